"""Rotary position embedding (Su et al. 2021) in the half-split convention of Hugging Face checkpoints.

Dimension i < r/2 and its partner i + r/2 form a plane, which is rotated by the angle
position * theta^(-2i/r). r is the head's size, or less where only a part of it is rotated. The
backward of a rotation is the rotation by the opposite angle, so only the table of cosines and sines
is saved. `rope_inv_freq` knows the published ways to stretch the angles over longer texts.
"""

import math

import torch
from torch import Tensor

from kernels.triton_utils import next_power_of_2, tl, triton, use_triton

# The types of scaling whose angles depend on the length of the text.
LENGTH_DEPENDENT = ("dynamic", "longrope")


# ---- angles ----


def rope_inv_freq(
    theta: float, dim: int, scaling: dict | None, lengths: Tensor | None = None
) -> Tensor:
    """Returns the angle per position of each pair of dimensions.

    theta: the base of the angles.
    dim: number of rotated dimensions of a head, r.
    scaling: None, or a dict with `rope_type` and what that type needs, as `families.read_rope`
    makes it. Its types are
    - linear (Chen et al. 2023: positions are interpolated),
    - llama3 (Llama 3.1),
    - yarn (Peng et al. 2023),
    - dynamic (NTK-aware base, by the text's length),
    - longrope (Ding et al. 2024: two tables of factors, by the text's length).
    lengths: int64 [tokens], the length of the text that each token is in; for dynamic and longrope.
    Returns float32 [dim / 2]; [tokens, dim / 2] for dynamic and longrope.

    The order of operations is that of transformers. It matters: at position 100,000, a difference
    in the last bit of 3e-8 becomes 0.003.
    """
    kind = None if scaling is None else scaling["rope_type"]
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    if lengths is not None:
        exponents = exponents.to(lengths.device)
    if kind == "dynamic":
        max_positions, factor = scaling["max_positions"], scaling["factor"]
        # The stretch of a text of up to max_positions tokens is 1.
        stretch = (factor * lengths.clamp(min=max_positions)[:, None] / max_positions) - (
            factor - 1
        )
        return 1.0 / (theta * stretch ** (dim / (dim - 2))) ** exponents
    if kind == "longrope":
        short = torch.tensor(scaling["short_factor"], device=exponents.device)
        long = torch.tensor(scaling["long_factor"], device=exponents.device)
        is_long = lengths[:, None] > scaling["original_max_position_embeddings"]
        return 1.0 / (torch.where(is_long, long, short) * theta**exponents)
    wavelengths = theta**exponents  # over 2 pi
    inv_freq = 1.0 / wavelengths
    if kind is None:
        return inv_freq
    if kind == "linear":
        return inv_freq / scaling["factor"]
    if kind == "llama3":
        return llama3_inv_freq(inv_freq, scaling)
    assert kind == "yarn", kind
    return yarn_inv_freq(inv_freq, wavelengths, theta, dim, scaling)


def llama3_inv_freq(inv_freq: Tensor, scaling: dict) -> Tensor:
    """Stretches long wavelengths by `factor` and leaves short ones as they are (Llama 3.1).

    Those between are blended, linearly in the number of rotations within the original context.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    rotations = scaling["original_max_position_embeddings"] / (2 * math.pi / inv_freq)
    unscaled = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - unscaled) * inv_freq / scaling["factor"] + unscaled * inv_freq


def yarn_inv_freq(
    inv_freq: Tensor, wavelengths: Tensor, theta: float, dim: int, scaling: dict
) -> Tensor:
    """Stretches long wavelengths by `factor` and leaves short ones as they are (YaRN, Peng et al. 2023).

    Unlike Llama 3.1's, the blend is linear in the index of the pair, between the pairs that make
    beta_fast and beta_slow rotations within the original context.
    """
    context = scaling["original_max_position_embeddings"]

    def pair_of(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling["beta_fast"]), pair_of(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # so that the blend does not divide by zero
    pairs = torch.arange(dim // 2, dtype=torch.float32)
    unscaled = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling["factor"] * wavelengths) * (1 - unscaled) + inv_freq * unscaled


# ---- rotations ----


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first r dimensions of each head.

    x: [tokens, heads, d].
    cos, sin: [tokens, 1, r / 2] in x's dtype; r is even and at most d.
    Returns a new tensor like x.
    """
    # torch.compile fuses the plain form, and miscompiles writes into halves of a tensor (torch 2.13).
    if torch.compiler.is_compiling():
        return rope_reference(x, cos, sin)
    if not torch.is_grad_enabled():
        return rotate(x, cos, sin)
    return RopeFunction.apply(cos, sin, x)[0]


