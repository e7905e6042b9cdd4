"""One batch by several processes: `--context-parallel N`, for sequences that are too long for one.

A flat batch is cut into 2 N pieces of equal length; process i has pieces i and 2 N - 1 - i, one from the front and one
from the back, since a token looks at all before it and so the work grows along a sequence. Everything but attention is
done token by token, on the own pieces. For attention the keys and values of all pieces are gathered (they are small
where heads share them), each process's queries attend to what stands before them in their documents, and in the
backward the gradients of keys and values are added up and go back to where they came from. So what is computed is what
one process would, packed or not. Loss and gradients are sums over tokens: other processes' parts come with their sum.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.attention import Documents, QuerySuffix, Scores, document_attention, suffix_attention


@dataclass
class ContextParallel:
    """size: processes that share a batch; place: which of them this one is; group: of torch.distributed."""

    size: int
    place: int
    group: object = None

    def padding(self, tokens: int) -> int:
        """How many tokens are added to a batch of so many, as a document that is not trained."""
        return -tokens % (2 * self.size)

    def mine(self, tokens: int) -> list[slice]:
        """The tokens of a padded batch that this process has, in order."""
        each = tokens // (2 * self.size)
        return [slice(i * each, (i + 1) * each) for i in (self.place, 2 * self.size - 1 - self.place)]

    def take(self, x: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Of [tokens, ...], those that this process has."""
        parts = [x[part] for part in self.mine(len(x))]
        return torch.cat(parts) if torch.is_tensor(x) else np.concatenate(parts)

    def local(self, rows: np.ndarray, tokens: int) -> np.ndarray:
        """The place of each of these tokens of a batch among those of this process; -1 where another has it."""
        places = np.full(tokens, -1)
        places[self.take(np.arange(tokens))] = np.arange(tokens // self.size)
        return places[rows]


class ShardedDocuments:
    """Stands in for kernels.attention.Documents where a process has only some tokens of a batch: positions, doc_lengths and
    dropout_seeds are those of its own tokens."""

    def __init__(self, whole: Documents, context: ContextParallel):
        self.context, self.lengths = context, whole.lengths
        slices = context.mine(sum(whole.lengths))
        self.positions, self.doc_lengths = context.take(whole.positions), context.take(whole.doc_lengths)
        self.dropout_seeds = None if whole.dropout_seeds is None else context.take(whole.dropout_seeds)
        self.work: list[tuple[slice, slice, Documents | QuerySuffix]] = []  # own queries, all keys, how they lie
        mine = 0
        for part in slices:
            start, at = 0, part.start
            run: list[int] = []  # whole documents, one after the other
            for length in whole.lengths:
                first, last = max(start, part.start), min(start + length, part.stop)
                if first < last:
                    if (first, last) == (start, start + length):
                        run.append(length)
                    else:
                        mine = self.add_run(run, at, mine, whole.device)
                        run = []
                        piece = QuerySuffix(last - first, last - start, whole.device)
                        self.work.append((slice(mine, mine + last - first), slice(start, last), piece))
                        mine, at = mine + last - first, last
                start += length
            mine = self.add_run(run, at, mine, whole.device)

    def add_run(self, run: list[int], at: int, mine: int, device) -> int:
        if not run:
            return mine
        size = sum(run)
        self.work.append((slice(mine, mine + size), slice(at, at + size), Documents(run, device)))
        return mine + size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, keep: bool = True) -> Tensor:
        """As kernels.attention.document_attention, q, k and v of the own tokens."""
        k, v = (AllGatherTokens.apply(x, self.context) for x in (k, v))
        parts = []
        for queries, keys, how in self.work:
            attend = suffix_attention if isinstance(how, QuerySuffix) else partial(document_attention, keep=keep)
            parts.append(attend(q[queries], k[keys], v[keys], scores, how))
        return torch.cat(parts)


class AllGatherTokens(torch.autograd.Function):
    """[own tokens, ...] of each process -> [all tokens, ...] in their order."""

    @staticmethod
    def forward(ctx, x, context):
        ctx.context = context
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(context.size)]
        dist.all_gather(found, x.contiguous(), group=context.group)
        halves = [part.chunk(2) for part in found]
        return torch.cat([front for front, _ in halves] + [back for _, back in reversed(halves)])

    @staticmethod
    def backward(ctx, grad):
        context = ctx.context
        pieces = grad.chunk(2 * context.size)
        sent = [torch.cat([pieces[i], pieces[-1 - i]]) for i in range(context.size)]
        mine = torch.empty_like(sent[0])
        dist.reduce_scatter(mine, sent, group=context.group)
        return mine, None
