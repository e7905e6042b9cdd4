"""GGUF out: a Hugging Face folder, with an adapter merged into it or not, as the one file that llama.cpp serves.

Keys and names come from `interop/gguf_names.py`, the tokenizer from `interop/gguf_tokenizer.py`. What is about to be
written is read back by interop/gguf_import.py's rules, which are llama.cpp's, and must come out as the same model: what
a GGUF file can't say of a folder is refused by name. Tensors go out one by one, each computed in float32 and rounded
once, so that memory stays at a tensor or so. A file appears under its name when it is whole.

An adapter alone becomes a file of its low-rank factors, which llama.cpp puts on its base when it loads.
"""

import contextlib
import dataclasses
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import lora
from checkpoint import (
    copy_tokenizer,
    head_name,
    hf_name,
    iterate_tensors,
    match_tensors,
    open_safetensors,
    read_config,
    read_tensor,
    weight_files,
)
from common.console import print_stderr
from common.errors import UserError
from common.files import atomic_file
from families import FAMILIES, Config, Reader
from interop.gguf_import import close, config_json
from interop.gguf_names import ARCHITECTURE_OF, ARCHITECTURES, UNEXPORTED, Architecture, Place, interleave_rows, places
from interop.gguf_reader import Gguf
from interop.gguf_reader import Tensor as Stored
from interop.gguf_tokenizer import PHI3, vocabulary
from kernels.rope import rope_inv_freq
from model import Transformer

TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # general.file_type of each
EXACT = ("ffn_gate_inp.weight", "position_embd.weight")  # llama.cpp wants these matrices in float32
LARGEST = {"F16": 65_504.0, "Q8_0": 127 * 65_504.0}  # weights that a type can hold
LogFn = Callable[[str], None]


def folder_to_gguf(folder, file, dtype: str = "f32", adapter=None, log: LogFn = print_stderr) -> None:
    """Writes a Hugging Face model folder as a GGUF file, its tokenizer and chat template included.

    dtype: of the matrices, one of TYPES; vectors, routers and tables of positions are float32 in any case, and with
        q8_0 a matrix whose rows are no multiple of 32 is float16, which is said.
    adapter: a PEFT LoRA folder that is merged in float32 first; a tokenizer or template that it holds goes before the
        model's.
    say: called with a line for each thing that llama.cpp will do otherwise than the folder's own model.
    Raises UserError, with nothing left behind, for a model, a tokenizer or a weight that has no place in such a file.
    """
    from gguf import GGMLQuantizationType

    folder, file = Path(folder), Path(file)
    if dtype not in TYPES:
        raise UserError(f"--type {dtype}: is not known; {', '.join(TYPES)} are")
    config = read_config(folder)
    if config.raw.get("quantization_config") is not None:
        raise UserError(f"{folder}: its weights are quantised already; give the folder that they were made of")
    row, architecture = exported(config, folder)
    plan = places(config, row)
    weights = FolderWeights(folder, config)
    updates = Updates(config, adapter) if adapter is not None else None
    with tokenizer_folder(folder, adapter) as home:
        words = vocabulary(home, config.vocab_size)
    keys, extra = metadata(config, row, architecture, folder), rope_tensors(config)
    fields = {"general.architecture": architecture, "general.type": "model"} | keys | words.fields
    check(fields, plan, extra, config, folder)
    notes = words.notes
    if row.windowless and any(layer.window for layer in config.layers):
        window = next(layer.window for layer in config.layers if layer.window)
        notes.append(
            f"llama.cpp has no sliding window for {architecture}: texts over {window} tokens read otherwise there"
        )
    if any((rope.scaling or {}).get("rope_type") == "longrope" for rope in config.ropes):
        notes.append("llama.cpp picks LongRoPE's factors by the size of its context (-c), not by the text's own length")
    named = {"general.name": model_name(folder, words.phi3), "general.file_type": TYPES[dtype]}
    if dtype == "q8_0":
        named["general.quantization_version"] = 2
    kinds = {name: GGMLQuantizationType[kind_of(name, place, dtype, notes)] for name, place in plan.items()}
    for note in notes:
        log(f"NOTE: {note}")
    kinds |= dict.fromkeys(extra, GGMLQuantizationType.F32)
    shapes = {name: place.shape for name, place in plan.items()} | {name: (len(v),) for name, v in extra.items()}

    def content() -> Iterator[np.ndarray]:
        for name, place in plan.items():
            yield stored(weights, updates, name, place, kinds[name])
        yield from extra.values()

    write(file, fields | named, {name: (shapes[name], kind) for name, kind in kinds.items()}, content())


