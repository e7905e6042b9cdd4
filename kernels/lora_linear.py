"""A frozen linear with a low-rank update beside it: y = x W^T + scale * (x A^T) B^T (Hu et al. 2021, LoRA, section 4).

Written out instead of left to autograd so that the order of products is the cheap one (nothing of size out x in is ever
made), the update is added inside a product, and what is kept is x, once for all linears that read it, and s = x A^T,
[tokens, rank]. A and B are fp32 masters, cast to x's dtype for the products; their gradients leave in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.nf4 import Frozen, matrix


def lora_linear(x: Tensor, frozen: Frozen, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x: [tokens, in]; frozen: the weight, [out, in], in x's dtype or in NF4, which is made whole for a moment, forward
    and backward; bias: frozen [out] in x's dtype, or None; A: [rank, in] and B: [out, rank], of any float dtype.
    Returns [tokens, out]."""
    return LoRALinear.apply(x, bias, A, B, scale, *frozen)


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


class LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, A, B, scale, *frozen):
        s = F.linear(x, A.to(x.dtype))  # [tokens, rank]
        ctx.save_for_backward(x, A, B, s, *frozen)
        ctx.scale = scale
        return F.linear(x, matrix(frozen, x.dtype), bias).addmm_(s, B.to(x.dtype).t(), alpha=scale)

    @staticmethod
    def backward(ctx, grad):
        x, A, B, s, *frozen = ctx.saved_tensors
        ds = (grad @ B.to(grad.dtype)).mul_(ctx.scale)  # [tokens, rank]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(grad, matrix(frozen, grad.dtype)).addmm_(ds, A.to(grad.dtype))
        dA = (ds.t() @ x).to(A.dtype)
        dB = (grad.t() @ s).to(B.dtype).mul_(ctx.scale)
        return dx, None, dA, dB, None, *[None] * len(frozen)
