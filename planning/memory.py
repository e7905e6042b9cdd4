"""Predicts what a run will take: memory at the peak by part, floating point operations, and time.
Recommends the method of fine-tuning that fits the machine.

`train.py --plan` asks this for each method. The model is built from config.json alone, of tensors
without memory (the meta device), so the counts of weights are those of the real model. Everything
else is arithmetic:

- memory at the peak: weights + the optimizer's moments + the largest of four points in a step: at
  the head (what the blocks keep, a chunk of logits and its gradient), when the backward of the
  blocks begins, when it ends, and when the gradient of the embedding table is made, which is the
  last one (all gradients exist then);
- operations: 2 per weight and token in the forward, 2 for the gradient of the inputs, 2 for the
  gradient of the weight where it is trained, and 7 T H d per layer for causal attention over T
  tokens (2 forward, 5 backward);
- time: operations divided by the rate of a matrix product on this machine (timed now) times
  EFFICIENCY (measured).
"""

import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lora
from adapter_files import adapter_modules
from adapting.new_tokens import read_token_texts
from adapting.tables import (
    TrainedRows,
    add_tables,
    asked_tables,
    grow_vocabulary,
    is_head_tied,
    tables_of,
)
from common import console
from data import max_tokens_per_micro_batch
from flags import NEW_ADAPTER
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

# FLOP/s of dense bf16 products, as the vendor publishes them.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}

# The rate of a training step, as a share of the rate of a matrix product; measured on CPUs. Products
# in fp32 take so long that what is around them counts less.
EFFICIENCY = {torch.bfloat16: 0.45, torch.float32: 0.73}

# A training that takes longer, in seconds, is none for this machine.
TOO_LONG = 14 * 24 * 3600
OTHER_MACHINE = "--plan --gpus 1 --gpu-memory 24 (or 48, 80, 141) plans for a GPU"
# Options of a recipe that have no value.
BARE_FLAGS = ("--optimizer-offload",)

# Bytes of the process itself: Python, torch, oneDNN's products, freed memory that is not returned
# to the system.
RUNTIME = {"cpu": 1.5e9, "cuda": 0.0}

# Bytes of a GPU that torch does not count: CUDA's context, the workspace of cuBLAS, fragments.
CONTEXT = 1.0e9

# The share of a device's memory that a plan may use: the figures are right to 10 %.
FITS = 0.9

# Bits that a trained weight can hold (Allen-Zhu & Li 2024, arXiv 2404.05405).
CAPACITY = 2

# The largest rank that is recommended: beyond it, full fine-tuning is simpler.
LARGEST_RANK = 256

# Bits that a trained token may teach, about (Schulman et al. 2025, "LoRA without regret").
BITS = 1


@dataclass(frozen=True)
class Recipe:
    """One way to fine-tune.

    method: a key of METHODS, for example "full", "lora" or "qlora".
    optimizer: the value of --optimizer.
    weights: the dtype that trained weights are stored in by full fine-tuning.
    offload: whether the state of the optimizer is on the host.
    checkpointing: the value of --activation-checkpointing.
    ewc: whether --ewc holds the weights near their start.
    quant: --quant, where it is asked for and --method does not imply it.
    """

    method: str
    optimizer: str = "adamw"
    weights: str = "fp32"
    offload: bool = False
    checkpointing: str = "none"
    ewc: bool = False
    quant: str | None = None

    @property
    def name(self) -> str:
        """A short name: what follows --method, --optimizer and --weights."""
        words = str(self).split()
        return " ".join(word for word in words if not word.startswith("--") or word in BARE_FLAGS)

    def __str__(self) -> str:
        """Returns the flags of train.py that ask for this recipe."""
        words = [f"--method {self.method}"]
        if self.quant:
            words.append(f"--quant {self.quant}")
        if self.optimizer != "adamw":
            words.append(f"--optimizer {self.optimizer}")
        if self.weights != "fp32":
            words.append(f"--weights {self.weights}")
        if self.offload:
            words.append("--optimizer-offload")
        if self.checkpointing != "none":
            words.append(f"--activation-checkpointing {self.checkpointing}")
        return " ".join(words)


