"""What is minimised. Today: token cross-entropy on the trained tokens, and the balance of routed experts.

One definition of the loss everywhere, training and evaluation: the sum of token losses divided by the number of trained
tokens, over the whole optimizer step (or file), whatever the micro-batches, accumulation or processes. So a batch of 8
is 2 x 4 to rounding, and a short answer weighs by its tokens, never by its place in a batch. Where records or turns
have weights, both sums are weighted, as torch's own weighted cross-entropy is.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from data import Batch
from distributed import total
from kernels.linear_cross_entropy import linear_cross_entropy
from model import Experts, Transformer


def token_loss_sum(model: Transformer, batch: Batch, apart: Tensor | None = None) -> Tensor:
    """Sum of -log p(next token), times its weight, over the batch's trained tokens, float32 scalar. Logits exist for
    those rows only. apart: a scalar to which the part of a replay is added."""
    hidden = model.flat(batch.tokens, batch.documents)
    rows = hidden.index_select(0, batch.rows)
    others = None if apart is None or batch.apart is None else (batch.apart, apart)
    head, softcap = model.head_weight(), model.config.logit_softcap
    return linear_cross_entropy(rows, head, batch.targets, softcap, batch.weights, others)


def training_loss(
    model: Transformer, batch: Batch, weight: float, tokens: int, apart: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A batch's share of a step's loss (cross-entropy a trained token), and, where experts are routed, of the step's
    balance loss, which is to be added with the configuration's weight; float32 scalars.

    weight, tokens: of all trained tokens of the whole step (their number where none is weighted), and the number of its
    tokens. A balance loss is a product of means, so it is not quite the same for another cut of the step into batches:
    each batch's weighs by its tokens.
    """
    routed = [block.mlp for block in model.blocks if isinstance(block.mlp, Experts)]
    for experts in routed:
        experts.load = None
    loss = token_loss_sum(model, batch, apart) / weight
    loads = [experts.load for experts in routed]
    for experts in routed:
        experts.load = ()
    return loss, balance_loss(loads) * (batch.counted / tokens) if loads else None


def balance_loss(loads: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Fedus et al. 2021 (Switch Transformer), equations 4 to 6, over all routed layers together, as Mixtral trains.

    loads: of each layer, the share of the tokens that chose each expert and the mean probability of each, [E]. As many
    as are active for a token where all experts are used alike; more where they are not.
    """
    chosen, probability = (torch.stack(column).mean(0) for column in zip(*loads, strict=True))
    return len(chosen) * (chosen * probability).sum()


@torch.no_grad()
def mean_loss(model: Transformer, batches: Iterable[Batch]) -> float:
    """Loss per trained token over all batches, of all processes: independent of how they were cut."""
    losses, weights = [], []
    for batch in batches:
        losses.append(token_loss_sum(model, batch))  # read when all are asked for: a GPU need not wait in between
        weights.append(batch.weight)
    sums = torch.tensor([sum(torch.stack(losses).tolist()), sum(weights)], dtype=torch.float64)
    loss, weight = total(sums).tolist()
    return loss / weight
