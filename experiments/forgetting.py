"""Measures what each method learns of the bundled task, and what it forgets meanwhile.

    python experiments/forgetting.py --general wikitext.txt --hellaswag hellaswag.jsonl --hours 3

A cell is one training: a method, a means against forgetting, a rate and a seed. Of each method the
rate is swept with one seed, without a means; then replay and EWC are tried at the best of these
rates, and all of it is repeated with two seeds more. Each cell is written to forgetting.json as
soon as it is measured, and the next call goes on with the first one that is missing. `--show` prints
the table and draws the picture of what is there.

What stands in the JSON is measured on data that no cell trains on, also not by replay or EWC.
"""

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from checkpoint import read_config
from evals.arguments import command_line
from evals.choices import log_likelihoods
from evals.multiple_choice import read_choice_task
from evals.targets import Opened
from experiments.cells import (
    add_result,
    exact_answers,
    loss_on_text,
    read_results,
    run_script,
    spread,
)

RESULTS = ROOT / "experiments" / "forgetting.json"
PICTURE = ROOT / "experiments" / "forgetting.png"
STEPS = 80
SEEDS = (0, 1, 2)
NUM_QUESTIONS = 100  # of the task
NUM_STORIES = 200  # of HellaSwag
NUM_PIECES, PIECE = 40, 512  # of general text, and the tokens of each
GENERAL_IN_TRAINING = "assets/general.txt"  # for replay and EWC

ADAPTER_RATES = (6.5e-4, 1.3e-3, 2.6e-3, 5.2e-3)
HIGH_RANK_RATES = (1.3e-3, 2.6e-3, 5.2e-3, 1.04e-2)
# name: (flags, rates)
METHODS: dict[str, tuple[list[str], tuple[float, ...]]] = {
    "full": (["--method", "full"], (7.5e-5, 2.5e-4, 7.5e-4, 2.25e-3)),
    "LoRA, rank 1": (["--rank", "1"], ADAPTER_RATES),
    "LoRA, rank 4": (["--rank", "4"], ADAPTER_RATES),
    "LoRA, rank 16": (["--rank", "16"], HIGH_RANK_RATES),
    "QLoRA, rank 16": (["--method", "qlora", "--rank", "16"], HIGH_RANK_RATES),
}
# What rounding the base to 4 bits costs by itself, which is in QLoRA's numbers.
BASES = {"base": [], "base in 4 bits": ["--quant", "nf4"]}
NO_MEANS = "nothing"
MEANS = {
    NO_MEANS: [],
    # A tenth of the examples, in pieces no longer than the task's own: longer ones would be most of a step.
    "replay": ["--replay", f"{GENERAL_IN_TRAINING}=0.1", "--seq-len", "128"],
    "EWC": ["--ewc", "1000", "--ewc-data", GENERAL_IN_TRAINING],
}


class Cell(NamedTuple):
    """One training."""

    method: str
    means: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method} | {self.means} | {self.rate:g} | seed {self.seed}"


def main() -> None:
    args = parse_words()
    if args.show:
        show(read_results(RESULTS))
        return
    deadline = time.monotonic() + 3600 * args.hours
    for name, words in BASES.items():
        if name not in read_results(RESULTS):
            add_result(RESULTS, name, scores_of(words, args))
    while time.monotonic() < deadline:
        cell = next_cell(read_results(RESULTS), args.methods)
        if cell is None:
            print("all cells are measured")
            return
        result = run_cell(cell, args)
        add_result(RESULTS, cell.key, result)
        print(cell.key, result, flush=True)


def parse_words() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--general", help="text whose loss says what is forgotten")
    parser.add_argument("--hellaswag", help="HellaSwag's JSONL")
    parser.add_argument("--hours", type=float, default=8.0, help="no cell is begun after these")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS),
                        help="measure only these, so that another process can take the others")  # fmt: skip
    parser.add_argument("--show", action="store_true", help="print the table, draw the picture")
    args = parser.parse_args()
    if not args.show and not (args.general and args.hellaswag):
        parser.error("--general and --hellaswag are wanted")
    return args


# ---- which cell is next ----


def next_cell(results: dict, methods: list[str]) -> Cell | None:
    """Returns the first cell that has no result: the sweeps, then the means, then the other seeds."""
    for method in methods:
        for rate in METHODS[method][1]:
            cell = Cell(method, NO_MEANS, rate, SEEDS[0])
            if cell.key not in results:
                return cell
    for seed in SEEDS:
        for means in MEANS:
            for method in methods:
                cell = Cell(method, means, best_rate(method, results), seed)
                if cell.key not in results:
                    return cell
    return None


