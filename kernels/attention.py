"""Causal attention inside documents, for flat tokens: [tokens, heads, head_dim].

Only attention needs to know where a document ends, so only this file deals with it. It computes by

- FlashAttention (Dao 2023, arXiv 2307.08691), on GPUs in bf16 or fp16: one call for all documents
  of a batch. It takes the documents' boundaries, sliding windows and grouped heads. Nothing is
  padded, and the host does not wait.
- FlexAttention (kernels/flex.py), on GPUs where it works, for scores with a soft-cap, which
  FlashAttention does not take.
- Otherwise, adjacent documents of similar length form a group, padded to its longest document:
  [documents, length, heads, head_dim]. This needs no padding mask: padding stands behind the real
  tokens, and causal attention never looks ahead. `SlicedAttention` computes a group, or, where it
  need not, torch's `scaled_dot_product_attention`: long documents in fp32 on CPUs, and older GPUs.

Grouped-query attention (Ainslie et al. 2023): with n_rep = heads / kv_heads, query head h reads
key-value head h // n_rep.
"""

from collections.abc import Iterator
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import flex
from kernels.triton_utils import to_device

# Tokens of a document on a CPU. The probabilities of longer ones, length x length / 2 numbers a
# head, would take too much memory to be kept for the backward.
KEEP_PROBS_UP_TO = 1024

# The padded score matrices of a group may be this much larger than the documents' own.
MAX_PADDING = 1.3

# Scores that SlicedAttention computes at a time where it does not keep the probabilities.
MAX_SCORES = 8 << 20

# The fewest queries in such a slice, however many keys they attend to.
MIN_SLICE_QUERIES = 16

# Queries in a slice where SlicedAttention keeps the probabilities. Without slices, half of a long
# document's scores would be of keys that the query may not attend to.
SLICE_QUERIES = 128

# A mask of at most so many numbers is kept for the next layer.
MAX_CACHED_MASK = 1 << 20

# The largest head_dim that FlashAttention takes.
FLASH_HEAD_DIM = 256


