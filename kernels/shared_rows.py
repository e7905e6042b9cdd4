"""Attention where one computed row stands for tokens of several documents.

What several documents begin with goes through the layers once: all documents have the same tokens
there at the same positions, so, with causal attention, the same hidden states. Only attention needs
whole documents: its queries, keys and values are spread over them (`expand`), and of its outputs
one for each row goes on (`select`).

Decoding shares what prompts begin with; training shares the virtual tokens of learned prompts
(adapters.py), which stand before every document. Those of a prefix are no rows at all: they have
keys and values, and nothing else is computed of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.attention import Documents, Scores


class SharedRows(NamedTuple):
    """documents: whole ones, of N tokens in all.
    expand: int64 [N], of each token the row that it is. Rows of a prefix come first.
    select: int64 [rows], of each computed row a token that it is.
    """

    documents: Documents
    expand: Tensor
    select: Tensor


class Prefix(NamedTuple):
    """Keys and values of one layer that stand before every document, [P, G, d] each."""

    keys: Tensor
    values: Tensor

    def repeated(self, times: int) -> "Prefix":
        """Returns the prefix several times over, one after the other."""
        return Prefix(self.keys.repeat(times, 1, 1), self.values.repeat(times, 1, 1))


def attend_shared(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Scores,
    rows: SharedRows,
    prefix: Prefix | None = None,
) -> Tensor:
    """Returns attention's output for the computed rows, [rows, H, d].

    attend: a function of q [N, H, d], k and v [N, G, d], their Scores and Documents.
    q, k, v: of the computed rows.
    """
    if prefix is not None:
        # What a prefix asks is not read, but attention takes a query for every token.
        q = torch.cat([q.new_zeros(len(prefix.keys), *q.shape[1:]), q])
        k = torch.cat([prefix.keys.to(k.dtype), k])
        v = torch.cat([prefix.values.to(v.dtype), v])
    q = q.index_select(0, rows.expand)  # [N, H, d]
    k = k.index_select(0, rows.expand)
    v = v.index_select(0, rows.expand)
    out = attend(q, k, v, scores, rows.documents)  # [N, H, d]
    return out.index_select(0, rows.select)


def lead_documents(documents: Documents, count: int, is_prefix: bool, shared: bool) -> SharedRows:
    """Returns the rows of a batch in which virtual tokens stand before every document. Rows of
    virtual tokens come first, then those of the batch's own tokens.

    count: of the virtual tokens, P.
    is_prefix: they have keys and values alone, and no computed rows.
    shared: P rows stand for the virtual tokens of all documents; else each document has P of its own.
    """
    lengths = np.asarray(documents.lengths)
    longer = Documents((lengths + count).tolist(), documents.device)
    document = np.repeat(np.arange(len(lengths)), longer.lengths)  # [N], of each token
    position = np.concatenate([np.arange(length) for length in longer.lengths])
    is_virtual = position < count
    # The number of each document's first token among the batch's own.
    first = np.cumsum(lengths) - lengths
    num_leading = count if shared else count * len(lengths)
    virtual_row = position if shared else document * count + position
    own_row = num_leading + first[document] + position - count
    expand = np.where(is_virtual, virtual_row, own_row)
    own = np.flatnonzero(~is_virtual)
    select = own
    if not is_prefix:
        virtual = np.arange(count) if shared else np.flatnonzero(is_virtual)
        select = np.concatenate([virtual, own])
    device = documents.device
    return SharedRows(
        longer, torch.from_numpy(expand).to(device), torch.from_numpy(select).to(device)
    )
