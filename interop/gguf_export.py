"""GGUF out: a Hugging Face folder, with or without an adapter merged into it, as the one file that
llama.cpp serves.

Keys and names come from interop/gguf_names.py, the tokenizer from interop/gguf_tokenizer.py. What
is about to be written is read back by the rules of interop/gguf_import.py, which are llama.cpp's,
and must come out as the same model: what a GGUF file can't say of a folder is refused by its name.
Tensors are written one by one, each computed in float32 and rounded once, so that memory stays at
about one tensor. A file appears under its name when it is whole.

An adapter alone becomes a file of its low-rank factors, which llama.cpp adds to its base when it
loads.
"""

import contextlib
import dataclasses
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import adapter_files
import lora
from adapting.score_head import require_lm_head
from adapting.tables import trained_tables
from checkpoint import (
    Place,
    all_finite,
    check_tied_head,
    copy_tokenizer,
    find_places,
    head_name,
    hf_name,
    iterate_tensors,
    match_tensors,
    open_safetensors,
    read_config,
    read_tensor,
    report_unread_shards,
    weight_files,
)
from common.choices import QUANT_KINDS
from common.console import one_line, print_stderr
from common.errors import UserError, read_json
from common.files import atomic_file
from common.progress import progress
from families import FAMILIES, Config, Reader
from interop.gguf_import import DATE_KEY, SYSTEM_KEY, close, config_json
from interop.gguf_names import (
    ARCHITECTURE_OF,
    ARCHITECTURES,
    UNEXPORTED,
    Architecture,
    GGUFPlace,
    interleave_rows,
    places,
)
from interop.gguf_reader import Gguf
from interop.gguf_reader import Tensor as GgufTensor
from interop.gguf_tokenizer import PHI3, vocabulary
from interop.resolve import check_adapter, pick_base_numbers, trained_day, trained_system
from kernels.nf4 import dequantized_weight
from kernels.rope import rope_inv_freq
from methods import ADAPTER_ROWS, METHODS, type_of_adapter
from model import Transformer
from quant import quantize as quantize_weight

# {value of --type: general.file_type, by llama.cpp's numbers}
TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 32,
    "q8_0": 7,
    "q5_1": 9,
    "q5_0": 8,
    "q4_1": 3,
    "q4_0": 2,
}
# Those whose weights are in blocks that share a scale; and those of under 8 bits.
BLOCK_TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
SMALL_TYPES = BLOCK_TYPES[1:]
BLOCK = 32  # weights that share a scale
# llama.cpp needs these matrices in float32.
ALWAYS_F32 = ("ffn_gate_inp.weight", "position_embd.weight")
# The matrix that makes the logits. In a small type its errors go into every one of them, and
# llama.cpp's own quantiser gives it 6 bits (Q6_K) then, which the gguf package can't write.
HEAD = "output.weight"
EMBEDDING = "token_embd.weight"
# The largest weight that a type can store: a scale, or the smallest weight of a block, is float16.
MAX_BY_TYPE = {
    "F16": 65_504.0,
    "Q8_0": 127 * 65_504.0,
    "Q5_1": 65_504.0,
    "Q5_0": 16 * 65_504.0,
    "Q4_1": 65_504.0,
    "Q4_0": 8 * 65_504.0,
}
LogFn = Callable[[str], None]


