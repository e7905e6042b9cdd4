"""From token rows to examples of a given length: what is cut or left out, and which tokens of an
example are trained.

An example is made when it is asked for, out of the arrays that dataset/token_cache.py maps into
memory. A conversation keeps the messages up to the last trained one that fits whole; a plain text
is cut into pieces; whatever is cut or left out is counted in `Dataset.dropped`, never cut in
silence.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dataset.text_stats import text_hash
from dataset.token_cache import IS_CHAT, Rows

# The pieces of a text that makes up more than this share of all examples may be split between
# training and validation: a single book has to give both.
SPLIT_PIECES_ABOVE = 0.02
# --train-on: the roles whose messages are trained, and True if only the last such message is.
TRAIN_ON = {
    "answers": (("assistant",), False),
    "last-answer": (("assistant",), True),
    "all-turns": (("user", "assistant"), False),
}


@dataclass
class Example:
    """One example: token ids up to the last trained one, and a loss weight for each.

    loss_weights: 0 or False for tokens that are not trained.
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
    source, row, start, stop: integer arrays [examples], source after source; start and stop are
        counted from the record's first token.
    last_only: True if only the last span of a record is trained.
    replays: how many of the last sources are replays.
    """

    def __init__(
        self,
        rows: list[Rows],
        source: np.ndarray,
        row: np.ndarray,
        start: np.ndarray,
        stop: np.ndarray,
        last_only: bool = False,
        replays: int = 0,
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
        source = int(self.source[i])
        rows = self.rows[source]
        row = int(self.row[i])
        start = int(self.start[i])
        stop = int(self.stop[i])
        loss_weights = np.zeros(stop - start, np.float32)
        spans = range(rows.span_starts[row], rows.span_starts[row + 1])
        if self.last_only:
            spans = spans[-1:]
        for k in spans:
            # Counted from this example's start. A span before it becomes an empty slice: numpy would
            # count negative bounds from the end.
            span_start, span_stop = rows.spans[k]
            first_trained = max(span_start - start, 0)
            end_trained = max(span_stop - start, 0)
            loss_weights[first_trained:end_trained] = rows.weights[k]
        # No token before the first one predicts it.
        loss_weights[0] = 0
        first = rows.starts[row]
        ids = rows.ids[first + start : first + stop]
        first_replay = len(self.rows) - self.replays
        return Example(
            ids=ids,
            loss_weights=loss_weights,
            source=rows.where(row),
            prompt=int(rows.prompts[row]),
            is_replay=source >= first_replay,
        )

    def take(self, chosen: np.ndarray) -> "ExampleIndex":
        """Returns some of the examples. chosen: their numbers."""
        return ExampleIndex(
            self.rows,
            self.source[chosen],
            self.row[chosen],
            self.start[chosen],
            self.stop[chosen],
            self.last_only,
            self.replays,
        )

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
    prompts: uint64 [examples], hashes of what is asked; examples with equal ones stay on one side
        of a split.
    chat: True if there are conversations, not plain text alone.
    formats: the names of the files' formats.
    with_validation: the files and folders that have a part of their own to validate with.

    Where the three arrays are not given, they are counted from the examples.
    """

    examples: Sequence[Example]
    dropped: dict[str, int] = field(default_factory=dict)
    # Never None after __post_init__.
    lengths: np.ndarray = None
    num_trained: np.ndarray = None
    prompts: np.ndarray = None
    chat: bool = False
    formats: tuple[str, ...] = ()
    with_validation: tuple = ()

    def __post_init__(self) -> None:
        if self.lengths is None:
            lengths = [len(example.ids) for example in self.examples]
            # Not the first token: none before it predicts it.
            num_trained = [np.count_nonzero(example.loss_weights[1:]) for example in self.examples]
            prompts = [example.prompt for example in self.examples]
            self.lengths = np.array(lengths, np.int64)
            self.num_trained = np.array(num_trained, np.int64)
            self.prompts = np.array(prompts, np.uint64)

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
        examples: Sequence[Example]
        if isinstance(self.examples, ExampleIndex):
            examples = self.examples.take(chosen)
        else:
            examples = [self.examples[i] for i in chosen]
        return Dataset(
            examples=examples,
            lengths=self.lengths[chosen],
            num_trained=self.num_trained[chosen],
            prompts=self.prompts[chosen],
            chat=self.chat,
        )

    def with_replay(self, replay: "Dataset") -> "Dataset":
        """Returns these examples followed by those of `replay`, whose sources become replays."""
        mine = self.examples
        theirs = replay.examples
        assert isinstance(mine, ExampleIndex) and isinstance(theirs, ExampleIndex)
        # The replay's sources are numbered after these.
        source = np.concatenate([mine.source, theirs.source + len(mine.rows)])
        row = np.concatenate([mine.row, theirs.row])
        start = np.concatenate([mine.start, theirs.start])
        stop = np.concatenate([mine.stop, theirs.stop])
        rows = mine.rows + theirs.rows
        num_replays = len(theirs.rows)
        return Dataset(
            examples=ExampleIndex(rows, source, row, start, stop, mine.last_only, num_replays),
            dropped=self.dropped,
            lengths=np.concatenate([self.lengths, replay.lengths]),
            num_trained=np.concatenate([self.num_trained, replay.num_trained]),
            prompts=np.concatenate([self.prompts, replay.prompts]),
            chat=self.chat or replay.chat,
        )


