"""From files to flat batches: token rows with a loss mask, a validation split, an order, and batches.

A token is trained where the mask says so: the answers and the token that ends each, of which the tokenizer's template
decides where they lie; in plain text every token. Whatever cannot be trained as it stands (an answer beyond --seq-len,
a record that the template refuses) is left out, counted and said, never cut in silence.

    python data.py inspect FILES --model DIR     what stands in them, as the model will see it
    python data.py convert FILES --out OUT.jsonl any format as messages
    python data.py split FILES --out DIR         train.jsonl, val.jsonl and test.jsonl, near-duplicates kept together

A batch is flat: `tokens` [N], one example after another without padding, the documents' lengths, and the rows whose
next token is trained, so that nothing else ever reaches the output head. Row r predicts token r + 1 of its example.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from formats import Map, open_source
from kernels.attention import Documents, to_device
from rows import CHAT, Rows, tokenised
from texts import text_hash
from tokenizer import Tokenizer

MUCH = 0.02  # of all examples
TRAIN_ON = {  # --train-on: whose turns are trained, and whether only the last of them
    "answers": (("assistant",), False),
    "last-answer": (("assistant",), True),
    "all-turns": (("user", "assistant"), False),
}


@dataclass
class Example:
    """ids, and of each how much its loss weighs (0 or False: not trained). where: the record's place, for messages.
    prompt: a hash of what is asked. apart: of a replay, whose loss is reported apart. Ends with the last trained
    token."""

    ids: Sequence[int]
    trained: Sequence[float]
    where: str = ""
    prompt: int = 0
    apart: bool = False


class Pieces(Sequence):
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
        trained = np.zeros(stop - start, np.float32)
        spans = range(rows.span_starts[row], rows.span_starts[row + 1])
        for (a, b), weight in ((rows.spans[k], rows.weights[k]) for k in (spans[-1:] if self.last_only else spans)):
            trained[max(a - start, 0) : max(b - start, 0)] = weight
        trained[0] = 0  # nothing predicts it
        ids, apart = rows.ids[first + start : first + stop], self.source[i] >= len(self.rows) - self.replays
        return Example(ids, trained, rows.where(row), int(rows.prompts[row]), bool(apart))

    def take(self, chosen) -> "Pieces":
        parts = (each[chosen] for each in (self.source, self.row, self.start, self.stop))
        return Pieces(self.rows, *parts, self.last_only, self.replays)

    @property
    def sizes(self) -> list[int]:
        return np.bincount(self.source, minlength=len(self.rows)).tolist()


@dataclass
class Dataset:
    examples: Sequence[Example]
    dropped: dict[str, int] = field(default_factory=dict)  # reason: how many records
    lengths: np.ndarray | None = None  # of the examples, in tokens
    trained: np.ndarray | None = None  # how many of them
    prompts: np.ndarray | None = None  # uint64; hash of what is asked: equal ones stay on one side of a split
    chat: bool = False  # has conversations, not plain text alone

    def __post_init__(self):
        if self.lengths is None:
            self.lengths = np.array([len(example.ids) for example in self.examples], np.int64)
            self.trained = np.array([np.count_nonzero(example.trained[1:]) for example in self.examples], np.int64)
            self.prompts = np.array([example.prompt for example in self.examples], np.uint64)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def trained_tokens(self) -> int:
        return int(self.trained.sum())

    def take(self, chosen: np.ndarray) -> "Dataset":
        """Some of the examples, by number or mask."""
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        if isinstance(self.examples, Pieces):
            examples = self.examples.take(chosen)
        else:
            examples = [self.examples[i] for i in chosen]
        arrays = (each[chosen] for each in (self.lengths, self.trained, self.prompts))
        return Dataset(examples, {}, *arrays, self.chat)

    def with_replay(self, other: "Dataset") -> "Dataset":
        """These examples, then the other ones, of replays."""
        mine, theirs = self.examples, other.examples
        source = np.concatenate([mine.source, theirs.source + len(mine.rows)])
        both = [np.concatenate([getattr(each, name) for each in (mine, theirs)]) for name in ("row", "start", "stop")]
        examples = Pieces(mine.rows + theirs.rows, source, *both, mine.last_only, len(theirs.rows))
        names = ("lengths", "trained", "prompts")
        arrays = [np.concatenate([getattr(each, name) for each in (self, other)]) for name in names]
        return Dataset(examples, self.dropped, *arrays, self.chat or other.chat)


@dataclass
class Batch:
    """tokens: int64 [N], whole examples in a row. rows: int64 [K], where the next token is trained; targets: int64 [K],
    that token. weights: float32 [K], of each one's loss; None where all are 1. weight, weight_apart: sums."""

    tokens: Tensor
    documents: Documents
    rows: Tensor
    targets: Tensor
    weights: Tensor | None = None
    weight: float = 0.0
    apart: Tensor | None = None  # float32 [K], each one's weight if it is of a replay, else 0; None where there is none
    weight_apart: float = 0.0

    def __post_init__(self):
        if self.weights is None:
            self.weight = float(len(self.targets))


