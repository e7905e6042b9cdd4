"""What people look at: aligned tables at the terminal and the loss curve as a picture."""

import json
from pathlib import Path


def table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text: the first row is the heading, the first column is left-aligned, numbers right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def read_metrics(file: Path) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def loss_curve(metrics: Path, picture: Path, title: str) -> None:
    """Draws training loss (each step, and smoothed) and validation loss of a run's metrics.jsonl as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(metrics)
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    checks = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    smooth, smoothed = steps[0][1], []
    for _, loss in steps:
        smooth += 0.1 * (loss - smooth)
        smoothed.append(smooth)
    axes.plot(*zip(*steps), color="#9ecae1", linewidth=1, label="training, each step")
    axes.plot([step for step, _ in steps], smoothed, color="#3182bd", linewidth=2, label="training, smoothed")
    if checks:
        axes.plot(*zip(*checks), color="#e6550d", marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss a trained token", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture)
    pyplot.close(figure)
