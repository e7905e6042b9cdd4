"""LM head and cross-entropy in one, chunk by chunk, so that no tensor of [tokens, vocabulary] ever exists.

The loss is a scalar, so its gradient is known in the forward up to one factor: each chunk computes its logits, its part
of the loss and at once its part of the gradients, and lets the logits go; the backward only multiplies by the factor
that arrives (as in Malek et al. 2024, Liger Kernel). Products run in the model's dtype; log-sum-exp, target logit, loss
and, where the head is trained, its gradient are summed in fp32: bf16 sums over chunks bend the loss curve.

`linear_cross_entropy_reference` is the same in three lines, with all logits: what tests compare with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gpu import on_gpu, tl, triton

LOGITS_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}  # a chunk of logits; on CPU under glibc's 32 MB, past which every
SOFTMAX_ROWS = 32  # allocation faults in new pages; on CPU the fp32 softmax goes in slices that stay in the cache
BLOCK, WARPS = 4096, 8  # logits that a program of the kernel holds at a time; with 4 warps some of them spill


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    counts: Tensor | None = None,
    others: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], each times its count.

    hidden: [tokens, D], any float dtype, trained rows only. weight: [V, D], cast to hidden's dtype for the products.
    targets: int64 [tokens]. softcap: logits become softcap * tanh(logits / softcap) first (Gemma 2). counts: float32
    [tokens], without a gradient; None where all are 1. others: other counts, and a float32 scalar to which the sum with
    these is added, without a gradient. Returns a float32 scalar; divide by the sum of the counts afterwards.
    """
    if not torch.is_grad_enabled():  # a Function is told only who requires gradients, not that nobody will ask
        hidden, weight = hidden.detach(), weight.detach()
    return LinearCrossEntropy.apply(hidden, weight, targets, softcap, counts, others)


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, counts: Tensor | None = None
) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    logits = softcap * (logits / softcap).tanh() if softcap else logits
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses if counts is None else losses * counts).sum()


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, counts, others):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        head = weight.to(hidden.dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        budget = LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES["cuda"])
        rows = max(1, budget // (head.shape[0] * head.element_size()))
        for start in range(0, hidden.shape[0], rows):
            chunk, target = hidden[start : start + rows], targets[start : start + rows]
            logits = F.linear(chunk, head)  # [rows, V]
            count = None if counts is None else counts[start : start + rows]
            losses = softmax_minus_one_hot_(logits, target, need_hidden or need_weight, softcap, count)
            loss += losses.sum() if count is None else losses @ count
            if others is not None:
                others[1].add_(losses @ others[0][start : start + rows])
            if need_hidden:
                torch.mm(logits, head, out=grad_hidden[start : start + rows])
            if need_weight:
                grad_weight += logits.t() @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx, factor):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * factor).to(ctx.hidden_dtype)  # factor: fp32, one number
        if grad_weight is not None:  # in place, for it is the largest gradient of all
            grad_weight = grad_weight.mul_(factor).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def softmax_minus_one_hot_(
    logits: Tensor, target: Tensor, want_grad: bool, softcap: float | None, counts: Tensor | None = None
) -> Tensor:
    """Turns logits [rows, V] into d loss / d logits in place (if wanted; times the row's count) and returns the rows'
    losses, fp32 [rows]."""
    if on_gpu(logits):
        losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
        softmax_kernel[(logits.shape[0],)](
            logits,
            target,
            losses,
            logits.shape[1],
            softcap or 1.0,
            CAPPED=bool(softcap),
            GRAD=want_grad,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        if counts is not None and want_grad:
            logits *= counts[:, None].to(logits.dtype)
        return losses
    slices = SOFTMAX_ROWS if logits.device.type == "cpu" else logits.shape[0]
    losses = logits.new_empty(len(target), dtype=torch.float32)
    counts = [None] * len(target) if counts is None else counts[:, None].split(slices)
    for part, index, count, loss in zip(logits.split(slices), target.split(slices), counts, losses.split(slices)):
        if softcap:
            capped = part.float().div_(softcap).tanh_()
        logprobs = (capped * softcap if softcap else part).log_softmax(-1, dtype=torch.float32)
        index = index[:, None]
        chosen = logprobs.gather(1, index)
        loss.copy_(chosen[:, 0]).neg_()
        if want_grad:
            grad = logprobs.exp_().scatter_(1, index, chosen.expm1())  # p - 1 of the target, without cancellation
            grad = grad if count is None else grad.mul_(count)
            part.copy_(grad.mul_(1 - capped.square_()) if softcap else grad)
    return losses


@triton.jit
def softmax_kernel(
    logits, target, losses, vocabulary, softcap, CAPPED: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr
):
    """A program a row, in two passes: the largest logit and the sum of exponentials as they go by (Milakov & Gimelshein
    2018), then the gradient in the logits' place. No fp32 copy of a row ever exists."""
    row = tl.program_id(0).to(tl.int64)
    row_logits, wanted = logits + row * vocabulary, tl.load(target + row)
    chosen = tl.load(row_logits + wanted).to(tl.float32)  # now: at the end a gradient stands there
    if CAPPED:
        chosen = softcap * tanh(chosen / softcap)
    most, total = float("-inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row_logits + at, at < vocabulary, float("-inf")).to(tl.float32)
        if CAPPED:
            x = tl.where(at < vocabulary, softcap * tanh(x / softcap), float("-inf"))
        higher = tl.maximum(most, tl.max(x))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher))
        most = higher
    tl.store(losses + row, most + tl.log(total) - chosen)
    if GRAD:
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(row_logits + at, at < vocabulary, float("-inf")).to(tl.float32)
            slope = 1.0
            if CAPPED:
                bent = tanh(x / softcap)
                slope, x = 1 - bent * bent, softcap * bent
            grad = tl.exp(x - most) / total
            grad = tl.where(at == wanted, grad - 1, grad)
            tl.store(row_logits + at, grad * slope, at < vocabulary)


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1
