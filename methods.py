"""The ways to fine-tune, a row each: what --method means, and the only place that knows.

A method leaves an ordinary nn.Module behind; the loop never asks which it is. To add one: its
functions and a row of `METHODS`.
"""

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoint
import distributed
import lora
from common.device import DTYPES, STORAGE_DTYPES
from common.errors import UserError
from model import Transformer, quantized_linears

# If rounding takes more than this share of what was trained, a warning says so.
WORTH_A_WARNING = 0.05


class Method(NamedTuple):
    """A way to fine-tune.

    attach(model, settings): freezes what is not trained and adds what is, on a model with weights
        or on the meta device.
    start(model, settings): gives what was added on the meta device its first numbers; elsewhere
        attach does it.
    save(model, settings, folder, write_extra): writes final/ or best/, and returns what a user must
        know of it, a clause, or "".
    lr_factor: of the default learning rate.
    weight_decay: the default.
    freezes_base: the base may then be in 4 bits, may be replicated on all ranks, and is not saved.
    options: names of the options that this method reads, and others don't.
    quant: the 4-bit format of the base where --quant is not given.
    describe(settings): what is trained, in a few words for the summary.
    lighter: the method that takes less memory, to be suggested where it ran out.
    switched_off(model): a context in which what was added computes nothing, so that the logits are
        those of the model before step 1, to the bit; None where the training leaves no such model.
    held: what --ewc holds near its start: "weights", those that are trained; "updates", the change of
        the adapted weights; None where there is no such change.
    """

    attach: Callable[[Transformer, "object"], None]
    start: Callable[[Transformer, "object"], None]
    save: Callable[[Transformer, "object", Path, Callable[[Path], None]], str]
    lr_factor: float
    weight_decay: float
    freezes_base: bool
    options: tuple[str, ...]
    describe: Callable[["object"], str]
    quant: str | None = None
    lighter: str | None = None
    switched_off: Callable[[Transformer], AbstractContextManager[None]] | None = None
    held: str | None = None


def attach_lora(model: Transformer, settings) -> None:
    """Freezes the model and puts LoRA on: that of --adapter, or a new one."""
    if continues_adapter(settings):
        lora.put_adapter_on(model, settings.adapter)
    else:
        lora.add_lora(model, settings.rank, settings.alpha, settings.dropout, settings.targets)


def start_lora(model: Transformer, settings) -> None:
    """Gives a LoRA that was put on a model without memory its first numbers: those of --adapter, or
    new ones."""
    if continues_adapter(settings):
        lora.load_lora_weights(model, settings.adapter)
        return
    for layer in lora.lora_layers(model).values():
        layer.start()


def continues_adapter(settings) -> bool:
    """True if the run begins with the numbers of --adapter; a run that is resumed has its own by
    now."""
    return bool(settings.adapter) and not settings.resume


def select_weights(model: Transformer, settings) -> None:
    """Marks the model's own weights as trained, those alone that --train names if it is given.

    Raises UserError if the model is in 4 bits, or if --train matches no parameter.
    """
    if quantized_linears(model):
        raise UserError(
            f"{model.source}: its weights are in 4 bits, which can't be trained; use --method qlora"
        )
    compute_dtype = DTYPES[settings.dtype]
    model.compute_dtype = compute_dtype
    if not settings.train:
        return
    # Users know the published names, so --train is matched with those.
    names = {name: checkpoint.hf_name(model, name) for name, _ in model.named_parameters()}
    selected = {name for name in names if re.search(settings.train, names[name])}
    if not selected:
        example = names["norm.weight"]
        raise UserError(
            f"--train {settings.train}: matches no parameter (they are named like {example})"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in selected)
        # A frozen weight needs no float32 master, which saves memory where the narrow dtype holds
        # the same number. Frozen means: not even rounded. On the meta device, before it is sharded,
        # whether that is so is not known yet.
        if name not in selected and not parameter.is_meta:
            narrow = parameter.data.to(compute_dtype)
            if torch.equal(narrow.float(), parameter.data):
                parameter.data = narrow


def start_nothing(model: Transformer, settings) -> None:
    """Does nothing: full fine-tuning adds no parameters, and loading fills those of the model."""


def save_full(
    model: Transformer, settings, folder: Path, write_extra: Callable[[Path], None]
) -> str:
    """Writes a Hugging Face folder in the dtype of --save-dtype. Returns how much of what was
    trained the rounding to it takes.

    If weights have become too large for it, float32 is written: the training must not be lost.
    """
    dtype = STORAGE_DTYPES[settings.save_dtype]
    too_large = weights_beyond(model, dtype)
    if too_large:
        checkpoint.save_model(model, folder, torch.float32, write_extra)
        return (
            f"WARNING: stored in fp32, for {too_large} has become too large for"
            f" {settings.save_dtype} (--save-dtype)"
        )
    lost = checkpoint.share_lost_by_rounding(model, dtype)
    checkpoint.save_model(model, folder, dtype, write_extra)
    if not lost:
        return ""
    remark = f"rounding to {settings.save_dtype} loses {100 * lost:.3g} % of what was trained"
    if lost > WORTH_A_WARNING:
        remark = f"WARNING: {remark}; --save-dtype fp32 keeps it"
    return remark


