"""Frozen linears with a low-rank update beside each: y = x W^T + scale * (x A^T) B^T (Hu et al. 2021, LoRA, section 4).

Written out instead of left to autograd so that the order of products is the cheap one (nothing of size out x in is ever
made), the update is added inside a product, and little is kept. Linears that read the same input, such as q, k and v,
are one function: x A^T of all is one product with the stacked A, and the gradient of x is added up in one tensor. Where
the input is act(gate) * up, gate and up are kept and the input is made anew (kernels/swiglu.py). Else what is kept is
x, once, and s = x A^T, [tokens, rank]. A and B are fp32 masters, cast to x's dtype for the products; their gradients
leave in fp32.

GPUs go another way to the same numbers. There a product with one side of length rank takes as long as its reading and
writing, so the update is written first and x W^T is added onto it, whose sums hide the reading; the scale is applied
inside the products that make s and its gradient, so that nothing is gone over to be scaled; and lora.py
hands over A and B cast already (`Casts`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import mm_as
from kernels.nf4 import Frozen, dequantized_weight, frozen_product
from kernels.swiglu import gated, gated_backward, gated_reference
from kernels.triton_utils import use_triton


class LoRAWeights(NamedTuple):
    """A linear with its update."""

    frozen: Frozen  # W [out, in] in x's dtype, or in NF4, which is made whole for a moment, forward and backward
    bias: Tensor | None  # frozen [out], in x's dtype
    A: Tensor  # [rank, in], of any float dtype
    B: Tensor  # [out, rank], likewise
    scale: float


class Casts(NamedTuple):
    """A and B of linears that read one input, in x's dtype."""

    A: Tensor  # [ranks, in], one linear's below the other's
    B: list[Tensor]  # [out, rank] of each


def lora_linears(
    x: Tensor, linears: list[LoRAWeights], up: Tensor | None = None, activation: str = "", casts: Casts | None = None
) -> list[Tensor]:
    """x: [tokens, in], which all of them read; or act(x) * up is what they read. casts: of these linears, for GPUs;
    where there are none, they are made here, and again in the backward. Returns a [tokens, out] of each."""
    layout = [(linear.scale, len(linear.frozen)) for linear in linears]
    tensors = [t for linear in linears for t in (linear.bias, linear.A, linear.B, *linear.frozen)]
    if use_triton(x) and not torch.is_grad_enabled():
        return without_gradients(x if up is None else gated(x, up, activation), linears, casts)
    if use_triton(x):
        return list(LoRALinearsOnGPU.apply(x, up, activation, layout, casts, *tensors))
    return list(LoRALinears.apply(x, up, activation, layout, *tensors))


def lora_linears_reference(x, linears: list[LoRAWeights], up=None, activation: str = "") -> list[Tensor]:
    x = x if up is None else gated_reference(x, up, activation)
    return [
        F.linear(x, dequantized_weight(frozen, x.dtype), bias)
        + scale * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
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
            F.linear(read, dequantized_weight(frozen, x.dtype), bias).addmm_(part, B.to(x.dtype).t(), alpha=scale)
            for (frozen, bias, _, B, scale), part in zip(linears, s.split(ranks, 1), strict=True)
        )
        ctx.save_for_backward(x, up, s, *tensors)
        ctx.activation, ctx.layout, ctx.ranks = activation, layout, ranks
        return outs

    @staticmethod
    def backward(ctx, *grads):
        x, up, s, *tensors = ctx.saved_tensors
        linears = unflatten(ctx.layout, tensors)
        ds = torch.cat(
            [(grad @ B.to(grad.dtype)).mul_(scale) for grad, (_, _, _, B, scale) in zip(grads, linears)], 1
        )  # [tokens, ranks]
        dx = dup = None
        if any(ctx.needs_input_grad[:2]):
            A = torch.cat([linear.A for linear in linears]).to(ds.dtype)
            dx, dup, read = input_gradients(x, up, ctx.activation, linears, grads, ds, A)
        else:
            read = x if up is None else gated(x, up, ctx.activation)
        dA = (ds.t() @ read).split(ctx.ranks)
        found = []
        for grad, part, each, (frozen, _, A, B, scale) in zip(grads, s.split(ctx.ranks, 1), dA, linears, strict=True):
            dB = (grad.t() @ part).to(B.dtype).mul_(scale)
            found += [None, each.to(A.dtype), dB, *[None] * len(frozen)]
        return dx, dup, None, None, *found