class Scores(NamedTuple):
    """How a layer weighs the keys that a query attends to: softmax(scale * q k^T).

    scale: the factor of q k^T.
    window: number of tokens that a token attends to: itself and window - 1 before it (Beltagy et
    al. 2020); None: all.
    softcap: scores s become softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118); None: they
    stay as they are.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


# ---- where the documents lie ----


class PaddedGroup:
    """Adjacent documents that are padded to one length.

    documents: number of documents.
    length: tokens of the longest one.
    tokens: tokens of all of them, without padding.
    slots: int64 [tokens], the place of each token in the padded [documents * length]; None if
    nothing is padded.
    offset: position of the first query among the keys.
    """

    def __init__(self, lengths: list[int], device: torch.device | str):
        self.documents = len(lengths)
        self.length = max(lengths)
        self.tokens = sum(lengths)
        self.offset = 0
        self.slots: Tensor | None = None
        if self.tokens < self.documents * self.length:
            slots = [np.arange(n) + i * self.length for i, n in enumerate(lengths)]
            self.slots = to_device(np.concatenate(slots), device)
        self.masks: dict[tuple, Tensor] = {}

    def pad(self, x: Tensor) -> Tensor:
        """[tokens, heads, d] -> [documents, length, heads, d], with zeros in the padding."""
        if self.slots is not None:
            padded = x.new_zeros(self.documents * self.length, *x.shape[1:])
            x = padded.index_copy(0, self.slots, x)
        return x.reshape(self.documents, self.length, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """[documents, length, heads, d] -> [tokens, heads, d], the inverse of `pad`."""
        x = x.reshape(self.documents * self.length, *x.shape[2:])
        if self.slots is None:
            return x
        return x.index_select(0, self.slots)

    def mask(
        self, like: Tensor, n_rep: int, rows: slice, key_slice: slice, window: int | None
    ) -> Tensor:
        """Returns the mask of a slice of queries, [n_rep * rows, keys] of 0 and -inf.

        It has the dtype of `like`. A small mask is computed once for all layers with the same
        window.
        """
        # The slice of keys is no part of this: it follows from that of the queries.
        kind = (like.dtype, n_rep, rows.start, rows.stop, window)
        if kind in self.masks:
            return self.masks[kind]
        first_query = rows.start + self.offset
        end = rows.stop + self.offset
        mask = causal_window_mask(like, first_query, key_slice.start, end, window)
        mask = mask.repeat(n_rep, 1)  # the rows of each query head, as `stack_heads` stacks them
        if mask.numel() <= MAX_CACHED_MASK:
            self.masks[kind] = mask
        return mask


class QuerySuffix(PaddedGroup):
    """One document of `keys` tokens, of which only the last `queries` are queries."""

    def __init__(self, queries: int, keys: int, device: torch.device | str = "cpu"):
        self.documents = 1
        self.length = queries
        self.offset = keys - queries
        self.slots = None
        self.masks = {}
        self.keys = keys
        self.device = device

    @cached_property
    def cu_seqlens_q(self) -> Tensor:
        return cu_seqlens([self.length], self.device)

    @cached_property
    def cu_seqlens_k(self) -> Tensor:
        return cu_seqlens([self.keys], self.device)

    def pad(self, x: Tensor) -> Tensor:
        return x[None]

    def unpad(self, x: Tensor) -> Tensor:
        return x[0]


class Documents:
    """Where the documents of a flat batch lie. It is built once a batch and read by every layer.

    lengths: the documents' lengths in tokens, in order. Sort a batch by length: adjacent documents
    of similar length make large groups.
    positions: int64 [tokens], counted from 0 in each document.
    dropout_seeds: int64 [tokens], one seed for each token; None without dropout or noise.
    block_masks: those of kernels/flex.py, by window.

    What only some of the ways to compute need is built when the first layer asks for it.
    """

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu"):
        self.lengths = lengths
        self.dropout_seeds: Tensor | None = None
        positions = [np.arange(n) for n in lengths]
        self.positions = to_device(np.concatenate(positions), device)
        self.device = device
        self.block_masks: dict[int | None, object] = {}

    @cached_property
    def groups(self) -> list[PaddedGroup]:
        """The documents in order, cut into groups that are each padded to one length."""
        runs: list[list[int]] = []
        for length in self.lengths:
            if runs and fit_one_group([*runs[-1], length]):
                runs[-1].append(length)
            else:
                runs.append([length])
        return [PaddedGroup(run, self.device) for run in runs]

    @cached_property
    def doc_lengths(self) -> Tensor:
        """The length of each token's document, int64 [tokens]."""
        return to_device(np.repeat(self.lengths, self.lengths), self.device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """The boundaries of the documents, int32 [documents + 1]."""
        return cu_seqlens(self.lengths, self.device)


def fit_one_group(lengths: list[int]) -> bool:
    """True if padding documents to the longest one adds few scores (MAX_PADDING)."""
    padded_scores = len(lengths) * max(lengths) ** 2
    own_scores = sum(length**2 for length in lengths)
    return padded_scores <= MAX_PADDING * own_scores


def cu_seqlens(lengths: list[int], device: torch.device | str) -> Tensor:
    """Returns each document's start, and the last one's end: int32 [documents + 1]."""
    return to_device(np.cumsum([0, *lengths], dtype=np.int32), device)


# ---- attention ----


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, documents: Documents, keep: bool = True
) -> Tensor:
    """Computes causal attention of each document over itself.

    q: [tokens, heads, head_dim], rotated already; heads is a multiple of kv_heads.
    k, v: [tokens, kv_heads, head_dim], in q's dtype; k is rotated already.
    keep: save the probabilities of short documents for the backward; False: the backward computes
    them again.
    Returns [tokens, heads, head_dim].
    """
    longest = max(documents.lengths)
    if scores.window and scores.window >= longest:
        scores = scores._replace(window=None)
    softcap = scores.softcap
    # Documents of one token do not go to FlashAttention: its operator takes another path for single
    # queries, and that path has no gradients.
    if longest > 1 and not softcap and flash_supports(q):
        boundaries = documents.cu_seqlens
        return flash_attention(q, k, v, scores, boundaries, boundaries, longest, longest)
    has_enough_tokens = q.is_cuda and len(q) >= flex.FEWEST_TOKENS
    if softcap and has_enough_tokens and flex.works(q, k, sliced_reference):
        masks = documents.block_masks
        if scores.window not in masks:
            masks[scores.window] = flex.block_mask(documents.lengths, scores.window, q.device)
        return flex.attention(q, k, v, scores.scale, softcap, masks[scores.window])
    return group_attention(q, k, v, scores, documents, keep)