def weights_beyond(model: Transformer, dtype: torch.dtype) -> str | None:
    """Returns the published name of a parameter that holds finite weights beyond the range of a
    dtype; None if there is none. All ranks must call it."""
    largest = torch.finfo(dtype).max
    if largest >= torch.finfo(torch.bfloat16).max:
        return None
    for name, parameter in model.named_parameters():
        local = distributed.to_local(parameter.detach())
        fits = True
        if local.numel() and local.is_floating_point():
            # What is not finite is refused elsewhere.
            smallest, greatest = (float(each) for each in torch.aminmax(local))
            fits = not largest < max(-smallest, greatest) < math.inf
        if not distributed.all_ranks_agree(fits):
            return checkpoint.hf_name(model, name)
    return None


def check_save_dtype(model: Transformer, settings) -> None:
    """Raises UserError if weights of the base are too large for --save-dtype, before hours are spent
    on it. All ranks must call it."""
    name = weights_beyond(model, STORAGE_DTYPES[settings.save_dtype])
    if name:
        raise UserError(
            f"--save-dtype {settings.save_dtype}: {name} of {model.source} holds weights too large"
            " for it; take bf16 or fp32"
        )


def save_lora(
    model: Transformer, settings, folder: Path, write_extra: Callable[[Path], None]
) -> str:
    """Writes a PEFT adapter folder, in float32: nothing is rounded."""
    lora.save_adapter(model, folder, write_extra)
    return ""


def describe_full(settings) -> str:
    return settings.train or "all"


def describe_lora(settings) -> str:
    if settings.adapter:
        return f"going on from {settings.adapter}"
    return f"rank {settings.rank}, alpha {settings.alpha:g} on {settings.targets}"


FULL = Method(
    attach=select_weights,
    start=start_nothing,
    save=save_full,
    lr_factor=1,
    weight_decay=0.01,
    freezes_base=False,
    options=("train", "weights", "save_dtype"),
    describe=describe_full,
    lighter="lora",
    held="weights",
)
LORA = Method(
    attach=attach_lora,
    start=start_lora,
    save=save_lora,
    lr_factor=10,
    weight_decay=0.0,
    freezes_base=True,
    options=("quant", "rank", "alpha", "dropout", "targets", "adapter"),
    describe=describe_lora,
    lighter="qlora",
    switched_off=lora.adapter_off,
    held="updates",
)
# A base in 4 bits wants a learning rate half as high again (experiments/LOG.md).
QLORA = LORA._replace(lr_factor=15, quant="nf4", lighter=None)
METHODS = {"full": FULL, "lora": LORA, "qlora": QLORA}


def quant_of(flags) -> str | None:
    """Returns the kind of quantization of a run: what --quant says, or else what --method implies."""
    return flags.quant or METHODS[flags.method].quant


def method_name(settings) -> str:
    """Returns the name of a run's row: --method lora on a quantized base is QLoRA by another name."""
    if settings.quant:
        return "qlora"
    return settings.method


def method_of(settings) -> Method:
    """Returns the row of a run."""
    return METHODS[method_name(settings)]


def model_of_step_0(model: Transformer, settings) -> AbstractContextManager[None] | None:
    """Returns a context in which a run's model computes as before step 1, to the bit; None where it
    no longer can."""
    switched_off = method_of(settings).switched_off
    # A run that goes on from an adapter did not begin with the base alone.
    if switched_off is None or settings.adapter:
        return None
    return switched_off(model)


def load_trainable(settings, folder: Path, device: torch.device) -> Transformer:
    """Loads the base model and makes it trainable by the run's method; sharded over the ranks where
    --shard asks."""
    # LoRA's first numbers are random.
    torch.manual_seed(settings.seed)
    method = method_of(settings)
    if method.freezes_base or settings.optimizer_offload:
        stored = DTYPES[settings.dtype]
    elif settings.weights == "bf16":
        stored = torch.bfloat16
    else:
        # fp32 masters: rounded to the nearest bf16 number, small updates would be lost.
        stored = torch.float32
    if settings.shard == "none":
        model = checkpoint.load_model(folder, stored, device, settings.quant)
        method.attach(model, settings)
    else:
        model = load_sharded(method, settings, folder, stored, device)
    model.activation_checkpointing = settings.activation_checkpointing
    if settings.save_dtype:
        check_save_dtype(model, settings)
    return model


def load_sharded(
    method: Method, settings, folder: Path, stored: torch.dtype, device: torch.device
) -> Transformer:
    """Returns what `load_trainable` does: the model is made trainable and sharded on the meta
    device, then each rank reads its own rows.

    stored: the dtype of the weights.
    """
    # Masters are cast before they are gathered for a layer, which sends half the bytes.
    dtype = DTYPES[settings.dtype]
    gathered = None
    if not method.freezes_base and dtype != stored:
        gathered = dtype

    def attach_and_shard(model: Transformer) -> None:
        method.attach(model, settings)
        distributed.shard_model(model, settings.shard, device, gathered, settings.shard_offload)

    memory = torch.device("cpu") if settings.shard_offload else device
    model = checkpoint.load_model(folder, stored, memory, settings.quant, attach_and_shard)
    if settings.shard_offload:
        # What is not sharded is not brought to the device when it is needed.
        for parameter in model.parameters():
            if not distributed.is_sharded(parameter):
                parameter.data = parameter.data.to(device)
    method.start(model, settings)
    return model
