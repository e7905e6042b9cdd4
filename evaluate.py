"""Measures a model on a file of examples, or two models side by side.

    python evaluate.py loss  --data FILE [--model M] [--adapter DIR] [--versus base|MODEL|ADAPTER]
    python evaluate.py exact --data FILE ...

What can be measured are the rows of evals/table.py. This file reads the command line, loads what it
names and prints a row for each model. Each kind of evaluation has its loop here: `measure_loss` asks
how probable the model finds the references; `measure_answers` lets the model answer, and compares;
`measure_choices` asks which of some choices the model finds most probable.
"""

from common.errors import run
from common.threads import choose_wait_policy
from evals.arguments import arguments, kind_of

if __name__ == "__main__":
    # This is read when torch is loaded.
    choose_wait_policy()
    # --help and a mistake in a flag are answered here: what is imported below takes seconds.
    run(arguments)

import argparse

import data
from checkpoint import read_config
from common import console
from dataset.folders import TEST
from dataset.formats import open_source
from evals.answers import Answers, answer_records, split_reference
from evals.choices import ChoiceTask, log_likelihoods
from evals.scores import Scores
from evals.table import CHOOSE, COMMANDS, EVALUATIONS, GENERATE, LOSS, imported
from evals.targets import Opened, digest_of_ids, encode_file, records_with_references


def main() -> None:
    args = arguments()
    if args.command is not None:
        imported(COMMANDS[args.command].function)(args)
        return
    LOOPS[kind_of(args.what)](args)


# ---- the loops, one for each kind of evaluation ----


def measure_loss(args: argparse.Namespace) -> None:
    """Prints how probable each target finds the references of --data."""
    opened = Opened(args)
    opened.print_computation()
    rows: dict[str, dict[str, float]] = {}
    digests = set()
    for target in opened.targets:
        tokenizer = opened.tokenizer_of(target)
        # A fault in the file is reported before the model is loaded, which may take long.
        config = read_config(target.folder)
        dataset = encode_file(args, opened.file, tokenizer, config.max_positions, opened.map_fn)
        data.check_tokens(dataset, config.vocab_size, str(opened.file))
        digests.add(digest_of_ids(dataset))
        model = opened.load(target, tokenizer)
        (name,) = args.what
        rows[target.name] = EVALUATIONS[name].load()(model, dataset, opened.batch_size)
    if len(digests) > 1:
        print(
            "WARNING: the two models read the file as different tokens, so their losses per token"
            " don't compare"
        )
    print_table(rows, {"loss": ".4f", "perplexity": ".3f", "tokens": ",.0f"})


def measure_answers(args: argparse.Namespace) -> None:
    """Lets each target answer the questions of --data, and prints how good the answers are."""
    opened = Opened(args)
    source = open_source(opened.file, map_fn=opened.map_fn, part=TEST, skip_bad=args.skip_bad)
    source.system = opened.system
    records = records_with_references(source, args.limit, args.seed)
    opened.print_computation()
    answers: dict[str, Answers] = {}
    for target in opened.targets:
        tokenizer = opened.tokenizer_of(target)
        model = opened.load(target, tokenizer)
        answers[target.name] = answer_records(
            model, tokenizer, records, args.max_new_tokens, opened.batch_size
        )
    print_scores(args.what, answers, args.show)


def measure_choices(args: argparse.Namespace) -> None:
    """Asks each target how probable it finds the choices of each question of --data, and prints how
    often the right one is the most probable."""
    opened = Opened(args)
    (name,) = args.what
    task = EVALUATIONS[name].load()(args, opened)
    opened.print_computation()
    scores: dict[str, Scores] = {}
    for target in opened.targets:
        tokenizer = opened.tokenizer_of(target)
        # A text that can't be encoded is reported before the model is loaded.
        pairs = task.encode(tokenizer, read_config(target.folder).max_positions)
        model = opened.load(target, tokenizer)
        scores[target.name] = task.score(log_likelihoods(model, pairs, opened.batch_size))
    print_table_of_scores(scores)
    for target_name, each in scores.items():
        print_wrong_choices(target_name, task, each, args.show)


