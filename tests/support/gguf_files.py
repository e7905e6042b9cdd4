"""GGUF files and tokenizers that are written by hand, and random checkpoints of each family that GGUF has."""

import io
import json
import random
import shutil
import struct
import warnings

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from support.helpers import SHARED

from common.errors import UserError

TEXT = "On 12.03.2023 she'll pay 1. rent  2. tea — naïve 東京 🙂\n\tdef f(x): return x**2\r\n   the the other"


SENTENCES = [
    TEXT,
    "the other day there were 365 days",
    "they gather the feathers together",
    "a<|im_end|>b <think> c",
    "",
]


ORDINARY, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def byte_level_tokenizer(digits=True):
    """A BPE of 300 tokens trained here: 2 control tokens, 1 user-defined one, the 256 bytes, merges."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alone = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([alone, words] if digits else [words])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = [tokenizers.AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=299,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3 + ["2023 2024 1999"] * 9, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    assert tokenizer.get_vocab_size() == 300
    return tokenizer


def bpe_fields(tokenizer, pre="smollm"):
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    kinds = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER_DEFINED}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, ORDINARY) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }


FIELDS = bpe_fields(byte_level_tokenizer())


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def encoded(weight, kind):
    """A matrix in a GGUF type. The package can't quantise the K types: those are random blocks with small scales."""
    kind = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quantize(weight, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = np.random.default_rng(0).integers(0, 256, (weight.size // block, size), dtype=np.uint8)
        scale = np.array([2e-4, 3e-4], np.float16).view(np.uint8)
        where = {"Q4_K": [0, 1, 2, 3], "Q5_K": [0, 1, 2, 3], "Q2_K": [-4, -3, -2, -1]}.get(kind.name, [-2, -1])
        blocks[:, where] = scale[: len(where)]
        return blocks.reshape(weight.shape[0], -1)


def write_gguf(path, model, kind="F32", fields=None, tensors=None, name="small"):
    """A Hugging Face Llama as a GGUF file, with llama.cpp's names and its order of q and k rows.

    kind: the type of the matrices. fields, tensors: put beside the usual ones, or left out where None.
    """
    config = model.config
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    header = {
        "general.name": name,
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    header |= FIELDS | (fields or {})
    writer = gguf.GGUFWriter(path, header.pop("general.architecture", "llama"))
    for key, value in header.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            add = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}.get(type(value))
            (add or writer.add_uint32)(key, value)
    rows = {}
    for published, weight in model.state_dict().items():
        if published == "lm_head.weight" and config.tie_word_embeddings:
            continue
        prefix, _, stem = published.removesuffix(".weight").partition("model.layers.")
        block, _, stem = stem.partition(".") if stem else ("", "", prefix)
        weight = weight.float().numpy()
        for projection, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if stem.endswith(projection):  # halves of a head interleaved, as llama.cpp's converter does it
                weight = weight.reshape(count, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        rows[(f"blk.{block}." if block else "") + NAMES[stem] + ".weight"] = weight
    for tensor, weight in (rows | (tensors or {})).items():
        if weight is not None:
            raw = kind if weight.ndim > 1 else "F32"
            data = encoded(np.ascontiguousarray(weight), raw)
            writer.add_tensor(tensor, data, raw_dtype=gguf.GGMLQuantizationType[raw])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught, warnings.catch_warnings(action="error", category=RuntimeWarning):
        call(*arguments)  # a warning would be a second line
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sentencepiece_model(prefix):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=out,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=["<think>", "▁▁▁"],
        minloglevel=2,
    )
    return out.getvalue()


def sentencepiece_fields(content, prefix=True):
    """The header's account of a sentencepiece model; llama.cpp's converter spells user-defined spaces as spaces."""
    pieces = sentencepiece_model_pb2.ModelProto.FromString(content).pieces
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": [p.piece.replace("▁", " ") if p.type == USER_DEFINED else p.piece for p in pieces],
        "tokenizer.ggml.scores": [p.score for p in pieces],
        "tokenizer.ggml.token_type": [p.type for p in pieces],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": None,
        "tokenizer.ggml.add_bos_token": None,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def blob(*fields, tensors=()):
    """A GGUF header by hand: fields as (key, type, packed value), tensors as (name, dims backwards, type, offset)."""

    def string(text):
        return struct.pack("<Q", len(text)) + text.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for key, kind, value in fields:
        out += string(key) + struct.pack("<I", kind) + value
    for name, dims, kind, offset in tensors:
        out += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return out


SIZES = {"vocab_size": 304, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}


SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


GPT2 = {"vocab_size": 304, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 1024}


IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


LLAMA3 |= {"original_max_position_embeddings": 8192}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]}


LONGROPE |= {"long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}


GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 12}  # transformers' loader knows these only


SMALL_GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 12}


