"""A frozen linear with a low-rank update beside it: y = x W^T + scale * (x A^T) B^T (Hu et al. 2021, LoRA, section 4).

Written out instead of left to autograd so that the order of products is the cheap one (nothing of size out x in is ever
made), the update is added inside a product, and what is kept is x, once for all linears that read it, and s = x A^T,
[tokens, rank]. A and B are fp32 masters, cast to x's dtype for the products; their gradients leave in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x: [tokens, in]; weight: frozen [out, in] in x's dtype; bias: frozen [out] or None; A: [rank, in] and
    B: [out, rank], of any float dtype. Returns [tokens, out]."""
    return LoRALinear.apply(x, weight, bias, A, B, scale)


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


class LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        s = F.linear(x, A.to(x.dtype))  # [tokens, rank]
        ctx.save_for_backward(x, weight, A, B, s)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(s, B.to(x.dtype).t(), alpha=scale)

    @staticmethod
    def backward(ctx, grad):
        x, weight, A, B, s = ctx.saved_tensors
        ds = (grad @ B.to(grad.dtype)).mul_(ctx.scale)  # [tokens, rank]
        dx = torch.mm(grad, weight).addmm_(ds, A.to(grad.dtype)) if ctx.needs_input_grad[0] else None
        dA = (ds.t() @ x).to(A.dtype)
        dB = (grad.t() @ s).to(B.dtype).mul_(ctx.scale)
        return dx, None, None, dA, dB, None
