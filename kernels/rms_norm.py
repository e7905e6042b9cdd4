"""RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * (offset + weight).

It is computed in fp32, whatever the dtype of x. The backward is written out, so that only x and one
number a row are saved, and so that it takes few passes over the rows, which cost the time.

That is also why `add_rms_norm` takes the residual addition before a norm. On a GPU, both are one
kernel in the forward. In the backward, the sum has two gradients, one from the residual and one
from the norm; they are added where the norm's gradient is computed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.triton_utils import next_power_of_2, tl, triton, use_triton

# Numbers in a row. The part of the weight's gradient that a longer row needs does not fit in
# registers.
LONG = 8192

# Columns of longer rows that a program then takes.
NORM_COLUMNS = 1024

# Warps that run on a multiprocessor at a time: its registers are enough for so many, with 64
# registers a thread.
WARPS_AT_ONCE = 32


# ---- RMSNorm ----


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Computes RMSNorm over the last dimension.

    x: [..., D].
    weight: [D] of any float dtype.
    offset: 1 for Gemma's files, which store the weight minus one.
    Returns x's shape and dtype.
    """
    # torch.compile fuses the plain form with the operations around it.
    if x.is_cuda and torch.compiler.is_compiling():
        return rms_norm_reference(x, weight, eps, offset)
    # The overhead of an autograd function is as large as the arithmetic of a short row.
    if not torch.is_grad_enabled() and not use_triton(x):
        # torch's own norm knows no offset.
        if not offset and weight.dtype == x.dtype:
            return F.rms_norm(x, weight.shape, weight, eps)
        return normalize(x, weight, eps, offset)[0]
    return RMSNormFunction.apply(x, weight, eps, offset)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    x32 = x.float()
    normal = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (normal * (weight.float() + offset)).to(x.dtype)


class RMSNormFunction(torch.autograd.Function):
    """`rms_norm` with gradients; saves x and one number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        out, scale = normalize(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        trains_weight = ctx.needs_input_grad[1]
        if use_triton(x):
            dx, dweight = backward_on_gpu(grad, x, weight, scale, ctx.offset, trains_weight)
            return dx, dweight, None, None
        grad = grad.float()
        normal = x.float() * scale
        dweight = None
        if trains_weight:
            all_but_last = tuple(range(x.dim() - 1))
            dweight = (grad * normal).sum(all_but_last).to(weight.dtype)
        if ctx.offset:
            weight = weight.float() + ctx.offset
        grad = grad * weight
        # The part of the gradient that goes through the scale is parallel to x.
        along = (grad * normal).mean(-1, keepdim=True)
        dx = grad.addcmul_(normal, along, value=-1).mul_(scale).to(x.dtype)
        return dx, dweight, None, None


def normalize(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Returns RMSNorm of x, and each row's 1 / sqrt(mean(x^2) + eps), float32 [..., 1]."""
    if use_triton(x):
        return normalize_on_gpu(x, None, weight, eps, offset)[1:]
    x32 = x.float()
    # The norm of a row needs no tensor of squares as large as x.
    norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)  # [..., 1]
    mean_square = norm.square_().div_(x.shape[-1])
    scale = mean_square.add_(eps).rsqrt_()
    if offset:
        weight = weight.float() + offset
    out = (x32 * scale).mul_(weight).to(x.dtype)
    return out, scale


# ---- the residual addition and the norm behind it ----


