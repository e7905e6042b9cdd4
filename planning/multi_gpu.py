"""Predicts what a run takes on many GPUs: memory per GPU, bytes sent in a step, and whether
computing hides them.

`train.py --plan --gpus 8 64 512` asks for it, from config.json alone. The arithmetic of a model
with W shards:

- a GPU holds 1/W of weights, gradients and moments; two whole blocks, and what is around the
  blocks, in the dtype of the products while they compute; the whole gradients of one block, until
  they are added up and scattered; and the activations and logits of planning/memory.py. If
  gradients wait for the last micro-batch of a step (--reduce last), it holds all of them whole.
- with p bytes of weights as they are gathered, g bytes of gradients and A micro-batches in a step,
  a GPU receives (W-1)/W * (2 A p + g): every block is gathered for the forward and again for the
  backward, gradients are scattered once. Without shards it receives 2 (N-1)/N * g on N GPUs: the
  ring all-reduce (Patarasuk & Yuan 2009). Hybrid: the first formula within a node of W GPUs, and
  2 (M-1)/M * g/W across M nodes.
- a ring through several nodes brings each byte into a node once, through the network cards of all
  its GPUs: an eighth per card.
- bytes within a node take NVLink's time, bytes between nodes the network's. Computing that takes
  longer hides both.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from common import console
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

GPUS_PER_NODE = 8


class Card(NamedTuple):
    """A GPU: its name, FLOP/s of dense bf16 products as the vendor publishes them, and bytes per
    second, one way, to another GPU of its node and through its network card."""

    name: str
    flops: float
    link: float
    network: float


# Bytes per second: NVLink 4, NVLink 3, PCIe 4.0 x16; InfiniBand of 400 and Ethernet of 100 Gbit/s.
NVLINK_4, NVLINK_3, PCIE_4 = 450e9, 300e9, 32e9
INFINIBAND, ETHERNET = 50e9, 12.5e9
# For GPUs of at most so many GB, in ascending order.
CARDS = {
    16: Card("RTX 4060 Ti", 44e12, PCIE_4, ETHERNET),
    24: Card("RTX 4090", PEAK_FLOPS["4090"], PCIE_4, ETHERNET),
    40: Card("A100", PEAK_FLOPS["A100"], NVLINK_3, INFINIBAND),
    48: Card("L40S", PEAK_FLOPS["L40S"], PCIE_4, ETHERNET),
    math.inf: Card("H100 or H200", PEAK_FLOPS["H100"], NVLINK_4, INFINIBAND),
}


def card_of(gigabytes: float) -> Card:
    """Returns a common card with so much memory."""
    return next(card for most, card in CARDS.items() if gigabytes <= most)


@dataclass(frozen=True)
class Layout:
    """How a model is spread over GPUs.

    gpus: all of them.
    shards: the GPUs that share one copy of the model.
    """

    gpus: int
    shards: int

    @property
    def name(self) -> str:
        """The value of --shard."""
        if self.shards == 1:
            return "none"
        return "full" if self.shards == self.gpus else "hybrid"


def layouts(gpus: int) -> list[Layout]:
    """Returns the different layouts of so many GPUs."""
    choices = [Layout(gpus, 1), Layout(gpus, gpus)]
    if gpus % GPUS_PER_NODE == 0:
        choices.append(Layout(gpus, GPUS_PER_NODE))
    # With one GPU, or with one node, two of them are the same.
    return list(dict.fromkeys(choices))


def gathered_size(module: nn.Module, itemsize: int) -> int:
    """Returns the bytes of a module's parameters as they are gathered.

    itemsize: bytes of a number in a trained matrix. All other parameters are gathered in the dtype
    that they have.
    """
    size = 0
    for p in module.parameters():
        is_trained_matrix = p.requires_grad and p.dim() > 1
        size += p.numel() * (itemsize if is_trained_matrix else p.element_size())
    return size


def trained_numel(module: nn.Module) -> int:
    """Returns the number of a module's trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def gathered_bytes(model: Transformer, recipe: Recipe) -> tuple[list[int], int]:
    """Returns the bytes that are gathered: ([of each block], of what is around the blocks)."""
    # Adapters are sent in fp32, as they are stored.
    item = 4 if METHODS[recipe.method].freezes_base else model.dtype.itemsize
    blocks = [gathered_size(block, item) for block in model.blocks]
    return blocks, gathered_size(model, item) - sum(blocks)


