"""What --plan prints, and what a run is expected to take."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch

import distributed
from common.device import pick_dtype
from data import TrainingData, batches_of_rows, max_tokens_per_micro_batch
from flags import NEW_ADAPTER, Flags
from methods import method_name
from model import Config
from planning import memory, multi_gpu
from planning.memory import Recipe, Workload
from planning.multi_gpu import Layout


def needs_data(flags: Flags, folder: Path) -> bool:
    """False where --plan can be answered from config.json alone: for --gpus, and for a folder without a tokenizer."""
    has_tokenizer = any((folder / f"tokenizer.{kind}").is_file() for kind in ("json", "model"))
    return has_tokenizer and not flags.gpus


def print_plan_of_config(flags: Flags, config: Config, device: torch.device) -> None:
    """Prints the plan that needs no data: of --gpus, else of rows of --seq-len tokens on this machine."""
    if flags.gpus:
        seq_len = min(flags.seq_len or 2048, config.max_positions)
        rows = rows_at_once(flags, seq_len, "cuda")
        multi_gpu.print_multi_gpu_plan(config, flags.gpus, seq_len, rows, flags.accumulate, adapter_of(flags))
        return
    dtype, _ = pick_dtype(flags.dtype, device)
    memory.print_plan(config, workload_of_full_rows(flags, config, device), device, dtype, adapter_of(flags))


def print_plan_of_data(
    flags: Flags, steps_per_epoch: int, config: Config, data: TrainingData, device: torch.device
) -> None:
    """Prints the plan for these data. flags: with their steps chosen."""
    dtype, _ = pick_dtype(flags.dtype, device)
    workload = describe_workload(flags, data, steps_per_epoch, device)
    memory.print_plan(config, workload, device, dtype, adapter_of(flags))


def adapter_of(flags: Flags) -> dict:
    """The arguments of lora.add_lora: as typed, else the defaults."""
    typed = {name: getattr(flags, name) for name in NEW_ADAPTER}
    return {name: NEW_ADAPTER[name] if value is None else value for name, value in typed.items()}


def describe_workload(
    flags: Flags, data: TrainingData, steps_per_epoch: int, device: torch.device, max_tokens: int | None = None
) -> Workload:
    """What planning/memory.py counts with. max_tokens: of a micro-batch."""
    train, val, sampler = data.train, data.val, data.sampler
    validations = 1 + math.ceil(flags.steps / flags.eval_every) if flags.eval_every else 1
    if data.pack:
        longest = dataclasses.replace(sampler).step(flags.batch_size)  # a sampler of its own
    else:
        longest = [[i] for i in np.argsort(-train.lengths, kind="stable")[: flags.batch_size]]
    rows = [[train.examples[i] for i in row] for row in longest]
    max_tokens = max_tokens or max_tokens_per_micro_batch(device)
    batches = batches_of_rows(rows, flags.batch_size, "cpu", max_tokens)
    largest = max(batches, key=lambda batch: len(batch.tokens))
    trained_steps = sampler.epoch_tokens() / steps_per_epoch * flags.steps
    return Workload(
        lengths=largest.documents.lengths,
        trained=len(largest.targets),
        share=train.trained_tokens / train.tokens,
        mean_context=float((train.lengths.astype(float) ** 2).sum()) / train.tokens,
        tokens=trained_steps + validations * val.tokens / 2,  # half of what is validated: without a backward
        to_learn=train.trained_tokens,
        accumulate=flags.accumulate * len(batches),
    )


def rows_at_once(flags: Flags, length: int, device: torch.device | str) -> int:
    """Rows of so many tokens that make a micro-batch."""
    return max(1, min(flags.batch_size, max_tokens_per_micro_batch(device) // length))


def workload_of_full_rows(flags: Flags, config: Config, device: torch.device) -> Workload:
    """Rows of --seq-len tokens, all trained."""
    length, steps = flags.seq_len or min(2048, config.max_positions), flags.steps or 1000
    rows = rows_at_once(flags, length, device)
    tokens = length * flags.batch_size * flags.accumulate * steps
    print(
        f"plan      no tokenizer here: for {steps:,} steps of {flags.batch_size} x {flags.accumulate} rows of"
        f" {length:,} tokens, all trained, of new text"
    )
    micro_batches = flags.accumulate * math.ceil(flags.batch_size / rows)
    return Workload([length] * rows, length * rows, 1.0, length, tokens, tokens, micro_batches)


def recipe_and_layout(flags: Flags) -> tuple[Recipe, Layout]:
    """What planning/memory.py and planning/multi_gpu.py call this run."""
    recipe = Recipe(
        method_name(flags), flags.optimizer, flags.weights, flags.optimizer_offload, flags.activation_checkpointing
    )
    shards = {"none": 1, "hybrid": distributed.local_world_size()}.get(flags.shard, distributed.world_size())
    return recipe, Layout(distributed.world_size(), shards)


def suggest_savings(flags: Flags, config: Config, workload: Workload, device: torch.device, dtype: torch.dtype) -> str:
    """For a run that had too little memory: what was expected to be where, and the three flags that help most."""
    recipe, layout = recipe_and_layout(flags)
    shape = flags.batch_size, flags.accumulate, flags.seq_len
    return multi_gpu.describe_savings(config, recipe, layout, workload, shape, device, dtype, adapter_of(flags))
