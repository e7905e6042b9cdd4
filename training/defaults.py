"""From what was typed to what a run does: what was left open is chosen once, with its reason.

`resolve_defaults` returns `Settings`, which are frozen: printed at the start, saved as config.json,
read by everybody.
"""

import dataclasses
import importlib.util
import math
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

import distributed
import optimizers
from adapting.new_tokens import file_of_new_tokens
from adapting.tables import trained_tables
from checkpoint import dtype_note, read_config, stored_dtype, weight_files
from common.choices import AUTO
from common.console import number_of
from common.device import DTYPES, STORAGE_DTYPES, pick_dtype
from common.errors import UserError
from data import TrainingData
from dataset.encoding import AS_PROMPTS
from dataset.example_records import is_whole_conversation
from dataset.examples import Dataset
from dataset.sampler import Sampler
from flags import NEW_ADAPTER, Flags, dashed
from methods import (
    check_kind_of_adapter,
    continues_adapter,
    load_any_adapter,
    lr_factor_of,
    method_of,
    select_weights,
    start_of,
)
from model import Config, Transformer
from objectives import OBJECTIVES, kind_of_examples, with_options_of_objective
from planning import memory, multi_gpu
from planning.memory import Workload
from planning.report import (
    GENERATED_TOKEN,
    adapter_of,
    describe_workload,
    num_validations,
    recipe_and_layout,
)
from training.checkpointer import RUN_FILES, format_bytes

# Seconds to compile a block, and the share of a step's time that it saves in bf16; measured on 2
# cores. In fp32, where products take nearly all of the time, it saves nothing.
COMPILE_SECONDS = 20
COMPILE_SAVES = 0.05
# Bytes of weights in NF4 for each byte of them in 16 bits.
SHARE_OF_NF4 = 0.26
# The share of the training's time that all validations may take together, and the fewest examples
# that a validation reads all the same.
VALIDATION_SHARE = 0.1
LEAST_VALIDATION = 16
# The share that all answers of --eval-metric may take together, and the fewest prompts that are
# answered all the same.
SCORING_SHARE = 0.1
LEAST_PROMPTS = 16
# The share of reading --forget-data, of which so many tokens are read all the same, if these are no
# more than LEAST_VALIDATION examples.
GENERAL_SHARE = 0.05
LEAST_GENERAL_TOKENS = 4096
# The gauge (training/gauge.py) takes this share of the training's time, and reads at most, and at
# least, so many tokens. One of them takes as long as training one does, or less: a forward, and the
# head twice, at every position (measured: experiments/LOG.md).
GAUGE_SHARE = 0.02
MOST_GAUGE_TOKENS = 2048
LEAST_GAUGE_TOKENS = 64
# A run that is killed loses half an hour at most.
MAX_SECONDS_BETWEEN_CHECKPOINTS = 1800
# The rate of full fine-tuning at a width of 2,000, and how it falls with the width: the recipe that
# Schulman et al. 2025, "LoRA without regret", publish for Llama models. It has ten times the rate
# for LoRA; METHODS holds each method's factor.
BASE_LR = 5e-5
REFERENCE_WIDTH = 2000
WIDTH_EXPONENT = 0.78
# --lr auto: its first guess, before training/lr_probe.py tries rates, is the default for so many examples
# a step; with more of them a step is less noisy and may be larger, by the square root (Malladi et al.
# 2022, arXiv 2205.10287).
REFERENCE_BATCH = 8
# The bundled task has few and short examples, one like the other: a machine that has time for 96
# steps of 8 gets twice as many answers right at twice that rate (experiments/LOG.md).
BUNDLED_TASK_LR = 2
# A run of fewer steps has no checkpoints, unless these take longer than that.
CHECKPOINTS_FROM_STEPS = 10


