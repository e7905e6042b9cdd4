"""The families' cases: a random configuration of each, and what switching off one of its features means."""

import dataclasses

import torch
from torch import nn

from families import RopeConfig

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4}


SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def per_layer(**changes):
    """Layers of the configuration, as they are or by a function of the layer."""

    def off(model):
        layers = [
            dataclasses.replace(layer, **{k: v(layer) if callable(v) else v for k, v in changes.items()})
            for layer in model.config.layers
        ]
        model.config = dataclasses.replace(model.config, layers=tuple(layers))
        for block, layer in zip(model.blocks, layers, strict=True):
            block.attention.scores = block.attention.scores._replace(window=layer.window, scale=layer.scale)

    return off


def config(**changes):
    def off(model):
        model.config = dataclasses.replace(model.config, **changes)

    return off


def zero(*endings):
    def off(model):
        with torch.no_grad():
            found = [p.zero_() for name, p in model.named_parameters() if name.endswith(endings)]
        assert found

    return off


def without(*names):
    """Modules of a block become the identity."""

    def off(model):
        for block in model.blocks:
            for name in names:
                parent, _, leaf = name.rpartition(".")
                owner = block.get_submodule(parent)
                assert hasattr(owner, leaf)
                setattr(owner, leaf, nn.Identity())

    return off


def attribute(kind: str, name: str, value):
    """An attribute of all modules of one class."""

    def off(model):
        found = [m for m in model.modules() if type(m).__name__ == kind]
        assert found
        for module in found:
            setattr(module, name, value)

    return off


def softcap_off(model):
    for block in model.blocks:
        block.attention.scores = block.attention.scores._replace(softcap=None)


def plain_rope(model):
    ropes = tuple(dataclasses.replace(rope, scaling=None) for rope in model.config.ropes)
    model.config = dataclasses.replace(model.config, ropes=ropes)


def whole_rope(model):
    rope = model.config.ropes[0]
    assert rope.dim < model.config.head_dim
    model.config = dataclasses.replace(model.config, ropes=(RopeConfig(rope.theta, model.config.head_dim, None),))


def experts(**changes):
    def off(model):
        for module in model.modules():
            if hasattr(module, "router"):
                module.rules = dataclasses.replace(module.rules, **changes)

    return off


def sequential(model):
    for block in model.blocks:
        block.parallel, block.mlp_norm = False, block.attention_norm


WINDOW = {"sliding window": per_layer(window=None)}


NO_OFFSET = attribute("RMSNorm", "offset", 0.0)


BIAS = {"bias of q, k, v": zero(".q.bias", ".k.bias", ".v.bias", ".qkv.bias")}


HEAD_NORM = {"qk-norm": attribute("Attention", "qk_norm", None)}


CASES = {  # test id: family, its configuration's changes, features to switch off
    "llama": ("llama", {"head_dim": 24}, {"rotary": per_layer(rope=None)}),
    "llama, biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True},
        BIAS | {"bias of o": zero("attention.o.bias"), "bias of mlp": zero("mlp.down.bias", "mlp.up.bias")},
    ),
    "llama, llama3 rope": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {"scaling": plain_rope},
    ),
    "llama, linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}, {"scaling": plain_rope}),
    "llama, dynamic rope": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 40},
        {"scaling": plain_rope},
    ),
    "llama, yarn": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {"scaling": plain_rope},
    ),
    "llama, yarn, all keys": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7,
                "mscale_all_dim": 1.1, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False,
            }
        },
        {"scaling": plain_rope},
    ),
    "mistral": ("mistral", {"sliding_window": 11}, WINDOW),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, BIAS),
    "qwen2, windows above": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        BIAS | WINDOW | {"full layers below": per_layer(window=9)},
    ),
    "qwen3": ("qwen3", {"head_dim": 24}, HEAD_NORM),
    "gemma": (
        "gemma",
        {"head_dim": 24, "hidden_act": "gelu"},  # as the released files say it and do not mean it
        {"norm offset": NO_OFFSET, "embedding scale": config(embed_scale=1.0)},
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 24, "sliding_window": 12, "query_pre_attn_scalar": 40, "attn_logit_softcapping": 5.0}
        | {"final_logit_softcapping": 20.0},
        WINDOW
        | {
            "soft-cap of attention": softcap_off,
            "soft-cap of logits": config(logit_softcap=None),
            "embedding scale": config(embed_scale=1.0),
            "alternating windows": per_layer(window=12),
            "norm offset": NO_OFFSET,
            "norms after": without("attention_post_norm", "mlp_post_norm"),
            "query_pre_attn_scalar": per_layer(scale=24**-0.5),
            "gelu": attribute("MLP", "activation", "silu"),
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 24, "sliding_window": 12, "query_pre_attn_scalar": 40, "num_hidden_layers": 7}
        | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        WINDOW
        | HEAD_NORM
        | {
            "two rope bases": per_layer(rope=0),
            "rope scaling of full layers": plain_rope,
            "norm offset": NO_OFFSET,
            "norms after": without("attention_post_norm", "mlp_post_norm"),
            "embedding scale": config(embed_scale=1.0),
        },
    ),
    "phi3": (
        "phi3",
        {"sliding_window": 13},
        WINDOW | {"order of fused rows": attribute("Attention", "layout", "grouped")},
    ),
    "phi3, longrope, partial": (
        "phi3",
        {
            "partial_rotary_factor": 0.75, "original_max_position_embeddings": 40,
            "rope_scaling": {
                "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            },
        },
        {"scaling": plain_rope, "partial rotary": whole_rope},
    ),
    "olmo2": (
        "olmo2",
        {},
        HEAD_NORM | {"norms after": without("attention_post_norm", "mlp_post_norm")},
    ),
    "smollm3": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 10},
        WINDOW | {"layers without rope": per_layer(rope=0)},
    ),
    "gpt2": (
        "gpt2",
        {},
        BIAS
        | {
            "learned positions": zero("positions.weight"),
            "norm bias": zero("norm.bias"),
            "order of fused rows": attribute("Attention", "layout", "grouped"),
        },
    ),
    "gpt2, scales by layer": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_inner": 100},
        {"scale by layer": per_layer(scale=16**-0.5)},
    ),
    "gpt_neox": (
        "gpt_neox",
        {"rotary_pct": 0.5, "rotary_emb_base": 5000},
        BIAS
        | {
            "parallel residual": attribute("Block", "parallel", False),
            "partial rotary": whole_rope,
            "order of fused rows": attribute("Attention", "layout", "stacked"),
        },
    ),
    "gpt_neox, in a row": (
        "gpt_neox",
        {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
        {"residual in a row": attribute("Block", "parallel", True)},
    ),
    "falcon 7B": ("falcon", {"multi_query": True, "parallel_attn": True}, {"parallel residual": sequential}),
    "falcon 40B": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        BIAS
        | {
            "order of fused rows": attribute("Attention", "layout", "stacked"),
            "two norms": attribute("Block", "shared", True),
        },
    ),
    "falcon 11B": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}, {}),
    "falcon, in a row": ("falcon", {"multi_query": False, "parallel_attn": False}, {}),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 14},
        WINDOW | {"weights sum to one": experts(normalised=False), "two experts a token": experts(active=1)},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 24}
        | {"mlp_only_layers": [0], "norm_topk_prob": False},
        HEAD_NORM | {"weights as they are": experts(normalised=True), "two experts a token": experts(active=1)},
    ),
    "qwen3_moe, every other": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 16}
        | {"decoder_sparse_step": 2, "norm_topk_prob": True},
        {"weights sum to one": experts(normalised=False)},
    ),
}  # fmt: skip
