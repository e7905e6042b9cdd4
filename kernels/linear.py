"""Linears whose weights are trained: y = x W^T + b, with W in fp32 whatever the dtype of x.

Autograd would keep the weight that was cast for the product until the backward, 2 bytes more a weight in bf16: here W
is cast again. As in kernels/lora_linear.py, linears that read the same input add its gradient up in one tensor, and of
an input act(gate) * up only gate and up are kept. A weight's gradient leaves its product in fp32 (`mm_as`).
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
        trained = any(wanted[: len(grads)])
        dx, dup, read = None, None, x
        if any(ctx.needs_input_grad[:2]):
            for grad, weight in zip(grads, weights, strict=True):
                dx = grad @ weight.to(grad.dtype) if dx is None else dx.addmm_(grad, weight.to(grad.dtype))
            if up is not None:
                dx, dup, read = gated_backward(dx, x, up, ctx.activation, product=trained)
        elif up is not None and trained:
            read = gated(x, up, ctx.activation)
        dweights = [
            mm_as(grad.t(), read, weight.dtype) if yes else None for grad, weight, yes in zip(grads, weights, wanted)
        ]
        dbiases = [
            sum_as(grad, bias.dtype) if yes else None for grad, bias, yes in zip(grads, biases, wanted[len(grads) :])
        ]
        return dx, dup, None, *dweights, *dbiases


def mm_as(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in another dtype. On NVIDIA GPUs an fp32 product of bf16 or fp16 factors is written as it was added up,
    without being rounded to their dtype and cast afterwards; ROCm has no such product, nor has a CPU."""
    narrow = a.dtype in (torch.bfloat16, torch.float16)
    if a.is_cuda and narrow and dtype == torch.float32 and not torch.version.hip and not torch.compiler.is_compiling():
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def sum_as(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over tokens, [tokens, out] -> [out] in dtype: on GPUs, which do it in one pass, rounded only once."""
    return grad.sum(0, dtype=dtype) if grad.is_cuda else grad.sum(0).to(dtype)
