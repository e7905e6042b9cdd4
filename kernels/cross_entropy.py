"""LM head and cross-entropy in one, so that no tensor of [tokens, vocabulary] ever exists.

The loss is a scalar, so its gradient is known in the forward up to one factor: each chunk computes
its logits, its part of the loss and at once its part of the gradients, and lets the logits go; the
backward only multiplies by the factor that arrives (as in Malek et al. 2024, Liger Kernel).
Products run in the model's dtype; log-sum-exp, target logit, loss and, where the head is trained,
its gradient are summed in fp32: bf16 sums over chunks bend the loss curve.

Where the weights of tokens follow from their losses, nothing is known in the forward:
`linear_token_losses` computes the logits once more in the backward.

`linear_cross_entropy_reference` is the same in three lines, with all logits: what tests compare
with.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.triton_utils import tl, triton, use_triton

# The size of a chunk of logits. On CPUs it stays under glibc's 32 MB, above which every allocation
# faults in new pages.
LOGITS_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}
# On CPUs the fp32 softmax takes so many rows at a time, which stay in the cache.
SOFTMAX_ROWS = 32
# Logits that a program of softmax_kernel takes at a time.
LOGITS_PER_BLOCK = 2048
LOGITS_WARPS = 8
# Rows and columns of a product that one multiprocessor computes at a time.
PRODUCT_TILE = 128, 256
# On GPUs, rows of logits are padded to a multiple of 16 numbers: 32 bytes in bf16.
ALIGNED = 16


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    loss_weights: Tensor | None = None,
    trained_rows: tuple[Tensor, Tensor] | None = None,
    smoothing: float = 0.0,
    by_confidence: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the cross-entropy through the output head: -log softmax(hidden @ weight.T)[target].

    hidden: [tokens, D], any float dtype; the rows of trained tokens only.
    weight: [V, D], cast to hidden's dtype for the products.
    targets: int64 [tokens].
    softcap: logits become softcap * tanh(logits / softcap) first (Gemma 2).
    loss_weights: float32 [tokens], without a gradient; None if all are 1. They are an argument
        here, and not applied when the losses are summed, because the head's gradient is computed in
        the forward.
    trained_rows: where only some rows of the weight are trained: their ids, int64 [R], each once, and
        the rows, [R, D], which stand in the weight already. The gradient goes to these.
    smoothing: epsilon of label smoothing (Szegedy et al. 2016, section 7), from 0 to 1: a token's
        loss is (1 - epsilon) times -log p(target), plus epsilon times the mean of -log p over the
        vocabulary.
    by_confidence: a token's loss is -p(target) log p(target), where p(target) counts as a constant:
        the loss of dynamic fine-tuning, DFT (Wu et al. 2025, arXiv 2508.05629). No smoothing then.

    Returns the weighted sum of the losses, a float32 scalar with gradients, to be divided by the
    sum of the weights; and each token's loss, float32 [tokens], without a weight or a gradient.
    Both are of the loss that is asked for.
    """
    # With smoothed targets there is no one p(target) to weigh by, and no paper that does it.
    assert not (smoothing and by_confidence), "smoothing and by_confidence exclude each other"
    # A Function is told which inputs require gradients, but not that autograd is off: detaching
    # tells it.
    if not torch.is_grad_enabled():
        hidden = hidden.detach()
        weight = weight.detach()
        trained_rows = None
    ids, rows = trained_rows or (None, None)
    return LinearCrossEntropy.apply(
        hidden, weight, targets, softcap, loss_weights, ids, rows, smoothing, by_confidence
    )


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    loss_weights: Tensor | None = None,
    trained_rows: tuple[Tensor, Tensor] | None = None,
    smoothing: float = 0.0,
    by_confidence: bool = False,
) -> tuple[Tensor, Tensor]:
    if trained_rows is not None:
        ids, rows = trained_rows
        weight = weight.index_copy(0, ids, rows.to(weight.dtype))
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    if by_confidence:
        losses = losses * (-losses.detach()).exp()
    weighted = losses if loss_weights is None else losses * loss_weights
    return weighted.sum(), losses.detach()


