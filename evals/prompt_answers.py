"""Answers to prompts that have no right answer, in memory: of `evaluate.py refusals` and its like, and of
`train.py --safety`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import distributed
from common.progress import progress
from dataset.prompts import Prompt
from evals.batch_answers import (
    AnswerSettings,
    encode_prompts,
    generate_batches,
    note_hidden_tools,
    prompt_batches,
    seed_of,
)
from evals.measures import Measure
from evals.refusals import SafetyPrompt, refusal_measures, refused_by_phrases
from model import Transformer
from tokenizer import Tokenizer


@dataclass
class ModelAnswers:
    """The answers of one model to each prompt, [prompts][samples]. num_cut: those that were cut off
    for their length; of saved ones as well."""

    texts: list[list[str]]
    num_cut: int = 0


def answer_all(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    settings: AnswerSettings,
    batch_size: int,
) -> ModelAnswers:
    """Answers every prompt --samples times.

    Raises UserError naming the record that the template refuses, or that is too long.
    """
    encoded = encode_prompts(model, tokenizer, prompts)
    note_hidden_tools(tokenizer, prompts)
    samples = settings.samples
    rows = [ids.tolist() for ids in encoded for _ in range(samples)]
    decoding: dict = settings.drawing()
    if settings.seed is not None:
        keys = [(i // samples + 1, i % samples + 1) for i in range(len(rows))]
        decoding["seeds"] = [seed_of(settings.seed, *key) for key in keys]
    answers = ModelAnswers([[""] * samples for _ in prompts])
    batches = prompt_batches([len(row) for row in rows], batch_size)
    with progress("answering", len(rows), "answer", shown=distributed.is_rank0()) as bar:
        for batch, generated in generate_batches(
            model, rows, batches, settings.max_new_tokens, stop=tokenizer.stop_ids, **decoding
        ):
            for i, ids in zip(batch, generated, strict=True):
                if ids[-1] in tokenizer.stop_ids:
                    ids = ids[:-1]
                else:
                    answers.num_cut += 1
                # A space at the beginning of a continuation belongs to the text.
                begins_text = prompts[i // samples].messages is not None
                pieces = tokenizer.stream(ids, skip_special=True, first=begins_text)
                answers.texts[i // samples][i % samples] = "".join(pieces)
            bar.update(len(batch))
    return answers


def refusals_of(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[SafetyPrompt],
    max_new_tokens: int,
    batch_size: int,
) -> list[Measure]:
    """Returns how much of the prompts a model refuses, by phrases in its most probable answers."""
    plain_prompts = [each.prompt for each in prompts]
    settings = greedy_settings(max_new_tokens)
    answers = answer_all(model, tokenizer, plain_prompts, settings, batch_size).texts
    return refusal_measures(prompts, refused_by_phrases(answers), answers)


def greedy_settings(max_new_tokens: int) -> AnswerSettings:
    """Returns the settings of one answer of always the most probable token."""
    return AnswerSettings(1, None, max_new_tokens, 0.0, 0, 1.0, 0.0, 1.0)
