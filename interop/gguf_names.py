"""The names of a model in a GGUF file and in a Hugging Face folder: one table for both directions.

A GGUF file names an architecture, which llama.cpp computes, and says its sizes under keys such as
`qwen2.embedding_length`. `ARCHITECTURES` has a row for each that is read and written here: the
families of families.py that it stands for, the keys that it has besides those of all (`KEYS`), and
what llama.cpp's code takes for granted, so that no key can change it. `MODULES` has the names of
modules, which all architectures share. Three things make a tensor of a file differ from the one in
the folder (`GGUFPlace`): rows of q and k in another order, a norm that is stored with 1 added, and
a matrix of GPT-2's, which the folder stores as [in, out].

interop/gguf_import.py reads by these tables. interop/gguf_export.py writes by them, reads what it
would write, and refuses what comes back as another model.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from checkpoint import hf_name, transposed
from families import Config
from model import Transformer

# {key without the architecture's name and the dot: (Llama's name in config.json, type)}
KeyTable = dict[str, tuple[str, type]]
# Keys of every architecture.
KEYS: KeyTable = {
    "context_length": ("max_position_embeddings", int),
    "embedding_length": ("hidden_size", int),
    "block_count": ("num_hidden_layers", int),
    "feed_forward_length": ("intermediate_size", int),
    "attention.head_count": ("num_attention_heads", int),
}
GROUPED: KeyTable = {"attention.head_count_kv": ("num_key_value_heads", int)}
RMS: KeyTable = {"attention.layer_norm_rms_epsilon": ("rms_norm_eps", float)}
ROTARY: KeyTable = {"rope.freq_base": ("rope_theta", float)}
LLAMA_KEYS = KEYS | GROUPED | RMS | ROTARY
EXPERTS: KeyTable = {
    "expert_count": ("num_experts", int),
    "expert_used_count": ("num_experts_per_tok", int),
}
WINDOW_KEY: KeyTable = {"attention.sliding_window": ("sliding_window", int)}
FINAL_SOFTCAP: KeyTable = {"final_logit_softcapping": ("final_logit_softcapping", float)}
# Keys of architectures with rotary positions. Code reads, writes and checks them: how many
# dimensions are rotated, and how the angles are scaled for long texts.
ROPE_KEYS = (
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)
OTHER_KEYS = ("vocab_size", "attention.key_length", "attention.value_length", "tensor_data_layout")


@dataclass(frozen=True)
class Architecture:
    """A row of `ARCHITECTURES`.

    families: model types. A file means the first one, unless gguf_import.family_of decides
    otherwise.
    keys: what config.json's settings are called in the file.
    optional: keys that a file may lack. Then the family's default holds, which is llama.cpp's too.
    fixed: settings of config.json, by Llama's names, that llama.cpp computes with in any case.
    interleaved: rows of q and k are in the order of the original Llama code (`interleave_rows`).
    own_head_dim: heads may be of any size; else together they have hidden_size dimensions.
    tied: llama.cpp loads only models whose head is (True) or is not (False) the embedding; None:
    either.
    pattern: every pattern-th layer attends to everything, the others within a window.
    hidden_scaled_depths: a Gemma of so many layers divides scores by hidden_size / heads, not by
    head_dim.
    windowless: the window is stored, and llama.cpp computes without it.
    """

    families: tuple[str, ...]
    keys: KeyTable = field(default_factory=lambda: LLAMA_KEYS)
    optional: tuple[str, ...] = ("attention.head_count_kv", "rope.freq_base")
    fixed: dict = field(default_factory=dict)
    interleaved: bool = False
    own_head_dim: bool = False
    tied: bool | None = None
    pattern: int | None = None
    hidden_scaled_depths: tuple[int, ...] = ()
    windowless: bool = False


SILU = {"hidden_act": "silu"}
TANH = {"hidden_act": "gelu_pytorch_tanh"}
NO_WINDOW = {"use_sliding_window": False}
GEMMA_OPTIONAL = (
    "attention.head_count_kv",
    "rope.freq_base",
    "attention.sliding_window",
    "final_logit_softcapping",
)

# fmt: off
ARCHITECTURES = {
    "llama": Architecture(("llama", "mistral", "mixtral"), LLAMA_KEYS | WINDOW_KEY | EXPERTS,
        optional=("attention.head_count_kv", "rope.freq_base", *WINDOW_KEY, *EXPERTS),
        fixed=SILU, interleaved=True, own_head_dim=True, windowless=True),
    "qwen2": Architecture(("qwen2",), fixed=SILU | NO_WINDOW),
    "qwen3": Architecture(("qwen3",), fixed=SILU | NO_WINDOW | {"attention_bias": False}, own_head_dim=True),
    "qwen3moe": Architecture(("qwen3_moe",),
        LLAMA_KEYS | EXPERTS | {"expert_feed_forward_length": ("moe_intermediate_size", int)},
        fixed=SILU | NO_WINDOW | {"attention_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 1,
                                  "mlp_only_layers": []},
        own_head_dim=True),
    "gemma": Architecture(("gemma",), fixed=TANH, own_head_dim=True, tied=True),
    "gemma2": Architecture(("gemma2",),
        LLAMA_KEYS | WINDOW_KEY | FINAL_SOFTCAP | {"attn_logit_softcapping": ("attn_logit_softcapping", float)},
        optional=(*GEMMA_OPTIONAL, "attn_logit_softcapping"),
        fixed=TANH, own_head_dim=True, tied=True, pattern=2, hidden_scaled_depths=(46,)),
    "gemma3": Architecture(("gemma3_text",),
        LLAMA_KEYS | WINDOW_KEY | FINAL_SOFTCAP | {"rope.freq_base_swa": ("rope_local_base_freq", float)},
        optional=(*GEMMA_OPTIONAL, "rope.freq_base_swa"),
        fixed=TANH, own_head_dim=True, pattern=6, hidden_scaled_depths=(62,)),
    "phi3": Architecture(("phi3",), LLAMA_KEYS | WINDOW_KEY,
        optional=("attention.head_count_kv", "rope.freq_base", *WINDOW_KEY),
        fixed=SILU, windowless=True),
    "olmo2": Architecture(("olmo2",), fixed=SILU | {"attention_bias": False}, tied=False),
    "smollm3": Architecture(("smollm3",),
        fixed=SILU | NO_WINDOW | {"no_rope_layer_interval": 4, "attention_bias": False, "mlp_bias": False},
        interleaved=True, own_head_dim=True),
    "gpt2": Architecture(("gpt2",),
        KEYS | {"attention.layer_norm_epsilon": ("rms_norm_eps", float)}, optional=(),
        fixed={"hidden_act": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}),
}
# fmt: on
# {family of families.py: its architecture}
ARCHITECTURE_OF: dict[str, str] = {}
for _name, _row in ARCHITECTURES.items():
    for _family in _row.families:
        ARCHITECTURE_OF[_family] = _name
# Families that llama.cpp has under a name and computes in another way, with the difference.
UNEXPORTED = {
    "gpt_neox": "llama.cpp computes GELU in its tanh form for it, the model does not",
    "falcon": "llama.cpp computes GELU in its tanh form for it, the model does not",
}

GGUF_BLOCK = "blk.{}."
# {module of model.py: its name in a file}. {} is the number of the layer; the number of an expert
# is left out.
MODULES = {
    "embed": "token_embd",
    "positions": "position_embd",
    "blocks.{}.attention_norm": GGUF_BLOCK + "attn_norm",
    "blocks.{}.attention.q": GGUF_BLOCK + "attn_q",
    "blocks.{}.attention.k": GGUF_BLOCK + "attn_k",
    "blocks.{}.attention.v": GGUF_BLOCK + "attn_v",
    "blocks.{}.attention.qkv": GGUF_BLOCK + "attn_qkv",
    "blocks.{}.attention.q_norm": GGUF_BLOCK + "attn_q_norm",
    "blocks.{}.attention.k_norm": GGUF_BLOCK + "attn_k_norm",
    "blocks.{}.attention.o": GGUF_BLOCK + "attn_output",
    "blocks.{}.attention_post_norm": GGUF_BLOCK + "post_attention_norm",
    "blocks.{}.mlp_norm": GGUF_BLOCK + "ffn_norm",
    "blocks.{}.mlp.gate": GGUF_BLOCK + "ffn_gate",
    "blocks.{}.mlp.up": GGUF_BLOCK + "ffn_up",
    "blocks.{}.mlp.gate_up": GGUF_BLOCK + "ffn_up",
    "blocks.{}.mlp.down": GGUF_BLOCK + "ffn_down",
    "blocks.{}.mlp.router": GGUF_BLOCK + "ffn_gate_inp",
    "blocks.{}.mlp.experts.{}.gate": GGUF_BLOCK + "ffn_gate_exps",
    "blocks.{}.mlp.experts.{}.up": GGUF_BLOCK + "ffn_up_exps",
    "blocks.{}.mlp.experts.{}.down": GGUF_BLOCK + "ffn_down_exps",
    "blocks.{}.mlp_post_norm": GGUF_BLOCK + "post_ffw_norm",
    "norm": "output_norm",
    "head": "output",
}
# Tensors besides the model's own: factors for the angles of Llama 3, and of LongRoPE for short and
# for long texts.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


class GGUFPlace(NamedTuple):
    """What a tensor of a GGUF file is in the folder.

    names: its Hugging Face names: one, or one an expert, whose matrices follow each other in the
    file.
    shape: in the file, in PyTorch's order: [out, in] or [experts, out, in].
    heads: the number of heads whose rows are interleaved in the file; 0 where rows keep their
    order.
    offset: the file holds the folder's weight plus this.
    transposed: the folder stores it as [in, out].
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    heads: int
    offset: float
    transposed: bool


