"""Attention whose scores have a soft-cap, on GPUs, by FlexAttention (He et al. 2024, arXiv 2412.05496).

FlexAttention compiles a kernel out of two small functions: what becomes of a score, and who sees whom. Which blocks of
128 queries and 128 keys there is anything to compute in is said by a block mask. torch makes one by trying all pairs of
tokens on the GPU; here it follows from the documents' lengths, on the host, once a batch and window.

What torch.compile makes of it depends on the machine, and nothing here may rest on it unseen: `works` first computes
documents of a few hundred tokens both ways, forward and backward. Where that fails, or the numbers are others, the
slices of kernels/attention.py compute, and a NOTE says so.
"""

import sys
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kernels.triton_utils import to_device

BLOCK = 128  # queries, and keys, of a block
FEWEST_TOKENS = 2 * BLOCK + 1  # of a batch; tables of one or two blocks would be compiled for apart
TRIALS = (([200, 57, 300], None), ([130, 900, 70], 100))  # (documents' lengths, window)
TOLERANCE = 2e-2  # of 16 bits: the largest difference, relative to the largest number


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, mask) -> Tensor:
    """softmax(softcap * tanh(scale / softcap * q k^T)) v of the pairs of tokens in `mask`, a `block_mask`.

    q: [tokens, heads, head_dim], k and v: [tokens, kv_heads, head_dim]. Returns [tokens, heads, head_dim].
    """
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, tokens, head_dim]
    out = compiled()(q, k, v, soft_capped(softcap), mask, scale, grouped)
    return out[0].transpose(0, 1)


@cache
def compiled():
    """FlexAttention as a kernel. fullgraph: an error where torch would else compute the scores of all pairs."""
    from torch.nn.attention.flex_attention import flex_attention  # which brings the compiler

    return torch.compile(flex_attention, fullgraph=True)  # sizes that change are left open at the second compilation


@cache
def soft_capped(cap: float):
    def score_mod(score, batch, head, query, key):
        return cap * torch.tanh(score / cap)

    return score_mod


# ---- who sees whom ----


def block_mask(lengths: list[int], window: int | None, device: torch.device):
    """A BlockMask of torch.nn.attention.flex_attention: causal attention inside documents of these lengths, each token
    seeing itself and window - 1 before it."""
    from torch.nn.attention.flex_attention import BlockMask

    tokens = sum(lengths)
    first = first_keys(lengths, window)
    firsts = to_device(first, device)

    def sees(batch, head, query, key):
        return (key <= query) & (key >= firsts[query])

    some, whole = blocks_to_compute(first)
    tables = [to_device(table, device) for blocks in (some, whole) for table in listed(blocks)]
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens))


def first_keys(lengths: list[int], window: int | None) -> np.ndarray:
    """The first token that each token sees, int64 [tokens]; never falling."""
    begins = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    return begins if window is None else np.maximum(begins, np.arange(len(begins)) - window + 1)


def blocks_to_compute(first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each block of queries with each of keys, bool [blocks, blocks]: whether only some of their pairs see each
    other; whether all do. A last block that is not full counts as one of some. first: of `first_keys`."""
    starts = np.arange(0, len(first), BLOCK)
    ends = np.minimum(starts + BLOCK, len(first)) - 1
    touched = (ends[None, :] >= first[starts][:, None]) & (starts[None, :] <= ends[:, None])
    # Of a block's queries the first one sees the fewest keys ahead, the last one the fewest behind
    whole = (ends[None, :] <= starts[:, None]) & (starts[None, :] >= first[ends][:, None])
    full = ends - starts == BLOCK - 1
    whole &= full[:, None] & full[None, :]
    return touched & ~whole, whole


def listed(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A table as BlockMask has it: how many blocks of keys each block of queries has, int32 [1, 1, blocks], and which,
    those first, int32 [1, 1, blocks, blocks]."""
    counts = blocks.sum(1, dtype=np.int32)
    which = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return counts[None, None], which[None, None]


# ---- whether it works here ----


def works(q: Tensor, k: Tensor, reference: Callable) -> bool:
    """Whether `attention` computes with tensors like these, [tokens, heads, head_dim]; tried once for each shape.

    reference(q, k, v, scale, softcap, window, lengths): the same by other means.
    """
    return passes_trial(q.shape[1], k.shape[1], q.shape[2], q.dtype, q.device, reference)


@cache
def passes_trial(heads: int, kv_heads: int, head_dim: int, dtype, device: torch.device, reference: Callable) -> bool:
    try:
        with torch.inference_mode(False), torch.enable_grad():
            shapes = heads, kv_heads, head_dim
            error = max(largest_difference(*trial, shapes, dtype, device, reference) for trial in TRIALS)
    except Exception as failure:  # noqa: BLE001 - the compiler's errors are of many kinds, and all mean the same here
        reason = str(failure).strip().partition("\n")[0][:200] or type(failure).__name__
    else:
        if error <= TOLERANCE:
            return True
        reason = f"its numbers differ by {error:.1e}"
    print(
        f"NOTE: FlexAttention does not work here ({reason}); attention with a soft-cap is computed in slices, which"
        " takes longer",
        file=sys.stderr,
    )
    return False


def largest_difference(lengths: list[int], window, shapes: tuple, dtype, device, reference: Callable) -> float:
    """Between `attention` and the reference: of the output and of all gradients, relative to the largest number of
    each."""
    heads, kv_heads, head_dim = shapes
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(sum(lengths), n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    *qkv, cotangent = (torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes)
    scale, softcap, mask = head_dim**-0.5, 5.0, block_mask(lengths, window, device)
    ways = (
        lambda *qkv: attention(*qkv, scale, softcap, mask),
        lambda *qkv: reference(*qkv, scale, softcap, window, lengths),
    )
    found = []
    for way in ways:
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = way(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, cotangent)])
    ratios = [((a - b).abs().max() / b.abs().max()).float() for a, b in zip(*found, strict=True)]
    return float(torch.stack(ratios).max().nan_to_num(nan=float("inf")))
