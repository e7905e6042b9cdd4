"""The benchmarks of `evaluate.py compare` that ask which choice a model finds most probable: multiple
choice and classification, as `--benchmark choices=FILE` and `--benchmark classify=FILE`.
"""

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path

from common import console
from dataset.folders import Fetched
from evals.arguments import BATCH_SIZE
from evals.choices import ChoiceTask, Pair, log_likelihoods
from evals.compare_arguments import evaluation_of
from evals.scores import ItemScores
from evals.table import CHOOSE
from evals.targets import Opened
from model import Transformer

# What evaluate.py's command line has besides, at its defaults.
OTHER_OPTIONS = {
    "shots": None,
    "shots_data": None,
    "labels": None,
    "calibrate": False,
    "picture": None,
}
# The name and the file of a --benchmark.
Benchmark = tuple[str, str]


def read_choice_benchmarks(
    args: argparse.Namespace, opened: Opened, fetched: Mapping[str, str | Path | Fetched]
) -> dict[Benchmark, ChoiceTask]:
    """Returns the questions of each --benchmark that has choices, and prints what was read."""
    tasks = {}
    for name, file in args.benchmark:
        row = evaluation_of(name)
        if row.kind != CHOOSE:
            continue
        task = name.partition(":")[2] or None
        options = argparse.Namespace(**(vars(args) | OTHER_OPTIONS | {"task": task}))
        of_file = copy.copy(opened)
        of_file.file = fetched[file]
        # --map belongs to --target.
        of_file.map_fn = None
        tasks[name, file] = row.load()(options, of_file)
    return tasks


def score_choices(
    model: Transformer,
    tasks: dict[Benchmark, ChoiceTask],
    pairs: dict[Benchmark, list[list[Pair]]],
    batch_size: int | None,
) -> dict[Benchmark, ItemScores]:
    """Returns a model's scores on each benchmark. pairs: its questions in the model's tokens.
    batch_size: --batch-size."""
    scores = {}
    for key, task in tasks.items():
        size = batch_size or BATCH_SIZE[CHOOSE]
        scores[key] = task.score(log_likelihoods(model, pairs[key], size))
    return scores


def warnings_of(file: str, scores: ItemScores) -> list[str]:
    """Returns the warnings below a tuned model's scores, with the file's name. The other notes there,
    such as a confusion matrix, are of one model, and belong to its own evaluation."""
    return [f"{file}: {note}" for note in scores.notes if note.startswith("WARNING")]


def print_flipped_choices(
    file: str, task: ChoiceTask, base: ItemScores, tuned: ItemScores, show: int
) -> None:
    """Prints how many questions are answered right after the training that were not before, and the
    other way round, and the first `show` of each kind."""
    metric = next(iter(base.items))
    kinds: dict[str, list[int]] = {"wrong to right": [], "right to wrong": []}
    for i, (before, after) in enumerate(zip(base.hits, tuned.hits, strict=True)):
        if before != after:
            kinds["wrong to right" if after else "right to wrong"].append(i)
    counts = ", ".join(f"{len(numbers):,} {kind}" for kind, numbers in kinds.items())
    print(f"\nflipped   of {len(base.hits):,} questions of {file} by {metric}: {counts}")
    for kind, numbers in kinds.items():
        for place, i in enumerate(numbers[:show]):
            question = task.questions[i]
            right = " | ".join(question.choices[number] for number in question.gold)
            print(f"\n  {kind} ({place + 1} of {len(numbers):,})")
            print(f"    question   {console.both_ends(question.context)}")
            print(f"    right      {console.one_line(right)}")
            print(f"    base       {console.one_line(question.choices[base.chosen[i]])}")
            print(f"    tuned      {console.one_line(question.choices[tuned.chosen[i]])}")
