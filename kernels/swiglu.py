"""The gate of an MLP: act(gate) * up (Shazeer 2020, arXiv 2002.05202; with SiLU it is SwiGLU, with GELU GeGLU).

Made in one pass on GPUs. Of the backward's two gradients each needs both inputs, and the product can be made anew of
them: so whoever keeps gate and up (kernels/linear.py, kernels/lora_linear.py) keeps nothing else of it. What they need
the product for again, the gradient of the linear behind it, gets it from the backward's own pass.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.triton_utils import tl, triton, use_triton

BLOCK = 1024
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up. Both [tokens, F] of one dtype, rows contiguous. Without gradients."""
    if use_triton(gate):
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        strides = gate.stride(0), up.stride(0)
        forward_kernel[grid(gate)](gate, up, out, gate.shape[1], *strides, ACTIVATION=activation, BLOCK=BLOCK)
        return out
    return ACTIVATIONS[activation](gate).mul_(up)


class Gated(torch.autograd.Function):
    """`gated` with gradients, for which gate and up are kept."""

    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated(gate, up, activation)

    @staticmethod
    def backward(ctx, grad):
        dgate, dup, _ = gated_backward(grad.clone(), *ctx.saved_tensors, ctx.activation)
        return dgate, dup, None


def gated_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](gate) * up


def gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, product: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of gate and up from that of act(gate) * up, which is overwritten, and act(gate) * up once more.

    All [tokens, F] of one dtype; grad is contiguous, gate and up have contiguous rows. product: whether the third is
    wanted; else it is None.
    """
    if use_triton(gate):
        dgate = torch.empty_like(grad)
        again = torch.empty_like(grad) if product else None
        backward_kernel[grid(gate)](
            grad, gate, up, dgate, again if product else grad, gate.shape[1], gate.stride(0), up.stride(0),
            PRODUCT=product, ACTIVATION=activation, BLOCK=BLOCK,
        )  # fmt: skip
        return dgate, grad, again
    again = gated(gate, up, activation) if product else None
    dup = ACTIVATIONS[activation](gate).mul_(grad)
    grad.mul_(up)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate), dup, again
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, gate, 0), dup, again
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, gate, approximate=approximate), dup, again


def grid(x: Tensor) -> tuple[int, int]:
    return x.shape[0], -(-x.shape[1] // BLOCK)


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """act(g) and its derivative, both fp32; what of them is not used costs nothing."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(g)
        value, slope = g * s, s * (1 + g * (1 - s))
    elif ACTIVATION == "gelu":
        s = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)  # the share of a normal distribution that lies below g
        value, slope = g * s, s + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(z)) / 2 is sigmoid(2 z); 2 z = 2 sqrt(2 / pi) (g + 0.044715 g^3)
        s = tl.sigmoid(1.5957691216057308 * g * (1 + 0.044715 * g * g))
        value, slope = g * s, s + g * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * g * g)
    else:
        tl.static_assert(ACTIVATION == "relu")
        value, slope = tl.where(g < 0, 0.0, g), tl.where(g <= 0, 0.0, 1.0)  # no numbers stay none
    return value, slope


@triton.jit
def forward_kernel(gate, up, out, width, gate_row, up_row, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * gate_row + at, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, inside, 0.0).to(tl.float32)
    value, _ = activate(g, ACTIVATION)
    tl.store(out + row * width + at, value * u, inside)


@triton.jit
def backward_kernel(
    grad, gate, up, dgate, product, width, gate_row, up_row,
    PRODUCT: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of up goes where grad was."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    d = tl.load(grad + row * width + at, inside, 0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + at, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, inside, 0.0).to(tl.float32)
    value, slope = activate(g, ACTIVATION)
    tl.store(dgate + row * width + at, d * u * slope, inside)
    tl.store(grad + row * width + at, d * value, inside)
    if PRODUCT:
        tl.store(product + row * width + at, value * u, inside)
