"""What a process of torchrun holds of a model with 2,048 tokens: METHOD BASE OUT writes OUT.RANK, JSON of bytes."""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch._dynamo
import torch.distributed.fsdp
from training_runs import run_loop, settings

import checkpoint
import distributed
from dataset.examples import Dataset, Example
from methods import load_trainable
from optimizers import make_optimizers

received = {"gathered": 0, "scattered": 0}


def counting_bytes(call, kind: str):
    def called(*arguments, **named):
        output, source = [each for each in (*arguments, *named.values()) if torch.is_tensor(each)]
        received[kind] += abs(output.nbytes - source.nbytes)  # of W parts, what W - 1 others sent
        return call(*arguments, **named)

    return called


for name in ("all_gather_single", "all_gather_into_tensor"):
    if hasattr(torch.distributed, name):
        setattr(torch.distributed, name, counting_bytes(getattr(torch.distributed, name), "gathered"))
for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
    if hasattr(torch.distributed, name):
        setattr(torch.distributed, name, counting_bytes(getattr(torch.distributed, name), "scattered"))

method, base, out = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
device = distributed.init_distributed(torch.device("cpu"))


def resident() -> int:  # bytes of memory that are not pages of files, and of those that are
    return 1024 * sum(map(int, re.findall(r"Rss(?:Anon|File):\s+(\d+)", Path("/proc/self/status").read_text())))


taken = []
put = checkpoint.copy_local_rows


def counting(parameter, tensor):
    put(parameter, tensor)
    taken.append(resident())


checkpoint.copy_local_rows = counting
before = resident()
chosen = settings(
    method=method, batch_size=4, lr=1e-4, steps=1, warmup=0, rank=16, alpha=16.0, dropout=0.0, targets="all",
    quant="nf4" if method == "qlora" else None, shard="full", dtype="bf16",
)  # fmt: skip
model = load_trainable(chosen, base, device)
model.compute_dtype = torch.bfloat16
held = {"loading": max(taken) - before}
made = make_optimizers(model, "adamw", 1e-4, 0.0)
bytes_of = lambda tensors: sum(distributed.to_local(t).nbytes for t in tensors if torch.is_tensor(t))
step = made[0].step


def counted(found_inf):
    step(found_inf)
    parameters = list(model.parameters())
    held["parameters"] = bytes_of(parameters)
    held["gradients"] = bytes_of([p.grad for p in parameters if p.grad is not None])
    held["optimizer"] = bytes_of([t for state in made[0].state.values() for t in state.values()])


made[0].step = counted
rng = np.random.default_rng(0)
examples = [Example(rng.integers(0, 2048, 20).tolist(), [False] * 5 + [True] * 15) for _ in range(8)]
received.update(gathered=0, scattered=0)
run_loop(model, Dataset(examples), chosen, Path(out).parent, device, made)
held |= received
Path(f"{out}.{distributed.rank()}").write_text(json.dumps(held))
distributed.destroy_process_group()
with distributed.safe_exit():
    pass  # all is done
