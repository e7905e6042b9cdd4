"""`evaluate.py compare`: what a training has taught, what it has cost, and how sure both are.

The two models are measured on the same examples: on --target the answers and the loss of the
references, on each --general file the loss, on each --benchmark the answers, on --safety what is
refused. Every change has a confidence interval by paired bootstrap (evals/bootstrap.py), whose items
are answers, conversations, or pieces of PIECE tokens of plain text.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import data
from adapter_files import is_adapter
from adapting.tables import vocabulary_size
from checkpoint import read_config
from common import console
from common.errors import UserError
from dataset.examples import Dataset, places_of
from dataset.folders import TEST, Fetched
from dataset.formats import Map
from dataset.records import Record
from evals.answers import Answers, answer_records, note_of_cut_answers, question_of
from evals.arguments import BATCH_SIZE
from evals.bootstrap import RESAMPLES, paired_interval
from evals.choices import ChoiceTask
from evals.compare_arguments import evaluation_of
from evals.compare_choices import (
    Benchmark,
    print_flipped_choices,
    read_choice_benchmarks,
    score_choices,
    warnings_of,
)
from evals.loss import example_losses
from evals.measures import Measure
from evals.prompt_answers import refusals_of
from evals.questions import read_task
from evals.refusals import PHRASES_NOTE, SafetyPrompt, drawn_prompts, read_safety_prompts
from evals.safety_arguments import REFUSAL_TOKENS
from evals.scores import ItemScores
from evals.table import EVALUATIONS, GENERATE, LOSS
from evals.targets import (
    Opened,
    Target,
    digest_of_ids,
    encode_files,
)
from interop.remote_data import fetch_data
from interop.resolve import base_folder, base_of_model
from model import Transformer
from tokenizer import Tokenizer

# Tokens of plain text that are one item of the bootstrap, since a text may be a single example.
PIECE = 256
# With fewer items a bootstrap's interval is too narrow.
FEW_ITEMS = 20
HEADINGS = ["", "items", "base", "tuned", "change", "95 % interval", "verdict"]


@dataclass
class ItemLosses:
    """The loss of a file by items. sums: float64 [items], of the token losses; tokens: their number,
    or the sum of their weights. digest: of the file's token ids."""

    sums: np.ndarray
    tokens: np.ndarray
    digest: str

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.tokens.sum())


@dataclass
class Measured:
    """What was measured of one model, by the names of the files. places: where the examples are from
    whose loss it is."""

    losses: dict[str, ItemLosses] = field(default_factory=dict)
    places: dict[str, np.ndarray] = field(default_factory=dict)
    answers: dict[str, Answers] = field(default_factory=dict)
    choices: dict[Benchmark, ItemScores] = field(default_factory=dict)
    refusals: list[Measure] = field(default_factory=list)


@dataclass
class Change:
    """A row of the table: a number of both models. lower_is_better: as of a loss; None where neither
    is."""

    name: str
    items: int
    base: float
    tuned: float
    interval: tuple[float, float]
    number_format: str
    lower_is_better: bool | None = False

    def cells(self) -> list[str]:
        low, high = self.interval
        spec = self.number_format
        interval = f"{low:+{spec}} to {high:+{spec}}"
        numbers = [f"{self.base:{spec}}", f"{self.tuned:{spec}}"]
        change = f"{self.tuned - self.base:+{spec}}"
        return [self.name, f"{self.items:,}", *numbers, change, interval, self.verdict]

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        low, high = self.interval
        if low == high == 0:
            return "no change"
        # The interval of a single item is a point.
        if low <= 0 <= high or self.items == 1:
            return "unsure"
        if self.lower_is_better is None:
            return "lower" if high < 0 else "higher"
        is_better = (high < 0) == self.lower_is_better
        return "better" if is_better else "worse"


