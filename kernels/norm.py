"""RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * (offset + weight), in fp32 inside whatever the dtype.

The backward is written out, so that x and one number a row are all that is kept, and every pass over the rows counts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x: [..., D], weight: [D] of any float dtype. Returns x's shape and dtype. offset: 1 for Gemma's files, which hold
    the weight less one."""
    if not torch.is_grad_enabled():  # a Function's ceremony costs as much as a short row's arithmetic
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
        grad, normal = grad.float(), x.float() * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normal).sum(tuple(range(x.dim() - 1))).to(weight.dtype)
        grad = grad * (weight.float() + ctx.offset if ctx.offset else weight)
        along = (grad * normal).mean(-1, keepdim=True)
        return grad.addcmul_(normal, along, value=-1).mul_(scale).to(x.dtype), grad_weight, None, None


def normalise(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The normal rows, and what each was multiplied with, fp32 [..., 1]."""
    x32 = x.float()
    mean_square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    scale = mean_square.add_(eps).rsqrt_()
    return (x32 * scale).mul_(weight.float() + offset if offset else weight).to(x.dtype), scale
