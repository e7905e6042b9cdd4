"""Loading a folder of many shards by plaintune and by transformers: seconds and peak memory, in one run.

    python benchmarks/load_speed.py [--layers 16] [--shard-mb 60] [--repeats 7] [--folder DIR]

The folder is a random Llama of --layers blocks of width 1536 in bf16 (16: 1.1 GB), or DIR. The two take turns, each
time in a fresh process, with the files in the page cache, for two jobs: to bf16, as it is stored, and to fp32. "load"
is until the call returns; "first logits" is until four tokens have been through the model as well, since both leave
weights that need no conversion in the file until they are used. Memory is the process's peak beyond what it had after
its imports, divided by the model's size. Prints medians and ranges; a ratio above 1 says that plaintune takes less.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import checkpoint
from families import Config
from model import Transformer

WIDTH = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 16, "vocab_size": 32_000}
ONE = """
import json, sys, time, torch
who, folder, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
if who == "plaintune":
    import checkpoint
    load = lambda: checkpoint.load_model(folder, dtype)
else:
    import transformers
    transformers.LlamaForCausalLM  # transformers imports a model's code at its first mention
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
memory = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before, start = memory(), time.perf_counter()
model = load()
loaded = time.perf_counter() - start
with torch.no_grad():
    model(torch.arange(4).view(1, 4))
logits = time.perf_counter() - start
peak = (memory() - before) / sum(p.nbytes for p in model.parameters())
print(json.dumps({"load": loaded, "first logits": logits, "peak memory": peak}))
"""


def make_folder(folder: Path, layers: int, shard_bytes: int) -> None:
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-6, "dtype": "bfloat16"}
    raw |= {"num_hidden_layers": layers, "max_position_embeddings": 2048, **WIDTH}
    with torch.device("meta"):
        model = Transformer(Config.from_hf(raw))
    weights = {
        checkpoint.hf_name(model, name): torch.randn(p.shape).mul_(0.02).bfloat16()
        for name, p in model.named_parameters()
    }
    checkpoint.write_json(raw, folder / "config.json")
    checkpoint.SHARD_BYTES = shard_bytes
    checkpoint.save_shards([checkpoint.Stored(*each) for each in weights.items()], folder)


def measure(who: str, folder: Path, dtype: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", ONE, who, str(folder), dtype], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shard-mb", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if args.folder is None:
            make_folder(folder, args.layers, args.shard_mb << 20)
        files = checkpoint.weight_files(folder)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ", end="")
        print(f"{sum(file.stat().st_size for file in files) / 1e9:.2f} GB in {len(files)} shards")
        for dtype in ("bfloat16", "float32"):
            runs = {"plaintune": [], "transformers": []}
            for _ in range(args.repeats):
                for who, found in runs.items():
                    found.append(measure(who, folder, dtype))
            for what in runs["plaintune"][0]:
                mine, theirs = ([run[what] for run in found] for found in runs.values())
                ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
                print(f"to {dtype:8} {what:12} plaintune {statistics.median(mine):6.3f}  ", end="")
                print(f"transformers {statistics.median(theirs):6.3f}  ratio {statistics.median(ratios):5.2f} ", end="")
                print(f"({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
