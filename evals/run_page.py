"""The page of one run: from the lines of its metrics.jsonl and the facts that training/run_report.py knows.

The curves and numbers are those of metrics.jsonl, so that a page can also be made of a run that is still
going on or was killed; facts, which the run writes into its own page, say what it was made from and how it
answers.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from common.console import format_duration, number_of
from common.errors import UserError
from evals.charts import Curve, LineChart, line_chart
from evals.report import PageBlock, PageSection, render_report
from evals.table import EVALUATIONS

PAGE_NAME = "report.html"
# The numbers of metrics.jsonl that have charts or places of their own, and those that need none.
CHARTED = (
    "loss", "replay_loss", "val_loss", "replay_val_loss", "kl_base", "lr", "grad_norm", "tokens_per_s",
    "memory_mb",
)  # fmt: skip
# What objectives of whole examples report: (title of the chart, {number of metrics.jsonl: its label}). A
# validation's numbers have val_ in front.
EXAMPLE_CHARTS = (
    ("Accuracy", {"accuracy": "accuracy"}),
    ("Margin between the rewards", {"margin": "margin"}),
    (
        "Rewards",
        {
            "reward_chosen": "chosen", "reward_rejected": "rejected",
            "reward_good": "good answers", "reward_bad": "bad answers", "reward": "answers",
        },
    ),
    ("Length of the answers, tokens", {"answer_tokens": "answers"}),
    (
        "Share of the answers",
        {"cut": "cut off at their longest", "alike": "in groups of equal rewards, which teach nothing",
         "redrawn": "in which a token was drawn again"},
    ),
    ("Log-probability of the answers", {"logp_chosen": "chosen", "logp_rejected": "rejected"}),
)  # fmt: skip
UNCHARTED = ("step", "tokens", "trained_tokens", "skipped", "seconds")
# So many rows of validations stand in the table of numbers, spread evenly.
MOST_ROWS = 60
# How numbers of metrics.jsonl are called on the page.
NUMBER_LABELS = {
    "val_accuracy": "validation accuracy",
    "val_margin": "validation, margin between the rewards",
    "kl": "KTO's estimate of KL(policy || reference)",
    "val_reward": "validation, mean reward",
    "val_answer_tokens": "validation, tokens of an answer",
    "val_cut": "validation, share of answers that were cut off",
    "kl_reference": "KL(policy || model before step 1), nats a token",
    "sampling_gap": "log-probabilities that train tokens against those that sampled them, nats",
    "replay_val_loss": "loss on replayed data, nats a token",
    "kl_base": "KL(base || tuned), nats a token",
    "general_loss": "loss on general data (--forget-data), nats a token",
    "general_loss_rise": "rise of the loss on general data, nats a token",
    "ewc_penalty": "penalty of --ewc",
    "balance_loss": "balance loss of routed experts",
}
CHANGES_NOTE = (
    "The end against the model before the training, with the 95 % interval of each change by paired bootstrap"
    " over its items. unsure: the interval holds 0."
)
SCORE = "val_"  # begins the name of an --eval-metric


def read_run_metrics(folder: Path) -> list[dict]:
    """Returns the lines of a run's metrics.jsonl; one that is being written, or damaged, is left out.

    Raises UserError if the folder is none of a run.
    """
    file = folder / "metrics.jsonl"
    if not file.is_file():
        inside = (folder.parent / "metrics.jsonl").is_file()
        advice = (
            f"name {folder.parent}"
            if inside
            else "the folder of a run is wanted (--out of train.py)"
        )
        raise UserError(f"{folder}: holds no metrics.jsonl; {advice}")
    lines = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            # A skipped step has no loss. What else is no number is damaged.
            lines.append(
                {name: value for name, value in line.items() if may_be_logged(name, value)}
            )
    return lines


def may_be_logged(name: str, value: object) -> bool:
    """True for what a line of metrics.jsonl may hold: a number, or null for one that was not finite."""
    if value is None:
        return name not in UNCHARTED
    return isinstance(value, int | float)


def check_spares_run(file: Path) -> None:
    """Raises UserError if --html names the page of a run, which holds what nothing else knows."""
    if file.name == PAGE_NAME and (file.parent / "metrics.jsonl").is_file():
        raise UserError(f"--html {file}: is the page of a run; give another name")


def points_of(
    lines: Sequence[dict], name: str, scale: float = 1
) -> list[tuple[float, float | None]]:
    """Returns (step, value) of a number of metrics.jsonl; None where a step was skipped."""
    points: list[tuple[float, float | None]] = []
    for line in lines:
        if name in line:
            value = line[name]
            points.append((line["step"], None if value is None else value * scale))
    return points


def rolling_mean(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Returns the mean of each value and those just before it, over a twentieth of the run; nothing for
    a run that is too short for it."""
    there = [(x, y) for x, y in points if y is not None]
    window = len(there) // 20
    if window < 1:
        return []
    means: list[tuple[float, float | None]] = []
    total = 0.0
    for i, (x, y) in enumerate(there):
        total += y
        if i > window:
            total -= there[i - window - 1][1]
        means.append((x, total / min(i + 1, window + 1)))
    return means


