"""What all adapters have in common: on a model, and as a folder of PEFT's.

An adapter is what a method puts on a frozen model: modules that are trained in place of the weights
(lora.py, adapters.py). Each of these modules has

    is_adapter   True, by which it is found
    base         what stands in its place without it: the linear that it adapts, or None
    before       where it took the place of another than `base`: that one (optional)
    merged       True while the base alone computes, either because the adapter's update is in the
                 base's weights, or because the adapter is switched off
    start(model)    fills in the first numbers, the same on every rank
    saved_numbers   how many numbers of each token are kept for the backward, for the plan of memory
    file_shape      the shape of its tensors in the file, where that is another one
    tensors(model, name)   {name in the file: parameter}, for our name of its place
    placed(model)   a static method, for kinds that something else of a model depends on: called once
                    such modules were put on a model or taken off
    takes_score_head   True where a score head can be trained beside it (optional)
    is_whole     True if it holds all numbers of what stands in its place, in their own dtype: merging
                 leaves it there, and sets `is_in_base` (optional)

Those whose update can be added to the weight of `base`, a linear, have `merged_weight`,
`unmerged_weight` and `merged_bias`, and keep in `original` and `original_bias` what these replace.

Files are what peft writes and servers read: adapter_config.json, and adapter_model.safetensors,
whose names begin with `base_model.model.` and the published name of a module.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from checkpoint import (
    all_finite,
    base_of,
    config_dtype,
    copy_local_rows,
    fingerprint,
    hf_name,
    iterate_tensors,
    read_config,
)
from common.choices import QUANT_KINDS
from common.errors import UserError, printable, read_json, read_json_if_there
from common.files import atomic_folder, save_tensors, write_json
from common.origin import base_facts
from distributed import full_tensor, rank0_context, run_on_rank0
from kernels.nf4 import NF4, dequantized_weight
from model import Transformer, quantized_linears

PREFIX = "base_model.model."
ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
# The base that LoftQ's adapter brings along, inside its folder.
OWN_BASE = "base"
# Of the adapters library (AdapterHub), whose configuration has the same name.
HUB_FILE = "adapter.safetensors"
PICKLES = ("adapter_model.bin", "pytorch_adapter.bin")


# ---- on a model ----


def adapter_modules(model: nn.Module) -> dict[str, Any]:
    """Returns the modules of a model's adapter by our names of their places; {} without one."""
    modules: dict[str, Any] = {}
    for name, module in model.named_modules():
        if getattr(module, "is_adapter", False):
            modules[name] = module
    return modules


def has_adapter(model: nn.Module) -> bool:
    return any(getattr(module, "is_adapter", False) for module in model.modules())


def base_size(model: Transformer) -> int:
    """Returns the number of the base model's parameters."""
    adapters: dict[int, int] = {}
    for module in adapter_modules(model).values():
        inside = set()
        if module.base is not None:
            inside = {id(p) for p in module.base.parameters()}
        # By parameter, since two modules may share one.
        adapters |= {id(p): p.numel() for p in module.parameters() if id(p) not in inside}
    return model.size - sum(adapters.values())


def refuse_second_adapter(model: nn.Module) -> None:
    """Raises UserError if a model has an adapter already."""
    if has_adapter(model):
        raise UserError(
            "the model has an adapter already; remove it first (lora.merge keeps the update of one)"
        )


def put_back(model: Transformer, modules: dict[str, Any]) -> None:
    """Puts the modules of an adapter on a model, by our names of their places. So several adapters can
    use one base, one after the other."""
    assert not has_adapter(model), "one adapter at a time"
    for name, module in modules.items():
        set_submodule(model, name, module)
    tell_placed(model, modules)


def remove_adapter(model: Transformer) -> dict[str, Any]:
    """Puts back what stood in the place of an adapter's modules, and returns these, for `put_back`. After
    `merge` the model is an ordinary one for save_model."""
    modules = adapter_modules(model)
    for name, module in modules.items():
        set_submodule(model, name, getattr(module, "before", module.base))
    tell_placed(model, modules)
    return modules


