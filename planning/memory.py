"""What a run will take, before it is begun: memory at the peak by part, floating point operations, time; and which way
of fine-tuning fits the machine.

`train.py --plan` asks for each method from config.json alone: the model is built of tensors without memory (the meta
device), so counts of weights are those of the real one. Everything else is arithmetic, which stands here to be read:

- memory at the peak: weights + the optimizer's moments + the largest of four moments in a step: at the head (what the
  blocks keep, a chunk of logits and its gradient), when the blocks' backward begins, when it ends, and when the
  embedding table's gradient is made, which is the last (all gradients);
- operations: 2 a weight and token forward, 2 for the inputs' gradient, 2 for the weight's own where it is trained, and
  7 T H d a layer for causal attention over T tokens (2 forward, 5 backward);
- time: operations over the rate of a product on this machine, timed now, times EFFICIENCY, which was measured.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import lora
from common import console as report
from data import max_tokens_per_micro_batch
from kernels.attention import (
    FLASH_HEAD_DIM,
    KEEP_PROBS_UP_TO,
    MAX_SCORES,
    SLICE_QUERIES,
    Documents,
    flash_head_dim,
    query_slices,
)
from kernels.cross_entropy import LOGITS_BYTES
from methods import METHODS
from model import Config, Linear, Transformer, quantized_linears
from optimizers import state_bytes
from quant import can_quantize, empty_nf4

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, published
EFFICIENCY = 0.45  # of a training step, against products alone; measured
RUNTIME = {"cpu": 1.5e9, "cuda": 0.0}  # bytes: Python, torch, oneDNN's products, freed memory that is not given back
CONTEXT = 1.0e9  # bytes of a GPU that torch does not count: CUDA's context, cuBLAS' workspace, fragments
FITS = 0.9  # of a device's memory: the figures are right to 10 %
CAPACITY = 2  # bits that a trained weight can hold (Allen-Zhu & Li 2024, arXiv 2404.05405)
LARGEST_RANK = 256  # beyond it full fine-tuning is the simpler way
BITS = 1  # that a trained token may teach, about (Schulman et al. 2025, "LoRA without regret")


@dataclass(frozen=True)
class Recipe:
    """One way to fine-tune."""

    method: str  # full, lora, qlora
    optimizer: str = "adamw"
    weights: str = "fp32"  # of trained weights, in full
    offload: bool = False  # of the optimizer's state to the host
    checkpointing: str = "none"

    def __str__(self) -> str:
        words = [f"--method {self.method}"]
        words += [f"--optimizer {self.optimizer}"] * (self.optimizer != "adamw")
        words += [f"--weights {self.weights}"] * (self.weights != "fp32") + ["--optimizer-offload"] * self.offload
        return " ".join(words + [f"--activation-checkpointing {self.checkpointing}"] * (self.checkpointing != "none"))


@dataclass
class Memory:
    """Bytes at the peak of training, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # kept by the blocks for their backward
    block: float  # by one of them, when it is computed (again, with checkpointing)
    logits: float  # of the head: a chunk of logits, its rows and their gradient, its own gradient where it is trained
    working: float  # of one block's backward, and a matrix made whole for a product
    runtime: float
    table: float  # the gradient of the embedding table, which is the last; 0 where it is not trained
    tied: bool  # it is added to the head's, which is the first
    recomputed: bool  # blocks are, in the backward
    accumulated: bool  # gradients of an earlier micro-batch are there all the while

    @property
    def peak(self) -> float:
        kept, grown = self.activations, 0 if self.accumulated else self.gradients
        last = 0 if self.accumulated or self.tied else self.table  # of `grown`, what is not there before the end
        beside = self.table if self.accumulated or self.tied else 0  # made beside what it is added to
        passing = max(
            kept + self.logits,
            kept + self.again + self.working,
            grown - last + self.block + self.working,
            grown + beside,
        )
        there = self.gradients if self.accumulated else 0
        return self.weights + self.optimizer + there + passing + self.runtime

    @property
    def again(self) -> float:
        return self.block if self.recomputed else 0


