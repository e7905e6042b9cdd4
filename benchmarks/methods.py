"""Compares all methods on the bundled task, each at the best of its own rates.

    python benchmarks/methods.py --hours 8          trains and measures; goes on where an earlier call has stopped
    python benchmarks/methods.py --show             prints the table and draws the picture of what is there

A comparison at one rate for all would be of rates. So each method is trained at four rates with one seed, and then
measured at the best of them (lowest validation loss) with three seeds: exact answers, loss on general text and the
gauge KL(base || tuned), trained parameters, size of the files, memory, time, and how fast the result writes, as it is
and merged. Each cell is written to results/cpu/methods.json as soon as it is measured.

The short form: STEPS steps of 8 examples. The general text is never trained on. Nothing else may run meanwhile.
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

from checkpoint import load_model
from common.console import format_duration
from common.device import pick_device, pick_dtype
from common.files import atomic_file
from experiments.cells import add_result, exact_answers, loss_on_text, read_results, run_script, spread
from interop.resolve import base_folder, pick_tokenizer
from methods import put_adapter_on

RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "methods.json"
PICTURE = ROOT / "assets" / "methods.png"
STEPS = 48
SEEDS = (0, 1, 2)
NUM_QUESTIONS = 100
TASK = "--data assets/booking_train.jsonl assets/general_chat.jsonl --val assets/booking_val.jsonl".split()
GENERAL = "assets/general.txt"
PIECE = 500  # tokens of general text at a time
# Written by the result, to time it: so many answers at a time, of so many tokens.
ANSWERS, TOKENS = 8, 48


class Compared(NamedTuple):
    """A row of the comparison. words: of train.py. rates: from low to high, each twice the one before."""

    words: str
    rates: tuple[float, ...]
    can_merge: bool = True


METHODS = {
    "full": Compared("--method full", (1.3e-4, 2.5e-4, 5e-4, 1e-3), False),
    "LoRA": Compared("--rank 8", (1.3e-3, 2.6e-3, 5.2e-3, 1e-2)),
    "LoRA, rank 32, rsLoRA": Compared("--rank 32 --rslora", (6.5e-4, 1.3e-3, 2.6e-3, 5.2e-3)),
    "LoRA+": Compared("--rank 8 --lora-plus 16", (3.2e-4, 6.5e-4, 1.3e-3, 2.6e-3)),
    "DoRA": Compared("--rank 8 --dora", (1.3e-3, 2.6e-3, 5.2e-3, 1e-2)),
    "PiSSA": Compared("--rank 8 --init pissa", (2e-4, 4e-4, 8e-4, 1.6e-3)),
    "QLoRA": Compared("--method qlora --rank 8", (1.3e-3, 2.6e-3, 5.2e-3, 1e-2)),
    "LoftQ": Compared("--method qlora --rank 8 --init loftq", (2e-4, 4e-4, 8e-4, 1.6e-3)),
    "VeRA": Compared("--method vera", (1.3e-2, 2.6e-2, 5.2e-2, 1e-1)),
    "bottleneck, Houlsby": Compared("--method bottleneck --placement houlsby", (1.3e-3, 2.6e-3, 5.2e-3, 1e-2), False),
    "bottleneck, Pfeiffer": Compared("--method bottleneck --placement pfeiffer", (1.3e-3, 2.6e-3, 5.2e-3, 1e-2), False),
    "bottleneck, parallel": Compared("--method bottleneck --placement parallel", (1.3e-3, 2.6e-3, 5.2e-3, 1e-2), False),
    "prompt tuning": Compared("--method prompt-tuning", (5e-2, 1e-1, 2e-1, 4e-1), False),
    "P-tuning": Compared("--method p-tuning", (5e-4, 1e-3, 2e-3, 4e-3), False),
    "prefix tuning": Compared("--method prefix-tuning", (6.5e-4, 1.3e-3, 2.6e-3, 5.2e-3), False),
    "(IA)^3": Compared("--method ia3", (1.4e-2, 2.8e-2, 5.6e-2, 1.1e-1)),
}


def main() -> None:
    args = parse_words()
    if args.show:
        show(read_results(RESULTS))
        return
    deadline = time.monotonic() + 3600 * args.hours
    if "base" not in read_results(RESULTS):
        add_result(RESULTS, "base", scores_of([]) | {"unmerged": writing_speed(None, None)})
    while time.monotonic() < deadline:
        cell = next_cell(read_results(RESULTS), args.methods)
        if cell is None:
            print("all cells are measured")
            return
        result = run_cell(cell)
        add_result(RESULTS, cell.key, result)
        print(cell.key, result, flush=True)


def parse_words() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--hours", type=float, default=8.0, help="no cell is begun after these")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="measure only these")
    parser.add_argument("--show", action="store_true", help="print the table, draw the picture")
    return parser.parse_args()


class Cell(NamedTuple):
    """One training. is_whole: all is measured, and not the validation loss alone."""

    method: str
    rate: float
    seed: int
    is_whole: bool

    @property
    def key(self) -> str:
        return f"{self.method} | {self.rate:g} | {'seed ' + str(self.seed) if self.is_whole else 'rate'}"


def next_cell(results: dict, methods: list[str]) -> Cell | None:
    """Returns the first cell that has no result: all rates, then the best of each with the first seed, and so on."""
    for method in methods:
        for rate in METHODS[method].rates:
            cell = Cell(method, rate, 0, False)
            if cell.key not in results:
                return cell
    for seed in SEEDS:
        for method in methods:
            cell = Cell(method, best_rate(method, results), seed, True)
            if cell.key not in results:
                return cell
    return None


def best_rate(method: str, results: dict) -> float:
    """Returns the rate with the lowest validation loss."""
    return min(METHODS[method].rates, key=lambda rate: results[Cell(method, rate, 0, False).key]["val_loss"])


# ---- measuring ----


def run_cell(cell: Cell) -> dict:
    """Trains a cell, and measures what came of it."""
    folder = Path(tempfile.mkdtemp(prefix="methods-"))
    try:
        out = folder / "run"
        words = [
            *METHODS[cell.method].words.split(), *TASK, "--steps", f"{STEPS}", "--lr", f"{cell.rate:g}",
            "--seed", f"{cell.seed}", "--eval-every", "0", "--save-every", "0", "--out", str(out),
        ]  # fmt: skip
        printed = run_script("train.py", *words)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
        steps = [line for line in lines if "tokens_per_s" in line]
        last = [line for line in lines if "val_loss" in line][-1]
        result = {"val_loss": last["val_loss"], "kl_base": last["kl_base"]}
        if not cell.is_whole:
            return result
        final = out / "final"
        trained = re.search(r"([\d,]+) parameters trained", printed)
        assert trained is not None, printed
        weights = [file for file in final.rglob("*.safetensors") if "base" not in file.parts]
        result |= {
            "trained_parameters": int(trained[1].replace(",", "")),
            "file_bytes": sum(file.stat().st_size for file in weights),
            "seconds": round(steps[-1]["seconds"], 1),
            "tokens_per_s": round(statistics.median(line["tokens_per_s"] for line in steps)),
            "memory_mb": round(max(line["memory_mb"] for line in steps)),
        }
        is_full = cell.method == "full"
        target = ["--model" if is_full else "--adapter", str(final)]
        is_in_4_bits = "qlora" in METHODS[cell.method].words
        if is_in_4_bits and cell.method != "LoftQ":
            # On the numbers that the adapter was trained on.
            target += ["--quant", "nf4"]
        result |= scores_of(target)
        quant = "nf4" if "--quant" in target else None
        model, adapter = (final, None) if is_full else (None, final)
        result["unmerged"] = writing_speed(model, adapter, quant)
        if METHODS[cell.method].can_merge:
            run_script("convert.py", "merge", str(final), str(folder / "merged"))
            result["merged"] = writing_speed(folder / "merged", None)
        return result
    finally:
        shutil.rmtree(folder)


def scores_of(target: list[str]) -> dict:
    """Returns exact answers to the task's questions (in %) and the loss on general text. target: words that name a
    model; [] for the base."""
    exact, model, tokenizer = exact_answers(target, NUM_QUESTIONS)
    text = ["--data", GENERAL, "--seq-len", f"{PIECE}"]
    return {"exact": exact, "general_loss": loss_on_text(target, model, tokenizer, text)}


def writing_speed(model_folder: Path | None, adapter: Path | None, quant: str | None = None) -> float:
    """Returns the tokens per second of ANSWERS answers of TOKENS tokens to notes of the task, the best of three."""
    device = pick_device("auto")
    dtype, _ = pick_dtype("auto", device)
    quiet = lambda *_: None
    base = base_folder(None if model_folder is None else str(model_folder), adapter, quiet)
    tokenizer = pick_tokenizer(base, adapter, None)
    model = load_model(base, dtype, device, quant)
    if adapter is not None:
        put_adapter_on(model, adapter, quiet)
    prompts = []
    for line in (ROOT / "assets" / "booking_test.jsonl").read_text(encoding="utf-8").splitlines()[:ANSWERS]:
        note = json.loads(line)["messages"][:-1]
        ids, _ = tokenizer.render(note, add_generation_prompt=True)
        prompts.append(ids)
    speeds = []
    for _ in range(3):
        start = time.perf_counter()
        answers = model.generate(prompts, TOKENS, stop=())
        speeds.append(sum(map(len, answers)) / (time.perf_counter() - start))
    return round(max(speeds), 1)


# ---- what came of it ----


def show(results: dict) -> None:
    """Prints a row for each method at its best rate, the mean of its seeds with the lowest and the highest."""
    base = results["base"]
    headings = ("method", "rate", "seeds", "exact answers, %", "validation loss", "rise of general loss", "KL to base",
                "trained", "file", "memory", "training", "tokens/s written", "merged")  # fmt: skip
    print(f"| {' | '.join(headings)} |")
    print("| --- " * len(headings) + "|")
    cells = ("base", "", "", f"{base['exact']:.0f}", "", f"loss {base['general_loss']:.3f}", "0", "", "", "", "")
    print(f"| {' | '.join(cells)} | {base['unmerged']:.0f} | |")
    points = []
    for method, row in METHODS.items():
        rates = [Cell(method, rate, 0, False).key for rate in row.rates]
        if not all(key in results for key in rates):
            print(f"| {method} | {sum(key in results for key in rates)} of {len(rates)} rates |")
            continue
        rate = best_rate(method, results)
        edge = " (at the end of what was tried)" if rate in (row.rates[0], row.rates[-1]) else ""
        keys = [Cell(method, rate, seed, True).key for seed in SEEDS]
        runs = [results[key] for key in keys if key in results]
        if not runs:
            loss = results[Cell(method, rate, 0, False).key]["val_loss"]
            print(f"| {method} | {rate:g}{edge} | 0 | | {loss:.4f} |")
            continue
        rise = [run["general_loss"] - base["general_loss"] for run in runs]
        exact = [run["exact"] for run in runs]
        points.append((method, exact, rise))
        first = runs[0]
        merged = [run["merged"] for run in runs if "merged" in run]
        cells = [
            method,
            f"{rate:g}{edge}",
            f"{len(runs)}",
            spread(exact, ".0f"),
            spread([run["val_loss"] for run in runs], ".3f"),
            spread(rise, "+.3f"),
            spread([run["kl_base"] for run in runs], ".2f"),
            f"{first['trained_parameters']:,}",
            f"{first['file_bytes'] / 1e6:.1f} MB",
            f"{first['memory_mb'] / 1000:.1f} GB",
            format_duration(min(run["seconds"] for run in runs)),
            f"{max(run['unmerged'] for run in runs):.0f}",
            f"{max(merged):.0f}" if merged else "",
        ]
        print(f"| {' | '.join(cells)} |")
    if points:
        draw(points)


def draw(points: list[tuple[str, list[float], list[float]]]) -> None:
    """Draws what is learnt against what is forgotten: a cross for each method, as wide and high as its seeds differ."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    colors = pyplot.get_cmap("tab20").colors
    for (method, exact, rise), color in zip(points, colors, strict=False):
        x, y = statistics.mean(rise), statistics.mean(exact)
        wide = [[x - min(rise)], [max(rise) - x]]
        high = [[y - min(exact)], [max(exact) - y]]
        axes.errorbar([x], [y], xerr=wide, yerr=high, marker="o", color=color, label=method, capsize=2, linestyle="")
    axes.set_xlabel("forgotten: rise of the loss on general text, nats a token")
    axes.set_ylabel("learnt: exact answers, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    with atomic_file(PICTURE) as tmp:
        figure.savefig(tmp, format="png", bbox_inches="tight")


if __name__ == "__main__":
    main()