def other_numbers(lines: Sequence[dict]) -> list[str]:
    """Returns the names of the numbers in metrics.jsonl that have no chart of their own, as a score of
    the validations or the penalty of a method."""
    names: dict[str, None] = {}
    for line in lines:
        names |= dict.fromkeys(
            name for name, value in line.items() if isinstance(value, int | float)
        )
    return [name for name in names if name not in CHARTED and name not in UNCHARTED]


def is_of_examples(lines: Sequence[dict]) -> bool:
    """True if the loss is a mean over examples, pairs or classes, and not over tokens."""
    names = ("accuracy", "val_accuracy", "reward", "val_reward")
    return any(name in line for line in lines for name in names)


def with_unit(words: str, lines: Sequence[dict]) -> str:
    """Returns words about the loss with its unit; a loss of examples has none."""
    return words if is_of_examples(lines) else f"{words}, nats a token"


def example_names() -> list[str]:
    """Returns the numbers that EXAMPLE_CHARTS draws."""
    names = [name for _, labels in EXAMPLE_CHARTS for name in labels]
    return names + [f"{SCORE}{name}" for name in names]


def label_of(name: str, lines: Sequence[dict] = ()) -> str:
    """Returns what a number of metrics.jsonl is called on the page."""
    metric = name.removeprefix(SCORE)
    if name == "val_loss":
        return with_unit("validation loss", lines)
    if name in NUMBER_LABELS:
        return NUMBER_LABELS[name]
    if name.startswith(SCORE) and metric in EVALUATIONS:
        return f"validation answers, {EVALUATIONS[metric].score}"
    return name


# ---- the curves ----


def run_charts(lines: Sequence[dict]) -> list[LineChart]:
    """Returns the charts of a run, those alone for which it has numbers."""
    losses = points_of(lines, "loss")
    means = rolling_mean(losses)
    replayed = points_of(lines, "replay_loss")
    curves = [Curve("training, each step", losses, 0, faint=bool(means))]
    if means:
        curves.append(Curve("training, running mean", means, 0))
    curves.append(Curve("validation", points_of(lines, "val_loss"), 1, dotted=True))
    curves.append(Curve("replayed data, training", rolling_mean(replayed) or replayed, 2))
    checks = points_of(lines, "replay_val_loss")
    curves.append(Curve("replayed data, validation", checks, 3, dotted=True))
    drawn = [
        line_chart(with_unit("Loss", lines), curves),
        line_chart(
            "Distance from the base, KL in nats a token",
            [Curve("KL(base || tuned)", points_of(lines, "kl_base"), 3, dotted=True)],
            from_zero=True,
        ),
        line_chart("Learning rate", [Curve("learning rate", points_of(lines, "lr"), 2)], True),
    ]
    for title, name, color, scale in (
        ("Gradient norm", "grad_norm", 5, 1),
        ("Speed, tokens/s", "tokens_per_s", 6, 1),
        ("Peak memory, GB", "memory_mb", 4, 1e-3),
    ):
        points = points_of(lines, name, scale)
        is_peak = name == "memory_mb"
        means = [] if is_peak else rolling_mean(points)
        label = "peak so far" if is_peak else "each step"
        curves = [Curve(label, points, color, faint=bool(means))]
        if means:
            curves.append(Curve("running mean", means, color))
        drawn.append(line_chart(title, curves, from_zero=True))
    drawn += example_charts(lines)
    for name in other_numbers(lines):
        if name in example_names():
            continue
        points = points_of(lines, name)
        drawn.append(line_chart(label_of(name), [Curve(label_of(name), points, 7, dotted=True)]))
    return [chart for chart in drawn if chart is not None]


