"""From files to flat batches: the examples of some files, a validation split, and batches of them.

A token is trained where the mask says so: the answers and the token that ends each, of which the tokenizer's template
decides where they lie; in plain text every token. Whatever cannot be trained as it stands (an answer beyond --seq-len,
a record that the template refuses) is left out, counted and said, never cut in silence.

    python data.py inspect FILES --model DIR     what stands in them, as the model will see it
    python data.py convert FILES --out OUT.jsonl any format as messages
    python data.py split FILES --out DIR         train.jsonl, val.jsonl and test.jsonl, near-duplicates kept together

A batch is flat: `tokens` [N], one example after another without padding, the documents' lengths, and the rows whose
next token is trained, so that nothing else ever reaches the output head. Row r predicts token r + 1 of its example.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from context import Context, SharedDocuments
from errors import UserError
from examples import IDLE, TRAIN_ON, Dataset, Example, cut
from formats import Map, open_source
from kernels.attention import Documents
from kernels.gpu import to_device
from rows import tokenised
from tokenizer import Tokenizer


@dataclass
class Batch:
    """tokens: int64 [N], whole examples in a row. rows: int64 [K], where the next token is trained; targets: int64 [K],
    that token. weights: float32 [K], of each one's loss; None where all are 1. weight, weight_apart: sums."""

    tokens: Tensor
    documents: Documents | SharedDocuments
    rows: Tensor
    targets: Tensor
    weights: Tensor | None = None
    weight: float = 0.0
    apart: Tensor | None = None  # float32 [K], each one's weight if it is of a replay, else 0; None where there is none
    weight_apart: float = 0.0

    counted: int = 0  # its tokens, without those that are there for another process's sake

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
    data = cut(rows, seq_len, last_only)
    data.formats = tuple(source.format.name for source in sources)
    if train_on != "answers" and not data.chat:
        raise UserError(f"--train-on {train_on}: plain text is trained whole, and there is no conversation")
    for reason, count in data.dropped.items():
        say(f"          {'shortened' if reason.startswith('cut') else 'left out'}: {count:,} records {reason}")
    if not len(data):
        reasons = "; ".join(f"{count} {reason}" for reason, count in data.dropped.items())
        raise UserError(f"{', '.join(map(str, paths))}: no record can be trained on ({reasons})")
    return data


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


def batches_by_length(
    data: Dataset,
    batch_size: int,
    device: torch.device | str = "cpu",
    hands: int = 1,
    hand: int = 0,
    context: Context | None = None,
    most: int | None = None,
) -> Iterator[Batch]:
    """All examples of a dataset in flat batches, made one after the other; of several processes, every `hands`-th for
    number `hand`, and as many for each. most: tokens of a batch (default: `most_tokens`)."""
    parts = cut_rows(data.lengths.tolist(), batch_size, most or most_tokens(device))
    for start in range(0, len(parts), hands):
        part = parts[start + hand] if start + hand < len(parts) else None
        yield collate([IDLE] if part is None else [data.examples[i] for i in part], device, context)


def row_batches(
    rows: Sequence[list[Example]], batch_size: int, device: torch.device | str = "cpu", most: int | None = None
) -> list[Batch]:
    """Rows of examples, sorted by length, in flat batches of at most batch_size rows and, where these are long, of
    about as many tokens as the device can use at a time: what a step computes is the same, and its memory is bounded.
    most: these tokens (default: `most_tokens`).
    """
    size = lambda row: sum(len(example.ids) for example in row)
    cuts = cut_rows([size(row) for row in rows], batch_size, most or most_tokens(device))
    return [collate([example for i in part for example in rows[i]], device) for part in cuts]


def cut_rows(sizes: Sequence[int], batch_size: int, most: int) -> list[list[int]]:
    """The numbers of rows of these sizes in tokens, by size, in parts of at most batch_size rows and, but for a longer
    row alone, `most` tokens."""
    order, parts = sorted(range(len(sizes)), key=lambda i: sizes[i]), []
    for start in range(0, len(order), batch_size):
        tokens = most
        for i in order[start : start + batch_size]:
            if i == order[start] or tokens + sizes[i] > most:
                parts.append([])
                tokens = 0
            parts[-1].append(i)
            tokens += sizes[i]
    return parts


def most_tokens(device: torch.device | str) -> int:
    """Of a flat batch: with more, no product is faster. On a GPU plan.py takes fewer where these do not fit."""
    return 2048 if torch.device(device).type == "cpu" else 16384


def collate(examples: Sequence[Example], device: torch.device | str = "cpu", context: Context | None = None) -> Batch:
    """context: of several processes that share each batch; this one's tokens of it are made."""
    lengths = [len(example.ids) for example in examples]
    tokens = np.concatenate([np.asarray(example.ids, np.int64) for example in examples])
    weights = np.concatenate([np.asarray(example.trained, np.float32) for example in examples])
    weights[np.cumsum([0, *lengths[:-1]])] = 0  # an example's first token has no row before it: never trained
    predicted = np.flatnonzero(weights)
    weights = weights[predicted]
    rows, targets, apart = predicted - 1, tokens[predicted], None
    plain = bool((weights == 1).all())
    if any(example.apart for example in examples):
        replayed = np.array([example.apart for example in examples], np.float32)
        apart = weights * np.repeat(replayed, lengths)[predicted]
    keys = [example.key or 0 for example in examples] if examples[0].key is not None else None
    counted = 0 if examples[0] is IDLE else len(tokens)
    if context and (padding := context.padding(len(tokens))):
        lengths, tokens, keys = [*lengths, padding], np.pad(tokens, (0, padding)), keys and [*keys, 0]
    documents = Documents(lengths, device)
    if keys is not None:
        documents.keys = to_device(np.repeat(keys, lengths), device) + documents.positions * 0x9E3779B1
    if context:
        counted = sum(max(0, min(part.stop, counted) - part.start) for part in context.mine(len(tokens)))
        rows = context.local(rows, len(tokens))
        here = rows >= 0
        rows, targets, weights, apart = (x if x is None else x[here] for x in (rows, targets, weights, apart))
        tokens, documents = context.take(tokens), SharedDocuments(documents, context)
    batch = Batch(
        to_device(tokens, device),
        documents,
        to_device(rows, device),
        to_device(targets, device),
        None if plain else to_device(weights, device),
        float(weights.sum(dtype=np.float64)),
    )
    batch.counted = counted
    if apart is not None:
        batch.apart, batch.weight_apart = to_device(apart, device), float(apart.sum(dtype=np.float64))
    return batch


if __name__ == "__main__":
    from errors import run
    from inspection import main

    run(main)
