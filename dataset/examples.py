"""From token rows to examples of a given length: what is cut or left out, and which tokens of an
example are trained.

An example is made when it is asked for, out of the arrays that dataset/token_cache.py maps into
memory. A conversation keeps the messages up to the last trained one that fits whole; a plain text
is cut into pieces; whatever is cut or left out is counted in `Dataset.dropped`, never cut in
silence.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dataset.encoding import AS_TEXTS
from dataset.faults import WARN_ABOVE
from dataset.formats import Source
from dataset.prompt_cut import cut_prompt
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
# --truncate: a conversation that is too long is cut at a turn or left out, or loses the beginning of
# its prompt.
TRUNCATE = ("drop", "prompt")


@dataclass(frozen=True)
class SampledAnswer:
    """What is known of an answer that the model has written while it is trained.

    logps: the log-probability of each of its tokens, when it was drawn.
    reward: of the answer. advantage: by how much that is better than the rewards of its group.
    is_cut: it was cut off at the most tokens that an answer may have.
    is_alike: all answers of its group have the same reward, so that nothing is learnt from them.
    was_redrawn: a token of it came out otherwise from the logits that train it (training/own_answers.py).
    """

    logps: Sequence[float]
    reward: float = 0.0
    advantage: float = 0.0
    is_cut: bool = False
    is_alike: bool = False
    was_redrawn: bool = False


@dataclass
class Example:
    """One example: token ids up to the last trained one, and a loss weight for each.

    loss_weights: 0 or False for tokens that are not trained.
    source: the record's place in its file, for messages.
    prompt: a hash of what is asked.
    is_replay: True if it comes from --replay, whose loss is reported by itself.
    dropout_seed: decides what is drawn for the example: its dropout, the answers to a prompt.
    split: where the second text of a pair begins in the ids; 0 where there is one text.
    weight: of a pair, a judged answer or a class as a whole.
    label: the number of its class, or of its judgment; -1 for others.
    mismatched: of a judged answer, its prompt with another example's answer.
    reference: of a preference, what the model before step 1 finds of its texts, where that was computed
        beforehand: the log-probability of each, and of the mismatched one; () where it was not.
    key: the number of its source, and that of its record there; None where it is not from a file.
    sampled: of a prompt that the model has answered; its ids are then followed by those of the answer.
    """

    ids: Sequence[int]
    loss_weights: Sequence[float]
    source: str = ""
    prompt: int = 0
    is_replay: bool = False
    dropout_seed: int | None = None
    split: int = 0
    weight: float = 1.0
    label: int = -1
    mismatched: "Example | None" = None
    reference: Sequence[float] = ()
    key: tuple[int, int] | None = None
    sampled: SampledAnswer | None = None

    @property
    def text_lengths(self) -> list[int]:
        """The tokens of each of its texts: two of a pair, else one."""
        if self.split:
            return [self.split, len(self.ids) - self.split]
        return [len(self.ids)]

    def texts(self) -> list["Example"]:
        """Returns each of its texts as an example: of a pair the chosen and the rejected one."""
        if not self.split:
            return [self]
        parts = (slice(0, self.split), slice(self.split, None))
        return [
            replace(self, ids=self.ids[part], loss_weights=self.loss_weights[part], split=0)
            for part in parts
        ]


# What a rank without rows computes while the others have some.
DUMMY_EXAMPLE = Example([0, 0], [0.0, 0.0])


class ExampleIndex(Sequence):
    """A sequence of examples that are made, when they are asked for, out of token rows on disk.

    Example i is the tokens start[i] to stop[i] of record row[i] in rows[source[i]]; of a prompt that
    is cut from the left, head[i] tokens of the record's beginning stand before them.

    rows: the token rows of each source.
    source, row, start, stop, head: integer arrays [examples], source after source; start and stop
        are counted from the record's first token. head: -1 for all that is not cut from the left,
        which most examples are not; None if none is.
    last_only: True if only the last span of a record is trained.
    replays: how many of the last sources are replays.
    label: int [examples], of judged answers and classes; None for others.
    partner: int64 [examples, 2], for judged answers the source and row of another one, whose answer is put
        behind the own prompt, in at most `seq_len` tokens; None for others.
    reference: float32 [examples, texts], see `Example`; None where it was not computed.
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
        head: np.ndarray | None = None,
        label: np.ndarray | None = None,
        partner: np.ndarray | None = None,
        reference: np.ndarray | None = None,
        seq_len: int = 0,
    ):
        self.rows = rows
        self.source = source
        self.row = row
        self.start = start
        self.stop = stop
        self.last_only = last_only
        self.replays = replays
        self.head = head
        self.label = label
        self.partner = partner
        self.reference = reference
        self.seq_len = seq_len

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, i: int) -> Example:
        source = int(self.source[i])
        rows = self.rows[source]
        row = int(self.row[i])
        start = int(self.start[i])
        stop = int(self.stop[i])
        head = -1 if self.head is None else int(self.head[i])
        is_cut = head >= 0
        head = max(head, 0)
        loss_weights = np.zeros(head + stop - start, np.float32)
        spans = range(rows.span_starts[row], rows.span_starts[row + 1])
        if self.last_only:
            spans = spans[-1:]
        for k in spans:
            # Counted from this example's start. A span before it becomes an empty slice: numpy would
            # count negative bounds from the end.
            span_start, span_stop = rows.spans[k]
            if is_cut and span_start < start:
                # The rest of an answer whose beginning is cut off.
                continue
            first_trained = max(span_start - start, 0) + head
            end_trained = max(span_stop - start, 0) + head
            loss_weights[first_trained:end_trained] = rows.weights[k]
        # No token before the first one predicts it.
        loss_weights[0] = 0
        first = rows.starts[row]
        ids = rows.ids[first + start : first + stop]
        if head:
            ids = np.concatenate([rows.ids[first : first + head], ids])
        first_replay = len(self.rows) - self.replays
        example = Example(
            ids=ids,
            loss_weights=loss_weights,
            source=rows.where(row),
            prompt=int(rows.prompts[row]),
            is_replay=source >= first_replay,
            key=(source, row),
        )
        if rows.kind != AS_TEXTS:
            example.split = int(rows.splits[row])
            example.weight = float(rows.weights[rows.span_starts[row]])
        if self.label is not None:
            example.label = int(self.label[i])
        if self.partner is not None:
            example.mismatched = self.mismatched(rows, row, *self.partner[i].tolist())
        if self.reference is not None:
            example.reference = self.reference[i].tolist()
        return example

    def mismatched(self, rows: Rows, row: int, partner: int, partner_row: int) -> Example:
        """Returns the prompt of a judged answer with the answer of another one, of another source
        perhaps: what does not fit into `seq_len` is cut off at the end, as nothing of it is trained."""
        prompt, _, _ = answer_of_row(rows, row)
        _, answer, is_trained = answer_of_row(self.rows[partner], partner_row)
        ids = np.concatenate([prompt, answer])[: self.seq_len]
        mask = np.concatenate([np.zeros(len(prompt), bool), is_trained])[: self.seq_len]
        weight = float(rows.weights[rows.span_starts[row]])
        return Example(ids, mask.astype(np.float32), weight=weight)

    def take(self, chosen: np.ndarray) -> "ExampleIndex":
        """Returns some of the examples. chosen: their numbers."""

        def taken(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[chosen]

        return ExampleIndex(
            self.rows,
            self.source[chosen],
            self.row[chosen],
            self.start[chosen],
            self.stop[chosen],
            self.last_only,
            self.replays,
            taken(self.head),
            taken(self.label),
            taken(self.partner),
            taken(self.reference),
            self.seq_len,
        )

    def heads(self) -> np.ndarray:
        """Returns the tokens of the record's beginning that stand before each example, int32; -1
        where its prompt is not cut."""
        if self.head is None:
            return np.full(len(self), -1, np.int32)
        return self.head

    @property
    def sizes(self) -> list[int]:
        """The number of examples of each source."""
        return np.bincount(self.source, minlength=len(self.rows)).tolist()


def answer_of_row(rows: Rows, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the ids of a judged answer's prompt, those of the answer, and which of these are trained:
    between its messages there may be a user's."""
    first = rows.starts[row]
    spans = rows.spans[rows.span_starts[row] : rows.span_starts[row + 1]]
    start, end = spans[0, 0], spans[-1, 1]
    is_trained = np.zeros(end - start, bool)
    for span_start, span_end in spans - start:
        is_trained[span_start:span_end] = True
    return rows.ids[first : first + start], rows.ids[first + start : first + end], is_trained


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
    sources: the opened files that `examples` are read from, in the order of their rows; () where
        these are not known.
    kind: what an example is, of dataset/encoding.py.
    label_names: of its classes or judgments, by their numbers.

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
    sources: tuple[Source, ...] = ()
    kind: str = AS_TEXTS
    label_names: tuple[str, ...] = ()

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
            sources=self.sources,
            kind=self.kind,
            label_names=self.label_names,
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
        head = None
        if mine.head is not None or theirs.head is not None:
            head = np.concatenate([mine.heads(), theirs.heads()])
        last_only = mine.last_only
        return Dataset(
            examples=ExampleIndex(rows, source, row, start, stop, last_only, num_replays, head),
            dropped=self.dropped,
            lengths=np.concatenate([self.lengths, replay.lengths]),
            num_trained=np.concatenate([self.num_trained, replay.num_trained]),
            prompts=np.concatenate([self.prompts, replay.prompts]),
            chat=self.chat or replay.chat,
        )


def cut(
    rows: list[Rows], seq_len: int, last_only: bool = False, truncate: str = TRUNCATE[0]
) -> Dataset:
    """Makes examples of at most seq_len tokens.

    Of a conversation, the messages up to the last trained one that fits whole; of a plain text,
    pieces of seq_len tokens, all trained but each piece's first, which nothing predicts.

    rows: the token rows of each source.
    seq_len: in tokens.
    last_only: True if only the last span of a record is trained.
    truncate: one of TRUNCATE; "prompt" keeps a last answer that does not fit, and cuts what stands
        before it from the left (dataset/prompt_cut.py); it needs rows that were made with heads.
    """
    # An array for each source, of all of its examples.
    sources, record_numbers, starts, stops, num_trained, prompt_hashes = [], [], [], [], [], []
    heads = []
    dropped: Counter[str] = Counter()
    has_chats = False
    for number, source_rows in enumerate(rows):
        is_chat = (source_rows.records[:, 2] & IS_CHAT) > 0
        has_chats = has_chats or bool(is_chat.any())
        chats = cut_chats(
            source_rows, np.flatnonzero(is_chat), seq_len, last_only, truncate, dropped
        )
        text_row, text_start, text_stop = cut_texts(
            source_rows, np.flatnonzero(~is_chat), seq_len, dropped
        )
        row = np.concatenate([chats.record, text_row])
        start = np.concatenate([chats.start, text_start])
        stop = np.concatenate([chats.stop, text_stop])
        head = np.concatenate([chats.head, np.full(len(text_row), -1)])
        trained = np.concatenate([chats.num_trained, text_stop - text_start - 1])
        # Back into the order of the file, since conversations and texts were cut separately.
        order = np.lexsort((start, row))
        sources.append(np.full(len(row), number))
        record_numbers.append(row[order])
        starts.append(start[order])
        stops.append(stop[order])
        heads.append(head[order])
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
    head = np.concatenate(heads).astype(np.int32)
    is_cut = head >= 0
    examples = ExampleIndex(
        rows, narrow_source, narrow_row, start, stop, last_only, head=head if is_cut.any() else None
    )
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
        lengths=stop - start + np.maximum(head, 0),
        num_trained=np.concatenate(num_trained),
        prompts=prompts,
        chat=has_chats,
    )


@dataclass
class CutChats:
    """Conversations of which something fits, int64 [conversations] each.

    record: their numbers. start, stop: their tokens. head: the tokens of their beginning that stand
    before these where the prompt is cut, else -1. num_trained: trained tokens.
    """

    record: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    head: np.ndarray
    num_trained: np.ndarray


def cut_chats(
    rows: Rows,
    chats: np.ndarray,
    seq_len: int,
    last_only: bool,
    truncate: str,
    dropped: Counter[str],
) -> CutChats:
    """Cuts conversations behind the last trained span that fits whole; with --truncate prompt in
    front, so that the last one does.

    rows: the token rows of a source.
    chats: int64 [C], the records that are conversations.
    seq_len: in tokens.
    last_only: True if only the last span of a record is trained.
    truncate: one of TRUNCATE.
    dropped: counts, by reason, the conversations that are cut or left out.
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
    start = np.zeros(num_records, np.int64)
    head = np.full(num_records, -1, np.int64)
    if truncate == "prompt":
        does_not_fit = num_fitting_spans[chats] < num_trained_spans[chats]
        spans = np.stack([record, ends - span_tokens, ends], 1)
        fronts = cut_fronts(rows, chats[does_not_fit], spans, seq_len)
        for chat, front in fronts.items():
            head[chat], start[chat], stop[chat], trained[chat] = front
            # Nothing of it is left out or shortened at its end.
            num_fitting_spans[chat] = num_trained_spans[chat]
        if fronts:
            reason = f"cut from the left of the prompt to fit into --seq-len {seq_len}"
            dropped[reason] += len(fronts)
    fitting_chats = chats[num_fitting_spans[chats] > 0]
    num_left_out = len(chats) - len(fitting_chats)
    is_shortened = num_fitting_spans[fitting_chats] < num_trained_spans[fitting_chats]
    num_shortened = int(is_shortened.sum())
    if num_left_out:
        dropped[f"whose answer does not fit into --seq-len {seq_len}"] += num_left_out
    if num_shortened:
        dropped[f"cut to the messages that fit into --seq-len {seq_len}"] += num_shortened
    return CutChats(
        fitting_chats,
        start[fitting_chats],
        stop[fitting_chats],
        head[fitting_chats],
        trained[fitting_chats],
    )


def cut_fronts(
    rows: Rows, chats: np.ndarray, spans: np.ndarray, seq_len: int
) -> dict[int, tuple[int, int, int, int]]:
    """Cuts conversations in front, so that their last trained span fits whole.

    chats: int64 [C], the records that are too long.
    spans: int64 [S, 3], of all trained spans, in order: record, start, end.

    Returns for each of which that span can be kept (tokens of its beginning that stay, the token from
    which on it is kept behind them, the last one's end, trained tokens).
    """
    fronts = {}
    for chat in chats.tolist():
        low, high = np.searchsorted(spans[:, 0], [chat, chat + 1])
        _, answer_start, answer_end = spans[high - 1].tolist()
        first = rows.starts[chat]
        ids = rows.ids[first : rows.starts[chat + 1]].tolist()
        answers = rows.spans[rows.span_starts[chat] : rows.span_starts[chat + 1]].tolist()
        head = int(rows.heads[chat])
        start = cut_prompt(ids, answers, (answer_start, answer_end), head, rows.turn, seq_len)
        if start is None:
            continue
        kept = spans[low:high][spans[low:high, 1] >= start]
        num_trained = int((kept[:, 2] - kept[:, 1]).sum())
        fronts[chat] = (head, start, answer_end, num_trained)
    return fronts


def draw_examples(
    prompts: np.ndarray,
    starts: np.ndarray,
    contents: np.ndarray,
    sources: np.ndarray,
    count: int,
    seed: int,
) -> np.ndarray:
    """Returns the numbers of `count` examples, ascending, of which each source gives its share, and
    at least one.

    An example is drawn by a hash of what it says and of the seed. So neither the order of the
    examples nor that of the files matters, and a larger count only adds examples.

    prompts: uint64 [examples], hashes of what is asked. starts: int [examples], where each begins in
    its record. contents: uint64 [examples], by which examples with equal prompts and starts are told
    apart. sources: int [examples], the number of each one's source, from 0 on.
    """
    keys = splitmix64(prompts ^ splitmix64(np.array([seed], np.uint64)))
    keys = splitmix64(keys ^ starts.astype(np.uint64))
    # Equal ones are numbered, so that they are not drawn all together.
    order = np.lexsort((contents, keys))
    is_new = np.ones(len(keys), bool)
    is_new[1:] = keys[order][1:] != keys[order][:-1]
    first_of_run = np.maximum.accumulate(np.where(is_new, np.arange(len(keys)), 0))
    copy_number = np.empty(len(keys), np.uint64)
    copy_number[order] = np.arange(len(keys)) - first_of_run
    keys = splitmix64(keys ^ copy_number)

    chosen = []
    for source, share in enumerate(shares_of(np.bincount(sources), count)):
        numbers = np.flatnonzero(sources == source)
        chosen.append(numbers[np.argsort(keys[numbers], kind="stable")[:share]])
    return np.sort(np.concatenate(chosen))


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Returns uint64 hashes of uint64 values, a bijection (Steele et al. 2014)."""
    # The products overflow, and are meant to.
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shares_of(sizes: np.ndarray, count: int) -> list[int]:
    """Returns how many of `count` examples each source gives: in proportion to its size, rounded by
    largest remainder, and at least one of a source that has any. sizes: int [sources]."""
    exact = sizes * (count / sizes.sum())
    shares = np.maximum(np.floor(exact).astype(int), (sizes > 0).astype(int))
    by_remainder = np.argsort(-(exact - shares), kind="stable")
    for source in by_remainder:
        if shares.sum() < count and shares[source] < sizes[source]:
            shares[source] += 1
    # Sources of which one was taken although their share is less have to be made up for.
    while shares.sum() > count:
        excess = np.where(shares > 1, shares - exact, -np.inf)
        shares[np.argmax(excess)] -= 1
    return shares.tolist()


def places_of(dataset: Dataset) -> np.ndarray:
    """Returns where each example is from, int64 [examples, 4]: the number of the file after --data, of
    the file in that folder, and of the record, and the first token of it. Models with another length limit
    or tokenizer may keep other examples of a file."""
    # Examples that are read from a file know the number of their record.
    assert isinstance(dataset.examples, ExampleIndex)
    index = dataset.examples
    places = np.zeros((len(dataset), 4), np.int64)
    places[:, 0] = index.source
    places[:, 3] = index.start
    for i, rows in enumerate(index.rows):
        own = index.source == i
        places[own, 1:3] = rows.records[index.row[own]][:, :2]
    return places


def share_beyond(rows: list[Rows], dropped: dict[str, int]) -> float:
    """Returns the share of the records that --seq-len has cut or left out.

    dropped: what `cut` has counted.
    """
    total = sum(len(each) for each in rows)
    num_beyond = sum(count for reason, count in dropped.items() if "--seq-len" in reason)
    return num_beyond / max(1, total)


def too_long_warning(rows: list[Rows], dropped: dict[str, int], truncate: str | None) -> str:
    """Returns a warning if --seq-len has cut or left out many records, else "".

    dropped: what `cut` has counted. truncate: one of TRUNCATE; None in an evaluation, which has no
    such flag, and whose --seq-len is the most that the model takes unless it is given.
    """
    share = share_beyond(rows, dropped)
    if share <= WARN_ABOVE:
        return ""
    warning = f"{100 * share:.1f} % of the records are longer than --seq-len"
    if truncate is None:
        return warning
    warning += "; raise --seq-len"
    if truncate == TRUNCATE[0]:
        warning += ", or keep their answers with --truncate prompt"
    return warning


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
