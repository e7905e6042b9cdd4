"""The loss curve of a run as a picture, drawn from metrics.jsonl."""

import json
from itertools import accumulate
from pathlib import Path


def read_metrics(file: Path) -> list[dict]:
    """Returns the lines of a metrics.jsonl."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def loss_curve(metrics: Path, picture: Path, title: str) -> None:
    """Draws the losses of a run's metrics.jsonl as a PNG: of each training step (of longer runs
    also their running mean) and of the validations."""
    import matplotlib

    # The backend that needs no display.
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    steps, losses = [], []
    checks, val_losses = [], []
    for line in read_metrics(metrics):
        # The loss of a step that was skipped is null.
        if line.get("loss") is not None:
            steps.append(line["step"])
            losses.append(line["loss"])
        if "val_loss" in line:
            checks.append(line["step"])
            val_losses.append(line["val_loss"])
    # A mean over the steps just before: a longer memory would lag behind the curve.
    window = max(1, len(steps) // 20)

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="training, each step")
    if window > 1:
        label = f"training, mean of {window + 1} steps"
        means = running_means(losses, window)
        axes.plot(steps, means, color="#3182bd", linewidth=2, label=label)
    if checks:
        axes.plot(checks, val_losses, color="#e6550d", marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss a trained token", title=title)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture)
    pyplot.close(figure)


def running_means(losses: list[float], window: int) -> list[float]:
    """Returns, for each loss, the mean of it and of up to `window` losses before it."""
    # sums[i] is the sum of the first i losses.
    sums = [0.0, *accumulate(losses)]
    means = []
    for i in range(len(losses)):
        start = max(0, i - window)
        means.append((sums[i + 1] - sums[start]) / (i + 1 - start))
    return means