def compare_models(args: argparse.Namespace) -> None:
    """Carries out `evaluate.py compare`: prints a table of changes, and the answers that changed."""
    files = [*([args.target] if args.target else []), *args.general]
    files += [file for _, file in args.benchmark]
    files += [args.safety] if args.safety else []
    # What Opened asks for besides.
    args.files, args.what = files[:1], [LOSS]
    opened = Opened(args, pick_models(args))
    fetched = {name: fetch_data(name, TEST) for name in dict.fromkeys(files)}
    dtype = str(opened.dtype).removeprefix("torch.")
    print(f"compute   in {dtype} on {opened.device.type}: {opened.reason}", flush=True)

    said: set[str] = set()

    def print_new(line: str) -> None:
        # A file is read for each model and each measurement, mostly alike.
        fact = line.removesuffix(", tokenised before")
        if fact not in said:
            print(line)
        said.add(fact)

    records = read_answered_records(args, opened, fetched, print_new)
    tasks = read_choice_benchmarks(args, opened, fetched)
    prompts = []
    if args.safety:
        prompts = read_safety_prompts(
            fetched[args.safety],
            skip_bad=args.skip_bad,
            system=opened.system,
            print_fn=print_new,
        )
        prompts = drawn_prompts(prompts, args.limit, args.seed, print_new)
    base, tuned = (
        measure(args, opened, target, fetched, records, tasks, prompts, print_new)
        for target in opened.targets
    )
    changes = []
    scores: list[tuple[ItemScores, ItemScores]] = []
    notes: list[str] = []
    if args.target:
        scores = score(args.metric, base, tuned, args.target)
        for name, pair in zip(args.metric, scores, strict=True):
            changes += changes_of_answers(f"target {short(args.target)}", name, pair, args.seed)
            notes += pair[1].notes
        changes.append(change_of_loss("target", args.target, base, tuned, args.seed, notes))
    for file in dict.fromkeys(args.general):
        changes.append(change_of_loss("general", file, base, tuned, args.seed, notes))
    for name, file in args.benchmark:
        if (name, file) in tasks:
            pair = (base.choices[name, file], tuned.choices[name, file])
            notes += warnings_of(short(file), pair[1])
        else:
            (pair,) = score([name], base, tuned, file)
            notes += pair[1].notes
        changes += changes_of_answers(f"benchmark {short(file)}", name, pair, args.seed)
    if args.safety:
        what = f"safety {short(args.safety)},"
        changes += changes_of_measures(what, base.refusals, tuned.refusals, args.seed)
        notes.append(PHRASES_NOTE)
    for name, measured in zip(("base", "tuned"), (base, tuned), strict=True):
        notes += cut_notes_of_files(name, measured.answers)
    print_changes(changes, args.seed, notes)
    if scores:
        flips = Flips.of(args.metric[0], scores[0], base.answers[args.target])
        flips.print_all(tuned.answers[args.target], args.show)
    for key, task in tasks.items():
        print_flipped_choices(short(key[1]), task, base.choices[key], tuned.choices[key], args.show)


def cut_notes_of_files(target: str, answers: dict[str, Answers]) -> list[str]:
    """Returns a line for each file of which a model's answers were cut off."""
    notes = []
    for file, each in answers.items():
        if each.num_cut:
            notes.append(note_of_cut_answers(each.num_cut, len(each), target, short(file)))
    return notes


def short(file: str) -> str:
    """Returns a file's name for the table."""
    return Path(file.rstrip("/")).name


# ---- the models ----


def pick_models(args: argparse.Namespace) -> list[Target]:
    """Returns the base and the tuned model that a command line names."""
    tuned = model_of_word("tuned", args.tuned, args.model)
    if args.base != "base":
        return [model_of_word("base", args.base, args.model), tuned]
    folder: Path | None = tuned.folder
    if tuned.adapter is None:
        folder = base_of_model(tuned.folder)
    if folder is None:
        raise UserError(
            f"compare base {args.tuned}: {args.tuned} does not say what it was trained from; name the"
            " base model in place of the word base"
        )
    return [Target("base", folder, None), tuned]


def model_of_word(name: str, word: str, model: str | None) -> Target:
    """Returns what a word of the command line names: an adapter folder, or a model. model: --model."""
    if is_adapter(word):
        return Target(name, base_folder(model, word), word)
    run = Path(word)
    if (run / "metrics.jsonl").is_file() and (run / "final").is_dir():
        raise UserError(f"{word}: is the folder of a run; what it has trained is {run / 'final'}")
    return Target(name, base_folder(word, None), None)


# ---- measuring ----


def read_answered_records(
    args: argparse.Namespace,
    opened: Opened,
    fetched: dict[str, str | Path | Fetched],
    print_fn: Callable[[str], None],
) -> dict[str, list[Record]]:
    """Returns the records of the files whose answers are measured, by the names of the files."""
    maps: dict[str, Map | None] = {}
    what: dict[str, list[str]] = {}
    if args.target and args.metric:
        maps[args.target] = opened.map_fn
        what[args.target] = list(args.metric)
    for name, file in args.benchmark:
        if evaluation_of(name).kind == GENERATE:
            maps.setdefault(file, None)
            what.setdefault(file, []).append(name)
    records = {}
    for file, map_fn in maps.items():
        names = list(dict.fromkeys(what[file]))
        records[file] = read_task(args, names, fetched[file], map_fn, opened.system, print_fn)
    return records


