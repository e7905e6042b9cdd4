"""The CUDA path without a GPU: kernels through Triton's real compiler, training steps on fake CUDA tensors.

Triton's interpreter, in which test_triton.py runs the kernels here, has no types and no limits; these tests have both.
Each starts a script of tests/support in a process of its own, for which a device guard is compiled with g++. None of
them skips.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from support.family_cases import CASES, IDS, SIZES

SUPPORT = Path(__file__).resolve().parent / "support"
REGISTERS = 128  # a thread; with more, too few threads run at a time to hide the memory's latency
NO_WIDE_LOADS = (
    "nf4 of experts",
    "norm of odd heads",
)  # of codes, a byte each; of rows that begin at no multiple of 16
CI_FAMILIES = ("llama", "gemma2", "gemma3", "qwen3", "gpt_neox", "mixtral")  # the others are slow
ROUTED = ("mixtral", "qwen3_moe")

PLAN_ERROR = 0.1  # of the memory at a step's height
FORWARD, BACKWARD = 40, 87  # launches of a Llama layer with LoRA


@pytest.fixture(scope="session")
def guard(tmp_path_factory) -> Path:
    """The guard that lets fake CUDA tensors live. Where it cannot be built, these tests fail."""
    folder = tmp_path_factory.mktemp("guard")
    words = [sys.executable, SUPPORT / "cuda_guard.py", folder]
    built = subprocess.run(words, check=False, capture_output=True, text=True)
    assert built.returncode == 0, f"no guard for fake CUDA tensors, which needs a C++ compiler: {built.stderr}"
    return folder / "cuda_guard.so"


@pytest.fixture
def script(guard, tmp_path_factory):
    """Runs a script of tests/support and returns what it prints, JSON line by line."""

    def run(name: str, *words) -> list:
        kernels = tmp_path_factory.getbasetemp() / "triton"  # compiled ones, kept for the next script
        environment = os.environ | {"PLAINTUNE_CUDA_GUARD": str(guard), "TRITON_CACHE_DIR": str(kernels)}
        environment.pop("TRITON_INTERPRET", None)
        words = [sys.executable, SUPPORT / name, *map(str, words)]
        ran = subprocess.run(words, check=False, capture_output=True, text=True, env=environment)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return [json.loads(line) for line in ran.stdout.splitlines()]

    return run


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))])
def test_every_kernel_compiles_and_fits(script, arch):
    """At the shapes of an 8B model: no error, nothing spilled, few registers, loads of 16 bytes."""
    (rows,) = script("compiled_kernels.py", "--arch", arch, "--json")
    assert len(rows) > 15
    assert [row for row in rows if "error" in row] == []
    assert [row for row in rows if row["spilled"] or row["registers"] > REGISTERS] == []
    assert [row for row in rows if not row["wide_loads"] and not row["name"].startswith(NO_WIDE_LOADS)] == []


def families(script, folder: Path, names: list[str], *words) -> None:
    configs = {}
    for name in names:
        family, changes, _ = CASES[name]
        configs[name] = transformers.CONFIG_MAPPING[family](**(SIZES | IDS | changes)).to_dict()
        configs[name].pop("architectures", None)
    (folder / "configs.json").write_text(json.dumps(configs))
    *rows, last = script("families_on_gpu.py", folder / "configs.json", *words)
    assert [row for row in rows if "error" in row] == []
    assert {row["name"] for row in rows} == {*names} and all(row["launches"] > 100 for row in rows)
    assert [row for row in rows if row["name"].startswith(ROUTED) and row["dtype"] == "bf16" and row["syncs"]] == []
    assert [row for row in last["compiled"] if row["spilled"] or row["registers"] > REGISTERS] == []
    assert len({row["kernel"] for row in last["compiled"]}) >= 7


def test_families_train_on_fake_cuda_tensors(script, tmp_path):
    """No wrong device, dtype or shape, forward and backward; every kernel that is launched compiles."""
    families(script, tmp_path, [*CI_FAMILIES], "--dtypes", "bf16")


@pytest.mark.parametrize("method, most", [("base", 404), ("nf4", 404)])
def test_a_written_token_is_launches_without_a_wait(script, method, most):
    """All of a step is captured; besides, the tokens are copied to the host."""
    (found,) = script("decode_census.py", "--method", method)
    assert found["waits"] == [] == found["outside"]["waits"]
    assert found["launches"] <= most and found["outside"]["names"] == {"_to_copy": 1}
    products = found["names"]["mm"] + found["names"].get("triton.nf4.multiply_kernel", 0)
    assert products == 4 * 32 + 1  # q, k, v in one, gate and up in one


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_all_families_train_on_fake_cuda_tensors(script, tmp_path, arch, dtype):
    names = [name for name in CASES if dtype == "bf16" or not name.startswith(ROUTED)]  # experts in fp32 read counts
    families(script, tmp_path, names, "--dtypes", dtype, "--arch", arch)


@pytest.mark.parametrize(
    "model, documents, allowed",
    [
        ("llama-8b", 40, 1.0),
        ("gemma2-9b", 2, 1.5),
        pytest.param("mistral-7b", 2, 1.5, marks=pytest.mark.slow),
        pytest.param("mistral-7b", 40, 1.5, marks=pytest.mark.slow),
    ],
)
def test_launches_of_a_layer(script, model, documents, allowed):
    """LoRA on one layer of documents that lie one behind the other, 16,384 tokens; two of them are beyond the windows.
    Nothing in a step after the first waits for the GPU."""
    words = ("--model", model, "--documents", documents, "--layers", 2, 4, "--json")
    (found,) = script("census.py", *words)
    launches = {phase: (found["4"][phase]["launches"] - found["2"][phase]["launches"]) / 2 for phase in found["2"]}
    assert launches["forward"] <= FORWARD * allowed and launches["backward"] <= BACKWARD * allowed
    assert launches["forward"] > 10
    assert [what["syncs"] for what in found["4"].values() if what["syncs"]] == []


def check_plan(script, *words) -> None:
    (rows,) = script("memory_oracle.py", "--json", *words)
    errors = {(row["name"], row["method"], row["checkpointing"]): row["planned"] / row["peak"] - 1 for row in rows}
    assert len(errors) > 3
    assert {what: error for what, error in errors.items() if abs(error) > PLAN_ERROR} == {}


def test_the_plan_is_what_a_gpu_would_hold(script):
    """The height of a step's memory, counted on fake CUDA tensors."""
    check_plan(
        script,
        "--models",
        "llama-8b",
        "gemma2-9b",
        "--methods",
        "lora",
        "full",
        "--activation-checkpointing",
        "none",
        "full",
    )


@pytest.mark.slow
def test_the_plan_is_what_a_gpu_would_hold_of_every_family(script, tmp_path):
    """Of published models, and of a layer or four of every family, wide enough that small things do not count. In
    bf16: in fp32, where attention goes by groups of documents, the plan is off by up to 22 %."""
    check_plan(script)
    wide = SIZES | {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "vocab_size": 32000}
    names = {"head_dim": 64, "num_key_value_heads": 4, "max_position_embeddings": 8192}
    configs = {}
    for name, (family, changes, _) in CASES.items():
        changed = wide | names | IDS | changes
        changed.pop("head_dim")
        if "short_factor" in changed.get("rope_scaling", {}):  # a factor for each pair of a small head's dimensions
            changed.pop("rope_scaling")
        if "moe_intermediate_size" in changed:
            changed["moe_intermediate_size"] = 768
        configs[name] = transformers.CONFIG_MAPPING[family](**changed).to_dict()
        configs[name].pop("architectures", None)
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    check_plan(script, "--configs", tmp_path / "configs.json")
