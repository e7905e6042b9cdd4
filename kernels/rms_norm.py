"""RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * (offset + weight), in fp32 inside whatever the dtype.

The backward is written out, so that x and one number a row are all that is kept, and every pass over the rows counts.
That is also why `add_rms_norm` takes the residual addition before a norm: on a GPU both are one kernel forward, and
backward the gradients that reach the sum from the residual and from the norm are added where the second is made.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.triton_utils import next_power_of_2, tl, triton, use_triton

LONG = 8192  # numbers; the share of a longer row in the weight's gradient does not fit in registers
COLUMNS = 1024  # of such rows, which a program then takes
WARPS_AT_ONCE = 32  # on a multiprocessor: its registers are enough for so many with 64 a thread


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x: [..., D], weight: [D] of any float dtype. Returns x's shape and dtype. offset: 1 for Gemma's files, which hold
    the weight less one."""
    if x.is_cuda and torch.compiler.is_compiling():  # a compiler fuses the plain form with what is around it
        return rms_norm_reference(x, weight, eps, offset)
    if not torch.is_grad_enabled() and not use_triton(
        x
    ):  # a Function's ceremony costs as much as a short row's arithmetic
        plain = not offset and weight.dtype == x.dtype
        return F.rms_norm(x, weight.shape, weight, eps) if plain else normalise(x, weight, eps, offset)[0]
    return RMSNorm.apply(x, weight, eps, offset)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    x32 = x.float()
    normal = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (normal * (weight.float() + offset)).to(x.dtype)


def add_rms_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns x + added and `rms_norm` of that sum, which is rounded to x's dtype before.

    x: [..., D]; added: the same shape and dtype, or None for nothing: then x is the sum, and what is gained is that its
    two gradients are added in the norm's backward.
    """
    if adds_in_norm(x):
        return AddRMSNorm.apply(x, added, weight, eps, offset)
    total = x if added is None else x + added
    return total, rms_norm(total, weight, eps, offset)


def add_rms_norm_reference(x, added, weight, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    total = x if added is None else x + added
    return total, rms_norm_reference(total, weight, eps, offset)


def adds_in_norm(x: Tensor) -> bool:
    """Whether `add_rms_norm` saves passes over x. A compiler fuses the plain form itself."""
    return not torch.compiler.is_compiling() and use_triton(x)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        out, scale = normalise(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        if use_triton(x):
            return *backward_on_gpu(grad, x, weight, scale, ctx.offset, ctx.needs_input_grad[1]), None, None
        grad, normal = grad.float(), x.float() * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normal).sum(tuple(range(x.dim() - 1))).to(weight.dtype)
        grad = grad * (weight.float() + ctx.offset if ctx.offset else weight)
        along = (grad * normal).mean(-1, keepdim=True)
        return grad.addcmul_(normal, along, value=-1).mul_(scale).to(x.dtype), grad_weight, None, None


class AddRMSNorm(torch.autograd.Function):
    """For GPUs alone. Keeps the sum, which the residual keeps alive anyway, and one number a row."""

    @staticmethod
    def forward(ctx, x, added, weight, eps, offset):
        total, out, scale = normalise_on_gpu(x, added, weight, eps, offset)
        ctx.save_for_backward(total, weight, scale)
        ctx.offset, ctx.adds = offset, added is not None
        ctx.set_materialize_grads(False)  # nothing reads the sum after a model's last norm
        return total, out

    @staticmethod
    def backward(ctx, grad_total, grad):
        total, weight, scale = ctx.saved_tensors
        dx, dweight = grad_total, None
        if grad is not None:
            trained = ctx.needs_input_grad[2]
            dx, dweight = backward_on_gpu(grad, total, weight, scale, ctx.offset, trained, grad_total)
        return dx, dx if ctx.adds else None, dweight, None, None


def normalise(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The normal rows, and what each was multiplied with, fp32 [..., 1]."""
    if use_triton(x):
        return normalise_on_gpu(x, None, weight, eps, offset)[1:]
    x32 = x.float()
    mean_square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    scale = mean_square.add_(eps).rsqrt_()
    return (x32 * scale).mul_(weight.float() + offset if offset else weight).to(x.dtype), scale


