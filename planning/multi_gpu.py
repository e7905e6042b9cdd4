"""What a run takes on many GPUs: memory a GPU, bytes that a step sends, and whether computing hides them.

`train.py --plan --gpus 8 64 512` asks, from config.json alone. The arithmetic, of a model with W shards:

- a GPU holds 1/W of weights, gradients and moments; two blocks and what is around the blocks whole, in the dtype of the
  products, while they compute; one block's gradients whole, until they are added up and scattered; and what
  planning/memory.py says of activations and logits. Where gradients wait for a step's last micro-batch (--reduce last),
  all of them whole.
- with p bytes of weights as they are gathered and g bytes of gradients, A micro-batches a step, a GPU receives
  (W-1)/W * (2 A p + g): every block is gathered for the forward and again for the backward, gradients are scattered
  once. Without shards 2 (N-1)/N * g over N GPUs: the ring all-reduce (Patarasuk & Yuan 2009). Hybrid: the first within
  a node of W GPUs, and 2 (M-1)/M * g/W across M nodes.
- rings through several nodes bring each byte into a node once, by the cards of all its GPUs: an eighth a card.
- what goes within a node takes NVLink's time, what goes across the network's; computing that takes longer hides both.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from common import console as report
from methods import METHODS
from model import Config, Transformer
from planning.memory import (
    CONTEXT,
    EFFICIENCY,
    FITS,
    PEAK_FLOPS,
    Memory,
    Recipe,
    Workload,
    expected_memory,
    fitting_job,
    flops_a_token,
    meta_model,
    recipes,
)

GPUS_PER_NODE = 8  # GPUs
MEMORY, FLOPS = 80e9, PEAK_FLOPS["H100"]  # of an H100 SXM: bytes, operations a second
NVLINK_BYTES, NETWORK_BYTES = 450e9, 50e9  # bytes a second and GPU, one way: NVLink 4; InfiniBand of 400 Gbit/s


@dataclass(frozen=True)
class Layout:
    """gpus in all, of which so many share a copy of the model."""

    gpus: int
    shards: int

    @property
    def name(self) -> str:
        return "none" if self.shards == 1 else "full" if self.shards == self.gpus else "hybrid"


def layouts(gpus: int) -> list[Layout]:
    """From the least traffic to the least memory."""
    found = [Layout(gpus, 1), Layout(gpus, gpus)] + [Layout(gpus, GPUS_PER_NODE)] * (gpus % GPUS_PER_NODE == 0)
    return list(dict.fromkeys(found))


def gathered_size(module: nn.Module, itemsize: int) -> int:
    """Bytes of a module's parameters as they are gathered; itemsize: of matrices that are trained."""
    size = lambda p: itemsize if p.requires_grad and p.dim() > 1 else p.element_size()
    return sum(p.numel() * size(p) for p in module.parameters())


def trained_numel(module: nn.Module) -> int:
    """Of its parameters that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def gathered_bytes(model: Transformer, recipe: Recipe) -> tuple[list[int], int]:
    """(of each block, of what is around the blocks)."""
    item = 4 if METHODS[recipe.method].freezes_base else model.dtype.itemsize  # adapters travel as they are
    blocks = [gathered_size(block, item) for block in model.blocks]
    return blocks, gathered_size(model, item) - sum(blocks)


def memory_per_process(
    model: Transformer, recipe: Recipe, layout: Layout, workload: Workload, device: str = "cuda", together: int = 1
) -> Memory:
    """plan.Memory of one of the processes; what is gathered for a while counts as working. together: processes that
    share a batch's tokens."""
    lengths, trained = workload.lengths, workload.trained
    if together > 1:  # as many tokens as one of them has; the keys that it gathers besides are small
        lengths, trained = [math.ceil(n / together) for n in lengths], math.ceil(trained / together)
    whole = expected_memory(model, recipe, lengths, trained, device, workload.accumulate)
    W = layout.shards
    if W == 1:
        return whole
    blocks, around = gathered_bytes(model, recipe)
    learning = [trained_numel(module) for module in model.blocks]
    outside = trained_numel(model) - sum(learning)
    # wide, all of them, until the last micro-batch; else a block's in the products' dtype, and wide to be sent
    waiting = 4 * (sum(learning) + outside) if workload.accumulate > 1 else 6 * (max(learning) + outside)
    return replace(
        whole,
        weights=whole.weights / W,
        gradients=whole.gradients / W,
        optimizer=whole.optimizer / W,
        table=whole.table / W,
        working=whole.working + 2 * max(blocks) + around + waiting,
    )


def traffic(model: Transformer, recipe: Recipe, layout: Layout, accumulate: int) -> tuple[float, float]:
    """Bytes that a GPU receives in a step: (from its node's others, through its card of the network)."""
    blocks, around = gathered_bytes(model, recipe)
    p = sum(blocks) + around / 2  # gathered once, not again
    g = 4 * trained_numel(model)
    W, copies = layout.shards, layout.gpus // layout.shards
    shared = (W - 1) / W * (2 * accumulate * p + g)
    copied = 2 * (copies - 1) / copies * g / W
    if (
        layout.shards > GPUS_PER_NODE
    ):  # rings through all nodes: what is for a node comes in once, through all its cards
        return shared, shared / GPUS_PER_NODE
    if W == 1:
        return copied, copied / GPUS_PER_NODE if layout.gpus > GPUS_PER_NODE else 0.0
    return shared, copied


