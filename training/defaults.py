"""From what was typed to what a run does: every setting that was left open, chosen once, with its reason.

`resolve_defaults` returns `Settings`, which are frozen: printed at the start, saved as config.json, read by everybody.
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
import lora
import optimizers
from checkpoint import read_config, stored_dtype, weight_files
from common.device import DTYPES, pick_dtype
from common.errors import UserError
from data import TrainingData
from dataset.sampler import Sampler
from flags import Flags
from methods import continues_adapter, method_of, select_weights
from model import Config, Transformer
from planning import memory, multi_gpu
from planning.memory import Workload
from planning.report import adapter_of, describe_workload, recipe_and_layout
from training.checkpointer import RUN_FILES, format_bytes

COMPILE_SECONDS = 20  # to compile a block; measured on 2 cores
COMPILE_SAVES = 0.05  # share of a step's time that it saves there
SHARE_OF_NF4 = 0.26  # of the bytes of 16-bit weights
MAX_SECONDS_BETWEEN_CHECKPOINTS = 1800


@dataclass(frozen=True)
class Settings(Flags):
    """Every option with the value that holds, none of them open.

    reasons: {option: why, where it was chosen here}. steps_per_epoch; max_tokens: of a micro-batch of one rank;
    flops_per_token: floating point operations of training; expected_seconds: of training.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    steps_per_epoch: int = 1
    max_tokens: int = 0
    flops_per_token: float = 0.0
    expected_seconds: float = 0.0
    workload: Workload | None = None


def resolve_defaults(
    flags: Flags, folder: Path, data: TrainingData, device: torch.device
) -> Settings:
    """Returns the run's settings. folder: of the base model. UserError where what was typed can't be had here."""
    config = read_config(folder)
    dtype, why_dtype = pick_dtype(flags.dtype, device)
    reasons = {"dtype": why_dtype}
    chosen = {
        "device": device.type,
        "dtype": next(name for name, known in DTYPES.items() if known == dtype),
        "seq_len": data.seq_len,
        "val_fraction": data.val_fraction,
        "pack": data.pack,
    }
    chosen["shard"], reasons["shard"] = choose_shard(flags, folder, device)
    flags = dataclasses.replace(flags, **chosen)
    flags, steps_per_epoch = choose_steps(flags, data.sampler)
    flags = choose_optimization(flags, config)
    model = meta_model_of_run(flags, folder, config)
    if continues_adapter(flags):
        flags = dataclasses.replace(flags, **adapter_shape(model))
    max_tokens = choose_max_tokens(flags, model, device)
    workload = describe_workload(flags, data, steps_per_epoch, device, max_tokens)
    flops = memory.flops_a_token(
        model, workload.all_lengths, workload.share, flags.activation_checkpointing
    )
    rate = distributed.broadcast_object(memory.product_rate(config, device, dtype))
    seconds = workload.tokens * flops / (memory.EFFICIENCY * rate * distributed.world_size())
    compiled, reasons["compile"] = choose_compile(flags, device, seconds)
    save_every, reasons["save_every"] = choose_save_every(flags, model, seconds)
    flags = dataclasses.replace(flags, compile=compiled, save_every=save_every)
    values = {each.name: getattr(flags, each.name) for each in dataclasses.fields(Flags)}
    return Settings(**values, reasons=reasons, steps_per_epoch=steps_per_epoch, max_tokens=max_tokens,
                    flops_per_token=flops, expected_seconds=seconds, workload=workload)  # fmt: skip


