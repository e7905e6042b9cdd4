"""What a model is called in a GGUF file and in a Hugging Face folder: one table for both directions.

A GGUF file names an architecture, which llama.cpp computes, and says its sizes under keys such as
`qwen2.embedding_length`. `ARCHITECTURES` has a row for each that is read and written here: the families of families.py
that it stands for, the keys that it knows beside those of all (`KEYS`), and what llama.cpp's code takes for granted
and no key can change. `MODULES` has the names of tensors, which all architectures share. Three things make a tensor of
a file differ from the published one (`Place`): rows of q and k in another order, a norm that is stored with 1 added,
and a matrix of GPT-2's, which is published as [in, out].

interop/gguf_import.py reads by these tables; interop/gguf_export.py writes by them, reads what it would write, and
refuses what comes back as another model.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from checkpoint import hf_name, transposed
from families import Config
from model import Transformer

# keys of every architecture, after its name and a dot: Llama's names in config.json
KEYS = {
    "context_length": ("max_position_embeddings", int),
    "embedding_length": ("hidden_size", int),
    "block_count": ("num_hidden_layers", int),
    "feed_forward_length": ("intermediate_size", int),
    "attention.head_count": ("num_attention_heads", int),
}
GROUPED = {"attention.head_count_kv": ("num_key_value_heads", int)}
RMS = {"attention.layer_norm_rms_epsilon": ("rms_norm_eps", float)}
ROTARY = {"rope.freq_base": ("rope_theta", float)}
LLAMA = KEYS | GROUPED | RMS | ROTARY
EXPERTS = {"expert_count": ("num_experts", int), "expert_used_count": ("num_experts_per_tok", int)}
WINDOW = {"attention.sliding_window": ("sliding_window", int)}
FINAL_SOFTCAP = {"final_logit_softcapping": ("final_logit_softcapping", float)}
# Read, written and checked in code, where the architecture is rotary: how angles are stretched, and how far they go
ROPE_KEYS = (
    *("rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.finetuned", "rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor"),
    *("rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
)
OTHER_KEYS = ("vocab_size", "attention.key_length", "attention.value_length", "tensor_data_layout")


@dataclass(frozen=True)
class Architecture:
    """A row. `optional` are keys that a file may lack: then the family's default counts, which is llama.cpp's too."""

    families: tuple[str, ...]  # model types; a file means the first but where gguf_in.family_of says otherwise
    keys: dict[str, tuple[str, type]] = field(default_factory=lambda: LLAMA)
    optional: tuple[str, ...] = ("attention.head_count_kv", "rope.freq_base")
    fixed: dict = field(default_factory=dict)  # of config.json, by Llama's names: what llama.cpp computes in any case
    turned: bool = False  # rows of q and k lie as in the original Llama code (`turn_rows`)
    own_head_dim: bool = False  # heads may be of any size; else they share hidden_size
    tied: bool | None = None  # llama.cpp loads only models whose head is (or is not) the embedding; None: either
    pattern: int | None = None  # every such layer sees everything, the others through a window
    big: tuple[int, ...] = ()  # a Gemma of so many layers divides scores by hidden_size / heads, not by head_dim
    windowless: bool = False  # the window is stored, and llama.cpp does without it


SILU, TANH = {"hidden_act": "silu"}, {"hidden_act": "gelu_pytorch_tanh"}
NO_WINDOW = {"use_sliding_window": False}
GEMMA_OPTIONAL = ("attention.head_count_kv", "rope.freq_base", "attention.sliding_window", "final_logit_softcapping")

# fmt: off
ARCHITECTURES = {
    "llama": Architecture(("llama", "mistral", "mixtral"), LLAMA | WINDOW | EXPERTS,
        optional=("attention.head_count_kv", "rope.freq_base", *WINDOW, *EXPERTS),
        fixed=SILU, turned=True, own_head_dim=True, windowless=True),
    "qwen2": Architecture(("qwen2",), fixed=SILU | NO_WINDOW),
    "qwen3": Architecture(("qwen3",), fixed=SILU | NO_WINDOW | {"attention_bias": False}, own_head_dim=True),
    "qwen3moe": Architecture(("qwen3_moe",),
        LLAMA | EXPERTS | {"expert_feed_forward_length": ("moe_intermediate_size", int)},
        fixed=SILU | NO_WINDOW | {"attention_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 1,
                                  "mlp_only_layers": []},
        own_head_dim=True),
    "gemma": Architecture(("gemma",), fixed=TANH, own_head_dim=True, tied=True),
    "gemma2": Architecture(("gemma2",),
        LLAMA | WINDOW | FINAL_SOFTCAP | {"attn_logit_softcapping": ("attn_logit_softcapping", float)},
        optional=(*GEMMA_OPTIONAL, "attn_logit_softcapping"),
        fixed=TANH, own_head_dim=True, tied=True, pattern=2, big=(46,)),
    "gemma3": Architecture(("gemma3_text",),
        LLAMA | WINDOW | FINAL_SOFTCAP | {"rope.freq_base_swa": ("rope_local_base_freq", float)},
        optional=(*GEMMA_OPTIONAL, "rope.freq_base_swa"),
        fixed=TANH, own_head_dim=True, pattern=6, big=(62,)),
    "phi3": Architecture(("phi3",), LLAMA | WINDOW,
        optional=("attention.head_count_kv", "rope.freq_base", *WINDOW),
        fixed=SILU, windowless=True),
    "olmo2": Architecture(("olmo2",), fixed=SILU | {"attention_bias": False}, tied=False),
    "smollm3": Architecture(("smollm3",),
        fixed=SILU | NO_WINDOW | {"no_rope_layer_interval": 4, "attention_bias": False, "mlp_bias": False},
        turned=True, own_head_dim=True),
    "gpt2": Architecture(("gpt2",),
        KEYS | {"attention.layer_norm_epsilon": ("rms_norm_eps", float)}, optional=(),
        fixed={"hidden_act": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}),
}
# fmt: on
ARCHITECTURE_OF = {family: name for name, row in ARCHITECTURES.items() for family in row.families}
UNEXPORTED = {  # families that llama.cpp has under a name and computes otherwise
    "gpt_neox": "llama.cpp computes GELU by its tanh form in it, the model does not",
    "falcon": "llama.cpp computes GELU by its tanh form in it, the model does not",
}

BLOCK = "blk.{}."
MODULES = {  # a module of ours: its name in a file; {} is the number of the layer, an expert's number is left out
    "embed": "token_embd",
    "positions": "position_embd",
    "blocks.{}.attention_norm": BLOCK + "attn_norm",
    "blocks.{}.attention.q": BLOCK + "attn_q",
    "blocks.{}.attention.k": BLOCK + "attn_k",
    "blocks.{}.attention.v": BLOCK + "attn_v",
    "blocks.{}.attention.qkv": BLOCK + "attn_qkv",
    "blocks.{}.attention.q_norm": BLOCK + "attn_q_norm",
    "blocks.{}.attention.k_norm": BLOCK + "attn_k_norm",
    "blocks.{}.attention.o": BLOCK + "attn_output",
    "blocks.{}.attention_post_norm": BLOCK + "post_attention_norm",
    "blocks.{}.mlp_norm": BLOCK + "ffn_norm",
    "blocks.{}.mlp.gate": BLOCK + "ffn_gate",
    "blocks.{}.mlp.up": BLOCK + "ffn_up",
    "blocks.{}.mlp.gate_up": BLOCK + "ffn_up",
    "blocks.{}.mlp.down": BLOCK + "ffn_down",
    "blocks.{}.mlp.router": BLOCK + "ffn_gate_inp",
    "blocks.{}.mlp.experts.{}.gate": BLOCK + "ffn_gate_exps",
    "blocks.{}.mlp.experts.{}.up": BLOCK + "ffn_up_exps",
    "blocks.{}.mlp.experts.{}.down": BLOCK + "ffn_down_exps",
    "blocks.{}.mlp_post_norm": BLOCK + "post_ffw_norm",
    "norm": "output_norm",
    "head": "output",
}
# beside the model's own: factors for the angles of Llama 3, and of LongRoPE for short and long texts
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


class Place(NamedTuple):
    """What a tensor of a GGUF file is in the folder."""

    names: tuple[str, ...]  # published: one, or one an expert, whose matrices then lie one after the other
    shape: tuple[int, ...]  # in the file, as PyTorch counts: [out, in] or [experts, out, in]
    heads: int  # whose rows are turned; 0 where rows keep their order
    offset: float  # the file holds the published weight plus this
    transposed: bool  # published as [in, out]


def places(config: Config, row: Architecture) -> dict[str, Place]:
    """{name in the file: Place} of each tensor of the model."""
    with torch.device("meta"):
        model = Transformer(config)
    turned = {"q": config.num_heads, "k": config.num_kv_heads} if row.turned else {}
    found: dict[str, Place] = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        numbers = re.findall(r"\.(\d+)", module)
        generic = re.sub(r"\.\d+", ".{}", module)
        theirs = f"{MODULES[generic].format(*numbers)}.{leaf}"
        place = Place(
            names=(hf_name(model, name),),
            shape=tuple(parameter.shape),
            heads=turned.get(module.rpartition(".")[2], 0),
            offset=config.norm_offset if "norm" in module else 0.0,
            transposed=transposed(model, name),
        )
        if ".experts." in name:
            place = place._replace(shape=(config.experts.count, *place.shape))
        found[theirs] = place._replace(names=found[theirs].names + place.names) if theirs in found else place
    return found


def turn_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k of a folder in the order of a file: [heads * head_dim, ...] to the same shape.

    RoPE turns pairs of dimensions. Hugging Face pairs dimension i with i + head_dim / 2; the original Llama code, and
    GGUF with it, has them side by side: (0, 1), (2, 3), ...
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])  # [heads, 2, head_dim / 2, ...]
    return halves.swapaxes(1, 2).reshape(rows.shape)


def original_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k of a file in the order of a folder: what `turn_rows` does, undone."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])  # [heads, head_dim / 2, 2, ...]
    return pairs.swapaxes(1, 2).reshape(rows.shape)