def load(
    paths: list[str | Path],
    tokenizer: Tokenizer,
    seq_len: int,
    train_on: str = "answers",
    trees: str = "best",
    say=lambda line: None,
    through: Map | None = None,
) -> Dataset:
    """The examples of some files, at most seq_len tokens long; `say` is told in lines what was found and what was left
    out. Raises UserError where nothing is left to train on."""
    roles, last_only = TRAIN_ON[train_on]
    rows, sources = [], [open_source(path, trees, through) for path in paths]
    for source in sources:
        rows.append(tokenised(source, tokenizer, roles))
        say("data      " + source.summary(rows[-1].found) + ", tokenised before" * rows[-1].cached)
        if source.format.name in ("preferences", "KTO"):
            good = "chosen" if source.format.name == "preferences" else "good"
            say(f"          trained on the {good} answers alone; an objective for the others there is not yet")
    if trees == "all" and not any("OASST" in each.format.name for each in sources):
        raise UserError("--trees all: no file holds OASST trees")
    data = cut(rows, seq_len, last_only)
    if train_on != "answers" and not data.chat:
        raise UserError(f"--train-on {train_on}: plain text is trained whole, and there is no conversation")
    for reason, count in data.dropped.items():
        say(f"          {'shortened' if reason.startswith('cut') else 'left out'}: {count:,} records {reason}")
    if not len(data):
        reasons = "; ".join(f"{count} {reason}" for reason, count in data.dropped.items())
        raise UserError(f"{', '.join(map(str, paths))}: no record can be trained on ({reasons})")
    return data


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
    examples = Pieces(rows, source.astype(np.int16), row.astype(np.int32), start, stop, last_only)
    prompts = np.concatenate([each.prompts[column[1]] for each, column in zip(rows, columns, strict=True)])
    # pieces of a long text that is much of the whole are parted; of a short one they stay together
    _, text, pieces = np.unique(source * 2**32 + row, return_inverse=True, return_counts=True)
    for i in np.flatnonzero(pieces[text] > max(1, MUCH * len(row))):
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
    wanted, fitting = np.bincount(owner, minlength=len(rows)), np.bincount(owner[fits], minlength=len(rows))
    whole = chosen[fitting[chosen] > 0]
    if lost := len(chosen) - len(whole):
        dropped[f"whose answer does not fit into --seq-len {seq_len}"] += lost
    if short := int((fitting[whole] < wanted[whole]).sum()):
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


def split(dataset: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """(training, validation), the latter about `fraction` of the examples and never over twice that, or one.

    An example's side is decided by a hash of its prompt, so that it depends on neither seed nor order, and examples
    with one prompt, letter case and spaces aside, stay together: a prompt that very many share is trained on.
    Validation is empty where no prompt is rare enough; UserError where all prompts would be in it.
    """
    everything = np.ones(len(dataset), bool)
    if fraction == 0:
        return dataset, dataset.take(~everything)
    prompts, group, size = np.unique(dataset.prompts, return_inverse=True, return_counts=True)  # ascending
    chosen, room = np.zeros(len(prompts), bool), max(1.0, 2 * fraction * len(dataset))
    for i, prompt in enumerate(prompts):
        if int(prompt) / 2**64 > fraction and chosen.any():
            break
        if size[i] <= room:
            chosen[i] = True
            room -= size[i]
    if chosen.all() and len(prompts) > 1:
        raise UserError(f"--val-fraction {fraction:g}: leaves none of {len(prompts)} prompts to train on; take less")
    if chosen.all():
        chosen[:] = False  # a single prompt
    train = dataset.take(~chosen[group])
    train.dropped = dataset.dropped
    return train, dataset.take(chosen[group])


def batches_by_length(data: Dataset, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """All examples of a dataset in flat batches, made one after the other."""
    order = np.argsort(data.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield from micro_batches([data.examples[i] for i in order[start : start + batch_size]], batch_size, device)


def micro_batches(examples: Sequence[Example], batch_size: int, device: torch.device | str = "cpu") -> list[Batch]:
    """Flat batches of at most batch_size examples, as `row_batches` makes them."""
    return row_batches([[example] for example in examples], batch_size, device)


def row_batches(rows: Sequence[list[Example]], batch_size: int, device: torch.device | str = "cpu") -> list[Batch]:
    """Rows of examples, sorted by length, in flat batches of at most batch_size rows and, where these are long, of
    about as many tokens as the device can use at a time: what a step computes is the same, and its memory is bounded.
    """
    size = lambda row: sum(len(example.ids) for example in row)
    rows, batches, most = sorted(rows, key=size), [], most_tokens(device)
    for start in range(0, len(rows), batch_size):
        part, tokens = [], 0
        for row in rows[start : start + batch_size]:
            if part and tokens + size(row) > most:
                batches.append(collate(part, device))
                part, tokens = [], 0
            part += row
            tokens += size(row)
        batches.append(collate(part, device))
    return batches


def most_tokens(device: torch.device | str) -> int:
    """Of a flat batch: with more, no product is faster."""
    return 2048 if torch.device(device).type == "cpu" else 16384


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    lengths = [len(example.ids) for example in examples]
    tokens = torch.from_numpy(np.concatenate([np.asarray(example.ids, np.int64) for example in examples]))
    weights = torch.from_numpy(np.concatenate([np.asarray(example.trained, np.float32) for example in examples]))
    weights[np.cumsum([0, *lengths[:-1]])] = 0  # an example's first token has no row before it: never trained
    predicted = weights.nonzero().flatten()
    weights = weights[predicted]
    rows, targets, plain = predicted - 1, tokens[predicted], bool((weights == 1).all())
    batch = Batch(
        to_device(tokens, device),
        Documents(lengths, device),
        to_device(rows, device),
        to_device(targets, device),
        None if plain else to_device(weights, device),
        float(weights.sum()),
    )
    if any(example.apart for example in examples):
        replayed = torch.tensor([float(example.apart) for example in examples])
        apart = weights * replayed.repeat_interleave(torch.tensor(lengths))[predicted]
        batch.apart, batch.weight_apart = to_device(apart, device), float(apart.sum())
    return batch


if __name__ == "__main__":  # the commands are inspection.py's, which reads data through this module
    from errors import run
    from inspection import main

    run(main)
