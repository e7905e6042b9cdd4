"""From files to flat batches: records to token rows with a loss mask, a validation split, an order, and batches.

A token is trained where the mask says so: the answers and the token that ends each, of which the tokenizer's template
decides where they lie; in plain text every token. Whatever cannot be trained as it stands (an answer beyond --seq-len,
a record that the template refuses) is left out, counted and said, never cut in silence.

A batch is flat: `tokens` [N], one example after another without padding, the documents' lengths, and the rows whose
next token is trained, so that nothing else ever reaches the output head. Row r predicts token r + 1 of its example.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from errors import UserError
from formats import Record, Source, read_records
from kernels.attention import Documents, to_device
from tokenizer import TemplateError, Tokenizer


@dataclass
class Example:
    """ids and trained (True where a token has a loss) of one record; they end with the last trained token."""

    ids: list[int]
    trained: list[bool]
    record: Record


@dataclass
class Dataset:
    examples: list[Example]
    dropped: dict[str, int] = field(default_factory=dict)  # reason: how many records

    @property
    def chat(self) -> bool:  # has conversations, not plain text alone
        return any(example.record.messages for example in self.examples)

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    @property
    def trained_tokens(self) -> int:
        return sum(sum(example.trained) for example in self.examples)


@dataclass
class Batch:
    """tokens: int64 [N], whole examples in a row. rows: int64 [K], where the next token is trained; targets: int64 [K],
    that token."""

    tokens: Tensor
    documents: Documents
    rows: Tensor
    targets: Tensor


def load_sources(paths: list[str | Path]) -> list[Source]:
    return [read_records(path) for path in paths]


def encode(sources: list[Source], tokenizer: Tokenizer, seq_len: int) -> Dataset:
    """Token rows of all records. Raises UserError where nothing is left to train on."""
    data = Dataset([])
    for source in sources:
        for reason, count in source.dropped.items():
            data.dropped[reason] = data.dropped.get(reason, 0) + count
        for record in source.records:
            found, reason = encode_record(record, tokenizer, seq_len)
            data.examples += found
            if reason:
                data.dropped[reason] = data.dropped.get(reason, 0) + 1
    if not data.examples:
        reasons = "; ".join(f"{count} {reason}" for reason, count in data.dropped.items())
        raise UserError(f"{', '.join(str(s.path) for s in sources)}: no record can be trained on ({reasons})")
    return data


def encode_record(record: Record, tokenizer: Tokenizer, seq_len: int) -> tuple[list[Example], str | None]:
    """The record's examples (a long text makes several) and, where something was left out, the reason."""
    if record.messages is None:
        return encode_text(record, tokenizer, seq_len)
    try:
        ids, trained = tokenizer.render(record.messages)
    except TemplateError as error:
        return [], f"refused by the chat template ({error})"
    ends = [i + 1 for i, yes in enumerate(trained) if yes and not (i + 1 < len(trained) and trained[i + 1])]
    fitting = [end for end in ends if end <= seq_len]  # of a long conversation, the turns whose answers fit whole
    if not fitting:
        return [], f"whose answer does not fit into --seq-len {seq_len}" if ends else "without a trained token"
    cut = f"cut to the turns that fit into --seq-len {seq_len}" if len(fitting) < len(ends) else None
    return [Example(ids[: fitting[-1]], trained[: fitting[-1]], record)], cut


def encode_text(record: Record, tokenizer: Tokenizer, seq_len: int) -> tuple[list[Example], str | None]:
    """Plain text in pieces of seq_len tokens, all trained but each piece's first, which nothing predicts."""
    ids = tokenizer.encode(record.text, bos=tokenizer.bos_id is not None and tokenizer.adds_bos, eos=True)
    if len(ids) < 2:
        return [], "of a single token, which nothing predicts"
    cuts = [*range(0, len(ids), seq_len), len(ids)]
    if cuts[-1] - cuts[-2] == 1:
        cuts[-2] -= 1  # the end token alone would not be trained
    pieces = [ids[start:end] for start, end in pairwise(cuts)]
    return [Example(piece, [False] + [True] * (len(piece) - 1), record) for piece in pieces], None


