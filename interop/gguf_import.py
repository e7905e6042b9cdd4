"""GGUF in: a llama.cpp file is made a Hugging Face folder once, and the rest of the house reads nothing else.

`interop/gguf_reader.py` reads the container, `interop/gguf_names.py` says what its parts are called,
`interop/gguf_tokenizer.py` makes the tokenizer. Here a file's keys become config.json (`config_json`), which
families.py then judges as it judges anybody's, and its tensors model.safetensors. A file means what llama.cpp computes
from it: where its code takes something for granted (Gemma's windows, the divisor of its scores, Qwen3's expert
weights), config.json says it. What is not known here is refused by name and never left out in silence.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.console import print_stderr
from common.errors import UserError
from common.files import atomic_folder, file_sha256, write_json
from families import FAMILIES, MAX_LAYERS, Config
from interop.gguf_names import (
    ARCHITECTURES,
    EXPERTS,
    OTHER_KEYS,
    ROPE_KEYS,
    ROPE_TENSORS,
    ROTARY,
    Architecture,
    Place,
    original_rows,
    places,
)
from interop.gguf_reader import Gguf, read_gguf
from interop.gguf_tokenizer import special_ids, tokenizer_files

CHUNK = 1 << 24  # weights that are made float32 at a time: 64 MB


def gguf_to_folder(file: str | Path, folder: str | Path) -> None:
    """Converts a GGUF file of a known architecture into a new Hugging Face folder, written aside, renamed when whole.

    file: as `read_gguf` takes it. F32, F16 and BF16 are copied bit for bit (Gemma's norms less the 1 that is added to
        them there). Blocks become float32: a scale times a code, plus a minimum, needs more bits than a 16-bit float
        has, and the folder is to give the file's own logits, not nearly those.
    folder: must not exist. Gets config.json, model.safetensors, tokenizer.json (byte-level BPE) or tokenizer.model
        (sentencepiece), tokenizer_config.json, generation_config.json, and source.json, which says what it was made of.
    Raises UserError, with nothing left behind, for a file that is damaged, cut, alien, not supported, or whose weights
    are not all finite.
    """
    file, folder = Path(file), Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    gguf = read_gguf(file)
    config = config_json(gguf)
    plan = matched(gguf, Config.from_hf(config, str(file)))
    source = {"file": file.name, "sha256": file_sha256(file)}
    source |= {key: gguf.fields.get(f"general.{key}") for key in ("name", "license")}
    source["tensor_types"] = Counter(sorted(tensor.kind for tensor in gguf.tensors.values()))
    documents = {"config.json": config, "source.json": source} | tokenizer_files(gguf)
    print_stderr(f"converting {file} into {folder}")
    with atomic_folder(folder) as tmp:
        for name, content in documents.items():
            if isinstance(content, bytes):
                (tmp / name).write_bytes(content)
            else:
                write_json(content, tmp / name)
        write_weights(gguf, plan, tmp / "model.safetensors")


# ---- config.json ----

NONE_AT_ZERO = ("attention.sliding_window", "expert_count", "final_logit_softcapping")  # 0 says that there is none


def config_json(gguf: Gguf) -> dict:
    """config.json in the dialect of transformers 4 (rope_theta, rope_scaling, torch_dtype), which 5 reads as well.

    Of the tensors only names, shapes and types are looked at. Raises UserError on an architecture, a key or a value
    that can't be said in a config.json of ours.
    """
    architecture = gguf.field("general.architecture", str)
    row = ARCHITECTURES.get(architecture)
    if row is None:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{gguf.file}: its architecture is {architecture!r}; those that can be converted are {known}")
    if gguf.fields.get("general.type", "model") != "model":
        raise UserError(f"{gguf.file}: holds {gguf.fields['general.type']!r}, not a model")
    if gguf.fields.get("split.count", 1) != 1:
        raise UserError(f"{gguf.file}: is a part of a model; join the parts first (llama-gguf-split --merge)")
    rotary = "rope.freq_base" in row.keys
    known = {*row.keys, *OTHER_KEYS, *(ROPE_KEYS if rotary else ())}
    known |= {"attention.sliding_window_pattern"} if row.pattern else set()
    for key in sorted(gguf.fields):
        if key.startswith(f"{architecture}.") and key.removeprefix(f"{architecture}.") not in known:
            raise UserError(f"{gguf.file}: uses {key!r}, which is not supported")
    name = family_of(gguf, row)
    family = FAMILIES[name]
    config = {"architectures": [family.architecture], "model_type": name}
    config["vocab_size"] = len(gguf.field("tokenizer.ggml.tokens", list))
    optional = {*row.optional} - ({*EXPERTS} if name == "mixtral" else set())
    for suffix, (key, kind) in row.keys.items():
        found = gguf.fields.get(f"{architecture}.{suffix}")
        none = found == 0 and suffix in NONE_AT_ZERO and architecture != "gemma2"  # which has a window and a cap
        if suffix in optional and (found is None or none):
            continue
        config[key] = gguf.field(f"{architecture}.{suffix}", kind)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)  # llama.cpp's default, which is not every family's
    head_dim = head_size(gguf, architecture, row, hidden, heads)
    if row.own_head_dim:
        config["head_dim"] = head_dim
    config |= {key: value for key, value in row.fixed.items()}
    config["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    if row.tied is not None and config["tie_word_embeddings"] is not row.tied:
        raise UserError(f"{gguf.file}: {'has' if row.tied else 'lacks'} output.weight, unlike {architecture} models")
    if name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in gguf.tensors
    if row.pattern:
        config |= gemma_layers(gguf, architecture, row, config, head_dim)
    if rotary:
        bases = [key for key, _ in row.keys.values() if key in ("rope_theta", "rope_local_base_freq")]
        config = dict.fromkeys(bases, 10_000.0) | config  # llama.cpp's default, which is not every family's
        config |= rope_settings(gguf, architecture, config, head_dim)
    ids = special_ids(gguf)
    # No pad_token_id: transformers would make it the embedding's padding_idx, whose row gets no gradient, and
    # chat models often pad with their end token. It stands in generation_config.json.
    config |= {"bos_token_id": ids.get("bos"), "eos_token_id": ids["eos"]}
    matrices = {tensor.kind for tensor in gguf.tensors.values() if len(tensor.shape) > 1}
    config["torch_dtype"] = {("F16",): "float16", ("BF16",): "bfloat16"}.get(tuple(matrices), "float32")
    return {family.keys.get(key, key): value for key, value in config.items()}


def family_of(gguf: Gguf, row: Architecture) -> str:
    """The model type that a file means. llama.cpp knows no sliding window under the name llama, and computes Mistral
    without; files of ours note it, so that it is not lost."""
    if row.families[0] == "llama":
        if gguf.fields.get("llama.expert_count"):
            return "mixtral"
        if gguf.fields.get("llama.attention.sliding_window"):
            return "mistral"
    return row.families[0]


def head_size(gguf: Gguf, architecture: str, row: Architecture, hidden: int, heads: int) -> int:
    """Dimensions of a head; UserError where keys and values differ, or llama.cpp would not load such heads."""
    key_length = gguf.field(f"{architecture}.attention.key_length", int, max(1, hidden // heads))
    value_length = gguf.field(f"{architecture}.attention.value_length", int, key_length)
    if key_length != value_length or (not row.own_head_dim and key_length * heads != hidden):
        raise UserError(
            f"{gguf.file}: {heads} heads with keys of {key_length} and values of {value_length} in {hidden} dimensions"
            f" do not make a model of {architecture}"
        )
    return key_length


def gemma_layers(gguf: Gguf, architecture: str, row: Architecture, config: dict, head_dim: int) -> dict:
    """What llama.cpp's code knows of Gemma 2 and 3: which layers see through a window, and what divides the scores."""
    depth, key = config["num_hidden_layers"], f"{architecture}.attention.sliding_window_pattern"
    if depth > MAX_LAYERS:
        return {}  # from_hf says it
    pattern = gguf.fields.get(key, row.pattern)
    if type(pattern) is list:
        if len(pattern) != depth or {*map(type, pattern)} != {bool}:
            raise UserError(f"{gguf.file}: {key} is no list of {depth} truths")
        slides = pattern
    elif type(pattern) is int and 0 < pattern < 2**31:
        slides = [bool((i + 1) % pattern) for i in range(depth)]
    else:
        raise UserError(f"{gguf.file}: {key} can't be {str(pattern)[:40]}")
    if architecture == "gemma3" and "sliding_window" not in config:
        slides = [False] * depth
    divisor = config["hidden_size"] // config["num_attention_heads"] if depth in row.big else head_dim
    types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return {"layer_types": types, "query_pre_attn_scalar": divisor}


