"""GGUF in: a file of llama.cpp becomes a Hugging Face folder once, and the other files read only
that folder.

`interop/gguf_reader.py` reads the container, `interop/gguf_names.py` says what its parts are
called, `interop/gguf_tokenizer.py` makes the tokenizer. Here a file's keys become config.json
(`config_json`), which families.py then checks as it checks any other, and its tensors become
model.safetensors. A file means what llama.cpp computes from it: where its code takes something for
granted (Gemma's windows, the divisor of its scores, Qwen3's expert weights), config.json says it.
What is not known here is refused by its name, and never left out in silence.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.console import print_stderr
from common.errors import UserError, read_json
from common.files import atomic_folder, file_crc32, file_sha256, write_json
from common.origin import SOURCE_FILE
from common.progress import progress
from families import FAMILIES, MAX_LAYERS, Config
from interop.gguf_names import (
    ARCHITECTURES,
    EXPERTS,
    OTHER_KEYS,
    ROPE_KEYS,
    ROPE_TENSORS,
    ROTARY,
    Architecture,
    GGUFPlace,
    deinterleave_rows,
    places,
)
from interop.gguf_reader import Gguf, read_gguf
from interop.gguf_tokenizer import special_ids, tokenizer_files

# The folder's weights, in one file.
WEIGHTS = "model.safetensors"
# The date that the chat template wrote in training: a key of ours, which llama.cpp passes over.
DATE_KEY = "plaintune.date"
# The same of the system message of conversations that had none.
SYSTEM_KEY = "plaintune.system"
CHUNK = 1 << 24  # weights that are converted to float32 at a time: 64 MB


def gguf_to_folder(file: str | Path, folder: str | Path, replace: bool = False) -> None:
    """Converts a GGUF file of a known architecture into a new Hugging Face folder, which gets its
    name when it is whole.

    file: as `read_gguf` takes it. F32, F16 and BF16 are copied bit for bit (Gemma's norms less the
        1 that a file adds to them). Blocks become float32: a scale times a code, plus a minimum,
        needs more bits than a 16-bit float has, and the folder is to give the file's own logits,
        not nearly those.
    folder: gets config.json, model.safetensors, tokenizer.json (byte-level BPE) or tokenizer.model
        (sentencepiece), tokenizer_config.json, generation_config.json, plaintune.json where the
        file says a date, and source.json, which says what it was made of, and how large its files
        are, by which `find_damaged_file` knows them.
    replace: whether a folder that is there already is replaced.
    Raises UserError, and leaves nothing behind, for a file that is damaged, cut, no GGUF file or
    not supported, or whose weights are not all finite.
    """
    file = Path(file)
    folder = Path(folder)
    if folder.exists() and not replace:
        raise UserError(f"{folder}: exists already; name a new folder")
    gguf = read_gguf(file)
    config = config_json(gguf)
    plan = plan_tensors(gguf, Config.from_hf(config, str(file)))
    tensor_types = sorted(tensor.kind for tensor in gguf.tensors.values())
    source = {
        "file": file.name,
        "sha256": file_sha256(file),
        "name": gguf.fields.get("general.name"),
        "license": gguf.fields.get("general.license"),
        "tensor_types": Counter(tensor_types),
    }
    documents = {"config.json": config} | tokenizer_files(gguf)
    # As train.py notes them, so that prompts go on to have them.
    facts = {"date": gguf.fields.get(DATE_KEY), "system": gguf.fields.get(SYSTEM_KEY)}
    facts = {name: value for name, value in facts.items() if isinstance(value, str)}
    if facts:
        documents["plaintune.json"] = facts
    print_stderr(f"converting {file} into {folder}")
    with atomic_folder(folder, replace) as tmp:
        for name, content in documents.items():
            if isinstance(content, bytes):
                (tmp / name).write_bytes(content)
            else:
                write_json(content, tmp / name)
        write_weights(gguf, plan, tmp / WEIGHTS)
        source["files"] = checksums(tmp)
        write_json(source, tmp / SOURCE_FILE)


def checksums(folder: Path) -> dict[str, dict]:
    """Returns {file name: {"bytes": size, "crc32": of its content}} of a folder's files, and for the
    weights, which take long to read, "changed_ns", their time of change."""
    result: dict[str, dict] = {}
    for file in sorted(folder.iterdir()):
        stat = file.stat()
        result[file.name] = {"bytes": stat.st_size, "crc32": file_crc32(file)}
        if file.name == WEIGHTS:
            result[file.name]["changed_ns"] = stat.st_mtime_ns
    return result


def find_damaged_file(folder: Path) -> str | None:
    """Returns what is wrong with a converted folder, which may have lost something on its disk or in
    a copy; None if all files are as they were written.

    Small files are read. The weights are, too, where their time of change is another one, as in a
    copy; else their size is enough.
    """
    file = folder / SOURCE_FILE
    try:
        for name, known in read_json(file)["files"].items():
            file = folder / name
            stat = file.stat()
            if stat.st_size != known["bytes"]:
                return f"{file} has {stat.st_size:,} bytes, not {known['bytes']:,}"
            is_unchanged = known.get("changed_ns") == stat.st_mtime_ns
            if not is_unchanged and file_crc32(file) != known["crc32"]:
                return f"{file} is damaged"
    except OSError as error:
        return f"{file} can't be read ({error.strerror})"
    except (UserError, KeyError, AttributeError, TypeError):
        return f"{file} is damaged"
    return None


# ---- config.json ----

# Keys for which 0 means that there is no such thing. Gemma 2 always has a window and a soft-cap.
NONE_AT_ZERO = ("attention.sliding_window", "expert_count", "final_logit_softcapping")
# Settings of config.json: the base of the angles, and Gemma 3's for layers with a window.
ROPE_THETAS = ("rope_theta", "rope_local_base_freq")


def config_json(gguf: Gguf) -> dict:
    """Returns config.json in the dialect of transformers 4 (rope_theta, rope_scaling, torch_dtype),
    which 5 reads too.

    Only names, shapes and types of the tensors are looked at, and the factors for RoPE. Raises
    UserError on an architecture, a key or a value that config.json can't say.
    """
    architecture = gguf.field("general.architecture", str)
    row = ARCHITECTURES.get(architecture)
    if row is None:
        known = f"those that can be converted are {', '.join(ARCHITECTURES)}"
        raise UserError(f"{gguf.file}: its architecture is {architecture!r}; {known}")
    is_rotary = "rope.freq_base" in row.keys
    check_supported(gguf, architecture, row, is_rotary)

    name = family_of(gguf, row)
    family = FAMILIES[name]
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": name}
    config["vocab_size"] = len(gguf.field("tokenizer.ggml.tokens", list))
    config |= settings_of_keys(gguf, architecture, row, name)
    hidden = config["hidden_size"]
    heads = config["num_attention_heads"]
    # llama.cpp's default, which is not every family's.
    config.setdefault("num_key_value_heads", heads)
    head_dim = head_size(gguf, architecture, row, hidden, heads)
    if row.own_head_dim:
        config["head_dim"] = head_dim
    config |= row.fixed

    # What only the tensors say.
    is_tied = "output.weight" not in gguf.tensors
    config["tie_word_embeddings"] = is_tied
    if row.tied is not None and is_tied is not row.tied:
        verb = "has" if row.tied else "lacks"
        raise UserError(f"{gguf.file}: {verb} output.weight, unlike {architecture} models")
    if name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in gguf.tensors

    if row.pattern:
        config |= gemma_layers(gguf, architecture, row, config, head_dim)
    if is_rotary:
        settings = [setting for setting, _ in row.keys.values()]
        thetas = [setting for setting in settings if setting in ROPE_THETAS]
        # llama.cpp's default, which is not every family's.
        config = dict.fromkeys(thetas, 10_000.0) | config
        config |= rope_settings(gguf, architecture, config, head_dim)

    ids = special_ids(gguf)
    # No pad_token_id: transformers would make it the embedding's padding_idx, whose row gets no
    # gradient, and chat models often pad with their end token. It is in generation_config.json.
    config |= {"bos_token_id": ids.get("bos"), "eos_token_id": ids["eos"]}
    # Vectors are float32 in nearly every file, whatever the matrices are.
    matrices = [tensor for tensor in gguf.tensors.values() if len(tensor.shape) > 1]
    matrix_types = {tensor.kind for tensor in matrices}
    config["torch_dtype"] = "float32"
    if matrix_types == {"F16"}:
        config["torch_dtype"] = "float16"
    if matrix_types == {"BF16"}:
        config["torch_dtype"] = "bfloat16"
    # Some families have names of their own for Llama's settings, as GPT-2's n_embd.
    renamed = {}
    for key, value in config.items():
        own_name = family.keys.get(key, key)
        renamed[own_name] = value
    return renamed


def check_supported(gguf: Gguf, architecture: str, row: Architecture, is_rotary: bool) -> None:
    """Raises UserError if a file is no whole model, or has a key of its architecture that is not
    known here."""
    content = gguf.fields.get("general.type", "model")
    if content != "model":
        raise UserError(f"{gguf.file}: holds {content!r}, not a model")
    if gguf.fields.get("split.count", 1) != 1:
        advice = "join the parts first (llama-gguf-split --merge)"
        raise UserError(f"{gguf.file}: is a part of a model; {advice}")
    known = {*row.keys, *OTHER_KEYS}
    if is_rotary:
        known |= {*ROPE_KEYS}
    if row.pattern:
        known.add("attention.sliding_window_pattern")
    prefix = f"{architecture}."
    for key in sorted(gguf.fields):
        if key.startswith(prefix) and key.removeprefix(prefix) not in known:
            raise UserError(f"{gguf.file}: uses {key!r}, which is not supported")


def family_of(gguf: Gguf, row: Architecture) -> str:
    """Returns the model type that a file means.

    llama.cpp knows no sliding window under the name llama, and computes Mistral without one. Files
    that interop/gguf_export.py writes note the window, so that it is not lost.
    """
    if row.families[0] == "llama":
        if gguf.fields.get("llama.expert_count"):
            return "mixtral"
        if gguf.fields.get("llama.attention.sliding_window"):
            return "mistral"
    return row.families[0]


def settings_of_keys(gguf: Gguf, architecture: str, row: Architecture, family: str) -> dict:
    """Returns the settings of config.json, by Llama's names, that keys of the file say."""
    optional = {*row.optional}
    if family == "mixtral":
        optional -= {*EXPERTS}
    settings = {}
    for suffix, (name, kind) in row.keys.items():
        key = f"{architecture}.{suffix}"
        value = gguf.fields.get(key)
        is_zero = value == 0 and suffix in NONE_AT_ZERO and architecture != "gemma2"
        is_absent = value is None or is_zero
        if is_absent and suffix in optional:
            continue
        settings[name] = gguf.field(key, kind)
    return settings