def add_rms_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns x + added, and `rms_norm` of that sum after it was rounded to x's dtype.

    x: [..., D].
    added: like x, or None for nothing. Then x itself is the sum, and what is gained is that its two
        gradients are added in the norm's backward.
    weight, eps, offset: of `rms_norm`.
    """
    if adds_in_norm(x):
        return AddRMSNorm.apply(x, added, weight, eps, offset)
    total = x if added is None else x + added
    return total, rms_norm(total, weight, eps, offset)


def add_rms_norm_reference(
    x, added, weight, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    total = x if added is None else x + added
    return total, rms_norm_reference(total, weight, eps, offset)


def adds_in_norm(x: Tensor) -> bool:
    """True if `add_rms_norm` saves passes over x. torch.compile fuses the plain form itself."""
    return not torch.compiler.is_compiling() and use_triton(x)


class AddRMSNorm(torch.autograd.Function):
    """`add_rms_norm` on GPUs. It saves one number a row, and the sum, which the residual needs."""

    @staticmethod
    def forward(ctx, x, added, weight, eps, offset):
        total, out, scale = normalize_on_gpu(x, added, weight, eps, offset)
        ctx.save_for_backward(total, weight, scale)
        ctx.offset = offset
        ctx.has_added = added is not None
        # Nothing reads the sum after a model's last norm, so it may have no gradient.
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    def backward(ctx, grad_total, grad):
        total, weight, scale = ctx.saved_tensors
        dx = grad_total
        dweight = None
        if grad is not None:
            trains_weight = ctx.needs_input_grad[2]
            dx, dweight = backward_on_gpu(
                grad, total, weight, scale, ctx.offset, trains_weight, grad_total
            )
        dadded = dx if ctx.has_added else None
        return dx, dadded, dweight, None, None


# ---- GPUs ----


def normalize_on_gpu(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x + added (x if added is None), and the two results of `normalize` for that sum."""
    width = x.shape[-1]
    shape = tile(width)
    numbers = x.contiguous()
    out = torch.empty_like(numbers)
    scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    total = x
    if added is not None:
        added = added.contiguous()
        total = torch.empty_like(numbers)
    rows = scale.numel()
    programs = triton.cdiv(rows, shape["ROWS"])
    norm_forward_kernel[(programs,)](
        numbers, added, weight, total, out, scale, rows, width, eps, offset,
        ADD=added is not None, **shape,
    )  # fmt: skip
    return total, out, scale


