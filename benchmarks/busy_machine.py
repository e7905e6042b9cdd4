"""How fast a training step is beside another busy process, for several ways in which threads wait for each other.

    python benchmarks/busy_machine.py --spins default 1000 passive           in bf16
    python benchmarks/busy_machine.py --dtype float32 --isa AVX2             as on a machine without bf16 instructions

Each way of waiting ("default": libgomp's, which spins; "passive": asleep; a number: how often a thread looks before it
sleeps) has a process of its own, which loads the default base with LoRA and trains on the bundled task. In each round
it takes some steps with the machine to itself and some beside a process that counts without end; printed are the
medians over the rounds, in tokens/s.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ISA = {
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "native": {},
}
NEIGHBOUR = "while True:\n    pass"


def child(dtype: str, rounds: int, steps: int, neighbours: int) -> None:
    """Trains in this process, and prints {"alone": [...], "beside": [...]}: tokens/s of each round."""
    sys.path.insert(0, str(ROOT))
    import torch

    import data
    from checkpoint import load_model
    from data import BUNDLED_TASK, MicroBatches
    from dataset.sampler import Sampler
    from interop.resolve import base_folder, pick_tokenizer
    from lora import add_lora
    from objectives import Losses, StepTotals, supervised_loss

    folder = base_folder(None, None)
    tokenizer = pick_tokenizer(folder, None, None)
    examples = data.load(BUNDLED_TASK["train"], tokenizer, 2048)
    model = load_model(folder, getattr(torch, dtype))
    add_lora(model, 8, 16)
    sampler = Sampler(examples.lengths, examples.examples.sizes, examples.examples.sizes, 0)
    loader = MicroBatches(examples, sampler, torch.device("cpu"), 8)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    model.train()
    number = 0

    def speed(count: int) -> float:
        nonlocal number
        tokens = 0
        start = time.perf_counter()
        for _ in range(count):
            for batch in loader.step(number):
                supervised_loss(model, batch, StepTotals.of([batch]), Losses(torch.device("cpu"))).backward()
                tokens += batch.num_tokens
            optimizer.step()
            optimizer.zero_grad()
            number += 1
        return tokens / (time.perf_counter() - start)

    speed(3)
    found = {"alone": [], "beside": []}
    for _ in range(rounds):
        found["alone"].append(speed(steps))
        others = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(neighbours)]
        try:
            time.sleep(0.3)
            found["beside"].append(speed(steps))
        finally:
            for other in others:
                other.kill()
                other.wait()
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", nargs="+", default=["default", "passive"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--isa", choices=[*ISA], default="native")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--neighbours", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.dtype, args.rounds, args.steps, args.neighbours)
        return
    print(f"{args.dtype}, {args.isa}, {args.rounds} rounds of {args.steps} steps; tokens/s: median (least to most)")
    for spin in args.spins:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "OMP_"))}
        environment |= ISA[args.isa]
        if spin == "passive":
            environment["OMP_WAIT_POLICY"] = "passive"
        elif spin != "default":
            environment["GOMP_SPINCOUNT"] = spin
        if args.threads:
            environment["OMP_NUM_THREADS"] = str(args.threads)
        words = [sys.executable, __file__, "--child", "--dtype", args.dtype]
        words += ["--rounds", str(args.rounds), "--steps", str(args.steps), "--neighbours", str(args.neighbours)]
        done = subprocess.run(words, env=environment, cwd="/", stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        cells = []
        for name, values in found.items():
            cells.append(f"{name} {statistics.median(values):6.0f} ({min(values):.0f} to {max(values):.0f})")
        print(f"  spin {spin:>8}: " + "; ".join(cells), flush=True)


if __name__ == "__main__":
    main()