@dataclass
class Memory:
    """Bytes that training takes, by part.

    weights, gradients, optimizer: of all parameters. Only trained ones have the latter two.
    activations: what all blocks keep for their backward.
    block: what one block keeps when it is computed; with checkpointing, when it is computed again.
    logits: the head: a chunk of logits, its rows and their gradient, and the head's own gradient if
        it is trained.
    working: what the backward of one block takes, and a matrix that is restored in full for a
        product.
    runtime: the process itself.
    table: the gradient of the embedding table, the last to be made; 0 if the table is not trained.
    tied: whether the head is the embedding table. Then its gradient is added to that of the head,
        which is the first.
    recomputed: whether the backward computes the blocks again.
    accumulated: whether the gradients of an earlier micro-batch exist during the whole step.
    held: what --ewc keeps: Fisher information and start of the weights.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    block: float
    logits: float
    working: float
    runtime: float
    table: float
    tied: bool
    recomputed: bool
    accumulated: bool
    held: float = 0.0

    @property
    def peak(self) -> float:
        """The most bytes that a step takes: what is always there, and the largest of 4 points."""
        new_gradients = 0 if self.accumulated else self.gradients
        # The part of `new_gradients` that does not exist before the end of the backward.
        last_gradient = 0 if self.accumulated or self.tied else self.table
        # A gradient that is added to another one is a tensor of its own until it is added.
        unadded_gradient = self.table if self.accumulated or self.tied else 0
        at_the_head = self.activations + self.logits
        backward_begins = self.activations + self.again + self.working
        backward_ends = new_gradients - last_gradient + self.block + self.working
        all_gradients = new_gradients + unadded_gradient
        step = max(at_the_head, backward_begins, backward_ends, all_gradients)
        old_gradients = self.gradients if self.accumulated else 0
        return self.weights + self.optimizer + old_gradients + step + self.runtime + self.held

    @property
    def again(self) -> float:
        """Bytes that a block keeps when the backward computes it again; 0 if it does not."""
        return self.block if self.recomputed else 0


def meta_model(
    config: Config,
    recipe: Recipe,
    dtype: torch.dtype,
    adapter: dict | None,
    quant: str | None = None,
) -> Transformer:
    """Returns the model of a recipe, without memory: shapes, dtypes and what is trained.

    dtype: the dtype of the products.
    adapter: {option: value} of a new adapter; None adds none.
    quant: the 4-bit format, as checkpoint.load_model takes it, where it is another than the
        method's own.
    """
    with torch.device("meta"):
        model = Transformer(config)
    method = METHODS[recipe.method]
    has_masters = not method.freezes_base and not recipe.offload and recipe.weights == "fp32"
    storage_dtype = torch.bfloat16 if recipe.weights == "bf16" else dtype
    model.to(torch.float32 if has_masters else storage_dtype)
    if model.score is not None:
        model.score.float()
    model.compute_dtype = dtype
    quant = quant or recipe.quant or method.quant
    if quant or config.raw.get("quantization_config"):
        with_head = quant is not None and "head" in quant
        for name, layer in model.named_modules():
            if not isinstance(layer, Linear) or not can_quantize(layer.weight):
                continue
            if name != "head" or with_head:
                layer.quantize(empty_nf4(layer.out_features, layer.in_features))
    if method.freezes_base and adapter is not None:
        # A new adapter, on all linears and without dropout if nothing else is said.
        options = {"adapter": None, "resume": None, "out": None} | NEW_ADAPTER | {"dropout": 0.0}
        options |= {**method.defaults} | adapter
        # Which ids are trained the tokenizer says; here their number counts.
        rows = number_of_new_tokens(adapter) + number_of_named_tokens(adapter)
        saved = options["modules_to_save"]
        options |= {"add_tokens": None, "train_tokens": None, "modules_to_save": None}
        method.attach(model, SimpleNamespace(**options))
        add_planned_tables(model, rows, number_of_new_tokens(adapter), saved)
    elif adapter is not None:
        grow_vocabulary(model, config.vocab_size + number_of_new_tokens(adapter))
    model.activation_checkpointing = recipe.checkpointing
    return model


def number_of_new_tokens(adapter: dict) -> int:
    """Returns how many tokens --add-tokens adds. adapter: {option: value}."""
    file = adapter.get("add_tokens")
    return len(read_token_texts(Path(file))) if file else 0


def number_of_named_tokens(adapter: dict) -> int:
    """Returns how many tokens --train-tokens names. adapter: {option: value}."""
    named = adapter.get("train_tokens")
    return len(named.split(",")) if named else 0


def add_planned_tables(model: Transformer, rows: int, new: int, saved: str | None) -> None:
    """Adds to a model without memory as many trained rows of embeddings as a run has, and the tables of
    --modules-to-save. new: how many of the rows the table does not have (it may; then it is less)."""
    names = asked_tables(model, saved)
    # A head in 4 bits gets no more rows: then the tokens have some of those that are there.
    grows = all(table.nf4 is None for table in tables_of(model).values())
    size = model.config.vocab_size + (new if grows else 0)
    ids = dict.fromkeys(tables_of(model), range(size - rows, size))
    if rows or names:
        add_tables(model, ids, names, size)


def expected_memory(
    model: Transformer,
    recipe: Recipe,
    lengths: list[int],
    trained: int,
    device: str,
    accumulate: int,
) -> Memory:
    """Returns the memory that training this model is expected to take.

    model: a real model, or one of `meta_model`.
    lengths: the lengths in tokens of the examples of the largest micro-batch.
    trained: the trained tokens of that micro-batch.
    device: "cpu", "cuda" or "mps".
    accumulate: micro-batches of a step.
    """
    config = model.config
    item = model.dtype.itemsize
    parameters = list(model.parameters())
    trained_parameters = [p for p in parameters if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    gradients = sum(p.numel() * p.element_size() for p in trained_parameters)
    moments = 0 if recipe.offload else state_bytes(recipe.optimizer)
    optimizer = sum(p.numel() * moments for p in trained_parameters)

    # What all blocks keep. With checkpointing these are their inputs only; with offloading two of
    # the inputs, which are on their way to or from the host.
    tokens = sum(lengths)
    # Attention has the virtual tokens of a learned prompt as well.
    documents = Documents([length + model.virtual_tokens for length in sorted(lengths)])
    hidden_states = tokens * config.hidden_size * item
    recomputed = recipe.checkpointing in ("full", "offload")
    # While a block is computed again, it keeps what it would keep without checkpointing.
    kind = "none" if recomputed else recipe.checkpointing
    block = kept_by_a_block(model, documents, device, kind)
    if recomputed:
        inputs = config.num_layers if recipe.checkpointing == "full" else 2
        activations = inputs * hidden_states
    else:
        activations = block * config.num_layers
    # The input and the output of the last norm.
    activations += 2 * hidden_states
    if device == "cuda" and model.lora_casts is not None:
        # The adapters in the dtype of the products (lora.ModelCasts).
        activations += item * sum(p.numel() for p in trained_parameters)

    embedding = looked_up(model.embed)
    # A score head has a few numbers a document, whose gradient is one of all hidden states.
    logits: float = hidden_states
    if model.score is None:
        logits = logits_bytes(model, trained, device)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        block=block,
        logits=logits,
        working=working_bytes(model, documents, device),
        runtime=RUNTIME.get(device, RUNTIME["cpu"]),
        table=embedding.nbytes if embedding.requires_grad else 0,
        tied=is_head_tied(model),
        recomputed=recomputed,
        accumulated=accumulate > 1,
        held=held_bytes(model, recipe) if recipe.ewc else 0.0,
    )


def logits_bytes(model: Transformer, trained: int, device: str) -> float:
    """Returns the bytes that the LM head and its loss take. trained, device: as of
    `expected_memory`."""
    config = model.config
    item = model.dtype.itemsize
    head = looked_up(model.head_table)
    budget = LOGITS_BYTES.get(device, LOGITS_BYTES["cuda"])
    chunk = min(budget, trained * config.vocab_size * item)
    # The rows that reach the head, and their gradient.
    rows = 2 * trained * config.hidden_size * item
    logits = chunk + rows
    if head is not None and head.requires_grad:
        # The head's own gradient.
        logits += config.vocab_size * config.hidden_size * (4 + item)
    elif isinstance(model.head_table, TrainedRows):
        # The head with the trained rows in it, which is made for each micro-batch.
        logits += config.vocab_size * config.hidden_size * item
    return logits


def looked_up(table: nn.Module) -> Any:
    """Returns the parameter that is read as an embedding table or output head: the one that is trained
    in its place, where there is one (adapting/tables.py); None where it is in 4 bits."""
    return getattr(table, "trained_table", table.weight)


def held_bytes(model: Transformer, recipe: Recipe) -> float:
    """Returns the bytes that --ewc keeps (training/ewc.py): for each trained weight its start and its
    Fisher information; or that of each adapted weight alone, for adapters that begin with no
    update."""
    if METHODS[recipe.method].held == "weights":
        return 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    item = fisher_dtype(model.dtype).itemsize
    bases = [layer.base for layer in lora.lora_layers(model).values()]
    return item * sum(base.in_features * base.out_features for base in bases)


def fisher_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which --ewc keeps the Fisher information of an adapted weight. dtype: of
    the products. Squares are too small for fp16, and fp32 would take twice the base's memory."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def by_flash(config: Config, device: str, item: int) -> bool:
    """True if attention is one kernel over all documents.

    That is FlashAttention, or FlexAttention for soft-capped scores.

    item: bytes of a number in the dtype of the products.
    """
    return device == "cuda" and item == 2 and config.head_dim <= FLASH_HEAD_DIM


def in_groups(config: Config, device: str, item: int) -> bool:
    """True if all routed experts of a layer are computed in one product (kernels/experts.py)."""
    return config.experts is not None and device == "cuda" and item == 2


def working_bytes(model: Transformer, documents: Documents, device: str) -> float:
    """Returns the bytes that the backward of a block needs for a while: gradients inside its MLP,
    and matrices that are converted for a product."""
    config = model.config
    item = model.dtype.itemsize
    tokens = sum(documents.lengths)
    # Experts are computed one after the other, except in groups (below).
    width = config.experts.intermediate_size if config.experts else config.intermediate_size
    mlp = tokens * (3 * width + config.hidden_size) * item
    # Soft-capped scores are computed in slices (SlicedAttention), except by FlexAttention.
    scores = 0
    if config.attention_softcap is not None and not by_flash(config, device, item):
        for group in documents.groups:
            scores += group.documents * group.length**2 * config.num_heads
    bytes_a_score = 12 if item == 4 else 16
    mlp = max(mlp, bytes_a_score * min(scores, MAX_SCORES))

    # The largest matrix that is dequantized or cast. Without a kernel, a number is computed in fp32
    # first: 6 bytes.
    dequantized_item = item if device == "cuda" else 6
    matrices = []
    for layer in quantized_linears(model).values():
        matrices.append(dequantized_item * layer.in_features * layer.out_features)
    for p in model.parameters():
        if p.requires_grad and p.dtype != model.dtype and p.dim() == 2:
            matrices.append(p.numel() * item)
    largest_matrix = max(matrices, default=0)
    if device != "cuda":
        return mlp + largest_matrix

    # The kernel of the gate's backward needs no matrix, and the products before and after it need
    # fewer tensors.
    products = tokens * 2 * (width + config.hidden_size) * item + largest_matrix
    experts = working_of_experts(model, tokens) if in_groups(config, device, item) else 0
    return max(mlp, products, experts)


def working_of_experts(model: Transformer, tokens: int) -> float:
    """Returns the same as `working_bytes`, for routed experts that are computed in one product."""
    config = model.config
    item = model.dtype.itemsize
    pairs = tokens * config.experts.active
    width = config.experts.intermediate_size
    # The matrices of NF4 codes, or of masters in fp32, are converted for the product.
    gate_and_up = 0
    for name, p in model.named_parameters():
        is_weight = ".experts." in name and ".lora_" not in name
        if is_weight and p.dtype != model.dtype:
            gate_and_up = 2 * config.experts.count * width * config.hidden_size * item
    gates = pairs * (4 * width + config.hidden_size) * item
    products = pairs * (2 * width + config.hidden_size) * item + gate_and_up
    return max(gates, products)


def inner_width(config: Config) -> int:
    """Returns the numbers that an MLP computes for a token between its two products."""
    if config.experts is None:
        return config.intermediate_size
    return config.experts.active * config.experts.intermediate_size


def kept_by_a_block(
    model: Transformer, documents: Documents, device: str, checkpointing: str
) -> float:
    """Returns the bytes that a block keeps for its backward.

    kernels/activation_checkpointing.py says which they are.
    """
    config = model.config
    item = model.dtype.itemsize
    hidden = config.hidden_size
    tokens = sum(documents.lengths)

    # `numbers` counts the numbers of a token that are kept in the dtype of the products.
    # The inputs of the norms, or of attention and MLP if the norms come after them.
    inputs = 1 if config.parallel else 2
    numbers = inputs * hidden
    if config.pre_norm and checkpointing == "none":
        norm_outputs = 1 if config.shared_norm else 2
        numbers += norm_outputs * hidden
    if config.post_norm:
        numbers += 2 * hidden
    # The output of attention.
    numbers += config.num_heads * config.head_dim
    # q and k before their norms.
    if config.qk_norm is not None:
        numbers += (config.num_heads + config.num_kv_heads) * config.head_dim
    numbers += 2 * inner_width(config)
    if config.experts and not in_groups(config, device, item):
        numbers += 2 * config.experts.active * hidden
    # What the adapters keep, such as x A^T.
    kept = sum(module.saved_numbers for module in adapter_modules(model).values())
    numbers += kept / config.num_layers

    # A norm keeps one fp32 number of its own for each token.
    norms = inputs
    if config.qk_norm is not None:
        norms += 2
    attention = kept_by_attention(config, documents, device, item, checkpointing)
    return tokens * (numbers * item + norms * 4) + attention


def kept_by_attention(
    c: Config, documents: Documents, device: str, item: int, checkpointing: str
) -> float:
    """Returns the bytes of q, k and v, and of what else attention keeps for its backward.

    The output of attention is not counted: the product after it keeps it.

    item: bytes of a number in the dtype of the products.
    """
    # The heads of q, k and v together.
    heads = c.num_heads + 2 * c.num_kv_heads
    if by_flash(c, device, item):
        size = flash_head_dim(c.head_dim) if c.attention_softcap is None else c.head_dim
        # If the heads are padded, the padded output is kept as well.
        if size > c.head_dim:
            heads += c.num_heads
        # And one fp32 number for each query and head.
        return sum(documents.lengths) * (heads * size * item + c.num_heads * 4)

    padded_tokens = 0
    other_numbers = 0.0
    for group in documents.groups:
        padded_tokens += group.documents * group.length
        # Soft-capped scores are computed again in the backward.
        if c.attention_softcap is not None:
            continue
        is_long = group.length > KEEP_PROBS_UP_TO
        # So are the scores of long documents in bf16 on CPUs.
        if device == "cpu" and is_long and item == 2:
            continue
        if device != "cpu" or is_long:
            # The output as a padded tensor, before it is made flat.
            other_numbers += group.documents * group.length * c.num_heads * c.head_dim
        elif checkpointing == "none":
            # The probabilities: every slice of queries keeps those of the keys that it attends to.
            probs = 0
            for queries, keys in query_slices(group.length, SLICE_QUERIES, None):
                probs += (queries.stop - queries.start) * keys.stop
            other_numbers += group.documents * probs * c.num_heads
    return (padded_tokens * heads * c.head_dim + other_numbers) * item


def flops_a_token(
    model: Transformer,
    lengths: Sequence[int] | np.ndarray = (),
    trained: float = 1.0,
    checkpointing: str = "none",
) -> float:
    """Returns the floating point operations of a training step, per token.

    lengths: of the documents, in tokens; attention is counted over them. Without any, it is not
        counted.
    trained: the share of tokens that reach the head.
    checkpointing: the value of --activation-checkpointing.
    """
    config = model.config
    # Every matrix that is multiplied: (name, numbers, whether it is trained). Embeddings are looked
    # up instead.
    matrices = []
    for name, p in model.named_parameters():
        # Looked up, or computed once a batch.
        is_looked_up = name.startswith(("embed.", "positions.", "prompt."))
        if p.dim() == 2 and not is_looked_up and ".nf4." not in name:
            matrices.append((name, p.numel(), p.requires_grad))
    for name, layer in quantized_linears(model).items():
        matrices.append((name, layer.in_features * layer.out_features, False))

    total = 0.0
    for name, size, is_trained in matrices:
        # The share of the tokens that this matrix is multiplied with.
        if ".experts." in name:
            share = config.experts.active / config.experts.count
        elif name in ("head.weight", "head.trained_table"):
            share = trained
        elif name.startswith("head."):
            # Beside what is trained in its place, or a few rows.
            share = (
                0 if name != "head.base.weight" or hasattr(model.head, "trained_table") else trained
            )
        else:
            share = 1
        operations = 6 if is_trained else 4
        if checkpointing in ("full", "offload") and name.startswith("blocks."):
            operations += 2
        total += share * size * operations
    if is_head_tied(model):
        # The embedding table is the head as well.
        embedding = looked_up(model.embed)
        total += trained * embedding.numel() * (6 if embedding.requires_grad else 4)
    if len(lengths):
        # Most layers share a window, and there may be many lengths.
        contexts: dict[int | None, float] = {}
        for layer in config.layers:
            if layer.window not in contexts:
                contexts[layer.window] = mean_context(lengths, layer.window)
            total += 14 * contexts[layer.window] * config.num_heads * config.head_dim
    return total


def mean_context(lengths: Sequence[int] | np.ndarray, window: int | None) -> float:
    """Returns the number of tokens that a token attends to, on average over these documents.

    The tokens of a document of T attend to T^2 / 2 tokens in all, and with a window of w < T tokens
    to w T - w^2 / 2.
    """
    lengths = np.asarray(lengths, dtype=float)
    reach = lengths if window is None else np.minimum(lengths, window)
    return float((reach * (2 * lengths - reach)).sum() / (2 * lengths.sum()))


def product_rate(config: Config, device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of a matrix product with the shape of the model's MLP.

    It takes about a tenth of a second.
    """
    # Fewer rows leave multiprocessors of a GPU without work.
    rows = 8192 if device.type == "cuda" else 512
    # Random numbers of its own, so that the run's do not depend on what is timed before it.
    generator = torch.Generator(device=device).manual_seed(0)
    width, inner = config.hidden_size, config.intermediate_size
    x = torch.randn(rows, width, device=device, generator=generator).to(dtype)
    w = torch.randn(width, inner, device=device, generator=generator).to(dtype)

    def product() -> Tensor:
        return x @ w  # (rows, width) @ (width, inner)

    if device.type == "cuda":
        seconds = seconds_on_gpu(product)
    else:
        seconds = seconds_on_host(product)
    # A multiplication and an addition for each number of x and each column of w.
    return 2 * x.numel() * w.shape[1] / seconds


