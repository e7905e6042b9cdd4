"""What one token that is written asks of a GPU, counted without one: launches, bytes through memory, waits.

    python tests/support/decode_census.py [--model llama-8b] [--method base] [--lines 1] [--prompt 500]

On fake tensors, as census.py: what `decoding.Steps` launches for a step, all of which a CUDA graph holds, and what is
left outside of it. Prints JSON: {"launches", "bytes", "waits", "names": {operation: launches}, "outside": the same of
what a replayed step launches besides}.
"""

import fake_cuda  # first: it changes torch

# isort: split
import argparse
import collections
import json

import torch
from census import ADAPTER, MODELS, Census

import adapter_files
import decoding
from families import Config
from model import Transformer
from planning import memory as plan


class Replay:
    """In place of a captured graph: a replay is one launch, which the census does not see."""

    def replay(self) -> None:
        pass


def make_model(raw: dict, method: str) -> Transformer:
    """A model on the fake GPU as it is generated with. method: base, lora (with an adapter on), nf4, qlora."""
    setup = plan.Recipe("qlora" if method in ("nf4", "qlora") else "lora")
    model = plan.meta_model(Config.from_hf(raw), setup, torch.bfloat16, ADAPTER)
    if method in ("base", "nf4"):
        adapter_files.remove_adapter(model)
    with fake_cuda.fake_tensors():
        return model.to_empty(device="cuda").eval()


def count(work) -> dict:
    census = Census()
    fake_cuda.on_launch = census.on_launch
    with census:
        work()
    fake_cuda.on_launch = fake_cuda.ignore_launch
    names = collections.Counter(row.name for row in census.rows)
    return {
        "launches": len(census.rows),
        "bytes": sum(row.bytes for row in census.rows),
        "waits": [what for _, what in census.syncs],
        "names": dict(names.most_common()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[*MODELS], default="llama-8b")
    parser.add_argument("--method", choices=["base", "lora", "nf4", "qlora"], default="base")
    parser.add_argument("--lines", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=500, help="tokens of each line so far")
    args = parser.parse_args()
    model = make_model(MODELS[args.model], args.method)

    def choose(logits, rows):
        return decoding.sample(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None)

    with fake_cuda.fake_tensors(), torch.no_grad(), decoding.packed_weights(model, 64):
        cache = decoding.KVCache(model, [args.prompt] * args.lines, 64, 1, decoding.GRAPH_ROUND)
        logits = torch.zeros(args.lines, model.config.vocab_size, dtype=model.dtype, device="cuda")
        steps = decoding.Steps(cache, logits, choose, captured=True)
        steps.launch()  # makes tables that stay
        captured = count(steps.launch)
        steps.graph = Replay()

        def one_token() -> None:
            steps.take(32)
            decoding.PendingTokens(steps.tokens, [*range(args.lines)])

        print(json.dumps(captured | {"outside": count(one_token)}))


if __name__ == "__main__":
    main()