@dataclass(frozen=True)
class Settings(Flags):
    """Every option with the value that holds, none of them open.

    reasons: {option: why}, for those that were chosen here.
    steps_per_epoch: the steps of one epoch, on average.
    max_tokens: the most tokens of a micro-batch of one rank.
    flops_per_token: floating point operations of training.
    expected_seconds: what training is expected to take.
    workload: what the expected time and memory are computed from.
    gauge_tokens: validation tokens on which KL(base || tuned) is measured; 0: it is not.
    general_examples: examples of --forget-data that are read at each validation; 0: none.
    """

    # `Flags` may leave these open; here each has a number. (They keep their places and defaults.)
    steps: int
    lr: float
    warmup: int
    weight_decay: float
    eval_every: int
    save_every: int
    val_limit: int

    reasons: dict[str, str] = field(default_factory=dict)
    steps_per_epoch: float = 1
    max_tokens: int = 0
    flops_per_token: float = 0.0
    expected_seconds: float = 0.0
    gauge_tokens: int = 0
    general_examples: int = 0
    workload: Workload = None  # type: ignore[assignment] (resolve_defaults always gives one)


def resolve_defaults(
    flags: Flags, folder: Path, data: TrainingData, device: torch.device
) -> Settings:
    """Returns the run's settings. folder: of the base model.

    Raises UserError where what was typed can't be had here.
    """
    config = read_config(folder)
    flags = with_options_of_objective(flags)
    dtype, why_dtype = pick_dtype(flags.dtype, device)
    if flags.resume and flags.dtype != "auto" and "dtype" not in flags.given:
        why_dtype = "as before"
    shard, why_shard = choose_shard(flags, folder, device)
    flags = dataclasses.replace(
        flags,
        device=device.type,
        dtype=next(name for name, known in DTYPES.items() if known == dtype),
        seq_len=data.seq_len,
        val_fraction=data.val_fraction,
        pack=data.pack,
        shard=shard,
    )
    flags, steps_per_epoch = choose_steps(flags, data.sampler)
    flags, why_lr = choose_optimization(flags, config)
    flags, why_save_dtype = choose_save_dtype(flags, folder, config)
    model = meta_model_of_run(flags, folder, config)
    if continues_adapter(flags):
        has_tables = bool(trained_tables(model))
        if flags.embedding_lr is not None and not has_tables:
            raise UserError(f"--embedding-lr: {flags.adapter} has no trained embeddings")
        if flags.ewc and has_tables:
            raise UserError(
                f"--ewc: holds the change of the adapted weights, and {flags.adapter} has trained"
                " embeddings as well"
            )
    if continues_adapter(flags):
        shape = method_of(flags).shape
        if shape is not None:
            flags = dataclasses.replace(flags, **shape(model))

    # What the run takes, which --compile and --save-every depend on.
    max_tokens = choose_max_tokens(flags, model, device)
    flags, why_val_limit = choose_val_limit(flags, data, steps_per_epoch)
    gauge_tokens, why_gauge = choose_gauge_tokens(flags, data, steps_per_epoch)
    general_examples, why_general = choose_general_examples(flags, data, steps_per_epoch)
    flags, why_metric, answering = choose_prompts(flags, data, steps_per_epoch, device)
    data = data.validating_on(flags.val_limit)
    workload = describe_workload(flags, data, steps_per_epoch, device, max_tokens)
    reading = mean_length(data.general) * general_examples * num_validations(flags) / 2
    workload = dataclasses.replace(workload, tokens=workload.tokens + reading + answering)
    flops = memory.flops_a_token(
        model, workload.all_lengths, workload.share, flags.activation_checkpointing
    )
    # Every rank times a product, and rank 0's rate counts: all ranks must choose alike.
    rate = distributed.broadcast_object(memory.product_rate(config, device, dtype))
    flops_per_second = memory.EFFICIENCY[dtype] * rate * distributed.world_size()
    seconds = workload.tokens * flops / flops_per_second
    compiled, why_compile = choose_compile(flags, device, seconds)
    save_every, why_save = choose_save_every(flags, model, seconds)

    flags = dataclasses.replace(flags, compile=compiled, save_every=save_every)
    values = {each.name: getattr(flags, each.name) for each in dataclasses.fields(Flags)}
    reasons = {
        "dtype": why_dtype,
        "shard": why_shard,
        "compile": why_compile,
        "save_every": why_save,
        "save_dtype": why_save_dtype,
        "val_limit": why_val_limit,
        "gauge": why_gauge,
        "eval_metric": why_metric,
        "general": why_general,
        "lr": why_lr,
    }
    return Settings(
        **values,
        reasons=reasons,
        steps_per_epoch=steps_per_epoch,
        max_tokens=max_tokens,
        flops_per_token=flops,
        expected_seconds=seconds,
        workload=workload,
        gauge_tokens=gauge_tokens,
        general_examples=general_examples,
    )


