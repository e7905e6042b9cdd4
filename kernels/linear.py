"""Linears whose weights are trained: y = x W^T + b, with W in fp32 whatever the dtype of x.

Autograd would keep the weight that was cast for the product until the backward, 2 bytes more a weight in bf16: here W
is cast again. As in kernels/lora_linear.py, linears that read the same input add its gradient up in one tensor, and of
an input act(gate) * up only gate and up are kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.swiglu import gated, gated_backward, gated_reference


def linears(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], up: Tensor | None = None, activation: str = ""
) -> list[Tensor]:
    """x: [tokens, in], which all of them read; or act(x) * up is what they read. weights: [out, in] of any float dtype,
    cast to x's; biases: [out], likewise. Returns a [tokens, out] of each, in x's dtype; gradients of weights and biases
    are in theirs."""
    return list(Linears.apply(x, up, activation, *weights, *biases))


def linears_reference(x, weights, biases, up=None, activation: str = "") -> list[Tensor]:
    x = x if up is None else gated_reference(x, up, activation)
    pairs = zip(weights, biases, strict=True)
    return [F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)) for weight, bias in pairs]


class Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, activation, *parameters):
        half = len(parameters) // 2
        trained = any(ctx.needs_input_grad[3 : 3 + half])
        ctx.save_for_backward(x if trained or up is not None else None, up, *parameters)
        ctx.activation = activation
        read = x if up is None else gated(x, up, activation)
        return tuple(linears_reference(read, parameters[:half], parameters[half:]))

    @staticmethod
    def backward(ctx, *grads):
        x, up, *parameters = ctx.saved_tensors
        weights, biases = parameters[: len(grads)], parameters[len(grads) :]
        wanted = ctx.needs_input_grad[3:]
        read = None  # made only where a weight wants a gradient
        if any(wanted[: len(grads)]):
            read = x if up is None else gated(x, up, ctx.activation)
        dx = dup = None
        if ctx.needs_input_grad[0]:
            for grad, weight in zip(grads, weights, strict=True):
                dx = grad @ weight.to(grad.dtype) if dx is None else dx.addmm_(grad, weight.to(grad.dtype))
            if up is not None:
                dx, dup = gated_backward(dx, x, up, ctx.activation)
        dweights = [
            (grad.t() @ read).to(weight.dtype) if yes else None for grad, weight, yes in zip(grads, weights, wanted)
        ]
        dbiases = [
            grad.sum(0).to(bias.dtype) if yes else None for grad, bias, yes in zip(grads, biases, wanted[len(grads) :])
        ]
        return dx, dup, None, *dweights, *dbiases
