"""The command line of sweep.py: which options are tried with which values, and what is the same in all.

A word such as `1e-4,3e-4` is several values, `1e-5..1e-2` a range, and a single value is the same in every
trial. Each trial's command line is checked as train.py would check it, before any is started.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import math
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import cli
from common.errors import UserError, read_json
from common.files import atomic_file, write_json
from common.known_names import TRAIN_NAMES
from flags import OPTIONS, Flags, dashed, parse_flags

SEARCHES = ("auto", "grid", "random", "halving", "tpe")
# Successive halving keeps the best one of so many, and trains it so many times as long.
REDUCTION = 3
# A rung of fewer steps would tell nothing.
LEAST_RUNG_STEPS = 5
# Options that sweep.py itself sets for each run, or that belong to no run of a sweep.
OF_THE_SWEEP = ("out", "overwrite", "resume", "plan", "gpus", "gpu_memory", "profile", "push")
# Options that say where a run computes, which is no question of what is best.
OF_THE_MACHINE = ("device", "shard", "context_parallel", "timeout", "wandb", "tensorboard")
# Options whose values have losses that can't be compared: of other texts, tokens, weights or equations.
# With --eval-metric the answers are compared, which can be.
CHANGE_THE_LOSS = (
    "model", "template", "date", "empty_think", "system", "train_on", "map", "trees", "seq_len", "truncate",
    "val", "val_fraction", "val_limit", "skip_bad", "add_tokens", "adapter", "objective", "beta",
    "label_smoothing", "length_normalized", "margin", "desirable_weight", "undesirable_weight", "reward",
    "teacher", "divergence", "own_answers", "max_new_tokens",
)  # fmt: skip
# These say how it is measured what is best, in all trials alike.
THE_MEASURE = ("eval_metric", "eval_metric_limit", "forget_limit", "forget_data", "safety")


class Range(NamedTuple):
    """Numbers from low to high, drawn so that each factor of ten comes equally often."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Sweep:
    """What is tried.

    space: {option: its values, as words, or a range}.
    base: words of train.py's command line that are the same in all trials.
    search: grid, random, halving or tpe; why_search: in words.
    seeds: with which each trial is repeated; none: once, with the seed of the other words.
    length: ("steps" or "epochs", how many) where `base` says so, which halving needs.
    """

    space: dict[str, tuple[str, ...] | Range]
    base: tuple[str, ...]
    search: str
    why_search: str
    trials: int
    seeds: tuple[str, ...]
    length: tuple[str, float] | None
    draw_seed: int
    out: str
    at_once: int = 1
    processes: int = 1
    keep_all: bool = False
    is_resumed: bool = False

    @property
    def repeats(self) -> int:
        """How many runs a trial has."""
        return max(1, len(self.seeds))

    def words_of(
        self, values: dict[str, str], seed: str | None = None, share: float = 1.0
    ) -> list[str]:
        """Returns train.py's words for a trial. share: of the steps, in successive halving."""
        words = list(self.base)
        for name, value in values.items():
            words += words_of_value(name, value)
        if seed is not None:
            words += ["--seed", seed]
        if share < 1:
            assert self.length is not None
            name, amount = self.length
            shorter = max(1, round(amount * share)) if name == "steps" else amount * share
            words += [dashed(name), f"{shorter:g}"]
        return words


