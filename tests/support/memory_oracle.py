"""What a training step holds of a GPU's memory at its height, against what planning/memory.py foretells. No GPU.

    python tests/support/memory_oracle.py [--models llama-8b ...] [--methods lora ...]
        [--activation-checkpointing none ...]

Two steps run on fake CUDA tensors (fake_cuda.py), and every storage is counted from its making to its end, rounded as
torch's allocator rounds. Prints a line a set-up, or with --json a list.
"""

import fake_cuda  # noqa: F401 - first: it changes torch

# isort: split
import argparse
import itertools
import json
import weakref
from pathlib import Path

import torch
from census import ADAPTER, MODELS, NOT_OURS, Census, document_lengths, here, make_model, training_step
from torch.utils._pytree import tree_flatten

ROUNDED = 512  # bytes, of the allocator


class LiveMemory(Census):
    """Bytes of the storages that are alive, and the most there have been."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def see(self, t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if not t.is_cuda or key in self.known:
            return
        size = -(-storage.nbytes() // ROUNDED) * ROUNDED

        def gone(_, key=key, size=size):
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Autograd adds a second gradient of a tensor onto the first in its place, but not where tensors are fake
        if self.phase == "backward" and func is torch.ops.aten.add.Tensor and here() == NOT_OURS:
            return args[0]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor):
                self.see(t)
        return out


def measure(raw: dict, method: str, layers: int, lengths: list[int], checkpointing: str, dtype: torch.dtype) -> dict:
    from planning import memory as plan

    model = make_model(raw, method, dtype, layers, ADAPTER)
    memory = LiveMemory()
    for p in model.parameters():
        memory.see(p)
    weights = memory.now
    training_step(model, lengths, trained=1.0, checkpointing=checkpointing, kind=lambda: memory)
    setup = plan.Recipe(method, checkpointing=checkpointing)
    told = plan.expected_memory(model, setup, lengths, sum(lengths), "cuda", 1)
    return {"weights": weights, "peak": memory.peak, "planned": told.peak, "parts": vars(told)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--configs", help="JSON of names and configurations, in place of --models")
    parser.add_argument("--methods", nargs="+", default=["lora", "full", "qlora"])
    parser.add_argument("--activation-checkpointing", nargs="+", default=["none", "selective", "full"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    configs = (
        json.loads(Path(args.configs).read_text()) if args.configs else {name: MODELS[name] for name in args.models}
    )
    rows = []
    for (name, raw), method, checkpointing in itertools.product(
        configs.items(), args.methods, args.activation_checkpointing
    ):
        lengths = document_lengths(args.documents, args.tokens)
        found = measure(raw, method, args.layers, lengths, checkpointing, getattr(torch, args.dtype))
        rows.append({"name": name, "method": method, "checkpointing": checkpointing, **found})
        if not args.json:
            error = found["planned"] / found["peak"] - 1
            print(
                f"{name:14}{method:7}{checkpointing:11}held {found['peak'] / 1e9:7.3f} GB,"
                f" planned {found['planned'] / 1e9:7.3f} ({error:+.1%}); weights {found['weights'] / 1e9:.3f}",
                flush=True,
            )
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
