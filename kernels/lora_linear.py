"""Frozen linears with a low-rank update beside each (Hu et al. 2021, LoRA, section 4).

    y = x W^T + scale * (x A^T) B^T

The backward is written out instead of left to autograd, so that the order of products is the cheap
one (nothing of size out x in is ever computed), the update is added inside a product, and little is
saved. Linears that read the same input, such as q, k and v, are one function: x A^T of all is one
product with the stacked A, and the gradient of x is summed in one tensor. Saved are x, once, and
s = x A^T, [tokens, ranks]. Where the input is act(gate) * up, gate and up are saved and the input
is computed again (kernels/swiglu.py). A and B are fp32 master weights, cast to x's dtype for the
products; their gradients are fp32. With dy, the gradient of y:

    ds = scale * dy B       dA = ds^T x
    dx = dy W + ds A        dB = scale * dy^T s

GPUs reach the same numbers by other products. There a product with one side of length rank takes as
long as reading and writing its tensors. So the update is written first and x W^T is added onto it,
whose arithmetic hides the reading; the scale is applied inside the products that compute s and its
gradient, so that no pass only scales; and lora.py passes A and B already cast (`Casts`).

A matrix W that is computed from 4 bits never gets a name here: its memory has to be free again
before that of the next linear is computed.
"""

from collections.abc import Sequence
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

    # W [out, in]: in x's dtype, or in NF4. From NF4, the whole matrix is computed in the forward
    # and again in the backward.
    frozen: Frozen
    bias: Tensor | None  # frozen [out], in x's dtype
    A: Tensor  # [rank, in], of any float dtype
    B: Tensor  # [out, rank], of any float dtype
    scale: float


class Casts(NamedTuple):
    """A and B, in x's dtype, of the linears that read one input."""

    A: Tensor  # [ranks, in]: the rows of the first linear, then those of the second
    B: list[Tensor]  # [out, rank] of each linear


def lora_linears(
    x: Tensor,
    linears: list[LoRAWeights],
    up: Tensor | None = None,
    activation: str = "",
    casts: Casts | None = None,
) -> list[Tensor]:
    """Returns the output of each linear, [tokens, out].

    x: [tokens, in], the input of all linears.
    up: [tokens, in]; where it is there, the input is act(x) * up instead of x.
    activation: the name of act, a key of kernels.swiglu.ACTIVATIONS.
    casts: A and B of these linears in x's dtype, which only GPUs use. Without them the casts are
        computed here, and again in the backward.
    """
    if use_triton(x) and not torch.is_grad_enabled():
        inputs = x if up is None else gated(x, up, activation)
        return without_gradients(inputs, linears, casts)
    # Autograd watches only tensors that are arguments themselves, so the linears are passed as one
    # flat list. `unflatten` is the way back.
    layout = [(linear.scale, len(linear.frozen)) for linear in linears]
    tensors: list[Tensor | None] = []
    for linear in linears:
        tensors += [linear.bias, linear.A, linear.B, *linear.frozen]
    if use_triton(x):
        outs = LoRALinearsOnGPU.apply(x, up, activation, layout, casts, *tensors)
    else:
        outs = LoRALinears.apply(x, up, activation, layout, *tensors)
    return list(outs)


def lora_linears_reference(
    x, linears: list[LoRAWeights], up=None, activation: str = ""
) -> list[Tensor]:
    if up is not None:
        x = gated_reference(x, up, activation)
    outs = []
    for frozen, bias, A, B, scale in linears:
        y = F.linear(x, dequantized_weight(frozen, x.dtype), bias)
        update = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
        outs.append(y + scale * update)
    return outs


