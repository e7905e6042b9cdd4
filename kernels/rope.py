"""Rotary position embedding (Su et al. 2021), half-split as in checkpoints of Hugging Face.

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
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim  # [dim / 2]
    if lengths is not None:
        exponents = exponents.to(lengths.device)
    if scaling is None:
        return 1.0 / theta**exponents
    kind = scaling["rope_type"]
    if kind in LENGTH_DEPENDENT:
        assert lengths is not None, "these types need the lengths of the texts"
        if kind == "dynamic":
            return dynamic_inv_freq(exponents, lengths, theta, dim, scaling)
        return longrope_inv_freq(exponents, lengths, theta, scaling)
    wavelengths = theta**exponents  # over 2 pi
    inv_freq = 1.0 / wavelengths
    if kind == "linear":
        return inv_freq / scaling["factor"]
    if kind == "llama3":
        return llama3_inv_freq(inv_freq, scaling)
    assert kind == "yarn", kind
    return yarn_inv_freq(inv_freq, wavelengths, theta, dim, scaling)


def dynamic_inv_freq(
    exponents: Tensor, lengths: Tensor, theta: float, dim: int, scaling: dict
) -> Tensor:
    """Raises the base theta with the length of a text (NTK-aware scaling, as transformers has it).

    exponents: float32 [dim / 2], those of the base.
    The other arguments are those of `rope_inv_freq`. Returns float32 [tokens, dim / 2].
    """
    max_positions = scaling["max_positions"]
    factor = scaling["factor"]
    # The stretch of a text of up to max_positions tokens is 1.
    clamped = lengths.clamp(min=max_positions)[:, None]  # [tokens, 1]
    stretch = factor * clamped / max_positions - (factor - 1)
    base = theta * stretch ** (dim / (dim - 2))
    return 1.0 / base**exponents


def longrope_inv_freq(exponents: Tensor, lengths: Tensor, theta: float, scaling: dict) -> Tensor:
    """Divides each angle by a factor of its own (LongRoPE, Ding et al. 2024).

    There is one table of factors for texts within the original context, and one for longer texts.

    exponents: float32 [dim / 2], those of the base.
    The other arguments are those of `rope_inv_freq`. Returns float32 [tokens, dim / 2].
    """
    short = torch.tensor(scaling["short_factor"], device=exponents.device)
    long = torch.tensor(scaling["long_factor"], device=exponents.device)
    is_long = lengths[:, None] > scaling["original_max_position_embeddings"]
    factors = torch.where(is_long, long, short)
    return 1.0 / (factors * theta**exponents)


def llama3_inv_freq(inv_freq: Tensor, scaling: dict) -> Tensor:
    """Stretches long wavelengths by `factor` and leaves short ones as they are (Llama 3.1).

    Those between are blended, linearly in the number of rotations within the original context.
    """
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    rotations = scaling["original_max_position_embeddings"] / (2 * math.pi / inv_freq)
    unscaled = ((rotations - low) / (high - low)).clamp(0, 1)
    stretched_part = (1 - unscaled) * inv_freq / scaling["factor"]
    return stretched_part + unscaled * inv_freq


def yarn_inv_freq(
    inv_freq: Tensor, wavelengths: Tensor, theta: float, dim: int, scaling: dict
) -> Tensor:
    """Stretches long wavelengths by `factor`, and not short ones (YaRN, Peng et al. 2023).

    Unlike Llama 3.1's, the blend is linear in the index of the pair, between the pairs that make
    beta_fast and beta_slow rotations within the original context.
    """
    context = scaling["original_max_position_embeddings"]

    def pair_of(rotations: float) -> float:
        """Returns the index of the pair that makes so many rotations within the context."""
        wavelength = context / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    low = pair_of(scaling["beta_fast"])
    high = pair_of(scaling["beta_slow"])
    if scaling["truncate"]:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, dim - 1)
    if low == high:
        high += 0.001  # so that the blend does not divide by zero
    pairs = torch.arange(dim // 2, dtype=torch.float32)
    unscaled = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    stretched = 1.0 / (scaling["factor"] * wavelengths)
    return stretched * (1 - unscaled) + inv_freq * unscaled


# ---- rotations ----


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first r dimensions of each head.

    x: [tokens, heads, d].
    cos, sin: [tokens, 1, r / 2] in x's dtype; r is even and at most d.
    Returns a new tensor like x.
    """
    # torch.compile fuses the plain form, and miscompiles writes into halves of a tensor (torch
    # 2.13).
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
    sizes = (half, half, x.shape[-1] - 2 * half)
    x1, x2, rest = x.split(sizes, -1)
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
    """Rotates x alone, or q and k together."""
    if len(tensors) == 1:
        (x,) = tensors
        return (rotate(x, cos, sin),)
    q, k = tensors
    return rotate_qk(q, k, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Computes `rope` without gradients, in plain PyTorch."""
    half = cos.shape[-1]
    sizes = (half, half, x.shape[-1] - 2 * half)
    out = torch.empty_like(x)
    x1, x2, rest = x.split(sizes, -1)
    out1, out2, out_rest = out.split(sizes, -1)
    # In place, so that each product is written once.
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
    # The kernel takes any distance between tokens and heads, but none between a head's numbers.
    if q.stride(2) != 1:
        q = q.contiguous()
    if k.stride(2) != 1:
        k = k.contiguous()
    q_out = q.new_empty(q.shape)
    k_out = k.new_empty(k.shape)
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
    q, k, q_out, k_out, cos, sin,
    q_token, q_head, k_token, k_head, qo_token, qo_head, ko_token, ko_head,
    heads, kv_heads, half, rest,
    HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotates all heads of one token, for which its angles are read once.

    q_token, q_head: the strides of q from a token to the next, and from a head to the next; those
        of k, q_out and k_out likewise.
    """
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + token * half + pair, pair < half, 0.0).to(tl.float32)
    s = tl.load(sin + token * half + pair, pair < half, 0.0).to(tl.float32)
    head = tl.arange(0, HEADS)[:, None]
    rotate_heads(
        q + token * q_token, q_out + token * qo_token, q_head, qo_head,
        head, heads, c, s, half, rest, HALF, REST,
    )  # fmt: skip
    head = tl.arange(0, KV)[:, None]
    rotate_heads(
        k + token * k_token, k_out + token * ko_token, k_head, ko_head,
        head, kv_heads, c, s, half, rest, HALF, REST,
    )  # fmt: skip


@triton.jit
def rotate_heads(
    x, out, stride, out_stride, head, heads, c, s, half, rest,
    HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotates the heads of one token, from x to out, by cosines c and sines s [1, HALF]."""
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
        unrotated = tl.load(x + head * stride + column, is_rest, 0.0)
        tl.store(out + head * out_stride + column, unrotated, is_rest)
