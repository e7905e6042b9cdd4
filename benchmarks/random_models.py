"""A model of a configuration with random weights, made where it is used: nothing is written to a disk or read from it.

Matrices are normal with deviation 0.02, norms are 1, adapters begin as they do in training. Weights in NF4 are random
codes under one scale, chosen so that their deviation is the same: real codes are distributed otherwise, but their bytes
are as many and cost the same time. Losses of such a model mean nothing beyond themselves.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lora
from distributed import to_local
from kernels.nf4 import CODE
from model import Config, Transformer
from planning import memory as plan

DEVIATION = 0.02


def random_model(
    raw: dict,
    setup: plan.Recipe,
    dtype: torch.dtype,
    device: torch.device | str,
    adapter: dict | None = None,
    seed: int = 0,
    arrange: Callable[[Transformer], None] | None = None,
) -> Transformer:
    """A model on the device, with what the set-up trains marked and of the dtypes that training would give it.

    raw: config.json; adapter: arguments of lora.add_lora, for the set-ups lora and qlora; arrange: is called with the
    model while it has no memory yet, for instance to make shards of it.
    """
    model = plan.meta_model(Config.from_hf(raw), setup, dtype, adapter or {})
    if arrange:
        arrange(model)
    model.to_empty(device=device)
    fill(model, seed)
    return model


@torch.no_grad()
def fill(model: Transformer, seed: int) -> None:
    """Gives every parameter its random numbers, in place."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        mine = to_local(parameter)
        if name.endswith(".nf4.packed"):
            mine.random_(0, 256)
        elif ".nf4." in name:
            mine.fill_(scale_of_codes(name, parameter))
        elif parameter.dim() == 1:
            mine.fill_(0.0 if name.endswith(".bias") else 1.0)
        else:
            mine.normal_(0.0, DEVIATION)
    for layer in lora.lora_layers(model).values():
        layer.start()


def scale_of_codes(name: str, parameter: torch.Tensor) -> float:
    """The value of a tensor beside NF4 codes, if every block is to have one scale. With double quantisation a scale is
    offset + nested * a number that its byte stands for; nested is 0 then."""
    spread = (sum(number * number for number in CODE) / len(CODE)) ** 0.5  # deviation of uniform codes
    is_scale = name.endswith(".offset") or (name.endswith(".absmax") and parameter.is_floating_point())
    return DEVIATION / spread if is_scale else 0.0
