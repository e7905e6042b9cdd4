"""What several test files share: random Llama-family checkpoints made by transformers."""

from pathlib import Path

import pytest
import torch
import transformers

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = {  # name: what differs from the smallest Llama
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_key_value_heads": 2},
    "one_kv_head": {"num_key_value_heads": 1},
    "odd_head_dim": {"head_dim": 22},
    "llama3_rope": {"rope_scaling": LLAMA3, "max_position_embeddings": 512, "rope_theta": 500_000.0},
    "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def llama(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.3, **changes):
    """A random Llama checkpoint written by transformers; returns its model, eager attention, in eval mode."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
    config = transformers.LlamaConfig(**(sizes | changes), attn_implementation="eager")
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms and biases too, so that ignoring one shows
            parameter.normal_(1.0 if "norm" in name else 0.0, std)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Length of the difference against the length of b."""
    return float((a - b).detach().norm() / b.detach().norm())
