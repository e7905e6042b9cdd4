"""Attention of one new token of each sequence over a cache of keys and values, on GPUs.

The new token is written into the cache, and the cache is read once. Where the cache ends and where
a sequence begins in it are numbers in the GPU's memory: so the same launches serve every step
(decoding.py captures them), and slots that are not filled yet are not read.

As in flash-decoding (Dao et al. 2023), several programs share the slots of a sequence. Each
computes a softmax of its own, relative to the largest score so far (Milakov & Gimelshein 2018,
arXiv 1805.02867), and a second kernel combines their parts. The query heads of a key-value head are
rows of one product. Scores and sums are in fp32.
"""

import torch
from torch import Tensor

from kernels.attention import Scores
from kernels.triton_utils import next_power_of_2, tl, triton

# Programs that share the slots of all sequences and heads: two on each multiprocessor of a large
# GPU.
PROGRAMS = 256

# The most parts that a sequence's slots are cut into: the second kernel loads all parts of a head
# at once.
PARTS = 32

# Bytes of keys that a program multiplies at a time.
SLOTS_PER_TILE = 8192

# Triton's products have at least so many rows and columns.
MIN_DOT_SIZE = 16


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    filled: Tensor,
    starts: Tensor,
    scores: Scores,
) -> Tensor:
    """Writes k and v into the cache and computes attention over it. Has no gradients.

    q: [B, heads, d], one new token of each of B sequences.
    k, v: [B, kv_heads, d].
    keys, values: [B, kv_heads, slots, d], the cache, contiguous; all tensors so far have one dtype.
    Global slot g of a sequence lies in slot g mod slots.
    filled: int64 [1], the global slot of the new token.
    starts: int64 [B], the first global slot of each sequence.
    Returns [B, heads, d].
    """
    B, heads, d = q.shape
    kv_heads, slots = keys.shape[1:3]
    q = with_adjacent_columns(q)
    k = with_adjacent_columns(k)
    v = with_adjacent_columns(v)
    assert keys.is_contiguous() and values.is_contiguous()
    pairs = B * kv_heads  # of a sequence and a key-value head
    n_rep = heads // kv_heads

    # A program multiplies [rows, width] queries by [width, tile] keys at a time.
    width = max(MIN_DOT_SIZE, next_power_of_2(d))
    rows = max(MIN_DOT_SIZE, next_power_of_2(n_rep))
    bytes_per_slot = width * q.element_size()
    tile = max(MIN_DOT_SIZE, min(64, SLOTS_PER_TILE // bytes_per_slot))
    num_warps = 4 if rows * width <= 2048 else 8

    # A part has a tile at least, and with many pairs the GPU is busy without parts.
    num_tiles = -(-slots // tile)
    num_parts = max(1, min(PARTS, num_tiles, PROGRAMS // pairs))
    single = num_parts == 1
    out = q.new_empty(B, heads, d)
    # A single part is the result itself. Several are kept in fp32, each with its largest score and
    # the sum of its weights.
    if single:
        parts = out
        num_stats = 0
    else:
        parts = q.new_empty(pairs, num_parts, n_rep, d, dtype=torch.float32)
        num_stats = pairs
    tops, sums = q.new_empty(2, num_stats, num_parts, n_rep, dtype=torch.float32).unbind()
    # The kernel reads neither where the flags CAPPED and WINDOWED are off.
    softcap = scores.softcap or 0.0
    window = scores.window or 0
    part_kernel[(pairs, num_parts)](
        q, k, v, keys, values, filled, starts, parts, tops, sums,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        kv_heads, n_rep, slots, d, scores.scale, softcap, window,
        CAPPED=scores.softcap is not None, WINDOWED=scores.window is not None,
        SINGLE=single, ROWS=rows, TILE=tile, WIDTH=width, num_warps=num_warps,
    )  # fmt: skip
    if not single:
        combine_kernel[(B * heads,)](
            parts, tops, sums, out, n_rep, d, num_parts,
            PARTS=next_power_of_2(num_parts), WIDTH=width,
        )  # fmt: skip
    return out


def with_adjacent_columns(x: Tensor) -> Tensor:
    """Returns x [B, heads, d], copied if the d numbers of a head are not adjacent in memory."""
    if x.stride(2) == 1:
        return x
    return x.contiguous()


@triton.jit
def part_kernel(
    q, k, v, keys, values, filled, starts, parts, tops, sums,
    q_sequence, q_head, k_sequence, k_head, v_sequence, v_head,
    kv_heads, n_rep, slots, d, scale, cap, window,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, SINGLE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Computes one part of a sequence's slots for one key-value head and its query heads.

    The program whose part has the new token's slot writes the token there. SINGLE: there is one
    part, and it is normalized here.
    """
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    sequence = pair // kv_heads
    head = pair % kv_heads
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_column = column < d

    # Which tiles of slots this part has.
    now = tl.load(filled).to(tl.int32)
    first = tl.load(starts + sequence).to(tl.int32)
    new_slot = now % slots
    num_filled = tl.minimum(now + 1, slots)  # with the new token
    num_tiles = tl.cdiv(num_filled, TILE)
    tiles_per_part = tl.cdiv(num_tiles, tl.num_programs(1))
    begin = part * tiles_per_part
    end = tl.minimum((part + 1) * tiles_per_part, num_tiles)

    # Addresses have 64 bits. They are computed once here, and not for each number.
    keys += pair * slots * d
    values += pair * slots * d
    q += sequence * q_sequence + head * n_rep * q_head

    # The new token's key and value are read from the inputs; the loop below leaves its slot out.
    new_k = tl.load(k + sequence * k_sequence + head * k_head + column, is_column, 0.0)
    new_v = tl.load(v + sequence * v_sequence + head * v_head + column, is_column, 0.0)
    has_new = (new_slot // TILE >= begin) & (new_slot // TILE < end)
    if has_new:
        tl.store(keys + new_slot * d + column, new_k, is_column)
        tl.store(values + new_slot * d + column, new_v, is_column)
    is_query = (row < n_rep)[:, None] & is_column[None, :]
    queries = tl.load(q + row[:, None] * q_head + column[None, :], is_query, 0.0)
    new_score = tl.sum(queries.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
    if CAPPED:
        new_score = capped(new_score, cap)
    # The softmax so far: its largest score, the sum of its weights, and the weighted sum of values.
    # The new token's weight is exp(0) in the part that has it.
    top = tl.where(has_new, new_score, float("-inf"))
    total = tl.zeros([ROWS], tl.float32) + tl.where(has_new, 1.0, 0.0)
    first_value = tl.where(has_new, new_v.to(tl.float32), 0.0)
    out = tl.zeros([ROWS, WIDTH], tl.float32) + first_value[None, :]

    for tile in range(begin, end):
        slot = tile * TILE + tl.arange(0, TILE)
        # The newest global slot that each slot holds.
        global_slot = now - (now - slot) % slots
        visible = (slot < num_filled) & (global_slot >= first) & (slot != new_slot)
        if WINDOWED:
            visible = visible & (global_slot > now - window)
        offsets = slot[:, None] * d + column[None, :]
        is_visible = visible[:, None] & is_column[None, :]
        tile_keys = tl.load(keys + offsets, is_visible, 0.0)
        scores = tl.dot(queries, tl.trans(tile_keys), input_precision="ieee") * scale
        if CAPPED:
            scores = capped(scores, cap)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # The largest score is -inf until a visible slot was read.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - shift[:, None])
        # What was summed so far was relative to the largest score of before.
        rescale = tl.exp(top - shift)
        total = total * rescale + tl.sum(weights, 1)
        tile_values = tl.load(values + offsets, is_visible, 0.0)
        weights = weights.to(tile_values.dtype)
        out = out * rescale[:, None]
        out = tl.dot(weights, tile_values, out, input_precision="ieee")
        top = new_top

    first_row = (pair * tl.num_programs(1) + part) * n_rep
    if SINGLE:  # then `parts` is the result
        out = out / total[:, None]
    else:
        tl.store(tops + first_row + row, top, row < n_rep)
        tl.store(sums + first_row + row, total, row < n_rep)
    parts += first_row * d
    tl.store(parts + row[:, None] * d + column[None, :], out, is_query)


@triton.jit
def capped(score, cap):
    """Returns cap * tanh(score / cap), by a sigmoid: tanh(x) = 2 sigmoid(2 x) - 1."""
    return cap * (2 * tl.sigmoid(2 * score / cap) - 1)


@triton.jit
def combine_kernel(
    parts, tops, sums, out, n_rep, d, num_parts, PARTS: tl.constexpr, WIDTH: tl.constexpr
):
    """Combines the parts of one sequence and query head: each has a largest score of its own."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    column = tl.arange(0, WIDTH)
    is_part = part < num_parts
    is_column = column < d
    # The row of this query head in each part.
    pair = head // n_rep
    part_row = (pair * num_parts + part) * n_rep + head % n_rep
    top = tl.load(tops + part_row, is_part, float("-inf"))
    part_sum = tl.load(sums + part_row, is_part, 0.0)
    inside = is_part[:, None] & is_column[None, :]
    values = tl.load(parts + part_row[:, None] * d + column[None, :], inside, 0.0)
    # Each part is relative to its own largest score; the weights make it relative to the largest.
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.sum(weight * part_sum, 0)
    result = tl.sum(values * weight[:, None], 0) / total
    tl.store(out + head * d + column, result, is_column)