def measure(
    args: argparse.Namespace,
    opened: Opened,
    target: Target,
    fetched: dict[str, str | Path | Fetched],
    records: dict[str, list[Record]],
    tasks: dict[Benchmark, ChoiceTask],
    prompts: list[SafetyPrompt],
    print_fn: Callable[[str], None],
) -> Measured:
    """Measures one model on all files. Faults in them are reported before it is loaded."""
    tokenizer = opened.tokenizer_of(target)
    datasets = read_texts(args, opened, target, tokenizer, fetched, print_fn)
    limit = target.max_positions()
    pairs = {key: task.encode(tokenizer, limit) for key, task in tasks.items()}
    model = opened.load(target, tokenizer)
    measured = Measured(choices=score_choices(model, tasks, pairs, args.batch_size))
    for file, dataset in datasets.items():
        size = args.batch_size or BATCH_SIZE[LOSS]
        measured.losses[file] = item_losses(model, dataset, size)
        measured.places[file] = places_of(dataset)
    for file, questions in records.items():
        size = args.batch_size or BATCH_SIZE[GENERATE]
        measured.answers[file] = answer_records(
            model, tokenizer, questions, args.max_new_tokens, size
        )
    if prompts:
        size = args.batch_size or BATCH_SIZE[GENERATE]
        measured.refusals = refusals_of(model, tokenizer, prompts, REFUSAL_TOKENS, size)
    return measured


def read_texts(
    args: argparse.Namespace,
    opened: Opened,
    target: Target,
    tokenizer: Tokenizer,
    fetched: dict[str, str | Path | Fetched],
    print_fn: Callable[[str], None],
) -> dict[str, Dataset]:
    """Returns the files whose loss is measured, as one model reads them."""
    rows = vocabulary_size(read_config(target.folder), target.adapter)
    datasets = {}
    for file in dict.fromkeys([args.target, *args.general]):
        if not file:
            continue
        map_fn = opened.map_fn if file == args.target else None
        limit = target.max_positions()
        dataset = encode_files(args, [fetched[file]], tokenizer, limit, map_fn, print_fn)
        data.check_tokens(dataset, rows, file)
        datasets[file] = dataset
    return datasets


def item_losses(model: Transformer, dataset: Dataset, batch_size: int) -> ItemLosses:
    """Returns the sums of the token losses of a dataset's items: its examples, and of plain text
    pieces of PIECE tokens. batch_size: examples that are computed at a time."""
    losses = example_losses(model, dataset, batch_size, 0 if dataset.chat else PIECE)
    has_tokens = losses.tokens > 0
    return ItemLosses(
        losses.weighted_nats[has_tokens],
        losses.weights[has_tokens],
        digest_of_ids(dataset),
    )


# ---- changes ----


def score(
    names: list[str], base: Measured, tuned: Measured, file: str
) -> list[tuple[ItemScores, ItemScores]]:
    """Returns the scores of both models' answers to a file, by each evaluation."""
    pairs = []
    for name in names:
        function = EVALUATIONS[name].load()
        pairs.append((function(base.answers[file]), function(tuned.answers[file])))
    return pairs


def changes_of_answers(
    what: str, name: str, pair: tuple[ItemScores, ItemScores], seed: int
) -> list[Change]:
    """Returns the changes of an evaluation's means over the answers, in percent. what: begins the
    names of the rows. Raises UserError for an evaluation that gives no number to an answer."""
    before, after = pair
    if not before.items:
        raise UserError(f"{name}: has no number for a single answer, so it can't be compared here")
    changes = []
    for item, numbers in before.items.items():
        base = 100 * np.asarray(numbers, float)
        tuned = 100 * np.asarray(after.items[item], float)
        interval = paired_interval(base, tuned, seed=seed)
        means = (float(base.mean()), float(tuned.mean()))
        changes.append(Change(f"{what}, {item} %", len(base), *means, interval, ".1f"))
    return changes


def changes_of_measures(
    what: str, before: list[Measure], after: list[Measure], seed: int
) -> list[Change]:
    """Returns the changes of numbers that each prompt has. what: begins the names of the rows."""
    changes = []
    for base, tuned in zip(before, after, strict=True):
        row = Measure(base.name, base.values, base.is_share and tuned.is_share)
        scale = 100 if row.is_share else 1
        numbers = (scale * base.values, scale * tuned.values)
        interval = paired_interval(*numbers, seed=seed)
        means = (float(numbers[0].mean()), float(numbers[1].mean()))
        name = f"{what} {row.heading}".strip()
        changes.append(
            Change(
                name, len(base.values), *means, interval, row.number_format, tuned.lower_is_better
            )
        )
    return changes


