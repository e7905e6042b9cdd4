"""The loss of a model on a dataset: how probable it finds the right answers.

The loss is the mean of -log p over the trained tokens, in nats, and the perplexity is its
exponential. Both depend on how a tokenizer cuts a text; bits per byte do not: the nats of all trained
tokens, divided by log 2 and by the bytes that these tokens stand for. A token that ends an answer is
counted with its nats and stands for no byte. Each token is predicted from the right tokens before
it, so nothing is generated. The result depends on the model and the file alone: another batch size
changes it by rounding only.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import objectives
from common.errors import UserError
from common.progress import progress
from dataset.examples import Dataset, Example, places_of
from dataset.folders import TEST, Fetched
from dataset.formats import open_source
from dataset.messages import quote_names
from model import Transformer, eval_mode
from tokenizer import Tokenizer

# The exponential of 710 is beyond a float.
LARGEST_EXPONENT = 700
# The group of records that lack the key.
NO_GROUP = "(without it)"


@dataclass
class ExampleLosses:
    """What a model says of each of N examples.

    nats: float64 [N], the sum of -log p over the trained tokens of each.
    weighted_nats: the same, of each token's nats times its loss weight; weights: the sum of these
        weights. The loss is the quotient of both, over all examples.
    tokens: int64 [N], trained tokens.
    """

    nats: np.ndarray
    weighted_nats: np.ndarray
    weights: np.ndarray
    tokens: np.ndarray

    def columns(self, chosen: np.ndarray | slice = slice(None)) -> dict[str, float]:
        """Returns "loss" (nats per trained token), "perplexity" (its exponential, infinite where a
        float can't hold it) and "tokens" (the number of trained tokens) of some examples."""
        mean = float(self.weighted_nats[chosen].sum() / self.weights[chosen].sum())
        perplexity = math.exp(mean) if mean < LARGEST_EXPONENT else math.inf
        return {"loss": mean, "perplexity": perplexity, "tokens": int(self.tokens[chosen].sum())}

    def bits_per_byte(
        self, num_bytes: np.ndarray, chosen: np.ndarray | slice = slice(None)
    ) -> float:
        """Returns the bits per byte of some examples; nan where they have no byte.

        num_bytes: of each example, the bytes that its trained tokens stand for.
        """
        total = int(num_bytes[chosen].sum())
        return float(self.nats[chosen].sum()) / math.log(2) / total if total else math.nan


def loss(model: Transformer, dataset: Dataset, batch_size: int = 8) -> dict[str, float]:
    """Returns the columns of all examples of a dataset. batch_size: as in `example_losses`."""
    return example_losses(model, dataset, batch_size).columns()


def example_losses(
    model: Transformer, dataset: Dataset, batch_size: int = 8, piece: int = 0
) -> ExampleLosses:
    """Computes the loss of a model on each example of a dataset. Dropout is off while it runs.

    batch_size: examples that are computed at a time.
    piece: if above 0, an example counts as several, of so many positions each: a long text has then
        numbers for its parts.
    """
    num_pieces = np.ones(len(dataset), np.int64)
    if piece:
        num_pieces = -(-dataset.lengths // piece)
    first_piece = np.cumsum(num_pieces) - num_pieces  # of each example
    total = int(num_pieces.sum())
    nats = np.zeros(total)
    weighted_nats = np.zeros(total)
    weights = np.zeros(total)
    tokens = np.zeros(total, np.int64)
    most = data.max_tokens_per_micro_batch(model.device)
    groups = data.split_micro_batches(dataset.lengths.tolist(), batch_size, most)
    bar = progress("reading", dataset.tokens, "token")
    with bar, eval_mode(model), torch.no_grad():
        for group in groups:
            examples = [dataset.examples[i] for i in group]
            batch = data.collate(examples, model.device)
            _, token_nats = objectives.token_losses(model, batch)
            batch_nats = token_nats.double().cpu().numpy()  # [K]
            end = 0
            for i, example in zip(group, examples, strict=True):
                places = trained_places(example)
                start, end = end, end + len(places)
                own = np.asarray(example.loss_weights, np.float64)[places]
                own_nats = batch_nats[start:end]
                numbers = np.full(len(places), first_piece[i])
                if piece:
                    # Of the position that predicts the token, which is the one before it.
                    numbers += (places - 1) // piece
                np.add.at(nats, numbers, own_nats)
                np.add.at(weighted_nats, numbers, own_nats * own)
                np.add.at(weights, numbers, own)
                np.add.at(tokens, numbers, 1)
            bar.update(batch.num_tokens)
    return ExampleLosses(nats, weighted_nats, weights, tokens)


def trained_places(example: Example) -> np.ndarray:
    """Returns the places of the trained tokens, int64 [K]. The first token is none of them, since no
    token before it predicts it."""
    places = np.flatnonzero(example.loss_weights)
    return places[places > 0]


def trained_bytes(dataset: Dataset, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the bytes that the trained tokens of each example stand for, int64 [N]."""
    numbers = []
    for example in dataset.examples:
        trained = np.asarray(example.ids)[trained_places(example)]
        numbers.append(tokenizer.num_bytes(trained.tolist()))
    return np.array(numbers, np.int64)


# ---- groups of examples ----


def examples_by_key(
    dataset: Dataset, files: Sequence[str | Path | Fetched], key: str
) -> dict[str, np.ndarray]:
    """Returns {value of a key: the numbers of the examples whose record has it}, the largest group
    first. The files are read once more for it.

    files: that the dataset was read from.
    key: of the objects in them, or the name of a column; "a.b" is key b of the object that key a
        holds; "file" is the file itself.
    Raises UserError where no record has the key.
    """
    # {(source, file of the source, number of the record in the file): value}
    values: dict[tuple[int, int, int], Hashable] = {}
    keys: set[str] = set()
    for i, file in enumerate(files):
        source = open_source(file, part=TEST)
        for container, number, payload in source.payloads():
            # What can't be read was refused or left out when the examples were made.
            if isinstance(payload, UserError):
                continue
            opened = source.containers[container]
            if key == "file":
                values[i, container, number] = str(opened.path)
                continue
            record = opened.value(number, payload)
            if isinstance(record, dict):
                keys.update(map(str, record))
                values[i, container, number] = value_at(record, key)
    if all(value is None for value in values.values()):
        raise UserError(f"--by {key}: no record has it; they have {quote_names(sorted(keys))}")
    if key == "file":
        names = distinct_names(map(str, values.values()))
        values = {place: names[str(path)] for place, path in values.items()}
    found: dict[str, list[int]] = {}
    for example, (i, container, number, _) in enumerate(places_of(dataset).tolist()):
        value = values.get((i, container, number))
        found.setdefault(NO_GROUP if value is None else str(value), []).append(example)
    by_size = sorted(found.items(), key=lambda item: -len(item[1]))
    return {name: np.array(numbers) for name, numbers in by_size}


def distinct_names(paths: Iterable[str]) -> dict[str, str]:
    """Returns {path: as much of its end as no other path has}, a file's own name at least."""
    ends = {path: Path(path).parts for path in dict.fromkeys(paths)}
    names = {}
    for path, parts in ends.items():
        for length in range(1, len(parts) + 1):
            end = parts[-length:]
            if sum(other[-length:] == end for other in ends.values()) == 1:
                break
        names[path] = str(Path(*end))
    return names


def value_at(record: dict, key: str) -> Hashable:
    """Returns the text or number at a key, or at "a.b"; None where there is none."""
    value: object = record
    if key in record:
        value = record[key]
    else:
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, str | int | float | bool) else None
