"""What is minimised. Today: token cross-entropy on the trained tokens, and the balance of routed experts.

One definition of the loss everywhere, training and evaluation: the sum of token losses divided by the number of trained
tokens, over the whole optimizer step (or file), whatever the micro-batches, gradient accumulation or ranks. So a batch
of 8 is 2 x 4 to rounding, and a short answer weighs by its tokens, never by its place in a batch. Where records or
messages have weights, both sums are weighted, as torch's own weighted cross-entropy is.

An objective is a function of (model, batch, totals, losses), as `supervised_loss`, and a row of `OBJECTIVES`.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from data import Batch
from distributed import all_reduce_sum
from kernels.cross_entropy import linear_cross_entropy
from model import Experts, Transformer


class StepTotals(NamedTuple):
    """What an optimizer step has in all its micro-batches, on all ranks.

    num_trained: trained tokens. loss_weight_sum: the sum of their weights, equal to num_trained where all weights are
    1. num_tokens: tokens without padding. replay_weight_sum: as loss_weight_sum, of replayed examples. stop_signal:
    the sum over ranks of the signals that ask for an end, which all have to hear of at the same step.
    """

    num_trained: float
    loss_weight_sum: float
    num_tokens: float
    replay_weight_sum: float = 0.0
    stop_signal: float = 0.0

    @classmethod
    def of(cls, batches: list[Batch], stop_signal: int = 0) -> "StepTotals":
        """Sums over this rank's micro-batches, then over all ranks."""
        columns = [
            [
                len(batch.targets),
                batch.loss_weight_sum,
                batch.num_tokens,
                batch.replay_weight_sum,
                0,
            ]
            for batch in batches
        ]
        columns[0][-1] = stop_signal
        sums = torch.tensor(columns, dtype=torch.float64).sum(0)
        return cls(*all_reduce_sum(sums).tolist())


class Losses:
    """A step's losses, summed over its micro-batches, as float32 scalars on the device, without gradients.

    loss: cross-entropy per trained token. replay_loss: the sum of the token losses of replayed examples. balance_loss:
    of routed experts; None where there are none.
    """

    def __init__(self, device: torch.device):
        self.loss, self.replay_loss = torch.zeros((), device=device), torch.zeros((), device=device)
        self.balance_loss: Tensor | None = None

    def add_balance(self, balance: Tensor) -> None:
        self.balance_loss = balance + (0 if self.balance_loss is None else self.balance_loss)

    def all_reduce(self) -> None:
        """Sums over all ranks."""
        has_balance = self.balance_loss is not None
        balance = self.balance_loss if has_balance else torch.zeros_like(self.loss)
        sums = all_reduce_sum(torch.stack([self.loss, self.replay_loss, balance]))
        self.loss, self.replay_loss = sums[0], sums[1]
        self.balance_loss = sums[2] if has_balance else None

    def extra(self, totals: StepTotals) -> dict[str, Tensor]:
        """What is reported beside the loss: {name in metrics.jsonl: value}."""
        values = {} if self.balance_loss is None else {"balance_loss": self.balance_loss}
        if totals.replay_weight_sum:
            values["replay_loss"] = self.replay_loss / totals.replay_weight_sum
        return values


def token_losses(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """The weighted sum of -log p(next token) over the batch's trained tokens, a float32 scalar, and each token's own,
    float32 [K], without a gradient. Logits exist for those rows only."""
    hidden = model.flat(batch.tokens, batch.documents)
    rows = hidden.index_select(0, batch.rows)
    head, softcap = model.head_weight(), model.config.logit_softcap
    return linear_cross_entropy(rows, head, batch.targets, softcap, batch.loss_weights)


def supervised_loss(model: Transformer, batch: Batch, totals: StepTotals, losses: Losses) -> Tensor:
    """A micro-batch's share of a step's loss, a float32 scalar whose gradients are to be accumulated: cross-entropy per
    trained token and, where experts are routed, the balance loss times the configuration's coefficient.

    totals: of the whole step. losses: to which this batch's part is added. A balance loss is a product of means, so it
    is not quite the same for another cut of the step into batches: each batch's weighs by its tokens.
    """
    routed = [block.mlp for block in model.blocks if isinstance(block.mlp, Experts)]
    for experts in routed:
        experts.load = None
    loss_sum, each = token_losses(model, batch)
    loss = loss_sum / totals.loss_weight_sum
    losses.loss += loss.detach()
    if batch.replay_weights is not None:
        losses.replay_loss += each @ batch.replay_weights
    loads = [experts.load for experts in routed]
    for experts in routed:
        experts.load = ()
    if not loads:
        return loss
    balance = balance_loss(loads) * (batch.num_tokens / totals.num_tokens)
    losses.add_balance(balance.detach())
    return loss + model.config.experts.balance * balance


def balance_loss(loads: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Fedus et al. 2021 (Switch Transformer), equations 4 to 6, over all routed layers together, as Mixtral trains.

    loads: of each layer, the share of the tokens that chose each expert and the mean probability of each, [E]. As many
    as are active for a token where all experts are used alike; more where they are not.
    """
    chosen, probability = (torch.stack(column).mean(0) for column in zip(*loads, strict=True))
    return len(chosen) * (chosen * probability).sum()


OBJECTIVES = {"supervised": supervised_loss}


@torch.no_grad()
def mean_loss(model: Transformer, batches: Iterable[Batch]) -> float:
    """Loss per trained token over all batches, of all ranks: independent of how they were cut."""
    losses, weights = [], []
    for batch in batches:
        losses.append(
            token_losses(model, batch)[0]
        )  # read when all are asked for: a GPU need not wait in between
        weights.append(batch.loss_weight_sum)
    sums = torch.tensor([sum(torch.stack(losses).tolist()), sum(weights)], dtype=torch.float64)
    loss, weight = all_reduce_sum(sums).tolist()
    return loss / weight
