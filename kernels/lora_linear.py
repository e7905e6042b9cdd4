"""Frozen linears with a low-rank update beside each: y = x W^T + scale * (x A^T) B^T (Hu et al. 2021, LoRA, section 4).

Written out instead of left to autograd so that the order of products is the cheap one (nothing of size out x in is ever
made), the update is added inside a product, and little is kept. Linears that read the same input, such as q, k and v,
are one function: x A^T of all is one product with the stacked A, and the gradient of x is added up in one tensor. Where
the input is act(gate) * up, gate and up are kept and the input is made anew (kernels/swiglu.py). Else what is kept is
x, once, and s = x A^T, [tokens, rank]. A and B are fp32 masters, cast to x's dtype for the products; their gradients
leave in fp32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.nf4 import Frozen, matrix
from kernels.swiglu import gated, gated_backward, gated_reference


class Adapted(NamedTuple):
    """A linear with its update."""

    frozen: Frozen  # W [out, in] in x's dtype, or in NF4, which is made whole for a moment, forward and backward
    bias: Tensor | None  # frozen [out], in x's dtype
    A: Tensor  # [rank, in], of any float dtype
    B: Tensor  # [out, rank], likewise
    scale: float


def lora_linears(x: Tensor, linears: list[Adapted], up: Tensor | None = None, activation: str = "") -> list[Tensor]:
    """x: [tokens, in], which all of them read; or act(x) * up is what they read. Returns a [tokens, out] of each."""
    layout = [(linear.scale, len(linear.frozen)) for linear in linears]
    tensors = [t for linear in linears for t in (linear.bias, linear.A, linear.B, *linear.frozen)]
    return list(LoRALinears.apply(x, up, activation, layout, *tensors))


def lora_linears_reference(x, linears: list[Adapted], up=None, activation: str = "") -> list[Tensor]:
    x = x if up is None else gated_reference(x, up, activation)
    return [
        F.linear(x, matrix(frozen, x.dtype), bias) + scale * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
        for frozen, bias, A, B, scale in linears
    ]


class LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, activation, layout, *tensors):
        linears = unflatten(layout, tensors)
        ranks = [linear.A.shape[0] for linear in linears]
        read = x if up is None else gated(x, up, activation)
        s = F.linear(read, torch.cat([linear.A for linear in linears]).to(x.dtype))  # [tokens, ranks]
        outs = tuple(
            F.linear(read, matrix(frozen, x.dtype), bias).addmm_(part, B.to(x.dtype).t(), alpha=scale)
            for (frozen, bias, _, B, scale), part in zip(linears, s.split(ranks, 1), strict=True)
        )
        ctx.save_for_backward(x, up, s, *tensors)
        ctx.activation, ctx.layout, ctx.ranks = activation, layout, ranks
        return outs

    @staticmethod
    def backward(ctx, *grads):
        x, up, s, *tensors = ctx.saved_tensors
        linears = unflatten(ctx.layout, tensors)
        read = x if up is None else gated(x, up, ctx.activation)
        ds = torch.cat(
            [(grad @ B.to(grad.dtype)).mul_(scale) for grad, (_, _, _, B, scale) in zip(grads, linears)], 1
        )  # [tokens, ranks]
        dx = dup = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(ds, torch.cat([linear.A for linear in linears]).to(ds.dtype))
            for grad, linear in zip(grads, linears, strict=True):
                dx.addmm_(grad, matrix(linear.frozen, grad.dtype))
            if up is not None:
                dx, dup = gated_backward(dx, x, up, ctx.activation)
        dA = (ds.t() @ read).split(ctx.ranks)
        found = []
        for grad, part, each, (frozen, _, A, B, scale) in zip(grads, s.split(ctx.ranks, 1), dA, linears, strict=True):
            dB = (grad.t() @ part).to(B.dtype).mul_(scale)
            found += [None, each.to(A.dtype), dB, *[None] * len(frozen)]
        return dx, dup, None, None, *found


def unflatten(layout: list[tuple[float, int]], tensors) -> list[Adapted]:
    found, left = [], iter(tensors)
    for scale, count in layout:
        bias, A, B = next(left), next(left), next(left)
        found.append(Adapted(tuple(next(left) for _ in range(count)), bias, A, B, scale))
    return found