def choose_shard(flags: Flags, folder: Path, device: torch.device) -> tuple[str, str]:
    """Returns --shard, and why it was chosen.

    Raises UserError if it does not suit the number of processes.
    """
    count = distributed.world_size()
    shard = flags.shard
    reason = ", asked for with --shard"
    if shard is None:
        size: float = sum(file.stat().st_size for file in weight_files(folder))
        if method_of(flags).quant:
            size *= SHARE_OF_NF4
        # A sharded base is gathered for each forward and backward, so a small one is not worth it.
        is_small = size <= distributed.REPLICATE_BELOW * memory.device_memory(device)
        if count == 1 or (method_of(flags).freezes_base and is_small):
            shard = "none"
            reason = (
                ": one process"
                if count == 1
                else f": the frozen base is small, {size / 1e9:.1f} GB"
            )
        else:
            shard = "full"
            reason = ""
    if flags.ewc and shard != "none":
        raise UserError(
            f"--ewc: needs whole weights on every process, and {count} processes would share them;"
            " add --shard none"
        )
    if kind_of_examples(flags) == AS_PROMPTS and shard != "none":
        flag = "--own-answers" if flags.own_answers else f"--objective {flags.objective}"
        raise UserError(
            f"{flag}: to answer, every process needs a whole model, and {count} processes would share it;"
            " add --shard none"
        )
    if shard == "none" and flags.reduce == "each":
        raise UserError("--reduce each: is about the gradients of shards, and --shard is none")
    if shard == "none" and flags.shard_offload:
        raise UserError("--shard-offload: keeps shards on the host, and --shard is none")
    if shard == "hybrid":
        on_this_node = distributed.local_world_size()
        if count == on_this_node:
            why = "shards inside a node and copies across nodes, and there is one node"
            raise UserError(f"--shard hybrid: {why}")
        if not distributed.all_ranks_agree(count % on_this_node == 0):
            raise UserError("--shard hybrid: the nodes must have equally many processes")
    return shard, reason


def choose_steps(flags: Flags, sampler: Sampler) -> tuple[Flags, float]:
    """Chooses how long to train and how often to validate.

    Returns the flags with these, and the mean number of steps in an epoch: packed epochs may differ
    by a step, and a run ends with the last step of its last one.
    """
    per_step = flags.batch_size * flags.accumulate * distributed.dp_size()
    examples = sum(sampler.samples_per_epoch)
    steps, epochs, eval_every = flags.steps, flags.epochs, flags.eval_every
    if steps is None:
        if epochs is None:
            # Few examples are read more often, so that there are enough steps to learn in.
            if examples >= 1_500:
                epochs = 1.0
            elif examples >= 500:
                epochs = 2.0
            else:
                epochs = 3.0
        steps = sampler.steps_of_epochs(epochs, per_step)
    steps_per_epoch = sampler.steps_per_epoch(steps, per_step)
    if eval_every is None:
        eval_every = math.ceil(steps / 5)
    flags = dataclasses.replace(flags, steps=steps, epochs=epochs, eval_every=eval_every)
    return flags, steps_per_epoch


def choose_val_limit(flags: Flags, data: TrainingData, steps_per_epoch: float) -> tuple[Flags, str]:
    """Chooses how many examples a validation reads. Returns the flags with it, and a line about it,
    "" where all are read."""
    sets = [dataset for dataset in (data.val, data.replay_val) if dataset]
    largest = max((len(dataset) for dataset in sets), default=0)
    limit = flags.val_limit
    why = "asked for with --val-limit"
    if "val_limit" not in flags.given:
        why = "as before (--val-limit)"
    if limit is None:
        trained_tokens = tokens_of_training(flags, data, steps_per_epoch)
        # A validated token takes half of the time of a trained one, since it has no backward.
        tokens = 2 * VALIDATION_SHARE * trained_tokens / num_validations(flags)
        tokens_per_example = sum(dataset.tokens / len(dataset) for dataset in sets)
        if data.train.kind == AS_PROMPTS:
            # A prompt is answered once, and not as often as one that is trained.
            tokens_per_example /= flags.group_size
        limit = 0
        if tokens_per_example:
            limit = max(LEAST_VALIDATION, int(tokens / tokens_per_example))
        why = "so that it takes under a tenth of the training's time (--val-limit)"
    if limit >= largest:
        limit = 0
    flags = dataclasses.replace(flags, val_limit=limit)
    if not limit:
        return flags, ""
    return flags, f"on {limit:,} of {largest:,} examples, chosen by their hash, {why}"