def tell_placed(model: Transformer, modules: dict[str, Any]) -> None:
    """Calls `placed` of each kind of module that has it, once."""
    for kind in dict.fromkeys(type(module) for module in modules.values()):
        if hasattr(kind, "placed"):
            kind.placed(model)


def set_submodule(model: nn.Module, name: str, module: nn.Module | None) -> None:
    """Replaces the submodule `name` of a model."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@contextlib.contextmanager
def adapter_off(model: Transformer) -> Iterator[None]:
    """A block in which the model computes as its base alone. Nothing is moved or rounded."""
    modules = adapter_modules(model).values()
    assert not any(module.merged for module in modules), (
        "a merged layer's base has the update in it"
    )
    for module in modules:
        # Then the module is its base.
        module.merged = True
    try:
        yield
    finally:
        for module in modules:
            module.merged = False


@torch.no_grad()
def merge(model: Transformer, keep: bool = False, stored: torch.dtype | None = None) -> float:
    """Adds every adapter's update to its base weight, in fp32, rounded once to the base's dtype.

    A base in NF4 leaves it, since 4 bits would not hold the update: the sum is in the model's
    dtype, and the base's numbers in it are those of its 4 bits.

    keep: keeps the weights as they were, so that `unmerge` is exact; this takes as much memory as
        they do. A base in NF4 is always kept.
    stored: the dtype that the weights are rounded to later on, if to another one.
    Returns the fraction of the update that rounding loses: the length of what rounding changes,
    over the length of the update.
    Raises UserError if the adapter is of a kind that is no update of weights, and where a layer's
    merged weights are too large for their dtype, naming the layer.
    """
    # Sums of squares. They stay on the device, so that the layers need not wait for each other.
    lost: float | Tensor = 0.0
    update: float | Tensor = 0.0
    for layer in mergeable_layers(model):
        assert not layer.merged, "merged already"
        if is_whole(layer):
            layer.is_in_base = True
            layer.merged = True
            continue
        base = layer.base
        # In fp32 from end to end: rounded twice, small updates would be lost.
        before = dequantized_weight(base.frozen, torch.float32)
        exact = layer.merged_weight(before)
        # Now, since `before` may be the weight itself, which is about to change.
        update += (exact - before).square().sum()
        if base.bias is not None:
            # Detached, as a parameter would become one of the layer.
            layer.original_bias = base.bias.detach()
            bias = layer.merged_bias(base.bias.float()).to(base.bias.dtype)
            base.bias = nn.Parameter(bias, requires_grad=False)
        # NF4 would lose the update, so the linear becomes a plain one.
        if base.nf4 is not None:
            layer.original = base.nf4.tensors
            base.dequantize(exact.to(model.dtype))
        else:
            layer.original = base.weight.clone() if keep else None
            base.weight.copy_(exact)
        rounded = base.weight if stored is None else base.weight.to(stored)
        lost += (rounded - exact).square().sum()
        layer.merged = True
    # An adapter that was never trained has no update.
    if not update:
        return 0.0
    share = math.sqrt(lost / update)
    if not math.isfinite(share):
        check_merged_weights(model, stored)
    return share


def mergeable_layers(model: Transformer) -> list:
    """Returns the modules of a model's adapter, in the model's order.

    Raises UserError if they are no updates of weights.
    """
    modules = adapter_modules(model)
    for module in modules.values():
        if not is_whole(module) and not hasattr(module, "merged_weight"):
            raise UserError(
                "this adapter is no update of weights, so it can't be merged into those of"
                f" {model.source}; keep it as an adapter"
            )
    return list(modules.values())


def is_whole(module: nn.Module) -> bool:
    """True for a module of an adapter that holds all numbers of what stands in its place."""
    return getattr(module, "is_whole", False)


def check_merged_weights(model: Transformer, stored: torch.dtype | None) -> None:
    """Raises UserError naming the first layer whose merged weights are not finite. stored: as for
    `merge`."""
    for name, layer in adapter_modules(model).items():
        if is_whole(layer):
            continue
        weight = layer.base.weight
        dtype = stored or weight.dtype
        if not all_finite(weight.to(dtype)):
            problem = (
                f"with the adapter's update its weights are too large for {config_dtype(dtype)}"
            )
            raise UserError(f"{hf_name(model, name)}: {problem}; take another --dtype")


@torch.no_grad()
def unmerge(model: Transformer) -> None:
    """Takes the updates out of the base weights again.

    The result is exact if `merge` kept the weights, as it always does for NF4; else up to its
    rounding to the base's dtype.
    """
    for layer in mergeable_layers(model):
        assert layer.merged, "not merged"
        layer.merged = False
        if is_whole(layer):
            layer.is_in_base = False
            continue
        base = layer.base
        if isinstance(layer.original, NF4):
            base.quantize(layer.original)
        elif layer.original is not None:
            base.weight.copy_(layer.original)
        else:
            base.weight.copy_(layer.unmerged_weight(base.weight.float()))
        if layer.original_bias is not None:
            base.bias = nn.Parameter(layer.original_bias, requires_grad=False)
        layer.original = None
        layer.original_bias = None


def whole_weight(layer: Any) -> Tensor:
    """Returns the weight of a frozen linear or embedding table, float32 [out, in], also if it is
    sharded or in NF4. All ranks must call it."""
    if layer.nf4 is None:
        return full_tensor(layer.weight.detach()).float()
    parts = [full_tensor(part.detach()) for part in layer.nf4.tensors if part is not None]
    return dequantized_weight(NF4(*parts), torch.float32)


# ---- as a folder ----


def adapter_tensors(model: Transformer) -> dict[str, Tensor]:
    """Returns the parameters of a model's adapter by their names in its file."""
    tensors: dict[str, Tensor] = {}
    for name, module in adapter_modules(model).items():
        tensors |= module.tensors(model, name)
    return tensors


