"""What it costs to be sharded and to be saved: one process, the same steps, each way in a process of its own, in turn.

    python benchmarks/durable_speed.py                     the dense shape of peers.py, on CPU
    python benchmarks/durable_speed.py --shape 1b          Llama-3.2-1B's shape, for a GPU

Weights are random, and made where the training is. `plain`: without FSDP, nothing saved. `fsdp`: --shard full with one
process. `saved`, `async`: plain, with a checkpoint after every fourth step, written before the next step or by a thread
beside it. Printed are the medians of a step's time over rounds, the ratios to `plain` of the same round, and of the
steps of `async` those while a checkpoint was being written.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peers import RATE, SHAPES, WARM_UP, raw_config

WAYS = ("plain", "fsdp", "saved", "async")


def side(spec: dict) -> dict:
    import torch
    from random_models import random_model

    import distributed
    import loading
    import plan
    import resume
    import train
    from data import cut_rows
    from examples import Example
    from optimizers import make_optimizers

    device = loading.pick_device("auto")
    if spec["way"] == "fsdp":
        device = distributed.start(device)
    method, many = spec["method"], spec["steps"]
    flags = train.Flags(method=method, steps=many, lr=RATE, warmup=0, weight_decay=0.0, batch_size=spec["batch"])
    dtype, _ = loading.pick_dtype("auto", device)

    def arrange(model) -> None:
        if spec["way"] == "fsdp":
            gathered = dtype if method == "full" and dtype != torch.float32 else None
            distributed.shard(model, "full", device, gathered)

    adapter = {"rank": 16, "alpha": 32.0}
    raw = raw_config(spec["shape"])
    model = random_model(raw, plan.Setup(method), dtype, device, adapter, arrange=arrange)
    model.compute_dtype = dtype
    steppers = make_optimizers(model, "adamw", RATE, 0.0)
    generator = torch.Generator().manual_seed(1)
    shape = many, spec["batch"], spec["seq"]
    ids = torch.randint(0, SHAPES[spec["shape"]]["vocab_size"], shape, generator=generator).tolist()
    trained = [False] + [True] * (spec["seq"] - 1)
    cuts = cut_rows([spec["seq"]] * spec["batch"], spec["batch"], train.most_tokens(device))
    steps = [[[Example(rows[i], trained) for i in part] for part in cuts] for rows in ids]
    with tempfile.TemporaryDirectory(dir=spec["where"]) as out:
        log = train.Log(flags, Path(out), 1.0, device)
        saver = resume.Saver(Path(out), 1, spec["way"] == "async", log.bar.write)
        times, beside, last = [], [], time.perf_counter()

        def after_step(done: int, _: int) -> bool:
            nonlocal last
            if spec["way"] in ("saved", "async") and done % 4 == 0:
                saver.save({"step": done, "val_loss": None}, resume.tensors_of(model, steppers))
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if done > WARM_UP:
                times.append(now - last)
                if saver.thread and saver.thread.is_alive():
                    beside.append(now - last)
            last = now
            return False

        train.optimize(model, steppers, steps, flags, log, device, after_step)
        start = time.perf_counter()
        saver.wait()
        ended = time.perf_counter() - start
        log.close()
    return {"step": sum(times) / len(times), "beside": statistics.median(beside) if beside else None, "end": ended}


def run_side(spec: dict) -> dict:
    """The result of a way, in a process of its own."""
    words = [sys.executable, __file__, "--side", json.dumps(spec)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{spec['way']}: {ran.stderr[-1500:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=[*SHAPES], default="dense")
    parser.add_argument("--method", choices=["full", "lora"], default="full")
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--where", help="folder in which checkpoints are written (default: the system's for such)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(side(json.loads(args.side))))
        return
    found = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            found[way].append(run_side(vars(args) | {"way": way}))
    for way in WAYS:
        ratios = [mine["step"] / plain["step"] for mine, plain in zip(found[way], found["plain"], strict=True)]
        seconds = statistics.median(each["step"] for each in found[way])
        print(f"{way:6} {1000 * seconds:8.1f} ms a step, {statistics.median(ratios):.3f} of plain"
              f" ({min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip
    beside = [(each["beside"], plain["step"]) for each, plain in zip(found["async"], found["plain"]) if each["beside"]]
    if beside:
        ratio = statistics.median(a / b for a, b in beside)
        print(f"async  {ratio:.3f} of plain in steps during which a checkpoint was written")


if __name__ == "__main__":
    main()