# ---- rotary positions ----

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_settings(gguf: Gguf, architecture: str, config: dict, head_dim: int) -> dict:
    """`rope_scaling` and what belongs to it; UserError for a kind that can't be said exactly."""
    prefix = f"{architecture}.rope.scaling."
    theta = config["rope_theta"]
    dim = gguf.field(f"{architecture}.rope.dimension_count", int, head_dim)
    settings: dict = {"rope_scaling": None}
    if dim != head_dim:
        if not FAMILIES[config["model_type"]].partial_rope or int(head_dim * (dim / head_dim)) != dim or dim > head_dim:
            raise UserError(f"{gguf.file}: RoPE over {dim} of {head_dim} dimensions is not supported in {architecture}")
        settings["partial_rotary_factor"] = dim / head_dim
    positions = config["max_position_embeddings"]
    original = gguf.field(f"{prefix}original_context_length", int, positions)
    if config["model_type"] == "phi3":
        settings["original_max_position_embeddings"] = original
    scaled = f"{prefix}factor" in gguf.fields
    kind = gguf.field(f"{prefix}type", str, "linear" if scaled else "none")
    freqs, short, long = (gguf.tensors.get(name) for name in ROPE_TENSORS)
    if short is not None and long is not None and kind in ("none", "longrope") and freqs is None:
        kind = "longrope"
    elif short is not None or long is not None:
        raise UserError(f"{gguf.file}: RoPE scaling {kind!r} and factors for LongRoPE are not supported together")
    if freqs is not None and kind != "none":
        raise UserError(f"{gguf.file}: RoPE scaling {kind!r} and rope_freqs.weight are not supported together")
    if kind not in ("yarn", "longrope") and f"{prefix}attn_factor" in gguf.fields:
        raise UserError(f"{gguf.file}: uses '{prefix}attn_factor' without YaRN or LongRoPE, which is not supported")
    match kind:
        case "none" if freqs is not None:
            settings["rope_scaling"] = llama3_scaling(gguf, dim, theta)
        case "none":
            pass
        case "linear" if gguf.field(f"{prefix}factor", float, 1.0) == 1.0:
            pass
        case "linear":
            settings["rope_scaling"] = {"rope_type": "linear", "factor": gguf.field(f"{prefix}factor", float)}
        case "yarn":
            settings["rope_scaling"] = yarn_scaling(gguf, prefix, original)
        case "longrope" if scaled or short is None:
            raise UserError(f"{gguf.file}: LongRoPE without two lists of factors, or with one factor, is not supported")
        case "longrope":
            tables = {}
            for name, tensor in (("short_factor", short), ("long_factor", long)):
                tables[name] = rope_factors(gguf, f"rope_factors_{name[:-7]}.weight", tensor, dim)
            ratio = positions / original
            sharper = math.sqrt(1 + math.log(ratio) / math.log(original)) if min(ratio, original) > 1 else 1.0
            found = gguf.field(f"{prefix}attn_factor", float, 1.0)
            scaling = {"rope_type": "longrope", "type": "longrope"} | tables
            settings["original_max_position_embeddings"] = original
            settings["rope_scaling"] = scaling | ({} if close(found, sharper) else {"attention_factor": found})
        case _:
            raise UserError(f"{gguf.file}: RoPE scaling {kind!r} is not supported")
    return settings


