"""The gate of an MLP: act(gate) * up (Shazeer 2020, arXiv 2002.05202).

With SiLU it is SwiGLU, with GELU GeGLU. On GPUs it is computed in one pass.

In the backward, each of the two gradients needs both inputs, and the product can be computed again
from them. So a function that saves gate and up (kernels/linear.py, kernels/lora_linear.py) saves
nothing else of the gate. The product is needed once more for the gradient of the linear that reads
it, which gets it from the backward's own pass.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.triton_utils import tl, triton, use_triton

# Numbers of a token that a program of a kernel takes.
GATE_BLOCK = 1024
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Computes act(gate) * up, without gradients.

    gate, up: [tokens, F] of one dtype, rows contiguous.
    activation: a key of ACTIVATIONS.
    Returns [tokens, F].
    """
    if use_triton(gate):
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        gate_forward_kernel[grid(gate)](
            gate, up, out, gate.shape[1], gate.stride(0), up.stride(0),
            ACTIVATION=activation, BLOCK=GATE_BLOCK,
        )  # fmt: skip
        return out
    # The activation is a new tensor, so it can take the product.
    return ACTIVATIONS[activation](gate).mul_(up)


class Gated(torch.autograd.Function):
    """`gated` with gradients; saves gate and up."""

    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated(gate, up, activation)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        # A copy, because gated_backward overwrites it and autograd may use grad elsewhere.
        dgate, dup, _ = gated_backward(grad.clone(), gate, up, ctx.activation)
        return dgate, dup, None


def gated_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](gate) * up


def gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, product: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes the gradients of gate and up.

    grad: [tokens, F], contiguous, the gradient of act(gate) * up; it is overwritten.
    gate, up: [tokens, F] of the same dtype, rows contiguous.
    activation: a key of ACTIVATIONS.
    product: compute act(gate) * up once more.
    Returns the gradients of gate and up, and the product or None, each [tokens, F].
    """
    if use_triton(gate):
        dgate = torch.empty_like(grad)
        out = torch.empty_like(grad) if product else None
        # A pointer has to be there; without a product the kernel does not use it.
        out_or_any = grad if out is None else out
        gate_backward_kernel[grid(gate)](
            grad, gate, up, dgate, out_or_any, gate.shape[1], gate.stride(0), up.stride(0),
            PRODUCT=product, ACTIVATION=activation, BLOCK=GATE_BLOCK,
        )  # fmt: skip
        # The kernel has written the gradient of up over grad.
        return dgate, grad, out
    out = gated(gate, up, activation) if product else None
    dup = ACTIVATIONS[activation](gate).mul_(grad)
    grad.mul_(up)
    if activation == "silu":
        dgate = torch.ops.aten.silu_backward(grad, gate)
    elif activation == "relu":
        dgate = torch.ops.aten.threshold_backward(grad, gate, 0)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        dgate = torch.ops.aten.gelu_backward(grad, gate, approximate=approximate)
    return dgate, dup, out


def grid(x: Tensor) -> tuple[int, int]:
    """Returns the programs of a launch for x [tokens, F]: tokens, and blocks of a token."""
    tokens, width = x.shape
    return tokens, -(-width // GATE_BLOCK)


# ---- GPUs: a program computes BLOCK numbers of one token ----


@triton.jit
def activate_in_kernel(g, ACTIVATION: tl.constexpr):
    """Returns act(g) and its derivative, both fp32. One that is not used costs nothing."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(g)
        value = g * s
        slope = s * (1 + g * (1 - s))
    elif ACTIVATION == "gelu":
        # s is the part of a normal distribution that lies below g. The constants are 1 / sqrt(2)
        # and 1 / sqrt(2 pi).
        s = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        value = g * s
        slope = s + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 is sigmoid(2 z), and 2 z = 2 sqrt(2 / pi) (g + 0.044715 g^3).
        s = tl.sigmoid(1.5957691216057308 * g * (1 + 0.044715 * g * g))
        value = g * s
        slope = s + g * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * g * g)
    else:
        # The comparisons are such that NaN stays NaN.
        tl.static_assert(ACTIVATION == "relu")
        value = tl.where(g < 0, 0.0, g)
        slope = tl.where(g <= 0, 0.0, 1.0)
    return value, slope


@triton.jit
def gate_forward_kernel(
    gate, up, out, width, gate_row, up_row, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * gate_row + at, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, inside, 0.0).to(tl.float32)
    value, _ = activate_in_kernel(g, ACTIVATION)
    tl.store(out + row * width + at, value * u, inside)


@triton.jit
def gate_backward_kernel(
    grad, gate, up, dgate, product, width, gate_row, up_row,
    PRODUCT: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of up where grad was. PRODUCT: write act(gate) * up as well."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    d = tl.load(grad + row * width + at, inside, 0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + at, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, inside, 0.0).to(tl.float32)
    value, slope = activate_in_kernel(g, ACTIVATION)
    tl.store(dgate + row * width + at, d * u * slope, inside)
    tl.store(grad + row * width + at, d * value, inside)
    if PRODUCT:
        tl.store(product + row * width + at, value * u, inside)