def normalise_on_gpu(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x + added, or x itself for None, and of that what `normalise` returns."""
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
    forward_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
        numbers, added, weight, total, out, scale, rows, width, eps, offset, ADD=added is not None, **shape
    )
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
    """Returns the gradients of x and, where it is trained, of the weight. residual: another gradient of x, which is
    added to the first."""
    x, grad, width, rows = x.contiguous(), grad.contiguous(), x.shape[-1], scale.numel()
    residual = None if residual is None else residual.contiguous()
    shape = tile(width)
    programs = triton.cdiv(rows, shape["ROWS"])
    sums = None  # [programs, width], of each program's rows
    if trained and width <= LONG:
        programs = min(programs, programs_at_once(x.device, shape["num_warps"]))
        sums = x.new_empty(programs, width, dtype=torch.float32)
    dx = torch.empty_like(x)
    backward_kernel[(programs,)](
        grad, residual, x, weight, scale, dx, sums, rows, width, offset,
        RESIDUAL=residual is not None, TRAINED=sums is not None, LATE=width > LONG, **shape,
    )  # fmt: skip
    if not trained:
        return dx, None
    if width > LONG:
        grid = (max(1, programs_at_once(x.device, 4) // triton.cdiv(width, COLUMNS)), triton.cdiv(width, COLUMNS))
        sums = x.new_empty(grid[0], width, dtype=torch.float32)
        weight_kernel[grid](grad, x, scale, sums, rows, width, BLOCK=COLUMNS, num_warps=4)
    return dx, sums.sum(0).to(weight.dtype)


def tile(width: int) -> dict[str, int]:
    """The rows of this width that a program takes at once, and its warps: four at least, so short rows go together. A
    thread gets 16 bytes in bf16; it loads rows that do not begin at multiples of these number by number."""
    block = next_power_of_2(width)
    numbers = 4 if width % 16 else 8  # a thread
    rows = max(1, 128 * numbers // block)
    threads = min(1024, rows * block // numbers)
    return {"ROWS": rows, "BLOCK": block, "num_warps": threads // (64 if torch.version.hip else 32)}


def programs_at_once(device: torch.device, warps: int) -> int:
    """How many programs run on the GPU at a time: that many add up a weight's gradient, each its share of the rows."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return processors * max(1, WARPS_AT_ONCE // warps)


@triton.jit
def forward_kernel(
    x, added, weight, total, out, scales, rows, width, eps, offset,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS rows; each is read once."""
    first = tl.program_id(0) * ROWS
    line, at = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (first + line < rows) & (at < width)
    start = first.to(tl.int64) * width
    here = line * width + at
    row = tl.load(x + start + here, inside, 0.0)
    if ADD:
        row = (row.to(tl.float32) + tl.load(added + start + here, inside, 0.0).to(tl.float32)).to(row.dtype)
        tl.store(total + start + here, row, inside)
    numbers = row.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(numbers * numbers, 1)[:, None] / width + eps)  # [ROWS, 1]
    weights = tl.load(weight + at, at < width, 0.0).to(tl.float32) + offset
    tl.store(scales + first + line, scale, first + line < rows)
    tl.store(out + start + here, numbers * scale * weights, inside)


@triton.jit
def backward_kernel(
    grad, residual, x, weight, scales, dx, sums, rows, width, offset,
    RESIDUAL: tl.constexpr, TRAINED: tl.constexpr, LATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS rows, and others after them where there are fewer programs: so it can add up its share of
    the weight's gradient in registers."""
    line, at = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    here = line * width + at
    if not LATE:
        weights = tl.load(weight + at, at < width, 0.0).to(tl.float32) + offset
    share = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        inside = (first + line < rows) & (at < width)
        start = tl.cast(first, tl.int64) * width
        scale = tl.load(scales + first + line, first + line < rows, 0.0)  # [ROWS, 1]
        g = tl.load(grad + start + here, inside, 0.0).to(tl.float32)
        normal = tl.load(x + start + here, inside, 0.0).to(tl.float32) * scale
        if TRAINED:
            share += g * normal
        if LATE:  # so weights take registers for a shorter time
            weights = tl.load(weight + at, at < width, 0.0).to(tl.float32) + offset
        g *= weights
        along = tl.sum(g * normal, 1)[:, None] / width
        g = (g - normal * along) * scale
        if RESIDUAL:
            g += tl.load(residual + start + here, inside, 0.0).to(tl.float32)
        tl.store(dx + start + here, g, inside)
    if TRAINED:
        tl.store(sums + tl.program_id(0) * width + at, tl.sum(share, 0)[None, :], at < width)


@triton.jit
def weight_kernel(grad, x, scales, sums, rows, width, BLOCK: tl.constexpr):
    """A program takes BLOCK columns of every so many rows, and adds up their share of the weight's gradient."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    share = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * width
        g = tl.load(grad + start + at, at < width, 0.0).to(tl.float32)
        numbers = tl.load(x + start + at, at < width, 0.0).to(tl.float32)
        share += g * numbers * tl.load(scales + row)
    tl.store(sums + tl.program_id(0) * width + at, share, at < width)
