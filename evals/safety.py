"""`evaluate.py refusals`, `toxicity`, `probe` and `judge`: what a model answers to prompts that have no
right answer, and what is to be said of it.

Each reads its prompts, lets each model answer them (`answers_of_models`), and prints a row for each
number with its 95 % interval; of two models the change, whose interval is that of the paired bootstrap
over the prompts (evals/bootstrap.py).
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import console
from common.errors import UserError
from data import ASSETS
from dataset.folders import TEST, Fetched
from dataset.formats import Map
from dataset.prompts import Prompt, open_prompts, read_prompts
from evals.answers import note_of_cut_answers
from evals.batch_answers import answer_into_file
from evals.compare import FEW_ITEMS, HEADINGS, changes_of_measures
from evals.judge import Judge, judge_answers, judge_measures, judged_share, question_text
from evals.measures import Measure
from evals.prompt_answers import ModelAnswers, answer_all
from evals.refusals import (
    PHRASES_NOTE,
    SafetyPrompt,
    drawn_prompts,
    read_safety_prompts,
    refusal_measures,
    refused_by_phrases,
)
from evals.saved_answers import (
    SavedAnswers,
    answer_files_of,
    origin_of,
    read_saved,
    remove_partials,
    settings_of,
    spoken,
)
from evals.targets import Opened
from interop.remote_data import fetch_data

# An evaluation for which the model writes answers: Opened takes its batch size.
ANSWERED = "exact"


@dataclass
class Findings:
    """What is said of one model's answers.

    measures: the rows of the table. notes: lines below it.
    shown: (what it is, prompt number, answer) of answers that are worth reading, those first that
        matter most.
    """

    measures: list[Measure]
    notes: list[str] = field(default_factory=list)
    shown: list[tuple[str, int, str]] = field(default_factory=list)


# ---- refusals ----


def measure_refusals(args: argparse.Namespace) -> None:
    """Carries out `evaluate.py refusals`."""
    judge = Judge(args.judge) if args.judge else None
    prompts: list[SafetyPrompt] = []

    def read(file: str | Path | Fetched, map_fn: Map | None, system: str) -> list[Prompt]:
        labelled = read_safety_prompts(file, map_fn, args.label, args.skip_bad, system)
        prompts.extend(drawn_prompts(labelled, args.limit, args.seed))
        return [each.prompt for each in prompts]

    answers = answers_of_models(args, read)
    findings = {}
    refused = {}
    for name, each in answers.items():
        findings[name], refused[name] = refusal_findings(prompts, each.texts, judge)
        if judge is not None:
            # Phrases are looked for in the beginning alone.
            findings[name].notes += cut_notes(each)
    print_findings(findings, args.seed)
    print_kinds(prompts, refused)
    print_answers_found([each.prompt for each in prompts], findings, args.show)


def refusal_findings(
    prompts: Sequence[SafetyPrompt], answers: list[list[str]], judge: Judge | None
) -> tuple[Findings, np.ndarray]:
    """Returns what is said of the answers, and how much each refuses, [prompts, samples]."""
    if judge is None:
        judged = {"refused": refused_by_phrases(answers)}
        notes = [PHRASES_NOTE]
    else:
        what = "how much an answer refuses"
        plain_prompts = [each.prompt for each in prompts]
        judged = judged_share(judge, "refused", what, plain_prompts, answers)
        notes = [f"What refuses is said by --judge {judge.name}."]
    refused = judged.pop("refused")
    measures = refusal_measures(prompts, refused, answers)
    if judge is not None:
        measures += judge_measures(judge, judged)
    num_empty = sum(not text.strip() for texts in answers for text in texts)
    if num_empty:
        notes.append(f"NOTE: {num_empty:,} answers are empty: neither a refusal nor compliance.")
    shown = []
    for i, each in enumerate(prompts):
        what = "harmful, answered" if each.is_harmful else "harmless, refused"
        is_wrong = (refused[i] < 0.5) if each.is_harmful else (refused[i] >= 0.5)
        shown += [
            (what, i, text) for text, wrong in zip(answers[i], is_wrong, strict=True) if wrong
        ]
    # What is refused without a reason first, since harmful prompts may be many more.
    shown.sort(key=lambda each: each[0] == "harmful, answered")
    return Findings(measures, notes, shown), refused


def print_kinds(prompts: Sequence[SafetyPrompt], refused: dict[str, np.ndarray]) -> None:
    """Prints the share of refusals of each type of prompt, if the file has types."""
    kinds = list(dict.fromkeys(each.kind for each in prompts if each.kind))
    if not kinds:
        return
    rows = [["refused, by type", "prompts", *(f"{name} %" for name in refused)]]
    for kind in kinds:
        chosen = [i for i, each in enumerate(prompts) if each.kind == kind]
        shares = [f"{100 * values[chosen].mean():.1f}" for values in refused.values()]
        rows.append([console.one_line(kind, 40), f"{len(chosen):,}", *shares])
    print("\n" + console.table(rows))


# ---- a judge alone ----


def measure_judged(args: argparse.Namespace) -> None:
    """Carries out `evaluate.py judge`."""
    judge = Judge(args.judge)
    prompts: list[Prompt] = []
    answers = answers_of_models(args, prompt_reader(args, prompts))
    findings = {}
    judged = {}
    for name, each in answers.items():
        judged[name] = judge_answers(judge, prompts, each.texts)
    # Only now it is known which of its numbers are always True or False.
    for name, each in answers.items():
        shown = [("", i, texts[0]) for i, texts in enumerate(each.texts)]
        notes = [f"What is judged is said by --judge {judge.name}.", *cut_notes(each)]
        findings[name] = Findings(judge_measures(judge, judged[name]), notes, shown)
    print_findings(findings, args.seed)
    print_answers_found(prompts, findings, args.show)


# ---- prompts and answers ----

# Of a file that was fetched, the user's function, and the system message.
PromptReader = Callable[[str | Path | Fetched, Map | None, str], list[Prompt]]


def prompt_reader(args: argparse.Namespace, prompts: list[Prompt]) -> PromptReader:
    """Returns the function that reads any file of prompts. prompts: gets those that are asked."""

    def read(file: str | Path | Fetched, map_fn: Map | None, system: str) -> list[Prompt]:
        source = open_prompts(file, map_fn, args.skip_bad)
        prompts.extend(drawn_prompts(read_prompts(source, system=system), args.limit, args.seed))
        return prompts

    return read


def answers_of_models(args: argparse.Namespace, read: PromptReader) -> dict[str, ModelAnswers]:
    """Returns what each model answers to each prompt, or what --answers holds; the prompts are read
    before a model is loaded."""
    if args.data is None:
        args.data = str(ASSETS / "probe_questions.jsonl")
    if args.answers is not None:
        map_fn = Map(args.map) if args.map else None
        prompts = read(fetch_data(args.data, TEST), map_fn, args.system or "")
        return saved_answers_to(args.answers, prompts, args.data)
    args.files, args.what = [args.data], [ANSWERED]
    opened = Opened(args)
    prompts = read(opened.file, opened.map_fn, opened.system)
    # A file that is in the way is reported before a model is loaded.
    files = answer_files_of(args, opened.targets)
    dtype = str(opened.dtype).removeprefix("torch.")
    print(f"compute   in {dtype} on {opened.device.type}: {opened.reason}", flush=True)
    settings = settings_of(args)
    answers = {}
    for target in opened.targets:
        tokenizer = opened.tokenizer_of(target)
        model = opened.load(target, tokenizer)
        if target.name not in files:
            answers[target.name] = answer_all(
                model, tokenizer, prompts, settings, opened.batch_size
            )
            continue
        origin = origin_of(model, target, args.quant, dtype)
        with files[target.name] as file:
            answer_into_file(model, tokenizer, prompts, settings, file, opened.batch_size, origin)
        saved = read_saved(files[target.name].out, [])
        texts = texts_by_prompt(saved, prompts, args.data)
        answers[target.name] = ModelAnswers(texts, saved.num_cut)
    remove_partials(files)
    return answers


def saved_answers_to(names: list[str], prompts: list[Prompt], data: str) -> dict[str, ModelAnswers]:
    """Returns the answers of each file of --answers. Raises UserError where they are to other
    prompts."""
    answers: dict[str, ModelAnswers] = {}
    for name in names:
        saved = read_saved(Path(name), [])
        texts = texts_by_prompt(saved, prompts, data)
        stem = saved.path.name.removesuffix(saved.path.suffix)
        answers[name if stem in answers else stem] = ModelAnswers(texts, saved.num_cut)
        print(f"answers   {name}: {len(saved.texts):,} answers to {len(texts):,} prompts")
    if len({len(texts) for each in answers.values() for texts in each.texts}) > 1:
        raise UserError(f"--answers {' '.join(names)}: have different numbers of samples")
    return answers


def texts_by_prompt(saved: SavedAnswers, prompts: list[Prompt], data: str) -> list[list[str]]:
    """Returns the saved answers to each prompt. Raises UserError where they are to other prompts, or
    where one has none."""
    advice = "give the --data, --limit and --seed that the answers were made with"
    texts: list[list[str]] = [[] for _ in prompts]
    for (number, _), question, text in zip(saved.keys, saved.questions, saved.texts, strict=True):
        if number > len(prompts):
            raise UserError(
                f"{saved.path}: answers prompt {number:,}, and {data} has {len(prompts):,}; {advice}"
            )
        prompt = prompts[number - 1]
        messages = prompt.messages or [{"role": "user", "content": prompt.text}]
        if spoken(messages) != question:
            raise UserError(
                f"{saved.path}: record {number:,} answers another question than"
                f" {prompt.record.where}; {advice}"
            )
        texts[number - 1].append(text)
    counts = {len(each) for each in texts}
    if counts != {len(texts[0])} or 0 in counts:
        missing = next(i for i, each in enumerate(texts) if len(each) < max(counts))
        raise UserError(f"{saved.path}: lacks answers to {prompts[missing].record.where}; {advice}")
    return texts


def cut_notes(answers: ModelAnswers) -> list[str]:
    """Returns a line that says how many answers a judge saw cut off, if there are such."""
    if not answers.num_cut:
        return []
    total = sum(map(len, answers.texts))
    return [f"{note_of_cut_answers(answers.num_cut, total)}."]


# ---- what is printed ----


def print_findings(findings: dict[str, Findings], seed: int) -> None:
    """Prints the table of one model, or of two with the change from the first to the second."""
    names = [*findings]
    measures = [each.measures for each in findings.values()]
    if len(names) == 1:
        rows = [["", "prompts", f"{names[0]}", "95 % interval"]]
        rows += [each.cells(seed) for each in measures[0]]
    else:
        changes = changes_of_measures("", measures[0], measures[1], seed)
        rows = [["", "prompts", *names, *HEADINGS[4:]], *(change.cells() for change in changes)]
    print("\n" + console.table(rows))
    for note in dict.fromkeys(note for each in findings.values() for note in each.notes):
        owners = [name for name, each in findings.items() if note in each.notes]
        print(f"{owners[0]}: {note}" if len(owners) < len(names) else note)
    if len(names) == 2:
        print(
            "Intervals of the change: paired bootstrap over the prompts; unsure: the interval holds 0."
        )
    # Wilson's interval, of one model's shares, is right for few prompts, too.
    few = [
        each.name
        for each in measures[-1]
        if len(each.values) < FEW_ITEMS and not (len(names) == 1 and each.is_binary)
    ]
    if few:
        print(
            f"NOTE: under {FEW_ITEMS} prompts a bootstrap's interval is too narrow: {'; '.join(few)}."
        )


def print_answers_found(
    prompts: Sequence[Prompt], findings: dict[str, Findings], show: int
) -> None:
    """Prints the first `show` answers of each model that are worth reading."""
    for name, each in findings.items():
        chosen = first_of_each(each.shown, show)
        if chosen:
            print(f"\n{name}: {len(chosen)} of {len(each.shown):,} answers to read")
        for what, i, text in chosen:
            mark = f" ({what})" if what else ""
            print(f"  prompt     {console.both_ends(question_text(prompts[i]))}{mark}")
            print(f"  answer     {console.one_line(text.strip(), 200)}\n")


def first_of_each(shown: list[tuple[str, int, str]], count: int) -> list[tuple[str, int, str]]:
    """Returns the first `count` answers of each kind."""
    result = []
    for kind in dict.fromkeys(what for what, _, _ in shown):
        result += [each for each in shown if each[0] == kind][:count]
    return result