def memory_per_process(
    model: Transformer,
    recipe: Recipe,
    layout: Layout,
    workload: Workload,
    device: str = "cuda",
    together: int = 1,
) -> Memory:
    """Returns the memory of one process. What is gathered for a while counts as `working`.

    together: processes that share the tokens of a batch (--context-parallel).
    """
    lengths = workload.lengths
    trained = workload.trained
    if together > 1:
        # A process computes its part of the tokens. The keys that it also gathers are small.
        lengths = [math.ceil(n / together) for n in lengths]
        trained = math.ceil(trained / together)
    unsharded = expected_memory(model, recipe, lengths, trained, device, workload.accumulate)
    W = layout.shards
    if W == 1:
        return unsharded
    blocks, around = gathered_bytes(model, recipe)
    trained_in_blocks = [trained_numel(block) for block in model.blocks]
    trained_around = trained_numel(model) - sum(trained_in_blocks)
    if workload.accumulate > 1:
        # All gradients in fp32, until the last micro-batch.
        gradients = 4 * (sum(trained_in_blocks) + trained_around)
    else:
        # Those of one block in the dtype of the products, and in fp32 to be sent.
        gradients = 6 * (max(trained_in_blocks) + trained_around)
    return replace(
        unsharded,
        weights=unsharded.weights / W,
        gradients=unsharded.gradients / W,
        optimizer=unsharded.optimizer / W,
        table=unsharded.table / W,
        working=unsharded.working + 2 * max(blocks) + around + gradients,
    )


def traffic(
    model: Transformer, recipe: Recipe, layout: Layout, accumulate: int
) -> tuple[float, float]:
    """Returns the bytes that a GPU receives in a step: (from GPUs of its node, through its card).

    accumulate: micro-batches of a step.
    """
    blocks, around = gathered_bytes(model, recipe)
    # What is around the blocks is gathered once, not again for the backward.
    p = sum(blocks) + around / 2
    g = 4 * trained_numel(model)
    W = layout.shards
    copies = layout.gpus // layout.shards
    sharded = (W - 1) / W * (2 * accumulate * p + g)
    replicated = 2 * (copies - 1) / copies * g / W
    # A ring that passes through several nodes brings a byte into a node once, through the network
    # cards of all its GPUs.
    if layout.shards > GPUS_PER_NODE:
        return sharded, sharded / GPUS_PER_NODE
    if W == 1 and layout.gpus > GPUS_PER_NODE:
        return replicated, replicated / GPUS_PER_NODE
    if W == 1:
        return replicated, 0.0
    return sharded, replicated


class Best(NamedTuple):
    """The best way for a recipe on a number of GPUs: the fastest that fits, or the smallest.

    seconds: of the whole workload; infinite where nothing fits.
    """

    recipe: Recipe
    layout: Layout
    memory: Memory
    sent: float
    computed: float
    seconds: float
    gpus: int