LOOPS = {LOSS: measure_loss, GENERATE: measure_answers, CHOOSE: measure_choices}


# ---- what is printed ----


def print_scores(names: list[str], answers: dict[str, Answers], show: int) -> None:
    """Prints a table for each evaluation of the answers, and the first `show` wrong answers of each
    target by the first evaluation.

    names: of the evaluations. answers: of each target.
    """
    shown: dict[str, Scores] = {}
    for name in names:
        scores = {target: EVALUATIONS[name].load()(each) for target, each in answers.items()}
        shown = shown or scores
        print_table_of_scores(scores)
    for target, each in shown.items():
        print_misses(target, answers[target], each.hits, show)


def print_table_of_scores(scores: dict[str, Scores]) -> None:
    """Prints a row for each target, the notes, and for each target a table of the parts, if there
    are any."""
    last = next(reversed(scores.values()))
    formats = {heading: last.formats[heading] for heading in last.columns}
    print_table({target: each.columns for target, each in scores.items()}, formats)
    for target, each in scores.items():
        for note in each.notes:
            print(f"{target}: {note}" if len(scores) > 1 and note not in last.notes else note)
        if each.parts:
            rows = [[target if len(scores) > 1 else "", *next(iter(each.parts.values()))]]
            for part, columns in each.parts.items():
                cells = [format(value, each.formats[name]) for name, value in columns.items()]
                rows.append([part, *cells])
            print("\n" + console.table(rows))


def print_table(results: dict[str, dict[str, float]], columns: dict[str, str]) -> None:
    """Prints a row for each target and, for two targets, their difference: the second one minus the
    first.

    results: for each target, its numbers by column. columns: the format of each column's numbers,
    by its heading.
    """
    rows = [["", *columns]]
    for name, result in results.items():
        row = [name]
        for column, spec in columns.items():
            row.append(format(result[column], spec))
        rows.append(row)
    if len(results) == 2:
        first, second = results.values()
        changes = ["change"]
        for column, spec in columns.items():
            changes.append(format(second[column] - first[column], "+" + spec))
        rows.append(changes)
    print("\n" + console.table(rows))


def print_misses(target: str, answers: Answers, hits: list[bool], show: int) -> None:
    """Prints the first `show` wrong answers of a target, each with its question and its references,
    on a line each."""
    misses = [i for i, hit in enumerate(hits) if not hit]
    shown = misses[:show]
    if shown:
        print(f"\n{target}: {len(shown)} of {len(misses):,} wrong answers")
    for i in shown:
        messages, _ = split_reference(answers.records[i])
        questions = [message["content"] for message in messages if message["role"] == "user"]
        question = questions[-1] if questions else ""
        print(f"  question   {console.both_ends(question)}")
        for reference in answers.references[i]:
            print(f"  reference  {console.one_line(reference.strip())}")
        print(f"  answer     {console.one_line(answers.texts[i].strip())}\n")


def print_wrong_choices(target: str, task: ChoiceTask, scores: Scores, show: int) -> None:
    """Prints the first `show` questions to which a target finds a wrong choice most probable, each
    with the right one and the chosen one."""
    misses = [i for i, hit in enumerate(scores.hits) if not hit]
    shown = misses[:show]
    if shown:
        print(f"\n{target}: {len(shown)} of {len(misses):,} wrong choices")
    for i in shown:
        question = task.questions[i]
        right = " | ".join(question.choices[number] for number in question.gold)
        print(f"  question   {console.both_ends(question.context)}")
        print(f"  right      {console.one_line(right)}")
        print(f"  chosen     {console.one_line(question.choices[scores.chosen[i]])}\n")


if __name__ == "__main__":
    run(main)
