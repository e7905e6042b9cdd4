"""Measures a model on a file of examples, or two models side by side.

    python evaluate.py loss  --data FILE [--model M] [--adapter DIR] [--versus base|MODEL|ADAPTER]
    python evaluate.py exact --data FILE ...
    python evaluate.py rouge --answers FILE
    python evaluate.py pass-at-k --data HumanEval.jsonl.gz --allow-code-execution

What can be measured are the rows of evals/table.py. This file reads the command line, loads what it
names and prints a row for each model. Each kind of evaluation has its loop here: `measure_loss` asks
how probable the model finds the references; `measure_answers` lets the model answer, and compares;
`measure_choices` asks which of some choices the model finds most probable; `measure_programs` lets the
model write programs, and runs them.
"""

from common.errors import run
from common.threads import choose_wait_policy
from evals.arguments import OF_ONE_EVALUATION, command_line, kind_of

if __name__ == "__main__":
    # This is read when torch is loaded.
    choose_wait_policy()
    # --help and a mistake in a flag are answered here: what is imported below takes seconds.
    run(command_line)

import argparse

import numpy as np

import data
from adapting.tables import vocabulary_size
from checkpoint import read_config
from common import console
from dataset.examples import places_of
from dataset.folders import TEST
from evals.answers import Answers, answer_records, note_of_cut_answers, question_of
from evals.choices import ChoiceTask, log_likelihoods
from evals.loss import ExampleLosses, examples_by_key, trained_bytes
from evals.pass_at_k import (
    TestedPrograms,
    check_programs,
    limits_of,
    read_asked,
    refuse_without_sandbox,
    score_code_answers,
    write_programs,
)
from evals.printed_page import page_of_output
from evals.questions import read_questions
from evals.saved_answers import (
    answer_and_save,
    answer_files_of,
    remove_partials,
    score_saved,
    settings_of,
)
from evals.scores import ItemScores
from evals.table import CHOOSE, COMMANDS, EVALUATIONS, EXECUTE, GENERATE, LOSS, imported
from evals.targets import Opened, digest_of_ids, encode_files
from interop.remote_data import fetch_data


def main() -> None:
    args = command_line()
    with page_of_output(args):
        if args.command is not None:
            imported(COMMANDS[args.command].function)(args)
            return
        LOOPS[kind_of(args.what)](args)


# ---- the loops, one for each kind of evaluation ----


def measure_loss(args: argparse.Namespace) -> None:
    """Prints how probable each target finds the references of --data."""
    opened = Opened(args)
    opened.print_computation()
    (name,) = args.what
    measure = EVALUATIONS[name].load()
    losses: dict[str, ExampleLosses] = {}
    rows: dict[str, dict[str, float]] = {}
    groups: dict[str, dict[str, np.ndarray]] = {}
    digests = set()
    records_read = set()
    for target in opened.targets:
        tokenizer = opened.tokenizer_of(target)
        # A fault in the file is reported before the model is loaded, which may take long.
        size = vocabulary_size(read_config(target.folder), target.adapter)
        dataset = encode_files(
            args, opened.files, tokenizer, target.max_positions(), opened.map_fn, opened.print_once
        )
        data.check_tokens(dataset, size, ", ".join(map(str, opened.files)))
        digests.add(digest_of_ids(dataset))
        if args.by is not None:
            groups[target.name] = examples_by_key(dataset, opened.files, args.by)
        records_read.add(np.unique(places_of(dataset)[:, :3], axis=0).tobytes())
        model = opened.load(target, tokenizer)
        measured = measure(model, dataset, opened.batch_size)
        bits_per_byte = measured.bits_per_byte(trained_bytes(dataset, tokenizer))
        losses[target.name] = measured
        rows[target.name] = measured.columns() | {"bits/byte": bits_per_byte}
    if len(records_read) > 1:
        print(
            "WARNING: the two models read different records, since their length limits or tokens are"
            " others, so their numbers don't compare; --seq-len N limits both, on records that are shorter"
        )
    elif len(digests) > 1:
        print(
            "WARNING: the two models read the file as different tokens, so their losses per token"
            " don't compare"
        )
    print_table(rows, {"loss": ".4f", "perplexity": ".3f", "bits/byte": ".4f", "tokens": ",.0f"})
    if groups:
        print_groups(args.by, losses, groups)


