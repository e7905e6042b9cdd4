"""The loss curve of a run as a picture, drawn from metrics.jsonl."""

import json
from itertools import accumulate
from pathlib import Path


def read_metrics(file: Path) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def loss_curve(metrics: Path, picture: Path, title: str) -> None:
    """Draws the losses of a run's metrics.jsonl as a PNG: of each training step (of longer runs also their running
    mean) and of the validations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    lines = read_metrics(metrics)
    steps = [
        (line["step"], line["loss"]) for line in lines if line.get("loss") is not None
    ]  # None: a step skipped
    checks = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    window = max(
        1, len(steps) // 20
    )  # a mean over the steps just before: a longer memory would lag behind the curve
    losses = [loss for _, loss in steps]
    sums = [0.0, *accumulate(losses)]
    starts = [max(0, i - window) for i in range(len(losses))]
    smoothed = [(sums[i + 1] - sums[start]) / (i + 1 - start) for i, start in enumerate(starts)]
    axes.plot(*zip(*steps), color="#9ecae1", linewidth=1, label="training, each step")
    if window > 1:
        label = f"training, mean of {window + 1} steps"
        axes.plot([step for step, _ in steps], smoothed, color="#3182bd", linewidth=2, label=label)
    if checks:
        axes.plot(*zip(*checks), color="#e6550d", marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss a trained token", title=title)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture)
    pyplot.close(figure)