def file_shapes(model: Transformer) -> dict[str, torch.Size]:
    """Returns the shapes in the file, by name, of the tensors that have another one on the model."""
    shapes: dict[str, torch.Size] = {}
    for name, module in adapter_modules(model).items():
        if hasattr(module, "file_shape"):
            shapes |= dict.fromkeys(module.tensors(model, name), module.file_shape)
    return shapes


def peft_facts(model: Transformer, peft_type: str) -> dict:
    """Returns what every adapter_config.json of PEFT says; it names the base as common/origin.py
    does."""
    base = base_facts(model.source)
    task_type: str | None = "CAUSAL_LM"
    if model.score is not None:
        # PEFT expects a trained head in the file of every adapter with the task of classification.
        task_type = "SEQ_CLS" if is_whole(model.score) else None
    return {
        "peft_type": peft_type,
        "task_type": task_type,
        "base_model_name_or_path": base["base"],
        "revision": base.get("base_revision"),
        "inference_mode": True,
    }


def write_adapter(
    model: Transformer,
    folder: str | Path,
    config: dict,
    write_extra: Callable[[Path], None] | None = None,
    file_name: str = ADAPTER_FILE,
    pack: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Writes the folder of a model's adapter, in place of what is there. All ranks must call it.

    config: what stands in adapter_config.json.
    write_extra: writes more files into the new folder, before that gets its name.
    pack: brings the tensors into the form of the file, where that is another one.
    Raises UserError if the folder holds a model.
    """
    if (Path(folder) / "config.json").is_file():
        raise UserError(
            f"{folder}: holds a model, which an adapter would replace; name another folder"
        )
    # Every rank gathers, because the shards of a tensor are on all of them.
    weights: dict[str, Tensor] = {}
    addresses: set[int] = set()
    shapes = file_shapes(model)
    for name, tensor in adapter_tensors(model).items():
        whole = full_tensor(tensor.detach())
        whole = whole.view(shapes.get(name, whole.shape)).cpu().contiguous()
        # The safetensors package takes no tensor under two names.
        weights[name] = whole.clone() if whole.data_ptr() in addresses else whole
        addresses.add(whole.data_ptr())
    with rank0_context(atomic_folder(Path(folder), replace=True)) as tmp:
        # None on the other ranks.
        if not tmp:
            return
        write_json(config, tmp / CONFIG_FILE)
        save_tensors(pack(weights) if pack else weights, tmp / file_name)
        if write_extra:
            write_extra(tmp)


def load_onto(
    model: Transformer,
    folder: str | Path,
    attach: Callable[[Transformer, dict, Path, dict[str, Tensor]], None],
) -> None:
    """Puts the adapter of a folder on the model: it is trainable, everything else is frozen.

    attach(model, config, where, tensors): puts on the model the modules that `config`, read from the
        file `where`, describes; their numbers are then read from `tensors`.
    Raises UserError, and leaves the model as it was, if the tensors are not exactly those of these
    modules, or if attach raises it.
    """
    config, tensors, file = read_adapter(Path(folder))
    config_file = Path(folder) / CONFIG_FILE
    # To leave the model as it was if the adapter does not fit.
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    had_adapter = has_adapter(model)
    try:
        try:
            attach(model, config, config_file, tensors)
        except UserError as error:
            message = str(error)
            if message.startswith(str(config_file)):
                raise
            raise UserError(f"{config_file}: does not fit this model ({message})") from None
        copy_tensors(model, tensors, file)
    except UserError:
        if not had_adapter:
            remove_adapter(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable[name])
        raise


def load_weights_onto(
    model: Transformer,
    folder: str | Path,
    tidy: Callable[[Transformer, dict, Path, dict[str, Tensor]], None] | None = None,
) -> None:
    """Reads an adapter's file into the adapter that the model has already.

    tidy(model, config, where, tensors): brings the file's tensors into the form of the model's own.
    """
    config, tensors, file = read_adapter(Path(folder))
    if tidy is not None:
        tidy(model, config, Path(folder) / CONFIG_FILE, tensors)
    copy_tensors(model, tensors, file)


def refuse_keys(config: dict, keys: Iterable[str], where: Path) -> None:
    """Raises UserError if an adapter_config.json sets one of some keys, which would be ignored. where:
    the file."""
    for key in keys:
        # peft writes keys that are not used as well, with one of these values.
        if config.get(key) not in (None, False, [], {}):
            raise UserError(f"{where}: {key} is set, which is not supported")


def check_transposed(model: Transformer, config: dict, where: Path) -> None:
    """Raises UserError if an adapter_config.json says of the model's weights that they are stored the
    other way round. peft corrects that with a warning, but then it is unclear what the file means."""
    transposed = config.get("fan_in_fan_out")
    if bool(transposed) != model.config.conv1d:
        raise UserError(f"{where}: fan_in_fan_out is {transposed}, which is wrong for this model")


def read_adapter(folder: Path) -> tuple[dict, dict[str, Tensor], Path]:
    """Returns what adapter_config.json says, the tensors, and the file that they are in.

    Raises UserError if the folder is no adapter's, or has no safetensors.
    """
    if not is_adapter(folder):
        raise UserError(f"{folder}: {why_no_adapter(folder)}")
    config = read_json(folder / CONFIG_FILE)
    file = weights_file(folder)
    if not file.is_file():
        message = f"{file}: no such file"
        pickles = [name for name in PICKLES if (folder / name).exists()]
        if pickles:
            message += f" ({pickles[0]} is a pickle, which can run code and is not read)"
        raise UserError(message)
    return config, dict(iterate_tensors([file])), file


def weights_file(folder: str | Path) -> Path:
    """Returns the file of an adapter's weights: PEFT's or, where that is not there, AdapterHub's."""
    hub_file = Path(folder) / HUB_FILE
    peft_file = Path(folder) / ADAPTER_FILE
    return hub_file if hub_file.is_file() and not peft_file.is_file() else peft_file


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG_FILE).is_file()


