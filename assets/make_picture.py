"""Draws assets/result.png from a run of the bundled task: the loss, and exact answers before, with examples in the
prompt, and after.

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
    steps = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    checks = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    axes.plot(*zip(*steps, strict=True), color=BLUE, linewidth=0.9, alpha=0.6, label="training")
    axes.plot(
        *zip(*checks, strict=True), color=ORANGE, marker="o", markersize=4, label="validation"
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss per trained token")
    axes.set_title(
        "213 steps of LoRA on a laptop's CPU"
        if len(steps) == 213
        else f"{len(steps)} steps of LoRA"
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def draw_answers(axes, exact: dict[str, list[int]]) -> None:
    shares = [100 * right / total for right, total in exact.values()]
    names = [name.replace(", ", "\n") for name in exact]
    bars = axes.bar(names, shares, color=[GRAY, GRAY, BLUE], width=0.6)
    for bar, share, (_, total) in zip(bars, shares, exact.values(), strict=True):
        height = bar.get_height()
        axes.text(
            bar.get_x() + bar.get_width() / 2, height + 2, f"{share:.1f} %\nof {total}", ha="center"
        )
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 25))
    axes.set_ylabel("exact answers, %")
    axes.set_title("Unseen booking notes to JSON records")


def main(run: Path) -> None:
    lines = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    comparison = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.6), dpi=110)
    draw_losses(left, lines)
    draw_answers(right, comparison["exact"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(__file__).resolve().parent / "result.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
