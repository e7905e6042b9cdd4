"""What a run will take, before it is begun: floating point operations a token, memory at the peak, time.

The counts are of the products, which is nearly all; the speed is that of one product, timed on the machine.
"""

import time

import torch

from kernels.attention import SHORT
from model import Transformer, quantized

RUNTIME_BYTES = 1.2e9  # of Python, torch, and the products that oneDNN has prepared (loading.py); measured
EFFICIENCY = 0.55  # of a training step, against products alone


def flops_a_token(model: Transformer) -> float:
    """Products of one training step, a token: 2 a weight forward, 2 for the inputs' gradient, 2 where it is trained.
    Attention is left out; the head counts for every token."""
    total, experts = 0.0, model.config.experts
    sizes = [(name, p.numel(), p.requires_grad) for name, p in model.named_parameters() if p.dim() == 2]
    sizes = [each for each in sizes if not each[0].startswith(("embed.", "positions.")) and ".nf4." not in each[0]]
    sizes += [(name, m.in_features * m.out_features, False) for name, m in quantized(model).items()]
    for name, size, trained in sizes:
        total += (experts.active / experts.count if ".experts." in name else 1) * size * (6 if trained else 4)
    shared = model.embed.weight  # the head as well, if there is none of its own
    return total + (shared.numel() * (6 if shared.requires_grad else 4) if model.head is None else 0)


def expected_memory(model: Transformer, lengths: list[int], moments: float) -> float:
    """Bytes at the peak of training: weights, gradients, the optimizer's moments (bytes a trained weight), what a
    micro-batch of examples of these lengths keeps for the backward, and what Python, torch and the prepared products
    take."""
    c, item = model.config, model.dtype.itemsize
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * (p.element_size() + moments) for p in model.parameters() if p.requires_grad)
    inner = c.experts.active * c.experts.intermediate_size if c.experts else c.intermediate_size
    kept = 8 * c.hidden_size + 3 * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 4 * inner  # a token a layer
    short = model.device.type == "cpu" and max(lengths) <= SHORT
    probs = c.num_heads * max(lengths) * short  # a token a layer, by the products of kernels/attention.py
    weights += max((6 * m.in_features * m.out_features for m in quantized(model).values()), default=0)  # made whole
    return weights + trained + sum(lengths) * c.num_layers * (kept + probs) * item + RUNTIME_BYTES


def expected_seconds(model: Transformer, tokens: float, dtype: torch.dtype) -> float:
    """The time to train on so many tokens, from the speed of one product here; EFFICIENCY is what was measured."""
    return tokens * flops_a_token(model) / (EFFICIENCY * product_rate(model, dtype))


def product_rate(model: Transformer, dtype: torch.dtype) -> float:
    """FLOP/s of the model's machine in a product of its own shape; takes about a tenth of a second."""
    x = torch.randn(512, model.config.hidden_size, device=model.device).to(dtype)
    w = torch.randn(model.config.hidden_size, model.config.intermediate_size, device=model.device).to(dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        float((x @ w)[0, 0])  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * x.numel() * w.shape[1] / min(times)