def linear_token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    trained_rows: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Returns each token's -log softmax(hidden @ weight.T)[target], float32 [tokens], with gradients.

    For losses that weigh tokens once all are known, as those of preferences do. It costs one more
    product than `linear_cross_entropy`, since the backward computes the logits again. Until then
    nothing is kept but the arguments, which are those of `linear_cross_entropy`. There may be no
    tokens.
    """
    ids, rows = trained_rows or (None, None)
    return LinearTokenLosses.apply(hidden, weight, targets, softcap, ids, rows)


class LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy`; its forward computes the gradients up to a factor."""

    @staticmethod
    def forward(
        ctx, hidden, weight, targets, softcap, loss_weights, ids, rows, smoothing, by_confidence
    ):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        need_rows = ctx.needs_input_grad[6]
        needs = need_hidden, need_weight, need_rows
        ctx.hidden_dtype = hidden.dtype
        ctx.weight_dtype = rows.dtype if need_rows else weight.dtype
        ctx.is_of_rows = need_rows
        loss, losses, grad_hidden, grad_weight = losses_and_gradients(
            hidden, weight, targets, softcap, loss_weights, needs, ids, smoothing, by_confidence
        )
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return loss, losses

    @staticmethod
    def backward(ctx, factor, _):
        # factor: a scalar in fp32, the gradient of the loss.
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * factor).to(ctx.hidden_dtype)
        # In place, since the head's gradient is the largest of all gradients.
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(factor).to(ctx.weight_dtype)
        if ctx.is_of_rows:
            return grad_hidden, None, None, None, None, None, grad_weight, None, None
        return grad_hidden, grad_weight, None, None, None, None, None, None, None


class LinearTokenLosses(torch.autograd.Function):
    """`linear_token_losses`; its backward computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, ids, rows):
        needs = False, False, False
        _, losses, _, _ = losses_and_gradients(hidden, weight, targets, softcap, None, needs, ids)
        ctx.save_for_backward(hidden, weight, targets, ids)
        ctx.softcap = softcap
        ctx.rows_dtype = None if rows is None else rows.dtype
        return losses

    @staticmethod
    def backward(ctx, grad_losses):  # fp32 [tokens]
        hidden, weight, targets, ids = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        need_rows = ctx.needs_input_grad[5]
        needs = need_hidden, need_weight, need_rows
        # The gradient of a plain sum is one number that stands for all, which no kernel can read.
        loss_weights = grad_losses.contiguous()
        _, _, grad_hidden, grad_weight = losses_and_gradients(
            hidden, weight, targets, ctx.softcap, loss_weights, needs, ids
        )
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.rows_dtype if need_rows else weight.dtype)
        if need_rows:
            return grad_hidden, None, None, None, None, grad_weight
        return grad_hidden, grad_weight, None, None, None, None


def losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None,
    loss_weights: Tensor | None,
    needs: tuple[bool, bool, bool],
    ids: Tensor | None,
    smoothing: float = 0.0,
    by_confidence: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns what `forward_in_pytorch` does; on a GPU `forward_on_gpu` computes it.

    weight: [V, D], in any float dtype.
    needs: whether hidden, weight and the rows `ids` of it need a gradient. Where the rows do, that of
        the weight is theirs alone, [R, D].

    The other arguments are those of `linear_cross_entropy`.
    """
    need_hidden, need_weight, need_rows = needs
    head = weight.to(hidden.dtype)
    compute = forward_on_gpu if use_triton(hidden) else forward_in_pytorch
    return compute(
        hidden,
        head,
        targets,
        softcap,
        loss_weights,
        need_hidden,
        need_weight or need_rows,
        ids if need_rows else None,
        smoothing,
        by_confidence,
    )


# ---- plain PyTorch ----