def close(a: float, b: float) -> bool:
    """Whether a float32 of a file says the same as a float64 of ours."""
    return math.isclose(a, b, rel_tol=1e-6)


def rope_factors(gguf: Gguf, name: str, tensor, dim: int) -> list[float]:
    """A tensor of factors, F32 [dim / 2], each printed as shortly as float32 allows."""
    if (tensor.kind, tensor.shape) != ("F32", (dim // 2,)):
        raise UserError(f"{gguf.file}: {name} is {tensor.kind} {list(tensor.shape)}, not F32 [{dim // 2}]")
    return [float(str(factor)) for factor in tensor.rows.view("<f4")[0]]


def llama3_scaling(gguf: Gguf, dim: int, theta: float) -> dict | None:
    """Llama 3's scaling arrives as rope_freqs.weight, F32 [dim / 2]: what each wavelength is multiplied with.

    The four parameters behind it can't all be found from it, but Meta published three of them for every model so far.
    So the fourth, the largest factor, is read off and the whole tensor checked against them.
    """
    factors = np.array(rope_factors(gguf, "rope_freqs.weight", gguf.tensors["rope_freqs.weight"], dim))
    if (factors == 1).all():
        return None
    low, high, length = LLAMA3_ROPE.values()
    turns = length / (2 * math.pi * theta ** (np.arange(0, dim, 2) / dim))  # in the original context
    share = np.clip((turns - low) / (high - low), 0, 1)  # of the unscaled frequency
    factor = float(factors.max())
    if not (1 <= factor < math.inf and np.allclose(factors * ((1 - share) / factor + share), 1, rtol=0, atol=1e-4)):
        raise UserError(f"{gguf.file}: rope_freqs.weight is not Llama 3's scaling of 8192 positions; not supported")
    return {"rope_type": "llama3", "factor": factor} | LLAMA3_ROPE


def yarn_scaling(gguf: Gguf, prefix: str, original: int) -> dict:
    """llama.cpp computes YaRN with its paper's own numbers in these architectures, whatever keys say otherwise; only
    the factor of the scores can be another."""
    factor = gguf.field(f"{prefix}factor", float)
    sharper = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    taken = {"yarn_ext_factor": (1.0,), "yarn_beta_fast": (32.0,), "yarn_beta_slow": (1.0,)}
    for key, fine in (taken | {"yarn_attn_factor": (1.0, sharper)}).items():
        found = gguf.fields.get(prefix + key, fine[0])
        if type(found) is not float or not any(close(found, value) for value in fine):
            raise UserError(f"{gguf.file}: {prefix}{key} is {str(found)[:40]}, {fine[-1]:g} is supported")
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    extra = gguf.field(f"{prefix}attn_factor", float, 1.0)
    return scaling | ({} if close(extra, 1.0) else {"attention_factor": sharper * extra})


# ---- weights ----


def matched(gguf: Gguf, config: Config) -> dict[str, Place]:
    """The places of the model's tensors, each found in the file with the shape that its keys ask for."""
    architecture = gguf.fields["general.architecture"]
    if config.num_layers > len(gguf.tensors):  # so that no time goes into building a model that is not there
        raise UserError(f"{gguf.file}: holds {len(gguf.tensors)} tensors, too few for {config.num_layers} layers")
    plan = places(config, ARCHITECTURES[architecture])
    if missing := [name for name in plan if name not in gguf.tensors]:
        raise UserError(f"{gguf.file}: {len(missing)} tensors are missing, the first is {missing[0]}")
    factors = ROPE_TENSORS if ROTARY.items() <= ARCHITECTURES[architecture].keys.items() else ()
    if extra := sorted(gguf.tensors.keys() - plan.keys() - {*factors}):
        layers = f"{config.num_layers} layers"
        raise UserError(f"{gguf.file}: holds {extra[0]!r}, which a model of {architecture} of {layers} does not have")
    for name, place in plan.items():
        if (found := gguf.tensors[name].shape) != place.shape:
            raise UserError(f"{gguf.file}: {name} has shape {list(found)}; its header asks for {list(place.shape)}")
    return plan


def write_weights(gguf: Gguf, plan: dict[str, Place], path: Path) -> None:
    """Writes model.safetensors a part of a tensor at a time, since the whole model in float32 may not fit into memory.

    The format: the length of a JSON header in 8 bytes, the header with each tensor's dtype, shape and place, the data.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, place in plan.items():
        dtype, width = (gguf.tensors[name].kind, 2) if is_copied(gguf, name, place) else ("F32", 4)
        shape = place.shape[1:] if len(place.names) > 1 or len(place.shape) > 2 else place.shape
        for published in place.names:
            start, end = end, end + width * math.prod(shape)
            shown = shape[::-1] if place.transposed else shape
            header[published] = {"dtype": dtype, "shape": shown, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, place in plan.items():
            out.writelines(weights.data for weights in published_weights(gguf, name, place))


def is_copied(gguf: Gguf, name: str, place: Place) -> bool:
    """Whether a tensor keeps its 16 bits: else it becomes float32."""
    return gguf.tensors[name].kind in ("F16", "BF16") and not place.offset


def published_weights(gguf: Gguf, name: str, place: Place) -> Iterator[np.ndarray]:
    """A tensor of the file as the folder has it, contiguous, in parts of whole rows: float32, or the 16 bits of it."""
    from gguf import GGMLQuantizationType, dequantize

    _, kind, rows = gguf.tensors[name]  # rows: uint8 [rows of all experts, bytes of a row]
    whole = place.heads or place.transposed  # rows change places, so none can go ahead
    bias = len(place.shape) == 1  # a single row
    if place.heads and not bias:
        rows = original_rows(rows, place.heads)  # whole rows move, so blocks inside them stay whole
    count = 1 if whole else -(-math.prod(place.shape) // CHUNK)
    for part in np.array_split(rows, min(count, len(rows))):
        part = np.ascontiguousarray(part)
        with np.errstate(invalid="ignore"):  # 0 times an infinite scale: refused below, in our words
            weights = dequantize(part, GGMLQuantizationType[kind])  # float32
        if not np.isfinite(weights).all():
            raise UserError(f"{gguf.file}: {name!r} holds NaN or infinite weights; take another copy of it")
        if is_copied(gguf, name, place):
            weights = part.view("<u2")
        if place.offset:
            weights = weights - np.float32(place.offset)
        if place.heads and bias:
            weights = original_rows(weights[0], place.heads)
        if place.transposed:
            weights = weights.T
        yield np.ascontiguousarray(weights)
