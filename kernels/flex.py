"""Attention with soft-capped scores on GPUs, by FlexAttention (He et al. 2024, arXiv 2412.05496).

FlexAttention compiles a kernel from two small functions: one changes a score, the other says which
token may attend to which. A block mask lists the blocks of 128 queries and 128 keys in which there
is anything to compute. torch makes such a mask by trying all pairs of tokens on the GPU; here it
follows from the documents' lengths, on the host, once a batch and window.

What torch.compile makes of it depends on the machine, so nothing here relies on it untested:
`works` first computes documents of a few hundred tokens both ways, forward and backward. If that
fails, or the numbers differ, `SlicedAttention` of kernels/attention.py computes instead, and a NOTE
says so.
"""

import sys
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from common.errors import first_line
from kernels.triton_utils import to_device

# Queries in a block, and keys in a block.
MASK_BLOCK = 128

# Batches with fewer tokens are not computed here: for tables of one or two blocks, torch would
# compile a kernel of their own.
FEWEST_TOKENS = 2 * MASK_BLOCK + 1

# The batches that `works` tries: (documents' lengths, window).
TRIALS: tuple[tuple[list[int], int | None], ...] = (
    ([200, 57, 300], None),
    ([130, 900, 70], 100),
)

# The largest difference that `works` accepts, relative to the largest number: for 16 bits.
FLEX_TOLERANCE = 2e-2


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, mask) -> Tensor:
    """Computes softmax(softcap * tanh(scale / softcap * q k^T)) v over the pairs of tokens in
    `mask`.

    q: [tokens, heads, head_dim].
    k, v: [tokens, kv_heads, head_dim].
    mask: of `block_mask`.
    Returns [tokens, heads, head_dim].
    """
    enable_gqa = q.shape[1] != k.shape[1]
    score_mod = soft_capped(softcap)
    # FlexAttention takes batches. This is a batch of one, and the mask keeps its documents apart.
    q = q.transpose(0, 1)[None]  # [1, heads, tokens, head_dim]
    k = k.transpose(0, 1)[None]
    v = v.transpose(0, 1)[None]
    out = compiled()(q, k, v, score_mod, mask, scale, enable_gqa)
    return out[0].transpose(0, 1)


@cache
def compiled():
    """Returns FlexAttention as a compiled kernel.

    fullgraph makes it an error if torch would otherwise compute the scores of all pairs. Sizes that
    change become symbols at the second compilation.
    """
    # The import is late because it brings the compiler.
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


@cache
def soft_capped(cap: float):
    """Returns the function that changes a score, always the same one for a cap."""

    def score_mod(score, batch, head, query, key):
        return cap * torch.tanh(score / cap)

    return score_mod


# ---- which token attends to which ----


def block_mask(lengths: list[int], window: int | None, device: torch.device):
    """Returns the BlockMask, a class of FlexAttention's, of causal attention inside documents.

    lengths: of the documents, in tokens.
    window: each token attends to itself and window - 1 tokens before it; None: to all before it.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tokens = sum(lengths)
    first = first_keys(lengths, window)
    first_on_device = to_device(first, device)

    def may_attend(batch, head, query, key):
        return (key <= query) & (key >= first_on_device[query])

    partial_blocks, full_blocks = blocks_to_compute(first)
    partial_counts, partial_indices = block_table(partial_blocks)
    full_counts, full_indices = block_table(full_blocks)
    return BlockMask.from_kv_blocks(
        to_device(partial_counts, device),
        to_device(partial_indices, device),
        to_device(full_counts, device),
        to_device(full_indices, device),
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=may_attend,
        seq_lengths=(tokens, tokens),
    )


def first_keys(lengths: list[int], window: int | None) -> np.ndarray:
    """Returns the first token that each token attends to, int64 [tokens].

    The numbers never fall.
    """
    starts = np.cumsum([0, *lengths[:-1]])  # [documents]
    document_starts = np.repeat(starts, lengths)  # [tokens]
    if window is None:
        return document_starts
    window_starts = np.arange(len(document_starts)) - window + 1
    return np.maximum(document_starts, window_starts)


def blocks_to_compute(first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which blocks of queries and keys are computed in part and which in full.

    first: of `first_keys`. Both results are bool [query blocks, key blocks]. In a partial block
    only some queries attend to some keys; in a full block all queries attend to all keys. The last
    block counts as partial if it has fewer than BLOCK tokens.
    """
    # The first and the last token of each block, as a column of queries and as a row of keys.
    starts = np.arange(0, len(first), MASK_BLOCK)
    ends = np.minimum(starts + MASK_BLOCK, len(first)) - 1
    query_starts = starts[:, None]
    query_ends = ends[:, None]
    key_starts = starts[None, :]
    key_ends = ends[None, :]
    # Since `first` never falls, the first query of a block attends to the earliest keys, and the
    # last query to the fewest of the earlier ones.
    earliest_key = first[starts][:, None]
    latest_first_key = first[ends][:, None]
    any_pair = (key_ends >= earliest_key) & (key_starts <= query_ends)
    # The first query attends to the fewest later keys.
    all_pairs = (key_ends <= query_starts) & (key_starts >= latest_first_key)
    has_all_tokens = ends - starts == MASK_BLOCK - 1
    all_pairs &= has_all_tokens[:, None] & has_all_tokens[None, :]
    return any_pair & ~all_pairs, all_pairs


