"""Context parallelism, `--context-parallel N`: N ranks compute one batch.

It is for sequences that are too long for one GPU.

A flat batch is cut into 2 N chunks of equal length. Rank i has chunks i and 2 N - 1 - i, one from
the front and one from the back: a token attends to all tokens before it, so the work grows along a
sequence. Everything but attention is computed token by token, on the rank's own chunks. For
attention the keys and values of all chunks are gathered (they are small where heads share them),
and the rank's queries attend to what comes before them in their documents. In the backward the
gradients of keys and values are summed and sent back to the ranks that they came from. So the
result is what one rank would compute, packed or not. Loss and gradients are sums over tokens: the
sum over all ranks adds the other ranks' tokens.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.attention import Documents, QuerySuffix, Scores, document_attention, suffix_attention

# Tensors, or NumPy's arrays.
Array = TypeVar("Array", Tensor, np.ndarray)


@dataclass
class ContextParallel:
    """The ranks that compute one batch.

    size: how many ranks share the batch.
    rank: which of them this one is, from 0.
    group: their process group in torch.distributed.
    """

    size: int
    rank: int
    group: "dist.ProcessGroup | None" = None

    def padding(self, tokens: int) -> int:
        """Returns how many tokens a batch of `tokens` tokens is padded with, as a document that is
        not trained."""
        return -tokens % (2 * self.size)

    def mine(self, tokens: int) -> list[slice]:
        """Returns this rank's two slices of a padded batch, in order."""
        chunk = tokens // (2 * self.size)
        front = self.rank
        back = 2 * self.size - 1 - self.rank
        return [slice(i * chunk, (i + 1) * chunk) for i in (front, back)]

    def take(self, x: Array) -> Array:
        """Returns this rank's rows of x [tokens, ...]."""
        parts = [x[part] for part in self.mine(len(x))]
        if isinstance(x, Tensor):
            return torch.cat(parts)
        return np.concatenate(parts)

    def local(self, rows: np.ndarray, tokens: int) -> np.ndarray:
        """Returns where the tokens `rows` of a padded batch are among this rank's tokens; -1 for
        another rank's."""
        places = np.full(tokens, -1)
        places[self.take(np.arange(tokens))] = np.arange(tokens // self.size)
        return places[rows]


class ShardedDocuments:
    """Stands in for kernels.attention.Documents where a rank has only some tokens of a batch.

    lengths: of all documents of the batch.
    positions, doc_lengths, dropout_seeds: as in Documents, of this rank's tokens only.
    """

    def __init__(self, whole: Documents, context: ContextParallel):
        self.context = context
        self.lengths = whole.lengths
        self.positions = context.take(whole.positions)
        self.doc_lengths = context.take(whole.doc_lengths)
        self.dropout_seeds: Tensor | None = None
        if whole.dropout_seeds is not None:
            self.dropout_seeds = context.take(whole.dropout_seeds)
        # The calls of attention: which of this rank's queries, which of the batch's keys, and which
        # documents they are.
        self.calls: list[tuple[slice, slice, Documents | QuerySuffix]] = []
        self.num_queries = 0  # this rank's tokens that `calls` covers so far
        for part in context.mine(sum(whole.lengths)):
            self.add_part(part, whole)

    def add_part(self, part: slice, whole: Documents) -> None:
        """Adds the attention of the tokens in `part` of the batch."""
        start = 0  # of the document
        # Documents that follow each other and are in the part as a whole make one call.
        run: list[int] = []  # their lengths
        run_start = part.start
        for length in whole.lengths:
            stop = start + length
            first = max(start, part.start)
            last = min(stop, part.stop)
            queries = last - first  # the document's tokens in the part; none if not positive
            if queries == length:
                run.append(length)
            elif queries > 0:
                # Only some of the document's tokens are in the part: they attend to the keys from
                # its start on.
                self.add_run(run, run_start, whole.device)
                suffix = QuerySuffix(queries, last - start, whole.device)
                self.add_call(queries, slice(start, last), suffix)
                run = []
                run_start = last
            start = stop
        self.add_run(run, run_start, whole.device)

    def add_run(self, run: list[int], start: int, device: torch.device | str) -> None:
        """Adds the attention of whole documents.

        run: their lengths.
        start: where they begin in the batch.
        """
        if run:
            tokens = sum(run)
            self.add_call(tokens, slice(start, start + tokens), Documents(run, device))

    def add_call(self, queries: int, keys: slice, documents: Documents | QuerySuffix) -> None:
        """Adds a call of attention for the next `queries` tokens of this rank."""
        end = self.num_queries + queries
        self.calls.append((slice(self.num_queries, end), keys, documents))
        self.num_queries = end

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, keep: bool = True) -> Tensor:
        """Returns what kernels.attention.document_attention does, for q, k and v of this rank's
        tokens."""
        all_k = AllGatherTokens.apply(k, self.context)
        all_v = AllGatherTokens.apply(v, self.context)
        outs = []
        for queries, keys, documents in self.calls:
            q_part = q[queries]
            k_part = all_k[keys]
            v_part = all_v[keys]
            if isinstance(documents, QuerySuffix):
                out = suffix_attention(q_part, k_part, v_part, scores, documents)
            else:
                out = document_attention(q_part, k_part, v_part, scores, documents, keep=keep)
            outs.append(out)
        return torch.cat(outs)


class AllGatherTokens(torch.autograd.Function):
    """[own tokens, ...] of each rank -> [all tokens, ...] in the order of the batch."""

    @staticmethod
    def forward(ctx, x, context):
        ctx.context = context
        parts = []
        for _ in range(context.size):
            parts.append(torch.empty_like(x, memory_format=torch.contiguous_format))
        dist.all_gather(parts, x.contiguous(), group=context.group)
        fronts = []
        backs = []
        for part in parts:
            front, back = part.chunk(2)
            fronts.append(front)
            backs.append(back)
        # The back chunks are in the opposite order: the last rank's comes first.
        return torch.cat(fronts + backs[::-1])

    @staticmethod
    def backward(ctx, grad):
        context = ctx.context
        chunks = grad.chunk(2 * context.size)
        # This rank's queries make gradients of all ranks' keys: each goes back to its rank.
        of_each_rank = []
        for rank in range(context.size):
            of_each_rank.append(torch.cat([chunks[rank], chunks[-1 - rank]]))
        own = torch.empty_like(of_each_rank[0])
        dist.reduce_scatter(own, of_each_rank, group=context.group)
        return own, None