def seconds_on_host(product: Callable[[], Tensor]) -> float:
    """Returns the shortest time in seconds of eight products, by the host's clock."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        # Reading a number waits for the device.
        float(product()[0, 0])
        times.append(time.perf_counter() - start)
    return min(times)


def seconds_on_gpu(product: Callable[[], Tensor], times: int = 16) -> float:
    """Returns the time in seconds of one product: the mean of `times` in a row, by the GPU's clock.

    The time that the host needs to launch a product, and to hear that it is done, is not counted.
    """
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    # In the first products the library chooses its kernel and the GPU raises its clock.
    for _ in range(4):
        product()
    begin.record()
    for _ in range(times):
        product()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def tokens_at_once(device: torch.device, room: float, peak: Callable[[int], float]) -> int:
    """Returns the tokens of a micro-batch: as many as are of use and fit.

    On CPUs memory is never the reason for fewer. If nothing fits, the smallest choice comes back.

    room: bytes that training may take.
    peak: a function from the tokens of a micro-batch to the bytes that training takes with them.
    """
    most = max_tokens_per_micro_batch(device)
    if device.type == "cpu":
        return most
    choices = [n for n in (16384, 12288, 8192, 6144, 4096, 3072, 2048, 1024) if n <= most]
    for tokens in choices:
        if peak(tokens) <= room:
            return tokens
    return choices[-1]


def device_memory(device: torch.device) -> float:
    """Returns the bytes that a run can use: the GPU's, the machine's, or the container's limit."""
    if device.type == "cuda":
        # Other processes may use some of the GPU. What torch has reserved belongs to this run.
        free, total = torch.cuda.mem_get_info(device)
        return min(total - CONTEXT, free + torch.cuda.memory_reserved(device))
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # The container's limit: a number of bytes, or "max" for none.
    limit_file = Path("/sys/fs/cgroup/memory.max")
    if limit_file.is_file():
        limit = limit_file.read_text().strip()
        if limit.isdigit():
            return min(physical, int(limit))
    return physical


