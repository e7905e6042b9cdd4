"""`evaluate.py report RUN RUN ...`: runs side by side, in the terminal and as a page.

    python evaluate.py report runs/a runs/b --html runs.html

What is compared is in the runs' folders: metrics.jsonl, config.json, and the facts in report.html, which a run
that still goes on has not. No model is loaded.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import console
from common.console import format_duration, number_of
from common.errors import UserError, read_json_if_there
from evals.charts import Curve, LineChart, line_chart
from evals.report import (
    PageBlock,
    PageSection,
    check_report_file,
    read_facts,
    render_report,
    write_report,
)
from evals.run_page import (
    PAGE_NAME,
    answer_blocks,
    check_spares_run,
    in_words,
    label_of,
    median_speed,
    other_numbers,
    points_of,
    read_run_metrics,
    rolling_mean,
    run_page,
    validations_of,
)

NOTHING = "-"
# Settings that say where a run was, and not what it trained.
NOT_COMPARED = (
    "out",
    "overwrite",
    "resume",
    "given",
    "wandb",
    "tensorboard",
    "push",
    "timeout",
    "log_every",
)


@dataclass
class RunFolder:
    """A run: its name on the page, the lines of metrics.jsonl, config.json, and the facts of its page."""

    folder: Path
    name: str
    lines: list[dict]
    config: dict
    facts: dict

    @property
    def steps(self) -> list[dict]:
        return [line for line in self.lines if "loss" in line]


def report_runs(args: argparse.Namespace) -> None:
    """Carries out `evaluate.py report`."""
    file = None
    if args.html is not None:
        file = Path(args.html)
        check_report_file(file)
        # A run's page may be made anew, of that run alone.
        folders = [folder.resolve() for folder in args.runs]
        if folders != [file.resolve().parent]:
            check_spares_run(file)
    runs = read_runs(args.runs)
    results = result_rows(runs)
    print(console.table([[console.one_line(cell, 60) for cell in row] for row in results]))
    for note in notes_on(runs):
        print(f"NOTE: {note}")
    differences = difference_rows(runs)
    if differences:
        rows = [[console.one_line(cell, 40) for cell in row] for row in differences]
        print("\n" + console.table(rows))
    if file is None:
        print("\n--html FILE writes a page with the curves, answers and commands")
        return
    page = run_page(runs[0].folder, runs[0].lines, runs[0].facts)
    if len(runs) > 1:
        page = page_of_runs(runs)
    write_report(file, page)
    print(f"\npage      {file}")


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """Reads the folders of runs. Raises UserError for one that is none, or has not begun."""
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        lines = read_run_metrics(folder)
        if not lines:
            raise UserError(f"{folder}: its metrics.jsonl holds no step yet")
        config = read_json_if_there(folder / "config.json")
        # Of runs with the same name, as the seeds of a sweep may have, the path tells them apart.
        name = name if names.count(name) == 1 else str(folder)
        runs.append(RunFolder(folder, name, lines, config, read_facts(folder / PAGE_NAME)))
    return runs


# ---- what is compared ----


def result_rows(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Returns the table of what came of each run, a row a run."""
    rows = [
        ["", "steps", "validation loss", "lowest", "KL to the base", "tokens/s", "memory", "time"]
    ]
    rows[0][2:2] = ["before"]
    for run in runs:
        validations = validations_of(run.lines)
        steps = run.steps
        wanted = run.config.get("steps")
        done = steps[-1]["step"] if steps else 0
        row = [run.name, f"{done:,}" if wanted in (None, done) else f"{done:,} of {wanted:,}"]
        if validations:
            first, last = validations[0], validations[-1]
            best = min(validations, key=lambda line: line["val_loss"])
            row.append(f"{first['val_loss']:.4f}" if first["step"] == 0 else NOTHING)
            row.append(f"{last['val_loss']:.4f}")
            row.append(f"{best['val_loss']:.4f} (step {best['step']:,})")
            row.append(NOTHING if last.get("kl_base") is None else f"{last['kl_base']:.4f}")
        else:
            row += [NOTHING] * 4
        memory = max((line.get("memory_mb", 0) for line in steps), default=0) / 1e3
        seconds = steps[-1].get("seconds", 0) if steps else 0
        row += [f"{median_speed(steps):,.0f}", f"{memory:.2f} GB", format_duration(seconds)]
        rows.append(row)
    return rows