def best_rate(method: str, results: dict) -> float:
    """Returns the rate with the most exact answers; of equal ones that with the lower general loss."""

    def worth(rate: float) -> tuple[float, float]:
        result = results[Cell(method, NO_MEANS, rate, SEEDS[0]).key]
        return result["exact"], -result["general_loss"]

    return max(METHODS[method][1], key=worth)


# ---- measuring ----


def run_cell(cell: Cell, args: argparse.Namespace) -> dict:
    """Trains a cell, and measures the model at its end."""
    folder = Path(tempfile.mkdtemp(prefix="forgetting-"))
    out = folder / "run"
    words = [
        *METHODS[cell.method][0], *MEANS[cell.means], "--lr", f"{cell.rate:g}", "--seed", f"{cell.seed}",
        "--steps", f"{STEPS}", "--data", "assets/booking_train.jsonl", "assets/general_chat.jsonl",
        "--val", "assets/booking_val.jsonl", "--eval-every", "0", "--save-every", "0", "--out", str(out),
    ]  # fmt: skip
    try:
        printed = run_script("train.py", *words)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
        steps = [line for line in lines if "tokens_per_s" in line]
        validations = [line for line in lines if "val_loss" in line]
        result = {
            "trained_parameters": int(
                re.search(r"([\d,]+) parameters trained", printed)[1].replace(",", "")
            ),
            "seconds": round(steps[-1]["seconds"], 1),
            "memory_mb": round(max(line["memory_mb"] for line in steps)),
            "val_loss": validations[-1]["val_loss"],
            "kl_base": validations[-1]["kl_base"],
        }
        flag = "--model" if cell.method == "full" else "--adapter"
        target = [flag, str(out / "final")]
        if cell.method.startswith("QLoRA"):
            # On the numbers that the adapter was trained on.
            target += BASES["base in 4 bits"]
        return result | scores_of(target, args)
    finally:
        shutil.rmtree(folder)


def scores_of(target: list[str], args: argparse.Namespace) -> dict:
    """Returns exact answers to the task's questions, loss on general text, and HellaSwag's accuracies
    (in %) of one model. target: the words that name it."""
    exact, model, tokenizer = exact_answers(target, NUM_QUESTIONS)
    text = ["--data", args.general, "--limit", f"{NUM_PIECES}", "--seq-len", f"{PIECE}"]
    general_loss = loss_on_text(target, model, tokenizer, text)
    limit = read_config(model.source).max_positions

    chosen = command_line(
        ["choices", "--data", args.hellaswag, "--limit", f"{NUM_STORIES}", *target]
    )
    task = read_choice_task(chosen, Opened(chosen))
    scores = task.score(log_likelihoods(model, task.encode(tokenizer, limit), 64)).columns
    return {
        "exact": exact,
        "general_loss": general_loss,
        "hellaswag_acc": scores["acc %"],
        "hellaswag_acc_norm": scores["acc_norm %"],
    }


# ---- what came of it ----


def show(results: dict) -> None:
    """Prints a row for each method and means at its best rate, the mean of its seeds with the lowest and
    the highest; says what is missing; and draws exact answers against the rise of general loss."""
    base = results["base"]
    headings = ("method", "against forgetting", "rate", "seeds", "exact %", "rise of general loss",
                "change of HellaSwag acc_norm", "KL to base", "trained", "time", "memory")  # fmt: skip
    print(f"| {' | '.join(headings)} |")
    print("| --- " * len(headings) + "|")
    print(
        f"| base | | | | {base['exact']:.0f} | loss {base['general_loss']:.3f} |"
        f" {base['hellaswag_acc_norm']:.1f} % | 0 | | | |"
    )
    rounded = results.get("base in 4 bits")
    if rounded:
        rise = rounded["general_loss"] - base["general_loss"]
        change = rounded["hellaswag_acc_norm"] - base["hellaswag_acc_norm"]
        exact = rounded["exact"]
        print(f"| base in 4 bits | | | | {exact:.0f} | {rise:+.3f} | {change:+.1f} | | | | |")
    points = []
    for method in METHODS:
        for means in MEANS:
            try:
                rate = best_rate(method, results)
            except KeyError:
                print(f"| {method} | {means} | not swept yet |")
                continue
            keys = [Cell(method, means, rate, seed).key for seed in SEEDS]
            found = [results[key] for key in keys if key in results]
            if not found:
                print(f"| {method} | {means} | {rate:g} | 0 |")
                continue
            rise = [each["general_loss"] - base["general_loss"] for each in found]
            points.append((method, means, [each["exact"] for each in found], rise))
            print(
                f"| {method} | {means} | {rate:g} | {len(found)} |"
                f" {spread([each['exact'] for each in found], '.0f')} |"
                f" {spread(rise, '+.3f')} |"
                f" {spread([each['hellaswag_acc_norm'] - base['hellaswag_acc_norm'] for each in found], '+.1f')} |"
                f" {spread([each['kl_base'] for each in found], '.2f')} |"
                f" {found[0]['trained_parameters']:,} | {fastest(method, means, results)} |"
                f" {found[0]['memory_mb'] / 1000:.1f} GB |"
            )
    print(correlations(results, base))
    if points:
        draw(points, results)


