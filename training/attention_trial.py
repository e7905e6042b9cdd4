"""--attention flash3 or flash4: another version of FlashAttention, held against version 2 in one step first."""

import dataclasses
from collections.abc import Callable

from torch import Tensor

import distributed
from data import MicroBatches, collate
from kernels import flash_versions
from model import Transformer
from objectives import Losses, StepTotals


def use_flash_version(
    name: str, model: Transformer, objective: Callable[..., Tensor], loader: MicroBatches
) -> str:
    """Puts that version in place and returns a line about it. UserError where loss or gradients of the run's first
    micro-batch are not those of version 2."""
    trial = MicroBatches(
        loader.dataset, dataclasses.replace(loader.sampler), loader.device, loader.batch_size
    )
    trial.max_tokens, trial.seed, trial.dropout = loader.max_tokens, loader.seed, loader.dropout
    trial.rows_per_rank = loader.rows_per_rank
    batch = collate(trial.examples_of_step(0)[0], loader.device, distributed.context_parallel)
    totals = StepTotals(
        len(batch.targets), max(batch.loss_weight_sum, 1.0), max(batch.num_tokens, 1)
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()

    def step() -> list[Tensor]:
        loss = objective(model, batch, totals, Losses(loader.device))
        loss.backward()
        results = [loss, *(distributed.to_local(p.grad) for p in parameters if p.grad is not None)]
        for p in parameters:
            p.grad = None
        return results

    error = flash_versions.use(name, loader.device, step)
    return f"{name}: loss and gradients of a first step within {error:.1e} of FlashAttention 2's"
