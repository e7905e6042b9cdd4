"""LM head and cross-entropy in one, chunk by chunk, so that no tensor of [tokens, vocabulary] ever exists.

The loss is a scalar, so its gradient is known in the forward up to one factor: each chunk computes its logits, its part
of the loss and at once its part of the gradients, and lets the logits go; the backward only multiplies by the factor
that arrives (as in Malek et al. 2024, Liger Kernel). Products run in the model's dtype; log-sum-exp, target logit, loss
and, where the head is trained, its gradient are summed in fp32: bf16 sums over chunks bend the loss curve.

`linear_cross_entropy_reference` is the same in three lines, with all logits: what tests compare with.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.triton_utils import tl, triton, use_triton

LOGITS_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}  # a chunk of logits; on CPU under glibc's 32 MB, past which every
SOFTMAX_ROWS = 32  # allocation faults in new pages; on CPU the fp32 softmax goes in slices that stay in the cache
BLOCK, WARPS = 2048, 8  # logits that a program of the kernel takes at a time
TILE = 128, 256  # of a product's result, which one multiprocessor makes at a time
ALIGNED = 16  # numbers, of which rows of logits are a multiple on GPUs: 32 bytes in bf16


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    loss_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of tokens through the output head: -log softmax(hidden @ weight.T)[target].

    hidden: [tokens, D], any float dtype, trained rows only. weight: [V, D], cast to hidden's dtype for the products.
    targets: int64 [tokens]. softcap: logits become softcap * tanh(logits / softcap) first (Gemma 2). loss_weights:
    float32 [tokens], without a gradient; None if all are 1. They are wanted here, and not when the losses are summed,
    because the head's gradient is made in the forward.

    Returns the weighted sum of the losses, a float32 scalar with gradients, to be divided by the sum of the weights;
    and each token's loss, float32 [tokens], without a weight or a gradient.
    """
    if not torch.is_grad_enabled():  # a Function is told only who requires gradients, not that nobody will ask
        hidden, weight = hidden.detach(), weight.detach()
    return LinearCrossEntropy.apply(hidden, weight, targets, softcap, loss_weights)


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, loss_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    logits = softcap * (logits / softcap).tanh() if softcap else logits
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses if loss_weights is None else losses * loss_weights).sum(), losses.detach()


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, loss_weights):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        head = weight.to(hidden.dtype)
        if use_triton(hidden):
            grads = need_hidden, need_weight
            loss, losses, *grads = forward_on_gpu(hidden, head, targets, softcap, loss_weights, *grads)
            ctx.save_for_backward(*grads)
            ctx.mark_non_differentiable(losses)
            return loss, losses
        loss = hidden.new_zeros((), dtype=torch.float32)
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        budget = LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES["cuda"])
        rows = max(1, budget // (head.shape[0] * head.element_size()))
        for start in range(0, hidden.shape[0], rows):
            chunk, target = hidden[start : start + rows], targets[start : start + rows]
            logits = F.linear(chunk, head)  # [rows, V]
            chunk_weights = None if loss_weights is None else loss_weights[start : start + rows]
            chunk_losses = losses[start : start + rows]
            softmax_minus_one_hot_(logits, target, chunk_losses, need_hidden or need_weight, softcap, chunk_weights)
            loss += chunk_losses.sum() if chunk_weights is None else chunk_losses @ chunk_weights
            if need_hidden:
                torch.mm(logits, head, out=grad_hidden[start : start + rows])
            if need_weight:
                grad_weight += logits.t() @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return loss, losses

    @staticmethod
    def backward(ctx, factor, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * factor).to(ctx.hidden_dtype)  # factor: fp32, one number
        if grad_weight is not None:  # in place, for it is the largest gradient of all
            grad_weight = grad_weight.mul_(factor).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def softmax_minus_one_hot_(
    logits: Tensor,
    target: Tensor,
    losses: Tensor,
    want_grad: bool,
    softcap: float | None,
    loss_weights: Tensor | None = None,
) -> None:
    """Turns logits [rows, V] into d loss / d logits in place (if wanted; times the row's weight) and writes the rows'
    losses to `losses`, fp32 [rows]."""
    slices = SOFTMAX_ROWS if logits.device.type == "cpu" else logits.shape[0]
    weights = [None] * len(target) if loss_weights is None else loss_weights[:, None].split(slices)
    for part, index, weight, loss in zip(logits.split(slices), target.split(slices), weights, losses.split(slices)):
        if softcap:
            capped = part.float().div_(softcap).tanh_()
        logprobs = (capped * softcap if softcap else part).log_softmax(-1, dtype=torch.float32)
        index = index[:, None]
        chosen = logprobs.gather(1, index)
        loss.copy_(chosen[:, 0]).neg_()
        if want_grad:
            grad = logprobs.exp_().scatter_(1, index, chosen.expm1())  # p - 1 of the target, without cancellation
            grad = grad if weight is None else grad.mul_(weight)
            part.copy_(grad.mul_(1 - capped.square_()) if softcap else grad)


def forward_on_gpu(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    softcap: float | None,
    loss_weights: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The loss, each token's, and the gradients of hidden and head that are needed. All chunks' logits share one buffer. Its rows are
    padded to addresses that are multiples of 32 bytes: a vocabulary such as 50,257 would allow neither cuBLAS nor the
    kernel to move more than a number at a time."""
    tokens, (vocabulary, size) = len(hidden), head.shape
    width = -(-vocabulary // ALIGNED) * ALIGNED
    rows = rows_of_chunks(tokens, vocabulary, size, head.element_size(), processors(hidden.device))
    buffer = hidden.new_empty(min(rows, tokens), width)
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_weight = torch.empty_like(head, dtype=torch.float32) if need_weight else None
    if need_weight and not tokens:
        grad_weight.zero_()
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        chunk, chunk_weights = hidden[part], None if loss_weights is None else loss_weights[part]
        logits = buffer[: len(chunk), :vocabulary]
        torch.mm(chunk, head.t(), out=logits)
        softmax_on_gpu(logits, targets[part], losses[part], need_hidden or need_weight, softcap, chunk_weights)
        if need_hidden:
            torch.mm(logits, head, out=grad_hidden[part])
        if need_weight:
            add_product(grad_weight, logits.t(), chunk, start == 0)
    loss = losses.sum() if loss_weights is None else losses @ loss_weights
    return loss, losses, grad_hidden, grad_weight


def rows_of_chunks(tokens: int, vocabulary: int, size: int, itemsize: int, processors: int) -> int:
    """How many tokens a chunk has, a multiple of a tile's rows: as many as LOGITS_BYTES allow, or down to half of
    that, where the tiles of the products with the head then fill the multiprocessors more often. 272 tiles on 132
    multiprocessors take as long as 396."""
    tile, across = TILE
    most = max(1, LOGITS_BYTES["cuda"] // (vocabulary * itemsize) // tile) * tile
    most = min(most, -(-tokens // tile) * tile)

    def waves(rows: int) -> int:  # times the length of the sums: of both products, as they take about equally long
        high = -(-rows // tile)
        logits, grads = (-(-high * -(-width // across) // processors) for width in (vocabulary, size))
        return logits * size + grads * vocabulary

    def duration(rows: int) -> int:
        chunks, rest = divmod(tokens, rows)
        return chunks * waves(rows) + waves(rest)

    return min(range(most, most // 2, -tile), key=duration, default=tile)


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, in total's fp32 whatever the dtype of a and b; the first product replaces what stands there."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.is_cuda:  # cuBLAS sums up in fp32 anyhow, and need not round to bf16
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def softmax_on_gpu(
    logits: Tensor, target: Tensor, losses: Tensor, want_grad: bool, softcap: float | None, loss_weights: Tensor | None
) -> None:
    """`softmax_minus_one_hot_` by a kernel, which writes the rows' losses to `losses`. Rows of logits may be padded:
    what lies between them is overwritten."""
    softmax_kernel[(len(logits),)](
        logits, target, losses, losses if loss_weights is None else loss_weights, logits.stride(0), logits.shape[1],
        softcap or 1.0, CAPPED=bool(softcap), GRAD=want_grad, WEIGHTED=loss_weights is not None, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def softmax_kernel(
    logits, target, losses, loss_weights, stride, vocabulary, softcap,
    CAPPED: tl.constexpr, GRAD: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a row, in two passes: the largest logit and the sum of exponentials as they go by (Milakov & Gimelshein
    2018), of each place in a block by itself, so that threads wait for each other only at the end; then the gradient in
    the logits' place. No fp32 copy of a row ever exists. A block is loaded while the one before it is computed."""
    row = tl.program_id(0).to(tl.int64)
    row_logits, wanted = logits + row * stride, tl.load(target + row)
    chosen = tl.load(row_logits + wanted).to(tl.float32)  # now: at the end a gradient stands there
    if CAPPED:
        chosen = softcap * tanh(chosen / softcap)
    most = tl.full([BLOCK], -1e38, tl.float32)  # below all logits, and finite: infinity less itself is no number
    total = tl.zeros([BLOCK], tl.float32)
    ahead = load_logits(row_logits, 0, stride, BLOCK)
    for start in range(0, vocabulary, BLOCK):
        x, ahead = ahead.to(tl.float32), load_logits(row_logits, start + BLOCK, stride, BLOCK)
        if CAPPED:
            x = softcap * tanh(x / softcap)
        x = tl.where(start + tl.arange(0, BLOCK) < vocabulary, x, float("-inf"))
        above = x - most
        power = tl.exp(-tl.abs(above))
        total = tl.where(above > 0, total * power + 1, total + power)
        most = tl.maximum(most, x)
    top = tl.max(most)
    total_of_row = tl.sum(total * tl.exp(most - top))
    tl.store(losses + row, top + tl.log(total_of_row) - chosen)
    if GRAD:
        factor, count = 1 / total_of_row, 1.0
        if WEIGHTED:
            count = tl.load(loss_weights + row)
        ahead = load_logits(row_logits, 0, stride, BLOCK)
        for start in range(0, vocabulary, BLOCK):
            x, ahead = ahead.to(tl.float32), load_logits(row_logits, start + BLOCK, stride, BLOCK)
            at, slope = start + tl.arange(0, BLOCK), count
            if CAPPED:
                bent = tanh(x / softcap)
                slope, x = count * (1 - bent * bent), softcap * bent
            grad = tl.exp(x - top) * factor
            grad = tl.where(at == wanted, grad - 1, grad)
            tl.store(row_logits + at, grad * slope, at < stride)


@triton.jit
def load_logits(row_logits, start, stride, BLOCK: tl.constexpr):
    """To the end of the padded row, so that 16 bytes have one mask."""
    at = start + tl.arange(0, BLOCK)
    return tl.load(row_logits + at, at < stride, 0.0)


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1
