"""Token rows to examples of a length: what is cut, what is left out, and which tokens of an example are trained.

An example is made when it is asked for, out of the arrays that dataset/token_cache.py maps into memory. A conversation
keeps the turns whose answers fit whole; a plain text comes in pieces; nothing is cut in silence.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dataset.text_stats import text_hash
from dataset.token_cache import CHAT, Rows

SPLIT_PIECES_ABOVE = 0.02  # of all examples
TRAIN_ON = {  # --train-on: whose turns are trained, and whether only the last of them
    "answers": (("assistant",), False),
    "last-answer": (("assistant",), True),
    "all-turns": (("user", "assistant"), False),
}


@dataclass
class Example:
    """Token ids up to the last trained one, and what each one's loss weighs (0 or False: not trained).

    source: the record's place in its file, for messages. prompt: a hash of what is asked. is_replay: whether it is of
    --replay, whose loss is reported by itself. dropout_seed: what decides its dropout.
    """

    ids: Sequence[int]
    loss_weights: Sequence[float]
    source: str = ""
    prompt: int = 0
    is_replay: bool = False
    dropout_seed: int | None = None


# What a rank computes that has nothing to do while the others have.
DUMMY_EXAMPLE = Example([0, 0], [0.0, 0.0])


class ExampleIndex(Sequence):
    """Examples out of rows on disk, made when they are asked for: tokens start to stop of row `row` of rows[source],
    source after source. replays: how many of the last sources are replays."""

    def __init__(self, rows: list[Rows], source, row, start, stop, last_only: bool = False, replays: int = 0):
        self.rows, self.last_only, self.replays = rows, last_only, replays
        self.source, self.row, self.start, self.stop = source, row, start, stop

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, i: int) -> Example:
        rows, row, start, stop = self.rows[self.source[i]], int(self.row[i]), int(self.start[i]), int(self.stop[i])
        first = rows.starts[row]
        loss_weights = np.zeros(stop - start, np.float32)
        spans = range(rows.span_starts[row], rows.span_starts[row + 1])
        for (a, b), weight in ((rows.spans[k], rows.weights[k]) for k in (spans[-1:] if self.last_only else spans)):
            loss_weights[max(a - start, 0) : max(b - start, 0)] = weight
        loss_weights[0] = 0  # nothing predicts it
        ids = rows.ids[first + start : first + stop]
        is_replay = bool(self.source[i] >= len(self.rows) - self.replays)
        return Example(ids, loss_weights, rows.where(row), int(rows.prompts[row]), is_replay)

    def take(self, chosen) -> "ExampleIndex":
        parts = (each[chosen] for each in (self.source, self.row, self.start, self.stop))
        return ExampleIndex(self.rows, *parts, self.last_only, self.replays)

    @property
    def sizes(self) -> list[int]:
        return np.bincount(self.source, minlength=len(self.rows)).tolist()


@dataclass
class Dataset:
    examples: Sequence[Example]
    dropped: dict[str, int] = field(default_factory=dict)  # reason: how many records
    lengths: np.ndarray | None = None  # of the examples, in tokens
    num_trained: np.ndarray | None = None  # how many of them are trained
    prompts: np.ndarray | None = None  # uint64; hash of what is asked: equal ones stay on one side of a split
    chat: bool = False  # has conversations, not plain text alone
    formats: tuple[str, ...] = ()  # of its files

    def __post_init__(self):
        if self.lengths is None:
            self.lengths = np.array([len(example.ids) for example in self.examples], np.int64)
            self.num_trained = np.array(
                [np.count_nonzero(example.loss_weights[1:]) for example in self.examples], np.int64
            )
            self.prompts = np.array([example.prompt for example in self.examples], np.uint64)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def trained_tokens(self) -> int:
        return int(self.num_trained.sum())

    def take(self, chosen: np.ndarray) -> "Dataset":
        """Some of the examples, by number or mask."""
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        if isinstance(self.examples, ExampleIndex):
            examples = self.examples.take(chosen)
        else:
            examples = [self.examples[i] for i in chosen]
        arrays = (each[chosen] for each in (self.lengths, self.num_trained, self.prompts))
        return Dataset(examples, {}, *arrays, self.chat)

    def with_replay(self, other: "Dataset") -> "Dataset":
        """These examples, then the other ones, of replays."""
        mine, theirs = self.examples, other.examples
        source = np.concatenate([mine.source, theirs.source + len(mine.rows)])
        both = [np.concatenate([getattr(each, name) for each in (mine, theirs)]) for name in ("row", "start", "stop")]
        examples = ExampleIndex(mine.rows + theirs.rows, source, *both, mine.last_only, len(theirs.rows))
        names = ("lengths", "num_trained", "prompts")
        arrays = [np.concatenate([getattr(each, name) for each in (self, other)]) for name in names]
        return Dataset(examples, self.dropped, *arrays, self.chat or other.chat)


def cut(rows: list[Rows], seq_len: int, last_only: bool = False) -> Dataset:
    """Examples of at most seq_len tokens. Of a conversation, the turns whose answers fit whole; of a plain text, pieces
    of seq_len tokens, all trained but each piece's first, which nothing predicts."""
    columns, dropped = [], Counter()
    for source, each in enumerate(rows):
        chat = (each.records[:, 2] & CHAT) > 0
        row, stop, trained = cut_chats(each, np.flatnonzero(chat), seq_len, last_only, dropped)
        text, start, end = cut_texts(each, np.flatnonzero(~chat), seq_len)
        row, start = np.concatenate([row, text]), np.concatenate([np.zeros(len(row), np.int64), start])
        order = np.lexsort((start, row))
        stop, trained = np.concatenate([stop, end]), np.concatenate([trained, end - start[len(stop) :] - 1])
        columns.append([each[order] for each in (np.full(len(row), source), row, start, stop, trained)])
    source, row, start, stop, trained = (np.concatenate(column) for column in zip(*columns, strict=True))
    examples = ExampleIndex(rows, source.astype(np.int16), row.astype(np.int32), start, stop, last_only)
    prompts = np.concatenate([each.prompts[column[1]] for each, column in zip(rows, columns, strict=True)])
    # pieces of a long text that is much of the whole are parted; of a short one they stay together
    _, text, pieces = np.unique(source * 2**32 + row, return_inverse=True, return_counts=True)
    for i in np.flatnonzero(pieces[text] > max(1, SPLIT_PIECES_ABOVE * len(row))):
        prompts[i] = text_hash(" ".join(map(str, examples[i].ids)))
    chats = any((each.records[:, 2] & CHAT).any() for each in rows)
    return Dataset(examples, dict(dropped), stop - start, trained, prompts, bool(chats))