def difference_rows(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Returns the settings in which the runs differ, a row a setting; nothing where they don't. Runs
    without config.json are left out."""
    runs = [run for run in runs if run.config]
    names: dict[str, None] = {}
    for run in runs:
        names |= dict.fromkeys(run.config)
    rows = [["setting", *(run.name for run in runs)]]
    for name in names:
        values = [run.config.get(name) for run in runs]
        if name not in NOT_COMPARED and any(value != values[0] for value in values):
            rows.append([f"--{name.replace('_', '-')}", *map(setting_text, values)])
    return rows if len(rows) > 1 else []


def setting_text(value: object) -> str:
    """Returns a setting of config.json as one reads it."""
    if value is None or value == []:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def notes_on(runs: Sequence[RunFolder]) -> list[str]:
    """Returns what must be known before the numbers are compared."""
    notes = []
    unknown = [run.name for run in runs if not run.facts]
    if unknown and len(runs) > 1:
        notes.append(
            f"{', '.join(unknown)}: no {PAGE_NAME} with facts (still going on, stopped hard, or of an earlier"
            " version), so whether base and data are the same is not known"
        )
    unset = [run.name for run in runs if not run.config]
    if unset and len(runs) > 1:
        notes.append(
            f"{', '.join(unset)}: no config.json, so its settings are not among those compared"
        )
    for key, what, so in (
        ("base_sha256", "bases", ""),
        ("validation_hash", "validation examples", ": their losses don't compare"),
    ):
        known = {run.facts[key] for run in runs if key in run.facts}
        if len(known) > 1:
            notes.append(f"the runs have different {what}{so}")
    return notes


def comparison_rows(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Returns the last column, that of the tuned model, of the tables with which runs of the bundled task
    end, and the first one's column of the base."""
    tables = {run.name: run.facts["comparison"] for run in runs if run.facts.get("comparison")}
    if not tables:
        return []
    first = next(iter(tables.values()))
    rows = [["", "base", *tables]]
    for i, row in enumerate(first[1:], 1):
        cells = [
            table[i][-1] if i < len(table) and table[i][0] == row[0] else NOTHING
            for table in tables.values()
        ]
        rows.append([row[0], row[1], *cells])
    return rows


# ---- the page ----


def page_of_runs(runs: Sequence[RunFolder]) -> str:
    """Returns the page of several runs."""
    top = [PageBlock("warning", note[:1].upper() + note[1:] + ".") for note in notes_on(runs)]
    top.append(PageBlock("table", result_rows(runs)))
    for run in runs:
        top.append(PageBlock("text", f"{run.name}: {in_words(run.lines, run.facts)}"))
    task = comparison_rows(runs)
    differences = difference_rows(runs)
    same = "The runs have the same settings." if not differences else ""
    made = []
    for run in runs:
        made.append(PageBlock("heading", run.name))
        if run.facts.get("command"):
            made.append(PageBlock("code", run.facts["command"]))
        if run.facts.get("made"):
            made.append(PageBlock("facts", run.facts["made"]))
    sections = [
        PageSection("", top),
        PageSection("The bundled task", [PageBlock("table", task)] if task else []),
        PageSection(
            "Settings that differ",
            [PageBlock("table", differences)] if differences else [PageBlock("text", same)],
        ),
        PageSection("Curves", [PageBlock("charts", charts_of_runs(runs))]),
        PageSection("Answers", answers_of_runs(runs)),
        PageSection("How they were made", made),
    ]
    return render_report(number_of(len(runs), "run"), ", ".join(run.name for run in runs), sections)


def charts_of_runs(runs: Sequence[RunFolder]) -> list[LineChart]:
    """Returns a chart for each number, with a curve for each run."""
    wanted = [
        ("Training loss, nats a token", "loss", 1.0, False),
        ("Validation loss, nats a token", "val_loss", 1.0, False),
        ("Distance from the base, KL in nats a token", "kl_base", 1.0, True),
        ("Learning rate", "lr", 1.0, True),
        ("Gradient norm", "grad_norm", 1.0, True),
        ("Speed, tokens/s", "tokens_per_s", 1.0, True),
        ("Peak memory, GB", "memory_mb", 1e-3, True),
    ]
    more = dict.fromkeys(name for run in runs for name in other_numbers(run.lines))
    wanted += [(label_of(name), name, 1.0, False) for name in more]
    drawn = []
    for title, name, scale, from_zero in wanted:
        curves = []
        any_means = False
        for color, run in enumerate(runs):
            points = points_of(run.lines, name, scale)
            is_smoothed = name in ("loss", "grad_norm", "tokens_per_s")
            means = rolling_mean(points) if is_smoothed else []
            any_means |= bool(means)
            dotted = name in ("val_loss", "kl_base", *more)
            curves.append(Curve(run.name, means or points, color, dotted=dotted))
        # Short runs have none.
        if any_means:
            title += ", running mean"
        drawn.append(line_chart(title, curves, from_zero))
    return [chart for chart in drawn if chart is not None]


def answers_of_runs(runs: Sequence[RunFolder]) -> list[PageBlock]:
    """Returns the runs' answers to the same questions in one place; other questions run by run."""
    answered = [run for run in runs if run.facts.get("answers")]
    if not answered:
        return []
    asked = [
        [dict(map(tuple, each)).get("asked") for each in run.facts["answers"]] for run in answered
    ]
    if any(questions != asked[0] for questions in asked):
        blocks = []
        for run in answered:
            blocks += [PageBlock("heading", run.name), *answer_blocks(run.facts)]
        return blocks
    shown = []
    for i, first in enumerate(answered[0].facts["answers"]):
        rows = [row for row in first if row[0] != "tuned"]
        for run in answered:
            rows += [[run.name, text] for name, text in run.facts["answers"][i] if name == "tuned"]
        shown.append(rows)
    return [PageBlock("answers", shown)]
