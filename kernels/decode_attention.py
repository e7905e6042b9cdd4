"""Attention of one new token a line over a cache of keys and values, on GPUs: the token is written into the cache, and
the cache is read once.

Where the cache ends and where a line begins in it are numbers in the GPU's memory, so that the same launches serve
every step (decoding.py captures them), and slots that are not filled yet are not read. As in flash-decoding (Dao et al.
2023), several programs share a line's slots, each with a softmax of its own by the largest score that it has seen
(Milakov & Gimelshein 2018, arXiv 1805.02867), and a second kernel puts their parts together. The query heads of a
key-value head are rows of one product. Scores and sums are in fp32.
"""

import torch
from torch import Tensor

from kernels.attention import Scores
from kernels.triton_utils import next_power_of_2, tl, triton

PROGRAMS = 256  # that share the slots of all lines and heads: two on each multiprocessor of a large GPU
PARTS = 32  # of a line's slots at most; the second kernel holds all parts of a head at once
TILE = 8192  # bytes of keys that a program multiplies at a time


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, filled: Tensor, starts: Tensor, scores: Scores
) -> Tensor:
    """Writes k and v into the cache, and attends to what it holds of each line then. For no gradients.

    q: [lines, heads, d]; k and v: [lines, kv_heads, d]; keys and values: [lines, kv_heads, slots, d], contiguous; all
    of one dtype. Global slot g of a line lies in slot g mod slots. filled: int64 [1], the new token's global slot;
    starts: int64 [lines], a line's first one. Returns [lines, heads, d].
    """
    (B, heads, d), (kv_heads, slots) = q.shape, keys.shape[1:3]
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    assert keys.is_contiguous() and values.is_contiguous()
    pairs, n_rep, width = B * kv_heads, heads // kv_heads, max(16, next_power_of_2(d))
    rows = max(16, next_power_of_2(n_rep))
    tile = max(16, min(64, TILE // (width * q.element_size())))
    count = max(1, min(PARTS, -(-slots // tile), PROGRAMS // pairs))
    out, alone = q.new_empty(B, heads, d), count == 1
    parts = out if alone else q.new_empty(pairs, count, n_rep, d, dtype=torch.float32)
    tops, sums = q.new_empty(2, 0 if alone else pairs, count, n_rep, dtype=torch.float32).unbind()
    part_kernel[(pairs, count)](
        q, k, v, keys, values, filled, starts, parts, tops, sums,
        *(stride for x in (q, k, v) for stride in x.stride()[:2]),
        kv_heads, n_rep, slots, d, scores.scale, scores.softcap or 0.0, scores.window or 0,
        CAPPED=scores.softcap is not None, WINDOWED=scores.window is not None,
        ALONE=alone, ROWS=rows, TILE=tile, WIDTH=width, num_warps=4 if rows * width <= 2048 else 8,
    )  # fmt: skip
    if not alone:
        whole_kernel[(B * heads,)](parts, tops, sums, out, n_rep, d, count, COUNT=next_power_of_2(count), WIDTH=width)
    return out


@triton.jit
def part_kernel(
    q, k, v, keys, values, filled, starts, parts, tops, sums, q_line, q_head, k_line, k_head, v_line, v_head,
    kv_heads, n_rep, slots, d, scale, cap, window,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, ALONE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """A program a part of a line's slots and a key-value head. The part that has the new token's slot writes it. ALONE:
    each part is all."""
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    line, head = pair // kv_heads, pair % kv_heads
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = column < d
    now, first = tl.load(filled).to(tl.int32), tl.load(starts + line).to(tl.int32)
    here, held = now % slots, tl.minimum(now + 1, slots)  # the new token's slot; slots that hold something with it
    tiles = tl.cdiv(held, TILE)
    each = tl.cdiv(tiles, tl.num_programs(1))
    begin, end = part * each, tl.minimum((part + 1) * each, tiles)
    keys += pair * slots * d  # addresses of 64 bits once, not for each number
    values += pair * slots * d
    q += line * q_line + head * n_rep * q_head
    new_k = tl.load(k + line * k_line + head * k_head + column, inside, 0.0)
    new_v = tl.load(v + line * v_line + head * v_head + column, inside, 0.0)
    own = (here // TILE >= begin) & (here // TILE < end)
    if own:
        tl.store(keys + here * d + column, new_k, inside)
        tl.store(values + here * d + column, new_v, inside)
    rows = (row < n_rep)[:, None] & inside[None, :]
    queries = tl.load(q + row[:, None] * q_head + column[None, :], rows, 0.0)
    score = tl.sum(queries.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
    if CAPPED:
        score = capped(score, cap)
    top, total = tl.where(own, score, float("-inf")), tl.zeros([ROWS], tl.float32) + tl.where(own, 1.0, 0.0)
    out = tl.zeros([ROWS, WIDTH], tl.float32) + tl.where(own, new_v.to(tl.float32), 0.0)[None, :]
    for tile in range(begin, end):
        slot = tile * TILE + tl.arange(0, TILE)
        place = now - (now - slot) % slots  # the global slot that lies there
        seen = (slot < held) & (place >= first) & (slot != here)
        if WINDOWED:
            seen = seen & (place > now - window)
        cells, there = slot[:, None] * d + column[None, :], seen[:, None] & inside[None, :]
        scores = tl.dot(queries, tl.trans(tl.load(keys + cells, there, 0.0)), input_precision="ieee") * scale
        if CAPPED:
            scores = capped(scores, cap)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # where nothing has been seen yet
        weights, less = tl.exp(scores - shift[:, None]), tl.exp(top - shift)
        total = total * less + tl.sum(weights, 1)
        found = tl.load(values + cells, there, 0.0)
        out = tl.dot(weights.to(found.dtype), found, out * less[:, None], input_precision="ieee")
        top = higher
    first_row = (pair * tl.num_programs(1) + part) * n_rep
    if ALONE:  # parts is what is returned
        out = out / total[:, None]
    else:
        tl.store(tops + first_row + row, top, row < n_rep)
        tl.store(sums + first_row + row, total, row < n_rep)
    tl.store(parts + first_row * d + row[:, None] * d + column[None, :], out, rows)


@triton.jit
def capped(score, cap):
    return cap * (2 * tl.sigmoid(2 * score / cap) - 1)  # cap * tanh(score / cap)


@triton.jit
def whole_kernel(parts, tops, sums, out, n_rep, d, count, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """A program a line and query head: its parts by their own largest scores, made one softmax."""
    head = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    at = (head // n_rep * count + part) * n_rep + head % n_rep
    top = tl.load(tops + at, part < count, float("-inf"))
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(sums + at, part < count, 0.0), 0)
    inside = (part < count)[:, None] & (column < d)[None, :]
    mine = tl.load(parts + at[:, None] * d + column[None, :], inside, 0.0)
    tl.store(out + head * d + column, tl.sum(mine * weight[:, None], 0) / total, column < d)