@dataclass
class Workload:
    """What a run trains on.

    lengths: the lengths in tokens of the examples of the largest micro-batch.
    trained: trained tokens of that micro-batch.
    share: the share of all tokens that are trained.
    all_lengths: the lengths in tokens of all examples.
    tokens: tokens of the whole training, with half of the tokens that are validated.
    to_learn: trained tokens of the data.
    accumulate: micro-batches of a step.
    """

    lengths: list[int]
    trained: int
    share: float
    all_lengths: Sequence[int] | np.ndarray
    tokens: float
    to_learn: int
    accumulate: int

    def cut(self, tokens: int) -> "Workload":
        """Returns this workload in micro-batches of at most `tokens` tokens, so more of them.

        The micro-batch that counts has the longest examples. One example that is longer than
        `tokens` is never cut.
        """
        lengths: list[int] = []
        for length in sorted(self.lengths, reverse=True):
            if not lengths or sum(lengths) + length <= tokens:
                lengths.append(length)
        if len(lengths) == len(self.lengths):
            return self
        trained = math.ceil(self.trained * sum(lengths) / sum(self.lengths))
        micro_batches = math.ceil(sum(self.lengths) / sum(lengths))
        return replace(
            self, lengths=lengths, trained=trained, accumulate=self.accumulate * micro_batches
        )