def tokens_of_training(flags: Flags, data: TrainingData, steps_per_epoch: float) -> float:
    """Returns the tokens that go through all steps of a run."""
    return data.sampler.epoch_tokens() / steps_per_epoch * flags.steps


def choose_gauge_tokens(
    flags: Flags, data: TrainingData, steps_per_epoch: float
) -> tuple[int, str]:
    """Chooses on how many validation tokens a run measures what it forgets. Returns 0 where it does
    not; and why.

    It follows from the run's data and steps alone, so that a run which is repeated or resumed reads
    the same tokens.
    Raises UserError where --forget-limit needs what can't be measured.
    """
    if OBJECTIVES[flags.objective].has_head:
        return 0, "off: a score head takes the place of the output head"
    if data.train.kind == AS_PROMPTS and len(data.val):
        bound = " (--beta bounds it)" if flags.objective == "grpo" else ""
        return 0, f"off: prompts have no tokens of answers to measure it on{bound}"
    if not len(data.val):
        if flags.forget_limit is not None:
            raise UserError(
                "--forget-limit: KL(base || tuned) can't be measured, nothing validates; give --val FILE"
            )
        for name in ("eval_metric", "forget_data"):
            if getattr(flags, name) is not None:
                raise UserError(
                    f"{dashed(name)}: is measured at validations, and nothing validates; give --val FILE"
                )
        return 0, "off: nothing validates"
    # All ranks measure the same tokens, while they share those that are trained.
    trained_tokens = tokens_of_training(flags, data, steps_per_epoch) / distributed.world_size()
    in_time = GAUGE_SHARE * trained_tokens / num_validations(flags)
    count = min(max(int(in_time), LEAST_GAUGE_TOKENS), MOST_GAUGE_TOKENS, data.val.tokens)
    why = f"about {100 * GAUGE_SHARE:g} % of the training's time"
    if in_time > count:
        why = f"under {100 * GAUGE_SHARE:g} % of the training's time"
    elif in_time < count:
        # A fraction of a token is no more of it.
        share = 100 * GAUGE_SHARE * count / in_time
        why = f"about {share:.0f} % of the training's time; fewer would say little"
    return count, why


def choose_general_examples(
    flags: Flags, data: TrainingData, steps_per_epoch: float
) -> tuple[int, str]:
    """Chooses how many examples of --forget-data a validation reads, and says why; 0 without it.

    As the gauge's tokens they follow from the run's data and steps alone.
    """
    if data.general is None:
        return 0, ""
    trained_tokens = tokens_of_training(flags, data, steps_per_epoch)
    tokens = 2 * GENERAL_SHARE * trained_tokens / num_validations(flags)
    length = mean_length(data.general)
    # Of a plain text, an example may be as long as the whole of other data.
    least = min(LEAST_VALIDATION, math.ceil(LEAST_GENERAL_TOKENS / length))
    count = max(least, int(tokens / length))
    total = len(data.general)
    if count >= total:
        return total, f"{number_of(total, 'example')}, which is all"
    return count, f"{count:,} of {total:,} examples, chosen by their hash"


