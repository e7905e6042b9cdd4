"""Draws assets/result.png from a run of the bundled task: the loss, and exact answers before, with
examples in the prompt, and after.

    python train.py --out runs/task && python assets/make_picture.py runs/task
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

GRAY, BLUE, ORANGE = "#9aa5b1", "#2b6cb0", "#dd6b20"


def draw_losses(axes, lines: list[dict]) -> None:
    """Draws the losses of a run over its steps. lines: of metrics.jsonl."""
    steps = []
    losses = []
    val_steps = []
    val_losses = []
    for line in lines:
        # A validation has a line of its own, and a step that was left out has no loss.
        if line.get("loss") is not None:
            steps.append(line["step"])
            losses.append(line["loss"])
        if "val_loss" in line:
            val_steps.append(line["step"])
            val_losses.append(line["val_loss"])
    axes.plot(steps, losses, color=BLUE, linewidth=0.9, alpha=0.6, label="training")
    axes.plot(val_steps, val_losses, color=ORANGE, marker="o", markersize=4, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per trained token")
    title = f"{len(steps)} steps of LoRA"
    # The run of the README, which has so many steps, was made on a laptop.
    if len(steps) == 213:
        title += " on a laptop's CPU"
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def draw_answers(axes, exact: dict[str, list[int]]) -> None:
    """Draws a bar for each way to answer. exact: {way: [exact answers, all answers]}."""
    names = []
    shares = []
    labels = []
    for name, (right, total) in exact.items():
        share = 100 * right / total
        names.append(name.replace(", ", "\n"))
        shares.append(share)
        labels.append(f"{share:.1f} %\nof {total}")
    # The two bars without training are gray.
    bars = axes.bar(names, shares, color=[GRAY, GRAY, BLUE], width=0.6)
    for bar, label in zip(bars, labels, strict=True):
        middle = bar.get_x() + bar.get_width() / 2
        axes.text(middle, bar.get_height() + 2, label, ha="center")
    # Over 100 %, so that the label of a full bar has room.
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 25))
    axes.set_ylabel("exact answers, %")
    axes.set_title("Unseen booking notes to JSON records")


def main(run: Path) -> None:
    """Draws the picture of a run. run: the folder that train.py --out named."""
    metrics = (run / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in metrics.splitlines()]
    comparison = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.6), dpi=110)
    draw_losses(left, lines)
    draw_answers(right, comparison["exact"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    assets = Path(__file__).resolve().parent
    figure.savefig(assets / "result.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
