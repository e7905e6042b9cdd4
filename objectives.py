"""What is minimised. Today: token cross-entropy on the trained tokens.

One definition of the loss everywhere, training and evaluation: the sum of token losses divided by the number of trained
tokens, over the whole optimizer step (or file), whatever the micro-batches, accumulation or processes. So a batch of 8
is 2 x 4 to rounding, and a short answer weighs by its tokens, never by its place in a batch.
"""

import torch
from torch import Tensor

from data import Batch
from kernels.linear_cross_entropy import linear_cross_entropy
from model import Transformer


def token_loss_sum(model: Transformer, batch: Batch) -> Tensor:
    """Sum of -log p(next token) over the batch's trained tokens, float32 scalar. Logits exist for those rows only."""
    hidden = model.flat(batch.tokens, batch.documents)
    rows = hidden.index_select(0, batch.rows)
    return linear_cross_entropy(rows, model.head_weight(), batch.targets, model.config.logit_softcap)


@torch.no_grad()
def mean_loss(model: Transformer, batches: list[Batch]) -> float:
    """Loss per trained token over all batches: independent of how they were cut."""
    total = sum(float(token_loss_sum(model, batch)) for batch in batches)
    return total / sum(len(batch.targets) for batch in batches)
