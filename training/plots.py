"""The loss curve of a run as a picture, drawn from metrics.jsonl."""

import json
import warnings
from itertools import accumulate
from pathlib import Path

from common.errors import printable

# Name in metrics.jsonl, label and color of the curves that have a point for each validation.
VALIDATION_CURVES = [
    ("val_loss", "validation", "#e6550d"),
    ("replay_val_loss", "replayed data, validation", "#31a354"),
]


def read_metrics(file: Path) -> list[dict]:
    """Returns the lines of a metrics.jsonl."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def loss_curve(metrics: Path, picture: Path, title: str) -> None:
    """Draws the losses of a run's metrics.jsonl as a PNG: of each training step (of longer runs
    also their running mean), of the validations, and of replayed data where there are some; and how
    far the model is from its base."""
    import matplotlib

    # The backend that needs no display.
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    lines = read_metrics(metrics)
    steps, losses = curve(lines, "loss")
    # A mean over the steps just before: a longer memory would lag behind the curve.
    window = max(1, len(steps) // 20)

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    # Dots where there is no mean to look at: of a single step there would be no line either.
    dots = {"marker": "o", "markersize": 3} if window == 1 else {}
    replays, replay_losses = curve(lines, "replay_loss")
    # A step's loss is that of all its trained tokens.
    what = "training with replay" if replays else "training"
    label = f"{what}, each step"
    axes.plot(steps, losses, color="#9ecae1", linewidth=1, label=label, **dots)
    if window > 1:
        label = f"{what}, mean of {window + 1} steps"
        means = running_means(losses, window)
        axes.plot(steps, means, color="#3182bd", linewidth=2, label=label)
    for name, label, color in VALIDATION_CURVES:
        checks, values = curve(lines, name)
        if checks:
            axes.plot(checks, values, color=color, marker="o", markersize=4, label=label)
    if replays:
        means = running_means(replay_losses, window)
        axes.plot(replays, means, color="#a1d99b", linewidth=1.5, label="replayed data, training")
    # A folder may be called by bytes that are no text, and a $ in a name would begin a formula.
    shown = printable(title).replace("$", r"\$")
    # Objectives of whole examples report how many of them are right, those of answers a reward.
    unit = "loss per example" if any("accuracy" in line for line in lines) else "loss per token"
    if any("reward" in line for line in lines):
        unit = "minus the mean reward"
    axes.set(xlabel="step", ylabel=unit, title=shown)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    checks, values = curve(lines, "kl_base")
    if checks:
        # In nats a token as well, but of another size.
        right = axes.twinx()
        label = "KL(base || tuned), right axis"
        right.plot(checks, values, color="#756bb1", linestyle=":", marker=".", label=label)
        right.set_ylabel("KL to the base, nats per token")
        right.set_ylim(bottom=0)
        more_handles, more_labels = right.get_legend_handles_labels()
        handles += more_handles
        labels += more_labels
    axes.legend(handles, labels)
    with warnings.catch_warnings():
        # Of characters that the font lacks: a box stands in their place.
        warnings.simplefilter("ignore")
        figure.tight_layout()
        figure.savefig(picture)
    pyplot.close(figure)


def curve(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of a number of metrics.jsonl, without those of skipped steps,
    which are null."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def running_means(losses: list[float], window: int) -> list[float]:
    """Returns, for each loss, the mean of it and of up to `window` losses before it."""
    # sums[i] is the sum of the first i losses.
    sums = [0.0, *accumulate(losses)]
    means = []
    for i in range(len(losses)):
        start = max(0, i - window)
        means.append((sums[i + 1] - sums[start]) / (i + 1 - start))
    return means