def choose_shard(flags: Flags, folder: Path, device: torch.device) -> tuple[str, str]:
    """--shard, and why."""
    count, shard, reason = distributed.world_size(), flags.shard, ", asked for with --shard"
    if shard is None:
        size = sum(file.stat().st_size for file in weight_files(folder)) * (
            SHARE_OF_NF4 if method_of(flags).quant else 1
        )
        is_small = size <= distributed.REPLICATE_BELOW * memory.device_memory(device)
        shard = "none" if count == 1 or (method_of(flags).freezes_base and is_small) else "full"
        reason = f": the frozen base is small, {size / 1e9:.1f} GB" if shard == "none" else ""
    if shard == "none" and flags.shard_offload:
        raise UserError("--shard-offload: keeps shards on the host, and --shard is none")
    if shard == "hybrid" and count == distributed.local_world_size():
        raise UserError(
            "--shard hybrid: shards inside a node and copies across nodes, and there is one node"
        )
    if shard == "hybrid" and not distributed.all_ranks_agree(
        count % distributed.local_world_size() == 0
    ):
        raise UserError("--shard hybrid: the nodes must have equally many processes")
    return shard, reason


def choose_steps(flags: Flags, sampler: Sampler) -> tuple[Flags, int]:
    """How long to train and how often to validate; with it the number of steps in an epoch."""
    per_step = flags.batch_size * flags.accumulate * distributed.dp_size()
    examples = sum(sampler.samples_per_epoch)
    steps_per_epoch = math.ceil(sampler.epoch_rows() / per_step)
    steps, epochs, eval_every = flags.steps, flags.epochs, flags.eval_every
    if steps is None:
        if epochs is None:
            epochs = 1.0 if examples >= 1_500 else 2.0 if examples >= 500 else 3.0
        steps = max(1, round(epochs * steps_per_epoch))
    if eval_every is None:
        eval_every = math.ceil(steps / 5)
    return dataclasses.replace(
        flags, steps=steps, epochs=epochs, eval_every=eval_every
    ), steps_per_epoch


def choose_optimization(flags: Flags, config: Config) -> Flags:
    """Learning rate, warm-up and weight decay; and the shape of a new adapter."""
    method, chosen = method_of(flags), {}
    if flags.lr is None:
        # Schulman et al. 2025, "LoRA without regret": the best rate falls with the width, and is ten times as high for
        # LoRA as for full fine-tuning.
        chosen["lr"] = float(f"{5e-5 * method.lr_factor * (2000 / config.hidden_size) ** 0.78:.1e}")
    warmup = round(0.05 * flags.steps) if flags.warmup is None else flags.warmup
    if warmup >= flags.steps:
        raise UserError(f"--warmup {warmup}: longer than the run of {flags.steps} steps")
    chosen["warmup"] = warmup
    if flags.weight_decay is None:
        chosen["weight_decay"] = method.weight_decay
    if method.freezes_base and not continues_adapter(flags):
        chosen |= adapter_of(flags)
    return dataclasses.replace(flags, **chosen)


def meta_model_of_run(flags: Flags, folder: Path, config: Config) -> Transformer:
    """The model of this run without memory, on the meta device, with what trains marked."""
    recipe, _ = recipe_and_layout(flags)
    dtype = DTYPES[flags.dtype]
    if continues_adapter(flags):
        model = memory.meta_model(config, recipe, dtype, None, flags.quant)
        model.source = folder
        lora.load_adapter(model, flags.adapter)
        return model
    model = memory.meta_model(config, recipe, dtype, adapter_of(flags), flags.quant)
    model.source = folder
    if not method_of(flags).freezes_base:
        select_weights(model, flags)
        for (
            parameter
        ) in model.parameters():  # frozen weights that were stored in 16 bits are held so
            if not parameter.requires_grad and stored_dtype(config).itemsize == 2:
                parameter.data = parameter.data.to(dtype)
    return model


def adapter_shape(model: Transformer) -> dict:
    """Rank, alpha, dropout and targets of the adapter that a model carries, as flags."""
    layers = lora.lora_layers(model)
    first = next(iter(layers.values()))
    targets = ",".join(lora.target_modules(model, list(layers)))
    return {"rank": first.rank, "alpha": first.alpha, "dropout": first.dropout, "targets": targets}