def fitting_job(
    workload: Workload, device: torch.device, room: float, takes: Callable[[Workload], Memory]
) -> Workload:
    """Returns the workload in micro-batches that fit, of a size that `tokens_at_once` chooses.

    room: bytes that training may take.
    takes: a function from a workload to the memory that it takes.
    """

    def peak(tokens: int) -> float:
        return takes(workload.cut(tokens)).peak

    return workload.cut(tokens_at_once(device, room, peak))


def memory_of_workload(
    model: Transformer, recipe: Recipe, device: str, workload: Workload
) -> Memory:
    """Returns `expected_memory` for a workload."""
    return expected_memory(
        model, recipe, workload.lengths, workload.trained, device, workload.accumulate
    )


def recipes(
    config: Config, device: torch.device, asked: str | None, quant: str | None
) -> list[Recipe]:
    """Returns the recipes that a plan compares, without checkpointing.

    asked: the method that is asked for, which has a row if it is another than full, LoRA and QLoRA.
    quant: --quant, for that one.
    A base that is stored in 4 bits can't be trained in full, and LoRA on it is QLoRA.
    """
    qlora = Recipe("qlora")
    others = [] if asked in (None, "full", "lora", "qlora") else [Recipe(asked, quant=quant)]
    if config.raw.get("quantization_config"):
        return [qlora, *others]
    full = [Recipe("full"), Recipe("full", "adamw8bit"), Recipe("full", "adamw8bit", "bf16")]
    if device.type == "cuda":
        full.append(Recipe("full", offload=True))
    return [*full, Recipe("lora"), qlora, *others]