def folder_to_gguf(
    folder: str | Path,
    file: str | Path,
    dtype: str = "f32",
    adapter: str | Path | None = None,
    log: LogFn = print_stderr,
    quant: str | None = None,
) -> None:
    """Writes a Hugging Face model folder as a GGUF file, with its tokenizer and chat template.

    dtype: of the matrices, one of TYPES. Vectors, routers and tables of positions are float32 in
        any case. In blocks (q8_0 and smaller), a matrix whose rows are no multiple of 32 is float16,
        and a line says so. With q5_1, q5_0, q4_1 and q4_0, the matrix that makes the logits (the
        embedding where they share one) is q8_0, which a line says, too.
    adapter: a PEFT LoRA folder that is merged in float32 first. Its tokenizer and template take
        precedence over the model's.
    log: is called with a line for each thing that llama.cpp does differently from the folder's own
    model, and for what differs from the base that the adapter was trained on.
    quant: the numbers of the model that the adapter is added to: a kind of QUANT_KINDS, "none" for
        the weights as they are stored, or None for those that it was trained on.
    Raises UserError, and leaves nothing behind, for a model, a tokenizer or a weight that a GGUF
    file can't store, and for a folder that load_model refuses.
    """
    from gguf import GGMLQuantizationType

    folder = Path(folder)
    file = Path(file)
    if dtype not in TYPES:
        raise UserError(f"--type {dtype}: is not known; {', '.join(TYPES)} are")
    check_is_new(file)
    config = read_config(folder)
    require_lm_head(folder, config, adapter)
    if config.raw.get("quantization_config") is not None:
        if adapter is not None:
            AdapterUpdates(config, adapter)  # says what to do with one that brings this base along
        problem = "its weights are quantised already; give the folder that they were made from"
        raise UserError(f"{folder}: {problem}")
    row, architecture = find_architecture(config, folder)
    plan = places(config, row)
    kind = None
    if adapter is not None:
        check_adapter(folder, Path(adapter))
        kind = pick_base_numbers(folder, adapter, quant, log)
    weights = FolderWeights(folder, config, kind)
    updates = None
    if adapter is not None:
        updates = AdapterUpdates(config, adapter)
    with tokenizer_folder(folder, adapter) as home:
        words = vocabulary(home, config.vocab_size)

    # The keys, read back before anything is written.
    factors = rope_tensors(config)
    fields: dict[str, Any] = {"general.architecture": architecture, "general.type": "model"}
    fields |= shape_keys(config, row, architecture, folder)
    fields |= words.fields
    check_read_back(fields, plan, factors, config, folder)
    fields |= {"general.name": model_name(folder, words.phi3), "general.file_type": TYPES[dtype]}
    if dtype in BLOCK_TYPES:
        fields["general.quantization_version"] = 2
    notes = words.notes + attention_notes(config, row, architecture)
    notes += add_prompt_facts(fields, adapter or folder)

    # The table of tensors, which the file has before the first of them.
    kinds = {}
    table = {}
    logits_matrix = HEAD if HEAD in plan else EMBEDDING
    for name, place in plan.items():
        label = stored_type(name, place, dtype, notes, name == logits_matrix)
        kinds[name] = GGMLQuantizationType[label]
        table[name] = (place.shape, kinds[name])
    for name, values in factors.items():
        table[name] = ((len(values),), GGMLQuantizationType.F32)
    for note in notes:
        log(f"NOTE: {note}")

    def content() -> Iterator[np.ndarray]:
        """Yields the tensors in the order of the table, each made when it is written."""
        for name, place in plan.items():
            yield encode_tensor(weights, updates, name, place, kinds[name])
        yield from factors.values()

    write_gguf(file, fields, table, content())


def find_architecture(config: Config, where) -> tuple[Architecture, str]:
    """Returns the row of a family in `ARCHITECTURES`, and its name there.

    where: for messages. Raises UserError where llama.cpp does not compute the family.
    """
    if config.family in UNEXPORTED:
        reason = UNEXPORTED[config.family]
        raise UserError(f"{where}: {config.family} can't be exported: {reason}")
    if config.family not in ARCHITECTURE_OF:
        supported = ", ".join(ARCHITECTURE_OF)
        raise UserError(f"{where}: {config.family} can't be exported ({supported} can)")
    architecture = ARCHITECTURE_OF[config.family]
    return ARCHITECTURES[architecture], architecture


def model_name(folder: Path, phi3: bool) -> str:
    """Returns general.name, which is the folder's name.

    llama.cpp decides by this name whether control tokens strip spaces as Phi-3's do. So the name
    says Phi-3 if, and only if, the tokenizer does that. phi3: it does.
    """
    name = folder.resolve().name
    if not phi3:
        return PHI3.sub("phi 3", name)
    if not PHI3.search(name):
        return f"Phi-3 {name}"
    return name


def attention_notes(config: Config, row: Architecture, architecture: str) -> list[str]:
    """Returns what llama.cpp's attention does differently from the model, a line each."""
    notes = []
    windows = [layer.window for layer in config.layers if layer.window]
    if row.windowless and windows:
        reason = f"llama.cpp has no sliding window for {architecture}"
        effect = f"it computes texts over {windows[0]} tokens differently from this model"
        notes.append(f"{reason}: {effect}")
    scalings = [rope.scaling for rope in config.ropes if rope.scaling]
    if any(scaling.get("rope_type") == "longrope" for scaling in scalings):
        difference = "by the size of its context (-c), not by the text's own length"
        notes.append(f"llama.cpp picks LongRoPE's factors {difference}")
    return notes