def choose_max_tokens(flags: Flags, model: Transformer, device: torch.device) -> int:
    """Tokens of a micro-batch of one rank: as many as are of use and, by the plan, fit."""
    recipe, layout = recipe_and_layout(flags)

    def peak(tokens: int) -> float:
        tokens *= flags.context_parallel
        job = Workload([tokens], tokens, 1.0, [tokens], tokens, tokens, accumulate=2)
        return multi_gpu.memory_per_process(
            model, recipe, layout, job, device.type, flags.context_parallel
        ).peak

    room = memory.FITS * memory.device_memory(device)
    return distributed.broadcast_object(memory.tokens_at_once(device, room, peak))


def choose_compile(flags: Flags, device: torch.device, seconds: float) -> tuple[str, str]:
    """--compile on or off, and why. seconds: what training is expected to take."""
    compiler = os.environ.get("CXX") or (
        "clang++" if sys.platform == "darwin" else "g++"
    )  # what torch.compile calls
    available = shutil.which(compiler) is not None
    available = available and (
        device.type != "cuda" or importlib.util.find_spec("triton") is not None
    )
    if flags.compile == "on" and not available:
        raise UserError(
            f"--compile on: needs {compiler}{' and triton' if device.type == 'cuda' else ''}, not found here"
        )
    if flags.compile != "auto":
        return flags.compile, f"compiled blocks {flags.compile}, asked for with --compile"
    if device.type == "cuda":
        return (
            "off",
            "compiled blocks off: what they save on GPUs is not measured yet, --compile on tries them",
        )
    if flags.deterministic:
        return (
            "off",
            "compiled blocks off: --deterministic, and whether it pays is a matter of the clock",
        )
    if flags.activation_checkpointing == "selective":
        return "off", "compiled blocks off: --activation-checkpointing selective"
    if not available:
        return "off", f"compiled blocks off: no {compiler} here"
    if seconds * COMPILE_SAVES > 2 * COMPILE_SECONDS:
        return "on", "compiled blocks on: a long run"
    return "off", "compiled blocks off: a short run"


def choose_save_every(flags: Flags, model: Transformer, seconds: float) -> tuple[int, str]:
    """--save-every, and a line about it: none where the disk has no room and it was left open."""
    save_every = flags.save_every
    if save_every is None:
        in_time = MAX_SECONDS_BETWEEN_CHECKPOINTS * flags.steps / max(seconds, 1)
        save_every = max(1, min(math.ceil(flags.steps / 5), int(in_time)))
    checkpoint_size, weights_size, count = sizes_on_disk(flags, model)
    needed = count * checkpoint_size + 3 * weights_size
    has_room = lambda: free_on_disk(flags) >= needed
    if flags.save_every is None and not flags.resume and not distributed.run_on_rank0(has_room):
        return (
            0,
            f"no checkpoints, the disk has no room for {count} of {format_bytes(checkpoint_size)}",
        )
    if not save_every:
        return 0, "no checkpoints"
    size = format_bytes(checkpoint_size)
    return (
        save_every,
        f"a checkpoint of {size} every {save_every:,} steps; the last {flags.keep} are kept",
    )


def sizes_on_disk(flags: Flags, model: Transformer) -> tuple[float, float, int]:
    """(bytes of a checkpoint, bytes of best/ or final/, checkpoints that may be there at a time)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    checkpoint = trained * (4 if flags.weights == "fp32" else 2) + trained * optimizers.state_bytes(
        flags.optimizer
    )
    checkpoint += 4 * trained if flags.optimizer_offload else 0
    weights = 4 * trained if method_of(flags).freezes_base else 2 * model.size
    return checkpoint, weights, flags.keep + 2  # the best one, and the one that is being written


def free_on_disk(flags: Flags) -> int:
    """Bytes that are free where the run will be written, with those of an earlier run that it removes."""
    out = Path(flags.out or "runs").resolve()
    existing = next(folder for folder in (out, *out.parents) if folder.exists())
    removed = 0
    for path in (out / name for name in RUN_FILES if flags.out):
        files = path.rglob("*") if path.is_dir() else [path] if path.exists() else []
        removed += sum(file.lstat().st_size for file in files)
    return shutil.disk_usage(existing).free + removed
