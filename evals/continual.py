"""`evaluate.py continual`: what trainings on one task after the other leave of each task.

The matrix R has R[j, i], the score of task i after training j, for T tasks and as many trainings.
From it follow, with higher scores better:

    average accuracy    mean of R[T, i] over all i                        (Lopez-Paz and Ranzato 2017,
    backward transfer   mean of R[T, i] - R[i, i] over i < T                arXiv 1706.08840)
    forward transfer    mean of R[i - 1, i] - b[i] over i > 1, with b the scores of the base
    forgetting          mean over i < T of the highest R[j, i], j < T, minus R[T, i]
                                                      (Chaudhry et al. 2018, arXiv 1801.10112)

Of a loss, whose lower numbers are better, R has -loss here, so that the signs mean the same; what is
printed of the matrix is the loss itself.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np

import data
from adapting.tables import vocabulary_size
from checkpoint import read_config
from common import console
from common.errors import UserError, read_json_if_there
from dataset.records import Record
from evals.answers import answer_records
from evals.arguments import BATCH_SIZE
from evals.compare import cut_notes_of_files, model_of_word
from evals.loss import example_losses
from evals.questions import read_task
from evals.table import EVALUATIONS, GENERATE, LOSS
from evals.targets import (
    Opened,
    Target,
    digest_of_ids,
    encode_files,
)
from interop.resolve import base_of_model


def print_transfer(args: argparse.Namespace) -> None:
    """Carries out `evaluate.py continual`: prints the matrix, and what follows from it."""
    # What Opened asks for besides.
    args.map, args.what = None, [args.metric]
    base, trained = models_of_runs(args)
    opened = Opened(args, [base, *trained] if base else trained)
    for note in notes_on_order(args.runs):
        print(note)
    opened.print_computation()
    # A fault in a file is reported before a model is loaded.
    records = [] if args.metric == "loss" else read_tasks(args, opened)
    digests: set[tuple[str, ...]] = set()
    rows = []
    for target in opened.targets:
        if args.metric == "loss":
            losses, digest = task_losses(args, opened, target)
            digests.add(digest)
            rows.append(losses)
        else:
            rows.append(task_scores(args, opened, target, records))
    numbers = np.array(rows)  # [models, tasks]
    print_matrix(args, opened.targets, numbers)
    if len(digests) > 1:
        print(
            "WARNING: the models read the files as different tokens, so their losses don't compare"
        )
    sign = -1 if args.metric == "loss" else 1
    matrix = sign * numbers[1 if base else 0 :]
    print_summary(args, transfer_of(matrix, sign * numbers[0] if base else None))


# ---- the arithmetic ----


def transfer_of(matrix: np.ndarray, base: np.ndarray | None = None) -> dict[str, float]:
    """Returns what follows from the scores of T tasks after T trainings; see the beginning of this
    file.

    matrix: [T, T], the score of task i after training j at [j, i]; higher is better; T is 2 or more.
    base: [T], the scores before the first training; without them there is no "forward transfer".
    """
    last = matrix[-1]
    learned = np.diagonal(matrix)
    best_before = matrix[:-1].max(0)
    summary = {
        "average": float(last.mean()),
        "backward transfer": float((last - learned)[:-1].mean()),
        "forgetting": float((best_before - last)[:-1].mean()),
    }
    if base is not None:
        just_before = np.diagonal(matrix, offset=1)
        summary["forward transfer"] = float((just_before - base[1:]).mean())
    return summary


# ---- the models ----


def models_of_runs(args: argparse.Namespace) -> tuple[Target | None, list[Target]]:
    """Returns the model before the first training (see base_of_runs), and those after each."""
    trained = [trained_model(number, word, args.model) for number, word in enumerate(args.runs, 1)]
    return base_of_runs(args, trained[0]), trained


def notes_on_order(runs: list[str]) -> list[str]:
    """Returns a line for each run that was not trained from the one before it, as far as the folders of runs
    say so."""
    notes = []
    for before, run in itertools.pairwise(runs):
        config = read_json_if_there(Path(run) / "config.json")
        is_run = (Path(run) / "metrics.jsonl").is_file() and (
            Path(before) / "metrics.jsonl"
        ).is_file()
        if not is_run or not config:
            continue
        start = config.get("adapter") or config.get("model")
        began_at = Path(start).resolve() if start else None
        if began_at is None or Path(before).resolve() not in (began_at, began_at.parent):
            notes.append(
                f"NOTE: {run} was trained from {start or 'the default base'}, not from {before}: transfer and"
                " forgetting are of trainings that follow each other"
            )
    return notes


def trained_model(number: int, word: str, model: str | None) -> Target:
    """Returns what a RUN names. number: of the training, from 1 on. model: --model."""
    name = f"after {number}"
    if (Path(word) / "metrics.jsonl").is_file():
        word = str(Path(word) / "final")
        if not Path(word).is_dir():
            raise UserError(f"{Path(word).parent}: the run has not ended, there is no final/")
    return model_of_word(name, word, model)


def base_of_runs(args: argparse.Namespace, first: Target) -> Target | None:
    """Returns the model before the first training; None where it is not wanted or not known."""
    if args.base == "none":
        return None
    if args.base is not None:
        return model_of_word("base", args.base, args.model)
    folder: Path | None = first.folder
    if first.adapter is None:
        folder = base_of_model(first.folder)
    if folder is None:
        print(
            f"NOTE: {args.runs[0]} does not say what it was trained from, so there is no row for the"
            " base, and no forward transfer; --base M names it"
        )
        return None
    return Target("base", folder, None)


# ---- measuring ----


def task_losses(
    args: argparse.Namespace, opened: Opened, target: Target
) -> tuple[list[float], tuple[str, ...]]:
    """Returns a model's loss a token on each task, and hashes of the tokens that it has read."""
    tokenizer = opened.tokenizer_of(target)
    rows = vocabulary_size(read_config(target.folder), target.adapter)
    datasets = []
    for name, file in zip(args.files, opened.files, strict=True):
        limit = target.max_positions()
        dataset = encode_files(args, [file], tokenizer, limit, None, opened.print_once)
        data.check_tokens(dataset, rows, name)
        datasets.append(dataset)
    model = opened.load(target, tokenizer)
    size = args.batch_size or BATCH_SIZE[LOSS]
    losses = [example_losses(model, dataset, size).columns()["loss"] for dataset in datasets]
    return losses, tuple(map(digest_of_ids, datasets))


