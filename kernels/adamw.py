"""AdamW's step on GPUs in one pass over memory, for the forms that torch's fused step has not: moments in blocks of 256
numbers of 8 bits (Dettmers et al. 2022, arXiv 2110.02861), and weights in bf16 that lose no small step.

Read are a weight, its gradient and two moments, written the weight and the moments: of an fp32 weight with 8-bit
moments 16 bytes, of a bf16 weight 10. optimizers.py holds the state, what the numbers mean, and the plain form, which
computes on CPUs. What was wrong with a step (found_inf) is read by the kernel, and how many steps were taken is counted
on the device: the host never waits.
"""

import math
from functools import cache

import torch
from torch import Tensor

from kernels.nf4 import NESTED_BLOCK, dynamic_codebook
from kernels.triton_utils import tl, triton

ROWS, WARPS = 8, 8  # blocks of 256 numbers that a program takes, each of which lies in one warp


def adamw_step(
    weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict, seed: Tensor, found_inf: Tensor | None
) -> None:
    """Changes weight [n] and state in place, or nothing where found_inf is 1.

    weight, grad: contiguous [n], fp32 or bf16. state: m and v, uint8 [n] with float32 m_scale and v_scale [ceil(n /
    256)], or both float32 [n]; step, float32 scalar, which counts this step already. group: lr, betas, eps and
    weight_decay. seed: int64, of whose first number the rounding of bf16 weights is drawn. found_inf: float32 scalar.
    All tensors are on one GPU. The gradient is not changed.
    """
    count, (beta1, beta2), lr = weight.numel(), group["betas"], group["lr"]
    if not count:  # a process without rows
        return
    in_8_bits = state["m"].dtype == torch.uint8
    scales = [state[f"{name}_scale"] if in_8_bits else state[name] for name in ("m", "v")]
    adamw_kernel[(-(-count // (ROWS * NESTED_BLOCK)),)](
        weight, grad, state["m"], state["v"], *scales, *tables(weight.device), state["step"], seed,
        state["step"] if found_inf is None else found_inf, count, float(lr), 1.0 - lr * group["weight_decay"], beta1,
        1.0 - beta1, beta2, 1.0 - beta2, math.log(beta1), math.log(beta2), group["eps"],
        IN_8_BITS=in_8_bits, STOCHASTIC=weight.dtype == torch.bfloat16, MAY_FAIL=found_inf is not None, ROWS=ROWS,
        num_warps=WARPS,
    )  # fmt: skip


@cache
def tables(device: torch.device) -> tuple[Tensor, ...]:
    """float32 [256] each: the numbers of m, those of v, and the middles between neighbours of both, where the last has
    no neighbour."""
    numbers = [dynamic_codebook(device, signed) for signed in (True, False)]
    return (*numbers, *(torch.cat([x.new_full((1,), -math.inf), (x[:-1] + x[1:]) / 2]) for x in numbers))


@triton.jit
def adamw_kernel(
    weights, grads, m, v, m_scales, v_scales, m_numbers, v_numbers, m_middles, v_middles, step, seed, found_inf, count,
    lr, shrink, beta1, rest1, beta2, rest2, log_beta1, log_beta2, eps,
    IN_8_BITS: tl.constexpr, STOCHASTIC: tl.constexpr, MAY_FAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some blocks of 256 numbers a program. shrink: 1 - lr * weight_decay; rest1, rest2: 1 - beta1, 1 - beta2, which
    the host rounds once."""
    if MAY_FAIL:  # noqa: SIM102 (which is decided when the kernel is compiled, unlike the next)
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0).to(tl.int64)
    block = program * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside, there = at < count, block * 256 < count
    w = tl.load(weights + at, inside, 0.0).to(tl.float32)
    g = tl.load(grads + at, inside, 0.0).to(tl.float32)
    if IN_8_BITS:
        first = dequantized(m, m_scales, m_numbers, at, block, inside, there, 127)
        second = dequantized(v, v_scales, v_numbers, at, block, inside, there, 0)
    else:
        first, second = tl.load(m + at, inside, 0.0), tl.load(v + at, inside, 0.0)
    first = tl.fma(g, rest1, first * beta1)
    second = tl.fma(g * rest2, g, second * beta2)
    steps = tl.load(step)
    spread = tl.sqrt(second) * (1 / tl.sqrt(one_minus_exp(steps * log_beta2))) + eps
    rate = lr / one_minus_exp(steps * log_beta1)
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
    """1 - e^x for x below 0, without cancellation near 0: there by the series, up to x^6."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.25, series, 1 - tl.exp(x))


@triton.jit
def dequantized(codes, scales, numbers, at, block, inside, there, ZERO: tl.constexpr):
    """A moment [ROWS, 256] in fp32, 0 beyond its end, of which ZERO is the code."""
    code = tl.load(codes + at, inside, ZERO).to(tl.int32)
    return look_up(numbers, code) * tl.load(scales + block, there, 0.0)[:, None]


@triton.jit
def look_up(table, index):
    """Of a table of 256 numbers those at index. The table goes through shared memory, where 32 threads read 32 places
    at once; from global memory, a cache line at a time."""
    whole = tl.load(table + tl.arange(0, 256))
    return tl.reshape(tl.gather(whole, tl.reshape(index, [index.numel]), 0), index.shape)


@triton.jit
def store_quantized(values, codes, scales, middles, at, block, inside, there, SIGNED: tl.constexpr):
    """As quant.quantize_8bit does it on GPUs."""
    largest = tl.max(tl.abs(values), 1)
    least = tl.full(largest.shape, 1e-38, tl.float32)  # quant.TINY; a bare number that small would be taken for fp64
    factor = tl.div_rn(tl.full(largest.shape, 1.0, tl.float32), tl.maximum(largest, least))
    scaled = values * factor[:, None]
    place = next_place(scaled, SIGNED)
    code = place - (scaled <= look_up(middles, place)).to(tl.int32)
    tl.store(codes + at, code.to(tl.uint8), inside)
    tl.store(scales + block, largest, there)


@triton.jit
def next_place(x, SIGNED: tl.constexpr):
    """The place of the dynamic number next above x, which lies in -1 to 1; where x is almost a number, its own place or
    the next: either will do, the middle below it says the rest.

    Of positive numbers n = 2^k (without signs, twice as many) lie between 10^(k-7) and 10^(k-6), in the middles of n
    equal parts. So within each of these seven decades the place is a linear function of x; its first half a part
    belongs to the last number of the decade before.
    """
    n: tl.constexpr = 1 if SIGNED else 2
    size = tl.abs(x)
    slope, shift = n * 1e6 / 0.9, n * 8 / 9 - 0.5
    for k in tl.static_range(1, 7):
        above = size >= 10.0 ** (k - 7)
        slope = tl.where(above, n * 2**k * 10.0 ** (6 - k) / 0.9, slope)
        shift = tl.where(above, n * 2**k * 8 / 9 - 0.5, shift)
    place = (size * slope + shift).to(tl.int32)
    if SIGNED:  # among them 0 is the 127th
        return tl.where(x < 0, 127 - place, 128 + place)
    else:
        return place


@triton.jit
def rounded_stochastically(x, seed, start, ROWS: tl.constexpr):
    """As optimizers.round_stochastically: fp32 that bf16 holds. x: [ROWS, 256]. Eight numbers share a call of Philox,
    which makes four of 32 bits, of which each takes half of one. start: how many tiles of x's size come before."""
    at = start.to(tl.int32) * (ROWS * 32) + tl.arange(0, ROWS * 32)
    a, b, c, d = tl.randint4x(seed, at)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    noise = tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), [ROWS, 256])
    bits = x.to(tl.uint32, bitcast=True)
    up = (bits + noise.to(tl.uint32)) & 0xFFFF0000
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, up, bits).to(tl.float32, bitcast=True)