def measure_answers(args: argparse.Namespace) -> None:
    """Lets each target answer the questions of --data, or takes the answers that --answers names, and
    prints how good they are."""
    if args.answers is not None:
        print_scores(args, score_saved(args))
        return
    opened = Opened(args)
    # A file that is in the way is reported before anything is read or loaded.
    files = answer_files_of(args, opened.targets)
    records = read_questions(args, opened.file, opened.map_fn, opened.system)
    opened.print_computation()
    settings = settings_of(args)
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
    remove_partials(files)
    print_scores(args, answers)


def measure_choices(args: argparse.Namespace) -> None:
    """Asks each target how probable it finds the choices of each question of --data, and prints how
    often the right one is the most probable. A target with a score head finds them by that."""
    opened = Opened(args)
    (name,) = args.what
    task = EVALUATIONS[name].load()(args, opened)
    opened.print_computation()
    scores: dict[str, ItemScores] = {}
    for target in opened.targets:
        tokenizer = opened.tokenizer_of(target)
        # A text that can't be encoded is reported before the model is loaded.
        if target.score_labels() is None:
            pairs = task.encode(tokenizer, target.max_positions())
            model = opened.load(target, tokenizer)
            scores[target.name] = task.score(log_likelihoods(model, pairs, opened.batch_size))
        else:
            assert task.encode_texts and task.score_by_head, "Opened refuses other tasks"
            texts = task.encode_texts(tokenizer, target.max_positions())
            model = opened.load(target, tokenizer)
            scores[target.name] = task.score_by_head(model, texts, opened.batch_size)
    print_table_of_scores(scores)
    for target_name, each in scores.items():
        print_wrong_choices(target_name, task, each, args.show)


def measure_programs(args: argparse.Namespace) -> None:
    """Lets each target write programs for the problems of --data, or takes those of --answers; runs
    them with their tests, and prints how many pass."""
    # Before what takes long.
    refuse_without_sandbox()
    if args.answers is not None:
        asked = read_asked(args, fetch_data(args.data, TEST))
        written = score_code_answers(args.answers, asked, max(args.k))
    else:
        opened = Opened(args)
        files = answer_files_of(args, opened.targets)
        asked = read_asked(args, opened.file)
        opened.print_computation()
        written = {}
        for target in opened.targets:
            tokenizer = opened.tokenizer_of(target)
            model = opened.load(target, tokenizer)
            written[target.name] = write_programs(
                model, tokenizer, asked, args, target, files.get(target.name), opened.batch_size
            )
        remove_partials(files)
    (name,) = args.what
    tested: dict[str, TestedPrograms] = {}
    for target_name, answers in written.items():
        tested[target_name] = check_programs(asked, answers, limits_of(args), target_name)
    score = EVALUATIONS[name].load()
    print_table_of_scores({target: score(each, args.k) for target, each in tested.items()})
    for target_name, programs in tested.items():
        print_failed_programs(target_name, programs, args.show)


LOOPS = {
    LOSS: measure_loss,
    GENERATE: measure_answers,
    CHOOSE: measure_choices,
    EXECUTE: measure_programs,
}


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
    shown: dict[str, ItemScores] = {}
    for name in args.what:
        scores = {target: EVALUATIONS[name].load()(each) for target, each in answers.items()}
        shown = shown or scores
        print_table_of_scores(scores)
    for target, answered in answers.items():
        if answered.num_cut:
            print(note_of_cut_answers(answered.num_cut, len(answered), target))
    for target, of_target in shown.items():
        print_misses(target, answers[target], of_target, args.show)


def print_table_of_scores(scores: dict[str, ItemScores]) -> None:
    """Prints a row for each target, the notes, and for each target a table of the parts, if there
    are any."""
    last = next(reversed(scores.values()))
    formats = {heading: last.formats[heading] for heading in last.columns}
    print_table({target: each.columns for target, each in scores.items()}, formats)
    for target, each in scores.items():
        for note in each.notes:
            is_common = all(note in other.notes for other in scores.values())
            if not is_common:
                print(f"{target}: {note}")
            elif each is last:
                print(note)
        if each.parts:
            rows = [[target if len(scores) > 1 else "", *next(iter(each.parts.values()))]]
            for part, columns in each.parts.items():
                cells = [format(value, each.formats[name]) for name, value in columns.items()]
                rows.append([part, *cells])
            print("\n" + console.table(rows))


