"""NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv 2305.14314): from codes to numbers, and a frozen
linear that computes with them.

A matrix [out, in] lies in blocks of 64 along its rows. Of a block are stored its largest absolute value, `absmax`, and
for each value which of 16 numbers between -1 and 1 it is, times absmax: two to a byte, the first in the high half.
Double quantisation (section 3 of the paper) stores absmax in 8 bits as well: offset + nested[block // 256] * one of 256
numbers (Dettmers et al. 2022, arXiv 2110.02861).

The product is not fused: the matrix is made whole in x's dtype, multiplied, and thrown away, forward and again in the
backward, so that what is kept for the backward is the 4-bit form. With more than some hundred tokens this is also the
fastest way. Bit for bit the numbers of bitsandbytes: code times absmax in fp32, rounded once.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, NESTED_BLOCK = 64, 256
# Quantiles of the normal distribution, as the paper's appendix E lists them
CODE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class NF4(NamedTuple):
    """A matrix in NF4, as plain tensors."""

    packed: Tensor  # uint8 [out, in / 2]
    absmax: Tensor  # float32 [out, in / 64]; uint8 with double quantisation
    nested: Tensor | None = None  # float32 [ceil(out * in / 64 / 256)], with double quantisation
    offset: Tensor | None = None  # float32 [1], likewise


Frozen = tuple[Tensor] | NF4  # a frozen matrix: itself, or its 4-bit form


@cache
def code(device: torch.device) -> Tensor:  # float32 [16]
    return torch.tensor(CODE, device=device)


@cache
def quadruples(device: torch.device) -> Tensor:
    """float32 [65536, 4]: what two bytes stand for, read as a little-endian number."""
    pairs = torch.cartesian_prod(code(device), code(device))  # of a byte, [256, 2]
    return torch.cat([pairs.repeat(256, 1), pairs.repeat_interleave(256, 0)], 1)


@cache
def dynamic_code(device: torch.device) -> Tensor:
    """float32 [256], sorted: the signed "dynamic" numbers of Dettmers 2016 (arXiv 1511.04561). Of ten to the -6, -5 ...
    0, one has 1, 2 ... 64 fractions, the middles of equal parts of 0.1 to 1, and each both signs; with them 0 and 1."""
    numbers = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        numbers += [*middles, *(-middle for middle in middles)]
    return torch.tensor(sorted(numbers), device=device)


def block_scales(frozen: NF4) -> Tensor:  # float32 [out, in / 64]
    if frozen.nested is None:
        return frozen.absmax
    numbers = dynamic_code(frozen.absmax.device).index_select(0, frozen.absmax.flatten().int())
    missing = -len(numbers) % NESTED_BLOCK
    scaled = F.pad(numbers, (0, missing)).view(-1, NESTED_BLOCK) * frozen.nested[:, None]
    return (scaled.flatten()[: len(numbers)] + frozen.offset).view(frozen.absmax.shape)


def nf4_dequantize(frozen: NF4, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in]. Four numbers are looked up at a time, which is what makes it bearable on CPUs."""
    out, scales = frozen.packed.shape[0], block_scales(frozen)
    fours = frozen.packed.contiguous().view(torch.uint16).flatten().int()
    numbers = quadruples(frozen.packed.device).index_select(0, fours).view(out, scales.shape[1], -1)
    return numbers.mul_(scales[..., None]).to(dtype).view(out, -1)


def nf4_dequantize_reference(frozen: NF4, dtype: torch.dtype) -> Tensor:
    halves = torch.stack([frozen.packed >> 4, frozen.packed & 15], -1).long()
    scales = block_scales(frozen)
    numbers = code(frozen.packed.device)[halves].view(*scales.shape, -1)
    return (numbers * scales[..., None]).to(dtype).flatten(1)


def matrix(frozen: Frozen, dtype: torch.dtype) -> Tensor:
    """[out, in] in dtype: the tensor itself, or made anew of its 4-bit form."""
    return frozen[0].to(dtype) if len(frozen) == 1 else nf4_dequantize(NF4(*frozen), dtype)


def nf4_linear(x: Tensor, frozen: NF4, bias: Tensor | None) -> Tensor:
    """x W^T + b of a frozen W. x: [tokens, in]; bias: frozen [out] in x's dtype. Returns [tokens, out]."""
    return NF4Linear.apply(x, bias, *frozen)


def nf4_linear_reference(x: Tensor, frozen: NF4, bias: Tensor | None) -> Tensor:
    return F.linear(x, nf4_dequantize_reference(frozen, x.dtype), bias)


class NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, *frozen):
        ctx.save_for_backward(*frozen)
        return F.linear(x, matrix(frozen, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        frozen = ctx.saved_tensors
        dx = grad @ matrix(frozen, grad.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, *[None] * len(frozen)