def meta_model(config: Config, recipe: Recipe, dtype: torch.dtype, adapter: dict | None) -> Transformer:
    """The model of a recipe without memory: shapes, dtypes and what is trained. adapter: arguments of lora.add_lora;
    None: no adapter is put on."""
    with torch.device("meta"):
        model = Transformer(config)
    method = METHODS[recipe.method]
    has_masters = not method.freezes_base and not recipe.offload and recipe.weights == "fp32"
    stored = torch.bfloat16 if recipe.weights == "bf16" else dtype
    model.to(torch.float32 if has_masters else stored)
    model.compute_dtype = dtype
    if method.quant or config.raw.get("quantization_config"):
        for name, layer in model.named_modules():
            if isinstance(layer, Linear) and name != "head" and can_quantize(layer.weight):
                layer.quantize(empty_nf4(layer.out_features, layer.in_features))
    if method.freezes_base and adapter is not None:
        lora.add_lora(model, **adapter)
    model.activation_checkpointing = recipe.checkpointing
    return model


def expected_memory(model: Transformer, recipe: Recipe, lengths: list[int], trained: int, device: str, accumulate: int):
    """Memory of training this model (real, or of `sketch`). lengths: of the examples of a micro-batch, the largest one;
    trained: its trained tokens."""
    c, item = model.config, model.dtype.itemsize
    parameters = list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    moments = 0 if recipe.offload else state_bytes(recipe.optimizer)
    optimizer = sum(p.numel() * moments for p in parameters if p.requires_grad)
    tokens, documents = sum(lengths), Documents(sorted(lengths))
    recomputed = recipe.checkpointing in ("full", "offload")
    layer = kept_by_a_block(model, documents, device, "none" if recomputed else recipe.checkpointing)
    activations = layer * c.num_layers
    if recomputed:  # the inputs, of which two are on their way to or from the host
        activations = (c.num_layers if recipe.checkpointing == "full" else 2) * tokens * c.hidden_size * item
    activations += 2 * tokens * c.hidden_size * item  # the last norm's input and output
    if device == "cuda" and METHODS[recipe.method].freezes_base:  # adapters as products take them (lora.ModelCasts)
        activations += item * sum(p.numel() for p in parameters if p.requires_grad)
    head = model.embed.weight if model.head is None else model.head.weight
    head_trained = head is not None and head.requires_grad
    budget = LOGITS_BYTES.get(device, LOGITS_BYTES["cuda"])
    logits = min(budget, trained * c.vocab_size * item) + 2 * trained * c.hidden_size * item
    logits += c.vocab_size * c.hidden_size * (4 + item) if head_trained else 0
    working = working_bytes(model, documents, device)
    runtime = RUNTIME.get(device, RUNTIME["cpu"])
    table = model.embed.weight.nbytes if model.embed.weight.requires_grad else 0
    tied = model.head is None
    return Memory(
        weights, gradients, optimizer, activations, layer, logits, working, runtime, table, tied, recomputed,
        accumulate > 1,
    )  # fmt: skip


def by_flash(config: Config, device: str, item: int) -> bool:
    """Whether attention is one kernel over all documents: FlashAttention, or FlexAttention for soft-caps."""
    return device == "cuda" and item == 2 and config.head_dim <= FLASH_HEAD_DIM


def in_chunks(config: Config, device: str, item: int) -> bool:
    """Whether documents are attended to in slices whose scores are not kept."""
    return config.attention_softcap is not None and not by_flash(config, device, item)


def in_groups(config: Config, device: str, item: int) -> bool:
    """Whether all routed experts of a layer are computed at once (kernels/experts.py)."""
    return config.experts is not None and device == "cuda" and item == 2


def working_bytes(model: Transformer, documents: Documents, device: str) -> float:
    """What a block's backward makes for a while: gradients inside its MLP, matrices that are made for a product."""
    c, item, tokens = model.config, model.dtype.itemsize, sum(documents.lengths)
    wide = c.experts.intermediate_size if c.experts else c.intermediate_size  # experts take turns
    mlp = tokens * (3 * wide + c.hidden_size) * item
    scores = 0
    if in_chunks(c, device, item):
        scores = sum(group.documents * group.length**2 * c.num_heads for group in documents.groups)
    mlp = max(mlp, (12 if item == 4 else 16) * min(scores, MAX_SCORES))
    made = item if device == "cuda" else 6  # bytes a number: in the dtype, and first in fp32 where no kernel does it
    matrices = [made * m.in_features * m.out_features for m in quantized_linears(model).values()]
    cast = [p for p in model.parameters() if p.requires_grad and p.dtype != model.dtype and p.dim() == 2]
    matrix = max([*matrices, *(p.numel() * item for p in cast)], default=0)
    if device != "cuda":
        return mlp + matrix
    # The kernel of the gate's backward needs no matrix, and the products before and behind it fewer tensors
    products = tokens * 2 * (wide + c.hidden_size) * item + matrix
    return max(mlp, products, working_of_experts(model, tokens) if in_groups(c, device, item) else 0)