def example_charts(lines: Sequence[dict]) -> list[LineChart | None]:
    """Returns the charts of EXAMPLE_CHARTS, training and validation of a number in one."""
    charts = []
    for title, labels in EXAMPLE_CHARTS:
        curves = []
        for i, (name, label) in enumerate(labels.items()):
            points = points_of(lines, name)
            means = rolling_mean(points)
            kind = "training, running mean" if means else "training, each step"
            curves.append(Curve(f"{label}, {kind}", means or points, 2 * (i % 2)))
            checks = points_of(lines, f"{SCORE}{name}")
            curves.append(Curve(f"{label}, validation", checks, 2 * (i % 2) + 1, dotted=True))
        charts.append(line_chart(title, curves))
    return charts


# ---- what came of it ----


def validations_of(lines: Sequence[dict]) -> list[dict]:
    return [line for line in lines if line.get("val_loss") is not None]


def in_words(lines: Sequence[dict], facts: dict) -> str:
    """Returns a sentence or two about what the training did to the losses."""
    validations = validations_of(lines)
    trained = [line for line in lines if line.get("loss") is not None]
    if not trained:
        return "No step was trained yet."
    steps = number_of(trained[-1]["step"], "step")
    unit = "" if is_of_examples(lines) else " nats a token"
    if len(validations) < 2 or validations[0]["step"] > 0:
        first, last = trained[0]["loss"], trained[-1]["loss"]
        return (
            f"{steps} were trained; the training loss went from {first:.4f} to {last:.4f}{unit}."
            " There is no validation before and after to compare."
        )
    first, last = validations[0], validations[-1]
    best = min(validations, key=lambda line: line["val_loss"])
    before, after = first["val_loss"], last["val_loss"]
    verb = "fell" if after < before else "rose"
    text = f"The loss on held-out examples {verb} from {before:.4f} to {after:.4f}{unit} in"
    text += f" {number_of(last['step'], 'step')}."
    if after >= before and best is first:
        text += " The model is no better on them than its base."
    elif best is not last:
        is_kept = facts.get("best_val_loss") == best["val_loss"]
        held = ": best/ holds these weights" if is_kept else ""
        text += f" It was lowest at step {best['step']:,}, {best['val_loss']:.4f}{held}."
    if first.get("val_accuracy") is not None and last.get("val_accuracy") is not None:
        shares = [f"{100 * line['val_accuracy']:.1f} %" for line in (first, last)]
        text += f" Their accuracy was {shares[0]} before and is {shares[1]}."
    if first.get("val_reward") is not None and last.get("val_reward") is not None:
        text += (
            f" The loss is minus the mean reward of the answers, which was {first['val_reward']:.3g} before"
            f" and is {last['val_reward']:.3g}."
        )
    rise = last.get("general_loss_rise")
    if rise is not None:
        direction = "rose" if rise > 0 else "fell"
        text += f" The loss on general data {direction} by {abs(rise):.4f}."
    return text