def print_plan(
    config: Config,
    workload: Workload,
    device: torch.device,
    dtype: torch.dtype,
    adapter: dict,
    asked: str | None,
    ewc: bool = False,
    quant: str | None = None,
) -> None:
    """Prints a table of recipes with what each one takes on this machine, and a recommendation.

    dtype: the dtype of the products.
    adapter: {option: value} of a new adapter.
    asked: the method that the recommendation is about; None: any.
    ewc: whether all of them are with --ewc.
    quant: --quant, for a method that is asked for and not among them otherwise.
    """
    room = FITS * device_memory(device)
    rate = product_rate(config, device, dtype)
    kinds = ["none", "selective", "full"]
    if device.type == "cuda":
        kinds.append("offload")
    rows = [["", "weights", "gradients", "moments", *kinds, "time"]]
    # Each recipe that fits, with its peak in bytes and its seconds.
    fitting: list[tuple[Recipe, float, float]] = []
    smallest: tuple[float, Recipe] | None = None

    # A row for each recipe, with a column for each kind of activation checkpointing.
    for plain_recipe in recipes(config, device, asked, quant):
        cells = []
        times = []
        for kind in kinds:
            recipe = replace(plain_recipe, checkpointing=kind, ewc=ewc)
            model = meta_model(config, recipe, dtype, adapter)
            takes = functools.partial(memory_of_workload, model, recipe, device.type)
            memory = takes(fitting_job(workload, device, room, takes))
            flops = flops_a_token(model, workload.all_lengths, workload.share, kind)
            seconds = workload.tokens * flops / (EFFICIENCY[dtype] * rate)
            fits = memory.peak <= room
            mark = " " if fits else "!"
            cells.append(f"{memory.peak / 1e9:.2f}{mark}")
            is_asked_for = asked in (None, recipe.method)
            if fits:
                times.append(seconds)
            if fits and is_asked_for:
                fitting.append((recipe, memory.peak, seconds))
            if not is_asked_for:
                continue
            if smallest is None or memory.peak < smallest[0]:
                smallest = (memory.peak, recipe)
        # These parts are those of the last kind.
        row = [plain_recipe.name]
        for part in (memory.weights, memory.gradients, memory.optimizer):
            row.append(f"{part / 1e9:.2f}")
        row += cells
        row.append(time_range(times))
        rows.append(row)

    print(console.table(rows))
    print("A row is --method, --optimizer and --weights; all sizes are GB.")
    names = ", ".join(kinds)
    print(f"{names}: the most that a step takes, with that --activation-checkpointing.")
    print(f"! is more than the {room / 1e9:.1f} GB that a run may use here.")
    if ewc:
        print("All with --ewc: Fisher information, and the start of trained weights, are counted.")
    if device.type != "cpu":
        most = max_tokens_per_micro_batch(device)
        print(f"Micro-batches have up to {most:,} tokens, and fewer if so many do not fit.")
    print(
        f"time: of the whole training, at {EFFICIENCY[dtype]:.0%} of the {rate / 1e9:,.0f} GFLOP/s"
        " that a matrix product reaches here."
    )
    advice = recommend(config, workload, dtype, adapter, fitting, room, smallest)
    print(f"plan      {advice}")


