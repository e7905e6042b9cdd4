"""Which examples are trained on and when: how sources are mixed, how examples are packed, and how
far a run is.

Everything follows from the seed, the data and three numbers, (epoch, window, row). Neither the
number of processes nor gradient accumulation changes the order. So a run that is resumed goes on
with the very next example, without computing again what came before.

An epoch is a list of samples. Each source has a fixed number of them, in random places of the list.
They are the source's own examples in shuffled order, repeated as often as needed, and the next
epoch goes on where this one stopped. The list is cut into windows of WINDOW_SAMPLES samples. With
packing, a window's examples are put into rows of at most seq_len tokens, none cut, each row as full
as possible (best-fit decreasing; Johnson et al. 1974), and the rows are shuffled. Without packing,
an example is a row.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import UserError

# Samples that are packed together, and again when a run is resumed among them.
WINDOW_SAMPLES = 4096
# A prime, by which `permutation` mixes the numbers of its seed.
SEED_FACTOR = 1_000_003


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

    def __post_init__(self) -> None:
        self.loaded_window: tuple[int, int] | None = None  # (epoch, window) of loaded_rows
        self.loaded_rows: list[list[int]] = []
        self.rows_of_epochs: dict[int, int] = {}  # of each epoch whose rows were counted

    def step(self, rows: int) -> list[list[int]]:
        """Returns the next `rows` rows, each a list of example numbers, and moves the position.

        Fewer come back at the end of an epoch: no step mixes epochs. A smaller step weighs what it
        should, because the loss counts tokens.
        """
        step_rows: list[list[int]] = []
        while len(step_rows) < rows:
            window_rows = self.load()
            missing = rows - len(step_rows)
            new = window_rows[self.row : self.row + missing]
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
        if self.loaded_window == current:
            return self.loaded_rows
        is_new_epoch = self.loaded_window is None or self.loaded_window[0] != self.epoch
        if is_new_epoch:
            self.order = epoch_order(self.sizes, self.samples_per_epoch, self.seed, self.epoch)
        self.loaded_rows = self.window_rows(self.order, self.epoch, self.window)
        self.loaded_window = current
        return self.loaded_rows

    def window_rows(self, order: np.ndarray, epoch: int, window: int) -> list[list[int]]:
        """Returns the rows of a window. order: the example numbers of the epoch, int64."""
        start = window * WINDOW_SAMPLES
        examples = order[start : start + WINDOW_SAMPLES].tolist()
        if self.seq_len is None:
            return [[i] for i in examples]
        lengths = [int(self.lengths[i]) for i in examples]
        rows = pack_rows(lengths, self.seq_len)  # of places in the window
        # Packing puts the longest examples into the first rows.
        shuffled_rows = []
        for j in permutation(len(rows), self.seed, epoch, window):
            shuffled_rows.append([examples[k] for k in rows[j]])
        return shuffled_rows

    @property
    def epochs_are_alike(self) -> bool:
        """True if every epoch has equally many rows, whatever its order."""
        if self.seq_len is None:
            return True
        # A window that holds every example once is packed into equally many rows in any order.
        is_one_window = sum(self.samples_per_epoch) <= WINDOW_SAMPLES
        return is_one_window and list(self.sizes) == list(self.samples_per_epoch)

    def epoch_rows(self, epoch: int = 0) -> int:
        """Returns how many rows an epoch has.

        Packed epochs of more than one window differ by a few rows, since their windows hold other
        examples. To count the rows, the epoch is packed.
        """
        if self.seq_len is None:
            return sum(self.samples_per_epoch)
        if self.epochs_are_alike:
            epoch = 0
        if epoch not in self.rows_of_epochs:
            order = epoch_order(self.sizes, self.samples_per_epoch, self.seed, epoch)
            num_windows = math.ceil(len(order) / WINDOW_SAMPLES)
            num_rows = 0
            for window in range(num_windows):
                start = window * WINDOW_SAMPLES
                examples = order[start : start + WINDOW_SAMPLES]
                num_rows += len(pack_rows(self.lengths[examples].tolist(), self.seq_len))
            self.rows_of_epochs[epoch] = num_rows
        return self.rows_of_epochs[epoch]

    def steps_of_epochs(self, epochs: float, rows_per_step: int) -> int:
        """Returns after how many steps every example was trained `epochs` times, at least 1.

        rows_per_step: the rows of `step`. A part of an epoch is rounded to whole steps.
        """
        if self.epochs_are_alike:
            return max(1, round(epochs * math.ceil(self.epoch_rows() / rows_per_step)))
        whole, part = divmod(epochs, 1)
        steps = 0
        for epoch in range(int(whole)):
            steps += math.ceil(self.epoch_rows(epoch) / rows_per_step)
        if part:
            steps += round(part * math.ceil(self.epoch_rows(int(whole)) / rows_per_step))
        return max(1, steps)

    def steps_per_epoch(self, steps: int, rows_per_step: int) -> float:
        """Returns the mean number of steps in an epoch of a run of so many steps.

        steps / this is then the number of epochs that `steps_of_epochs` was asked for.
        """
        if self.epochs_are_alike:
            return math.ceil(self.epoch_rows() / rows_per_step)
        epoch = 0
        rest = steps
        while True:
            steps_of_epoch = math.ceil(self.epoch_rows(epoch) / rows_per_step)
            if rest < steps_of_epoch:
                return steps / (epoch + rest / steps_of_epoch)
            rest -= steps_of_epoch
            epoch += 1

    def epoch_tokens(self) -> float:
        """Returns how many tokens an epoch takes on average.

        Computed from the mean length of each source's examples, since which of them an epoch
        takes differs from epoch to epoch.
        """
        tokens_of_sources = []
        start = 0
        for size, samples in zip(self.sizes, self.samples_per_epoch, strict=True):
            mean_length = float(self.lengths[start : start + size].mean())
            tokens_of_sources.append(samples * mean_length)
            start += size
        return sum(tokens_of_sources)


def allocate_samples(
    sizes: Sequence[int], weights: Sequence[float] | None, replayed: Sequence[float] = ()
) -> list[int]:
    """Returns how many samples of an epoch each source has.

    In all they are as many as the sources without replay have examples.

    sizes: examples of each source, those of the replay last.
    weights: of the sources without replay, relative to each other; None: their sizes, so that
        without replay each example comes once.
    replayed: for each replay source, its share of all samples.

    Rounds to whole numbers by largest remainders. None is 0: a source with a small share has one
    sample, which is taken from the largest. Raises UserError if the epoch has fewer samples than
    there are sources.
    """
    num_plain = len(sizes) - len(replayed)
    plain_sizes = sizes[:num_plain]
    total = sum(plain_sizes)
    if weights is None:
        weights = plain_sizes
    plain_share = 1 - sum(replayed)
    shares = [plain_share * weight / sum(weights) for weight in weights]
    shares += replayed
    exact = [total * share for share in shares]
    # Rounded down, and what is missing goes to the sources that lost most by it.
    samples = [int(number) for number in exact]
    missing = total - sum(samples)
    by_remainder = sorted(range(len(exact)), key=lambda i: samples[i] - exact[i])
    for i in by_remainder[:missing]:
        samples[i] += 1
    if total < len(samples):
        raise UserError(
            f"{total:,} examples make an epoch too short for {len(samples)} files;"
            " give more examples"
        )
    while 0 in samples:
        samples[samples.index(max(samples))] -= 1
        samples[samples.index(0)] += 1
    return samples


def epoch_order(
    sizes: Sequence[int], samples_per_epoch: Sequence[int], seed: int, epoch: int
) -> np.ndarray:
    """Returns the example numbers of an epoch's samples in order, int64.

    sizes, samples_per_epoch, seed: as those of `Sampler`.

    The order is plainly shuffled. Padding is never computed, so placing examples of similar length
    together would gain nothing, and it would cost: steps of short answers alone are noisier, and
    take as long as those of many tokens (experiments/LOG.md).
    """
    if list(sizes) == list(samples_per_epoch):
        return permutation(sum(sizes), seed, epoch)
    # First only which source each place of the epoch takes its example from, then which example.
    sorted_sources = np.repeat(np.arange(len(sizes)), samples_per_epoch)
    source_of_sample = sorted_sources[permutation(sum(samples_per_epoch), seed, epoch)]
    order = np.empty(len(source_of_sample), np.int64)
    first = 0  # number of the source's first example
    for source, (size, count) in enumerate(zip(sizes, samples_per_epoch, strict=True)):
        # Counted from the beginning of the run, this epoch takes the source's samples from `at` to
        # `end`. The source's examples are shuffled anew each time that all of them were taken.
        at = epoch * count
        end = at + count
        picks = []
        while at < end:
            repetition, begin = divmod(at, size)
            shuffled = permutation(size, seed, repetition, 1 + source)
            missing = end - at
            pick = shuffled[begin : begin + missing]
            picks.append(pick)
            at += len(pick)
        if picks:
            order[source_of_sample == source] = first + np.concatenate(picks)
        first += size
    return order


def permutation(count: int, seed: int, first: int, *others: int) -> np.ndarray:
    """Returns 0 to count - 1 in a random order, int64 [count].

    The order follows from the seed and the other numbers.
    """
    mixed = seed * SEED_FACTOR + first
    for number in others:
        # torch takes seeds of 64 bits. `+ 1` makes (first, 0) another seed than (first) alone.
        mixed = (mixed * SEED_FACTOR + number + 1) % 2**62
    generator = torch.Generator().manual_seed(mixed)
    return torch.randperm(count, generator=generator).numpy()


def pack_rows(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Puts each example into one row of at most seq_len tokens.

    lengths: tokens of each example, at most seq_len.

    Best-fit decreasing (Johnson et al. 1974): the longest example goes first, each into the row
    that has least room left over. Returns the example numbers of each row. Takes O(n log n), but
    for the moves within the sorted list of rows that have room.
    """
    rows: list[list[int]] = []
    rows_with_room: list[tuple[int, int]] = []  # (tokens left, number of the row), ascending
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in longest_first:
        length = lengths[i]
        # The first row with at least `length` tokens left; -1 is before all numbers of rows.
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