def head_size(gguf: Gguf, architecture: str, row: Architecture, hidden: int, heads: int) -> int:
    """Returns the dimensions of a head.

    Raises UserError where those of keys and values differ, or llama.cpp would not load such heads.
    """
    # At least 1, since the header may claim more heads than dimensions.
    usual = max(1, hidden // heads)
    key_length = gguf.field(f"{architecture}.attention.key_length", int, usual)
    value_length = gguf.field(f"{architecture}.attention.value_length", int, key_length)
    fits = row.own_head_dim or key_length * heads == hidden
    if key_length != value_length or not fits:
        shape = f"{heads} heads with keys of {key_length} and values of {value_length}"
        problem = f"{shape} in {hidden} dimensions do not make a model of {architecture}"
        raise UserError(f"{gguf.file}: {problem}")
    return key_length


def gemma_layers(
    gguf: Gguf, architecture: str, row: Architecture, config: dict, head_dim: int
) -> dict:
    """Returns what llama.cpp's code fixes for Gemma 2 and 3: which layers have a window, and what
    divides the scores."""
    depth = config["num_hidden_layers"]
    if depth > MAX_LAYERS:
        # Config.from_hf refuses it. A list of so many layers might not fit in memory.
        return {}
    key = f"{architecture}.attention.sliding_window_pattern"
    pattern = gguf.fields.get(key, row.pattern)
    if type(pattern) is list:
        types = {type(item) for item in pattern}
        if len(pattern) != depth or types != {bool}:
            raise UserError(f"{gguf.file}: {key} is no list of {depth} booleans")
        slides = pattern
    elif type(pattern) is int and 0 < pattern < 2**31:
        slides = [bool((i + 1) % pattern) for i in range(depth)]
    else:
        actual = str(pattern)[:40]
        raise UserError(f"{gguf.file}: {key} can't be {actual}")
    if architecture == "gemma3" and "sliding_window" not in config:
        slides = [False] * depth
    # Scores are divided by the root of this.
    divisor = head_dim
    if depth in row.hidden_scaled_depths:
        divisor = config["hidden_size"] // config["num_attention_heads"]
    layer_types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return {"layer_types": layer_types, "query_pre_attn_scalar": divisor}


# ---- rotary positions ----

LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope_settings(gguf: Gguf, architecture: str, config: dict, head_dim: int) -> dict:
    """Returns `rope_scaling` and the settings that belong to it.

    Raises UserError for a kind of scaling that config.json can't say exactly.
    """
    prefix = f"{architecture}.rope.scaling."
    theta = config["rope_theta"]
    dim = gguf.field(f"{architecture}.rope.dimension_count", int, head_dim)
    settings: dict[str, Any] = {"rope_scaling": None}
    if dim != head_dim:
        # A configuration says the share of the dimensions, from which the number must come back
        # exactly.
        share = dim / head_dim
        is_exact = dim <= head_dim and int(head_dim * share) == dim
        if not FAMILIES[config["model_type"]].partial_rope or not is_exact:
            problem = f"RoPE over {dim} of {head_dim} dimensions"
            raise UserError(f"{gguf.file}: {problem} is not supported in {architecture}")
        settings["partial_rotary_factor"] = share
    positions = config["max_position_embeddings"]
    original = gguf.field(f"{prefix}original_context_length", int, positions)
    if config["model_type"] == "phi3":
        settings["original_max_position_embeddings"] = original
    kind = rope_kind(gguf, prefix)
    if kind == "none" and ROPE_TENSORS[0] in gguf.tensors:
        settings["rope_scaling"] = llama3_scaling(gguf, dim, theta)
    elif kind == "linear":
        factor = gguf.field(f"{prefix}factor", float, 1.0)
        if factor != 1.0:
            settings["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        settings["rope_scaling"] = yarn_scaling(gguf, prefix, original)
    elif kind == "longrope":
        settings["rope_scaling"] = longrope_scaling(gguf, prefix, dim, positions, original)
        settings["original_max_position_embeddings"] = original
    elif kind != "none":
        raise UserError(f"{gguf.file}: RoPE scaling {kind!r} is not supported")
    return settings


def rope_kind(gguf: Gguf, prefix: str) -> str:
    """Returns the kind of scaling that keys and tensors mean together. prefix: of the keys of
    scaling.

    Raises UserError where keys and tensors contradict each other.
    """
    has_factor = f"{prefix}factor" in gguf.fields
    has_attn_factor = f"{prefix}attn_factor" in gguf.fields
    # Files from before the key `type` was there have a factor alone.
    usual = "linear" if has_factor else "none"
    kind = gguf.field(f"{prefix}type", str, usual)
    has_freqs, has_short, has_long = (name in gguf.tensors for name in ROPE_TENSORS)
    scaling = f"RoPE scaling {kind!r}"
    if has_short and has_long and kind in ("none", "longrope") and not has_freqs:
        # The tensors say it; the key may be missing.
        kind = "longrope"
    elif has_short or has_long:
        problem = f"{scaling} and factors for LongRoPE are not supported together"
        raise UserError(f"{gguf.file}: {problem}")
    if has_freqs and kind != "none":
        problem = f"{scaling} and rope_freqs.weight are not supported together"
        raise UserError(f"{gguf.file}: {problem}")
    if has_attn_factor and kind not in ("yarn", "longrope"):
        problem = f"uses '{prefix}attn_factor' without YaRN or LongRoPE, which is not supported"
        raise UserError(f"{gguf.file}: {problem}")
    if kind == "longrope" and (has_factor or not has_short):
        problem = "LongRoPE without two lists of factors, or with one factor, is not supported"
        raise UserError(f"{gguf.file}: {problem}")
    return kind


def close(a: float, b: float) -> bool:
    """True if a float32 of a file says the same as a float64 of config.json."""
    return math.isclose(a, b, rel_tol=1e-6)


def rope_factors(gguf: Gguf, name: str, dim: int) -> list[float]:
    """Returns a tensor of factors, F32 [dim / 2], each as the shortest decimal that float32
    allows."""
    tensor = gguf.tensors[name]
    count = dim // 2
    if tensor.kind != "F32" or tensor.shape != (count,):
        actual = f"{tensor.kind} {list(tensor.shape)}"
        raise UserError(f"{gguf.file}: {name} is {actual}, not F32 [{count}]")
    factors = tensor.rows.view("<f4")[0]  # [dim / 2]
    return [float(str(factor)) for factor in factors]


def llama3_scaling(gguf: Gguf, dim: int, theta: float) -> dict | None:
    """Returns Llama 3's `rope_scaling`, or None where it scales nothing.

    A file has it as rope_freqs.weight, F32 [dim / 2]: the factor of each wavelength. The four
    parameters behind it can't all be computed from it, but Meta published three of them, the same
    for every model so far. So the fourth, the largest factor, is read from the tensor, and the
    whole tensor is compared with what the four give.
    """
    factors = np.array(rope_factors(gguf, "rope_freqs.weight", dim))
    if (factors == 1).all():
        return None
    low, high, length = LLAMA3_ROPE.values()
    exponents = np.arange(0, dim, 2) / dim  # [dim / 2]
    wavelengths = 2 * math.pi * theta**exponents  # [dim / 2], in positions
    # How often each pair of dimensions turns around in the original context. Above `high` its
    # frequency stays, below `low` it is divided by the factor, and between it is a mean of both.
    rotations = length / wavelengths
    unscaled = np.clip((rotations - low) / (high - low), 0, 1)  # the share that stays
    factor = float(factors.max())
    is_possible = 1 <= factor < math.inf
    if is_possible:
        scales = (1 - unscaled) / factor + unscaled
        is_possible = np.allclose(factors * scales, 1, rtol=0, atol=1e-4)
    if not is_possible:
        problem = "rope_freqs.weight is not Llama 3's scaling of 8192 positions; not supported"
        raise UserError(f"{gguf.file}: {problem}")
    return {"rope_type": "llama3", "factor": factor} | LLAMA3_ROPE


def yarn_scaling(gguf: Gguf, prefix: str, original: int) -> dict:
    """Returns YaRN's `rope_scaling`.

    llama.cpp computes YaRN with the numbers of its paper in these architectures, whatever the keys
    say. Only the factor of the scores can be another one. Raises UserError where a key says another
    number.
    """
    factor = gguf.field(f"{prefix}factor", float)
    # The factor of queries and keys that YaRN's paper takes (Peng et al. 2023, section 3.4).
    usual = 1.0
    if factor > 1:
        usual = 0.1 * math.log(factor) + 1.0
    supported = {
        "yarn_ext_factor": (1.0,),
        "yarn_beta_fast": (32.0,),
        "yarn_beta_slow": (1.0,),
        "yarn_attn_factor": (1.0, usual),
    }
    for key, numbers in supported.items():
        value = gguf.fields.get(prefix + key, numbers[0])
        is_supported = False
        if type(value) is float:
            is_supported = any(close(value, number) for number in numbers)
        if not is_supported:
            actual = f"{prefix}{key} is {str(value)[:40]}"
            raise UserError(f"{gguf.file}: {actual}, {numbers[-1]:g} is supported")
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    extra = gguf.field(f"{prefix}attn_factor", float, 1.0)
    if not close(extra, 1.0):
        scaling["attention_factor"] = usual * extra
    return scaling


def longrope_scaling(gguf: Gguf, prefix: str, dim: int, positions: int, original: int) -> dict:
    """Returns LongRoPE's `rope_scaling`. positions, original: the context now, and before it was
    made longer."""
    # Older transformers read the kind at "type", newer ones at "rope_type".
    scaling: dict[str, Any] = {"rope_type": "longrope", "type": "longrope"}
    scaling["short_factor"] = rope_factors(gguf, "rope_factors_short.weight", dim)
    scaling["long_factor"] = rope_factors(gguf, "rope_factors_long.weight", dim)
    # The factor of queries and keys that transformers takes where config.json names none.
    ratio = positions / original
    usual = 1.0
    if min(ratio, original) > 1:
        stretch = math.log(ratio) / math.log(original)
        usual = math.sqrt(1 + stretch)
    attention_factor = gguf.field(f"{prefix}attn_factor", float, 1.0)
    if not close(attention_factor, usual):
        scaling["attention_factor"] = attention_factor
    return scaling


# ---- weights ----


def plan_tensors(gguf: Gguf, config: Config) -> dict[str, GGUFPlace]:
    """Returns the places of the model's tensors, after a check that the file has each in the shape
    that its keys imply.

    Raises UserError where a tensor is missing, has another shape, or is no part of the model.
    """
    architecture = gguf.fields["general.architecture"]
    row = ARCHITECTURES[architecture]
    # Checked first, so that no time goes into building a model that is not there.
    if config.num_layers > len(gguf.tensors):
        counts = f"holds {len(gguf.tensors)} tensors, too few for {config.num_layers} layers"
        raise UserError(f"{gguf.file}: {counts}")
    plan = places(config, row)
    missing = [name for name in plan if name not in gguf.tensors]
    if missing:
        counts = f"{len(missing)} tensors are missing"
        raise UserError(f"{gguf.file}: {counts}, the first is {missing[0]}")
    extra = gguf.tensors.keys() - plan.keys()
    is_rotary = ROTARY.items() <= row.keys.items()
    if is_rotary:
        extra -= {*ROPE_TENSORS}
    if extra:
        first = min(extra)
        model = f"a model of {architecture} of {config.num_layers} layers"
        raise UserError(f"{gguf.file}: holds {first!r}, which {model} does not have")
    for name, place in plan.items():
        shape = gguf.tensors[name].shape
        if shape != place.shape:
            wanted = f"its header asks for {list(place.shape)}"
            raise UserError(f"{gguf.file}: {name} has shape {list(shape)}; {wanted}")
    return plan


def write_weights(gguf: Gguf, plan: dict[str, GGUFPlace], path: Path) -> None:
    """Writes model.safetensors a part of a tensor at a time, since the whole model in float32 may
    not fit in memory."""
    bar = progress(f"converting {gguf.file.name}", len(plan), "tensor")
    with open(path, "wb") as out, bar:
        out.write(safetensors_header(gguf, plan))
        for name, place in plan.items():
            parts = folder_weights(gguf, name, place)
            out.writelines(weights.data for weights in parts)
            bar.update()


def safetensors_header(gguf: Gguf, plan: dict[str, GGUFPlace]) -> bytes:
    """Returns what stands before the data of a safetensors file.

    The format: the length of a JSON header in 8 bytes, then the header with the dtype, shape and
    place of each tensor, filled up with spaces to a multiple of 8 bytes.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, place in plan.items():
        dtype = "F32"
        bytes_per_weight = 4
        if is_copied(gguf, name, place):
            dtype = gguf.tensors[name].kind
            bytes_per_weight = 2
        # A folder has a matrix for each expert, one after the other in the file.
        shape = place.shape
        is_of_experts = len(place.names) > 1 or len(place.shape) > 2
        if is_of_experts:
            shape = place.shape[1:]
        hf_shape = shape[::-1] if place.transposed else shape
        num_bytes = bytes_per_weight * math.prod(shape)
        for hf_name in place.names:
            start = end
            end += num_bytes
            header[hf_name] = {"dtype": dtype, "shape": hf_shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    padding = -len(text) % 8
    text += b" " * padding
    return struct.pack("<Q", len(text)) + text


def is_copied(gguf: Gguf, name: str, place: GGUFPlace) -> bool:
    """True if a tensor keeps its 16 bits; else it becomes float32, as a norm does from which 1 is
    taken away."""
    has_16_bits = gguf.tensors[name].kind in ("F16", "BF16")
    return has_16_bits and not place.offset


def folder_weights(gguf: Gguf, name: str, place: GGUFPlace) -> Iterator[np.ndarray]:
    """Yields a tensor of the file as the folder stores it, contiguous, in parts of whole rows.

    Each part is float32, or uint16 where the tensor keeps its 16 bits. Raises UserError where a
    weight is not finite.
    """
    from gguf import GGMLQuantizationType, dequantize

    _, kind, rows = gguf.tensors[name]  # rows: uint8 [rows of all experts, bytes of a row]
    is_bias = len(place.shape) == 1  # a single row
    if place.heads and not is_bias:
        # Whole rows move, so the blocks inside them stay whole.
        rows = deinterleave_rows(rows, place.heads)
    # Weights that change places can only be written all together.
    num_parts = 1
    if not place.heads and not place.transposed:
        num_parts = math.ceil(math.prod(place.shape) / CHUNK)
    for part in np.array_split(rows, min(num_parts, len(rows))):
        part = np.ascontiguousarray(part)
        # 0 times an infinite scale would warn; the check below refuses it with our own message.
        with np.errstate(invalid="ignore"):
            weights = dequantize(part, GGMLQuantizationType[kind])  # float32
        if not np.isfinite(weights).all():
            problem = f"{name!r} holds NaN or infinite weights"
            raise UserError(f"{gguf.file}: {problem}; take another copy of it")
        if is_copied(gguf, name, place):
            weights = part.view("<u2")
        if place.offset:
            weights = weights - np.float32(place.offset)
        if place.heads and is_bias:
            weights = deinterleave_rows(weights[0], place.heads)
        if place.transposed:
            weights = weights.T
        yield np.ascontiguousarray(weights)