def recommend(
    config: Config,
    workload: Workload,
    dtype: torch.dtype,
    adapter: dict,
    fitting: list[tuple[Recipe, float, float]],
    room: float,
    smallest: tuple[float, Recipe],
) -> str:
    """Returns one line: which recipe to take, and why.

    Adapters learn as well as full fine-tuning does until the data hold more than they can (Schulman
    et al. 2025; Biderman et al. 2024, arXiv 2405.09673), so the question is first how much there is
    to learn, then what fits.

    fitting: the recipes that fit, each with its peak in bytes and its time in seconds, in the order
        of the table.
    room: bytes that training may take.
    smallest: the smallest peak of all, and its recipe.
    """
    if not fitting:
        peak, recipe = smallest
        takes = f"takes {peak / 1e9:.1f} of {room / 1e9:.1f} GB"
        return (
            f"nothing fits: the least, {recipe}, {takes}; lower --batch-size or --seq-len;"
            f" {OTHER_MACHINE}"
        )
    # Of each method, the first recipe that fits: it is the fastest, and the nearest to plain AdamW
    # in fp32.
    first: dict[str, tuple[Recipe, float, float]] = {}
    for recipe, peak, seconds in fitting:
        first.setdefault(recipe.method, (recipe, peak, seconds))

    # How many trained tokens the adapters can hold, and which rank would hold all of the data.
    rank = adapter.get("rank", NEW_ADAPTER["rank"])
    lora_model = meta_model(config, Recipe("lora"), dtype, adapter)
    adapter_numel = sum(p.numel() for p in lora_model.parameters() if p.requires_grad)
    capacity = CAPACITY / BITS * adapter_numel
    sufficient_rank = math.ceil(rank * workload.to_learn / capacity)

    # In the order in which they are preferred.
    method = next(m for m in ("lora", "qlora", "full", *first) if m in first)
    if sufficient_rank > LARGEST_RANK and "full" in first:
        method = "full"
    recipe, peak, seconds = first[method]
    what_is_held = f"adapters of rank {rank} hold about {capacity:,.0f}"
    why = f"{workload.to_learn:,} trained tokens; {what_is_held}"
    if method not in ("lora", "qlora", "full"):
        why = f"{workload.to_learn:,} trained tokens"
    elif method == "full":
        why += ", and full fits"
    elif sufficient_rank > rank:
        why += f", of rank {sufficient_rank} all of them"
    else:
        why += ", so full would learn no more"
    if method == "qlora" and "lora" not in first:
        why += "; 16-bit weights do not fit"
    flags = str(recipe)
    if rank < sufficient_rank and method in ("lora", "qlora"):
        flags += f" --rank {sufficient_rank}"
    takes = f"{peak / 1e9:.1f} of {room / 1e9:.1f} GB, {console.format_duration(seconds)}"
    if seconds > TOO_LONG:
        return f"not on this machine: {flags} takes {takes}; {OTHER_MACHINE}"
    return f"{flags}: {takes}; {why}"


def time_range(times: list[float]) -> str:
    """Returns the shortest and the longest of some times in seconds, as the table has them."""
    if not times:
        return "does not fit"
    shortest = console.format_duration(min(times))
    longest = console.format_duration(max(times))
    if shortest == longest:
        return shortest
    number, _, unit = shortest.partition(" ")
    # 12 to 17 min, but 50 s to 1.2 min.
    return f"{number} to {longest}" if longest.endswith(unit) else f"{shortest} to {longest}"
