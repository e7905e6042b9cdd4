"""Brings flags and data to the predictions of this folder, for --plan and for a run's first lines.

planning/memory.py and planning/multi_gpu.py know neither flags nor data. They count with a `Recipe`
(the method of fine-tuning), a `Layout` (how the model is spread over GPUs) and a `Workload` (what
is trained on), which the functions of this file build from the flags.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch

import distributed
from adapter_files import virtual_tokens_in
from common.device import DTYPES, pick_dtype
from data import TrainingData, max_tokens_per_micro_batch, split_micro_batches
from dataset.encoding import AS_PROMPTS
from flags import NEW_ADAPTER, Flags
from methods import continues_adapter, method_name, method_of, start_of
from model import Config
from planning import memory, multi_gpu
from planning.memory import Recipe, Workload
from planning.multi_gpu import Layout

# What a generated token takes, in trained tokens, in batches of some ten prompts: a CPU multiplies as
# fast as in training, a GPU waits for its memory.
GENERATED_TOKEN = {"cpu": 1.0, "cuda": 8.0}


def needs_data(flags: Flags, folder: Path) -> bool:
    """False if --plan can be answered from config.json alone: for --gpus without --data, and for a
    folder without a tokenizer."""
    files = (folder / "tokenizer.json", folder / "tokenizer.model")
    has_tokenizer = any(file.is_file() for file in files)
    return has_tokenizer and (bool(flags.data) or not flags.gpus)


def print_plan_of_config(flags: Flags, config: Config, device: torch.device) -> None:
    """Prints the plan that needs no data: for --gpus, or for rows of --seq-len tokens here."""
    if flags.gpus:
        seq_len = min(flags.seq_len or 2048, config.max_positions)
        rows = rows_at_once(flags, seq_len, "cuda")
        step = f"{rows} x {flags.accumulate} rows of {seq_len:,} tokens"
        print(f"plan      for a step of {step} on each GPU; --data counts a whole run")
        tokens = seq_len * rows
        workload = Workload(
            lengths=[seq_len] * rows,
            trained=tokens,
            share=1.0,
            all_lengths=[seq_len],
            tokens=tokens * flags.accumulate,
            to_learn=tokens * flags.accumulate,
            accumulate=flags.accumulate,
        )
        multi_gpu.print_multi_gpu_plan(
            config,
            flags.gpus,
            flags.gpu_memory,
            workload,
            1,
            typed_adapter(flags),
            asked_method(flags, config),
            has_data=False,
            quant=flags.quant,
        )
        return
    dtype, _ = pick_dtype(flags.dtype, device)
    workload = workload_of_full_rows(flags, config, device)
    memory.print_plan(
        config, workload, device, dtype, typed_adapter(flags), asked_method(flags, config),
        bool(flags.ewc), flags.quant,
    )  # fmt: skip


def print_plan_of_data(
    flags: Flags, steps_per_epoch: float, config: Config, data: TrainingData, device: torch.device
) -> None:
    """Prints the plan for these data. flags: with the number of steps chosen."""
    if flags.gpus:
        on_gpu = describe_workload(flags, data, steps_per_epoch, torch.device("cuda"))
        multi_gpu.print_multi_gpu_plan(
            config, flags.gpus, flags.gpu_memory, on_gpu, flags.steps, typed_adapter(flags),
            asked_method(flags, config), has_data=True, quant=flags.quant,
        )  # fmt: skip
        return
    dtype, _ = pick_dtype(flags.dtype, device)
    workload = describe_workload(flags, data, steps_per_epoch, device)
    memory.print_plan(
        config, workload, device, dtype, typed_adapter(flags), asked_method(flags, config),
        bool(flags.ewc), flags.quant,
    )  # fmt: skip


def asked_method(flags: Flags, config: Config) -> str | None:
    """Returns the method that the command line asks for, None where it leaves it to the plan."""
    if not {"method", "quant"} & flags.given:
        return None
    # LoRA on a base that is stored in 4 bits is QLoRA.
    name = method_name(flags)
    return "qlora" if name == "lora" and config.raw.get("quantization_config") else name


def adapter_of(flags: Flags) -> dict:
    """Returns {option: value} of a new adapter: what is on the command line, else the defaults of the
    method."""
    return NEW_ADAPTER | {**method_of(flags).defaults} | typed_adapter(flags)


def typed_adapter(flags: Flags) -> dict:
    """Returns {option: value} of what the command line says of a new adapter."""
    values = {name: getattr(flags, name) for name in NEW_ADAPTER}
    return {name: value for name, value in values.items() if value not in (None, False)}


def virtual_tokens_of(flags: Flags) -> int:
    """Returns how many virtual tokens a run's method puts before every text."""
    if "virtual_tokens" not in method_of(flags).options:
        return 0
    if continues_adapter(flags):
        return virtual_tokens_in(start_of(flags))
    return adapter_of(flags)["virtual_tokens"]


def num_validations(flags: Flags) -> int:
    """Returns how often a run validates: also before its first step, if it does so on the way."""
    if not flags.eval_every:
        return 1
    return 1 + math.ceil(flags.steps / flags.eval_every)


