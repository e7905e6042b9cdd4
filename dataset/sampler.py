"""Which examples, and when: how sources are mixed, how examples are packed, and where in all that a run stands.

Everything follows from the seed, the data and three numbers, (epoch, window, row); neither the number of processes nor
accumulation plays a part. So a run that is resumed goes on with the very next example, without replaying what was.

An epoch is a list of draws. Each source has its share of them, spread at random; what it gives are its own examples in
shuffled order, round after round, going on in the next epoch where it stopped in this one. The list is cut into windows
of WINDOW draws. Packed, a window's examples are put into rows of at most seq_len tokens, none cut, each row as full as
can be (best-fit decreasing; Johnson et al. 1974), and the rows are shuffled. Not packed, an example is a row.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from common.errors import UserError

WINDOW = 4096


@dataclass
class Sampler:
    """The rows of step after step. lengths: int [examples], source after source; sizes: examples of each source;
    samples_per_epoch: draws of each; seq_len: of a packed row, None: not packed. epoch, window, row: of the next row."""

    lengths: np.ndarray
    sizes: Sequence[int]
    samples_per_epoch: Sequence[int]
    seed: int
    seq_len: int | None = None
    epoch: int = 0
    window: int = 0
    row: int = 0

    def __post_init__(self):
        self.at, self.rows = None, []  # the window whose rows are held
        self.num_epoch_rows = None  # rows of the first epoch

    def step(self, rows: int) -> list[list[int]]:
        """The example numbers of the next so many rows; fewer at the end of an epoch: no step mixes epochs, and the
        loss counts tokens, so that a smaller step weighs what it should."""
        taken: list[list[int]] = []
        while len(taken) < rows:
            found = self.load()
            new = found[self.row : self.row + rows - len(taken)]
            taken += new
            self.row += len(new)
            if self.row < len(found):
                continue
            self.window, self.row = self.window + 1, 0
            if self.window * WINDOW >= sum(self.samples_per_epoch):
                self.epoch, self.window = self.epoch + 1, 0
                break
        return taken

    def load(self) -> list[list[int]]:
        """The rows of the window at hand."""
        if self.at != (self.epoch, self.window):
            if self.at is None or self.at[0] != self.epoch:
                self.order = epoch_order(self.sizes, self.samples_per_epoch, self.seed, self.epoch)
            self.rows = self.window_rows(self.order, self.epoch, self.window)
            self.at = (self.epoch, self.window)
        return self.rows

    def window_rows(self, order: np.ndarray, epoch: int, window: int) -> list[list[int]]:
        chosen = order[window * WINDOW : (window + 1) * WINDOW].tolist()
        if self.seq_len is None:
            return [[i] for i in chosen]
        rows = pack([int(self.lengths[i]) for i in chosen], self.seq_len)
        shuffled = permutation(len(rows), self.seed, epoch, window)
        return [[chosen[k] for k in rows[j]] for j in shuffled]

    def epoch_rows(self) -> int:
        """How many rows the first epoch has; others of a packed run may differ by a few."""
        if self.seq_len is None:
            return sum(self.samples_per_epoch)
        if self.num_epoch_rows is None:
            order = epoch_order(self.sizes, self.samples_per_epoch, self.seed, 0)
            windows = range(-(-len(order) // WINDOW))
            self.num_epoch_rows = sum(len(self.window_rows(order, 0, window)) for window in windows)
        return self.num_epoch_rows

    def epoch_tokens(self) -> float:
        """How many tokens an epoch draws, by each source's mean."""
        edges = np.cumsum([0, *self.sizes])
        means = (float(self.lengths[a:b].mean()) for a, b in pairwise(edges))
        return sum(draws * mean for draws, mean in zip(self.samples_per_epoch, means, strict=True))


def allocate_samples(
    sizes: Sequence[int], weights: Sequence[float] | None, replayed: Sequence[float] = ()
) -> list[int]:
    """How many draws of an epoch each source has, which are as many as the sources that are no replay have examples.

    sizes: examples of each source, those of the replay last. weights: of the others, relative to each other; None: by
    their sizes, so that without replay each example comes once. replayed: shares of all draws. To whole numbers by
    largest remainders, but none is 0: a small share is one draw, which the largest gives up.
    """
    plain = len(sizes) - len(replayed)
    total = sum(sizes[:plain])
    weights = list(sizes[:plain]) if weights is None else list(weights)
    parts = [(1 - sum(replayed)) * weight / sum(weights) for weight in weights] + list(replayed)
    exact = [total * part for part in parts]
    draws = [int(each) for each in exact]
    for i in sorted(range(len(exact)), key=lambda i: draws[i] - exact[i])[: total - sum(draws)]:
        draws[i] += 1
    if total < len(draws):
        raise UserError(f"{total:,} examples make an epoch too short for {len(draws)} files; give more of them")
    while 0 in draws:
        draws[draws.index(max(draws))] -= 1
        draws[draws.index(0)] += 1
    return draws


def epoch_order(sizes: Sequence[int], draws: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """The example numbers of an epoch's draws, int64.

    Plainly shuffled: padding is never computed, so that examples of like length side by side would gain nothing, and
    they cost: steps of short answers alone are noisier, and as long as those of many tokens (experiments/LOG.md).
    """
    if list(sizes) == list(draws):
        return permutation(sum(sizes), seed, epoch)
    source = np.repeat(np.arange(len(sizes)), draws)[permutation(sum(draws), seed, epoch)]
    order, first = np.empty(len(source), np.int64), 0
    for s, (size, count) in enumerate(zip(sizes, draws, strict=True)):
        at, end, picks = epoch * count, (epoch + 1) * count, []  # of this source's draws since the beginning
        while at < end:
            round, begin = divmod(at, size)
            picks.append(permutation(size, seed, round, 1 + s)[begin : begin + end - at])
            at += len(picks[-1])
        if picks:
            order[source == s] = first + np.concatenate(picks)
        first += size
    return order


def permutation(count: int, seed: int, *of: int) -> np.ndarray:
    """0 to count - 1 in an order that follows from the numbers."""
    epoch, *more = of
    mixed = seed * 1_000_003 + epoch
    for each in more:
        mixed = (mixed * 1_000_003 + each + 1) % 2**62
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed)).numpy()


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Rows of at most seq_len tokens that hold each example once: the longest first, each where least room is left
    over. O(n log n), but for the moves in a sorted list of the open rows."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row with any: tokens left, number; ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[i]
        at = bisect_left(room, (length, -1))
        if at < len(room):
            left, row = room.pop(at)
            rows[row].append(i)
        else:
            left, row = seq_len, len(rows)
            rows.append([i])
        if left > length:
            insort(room, (left - length, row))
    return rows
