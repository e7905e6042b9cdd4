"""A step of AdamW on GPUs in one pass over memory, for two forms that torch's fused step lacks.

They are moments in blocks of 256 numbers of 8 bits (Dettmers et al. 2022, arXiv 2110.02861), and
weights in bf16 that lose no small step, since they are rounded stochastically.

A step reads a weight, its gradient and two moments, and writes the weight and the moments: 16 bytes
for an fp32 weight with 8-bit moments, 10 for a bf16 weight. optimizers.py has the state, what its
numbers mean, and the plain form, which computes on CPUs. The kernel reads `found_inf` itself, and
the steps are counted on the device, so that the host never waits.
"""

import math
from functools import cache

import torch
from torch import Tensor

from kernels.nf4 import NESTED_BLOCK, dynamic_codebook
from kernels.triton_utils import tl, triton

# A program takes 8 blocks of 256 numbers with 8 warps, a block for each warp.
BLOCKS_PER_PROGRAM = 8
ADAMW_WARPS = 8


def adamw_step(
    weight: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    group: dict,
    seed: Tensor,
    found_inf: Tensor | None,
) -> None:
    """Updates weight and state in place, or changes nothing where found_inf is 1.

    All tensors are on one GPU.

    weight: contiguous [n], fp32 or bf16.
    grad: contiguous [n], fp32 or bf16; it is not changed.
    state: m and v, the moments, uint8 [n] with float32 m_scale and v_scale [ceil(n / 256)], or both
        float32 [n]; and step, a float32 scalar, which counts this step already.
    group: lr, betas, eps and weight_decay, as in torch's optimizers.
    seed: int64; its first number seeds the rounding of bf16 weights.
    found_inf: float32 scalar, 1 = skip this update, 0 or None = apply it.
    """
    count = weight.numel()
    # A rank may have no rows of a sharded weight.
    if not count:
        return
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    m = state["m"]
    v = state["v"]
    step = state["step"]
    in_8_bits = m.dtype == torch.uint8
    # Pointers have to be there: other tensors stand in for what the kernel does not read.
    m_scale = state["m_scale"] if in_8_bits else m
    v_scale = state["v_scale"] if in_8_bits else v
    found_inf_or_any = step if found_inf is None else found_inf
    # The weight decay is decoupled: a weight is multiplied by this.
    shrink = 1.0 - lr * group["weight_decay"]
    programs = -(-count // (BLOCKS_PER_PROGRAM * NESTED_BLOCK))
    # The kernel computes beta^step from the logarithm of beta, since only the GPU knows the step.
    adamw_kernel[(programs,)](
        weight, grad, m, v, m_scale, v_scale, *tables(weight.device), step, seed, found_inf_or_any,
        count, float(lr), shrink, beta1, 1.0 - beta1, beta2, 1.0 - beta2,
        math.log(beta1), math.log(beta2), group["eps"],
        IN_8_BITS=in_8_bits, STOCHASTIC=weight.dtype == torch.bfloat16,
        MAY_FAIL=found_inf is not None, ROWS=BLOCKS_PER_PROGRAM, num_warps=ADAMW_WARPS,
    )  # fmt: skip


@cache
def tables(device: torch.device) -> tuple[Tensor, ...]:
    """Returns the numbers of m, those of v, the middles of m, and those of v.

    A middle lies between a number and the one before it. Each result is float32 [256]. The first
    middle is -inf, since the first number has none before it.
    """
    m_numbers = dynamic_codebook(device, True)  # signed
    v_numbers = dynamic_codebook(device, False)
    middles = []
    for x in (m_numbers, v_numbers):
        before_first = x.new_full((1,), -math.inf)
        between = (x[:-1] + x[1:]) / 2
        middles.append(torch.cat([before_first, between]))
    m_middles, v_middles = middles
    return m_numbers, v_numbers, m_middles, v_middles


@triton.jit
def adamw_kernel(
    weights, grads, m, v, m_scales, v_scales, m_numbers, v_numbers, m_middles, v_middles,
    step, seed, found_inf, count, lr, shrink, beta1, rest1, beta2, rest2, log_beta1, log_beta2, eps,
    IN_8_BITS: tl.constexpr, STOCHASTIC: tl.constexpr, MAY_FAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Updates ROWS blocks of 256 numbers a program.

    shrink: 1 - lr * weight_decay.
    rest1, rest2: 1 - beta1 and 1 - beta2, which the host rounds once.
    """
    # Two conditions and not one: the first is decided when the kernel is compiled, the second when
    # it runs.
    if MAY_FAIL:  # noqa: SIM102
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0).to(tl.int64)
    block = program * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = at < count  # which numbers exist
    there = block * 256 < count  # which blocks exist
    w = tl.load(weights + at, inside, 0.0).to(tl.float32)
    g = tl.load(grads + at, inside, 0.0).to(tl.float32)
    if IN_8_BITS:
        first = dequantized(m, m_scales, m_numbers, at, block, inside, there, 127)
        second = dequantized(v, v_scales, v_numbers, at, block, inside, there, 0)
    else:
        first = tl.load(m + at, inside, 0.0)
        second = tl.load(v + at, inside, 0.0)
    first = tl.fma(g, rest1, first * beta1)
    second = tl.fma(g * rest2, g, second * beta2)
    steps = tl.load(step)
    # The moments start at 0, so early ones are too small by 1 - beta^steps.
    correction2 = one_minus_exp(steps * log_beta2)
    spread = tl.sqrt(second) * (1 / tl.sqrt(correction2)) + eps
    correction1 = one_minus_exp(steps * log_beta1)
    rate = lr / correction1
    w = w * shrink - rate * (first / spread)
    if STOCHASTIC:
        w = rounded_stochastically(w, tl.load(seed), program, ROWS)
    tl.store(weights + at, w, inside)
    if IN_8_BITS:
        store_quantized(first, m, m_scales, m_middles, at, block, inside, there, True)
        store_quantized(second, v, v_scales, v_middles, at, block, inside, there, False)
    else:
        tl.store(m + at, first, inside)
        tl.store(v + at, second, inside)


@triton.jit
def one_minus_exp(x):
    """Returns 1 - e^x for x below 0.

    Near 0 it uses the series up to x^6, which has no cancellation.
    """
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.25, series, 1 - tl.exp(x))


@triton.jit
def dequantized(codes, scales, numbers, at, block, inside, there, ZERO: tl.constexpr):
    """Returns a moment [ROWS, 256] in fp32, with 0 beyond its end.

    ZERO: the code of the number 0.
    """
    code = tl.load(codes + at, inside, ZERO).to(tl.int32)
    return look_up(numbers, code) * tl.load(scales + block, there, 0.0)[:, None]


@triton.jit
def look_up(table, index):
    """Returns table[index], of a table of 256 numbers.

    The table is read through shared memory, where 32 threads read 32 places at once; global memory
    would be read one cache line at a time.
    """
    whole = tl.load(table + tl.arange(0, 256))
    flat_index = tl.reshape(index, [index.numel])
    values = tl.gather(whole, flat_index, 0)
    return tl.reshape(values, index.shape)


@triton.jit
def store_quantized(values, codes, scales, middles, at, block, inside, there, SIGNED: tl.constexpr):
    """Quantizes a moment [ROWS, 256] to 8 bits and stores its codes and scales.

    It computes what quant.quantize_8bit does on GPUs.
    """
    largest = tl.max(tl.abs(values), 1)
    # quant.TINY; a Python number that small would be taken for fp64.
    least = tl.full(largest.shape, 1e-38, tl.float32)
    one = tl.full(largest.shape, 1.0, tl.float32)
    # Not 1 / x, which GPUs round otherwise than PyTorch does.
    factor = tl.div_rn(one, tl.maximum(largest, least))
    scaled = values * factor[:, None]
    # The nearest number is at this place, or at the one before if x is not above their middle.
    place = next_place(scaled, SIGNED)
    code = place - (scaled <= look_up(middles, place)).to(tl.int32)
    tl.store(codes + at, code.to(tl.uint8), inside)
    tl.store(scales + block, largest, there)


@triton.jit
def next_place(x, SIGNED: tl.constexpr):
    """Returns the place, in the sorted dynamic numbers, of the next number above x in -1 to 1.

    Where x is almost equal to a number, it is that number's place or the next. Either will do: the
    caller compares x with the middle below it.

    Between 10^(k-7) and 10^(k-6) there are n = 2^k positive numbers (without signs twice as many),
    in the middles of n equal parts. So within each of these seven decades the place is a linear
    function of x. The first half part of a decade belongs to the last number of the decade before.
    """
    n: tl.constexpr = 1 if SIGNED else 2
    size = tl.abs(x)
    slope = n * 1e6 / 0.9
    shift = n * 8 / 9 - 0.5
    for k in tl.static_range(1, 7):
        above = size >= 10.0 ** (k - 7)
        slope = tl.where(above, n * 2**k * 10.0 ** (6 - k) / 0.9, slope)
        shift = tl.where(above, n * 2**k * 8 / 9 - 0.5, shift)
    place = (size * slope + shift).to(tl.int32)
    # With signs, the number 0 is at place 127.
    if SIGNED:
        return tl.where(x < 0, 127 - place, 128 + place)
    else:
        return place


@triton.jit
def rounded_stochastically(x, seed, start, ROWS: tl.constexpr):
    """Returns x rounded to a bf16 number, up or down at random, as fp32.

    It is optimizers.round_stochastically in a kernel.

    x: fp32 [ROWS, 256].
    start: how many tiles of x's size come before this one.

    Eight numbers share one call of Philox, which returns four random numbers of 32 bits; each takes
    16 bits.
    """
    at = start.to(tl.int32) * (ROWS * 32) + tl.arange(0, ROWS * 32)
    a, b, c, d = tl.randint4x(seed, at)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    low_half = words & 0xFFFF
    high_half = (words >> 16) & 0xFFFF
    noise = tl.reshape(tl.join(low_half, high_half), [ROWS, 256])
    bits = x.to(tl.uint32, bitcast=True)
    # bf16 is the upper half of fp32. The noise carries into it as often as the lower half is large.
    up = (bits + noise.to(tl.uint32)) & 0xFFFF0000
    # The carry would turn infinity and NaN, whose exponent is all ones, into other numbers.
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, up, bits).to(tl.float32, bitcast=True)