def print_multi_gpu_plan(
    config: Config,
    gpus: tuple[int, ...],
    gigabytes: float,
    workload: Workload,
    steps: float,
    adapter: dict,
    asked: str | None,
    has_data: bool,
    quant: str | None = None,
) -> None:
    """Prints, for each recipe and number of GPUs, the layout and checkpointing that fit best.

    gpus: the numbers of GPUs to plan for. gigabytes: the memory of each.
    workload: its lengths are of a micro-batch of each GPU; its tokens those of the whole run, or
        without data those of one step of a GPU.
    steps: the optimizer steps of one GPU in the run; 1 without data.
    adapter: {option: value} of a new adapter.
    asked: the method that the recommendation is about; None: any.
    quant: --quant, for a method that is asked for and not compared otherwise.
    """
    card = card_of(gigabytes)
    room = FITS * (1e9 * gigabytes - CONTEXT)
    heading = ["", "GPUs", "--shard", "checkpointing", "state", "peak", "sent in", "computed in"]
    rows = [[*heading, "time"] if has_data else heading]
    ways = []
    for recipe in recipes(config, torch.device("cpu"), asked, quant):
        model = meta_model(config, recipe, torch.bfloat16, adapter)
        for count in gpus:
            best = best_way(model, recipe, count, workload, steps, room, card)
            if asked in (None, recipe.method):
                ways.append(best)
            rows.append(table_row(best, room, has_data))
    print(console.table(rows))
    print(
        f"For GPUs of {gigabytes:g} GB, as fast as an {card.name}: {card.flops / 1e12:.0f} TFLOP/s,"
        f" of which a run has {EFFICIENCY[torch.bfloat16]:.0%}."
    )
    print("A row is --method, --optimizer and --weights. All sizes are GB per GPU.")
    print("checkpointing: --activation-checkpointing. state: weights, gradients and moments.")
    print(
        "sent in: seconds in which a GPU receives what a step sends; computed in: of its products."
    )
    print(
        f"  ({card.link / 1e9:.0f} GB/s within a node, {card.network / 1e9:g} GB/s between nodes)"
    )
    if has_data:
        print("time: of the whole training, sending or computing, whichever takes longer.")
    print(
        f"--shard and checkpointing are the fastest that fit in {room / 1e9:.0f} of"
        f" {gigabytes:g} GB; a peak with ! means that none fits."
    )
    print(f"plan      {recommend_gpus(ways, room, has_data)}")


def table_row(best: Best, room: float, has_data: bool) -> list[str]:
    """Returns the table's row of a recipe and a number of GPUs."""
    memory = best.memory
    mark = "" if memory.peak <= room else "!"
    state = memory.weights + memory.gradients + memory.optimizer
    row = [
        replace(best.recipe, checkpointing="none").name,
        f"{best.gpus:,}",
        best.layout.name,
        best.recipe.checkpointing,
        f"{state / 1e9:.1f}",
        f"{memory.peak / 1e9:.1f}{mark}",
        f"{best.sent:.2f} s",
        f"{best.computed:.2f} s",
    ]
    if has_data:
        row.append("-" if mark else console.format_duration(best.seconds))
    return row


def recommend_gpus(ways: list[Best], room: float, has_data: bool) -> str:
    """Returns one line: the first of LoRA, QLoRA and full fine-tuning that fits, on the fewest
    GPUs."""
    fitting = [best for best in ways if best.memory.peak <= room]
    if not fitting:
        least = min(ways, key=lambda best: best.memory.peak)
        return (
            f"nothing fits: the least, {least.recipe} on {count_of_gpus(least.gpus)}, takes"
            f" {least.memory.peak / 1e9:.1f} of {room / 1e9:.1f} GB; more --gpus, a larger"
            " --gpu-memory, or a lower --batch-size or --seq-len"
        )
    order = ("lora", "qlora", "full", *METHODS)
    best = min(fitting, key=lambda each: (order.index(each.recipe.method), each.gpus))
    flags = f"{best.recipe}"
    if best.layout.name != "none":
        flags += f" --shard {best.layout.name}"
    line = f"{flags} on {count_of_gpus(best.gpus)}: {best.memory.peak / 1e9:.1f} of {room / 1e9:.1f} GB each"
    if has_data:
        line += f", {console.format_duration(best.seconds)}"
    return line


def count_of_gpus(number: int) -> str:
    return "1 GPU" if number == 1 else f"{number:,} GPUs"