def why_no_adapter(folder: Path) -> str:
    """Returns what a path is that should have been an adapter folder, for messages."""
    if not folder.is_dir():
        return "no such folder"
    final = folder / "final"
    if is_adapter(final):
        return f"is the folder of a run; its adapter is {final}"
    if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
        return "is a whole model, not an adapter; give it as --model"
    return f"no {CONFIG_FILE} in it, so it is no PEFT adapter folder"


def adapter_metadata(folder: str | Path) -> dict:
    """Returns what plaintune.json says of the adapter's base; {} if there is no such file.

    train.py writes it beside the weights.
    """
    return read_json_if_there(Path(folder) / "plaintune.json")


def virtual_tokens_in(folder: str | Path) -> int:
    """Returns how many virtual tokens the adapter in a folder puts before every text; 0 for most."""
    count = read_json_if_there(Path(folder) / CONFIG_FILE).get("num_virtual_tokens")
    return count if type(count) is int else 0


def quant_kind(model: Transformer) -> str | None:
    """Returns which linears of a model are in 4 bits, as --quant names it; None if none are."""
    quantized = list(quantized_linears(model).values())
    if not quantized:
        return None
    return "nf4+head" if base_of(model.head) in quantized else "nf4"


def base_numbers(model: Transformer) -> dict:
    """Returns what plaintune.json says of the numbers that a model was trained on: {"quant": kind},
    and if its base is a folder of to-nf4, the hash of what that was made from."""
    facts: dict[str, str | None] = {"quant": quant_kind(model)}
    if is_quantized(model.source):
        facts["quantized_from_sha256"] = adapter_metadata(model.source).get("base_sha256")
    return facts