def cut(rows: list[Rows], seq_len: int, last_only: bool = False) -> Dataset:
    """Makes examples of at most seq_len tokens.

    Of a conversation, the messages up to the last trained one that fits whole; of a plain text,
    pieces of seq_len tokens, all trained but each piece's first, which nothing predicts.

    rows: the token rows of each source.
    seq_len: in tokens.
    last_only: True if only the last span of a record is trained.
    """
    # An array for each source, of all of its examples.
    sources, record_numbers, starts, stops, num_trained, prompt_hashes = [], [], [], [], [], []
    dropped: Counter[str] = Counter()
    has_chats = False
    for number, source_rows in enumerate(rows):
        is_chat = (source_rows.records[:, 2] & IS_CHAT) > 0
        has_chats = has_chats or bool(is_chat.any())
        chat_row, chat_stop, chat_trained = cut_chats(
            source_rows, np.flatnonzero(is_chat), seq_len, last_only, dropped
        )
        text_row, text_start, text_stop = cut_texts(
            source_rows, np.flatnonzero(~is_chat), seq_len, dropped
        )
        row = np.concatenate([chat_row, text_row])
        start = np.concatenate([np.zeros(len(chat_row), np.int64), text_start])
        stop = np.concatenate([chat_stop, text_stop])
        trained = np.concatenate([chat_trained, text_stop - text_start - 1])
        # Back into the order of the file, since conversations and texts were cut separately.
        order = np.lexsort((start, row))
        sources.append(np.full(len(row), number))
        record_numbers.append(row[order])
        starts.append(start[order])
        stops.append(stop[order])
        num_trained.append(trained[order])
        prompt_hashes.append(source_rows.prompts[row[order]])
    source = np.concatenate(sources)
    row = np.concatenate(record_numbers)
    start = np.concatenate(starts)
    stop = np.concatenate(stops)
    prompts = np.concatenate(prompt_hashes)
    # Narrow types, since these two arrays stay in memory for every example.
    narrow_source = source.astype(np.int16)
    narrow_row = row.astype(np.int32)
    examples = ExampleIndex(rows, narrow_source, narrow_row, start, stop, last_only)
    # The pieces of a text that is much of the whole get a hash each, so that a split may separate
    # them. Those of a short text keep the hash that they share, and stay together.
    record_key = source * 2**32 + row
    _, record, num_pieces = np.unique(record_key, return_inverse=True, return_counts=True)
    most_pieces = max(1, SPLIT_PIECES_ABOVE * len(row))
    for i in np.flatnonzero(num_pieces[record] > most_pieces):
        prompts[i] = text_hash(" ".join(map(str, examples[i].ids)))
    return Dataset(
        examples=examples,
        dropped=dict(dropped),
        lengths=stop - start,
        num_trained=np.concatenate(num_trained),
        prompts=prompts,
        chat=has_chats,
    )


