"""--attention flash3 or flash4: another version of FlashAttention, compared with version 2 first.

The comparison is one forward and backward of the run's own model on its first micro-batch.
"""

from torch import Tensor

import distributed
from data import MicroBatches
from kernels import flash_versions
from model import Transformer
from objectives import Losses, RunObjective, StepTotals


def use_flash_version(
    name: str, model: Transformer, objective: RunObjective, loader: MicroBatches
) -> str:
    """Puts that version in place and returns a line about it.

    Raises UserError if loss or gradients of the run's first micro-batch are not those of version 2.
    """
    first_micro_batch = loader.from_here().examples_of_step(0)[0]
    batch = objective.trial_batch(loader.collate(first_micro_batch))
    # A rank may have no trained token of the batch, and the loss is divided by these.
    totals = StepTotals(
        num_trained=len(batch.targets),
        loss_weight_sum=max(batch.loss_weight_sum, 1.0),
        num_tokens=max(batch.num_tokens, 1),
        num_examples=max(batch.texts.weight_sum, 1.0) if batch.texts else 0.0,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()

    def step() -> list[Tensor]:
        """Returns the loss and this rank's rows of all gradients, and leaves no gradient behind."""
        loss = objective(model, batch, totals, Losses(loader.device))
        loss.backward()
        results = [loss]
        for p in parameters:
            if p.grad is not None:
                results.append(distributed.to_local(p.grad))
            p.grad = None
        return results

    error = flash_versions.use(name, loader.device, step)
    return f"{name}: loss and gradients of a first step within {error:.1e} of FlashAttention 2's"
