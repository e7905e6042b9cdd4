"""What a process of torchrun holds of a model with 2,048 tokens: METHOD BASE OUT writes OUT.RANK, JSON of bytes."""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch._dynamo
import torch.distributed.fsdp

import checkpoint
import distributed
import optimizers
import train
from examples import Dataset, Example
from flags import Flags
from log import Stop
from order import Stream

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
device = distributed.start(torch.device("cpu"))


def resident() -> int:  # bytes of memory that are not pages of files, and of those that are
    return 1024 * sum(map(int, re.findall(r"Rss(?:Anon|File):\s+(\d+)", Path("/proc/self/status").read_text())))


taken = []
put = checkpoint.put


def counting(parameter, tensor):
    put(parameter, tensor)
    taken.append(resident())


checkpoint.put = counting
before = resident()
flags = Flags(method=method, batch_size=4, lr=1e-4, steps=1, warmup=0, weight_decay=0.0, rank=16)
flags.quant = "nf4" if method == "qlora" else None
flags.shard = "full"
model = train.prepare(flags, base, torch.bfloat16, device)
model.compute_dtype = torch.bfloat16
held = {"loading": max(taken) - before}
steppers = optimizers.make_optimizers(model, "adamw", 1e-4, 0.0)
bytes_of = lambda tensors: sum(distributed.local(t).nbytes for t in tensors if torch.is_tensor(t))
step = steppers[0].step


def counted(bad):
    step(bad)
    parameters = list(model.parameters())
    held["parameters"] = bytes_of(parameters)
    held["gradients"] = bytes_of([p.grad for p in parameters if p.grad is not None])
    held["optimizer"] = bytes_of([t for state in steppers[0].state.values() for t in state.values()])


steppers[0].step = counted
rng = np.random.default_rng(0)
examples = [Example(rng.integers(0, 2048, 20).tolist(), [False] * 5 + [True] * 15) for _ in range(8)]
data = Dataset(examples)


class Quiet:
    stop = Stop()  # no signal

    def step(self, *_):
        pass


steps = train.step_parts(data, Stream(data.lengths, [8], [8], 0), flags, device)
received.update(gathered=0, scattered=0)
train.optimize(model, steppers, steps, flags, Quiet(), device, lambda *_: False)
held |= received
Path(f"{out}.{distributed.rank()}").write_text(json.dumps(held))
distributed.stop()
