"""Measures public files by one command each: the default base, and the same model tuned by train.py.

    python experiments/real_files.py --data FOLDER --hours 2
    python experiments/real_files.py --show

FOLDER holds the files under the names that TRAININGS and ROWS say. Each tuned model is trained on a part
of its file that is not asked for, or, where a file is a test and nothing else, on 999 examples of Alpaca.
A row is written to real_files.json as soon as it is measured; the next call goes on with the first one
that is missing. `--show` prints the table of docs/evaluation.md.

A few dozen records tell that a command works on a file and roughly what a small model does there: the
standard error of a share over 48 records is up to 7 points.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "real_files.json"
MAPS = "experiments/real_files.py"
TRANSLATE = "Translate the sentence into German."

# name: (what is prepared before, the words of train.py). DATA is the folder of files, WORK a folder for
# what is made of them.
TRAININGS: dict[str, tuple[str, str]] = {
    "banking77": ("", "--data DATA/banking77/train.csv --steps 300 --batch-size 16"),
    "ag_news": (
        "data.py split DATA/ag_news/test_3000.csv --out WORK/ag_news --test 0.2",
        "--data WORK/ag_news/train.jsonl --steps 60",
    ),
    "dialogsum": ("", "--data DATA/dialogsum.dev.jsonl --steps 40"),
    "multi30k": (
        f"{MAPS} --join DATA/multi30k/val.en DATA/multi30k/val.de --out WORK/multi30k.jsonl",
        f"--data WORK/multi30k.jsonl --system {shlex.quote(TRANSLATE)} --steps 100",
    ),
    "xquad": (
        "data.py split DATA/xquad/xquad.en.json --out WORK/xquad --test 0.2",
        "--data WORK/xquad/train.jsonl --steps 60",
    ),
    "pubmedqa": (
        f"data.py split DATA/pubmedqa_ori_pqal.json --map {MAPS}:decision --out WORK/pubmedqa --test 0.2",
        "--data WORK/pubmedqa/train.jsonl --steps 40",
    ),
    "gsm8k": (
        "data.py split DATA/gsm8k_train.jsonl --out WORK/gsm8k --test 0.05",
        "--data WORK/gsm8k/train.jsonl --steps 80",
    ),
    "mbpp": ("", f"--data DATA/mbpp.jsonl --map {MAPS}:mbpp_training_part --steps 40"),
    "alpaca": ("", "--data DATA/alpaca_en_1k.json --steps 60"),
}


class Row(NamedTuple):
    """One file. words: of evaluate.py; columns: those of the printed table that are shown, or, where a
    table has a row for each measure, the names of these rows."""

    file: str
    training: str
    words: str
    columns: tuple[str, ...]


ROWS = [
    Row("banking77, 77 labels", "banking77", "classify --data DATA/banking77/test.csv --limit 154",
        ("accuracy %", "macro F1 %")),
    Row("ag_news, 4 labels", "ag_news", "classify --data WORK/ag_news/test.jsonl --limit 96",
        ("accuracy %", "macro F1 %")),
    Row("dialogsum, three references", "dialogsum",
        "rouge --data DATA/dialogsum.test_300.jsonl --limit 48 --max-new-tokens 64",
        ("ROUGE-1", "ROUGE-2", "ROUGE-L")),
    Row("xsum", "dialogsum", "rouge --data DATA/xsum_sample.json --max-new-tokens 64",
        ("ROUGE-1", "ROUGE-2", "ROUGE-L")),
    Row("multi30k, English to German", "multi30k",
        "bleu chrf --data DATA/multi30k/test_2016_flickr.en --references DATA/multi30k/test_2016_flickr.de"
        f" --system {shlex.quote(TRANSLATE)} --limit 48", ("BLEU", "chrF2")),
    Row("xquad, English", "xquad", "f1 --data WORK/xquad/test.jsonl --limit 48 --max-new-tokens 32",
        ("F1 %", "exact %")),
    Row("pubmedqa, yes, no or maybe", "pubmedqa", "classify --data WORK/pubmedqa/test.jsonl --limit 48",
        ("accuracy %", "macro F1 %")),
    Row("gsm8k", "gsm8k", "numeric --data WORK/gsm8k/test.jsonl --limit 48 --max-new-tokens 200",
        ("numeric %",)),
    Row("HumanEval", "mbpp", "pass-at-k --data DATA/HumanEval.jsonl.gz --limit 32 --max-new-tokens 256"
        " --allow-code-execution", ("pass@1 %",)),
    Row("mbpp", "mbpp", "pass-at-k --data DATA/mbpp.jsonl --limit 32 --max-new-tokens 256"
        " --allow-code-execution", ("pass@1 %",)),
    Row("mmlu, 8 subjects, 5 shots", "alpaca", "choices --data DATA/mmlu --limit 6", ("acc %",)),
    Row("hellaswag", "alpaca", "choices --data DATA/hellaswag_val_1k.jsonl --limit 96",
        ("acc %", "acc_norm %")),
    Row("ARC-Easy (llm-foundry's form)", "alpaca", "choices --data DATA/arc_easy_icl_500.jsonl --limit 96",
        ("acc %", "acc_norm %")),
    Row("ARC-Challenge (llm-foundry's form)", "alpaca",
        "choices --data DATA/arc_challenge_icl_500.jsonl --limit 96", ("acc %", "acc_norm %")),
    Row("openbookqa", "alpaca", "choices --data DATA/openbookqa_test.jsonl --limit 96",
        ("acc %", "acc_norm %")),
    Row("TruthfulQA (from its CSV)", "alpaca", "choices --data DATA/TruthfulQA.csv --limit 96",
        ("MC1 %", "MC2 %")),
    Row("legalbench, corporate lobbying", "alpaca",
        f"classify --data DATA/legalbench_corporate_lobbying_train.tsv --map {MAPS}:lobbying",
        ("accuracy %", "macro F1 %")),
    Row("legalbench, tax owed", "alpaca", "numeric --data DATA/legalbench_sara_numeric_train.tsv"
        " --max-new-tokens 32", ("numeric %",)),
    Row("advbench", "alpaca", "refusals --data DATA/advbench_harmful_behaviors.csv --limit 60",
        ("refusal of harmful prompts %",)),
    Row("xstest", "alpaca", "refusals --data DATA/xstest_prompts.csv --limit 120",
        ("refusal of harmful prompts %", "over-refusal of harmless prompts %")),
]  # fmt: skip


# ---- functions for --map ----


def decision(record: dict) -> dict:
    """Makes a question about the abstract out of PubMedQA's record; the answer is yes, no or maybe."""
    contexts = "\n".join(record["CONTEXTS"])
    question = f"{contexts}\n{record['QUESTION']} Answer yes, no or maybe."
    return {"question": question, "answer": record["final_decision"]}


