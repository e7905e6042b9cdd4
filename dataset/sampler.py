"""Which examples are trained on and when: how sources are mixed, how examples are packed, and how far a run is.

Everything follows from the seed, the data and three numbers, (epoch, window, row). Neither the number of processes nor
gradient accumulation changes the order. So a run that is resumed goes on with the very next example, without computing
again what came before.

An epoch is a list of samples. Each source has a fixed number of them, in random places of the list; they are its own
examples in shuffled order, repeated as often as needed, and the next epoch goes on where this one stopped. The list is
cut into windows of WINDOW samples. With packing, a window's examples are put into rows of at most seq_len tokens, none
cut, each row as full as possible (best-fit decreasing; Johnson et al. 1974), and the rows are shuffled. Without
packing, an example is a row.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from common.errors import UserError

WINDOW_SAMPLES = 4096


@dataclass
class Sampler:
    """Returns the rows of step after step, deterministically, out of one or several sources.

    lengths: int64 [examples], tokens of each example, source after source.
    sizes: examples of each source.
    samples_per_epoch: how many examples of each source an epoch takes.
    seed: decides the order.
    seq_len: tokens of a packed row at most; None for no packing.
    epoch, window, row: the position of the next row, which is all that a checkpoint stores.
    """

    lengths: np.ndarray
    sizes: Sequence[int]
    samples_per_epoch: Sequence[int]
    seed: int
    seq_len: int | None = None
    epoch: int = 0
    window: int = 0
    row: int = 0

    def __post_init__(self):
        self.loaded_window = None  # (epoch, window) of loaded_rows
        self.loaded_rows = []
        self.num_epoch_rows = None  # rows of the first epoch, once they were counted

    def step(self, rows: int) -> list[list[int]]:
        """Returns the next `rows` rows, each a list of example numbers, and moves the position.

        Fewer come back at the end of an epoch: no step mixes epochs. A smaller step weighs what it should, because the
        loss counts tokens.
        """
        step_rows: list[list[int]] = []
        while len(step_rows) < rows:
            window_rows = self.load()
            new = window_rows[self.row : self.row + rows - len(step_rows)]
            step_rows += new
            self.row += len(new)
            if self.row < len(window_rows):
                continue
            self.window += 1
            self.row = 0
            if self.window * WINDOW_SAMPLES >= sum(self.samples_per_epoch):
                self.epoch += 1
                self.window = 0
                break
        return step_rows

    def load(self) -> list[list[int]]:
        """Returns the rows of the current window, computed when the window is new."""
        current = (self.epoch, self.window)
        if self.loaded_window != current:
            if self.loaded_window is None or self.loaded_window[0] != self.epoch:
                self.order = epoch_order(self.sizes, self.samples_per_epoch, self.seed, self.epoch)
            self.loaded_rows = self.window_rows(self.order, self.epoch, self.window)
            self.loaded_window = current
        return self.loaded_rows

    def window_rows(self, order: np.ndarray, epoch: int, window: int) -> list[list[int]]:
        """Returns the rows of a window. order: the example numbers of the epoch, int64."""
        examples = order[window * WINDOW_SAMPLES : (window + 1) * WINDOW_SAMPLES].tolist()
        if self.seq_len is None:
            return [[i] for i in examples]
        rows = pack_rows([int(self.lengths[i]) for i in examples], self.seq_len)
        shuffled = permutation(len(rows), self.seed, epoch, window)
        return [[examples[k] for k in rows[j]] for j in shuffled]

    def epoch_rows(self) -> int:
        """Returns how many rows the first epoch has; other epochs of a packed run may differ by a few."""
        if self.seq_len is None:
            return sum(self.samples_per_epoch)
        if self.num_epoch_rows is None:
            order = epoch_order(self.sizes, self.samples_per_epoch, self.seed, 0)
            num_windows = -(-len(order) // WINDOW_SAMPLES)
            self.num_epoch_rows = sum(
                len(self.window_rows(order, 0, window)) for window in range(num_windows)
            )
        return self.num_epoch_rows

    def epoch_tokens(self) -> float:
        """Returns how many tokens an epoch takes on average, from the mean length of each source's examples."""
        edges = np.cumsum([0, *self.sizes])
        means = [float(self.lengths[start:stop].mean()) for start, stop in pairwise(edges)]
        return sum(
            samples * mean for samples, mean in zip(self.samples_per_epoch, means, strict=True)
        )