def run_tiles(lines: Sequence[dict], facts: dict) -> list[tuple[str, str, str]]:
    """Returns (name, number, remark) of what stands first on the page."""
    tiles = []
    validations = validations_of(lines)
    unit = "" if is_of_examples(lines) else "nats a token"
    steps = [line for line in lines if "loss" in line]
    if validations:
        first, last = validations[0], validations[-1]
        before = f"{first['val_loss']:.4f} before" if first["step"] == 0 else unit
        tiles.append(("Validation loss", f"{last['val_loss']:.4f}", before))
        if last.get("val_accuracy") is not None:
            accuracy = f"{100 * last['val_accuracy']:.1f} %"
            tiles.append(("Accuracy", accuracy, "on held-out examples"))
        if last.get("val_reward") is not None:
            reward = first.get("val_reward") if first["step"] == 0 else None
            before = "" if reward is None else f"{reward:.3g} before"
            tiles.append(("Reward", f"{last['val_reward']:.3g}", before))
        if last.get("kl_base") is not None:
            tiles.append(
                ("Distance from the base", f"{last['kl_base']:.4f}", "KL, nats a token; 0 before")
            )
    elif steps and steps[-1]["loss"] is not None:
        remark = f"{unit}, last step" if unit else "last step"
        tiles.append(("Training loss", f"{steps[-1]['loss']:.4f}", remark))
    if facts.get("trained"):
        tiles.append(("Trained", facts["trained"], facts.get("trained_share", "")))
    if steps:
        tokens = sum(line.get("tokens", 0) for line in steps)
        tiles.append(
            ("Training", format_duration(steps[-1].get("seconds", 0)), f"{tokens:,} tokens")
        )
        tiles.append(("Speed", f"{median_speed(steps):,.0f}", "tokens/s, median step"))
        memory = max(line.get("memory_mb", 0) for line in steps) / 1e3
        tiles.append(("Peak memory", f"{memory:.2f} GB", facts.get("device", "")))
    return tiles


