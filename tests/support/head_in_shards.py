"""Trains score heads in one process or several: argv has a folder of bases and one for the results."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

import checkpoint
import distributed
import lora
from adapting.score_head import document_scores
from kernels.attention import Documents
from methods import load_trainable
from optimizers import make_optimizers
from training.defaults import Settings

LENGTHS = [5, 9, 2, 12, 7, 4]
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all"}
# name: base, settings, labels
CASES = {
    "full": ("llama", {"method": "full"}, ["no", "maybe", "yes"]),
    "full, one label": ("tied", {"method": "full", "activation_checkpointing": "full"}, ["reward"]),
    "full, of a classifier": ("classifier", {"method": "full"}, ["a", "b", "c"]),
    "lora": ("llama", {"method": "lora", **LORA}, ["no", "yes"]),
    "qlora, of a classifier": ("classifier", {"method": "qlora", "quant": "nf4", **LORA}, ["a", "b", "c"]),
}


def train(name: str, bases: Path, out: Path, shard: str) -> None:
    """Trains a case for three steps and writes its folder. Ranks share the documents of a step."""
    base, changes, labels = CASES[name]
    chosen = Settings(shard=shard, dtype="fp32", seed=3, **changes)
    device = torch.device("cpu")
    model = load_trainable(chosen, bases / base, device, labels)
    assert model.head is None and distributed.has_shards(model) == (shard == "full")
    (optimizer,) = make_optimizers(model, "adamw", 1e-2, 0.0)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 96, (length,), generator=generator) for length in LENGTHS]
    weights = torch.randn(len(texts), len(labels), generator=generator)
    mine = range(distributed.rank(), len(texts), distributed.world_size())
    model.train()
    for _ in range(3):
        # Twice a step, since gradients are summed over micro-batches as well.
        for part in (mine[:1], mine[1:]):
            documents = Documents([LENGTHS[i] for i in part])
            scores = document_scores(model, torch.cat([texts[i] for i in part]), documents)
            (scores * weights[list(part)]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    save = checkpoint.save_model if chosen.method == "full" else lora.save_adapter
    save(model, out / name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_distributed(torch.device("cpu"))
    with distributed.safe_exit():
        for each in CASES:
            train(each, Path(sys.argv[1]), Path(sys.argv[2]), "full")
        dist.barrier()
