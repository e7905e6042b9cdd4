"""Runs of train.py in processes of their own: torchrun, what they wrote, and how two runs are compared."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import chat_base, sentence

ROOT = Path(__file__).resolve().parents[2]


def records(path: Path, count: int, seed: int) -> Path:
    lengths = torch.randint(1, 25, (count, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [
        {"prompt": sentence(seed + 2 * i, a // 2 + 1), "completion": sentence(seed + 2 * i + 1, b)}
        for i, (a, b) in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    return path


def preferences(path: Path, count: int, seed: int) -> Path:
    """Pairs of answers, and of each prompt a label and a question, so that every objective of whole examples finds its
    records; and a function that rewards answers."""
    lengths = torch.randint(1, 12, (count, 3), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = []
    for i, (a, b, c) in enumerate(lengths):
        texts = [sentence(seed + 3 * i + k, n) for k, n in enumerate((a + 1, b, c))]
        # What is learnt holds for held-out pairs, too.
        rows.append({"prompt": texts[0], "chosen": f"{texts[1]} yes", "rejected": f"{texts[2]} no"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    labels = ("red", "blue")
    classes = [{"text": f"{row['prompt']} {'ab'[i % 2]}", "label": labels[i % 2]} for i, row in enumerate(rows)]
    text = "".join(json.dumps(row) + "\n" for row in classes)
    path.with_name(f"{path.stem}-classes.jsonl").write_text(text, encoding="utf-8")
    asked = [{"question": row["prompt"], "answer": row["chosen"]} for row in rows]
    for name, some in (("questions", asked), ("few", asked[:6])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        path.with_name(f"{path.stem}-{name}.jsonl").write_text(text, encoding="utf-8")
    function = "def reward(answer, reference):\n    return answer.count('e') + len(set(answer) & set(reference)) / 10\n"
    path.with_name("reward.py").write_text(function, encoding="utf-8")
    return path


def torchrun(processes: int, *words, seconds: float = 300, code: int = 0, **environment) -> str:
    """What N processes print; their exit code must be this one."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *map(str, words)]
    into = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(line, check=False, **into, timeout=seconds, cwd=ROOT, env=os.environ | environment)
    assert done.returncode == code, done.stdout[:3000] + done.stdout[-3000:]
    return done.stdout


def selected_parameters(request, *names: str) -> set[tuple]:
    """The values of these parameters in the tests that were selected to run and use the fixture that asks."""
    found = set()
    for item in request.session.items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if request.fixturename in item.fixturenames and values.keys() >= set(names):
            found.add(tuple(values[name] for name in names))
    return found


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


EXACT = ("step", "loss", "val_loss", "replay_val_loss", "replay_loss", "grad_norm", "lr", "tokens", "trained_tokens")
EXACT += ("kl_base", "accuracy", "margin", "reward_chosen", "logp_rejected", "kl", "val_accuracy", "val_margin")
EXACT += ("reward", "answer_tokens", "kl_reference", "val_reward")


METHODS = {
    "full": "--method full --lr 1e-3",
    "lora": "--rank 4 --dropout 0.2",
    "qlora": "--method qlora --rank 4",
    "packed, mixed, accumulated": "--rank 4 --pack --seq-len 96 --accumulate 2 MIXED",
    "muon": "--method full --optimizer muon",
    "adamw8bit": "--method full --optimizer adamw8bit",
    "bf16 weights": "--method full --weights bf16 --dtype bf16",
    "8 bits, bf16": "--method full --weights bf16 --optimizer adamw8bit",
    "some": "--method full --train layers.1",
    "going on": "--adapter ADAPTER",
    "bottleneck": "--method bottleneck --placement parallel --lr 1e-2",
    "prompt-tuning": "--method prompt-tuning --lr 0.3 --virtual-tokens 5 --pack --seq-len 96",
    "p-tuning": "--method p-tuning --encoder lstm --encoder-size 16 --lr 1e-2 --quant nf4",
    "prefix-tuning": "--method prefix-tuning --lr 1e-2 --accumulate 2 MIXED",
    "ia3": "--method ia3 --lr 0.1",
    "variants": "--rank 4 --dora --rslora --init pissa --lora-plus 4 --rank-pattern q_proj=2 --dropout 0.2",
    "vera": "--method vera --lr 0.1 --layers 1 --quant nf4",
    "loftq": "--method qlora --init loftq --rank 4",
    "new tokens": "--rank 4 --add-tokens TOKENS --train-tokens <|im_end|>",
    "new tokens, full": "--method full --add-tokens TOKENS",
    "tables": "--rank 4 --modules-to-save embed_tokens,lm_head --embedding-lr 1e-3",
    "asynchronous": "--method full --save-async",
    "dft": "--objective dft --neftune 5 --rank 4 --accumulate 2",
    "smoothed": "--label-smoothing 0.1 --method full --pack --seq-len 96",
    "dpo": "--objective dpo --rank 4 --dropout 0.2 --label-smoothing 0.1 --pack --seq-len 96 PAIRS",
    "dpo, full": "--objective dpo --length-normalized --beta 5 --method full PAIRS",
    "ipo": "--objective ipo --rank 4 --init pissa PAIRS",
    "kto": "--objective kto --rank 4 --accumulate 2 PAIRS",
    "kto, full": "--objective kto --method full --pack --seq-len 96 PAIRS",
    "orpo": "--objective orpo --rank 4 PAIRS",
    "simpo": "--objective simpo --rank 4 --accumulate 2 PAIRS",
    "reward": "--objective reward --rank 4 --pack --seq-len 96 PAIRS",
    "classify": "--objective classify --method full CLASSES",
    "grpo": "--objective grpo --rank 4 --beta 0.04 --group-size 4 --max-new-tokens 12 --accumulate 2 QUESTIONS",
    "grpo, full": "--objective grpo --method full --dr-grpo --max-new-tokens 12 --pack --seq-len 96 QUESTIONS",
    "distill": "--objective distill --teacher TEACHER --rank 4 --pack --seq-len 96 --accumulate 2 MIXED",
    "distill, own answers": "--objective distill --teacher self --own-answers --max-new-tokens 6 --method full",
}
SLOW_METHODS = ("smoothed", "ipo", "kto, full", "orpo", "simpo", "classify", "grpo, full", "distill, own answers")
EACH_METHOD = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_METHODS)) for name in METHODS]