def choose_prompts(
    flags: Flags, data: TrainingData, steps_per_epoch: float, device: torch.device
) -> tuple[Flags, str, float]:
    """Chooses how many validation prompts --eval-metric answers.

    Returns the flags with --eval-metric-limit (0: all), a clause about it, and what all answers of the
    run take, in trained tokens; nothing without the flag.
    Raises UserError where no answer can be compared, or where the ranks have no whole model each.
    """
    if flags.eval_metric is None:
        return flags, "", 0.0
    name = f"--eval-metric {flags.eval_metric}"
    if not data.val.chat:
        raise UserError(
            f"{name}: the validation data are plain text, which has no reference answers to compare with"
        )
    if flags.shard != "none" or flags.context_parallel > 1:
        why = "to be answered, a prompt needs a whole model on each process; --shard none"
        if flags.context_parallel > 1:
            why = "not with --context-parallel, whose processes share each text"
        raise UserError(f"{name}: {why}")
    asked = data.val.take(is_whole_conversation(data.val))
    total = len(asked)
    if not total:
        raise UserError(f"{name}: no validation example fits whole into --seq-len {flags.seq_len}")
    # Of a conversation only the last answer is asked for, so this is rather too much.
    answer_tokens = float(asked.num_trained.mean())
    prompt_tokens = mean_length(asked) - answer_tokens
    if asked.kind == AS_PROMPTS:
        answer_tokens = flags.max_new_tokens
    generated = GENERATED_TOKEN.get(device.type, GENERATED_TOKEN["cuda"])
    tokens_per_prompt = prompt_tokens / 2 + generated * answer_tokens
    times = num_validations(flags)
    limit = flags.eval_metric_limit
    why = "as asked for with --eval-metric-limit"
    if "eval_metric_limit" not in flags.given:
        why = "as before (--eval-metric-limit)"
    if limit is None:
        # The ranks share the prompts as they share the trained tokens.
        trained_tokens = tokens_of_training(flags, data, steps_per_epoch)
        in_time = int(SCORING_SHARE * trained_tokens / times / tokens_per_prompt)
        limit = max(LEAST_PROMPTS, in_time)
        why = "for about a tenth of the training's time (--eval-metric-limit)"
        if in_time < limit:
            why = "as fewer would say little (--eval-metric-limit)"
    if limit >= total:
        limit = 0
    count = limit or total
    clause = f"{count:,} of {total:,} validation prompts, chosen by their hash, {why}"
    if not limit:
        clause = f"all {number_of(total, 'validation prompt')}"
    flags = dataclasses.replace(flags, eval_metric_limit=limit)
    return flags, clause, times * count * tokens_per_prompt


def mean_length(dataset: Dataset | None) -> float:
    """Returns the mean length of the examples of a dataset, in tokens; 0 without one."""
    return dataset.tokens / len(dataset) if dataset else 0.0


def is_bundled_task(flags: Flags) -> bool:
    """True for `python train.py`, also with options that keep the demonstration's task and base."""
    is_sharded = flags.shard != "none" or distributed.world_size() > 1
    # Options that give the run another task, another base or no end.
    asks_for_another = flags.data or flags.model or flags.adapter or flags.profile or flags.system
    asks_for_another = asks_for_another or flags.objective not in ("sft", "dft")
    return not (asks_for_another or is_sharded)


def choose_optimization(flags: Flags, config: Config) -> tuple[Flags, str]:
    """Chooses learning rate, warm-up and weight decay; and the shape of a new adapter.

    Returns the flags with them, and a remark on the rate, "" where there is nothing to say.
    """
    method = method_of(flags)
    objective = OBJECTIVES[flags.objective]
    chosen: dict = {}
    why_lr = ""
    if flags.lr in (None, AUTO):
        width_factor = (REFERENCE_WIDTH / config.hidden_size) ** WIDTH_EXPONENT
        lr = BASE_LR * lr_factor_of(flags) * width_factor * objective.lr_factor
        if flags.lr == AUTO:
            lr *= auto_factor(flags)
            why_lr = " (where --lr auto begins)"
        elif is_bundled_task(flags):
            lr *= BUNDLED_TASK_LR
            why_lr = f" ({BUNDLED_TASK_LR} times the default, since it is short)"
        # Two digits, so that what is printed and typed again is the rate to the bit.
        chosen["lr"] = float(f"{lr:.1e}")
    warmup = flags.warmup
    if warmup is None:
        warmup = round(0.05 * flags.steps)
    if warmup >= flags.steps:
        raise UserError(f"--warmup {warmup}: longer than the run of {flags.steps} steps")
    chosen["warmup"] = warmup
    if flags.weight_decay is None:
        chosen["weight_decay"] = method.weight_decay
    if not continues_adapter(flags):
        for name, value in adapter_of(flags).items():
            if name in method.options:
                chosen[name] = value
    return dataclasses.replace(flags, **chosen), why_lr


