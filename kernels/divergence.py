"""The divergence between two models' next tokens through their output heads, for distillation, so that no
tensor of [tokens, vocabulary] ever exists.

As in kernels/cross_entropy.py, each chunk computes its logits (here of both models), its part of the
loss and at once its part of the gradients, and lets the logits go; the backward only multiplies by the
factor that arrives. The teacher has no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cross_entropy import LOGITS_BYTES


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    reverse: bool = False,
    softcaps: tuple[float | None, float | None] = (None, None),
    loss_weights: Tensor | None = None,
    trained_rows: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the divergence of each token's next one: with t = softmax of the teacher's logits and s of the
    student's, KL(t || s) = sum t log(t / s) (Hinton et al. 2015, arXiv 1503.02531), or with `reverse`
    KL(s || t) = sum s log(s / t) (Gu et al. 2023, arXiv 2306.08543).

    hidden: [tokens, D]. weight: [V, D], cast to hidden's dtype for the products.
    teacher_hidden: [tokens, E]. teacher_weight: [V, E]. One of the two may have more rows than the other:
        tables are padded to round numbers, and ids that only one model has are no tokens.
    softcaps: of student and teacher, logits become softcap * tanh(logits / softcap) first.
    loss_weights: float32 [tokens], without a gradient; None if all are 1.
    trained_rows: as in `linear_cross_entropy`.

    Returns the weighted sum, a float32 scalar with gradients, and each token's own, float32 [tokens],
    without a weight or a gradient.
    """
    if not torch.is_grad_enabled():
        hidden = hidden.detach()
        weight = weight.detach()
        trained_rows = None
    ids, rows = trained_rows or (None, None)
    return LinearDivergence.apply(
        hidden,
        weight,
        teacher_hidden.detach(),
        teacher_weight.detach(),
        reverse,
        softcaps,
        loss_weights,
        ids,
        rows,
    )


class LinearDivergence(torch.autograd.Function):
    """`linear_divergence`; its forward computes the gradients up to a factor."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        reverse,
        softcaps,
        loss_weights,
        ids,
        rows,
    ):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        need_rows = ctx.needs_input_grad[8]
        ctx.is_of_rows = need_rows
        ctx.weight_dtype = rows.dtype if need_rows else weight.dtype
        head = weight.to(hidden.dtype)
        teacher_head = teacher_weight.to(teacher_hidden.dtype)
        common = min(len(head), len(teacher_head))
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        if need_weight or need_rows:
            num_rows = len(ids) if need_rows else len(head)
            grad_weight = head.new_zeros(num_rows, head.shape[1], dtype=torch.float32)
        budget = LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES["cuda"])
        # Log-probabilities of both are in float32.
        at_once = max(1, budget // (common * 4))
        for start in range(0, len(hidden), at_once):
            part = slice(start, start + at_once)
            chunk = hidden[part]
            student = log_softmax_of(chunk, head[:common], softcaps[0])
            teacher = log_softmax_of(teacher_hidden[part], teacher_head[:common], softcaps[1])
            losses[part], grad = divergence_and_gradient(student, teacher, reverse)
            if grad_hidden is None and grad_weight is None:
                continue
            if loss_weights is not None:
                grad.mul_(loss_weights[part, None])
            if softcaps[0]:
                # The derivative of softcap * tanh(x / softcap) is 1 - tanh(x / softcap)^2.
                capped = F.linear(chunk, head[:common]).float().div_(softcaps[0]).tanh_()
                grad.mul_(1 - capped.square_())
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head[:common], out=grad_hidden[part])
            if grad_weight is not None and need_rows:
                # A row beyond what both have is no token of this loss.
                known = ids < common
                of_rows = grad.index_select(1, ids.clamp(max=common - 1)) * known
                grad_weight += of_rows.t() @ chunk
            elif grad_weight is not None:
                grad_weight[:common] += grad.t() @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        total = losses.sum() if loss_weights is None else losses @ loss_weights
        return total, losses

    @staticmethod
    def backward(ctx, factor, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * factor).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(factor).to(ctx.weight_dtype)
        grad_rows = grad_weight if ctx.is_of_rows else None
        of_weight = None if ctx.is_of_rows else grad_weight
        return grad_hidden, of_weight, None, None, None, None, None, None, grad_rows


def log_softmax_of(hidden: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    """Returns the log-probabilities of the next token, float32 [tokens, V]."""
    logits = F.linear(hidden, head)
    if softcap:
        logits = softcap * logits.float().div_(softcap).tanh_()
    return logits.log_softmax(-1, dtype=torch.float32)


def divergence_and_gradient(
    student: Tensor, teacher: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Returns the divergence of each token, float32 [tokens], and its gradient with respect to the
    student's logits, [tokens, V]. student, teacher: log-probabilities, float32 [tokens, V]."""
    if not reverse:
        # sum t (log t - log s); its gradient is s - t.
        probs = teacher.exp()
        losses = (probs * (teacher - student)).sum(-1)
        return losses, student.exp().sub_(probs)
    # sum s (log s - log t); its gradient is s (log s - log t - the loss).
    probs = student.exp()
    differences = student - teacher
    losses = (probs * differences).sum(-1)
    return losses, differences.sub_(losses[:, None]).mul_(probs)