def group_attention(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, documents: Documents, keep: bool = True
) -> Tensor:
    """Computes the same as `document_attention`, one group of documents after the other."""
    groups = documents.groups
    sizes = [group.tokens for group in groups]
    q_parts = q.split(sizes)
    k_parts = k.split(sizes)
    v_parts = v.split(sizes)
    outputs = []
    for q_part, k_part, v_part, group in zip(q_parts, k_parts, v_parts, groups, strict=True):
        outputs.append(padded_group_attention(q_part, k_part, v_part, group, scores, keep))
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs)


def sliced_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float,
    window: int | None,
    lengths: list[int],
) -> Tensor:
    """Computes the same as `flex.attention`, by groups. `flex.works` compares the two."""
    scores = Scores(scale, window, softcap)
    return group_attention(q, k, v, scores, Documents(lengths, q.device))


def suffix_attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores, piece: QuerySuffix) -> Tensor:
    """Computes causal attention of the last tokens of one document over the whole document.

    q: [queries, heads, head_dim]; k, v: [keys, kv_heads, head_dim]; otherwise as in
    `document_attention`.
    Returns [queries, heads, head_dim].
    """
    queries, heads, _ = q.shape
    keys = len(k)
    if queries > 1 and not scores.softcap and flash_supports(q):
        cu_seqlens_q = piece.cu_seqlens_q
        cu_seqlens_k = piece.cu_seqlens_k
        return flash_attention(q, k, v, scores, cu_seqlens_q, cu_seqlens_k, queries, keys)
    keys_per_query = min(keys, scores.window or keys)
    queries_per_slice = max(MIN_SLICE_QUERIES, MAX_SCORES // (heads * keys_per_query))
    return SlicedAttention.apply(q, k, v, piece, scores, queries_per_slice, False)


# ---- FlashAttention ----


def flash_supports(q: Tensor) -> bool:
    """True if torch's FlashAttention takes tensors like q: 16 bits, on an NVIDIA GPU of 2020 or
    later."""
    if not q.is_cuda or q.shape[-1] > FLASH_HEAD_DIM:
        return False
    return q.dtype in (torch.float16, torch.bfloat16) and has_flash(q.device)


@cache
def has_flash(device: torch.device) -> bool:
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Scores,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor:
    """Computes causal attention of all documents by one call of FlashAttention, with gradients.

    q: [queries, heads, head_dim]; the queries of a document are the last ones of its tokens.
    k, v: [keys, kv_heads, head_dim].
    cu_seqlens_q, cu_seqlens_k: int32 [documents + 1], the boundaries of the documents in q and in k
    (`cu_seqlens`).
    max_seqlen_q, max_seqlen_k: the most queries and the most keys of a document.
    Returns [queries, heads, head_dim].

    torch's operator is called itself, not through torch.nn.attention.varlen, which imports the
    compiler and takes other arguments in torch 2.11 than in 2.13. `activate_flash_attention_impl`
    puts versions 3 and 4 in this one's place.
    """
    head_dim = q.shape[-1]
    padding = flash_head_dim(head_dim) - head_dim
    if padding > 0:
        # Zeros change no score, and the outputs that they make are cut off below.
        q = F.pad(q, (0, padding))
        k = F.pad(k, (0, padding))
        v = F.pad(v, (0, padding))
    # The number of keys before its own that a query attends to; -1 means all.
    window_left = -1 if scores.window is None else scores.window - 1
    is_causal = window_left < 0
    dropout = 0.0
    return_debug_mask = False
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout, is_causal, return_debug_mask,
        scale=scores.scale, window_size_left=window_left, window_size_right=0,
    )  # fmt: skip
    return out[..., :head_dim]


