"""Weights on disk: Hugging Face folders in and out.

A folder holds config.json, one model.safetensors or several shards with model.safetensors.index.json, tokenizer files
and generation_config.json. Names in files are the published ones; inside they are ours; families.py has the tables
between them. Loading builds the model on the meta device and fills it tensor by tensor, so that peak memory is the
model once plus two tensors, however many shards there are. Everything that is written is written aside, synced to the
disk and renamed: a crash leaves the old or the new. Only safetensors are read: pickled weights (`.bin`, `.pt`) can run
code on loading and are refused.
"""

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import UserError, read_json
from common.files import atomic_folder, file_sha256, save_tensors, write_json
from distributed import full_tensor, gather_rows, local_row_slice, rank0_context, synced_errors, to_local
from kernels.nf4 import NF4
from model import Config, Linear, Transformer, quantized_linears, stack_expert_weights
from quant import (
    KINDS,
    SIDE,
    can_quantize,
    check_settings,
    empty_nf4,
    from_files,
    quantize_nf4,
    quantize_scales,
    settings,
    to_files,
)

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
SHARD_NAME = re.compile(r"[\w-][\w.-]{0,150}\.safetensors", re.ASCII)
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names; 8-bit floats want scales, which no family here has
TEMPLATES = "additional_chat_templates"  # a folder in the folder: NAME.jinja, beside chat_template.jinja
HEADER_BYTES = 32 << 20  # 300,000 tensors; the package would take 100 MB, and for them 1.3 GB of memory
SHARD_BYTES = 5 << 30  # the size at which the Hub's own tools begin a new file
MAPPED_BYTES = 32 << 20  # of a file that is being read: its pages count as this process's until they are unmapped
# Tables that old checkpoints stored and every reader recomputes: of rotary angles, and masks of GPT-2 and NeoX
RECOMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")


def hf_name(model: Transformer, name: str) -> str:
    """The checkpoint's name of one of our modules or parameters; adapters wrapped around a module don't show."""
    name, table = name.replace(".base.", ".").removesuffix(".base"), model.config.names
    numbers = re.findall(r"\.(\d+)", name)  # of the layer, and of the expert
    generic = re.sub(r"\.\d+", ".{}", name)
    module, leaf = (generic, "") if generic in table else (generic.rpartition(".")[0], "." + generic.rpartition(".")[2])
    return table[module].format(*numbers) + leaf


def transposed(model: Transformer, name: str) -> bool:
    """Whether files hold this parameter of ours as [in, out]: GPT-2's "Conv1D", matrices of its blocks."""
    return model.config.conv1d and name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name


def read_config(folder: Path) -> Config:
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json in it, so it is no Hugging Face model folder")
    return Config.from_hf(read_json(folder / "config.json"), str(folder / "config.json"))


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, in the order of their names: model.safetensors alone where it is there, as
    transformers has it. Raises UserError where there are none, or some lack. A link counts as the file it leads to: the
    Hub's cache is made of links."""
    folder = Path(folder)
    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file() and not (folder / "model.safetensors").is_file():
        files = shard_names(index)
    there = {file.name for file in folder.iterdir() if file.is_file()}
    missing = [name for name in files if name not in there]
    if not missing:
        return [folder / name for name in files]
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder}: its weights are pickles ({pickles[0]}), which can run code when loaded and are not read;"
            " save the model as safetensors"
        )
    raise UserError(f"{folder}: {abbreviate(missing)} is missing")


def shard_names(index: Path) -> list[str]:
    """The files that a model.safetensors.index.json names, sorted; UserError where one is no plain name of a
    safetensors file (`../x`, `/x`), which could lead anywhere."""
    shards = read_json(index).get("weight_map")
    names = {*shards.values()} if isinstance(shards, dict) and {*map(type, shards.values())} <= {str} else None
    if names is None or not all(map(SHARD_NAME.fullmatch, names)):
        raise UserError(f"{index}: weight_map must map tensor names to names of .safetensors files beside it")
    return sorted(names)


