"""Linears whose weights are trained: y = x W^T + b, with W in fp32 whatever the dtype of x.

Autograd would keep the weight that was cast for the product until the backward, which takes 2 bytes
more a weight in bf16. Here the backward casts W again. As in kernels/lora_linear.py, linears that
read the same input add its gradient up in one tensor, and of an input act(gate) * up only gate and
up are saved. A weight's gradient leaves its product in fp32 (`mm_as`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.swiglu import gated, gated_backward, gated_reference


def linears(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    up: Tensor | None = None,
    activation: str = "",
) -> list[Tensor]:
    """Computes several linears that read the same input.

    x: [tokens, in], the input of all of them.
    weights: [out, in] each, of any float dtype; they are cast to x's.
    biases: [out] each, likewise; or None.
    up, activation: if given, the input is act(x) * up (kernels/swiglu.py).
    Returns [tokens, out] for each, in x's dtype. Gradients have the dtype of their weight or bias.
    """
    return list(Linears.apply(x, up, activation, *weights, *biases))


def linears_reference(x, weights, biases, up=None, activation: str = "") -> list[Tensor]:
    if up is not None:
        x = gated_reference(x, up, activation)
    outputs = []
    for weight, bias in zip(weights, biases, strict=True):
        bias = None if bias is None else bias.to(x.dtype)
        outputs.append(F.linear(x, weight.to(x.dtype), bias))
    return outputs


class Linears(torch.autograd.Function):
    """`linears`, with the weights and then the biases as one flat list of parameters."""

    @staticmethod
    def forward(ctx, x, up, activation, *parameters):
        count = len(parameters) // 2
        weights = parameters[:count]
        biases = parameters[count:]
        trains_weight = any(ctx.needs_input_grad[3 : 3 + count])
        # The gradients of the weights need x, and those of gate and up need both.
        needs_x = trains_weight or up is not None
        ctx.save_for_backward(x if needs_x else None, up, *parameters)
        ctx.activation = activation
        inputs = x if up is None else gated(x, up, activation)
        return tuple(linears_reference(inputs, weights, biases))

    @staticmethod
    def backward(ctx, *grads):
        x, up, *parameters = ctx.saved_tensors
        count = len(grads)
        weights = parameters[:count]
        biases = parameters[count:]
        needs_dweight = ctx.needs_input_grad[3 : 3 + count]
        needs_dbias = ctx.needs_input_grad[3 + count :]
        trains_weight = any(needs_dweight)
        dx = dup = None
        inputs = x
        needs_dx, needs_dup = ctx.needs_input_grad[:2]
        if needs_dx or needs_dup:
            # dx = dy W, summed over the linears.
            for grad, weight in zip(grads, weights, strict=True):
                # The cast weight has no name, so its memory is free again after the product.
                if dx is None:
                    dx = grad @ weight.to(grad.dtype)
                else:
                    dx.addmm_(grad, weight.to(grad.dtype))
            if up is not None:
                dx, dup, inputs = gated_backward(dx, x, up, ctx.activation, product=trains_weight)
        elif up is not None and trains_weight:
            inputs = gated(x, up, ctx.activation)
        # dW = dy^T x, [out, in]
        dweights = [None] * count
        dbiases = [None] * count
        for i, grad in enumerate(grads):
            if needs_dweight[i]:
                dweights[i] = mm_as(grad.t(), inputs, weights[i].dtype)
        for i, grad in enumerate(grads):
            if needs_dbias[i]:
                dbiases[i] = sum_as(grad, biases[i].dtype)
        return dx, dup, None, *dweights, *dbiases


def mm_as(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a @ b in another dtype.

    On NVIDIA GPUs, an fp32 product of bf16 or fp16 factors is written as it was added up, without
    being rounded to their dtype and cast afterwards. ROCm and CPUs have no such product.
    """
    on_nvidia = a.is_cuda and not torch.version.hip
    is_half = a.dtype in (torch.bfloat16, torch.float16)
    widens = is_half and dtype == torch.float32
    if widens and on_nvidia and not torch.compiler.is_compiling():
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def sum_as(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over tokens: [tokens, out] -> [out] in dtype.

    GPUs do it in one pass, so that the sum is rounded only once.
    """
    if grad.is_cuda:
        return grad.sum(0, dtype=dtype)
    return grad.sum(0).to(dtype)
