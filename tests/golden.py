"""The golden record: six small training jobs whose numbers must not change, to the bit, while the code is rebuilt.

    python tests/golden.py --against REV    runs the jobs with the files of this checkout and with those of a commit

The jobs run on one small random model: full fine-tuning, LoRA, QLoRA, packed rows mixed with replay, a run that is
killed and resumed, and two processes. Compared are the numbers of every line of metrics.jsonl (losses, gradient norms,
rates, tokens) and the bytes of the final weights. The two checkouts run on the same machine one after the other, since
another processor adds up in another order. Exit code 1 and the first difference of each job where one is found.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ("step", "loss", "val_loss", "replay_loss", "replay_val_loss", "grad_norm", "lr", "tokens", "trained_tokens")
STEPS = 12
KILL_AFTER = 7  # lines of metrics.jsonl: between the checkpoint of step 4 and that of step 8

# DATA, VAL and REPLAY stand for files. {new name of a flag: its name in older commits}, values after it likewise.
JOBS = {
    "full": "--method full --lr 1e-3 --schedule linear --data DATA",
    "lora": "--rank 4 --dropout 0.2 --dtype bf16 --activation-checkpointing full --data DATA",
    "qlora": "--method qlora --rank 4 --data DATA",
    "packed, mixed, replay": "--rank 4 --pack --seq-len 96 --accumulate 2 --data DATA=3 MORE=1 --replay REPLAY=0.2",
    "killed and resumed": "--method full --optimizer adamw8bit --lr 1e-3 --save-every 4 --data DATA",
    "two processes": "--rank 4 --shard full --activation-checkpointing selective --data DATA",
}
FORMER_FLAGS = {"--activation-checkpointing": ("--remat", {"full": "block"})}


def make_inputs(folder: Path) -> dict[str, Path]:
    """Writes the model and the files of records that all jobs share, and returns {word: path}."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from support.helpers import chat_base, sentence

    inputs = {"MODEL": chat_base(folder / "base", num_key_value_heads=2)}
    for name, count, seed in (("DATA", 40, 0), ("MORE", 20, 200), ("REPLAY", 30, 400), ("VAL", 9, 500)):
        lengths = random.Random(seed)
        lines = []
        for i in range(count):
            prompt = sentence(seed + 2 * i, lengths.randint(1, 12))
            completion = sentence(seed + 2 * i + 1, lengths.randint(1, 25))
            lines.append(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
        inputs[name] = folder / f"{name.lower()}.jsonl"
        inputs[name].write_text("".join(lines), encoding="utf-8")
    return inputs


def words_of(job: str, inputs: dict[str, Path], out: Path, former_flags: bool) -> list[str]:
    """The command line of a job, in the names of the checkout that runs it."""
    words = []
    for word in JOBS[job].split():
        values = FORMER_FLAGS.get(words[-1] if words else "", ("", {}))[1] if former_flags else {}
        name, equals, share = word.partition("=")
        words.append(values.get(word, f"{inputs[name]}{equals}{share}" if name in inputs else word))
    if former_flags:
        words = [FORMER_FLAGS.get(word, (word,))[0] for word in words]
    if "--dtype" not in words:
        words += ["--dtype", "fp32"]
    words += ["--model", str(inputs["MODEL"]), "--val", str(inputs["VAL"]), "--out", str(out)]
    return [*words, *f"--batch-size 6 --steps {STEPS} --eval-every 5 --device cpu --compile off".split()]


def run_job(job: str, root: Path, inputs: dict[str, Path], out: Path) -> dict:
    """Runs a job with the files under `root`; returns its numbers and the SHA-256 of each final tensor."""
    environment = os.environ | {"PLAINTUNE_CACHE": str(out.parent / "cache"), "OMP_NUM_THREADS": "1"}
    environment["HF_HUB_OFFLINE"] = "1"
    start = {"cwd": root, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    help_text = subprocess.run([sys.executable, "train.py", "--help"], check=True, **start).stdout
    words = ["train.py", *words_of(job, inputs, out, "--activation-checkpointing" not in help_text)]
    if job == "two processes":
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    if job == "killed and resumed":
        kill_when_it_has_trained(subprocess.Popen([sys.executable, *words], **start), out / "metrics.jsonl")
        words += ["--resume"]
    done = subprocess.run([sys.executable, *words], check=False, **start)
    if done.returncode:
        raise SystemExit(f"{job}, in {root}: exit code {done.returncode}\n{done.stdout[-3000:]}")
    return {"numbers": read_numbers(out), "weights": hash_weights(out / "final")}


def kill_when_it_has_trained(process: subprocess.Popen, metrics: Path) -> None:
    """Sends SIGKILL as soon as KILL_AFTER lines are written."""
    while process.poll() is None:
        if metrics.is_file() and len(metrics.read_bytes().splitlines()) >= KILL_AFTER:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    said, _ = process.communicate()
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"the run that was to be killed ended by itself:\n{said[-3000:]}")


def read_numbers(run: Path) -> list[list]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [[line.get(name) for name in NUMBERS] for line in lines]


def hash_weights(folder: Path) -> dict[str, str]:
    """{name: SHA-256 of dtype, shape and bytes} of the tensors in a folder's safetensors files."""
    import torch
    from safetensors import safe_open

    hashes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                tensor = stored.get_tensor(name).contiguous()
                description = f"{tensor.dtype} {[*tensor.shape]} ".encode()
                content = tensor.flatten().view(torch.uint8).numpy().tobytes()
                hashes[name] = hashlib.sha256(description + content).hexdigest()
    return hashes


def first_difference(was: dict, now: dict) -> str | None:
    """The first number or tensor that two records of a job do not share, or None."""
    for old, new in zip(was["numbers"], now["numbers"], strict=False):
        for name, a, b in zip(NUMBERS, old, new, strict=True):
            if a != b:
                return f"step {old[0]}: {name} was {a!r} and is {b!r}"
    if len(was["numbers"]) != len(now["numbers"]):
        return f"{len(was['numbers'])} lines of metrics before, {len(now['numbers'])} now"
    if was["weights"].keys() != now["weights"].keys():
        return f"other tensors: {sorted(was['weights'].keys() ^ now['weights'].keys())[:4]}"
    other = [name for name, digest in was["weights"].items() if now["weights"][name] != digest]
    return f"{len(other)} of {len(was['weights'])} tensors differ, {other[0]} the first" if other else None


def compare(revision: str, jobs: list[str]) -> bool:
    """Runs the jobs in a checkout of `revision` and in this one; prints a line a job; True if all are equal."""
    equal = True
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        folder = Path(temporary)
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder / "then"), revision], check=True)
        try:
            inputs = make_inputs(folder)
            for job in jobs:
                seconds = time.perf_counter()
                name = job.replace(", ", "-").replace(" ", "-")
                was = run_job(job, folder / "then", inputs, folder / "runs-then" / name)
                now = run_job(job, ROOT, inputs, folder / "runs-now" / name)
                difference = first_difference(was, now)
                equal = equal and difference is None
                seconds = time.perf_counter() - seconds
                count = f"{len(now['numbers'])} lines of metrics, {len(now['weights'])} tensors"
                digest = hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:16]
                print(f"{job:24}{difference or f'equal: {count}, digest {digest}'} ({seconds:.0f} s)", flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(folder / "then")], check=True)
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--against", required=True, metavar="REV", help="the commit whose numbers are the right ones")
    parser.add_argument("--jobs", nargs="+", choices=[*JOBS], default=[*JOBS], help="default: all six")
    arguments = parser.parse_args()
    sys.exit(0 if compare(arguments.against, arguments.jobs) else 1)


if __name__ == "__main__":
    main()