CASES = {  # test id: family, its configuration's changes, whether transformers' GGUF loader can say that
    "llama": ("llama", {"head_dim": 24}, True),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, False),
    "llama, linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}, False),
    "llama, llama3 rope": ("llama", {"rope_scaling": LLAMA3, "head_dim": 32, "rope_theta": 500_000.0}, False),
    "llama, yarn": ("llama", {"rope_scaling": YARN}, False),
    "llama, sharper yarn": ("llama", {"rope_scaling": YARN | {"attention_factor": 1.3}}, False),
    "mistral": ("mistral", {"sliding_window": 200}, True),
    "mistral, no window": ("mistral", {"sliding_window": None}, True),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, False),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, True),
    "qwen2, yarn": ("qwen2", {"rope_scaling": YARN}, False),
    "qwen3": ("qwen3", {"head_dim": 128}, True),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "head_dim": 24}
        | {"norm_topk_prob": True},
        True,
    ),
    "gemma": ("gemma", {"head_dim": 24}, False),
    "gemma2": ("gemma2", GEMMA, True),
    "gemma2, other caps": (
        "gemma2",
        SMALL_GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0},
        False,
    ),
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}, True),
    "gemma3, linear rope": (
        "gemma3_text",
        SMALL_GEMMA | {"num_hidden_layers": 7, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        False,
    ),
    "gemma3, other windows": (
        "gemma3_text",
        SMALL_GEMMA | {"layer_types": ["full_attention", "sliding_attention"] * 2, "final_logit_softcapping": 15.0}
        | {"rope_local_base_freq": 5000.0},
        False,
    ),
    "phi3": ("phi3", {"sliding_window": 200}, True),
    "phi3, longrope": (
        "phi3",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 256, "rope_scaling": LONGROPE},
        False,
    ),
    "olmo2": ("olmo2", {}, False),
    "smollm3": ("smollm3", {}, False),
    "gpt2": ("gpt2", {}, True),
}  # fmt: skip


TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"


def checkpoint(folder, family, changes, std=0.3, dtype=torch.float32):
    """A random checkpoint with the 300 tokens of test_convert.py, written by transformers; returns its model."""
    settings = (GPT2 if family == "gpt2" else SIZES) | IDS | changes
    settings = transformers.CONFIG_MAPPING[family](**settings, attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = ("norm" in name or ".ln_" in name) and name.endswith("weight") and "gemma" not in family
            parameter.normal_(1.0 if norm else 0.0, std)
    model = model.to(dtype)
    model.save_pretrained(folder)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))
    return model


def tokens(vocab=304):
    return torch.arange(60).mul(7).remainder(vocab)[None]  # beyond the windows of 12


ROWS = {"gpt2": 50_257, "llama3_1": 128_256, "qwen2_5": 151_936, "qwen3": 151_936, "mistral_nemo": 131_072}


ROWS |= {"gemma3": 262_144, "llama2": 32_000}


def texts(count, special):
    """Random texts of what tells tokenizers apart, with special tokens inside."""
    pool = [
        "the",
        "  ",
        "    ",
        " ",
        "\n",
        "\n\n\n",
        "\t\t",
        "é",
        "e\u0301",
        "東京",
        "🙂",
        " YYY",
        "12345",
        "ing",
        "It's",
    ]
    pool += ["I'LL", "CamelCase", "...", "/", "ſ", "_", "नमस्ते", "\u200d", "\r\n", *special]
    rng = random.Random(0)
    for _ in range(count):
        yield "".join(rng.choice(pool) if rng.random() < 0.9 else chr(rng.randrange(32, 0x3000)) for _ in range(8))


def real(name, folder):
    """A folder with a real tokenizer and a model of one layer that has its number of rows."""
    checkpoint(folder, "llama", SMALLEST | {"vocab_size": ROWS[name], "torch_dtype": "bfloat16"})
    if name == "llama2":
        (folder / "tokenizer.json").unlink()
        shutil.copy(SHARED / "tokenizers" / "llama2_sentencepiece.model", folder / "tokenizer.model")
        settings = {"legacy": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(SHARED / "tokenizers" / name / file, folder / file)
    return folder


SMALLEST = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "tie_word_embeddings": True}


def pieces(folder, content, rows=None, **settings):
    """A folder with a sentencepiece model and a checkpoint of as many rows, or of more."""
    checkpoint(folder, "llama", SMALLEST | {"vocab_size": rows or len(ModelProto.FromString(content).pieces)})
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | settings))
    return folder


def phi3_model():
    """A sentencepiece model with Phi-3's control tokens behind the pieces, and their settings."""
    content = sentencepiece_model(True)
    first = len(ModelProto.FromString(content).pieces)
    added = {str(i): text for i, text in enumerate(["<unk>", "<s>", "</s>"])}
    added |= {str(first + i): text for i, text in enumerate(["<|endoftext|>", "<|user|>", "<|end|>"])}
    bare = ("<unk>", "<s>", "<|endoftext|>")
    rules = {"lstrip": False, "normalized": False, "single_word": False, "special": True}
    decoder = {i: {"content": text, "rstrip": text not in bare} | rules for i, text in added.items()}
    return content, first + 3, decoder


import torch
from transformers import LlamaConfig, LlamaForCausalLM

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def llama(**changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL | changes)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15) if parameter.dim() > 1 else parameter.data.uniform_(0.5, 1.5)
    return model