def flash_head_dim(head_dim: int) -> int:
    """Returns the next head_dim that FlashAttention takes: a multiple of 8, or 256 above 192.

    Some GPUs have no backward between 192 and 224.
    """
    if head_dim > 192:
        return 256
    return -(-head_dim // 8) * 8


# ---- groups of documents ----


def padded_group_attention(
    q: Tensor, k: Tensor, v: Tensor, group: PaddedGroup, scores: Scores, keep: bool
) -> Tensor:
    """Computes the same as `document_attention`, for the tokens of one group."""
    if scores.window and scores.window >= group.length:
        scores = scores._replace(window=None)
    on_cpu = q.device.type == "cpu"
    is_short = on_cpu and group.length <= KEEP_PROBS_UP_TO and not scores.softcap
    # Of long documents torch's own kernel is as fast in fp32, but not in bf16.
    is_sliced = is_short or (on_cpu and q.dtype == torch.bfloat16)
    if is_sliced or scores.softcap or scores.window:
        queries_per_slice = SLICE_QUERIES
        if not is_short:
            keys_per_query = min(group.length, scores.window or group.length)
            scores_per_query = group.documents * q.shape[1] * keys_per_query
            most = MAX_SCORES // scores_per_query
            if not scores.softcap and not scores.window:
                most = min(most, SLICE_QUERIES)
            queries_per_slice = max(MIN_SLICE_QUERIES, most)
        keep_probs = is_short and keep
        return SlicedAttention.apply(q, k, v, group, scores, queries_per_slice, keep_probs)

    q = group.pad(q).transpose(1, 2)  # [documents, heads, length, head_dim]
    k = group.pad(k).transpose(1, 2)
    v = group.pad(v).transpose(1, 2)
    n_rep = q.shape[1] // k.shape[1]
    enable_gqa = n_rep > 1
    if enable_gqa and q.is_cuda:
        # For the inputs that come here on a GPU, torch has no fused kernel with grouped heads.
        k = k.repeat_interleave(n_rep, 1)
        v = v.repeat_interleave(n_rep, 1)
        enable_gqa = False
    if q.is_cuda:
        disable_cudnn_attention()
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scores.scale, enable_gqa=enable_gqa
    )
    return group.unpad(out.transpose(1, 2))


