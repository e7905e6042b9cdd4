"""The loss on examples that are not trained on, over all ranks, which a signal ends at once."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

import distributed
from common.progress import progress
from data import Batch, batches_by_length
from dataset.examples import Dataset
from kernels.attention import Documents
from model import Transformer, eval_mode
from objectives import mean_loss
from training.signals import GracefulStop, ValidationInterrupted

VALIDATION_BATCH = 8  # examples


def validation_loss(
    model: Transformer,
    val: Dataset,
    device: torch.device,
    max_tokens: int | None = None,
    stop: GracefulStop | None = None,
    sums: list[Tensor] | None = None,
) -> float:
    """Returns the loss per trained token, over all ranks.

    max_tokens: the most of a batch.
    sums: gets those of each of this rank's batches by examples (see `sums_of_examples`); nothing where
        ranks share a batch.
    Raises ValidationInterrupted on all ranks soon after a signal has reached one.
    """
    batches = batches_by_length(
        val,
        VALIDATION_BATCH,
        device,
        distributed.dp_size(),
        distributed.dp_rank(),
        distributed.context_parallel,
        max_tokens,
    )

    def take(batch: Batch, token_loss: Tensor) -> None:
        if sums is not None and isinstance(batch.documents, Documents):
            sums.append(sums_of_examples(batch, batch.documents, token_loss))

    with eval_mode(model):
        try:
            loss = mean_loss(model, until_signal(batches, val.tokens, stop), take)
        finally:
            if distributed.has_shards(model):
                # What is around the blocks stays gathered for a backward, which does not come here.
                model.reshard()
    return loss


def sums_of_examples(batch: Batch, documents: Documents, token_loss: Tensor) -> Tensor:
    """Returns the weighted sum of the token losses of each example of a batch, and the sum of their
    weights: float32 [2, examples]. token_loss: float32 [K]."""
    ends = documents.cu_seqlens[1:].long()
    numbers = torch.bucketize(batch.logit_positions, ends, right=True)  # [K]
    weights = batch.loss_weights
    if weights is None:
        weights = torch.ones_like(token_loss)
    sums = torch.zeros(2, len(documents.lengths), device=token_loss.device)
    return sums.index_add_(1, numbers, torch.stack([token_loss * weights, weights]))


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