def rope_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `rope` of q [tokens, heads, d] and k [tokens, kv_heads, d]; on GPUs in one pass.

    It does not work in place: q and k are views of a linear's output, and autograd lets no function
    with two outputs change those. Nor would it save memory that lives longer than the next line.
    """
    if torch.compiler.is_compiling():
        return rope_reference(q, cos, sin), rope_reference(k, cos, sin)
    if not torch.is_grad_enabled():
        return rotate_qk(q, k, cos, sin)
    return RopeFunction.apply(cos, sin, q, k)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    x1, x2, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), -1)


class RopeFunction(torch.autograd.Function):
    """Rotates one tensor (`rope`) or two (`rope_qk`) by the same angles."""

    @staticmethod
    def forward(ctx, cos, sin, *tensors):
        ctx.save_for_backward(cos, sin)
        return rotate_all(tensors, cos, sin)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        return None, None, *rotate_all(grads, cos, -sin)


def rotate_all(tensors: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    if len(tensors) == 1:
        return (rotate(*tensors, cos, sin),)
    return rotate_qk(*tensors, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Computes `rope` without gradients, in plain PyTorch."""
    half = cos.shape[-1]
    sizes = (half, half, x.shape[-1] - 2 * half)
    out = torch.empty_like(x)
    x1, x2, rest = x.split(sizes, -1)
    out1, out2, out_rest = out.split(sizes, -1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin)
    if rest.shape[-1]:
        out_rest.copy_(rest)
    return out


def rotate_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `rope_qk` without gradients."""
    if use_triton(q):
        return rotate_qk_on_gpu(q, k, cos, sin)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate_qk_on_gpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `rope_qk` without gradients, by one launch of a Triton kernel."""
    tokens, heads, d = q.shape
    kv_heads = k.shape[1]
    half = cos.shape[-1]
    rest = d - 2 * half  # dimensions that are not rotated
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if tokens:
        rotate_kernel[(tokens,)](
            q, k, q_out, k_out, cos.contiguous(), sin.contiguous(),
            *q.stride()[:2], *k.stride()[:2], *q_out.stride()[:2], *k_out.stride()[:2],
            heads, kv_heads, half, rest,
            HEADS=next_power_of_2(heads), KV=next_power_of_2(kv_heads), HALF=next_power_of_2(half),
            REST=next_power_of_2(rest) if rest else 0,
        )  # fmt: skip
    return q_out, k_out


@triton.jit
def rotate_kernel(
    q, k, q_out, k_out, cos, sin, q_token, q_head, k_token, k_head, qo_token, qo_head, ko_token, ko_head,
    heads, kv_heads, half, rest, HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotates all heads of one token, for which its angles are read once."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + token * half + pair, pair < half, 0.0).to(tl.float32)
    s = tl.load(sin + token * half + pair, pair < half, 0.0).to(tl.float32)
    head = tl.arange(0, HEADS)[:, None]
    rotate_heads(
        q + token * q_token,
        q_out + token * qo_token,
        q_head,
        qo_head,
        head,
        heads,
        c,
        s,
        half,
        rest,
        HALF,
        REST,
    )
    head = tl.arange(0, KV)[:, None]
    rotate_heads(
        k + token * k_token,
        k_out + token * ko_token,
        k_head,
        ko_head,
        head,
        kv_heads,
        c,
        s,
        half,
        rest,
        HALF,
        REST,
    )


@triton.jit
def rotate_heads(
    x,
    out,
    stride,
    out_stride,
    head,
    heads,
    c,
    s,
    half,
    rest,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (pair < half)
    first = tl.load(x + head * stride + pair, inside, 0.0).to(tl.float32)
    second = tl.load(x + head * stride + half + pair, inside, 0.0).to(tl.float32)
    tl.store(out + head * out_stride + pair, first * c - second * s, inside)
    tl.store(out + head * out_stride + half + pair, second * c + first * s, inside)
    # REST is known when the kernel is compiled. In a branch that is decided later, a name could not
    # change its shape.
    if REST > 0:
        column = 2 * half + tl.arange(0, REST)[None, :]
        is_rest = (head < heads) & (column < 2 * half + rest)
        tl.store(
            out + head * out_stride + column,
            tl.load(x + head * stride + column, is_rest, 0.0),
            is_rest,
        )
