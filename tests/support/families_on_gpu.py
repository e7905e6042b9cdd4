"""Forward and backward of every family on a GPU that is not there; every kernel that is launched is compiled for one.

    python tests/support/families_on_gpu.py CONFIGS.json [--arch 90] [--methods lora full qlora] [--dtypes bf16 fp32]

CONFIGS.json: {name: config.json of a model}. Prints a JSON line for each family, method and dtype: {"name", "method",
"dtype", "launches", "syncs"}, or "error" and where; then one of the kernels that were compiled, with their resources.
"""

import fake_cuda  # first: it changes torch

# isort: split
import argparse
import json
import traceback
from pathlib import Path

import torch
from census import Census, make_model, training_step
from compiled_kernels import last_cause, resources

LENGTHS = [5, 33, 60, 60, 7]  # some beyond the windows of the small models
ADAPTER = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


compiled: dict[str, dict] = {}  # a kernel and its resources, by the hash of what was compiled


class CompilingCensus(Census):
    """Compiles every launch it sees, each form of a kernel once."""

    def on_launch(self, kernel, args, grid, options, bound) -> None:
        super().on_launch(kernel, args, grid, options, bound)
        made = fake_cuda.compile_launch(kernel, args, grid, options)
        if made.hash not in compiled:
            compiled[made.hash] = {"kernel": fake_cuda.kernel_name(kernel)} | resources(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configs")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--methods", nargs="+", default=["lora", "full", "qlora"])
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    args = parser.parse_args()
    fake_cuda.compile_for(args.arch)
    for name, raw in json.loads(Path(args.configs).read_text()).items():
        for method in args.methods:
            for dtype in args.dtypes:
                row = {"name": name, "method": method, "dtype": dtype} | try_one(raw, method, dtype)
                print(json.dumps(row), flush=True)
    print(json.dumps({"compiled": [*compiled.values()]}))


def try_one(raw: dict, method: str, dtype: str) -> dict:
    try:
        model = make_model(raw, method, DTYPES[dtype], adapter=ADAPTER)
        census = training_step(model, LENGTHS, kind=CompilingCensus)
    except Exception as error:  # noqa: BLE001 - of whatever kind: the test shows it
        where = [f for f in traceback.extract_tb(error.__traceback__) if "/tests/" not in f.filename][-1]
        return {"error": last_cause(error), "at": f"{Path(where.filename).name}:{where.lineno}"}
    return {"launches": len(census.rows), "syncs": sorted({what for _, what in census.syncs})}


if __name__ == "__main__":
    main()
