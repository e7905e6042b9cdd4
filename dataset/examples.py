"""From token rows to examples of a given length: what is cut or left out, and which tokens of an example are trained.

An example is made when it is asked for, out of the arrays that dataset/token_cache.py maps into memory. A conversation
keeps the messages up to the last trained one that fits whole; a plain text is cut into pieces; whatever is cut or left
out is counted in `Dataset.dropped`, never cut in silence.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dataset.text_stats import text_hash
from dataset.token_cache import IS_CHAT, Rows

# The pieces of a text that makes up more than this share of all examples may be split between training and validation.
SPLIT_PIECES_ABOVE = 0.02
# --train-on: the roles whose messages are trained, and True if only the last such message is.
TRAIN_ON = {
    "answers": (("assistant",), False),
    "last-answer": (("assistant",), True),
    "all-turns": (("user", "assistant"), False),
}


@dataclass
class Example:
    """One example: token ids up to the last trained one, and a loss weight for each (0 or False: not trained).

    source: the record's place in its file, for messages.
    prompt: a hash of what is asked.
    is_replay: True if it comes from --replay, whose loss is reported by itself.
    dropout_seed: decides the example's dropout.
    """

    ids: Sequence[int]
    loss_weights: Sequence[float]
    source: str = ""
    prompt: int = 0
    is_replay: bool = False
    dropout_seed: int | None = None


# What a rank without rows computes while the others have some.
DUMMY_EXAMPLE = Example([0, 0], [0.0, 0.0])


class ExampleIndex(Sequence):
    """A sequence of examples that are made, when they are asked for, out of token rows on disk.

    Example i is the tokens start[i] to stop[i] of record row[i] in rows[source[i]].

    rows: the token rows of each source.
    source, row, start, stop: integer arrays [examples], source after source.
    last_only: True if only the last span of a record is trained.
    replays: how many of the last sources are replays.
    """

    def __init__(
        self, rows: list[Rows], source, row, start, stop, last_only: bool = False, replays: int = 0
    ):
        self.rows = rows
        self.source = source
        self.row = row
        self.start = start
        self.stop = stop
        self.last_only = last_only
        self.replays = replays

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, i: int) -> Example:
        rows = self.rows[self.source[i]]
        row = int(self.row[i])
        start = int(self.start[i])
        stop = int(self.stop[i])
        loss_weights = np.zeros(stop - start, np.float32)
        spans = range(rows.span_starts[row], rows.span_starts[row + 1])
        if self.last_only:
            spans = spans[-1:]
        for k in spans:
            span_start, span_stop = rows.spans[k]
            loss_weights[max(span_start - start, 0) : max(span_stop - start, 0)] = rows.weights[k]
        # No token before the first one predicts it.
        loss_weights[0] = 0
        first = rows.starts[row]
        ids = rows.ids[first + start : first + stop]
        is_replay = bool(self.source[i] >= len(self.rows) - self.replays)
        return Example(ids, loss_weights, rows.where(row), int(rows.prompts[row]), is_replay)

    def take(self, chosen: np.ndarray) -> "ExampleIndex":
        """Returns some of the examples. chosen: their numbers."""
        arrays = [array[chosen] for array in (self.source, self.row, self.start, self.stop)]
        return ExampleIndex(self.rows, *arrays, self.last_only, self.replays)

    @property
    def sizes(self) -> list[int]:
        """The number of examples of each source."""
        return np.bincount(self.source, minlength=len(self.rows)).tolist()


@dataclass
class Dataset:
    """Examples, and what is known of each without making it.

    dropped: number of records for each reason to cut them or to leave them out.
    lengths: int64 [examples], tokens of each.
    num_trained: int64 [examples], trained tokens of each.
    prompts: uint64 [examples], hashes of what is asked; examples with equal ones stay on one side of a split.
    chat: True if there are conversations, not plain text alone.
    formats: the names of the files' formats.
    """

    examples: Sequence[Example]
    dropped: dict[str, int] = field(default_factory=dict)
    lengths: np.ndarray | None = None
    num_trained: np.ndarray | None = None
    prompts: np.ndarray | None = None
    chat: bool = False
    formats: tuple[str, ...] = ()

    def __post_init__(self):
        if self.lengths is None:
            num_trained = [np.count_nonzero(example.loss_weights[1:]) for example in self.examples]
            self.lengths = np.array([len(example.ids) for example in self.examples], np.int64)
            self.num_trained = np.array(num_trained, np.int64)
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
        """Returns some of the examples. chosen: their numbers, or a mask."""
        if chosen.dtype == bool:
            chosen = np.flatnonzero(chosen)
        if isinstance(self.examples, ExampleIndex):
            examples = self.examples.take(chosen)
        else:
            examples = [self.examples[i] for i in chosen]
        arrays = [array[chosen] for array in (self.lengths, self.num_trained, self.prompts)]
        return Dataset(examples, {}, *arrays, self.chat)

    def with_replay(self, replay: "Dataset") -> "Dataset":
        """Returns these examples followed by those of `replay`, whose sources are marked as replays."""
        mine = self.examples
        theirs = replay.examples
        source = np.concatenate([mine.source, theirs.source + len(mine.rows)])
        row = np.concatenate([mine.row, theirs.row])
        start = np.concatenate([mine.start, theirs.start])
        stop = np.concatenate([mine.stop, theirs.stop])
        rows = mine.rows + theirs.rows
        return Dataset(
            examples=ExampleIndex(
                rows, source, row, start, stop, mine.last_only, replays=len(theirs.rows)
            ),
            dropped=self.dropped,
            lengths=np.concatenate([self.lengths, replay.lengths]),
            num_trained=np.concatenate([self.num_trained, replay.num_trained]),
            prompts=np.concatenate([self.prompts, replay.prompts]),
            chat=self.chat or replay.chat,
        )


def cut(rows: list[Rows], seq_len: int, last_only: bool = False) -> Dataset:
    """Makes examples of at most seq_len tokens.

    Of a conversation, the messages up to the last trained one that fits whole; of a plain text, pieces of seq_len
    tokens, all trained but each piece's first, which nothing predicts.

    rows: the token rows of each source.
    seq_len: in tokens.
    last_only: True if only the last span of a record is trained.
    """
    columns = []  # for each source [source, row, start, stop, trained tokens] of its examples
    dropped = Counter()
    for number, source_rows in enumerate(rows):
        is_chat = (source_rows.records[:, 2] & IS_CHAT) > 0
        chat_row, chat_stop, chat_trained = cut_chats(
            source_rows, np.flatnonzero(is_chat), seq_len, last_only, dropped
        )
        text_row, text_start, text_stop = cut_texts(source_rows, np.flatnonzero(~is_chat), seq_len)
        row = np.concatenate([chat_row, text_row])
        start = np.concatenate([np.zeros(len(chat_row), np.int64), text_start])
        stop = np.concatenate([chat_stop, text_stop])
        trained = np.concatenate([chat_trained, text_stop - text_start - 1])
        source = np.full(len(row), number)
        # The order of the file.
        order = np.lexsort((start, row))
        columns.append([column[order] for column in (source, row, start, stop, trained)])
    source, row, start, stop, trained = (
        np.concatenate(column) for column in zip(*columns, strict=True)
    )
    examples = ExampleIndex(
        rows, source.astype(np.int16), row.astype(np.int32), start, stop, last_only
    )
    prompts = np.concatenate(
        [r.prompts[column[1]] for r, column in zip(rows, columns, strict=True)]
    )
    # The pieces of a text that is much of the whole get a hash each, so that a split may separate them. Those of a
    # short text keep the hash that they share, and stay together.
    _, text, num_pieces = np.unique(source * 2**32 + row, return_inverse=True, return_counts=True)
    for i in np.flatnonzero(num_pieces[text] > max(1, SPLIT_PIECES_ABOVE * len(row))):
        prompts[i] = text_hash(" ".join(map(str, examples[i].ids)))
    has_chats = any((r.records[:, 2] & IS_CHAT).any() for r in rows)
    return Dataset(examples, dict(dropped), stop - start, trained, prompts, bool(has_chats))


def cut_chats(
    rows: Rows, chats: np.ndarray, seq_len: int, last_only: bool, dropped: Counter
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts conversations behind the last trained span that fits whole.

    rows: the token rows of a source.
    chats: int64 [C], the records that are conversations.
    seq_len: in tokens.
    last_only: True if only the last span of a record is trained.
    dropped: counts, by reason, the conversations that are cut or left out.

    Returns (record, end, trained tokens), int64 each, of the conversations of which something fits.
    """
    num_records = len(rows)
    num_spans = np.diff(rows.span_starts)
    record = np.repeat(np.arange(num_records), num_spans)  # of each span
    starts = rows.spans[:, 0].astype(np.int64)
    ends = rows.spans[:, 1].astype(np.int64)
    # A record's first token has none before it that predicts it.
    is_trained = (rows.weights > 0) & (ends > np.maximum(starts, 1))
    if last_only:
        is_last = np.zeros(len(ends), bool)
        is_last[rows.span_starts[1:][num_spans > 0] - 1] = True
        is_trained &= is_last
    record = record[is_trained]
    starts = starts[is_trained]
    ends = ends[is_trained]

    trained_chats = np.intersect1d(chats, record)
    if len(trained_chats) < len(chats):
        dropped["without a trained token"] += len(chats) - len(trained_chats)
        chats = trained_chats

    fits = ends <= seq_len
    stop = np.zeros(num_records, np.int64)
    trained = np.zeros(num_records, np.int64)
    np.maximum.at(stop, record[fits], ends[fits])
    np.add.at(trained, record[fits], (ends - np.maximum(starts, 1))[fits])

    num_trained_spans = np.bincount(record, minlength=num_records)
    num_fitting_spans = np.bincount(record[fits], minlength=num_records)
    fitting_chats = chats[num_fitting_spans[chats] > 0]
    num_left_out = len(chats) - len(fitting_chats)
    num_shortened = int((num_fitting_spans[fitting_chats] < num_trained_spans[fitting_chats]).sum())
    if num_left_out:
        dropped[f"whose answer does not fit into --seq-len {seq_len}"] += num_left_out
    if num_shortened:
        dropped[f"cut to the messages that fit into --seq-len {seq_len}"] += num_shortened
    return fitting_chats, stop[fitting_chats], trained[fitting_chats]


def cut_texts(
    rows: Rows, texts: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts plain texts into pieces of seq_len tokens.

    rows: the token rows of a source.
    texts: int64 [T], the records that are texts.
    seq_len: in tokens.

    Returns (record, start, end) of the pieces, int64 each.
    """
    lengths = np.diff(rows.starts)[texts]
    num_pieces = -(-lengths // seq_len)
    record = np.repeat(texts, num_pieces)
    piece = np.arange(len(record)) - np.repeat(
        np.cumsum(num_pieces) - num_pieces, num_pieces
    )  # 0, 1, ... in a text
    length = np.repeat(lengths, num_pieces)
    start = piece * seq_len
    end = np.minimum((piece + 1) * seq_len, length)
    # A last piece of one token, the end token, would not be trained; so the piece before gives it one of its tokens.
    ends_alone = (length > 1) & (length % seq_len == 1)
    start -= ends_alone & (end == length)
    end -= ends_alone & (end == length - 1)
    is_trained = end - start > 1
    return record[is_trained], start[is_trained], end[is_trained]