def working_of_experts(model: Transformer, tokens: int) -> float:
    """The same of routed experts that are computed at once."""
    c, item = model.config, model.dtype.itemsize
    pairs, inner = tokens * c.experts.active, c.experts.intermediate_size
    gate_up = 2 * c.experts.count * inner * c.hidden_size * item
    of_experts = {name: p for name, p in model.named_parameters() if ".experts." in name and ".lora_" not in name}
    made = any(p.dtype != model.dtype for p in of_experts.values())  # of codes, or of masters in fp32
    return max(
        pairs * (4 * inner + c.hidden_size) * item,
        pairs * (2 * inner + c.hidden_size) * item + gate_up * made,
    )


def inner_width(config: Config) -> int:
    """Of what a token passes through in an MLP."""
    if config.experts is None:
        return config.intermediate_size
    return config.experts.active * config.experts.intermediate_size


def kept_by_a_block(model: Transformer, documents: Documents, device: str, checkpointing: str) -> float:
    """Bytes that a block keeps for its backward (kernels/activation_checkpointing.py says what)."""
    c, item, D = model.config, model.dtype.itemsize, model.config.hidden_size
    tokens = sum(documents.lengths)
    inputs = 1 if c.parallel else 2  # of norms, or of attention and MLP where norms stand behind
    normal = (1 if c.shared_norm else 2) if c.pre_norm else 0
    numbers = inputs * D + (normal * D if checkpointing == "none" else 0) + 2 * D * c.post_norm
    numbers += c.num_heads * c.head_dim  # attention's output
    numbers += (c.num_heads + c.num_kv_heads) * c.head_dim * (c.qk_norm is not None)  # q and k before their norms
    numbers += 2 * inner_width(c)
    numbers += 2 * c.experts.active * D if c.experts and not in_groups(c, device, item) else 0
    adapted = lora.lora_layers(model)
    numbers += sum(layer.rank for layer in adapted.values()) / c.num_layers  # x A^T
    rows = (inputs + 2 * (c.qk_norm is not None)) * 4  # a norm's own number, fp32
    return tokens * (numbers * item + rows) + kept_by_attention(c, documents, device, item, checkpointing)


def kept_by_attention(c: Config, documents: Documents, device: str, item: int, checkpointing: str) -> float:
    """Bytes: q, k and v, and what attention needs besides; its output is kept by the product behind it."""
    heads = c.num_heads + 2 * c.num_kv_heads
    if by_flash(c, device, item):
        size = flash_head_dim(c.head_dim) if c.attention_softcap is None else c.head_dim
        wide = heads + c.num_heads * (size > c.head_dim)  # where heads are padded, the output is kept padded as well
        return sum(documents.lengths) * (wide * size * item + c.num_heads * 4)  # and a number a query, fp32
    padded, more = 0, 0.0
    for group in documents.groups:  # documents padded to one length
        padded += group.documents * group.length
        if in_chunks(c, device, item):
            continue
        if device == "cpu" and group.length <= KEEP_PROBS_UP_TO:
            seen = sum(
                (rows.stop - rows.start) * seen.stop for rows, seen in query_slices(group.length, SLICE_QUERIES, None)
            )
            more += group.documents * seen * c.num_heads * (checkpointing == "none")
        else:
            more += group.documents * group.length * c.num_heads * c.head_dim  # its output, before it lies flat
    return (padded * heads * c.head_dim + more) * item