def backward_on_gpu(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: float,
    trained: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of x and of the weight.

    grad: the gradient of the norm's output, like x.
    scale: the second result of `normalize`.
    trained: compute the weight's gradient; False: it is None.
    residual: another gradient of x, which is added to the first; or None.
    """
    x = x.contiguous()
    grad = grad.contiguous()
    width = x.shape[-1]
    rows = scale.numel()
    if residual is not None:
        residual = residual.contiguous()
    shape = tile(width)
    programs = triton.cdiv(rows, shape["ROWS"])
    sums = None  # [programs, width], the weight's gradient from the rows of each program
    if trained and width <= LONG:
        programs = min(programs, programs_at_once(x.device, shape["num_warps"]))
        sums = x.new_empty(programs, width, dtype=torch.float32)
    dx = torch.empty_like(x)
    norm_backward_kernel[(programs,)](
        grad, residual, x, weight, scale, dx, sums, rows, width, offset,
        RESIDUAL=residual is not None, TRAINED=sums is not None, LATE=width > LONG, **shape,
    )  # fmt: skip
    if not trained:
        return dx, None
    # Of long rows another kernel computes the weight's gradient, a few columns a program.
    if sums is None:
        column_blocks = triton.cdiv(width, NORM_COLUMNS)
        row_blocks = max(1, programs_at_once(x.device, 4) // column_blocks)
        sums = x.new_empty(row_blocks, width, dtype=torch.float32)
        grid = (row_blocks, column_blocks)
        weight_kernel[grid](grad, x, scale, sums, rows, width, BLOCK=NORM_COLUMNS, num_warps=4)
    return dx, sums.sum(0).to(weight.dtype)


def tile(width: int) -> dict[str, int]:
    """Returns what a program takes at once: ROWS rows of BLOCK numbers (`width` or more), by
    num_warps warps.

    A program has at least four warps, so it takes several short rows together. A thread gets 16
    bytes in bf16. If rows do not begin at multiples of 16 bytes, it loads them number by number.
    """
    block = next_power_of_2(width)
    numbers_per_thread = 4 if width % 16 else 8
    # 128 threads are the four warps.
    rows = max(1, 128 * numbers_per_thread // block)
    threads = min(1024, rows * block // numbers_per_thread)
    threads_per_warp = 64 if torch.version.hip else 32
    return {"ROWS": rows, "BLOCK": block, "num_warps": threads // threads_per_warp}


def programs_at_once(device: torch.device, warps: int) -> int:
    """Returns how many programs of so many warps run on the GPU at a time.

    As many add up a weight's gradient, each over its part of the rows.
    """
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * max(1, WARPS_AT_ONCE // warps)


@triton.jit
def norm_forward_kernel(
    x, added, weight, total, out, scales, rows, width, eps, offset,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes ROWS rows; each is read once."""
    first = tl.program_id(0) * ROWS
    line = tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (first + line < rows) & (at < width)
    start = first.to(tl.int64) * width
    here = line * width + at
    row = tl.load(x + start + here, inside, 0.0)
    if ADD:
        sums = row.to(tl.float32) + tl.load(added + start + here, inside, 0.0).to(tl.float32)
        row = sums.to(row.dtype)
        tl.store(total + start + here, row, inside)
    numbers = row.to(tl.float32)
    mean_square = tl.sum(numbers * numbers, 1)[:, None] / width  # [ROWS, 1]
    scale = 1 / tl.sqrt(mean_square + eps)
    weights = tl.load(weight + at, at < width, 0.0).to(tl.float32) + offset
    tl.store(scales + first + line, scale, first + line < rows)
    tl.store(out + start + here, numbers * scale * weights, inside)


@triton.jit
def norm_backward_kernel(
    grad, residual, x, weight, scales, dx, sums, rows, width, offset,
    RESIDUAL: tl.constexpr, TRAINED: tl.constexpr, LATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes ROWS rows at a time, and others after them if there are fewer programs than rows.

    So a program can add up its part of the weight's gradient in registers.

    LATE: load the weight where it is used, so that it takes registers for a shorter time.
    """
    line = tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    here = line * width + at
    if not LATE:
        weights = tl.load(weight + at, at < width, 0.0).to(tl.float32) + offset
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        inside = (first + line < rows) & (at < width)
        start = tl.cast(first, tl.int64) * width
        scale = tl.load(scales + first + line, first + line < rows, 0.0)  # [ROWS, 1]
        g = tl.load(grad + start + here, inside, 0.0).to(tl.float32)
        normal = tl.load(x + start + here, inside, 0.0).to(tl.float32) * scale
        if TRAINED:
            dweight += g * normal
        if LATE:
            weights = tl.load(weight + at, at < width, 0.0).to(tl.float32) + offset
        g *= weights
        # The part of the gradient that goes through the scale is parallel to x.
        along = tl.sum(g * normal, 1)[:, None] / width
        g = (g - normal * along) * scale
        # Added in fp32, so that the sum is rounded once.
        if RESIDUAL:
            g += tl.load(residual + start + here, inside, 0.0).to(tl.float32)
        tl.store(dx + start + here, g, inside)
    if TRAINED:
        sums_here = sums + tl.program_id(0) * width
        tl.store(sums_here + at, tl.sum(dweight, 0)[None, :], at < width)


@triton.jit
def weight_kernel(grad, x, scales, sums, rows, width, BLOCK: tl.constexpr):
    """Adds up the weight's gradient for BLOCK columns, over every so many rows."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dweight = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * width
        g = tl.load(grad + start + at, at < width, 0.0).to(tl.float32)
        numbers = tl.load(x + start + at, at < width, 0.0).to(tl.float32)
        dweight += g * numbers * tl.load(scales + row)
    tl.store(sums + tl.program_id(0) * width + at, dweight, at < width)
