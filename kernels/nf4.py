"""NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv 2305.14314): from codes to
numbers, and a frozen linear that computes with them.

A matrix [out, in] lies in blocks of 64 along its rows. Of a block are stored its largest absolute
value, `absmax`, and for each value which of 16 numbers between -1 and 1 it is, times absmax: two to
a byte, the first in the high half. Double quantisation (section 3 of the paper) stores absmax in 8
bits as well: offset + nested[block // 256] * one of 256 numbers (Dettmers et al. 2022, arXiv
2110.02861).

The product is not fused: the matrix is made whole in x's dtype, multiplied, and thrown away,
forward and again in the backward, so that what is kept for the backward is the 4-bit form. With
more than some hundred tokens this is also the fastest way. With few rows, as when a text is
written, a GPU multiplies while it dequantises and never makes the matrix. Bit for bit the numbers
of bitsandbytes: code times absmax in fp32, rounded once.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.triton_utils import next_power_of_2, tl, triton, use_triton

NF4_BLOCK = 64  # values that share one absmax
NESTED_BLOCK = 256  # values of absmax that share one scale, with double quantisation
# A program of dequantize_nf4_kernel reads 4,096 bytes with 8 warps, which is 16 bytes a thread.
BYTES = 4096
NF4_WARPS = 8
# For up to FEW rows of x, a GPU multiplies while it dequantises. Writing the whole matrix first
# moves 4.5 bytes a weight (0.5 read, 2 written, 2 read). The fused product moves 0.5, but it
# computes without tensor cores: for 8 rows some 40 instructions a weight, in which time an H100
# moves between 4 and 5 bytes.
FEW = 8
# The rows of x that one program of multiply_kernel takes. More would need more registers than there
# are.
ROWS_PER_PROGRAM = 4
# The quantiles of the normal distribution, as the paper's appendix E lists them.
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class NF4(NamedTuple):
    """A matrix [out, in] in NF4, as plain tensors."""

    packed: Tensor  # uint8 [out, in / 2]
    absmax: Tensor  # float32 [out, in / 64]; uint8 with double quantisation
    nested: Tensor | None = None  # float32 [ceil(out * in / 64 / 256)], with double quantisation
    offset: Tensor | None = None  # float32 [1], likewise


Frozen = tuple[Tensor] | NF4  # a frozen matrix: itself, or its 4-bit form


@cache
def nf4_codebook(device: torch.device) -> Tensor:
    """Returns the 16 numbers that a 4-bit code stands for, float32 [16]."""
    return torch.tensor(CODE, device=device)


@cache
def two_byte_table(device: torch.device) -> Tensor:
    """Returns the four numbers that two bytes stand for, float32 [65536, 4].

    The row is the two bytes read as one little-endian number.
    """
    codebook = nf4_codebook(device)
    pairs = torch.cartesian_prod(codebook, codebook)  # [256, 2]: the two numbers of one byte
    first_byte = pairs.repeat(256, 1)
    second_byte = pairs.repeat_interleave(256, 0)
    return torch.cat([first_byte, second_byte], 1)


@cache
def dynamic_codebook(device: torch.device, signed: bool = True) -> Tensor:
    """Returns `dynamic_numbers` as a tensor on a device, float32 [256]."""
    return torch.tensor(dynamic_numbers(signed), device=device)


@cache
def dynamic_numbers(signed: bool) -> list[float]:
    """Returns the 256 "dynamic" numbers of Dettmers 2016 (arXiv 1511.04561), sorted.

    Each power of ten from 10^-6 to 10^0 is multiplied by 1, 2, 4 ... 64 fractions, which are the
    middles of as many equal parts of the range from 0.1 to 1. 0 and 1 are added.

    signed: each number is there with both signs. Otherwise there are twice as many fractions and no
        negative numbers.
    """
    numbers = [0.0, 1.0]
    for exponent in range(7):
        num_fractions = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, num_fractions + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        power_of_ten = 10.0 ** (exponent - 6)
        positive = (middles * power_of_ten).tolist()
        numbers += positive
        if signed:
            numbers += [-number for number in positive]
    return sorted(numbers)


def dequantize_8bit(codes: Tensor, scales: Tensor, numbers: Tensor) -> Tensor:
    """Returns numbers[codes] times the scale of each block of 256 values, float32 [n].

    codes: uint8 [n].
    scales: float32 [ceil(n / 256)]; the last block may be shorter than 256.
    numbers: float32 [256], as `dynamic_codebook` returns them.
    """
    values = numbers.index_select(0, codes.int())
    # Only full blocks can be viewed as a matrix [blocks, 256]; the rest has the last scale.
    full_blocks = len(values) // NESTED_BLOCK
    split = full_blocks * NESTED_BLOCK
    values[:split].view(-1, NESTED_BLOCK).mul_(scales[:full_blocks, None])
    values[split:].mul_(scales[full_blocks:])
    return values


def block_scales(frozen: NF4) -> Tensor:
    """Returns the absmax of each block, float32 [out, in / 64], however it is stored."""
    if frozen.nested is None:
        return frozen.absmax
    assert frozen.offset is not None, "nested and offset come together"
    numbers = dynamic_codebook(frozen.absmax.device)
    absmax = dequantize_8bit(frozen.absmax.flatten(), frozen.nested, numbers)
    return (absmax + frozen.offset).view(frozen.absmax.shape)


def nf4_dequantize(frozen: NF4, dtype: torch.dtype) -> Tensor:
    """Returns the matrix [out, in] in dtype."""
    if use_triton(frozen.packed):
        return dequantize_nf4_on_gpu(frozen, dtype)
    out = frozen.packed.shape[0]
    scales = block_scales(frozen)
    # Two bytes, which are four numbers, are looked up at a time: that is faster on CPUs.
    byte_pairs = frozen.packed.contiguous().view(torch.uint16).flatten().int()
    table = two_byte_table(frozen.packed.device)
    values = table.index_select(0, byte_pairs)  # [out * in / 4, 4]
    values = values.view(out, scales.shape[1], -1)  # [out, in / 64, 64]
    return values.mul_(scales[..., None]).to(dtype).view(out, -1)


def nf4_dequantize_reference(frozen: NF4, dtype: torch.dtype) -> Tensor:
    codes = torch.stack([frozen.packed >> 4, frozen.packed & 15], -1).long()  # [out, in / 2, 2]
    scales = block_scales(frozen)  # [out, in / 64]
    values = nf4_codebook(frozen.packed.device)[codes]
    values = values.view(*scales.shape, -1)  # [out, in / 64, 64]
    return (values * scales[..., None]).to(dtype).flatten(1)


def dequantized_weight(frozen: Frozen, dtype: torch.dtype) -> Tensor:
    """Returns the matrix [out, in] in dtype: the stored tensor, or a new one out of 4 bits."""
    if len(frozen) == 1:
        return frozen[0].to(dtype)
    return nf4_dequantize(NF4(*frozen), dtype)


def nf4_linear(x: Tensor, frozen: NF4, bias: Tensor | None) -> Tensor:
    """Returns x W^T + b, [tokens, out], of a frozen W.

    x: [tokens, in].
    frozen: W, [out, in].
    bias: frozen [out] in x's dtype, or None.
    """
    if not torch.is_grad_enabled():
        return frozen_product(x, frozen, bias)
    return NF4Linear.apply(x, bias, *frozen)


def frozen_product(x: Tensor, frozen: Frozen, bias: Tensor | None) -> Tensor:
    """Returns what `nf4_linear` does, without gradients and for a plain W as well.

    It takes the way that reads the least memory: for few rows on a GPU, W in NF4 is never written
    as a whole.
    """
    is_nf4 = len(frozen) > 1
    if is_nf4 and use_triton(x) and len(x) <= FEW:
        return multiply_on_gpu(x, NF4(*frozen), bias)
    return F.linear(x, dequantized_weight(frozen, x.dtype), bias)


def nf4_linear_reference(x: Tensor, frozen: NF4, bias: Tensor | None) -> Tensor:
    return F.linear(x, nf4_dequantize_reference(frozen, x.dtype), bias)


class NF4Linear(torch.autograd.Function):
    """`nf4_linear` with the gradient of x.

    It saves the 4-bit form and dequantises it again in the backward.
    """

    @staticmethod
    def forward(ctx, x, bias, *frozen):
        ctx.save_for_backward(*frozen)
        return frozen_product(x, frozen, bias)

    @staticmethod
    def backward(ctx, grad):
        frozen = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grad @ dequantized_weight(frozen, grad.dtype)
        # The bias is frozen too.
        frozen_grads = [None] * len(frozen)
        return dx, None, *frozen_grads


def dequantize_tables(frozen: NF4) -> tuple[Tensor, ...]:
    """Returns what the kernels need to dequantise: absmax, the 16 numbers, nested, offset and the
    256 numbers.

    Without double quantisation the kernels do not read the last three. A pointer has to be there
    all the same, so absmax stands in for nested and offset.
    """
    device = frozen.packed.device
    nested = frozen.absmax if frozen.nested is None else frozen.nested
    offset = frozen.absmax if frozen.offset is None else frozen.offset
    return (
        frozen.absmax.contiguous(),
        nf4_codebook(device),
        nested,
        offset,
        dynamic_codebook(device),
    )


def dequantize_nf4_on_gpu(frozen: NF4, dtype: torch.dtype) -> Tensor:
    """Returns the matrix [out, in] in dtype, by one launch of dequantize_nf4_kernel."""
    packed = frozen.packed.contiguous()
    out, bytes_per_row = packed.shape
    weight = torch.empty(out, 2 * bytes_per_row, dtype=dtype, device=packed.device)
    bytes_per_block = bytes_per_row // frozen.absmax.shape[1]
    num_blocks = frozen.absmax.numel()
    programs = -(-packed.numel() // BYTES)
    # enable_fp_fusion=False: product and sum of a scale are each rounded, as in bitsandbytes. Fused
    # they would be rounded once.
    dequantize_nf4_kernel[(programs,)](
        packed, *dequantize_tables(frozen), weight, num_blocks, DOUBLE=frozen.nested is not None,
        BLOCKS=BYTES // bytes_per_block, PER_BLOCK=bytes_per_block,
        num_warps=NF4_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return weight


def multiply_on_gpu(x: Tensor, frozen: NF4, bias: Tensor | None) -> Tensor:
    """Returns x W^T + b, [rows, out], of up to FEW rows, without writing the whole of W."""
    x = x.contiguous()
    rows, size = x.shape
    out = frozen.packed.shape[0]
    result = x.new_empty(rows, out)
    words = frozen.packed.contiguous().view(torch.int32)  # eight codes each
    rows_per_program = min(ROWS_PER_PROGRAM, next_power_of_2(rows))
    columns_per_program = 4 if rows == 1 else 2
    # Each thread takes 32 numbers at a time. A program has at least one warp, at most four.
    threads = min(128, max(32, next_power_of_2(size // 32)))
    # A pointer has to be there; without a bias the kernel does not read it.
    bias_or_any = result if bias is None else bias
    grid = -(-out // columns_per_program), -(-rows // rows_per_program)
    multiply_kernel[grid](
        x, words, *dequantize_tables(frozen), bias_or_any, result, rows, size, out,
        DOUBLE=frozen.nested is not None, BIAS=bias is not None, ROWS=rows_per_program,
        COLUMNS=columns_per_program, THREADS=threads, num_warps=threads // 32,
    )  # fmt: skip
    return result


@triton.jit
def scales_of(absmax, nested, offset, numbers, block, inside, DOUBLE: tl.constexpr):
    """Returns the scales of blocks, fp32. Product and sum are each rounded, as in bitsandbytes."""
    scale = tl.load(absmax + block, inside, 0)
    # DOUBLE is known when the kernel is compiled, so only one of the two returns exists: Triton
    # wants all returns of a function to have the same type.
    if DOUBLE:
        number = tl.load(numbers + scale.to(tl.int32))
        scale_of_scales = tl.load(nested + block // 256, inside, 0.0)
        return number * scale_of_scales + tl.load(offset)
    else:
        return scale


@triton.jit
def dequantize_nf4_kernel(
    packed, absmax, code, nested, offset, numbers, out, count,
    DOUBLE: tl.constexpr, BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Dequantises BLOCKS blocks of PER_BLOCK bytes a program; a byte holds two codes.

    count: the number of all blocks.

    Both levels of scales are applied in the same pass.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < count
    scale = scales_of(absmax, nested, offset, numbers, block, inside, DOUBLE)[:, None]
    at = block[:, None] * PER_BLOCK + tl.arange(0, PER_BLOCK)[None, :]
    byte = tl.load(packed + at, inside[:, None], 0).to(tl.int32)
    high = tl.load(code + (byte >> 4)) * scale
    low = tl.load(code + (byte & 15)) * scale
    pair = tl.interleave(high, low)
    at = block[:, None] * (2 * PER_BLOCK) + tl.arange(0, 2 * PER_BLOCK)[None, :]
    tl.store(out + at, pair.to(out.dtype.element_ty), inside[:, None])


@triton.jit
def half_scales(
    absmax, nested, offset, numbers, starts, start, per_row, there,
    DOUBLE: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Returns the scales of half blocks, 16 bytes of codes each, fp32 [columns, THREADS].

    starts: the word at which each row of W starts.
    start: the first word within a row.
    per_row: words of a row.
    there: which columns exist.
    """
    # A half block is four words.
    half = start // 4 + tl.arange(0, THREADS)[None, :]
    inside = there & (half < per_row // 4)
    block = (starts // 4 + half) // 2
    return scales_of(absmax, nested, offset, numbers, block, inside, DOUBLE)


@triton.jit
def multiply_kernel(
    x, words, absmax, code, nested, offset, numbers, bias, y, rows, size, out,
    DOUBLE: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """Computes ROWS rows and COLUMNS columns of x W^T a program, which goes along the rows of W.

    A thread takes 16 bytes of codes of each column and the 32 numbers of x that belong to them. It
    keeps a sum of its own until the end.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = (column < out)[:, None]
    per_row = size // 8  # words of four bytes, each of eight codes
    starts = column.to(tl.int64)[:, None] * per_row
    sixteen = tl.load(code + tl.arange(0, 16))
    # The eight codes of a word: in each byte the high half comes first.
    digit = tl.arange(0, 8)
    shift = (digit // 2 * 8 + 4 - digit % 2 * 4)[None, None, None, :]
    total = tl.zeros([ROWS, COLUMNS, THREADS], tl.float32)
    for start in range(0, per_row, 4 * THREADS):
        at = start + tl.arange(0, 4 * THREADS)[None, :]
        word = tl.load(words + starts + at, there & (at < per_row), 0)
        # The codes of a thread's four words: [COLUMNS, THREADS, 4, 8].
        four_words = tl.reshape(word, [COLUMNS, THREADS, 4, 1])
        index = (four_words >> shift) & 15
        flat_index = tl.reshape(index, [index.numel])
        number = tl.gather(sixteen, flat_index, 0)
        number = tl.reshape(number, [COLUMNS, THREADS, 32])
        # The scale is applied to the weights or, late, to the sums: whichever order needs fewer
        # registers.
        late: tl.constexpr = DOUBLE or ROWS == 1
        if not late:
            scale = half_scales(
                absmax, nested, offset, numbers, starts, start, per_row, there, DOUBLE, THREADS
            )  # fmt: skip
            number *= scale[:, :, None]
        place = start * 8 + tl.arange(0, 32 * THREADS)
        for i in tl.static_range(ROWS):
            row = tl.program_id(1).to(tl.int64) * ROWS + i
            values = tl.load(x + row * size + place, (place < size) & (row < rows), 0.0)
            values = tl.reshape(values.to(tl.float32), [1, THREADS, 32])
            part = tl.sum(number * values, 2)
            if late:
                part *= half_scales(
                    absmax, nested, offset, numbers, starts, start, per_row, there, DOUBLE, THREADS
                )  # fmt: skip
            # Which row a sum belongs to is known when this is compiled, so nothing is compared at
            # run time.
            total += tl.where(tl.arange(0, ROWS)[:, None, None] == i, part[None, :, :], 0.0)
    result = tl.sum(total, 2)
    row_here = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    if BIAS:
        result += tl.load(bias + column, column < out, 0.0).to(tl.float32)[None, :]
    inside = (row_here < rows) & (column < out)[None, :]
    tl.store(y + row_here.to(tl.int64) * out + column[None, :], result, inside)
