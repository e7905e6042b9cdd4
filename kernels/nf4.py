"""NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv 2305.14314): from codes to numbers, and a frozen
linear that computes with them.

A matrix [out, in] lies in blocks of 64 along its rows. Of a block are stored its largest absolute value, `absmax`, and
for each value which of 16 numbers between -1 and 1 it is, times absmax: two to a byte, the first in the high half.
Double quantisation (section 3 of the paper) stores absmax in 8 bits as well: offset + nested[block // 256] * one of 256
numbers (Dettmers et al. 2022, arXiv 2110.02861).

The product is not fused: the matrix is made whole in x's dtype, multiplied, and thrown away, forward and again in the
backward, so that what is kept for the backward is the 4-bit form. With more than some hundred tokens this is also the
fastest way. With few rows, as when a text is written, a GPU multiplies while it dequantises and never makes the matrix.
Bit for bit the numbers of bitsandbytes: code times absmax in fp32, rounded once.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.triton_utils import next_power_of_2, tl, triton, use_triton

BLOCK, NESTED_BLOCK = 64, 256
BYTES, WARPS = 4096, 8  # that a program turns into numbers: 16 a thread
# Rows of x that are multiplied while dequantising. A matrix that is made moves 4.5 bytes a weight (0.5 read, 2 written,
# 2 read), this product 0.5, but it computes without tensor cores: for 8 rows some 40 instructions a weight, in which
# time an H100 moves between 4 and 5 bytes.
FEW, ROWS = 8, 4  # and those that a program takes; more want more registers than there are
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
def nf4_codebook(device: torch.device) -> Tensor:  # float32 [16]
    return torch.tensor(CODE, device=device)


@cache
def two_byte_table(device: torch.device) -> Tensor:
    """float32 [65536, 4]: what two bytes stand for, read as a little-endian number."""
    pairs = torch.cartesian_prod(nf4_codebook(device), nf4_codebook(device))  # of a byte, [256, 2]
    return torch.cat([pairs.repeat(256, 1), pairs.repeat_interleave(256, 0)], 1)


@cache
def dynamic_codebook(device: torch.device, signed: bool = True) -> Tensor:
    """`dynamic_numbers` on a device, float32 [256]."""
    return torch.tensor(dynamic_numbers(signed), device=device)


@cache
def dynamic_numbers(signed: bool) -> list[float]:
    """256 numbers, sorted: the "dynamic" ones of Dettmers 2016 (arXiv 1511.04561). Of ten to the -6, -5 ... 0, one has
    1, 2 ... 64 fractions, the middles of equal parts of 0.1 to 1, and each both signs; with them 0 and 1. Unsigned:
    twice as many fractions, no signs."""
    numbers = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        numbers += [*middles, *(-middle for middle in middles if signed)]
    return sorted(numbers)


def dequantize_8bit(codes: Tensor, scales: Tensor, numbers: Tensor) -> Tensor:
    """float32 [n] of blocks of 256: numbers[codes] times the block's scale. codes: uint8 [n]; scales: float32
    [ceil(n / 256)]."""
    found = numbers.index_select(0, codes.int())
    whole = len(found) // NESTED_BLOCK
    found[: whole * NESTED_BLOCK].view(-1, NESTED_BLOCK).mul_(scales[:whole, None])
    found[whole * NESTED_BLOCK :].mul_(scales[whole:])
    return found


def block_scales(frozen: NF4) -> Tensor:  # float32 [out, in / 64]
    if frozen.nested is None:
        return frozen.absmax
    numbers = dynamic_codebook(frozen.absmax.device)
    return (dequantize_8bit(frozen.absmax.flatten(), frozen.nested, numbers) + frozen.offset).view(frozen.absmax.shape)


def nf4_dequantize(frozen: NF4, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in]. Four numbers are looked up at a time, which is what makes it bearable on CPUs."""
    if use_triton(frozen.packed):
        return dequantize_on_gpu(frozen, dtype)
    out, scales = frozen.packed.shape[0], block_scales(frozen)
    fours = frozen.packed.contiguous().view(torch.uint16).flatten().int()
    numbers = two_byte_table(frozen.packed.device).index_select(0, fours).view(out, scales.shape[1], -1)
    return numbers.mul_(scales[..., None]).to(dtype).view(out, -1)