class LoRALinears(torch.autograd.Function):
    """The form for CPUs. s = x A^T and its gradient ds, [tokens, ranks], are not scaled."""

    @staticmethod
    def forward(ctx, x, up, activation, layout, *tensors):
        linears = unflatten(layout, tensors)
        ranks = [linear.A.shape[0] for linear in linears]
        inputs = x if up is None else gated(x, up, activation)
        A = torch.cat([linear.A for linear in linears]).to(x.dtype)  # [ranks, in]
        s = F.linear(inputs, A)  # [tokens, ranks]
        outs = []
        for linear, low in zip(linears, s.split(ranks, 1), strict=True):
            y = F.linear(inputs, dequantized_weight(linear.frozen, x.dtype), linear.bias)
            y.addmm_(low, linear.B.to(x.dtype).t(), alpha=linear.scale)
            outs.append(y)
        # The master weights are saved, which live anyway, and not their casts.
        ctx.save_for_backward(x, up, s, *tensors)
        ctx.activation = activation
        ctx.layout = layout
        ctx.ranks = ranks
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads):
        x, up, s, *tensors = ctx.saved_tensors
        linears = unflatten(ctx.layout, tensors)
        ds_parts = []
        for grad, linear in zip(grads, linears, strict=True):
            ds_part = grad @ linear.B.to(grad.dtype)
            ds_parts.append(ds_part.mul_(linear.scale))
        ds = torch.cat(ds_parts, 1)  # [tokens, ranks]
        dx = dup = None
        needs_dx, needs_dup = ctx.needs_input_grad[:2]
        if needs_dx or needs_dup:
            A = torch.cat([linear.A for linear in linears]).to(ds.dtype)
            dx, dup, inputs = input_gradients(x, up, ctx.activation, linears, grads, ds, A)
        else:
            # Nothing before these linears is trained, but A's gradient needs their input.
            inputs = x if up is None else gated(x, up, ctx.activation)
        lows = s.split(ctx.ranks, 1)
        dAs = (ds.t() @ inputs).split(ctx.ranks)
        # In the order of the flat list. Bias and W are frozen.
        tensor_grads = []
        for linear, grad, low, dA in zip(linears, grads, lows, dAs, strict=True):
            dB = (grad.t() @ low).to(linear.B.dtype).mul_(linear.scale)
            frozen_grads = [None] * len(linear.frozen)
            tensor_grads += [None, dA.to(linear.A.dtype), dB, *frozen_grads]
        return dx, dup, None, None, *tensor_grads


class LoRALinearsOnGPU(torch.autograd.Function):
    """The form for GPUs. s = x A^T and its gradient ds, [tokens, ranks], are scaled already."""

    @staticmethod
    def forward(ctx, x, up, activation, layout, casts, *tensors):
        linears = unflatten(layout, tensors)
        ranks = [linear.A.shape[0] for linear in linears]
        # The casts are neither inputs nor outputs, so autograd needs not watch them.
        ctx.casts = casts
        if casts is None:
            casts = cast(linears, x.dtype)
        inputs = x if up is None else gated(x, up, activation)
        s = scaled_low(inputs, casts.A, linears)  # [tokens, ranks]
        outs = []
        for linear, B, low in zip(linears, casts.B, s.split(ranks, 1), strict=True):
            y = F.linear(low, B, linear.bias)
            y.addmm_(inputs, dequantized_weight(linear.frozen, x.dtype).t())
            outs.append(y)
        ctx.save_for_backward(x, up, s, *tensors)
        ctx.activation = activation
        ctx.layout = layout
        ctx.ranks = ranks
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads):
        x, up, s, *tensors = ctx.saved_tensors
        linears = unflatten(ctx.layout, tensors)
        casts = ctx.casts
        if casts is None:
            casts = cast(linears, s.dtype)
        # The products write into columns of ds, so that nothing needs to be concatenated.
        ds = torch.empty_like(s)
        ds_parts = ds.split(ctx.ranks, 1)
        for ds_part, grad, B, linear in zip(ds_parts, grads, casts.B, linears, strict=True):
            scaled_product_(ds_part, grad, B, linear.scale)
        dx = dup = None
        needs_dx, needs_dup = ctx.needs_input_grad[:2]
        if needs_dx or needs_dup:
            dx, dup, inputs = input_gradients(x, up, ctx.activation, linears, grads, ds, casts.A)
        else:
            # Nothing before these linears is trained, but A's gradient needs their input.
            inputs = x if up is None else gated(x, up, ctx.activation)
        lows = s.split(ctx.ranks, 1)
        dAs = mm_as(ds.t(), inputs, torch.float32).split(ctx.ranks)
        # In the order of the flat list. Bias and W are frozen.
        tensor_grads = []
        for linear, grad, low, dA in zip(linears, grads, lows, dAs, strict=True):
            dB = mm_as(grad.t(), low, linear.B.dtype)
            frozen_grads = [None] * len(linear.frozen)
            tensor_grads += [None, dA.to(linear.A.dtype), dB, *frozen_grads]
        return dx, dup, None, None, None, *tensor_grads


