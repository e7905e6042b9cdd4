"""What came of the runs of a sweep: the score of each, from its metrics.jsonl, the table and its remarks."""

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from common.console import format_duration, table
from common.errors import UserError, first_line, read_json
from flags import dashed
from training.plots import read_metrics
from training.sweep_words import Range, Sweep, num_rungs, share_of_rung, words_of_values

# Rows of the table: of more trials the best are printed.
MOST_TRIALS_SHOWN = 30


@dataclass(frozen=True)
class RunOutcome:
    """What a run has reached.

    score: of its best validation; name: what that is, such as "validation loss".
    higher: whether a higher score is better.
    loss: at that validation, which parts equal scores.
    step: after which it was; first: the score before the training, None if that was not measured.
    weights: best or final, where the weights of that validation are.
    kl_base: the distance from the base at that validation, None if it was not measured.
    """

    score: float
    name: str
    higher: bool
    loss: float
    step: int
    first: float | None
    weights: str
    kl_base: float | None
    memory_mb: float

    @property
    def key(self) -> float:
        """The score such that lower is better."""
        return -self.score if self.higher else self.score

    @property
    def is_better_than_first(self) -> bool:
        if self.first is None:
            return True
        return self.score > self.first if self.higher else self.score < self.first


@dataclass(frozen=True)
class Result:
    """A run that has ended: a line of results.jsonl.

    name: of its folder. error: why it has no outcome, else "".
    """

    name: str
    trial: int
    rung: int | None
    values: dict[str, str]
    seed: str | None
    seconds: float
    error: str
    outcome: RunOutcome | None

    def line(self) -> str:
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @staticmethod
    def from_dict(line: dict) -> "Result":
        outcome = line["outcome"] and RunOutcome(**line["outcome"])
        return Result(**line | {"outcome": outcome})


def read_results(file: Path) -> list[Result]:
    """Returns the results in a results.jsonl. A last line that was written in part is left out: its run is
    read again.

    Raises UserError if the file is another one.
    """
    # What stands behind the last end of a line is such a part.
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    try:
        return [Result.from_dict(json.loads(line)) for line in lines]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: is not a file of sweep.py") from None


def read_outcome(folder: Path) -> tuple[RunOutcome | None, str]:
    """Returns what a run in a folder has reached; or None, and why it has no score."""
    try:
        lines = read_metrics(folder / "metrics.jsonl")
        config = read_json(folder / "config.json")
    except (OSError, ValueError, UserError) as error:
        return None, f"what it measured can't be read: {first_line(error)}"
    metric = config["eval_metric"]
    field = "val_loss" if metric is None else f"val_{metric}"
    name = "validation loss" if metric is None else metric
    validations = [
        line for line in lines if line.get("val_loss") is not None and line.get(field) is not None
    ]
    after = [line for line in validations if line["step"]]
    if not after:
        return None, "no validation after the training, so it has no score"
    allowed = [line for line in after if is_allowed(line, config)]
    if not allowed:
        return None, f"no validation under --forget-limit {config['forget_limit']:g}"
    higher = metric is not None
    best = min(
        allowed, key=lambda line: (-line[field] if higher else line[field], line["val_loss"])
    )
    before = [line[field] for line in validations if not line["step"]]
    # Of the last validation's weights there may be no copy in best/.
    weights = "final"
    if best["step"] != after[-1]["step"] and (folder / "best").is_dir():
        weights = "best"
    memory = max((line["memory_mb"] for line in lines if "memory_mb" in line), default=0.0)
    return RunOutcome(
        best[field], name, higher, best["val_loss"], best["step"], before[0] if before else None, weights,
        best.get("kl_base"), memory,
    ), ""  # fmt: skip


def is_allowed(line: dict, config: dict) -> bool:
    """True if a validation is under the run's --forget-limit, or there is none."""
    limit = config["forget_limit"]
    if limit is None:
        return True
    forgotten = line.get("kl_base" if config["forget_data"] is None else "general_loss_rise")
    return forgotten is not None and forgotten < limit


def score_text(outcome: RunOutcome) -> str:
    """Returns a score in words."""
    text = f"{outcome.name} {outcome.score:.4f}"
    return text + f" (loss {outcome.loss:.4f})" if outcome.higher else text


# ---- trials with all their seeds ----