def sweep_arguments(argv: list[str] | None = None) -> Sweep:
    """Parses the command line. Raises UserError naming the flag that is wrong."""
    words = sys.argv[1:] if argv is None else argv
    own, base = words, []
    if "--" in words:
        place = words.index("--")
        own, base = words[:place], words[place + 1 :]
    args = cli.parse_args(make_sweep_parser(), own, TRAIN_NAMES)
    for name in ("trials", "at_once", "processes"):
        number = getattr(args, name)
        if number is not None and number < 1:
            raise UserError(f"{dashed(name)} {number}: must be above 0")
    if args.resume:
        return resumed_sweep(args, base)
    refuse_options_of_the_sweep(base)
    space, fixed = read_space(args, own)
    base = [*base, *fixed]
    seeds = space.pop("seed", ())
    if isinstance(seeds, Range):
        raise UserError("--seed: a trial is repeated with each of its seeds; list them, as 0,1,2")
    if not space:
        what = "--seed alone repeats one trial" if seeds else "no option has several values"
        raise UserError(f"nothing to compare: {what}; give some, as --lr 1e-4,3e-4 (see --help)")
    sweep = chosen_search(args, space, tuple(base), seeds)
    return checked(sweep)


def make_sweep_parser() -> argparse.ArgumentParser:
    """Returns the parser of sweep.py's own flags and of the options that can be tried."""
    parser = argparse.ArgumentParser(
        "sweep.py",
        allow_abbrev=False,
        usage="sweep.py --OPTION VALUE,VALUE,... [--trials N] [--search ...] [--out DIR] [-- OPTIONS OF ALL TRIALS]",
        description="Runs train.py with several values of its options and says which are best: those with the"
        " lowest validation loss, or the highest score of --eval-metric. Any option of train.py (python train.py"
        " --help) can be tried: of numbers and of words to choose from the values are separated by commas, as"
        " --lr 1e-4,3e-4 --method lora,full; of files, names and texts by spaces, as --targets q_proj,v_proj all;"
        " yes,no of an option that is on or off. LOW..HIGH is a range of numbers, of which --trials are drawn."
        " --seed 0,1,2 repeats each trial with these seeds, and means are compared. What stands behind -- is the"
        " same in all trials.",
    )
    add = parser.add_argument
    add("--trials", type=int, metavar="N", help="how many are tried; default: every combination")
    add(
        "--search",
        choices=SEARCHES,
        help="grid: every combination; random: combinations that are drawn; halving: successive halving, many"
        f" trials of few steps, of which the best one of {REDUCTION} each time is trained {REDUCTION} times as"
        " long, from its beginning; tpe: each trial is chosen from what the ones before it say, by Optuna (pip"
        " install optuna). default: auto: grid if --trials are enough for it, else tpe if Optuna is installed,"
        " else random",
    )
    add("--out", metavar="DIR", help="folder of the sweep; default: a new one under sweeps/")
    add(
        "--resume",
        action="store_true",
        help="go on with the sweep in --out, which is interrupted or has failed trials; no other flag is"
        " needed",
    )
    add(
        "--at-once",
        type=int,
        metavar="N",
        help="runs at the same time, each on a GPU of its own; without a GPU they share the cores; default: 1",
    )
    add(
        "--processes",
        type=int,
        metavar="N",
        help="processes of each run, as torchrun --nproc-per-node has it; default: 1",
    )
    add(
        "--keep-all",
        action="store_true",
        help="keep the weights of all runs; default: those of the best one. What they measured is kept in any case",
    )
    add("--draw-seed", type=int, metavar="N", help="seed of what is drawn; default: 0")
    for name in OPTIONS:
        if name not in OF_THE_SWEEP:
            # Their help is that of train.py.
            add(dashed(name), nargs="*", action="extend", default=None, help=argparse.SUPPRESS)
    return parser


def refuse_options_of_the_sweep(base: list[str]) -> None:
    """Raises UserError if an option that sweep.py sets itself stands among those of all trials."""
    refused = {dashed(name): "is not for the runs of a sweep" for name in OF_THE_SWEEP}
    refused |= dict.fromkeys(("--out", "--resume"), "stands before the --")
    for word in base:
        flag = word.partition("=")[0]
        if flag in refused:
            raise UserError(f"{flag}: {refused[flag]}")