# ---- keys ----


def shape_keys(config: Config, row: Architecture, architecture: str, folder: Path) -> dict:
    """Returns {key: value} of the model's shape, as gguf_import.config_json reads it.

    Raises UserError where config.json lacks a setting that the file needs.
    """
    read = Reader(config.raw, FAMILIES[config.family], str(folder / "config.json"))
    settings = known_settings(config)
    result: dict[str, Any] = {"vocab_size": config.vocab_size}
    for suffix, (name, kind) in row.keys.items():
        value = settings[name] if name in settings else read(name, kind)
        if value is not None:
            result[suffix] = kind(value)
        elif suffix not in row.optional:
            problem = f"its config.json has no {name}"
            raise UserError(f"{folder}: {problem}, which a GGUF file of {architecture} needs")
    if row.own_head_dim or config.ropes:
        result["attention.key_length"] = config.head_dim
        result["attention.value_length"] = config.head_dim
    if row.pattern:
        slides = [layer.window is not None for layer in config.layers]
        usual = [bool((i + 1) % row.pattern) for i in range(config.num_layers)]
        # llama.cpp knows the usual pattern by itself.
        if any(slides) and slides != usual:
            result["attention.sliding_window_pattern"] = slides
    if config.ropes:
        result |= rope_keys(config, folder)
    return {f"{architecture}.{suffix}": value for suffix, value in result.items()}


def known_settings(config: Config) -> dict:
    """Returns the settings that a Config has, by Llama's names in config.json. Others are read from
    the file itself."""
    windows = [layer.window for layer in config.layers if layer.window]
    settings: dict[str, Any] = {
        "num_key_value_heads": config.num_kv_heads,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.norm_eps,
        "sliding_window": windows[0] if windows else None,
        "final_logit_softcapping": config.logit_softcap,
        "attn_logit_softcapping": config.attention_softcap,
        "num_experts": None,
        "num_experts_per_tok": None,
        "moe_intermediate_size": None,
    }
    if config.experts is not None:
        settings["num_experts"] = config.experts.count
        settings["num_experts_per_tok"] = config.experts.active
        settings["moe_intermediate_size"] = config.experts.intermediate_size
    if config.ropes:
        # Gemma 3 has two: the first is of the layers that attend to everything.
        settings["rope_theta"] = config.ropes[0].theta
        settings["rope_local_base_freq"] = config.ropes[-1].theta
    return settings


def rope_keys(config: Config, folder: Path) -> dict:
    """Returns the keys of rotary positions, without the architecture's name.

    Raises UserError for a scaling that llama.cpp does not compute.
    """
    rope = config.ropes[0]
    scaling = rope.scaling or {}
    keys: dict[str, Any] = {"rope.dimension_count": rope.dim}
    has_original = "original_max_position_embeddings" in scaling
    if has_original and scaling["rope_type"] != "llama3":
        original = int(scaling["original_max_position_embeddings"])
        keys["rope.scaling.original_context_length"] = original
    match scaling:
        case {} if not scaling:
            pass
        case {"rope_type": "llama3"}:
            pass  # It is a tensor: `rope_tensors`.
        case {"rope_type": "linear", "factor": factor}:
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(factor)}
        case {"rope_type": "yarn", "factor": factor, "attention_factor": attention_factor}:
            # The numbers of YaRN's paper, which llama.cpp takes whatever a file says.
            betas = scaling["beta_fast"], scaling["beta_slow"]
            if betas != (32, 1) or not scaling["truncate"]:
                supported = "beta_fast 32, beta_slow 1 and truncate"
                raise UserError(f"{folder}: llama.cpp computes YaRN with {supported} only")
            keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(factor)}
            usual = 1.0
            if factor > 1:
                usual = 0.1 * float(np.log(factor)) + 1.0
            if not close(attention_factor, usual):
                keys["rope.scaling.attn_factor"] = attention_factor / usual
        case {"rope_type": "longrope", "attention_factor": attention_factor}:
            keys["rope.scaling.type"] = "longrope"
            keys["rope.scaling.attn_factor"] = float(attention_factor)
        case {"rope_type": kind}:
            raise UserError(f"{folder}: llama.cpp has no rope scaling {kind!r}")
    return keys