def places(config: Config, row: Architecture) -> dict[str, GGUFPlace]:
    """Returns {name in the file: GGUFPlace} for every tensor of the model."""
    # The model has the names and shapes of its parameters; on the meta device they take no memory.
    with torch.device("meta"):
        model = Transformer(config)
    interleaved_heads = {}
    if row.interleaved:
        interleaved_heads = {"q": config.num_heads, "k": config.num_kv_heads}
    result: dict[str, GGUFPlace] = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        # blocks.3.mlp.experts.5.up: the numbers 3 and 5, of which a file's name takes the first.
        numbers = re.findall(r"\.(\d+)", module)
        generic = re.sub(r"\.\d+", ".{}", module)
        _, _, last_part = module.rpartition(".")
        gguf_name = f"{MODULES[generic].format(*numbers)}.{leaf}"
        place = GGUFPlace(
            names=(hf_name(model, name),),
            shape=tuple(parameter.shape),
            heads=interleaved_heads.get(last_part, 0),
            offset=config.norm_offset if "norm" in module else 0.0,
            transposed=transposed(model, name),
        )
        if ".experts." in name:
            place = place._replace(shape=(config.experts.count, *place.shape))
        if gguf_name in result:
            # Another expert of the same matrix.
            place = place._replace(names=result[gguf_name].names + place.names)
        result[gguf_name] = place
    return result


def interleave_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of q or k of a folder in the order of a file: [heads * head_dim, ...], the same
    shape.

    RoPE rotates pairs of dimensions. Hugging Face pairs dimension i with i + head_dim / 2. The
    original Llama code, and GGUF with it, has the two of a pair side by side: (0, 1), (2, 3), ...
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])  # [heads, 2, head_dim / 2, ...]
    return halves.swapaxes(1, 2).reshape(rows.shape)


def deinterleave_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of q or k of a file in the order of a folder: the inverse of
    `interleave_rows`."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])  # [heads, head_dim / 2, 2, ...]
    return pairs.swapaxes(1, 2).reshape(rows.shape)