def exported(config: Config, where) -> tuple[Architecture, str]:
    """The row of the table for a family, and its name in GGUF; UserError where llama.cpp does not compute it."""
    if config.family in UNEXPORTED:
        raise UserError(f"{where}: {config.family} can't be exported: {UNEXPORTED[config.family]}")
    if config.family not in ARCHITECTURE_OF:
        raise UserError(f"{where}: {config.family} can't be exported ({', '.join(ARCHITECTURE_OF)} can)")
    architecture = ARCHITECTURE_OF[config.family]
    return ARCHITECTURES[architecture], architecture


def model_name(folder: Path, phi3: bool) -> str:
    """general.name: the folder's. llama.cpp reads from it whether control tokens take spaces along as Phi-3's do."""
    name = folder.resolve().name
    if phi3 and not PHI3.search(name):
        return f"Phi-3 {name}"
    return name if phi3 else PHI3.sub("phi 3", name)


# ---- keys ----


def metadata(config: Config, row: Architecture, architecture: str, folder: Path) -> dict:
    """{key: value} of the model's shape, as `gguf_in.config_json` reads it."""
    read = Reader(config.raw, FAMILIES[config.family], str(folder / "config.json"))
    known = {"num_key_value_heads": config.num_kv_heads, "num_hidden_layers": config.num_layers}
    known |= {"intermediate_size": config.intermediate_size, "rms_norm_eps": config.norm_eps}
    window = next((layer.window for layer in config.layers if layer.window), None)
    known |= {"sliding_window": window, "final_logit_softcapping": config.logit_softcap}
    known |= {"attn_logit_softcapping": config.attention_softcap}
    if config.ropes:
        known["rope_theta"] = config.ropes[0].theta
        known["rope_local_base_freq"] = config.ropes[-1].theta
    experts = config.experts
    known |= {"num_experts": experts and experts.count, "num_experts_per_tok": experts and experts.active}
    known["moe_intermediate_size"] = experts and experts.intermediate_size
    found = {"vocab_size": config.vocab_size}
    for suffix, (key, kind) in row.keys.items():
        value = known[key] if key in known else read(key, kind)
        if value is not None:
            found[suffix] = kind(value)
        elif suffix not in row.optional:
            raise UserError(f"{folder}: its config.json has no {key}, which a GGUF file of {architecture} needs")
    if row.own_head_dim or config.ropes:
        found |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if row.pattern:
        slides = [layer.window is not None for layer in config.layers]
        if any(slides) and slides != [bool((i + 1) % row.pattern) for i in range(config.num_layers)]:
            found["attention.sliding_window_pattern"] = slides
    if config.ropes:
        found |= rope_keys(config, folder)
    return {f"{architecture}.{suffix}": value for suffix, value in found.items()}