def abbreviate(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:100] for name in names[:3]) + more


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[safe_open]:
    """A safetensors file, mapped. The package checks its header: offsets, shapes and types agree, nothing overlaps or
    leads out of the file. UserError where they do not, or where the block can't read a tensor."""
    with open(file, "rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if header > HEADER_BYTES and header <= file.stat().st_size:  # a longer one is refused by the package
        raise UserError(f"{file}: a header of {header / 1e6:,.0f} MB, at most {HEADER_BYTES / 1e6:.0f} are read")
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise UserError(f"{file}: damaged or cut off, not readable as safetensors ({str(error)[:200]})") from None


def iterate_tensors(files: list[Path], keeps: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every (published name, tensor) of safetensors files, each a view of its file's pages. keeps: the dtype of those
    that the caller holds on to; of the others no more than MAPPED_BYTES and a tensor are mapped at a time."""
    for file in files:
        with open_safetensors(file) as shard:
            names = list(shard.keys())[::-1]
        while names:
            read = 0
            with open_safetensors(file) as shard:
                while names and read < MAPPED_BYTES:
                    tensor = shard.get_tensor(name := names.pop())
                    read += tensor.nbytes if tensor.dtype != keeps else 0
                    yield name, tensor
                    del tensor


def load_model(
    folder,
    dtype: torch.dtype = torch.float32,
    device="cpu",
    quant: str | None = None,
    arrange: Callable[[Transformer], None] | None = None,
) -> Transformer:
    """The model of a Hugging Face folder, in `dtype` on `device`, in eval mode and with all parameters trainable.

    Where nothing has to be done to a tensor (CPU, stored in `dtype`) it is not copied: the parameter is the file's own
    pages, read when they are first used, and private to this process where they are written. So the file may be
    replaced or deleted while the model is in use, but not overwritten in place. Others are copied, two at a time.
    quant: "nf4" quantises the linears of the blocks (quant.py), "nf4+head" the output head too, each as it is read, on
    `device`, from the numbers as they are stored; they are frozen then. A folder that is quantised already, by
    bitsandbytes or by save_model, stays so whatever is asked for. model.unquantized names linears whose rows are no
    whole blocks of 64: they stay in dtype.
    arrange: is given the model while it is on the meta device, with nothing in it, to put adapters on and to shard it
    (distributed.shard). Then it gets memory on `device`, and of each tensor the rows are read that are this process's:
    a view of a mapped file costs what is looked at. What arrange adds is left uninitialised.
    Raises UserError naming the tensors that are missing, unknown, there twice, or of another shape than config.json
    implies, before any weight is read.
    """
    if quant not in (None, *KINDS):
        raise UserError(f"quant {quant!r} is not supported (supported: {', '.join(KINDS)})")
    folder, device = Path(folder), torch.device(device)
    config, files = read_config(folder), weight_files(folder)
    if quant == "nf4+head" and config.tied:
        raise UserError(f"--quant {quant}: this model's output head is its embedding table, which stays as it is")
    with torch.device("meta"):
        model = Transformer(config)
    if (method := config.raw.get("quantization_config")) is not None:
        check_settings(method, str(folder / "config.json"))
    quantised = {} if method is None else quantized_parts(files)
    places, second_table = {}, None
    for name, full in match_tensors(model, folder, files, quantised).items():
        owner, leaf = model.get_submodule(full.rpartition(".")[0]), full.rpartition(".")[2]
        asked = quant is not None and ("head" in quant or owner is not model.head)
        wanted = asked and leaf == "weight" and isinstance(owner, Linear) and name not in quantised
        if wanted and not can_quantize(owner.weight):
            model.unquantized.append(name)
        wanted = wanted and can_quantize(owner.weight)
        places[name] = Place(owner, leaf, transposed(model, full), wanted, quantised.get(name), f"{folder}: {name}")
    keeps = dtype if device.type == "cpu" and not config.conv1d else None
    model.source = folder
    model.to(dtype)
    for owner, *_, in_4_bits, beside, _ in places.values():
        if in_4_bits or beside:
            owner.quantize(empty_nf4(owner.out_features, owner.in_features, in_4_bits or "nested_absmax" in beside))
    if arrange is not None:
        arrange(model)
        model.to_empty(device=device)

    @torch.no_grad()
    def fill(file: Path) -> None:
        nonlocal second_table
        for name, tensor in iterate_tensors([file], keeps):
            if config.tied and name == head_name(config):
                second_table = tensor  # not read yet
            elif name in places:  # else one of RECOMPUTED, or beside a quantised weight
                place_tensor(places[name], tensor, dtype, device, keeps is None)

    # what takes the time is new memory, and two threads get it sooner; processes quantise together, one after the other
    with ThreadPoolExecutor(2 if arrange is None else 1) as pool:
        for _ in pool.map(fill, files):
            pass
    if second_table is not None:
        table = to_local(model.embed.weight.detach())
        rows = zip(second_table[local_row_slice(model.embed.weight)].split(4096), table.split(4096), strict=True)
        if not all(torch.equal(theirs.to(device, dtype), mine) for theirs, mine in rows):  # no second one in memory
            what = f"config.json ties the output head to the embedding, but {head_name(config)} differs"
            raise UserError(f"{folder}: {what}")
    if arrange is None:  # FSDP gives each its own memory
        stack_expert_weights(model)
    return model.eval()


class Place(NamedTuple):
    """Where a tensor of a file goes. turned: it is stored as [in, out]; in_4_bits: it is to be quantised; beside: what
    stands beside it where it is so in the file; where: for messages."""

    owner: nn.Module
    leaf: str
    turned: bool
    in_4_bits: bool
    beside: dict[str, tuple[Path, str]] | None
    where: str

    def nf4(self, tensor: Tensor) -> NF4:
        """Of a weight that is quantised in the file, on the CPU."""
        parts = {"": tensor} | {end: read_tensor(*place) for end, place in self.beside.items()}
        return from_files(parts, (self.owner.out_features, self.owner.in_features), self.where)


def place_tensor(place: Place, tensor: Tensor, dtype: torch.dtype, device: torch.device, copy: bool) -> None:
    """Fills a parameter with its rows of a stored tensor. A parameter on the meta device, as all are without
    `arrange`, gets its memory here; a weight that is not quantised takes the tensor's own unless `copy` is set."""
    owner = place.owner
    if place.in_4_bits or place.beside:
        if to_local(owner.nf4.packed).is_meta:
            owner.nf4.to_empty(device=device)
        fill_nf4(place, tensor, device)
        return
    tensor = tensor.t() if place.turned else tensor
    parameter = getattr(owner, place.leaf)
    if to_local(parameter).is_meta:
        setattr(owner, place.leaf, nn.Parameter(tensor.to(device, dtype, copy=copy).contiguous()))
    else:
        copy_local_rows(parameter, tensor)


def fill_nf4(place: Place, tensor: Tensor, device: torch.device) -> None:
    """Fills a weight in NF4. To quantise it all processes work together: the second level of scales runs across all
    rows."""
    owner = place.owner
    if place.beside:
        copy_local_nf4(owner, place.nf4(tensor))
        return
    tensor = tensor.t() if place.turned else tensor
    packed = owner.nf4.packed
    mine, absmax = quantize_nf4(tensor[local_row_slice(packed)].to(device).contiguous())
    to_local(packed).copy_(mine)
    copy_local_nf4(owner, NF4(None, *quantize_scales(gather_rows(absmax, packed))))


def copy_local_rows(parameter: Tensor, tensor: Tensor) -> None:
    """Copies those rows of a whole tensor that are this process's."""
    to_local(parameter).copy_(tensor[local_row_slice(parameter)])


def copy_local_nf4(owner: Linear, parts: NF4) -> None:
    for name, part in zip(parts._fields, parts, strict=True):
        if part is not None:
            copy_local_rows(getattr(owner.nf4, name), part)


def quantized_parts(files: list[Path]) -> dict[str, dict[str, tuple[Path, str]]]:
    """{weight: {end: (file, tensor)}} of what stands beside quantised weights, by bitsandbytes' names."""
    found: dict[str, dict[str, tuple[Path, str]]] = {}
    for file in files:
        with open_safetensors(file) as shard:
            for name in shard.keys():  # noqa: SIM118  no dict
                for end in SIDE:
                    if name.endswith(f".weight.{end}"):
                        found.setdefault(name.removesuffix("." + end), {})[end] = file, name
    return found


def read_tensor(file: Path, name: str) -> Tensor:
    with open_safetensors(file) as shard:
        return shard.get_tensor(name)


def head_name(config: Config) -> str:
    return config.names["head"] + ".weight"


def match_tensors(model: Transformer, folder: Path, files: list[Path], quantised: dict[str, dict]) -> dict[str, str]:
    """{tensor in the files: parameter of ours}, by the files' headers alone: each parameter once, in the shape that it
    has here, and nothing besides but what is recomputed. A tied head that is stored all the same (some writers do)
    stands for the embedding. quantised: of quantised_parts. UserError names the tensors of which that is not so."""
    config = model.config
    wanted = {hf_name(model, name): name for name, _ in model.named_parameters()}
    if config.tied:
        wanted[head_name(config)] = "embed.weight"
    prefix = config.names["embed"].partition(".")[0] + "."  # which files of the bare model lack, as GPT-2's on the Hub
    found, unknown, where = {}, [], {}
    beside = {name for parts in quantised.values() for _, name in parts.values()}
    for file in files:
        with open_safetensors(file) as shard:
            for name in shard.keys():  # noqa: SIM118  no dict
                if name in beside:
                    continue
                full = name if name in wanted else prefix + name
                if full not in wanted:
                    unknown += [] if RECOMPUTED.search(name) else [name]
                    continue
                if full in where:
                    raise UserError(f"{folder}: {full} is there twice, in {where[full]} and in {file.name}")
                found[name], where[full] = wanted[full], file.name
                if name in quantised:
                    continue  # whose shape stands in a tensor: quant.from_files looks at it
                shape = model.get_parameter(wanted[full]).shape
                shape = [*shape][::-1] if transposed(model, wanted[full]) else [*shape]
                stored = shard.get_slice(name)
                if stored.get_shape() != shape:
                    raise UserError(f"{folder}: {name} has shape {stored.get_shape()}, config.json implies {shape}")
                if stored.get_dtype() not in FLOATS:
                    raise UserError(f"{folder}: {name} holds {stored.get_dtype()}, {', '.join(FLOATS)} can be read")
    missing = sorted(wanted.keys() - where.keys() - ({head_name(config)} if config.tied else set()))
    for kind, names in (("missing", missing), ("not part of the model", unknown)):
        if names:
            raise UserError(f"{folder}: tensors {kind}: {abbreviate(names)}")
    return found


def stored_dtype(config: Config) -> torch.dtype:
    """The dtype that config.json says its weights are stored in; float32 where it says nothing."""
    named = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return named.get(str(config.raw.get("dtype") or config.raw.get("torch_dtype")), torch.float32)


def save_model(
    model: Transformer, folder, dtype: torch.dtype | None = None, also: Callable[[Path], None] | None = None
) -> None:
    """Writes a Hugging Face folder that transformers loads: weights in `dtype` (default: their own), config.json, and
    the tokenizer files, template and generation_config.json of the folder that the model came from. also: writes more
    into the folder before it takes its name. An adapter must be merged, or dropped. What is in the folder is replaced.
    UserError where the folder that the model came from is gone."""
    if any(getattr(module, "merged", True) is False for module in model.modules()):
        raise UserError("the model carries a LoRA adapter that is not merged; merge, or drop_lora, comes first")
    if not model.source.is_dir():
        raise UserError(f"{folder}: tokenizer and settings come from {model.source}, which is gone")
    weights, frozen, dtypes = [], quantized_linears(model), set()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and ".nf4." not in name:
            weights.append(Stored(hf_name(model, name), parameter.detach(), dtype, transposed(model, name)))
            dtypes.add(str(dtype or parameter.dtype).removeprefix("torch."))
    config = {key: value for key, value in model.config.raw.items() if key not in ("dtype", "torch_dtype")}
    config.pop("quantization_config", None)
    if frozen:
        computed = str(dtype or model.dtype).removeprefix("torch.")
        for name, layer in frozen.items():
            for end, tensor in to_files(layer.nf4.tensors, (layer.out_features, layer.in_features), computed).items():
                weights.append(Stored(".".join(filter(None, (hf_name(model, name), "weight", end))), tensor.detach()))
        config["quantization_config"] = settings(layer.nf4.nested is not None, computed, model.head in frozen.values())
    if len(dtypes) == 1:
        config["dtype" if "dtype" in model.config.raw else "torch_dtype"] = dtypes.pop()
    with rank0_context(atomic_folder(folder, replace=True)) as tmp:
        with synced_errors():
            if tmp:
                write_json(config, tmp / "config.json")
                copy_tokenizer(model.source, tmp)
                if also:
                    also(tmp)
        save_shards(weights, tmp)


class Stored(NamedTuple):
    """A tensor that is to be stored: when its turn comes it is gathered, if it is in shards, and turned."""

    name: str
    tensor: Tensor
    dtype: torch.dtype | None = None
    turned: bool = False

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * (self.dtype or self.tensor.dtype).itemsize

    def value(self) -> Tensor:
        found = full_tensor(self.tensor).to("cpu", self.dtype)
        return (found.t() if self.turned else found).contiguous()


def save_shards(weights: list[Stored], folder: Path | None) -> None:
    """model.safetensors, or several shards of at most SHARD_BYTES with their index; no more than one of them is in
    memory. folder: None in processes that only help to gather."""
    shards, size = [[]], 0
    for each in weights:
        if shards[-1] and size + each.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(each)
        size += each.nbytes
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        values = {}
        for each in shard:
            value = each.value()  # all ranks gather it
            if folder:
                values[each.name] = value
        with synced_errors():
            if values:
                save_tensors(values, folder / name)
    if len(shards) > 1:
        file_of = {each.name: name for name, shard in zip(names, shards, strict=True) for each in shard}
        metadata = {"total_size": sum(each.nbytes for each in weights)}
        with synced_errors():
            if folder:
                write_json({"metadata": metadata, "weight_map": file_of}, folder / "model.safetensors.index.json")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Carries tokenizer files, chat templates and generation_config.json over, byte for byte."""
    more = [f"{TEMPLATES}/{file.name}" for file in (source / TEMPLATES).glob("*.jinja")]
    for name in (*TOKENIZER_FILES, *more):
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model folder's weights: of the one file, or of its shards' digests in order. 1 s a GB or less."""
    digests = [file_sha256(file) for file in weight_files(folder)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
