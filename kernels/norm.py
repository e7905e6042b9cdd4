"""RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * (offset + weight), in fp32 inside whatever the dtype.

The backward is written out, so that x and one number a row are all that is kept, and every pass over the rows counts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gpu import blocks, on_gpu, tl, triton

PROGRAMS = 512  # that share the rows of a backward in which the weight is trained
WARPS = 8


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x: [..., D], weight: [D] of any float dtype. Returns x's shape and dtype. offset: 1 for Gemma's files, which hold
    the weight less one."""
    if not torch.is_grad_enabled() and not on_gpu(x):  # a Function's ceremony costs as much as a short row's arithmetic
        plain = not offset and weight.dtype == x.dtype
        return F.rms_norm(x, weight.shape, weight, eps) if plain else normalise(x, weight, eps, offset)[0]
    return RMSNorm.apply(x, weight, eps, offset)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    x32 = x.float()
    normal = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (normal * (weight.float() + offset)).to(x.dtype)


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
        if on_gpu(x):
            return *backward_on_gpu(grad, x, weight, scale, ctx.offset, ctx.needs_input_grad[1]), None, None
        grad, normal = grad.float(), x.float() * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normal).sum(tuple(range(x.dim() - 1))).to(weight.dtype)
        grad = grad * (weight.float() + ctx.offset if ctx.offset else weight)
        along = (grad * normal).mean(-1, keepdim=True)
        return grad.addcmul_(normal, along, value=-1).mul_(scale).to(x.dtype), grad_weight, None, None


def normalise(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The normal rows, and what each was multiplied with, fp32 [..., 1]."""
    if on_gpu(x):
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        scale, width = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32), x.shape[-1]
        grid = (scale.numel(),)
        forward_kernel[grid](x, weight, out, scale, width, eps, offset, BLOCK=blocks(width), num_warps=WARPS)
        return out, scale
    x32 = x.float()
    mean_square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    scale = mean_square.add_(eps).rsqrt_()
    return (x32 * scale).mul_(weight.float() + offset if offset else weight).to(x.dtype), scale


def backward_on_gpu(grad, x, weight, scale, offset: float, trained: bool) -> tuple[Tensor, Tensor | None]:
    x, grad, width, rows = x.contiguous(), grad.contiguous(), x.shape[-1], scale.numel()
    dx, grid = torch.empty_like(x), (min(rows, PROGRAMS) if trained else rows,)
    sums = x.new_zeros(grid[0] if trained else 0, width, dtype=torch.float32)  # of each program's rows
    backward_kernel[grid](
        grad, x, weight, scale, dx, sums, rows, width, offset, TRAINED=trained, BLOCK=blocks(width), num_warps=WARPS
    )
    return dx, sums.sum(0).to(weight.dtype) if trained else None


@triton.jit
def forward_kernel(x, weight, out, scales, width, eps, offset, BLOCK: tl.constexpr):
    """A program a row; a row is read once."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < width
    numbers = tl.load(x + row * width + at, inside, 0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(numbers * numbers) / width + eps)
    weights = tl.load(weight + at, inside, 0.0).to(tl.float32) + offset
    tl.store(scales + row, scale)
    tl.store(out + row * width + at, numbers * scale * weights, inside)


@triton.jit
def backward_kernel(grad, x, weight, scales, dx, sums, rows, width, offset, TRAINED: tl.constexpr, BLOCK: tl.constexpr):
    """A program every so many rows, so that it can add up its share of the weight's gradient in registers."""
    at = tl.arange(0, BLOCK)
    inside = at < width
    weights = tl.load(weight + at, inside, 0.0).to(tl.float32) + offset
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        start = row * width
        scale = tl.load(scales + row)
        g = tl.load(grad + start + at, inside, 0.0).to(tl.float32)
        normal = tl.load(x + start + at, inside, 0.0).to(tl.float32) * scale
        if TRAINED:
            total += g * normal
        g *= weights
        along = tl.sum(g * normal) / width
        tl.store(dx + start + at, (g - normal * along) * scale, inside)
    if TRAINED:
        tl.store(sums + tl.program_id(0) * width + at, total, inside)
