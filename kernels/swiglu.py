"""The gate of an MLP: act(gate) * up (Shazeer 2020, arXiv 2002.05202; with SiLU it is SwiGLU, with GELU GeGLU).

Made in one pass on GPUs. Of the backward's two gradients each needs both inputs, and the product can be made anew of
them: so whoever keeps gate and up (kernels/linear.py, kernels/lora_linear.py) keeps nothing else of it.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gpu import on_gpu, tl, triton

BLOCK = 1024
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up. Both [tokens, F] of one dtype, rows contiguous. Without gradients."""
    if activation == "silu" and on_gpu(gate):
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        forward_kernel[grid(gate)](gate, up, out, gate.shape[1], gate.stride(0), up.stride(0), BLOCK=BLOCK)
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
        return *gated_backward(grad.clone(), *ctx.saved_tensors, ctx.activation), None


def gated_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](gate) * up


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from that of act(gate) * up, which is overwritten."""
    if activation == "silu" and on_gpu(gate):
        dgate = torch.empty_like(grad)
        backward_kernel[grid(gate)](grad, gate, up, dgate, gate.shape[1], gate.stride(0), up.stride(0), BLOCK=BLOCK)
        return dgate, grad
    dup = ACTIVATIONS[activation](gate).mul_(grad)
    grad.mul_(up)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate), dup
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, gate, 0), dup
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, gate, approximate=approximate), dup


def grid(x: Tensor) -> tuple[int, int]:
    return x.shape[0], -(-x.shape[1] // BLOCK)


@triton.jit
def forward_kernel(gate, up, out, width, gate_row, up_row, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * gate_row + at, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * width + at, g * tl.sigmoid(g) * u, inside)


@triton.jit
def backward_kernel(grad, gate, up, dgate, width, gate_row, up_row, BLOCK: tl.constexpr):
    """d up goes where grad was."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    d = tl.load(grad + row * width + at, inside, 0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + at, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, inside, 0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dgate + row * width + at, d * u * s * (1 + g * (1 - s)), inside)
    tl.store(grad + row * width + at, d * g * s, inside)