def describe_workload(
    flags: Flags,
    data: TrainingData,
    steps_per_epoch: float,
    device: torch.device,
    max_tokens: int | None = None,
) -> Workload:
    """Returns the workload of a run on these data.

    flags: with the number of steps chosen.
    steps_per_epoch: the steps of one epoch.
    max_tokens: the most tokens of a micro-batch; None: the default of the device.
    """
    if data.train.kind == AS_PROMPTS:
        return workload_of_answers(flags, data, steps_per_epoch, device, max_tokens)
    train, sampler = data.train, data.sampler
    val_tokens = data.val.tokens
    if data.replay_val:
        val_tokens += data.replay_val.tokens

    # The rows that stand for the largest step: the next packed ones, or those of the longest
    # examples. A row is a list of example numbers.
    if data.pack:
        # A copy of the sampler, since a step moves its position.
        rows = dataclasses.replace(sampler).step(flags.batch_size)
    else:
        longest_first = np.argsort(-train.lengths, kind="stable")
        rows = [[i] for i in longest_first[: flags.batch_size]]
    # What the loader would make of them. Their lengths say it, so that no batch has to be built.
    sizes = [int(train.lengths[row].sum()) for row in rows]
    if not max_tokens:
        max_tokens = max_tokens_per_micro_batch(device)
    micro_batches = split_micro_batches(sizes, flags.batch_size, max_tokens)
    largest = max(micro_batches, key=lambda numbers: sum(sizes[i] for i in numbers))
    examples = [example for i in largest for example in rows[i]]

    trained_tokens = sampler.epoch_tokens() / steps_per_epoch * flags.steps
    return Workload(
        lengths=train.lengths[examples].tolist(),
        trained=int(train.num_trained[examples].sum()),
        share=train.trained_tokens / train.tokens,
        all_lengths=train.lengths,
        # A validated token counts half, since it has no backward.
        tokens=trained_tokens + num_validations(flags) * val_tokens / 2,
        to_learn=train.trained_tokens,
        accumulate=flags.accumulate * len(micro_batches),
    )


def workload_of_answers(
    flags: Flags,
    data: TrainingData,
    steps_per_epoch: float,
    device: torch.device,
    max_tokens: int | None = None,
) -> Workload:
    """Returns what `describe_workload` does where the model answers prompts: as if each answer were as
    long as it may be, since nothing is known of them yet."""
    assert flags.max_new_tokens is not None and flags.group_size is not None
    train = data.train
    answer = flags.max_new_tokens
    longest = sorted((train.lengths + answer).tolist(), reverse=True)[: flags.batch_size]
    sizes = [length for length in longest for _ in range(flags.group_size)]
    if not max_tokens:
        max_tokens = max_tokens_per_micro_batch(device)
    micro_batches = split_micro_batches(sizes, len(sizes), max_tokens)
    largest = [sizes[i] for i in max(micro_batches, key=lambda each: sum(sizes[i] for i in each))]
    generated = answer * GENERATED_TOKEN.get(device.type, GENERATED_TOKEN["cuda"])
    mean_prompt = train.tokens / len(train)
    num_prompts = sum(data.sampler.samples_per_epoch) / steps_per_epoch * flags.steps
    tokens = num_prompts * flags.group_size * (mean_prompt + answer + generated)
    tokens += num_validations(flags) * (data.val.tokens / 2 + len(data.val) * generated)
    return Workload(
        lengths=largest,
        trained=answer * len(largest),
        share=answer / (mean_prompt + answer),
        all_lengths=train.lengths + answer,
        tokens=tokens,
        to_learn=len(train) * answer,
        accumulate=flags.accumulate * len(micro_batches),
    )


def rows_at_once(flags: Flags, length: int, device: torch.device | str) -> int:
    """Returns the number of rows of `length` tokens in a micro-batch; at least 1."""
    return max(1, min(flags.batch_size, max_tokens_per_micro_batch(device) // length))


def workload_of_full_rows(flags: Flags, config: Config, device: torch.device) -> Workload:
    """Returns a workload of rows of --seq-len tokens, all trained, and prints what it assumes."""
    length = flags.seq_len or min(2048, config.max_positions)
    steps = flags.steps or 1000
    rows = rows_at_once(flags, length, device)
    tokens = length * flags.batch_size * flags.accumulate * steps
    rows_of_step = f"{flags.batch_size} x {flags.accumulate} rows of {length:,} tokens"
    print(
        "plan      the folder of the model has no tokenizer, so the data are not read; the plan is"
        f" for {steps:,} steps of {rows_of_step}, all trained, of new text"
    )
    return Workload(
        lengths=[length] * rows,
        trained=length * rows,
        share=1.0,
        all_lengths=[length],
        tokens=tokens,
        to_learn=tokens,
        accumulate=flags.accumulate * math.ceil(flags.batch_size / rows),
    )


def recipe_and_layout(flags: Flags) -> tuple[Recipe, Layout]:
    """Returns the recipe and the layout of this run."""
    recipe = Recipe(
        method=method_name(flags),
        optimizer=flags.optimizer,
        weights=flags.weights,
        offload=flags.optimizer_offload,
        checkpointing=flags.activation_checkpointing,
        ewc=bool(flags.ewc),
    )
    gpus = distributed.world_size()
    if flags.shard == "none":
        shards = 1
    elif flags.shard == "hybrid":
        shards = distributed.local_world_size()
    else:
        shards = gpus
    return recipe, Layout(gpus, shards)


def suggest_savings(flags: Flags, config: Config, workload: Workload, device: torch.device) -> str:
    """Returns a sentence for a run that had too little memory: the sizes that were expected, and
    the three changes of flags that help most. flags: with the dtype chosen."""
    recipe, layout = recipe_and_layout(flags)
    shape = (flags.batch_size, flags.accumulate, flags.seq_len)
    dtype = DTYPES[flags.dtype]
    return multi_gpu.describe_savings(
        config, recipe, layout, workload, shape, device, dtype, adapter_of(flags)
    )
