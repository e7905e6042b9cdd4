"""Exact match: an answer is right if it equals a reference, apart from space at the ends.

A model with a low loss can still fail here, because for the loss each token was predicted from a
right beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dataset.records import Record
from evals.answers import Answers, answer_records
from evals.scores import ItemScores
from model import Transformer
from tokenizer import Tokenizer


def exact_scores(answers: Answers) -> ItemScores:
    """ItemScores answers by exact match: 1 for each that equals one of its references, else 0."""
    hits = []
    for text, references in zip(answers.texts, answers.references, strict=True):
        hits.append(text.strip() in {reference.strip() for reference in references})
    right = sum(hits)
    columns = {
        "right": float(right),
        "of": float(len(hits)),
        "exact %": 100 * right / len(hits),
        "prompt tokens": answers.prompt_tokens,
    }
    formats = {"right": ",.0f", "of": ",.0f", "exact %": ".1f", "prompt tokens": ".1f"}
    return ItemScores({"exact": [float(hit) for hit in hits]}, columns, formats)


@dataclass
class ExactResult:
    """The answers to some records, in the order of the records, each beside its one reference.
    prompt_tokens: mean length of a prompt, in tokens."""

    records: list[Record]
    references: list[str]
    answers: list[str]
    prompt_tokens: float

    @property
    def hits(self) -> list[bool]:
        """For each record, True if the answer equals the reference."""
        pairs = zip(self.answers, self.references, strict=True)
        return [answer.strip() == reference.strip() for answer, reference in pairs]

    @property
    def right(self) -> int:
        """The number of right answers."""
        return sum(self.hits)

    @property
    def total(self) -> int:
        """The number of answers."""
        return len(self.records)

    @property
    def accuracy(self) -> float:
        """The number of right answers divided by the number of all answers, from 0 to 1."""
        return self.right / self.total


def exact(
    model: Transformer,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    shots: Sequence[Record] = (),
) -> ExactResult:
    """Returns the answers of `answer_records`, which explains the arguments, for exact match."""
    answers = answer_records(model, tokenizer, records, max_new_tokens, batch_size, shots)
    references = [accepted[0] for accepted in answers.references]
    return ExactResult(answers.records, references, answers.texts, answers.prompt_tokens)