def nf4_dequantize_reference(frozen: NF4, dtype: torch.dtype) -> Tensor:
    halves = torch.stack([frozen.packed >> 4, frozen.packed & 15], -1).long()
    scales = block_scales(frozen)
    numbers = nf4_codebook(frozen.packed.device)[halves].view(*scales.shape, -1)
    return (numbers * scales[..., None]).to(dtype).flatten(1)


def dequantized_weight(frozen: Frozen, dtype: torch.dtype) -> Tensor:
    """[out, in] in dtype: the tensor itself, or made anew of its 4-bit form."""
    return frozen[0].to(dtype) if len(frozen) == 1 else nf4_dequantize(NF4(*frozen), dtype)


def nf4_linear(x: Tensor, frozen: NF4, bias: Tensor | None) -> Tensor:
    """x W^T + b of a frozen W. x: [tokens, in]; bias: frozen [out] in x's dtype. Returns [tokens, out]."""
    if not torch.is_grad_enabled():
        return frozen_product(x, frozen, bias)
    return NF4Linear.apply(x, bias, *frozen)


def frozen_product(x: Tensor, frozen: Frozen, bias: Tensor | None) -> Tensor:
    """`nf4_linear` without gradients, and of a plain W as well: the way that reads least memory."""
    if len(frozen) > 1 and use_triton(x) and len(x) <= FEW:
        return multiply_on_gpu(x, NF4(*frozen), bias)
    return F.linear(x, dequantized_weight(frozen, x.dtype), bias)


def nf4_linear_reference(x: Tensor, frozen: NF4, bias: Tensor | None) -> Tensor:
    return F.linear(x, nf4_dequantize_reference(frozen, x.dtype), bias)


class NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, *frozen):
        ctx.save_for_backward(*frozen)
        return frozen_product(x, frozen, bias)

    @staticmethod
    def backward(ctx, grad):
        frozen = ctx.saved_tensors
        dx = grad @ dequantized_weight(frozen, grad.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, *[None] * len(frozen)


def dequantize_tables(frozen: NF4) -> tuple[Tensor, ...]:
    """What the kernels read: scales and what they mean, the 16 and the 256 numbers. Of a matrix without double
    quantisation the last three are not looked at."""
    device = frozen.packed.device
    nested, offset = (frozen.absmax if x is None else x for x in (frozen.nested, frozen.offset))
    return frozen.absmax.contiguous(), nf4_codebook(device), nested, offset, dynamic_codebook(device)


def dequantize_on_gpu(frozen: NF4, dtype: torch.dtype) -> Tensor:
    packed, out = frozen.packed.contiguous(), frozen.packed.shape[0]
    made = torch.empty(out, 2 * packed.shape[1], dtype=dtype, device=packed.device)
    per_block, count = packed.shape[1] // frozen.absmax.shape[1], frozen.absmax.numel()
    dequantize_kernel[(-(-packed.numel() // BYTES),)](
        packed, *dequantize_tables(frozen), made, count, DOUBLE=frozen.nested is not None, BLOCKS=BYTES // per_block,
        PER_BLOCK=per_block, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return made


def multiply_on_gpu(x: Tensor, frozen: NF4, bias: Tensor | None) -> Tensor:
    x, (rows, size), out = x.contiguous(), x.shape, frozen.packed.shape[0]
    made, words = x.new_empty(rows, out), frozen.packed.contiguous().view(torch.int32)
    at_once, columns = min(ROWS, next_power_of_2(rows)), 4 if rows == 1 else 2
    threads = min(128, max(32, next_power_of_2(size // 32)))  # of 32 numbers each
    multiply_kernel[(-(-out // columns), -(-rows // at_once))](
        x, words, *dequantize_tables(frozen), made if bias is None else bias, made, rows, size, out,
        DOUBLE=frozen.nested is not None, BIAS=bias is not None, ROWS=at_once, COLUMNS=columns, THREADS=threads,
        num_warps=threads // 32,
    )  # fmt: skip
    return made


@triton.jit
def scales_of(absmax, nested, offset, numbers, block, inside, DOUBLE: tl.constexpr):
    """The scales of blocks, fp32; their product and sum are rounded apart, as bitsandbytes does it."""
    scale = tl.load(absmax + block, inside, 0)
    if DOUBLE:  # one return for both: Triton wants the types of all of a function's returns to be equal
        number = tl.load(numbers + scale.to(tl.int32))
        return number * tl.load(nested + block // 256, inside, 0.0) + tl.load(offset)
    else:
        return scale


@triton.jit
def dequantize_kernel(
    packed, absmax, code, nested, offset, numbers, out, count,
    DOUBLE: tl.constexpr, BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Some blocks a program, of PER_BLOCK bytes with two numbers each: both levels of scales in the one pass. count: of
    blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < count
    scale = scales_of(absmax, nested, offset, numbers, block, inside, DOUBLE)[:, None]
    at = block[:, None] * PER_BLOCK + tl.arange(0, PER_BLOCK)[None, :]
    byte = tl.load(packed + at, inside[:, None], 0).to(tl.int32)
    pair = tl.interleave(tl.load(code + (byte >> 4)) * scale, tl.load(code + (byte & 15)) * scale)
    at = block[:, None] * (2 * PER_BLOCK) + tl.arange(0, 2 * PER_BLOCK)[None, :]
    tl.store(out + at, pair.to(out.dtype.element_ty), inside[:, None])


@triton.jit
def half_scales(
    absmax, nested, offset, numbers, starts, start, per_row, there, DOUBLE: tl.constexpr, THREADS: tl.constexpr
):
    """[columns, THREADS]: the scales of 16 bytes each, half a block, from words `start` of rows of W at `starts`."""
    half = start // 4 + tl.arange(0, THREADS)[None, :]
    inside = there & (half < per_row // 4)
    return scales_of(absmax, nested, offset, numbers, (starts // 4 + half) // 2, inside, DOUBLE)


@triton.jit
def multiply_kernel(
    x, words, absmax, code, nested, offset, numbers, bias, made, rows, size, out,
    DOUBLE: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Some rows and columns of x W^T a program, which goes along the rows of W. A thread takes 16 bytes of codes of
    each column and the 32 numbers of x that belong to them, and keeps a sum of its own until the end."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there, per_row = (column < out)[:, None], size // 8
    starts = column.to(tl.int64)[:, None] * per_row
    sixteen = tl.load(code + tl.arange(0, 16))
    digit = tl.arange(0, 8)  # of a word of four bytes: of each the high half comes first
    shift = (digit // 2 * 8 + 4 - digit % 2 * 4)[None, None, None, :]
    total = tl.zeros([ROWS, COLUMNS, THREADS], tl.float32)
    for start in range(0, per_row, 4 * THREADS):
        at = start + tl.arange(0, 4 * THREADS)[None, :]
        word = tl.load(words + starts + at, there & (at < per_row), 0)
        index = (tl.reshape(word, [COLUMNS, THREADS, 4, 1]) >> shift) & 15
        number = tl.gather(sixteen, tl.reshape(index, [index.numel]), 0)
        number = tl.reshape(number, [COLUMNS, THREADS, 32])
        late: tl.constexpr = DOUBLE or ROWS == 1  # which of both orders needs fewer registers
        if not late:
            scale = half_scales(absmax, nested, offset, numbers, starts, start, per_row, there, DOUBLE, THREADS)
            number *= scale[:, :, None]
        place = start * 8 + tl.arange(0, 32 * THREADS)
        for i in tl.static_range(ROWS):
            row = tl.program_id(1).to(tl.int64) * ROWS + i
            values = tl.load(x + row * size + place, (place < size) & (row < rows), 0.0).to(tl.float32)
            part = tl.sum(number * tl.reshape(values, [1, THREADS, 32]), 2)
            if late:
                part *= half_scales(absmax, nested, offset, numbers, starts, start, per_row, there, DOUBLE, THREADS)
            # which rows a thread's sums are of is known when this is compiled: nothing is compared
            total += tl.where(tl.arange(0, ROWS)[:, None, None] == i, part[None, :, :], 0.0)
    result = tl.sum(total, 2)
    row_here = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    if BIAS:
        result += tl.load(bias + column, column < out, 0.0).to(tl.float32)[None, :]
    inside = (row_here < rows) & (column < out)[None, :]
    tl.store(made + row_here.to(tl.int64) * out + column[None, :], result, inside)