def mbpp_training_part(record: dict) -> dict | None:
    """Leaves in the tasks that MBPP's paper trains on."""
    return (
        {"prompt": record["text"], "completion": record["code"]}
        if record["task_id"] >= 601
        else None
    )


def lobbying(record: dict) -> dict:
    """Makes a question of LegalBench's bill and company; the answer is Yes or No."""
    question = (
        f"Bill: {record['bill_title']}\n{record['bill_summary']}\nCompany: {record['company_name']}\n"
        f"{record['company_description']}\nIs the bill relevant to the company? Answer Yes or No."
    )
    return {"question": question, "answer": record["answer"]}


def first_turn(record: dict) -> dict:
    """Asks the first of MT-Bench's two questions."""
    return {"prompt": record["turns"][0], "id": record["question_id"]}


# ---- measuring ----


def main() -> None:
    args = parse_words()
    if args.join:
        join(*args.join, args.out)
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if args.show:
        show(results)
        return
    data, work = args.data.resolve(), args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 3600 * args.hours
    for row in ROWS:
        if row.file in results:
            continue
        if time.monotonic() > deadline:
            break
        adapter = train(row.training, data, work)
        words = f"evaluate.py {row.words} --adapter {adapter} --versus base --show 0"
        printed, seconds = run(words, data, work)
        results[row.file] = {"printed": printed, "seconds": seconds, **scores(printed, row.columns)}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(row.file, {k: v for k, v in results[row.file].items() if k != "printed"}, flush=True)