def change_of_loss(
    role: str, file: str, base: Measured, tuned: Measured, seed: int, notes: list[str]
) -> Change:
    """Returns the change of the loss a token on a file. notes: gets what must be known about it.

    Raises UserError where the models do not read the file as the same examples.
    """
    before, after = base.losses[file], tuned.losses[file]
    if before.digest != after.digest:
        notes.append(
            f"WARNING: the two models read {short(file)} as different tokens, so their losses a token"
            " don't compare"
        )
        are_same = np.array_equal(base.places[file], tuned.places[file])
        if len(before.sums) != len(after.sums) or not are_same:
            raise UserError(
                f"{file}: the two models read it as {len(before.sums):,} and {len(after.sums):,}"
                " examples that are not the same, which can't be paired; for plain text, or with another"
                " length limit, run `evaluate.py loss` on each"
            )
    interval = paired_interval(before.sums, after.sums, before.tokens, after.tokens, seed=seed)
    name = f"{role} {short(file)}, loss"
    return Change(name, len(before.sums), before.mean, after.mean, interval, ".4f", True)


def print_changes(changes: list[Change], seed: int, notes: list[str]) -> None:
    """Prints the table, and what must be known to read it."""
    print("\n" + console.table([HEADINGS, *(change.cells() for change in changes)]))
    print(
        f"Intervals: {RESAMPLES:,} paired bootstrap resamples (--seed {seed}) of the items, which are"
        f" answers, conversations, or pieces of {PIECE} tokens of plain text; unsure: the interval holds"
        " 0."
    )
    few = [change.name for change in changes if change.items < FEW_ITEMS]
    if few:
        print(
            f"NOTE: with fewer than {FEW_ITEMS} items an interval is too narrow: {'; '.join(few)}."
        )
    still = [
        change for change in changes if change.name.endswith("%") and change.interval == (0, 0)
    ]
    if still:
        rows = []
        for change in still:
            most = min(100, 300 / change.items)
            rows.append(
                f"{change.name} (of {console.number_of(change.items, 'item')}: {most:.0f} %)"
            )
        print(
            "NOTE: no item changed in these rows, from which no interval follows; as many of all may"
            f" change (rule of three): {'; '.join(rows)}."
        )
    for note in dict.fromkeys(notes):
        print(note)


@dataclass
class Flips:
    """The answers that an evaluation finds better after the training, and worse.

    is_binary: every answer is right or wrong.
    better, worse: their numbers, those that changed most first.
    """

    metric: str
    is_binary: bool
    base: list[float]
    tuned: list[float]
    answers: Answers
    better: list[int]
    worse: list[int]

    @classmethod
    def of(cls, metric: str, pair: tuple[ItemScores, ItemScores], answers: Answers) -> "Flips":
        """answers: of the base. By an evaluation's first number."""
        base, tuned = (next(iter(scores.items.values())) for scores in pair)
        change = np.asarray(tuned, float) - np.asarray(base, float)
        order = np.argsort(-np.abs(change), kind="stable").tolist()
        better = [i for i in order if change[i] > 0]
        worse = [i for i in order if change[i] < 0]
        is_binary = {*base, *tuned} <= {0.0, 1.0}
        return cls(metric, is_binary, base, tuned, answers, better, worse)

    def print_all(self, tuned: Answers, show: int) -> None:
        """Prints how many answers changed, and the first `show` of each kind."""
        kinds = ["wrong to right", "right to wrong"] if self.is_binary else ["better", "worse"]
        counts = f"{len(self.better):,} {kinds[0]}, {len(self.worse):,} {kinds[1]}"
        print(f"\nflipped   of {len(self.answers):,} answers by {self.metric}: {counts}")
        for kind, numbers in zip(kinds, (self.better, self.worse), strict=True):
            for place, i in enumerate(numbers[:show]):
                of = f"{place + 1} of {len(numbers):,}"
                score = "" if self.is_binary else f", {self.base[i]:.2f} to {self.tuned[i]:.2f}"
                print(f"\n  {kind} ({of}{score})")
                self.print_answer(i, tuned)

    def print_answer(self, i: int, tuned: Answers) -> None:
        """Prints an answer's question, references, and what both models answered."""
        messages, _ = question_of(self.answers.records[i])
        question = [message["content"] for message in messages if message["role"] == "user"][-1]
        print(f"    question   {console.both_ends(question)}")
        for reference in self.answers.references[i]:
            print(f"    reference  {console.one_line(reference.strip())}")
        print(f"    base       {console.one_line(self.answers.texts[i].strip())}")
        print(f"    tuned      {console.one_line(tuned.texts[i].strip())}")