def read_space(args: argparse.Namespace, typed: list[str]) -> tuple[dict, list[str]]:
    """Returns {option: its values or its range} of those with several, and train.py's words for those
    with one value, which is the same in all trials. typed: the command line, whose order is kept."""
    space: dict[str, tuple[str, ...] | Range] = {}
    fixed: list[str] = []
    flags = [word.partition("=")[0] for word in typed]
    given = [
        name for name in OPTIONS if name not in OF_THE_SWEEP and getattr(args, name) is not None
    ]
    for name in sorted(given, key=lambda name: flags.index(dashed(name))):
        words = getattr(args, name)
        values = read_values(name, words)
        if not isinstance(values, Range) and len(values) == 1:
            fixed += words_of_value(name, values[0])
            continue
        if name in OF_THE_MACHINE:
            raise UserError(f"{dashed(name)}: says where a run computes or reports; give one value")
        if name in THE_MEASURE:
            raise UserError(f"{dashed(name)}: says by what the trials are compared; give one value")
        space[name] = values
    return space, fixed


def read_values(name: str, words: list[str]) -> tuple[str, ...] | Range:
    """Returns the values of an option, or its range.

    Raises UserError for a value that comes twice, or a range that is none.
    """
    kind = str(OPTIONS[name].type)
    is_number = "int" in kind or "float" in kind
    values = words
    if is_number or "bool" in kind or OPTIONS[name].metadata.get("choices"):
        values = [value.strip() for word in words for value in word.split(",") if value.strip()]
    if is_number and len(values) == 1 and ".." in values[0]:
        return read_range(name, values[0])
    if "bool" in kind:
        values = values or ["yes"]
        wrong = [value for value in values if value not in ("yes", "no")]
        if wrong:
            raise UserError(f"{dashed(name)} {wrong[0]}: yes or no is wanted, or both: yes,no")
    if not values:
        raise UserError(f"{dashed(name)}: a value is wanted, or several")
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{dashed(name)} {value}: comes twice")
    return tuple(values)


def read_range(name: str, word: str) -> Range:
    """Returns the range of a word such as 1e-5..1e-2, of an option whose values are numbers."""
    low, _, high = word.partition("..")
    try:
        limits = Range(float(low), float(high))
    except ValueError:
        raise UserError(f"{dashed(name)} {word}: a range is two numbers, as 1e-5..1e-2") from None
    if not 0 < limits.low < limits.high < math.inf:
        raise UserError(
            f"{dashed(name)} {word}: a range begins above 0 and ends at a higher number"
        )
    if takes_whole_numbers(name) and (limits.low % 1 or limits.high % 1):
        raise UserError(f"{dashed(name)} {word}: whole numbers are wanted")
    return limits


def words_of_value(name: str, value: str) -> list[str]:
    """Returns train.py's words that give an option a value."""
    kind = str(OPTIONS[name].type)
    if "bool" not in kind:
        return [dashed(name), value]
    if value == "yes":
        return [dashed(name)]
    # Of an option that is off by default nothing has to be said.
    return ["--no-" + name.replace("_", "-")] if kind != "bool" and "None" in kind else []


def words_of_values(values: dict[str, str], seed: str | None = None) -> str:
    """Returns what makes a trial that trial, as it is printed: "--lr 1e-4 --dora no"."""
    named = values if seed is None else values | {"seed": seed}
    return " ".join(f"{dashed(name)} {value}" for name, value in named.items())