def parse_words() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, help="folder of the public files")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "real_files",
                        help="folder for runs and split files; default: runs/real_files")  # fmt: skip
    parser.add_argument("--hours", type=float, default=3.0, help="no row is begun after these")
    parser.add_argument("--show", action="store_true", help="print the table")
    parser.add_argument("--join", nargs=2, type=Path, metavar="FILE",
                        help="make prompts and completions of two texts whose lines belong together")  # fmt: skip
    parser.add_argument("--out", type=Path, help="with --join: the JSONL to write")
    args = parser.parse_args()
    if args.join and not args.out:
        parser.error("--join needs --out")
    if not (args.join or args.show or args.data):
        parser.error("--data is wanted")
    return args


def join(prompts: Path, completions: Path, out: Path) -> None:
    """Writes a record for each pair of lines."""
    pairs = zip(prompts.read_text().splitlines(), completions.read_text().splitlines(), strict=True)
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs]
    out.write_text("\n".join(lines) + "\n")


def train(name: str, data: Path, work: Path) -> Path:
    """Returns the adapter of a training, which is made if it is not there."""
    out = work / "runs" / name
    final = out / "final"
    if not final.is_dir():
        prepare, words = TRAININGS[name]
        if prepare:
            # What a run that was stopped has left.
            shutil.rmtree(work / name, ignore_errors=True)
            run(prepare, data, work)
        _, seconds = run(f"train.py {words} --save-every 0 --overwrite --out {out}", data, work)
        print(f"trained {name} in {seconds} s", flush=True)
    return final


def run(words: str, data: Path, work: Path) -> tuple[str, int]:
    """Runs a script of the project. Returns what it printed, and its seconds."""
    words = words.replace("DATA/", f"{data}/").replace("WORK/", f"{work}/")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *shlex.split(words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{words}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    return done.stdout, round(time.monotonic() - start)


def scores(printed: str, columns: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Returns base's and adapter's values out of the tables that were printed."""
    lines = printed.splitlines()
    found: dict[str, dict[str, float]] = {"base": {}, "adapter": {}}
    for i, line in enumerate(lines):
        if not re.fullmatch("-{10,}", line):
            continue
        heads = re.split(r"\s{2,}", lines[i - 1].strip())
        for row in lines[i + 1 :]:
            if not row.strip():
                break
            name, *cells = re.split(r"\s{2,}", row.strip())
            values = dict(zip(heads, cells, strict=False))
            if name in found:
                kept = {column: float(values[column]) for column in columns if column in values}
                # The first table counts: those behind it are of parts.
                found[name] = kept | found[name]
            elif name in columns:  # a row for each measure
                for side, of_side in found.items():
                    of_side.setdefault(name, float(values[side]))
    return found


# ---- the table ----


def show(results: dict) -> None:
    """Prints a row for each file, and the trainings behind them."""
    print("| file | what is measured | base | tuned | tuned on | `evaluate.py` |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in ROWS:
        result = results.get(row.file)
        if result is None:
            print(f"| {row.file} | not measured yet | | | | |")
            continue
        base, tuned = (
            " / ".join(f"{result[side][name]:g}" for name in row.columns)
            for side in ("base", "adapter")
        )
        names = ", ".join(name.removesuffix(" %") for name in row.columns)
        words = row.words.replace("DATA/", "").replace("WORK/", "")
        print(f"| {row.file} | {names} | {base} | {tuned} | {row.training} | `{words}` |")
    print("\n| tuned on | commands |\n| --- | --- |")
    for name, (prepare, words) in TRAININGS.items():
        before = f"`{prepare}`, then " if prepare else ""
        row = f"| {name} | {before}`train.py {words}` |"
        print(row.replace("DATA/", "").replace("WORK/", ""))


if __name__ == "__main__":
    main()