def fastest(method: str, means: str, results: dict) -> str:
    """Returns the seconds of the fastest training of a method and means, at any rate: all have equally
    many steps, and what else the machine does can only make one slower. "" where none was timed: a run that
    was halted meanwhile has None."""
    start = f"{method} | {means} | "
    timed = [result["seconds"] for key, result in results.items() if key.startswith(start)]
    timed = [seconds for seconds in timed if seconds is not None]
    return f"{min(timed):.0f} s" if timed else ""


def correlations(results: dict, base: dict) -> str:
    """Returns how well the gauge ranks the runs by what they have forgotten: Spearman's coefficients, each
    with the 95 % interval of a bootstrap over the runs."""
    import numpy as np
    from scipy import stats

    runs = []
    starts = []  # what each was trained from
    for key, result in results.items():
        if key not in BASES:
            runs.append(result)
            is_rounded = key.startswith("QLoRA") and "base in 4 bits" in results
            starts.append(results["base in 4 bits"] if is_rounded else base)
    if len(runs) < 4:
        return "fewer than 4 runs: no correlation"
    gauge = np.array([run["kl_base"] for run in runs])
    forgotten = {
        "rise of general loss": [
            run["general_loss"] - start["general_loss"]
            for run, start in zip(runs, starts, strict=True)
        ],
        "fall of HellaSwag": [
            start["hellaswag_acc_norm"] - run["hellaswag_acc_norm"]
            for run, start in zip(runs, starts, strict=True)
        ],
    }
    said = []
    for name, values in forgotten.items():
        values = np.array(values)
        generator = np.random.default_rng(0)
        drawn = generator.integers(0, len(runs), (2000, len(runs)))
        many = [stats.spearmanr(gauge[rows], values[rows]).statistic for rows in drawn]
        low, high = np.nanquantile(many, (0.025, 0.975))
        rho = stats.spearmanr(gauge, values).statistic
        said.append(
            f"gauge and {name}: {rho:+.2f} ({low:+.2f} to {high:+.2f}) over {len(runs)} runs"
        )
    return "\n".join(said)


def draw(points: list[tuple[str, str, list[float], list[float]]], results: dict) -> None:
    """Draws what is learned against what is forgotten: a line for the rates of each method, and large marks
    for the mean of the seeds at the best rate, with each means against forgetting.

    points: (method, means, exact, rise of loss).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = dict(
        zip(METHODS, ("#222222", "#7fcdbb", "#4292c6", "#08306b", "#dd6b20"), strict=True)
    )
    markers = dict(zip(MEANS, "osD", strict=True))
    figure, axes = pyplot.subplots(figsize=(8, 4.8))
    base = results["base"]["general_loss"]
    for method, (_, rates) in METHODS.items():
        swept = [results.get(Cell(method, NO_MEANS, rate, SEEDS[0]).key) for rate in rates]
        swept = [result for result in swept if result]
        rises = [result["general_loss"] - base for result in swept]
        exact = [result["exact"] for result in swept]
        axes.plot(
            rises, exact, color=colors[method], marker=".", linewidth=1, alpha=0.6, label=method
        )
    for method, means, exact, rise in points:
        axes.scatter(
            statistics.mean(rise), statistics.mean(exact), color=colors[method], marker=markers[means], s=70,
            edgecolors="white", zorder=3,
        )  # fmt: skip
    for means, marker in markers.items():
        label = "best rate" if means == NO_MEANS else f"best rate, {means}"
        axes.scatter([], [], color="#666666", marker=marker, s=50, label=label)
    # Rises of hundredths and of whole nats, and some below 0.
    axes.set_xscale("symlog", linthresh=0.02)
    ticks = [0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("forgotten: rise of the loss on general text, nats a token")
    axes.set_ylabel("learned: exact answers, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(PICTURE, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
