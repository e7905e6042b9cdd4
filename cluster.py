"""What a run takes on many GPUs: memory a GPU, bytes that a step sends, and whether computing hides them.

`train.py --plan --gpus 8 64 512` asks, from config.json alone. The arithmetic, of a model with W shards:

- a GPU holds 1/W of weights, gradients and moments; two blocks and what is around the blocks whole, in the dtype of the
  products, while they compute; one block's gradients whole, until they are added up and scattered; and what plan.py
  says of activations and logits. Where gradients wait for a step's last micro-batch (--reduce last), all of them whole.
- with p bytes of weights as they are gathered and g bytes of gradients, A micro-batches a step, a GPU receives
  (W-1)/W * (2 A p + g): every block is gathered for the forward and again for the backward, gradients are scattered
  once. Without shards 2 (N-1)/N * g over N GPUs: the ring all-reduce (Patarasuk & Yuan 2009). Hybrid: the first within
  a node of W GPUs, and 2 (M-1)/M * g/W across M nodes.
- what goes within a node takes NVLink's time, what goes across takes the network's; computing hides it if it is longer.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

import report
from model import Config, Transformer
from plan import CONTEXT, EFFICIENCY, FITS, Memory, Setup, expected_memory, flops_a_token, setups, sketch

NODE = 8  # GPUs
MEMORY, FLOPS = 80e9, 989e12  # of an H100 SXM: bytes, dense bf16 operations a second (NVIDIA's data sheet)
INSIDE, ACROSS = 450e9, 50e9  # bytes a second and GPU, one way: NVLink 4; InfiniBand of 400 Gbit/s
MOST = 16384  # tokens of a flat batch


@dataclass(frozen=True)
class Layout:
    """gpus in all, of which so many share a copy of the model; across: shards of a copy lie in several nodes."""

    gpus: int
    shards: int

    @property
    def across(self) -> bool:
        return self.shards > NODE

    @property
    def name(self) -> str:
        return "none" if self.shards == 1 else "full" if self.shards == self.gpus else "hybrid"


def layouts(gpus: int) -> list[Layout]:
    """From the least traffic to the least memory."""
    found = [Layout(gpus, 1), Layout(gpus, min(NODE, gpus)), Layout(gpus, gpus)]
    return list(dict.fromkeys(found))


def weights_of(module: nn.Module, itemsize: int, trained: bool = False) -> int:
    """Bytes of a module's parameters as they are gathered: floats that are trained in the dtype of the products.
    trained: how many numbers are trained instead."""
    chosen = [p for p in module.parameters() if p.requires_grad] if trained else list(module.parameters())
    if trained:
        return sum(p.numel() for p in chosen)
    return sum(p.numel() * (itemsize if p.requires_grad and p.dim() > 1 else p.element_size()) for p in chosen)


def gathered_bytes(model: Transformer, setup: Setup) -> tuple[int, int]:
    """(of a block, of what is around the blocks)."""
    item = model.dtype.itemsize if setup.method == "full" else 4  # adapters travel as they are
    block = max(weights_of(block, item) for block in model.blocks)
    return block, weights_of(model, item) - sum(weights_of(block, item) for block in model.blocks)


def memory_a_gpu(model: Transformer, setup: Setup, layout: Layout, lengths: list[int], accumulate: int) -> Memory:
    """plan.Memory of one of the GPUs; what is gathered for a while counts as working."""
    whole = expected_memory(model, setup, lengths, sum(lengths), "cuda", accumulate)
    W = layout.shards
    if W == 1:
        return whole
    block, around = gathered_bytes(model, setup)
    trained = [weights_of(module, 0, trained=True) for module in model.blocks]
    outside = weights_of(model, 0, trained=True) - sum(trained)
    waiting = 4 * (sum(trained) + outside) if accumulate > 1 else 6 * (max(trained) + outside)  # bf16, and fp32 to send
    return replace(
        whole,
        weights=whole.weights / W,
        gradients=whole.gradients / W,
        optimizer=whole.optimizer / W,
        working=whole.working + 2 * block + around + waiting,
    )


def traffic(model: Transformer, setup: Setup, layout: Layout, accumulate: int) -> tuple[float, float]:
    """Bytes that a GPU receives in a step: (within its node, across nodes)."""
    around, item = gathered_bytes(model, setup)[1], model.dtype.itemsize if setup.method == "full" else 4
    p = sum(weights_of(block, item) for block in model.blocks) + around / 2  # gathered once, not again
    g = 4 * weights_of(model, 0, trained=True)
    W, copies = layout.shards, layout.gpus // layout.shards
    shared = (W - 1) / W * (2 * accumulate * p + g)
    copied = 2 * (copies - 1) / copies * g / W
    inside, across = (0.0, shared) if layout.across else (shared, 0.0)
    apart = copies > 1 and (W > 1 or layout.gpus > NODE)  # copies in several nodes
    return inside + (0 if apart else copied), across + (copied if apart else 0)


def show(config: Config, gpus: list[int], seq_len: int, batch: int, accumulate: int, adapter: dict) -> None:
    """Prints, for each way of fine-tuning and number of GPUs, how it fits best and what it sends."""
    rows = [["", "GPUs", "--shard", "--remat", "weights", "gradients", "moments", "kept", "peak", "inside", "across",
             "sent in", "computed in"]]  # fmt: skip
    batch = max(1, min(batch, MOST // seq_len))
    lengths, room = [seq_len] * batch, FITS * (MEMORY - CONTEXT)
    for setup in setups(config, torch.device("cpu")):
        for count in gpus:
            rows.append(best_row(config, setup, count, lengths, accumulate, room, adapter))
    print(report.table(rows))
    where = f"within its node ({INSIDE / 1e9:.0f} GB/s) and from others ({ACROSS / 1e9:.0f})"
    print(
        f"GB a GPU; {batch} x {accumulate} rows of {seq_len:,} tokens a step and GPU, in bf16. kept: by the blocks for"
    )
    print(f"the backward; inside, across: what a GPU receives in a step {where};")
    print(f"computed at {EFFICIENCY:.0%} of {FLOPS / 1e12:.0f} TFLOP/s. Of --shard and --remat the first that fit into")
    print(f"{room / 1e9:.0f} of {MEMORY / 1e9:.0f} GB (! if none does), nodes of {NODE}; cluster.py has the arithmetic")


def best_row(
    config: Config, setup: Setup, gpus: int, lengths: list[int], accumulate: int, room: float, adapter
) -> list:
    name, fits, found = str(setup).replace("--method ", ""), False, None
    for layout in layouts(gpus):
        for kind in ("none", "selective", "block"):
            setup = replace(setup, remat=kind)
            model = sketch(config, setup, torch.bfloat16, adapter)
            memory = memory_a_gpu(model, setup, layout, lengths, accumulate)
            if found is None or memory.peak < found[0].peak:
                found = memory, layout, kind, model, setup
            fits = memory.peak <= room
            if fits:
                found = memory, layout, kind, model, setup
                break
        if fits:
            break
    memory, layout, kind, model, setup = found
    inside, across = traffic(model, setup, layout, accumulate)
    sent = inside / INSIDE + across / ACROSS
    reach = float(lengths[0])
    computed = accumulate * sum(lengths) * flops_a_token(model, reach, 1.0, kind) / (EFFICIENCY * FLOPS)
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
    return [
        *(name, f"{gpus:,}", layout.name, kind, *(f"{part / 1e9:.1f}" for part in parts)),
        f"{memory.peak / 1e9:.1f}{'' if fits else '!'}",
        *(f"{part / 1e9:.1f}" for part in (inside, across)),
        *(f"{seconds:.2f} s" if math.isfinite(seconds) else "" for seconds in (sent, computed)),
    ]