def without_gradients(
    inputs: Tensor, linears: list[LoRAWeights], casts: Casts | None
) -> list[Tensor]:
    """Returns the output of each linear for inputs [tokens, in], as a text is generated.

    For few rows, a matrix in NF4 is never written as a whole (`frozen_product`).
    """
    if casts is None:
        casts = cast(linears, inputs.dtype)
    ranks = [linear.A.shape[0] for linear in linears]
    lows = scaled_low(inputs, casts.A, linears).split(ranks, 1)
    outs = []
    for linear, B, low in zip(linears, casts.B, lows, strict=True):
        y = frozen_product(inputs, linear.frozen, linear.bias)
        outs.append(y.addmm_(low, B.t()))
    return outs


def scaled_low(inputs: Tensor, A: Tensor, linears: list[LoRAWeights]) -> Tensor:
    """Returns scale * inputs A^T of each linear, next to each other: [tokens, ranks].

    A: [ranks, in], of all linears, in the dtype of the inputs.
    """
    ranks = [linear.A.shape[0] for linear in linears]
    s = inputs.new_empty(inputs.shape[0], sum(ranks))
    scales = {linear.scale for linear in linears}
    # One scale for all, as in every model that add_lora makes: one product.
    if len(scales) == 1:
        scaled_product_(s, inputs, A.t(), linears[0].scale)
        return s
    for low, own_A, linear in zip(s.split(ranks, 1), A.split(ranks), linears, strict=True):
        scaled_product_(low, inputs, own_A.t(), linear.scale)
    return s


def input_gradients(
    x: Tensor,
    up: Tensor | None,
    activation: str,
    linears: list[LoRAWeights],
    grads: Sequence[Tensor],
    ds: Tensor,
    A: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns the gradients of x and up (None without up), and the input that the linears read.

    All three are [tokens, in].

    grads: the gradient of each linear's output, [tokens, out].
    ds: the gradient of x A^T, [tokens, ranks].
    A: [ranks, in], of all linears, in the dtype of ds.
    """
    dx = torch.mm(ds, A)
    for grad, linear in zip(grads, linears, strict=True):
        dx.addmm_(grad, dequantized_weight(linear.frozen, grad.dtype))
    if up is None:
        return dx, None, x
    dgate, dup, inputs = gated_backward(dx, x, up, activation, product=True)
    assert inputs is not None, "product=True asks for it"
    return dgate, dup, inputs


def scaled_product_(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Writes scale * (a @ b) to out. The product is scaled before it is rounded."""
    # beta=0: what out contained is not read.
    out.addmm_(a, b, beta=0, alpha=scale)


def cast(linears: list[LoRAWeights], dtype: torch.dtype) -> Casts:
    """Returns A and B of the linears in dtype."""
    # Without a copy if there is nothing to stack.
    if len(linears) == 1:
        A = linears[0].A
    else:
        A = torch.cat([linear.A for linear in linears])
    return Casts(A.to(dtype), [linear.B.to(dtype) for linear in linears])


def unflatten(layout: list[tuple[float, int]], tensors: Sequence) -> list[LoRAWeights]:
    """Returns the linears whose tensors follow each other: bias, A, B and those of W.

    layout: of each linear, its scale and the number of tensors of its frozen matrix.
    """
    linears = []
    start = 0
    for scale, num_frozen in layout:
        bias, A, B = tensors[start : start + 3]
        end = start + 3 + num_frozen
        frozen = tuple(tensors[start + 3 : end])
        linears.append(LoRAWeights(frozen, bias, A, B, scale))
        start = end
    return linears
