"""Causal attention inside documents, for tokens that lie flat: [tokens, heads, head_dim], one document after another.

Only attention has to know where a document ends, so this file is the one place where that matters. Ways to compute it:

- On GPUs in bf16 or fp16: one call of FlashAttention (Dao 2023, arXiv 2307.08691) for all documents of a batch, whose
  boundaries it is given; sliding windows and grouped heads are its own. Nothing is padded, nothing waits.
- Scores with a soft-cap, which it does not know, on GPUs: FlexAttention (kernels/flex.py), where that works.
- Else runs of documents of similar length form a group, padded to its longest document: [documents, length, heads,
  head_dim]. Causality makes that exact without a padding mask: padding stands behind the real tokens, which never look
  ahead. A group is computed by
  - `scaled_dot_product_attention`: long documents on CPUs, and fp32 and older cards;
  - `SlicedAttention`, where that can't: scores with a soft-cap, and sliding windows of long documents. A slice of
    queries at a time, with no more keys than it sees; only q, k and v are kept, the backward computes the slice again;
  - the same on CPUs for documents up to 1,024 tokens, with the probabilities kept. PyTorch's fused CPU kernel spends
    most of its time in its backward: 8 documents of 70 tokens, 9 heads over 3, bf16, 2 cores, forward and backward:
    1.4 ms here against 7.6 ms there.

Grouped-query attention (Ainslie et al. 2023): query head h reads key-value head h // (heads / kv_heads).
"""

from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import flex
from kernels.triton_utils import to_device

KEEP_PROBS_UP_TO = 1024  # tokens; beyond it the probabilities, length x length / 2 a head, would be too much to keep
MAX_PADDING = 1.3  # a group's padded score matrices may be this much larger than its documents' own
MAX_SCORES = 8 << 20  # scores that SlicedAttention makes at a time where it does not keep them
SLICE_QUERIES = (
    128  # queries at a time where it does: of a long document's scores half are of keys that none of them sees
)
MAX_CACHED_MASK = 1 << 20  # numbers of a mask that is kept for the next layer
FLASH_HEAD_DIM = 256  # the largest that FlashAttention takes


class Scores(NamedTuple):
    """How a layer weighs what a token sees: softmax(scale * q k^T) over the keys in reach."""

    scale: float
    window: int | None = None  # a token sees itself and window - 1 before it (Beltagy et al. 2020); None: all
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118)