def median_speed(steps: Sequence[dict]) -> float:
    """Returns the tokens/s of the median step: single slow ones do not count."""
    speeds = sorted(line["tokens_per_s"] for line in steps if line.get("tokens_per_s"))
    return speeds[len(speeds) // 2] if speeds else 0.0


def loss_rows(lines: Sequence[dict]) -> list[list[str]]:
    """Returns the table of the losses before the training, at their lowest, and at the end."""
    validations = validations_of(lines)
    if not validations:
        return []
    first, last = validations[0], validations[-1]
    best = min(validations, key=lambda line: line["val_loss"])
    columns = [("end", last)]
    if best not in (first, last):
        columns.insert(0, ("lowest validation loss", best))
    if first["step"] == 0 and first is not last:
        columns.insert(0, ("before training", first))
    rows = [["", *(f"{name} (step {line['step']:,})" for name, line in columns)]]
    for name in ["val_loss", "replay_val_loss", "kl_base", *other_numbers(validations)]:
        if any(line.get(name) is not None for _, line in columns):
            numbers = [line.get(name) for _, line in columns]
            rows.append(
                [
                    label_of(name, lines),
                    *("" if number is None else f"{number:.4f}" for number in numbers),
                ]
            )
    return rows


def number_rows(lines: Sequence[dict]) -> list[list[str]]:
    """Returns the table of all validations, of many of them some spread evenly."""
    validations = validations_of(lines)
    names = ["val_loss", "replay_val_loss", "kl_base", *other_numbers(validations)]
    names = [name for name in names if any(name in each for each in validations)]
    if len(validations) < 2:
        return []
    if len(validations) > MOST_ROWS:
        last = len(validations) - 1
        validations = [validations[round(i * last / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]
    rows = [["step", *(label_of(name, validations) for name in names)]]
    for line in validations:
        numbers = [line.get(name) for name in names]
        rows.append(
            [f"{line['step']:,}", *("" if each is None else f"{each:.4f}" for each in numbers)]
        )
    return rows


# ---- the page ----


def run_sections(lines: Sequence[dict], facts: dict) -> list[PageSection]:
    """Returns the sections of a run's page."""
    top = [PageBlock("lead", in_words(lines, facts))]
    for remark in facts.get("warnings", []):
        top.append(PageBlock("warning", remark))
    top.append(PageBlock("tiles", run_tiles(lines, facts)))
    changes = []
    if facts.get("changes"):
        changes.append(PageBlock("table", facts["changes"]))
        changes.append(PageBlock("note", CHANGES_NOTE))
    if facts.get("comparison"):
        changes.append(PageBlock("table", facts["comparison"]))
        changes += [PageBlock("note", note) for note in facts.get("comparison_notes", [])]
    if loss_rows(lines):
        changes.append(PageBlock("table", loss_rows(lines)))
    unmeasured = []
    if facts.get("compare_command"):
        unmeasured = [
            PageBlock("text", unmeasured_here(facts)),
            PageBlock("code", facts["compare_command"]),
        ]
    curves = []
    charts = run_charts(lines)
    if charts:
        curves.append(PageBlock("charts", charts))
    if number_rows(lines):
        curves.append(PageBlock("folded", number_rows(lines), "All validations as numbers"))
    skipped = sum(line.get("loss", 0) is None for line in lines)
    if skipped:
        text = f"{number_of(skipped, 'step')} had no finite loss or gradient and changed no weight."
        curves.append(PageBlock("warning", text))
    return [
        PageSection("", top),
        PageSection("Before and after", changes),
        PageSection("Answers", answer_blocks(facts)),
        PageSection("Curves", curves),
        PageSection("Data", data_blocks(facts)),
        PageSection("How it was made", making_blocks(facts)),
        PageSection("What this page does not say", unmeasured),
    ]


def unmeasured_here(facts: dict) -> str:
    """Returns what a run has not measured."""
    missing = ["how often answers are right", "what the model has forgotten"]
    if not facts.get("asked_for_safety"):
        missing.append("whether it answers harmful requests")
    if facts.get("comparison"):
        missing = [
            "how often answers to other questions are right",
            "what else the model has forgotten",
        ]
    listed = f"{', '.join(missing[:-1])}, or {missing[-1]}"
    means = facts.get("loss_means") or "that the model finds their answers more probable"
    return (
        f"A lower loss on held-out examples means {means}. It does not"
        f" say {listed}. To measure target and forgetting, with intervals and a page like this one:"
    )


def answer_blocks(facts: dict) -> list[PageBlock]:
    """Returns the sample answers of a run, and how they came about."""
    blocks = []
    if facts.get("answers"):
        blocks.append(PageBlock("answers", facts["answers"]))
    if facts.get("answers_note"):
        blocks.append(PageBlock("note", facts["answers_note"]))
    return blocks


def data_blocks(facts: dict) -> list[PageBlock]:
    """Returns what the run was trained on, and three examples."""
    blocks = []
    if facts.get("files"):
        blocks.append(PageBlock("table", facts["files"]))
    blocks += [PageBlock("text", line) for line in facts.get("data", [])]
    if facts.get("examples"):
        blocks.append(PageBlock("heading", "Examples as the model saw them"))
        text = "Marked: the tokens that are trained. The rest is read and not trained."
        blocks.append(PageBlock("note", text))
        blocks.append(PageBlock("spans", facts["examples"]))
    blocks += [PageBlock("note", note) for note in facts.get("examples_notes", [])]
    return blocks


def making_blocks(facts: dict) -> list[PageBlock]:
    """Returns the command, the settings, versions and hashes."""
    blocks = []
    if facts.get("command"):
        blocks += [
            PageBlock("text", facts.get("command_note", "This command does it again:")),
            PageBlock("code", facts["command"]),
        ]
    if facts.get("made"):
        blocks.append(PageBlock("facts", facts["made"]))
    if facts.get("given"):
        blocks.append(PageBlock("heading", "Flags that were given"))
        blocks.append(PageBlock("facts", facts["given"]))
    if facts.get("chosen"):
        blocks.append(PageBlock("heading", "Settings that the program chose"))
        blocks.append(PageBlock("facts", facts["chosen"]))
    return blocks


def run_page(folder: Path, lines: Sequence[dict], facts: dict) -> str:
    """Returns the page of a run."""
    title = facts.get("title") or f"Run {folder.resolve().name}"
    subtitle = (
        facts.get("subtitle")
        or f"{folder.resolve().name}: of its metrics.jsonl alone, the run has written no page"
    )
    return render_report(title, subtitle, run_sections(lines, facts), facts)