def chosen_search(
    args: argparse.Namespace, space: dict, base: tuple[str, ...], seeds: tuple[str, ...]
) -> Sweep:
    """Returns the sweep with its search and its number of trials.

    Raises UserError where they do not suit each other.
    """
    ranges = [name for name, values in space.items() if isinstance(values, Range)]
    combinations = None if ranges else math.prod(len(values) for values in space.values())
    search, trials = args.search or "auto", args.trials
    if trials is None and search in ("random", "halving", "tpe"):
        raise UserError(f"--search {search}: draws trials; say how many: --trials N")
    if ranges and (trials is None or search == "grid"):
        word = f"{dashed(ranges[0])} {space[ranges[0]]}"
        what = (
            "a grid has no ranges, list values"
            if search == "grid"
            else "say how many are drawn: --trials N"
        )
        raise UserError(f"{word}: {what}")
    has_optuna = importlib.util.find_spec("optuna") is not None
    if search == "auto":
        is_enough = combinations is not None and (trials is None or trials >= combinations)
        search = "grid" if is_enough else "tpe" if has_optuna else "random"
    if search == "grid":
        if trials is not None and trials < combinations:
            raise UserError(
                f"--search grid: has {combinations} combinations, more than --trials {trials};"
                " --search random draws some"
            )
        trials = combinations
    if search == "tpe" and not has_optuna:
        raise UserError("--search tpe: Optuna is not installed; pip install optuna, or take random")
    if combinations is not None:
        trials = min(trials, combinations)
    why = {
        "grid": "every combination",
        "random": "drawn at random",
        "halving": "successive halving of what is drawn at random",
        "tpe": "chosen by Optuna's TPE from those before",
    }[search]
    out = args.out or time.strftime("sweeps/%Y%m%d-%H%M%S")
    return Sweep(
        space, base, search, why, trials, seeds, None, args.draw_seed or 0, out, args.at_once or 1,
        args.processes or 1, args.keep_all,
    )  # fmt: skip


def checked(sweep: Sweep) -> Sweep:
    """Returns the sweep with the length of its runs, once every trial's words are known to be right.

    Raises UserError where train.py would, with the trial; and where scores can't be compared.
    """
    out = Path(sweep.out)
    if (out / "sweep.json").exists():
        raise UserError(f"--out {out}: holds a sweep already; name another folder, or add --resume")
    if out.is_file() or (
        out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    ):
        raise UserError(f"--out {out}: holds something else; name another folder")
    flags = Flags()
    for values in corners(sweep):
        for seed in sweep.seeds or (None,):
            words = sweep.words_of(values, seed)
            try:
                flags = parse_flags(words)
            except UserError as error:
                raise UserError(f"{error} (in the trial with {words_of_values(values)})") from None
    if flags.eval_metric is None:
        for name in sweep.space:
            is_same_data = name != "data" or flags.val is not None
            if name in CHANGE_THE_LOSS or not is_same_data:
                why = "its values have validation losses that can't be compared"
                advice = "add --eval-metric, which compares answers"
                if name == "data":
                    advice = "give the same --val for all"
                raise UserError(f"{dashed(name)}: {why}; {advice}")
    has_end = flags.steps is not None or flags.epochs is not None or flags.full_run
    if not (flags.data or flags.model or flags.adapter or has_end):
        raise UserError(
            "the bundled task takes as many steps as its --budget has time for, which differ between trials;"
            " give --steps N behind --"
        )
    if flags.val_fraction == 0:
        raise UserError("--val-fraction 0: without validation no trial has a score")
    if sweep.search != "halving":
        return sweep
    return dataclasses.replace(sweep, length=length_of_runs(sweep, flags))


def length_of_runs(sweep: Sweep, flags: Flags) -> tuple[str, float]:
    """Returns what says how long a whole run is, for halving. Raises UserError where nothing does."""
    if {"steps", "epochs"} & set(sweep.space):
        raise UserError("--search halving: says itself how long each run is; give one --steps")
    if flags.steps is None and flags.epochs is None:
        raise UserError(
            "--search halving: trains parts of a run; say how long a whole one is: --steps N"
        )
    if flags.steps is None:
        return "epochs", float(flags.epochs)
    rungs = num_rungs(sweep.trials)
    first = flags.steps / REDUCTION ** (rungs - 1)
    if first < LEAST_RUNG_STEPS:
        raise UserError(
            f"--trials {sweep.trials}: in halving, the first of {rungs} rungs would train {first:.1f} of"
            f" --steps {flags.steps}, which tells nothing; fewer trials, or more steps"
        )
    return "steps", float(flags.steps)