@dataclass(frozen=True)
class Row:
    """A trial: its runs with all seeds, the best one first. mean, low, high: of their scores."""

    number: int
    rung: int | None
    values: dict[str, str]
    results: list[Result]
    mean: float
    low: float
    high: float

    @property
    def outcome(self) -> RunOutcome:
        """That of its best run."""
        outcome = self.results[0].outcome
        assert outcome is not None  # only runs that have one make a row
        return outcome

    @property
    def key(self) -> float:
        """The mean score such that lower is better."""
        return -self.mean if self.outcome.higher else self.mean


def rows_of_trials(results: list[Result]) -> list[Row]:
    """Returns a row for each trial of which runs have an outcome, the best first. A trial of halving is where
    it has been trained longest, and those that were trained longer stand first."""
    groups: dict[int, list[Result]] = {}
    for result in results:
        if result.outcome:
            groups.setdefault(result.trial, []).append(result)
    rows = []
    for number, group in groups.items():
        rung = max((each.rung for each in group if each.rung is not None), default=None)
        last = [each for each in group if each.rung == rung]
        last.sort(key=lambda each: (each.outcome.key, each.outcome.loss))
        scores = [each.outcome.score for each in last]
        rows.append(
            Row(
                number,
                rung,
                last[0].values,
                last,
                statistics.mean(scores),
                min(scores),
                max(scores),
            )
        )
    # A trial of which a seed has failed is behind those of which none has.
    most = {
        row.rung: max(len(other.results) for other in rows if other.rung == row.rung)
        for row in rows
    }

    def place(row: Row) -> tuple:
        missing = most[row.rung] - len(row.results)
        return -(row.rung or 0), missing, row.key, row.outcome.loss, row.number

    return sorted(rows, key=place)


def as_value(word: str) -> float | str:
    """Returns a value as a number if it is one."""
    try:
        return float(word)
    except ValueError:
        return word


def sweep_table(sweep: Sweep, results: list[Result]) -> str:
    """Returns the table: a row for each trial, the best first, those without a score last."""
    rows = rows_of_trials(results)
    seeds = len(sweep.seeds)
    heading = ["trial", *(dashed(name) for name in sweep.space), rows[0].outcome.name]
    if seeds:
        heading += ["low to high", "seeds"]
    if sweep.search == "halving":
        heading.append("of the steps")
    heading += ["best after step", "KL to the base", "time", "memory"]
    cells = [heading]
    for row in rows[:MOST_TRIALS_SHOWN]:
        line = [f"{row.number}", *(row.values[name] for name in sweep.space), f"{row.mean:.4f}"]
        if seeds:
            line += [f"{row.low:.4f} to {row.high:.4f}", f"{len(row.results)}"]
        if sweep.search == "halving":
            parts = round(1 / share_of_rung(row.rung, num_rungs(sweep.trials)))
            line.append("all" if parts == 1 else f"1/{parts}")
        kl = [each.outcome.kl_base for each in row.results if each.outcome.kl_base is not None]
        seconds = statistics.mean(each.seconds for each in row.results)
        line += [
            f"{row.outcome.step:,}",
            f"{statistics.mean(kl):.3f}" if kl else "",
            format_duration(seconds),
            f"{max(each.outcome.memory_mb for each in row.results) / 1000:.1f} GB",
        ]
        cells.append(line)
    text = table(cells)
    if len(rows) > MOST_TRIALS_SHOWN:
        text += f"\n({len(rows) - MOST_TRIALS_SHOWN} more in results.jsonl)"
    scored = {row.number for row in rows}
    for result in results:
        if result.trial not in scored:
            text += f"\ntrial {result.trial} ({words_of_values(result.values)}): {result.error}"
    return text


def edge_remarks(sweep: Sweep, best: Row) -> list[str]:
    """Returns a line for each option of which the best value is the lowest or highest that was tried: a
    better one may lie beyond."""
    remarks = []
    for name, values in sweep.space.items():
        if isinstance(values, Range):
            number, low, high = float(best.values[name]), values.low, values.high
            # Within a tenth of the range, by its logarithm.
            margin = (high / low) ** 0.1
            end = "lowest" if number < low * margin else "highest" if number > high / margin else ""
        else:
            numbers = [as_value(value) for value in values]
            if any(isinstance(value, str) for value in numbers) or len(numbers) < 2:
                continue
            number = as_value(best.values[name])
            end = (
                "lowest" if number == min(numbers) else "highest" if number == max(numbers) else ""
            )
        if end:
            beyond = "below" if end == "lowest" else "above"
            remarks.append(
                f"the best {dashed(name)}, {best.values[name]}, is at the {end} end of what was tried; one {beyond} it"
                " may be better"
            )
    return remarks