def rope_tensors(config: Config) -> dict[str, np.ndarray]:
    """Returns the scaling of rotary positions that a file stores as tensors and not as keys: {name:
    float32 [dim / 2]}."""
    if not config.ropes:
        return {}
    rope = config.ropes[0]
    match rope.scaling:
        case {"rope_type": "llama3"}:
            unscaled = rope_inv_freq(rope.theta, rope.dim, None)
            scaled = rope_inv_freq(rope.theta, rope.dim, rope.scaling)
            return {"rope_freqs.weight": (unscaled / scaled).numpy()}
        case {"rope_type": "longrope", "short_factor": short, "long_factor": long}:
            return {
                "rope_factors_long.weight": np.array(long, np.float32),
                "rope_factors_short.weight": np.array(short, np.float32),
            }
    return {}


def check_read_back(
    fields: dict,
    plan: dict[str, GGUFPlace],
    factors: dict[str, np.ndarray],
    config: Config,
    folder: Path,
) -> None:
    """Raises UserError if the file would be read as another model, and names the first difference.

    factors: the tensors of `rope_tensors`.
    """
    # Of the model's tensors only names and shapes are looked at.
    no_bytes = np.empty((0, 0), np.uint8)
    tensors = {}
    for name, place in plan.items():
        tensors[name] = GgufTensor(place.shape, "F32", no_bytes)
    for name, values in factors.items():
        row = values.view(np.uint8)[None]  # [1, bytes]
        tensors[name] = GgufTensor(values.shape, "F32", row)
    config_read_back = config_json(Gguf(folder, fields, tensors))
    again = Config.from_hf(config_read_back, str(folder))
    for entry in dataclasses.fields(Config):
        # These say how a folder writes the model, not which model it is.
        if entry.name in ("family", "raw", "ignored_settings", "names"):
            continue
        ours = getattr(config, entry.name)
        theirs = getattr(again, entry.name)
        difference = first_difference(ours, theirs, entry.name)
        if difference:
            architecture = fields["general.architecture"]
            raise UserError(f"{folder}: as {architecture}, a GGUF file can't say {difference}")


def first_difference(ours, theirs, name: str) -> str:
    """Returns the first difference of two values, nested or not; "" if there is none.

    name: what the values are called. The difference reads "NAME OURS; it would be read as THEIRS".
    """
    pairs: list[tuple[Any, Any, str]] = []  # the parts of both values, with the name of each
    are_lists = isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple))
    are_dicts = isinstance(ours, dict) and isinstance(theirs, dict)
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        for entry in dataclasses.fields(ours):
            if entry.name == "balance":  # a setting of training only
                continue
            our_part = getattr(ours, entry.name)
            their_part = getattr(theirs, entry.name)
            pairs.append((our_part, their_part, f"{name}.{entry.name}"))
    elif are_dicts and ours.keys() == theirs.keys():
        for key in ours:
            pairs.append((ours[key], theirs[key], f"{name}.{key}"))
    elif are_lists and len(ours) == len(theirs):
        for i in range(len(ours)):
            pairs.append((ours[i], theirs[i], f"{name}[{i}]"))
    else:
        are_numbers = type(ours) in (int, float) and type(theirs) in (int, float)
        # A file has float32 where config.json has float64.
        is_same = close(ours, theirs) if are_numbers else ours == theirs
        return "" if is_same else f"{name} {ours!r}; it would be read as {theirs!r}"
    for our_part, their_part, part_name in pairs:
        difference = first_difference(our_part, their_part, part_name)
        if difference:
            return difference
    return ""


# ---- weights ----