def print_multi_gpu_plan(
    config: Config, gpus: list[int], seq_len: int, batch: int, accumulate: int, adapter: dict
) -> None:
    """Prints, for each way of fine-tuning and number of GPUs, how it fits best and what it sends."""
    sizes = ["weights", "gradients", "moments", "kept", "peak"]
    rows = [["", "GPUs", "--shard", "checkpointing", *sizes, "inside", "across", "sent in", "computed in"]]
    tokens, room = seq_len * batch, FITS * (MEMORY - CONTEXT)
    workload = Workload([seq_len] * batch, tokens, 1.0, seq_len, tokens * accumulate, tokens * accumulate, accumulate)
    for recipe in recipes(config, torch.device("cpu")):
        model = meta_model(config, recipe, torch.bfloat16, adapter)
        rows += [best_row(model, recipe, count, workload, room) for count in gpus]
    print(report.table(rows))
    where = f"by NVLink ({NVLINK_BYTES / 1e9:.0f} GB/s) and a card of the network ({NETWORK_BYTES / 1e9:.0f})"
    print(
        f"GB a GPU; {batch} x {accumulate} rows of {seq_len:,} tokens a step and GPU, bf16. kept: by blocks for their"
    )
    print(f"backward; inside, across: received in a step {where};")
    print(f"computed at {EFFICIENCY:.0%} of {FLOPS / 1e12:.0f} TFLOP/s. The fastest --shard and checkpointing")
    print(
        f"that fit {room / 1e9:.0f} of {MEMORY / 1e9:.0f} GB (!: none does); planning/multi_gpu.py has the arithmetic"
    )


def best_row(model: Transformer, recipe: Recipe, gpus: int, workload: Workload, room: float) -> list:
    """The fastest of what fits, of sending and computing the longer one; where nothing fits the smallest."""
    found = []
    for layout in layouts(gpus):
        for kind in ("none", "selective", "full"):
            way = replace(recipe, checkpointing=kind)
            takes = lambda workload, way=way, layout=layout: memory_per_process(model, way, layout, workload)
            fitting = fitting_job(workload, torch.device("cuda"), room, takes)
            memory = takes(fitting)
            inside, across = traffic(model, way, layout, fitting.accumulate)
            sent = inside / NVLINK_BYTES + across / NETWORK_BYTES
            computed = workload.tokens * flops_a_token(model, workload.mean_context, 1.0, kind) / (EFFICIENCY * FLOPS)
            fits = memory.peak <= room
            rank = (0, max(sent, computed), sent) if fits else (1, memory.peak, sent)
            sizes = memory.weights, memory.gradients, memory.optimizer, memory.activations
            row = [str(recipe).replace("--method ", ""), f"{gpus:,}", layout.name, kind]
            row += [f"{part / 1e9:.1f}" for part in sizes] + [f"{memory.peak / 1e9:.1f}{'' if fits else '!'}"]
            row += [f"{inside / 1e9:.1f}", f"{across / 1e9:.1f}", f"{sent:.2f} s", f"{computed:.2f} s"]
            found.append((rank, row))
    return min(found)[1]


def describe_savings(
    config: Config,
    recipe: Recipe,
    layout: Layout,
    workload: Workload,
    shape: tuple[int, int, int],
    device,
    dtype,
    adapter: dict,
) -> str:
    """For a run that had too little memory: what was expected to be where, and the three flags that help most. shape:
    --batch-size, --accumulate, --seq-len."""
    batch, accumulate, seq_len = shape

    def takes(
        recipe: Recipe, lengths: list[int] = workload.lengths, times: int = workload.accumulate, layout=layout
    ) -> Memory:
        trained = math.ceil(workload.trained * sum(lengths) / sum(workload.lengths))
        one = replace(workload, lengths=lengths, trained=trained, accumulate=times)
        return memory_per_process(meta_model(config, recipe, dtype, adapter), recipe, layout, one, device.type)

    half, shorter = (
        workload.lengths[: math.ceil(len(workload.lengths) / 2)],
        [min(n, seq_len // 2) for n in workload.lengths],
    )
    ways = {
        "--activation-checkpointing full": takes(replace(recipe, checkpointing="full")),
        f"--seq-len {seq_len // 2}": takes(recipe, shorter),
    }
    if layout.shards < layout.gpus:
        ways["--shard full"] = takes(recipe, layout=Layout(layout.gpus, layout.gpus))
    if batch > 1:
        ways[f"--batch-size {batch // 2} --accumulate {2 * accumulate}"] = takes(recipe, half, 2)
    method = METHODS[recipe.method]
    if "weights" in method.options:
        ways["--optimizer adamw8bit --weights bf16"] = takes(replace(recipe, optimizer="adamw8bit", weights="bf16"))
    if method.lighter:
        ways[f"--method {method.lighter}"] = takes(Recipe(method.lighter, checkpointing=recipe.checkpointing))
    expected = takes(recipe)
    best = sorted(ways, key=lambda way: ways[way].peak)[:3]
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    return (
        f"Expected were {expected.peak / 1e9:.2f} GB: "
        + ", ".join(f"{part} {getattr(expected, part) / 1e9:.2f}" for part in parts)
        + "; what helps most: "
        + ", ".join(f"{way} ({ways[way].peak / 1e9:.2f})" for way in best)
    )