def block_table(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a table of blocks as BlockMask stores it.

    blocks: bool [query blocks, key blocks].
    Returns the number of key blocks of each query block, int32 [1, 1, query blocks], and the
    indices of all key blocks, those that count first, int32 [1, 1, query blocks, key blocks].
    """
    counts = blocks.sum(1, dtype=np.int32)
    indices = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return counts[None, None], indices[None, None]


# ---- whether it works here ----


def works(q: Tensor, k: Tensor, reference: Callable) -> bool:
    """True if `attention` computes correctly with tensors of these shapes.

    It is tried once for each shape.

    q: [tokens, heads, head_dim].
    k: [tokens, kv_heads, head_dim].
    reference: reference(q, k, v, scale, softcap, window, lengths) computes the same by other means.
    """
    return passes_trial(q.shape[1], k.shape[1], q.shape[2], q.dtype, q.device, reference)


@cache
def passes_trial(
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    reference: Callable,
) -> bool:
    """Returns what `works` documents. A NOTE on stderr says why it is False."""
    shapes = (heads, kv_heads, head_dim)
    errors = []
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for lengths, window in TRIALS:
                error = largest_difference(lengths, window, shapes, dtype, device, reference)
                errors.append(error)
    # The compiler's errors are of many kinds, and all mean the same here.
    except Exception as failure:  # noqa: BLE001
        reason = first_line(failure)
    else:
        if max(errors) <= FLEX_TOLERANCE:
            return True
        reason = f"its numbers differ by {max(errors):.1e}"
    print(
        f"NOTE: FlexAttention does not work here ({reason}); attention with a soft-cap is computed"
        " in slices, which takes longer",
        file=sys.stderr,
    )
    return False


def largest_difference(
    lengths: list[int],
    window: int | None,
    shapes: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    reference: Callable,
) -> float:
    """Compares `attention` with the reference on random numbers.

    shapes: (heads, kv_heads, head_dim).
    Returns the largest difference of the output and of all gradients, each relative to its own
    largest number; infinity if one of them is NaN.
    """
    heads, kv_heads, head_dim = shapes
    scale = head_dim**-0.5
    softcap = 5.0  # small enough for random scores to feel it
    mask = block_mask(lengths, window, device)
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int) -> Tensor:
        shape = (sum(lengths), heads, head_dim)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    qkv = [random(heads), random(kv_heads), random(kv_heads)]
    grad_out = random(heads)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, scale, softcap, mask)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference(q, k, v, scale, softcap, window, lengths)

    def output_and_gradients(function: Callable) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = function(*leaves)
        gradients = torch.autograd.grad(out, leaves, grad_out)
        return [out.detach(), *gradients]

    our_results = output_and_gradients(ours)
    their_results = output_and_gradients(theirs)
    ratios = []
    for our, their in zip(our_results, their_results, strict=True):
        difference = (our - their).abs().max()
        ratios.append((difference / their.abs().max()).float())
    largest = torch.stack(ratios).max()
    return float(largest.nan_to_num(nan=float("inf")))
