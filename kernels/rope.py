"""Rotary position embedding (Su et al. 2021) in the half-split convention of Hugging Face checkpoints.

Dimension i < r/2 and its partner i + r/2 are one plane, turned by position * theta^(-2i/r); r is the head's size, or
less where only a part of it turns. The backward of a rotation is the rotation by the opposite angle, so nothing is kept
but the table. `frequencies` knows the published ways to stretch the angles over longer texts.
"""

import math

import torch
from torch import Tensor

from kernels.triton_utils import next_power_of_2, tl, triton, use_triton

LENGTH_DEPENDENT = ("dynamic", "longrope")  # their angles depend on how long the text is


def rope_inv_freq(theta: float, dim: int, scaling: dict | None, lengths: Tensor | None = None) -> Tensor:
    """Angle per position of each pair of dimensions, float32 [dim / 2].

    scaling: None, or a dict with `rope_type` and what that type needs, as `families.read_rope` makes it:
    linear (Chen et al. 2023: positions are interpolated), llama3 (Llama 3.1), yarn (Peng et al. 2023), dynamic
    (NTK-aware base, by the text's length) and longrope (Ding et al. 2024: two tables of factors, by its length).
    lengths: int64 [tokens], the length of the text that each token is in; dynamic and longrope return
    [tokens, dim / 2]. Computed in transformers' order of operations: a position of 100,000 makes 0.003 of a last
    bit's 3e-8.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    if lengths is not None:
        exponents = exponents.to(lengths.device)
    kind = scaling and scaling["rope_type"]
    if kind == "dynamic":
        longest, factor = scaling["max_positions"], scaling["factor"]
        stretch = (factor * lengths.clamp(min=longest)[:, None] / longest) - (factor - 1)  # 1 up to max_positions
        return 1.0 / (theta * stretch ** (dim / (dim - 2))) ** exponents
    if kind == "longrope":
        tables = [torch.tensor(scaling[name], device=exponents.device) for name in ("short_factor", "long_factor")]
        beyond = lengths[:, None] > scaling["original_max_position_embeddings"]
        return 1.0 / (torch.where(beyond, tables[1], tables[0]) * theta**exponents)
    wavelengths = theta**exponents  # over 2 pi
    plain = 1.0 / wavelengths
    if kind is None:
        return plain
    if kind == "linear":
        return plain / scaling["factor"]
    if kind == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, those between blended linearly in the number of
        # turns that they make within the original context.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi / plain)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * plain / scaling["factor"] + keep * plain
    assert kind == "yarn", kind
    # As llama3, but the blend is linear in the index of the pair, between those that make beta_fast and beta_slow turns
    ends = [
        dim * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling["beta_fast"], scaling["beta_slow"])
    ]
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if scaling["truncate"] else ends
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling["factor"] * wavelengths) * (1 - keep) + plain * keep


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [tokens, heads, d]; cos and sin: [tokens, 1, r / 2] in x's dtype, r <= d even. Returns x with its first r
    dimensions turned, same shape and dtype."""
    if torch.compiler.is_compiling():  # fuses the plain form, and miscompiles writes into halves of a tensor (2.13)
        return rope_reference(x, cos, sin)
    if not torch.is_grad_enabled():
        return rotate(x, cos, sin)
    return Rope.apply(x, cos, sin)


def rope_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rope` of q [tokens, heads, d] and k [tokens, kv_heads, d], on GPUs in one pass. Not in place: q and k are views
    of what a linear made, which autograd lets no function of two outputs change; and in place nothing would be saved
    that lives longer than the next line."""
    if not use_triton(q) or torch.compiler.is_compiling():
        return rope(q, cos, sin), rope(k, cos, sin)
    return RopeQK.apply(q, k, cos, sin)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    x1, x2, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), -1)


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


class RopeQK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate_qk(q, k, cos, sin)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return *rotate_qk(dq, dk, cos, -sin), None, None


def rotate_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    (tokens, heads, d), kv_heads, half = q.shape, k.shape[1], cos.shape[-1]
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    strides = [stride for x in (q, k, q_out, k_out) for stride in x.stride()[:2]]
    rest = d - 2 * half  # dimensions that do not turn
    sizes = {
        "HEADS": next_power_of_2(heads),
        "KV": next_power_of_2(kv_heads),
        "HALF": next_power_of_2(half),
        "REST": next_power_of_2(rest) if rest else 0,
    }
    if tokens:
        rotate_kernel[(tokens,)](
            q, k, q_out, k_out, cos.contiguous(), sin.contiguous(),
            *strides, heads, kv_heads, half, rest, **sizes,
        )  # fmt: skip
    return q_out, k_out


@triton.jit
def rotate_kernel(
    q, k, q_out, k_out, cos, sin, q_token, q_head, k_token, k_head, qo_token, qo_head, ko_token, ko_head,
    heads, kv_heads, half, rest, HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A program a token: its angles are read once for all heads."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + token * half + pair, pair < half, 0.0).to(tl.float32)
    s = tl.load(sin + token * half + pair, pair < half, 0.0).to(tl.float32)
    head = tl.arange(0, HEADS)[:, None]
    rotate_heads(
        q + token * q_token, q_out + token * qo_token, q_head, qo_head, head, heads, c, s, half, rest, HALF, REST
    )
    head = tl.arange(0, KV)[:, None]
    rotate_heads(
        k + token * k_token, k_out + token * ko_token, k_head, ko_head, head, kv_heads, c, s, half, rest, HALF, REST
    )


@triton.jit
def rotate_heads(x, out, stride, out_stride, head, heads, c, s, half, rest, HALF: tl.constexpr, REST: tl.constexpr):
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (pair < half)
    first = tl.load(x + head * stride + pair, inside, 0.0).to(tl.float32)
    second = tl.load(x + head * stride + half + pair, inside, 0.0).to(tl.float32)
    tl.store(out + head * out_stride + pair, first * c - second * s, inside)
    tl.store(out + head * out_stride + half + pair, second * c + first * s, inside)
    if REST > 0:  # known when the kernel is compiled; a name can't change its shape in a branch that is taken later
        left = 2 * half + tl.arange(0, REST)[None, :]
        unturned = (head < heads) & (left < 2 * half + rest)
        tl.store(out + head * out_stride + left, tl.load(x + head * stride + left, unturned, 0.0), unturned)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out, half = torch.empty_like(x), cos.shape[-1]
    sizes = (half, half, x.shape[-1] - 2 * half)
    (x1, x2, rest), (y1, y2, kept) = x.split(sizes, -1), out.split(sizes, -1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    if rest.shape[-1]:
        kept.copy_(rest)
    return out