def print_table(results: dict[str, dict[str, float]], columns: dict[str, str]) -> None:
    """Prints a row for each target and, for two targets, their difference: the second one minus the
    first, but for standard errors.

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
            # The difference of two standard errors says nothing.
            is_error = column.endswith("±")
            difference = format(second[column] - first[column], "+" + spec)
            changes.append("" if is_error else difference)
        rows.append(changes)
    print("\n" + console.table(rows))


def print_groups(
    key: str, losses: dict[str, ExampleLosses], groups: dict[str, dict[str, np.ndarray]]
) -> None:
    """Prints the loss of each target on each group of examples, the largest group first.

    groups: for each target {value of the key: the numbers of its examples}, whose examples may be others.
    """
    rows = [[key, "examples", "tokens", *(f"loss, {name}" for name in losses)]]
    if len(losses) == 2:
        rows[0].append("change")
    last = next(reversed(groups.values()))
    in_all = dict.fromkeys([*last, *(value for each in groups.values() for value in each)])
    for value in in_all:
        # None: all of a group may be too long for one of the models.
        columns = []
        for target, each in losses.items():
            chosen = groups[target].get(value)
            columns.append(None if chosen is None else each.columns(chosen))
        count = len(last.get(value, ()))
        tokens = columns[-1]["tokens"] if columns[-1] else 0
        row = [console.one_line(value), f"{count:,}", f"{tokens:,.0f}"]
        row += [f"{each['loss']:.4f}" if each else "" for each in columns]
        if len(losses) == 2:
            before, after = columns
            row.append(f"{after['loss'] - before['loss']:+.4f}" if before and after else "")
        rows.append(row)
    print("\n" + console.table(rows))


def print_misses(target: str, answers: Answers, scores: ItemScores, show: int) -> None:
    """Prints the first `show` wrong answers of a target, each with its question and its references,
    on a line each."""
    misses = []
    for i, hit in enumerate(scores.hits):
        # Of some measures even what equals its reference has less than 100 %.
        is_reference = answers.texts[i].strip() in map(str.strip, answers.references[i])
        if not hit and not is_reference:
            misses.append(i)
    shown = misses[:show]
    number = console.number_of(len(misses), "wrong answer")
    if any(0 < number < 1 for number in next(iter(scores.items.values()))):
        # Few summaries equal their reference, and are not wrong for that.
        verb = "scores" if len(misses) == 1 else "score"
        number = f"{console.number_of(len(misses), 'answer')} that {verb} below 100 %"
    if shown:
        several = f" first {len(shown)} of its" if len(shown) < len(misses) else ""
        print(f"\n{target}:{several} {number}")
    for i in shown:
        messages, _ = question_of(answers.records[i])
        questions = [message["content"] for message in messages if message["role"] == "user"]
        question = questions[-1] if questions else ""
        print(f"  question   {console.both_ends(question)}")
        for reference in answers.references[i]:
            print(f"  reference  {console.one_line(reference.strip())}")
        print(f"  answer     {console.one_line(answers.texts[i].strip())}\n")


def print_wrong_choices(target: str, task: ChoiceTask, scores: ItemScores, show: int) -> None:
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


def print_failed_programs(target: str, programs: TestedPrograms, show: int) -> None:
    """Prints the first `show` programs of a target that did not pass, each with what became of it and
    the answer that it was taken from."""
    misses = programs.misses()
    if misses and show:
        print(f"\n{target}: {min(show, len(misses))} of {len(misses):,} that did not pass")
    for problem, answer, outcome in misses[:show]:
        reason = f": {outcome.reason}" if outcome.reason else ""
        print(f"  {problem.id}  {console.one_line(outcome.end + reason)}")
        print(f"    answer  {console.one_line(answer.text)}")


if __name__ == "__main__":
    run(main)