class PaddedGroup:
    """Neighbouring documents that are padded to one length together.

    slots: int64 [tokens of the group], where each lies in the padded [documents * length]; None where none is padding.
    """

    def __init__(self, lengths: list[int], device: torch.device | str):
        self.documents, self.length, self.tokens = len(lengths), max(lengths), sum(lengths)
        self.offset = 0  # of the first query among the keys
        self.slots = None
        if self.tokens < self.documents * self.length:
            slots = np.concatenate([np.arange(n) + i * self.length for i, n in enumerate(lengths)])
            self.slots = to_device(slots, device)
        self.masks: dict[tuple, Tensor] = {}

    def pad(self, x: Tensor) -> Tensor:  # [tokens, heads, d] -> [documents, length, heads, d], zeros in the padding
        if self.slots is not None:
            x = x.new_zeros(self.documents * self.length, *x.shape[1:]).index_copy(0, self.slots, x)
        return x.reshape(self.documents, self.length, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:  # the way back
        x = x.reshape(self.documents * self.length, *x.shape[2:])
        return x if self.slots is None else x.index_select(0, self.slots)

    def mask(self, like: Tensor, n_rep: int, rows: slice, key_slice: slice, window: int | None) -> Tensor:
        """[share * rows, seen] of 0 and -inf, made once for all layers of a kind where it is small."""
        kind = like.dtype, n_rep, rows.start, rows.stop, window
        if kind in self.masks:
            return self.masks[kind]
        start, stop = rows.start + self.offset, rows.stop + self.offset
        mask = causal_window_mask(like, start, key_slice.start, stop, window).repeat(n_rep, 1)
        if mask.numel() <= MAX_CACHED_MASK:
            self.masks[kind] = mask
        return mask


class QuerySuffix(PaddedGroup):
    """A document of `keys` tokens of which only the last `queries` ask."""

    def __init__(self, queries: int, keys: int, device: torch.device | str = "cpu"):
        self.documents, self.length, self.slots, self.masks = 1, queries, None, {}
        self.offset, self.keys, self.device = keys - queries, keys, device

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:  # of the queries and of the keys, as FlashAttention takes them
        return tuple(cu_seqlens([n], self.device) for n in (self.length, self.keys))

    def pad(self, x: Tensor) -> Tensor:
        return x[None]

    def unpad(self, x: Tensor) -> Tensor:
        return x[0]


class Documents:
    """Where the documents of a flat batch lie. Made once a batch, read by every layer.

    lengths: the documents' lengths in tokens, in order. Neighbours of similar length make large groups: sort a batch.
    positions: int64 [tokens], counted from 0 in each document. dropout_seeds: int64 [tokens], a number for
    each; None where nothing drops out. What only some ways of computing need is made when the first layer asks for it.
    """

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu"):
        self.lengths, self.dropout_seeds = lengths, None
        self.positions = to_device(np.concatenate([np.arange(n) for n in lengths]), device)
        self.device = device
        self.block_masks: dict[int | None, object] = {}  # of kernels/flex.py, by window

    @cached_property
    def groups(self) -> list[PaddedGroup]:
        runs: list[list[int]] = []
        for n in self.lengths:
            run = [*runs[-1], n] if runs else []
            if run and len(run) * max(run) ** 2 <= MAX_PADDING * sum(m * m for m in run):
                runs[-1] = run
            else:
                runs.append([n])
        return [PaddedGroup(run, self.device) for run in runs]

    @cached_property
    def doc_lengths(self) -> Tensor:  # int64 [tokens], the length of the document that each is in
        return to_device(np.repeat(self.lengths, self.lengths), self.device)

    @cached_property
    def bounds(self) -> Tensor:
        return cu_seqlens(self.lengths, self.device)


def cu_seqlens(lengths: list[int], device: torch.device | str) -> Tensor:
    """Where each document begins, and where the last one ends: int32 [documents + 1]."""
    return to_device(np.cumsum([0, *lengths], dtype=np.int32), device)


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, documents: Documents, keep: bool = True
) -> Tensor:
    """Causal attention of each document over itself.

    q: [tokens, heads, head_dim], k and v: [tokens, kv_heads, head_dim], one dtype, rotated already; heads a multiple of
    kv_heads. keep: short documents' probabilities, for the backward, which computes them again otherwise. Returns
    [tokens, heads, head_dim].
    """
    longest = max(documents.lengths)
    if scores.window and scores.window >= longest:
        scores = scores._replace(window=None)
    if (
        longest > 1 and flash_supports(q) and not scores.softcap
    ):  # single queries go another way there, without gradients
        return flash_attention(q, k, v, scores, documents.bounds, documents.bounds, longest, longest)
    if q.is_cuda and scores.softcap and len(q) >= flex.FEWEST_TOKENS and flex.works(q, k, sliced_reference):
        masks = documents.block_masks
        if scores.window not in masks:
            masks[scores.window] = flex.block_mask(documents.lengths, scores.window, q.device)
        return flex.attention(q, k, v, scores.scale, scores.softcap, masks[scores.window])
    return group_attention(q, k, v, scores, documents, keep)


