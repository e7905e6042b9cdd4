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

from peers import RATE, SHAPES, WARM_UP, GivenSteps, raw_config

from common.device import pick_device, pick_dtype

WAYS = ("plain", "fsdp", "saved", "async")


def side(spec: dict) -> dict:
    import torch
    from random_models import random_model

    import distributed
    import train
    from data import max_tokens_per_micro_batch, split_micro_batches
    from dataset.examples import Example
    from objectives import make_objective
    from optimizers import make_optimizers
    from planning import memory as plan
    from training import checkpointer
    from training.defaults import Settings
    from training.metrics import MetricsLogger
    from training.signals import GracefulStop
    from training.state import TrainState

    device = pick_device("auto")
    if spec["way"] == "fsdp":
        device = distributed.init_distributed(device)
    method, many = spec["method"], spec["steps"]
    settings = Settings(
        method=method, steps=many, lr=RATE, warmup=0, weight_decay=0.0, batch_size=spec["batch"], eval_every=1
    )
    dtype, _ = pick_dtype("auto", device)

    def arrange(model) -> None:
        if spec["way"] == "fsdp":
            gathered = dtype if method == "full" and dtype != torch.float32 else None
            distributed.shard_model(model, "full", device, gathered)

    adapter = {"rank": 16, "alpha": 32.0}
    raw = raw_config(spec["shape"])
    model = random_model(raw, plan.Recipe(method), dtype, device, adapter, arrange=arrange)
    model.compute_dtype = dtype
    optimizers = make_optimizers(model, "adamw", RATE, 0.0)
    generator = torch.Generator().manual_seed(1)
    shape = many, spec["batch"], spec["seq"]
    ids = torch.randint(0, SHAPES[spec["shape"]]["vocab_size"], shape, generator=generator).tolist()
    trained = [False] + [True] * (spec["seq"] - 1)
    cuts = split_micro_batches([spec["seq"]] * spec["batch"], spec["batch"], max_tokens_per_micro_batch(device))
    steps = [[[Example(rows[i], trained) for i in cut] for cut in cuts] for rows in ids]
    times, beside, last = [], [], time.perf_counter()

    class EveryStep:
        """In place of the evaluator: writes a checkpoint every fourth step, and takes the time of each."""

        was_interrupted = False

        def due(self, state) -> bool:
            return state.step > 0

        def run(self, state, stop) -> bool:
            nonlocal last
            if spec["way"] in ("saved", "async") and state.step % 4 == 0:
                tensors = checkpointer.trainable_state(model, optimizers)
                writer.save({"step": state.step, "val_loss": None}, tensors)
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if state.step > WARM_UP:
                times.append(now - last)
                if writer.thread and writer.thread.is_alive():
                    beside.append(now - last)
            last = now
            return False

    loader = GivenSteps(steps, device)
    with tempfile.TemporaryDirectory(dir=spec["where"]) as out:
        state = TrainState()
        metrics = MetricsLogger(settings, Path(out), 1.0, device, state)
        writer = checkpointer.CheckpointWriter(Path(out), 1, spec["way"] == "async", metrics.bar.write)
        parts = (settings, model, make_objective(settings, None), optimizers, loader, state, metrics, GracefulStop())
        train.train_loop(*parts, EveryStep())
        start = time.perf_counter()
        writer.wait()
        ended = time.perf_counter() - start
        metrics.close()
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