def cut_chats(
    rows: Rows, chats: np.ndarray, seq_len: int, last_only: bool, dropped: Counter[str]
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
    first_trained = np.maximum(starts, 1)
    is_trained = (rows.weights > 0) & (ends > first_trained)
    if last_only:
        spans_end = rows.span_starts[1:]  # of each record
        last_spans = spans_end[num_spans > 0] - 1
        is_last = np.zeros(len(ends), bool)
        is_last[last_spans] = True
        is_trained &= is_last
    # From here on of the trained spans only.
    record = record[is_trained]
    ends = ends[is_trained]
    span_tokens = ends - first_trained[is_trained]

    trained_chats = np.intersect1d(chats, record)
    if len(trained_chats) < len(chats):
        dropped["without a trained token"] += len(chats) - len(trained_chats)
        chats = trained_chats

    # `ufunc.at` and not `stop[record] = ...`, since a record has several spans.
    fits = ends <= seq_len
    stop = np.zeros(num_records, np.int64)
    trained = np.zeros(num_records, np.int64)
    np.maximum.at(stop, record[fits], ends[fits])
    np.add.at(trained, record[fits], span_tokens[fits])

    num_trained_spans = np.bincount(record, minlength=num_records)
    num_fitting_spans = np.bincount(record[fits], minlength=num_records)
    fitting_chats = chats[num_fitting_spans[chats] > 0]
    num_left_out = len(chats) - len(fitting_chats)
    is_shortened = num_fitting_spans[fitting_chats] < num_trained_spans[fitting_chats]
    num_shortened = int(is_shortened.sum())
    if num_left_out:
        dropped[f"whose answer does not fit into --seq-len {seq_len}"] += num_left_out
    if num_shortened:
        dropped[f"cut to the messages that fit into --seq-len {seq_len}"] += num_shortened
    return fitting_chats, stop[fitting_chats], trained[fitting_chats]


def cut_texts(
    rows: Rows, texts: np.ndarray, seq_len: int, dropped: Counter[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts plain texts into pieces of seq_len tokens.

    rows: the token rows of a source.
    texts: int64 [T], the records that are texts.
    seq_len: in tokens.
    dropped: counts, by reason, the texts that are left out or lose tokens.

    Returns (record, start, end) of the pieces, int64 each.
    """
    lengths = np.diff(rows.starts)[texts]
    num_pieces = -(-lengths // seq_len)  # rounded up
    first_pieces = np.cumsum(num_pieces) - num_pieces  # the number of each text's first piece
    # From here on of each piece. `piece` counts 0, 1, ... in a text.
    record = np.repeat(texts, num_pieces)
    piece = np.arange(len(record)) - np.repeat(first_pieces, num_pieces)
    length = np.repeat(lengths, num_pieces)
    start = piece * seq_len
    end = np.minimum((piece + 1) * seq_len, length)
    # A last piece of one token, the end token, would not be trained; so the piece before gives it
    # one of its tokens. Subtracting a mask takes 1 where it is True.
    ends_alone = (length > 1) & (length % seq_len == 1)
    start -= ends_alone & (end == length)
    end -= ends_alone & (end == length - 1)
    is_trained = end - start > 1
    num_alone = int((lengths < 2).sum())
    if num_alone:
        dropped["without a trained token"] += num_alone
    # With --seq-len 2 a piece that gives a token keeps one, in which there is nothing to predict.
    is_lost = ~is_trained & (length > 1)
    num_lost = int((end - start)[is_lost].sum())
    if num_lost:
        reason = f"cut by {num_lost:,} tokens in all, each a piece of --seq-len {seq_len} by itself"
        dropped[reason] += len(np.unique(record[is_lost]))
    return record[is_trained], start[is_trained], end[is_trained]