def rope_keys(config: Config, folder: Path) -> dict:
    """The keys of rotary positions, after the architecture's name."""
    rope = config.ropes[0]
    keys, scaling = {"rope.dimension_count": rope.dim}, rope.scaling or {}
    if "original_max_position_embeddings" in scaling and scaling["rope_type"] != "llama3":
        keys["rope.scaling.original_context_length"] = int(scaling["original_max_position_embeddings"])
    match scaling:
        case {} if not scaling:
            pass
        case {"rope_type": "llama3"}:  # a tensor has it
            pass
        case {"rope_type": "linear", "factor": factor}:
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(factor)}
        case {"rope_type": "yarn", "factor": factor, "attention_factor": sharper}:
            if (scaling["beta_fast"], scaling["beta_slow"], scaling["truncate"]) != (32, 1, True):
                raise UserError(f"{folder}: llama.cpp computes YaRN with beta_fast 32, beta_slow 1 and truncate only")
            keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(factor)}
            usual = 0.1 * float(np.log(factor)) + 1.0 if factor > 1 else 1.0
            if not close(sharper, usual):
                keys["rope.scaling.attn_factor"] = sharper / usual
        case {"rope_type": "longrope", "attention_factor": sharper}:
            keys |= {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": float(sharper)}
        case {"rope_type": kind}:
            raise UserError(f"{folder}: llama.cpp has no rope scaling {kind!r}")
    return keys


def rope_tensors(config: Config) -> dict[str, np.ndarray]:
    """Factors for the angles that are no keys in a file: float32 [dim / 2]."""
    rope = config.ropes[0] if config.ropes else None
    match rope and rope.scaling:
        case {"rope_type": "llama3"}:
            plain, scaled = (rope_inv_freq(rope.theta, rope.dim, scaling) for scaling in (None, rope.scaling))
            return {"rope_freqs.weight": (plain / scaled).numpy()}
        case {"rope_type": "longrope", "short_factor": short, "long_factor": long}:
            named = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
            return {name: np.array(factors, np.float32) for name, factors in named.items()}
    return {}


def check(fields: dict, plan: dict[str, Place], extra: dict[str, np.ndarray], config: Config, folder: Path) -> None:
    """UserError where the file would be read as another model, naming the first difference."""
    empty = np.empty((0, 0), np.uint8)
    files = {name: Stored(place.shape, "F32", empty) for name, place in plan.items()}
    files |= {name: Stored(v.shape, "F32", v.view(np.uint8)[None]) for name, v in extra.items()}
    again = Config.from_hf(config_json(Gguf(folder, fields, files)), str(folder))
    for entry in dataclasses.fields(Config):
        if entry.name not in ("family", "raw", "ignored_settings", "names"):
            ours, theirs = getattr(config, entry.name), getattr(again, entry.name)
            if difference := first_difference(ours, theirs, entry.name):
                architecture = fields["general.architecture"]
                raise UserError(f"{folder}: as {architecture}, a GGUF file can't say {difference}")


def first_difference(ours, theirs, name: str) -> str:
    """What differs first in two values, nested or not, as "name is this, not that"; "" where nothing does."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        inside = [entry.name for entry in dataclasses.fields(ours) if entry.name != "balance"]  # of training only
        pairs = [(getattr(ours, key), getattr(theirs, key), f"{name}.{key}") for key in inside]
    elif isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        pairs = [(ours[key], theirs[key], f"{name}.{key}") for key in ours]
    elif isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        pairs = [(a, b, f"{name}[{i}]") for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    else:
        numbers = type(ours) in (int, float) and type(theirs) in (int, float)
        same = close(ours, theirs) if numbers else ours == theirs
        return "" if same else f"{name} {ours!r}; it would be read as {theirs!r}"
    return next((found for pair in pairs if (found := first_difference(*pair))), "")


# ---- weights ----


class FolderWeights:
    """The weights of a model folder by their Hugging Face names, read one at a time.

    They are matched with the model as checkpoint.load_model matches them, so that both read the same folders and refuse
    the same ones, by the files' headers alone.
    """

    def __init__(self, folder: Path, config: Config):
        with torch.device("meta"):
            model = Transformer(config)
        files = weight_files(folder)
        parameters = match_tensors(model, folder, files, {})
        self.folder = folder
        self.stored: dict[str, tuple[Path, str]] = {}  # {Hugging Face name: (file, name in it)}
        for file in files:
            with open_safetensors(file) as shard:
                names = list(shard.keys())
            for name in names:
                # A tied head that is stored all the same is the embedding again, which has its own name.
                is_tied_head = config.tied and name == head_name(config)
                if name in parameters and not is_tied_head:
                    self.stored[hf_name(model, parameters[name])] = file, name

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor as float32, into memory of its own."""
        return read_tensor(*self.stored[name]).to(torch.float32, copy=True)


class Updates:
    """What a LoRA adapter adds to published weights, checked against the model as lora.load_adapter checks it."""

    def __init__(self, config: Config, adapter):
        with torch.device("meta"):
            self.model = Transformer(config)
        lora.load_adapter(self.model, adapter)  # into tensors without memory: only its judgement counts
        self.layers = lora.lora_layers(self.model)
        self.found = dict(iterate_tensors([Path(adapter) / "adapter_model.safetensors"]))

    def factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A, float32 [rank, in], and B, float32 [out, rank], of a published layer."""
        return tuple(self.found[f"{lora.PREFIX}{layer}.lora_{side}.weight"].float() for side in "AB")

    def add(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A published weight [out, in] with the update added: the arithmetic of `lora.merge`."""
        layer = name.removesuffix(".weight")
        if layer not in self.layers:
            return weight
        a, b = self.factors(layer)
        return weight + self.layers[layer].scale * (b @ a)


def kind_of(name: str, place: Place, dtype: str, notes: list[str]) -> str:
    """The type that a tensor is stored in."""
    if len(place.shape) == 1 or name.endswith(EXACT):
        return "F32"
    if dtype == "q8_0" and place.shape[-1] % 32:
        notes.append(f"{name} is stored in f16: its rows of {place.shape[-1]} are no whole blocks of 32")
        return "F16"
    return dtype.upper()


def stored(weights: FolderWeights, updates: Updates | None, name: str, place: Place, kind) -> np.ndarray:
    """A tensor as the file holds it: float32, float16, or uint8 rows of blocks."""
    from gguf import quantize

    parts = []
    for published in place.names:
        weight = weights.read(published)
        weight = weight.t() if place.transposed else weight
        weight = updates.add(published, weight) if updates else weight
        rows = weight.contiguous().numpy()
        if not np.isfinite(rows).all():
            raise UserError(f"{weights.folder}: {published} holds NaN or infinite weights")
        if np.abs(rows).max() > LARGEST.get(kind.name, np.inf):
            raise UserError(f"{weights.folder}: {published} holds weights too large for {kind.name}; take --type bf16")
        rows = rows + np.float32(place.offset) if place.offset else rows
        rows = interleave_rows(rows, place.heads) if place.heads else rows
        parts.append(quantize(np.ascontiguousarray(rows), kind))
    return np.stack(parts) if len(place.shape) > 2 else parts[0]


# ---- an adapter alone ----


def adapter_to_gguf(adapter, file, folder) -> None:
    """Writes a PEFT LoRA adapter as a GGUF file that llama.cpp loads beside its base (`--lora`).

    folder: the base, of which only config.json is read. A is float32 [rank, in], B [out, rank] with the rows in the
    base's order in the file. Raises UserError where the adapter does not fit it, or is on a mixture's experts.
    """
    from gguf import GGMLQuantizationType

    folder = Path(folder)
    config = read_config(folder)
    row, architecture = exported(config, folder)
    updates = Updates(config, adapter)
    where = {place.names[0]: (name, place) for name, place in places(config, row).items() if len(place.shape) < 3}
    content: dict[str, np.ndarray] = {}
    for layer in updates.layers:
        if f"{layer}.weight" not in where:
            raise UserError(f"{adapter}: adapts {layer}, one of many experts, which is not supported in a LoRA file")
        name, place = where[f"{layer}.weight"]
        a, b = (side.numpy() for side in updates.factors(layer))
        content[f"{name}.lora_a"] = np.ascontiguousarray(a)
        content[f"{name}.lora_b"] = np.ascontiguousarray(interleave_rows(b, place.heads) if place.heads else b)
    alpha = float(next(iter(updates.layers.values())).alpha)
    fields = {"general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora"}
    fields |= {"adapter.lora.alpha": alpha, "general.name": Path(adapter).resolve().name, "general.file_type": 0}
    kinds = {name: (array.shape, GGMLQuantizationType.F32) for name, array in content.items()}
    write(Path(file), fields, kinds, iter(content.values()))


# ---- the file ----


@contextlib.contextmanager
def tokenizer_folder(folder: Path, adapter) -> Iterator[Path]:
    """A folder with the tokenizer's files: the model's, or a passing one in which the adapter's stand before them."""
    if adapter is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as passing:
        shutil.copyfile(folder / "config.json", Path(passing, "config.json"))
        for source in (folder, Path(adapter)):
            copy_tokenizer(source, Path(passing))
        yield Path(passing)


def write(file: Path, fields: dict, kinds: dict, content: Iterator[np.ndarray]) -> None:
    """Writes a GGUF file aside, syncs it, and gives it its name. kinds: {tensor: (shape, type)}, in the order of
    content. UserError where the file is there already."""
    from gguf import GGML_QUANT_SIZES, GGUFWriter

    if file.exists():
        raise UserError(f"{file}: exists already; name a new file")
    if not file.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file.parent))
    writer = GGUFWriter(None, fields["general.architecture"])
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if key != "general.architecture":
            add.get(type(value), writer.add_array)(key, value)
    for name, (shape, kind) in kinds.items():
        block, size = GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, kind)
    with atomic_file(file) as tmp, contextlib.closing(writer):
        writer.write_header_to_file(tmp)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in content:
            writer.write_tensor_data(array)