def group_attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores, documents: Documents, keep: bool = True) -> Tensor:
    """document_attention, a group of documents of similar length after the other."""
    sizes = [group.tokens for group in documents.groups]
    parts = [
        group_attention_fn(*qkv, group, scores, keep)
        for *qkv, group in zip(q.split(sizes), k.split(sizes), v.split(sizes), documents.groups, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sliced_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, window: int | None, lengths: list[int]
):
    """What kernels/flex.py is held against."""
    return group_attention(q, k, v, Scores(scale, window, softcap), Documents(lengths, q.device))


def suffix_attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores, piece: QuerySuffix) -> Tensor:
    """As document_attention, of the last tokens of one document. q: [queries, heads, head_dim]; k, v: [keys, kv_heads,
    head_dim]."""
    if len(q) > 1 and flash_supports(q) and not scores.softcap:
        return flash_attention(q, k, v, scores, *piece.bounds, len(q), len(k))
    queries_per_slice = max(16, MAX_SCORES // (q.shape[1] * min(len(k), scores.window or len(k))))
    return SlicedAttention.apply(q, k, v, piece, scores, queries_per_slice, False)


# ---- FlashAttention ----


def flash_supports(q: Tensor) -> bool:
    """Whether torch's FlashAttention computes with tensors like q: 16 bits, on an NVIDIA GPU of 2020 or later."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > FLASH_HEAD_DIM:
        return False
    return has_flash(q.device)


@cache
def has_flash(device: torch.device) -> bool:
    built = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, q_bounds: Tensor, k_bounds: Tensor, longest_q: int, longest_k: int
) -> Tensor:
    """Causal attention of documents by one call of FlashAttention, with gradients.

    q: [queries, heads, head_dim], k and v: [keys, kv_heads, head_dim]; bounds: int32 [documents + 1], of each. A
    document's queries are the last ones of its keys. Returns [queries, heads, head_dim].

    torch's operator is called itself, not by torch.nn.attention.varlen: that imports the compiler, and takes other
    arguments in torch 2.11 than in 2.13. `activate_flash_attention_impl` puts versions 3 and 4 in this one's place.
    """
    d = q.shape[-1]
    size = flash_head_dim(d)
    if size > d:
        q, k, v = (F.pad(x, (0, size - d)) for x in (q, k, v))
    back = -1 if scores.window is None else scores.window - 1  # keys before a query's own that it sees; -1: all
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, q_bounds, k_bounds, longest_q, longest_k, 0.0, back < 0, False,
        scale=scores.scale, window_size_left=back, window_size_right=0,
    )  # fmt: skip
    return out[..., :d]


def flash_head_dim(head_dim: int) -> int:
    """The next head size that FlashAttention takes: multiples of 8; between 192 and 224 some cards have no backward."""
    return 256 if head_dim > 192 else -(-head_dim // 8) * 8


# ---- groups of documents ----


def group_attention_fn(q: Tensor, k: Tensor, v: Tensor, group: PaddedGroup, scores: Scores, keep: bool) -> Tensor:
    if scores.window and scores.window >= group.length:
        scores = scores._replace(window=None)
    short = q.device.type == "cpu" and group.length <= KEEP_PROBS_UP_TO and not scores.softcap
    if short or scores.softcap or scores.window:
        a_row = group.documents * q.shape[1] * min(group.length, scores.window or group.length)  # scores
        queries_per_slice = SLICE_QUERIES if short else max(16, MAX_SCORES // a_row)
        return SlicedAttention.apply(q, k, v, group, scores, queries_per_slice, short and keep)
    q, k, v = (group.pad(x).transpose(1, 2) for x in (q, k, v))  # [documents, heads, length, head_dim]
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda:  # what is left to it here has no fused kernel with grouped heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        grouped = False
    if q.is_cuda:
        disable_cudnn_attention()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores.scale, enable_gqa=grouped)
    return group.unpad(out.transpose(1, 2))


@cache
def disable_cudnn_attention() -> None:
    """cuDNN's attention plans anew for each new shape, which takes longer than a step, and every batch has others."""
    torch.backends.cuda.enable_cudnn_sdp(False)


class SlicedAttention(torch.autograd.Function):
    """One group, a slice of queries at a time, by products with the keys that it sees.

    The queries of the heads that share a key-value head stand below each other, so that one product [share * rows, d] x
    [d, seen] a key-value head serves them all and no key is repeated. keep: the probabilities, for the backward; else
    it computes them again.
    """

    @staticmethod
    def forward(ctx, q, k, v, group, scores, queries_per_slice, keep):
        n_rep = q.shape[1] // k.shape[1]
        queries, keys, values = (
            stack_heads(group.pad(q), n_rep),
            stack_heads(group.pad(k), 1),
            stack_heads(group.pad(v), 1),
        )
        out, kept = torch.empty_like(queries), []
        ctx.group, ctx.n_rep, ctx.scores = group, n_rep, scores
        ctx.slices = list(query_slices(group.length, queries_per_slice, scores.window, group.offset))
        for rows, key_slice in ctx.slices:
            probs, _ = SlicedAttention.probs(ctx, queries, keys, rows, key_slice)
            view_by_row(out, n_rep)[:, :, rows] = view_by_row(probs.to(q.dtype) @ values[:, key_slice], n_rep)
            kept += [probs] * keep
        ctx.save_for_backward(queries, keys, values, *kept)
        return group.unpad(unstack_heads(out, group.documents, n_rep))

    @staticmethod
    def probs(ctx, queries, keys, rows, key_slice):
        """[documents * kv_heads, share * rows, seen], and the tanh of the soft-cap if there is one. On CPUs scores have
        the inputs' dtype, and softmax is in fp32 inside; elsewhere, and with a soft-cap, all of it is in fp32."""
        scale, window, softcap = ctx.scores
        part, keys = query_rows(queries, ctx.n_rep, rows), keys[:, key_slice].transpose(1, 2)
        if softcap is None and queries.device.type == "cpu":
            mask = ctx.group.mask(queries, ctx.n_rep, rows, key_slice, window)
            return torch.baddbmm(mask, part, keys, alpha=scale).softmax(-1), None
        scores, capped = (part @ keys).float().mul_(scale), None
        if softcap:
            capped = scores.div_(softcap).tanh_()
            scores = capped * softcap
        scores += ctx.group.mask(scores, ctx.n_rep, rows, key_slice, window)
        return scores.softmax(-1), capped

    @staticmethod
    def backward(ctx, grad):
        queries, keys, values, *kept = ctx.saved_tensors
        group, n_rep, (scale, _, softcap) = ctx.group, ctx.n_rep, ctx.scores
        grad = stack_heads(group.pad(grad), n_rep)  # zeros in the padding, whose queries must not pull at real keys
        dq = torch.empty_like(queries)
        whole = len(ctx.slices) == 1 and ctx.slices[0][1].start == 0  # else the keys' gradients are added up, in fp32
        dk, dv = (None, None) if whole else (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        for number, (rows, key_slice) in enumerate(ctx.slices):
            again = None if kept else SlicedAttention.probs(ctx, queries, keys, rows, key_slice)
            probs, capped = (kept[number], None) if kept else again
            part, dout = query_rows(queries, n_rep, rows), query_rows(grad, n_rep, rows)
            dprobs = (dout @ values[:, key_slice].transpose(1, 2)).to(probs.dtype)
            dscores = torch.ops.aten._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            if softcap:
                dscores *= 1 - capped.square_()
            dscores = dscores.to(queries.dtype)
            view_by_row(dq, n_rep)[:, :, rows] = view_by_row(dscores @ keys[:, key_slice], n_rep)
            dk_part, dv_part = dscores.transpose(1, 2) @ part, probs.to(dout.dtype).transpose(1, 2) @ dout
            if whole:
                dk, dv = dk_part, dv_part
            else:
                dk[:, key_slice] += dk_part
                dv[:, key_slice] += dv_part
        grads = ((dq.mul_(scale), n_rep), (dk.mul_(scale).to(keys.dtype), 1), (dv.to(values.dtype), 1))
        return *(group.unpad(unstack_heads(x, group.documents, n)) for x, n in grads), None, None, None, None


def query_slices(length: int, queries_per_slice: int, window: int | None, offset: int = 0):
    """(rows, the keys that they see), as slices of positions; the first row stands at key `offset`."""
    for start in range(0, length, queries_per_slice):
        end = min(start + queries_per_slice, length)
        key_slice = slice(max(0, offset + start - window + 1) if window else 0, offset + end)
        yield slice(start, end), key_slice


def query_rows(x: Tensor, n_rep: int, rows: slice) -> Tensor:  # [..., share * T, n] -> [..., share * rows, n]
    whole = rows.stop - rows.start == x.shape[1] // n_rep
    return x if whole else view_by_row(x, n_rep)[:, :, rows].flatten(1, 2)


def view_by_row(x: Tensor, n_rep: int) -> Tensor:  # [documents * kv_heads, share * T, n] -> [..., share, T, n]
    return x.unflatten(1, (n_rep, -1))


def causal_window_mask(like: Tensor, row: int, key: int, end: int, window: int | None) -> Tensor:
    """-inf where the query at a position from `row` on does not see the key at one from `key` on, both up to `end`; 0
    where it does."""
    mask = like.new_full((end - row, end - key), float("-inf"))
    if window is None:
        return mask.triu_(1 + row - key)
    return mask.triu(1 + row - key) + mask.tril_(row - key - window)


def stack_heads(x: Tensor, n_rep: int) -> Tensor:
    """[documents, T, kv_heads * share, d] -> [documents * kv_heads, share * T, d]"""
    documents, T, heads, d = x.shape
    x = x.view(documents, T, heads // n_rep, n_rep, d).permute(0, 2, 3, 1, 4)
    x = x.reshape(documents * (heads // n_rep), n_rep * T, d)
    return x.contiguous()  # a view of one document would keep the tokens of all of them


def unstack_heads(x: Tensor, documents: int, n_rep: int) -> Tensor:
    """The way back: [documents * kv_heads, share * T, d] -> [documents, T, kv_heads * share, d]"""
    T, d = x.shape[1] // n_rep, x.shape[2]
    return x.view(documents, -1, n_rep, T, d).permute(0, 3, 1, 2, 4).reshape(documents, T, -1, d)


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """Attention of n new tokens a line over what the line holds so far, themselves included. For no gradients.

    q: [lines * n, heads, head_dim]; keys and values: [lines, kv_heads, length, head_dim], contiguous; mask: of
    `stacked_mask`. Returns [lines * n, heads, head_dim].
    """
    B, G, _, d = keys.shape
    n_rep, n = q.shape[1] // G, q.shape[0] // B
    if n == 1:
        queries = q.reshape(B * G, n_rep, d)
    else:
        queries = q.view(B, n, G, n_rep, d).permute(0, 2, 3, 1, 4).reshape(B * G, n_rep * n, d)
    keys, values = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
    if scores.softcap is None:
        weights = torch.add(mask, queries.bmm(keys), alpha=scores.scale).softmax(-1)
    else:
        weights = queries.bmm(keys).float().mul_(scores.scale / scores.softcap).tanh_()
        weights = weights.mul_(scores.softcap).add_(mask).softmax(-1).to(q.dtype)
    out = weights.bmm(values)
    if n == 1:
        return out.view(B, G * n_rep, d)
    return out.view(B, G, n_rep, n, d).permute(0, 3, 1, 2, 4).reshape(B * n, G * n_rep, d)


def decode_mask(visible: Tensor, kv_heads: int, n_rep: int, dtype: torch.dtype) -> Tensor:
    """What cached_attention adds to its scores, 0 or -inf, [lines * kv_heads, share * n, length], from what each of n
    new tokens a line sees, bool [lines, n, length]. Made once for all layers."""
    B, n, length = visible.shape
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
    mask = mask[:, None, None].expand(B, kv_heads, n_rep, n, length)
    return mask.reshape(B * kv_heads, n_rep * n, length)
