"""Weights on disk: Hugging Face folders in and out.

A folder holds config.json, one model.safetensors or several shards with
model.safetensors.index.json, tokenizer files and generation_config.json. Files have the published
names, the program has its own; families.py has the tables between them. Loading builds the model on
the meta device and fills it tensor by tensor, so that peak memory is the model once plus two
tensors, however many shards there are. Everything is written under another name, synced to the disk
and renamed: a crash leaves the old folder or the new one. Only safetensors are read: pickled
weights (`.bin`, `.pt`) can run code on loading and are refused.
"""

import contextlib
import hashlib
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.choices import QUANT_KINDS
from common.console import print_stderr
from common.errors import UserError, read_json, read_json_if_there
from common.files import (
    atomic_folder,
    file_sha256,
    refuse_pointer,
    save_tensors,
    utf8_path,
    write_json,
)
from common.progress import progress
from distributed import (
    all_gather_object,
    all_ranks_agree,
    all_reduce_sum,
    broadcast_object,
    full_tensor,
    gather_rows,
    is_rank0,
    is_sharded,
    local_row_slice,
    rank0_context,
    synced_errors,
    to_local,
)
from families import FAMILIES
from kernels.nf4 import NF4, NF4_BLOCK
from model import Config, Linear, ScoreHead, Transformer, quantized_linears, stack_expert_weights
from quant import (
    SIDE,
    QuantizedWeight,
    can_quantize,
    check_settings,
    empty_nf4,
    from_files,
    quantize_nf4,
    quantize_scales,
    settings,
    to_files,
)
from tokenizer import Padding, load_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# A folder in the model folder with more chat templates, NAME.jinja each.
TEMPLATES = "additional_chat_templates"
SHARD_NAME = re.compile(r"[\w-][\w.-]{0,150}\.safetensors", re.ASCII)
# safetensors' names of dtypes. 8-bit floats need scales, which no family here has.
FLOATS = ("F64", "F32", "F16", "BF16")
# {safetensors' name of a dtype: the dtype in which weights that are stored so are written again}.
# Nothing here computes in float64.
WRITTEN_DTYPES = {
    "F64": torch.float32,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Enough for 300,000 tensors. The safetensors package allows 100 MB, which take 1.3 GB of memory.
HEADER_BYTES = 32 << 20
# The Hub's own tools begin a new file at this size.
SHARD_BYTES = 5 << 30
# Bytes of a file that are mapped at a time: mapped pages count as this process's memory.
MAPPED_BYTES = 32 << 20
# Rows of a matrix that are compared at a time, so that there is no second matrix in memory.
COMPARED_ROWS = 4096
# Tables that old checkpoints stored and that every reader recomputes: rotary angles, and masks of
# GPT-2 and NeoX.
RECOMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")


def hf_name(model: Transformer, name: str) -> str:
    """Returns the published name of one of our modules or parameters, without adapters around
    it."""
    # An adapter holds the layer that it adapts as its submodule `base`.
    name = name.replace(".base.", ".").removesuffix(".base")
    table = model.config.names
    # The numbers of the layer and of the expert, and the name with {} in their place, as in the
    # table.
    numbers = re.findall(r"\.(\d+)", name)
    generic = re.sub(r"\.\d+", ".{}", name)
    if generic in table:
        return table[generic].format(*numbers)
    # It is a parameter, and the table has its module.
    module, _, leaf = generic.rpartition(".")
    return table[module].format(*numbers) + "." + leaf


def base_of(module: nn.Module | None) -> nn.Module | None:
    """Returns what a module of an adapter stands for, another module itself."""
    return getattr(module, "base", module)


def transposed(model: Transformer, name: str) -> bool:
    """True if files store this parameter as [in, out]: GPT-2's "Conv1D", the matrices of its
    blocks."""
    is_matrix = name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name
    return model.config.conv1d and is_matrix


def read_config(folder: Path) -> Config:
    """Reads a model folder's config.json. Raises UserError if it is not there or not supported."""
    folder = Path(folder)
    file = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    if not file.is_file():
        raise UserError(f"{folder}: no config.json in it, so it is no Hugging Face model folder")
    return Config.from_hf(read_json(file), str(file))


def weight_files(folder: Path) -> list[Path]:
    """Returns a model folder's safetensors files, sorted by name.

    It is model.safetensors alone if the folder has it, as in transformers; else the files that the
    index names. A link counts as the file that it leads to: the Hub's cache is made of links.
    Raises UserError if there are none, or if one is missing.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (folder / "model.safetensors").is_file():
        names = shard_names(index)
    existing = {file.name for file in folder.iterdir() if file.is_file()}
    missing = [name for name in names if name not in existing]
    if not missing:
        return [folder / name for name in names]
    pickles = []
    for pattern in ("*.bin", "*.pt", "*.pth"):
        pickles += [file.name for file in folder.glob(pattern)]
    if pickles:
        raise UserError(
            f"{folder}: its weights are pickles ({min(pickles)}), which can run code when loaded and are not read;"
            " save the model as safetensors"
        )
    raise UserError(f"{folder}: {abbreviate(missing)} is missing")


def report_unread_shards(folder: Path) -> None:
    """Prints which weights are read where a folder has model.safetensors and shards as well: it is
    left open there which of them are newer."""
    index = folder / "model.safetensors.index.json"
    one_file = folder / "model.safetensors"
    if not (is_rank0() and index.is_file() and one_file.is_file()):
        return
    shards = [name for name in shard_names(index) if (folder / name).is_file()]
    unread = [name for name in shards if name != one_file.name]
    if unread:
        print_stderr(
            f"WARNING: {folder}: read is {one_file.name} alone, as transformers does; not"
            f" {abbreviate(unread)}, which {index.name} names. Remove those that are old"
        )


def shard_names(index: Path) -> list[str]:
    """Returns the files that a model.safetensors.index.json names, sorted.

    Raises UserError if one is not the plain name of a safetensors file: `../x` or `/x` could lead
    anywhere.
    """
    weight_map = read_json(index).get("weight_map")
    is_valid = isinstance(weight_map, dict) and all(map(is_shard_name, weight_map.values()))
    if not is_valid:
        raise UserError(
            f"{index}: weight_map must map tensor names to names of .safetensors files beside it"
        )
    return sorted(set(weight_map.values()))


def is_shard_name(name: object) -> bool:
    """True for the plain name of a safetensors file, without a folder."""
    return isinstance(name, str) and SHARD_NAME.fullmatch(name) is not None


def abbreviate(names: list[str]) -> str:
    """Returns the first three names, and how many more there are."""
    text = ", ".join(name[:100] for name in names[:3])
    if len(names) > 3:
        text += f" and {len(names) - 3} more"
    return text


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[safe_open]:
    """Maps a safetensors file for the time of a block.

    The package checks the header: offsets, shapes and types agree, nothing overlaps or leads out of
    the file.
    Raises UserError if they do not, if the header is over HEADER_BYTES, or if the block can't read
    a tensor.
    """
    refuse_pointer(file)
    with open(file, "rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    # The package itself refuses a header that is longer than the file.
    if HEADER_BYTES < header_bytes <= file.stat().st_size:
        size = header_bytes / 1e6
        limit = HEADER_BYTES / 1e6
        raise UserError(
            f"{file}: a header of {size:,.0f} MB is too long; at most {limit:.0f} MB are read"
        )
    try:
        with utf8_path(file) as name, safe_open(name, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        reason = str(error)[:200]
        raise UserError(
            f"{file}: damaged or cut off, not readable as safetensors ({reason})"
        ) from None


def iterate_tensors(
    files: list[Path], kept_dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yields (published name, tensor) of all tensors of safetensors files. Each tensor is a view of
    its file's pages.

    kept_dtype: the dtype of the tensors that the caller keeps as they are. Of all others no more
        than MAPPED_BYTES and one tensor are mapped at a time.
    """
    for file in files:
        with open_safetensors(file) as shard:
            names = list(shard.keys())
        names.reverse()  # pop() takes the last one, so they come in the file's order
        while names:
            # The file is opened anew, which unmaps the pages that nobody uses any more.
            mapped = 0
            with open_safetensors(file) as shard:
                while names and mapped < MAPPED_BYTES:
                    name = names.pop()
                    tensor = shard.get_tensor(name)
                    if tensor.dtype != kept_dtype:
                        mapped += tensor.nbytes
                    yield name, tensor
                    # It must not keep the file's pages alive while the file is opened anew.
                    del tensor


def load_model(
    folder,
    dtype: torch.dtype = torch.float32,
    device="cpu",
    quant: str | None = None,
    on_meta: Callable[[Transformer], None] | None = None,
) -> Transformer:
    """Loads the model of a Hugging Face folder, in eval mode and with all parameters trainable.

    dtype, device: of its parameters; a score head is in float32.
    quant: "nf4" quantises the linears of the blocks (quant.py), "nf4+head" the output head too.
        Each is quantised on `device` as it is read, from the numbers as they are stored, and is
        frozen then. A folder that is quantised already, by bitsandbytes or by save_model, stays so
        whatever `quant` is. Linears whose rows are no whole blocks of 64 stay in dtype;
        model.unquantized has their names.
    on_meta: is called with the model while that is on the meta device, without memory, to add
        adapters and to shard it (distributed.shard_model). Then the model gets memory on `device`,
        and of each tensor only this rank's rows are read: a view of a mapped file costs no more.
        Parameters that on_meta adds are not initialised.

    A tensor that needs no change (on the CPU, stored in `dtype`) is not copied: the parameter is
    the file's own pages, read when they are first used, and private to this process once they are
    written. So the file may be replaced or deleted while the model is in use, but not overwritten
    in place. All other tensors are copied, two at a time.

    Raises UserError naming the tensors that are missing, unknown, there twice, or of another shape
    than config.json implies, before any weight is read; and those with NaN or infinite numbers.
    """
    if quant not in (None, *QUANT_KINDS):
        known = ", ".join(QUANT_KINDS)
        raise UserError(f"quant {quant!r} is not supported (supported: {known})")
    folder = Path(folder)
    device = torch.device(device)
    config = read_config(folder)
    files = weight_files(folder)
    report_unread_shards(folder)
    if quant == "nf4+head" and config.tied:
        raise UserError(
            f"--quant {quant}: this model's output head is its embedding table, which stays as it is"
        )
    if quant == "nf4+head" and config.labels is not None:
        raise UserError(
            f"--quant {quant}: {folder} has a score head, which stays as it is; take nf4"
        )

    # The model on the meta device, and where each stored tensor goes.
    with torch.device("meta"):
        model = Transformer(config)
    model.source = folder
    places = find_places(model, folder, files, quant)
    model.to(dtype)
    if model.score is not None:
        model.score.float()
    # After model.to(), which would change the dtype of their scales.
    for place in places.values():
        if place.is_nf4:
            # What is quantised here gets scales in 8 bits; what is so in the file stays as it is.
            is_double = place.quantize or "nested_absmax" in place.quant_state
            linear = place.linear
            linear.quantize(empty_nf4(linear.out_features, linear.in_features, is_double))
    if on_meta is not None:
        on_meta(model)
        model.to_empty(device=device)
        # An LM head is gone where on_meta has put a score head in its place.
        modules = set(model.modules())
        places = {name: place for name, place in places.items() if place.owner in modules}

    # The tensors, file by file. A matrix that is stored transposed is always copied.
    kept_dtype = None
    if device.type == "cpu" and not config.conv1d:
        kept_dtype = dtype
    stored_head = None
    problems: list[str] = []

    @torch.no_grad()
    def fill(file: Path) -> None:
        nonlocal stored_head
        for name, tensor in iterate_tensors([file], kept_dtype):
            if config.tied and name == head_name(config):
                # A view, which reads nothing yet.
                stored_head = tensor
            elif name in places:
                copy = kept_dtype is None
                is_score = isinstance(places[name].owner, ScoreHead)
                own_dtype = torch.float32 if is_score else dtype
                place_tensor(places[name], tensor, own_dtype, device, copy)
                if not is_filled_with_numbers(places[name]):
                    problems.append(f"{name} {what_is_not_finite(tensor, own_dtype)}")
            # Any other is one of RECOMPUTED, belongs to a quantised weight, or is the LM head that
            # on_meta has taken off.

    # Most of the time goes into getting new memory, and two threads get it sooner. With on_meta
    # there is one thread: ranks quantise a weight together, so they must fill the weights in the
    # same order.
    num_threads = 2 if on_meta is None else 1
    with ThreadPoolExecutor(num_threads) as pool:
        # map() raises what a thread has raised only where its results are taken.
        for _ in pool.map(fill, files):
            pass
    # A rank sees its own rows alone, and all ranks must stop together.
    if on_meta is not None:
        problems = [problem for of_rank in all_gather_object(problems) for problem in of_rank]
    if problems:
        others = len(set(problems)) - 1
        more = f"; {others} more are not finite either" if others else ""
        raise UserError(f"{folder}: {min(problems)}{more}")
    if stored_head is not None:
        check_tied_head(model, stored_head, dtype, device)
    # FSDP gives each parameter memory of its own.
    if on_meta is None:
        stack_expert_weights(model)
    return model.eval()


class Place(NamedTuple):
    """The destination of a checkpoint tensor.

    owner, leaf: our module and the name of its parameter.
    transposed: the tensor is stored as [in, out] (GPT-2's Conv1D).
    quantize: it is converted to NF4 on load.
    quant_state: {end of the name: (file, tensor)} of bitsandbytes' other tensors of this weight, if
        the file has it in NF4 already; else empty.
    label: folder and tensor, for messages.
    """

    owner: nn.Module
    leaf: str
    transposed: bool
    quantize: bool
    quant_state: dict[str, tuple[Path, str]]
    label: str

    @property
    def is_nf4(self) -> bool:
        """True if the parameter is in NF4 once it is loaded."""
        return self.quantize or bool(self.quant_state)

    @property
    def linear(self) -> Linear:
        """The owner of a weight in NF4: only linears have one."""
        assert isinstance(self.owner, Linear), f"{self.label}: not the weight of a linear"
        return self.owner

    @property
    def nf4(self) -> QuantizedWeight:
        """The parameters of a weight in NF4, which `load_model` makes before it reads a tensor."""
        assert self.linear.nf4 is not None, f"{self.label}: has no parameters in NF4"
        return self.linear.nf4

    def stored_nf4(self, codes: Tensor) -> NF4:
        """Returns a weight that the file has in NF4, on the CPU. codes: the tensor of its own
        name."""
        parts = {"": codes}
        for end, (file, name) in self.quant_state.items():
            parts[end] = read_tensor(file, name)
        shape = self.linear.out_features, self.linear.in_features
        return from_files(parts, shape, self.label)


def find_places(
    model: Transformer, folder: Path, files: list[Path], quant: str | None
) -> dict[str, Place]:
    """Returns {tensor in the files: Place} of a model on the meta device; fills model.unquantized.

    quant: as for load_model.
    Raises UserError as match_tensors does, and if the folder is quantised, but not as bitsandbytes'
    NF4.
    """
    quantized: dict[str, dict[str, tuple[Path, str]]] = {}
    method = model.config.raw.get("quantization_config")
    if method is not None:
        check_settings(method, str(folder / "config.json"))
        quantized = quantized_parts(files)
    places = {}
    for name, parameter_name in match_tensors(model, folder, files, quantized).items():
        module_name, _, leaf = parameter_name.rpartition(".")
        owner = model.get_submodule(module_name)
        quantize = False
        if name in quantized and not (isinstance(owner, Linear) and leaf == "weight"):
            _, side_tensor = next(iter(quantized[name].values()))
            raise UserError(
                f"{folder}: {side_tensor} is of a quantised weight, and {name} is no linear's, so it"
                " can't be in 4 bits"
            )
        if isinstance(owner, Linear) and leaf == "weight" and name not in quantized:
            is_head = owner is model.head
            if quant is not None and (not is_head or "head" in quant):
                quantize = can_quantize(owner.weight)
                if not quantize:
                    model.unquantized.append(name)
        places[name] = Place(
            owner,
            leaf,
            transposed=transposed(model, parameter_name),
            quantize=quantize,
            quant_state=quantized.get(name, {}),
            label=f"{folder}: {name}",
        )
    if quant is not None and not any(place.is_nf4 for place in places.values()):
        width = model.config.hidden_size
        raise UserError(
            f"{folder}: none of its linears can be in 4 bits ({quant}): their rows are no whole"
            f" blocks of {NF4_BLOCK} weights (hidden size {width}); leave out --quant, and take"
            " --method lora for qlora"
        )
    return places


def place_tensor(
    place: Place, tensor: Tensor, dtype: torch.dtype, device: torch.device, copy: bool
) -> None:
    """Fills a parameter with this rank's rows of a stored tensor.

    A parameter on the meta device gets its memory here; it is there if load_model has no on_meta.
    copy: a weight that is not quantised never shares the tensor's memory.
    """
    if place.is_nf4:
        if to_local(place.nf4.packed).is_meta:
            place.nf4.to_empty(device=device)
        fill_nf4(place, tensor, device)
        return
    if place.transposed:
        tensor = tensor.t()
    parameter = getattr(place.owner, place.leaf)
    tensor = with_rows_of(parameter, tensor)
    if to_local(parameter).is_meta:
        value = tensor.to(device, dtype, copy=copy).contiguous()
        setattr(place.owner, place.leaf, nn.Parameter(value))
    else:
        copy_local_rows(parameter, tensor)


def with_rows_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Returns a stored tensor with as many rows as a parameter has, zeros in those that are not stored:
    a table that got rows for new tokens (adapting/tables.py) has more."""
    missing = len(parameter) - len(tensor)
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def fill_nf4(place: Place, tensor: Tensor, device: torch.device) -> None:
    """Fills a weight in NF4. All ranks must call it, since they quantise together: the second level
    of scales runs across all rows."""
    parameters = place.nf4
    if place.quant_state:
        stored = place.stored_nf4(tensor)
        for name, value in zip(stored._fields, stored, strict=True):
            if value is not None:
                copy_local_rows(getattr(parameters, name), value)
        return
    if place.transposed:
        tensor = tensor.t()

    # The first level lies within rows, so each rank quantises its own.
    rows = tensor[local_row_slice(parameters.packed)].to(device).contiguous()
    local_packed, local_absmax = quantize_nf4(rows)
    to_local(parameters.packed).copy_(local_packed)
    # The second level: every rank computes all of it, and keeps its part.
    all_absmax = gather_rows(local_absmax, parameters.packed)
    absmax, nested, offset = quantize_scales(all_absmax)
    copy_local_rows(parameters.absmax, absmax)
    assert parameters.nested is not None and parameters.offset is not None
    copy_local_rows(parameters.nested, nested)
    copy_local_rows(parameters.offset, offset)


def all_finite(tensor: Tensor) -> bool:
    """True if no number of a tensor is NaN or infinite; always on the meta device."""
    if tensor.is_meta or tensor.numel() == 0:
        return True
    # NaN becomes both of them. One pass over memory, which takes a twentieth of isfinite().all().
    smallest, largest = torch.aminmax(tensor.detach())
    return bool(smallest.isfinite() & largest.isfinite())


def is_filled_with_numbers(place: Place) -> bool:
    """True if this rank's part of a parameter that was just filled is finite.

    NaN in a weight that was quantised stands in the scale of its block, whose codes can't hold it.
    """
    if place.is_nf4:
        parts = [place.nf4.absmax, place.nf4.nested, place.nf4.offset]
        tensors = [part for part in parts if part is not None and part.is_floating_point()]
    else:
        tensors = [getattr(place.owner, place.leaf)]
    return all(all_finite(to_local(tensor)) for tensor in tensors)


def what_is_not_finite(tensor: Tensor, dtype: torch.dtype) -> str:
    """Returns what is wrong with a stored tensor that is not finite in dtype, behind its name."""
    if not tensor.is_floating_point() or not all_finite(tensor):
        return "holds NaN or infinite weights; take another copy of it"
    return f"holds weights too large for {config_dtype(dtype)}; compute in another --dtype"


def copy_local_rows(parameter: Tensor, tensor: Tensor) -> None:
    """Copies this rank's rows of a whole tensor into a parameter."""
    to_local(parameter).copy_(tensor[local_row_slice(parameter)])


def check_tied_head(
    model: Transformer, stored_head: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises UserError if a stored output head differs from the embedding that it is tied to."""
    embedding = model.embed.weight.detach()
    table = to_local(embedding)
    stored_rows = with_rows_of(embedding, stored_head)[local_row_slice(embedding)]
    pairs = zip(stored_rows.split(COMPARED_ROWS), table.split(COMPARED_ROWS), strict=True)
    for stored, ours in pairs:
        if not torch.equal(stored.to(device, dtype), ours):
            head = head_name(model.config)
            raise UserError(
                f"{model.source}: config.json ties the output head to the embedding, but {head} differs"
            )


def quantized_parts(files: list[Path]) -> dict[str, dict[str, tuple[Path, str]]]:
    """Returns {weight: {end: (file, tensor)}}: the tensors that bitsandbytes stores beside each
    quantised weight."""
    parts: dict[str, dict[str, tuple[Path, str]]] = {}
    for file in files:
        with open_safetensors(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (it is no dict)
                for end in SIDE:
                    if name.endswith(f".weight.{end}"):
                        weight = name.removesuffix("." + end)
                        parts.setdefault(weight, {})
                        parts[weight][end] = file, name
    return parts


def read_tensor(file: Path, name: str) -> Tensor:
    """Returns one tensor of a safetensors file: a view of the file's pages."""
    with open_safetensors(file) as shard:
        return shard.get_tensor(name)


def head_name(config: Config) -> str:
    """Returns the published name of the output head's weight."""
    return config.names["head"] + ".weight"


def match_tensors(
    model: Transformer, folder: Path, files: list[Path], quantized: dict[str, dict]
) -> dict[str, str]:
    """Returns {tensor in the files: parameter of ours}. Reads only the headers of the files.

    The files must have each parameter once, in the shape that it has here, and nothing else but
    what is recomputed. A tied head that is stored all the same (some writers do so) stands for the
    embedding.
    quantized: of quantized_parts.
    Raises UserError naming the tensors of which that is not true.
    """
    config = model.config
    expected = {hf_name(model, name): name for name, _ in model.named_parameters()}
    optional = set()
    if config.tied:
        expected[head_name(config)] = "embed.weight"
        optional.add(head_name(config))
    # Files of the bare model lack this prefix, as GPT-2's on the Hub do.
    prefix = config.names["embed"].partition(".")[0] + "."
    side_tensors = set()
    for parts in quantized.values():
        side_tensors |= {name for _, name in parts.values()}
    stored_names = set()
    matches = {}
    unknown = []
    file_of: dict[str, str] = {}
    for file in files:
        with open_safetensors(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (it is no dict)
                stored_names.add(name)
                if name in side_tensors:
                    continue
                full_name = name
                if name not in expected:
                    full_name = prefix + name
                if full_name not in expected:
                    if not RECOMPUTED.search(name):
                        unknown.append(name)
                    continue
                if full_name in file_of:
                    first = file_of[full_name]
                    raise UserError(
                        f"{folder}: {full_name} is there twice, in {first} and in {file.name}"
                    )
                file_of[full_name] = file.name
                matches[name] = expected[full_name]
                # quant.from_files checks a quantised weight: one of its side tensors has the shape.
                if name not in quantized:
                    stored = shard.get_slice(name)
                    label = f"{folder}: {name}"
                    check_shape_and_dtype(model, expected[full_name], stored, label)
    missing = sorted(expected.keys() - file_of.keys() - optional)
    if missing:
        # Of a file that names its tensors differently, one of its own names says how.
        instead = f"; not part of the model: {abbreviate(sorted(unknown))}" if unknown else ""
        raise UserError(f"{folder}: tensors missing: {abbreviate(missing)}{instead}")
    for weight in quantized.keys() - stored_names:
        unknown += [name for _, name in quantized[weight].values()]
    if unknown:
        raise UserError(f"{folder}: tensors not part of the model: {abbreviate(unknown)}")
    return matches


def check_shape_and_dtype(model: Transformer, parameter_name: str, stored, label: str) -> None:
    """Raises UserError if a stored tensor has another shape than our parameter, or a dtype that
    can't be read. stored: a slice of safetensors, of which nothing is read."""
    shape = list(model.get_parameter(parameter_name).shape)
    if transposed(model, parameter_name):
        shape.reverse()
    if stored.get_shape() != shape:
        raise UserError(f"{label} has shape {stored.get_shape()}, config.json implies {shape}")
    if stored.get_dtype() not in FLOATS:
        readable = ", ".join(FLOATS)
        raise UserError(f"{label} holds {stored.get_dtype()}, {readable} can be read")


def stored_dtype_counts(folder: Path) -> Counter:
    """Returns how many weights a folder's files store in each dtype, by torch's dtypes, the
    commonest first; float64 counts as float32. Reads only the headers of the files."""
    counts: Counter[torch.dtype] = Counter()
    for file in weight_files(folder):
        with open_safetensors(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (it is no dict)
                # The scales of weights in 4 bits are no weights.
                if name.endswith(tuple(f".weight.{end}" for end in SIDE)):
                    continue
                stored = shard.get_slice(name)
                if stored.get_dtype() in FLOATS:
                    counts[WRITTEN_DTYPES[stored.get_dtype()]] += math.prod(stored.get_shape())
    return Counter(dict(counts.most_common()))


def stored_dtype(folder: Path) -> torch.dtype:
    """Returns the dtype in which a folder's files store most of its weights, whatever config.json
    says. Reads only the headers of the files."""
    counts = stored_dtype_counts(folder)
    return next(iter(counts), torch.float32)


def claimed_dtype(config: Config) -> str | None:
    """Returns the dtype of the weights by config.json; None if it says nothing."""
    name = config.raw.get("dtype") or config.raw.get("torch_dtype")
    return str(name).removeprefix("torch.") if name else None


def dtype_note(config: Config, stored: torch.dtype) -> str | None:
    """Returns a clause where config.json claims another dtype than the weights are stored in.

    stored: what `stored_dtype` returns.
    """
    claimed = claimed_dtype(config)
    actual = config_dtype(stored)
    # What is written in place of float64 is float32, which nobody claimed.
    if claimed in (None, actual, "float64", "auto"):
        return None
    return f"config.json says {claimed[:40]}, the weights are {actual}, which counts"


def save_model(
    model: Transformer,
    folder,
    dtype: torch.dtype | None = None,
    write_extra: Callable[[Path], None] | None = None,
) -> str:
    """Writes a Hugging Face folder that transformers loads, in place of what is there: weights,
    config.json, and the tokenizer files, chat templates and generation_config.json of the folder
    that the model came from.

    dtype: of the weights; None: their own. A score head stays in float32.
    write_extra: writes more files into the new folder, before that gets its name.
    Returns what a user must know of the padding token of a model with a score head (`name_padding`),
    a clause; "" where there is nothing to say. All ranks get the same.
    Raises UserError if the model has an adapter that is not merged, if a weight is not finite in
    dtype, or if the folder that it came from is gone.
    """
    # Only the modules of an adapter have `merged`.
    if any(getattr(module, "merged", None) is False for module in model.modules()):
        raise UserError(
            "the model has an adapter that is not merged; call lora.merge or"
            " adapter_files.remove_adapter first"
        )
    source = model.source
    if not source.is_dir():
        raise UserError(f"{folder}: tokenizer and settings come from {source}, which is gone")
    weights = tensors_to_store(model, dtype)
    config = config_to_store(model, dtype)
    note = ""
    # `tmp` is None on all ranks but the first, which only help to gather.
    with rank0_context(atomic_folder(folder, replace=True)) as tmp:
        with synced_errors():
            if tmp:
                write_json(config, tmp / "config.json")
                copy_tokenizer(source, tmp)
                if write_extra:
                    write_extra(tmp)
                if model.score is not None:
                    padding = name_padding(tmp, model.config)
                    write_json(config | {"pad_token_id": padding.id}, tmp / "config.json")
                    note = padding.note
        save_shards(weights, tmp)
    return "" if model.score is None else broadcast_object(note)


def name_padding(folder: Path, config: Config, source: Path | None = None) -> Padding:
    """Returns the padding token of a model with a score head, and names it in the tokenizer's files.

    A class of transformers finds the last token of a text by its being another than pad_token_id. So
    a text must never end with that, and the tokenizer must pad with it.

    folder: with the tokenizer's files. source: the folder that has them where `folder` has none; they
        are left as they are there.
    config: of the model.
    """
    has_own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    try:
        tokenizer = load_tokenizer(folder if has_own or source is None else source)
    except UserError:
        # There is none, or one that is not read here. What config.json says counts if it is no end.
        ends = config.raw.get("eos_token_id")
        id = config.raw.get("pad_token_id")
        is_end = id in ends if isinstance(ends, list) else id == ends
        return Padding(None if is_end else id, None, "")
    padding = tokenizer.padding(config.vocab_size)
    if padding.text is None or not has_own:
        return padding
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if name == "special_tokens_map.json" and not file.is_file():
            continue
        settings = read_json_if_there(file)
        write_json(settings | {"pad_token": padding.text}, file)
    return padding


class Stored(NamedTuple):
    """A tensor that is to be stored. `value` gathers it, if it is sharded, and transposes it."""

    name: str
    tensor: Tensor
    dtype: torch.dtype | None = None
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """The size in the file."""
        dtype = self.dtype or self.tensor.dtype
        return self.tensor.numel() * dtype.itemsize

    def value(self) -> Tensor:
        """Returns the tensor as it is stored, on the CPU. All ranks must call this.

        Raises UserError if it is not finite, on all ranks alike.
        """
        tensor = full_tensor(self.tensor).to("cpu", self.dtype)
        if tensor.is_floating_point() and not all_finite(tensor):
            name = config_dtype(tensor.dtype)
            raise UserError(
                f"{self.name} is NaN, or too large for {name}; not saved, choose another dtype"
            )
        if self.transposed:
            tensor = tensor.t()
        return tensor.contiguous()


def is_stored_as_it_is(model: Transformer, name: str) -> bool:
    """True for a parameter of a model's folder that is not quantised."""
    # A score head stands in the place of the LM head, and one that is trained in that of its base.
    if model.score is not None and name.startswith(("head.", "score.base.")):
        return False
    return not any(part in name for part in (".lora_", ".ia3_scale", ".trained_", ".nf4."))


def tensors_to_store(model: Transformer, dtype: torch.dtype | None) -> list[Stored]:
    """Returns the tensors of a model's folder, without adapters. dtype: as for save_model."""
    weights = []
    for name, parameter in model.named_parameters():
        if is_stored_as_it_is(model, name):
            is_transposed = transposed(model, name)
            own_dtype = torch.float32 if name == "score.weight" else dtype
            weight = Stored(hf_name(model, name), parameter.detach(), own_dtype, is_transposed)
            weights.append(weight)
    computed = config_dtype(dtype or model.dtype)
    for name, layer in quantized_linears(model).items():
        if model.score is not None and name.startswith("head"):
            continue
        assert layer.nf4 is not None  # by which quantized_linears chooses
        shape = layer.out_features, layer.in_features
        weight_name = hf_name(model, name) + ".weight"
        for end, tensor in to_files(layer.nf4.tensors, shape, computed).items():
            full_name = weight_name
            if end:
                full_name = f"{weight_name}.{end}"
            weights.append(Stored(full_name, tensor.detach()))
    return weights


def config_to_store(model: Transformer, dtype: torch.dtype | None) -> dict:
    """Returns the config.json of a model's folder: that of the folder it came from, with dtype,
    quantisation and the labels of a score head as they are now. dtype: as for save_model."""
    raw = model.config.raw
    config = {}
    for key, value in raw.items():
        if key not in ("dtype", "torch_dtype", "quantization_config"):
            config[key] = value
    if model.score is not None:
        config |= settings_of_labels(model.score.labels)  # type: ignore[arg-type]
        config["architectures"] = [FAMILIES[model.config.family].classifier]
        # Of older files; it is the length of id2label.
        config.pop("num_labels", None)
    quantized = list(quantized_linears(model).values())
    if quantized:
        nf4 = quantized[-1].nf4
        is_double = nf4 is not None and nf4.nested is not None
        compute_dtype = config_dtype(dtype or model.dtype)
        has_head = model.score is None and base_of(model.head) in quantized
        config["quantization_config"] = settings(is_double, compute_dtype, has_head)
    dtypes = set()
    for name, parameter in model.named_parameters():
        # The score head is in float32 whatever the dtype of the model.
        if is_stored_as_it_is(model, name) and name != "score.weight":
            dtypes.add(config_dtype(dtype or parameter.dtype))
    # A model of several dtypes has no name for them.
    if len(dtypes) == 1:
        # transformers 5 calls it dtype, transformers 4 torch_dtype.
        key = "dtype" if "dtype" in raw else "torch_dtype"
        config[key] = dtypes.pop()
    return config


def settings_of_labels(labels: Sequence[str]) -> dict:
    """Returns what a config.json says of the labels of a score head."""
    return {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def config_dtype(dtype: torch.dtype) -> str:
    """Returns a dtype's name in config.json."""
    return str(dtype).removeprefix("torch.")


def save_shards(weights: list[Stored], folder: Path | None) -> None:
    """Writes model.safetensors, or several shards of at most SHARD_BYTES and their index. No more
    than one shard is in memory.

    folder: None on ranks that only help to gather.
    """
    shards: list[list[Stored]] = [[]]
    size = 0  # of the last shard, in bytes
    for weight in weights:
        if shards[-1] and size + weight.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += weight.nbytes
    num_shards = len(shards)
    names = ["model.safetensors"]
    if num_shards > 1:
        names = [f"model-{i:05}-of-{num_shards:05}.safetensors" for i in range(1, num_shards + 1)]

    file_of: dict[str, str] = {}
    total_size = sum(weight.nbytes for weight in weights)
    bar = progress("writing", total_size, "byte", shown=folder is not None)
    for file_name, shard in zip(names, shards, strict=True):
        values: dict[str, Tensor] = {}
        for weight in shard:
            file_of[weight.name] = file_name
            # On every rank, also where the value is not wanted: it is gathered.
            value = weight.value()
            if folder:
                values[weight.name] = value
        with synced_errors():
            if folder and values:
                save_tensors(values, folder / file_name)
        bar.update(sum(weight.nbytes for weight in shard))
    bar.close()
    if num_shards > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": file_of}
        with synced_errors():
            if folder:
                write_json(index, folder / "model.safetensors.index.json")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies tokenizer files, chat templates and generation_config.json, byte for byte.

    Raises UserError if one is only the pointer of a file that Git LFS has not fetched.
    """
    names = list(TOKENIZER_FILES)
    for file in (source / TEMPLATES).glob("*.jinja"):
        names.append(f"{TEMPLATES}/{file.name}")
    for name in names:
        if (source / name).is_file():
            refuse_pointer(source / name)
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def fingerprint(folder: Path) -> str:
    """Returns the SHA-256 of a model folder's weights: of the one file, or of its shards' digests
    in order. It takes at most 1 s a GB."""
    digests = [file_sha256(file) for file in weight_files(folder)]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@torch.no_grad()
def share_lost_by_rounding(model: Transformer, dtype: torch.dtype) -> float:
    """Returns the share of what full fine-tuning has changed that is lost where the weights are
    stored in dtype: 0 if nothing, 1 if they come back as the base. All ranks must call it.

    It is 1 - <stored - base, trained - base> / |trained - base|^2, over all trained weights. The
    rounding of weights which moved by many steps of dtype cancels out in it, as it does in a
    product; where a weight moved by less than half a step, its stored number is the base's again.
    The base is read from the folder that the model came from, once; if its weights are gone by now,
    nothing is known, and 0 is returned.
    """
    trained: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        # The score head is stored in float32 in any case.
        if parameter.requires_grad and name != "score.weight":
            trained[name] = parameter
    if all(p.dtype == dtype for p in trained.values()) or dtype == torch.float32:
        return 0.0
    files: list[Path] = []
    with contextlib.suppress(OSError, UserError):
        files = weight_files(model.source)
    # A base that was deleted while the run went on must not cost its result.
    if not all_ranks_agree(bool(files)):
        return 0.0
    sums = torch.zeros(2, dtype=torch.float64)  # kept, of all
    # As the folder has it: in training its head may become another, and its tables larger.
    with torch.device("meta"):
        base_model = Transformer(read_config(model.source))
    matches = match_tensors(base_model, model.source, files, {})
    for name, tensor in iterate_tensors(files):
        weight = trained.get(matches.get(name, ""))
        is_head_of_table = model.config.tied and name == head_name(model.config)
        # Of weights that are whole on every rank, rank 0 counts.
        if weight is None or is_head_of_table or not (is_sharded(weight) or is_rank0()):
            continue
        if transposed(model, matches[name]):
            tensor = tensor.t()
        tensor = with_rows_of(weight, tensor)
        base_rows = tensor[local_row_slice(weight)].split(COMPARED_ROWS)
        for base, now in zip(base_rows, to_local(weight).split(COMPARED_ROWS), strict=True):
            base = base.to(now.device, torch.float32)
            update = now.float() - base
            kept = now.to(dtype).float() - base
            sums[0] += (kept * update).sum().double().cpu()
            sums[1] += update.square().sum().double().cpu()
    kept_square, update_square = all_reduce_sum(sums).tolist()
    if not update_square:
        return 0.0
    return max(0.0, 1 - kept_square / update_square)