def best_way(
    model: Transformer,
    recipe: Recipe,
    gpus: int,
    workload: Workload,
    steps: float,
    room: float,
    card: Card,
) -> Best:
    """Returns the fastest layout and checkpointing that fit, or the smallest.

    A step takes as long as sending or computing, whichever takes longer.
    steps: those of one GPU; of several, each has its share.
    room: bytes that training may take.
    """
    # (order, number, way). The smallest order is the best; of equal ones the first.
    candidates: list[tuple[tuple[float, ...], int, Best]] = []
    tokens_per_step = workload.tokens / steps
    for layout in layouts(gpus):
        for kind in ("none", "selective", "full"):
            candidate = replace(recipe, checkpointing=kind)
            takes = functools.partial(memory_per_process, model, candidate, layout)
            fitting = fitting_job(workload, torch.device("cuda"), room, takes)
            memory = takes(fitting)
            intra_node, inter_node = traffic(model, candidate, layout, fitting.accumulate)
            sent = intra_node / card.link + inter_node / card.network
            flops = flops_a_token(model, workload.all_lengths, workload.share, kind)
            computed = tokens_per_step * flops / (EFFICIENCY[torch.bfloat16] * card.flops)
            step = max(sent, computed)
            seconds = step * steps / gpus
            order: tuple[float, ...] = (0, step, sent)
            if memory.peak > room:
                order = (1, memory.peak, sent)
                seconds = math.inf
            way = Best(candidate, layout, memory, sent, computed, seconds, gpus)
            candidates.append((order, len(candidates), way))
    return min(candidates)[2]


def describe_savings(
    config: Config,
    recipe: Recipe,
    layout: Layout,
    workload: Workload,
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    adapter: dict,
) -> str:
    """Returns a sentence for a run that had too little memory: the sizes that were expected, and
    the three changes of flags that help most.

    shape: (--batch-size, --accumulate, --seq-len).
    dtype: the dtype of the products.
    adapter: {option: value} of a new adapter.
    """
    batch, accumulate, seq_len = shape

    def takes(
        recipe: Recipe,
        lengths: list[int] = workload.lengths,
        accumulate: int = workload.accumulate,
        layout: Layout = layout,
    ) -> Memory:
        """Returns the memory of the run with some changes. A shorter batch trains fewer tokens."""
        trained = math.ceil(workload.trained * sum(lengths) / sum(workload.lengths))
        changed = replace(workload, lengths=lengths, trained=trained, accumulate=accumulate)
        model = meta_model(config, recipe, dtype, adapter)
        return memory_per_process(model, recipe, layout, changed, device.type)

    # What each change of flags would take.
    savings: dict[str, Memory] = {}
    checkpointed = replace(recipe, checkpointing="full")
    savings["--activation-checkpointing full"] = takes(checkpointed)
    shorter = [min(n, seq_len // 2) for n in workload.lengths]
    savings[f"--seq-len {seq_len // 2}"] = takes(recipe, shorter)
    if recipe.ewc:
        savings["no --ewc"] = takes(replace(recipe, ewc=False))
    elif layout.shards < layout.gpus:
        savings["--shard full"] = takes(recipe, layout=Layout(layout.gpus, layout.gpus))
    if batch > 1:
        half = workload.lengths[: math.ceil(len(workload.lengths) / 2)]
        flags = f"--batch-size {batch // 2} --accumulate {2 * accumulate}"
        savings[flags] = takes(recipe, half, 2)
    method = METHODS[recipe.method]
    if "weights" in method.options:
        in_16_bits = replace(recipe, optimizer="adamw8bit", weights="bf16")
        savings["--optimizer adamw8bit --weights bf16"] = takes(in_16_bits)
    if method.lighter:
        lighter = replace(recipe, method=method.lighter)
        if not method.freezes_base:
            # The optimizer and the weights' dtype of full fine-tuning are not carried over.
            kind = recipe.checkpointing
            lighter = Recipe(method.lighter, checkpointing=kind, ewc=recipe.ewc)
        savings[f"--method {method.lighter}"] = takes(lighter)

    expected = takes(recipe)
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    sizes = ", ".join(f"{part} {getattr(expected, part) / 1e9:.2f}" for part in parts)
    if recipe.ewc:
        sizes += f", --ewc {expected.held / 1e9:.2f}"
    best = sorted(savings, key=lambda flags: savings[flags].peak)[:3]
    advice = ", ".join(f"{flags} ({savings[flags].peak / 1e9:.2f})" for flags in best)
    return f"The plan expected {expected.peak / 1e9:.2f} GB: {sizes}; what helps most: {advice}"