def cut_chats(rows: Rows, chosen: np.ndarray, seq_len: int, last_only: bool, dropped: Counter):
    """(row, end, trained tokens) of the conversations of which something fits."""
    counts = np.diff(rows.span_starts)
    owner = np.repeat(np.arange(len(rows)), counts)
    starts, ends = rows.spans[:, 0].astype(np.int64), rows.spans[:, 1].astype(np.int64)
    wanted = (rows.weights > 0) & (ends > np.maximum(starts, 1))
    if last_only:
        last = np.zeros(len(ends), bool)
        last[rows.span_starts[1:][counts > 0] - 1] = True
        wanted &= last
    owner, starts, ends = owner[wanted], starts[wanted], ends[wanted]
    if nothing := len(chosen) - len(np.intersect1d(chosen, owner)):
        dropped["without a trained token"] += nothing
        chosen = np.intersect1d(chosen, owner)
    fits = ends <= seq_len
    stop, trained = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    np.maximum.at(stop, owner[fits], ends[fits])
    np.add.at(trained, owner[fits], (ends - np.maximum(starts, 1))[fits])
    there, fitting = np.bincount(owner, minlength=len(rows)), np.bincount(owner[fits], minlength=len(rows))
    whole = chosen[fitting[chosen] > 0]
    if lost := len(chosen) - len(whole):
        dropped[f"whose answer does not fit into --seq-len {seq_len}"] += lost
    if short := int((fitting[whole] < there[whole]).sum()):
        dropped[f"cut to the turns that fit into --seq-len {seq_len}"] += short
    return whole, stop[whole], trained[whole]


def cut_texts(rows: Rows, chosen: np.ndarray, seq_len: int):
    """(row, start, end) of the pieces of plain texts."""
    lengths = np.diff(rows.starts)[chosen]
    counts = -(-lengths // seq_len)
    row = np.repeat(chosen, counts)
    number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    length = np.repeat(lengths, counts)
    start, end = number * seq_len, np.minimum((number + 1) * seq_len, length)
    # the end token alone would not be trained: the piece before gives up a token
    alone = (length > 1) & (length % seq_len == 1)
    start -= alone & (end == length)
    end -= alone & (end == length - 1)
    some = end - start > 1
    return row[some], start[some], end[some]