class LoRALinearsOnGPU(torch.autograd.Function):
    """s and ds, [tokens, ranks], are here times scale."""

    @staticmethod
    def forward(ctx, x, up, activation, layout, casts, *tensors):
        linears = unflatten(layout, tensors)
        ranks = [linear.A.shape[0] for linear in linears]
        ctx.casts = casts  # no input and no output: autograd does not watch it
        A, Bs = casts or cast(linears, x.dtype)
        read = x if up is None else gated(x, up, activation)
        s = scaled_low(read, A, linears)
        outs = []
        for (frozen, bias, *_), B, part in zip(linears, Bs, s.split(ranks, 1), strict=True):
            update = F.linear(part, B, bias)
            outs.append(update.addmm_(read, dequantized_weight(frozen, x.dtype).t()))
        ctx.save_for_backward(x, up, s, *tensors)
        ctx.activation, ctx.layout, ctx.ranks = activation, layout, ranks
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads):
        x, up, s, *tensors = ctx.saved_tensors
        linears = unflatten(ctx.layout, tensors)
        A, Bs = ctx.casts or cast(linears, s.dtype)
        ds = torch.empty_like(s)
        for part, grad, B, linear in zip(ds.split(ctx.ranks, 1), grads, Bs, linears, strict=True):
            scaled_product_(part, grad, B, linear.scale)
        dx = dup = None
        if any(ctx.needs_input_grad[:2]):
            dx, dup, read = input_gradients(x, up, ctx.activation, linears, grads, ds, A)
        else:
            read = x if up is None else gated(x, up, ctx.activation)
        dA = mm_as(ds.t(), read, torch.float32).split(ctx.ranks)
        found = []
        for grad, part, each, linear in zip(grads, s.split(ctx.ranks, 1), dA, linears, strict=True):
            dB = mm_as(grad.t(), part, linear.B.dtype)
            found += [None, each.to(linear.A.dtype), dB, *[None] * len(linear.frozen)]
        return dx, dup, None, None, None, *found


def without_gradients(read: Tensor, linears: list[LoRAWeights], casts: Casts | None) -> list[Tensor]:
    """The linears' outputs for what they read, as a text is written: of few rows, a matrix in NF4 is not made whole."""
    A, Bs = casts or cast(linears, read.dtype)
    parts = scaled_low(read, A, linears).split([linear.A.shape[0] for linear in linears], 1)
    outs = []
    for linear, B, part in zip(linears, Bs, parts, strict=True):
        made = frozen_product(read, linear.frozen, linear.bias)
        outs.append(made.addmm_(part, B.t()))
    return outs


def scaled_low(read: Tensor, A: Tensor, linears: list[LoRAWeights]) -> Tensor:
    """Of each linear scale * read A^T, side by side: [tokens, ranks]. A: stacked, in read's dtype."""
    ranks = [linear.A.shape[0] for linear in linears]
    s = read.new_empty(read.shape[0], sum(ranks))
    if len({linear.scale for linear in linears}) == 1:  # as in every model that add_lora makes
        scaled_product_(s, read, A.t(), linears[0].scale)
        return s
    for part, each, linear in zip(s.split(ranks, 1), A.split(ranks), linears, strict=True):
        scaled_product_(part, read, each.t(), linear.scale)
    return s


def input_gradients(
    x: Tensor, up: Tensor | None, activation: str, linears: list[LoRAWeights], grads, ds: Tensor, A: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of x and up, and what the linears read. grads: those of the outputs, [tokens, out]; ds: that of
    x A^T, [tokens, ranks]; A: all linears' stacked, in its dtype."""
    dx = torch.mm(ds, A)
    for grad, linear in zip(grads, linears, strict=True):
        dx.addmm_(grad, dequantized_weight(linear.frozen, grad.dtype))
    if up is None:
        return dx, None, x
    return gated_backward(dx, x, up, activation, product=True)


def scaled_product_(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Writes scale * (a @ b), scaled before it is rounded, to out, whose former content is not read."""
    out.addmm_(a, b, beta=0, alpha=scale)


def cast(linears: list[LoRAWeights], dtype: torch.dtype) -> Casts:
    A = linears[0].A if len(linears) == 1 else torch.cat([linear.A for linear in linears])
    return Casts(A.to(dtype), [linear.B.to(dtype) for linear in linears])


def unflatten(layout: list[tuple[float, int]], tensors) -> list[LoRAWeights]:
    found, left = [], iter(tensors)
    for scale, count in layout:
        bias, A, B = next(left), next(left), next(left)
        found.append(LoRAWeights(tuple(next(left) for _ in range(count)), bias, A, B, scale))
    return found