def flops_a_token(
    model: Transformer, mean_context: float = 0.0, trained: float = 1.0, checkpointing: str = "none"
) -> float:
    """Operations of a training step, a token. reach: how many tokens attention looks back over, on average twice that
    (sum of squared lengths over sum of lengths); trained: the share of tokens that reach the head."""
    c, total = model.config, 0.0
    sizes = [(name, p.numel(), p.requires_grad) for name, p in model.named_parameters() if p.dim() == 2]
    sizes = [each for each in sizes if not each[0].startswith(("embed.", "positions.")) and ".nf4." not in each[0]]
    sizes += [(name, m.in_features * m.out_features, False) for name, m in quantized_linears(model).items()]
    for name, size, learns in sizes:
        share = c.experts.active / c.experts.count if ".experts." in name else trained if name == "head.weight" else 1
        again = 2 if checkpointing in ("full", "offload") and name.startswith("blocks.") else 0
        total += share * size * ((6 if learns else 4) + again)
    shared = model.embed.weight  # the head as well, if there is none of its own
    total += trained * shared.numel() * (6 if shared.requires_grad else 4) if model.head is None else 0
    return total + 7 * mean_context * c.num_heads * c.head_dim * c.num_layers


def product_rate(config: Config, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s in a product of the model's own shape; takes about a tenth of a second."""
    rows = 8192 if device.type == "cuda" else 512  # fewer leave a GPU's multiprocessors without work
    x = torch.randn(rows, config.hidden_size, device=device).to(dtype)
    w = torch.randn(config.hidden_size, config.intermediate_size, device=device).to(dtype)
    seconds = seconds_on_gpu if device.type == "cuda" else seconds_on_host
    return 2 * x.numel() * w.shape[1] / seconds(lambda: x @ w)


def seconds_on_host(product: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(8):
        start = time.perf_counter()
        float(product()[0, 0])  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times)


def seconds_on_gpu(product: Callable[[], Tensor], times: int = 16) -> float:
    """Of one of several products that follow each other, by the GPU's own clock: what the host takes to ask for one,
    and to hear that it is done, is not counted."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(4):  # the library chooses its kernel, the card raises its clock
        product()
    begin.record()
    for _ in range(times):
        product()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def tokens_at_once(device: torch.device, room: float, peak: Callable[[int], float]) -> int:
    """Tokens of a micro-batch, the most that are of use and fit. peak(tokens): bytes that training with so many takes;
    room: bytes that it may take. On CPUs memory is never the reason for fewer."""
    most = max_tokens_per_micro_batch(device)
    if device.type == "cpu":
        return most
    choices = [n for n in (16384, 12288, 8192, 6144, 4096, 3072, 2048, 1024) if n <= most]
    return next((tokens for tokens in choices if peak(tokens) <= room), choices[-1])


def device_memory(device: torch.device) -> float:
    """Bytes that a run can have: of the GPU, or of the machine, or of what a container is allowed."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)  # others may have some of it; what torch holds is this run's
        return min(total - CONTEXT, free + torch.cuda.memory_reserved(device))
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(found, int(text)) if text.isdigit() else found


@dataclass
class Workload:
    """What is to be trained on: examples' lengths, trained tokens, and how many pass through in all."""

    lengths: list[int]  # of a micro-batch, the largest that there may be
    trained: int  # tokens of it
    share: float  # of tokens that are trained
    mean_context: float  # sum of squared lengths over sum of lengths, of all
    tokens: float  # of the whole training, with half of what is validated
    to_learn: int  # trained tokens of the data
    accumulate: int

    def cut(self, tokens: int) -> "Workload":
        """The same with micro-batches of at most so many tokens, but for an example that is longer: the longest ones
        together, and more micro-batches a step."""
        kept: list[int] = []
        for length in sorted(self.lengths, reverse=True):
            if not kept or sum(kept) + length <= tokens:
                kept.append(length)
        if len(kept) == len(self.lengths):
            return self
        trained = math.ceil(self.trained * sum(kept) / sum(self.lengths))
        times = math.ceil(sum(self.lengths) / sum(kept))
        return replace(self, lengths=kept, trained=trained, accumulate=self.accumulate * times)


def fitting_job(workload: Workload, device: torch.device, room: float, takes: Callable[[Workload], Memory]) -> Workload:
    """The job in micro-batches that fit, as `tokens_at_once` has them. takes: what a job takes."""
    return workload.cut(tokens_at_once(device, room, lambda tokens: takes(workload.cut(tokens)).peak))


def recipes(config: Config, device: torch.device) -> list[Recipe]:
    found = [] if config.raw.get("quantization_config") else [
        Recipe("full"),
        Recipe("full", "adamw8bit"),
        Recipe("full", "adamw8bit", "bf16"),
        *[Recipe("full", offload=True)] * (device.type == "cuda"),
        Recipe("lora"),
    ]  # fmt: skip
    return [*found, Recipe("qlora")]


def print_plan(config: Config, workload: Workload, device: torch.device, dtype: torch.dtype, adapter: dict) -> None:
    """Prints the table and the recommendation."""
    room, rate = FITS * device_memory(device), product_rate(config, device, dtype)
    kinds = ("none", "selective", "full", *["offload"] * (device.type == "cuda"))
    rows = [["", "weights", "gradients", "moments", "logits", *(f"{k}: kept, peak" for k in kinds), "GFLOP", "minutes"]]
    fitting: list[tuple[Recipe, float]] = []
    smallest = None
    for recipe in recipes(config, device):
        cells, costs = [], []
        for kind in kinds:
            recipe = replace(recipe, checkpointing=kind)
            model = meta_model(config, recipe, dtype, adapter)
            takes = lambda workload, model=model, recipe=recipe: expected_memory(
                model, recipe, workload.lengths, workload.trained, device.type, workload.accumulate
            )
            memory = takes(fitting_job(workload, device, room, takes))
            costs.append(flops_a_token(model, workload.mean_context, workload.share, kind))
            cells.append(
                f"{memory.activations / 1e9:.2f}, {memory.peak / 1e9:.2f}{' ' if memory.peak <= room else '!'}"
            )
            if memory.peak <= room:
                fitting.append((recipe, memory.peak))
            smallest = min(smallest or (memory.peak, recipe), (memory.peak, recipe), key=lambda pair: pair[0])
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.logits)
        name = str(replace(recipe, checkpointing="none")).replace("--method ", "")
        minutes = [workload.tokens * cost / (EFFICIENCY * rate) / 60 for cost in (costs[0], costs[2])]
        rows.append(
            [name, *(f"{part / 1e9:.2f}" for part in parts), *cells]
            + [f"{costs[0] / 1e9:.2f}", f"{minutes[0]:.1f} to {minutes[1]:.1f}"]
        )
    print(report.table(rows))
    print(f"GB; ! is more than the {room / 1e9:.1f} that may be used here. kept: activations that the blocks keep for")
    print("their backward, with that --activation-checkpointing; peak: weights, moments, and what a step adds at its")
    print("height. GFLOP: a token, without checkpointing;")
    if device.type != "cpu":
        print(f"micro-batches have up to {max_tokens_per_micro_batch(device):,} tokens, fewer where those do not fit;")
    print(f"minutes: none and full, at {EFFICIENCY:.0%} of the {rate / 1e9:,.0f} GFLOP/s that a product reaches here")
    print(f"plan      {recommend(config, workload, dtype, adapter, fitting, room, smallest)}")