def trained_kind(adapter: str | Path) -> str | None:
    """Returns the numbers of the base that an adapter was trained on: one of QUANT_KINDS, "stored"
    for the weights as they are stored, or None if it is not known."""
    metadata = adapter_metadata(adapter)
    kind = metadata.get("quant")
    if kind in QUANT_KINDS:
        return kind
    return "stored" if "quant" in metadata else None


def numbers_note(adapter: str | Path, folder: Path, kind: str | None) -> str | None:
    """Returns a line where an adapter was trained on other numbers of its base than these; None
    where they are the same, or where it is not known.

    folder: of the base.
    kind: how it is loaded, one of QUANT_KINDS or None.
    """
    trained = trained_kind(adapter)
    if trained is None or trained == (kind or "stored"):
        return None
    if trained in QUANT_KINDS:
        note = f"NOTE: {adapter} was trained on its base in {trained}; --quant {trained} gives it that one"
        return f"{note} (here it is in {kind})" if kind else note
    if is_quantized(folder):
        # Runs from before `quant` was noted for folders that are in 4 bits already.
        if adapter_metadata(adapter).get("base_sha256") == fingerprint(folder):
            return None
        return (
            f"NOTE: {adapter} was trained on its base as it is stored, and {folder} is in {kind};"
            " give the folder that this one was quantised from"
        )
    return (
        f"NOTE: {adapter} was trained on its base as it is stored, and here it is in {kind}; without"
        " --quant it has the weights that it was trained on"
    )


def base_note(adapter: str | Path, folder: Path) -> str | None:
    """Returns a line where an adapter was trained on another base than that of a folder, by the
    hash of the weights, or where only its name for the base is known and is another; else None."""
    metadata = adapter_metadata(adapter)
    base_sha256 = metadata.get("base_sha256")
    if base_sha256 is None:
        return name_note(adapter, folder)
    # One rank reads the base's files, which takes a second a GB, and tells the others.
    sha256 = run_on_rank0(lambda: fingerprint(folder))
    # A folder that to-nf4 wrote notes what it was made from. In 4 bits both are the same numbers.
    same_weights = {sha256}
    if is_quantized(folder):
        same_weights.add(adapter_metadata(folder).get("base_sha256"))
    if base_sha256 in same_weights or metadata.get("quantized_from_sha256") == sha256:
        return None
    own = ""
    if (Path(adapter) / OWN_BASE).is_dir():
        own = "; without --model it gets the base that it brings along"
    return (
        f"WARNING: {adapter} was trained on other weights than those of {folder};"
        f" its answers will suffer{own}"
    )