class FolderWeights:
    """The weights of a model folder by their Hugging Face names, read one at a time.

    They are matched with the model as checkpoint.load_model matches them, so that both read the
    same folders and refuse the same ones: by the files' headers, and by the values of a tied head
    that is stored beside the embedding.
    """

    def __init__(self, folder: Path, config: Config, quant: str | None = None):
        """quant: the linears that are read as the numbers that NF4 makes of them, as for
        checkpoint.load_model."""
        with torch.device("meta"):
            model = Transformer(config)
        model.source = folder
        files = weight_files(folder)
        report_unread_shards(folder)
        parameters = match_tensors(model, folder, files, {})
        self.folder = folder
        # The weights that are quantised first.
        self.quantized: dict[str, Place] = {}
        for name, place in find_places(model, folder, files, quant).items():
            if place.quantize:
                self.quantized[name] = place
        self.stored: dict[str, tuple[Path, str]] = {}  # {Hugging Face name: (file, name in it)}
        tied_head = None  # the file of a tied head that is stored all the same
        for file in files:
            with open_safetensors(file) as shard:
                names = list(shard.keys())
            for name in names:
                if config.tied and name == head_name(config):
                    tied_head = file
                elif name in parameters:
                    self.stored[hf_name(model, parameters[name])] = file, name
        if tied_head is not None:
            # A GGUF file would lack this head, so it must be the embedding, as load_model demands.
            embedding = self.read(hf_name(model, "embed.weight"))
            model.embed.weight = torch.nn.Parameter(embedding, requires_grad=False)
            head = read_tensor(tied_head, head_name(config))
            check_tied_head(model, head, torch.float32, torch.device("cpu"))

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor as float32, into memory of its own."""
        file, stored_name = self.stored[name]
        weight = read_tensor(file, stored_name)
        place = self.quantized.get(stored_name)
        if place is None:
            return weight.to(torch.float32, copy=True)
        if place.transposed:
            weight = weight.t()
        rounded = dequantized_weight(quantize_weight(weight.contiguous()), torch.float32)
        return rounded.t() if place.transposed else rounded


class AdapterUpdates:
    """What a LoRA adapter adds to a folder's weights, checked against the model as
    lora.load_adapter checks it."""

    def __init__(self, config: Config, adapter: str | Path):
        kind = type_of_adapter(adapter)
        if kind != "LORA":
            advice = "llama.cpp has nothing for it"
            if kind in ADAPTER_ROWS and METHODS[ADAPTER_ROWS[kind]].can_merge:
                advice = "`convert.py merge` it, and export the merged folder"
            raise UserError(f"{adapter}: is no LoRA adapter ({kind}); {advice}")
        if (Path(adapter) / adapter_files.OWN_BASE).is_dir():
            raise UserError(
                f"{adapter}: belongs to the base in 4 bits in its folder (LoftQ); `convert.py merge`"
                " it, and export the merged folder"
            )
        # The adapter is loaded into tensors without memory: only the checks of load_adapter are
        # needed.
        with torch.device("meta"):
            self.model = Transformer(config)
        lora.load_adapter(self.model, adapter)
        if trained_tables(self.model):
            raise UserError(
                f"{adapter}: holds trained embeddings; `convert.py merge` it, and export the merged"
                " folder"
            )
        self.folder = Path(adapter)
        self.layers = lora.lora_layers(self.model)
        self.tensors = dict(iterate_tensors([Path(adapter) / "adapter_model.safetensors"]))
        config_file = Path(adapter) / adapter_files.CONFIG_FILE
        lora.tidy_lora(self.model, read_json(config_file), config_file, self.tensors)

    def factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns A, float32 [rank, in], and B, float32 [out, rank], of a layer by its Hugging Face
        name."""
        a = self.tensors[f"{adapter_files.PREFIX}{layer}.lora_A.weight"]
        b = self.tensors[f"{adapter_files.PREFIX}{layer}.lora_B.weight"]
        return a.float(), b.float()

    def changes(self, name: str) -> bool:
        """True if the adapter has an update for a weight of the folder."""
        return name.removesuffix(".weight") in self.layers

    def add(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Returns a weight that the adapter changes, [out, in], with its update added, by the
        arithmetic of `lora.merge`."""
        layer = name.removesuffix(".weight")
        a, b = self.factors(layer)
        adapted = weight + self.layers[layer].scale * (b @ a)
        if not self.layers[layer].variant.dora:
            return adapted
        lengths = self.tensors[f"{adapter_files.PREFIX}{layer}.lora_magnitude_vector"].float()
        return adapted * (lengths / lora.row_lengths(adapted))[:, None]


def stored_type(
    name: str, place: GGUFPlace, dtype: str, notes: list[str], makes_logits: bool
) -> str:
    """Returns the GGUF type of a tensor. A line is added to notes where it is not the one of
    --type.

    makes_logits: the tensor is the model's output head.
    """
    if len(place.shape) == 1 or name.endswith(ALWAYS_F32):
        return "F32"
    width = place.shape[-1]  # weights of a row; a block may not extend over two
    if dtype in BLOCK_TYPES and width % BLOCK:
        reason = f"its rows of {width} weights are no whole blocks of {BLOCK}"
        notes.append(f"{name} is stored in f16: {reason}")
        return "F16"
    if dtype in SMALL_TYPES and makes_logits:
        notes.append(f"{name} is stored in q8_0: it makes the logits, which {dtype} would blur")
        return "Q8_0"
    return dtype.upper()


def add_prompt_facts(fields: dict, trained: str | Path) -> list[str]:
    """Adds the date that the chat template wrote in training, and the system message of
    conversations that had none, to a file's fields. Returns what is to be said of them: llama.cpp
    writes the present day, and no system message by itself.

    trained: the folder of the adapter, or of the model.
    """
    notes = []
    day = trained_day(trained)
    if day:
        fields[DATE_KEY] = day
        note = f"the chat template writes a date, in training {day}, and llama.cpp writes today's"
        notes.append(f"{note}; the file says it as {DATE_KEY}, which convert.py to-folder reads")
    system = trained_system(trained)
    if system:
        fields[SYSTEM_KEY] = system
        note = f'it was trained with the system message "{one_line(system, 60)}"'
        notes.append(
            f"{note}, which must be given to llama.cpp; the file says it as {SYSTEM_KEY}, which"
            " convert.py to-folder reads"
        )
    return notes


def encode_tensor(
    weights: FolderWeights, updates: AdapterUpdates | None, name: str, place: GGUFPlace, kind
) -> np.ndarray:
    """Returns a tensor as the file stores it: float32, float16, or uint8 rows of blocks.

    Raises UserError where a weight is not finite, or too large for the type.
    """
    from gguf import quantize

    parts = []  # of each expert, or one
    for hf in place.names:
        weight = weights.read(hf)
        # [out, in], as adapters and GGUF files have it; a bias or a norm's weight is [out].
        if place.transposed:
            weight = weight.t()
        if not all_finite(weight):
            raise UserError(f"{weights.folder}: {hf} holds NaN or infinite weights")
        where = weights.folder
        holds = " holds"
        if updates and updates.changes(hf):
            weight = updates.add(hf, weight)
            where = updates.folder
            holds = ", with the adapter's update, holds"
            # Both are numbers, load_adapter has seen to it. Their sum may be beyond float32.
            if not all_finite(weight):
                raise UserError(f"{where}: {hf}{holds} weights too large for float32")
        rows = weight.contiguous().numpy()
        limit = MAX_BY_TYPE.get(kind.name, np.inf)
        if np.abs(rows).max() > limit:
            problem = f"{holds} weights too large for {kind.name}"
            raise UserError(f"{where}: {hf}{problem}; take --type bf16")
        if place.offset:
            rows = rows + np.float32(place.offset)
        if place.heads:
            rows = interleave_rows(rows, place.heads)
        parts.append(quantize(np.ascontiguousarray(rows), kind))
    has_experts = len(place.shape) > 2
    if has_experts:
        return np.stack(parts)  # [experts, out, in]
    return parts[0]


# ---- an adapter alone ----


def adapter_to_gguf(
    adapter: str | Path, file: str | Path, folder: str | Path, log: LogFn = print_stderr
) -> None:
    """Writes a PEFT LoRA adapter as a GGUF file that llama.cpp loads together with its base
    (`--lora`).

    folder: the base, of which config.json is read, and the hash of the weights compared. In the
    file, A is float32 [rank, in] and B is float32 [out, rank], its rows in the order of the base's
    file.
    log: is called with a line where the adapter was trained on another base, or in 4 bits.
    Raises UserError where the adapter does not fit the base, or is on the experts of a mixture.
    """
    from gguf import GGMLQuantizationType

    folder = Path(folder)
    check_is_new(Path(file))
    config = read_config(folder)
    require_lm_head(folder, config, adapter)
    row, architecture = find_architecture(config, folder)
    check_adapter(folder, Path(adapter))
    trained = adapter_files.trained_kind(adapter)
    if trained in QUANT_KINDS:
        log(
            f"NOTE: {adapter} was trained on its base in {trained}, and llama.cpp adds it to the"
            " file that it is given, whose numbers are others; `convert.py to-gguf --adapter` writes"
            " those that it was trained on"
        )
    note = adapter_files.base_note(adapter, folder)
    if note:
        log(note)
    dated: dict[str, str] = {}
    for note in add_prompt_facts(dated, adapter):
        log(f"NOTE: {note}")
    updates = AdapterUpdates(config, adapter)
    by_hf_name = {}
    for name, place in places(config, row).items():
        if len(place.shape) < 3:  # not of experts, whose matrices share one tensor
            by_hf_name[place.names[0]] = name, place
    first_layer = next(iter(updates.layers.values()))
    if first_layer.variant.dora:
        raise UserError(
            f"{adapter}: DoRA's lengths have no place in a LoRA file; `convert.py to-gguf --adapter`"
            " writes them merged"
        )
    alpha = first_layer.alpha
    content: dict[str, np.ndarray] = {}
    for layer in updates.layers:
        weight = f"{layer}.weight"
        if weight not in by_hf_name:
            problem = f"adapts {layer}, one of many experts, which is not supported in a LoRA file"
            raise UserError(f"{adapter}: {problem}")
        name, place = by_hf_name[weight]
        a, b = updates.factors(layer)
        # llama.cpp scales all layers by one alpha over their own rank.
        adapted = updates.layers[layer]
        b = b * (adapted.scale * adapted.rank / alpha)
        # The rows of B are those of the weight, and stand in its order.
        rows_b = b.numpy()
        if place.heads:
            rows_b = interleave_rows(rows_b, place.heads)
        content[f"{name}.lora_a"] = np.ascontiguousarray(a.numpy())
        content[f"{name}.lora_b"] = np.ascontiguousarray(rows_b)
    fields = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
        "general.name": Path(adapter).resolve().name,
        "general.file_type": TYPES["f32"],
        **dated,
    }
    table = {}
    for name, array in content.items():
        table[name] = (array.shape, GGMLQuantizationType.F32)
    write_gguf(Path(file), fields, table, iter(content.values()))


# ---- the file ----


@contextlib.contextmanager
def tokenizer_folder(folder: Path, adapter: str | Path | None) -> Iterator[Path]:
    """Yields a folder with the tokenizer's files.

    Without an adapter it is the model's. Else it is a temporary one, in which the adapter's files
    replace the model's.
    """
    if adapter is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        # It may name stop tokens that the tokenizer's own files do not.
        shutil.copyfile(folder / "config.json", tmp / "config.json")
        copy_tokenizer(folder, tmp)
        copy_tokenizer(Path(adapter), tmp)
        yield tmp


def check_is_new(file: Path) -> None:
    """Raises UserError where a file exists already, FileNotFoundError where its folder does not:
    before any tensor is computed."""
    if file.exists():
        raise UserError(f"{file}: exists already; name a new file")
    if not file.parent.is_dir():
        # As the system would say it.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file.parent))


def write_gguf(file: Path, fields: dict, table: dict, content: Iterator[np.ndarray]) -> None:
    """Writes a GGUF file under another name, syncs it to the disk, and renames it. Raises UserError
    if another process has written a file of that name meanwhile.

    fields: {key: value}.
    table: {tensor: (shape, type)}, in the order of content.
    content: the tensors, each as the file stores it.
    """
    from gguf import GGML_QUANT_SIZES, GGUFWriter

    writer = GGUFWriter(None, fields["general.architecture"])  # which writes this key by itself
    # By the exact type: a bool is an int for Python, and another type for GGUF.
    add_value = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in fields.items():
        if key != "general.architecture":
            add_value[type(value)](key, value)
    for name, (shape, kind) in table.items():
        block_weights, block_bytes = GGML_QUANT_SIZES[kind]
        num_bytes = int(np.prod(shape)) // block_weights * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, kind)
    try:
        with atomic_file(file, replace=False) as tmp, contextlib.closing(writer):
            writer.write_header_to_file(tmp)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with progress(f"writing {file.name}", len(table), "tensor") as bar:
                for array in content:
                    writer.write_tensor_data(array)
                    bar.update()
    except FileExistsError:
        problem = "was written by another process meanwhile; this one's file is not kept"
        raise UserError(f"{file}: {problem}") from None
