"""The loss on examples that are not trained on, over all ranks, which a signal ends at once."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

import distributed
from common.progress import progress
from data import Batch, batches_by_length
from dataset.encoding import AS_PROMPTS
from dataset.examples import Dataset
from model import Transformer, eval_mode
from objectives import RunObjective, SupervisedRun
from training.signals import GracefulStop, ValidationInterrupted

VALIDATION_BATCH = 8  # examples
# Prompts that are answered take more at a time: a step of decoding hardly takes longer with more of them.
ANSWERED_AT_ONCE = 32


def validation_loss(
    model: Transformer,
    val: Dataset,
    device: torch.device,
    max_tokens: int | None = None,
    stop: GracefulStop | None = None,
    sums: list[Tensor] | None = None,
) -> float:
    """Returns the cross-entropy per trained token, over all ranks: see `validate`."""
    return validate(SupervisedRun(None), model, val, device, max_tokens, stop, sums)["loss"]


def validate(
    objective: RunObjective,
    model: Transformer,
    val: Dataset,
    device: torch.device,
    max_tokens: int | None = None,
    stop: GracefulStop | None = None,
    sums: list[Tensor] | None = None,
) -> dict[str, float]:
    """Returns the loss of an objective, and what it reports beside it, over all ranks: {"loss": ...}.

    max_tokens: the most of a batch.
    sums: gets the weighted losses of each of this rank's batches by examples, and the weights, float32
        [2, examples]; nothing where ranks share a batch.
    Raises ValidationInterrupted on all ranks soon after a signal has reached one.
    """
    batches = batches_by_length(
        val,
        ANSWERED_AT_ONCE if val.kind == AS_PROMPTS else VALIDATION_BATCH,
        device,
        distributed.dp_size(),
        distributed.dp_rank(),
        distributed.context_parallel,
        max_tokens,
    )

    def take(sums_of_batch: Tensor) -> None:
        if sums is not None:
            sums.append(sums_of_batch)

    with eval_mode(model):
        try:
            return objective.validate(model, until_signal(batches, val.tokens, stop), take)
        finally:
            if distributed.has_shards(model):
                # What is around the blocks stays gathered for a backward, which does not come here.
                model.reshard()


def until_signal(
    batches: Iterable[Batch], num_tokens: int, stop: GracefulStop | None
) -> Iterator[Batch]:
    """Yields the batches of a validation, and shows its progress. num_tokens: of all ranks.

    Raises ValidationInterrupted, on all ranks at the same batch, once one has a signal.
    """
    bar = progress("validating", num_tokens, "token", shown=distributed.is_rank0())
    with bar:
        for batch in batches:
            if stop and not distributed.all_ranks_agree(not stop.signal):
                raise ValidationInterrupted
            yield batch
            bar.update(batch.num_tokens * distributed.world_size())