def auto_factor(flags: Flags) -> float:
    """Returns the factor of the default rate with which --lr auto begins: for the run's batch, and for how
    LoRA's update is scaled."""
    batch = flags.batch_size * flags.accumulate * distributed.dp_size()
    factor = math.sqrt(batch / REFERENCE_BATCH)
    if "alpha" not in method_of(flags).options or continues_adapter(flags):
        return factor
    # A step of B A that all ranks take alike is as large as scale x rank: alpha, of rsLoRA alpha x
    # sqrt(rank). The default is for the default alpha.
    adapter = adapter_of(flags)
    size = adapter["alpha"] * (math.sqrt(adapter["rank"]) if flags.rslora else 1)
    default = NEW_ADAPTER["alpha"] * (math.sqrt(NEW_ADAPTER["rank"]) if flags.rslora else 1)
    return factor * default / size


def meta_model_of_run(flags: Flags, folder: Path, config: Config) -> Transformer:
    """Returns this run's model without memory, on the meta device, with what trains marked."""
    recipe, _ = recipe_and_layout(flags)
    dtype = DTYPES[flags.dtype]
    if continues_adapter(flags):
        model = memory.meta_model(config, recipe, dtype, None, flags.quant)
        model.source = folder
        check_kind_of_adapter(flags)
        load_any_adapter(model, start_of(flags))
        return model
    # Once a run is resumed, it has a copy of the file.
    adapter = adapter_of(flags) | {"add_tokens": file_of_new_tokens(flags)}
    model = memory.meta_model(config, recipe, dtype, adapter, flags.quant)
    model.source = folder
    if not method_of(flags).freezes_base:
        select_weights(model, flags)
        # Frozen weights that were stored in 16 bits stay in 16 bits; trained ones are in fp32.
        stored_in_16_bits = stored_dtype(folder).itemsize == 2
        for parameter in model.parameters():
            if stored_in_16_bits and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return model


def choose_max_tokens(flags: Flags, model: Transformer, device: torch.device) -> int:
    """Returns the tokens of a micro-batch of one rank: as many as help and, by the plan, fit."""
    recipe, layout = recipe_and_layout(flags)

    def peak(tokens: int) -> float:
        """Returns the bytes at the peak with this many tokens, in one document, all trained."""
        tokens *= flags.context_parallel
        workload = Workload(
            lengths=[tokens],
            trained=tokens,
            share=1.0,
            all_lengths=[tokens],
            tokens=tokens,
            to_learn=tokens,
            # More than one in a step take more memory: gradients stay from one to the next.
            accumulate=2,
        )
        memory_of_rank = multi_gpu.memory_per_process(
            model, recipe, layout, workload, device.type, flags.context_parallel
        )
        return memory_of_rank.peak

    room = memory.FITS * memory.device_memory(device)
    return distributed.broadcast_object(memory.tokens_at_once(device, room, peak))


def choose_compile(flags: Flags, device: torch.device, seconds: float) -> tuple[str, str]:
    """Returns "on" or "off" for --compile, and why. seconds: what training is expected to take.

    Raises UserError for --compile on where its compiler is missing.
    """
    on_gpu = device.type == "cuda"
    # The compiler of C++ that torch.compile calls.
    compiler = os.environ.get("CXX")
    if not compiler:
        compiler = "clang++" if sys.platform == "darwin" else "g++"
    available = shutil.which(compiler) is not None
    if on_gpu and importlib.util.find_spec("triton") is None:
        available = False
    if flags.compile == "on" and not available:
        needed = f"{compiler} and triton" if on_gpu else compiler
        raise UserError(f"--compile on: needs {needed}, not found here")

    if flags.compile != "auto":
        is_as_before = flags.resume and "compile" not in flags.given
        why = "as before" if is_as_before else "asked for with --compile"
        return flags.compile, f"compiled blocks {flags.compile}, {why}"
    choice = "off"
    if on_gpu:
        reason = "what they save on GPUs is not measured yet, --compile on tries them"
    elif flags.deterministic:
        reason = "--deterministic, and whether it pays is a matter of the clock"
    elif flags.activation_checkpointing == "selective":
        reason = "--activation-checkpointing selective"
    elif not available:
        reason = f"no {compiler} here"
    elif flags.dtype == "fp32":
        reason = "it saves nothing in fp32"
    elif seconds * COMPILE_SAVES > 2 * COMPILE_SECONDS:
        choice = "on"
        reason = "a long run"
    else:
        reason = "a short run"
    return choice, f"compiled blocks {choice}: {reason}"