def data_words(words: list[str], folder: Path, mixed: list) -> list:
    """The words with --data and --val of preferences, of classes, or of questions with the reward of their answers,
    where they ask for these; else with `mixed` as the data."""
    ends = {"PAIRS": ".jsonl", "CLASSES": "-classes.jsonl", "QUESTIONS": "-questions.jsonl"}
    kind = next((word for word in words if word in ends), None)
    words = [word for word in words if word != kind]
    if kind is None:
        return [*words, "--data", *mixed]
    if kind == "QUESTIONS":
        words += ["--reward", f"{folder / 'reward.py'}:reward"]
    found = [folder / f"pairs{ends[kind]}"]
    if kind == "QUESTIONS":
        # Some come several times in an epoch, and in a step.
        found = [f"{found[0]}=1", f"{folder / 'pairs-few.jsonl'}=1"]
    return [*words, "--data", *found, "--val", folder / f"val-pairs{ends[kind]}"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """words(method): the flags of a job of 14 steps in two epochs, checkpoints every 3."""
    folder = tmp_path_factory.mktemp("job")
    base = chat_base(folder / "base", num_key_value_heads=2)
    teacher = chat_base(folder / "teacher", num_hidden_layers=1, seed=7)
    (folder / "tokens.txt").write_text("fox jumps\n12 7\n")
    data, more, val = (records(folder / f"{name}.jsonl", n, seed) for name, n, seed in
                       (("data", 40, 0), ("more", 20, 200), ("val", 9, 500)))  # fmt: skip
    preferences(folder / "pairs.jsonl", 40, 0)
    preferences(folder / "val-pairs.jsonl", 9, 500)

    def words(method: str, *more_words) -> list[str]:
        found = METHODS[method].replace("ADAPTER", str(folder / "adapter/final"))
        found = found.replace("TOKENS", str(folder / "tokens.txt")).replace("TEACHER", str(teacher)).split()
        mixed = [f"{data}=3", f"{more}=1", "--replay", f"{val}=0.2"] if "MIXED" in found else [data]
        found = [word for word in found if word != "MIXED"]
        found += [] if "--dtype" in found else ["--dtype", "fp32"]
        found = ["--val", val, *data_words(found, folder, mixed)]
        found += ["--model", base, "--batch-size", 6, "--steps", 14]
        return [str(word) for word in (*found, "--save-every", 3, "--eval-every", 4, *more_words)]

    first = [*words("lora"), "--steps", "2", "--save-every", "0", "--out", str(folder / "adapter")]
    subprocess.run([sys.executable, "train.py", *first], cwd=ROOT, check=True, capture_output=True)
    return words


def exact(run: Path) -> list[list]:
    return [[line.get(key) for key in EXACT] for line in lines(run)]


def final(run: Path) -> dict:
    (file,) = (run / "final").glob("*.safetensors")
    return load_file(file)


def assert_same(a: Path, b: Path) -> None:
    assert exact(a) == exact(b)
    mine, theirs = final(a), final(b)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    (best,) = (a / "best").glob("*.safetensors")
    best_a, best_b = load_file(best), load_file(b / "best" / best.name)
    assert all(torch.equal(best_a[name], best_b[name]) for name in best_a)


def descendants(pid: int) -> list[int]:
    found = [pid]
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += descendants(int(path.parent.name))
    return found


def after_lines(out: Path, count: int, more: float):
    """True once metrics.jsonl has so many lines, and so many seconds later."""
    seen = []

    def when() -> bool:
        file = out / "metrics.jsonl"
        if not seen and file.is_file() and file.read_bytes().count(b"\n") >= count:
            seen.append(time.time())
        return bool(seen) and time.time() >= seen[0] + more

    return when
