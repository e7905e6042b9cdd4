"""Multiple choice: items/s of plaintune and of lm-evaluation-harness on MMLU, five examples before each question.

    python benchmarks/choices_speed.py MMLU_FOLDER [--items 50] [--peer-items N] [--model M] [--peer-batch 8]

Both score the first questions of each subject with the same weights, in the dtype that plaintune picks here,
and with as many threads. The harness runs in a process of its own (tests/support/harness_scores.py; its package
`evaluate` has the name of a file here). Loading is not counted; reading the questions, tokenizing and scoring are.
The harness computes every question from its beginning, so few questions tell its items/s: --peer-items of each subject.
Prints items/s of both, their ratio, and the largest difference of two log-likelihoods; --out FILE.json keeps them.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from checkpoint import load_model
from common.device import pick_device, pick_dtype
from common.errors import run
from evals.arguments import BATCH_SIZE, evaluation_arguments
from evals.choices import log_likelihoods
from evals.multiple_choice import LETTERS, choice_task
from evals.table import CHOOSE
from interop.resolve import base_folder
from tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mmlu", type=Path)
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--model")
    parser.add_argument("--peer-items", type=int, help="questions of each subject for the harness; default: --items")
    parser.add_argument("--peer-batch", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = pick_device()
    dtype, why = pick_dtype("auto", device)
    folder = base_folder(args.model, None)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        peer_items = args.peer_items or args.items
        tasks = write_questions(args.mmlu, args.items, peer_items, work)
        model, tokenizer = load_model(folder, dtype, device), load_tokenizer(folder)
        start = time.perf_counter()
        words = ["choices", "--data", str(work / "mmlu")]
        task = choice_task(evaluation_arguments(words), str(work / "mmlu"))
        pairs = task.encode(tokenizer, model.config.max_positions)
        mine = log_likelihoods(model, pairs, BATCH_SIZE[CHOOSE])
        scores = task.score(mine)
        seconds = time.perf_counter() - start
        print(f"{len(mine)} items in {seconds:.1f} s; the harness now", flush=True)
        del model
        peer = run_harness(folder, dtype, device, args.peer_batch, tasks, work)
    # Questions of the harness, and ours by their subjects: the harness may have the first ones of each only.
    differences, hits, same = [], [], []
    for name, found in peer["tasks"].items():
        of_subject = [i for i, question in enumerate(task.questions) if question.group == name]
        for i, values in zip(of_subject, found["likelihoods"]):
            differences += [abs(a - b) for a, b in zip(mine[i], values, strict=True)]
        hits += found["items"]["acc"]
        same += [scores.items["acc"][i] for i in of_subject[: len(found["items"]["acc"])]]
    assert len(same) == len(hits)
    speed, peer_speed = len(mine) / seconds, len(hits) / peer["seconds"]
    result = {
        "items": len(mine),
        "subjects": len(tasks),
        "items_per_s": speed,
        "harness_items": len(hits),
        "harness_items_per_s": peer_speed,
        "ratio": speed / peer_speed,
        "largest_difference": max(differences),
        "accuracy": sum(scores.items["acc"]) / len(mine),
        "accuracy_of_harness_items": sum(same) / len(same),
        "harness_accuracy": sum(hits) / len(hits),
        "torch": torch.__version__,
        "device": str(device),
        "dtype": f"{dtype} ({why})",
        "threads": torch.get_num_threads(),
        "peer_batch": args.peer_batch,
    }
    for key, value in result.items():
        print(f"{key:20} {value:.4g}" if isinstance(value, float) else f"{key:20} {value}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def write_questions(mmlu: Path, items: int, peer_items: int, work: Path) -> dict:
    """Writes the first questions of each subject as both read them, and returns the harness' tasks."""
    tasks = {}
    for part in ("dev", "test"):
        (work / "mmlu" / part).mkdir(parents=True)
    for file in sorted((mmlu / "test").glob("*_test.csv")):
        subject = file.name.removesuffix("_test.csv")
        for part, most in (("dev", 5), ("test", items)):
            with open(mmlu / part / f"{subject}_{part}.csv", newline="", encoding="utf-8") as source:
                rows = list(csv.reader(source))[:most]
            with open(work / "mmlu" / part / f"{subject}_{part}.csv", "w", newline="", encoding="utf-8") as target:
                csv.writer(target).writerows(rows)
            with open(work / f"{subject}_{part}.jsonl", "w", encoding="utf-8") as lines:
                for question, *choices, letter in rows[: peer_items if part == "test" else most]:
                    record = {"question": question, "choices": choices, "answer": LETTERS.index(letter)}
                    lines.write(json.dumps(record) + "\n")
        spec = {"config": f"mmlu/default/mmlu_{subject}.yaml", "data": str(work / f"{subject}_test.jsonl")}
        tasks[subject] = spec | {"shots": 5, "shots_data": str(work / f"{subject}_dev.jsonl")}
    return tasks


def run_harness(folder: Path, dtype: torch.dtype, device: torch.device, batch: int, tasks: dict, work: Path) -> dict:
    """What the harness finds, and its seconds."""
    spec = {
        "model": str(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "batch_size": batch,
    }
    (work / "spec.json").write_text(json.dumps(spec | {"tasks": tasks}))
    script = ROOT / "tests" / "support" / "harness_scores.py"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "hub")}
    environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    words = [sys.executable, script, work / "spec.json", work / "out.json"]
    subprocess.run(words, cwd=work, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads((work / "out.json").read_text())


if __name__ == "__main__":
    run(main)