def split(dataset: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """(training, validation), the latter about `fraction` of the examples and never over twice that, or one.

    An example's side is decided by a hash of its prompt, so that it depends on neither seed nor order, and examples
    with one prompt, letter case and spaces aside, stay together: a prompt that very many share is trained on.
    Validation is empty where no prompt is rare enough; UserError where all prompts would be in it.
    """
    if fraction == 0:
        return dataset, Dataset([])
    alone = len({id(example.record) for example in dataset.examples}) == 1  # one long text: its pieces are parted
    places = [place(example, alone) for example in dataset.examples]
    size, chosen, room = Counter(places), set(), max(1.0, 2 * fraction * len(places))
    for where in sorted(size):
        if where > fraction and chosen:
            break
        if size[where] <= room:
            chosen.add(where)
            room -= size[where]
    if len(chosen) == len(size) > 1:
        raise UserError(f"--val-fraction {fraction:g}: leaves none of {len(size)} prompts to train on; take less")
    if len(chosen) == len(size):
        chosen = set()  # a single prompt
    sides = ([], [])
    for example, where in zip(dataset.examples, places, strict=True):
        sides[where in chosen].append(example)
    return Dataset(sides[0], dataset.dropped), Dataset(sides[1])


def place(example: Example, piece: bool = False) -> float:
    """A number in [0, 1) that depends on the prompt alone: what stands before the first answer to a user, or the text.
    piece: on this piece of the text."""
    turns = example.record.messages
    if piece:
        text = " ".join(map(str, example.ids))
    elif turns is None:
        text = example.record.text
    else:
        asked = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
        answers = (i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i > asked)
        text = "\n".join(turn["content"] for turn in turns[: next(answers, len(turns))])
    digest = hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def epoch_order(examples: int, per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """The example numbers of every optimizer step of an epoch: each exactly once, a function of the arguments alone.

    Plainly shuffled: padding is never computed, so that examples of like length side by side would gain nothing, and
    they cost: steps of short answers alone are noisier, and as long as those of many tokens (LOG.md). What does not
    fill a step makes the epoch's last, smaller one: no step mixes epochs, and the loss counts tokens, so that it weighs
    what it should.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(examples, generator=generator).tolist()
    return [order[start : start + per_step] for start in range(0, examples, per_step)]


def micro_batches(examples: list[Example], batch_size: int, device: torch.device | str = "cpu") -> list[Batch]:
    """The examples, sorted by length, in flat batches of at most batch_size examples and, where these are long, of
    about as many tokens as the device can use at a time: what a step computes is the same, and its memory is bounded.
    """
    examples = sorted(examples, key=lambda example: len(example.ids))
    batches, most = [], most_tokens(device)
    for start in range(0, len(examples), batch_size):
        part, tokens = [], 0
        for example in examples[start : start + batch_size]:
            if part and tokens + len(example.ids) > most:
                batches.append(collate(part, device))
                part, tokens = [], 0
            part.append(example)
            tokens += len(example.ids)
        batches.append(collate(part, device))
    return batches


def most_tokens(device: torch.device | str) -> int:
    """Of a flat batch: with more, no product is faster."""
    return 2048 if torch.device(device).type == "cpu" else 16384


def collate(examples: list[Example], device: torch.device | str = "cpu") -> Batch:
    tokens = torch.tensor([i for example in examples for i in example.ids])
    trained = torch.tensor([yes for example in examples for yes in (False, *example.trained[1:])])
    predicted = trained.nonzero().flatten()  # an example's first token has no row before it: never trained
    documents = Documents([len(example.ids) for example in examples], device)
    rows, targets = predicted - 1, tokens[predicted]
    return Batch(to_device(tokens, device), documents, to_device(rows, device), to_device(targets, device))