@cache
def disable_cudnn_attention() -> None:
    """Switches off cuDNN's attention for the process.

    It plans anew for each new shape, which takes longer than a step, and every batch has other
    shapes.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


class SlicedAttention(torch.autograd.Function):
    """Attention of one group, a slice of queries at a time, with only the keys that they attend to.

    It computes what `scaled_dot_product_attention` cannot: scores with a soft-cap, and sliding
    windows of long documents. On CPUs it also computes documents up to KEEP_PROBS_UP_TO tokens, and
    in bf16 longer ones, since PyTorch's fused CPU kernel takes longer. Forward and backward of 9
    heads over 3, bf16, 2 cores: 8 documents of 70 tokens 1.4 ms here and 7.6 ms there, one of 2,048
    102 and 146 ms.

    The n_rep query heads that share a key-value head are stacked below each other. So one product
    [n_rep * rows, d] x [d, keys] a key-value head computes all of them, and no key is repeated.

    keep: save the probabilities for the backward; False: only q, k and v are saved, and the
    backward computes each slice again.
    """

    @staticmethod
    def forward(ctx, q, k, v, group, scores, queries_per_slice, keep):
        n_rep = q.shape[1] // k.shape[1]
        queries = stack_heads(group.pad(q), n_rep)  # [documents * kv_heads, n_rep * length, d]
        keys = stack_heads(group.pad(k), 1)  # [documents * kv_heads, length, d]
        values = stack_heads(group.pad(v), 1)
        slices = query_slices(group.length, queries_per_slice, scores.window, group.offset)
        ctx.group = group
        ctx.n_rep = n_rep
        ctx.scores = scores
        ctx.slices = list(slices)
        out = torch.empty_like(queries)
        kept_probs = []
        for rows, key_slice in ctx.slices:
            probs, _ = SlicedAttention.probs(ctx, queries, keys, rows, key_slice)
            set_query_rows(out, n_rep, rows, probs.to(q.dtype) @ values[:, key_slice])
            if keep:
                kept_probs.append(probs)
        ctx.save_for_backward(queries, keys, values, *kept_probs)
        return group.unpad(unstack_heads(out, group.documents, n_rep))

    @staticmethod
    def probs(ctx, queries, keys, rows, key_slice):
        """Returns a slice's probabilities, [documents * kv_heads, n_rep * rows, keys].

        The second value is the tanh of the soft-cap, which the backward needs, or None. On CPUs
        without a soft-cap, scores have the inputs' dtype, and softmax is in fp32 inside. Otherwise
        all of it is in fp32.
        """
        scale, window, softcap = ctx.scores
        queries = query_rows(queries, ctx.n_rep, rows)
        keys = keys[:, key_slice].transpose(1, 2)  # [documents * kv_heads, d, keys]
        if softcap is None and queries.device.type == "cpu":
            mask = ctx.group.mask(queries, ctx.n_rep, rows, key_slice, window)
            scores = torch.baddbmm(mask, queries, keys, alpha=scale)
            return scores.softmax(-1), None
        scores = (queries @ keys).float().mul_(scale)
        tanh = None
        if softcap:
            tanh = scores.div_(softcap).tanh_()
            scores = tanh * softcap
        scores += ctx.group.mask(scores, ctx.n_rep, rows, key_slice, window)
        return scores.softmax(-1), tanh

    @staticmethod
    def backward(ctx, grad):
        queries, keys, values, *kept_probs = ctx.saved_tensors
        group = ctx.group
        n_rep = ctx.n_rep
        scale, _, softcap = ctx.scores
        # `pad` puts zeros in the padding, so its queries add nothing to the gradients of real keys.
        grad = stack_heads(group.pad(grad), n_rep)
        dq = torch.empty_like(queries)
        # Several slices share keys, so the gradients of keys and values are added up, in fp32.
        one_slice = len(ctx.slices) == 1 and ctx.slices[0][1].start == 0
        if not one_slice:
            dk = torch.zeros_like(keys, dtype=torch.float32)
            dv = torch.zeros_like(values, dtype=torch.float32)
        for i, (rows, key_slice) in enumerate(ctx.slices):
            if kept_probs:
                probs, tanh = kept_probs[i], None
            else:
                probs, tanh = SlicedAttention.probs(ctx, queries, keys, rows, key_slice)
            queries_part = query_rows(queries, n_rep, rows)
            dout = query_rows(grad, n_rep, rows)
            # From out = probs @ values back to the scores: through softmax, and through the
            # soft-cap, whose derivative is 1 - tanh^2.
            dprobs = (dout @ values[:, key_slice].transpose(1, 2)).to(probs.dtype)
            dscores = torch.ops.aten._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            if softcap:
                dscores *= 1 - tanh.square_()
            dscores = dscores.to(queries.dtype)
            # The scale of the scores is multiplied at the end, once for all slices.
            set_query_rows(dq, n_rep, rows, dscores @ keys[:, key_slice])
            dk_part = dscores.transpose(1, 2) @ queries_part
            dv_part = probs.to(dout.dtype).transpose(1, 2) @ dout
            if one_slice:
                dk = dk_part
                dv = dv_part
            else:
                dk[:, key_slice] += dk_part
                dv[:, key_slice] += dv_part
        dq = unstack_heads(dq.mul_(scale), group.documents, n_rep)
        dk = unstack_heads(dk.mul_(scale).to(keys.dtype), group.documents, 1)
        dv = unstack_heads(dv.to(values.dtype), group.documents, 1)
        return group.unpad(dq), group.unpad(dk), group.unpad(dv), None, None, None, None


def query_slices(
    length: int, queries_per_slice: int, window: int | None, offset: int = 0
) -> Iterator[tuple[slice, slice]]:
    """Yields slices of the queries, each with the slice of the keys that they attend to.

    length: number of queries. offset: position of the first query among the keys.
    """
    for start in range(0, length, queries_per_slice):
        end = min(start + queries_per_slice, length)
        first_key = 0
        if window:
            first_key = max(0, offset + start - window + 1)
        yield slice(start, end), slice(first_key, offset + end)


# In these three functions, x has the layout of `stack_heads`: [documents * kv_heads, n_rep * T, n].


def query_rows(x: Tensor, n_rep: int, rows: slice) -> Tensor:
    """Returns the rows of some queries, [documents * kv_heads, n_rep * rows, n]."""
    num_queries = x.shape[1] // n_rep
    if rows.stop - rows.start == num_queries:
        return x  # all of them, so there is nothing to copy
    return view_by_row(x, n_rep)[:, :, rows].flatten(1, 2)


def set_query_rows(x: Tensor, n_rep: int, rows: slice, values: Tensor) -> None:
    """Writes values, [documents * kv_heads, n_rep * rows, n], where `query_rows` reads."""
    view_by_row(x, n_rep)[:, :, rows] = view_by_row(values, n_rep)


def view_by_row(x: Tensor, n_rep: int) -> Tensor:
    """[documents * kv_heads, n_rep * T, n] -> [documents * kv_heads, n_rep, T, n], a view."""
    return x.unflatten(1, (n_rep, -1))


def causal_window_mask(
    like: Tensor, first_query: int, first_key: int, end: int, window: int | None
) -> Tensor:
    """Returns an additive causal mask with a sliding window, [end - first_query, end - first_key].

    It is 0 where the query at position i in [first_query, end) may attend to the key at position j
    in [first_key, end), else -inf; its dtype is that of `like`.
    """
    mask = like.new_full((end - first_query, end - first_key), float("-inf"))
    # The diagonal on which a query meets its own key: row i is position first_query + i.
    own_key = first_query - first_key
    if window is None:
        return mask.triu_(own_key + 1)
    later_keys = mask.triu(own_key + 1)
    too_early_keys = mask.tril_(own_key - window)
    return later_keys + too_early_keys


def stack_heads(x: Tensor, n_rep: int) -> Tensor:
    """[documents, T, kv_heads * n_rep, d] -> [documents * kv_heads, n_rep * T, d]"""
    documents, T, heads, d = x.shape
    kv_heads = heads // n_rep
    x = x.view(documents, T, kv_heads, n_rep, d)
    x = x.permute(0, 2, 3, 1, 4)  # [documents, kv_heads, n_rep, T, d]
    x = x.reshape(documents * kv_heads, n_rep * T, d)
    # Without the copy, a view of one document would keep the tokens of all documents in memory.
    return x.contiguous()


def unstack_heads(x: Tensor, documents: int, n_rep: int) -> Tensor:
    """[documents * kv_heads, n_rep * T, d] -> [documents, T, kv_heads * n_rep, d]"""
    T = x.shape[1] // n_rep
    d = x.shape[2]
    x = x.view(documents, -1, n_rep, T, d)
    x = x.permute(0, 3, 1, 2, 4)  # [documents, T, kv_heads, n_rep, d]
    return x.reshape(documents, T, -1, d)


# ---- attention over a cache, for decoding ----


def cached_attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scores: Scores
) -> Tensor:
    """Computes attention of n new tokens of each of B sequences over its cache, without gradients.

    The cache holds the new tokens already.

    q: [B * n, heads, head_dim].
    keys, values: [B, kv_heads, length, head_dim], contiguous.
    mask: of `decode_mask`.
    Returns [B * n, heads, head_dim].
    """
    B, G, _, d = keys.shape
    n_rep = q.shape[1] // G
    n = q.shape[0] // B
    # As in `stack_heads`, the query heads of a key-value head are rows of one product. A single new
    # token, the usual case, needs no permutation.
    if n == 1:
        queries = q.reshape(B * G, n_rep, d)
    else:
        queries = q.view(B, n, G, n_rep, d).permute(0, 2, 3, 1, 4)  # [B, G, n_rep, n, d]
        queries = queries.reshape(B * G, n_rep * n, d)
    keys = keys.flatten(0, 1).transpose(1, 2)  # [B * G, d, length]
    values = values.flatten(0, 1)  # [B * G, length, d]
    if scores.softcap is None:
        weights = torch.add(mask, queries.bmm(keys), alpha=scores.scale).softmax(-1)
    else:
        capped = queries.bmm(keys).float().mul_(scores.scale / scores.softcap).tanh_()
        capped = capped.mul_(scores.softcap)
        weights = capped.add_(mask).softmax(-1).to(q.dtype)
    out = weights.bmm(values)  # [B * G, n_rep * n, d]
    if n == 1:
        return out.view(B, G * n_rep, d)
    out = out.view(B, G, n_rep, n, d).permute(0, 3, 1, 2, 4)  # [B, n, G, n_rep, d]
    return out.reshape(B * n, G * n_rep, d)


def decode_mask(visible: Tensor, kv_heads: int, n_rep: int, dtype: torch.dtype) -> Tensor:
    """Returns the additive mask of `cached_attention`, of 0 and -inf. All layers share it.

    visible: bool [B, n, length], the cached tokens that each of n new tokens attends to.
    Returns [B * kv_heads, n_rep * n, length] in dtype.
    """
    B, n, length = visible.shape
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    mask = mask.masked_fill_(~visible, float("-inf"))
    mask = mask[:, None, None].expand(B, kv_heads, n_rep, n, length)
    return mask.reshape(B * kv_heads, n_rep * n, length)