def corners(sweep: Sweep) -> list[dict[str, str]]:
    """Returns combinations of values of which each may be wrong by itself: all of a grid, of a range both
    ends."""
    columns = []
    for name, values in sweep.space.items():
        if isinstance(values, Range):
            columns.append([number_word(name, value) for value in values])
        else:
            columns.append([*values])
    return [
        dict(zip(sweep.space, values, strict=True))
        for values in itertools.islice(itertools.product(*columns), 2000)
    ]


def num_rungs(trials: int) -> int:
    """Returns the rungs of successive halving: as many as leave one trial for the last."""
    rungs = 1
    while trials >= REDUCTION**rungs:
        rungs += 1
    return rungs


def share_of_rung(rung: int | None, rungs: int) -> float:
    """Returns which share of a whole run's steps is trained in a rung; rung: None where there are none."""
    return 1.0 if rung is None else REDUCTION ** (rung - rungs + 1)


def takes_whole_numbers(name: str) -> bool:
    """True if the values of an option, which are numbers, are whole ones."""
    return "float" not in str(OPTIONS[name].type)


def number_word(name: str, value: float) -> str:
    """Returns a drawn number as it is typed, with two digits, or as a whole number. name: of the option."""
    return f"{round(value)}" if takes_whole_numbers(name) else f"{value:.2g}"


# ---- the sweep on disk ----


def save_sweep(sweep: Sweep) -> None:
    """Writes sweep.json, by which the sweep is resumed."""
    values = dataclasses.asdict(sweep)
    values["space"] = {
        # As it was typed: fewer digits would be another range.
        name: f"{value.low!r}..{value.high!r}" if isinstance(value, Range) else list(value)
        for name, value in sweep.space.items()
    }
    del values["is_resumed"]
    values["directory"] = str(Path.cwd())
    with atomic_file(Path(sweep.out) / "sweep.json") as tmp:
        write_json(values, tmp)


def resumed_sweep(args: argparse.Namespace, base: list[str]) -> Sweep:
    """Returns what is known of the sweep that --resume goes on with: its folder, and what may change."""
    if args.out is None:
        raise UserError("--resume: needs --out, the folder of the sweep that is to go on")
    given = [
        dashed(name)
        for name in OPTIONS
        if name not in OF_THE_SWEEP and getattr(args, name) is not None
    ]
    fixed = ("trials", "search", "draw_seed", "processes")
    given += [dashed(name) for name in fixed if getattr(args, name) is not None]
    given += base[:1]
    if given:
        raise UserError(f"--resume: the sweep goes on as it was begun; leave {given[0]} out")
    if not (Path(args.out) / "sweep.json").is_file():
        raise UserError(f"--resume: no sweep in {args.out} (sweep.json)")
    saved = read_sweep_file(Path(args.out))
    at_once = args.at_once or saved.at_once
    return dataclasses.replace(
        saved, out=args.out, at_once=at_once, keep_all=args.keep_all or saved.keep_all
    )


def read_sweep_file(out: Path) -> Sweep:
    """Returns the sweep of a folder. Raises UserError where it is of another working directory, from which
    its files would not be found."""
    saved = read_json(out / "sweep.json")
    try:
        directory = saved.pop("directory")
        space = {}
        for name, values in saved["space"].items():
            is_range = isinstance(values, str)
            space[name] = read_values(name, [values]) if is_range else tuple(values)
        length = saved["length"] and (saved["length"][0], saved["length"][1])
        saved |= {
            "space": space,
            "base": tuple(saved["base"]),
            "seeds": tuple(saved["seeds"]),
            "length": length,
        }
        sweep = Sweep(**saved, is_resumed=True)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{out / 'sweep.json'}: is not a file of sweep.py") from None
    if Path(directory) != Path.cwd():
        raise UserError(
            f"--resume: the sweep was begun in {directory}; start from there (cd {shlex.quote(directory)})"
        )
    return sweep
