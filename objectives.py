"""What is minimised: token cross-entropy on the trained tokens, and the balance of routed experts.

One definition of the loss everywhere, training and evaluation: the sum of token losses divided by
the number of trained tokens, over the whole optimizer step (or file), whatever the micro-batches,
gradient accumulation or ranks. So a batch of 8 is 2 x 4 to rounding, and a short answer weighs by
its tokens, never by its place in a batch. Where records or messages have weights, both sums are
weighted, as torch's own weighted cross-entropy is.

An objective is a function of (model, batch, totals, losses), as `supervised_loss`, and a row of
`OBJECTIVES`.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from data import Batch
from distributed import all_reduce_sum
from kernels.cross_entropy import linear_cross_entropy
from model import Experts, Transformer


class StepTotals(NamedTuple):
    """What an optimizer step has in all its micro-batches, on all ranks.

    num_trained: trained tokens.
    loss_weight_sum: the sum of their weights, equal to num_trained where all weights are 1.
    num_tokens: tokens without padding.
    replay_weight_sum: as loss_weight_sum, of replayed examples.
    stop_signal: the sum over ranks of the signals that ask for an end, which all have to hear of at
    the same step.
    """

    num_trained: float
    loss_weight_sum: float
    num_tokens: float
    replay_weight_sum: float = 0.0
    stop_signal: float = 0.0

    @classmethod
    def of(cls, batches: list[Batch], stop_signal: int = 0) -> "StepTotals":
        """Sums over this rank's micro-batches, then over all ranks."""
        rows: list[list[float]] = []  # of each micro-batch, the fields in their order
        for batch in batches:
            num_trained = len(batch.targets)
            weights = [batch.loss_weight_sum, batch.num_tokens, batch.replay_weight_sum]
            rows.append([num_trained, *weights, 0])
        # The signal came to this rank, and not to each micro-batch.
        rows[0][-1] = stop_signal
        # In float64, so that counts are exact.
        sums = torch.tensor(rows, dtype=torch.float64).sum(0)
        return cls(*all_reduce_sum(sums).tolist())


class Losses:
    """A step's losses, summed over its micro-batches, as float32 scalars on the device, without
    gradients.

    loss: cross-entropy per trained token.
    replay_loss: the sum of the token losses of replayed examples.
    balance_loss: of routed experts; None where there are none.
    ewc_penalty: of --ewc (training/ewc.py), which is no part of `loss`; None without it.
    """

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), device=device)
        self.replay_loss = torch.zeros((), device=device)
        self.balance_loss: Tensor | None = None
        self.ewc_penalty: Tensor | None = None

    def add_balance(self, balance: Tensor) -> None:
        if self.balance_loss is None:
            self.balance_loss = balance
        else:
            self.balance_loss = balance + self.balance_loss

    def all_reduce(self) -> None:
        """Sums over all ranks."""
        # Without experts, a zero takes the place: there are always three numbers, in one message.
        balance = self.balance_loss
        if balance is None:
            balance = torch.zeros_like(self.loss)
        sums = all_reduce_sum(torch.stack([self.loss, self.replay_loss, balance]))
        self.loss = sums[0]
        self.replay_loss = sums[1]
        if self.balance_loss is not None:
            self.balance_loss = sums[2]

    def extra(self, totals: StepTotals) -> dict[str, Tensor]:
        """Returns what is reported beside the loss: {name in metrics.jsonl: value}."""
        values = {}
        if self.balance_loss is not None:
            values["balance_loss"] = self.balance_loss
        if totals.replay_weight_sum:
            values["replay_loss"] = self.replay_loss / totals.replay_weight_sum
        if self.ewc_penalty is not None:
            values["ewc_penalty"] = self.ewc_penalty
        return values


def token_losses(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the weighted sum of -log p(next token) over the batch's trained tokens, a float32
    scalar, and each token's own, float32 [K], without a gradient."""
    hidden = model.flat(batch.tokens, batch.documents)  # [N, D]
    # Logits exist only where the next token is trained: each takes as many numbers as the
    # vocabulary has ids.
    to_head = hidden.index_select(0, batch.logit_positions)  # [K, D]
    head = model.head_weight()
    softcap = model.config.logit_softcap
    rows = model.head_rows()
    return linear_cross_entropy(to_head, head, batch.targets, softcap, batch.loss_weights, rows)


def supervised_loss(model: Transformer, batch: Batch, totals: StepTotals, losses: Losses) -> Tensor:
    """Returns a micro-batch's share of a step's loss, a float32 scalar whose gradients are to be
    accumulated: cross-entropy per trained token and, where experts are routed, the balance loss
    times the configuration's coefficient.

    totals: of the whole step.
    losses: to which this batch's part is added.

    A balance loss is a product of means, so it is not quite the same for another cut of the step
    into batches: each batch's weighs by its tokens.
    """
    routed = [block.mlp for block in model.blocks if isinstance(block.mlp, Experts)]
    # None lets the forward leave a load, and () keeps a block that is computed again in the
    # backward from leaving another one.
    for experts in routed:
        experts.load = None
    loss_sum, token_loss = token_losses(model, batch)
    # By the step's weights, not the batch's: so the gradients of micro-batches only add up.
    loss = loss_sum / totals.loss_weight_sum
    losses.loss += loss.detach()
    if batch.replay_weights is not None:
        losses.replay_loss += token_loss @ batch.replay_weights
    if not routed:
        return loss

    loads = []
    for experts in routed:
        assert experts.load, "in training, the forward leaves each layer's load"
        loads.append(experts.load)
        experts.load = ()
    balance = balance_loss(loads) * (batch.num_tokens / totals.num_tokens)
    losses.add_balance(balance.detach())
    rules = model.config.experts
    assert rules is not None, "layers are routed only if the configuration has experts"
    return loss + rules.balance * balance


def balance_loss(loads: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns the balance loss of Fedus et al. 2021 (Switch Transformer), equations 4 to 6, over
    all routed layers together, as Mixtral trains.

    loads: of each layer, the fraction of the tokens that chose each expert and the mean probability
    of each, [E].

    It is as large as the number of experts that are active for a token where all experts are used
    alike; larger where they are not.
    """
    fractions, probabilities = zip(*loads, strict=True)
    chosen = torch.stack(fractions).mean(0)  # [E]
    probability = torch.stack(probabilities).mean(0)  # [E]
    return len(chosen) * (chosen * probability).sum()


OBJECTIVES = {"supervised": supervised_loss}


@torch.no_grad()
def mean_loss(
    model: Transformer,
    batches: Iterable[Batch],
    take: Callable[[Batch, Tensor], None] | None = None,
) -> float:
    """Returns the loss per trained token over all batches, of all ranks: independent of how they
    were cut.

    take: is given each batch with its tokens' losses, float32 [K].
    """
    losses = []
    weights = []
    for batch in batches:
        loss_sum, token_loss = token_losses(model, batch)
        if take is not None:
            take(batch, token_loss)
        losses.append(loss_sum)
        weights.append(batch.loss_weight_sum)
    # The losses are read when all are asked for: a GPU need not wait in between.
    total_loss = sum(torch.stack(losses).tolist())
    total_weight = sum(weights)
    sums = torch.tensor([total_loss, total_weight], dtype=torch.float64)
    loss, weight = all_reduce_sum(sums).tolist()
    return loss / weight