def name_note(adapter: str | Path, folder: Path) -> str | None:
    """Returns a line where an adapter, of which no hash of its base is known, names another base
    than this folder; else None."""
    config = read_json(Path(adapter) / CONFIG_FILE)
    named = config.get("base_model_name_or_path") or config.get("model_name")
    if not isinstance(named, str) or not named:
        return None
    names = {str(folder), str(folder.resolve()), folder.resolve().name, base_facts(folder)["base"]}
    if named in names or Path(named).name in names:
        return None
    return (
        f"NOTE: {adapter} names {printable(named[:100])} as its base; whether {folder} holds the"
        " same weights is not known"
    )


def is_quantized(folder: Path) -> bool:
    """True if a model folder is in 4 bits on disk."""
    return read_config(folder).raw.get("quantization_config") is not None


def copy_tensors(model: Transformer, tensors: dict[str, Tensor], file: Path) -> None:
    """Copies the tensors of an adapter's file into the adapter that the model has.

    Raises UserError if they are not exactly those of its modules: by name, shape, and being finite
    numbers of a float dtype.
    """
    parameters = adapter_tensors(model)
    missing = sorted(set(parameters) - set(tensors))
    extra = sorted(set(tensors) - set(parameters))
    if missing:
        instead = other_name(missing[0], extra)
        raise UserError(
            f"{file}: {len(missing)} of its tensors missing, the first: {missing[0]}{instead}"
        )
    if extra:
        raise UserError(
            f"{file}: {len(extra)} of its tensors not used by its configuration, the first:"
            f" {extra[0]}"
        )
    shapes = file_shapes(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensor = tensors[name]
            needed = shapes.get(name, parameter.shape)
            if tensor.shape == needed:
                tensor = tensor.view(parameter.shape)
            else:
                shape = list(tensor.shape)
                expected = list(needed)
                raise UserError(f"{file}: {name} has shape {shape}, this model needs {expected}")
            if not tensor.is_floating_point():
                raise UserError(
                    f"{file}: {name} holds {tensor.dtype}, floating point numbers are needed"
                )
            # As float32, since a file may have numbers in float64 that are too large for it.
            if not all_finite(tensor.float()):
                raise UserError(
                    f"{file}: {name} holds NaN or infinite weights; take another checkpoint of it"
                )
            copy_local_rows(parameter, tensor)


def other_name(missing: str, extra: list[str]) -> str:
    """Returns how a file's own names differ from the one that is missing, to be put behind it; ""
    if the file has no other names.

    extra: the names in the file that the model does not have.
    """
    if not extra:
        return ""
    closest = max(extra, key=lambda name: common_end(name, missing))
    same = common_end(closest, missing)
    theirs = closest[: len(closest) - same]
    ours = missing[: len(missing) - same]
    # The same layer of the same block, only that its name begins differently.
    is_prefix = same > 0 and not any(character.isdigit() for character in theirs + ours)
    if is_prefix:
        return f"; the file has {closest}, which begins with {theirs!r} in place of {ours!r}"
    return f"; the file has others, the first: {extra[0]}"


def common_end(a: str, b: str) -> int:
    """Returns the length of the longest common end of two names that is made of whole parts."""
    parts = a.split(".")
    for first in range(len(parts)):
        end = ".".join(parts[first:])
        if b == end or b.endswith("." + end):
            return len(end)
    return 0


def is_number(value: object) -> TypeGuard[float]:
    """True if a value of a JSON file is a number. isinstance() would take true and false for one."""
    return type(value) in (int, float)