def forward_in_pytorch(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    softcap: float | None,
    loss_weights: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    wanted: Tensor | None = None,
    smoothing: float = 0.0,
    by_confidence: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns the loss, each token's loss, and the gradients of hidden and head.

    need_hidden, need_weight: a gradient that is not needed is None. That of hidden is [tokens, D]
        in hidden's dtype, that of the head float32 [V, D].
    wanted: int64 [R], the rows of the head whose gradient is returned, float32 [R, D]; None: all.

    The other arguments and values are those of `linear_cross_entropy`; head is its weight in
    hidden's dtype.
    """
    loss = hidden.new_zeros((), dtype=torch.float32)
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_weight = None
    if need_weight:
        trained = head.shape[0] if wanted is None else len(wanted)
        grad_weight = head.new_zeros(trained, head.shape[1], dtype=torch.float32)
    budget = LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES["cuda"])
    bytes_per_row = head.shape[0] * head.element_size()
    rows = max(1, budget // bytes_per_row)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        chunk = hidden[part]
        chunk_losses = losses[part]
        chunk_weights = None if loss_weights is None else loss_weights[part]
        logits = F.linear(chunk, head)  # [rows, V]
        softmax_minus_one_hot_(
            logits,
            targets[part],
            chunk_losses,
            need_hidden or need_weight,
            softcap,
            chunk_weights,
            smoothing,
            by_confidence,
        )
        # From here on `logits` holds the gradient of the logits.
        if chunk_weights is None:
            loss += chunk_losses.sum()
        else:
            loss += chunk_losses @ chunk_weights
        if grad_hidden is not None:
            torch.mm(logits, head, out=grad_hidden[part])
        if grad_weight is not None:
            of_rows = logits if wanted is None else logits.index_select(1, wanted)
            grad_weight += of_rows.t() @ chunk
    return loss, losses, grad_hidden, grad_weight


def softmax_minus_one_hot_(
    logits: Tensor,
    target: Tensor,
    losses: Tensor,
    want_grad: bool,
    softcap: float | None,
    loss_weights: Tensor | None = None,
    smoothing: float = 0.0,
    by_confidence: bool = False,
) -> None:
    """Replaces logits [rows, V] by the gradient of the loss, and writes the losses of the rows.

    target: int64 [rows].
    losses: float32 [rows].
    want_grad: whether the gradient is needed; without it logits stay as they are.
    softcap, smoothing, by_confidence: as in `linear_cross_entropy`.
    loss_weights: float32 [rows]; each row's gradient is multiplied by it, its loss is not.
    """
    rows_at_a_time = SOFTMAX_ROWS if logits.device.type == "cpu" else logits.shape[0]
    parts = logits.split(rows_at_a_time)
    targets_of_parts = target.split(rows_at_a_time)
    losses_of_parts = losses.split(rows_at_a_time)
    weights_of_parts: Sequence[Tensor | None] = [None] * len(parts)
    if loss_weights is not None:
        weights_of_parts = loss_weights[:, None].split(rows_at_a_time)
    for part, index, weight, loss in zip(
        parts, targets_of_parts, weights_of_parts, losses_of_parts, strict=True
    ):
        if softcap:
            capped = part.float().div_(softcap).tanh_()
            logprobs = (capped * softcap).log_softmax(-1, dtype=torch.float32)
        else:
            logprobs = part.log_softmax(-1, dtype=torch.float32)
        index = index[:, None]  # [rows, 1]
        chosen = logprobs.gather(1, index)  # [rows, 1]
        loss.copy_(chosen[:, 0]).neg_()
        if smoothing:
            # Neither of the two terms is negative, so nothing cancels.
            loss.mul_(1 - smoothing).sub_(logprobs.mean(-1), alpha=smoothing)
        if by_confidence:
            confidence = chosen.exp()  # [rows, 1]
            loss.mul_(confidence[:, 0])
        if not want_grad:
            continue
        # The target's gradient is p - 1: expm1 computes it without cancellation.
        at_target = chosen.expm1()
        if smoothing:
            at_target.add_(smoothing)
        grad = logprobs.exp_().scatter_(1, index, at_target)
        if smoothing:
            grad.sub_(smoothing / grad.shape[1])
        if by_confidence:
            grad.mul_(confidence)
        if weight is not None:
            grad.mul_(weight)
        # The derivative of softcap * tanh(x / softcap) is 1 - tanh(x / softcap)^2.
        if softcap:
            grad.mul_(1 - capped.square_())
        part.copy_(grad)


# ---- GPUs ----


def forward_on_gpu(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    softcap: float | None,
    loss_weights: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    wanted: Tensor | None = None,
    smoothing: float = 0.0,
    by_confidence: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Computes what `forward_in_pytorch` does, with softmax_kernel.

    The logits of all chunks share one buffer, whose rows start at multiples of 32 bytes: with a
    vocabulary such as 50,257 and no padding, neither cuBLAS nor the kernel could move more than one
    number at a time.
    """
    tokens = len(hidden)
    vocabulary, size = head.shape
    width = -(-vocabulary // ALIGNED) * ALIGNED
    rows = rows_of_chunks(tokens, vocabulary, size, head.element_size(), processors(hidden.device))
    buffer = hidden.new_empty(min(rows, tokens), width)
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_weight = None
    if need_weight:
        trained = vocabulary if wanted is None else len(wanted)
        grad_weight = head.new_empty(trained, size, dtype=torch.float32)
    # The first product fills the gradient of the head. Without tokens there is none.
    if grad_weight is not None and not tokens:
        grad_weight.zero_()
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        chunk = hidden[part]
        chunk_weights = None if loss_weights is None else loss_weights[part]
        logits = buffer[: len(chunk), :vocabulary]  # [rows, V]
        torch.mm(chunk, head.t(), out=logits)
        softmax_on_gpu(
            logits,
            targets[part],
            losses[part],
            need_hidden or need_weight,
            softcap,
            chunk_weights,
            smoothing,
            by_confidence,
        )
        # From here on `logits` holds the gradient of the logits.
        if grad_hidden is not None:
            torch.mm(logits, head, out=grad_hidden[part])
        if grad_weight is not None:
            of_rows = logits if wanted is None else logits.index_select(1, wanted)
            add_product(grad_weight, of_rows.t(), chunk, start == 0)
    loss = losses.sum() if loss_weights is None else losses @ loss_weights
    return loss, losses, grad_hidden, grad_weight


def rows_of_chunks(tokens: int, vocabulary: int, size: int, itemsize: int, processors: int) -> int:
    """Returns the number of tokens of a chunk, a multiple of a tile's rows.

    It is as many as LOGITS_BYTES allow, or down to half of that where the tiles of the two products
    with the head then fill the multiprocessors more evenly: on 132 multiprocessors, 272 tiles take
    as long as 396.

    tokens, vocabulary, size: the sizes of hidden [tokens, size] and of the head [vocabulary, size].
    itemsize: bytes of a logit.
    processors: multiprocessors of the GPU.
    """
    tile_rows, tile_columns = PRODUCT_TILE
    tiles_in_budget = LOGITS_BYTES["cuda"] // (vocabulary * itemsize) // tile_rows
    tiles_of_tokens = -(-tokens // tile_rows)
    most = min(max(1, tiles_in_budget), tiles_of_tokens) * tile_rows

    def chunk_duration(rows: int) -> int:
        """Returns the time of both products, for the logits and for the gradient.

        It is the rounds of tiles times the length of the sums that a tile computes.
        """
        tiles_high = -(-rows // tile_rows)
        rounds = []
        for width in (vocabulary, size):
            tiles = tiles_high * -(-width // tile_columns)
            rounds.append(-(-tiles // processors))
        return rounds[0] * size + rounds[1] * vocabulary

    def duration(rows: int) -> int:
        chunks, rest = divmod(tokens, rows)
        return chunks * chunk_duration(rows) + chunk_duration(rest)

    # Largest first: of equally fast ones min() takes the first.
    candidates = range(most, most // 2, -tile_rows)
    return min(candidates, key=duration, default=tile_rows)


@cache
def processors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a GPU, 1 for another device."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Adds a @ b to total, which is fp32 whatever the dtype of a and b.

    first: the product replaces total instead.
    """
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.is_cuda:
        # cuBLAS sums in fp32 in any case and can return the sum without rounding it to bf16.
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def softmax_on_gpu(
    logits: Tensor,
    target: Tensor,
    losses: Tensor,
    want_grad: bool,
    softcap: float | None,
    loss_weights: Tensor | None,
    smoothing: float = 0.0,
    by_confidence: bool = False,
) -> None:
    """Does what `softmax_minus_one_hot_` does, by one launch of softmax_kernel.

    logits: [rows, V], a view of padded rows or not; the padding is overwritten.
    """
    # A pointer has to be there; without weights the kernel does not read it.
    weights_or_any = losses if loss_weights is None else loss_weights
    rows, vocabulary = logits.shape
    softmax_kernel[(rows,)](
        logits, target, losses, weights_or_any, logits.stride(0), vocabulary, softcap or 1.0,
        CAPPED=bool(softcap), GRAD=want_grad, WEIGHTED=loss_weights is not None,
        SMOOTHING=smoothing, BY_CONFIDENCE=by_confidence,
        BLOCK=LOGITS_PER_BLOCK, num_warps=LOGITS_WARPS,
    )  # fmt: skip


@triton.jit
def softmax_kernel(
    logits, target, losses, loss_weights, stride, vocabulary, softcap,
    CAPPED: tl.constexpr, GRAD: tl.constexpr, WEIGHTED: tl.constexpr,
    SMOOTHING: tl.constexpr, BY_CONFIDENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes one row a program, in two passes over its logits.

    The first pass computes the largest logit and the sum of exponentials together (Milakov &
    Gimelshein 2018), for each place in a block by itself, so that threads wait for each other only
    at the end. The second writes the gradient in the place of the logits. No fp32 copy of a row
    ever exists. A block is loaded while the one before it is computed.

    stride: numbers from one row to the next, padding included.
    SMOOTHING: a constant, so that a kernel without it is not one instruction longer.
    """
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * stride
    wanted = tl.load(target + row)
    # The target's logit is read now: the gradient replaces it later.
    chosen = tl.load(row_logits + wanted).to(tl.float32)
    if CAPPED:
        chosen = softcap * tanh(chosen / softcap)
    # -1e38 lies below all logits and is finite: infinity minus infinity would be NaN.
    most = tl.full([BLOCK], -1e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    # How far the target's logit lies above the others, in sum: the mean of -log p over the
    # vocabulary is -log p of the target plus the mean of these.
    above_others = tl.zeros([BLOCK], tl.float32)
    ahead = load_logits(row_logits, 0, stride, BLOCK)
    for start in range(0, vocabulary, BLOCK):
        x = ahead.to(tl.float32)
        ahead = load_logits(row_logits, start + BLOCK, stride, BLOCK)
        if CAPPED:
            x = softcap * tanh(x / softcap)
        inside = start + tl.arange(0, BLOCK) < vocabulary
        if SMOOTHING > 0:
            above_others += tl.where(inside, chosen - x, 0.0)
        x = tl.where(inside, x, float("-inf"))
        # The sum is relative to the largest logit. A larger one scales what was summed before;
        # either way one exponential is enough.
        above = x - most
        power = tl.exp(-tl.abs(above))
        total = tl.where(above > 0, total * power + 1, total + power)
        most = tl.maximum(most, x)
    # The places of the block meet: their sums are relative to different largest logits.
    top = tl.max(most)
    total_of_row = tl.sum(total * tl.exp(most - top))
    loss = top + tl.log(total_of_row) - chosen
    if SMOOTHING > 0:
        loss += SMOOTHING * tl.sum(above_others) / vocabulary
    if BY_CONFIDENCE:
        confidence = tl.exp(chosen - top) / total_of_row
        loss *= confidence
    tl.store(losses + row, loss)
    if GRAD:
        factor = 1 / total_of_row
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(loss_weights + row)
        if BY_CONFIDENCE:
            weight *= confidence
        ahead = load_logits(row_logits, 0, stride, BLOCK)
        for start in range(0, vocabulary, BLOCK):
            x = ahead.to(tl.float32)
            ahead = load_logits(row_logits, start + BLOCK, stride, BLOCK)
            at = start + tl.arange(0, BLOCK)
            # The derivative of the soft-cap, as in softmax_minus_one_hot_.
            slope = weight
            if CAPPED:
                bent = tanh(x / softcap)
                slope = weight * (1 - bent * bent)
                x = softcap * bent
            grad = tl.exp(x - top) * factor
            grad = tl.where(at == wanted, grad - (1 - SMOOTHING), grad)
            if SMOOTHING > 0:
                grad -= SMOOTHING / vocabulary
            # The padding is overwritten too, so that one mask covers each 16 bytes.
            tl.store(row_logits + at, grad * slope, at < stride)


@triton.jit
def load_logits(row_logits, start, stride, BLOCK: tl.constexpr):
    """Returns a block of a row, up to the end of its padding.

    So one mask covers each 16 bytes.
    """
    at = start + tl.arange(0, BLOCK)
    return tl.load(row_logits + at, at < stride, 0.0)


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1