def allocate_samples(
    sizes: Sequence[int], weights: Sequence[float] | None, replayed: Sequence[float] = ()
) -> list[int]:
    """Returns how many samples of an epoch each source has: in all as many as the sources without replay have examples.

    sizes: examples of each source, those of the replay last.
    weights: of the sources without replay, relative to each other; None: their sizes, so that without replay each
        example comes once.
    replayed: for each replay source, its share of all samples.

    Rounds to whole numbers by largest remainders. None is 0: a source with a small share has one sample, which is taken
    from the largest. Raises UserError if the epoch has fewer samples than there are sources.
    """
    num_plain = len(sizes) - len(replayed)
    total = sum(sizes[:num_plain])
    weights = list(sizes[:num_plain]) if weights is None else list(weights)
    shares = [(1 - sum(replayed)) * weight / sum(weights) for weight in weights] + list(replayed)
    exact = [total * share for share in shares]
    samples = [int(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: samples[i] - exact[i])
    for i in by_remainder[: total - sum(samples)]:
        samples[i] += 1
    if total < len(samples):
        count = len(samples)
        raise UserError(
            f"{total:,} examples make an epoch too short for {count} files; give more examples"
        )
    while 0 in samples:
        samples[samples.index(max(samples))] -= 1
        samples[samples.index(0)] += 1
    return samples


def epoch_order(
    sizes: Sequence[int], samples_per_epoch: Sequence[int], seed: int, epoch: int
) -> np.ndarray:
    """Returns the example numbers of an epoch's samples in order, int64. Arguments: as those of `Sampler`.

    The order is plainly shuffled. Padding is never computed, so placing examples of similar length together would gain
    nothing, and it would cost: steps of short answers alone are noisier, and take as long as those of many tokens
    (experiments/LOG.md).
    """
    if list(sizes) == list(samples_per_epoch):
        return permutation(sum(sizes), seed, epoch)
    source_of_sample = np.repeat(np.arange(len(sizes)), samples_per_epoch)
    source_of_sample = source_of_sample[permutation(sum(samples_per_epoch), seed, epoch)]
    order = np.empty(len(source_of_sample), np.int64)
    first = 0  # number of the source's first example
    for source, (size, count) in enumerate(zip(sizes, samples_per_epoch, strict=True)):
        # Counted from the beginning of the run, this epoch takes the source's samples from `at` to `end`. The source's
        # examples are shuffled anew each time that all of them were taken.
        at = epoch * count
        end = (epoch + 1) * count
        picks = []
        while at < end:
            repetition, begin = divmod(at, size)
            shuffled = permutation(size, seed, repetition, 1 + source)
            picks.append(shuffled[begin : begin + end - at])
            at += len(picks[-1])
        if picks:
            order[source_of_sample == source] = first + np.concatenate(picks)
        first += size
    return order


def permutation(count: int, seed: int, first: int, *others: int) -> np.ndarray:
    """Returns 0 to count - 1 in a random order that follows from the seed and the other numbers, int64 [count]."""
    mixed = seed * 1_000_003 + first
    for number in others:
        mixed = (mixed * 1_000_003 + number + 1) % 2**62
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed)).numpy()


def pack_rows(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Puts each example into one row of at most seq_len tokens (best-fit decreasing; Johnson et al. 1974).

    lengths: tokens of each example, at most seq_len.

    The longest example goes first, each into the row that has least room left over. Returns the example numbers of each
    row. Takes O(n log n), but for the moves within the sorted list of rows that have room.
    """
    rows: list[list[int]] = []
    rows_with_room: list[tuple[int, int]] = []  # (tokens left, number of the row), ascending
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in longest_first:
        length = lengths[i]
        at = bisect_left(rows_with_room, (length, -1))
        if at < len(rows_with_room):
            room, row = rows_with_room.pop(at)
            rows[row].append(i)
        else:
            room = seq_len
            row = len(rows)
            rows.append([i])
        if room > length:
            insort(rows_with_room, (room - length, row))
    return rows
