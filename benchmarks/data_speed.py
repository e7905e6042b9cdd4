"""Tokenising large files: ours against `datasets.map` with the fast tokenizer, in one run, each in its own process.

    python benchmarks/data_speed.py                      100,000 examples, three rounds, alternating
    python benchmarks/data_speed.py --whole 1000000      ours alone: inspect, then a second start; time and memory

Ours renders each conversation twice, proves its mask, and writes ids and mask; `datasets.map` renders and tokenises,
without a mask: one by one as trl does, and in batches, with one process and with one a core. Memory: the proportional
set sizes of all processes together, the largest of four samples a second.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = """
import sys, time
sys.path.insert(0, {root!r})
from interop.resolve import model_folder
from dataset.formats import open_source
from dataset.token_cache import tokenized_rows
from tokenizer import load_tokenizer
tokenizer = load_tokenizer(model_folder(None))
start = time.perf_counter()
made = tokenized_rows(open_source({file!r}), tokenizer)
print(len(made.ids), time.perf_counter() - start)
"""
THEIRS = """
import sys, time
sys.path.insert(0, {root!r})
import datasets, transformers
from interop.resolve import model_folder
tokenizer = transformers.AutoTokenizer.from_pretrained(str(model_folder(None)))
datasets.disable_progress_bars()
one = lambda x: {{"input_ids": tokenizer.apply_chat_template(x["messages"], tokenize=True, return_dict=False)}}
def many(x):
    texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in x["messages"]]
    return {{"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}}
start = time.perf_counter()
data = datasets.load_dataset("json", data_files={file!r}, split="train", cache_dir={cache!r})
made = data.map({function}, batched={batched}, num_proc={processes}, remove_columns=data.column_names)
seconds = time.perf_counter() - start
print(sum(map(len, made.with_format("numpy")["input_ids"])), seconds)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", type=int, help="so many examples by ours alone")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with tempfile.TemporaryDirectory() as work:
        file = Path(work, "examples.jsonl")
        generate(file, args.whole or args.examples)
        print(f"{args.whole or args.examples:,} examples, {file.stat().st_size / 1e6:,.0f} MB; {os.cpu_count()} cores")
        whole(file, work) if args.whole else compare(file, work, args.rounds)


def generate(file: Path, count: int) -> None:
    """Questions and answers of about 1 kB, put together of the sentences of the bundled texts."""
    draw = random.Random(0)
    text = (ROOT / "assets" / "general.txt").read_text(encoding="utf-8")
    sentences = [each.strip() for each in re.split(r"(?<=[.!?])\s+", text) if 20 < len(each) < 200]
    with open(file, "w", encoding="utf-8") as out:
        for i in range(count):
            question = f"{' '.join(draw.choices(sentences, k=2))} ({i})"
            answer = " ".join(draw.choices(sentences, k=draw.randint(2, 16)))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": turns}) + "\n")


def compare(file: Path, work: str, rounds: int) -> None:
    known = {"root": str(ROOT), "file": str(file)}
    processes = os.cpu_count()
    sides = {"plaintune, ids and mask": lambda n: OURS.format(**known)}
    for name, function, batched, count in (
        ("datasets.map, one by one", "one", False, 1),
        (f"datasets.map, one by one, {processes} processes", "one", False, processes),
        ("datasets.map, batched", "many", True, 1),
        (f"datasets.map, batched, {processes} processes", "many", True, processes),
    ):  # fmt: skip
        more = {"function": function, "batched": batched, "processes": count if count > 1 else None}
        sides[name] = lambda n, more=more: THEIRS.format(**known, **more, cache=f"{work}/{n}")
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    memory: dict[str, float] = {}
    for n in range(rounds):
        for i, (name, program) in enumerate(sides.items()):
            os.environ["PLAINTUNE_CACHE"] = fresh_cache(work)
            said, peak = measured([sys.executable, "-c", program(f"{n}-{i}")])
            tokens, seconds = said.split()[-2:]
            speeds[name].append(int(tokens) / float(seconds))
            memory[name] = max(memory.get(name, 0), peak)
    ours = speeds.pop("plaintune, ids and mask")
    print(f"plaintune, ids and mask: {statistics.median(ours):,.0f} tokens/s, "
          f"{memory['plaintune, ids and mask'] / 1e6:,.0f} MB")  # fmt: skip
    for name, theirs in speeds.items():
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        said = f"{name}: {statistics.median(theirs):,.0f} tokens/s, {memory[name] / 1e6:,.0f} MB"
        print(f"{said}; ours {ratios[len(ratios) // 2]:.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def whole(file: Path, work: str) -> None:
    os.environ["PLAINTUNE_CACHE"] = fresh_cache(work)
    for name in ("first", "second"):
        start = time.perf_counter()
        command = [sys.executable, ROOT / "data.py", "inspect", file, "--show", "1"]
        said, peak = measured(command)
        print(f"inspect, {name} time: {time.perf_counter() - start:.0f} s, peak {peak / 1e6:,.0f} MB")
    print(said)
    said, peak = measured([sys.executable, "-c", OURS.format(root=str(ROOT), file=str(file))])
    tokens, seconds = said.split()[-2:]
    print(f"a second start reads the rows in {float(seconds):.1f} s (the file's hash is most of it)")
    os.environ["PLAINTUNE_CACHE"] = fresh_cache(work)
    said, peak = measured([sys.executable, "-c", OURS.format(root=str(ROOT), file=str(file))])
    tokens, seconds = said.split()[-2:]
    print(f"tokenised: {int(tokens):,} tokens in {float(seconds):.0f} s, {int(tokens) / float(seconds):,.0f} tokens/s, "
          f"peak {peak / 1e6:,.0f} MB")  # fmt: skip


def fresh_cache(work: str) -> str:
    """A cache with the converted model and no rows."""
    sys.path.insert(0, str(ROOT))
    from interop.resolve import model_folder

    folder = Path(work, "cache")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    kept = os.environ.pop("PLAINTUNE_CACHE", None)
    if kept and not kept.startswith(work):
        os.environ["REAL_CACHE"] = kept
    if "REAL_CACHE" in os.environ:
        os.environ["PLAINTUNE_CACHE"] = os.environ["REAL_CACHE"]
    model = model_folder(None)
    (folder / model.name).symlink_to(model)
    return str(folder)


def measured(command: list) -> tuple[str, float]:
    """What a command prints, and the most memory that it and its children hold together, bytes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    peak, done = [0.0], threading.Event()

    def watch():
        while not done.wait(0.25):
            peak[0] = max(peak[0], sum(map(proportional, tree(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    said, _ = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command}: ended with {process.returncode}")
    return said, peak[0]


def tree(pid: int) -> list[int]:
    found = [pid]
    for each in found:
        try:
            for thread in os.listdir(f"/proc/{each}/task"):
                found += map(int, Path(f"/proc/{each}/task/{thread}/children").read_text().split())
        except OSError:
            pass
    return found


def proportional(pid: int) -> float:
    """A process's own memory, and its share of what it has in common with others; pages of mapped files left out, which
    the system may take back."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return 1024.0 * sum(int(n) for n in re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+)", text, re.MULTILINE))


if __name__ == "__main__":
    main()
