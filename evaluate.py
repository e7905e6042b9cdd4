"""Measures a model on a file of examples, or two models side by side.

    python evaluate.py loss  --data FILE [--model M] [--adapter DIR] [--versus base|MODEL|ADAPTER]
    python evaluate.py exact --data FILE ...
    python evaluate.py pass-at-k --data HumanEval.jsonl.gz --allow-code-execution

What can be measured are the rows of evals/table.py. This file reads the command line, loads what it
names and prints a row for each model. Each kind of evaluation has its loop here: `measure_loss` asks
how probable the model finds the references; `measure_answers` lets the model answer, and compares;
`measure_programs` lets the model write programs, and runs them.
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
from pathlib import Path

import data
from checkpoint import read_config
from common import console
from dataset.folders import TEST
from dataset.formats import open_source
from evals.answers import Answers, answer_records, split_reference
from evals.code_problems import read_problems
from evals.pass_at_k import (
    CodeAnswer,
    TestedPrograms,
    answer_problems,
    check_answers_out,
    check_counts,
    check_programs,
    draw_problems,
    limits_of,
    read_code_answers,
    refuse_without_sandbox,
)
from evals.sandbox import PASSED
from evals.scores import Scores
from evals.table import COMMANDS, EVALUATIONS, EXECUTE, GENERATE, LOSS, imported
from evals.targets import Opened, digest_of_ids, encode_file, records_with_references
from interop.remote_data import fetch_data


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


def measure_programs(args: argparse.Namespace) -> None:
    """Lets each target write programs for the problems of --data, or reads them from --answers; runs
    them with their tests, and prints how many pass."""
    # Before what takes long.
    refuse_without_sandbox()
    check_answers_out(args.out, args.overwrite, args.data)
    asked = read_problems(fetch_data(args.data, TEST))
    print(f"data      {asked.note}")
    asked = draw_problems(asked, args.limit, args.seed)
    answers: dict[str, list[list[CodeAnswer]]] = {}
    if args.answers is not None:
        answers["answers"] = read_code_answers(Path(args.answers), asked)
        check_counts(answers["answers"], asked, max(args.k), args.answers)
    else:
        opened = Opened(args)
        opened.print_computation()
        for target in opened.targets:
            tokenizer = opened.tokenizer_of(target)
            model = opened.load(target, tokenizer)
            answers[target.name] = answer_problems(
                model, tokenizer, asked, args, target, opened.batch_size
            )
    tested = {}
    for name, several in answers.items():
        tested[name] = check_programs(asked, several, limits_of(args), name)
    print_passed(args.what[0], tested, args.k, args.show)


LOOPS = {LOSS: measure_loss, GENERATE: measure_answers, EXECUTE: measure_programs}


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
        last = next(reversed(scores.values()))
        rows = {target: each.columns for target, each in scores.items()}
        print_table(rows, last.formats)
        for note in last.notes:
            print(note)
    for target, each in shown.items():
        print_misses(target, answers[target], each.hits, show)


def print_passed(name: str, tested: dict[str, TestedPrograms], ks: list[int], show: int) -> None:
    """Prints a table of pass@k, what became of the programs of each target, and the first `show` that
    did not pass, a line each.

    name: of the evaluation. tested: the programs of each target.
    """
    score = EVALUATIONS[name].load()
    scores = {target: score(each, ks) for target, each in tested.items()}
    rows = {target: each.columns for target, each in scores.items()}
    print_table(rows, next(iter(scores.values())).formats)
    for target, each in scores.items():
        for note in each.notes:
            print(f"{target}: {note}")
    for target, programs in tested.items():
        misses = []
        for problem, answers, outcomes in zip(
            programs.problems, programs.answers, programs.outcomes, strict=True
        ):
            for answer, outcome in zip(answers, outcomes, strict=True):
                if outcome.end != PASSED:
                    misses.append((problem, answer, outcome))
        if misses and show:
            print(f"\n{target}: {min(show, len(misses))} of {len(misses):,} that did not pass")
        for problem, answer, outcome in misses[:show]:
            reason = f": {outcome.reason}" if outcome.reason else ""
            print(f"  {problem.id}  {console.one_line(outcome.end + reason)}")
            print(f"    answer  {console.one_line(answer.text)}")


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


if __name__ == "__main__":
    run(main)
