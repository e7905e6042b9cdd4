"""Measures a model on a file of examples, or two models side by side.

    python evaluate.py loss  --data FILE [--model M] [--adapter DIR] [--versus base|MODEL|ADAPTER]
    python evaluate.py exact --data FILE ...
    python evaluate.py rouge --answers FILE

What can be measured are the rows of evals/table.py. This file reads the command line, loads what it
names and prints a row for each model. Each kind of evaluation has its loop here: `measure_loss` asks
how probable the model finds the references; `measure_answers` lets the model answer, and compares.
"""

from common.errors import run
from common.threads import choose_wait_policy
from evals.arguments import OF_ONE_EVALUATION, arguments, kind_of

if __name__ == "__main__":
    # This is read when torch is loaded.
    choose_wait_policy()
    # --help and a mistake in a flag are answered here: what is imported below takes seconds.
    run(arguments)

import argparse

import data
from checkpoint import read_config
from common import console
from evals.answers import Answers, answer_records, question_of
from evals.batch_answers import AnswerSettings
from evals.questions import read_questions
from evals.saved_answers import answer_and_save, answer_file_of, score_saved
from evals.scores import Scores
from evals.table import COMMANDS, EVALUATIONS, GENERATE, LOSS, imported
from evals.targets import Opened, digest_of_ids, encode_file


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
    """Lets each target answer the questions of --data, or takes the answers that --answers names, and
    prints how good they are."""
    if args.answers is not None:
        print_scores(args, score_saved(args))
        return
    opened = Opened(args)
    # A file that is in the way is reported before anything is read or loaded.
    files = {}
    if args.out is not None:
        files = {each.name: answer_file_of(args, each, opened) for each in opened.targets}
    records = read_questions(args, opened.file, opened.map_fn, opened.system)
    opened.print_computation()
    settings = AnswerSettings(
        args.samples or 1,
        # What is not drawn has no seed.
        args.seed if args.temperature else None,
        args.max_new_tokens or 0,
        args.temperature,
        args.top_k,
        args.top_p,
        args.min_p,
        args.repetition_penalty,
    )
    is_default = settings.temperature == 0 and settings.repetition_penalty == 1
    answers: dict[str, Answers] = {}
    for target in opened.targets:
        tokenizer = opened.tokenizer_of(target)
        model = opened.load(target, tokenizer)
        if args.out is not None:
            dtype = str(opened.dtype).removeprefix("torch.")
            batch_size = opened.batch_size
            answers[target.name] = answer_and_save(
                args,
                files[target.name],
                target,
                model,
                tokenizer,
                records,
                settings,
                batch_size,
                dtype,
            )
        else:
            answers[target.name] = answer_records(
                model,
                tokenizer,
                records,
                args.max_new_tokens,
                opened.batch_size,
                (),
                None if is_default else settings,
            )
    print_scores(args, answers)


LOOPS = {LOSS: measure_loss, GENERATE: measure_answers}


# ---- what is printed ----


def print_scores(args: argparse.Namespace, answers: dict[str, Answers]) -> None:
    """Prints a table for each evaluation of the answers, and the first --show wrong answers of each
    target by the first evaluation.

    answers: of each target.
    """
    for each in answers.values():
        for option in OF_ONE_EVALUATION:
            value = getattr(args, option)
            if value is not None:
                each.options[option] = value
    shown: dict[str, Scores] = {}
    for name in args.what:
        scores = {target: EVALUATIONS[name].load()(each) for target, each in answers.items()}
        shown = shown or scores
        last = next(reversed(scores.values()))
        rows = {target: each.columns for target, each in scores.items()}
        print_table(rows, last.formats)
        # What holds for the metric is said once, what holds for one target's answers for each.
        for note in dict.fromkeys(note for each in scores.values() for note in each.notes):
            print(note)
    for target, each in answers.items():
        if each.num_cut:
            print(
                f"NOTE: {target}: {each.num_cut:,} of {len(each):,} answers were cut off at the longest"
                " that an answer may be (--max-new-tokens)"
            )
    for target, first in shown.items():
        print_misses(target, answers[target], first, args.show)


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


def print_misses(target: str, answers: Answers, scores: Scores, show: int) -> None:
    """Prints the first `show` wrong answers of a target, each with its question and its references,
    on a line each."""
    misses = [i for i, hit in enumerate(scores.hits) if not hit]
    shown = misses[:show]
    what = "wrong answers"
    if any(0 < number < 1 for number in next(iter(scores.items.values()))):
        # Few summaries equal their reference, and are not wrong for that.
        what = "answers that do not score 100 %"
    if shown:
        print(f"\n{target}: {len(shown)} of {len(misses):,} {what}")
    for i in shown:
        messages, _ = question_of(answers.records[i])
        questions = [message["content"] for message in messages if message["role"] == "user"]
        question = questions[-1] if questions else ""
        print(f"  question   {console.both_ends(question)}")
        for reference in answers.references[i]:
            print(f"  reference  {console.one_line(reference.strip())}")
        print(f"  answer     {console.one_line(answers.texts[i].strip())}\n")


if __name__ == "__main__":
    run(main)
