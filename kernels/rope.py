"""Rotary position embedding (Su et al. 2021) in the half-split convention of Hugging Face checkpoints.

Dimension i < d/2 and its partner i + d/2 are one plane, turned by position * theta^(-2i/d). The backward of a rotation
is the rotation by the opposite angle, so nothing is kept but the table.
"""

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [tokens, heads, d]; cos and sin: float32 [tokens, d / 2]. Returns x turned, same shape and dtype."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    if torch.compiler.is_compiling():  # fuses the plain form, and miscompiles writes into halves of a tensor (2.13)
        return rope_reference(x, cos, sin)
    return Rope.apply(x, cos, sin)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    (x1, x2), (y1, y2) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    return out