def recommend(config: Config, workload: Workload, dtype, adapter: dict, fitting: list, room: float, smallest) -> str:
    """One line: what to take, and why.

    Adapters learn as well as full fine-tuning does until the data hold more than they can (Schulman et al. 2025;
    Biderman et al. 2024, arXiv 2405.09673), so the question is first how much there is to learn, then what fits.
    """
    if not fitting:
        peak, recipe = smallest
        least = f"nothing fits: the least, {recipe}, takes {peak / 1e9:.1f} of {room / 1e9:.1f} GB"
        return f"{least}; lower --batch-size or --seq-len"
    first = {}
    for recipe, peak in fitting:  # of each method the first that fits: the fastest, nearest to plain AdamW in fp32
        first.setdefault(recipe.method, (recipe, peak))
    drawn, rank = meta_model(config, Recipe("lora"), dtype, adapter), adapter["rank"]
    holds = CAPACITY / BITS * sum(p.numel() for p in drawn.parameters() if p.requires_grad)  # trained tokens
    enough = math.ceil(rank * workload.to_learn / holds)  # the rank that holds them all
    method = next(m for m in ("lora", "qlora", "full") if m in first)
    if enough > LARGEST_RANK and "full" in first:
        method = "full"
    recipe, peak = first[method]
    why = f"{workload.to_learn:,} trained tokens; adapters of rank {rank} hold about {holds:,.0f}"
    if method == "full":
        why += ", and full fits"
    elif enough > rank:
        why += f", of rank {enough} all of them"
    else:
        why += ", so full would learn no more"
    if method == "qlora" and "lora" not in first:
        why += "; 16-bit weights do not fit"
    more = f" --rank {enough}" if rank < enough and method != "full" else ""
    return f"{recipe}{more}: {peak / 1e9:.1f} of {room / 1e9:.1f} GB; {why}"