def read_tasks(args: argparse.Namespace, opened: Opened) -> list[list[Record]]:
    """Returns the records of each task."""
    what = [args.metric]
    tasks = []
    for file in opened.files:
        tasks.append(read_task(args, what, file, None, opened.system, opened.print_once))
    return tasks


def task_scores(
    args: argparse.Namespace, opened: Opened, target: Target, tasks: list[list[Record]]
) -> list[float]:
    """Returns how good a model's answers to each task are: the number by which their evaluation judges,
    the same as `evaluate.py METRIC` prints."""
    tokenizer = opened.tokenizer_of(target)
    model = opened.load(target, tokenizer)
    size = args.batch_size or BATCH_SIZE[GENERATE]
    scores = []
    for file, records in zip(args.files, tasks, strict=True):
        answers = answer_records(model, tokenizer, records, args.max_new_tokens, size)
        for note in cut_notes_of_files(target.name, {file: answers}):
            opened.print_once(note)
        evaluation = EVALUATIONS[args.metric]
        scores.append(evaluation.load()(answers).columns[evaluation.score])
    return scores


# ---- what is printed ----


def print_matrix(args: argparse.Namespace, targets: list[Target], numbers: np.ndarray) -> None:
    """Prints a row for each model and a column for each task. numbers: [models, tasks]."""
    spec = number_format(args.metric)
    names = [Path(file.rstrip("/")).name for file in args.files]
    heading = "loss" if args.metric == "loss" else EVALUATIONS[args.metric].score
    rows = [[heading, *(f"{i} {name}" for i, name in enumerate(names, 1))]]
    for target, row in zip(targets, numbers, strict=True):
        rows.append([target.name, *(format(number, spec) for number in row)])
    print("\n" + console.table(rows) + "\n")


def print_summary(args: argparse.Namespace, summary: dict[str, float]) -> None:
    """Prints what follows from the matrix, each with what it means."""
    spec = number_format(args.metric)
    is_loss = args.metric == "loss"
    average = -summary["average"] if is_loss else summary["average"]
    label = f"average {'loss' if is_loss else EVALUATIONS[args.metric].score}"
    print(f"{label:18}{average:>9{spec}}   of all tasks after the last training")
    what = {
        "backward transfer": "what later trainings have changed of earlier tasks",
        "forgetting": "what is lost of earlier tasks since they were at their best",
        "forward transfer": "what earlier trainings have changed of a task before its own",
    }
    for name, meaning in what.items():
        if name in summary:
            print(f"{name:18}{summary[name]:>+9{spec}}   {meaning}")
    if is_loss:
        print("(A loss that falls counts as positive transfer, and one that rises as forgetting.)")


def number_format(metric: str) -> str:
    """Returns how a number of a metric is written."""
    return ".4f" if metric == "loss" else ".1f"