def choose_save_every(flags: Flags, model: Transformer, seconds: float) -> tuple[int, str]:
    """Returns --save-every, and a line about it.

    It is 0, no checkpoints, if it was left open and the disk has no room for them.
    seconds: what training is expected to take.
    """
    save_every = flags.save_every
    if save_every is None:
        in_time = MAX_SECONDS_BETWEEN_CHECKPOINTS * flags.steps / max(seconds, 1)
        if flags.steps < CHECKPOINTS_FROM_STEPS and in_time >= flags.steps:
            steps = number_of(flags.steps, "step")
            return 0, f"no checkpoints, the run is short: {steps} (--save-every)"
        save_every = max(1, min(math.ceil(flags.steps / 5), int(in_time)))
    checkpoint_size, weights_size, count = sizes_on_disk(flags, model)
    needed = count * checkpoint_size + 3 * weights_size
    size = format_bytes(checkpoint_size)

    def has_room() -> bool:
        return free_on_disk(flags) >= needed

    # A run that is resumed replaces what it has written, so its room is not asked about.
    if flags.save_every is None and not flags.resume and not distributed.run_on_rank0(has_room):
        return 0, f"no checkpoints, the disk has no room for {count} of {size}"
    if not save_every:
        return 0, "no checkpoints"
    interval = "step" if save_every == 1 else f"{save_every:,} steps"
    kept = "is kept" if flags.keep == 1 else "are kept"
    line = f"a checkpoint of {size} every {interval}; the last {flags.keep} {kept}"
    return save_every, line


def choose_save_dtype(flags: Flags, folder: Path, config: Config) -> tuple[Flags, str]:
    """Returns the flags with --save-dtype, the dtype of best/ and final/, and why it was chosen;
    an adapter has none, it is stored in float32."""
    if method_of(flags).freezes_base:
        return flags, ""
    if flags.save_dtype is not None:
        return flags, "asked for with --save-dtype"
    dtype = stored_dtype(folder)
    name = next(name for name, known in STORAGE_DTYPES.items() if known == dtype)
    reason = dtype_note(config, dtype) or "as the base's files are"
    return dataclasses.replace(flags, save_dtype=name), f"{reason} (--save-dtype)"


def sizes_on_disk(flags: Flags, model: Transformer) -> tuple[float, float, int]:
    """Returns (bytes of a checkpoint, bytes of best/ or final/, most checkpoints at a time)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bytes_a_weight = 4 if flags.weights == "fp32" else 2
    checkpoint = trained * bytes_a_weight + trained * optimizers.state_bytes(flags.optimizer)
    if flags.optimizer_offload:
        # The masters on the host.
        checkpoint += 4 * trained
    if method_of(flags).freezes_base:
        weights = 4 * trained
    else:
        weights = (4 if flags.save_dtype == "fp32" else 2) * model.size
    # Besides those of --keep, the best one and the one that is being written.
    return checkpoint, weights, flags.keep + 2


def free_on_disk(flags: Flags) -> int:
    """Returns the bytes that are free where the run will be written, with those of an earlier run
    that it removes."""
    out = Path(flags.out or "runs").resolve()
    existing = next(folder for folder in (out, *out.parents) if folder.exists())
    removed = 0
    if flags.out:
        for name in RUN_FILES:
            path = out / name
            if path.is_dir():
                removed += sum(file.lstat().st_size for file in path.rglob("*"))
            elif path.exists():
                removed += path.lstat().st_size
    return shutil.disk_usage(existing).free + removed
