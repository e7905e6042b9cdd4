"""The rows of benchmarks/gpu_run.sh: what is measured on a card, in order of worth. gpu_run.py starts each in a process
of its own.

    python benchmarks/gpu_rows.py ROW --lines FILE [--rehearse]      one row by hand; FILE gets a line of JSON a result

A row is a function of settings, device and `report`, and yields (name, measurement) pairs; a measurement is a function
that returns a dictionary. What a measurement raises is its result as well, and the next one is run, so that one that
runs out of memory costs only itself. A side's name is "plaintune", or "peer" for transformers with peft and
bitsandbytes, whose rows are left out where these are not installed. The peer's rows must not see this repository's
root, where `kernels` and `evaluate` would hide the packages of these names.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import peers

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT, CONTEXT_LOST = 69, 75  # exit codes: a package is missing; the GPU takes no more work from this process
RANK = 16
# Of a loss, relative to the CPU's in fp32, at any of the steps; bf16 on a CPU is 3e-3 away from it after twenty steps
# of full fine-tuning, 1e-3 after twenty of LoRA
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}
CORRECTNESS_RATE = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3}  # losses fall by a quarter and more
REHEARSAL_NAME = "rehearsal on CPU"
FULL_WAYS = {  # of full fine-tuning: what is on the host, as train.py's flags say it, and as plan.Setup does
    "all on the GPU": {},
    "--optimizer-offload": {"offload": True},
    "--activation-checkpointing offload": {"checkpointing": "offload"},
    "--optimizer-offload --activation-checkpointing offload": {"offload": True, "checkpointing": "offload"},
}
REHEARSAL = {"shape": "rehearsal", "batches": {"64": 2}, "steps": 4, "document": 20}  # of all that trains
Measurements = Iterator[tuple[str, Callable[[], dict]]]


@dataclass(frozen=True)
class Row:
    """limit: seconds after which it is killed; rehearsal: what is other about its settings then."""

    name: str
    what: str
    limit: int
    function: str
    settings: dict = field(default_factory=dict)
    rehearsal: dict = field(default_factory=dict)


def fine_tuning_rows() -> list[Row]:
    """Each job by both sides: 8,192 tokens a step of the large shape, 16,384 of the small one."""
    rows = []
    for shape, batches, limit in (("8b", {"2048": 4, "4096": 2}, 90), ("1b", {"2048": 8, "4096": 4}, 60)):
        for method in ("lora", "qlora"):
            settings = {"shape": shape, "method": method, "batches": batches, "steps": peers.WARM_UP + 4}
            name, job = f"{method}-{shape}", f"{NAMES[method]} of the {SHAPE_NAMES[shape]} shape"
            rows.append(Row(name, job, limit, "fine_tuning", settings, REHEARSAL))
            rows.append(Row(f"{name}-peer", f"{job}, peer", limit, "peer_fine_tuning", settings, REHEARSAL))
    return rows


NAMES = {"lora": "LoRA", "qlora": "QLoRA", "full": "full fine-tuning"}
SHAPE_NAMES = {"8b": "Llama-3.1-8B", "1b": "Llama-3.2-1B"}
ROWS = [
    Row("environment", "device, versions, and its rates of products and copies", 90, "environment",
        {"product": 8192, "copy": 4 << 30}, {"product": 256, "copy": 1 << 20}),
    Row("compile", "every Triton kernel launched once at the 8B shape", 120, "compile_check", {}, {"small": True}),
    Row("tests", "tests with the marker gpu, and those of the kernels in Triton", 150, "gpu_tests", {},
        {"files": ["tests/test_optimizers.py"]}),
    Row("correctness", "twenty steps of training on the card against the CPU in fp32", 120, "correctness",
        {"shape": "135m", "seq": 128, "steps": 20}, {"shape": "rehearsal", "seq": 64}),
    *fine_tuning_rows(),
    Row("kernels", "kernels/bench.py: each kernel, its reference, the compiled reference", 150, "kernel_times",
        {"shape": "8b", "tokens": 4096, "compile": True}, {"shape": "rehearsal", "tokens": 32, "compile": False}),
    *(
        Row(f"decode-{shape}{end}", f"greedy decoding of 64 tokens after 128, {SHAPE_NAMES[shape]} shape{what}", limit,
            function, {"shape": shape, "prompt": 128, "new": 64, "batches": [1, 16]},
            {"shape": "rehearsal", "prompt": 8, "new": 4, "batches": [1, 3]})
        for shape, limit in (("8b", 75), ("1b", 50))
        for end, what, function in (("", "", "decoding"), ("-peer", ", peer", "peer_decoding"))
    ),
    Row("compiled-8b", "the Llama-3.1-8B shape with compiled blocks (--compile on)", 150, "compiled_blocks",
        {"shape": "8b", "batches": {"4096": 2}, "steps": peers.WARM_UP + 4},
        REHEARSAL | {"compile": False}),
    Row("full-1b", "full fine-tuning of the Llama-3.2-1B shape", 120, "full",
        {"shape": "1b", "batches": {"2048": 4}, "kinds": ["rows"], "steps": peers.WARM_UP + 3},
        REHEARSAL),
    Row("full-1b-peer", "full fine-tuning of the Llama-3.2-1B shape, peer", 60, "peer_fine_tuning",
        {"shape": "1b", "method": "full", "batches": {"2048": 4}, "kinds": ["rows"], "steps": peers.WARM_UP + 3},
        REHEARSAL),
    Row("checkpoints-1b", "what --shard full and checkpoints cost full fine-tuning of the 1B shape", 150, "durability",
        {"shape": "1b", "seq": 2048, "batch": 4, "steps": 8, "room": 50e9},
        {"shape": "rehearsal", "seq": 32, "batch": 2, "steps": 8, "room": 0}),
]  # fmt: skip


class LeftOut(Exception):
    """A row is not for this machine, for the reason that it holds."""


def require(*packages: str) -> str:
    """The packages' versions. Raises LeftOut where one is not installed."""
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        raise LeftOut(f"not installed: {', '.join(missing)}")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def use_program() -> None:
    """From here on this repository's modules can be imported."""
    sys.path.insert(0, str(ROOT))


# ------------------------------------------------------------------------------- the machine, the kernels, the tests


def environment(settings: dict, device, report) -> Measurements:
    yield "machine", partial(machine, device)
    yield "rates", partial(rates, settings, device)


def machine(device) -> dict:
    """What runs here, and on what."""
    import torch

    use_program()
    from kernels import triton_utils
    from planning import memory as plan

    found = {
        "device": REHEARSAL_NAME,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
    }
    for name in ("triton", "transformers", "peft", "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        found |= {"capability": f"{properties.major}.{properties.minor}", "driver": driver_version()}
        found["triton_launches"] = (
            triton_utils.triton_launches()
        )  # where it is False, plain PyTorch computes everywhere
        known = [peak for chip, peak in plan.PEAK_FLOPS.items() if chip in properties.name]
        found["published_flops"] = known[0] if known else None
    return found


def driver_version() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        said = subprocess.run(words, capture_output=True, text=True, check=False).stdout.splitlines()
        if said:
            return said[0].strip()
    return "unknown"


def rates(settings: dict, device) -> dict:
    """What the device reaches of itself: FLOP/s in a large product in bf16, and bytes a second in a copy, counted as
    read and written."""
    import torch

    size = settings["product"]
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    source = torch.empty(settings["copy"], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = median_seconds(lambda: a @ b, device)
    copy = median_seconds(lambda: target.copy_(source), device)
    return {"flops_per_second": 2 * size**3 / product, "copy_bytes_per_second": 2 * source.numel() / copy}


def median_seconds(run: Callable, device, rounds: int = 5, times: int = 4) -> float:
    """Of one call: the median of rounds of several, with the device's queue waited for around each round."""
    import torch

    run()
    found = []
    for _ in range(rounds):
        peers.synchronize(torch, device)
        start = time.perf_counter()
        for _ in range(times):
            run()
        peers.synchronize(torch, device)
        found.append((time.perf_counter() - start) / times)
    return statistics.median(found)


def compile_check(settings: dict, device, report) -> Measurements:
    """Every launch of tests/support/compiled_kernels.py. Only whether it compiles and ends is looked at: its numbers
    are for the tests and for kernels/bench.py."""
    import torch

    if device.type != "cuda":
        os.environ["TRITON_INTERPRET"] = "1"
    use_program()
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import compiled_kernels

    if settings.get("small"):
        small = {"D": 128, "F": 256, "H": 4, "G": 2, "HEAD_DIM": 16, "V": 128, "N": 16}
        vars(compiled_kernels).update(small)

    def run(launch: Callable) -> dict:
        launch()
        peers.synchronize(torch, device)  # where a launch went wrong, this is what raises
        return {}

    for name, launch in compiled_kernels.cases(device.type):
        yield name, partial(run, launch)


def gpu_tests(settings: dict, device, report) -> Measurements:
    """Each test's own result is reported under its name; a file's is how many there were of each kind."""
    require("pytest")
    import pytest

    os.chdir(ROOT)
    files = settings.get("files") or sorted(
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").glob("test_*.py")
        if "pytest.mark.gpu" in file.read_text()
    )
    jobs = [(file, ["-m", "gpu"]) for file in files]
    jobs.append(("tests/test_triton.py", ["-k", "norm"] if settings.get("files") else []))

    def run(file: str, words: list[str]) -> dict:
        counts = Counts(report)
        code = pytest.main(["-q", "-p", "no:cacheprovider", file, *words], plugins=[counts])
        ended_well = code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
        if counts.broken or not ended_well:
            raise RuntimeError(counts.broken or f"pytest ended with {code!r}")
        if counts.outcomes["failed"] and context_lost(device):
            raise RuntimeError(f"{counts.outcomes}, after which the GPU took no more work from this process")
        return counts.outcomes

    for file, words in jobs:
        yield file, partial(run, file, words)


class Counts:
    """A plugin of pytest that reports every test as it ends."""

    def __init__(self, report):
        self.report, self.outcomes, self.broken = report, {"passed": 0, "failed": 0, "skipped": 0}, ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and report.outcome == "passed":
            return  # of setting up and of tearing down, only what went wrong
        self.outcomes[report.outcome] += 1
        error = report.longreprtext[-800:] if report.outcome == "failed" else ""
        status = {"passed": "done", "failed": "failed", "skipped": "left out"}[report.outcome]
        self.report(report.nodeid, status, {"test": True}, error, report.duration)

    def pytest_collectreport(self, report) -> None:
        if report.outcome == "failed":
            self.broken = f"not collected: {report.longreprtext[-500:]}"


# --------------------------------------------------------------------------------------------------- right numbers


def correctness(settings: dict, device, report) -> Measurements:
    """The same steps from the same weights, which are numbers that bf16 holds, on the CPU in fp32 and on the device in
    both dtypes. Two batches alternate, so that the losses fall, and a wrong gradient is seen in them."""
    import torch

    use_program()
    from random_models import random_model

    from planning import memory as plan

    spec = {"shape": settings["shape"], "steps": 2, "batch": 2, "seq": settings["seq"], "document": 40}
    batches = peers.document_rows(torch, spec)
    rows = [batches[step % 2] for step in range(settings["steps"])]
    raw, cpu = peers.raw_config(settings["shape"]), torch.device("cpu")
    for method, rate in CORRECTNESS_RATE.items():
        setup, adapter = plan.Recipe(method), peers.adapter({"rank": RANK})
        spec = spec | {"method": method, "rate": rate}
        model = random_model(raw, setup, torch.float32, cpu, adapter)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16) if parameter.is_floating_point() else parameter)
        begin = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        wanted = peers.train_by_plaintune(torch, model, spec, rows, cpu, 0.0)[1]
        for dtype in (torch.float32, torch.bfloat16):
            model = random_model(raw, setup, dtype, device, adapter)
            model.load_state_dict(begin)
            job = partial(peers.train_by_plaintune, torch, model, spec, rows, device, 0.0)
            yield f"{method}, {str(dtype)[6:]}", partial(compare_losses, job, wanted, str(dtype)[6:])


def compare_losses(job: Callable, wanted: list[float], dtype: str) -> dict:
    _, losses = job()
    apart = [abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True)]
    apart = [math.inf if math.isnan(each) else each for each in apart]
    largest, allowed = max(apart), TOLERANCE[dtype]
    result = {"losses": losses, "cpu_losses": wanted, "largest": largest, "tolerance": allowed}
    if largest > allowed:
        step = apart.index(largest) + 1
        raise WrongNumbers(f"step {step}: {largest:.1e} from the CPU's loss, {allowed:.0e} allowed", result)
    return result


class WrongNumbers(Exception):
    """Losses that are too far from the reference's. values: all of them."""

    def __init__(self, message: str, values: dict):
        super().__init__(message)
        self.values = values


# ----------------------------------------------------------------------------------------------------- fine-tuning


def fine_tuning(settings: dict, device, report) -> Measurements:
    """Full rows and packed documents of each length."""
    import torch

    use_program()
    from random_models import random_model

    from planning import memory as plan

    setup = plan.Recipe(settings["method"])
    model = random_model(
        peers.raw_config(settings["shape"]), setup, torch.bfloat16, device, peers.adapter({"rank": RANK})
    )
    yield from jobs(settings, lambda spec: measure_ours(model, setup, spec, device))


def jobs(settings: dict, measure: Callable[[dict], dict]) -> Measurements:
    """The lengths and kinds of rows of a job; a batch that does not fit is halved until it does."""
    for seq, batch in settings["batches"].items():
        for kind in settings.get("kinds", ("rows", "documents")):
            spec = {key: settings[key] for key in ("shape", "method", "steps", "document") if key in settings}
            spec |= {"seq": int(seq), "batch": batch, "kind": kind, "rank": RANK}
            yield f"{seq}, {kind}", partial(halve_until_it_fits, measure, spec)


def halve_until_it_fits(measure: Callable[[dict], dict], spec: dict) -> dict:
    import torch

    while True:
        try:
            return measure(spec) | {"batch": spec["batch"], "seq": spec["seq"]}
        except torch.OutOfMemoryError:
            if spec["batch"] == 1:
                raise
        spec = spec | {"batch": spec["batch"] // 2}
        free_memory()


def free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the process's peak begins anew: proc(5)


def rows_of_job(spec: dict) -> list:
    """[steps][batch][documents][tokens]"""
    import torch

    if spec["kind"] == "documents":
        return peers.document_rows(torch, spec)
    return [[[row] for row in step] for step in peers.token_rows(torch, spec)]


def measure_ours(model, setup, spec: dict, device) -> dict:
    """Speed and memory of our training loop, and what planning/memory.py foretells of the memory."""
    import torch

    from planning import memory as plan

    free_memory()
    rows = rows_of_job(spec)
    before = peers.resident()
    job = spec | {"checkpointing": setup.checkpointing, "offload": setup.offload, "weights": setup.weights}
    result, _ = peers.train_by_plaintune(torch, model, job, rows, device, before)
    micro_batches = [[len(ids) for row in step for ids in row] for step in rows]
    lengths = max(micro_batches, key=lambda batch: sum(n * n for n in batch))
    trained = sum(lengths) - len(lengths)
    planned = plan.expected_memory(model, setup, lengths, trained, device.type, 1).peak
    return result | rate_of_work(spec, rows, result["speed"]) | {"planned": planned, "side": "plaintune"}


def rate_of_work(spec: dict, rows: list, speed: float) -> dict:
    """Operations a token by peers.operations, and the FLOP/s that a speed in tokens a second means then."""
    lengths = [len(ids) for step in rows[peers.WARM_UP :] for row in step for ids in row]
    reach = sum(n * n for n in lengths) / sum(lengths)
    flops = peers.operations(peers.SHAPES[spec["shape"]], spec["method"], reach)
    return {"flops_per_token": flops, "flops_per_second": flops * speed}


def compiled_blocks(settings: dict, device, report) -> Measurements:
    import torch

    use_program()
    from random_models import random_model

    from planning import memory as plan

    for method in ("lora", "qlora"):
        setup = plan.Recipe(method)
        raw = peers.raw_config(settings["shape"])
        model = random_model(raw, setup, torch.bfloat16, device, peers.adapter({"rank": RANK}))
        if settings.get("compile", True):
            model.compile_blocks()
        measure = partial(measure_of_setup, model, setup, device)
        for name, measurement in jobs(settings | {"method": method}, measure):
            yield f"{method}, {name}", measurement
        del model, measure, measurement
        free_memory()


def measure_of_setup(model, setup, device, spec: dict) -> dict:
    return measure_ours(model, setup, spec, device)


def full(settings: dict, device, report) -> Measurements:
    """With fp32 masters; with these on the host, with the blocks' inputs there, with both."""
    use_program()
    from planning import memory as plan

    for way, more in FULL_WAYS.items():
        measure = partial(measure_full, plan.Recipe("full", **more), device)
        for name, measurement in jobs(settings | {"method": "full"}, measure):
            yield f"{way}, {name}", measurement


def measure_full(setup, device, spec: dict) -> dict:
    import torch
    from random_models import random_model

    model = random_model(peers.raw_config(spec["shape"]), setup, torch.bfloat16, device)
    return measure_ours(model, setup, spec, device)


# ------------------------------------------------------------------------------------------------- the peer's side


def peer_fine_tuning(settings: dict, device, report) -> Measurements:
    import torch

    packages = ["transformers"]
    packages += ["peft"] if settings["method"] != "full" else []
    packages += ["bitsandbytes"] if settings["method"] == "qlora" else []
    versions = require(*packages)
    spec = {"shape": settings["shape"], "method": settings["method"], "rank": RANK}
    model = peers.random_peer(torch, spec, device, torch.bfloat16).train()
    yield from jobs(settings, lambda spec: measure_peer(model, spec, device) | {"versions": versions})


def measure_peer(model, spec: dict, device) -> dict:
    """The usual loop: without gradient checkpointing where that fits, else with it."""
    import torch

    try:
        return measure_peer_once(model, spec, device) | {"checkpointing": False}
    except torch.OutOfMemoryError:
        pass
    model.zero_grad()
    free_memory()
    peers.checkpoint_gradients(model)
    try:
        return measure_peer_once(model, spec, device) | {"checkpointing": True}
    finally:
        model.gradient_checkpointing_disable()
        model.zero_grad()


def measure_peer_once(model, spec: dict, device) -> dict:
    """Full rows as one batch, documents padded, some at a time, in the order that they come in."""
    import torch

    free_memory()
    rows, before = rows_of_job(spec), peers.resident()
    steps, collate = [], peers.whole_rows
    for step in rows:
        documents = [ids for row in step for ids in row]
        if spec["kind"] == "rows":
            steps.append([documents])
            continue
        random.Random(3).shuffle(documents)
        records = [[ids, [False] + [True] * (len(ids) - 1)] for ids in documents]
        steps.append([records[i : i + peers.AT_ONCE] for i in range(0, len(records), peers.AT_ONCE)])
        collate = peers.padded_records
    result = peers.usual_loop(torch, model, device, peers.RATE, steps, collate, before)
    return result | rate_of_work(spec, rows, result["speed"]) | {"side": "peer"}


# ------------------------------------------------------------------------------------------- kernels, decoding, disk


def kernel_times(settings: dict, device, report) -> Measurements:
    """kernels/bench.py, a case at a time."""
    import torch

    use_program()
    from kernels import bench

    shape = bench.BENCH_SHAPES[settings["shape"]]
    yield from bench.measurements(shape, settings["tokens"], device, torch.bfloat16, compiles=settings["compile"])


def decoding(settings: dict, device, report) -> Measurements:
    """The base in bf16 and in NF4, without an adapter and with one that is not merged."""
    import torch

    use_program()
    from random_models import random_model

    import adapter_files
    from planning import memory as plan

    raw, adapter = peers.raw_config(settings["shape"]), peers.adapter({"rank": RANK})
    for base, method in (("bf16", "lora"), ("NF4", "qlora")):
        model = random_model(raw, plan.Recipe(method), torch.bfloat16, device, adapter)
        for kind in (f"{base} with LoRA", base):
            if kind == base:
                adapter_files.remove_adapter(model)
            for batch in settings["batches"]:
                yield f"{kind}, batch {batch}", partial(decode, settings, batch, device, partial(generate, model))
        del model
        free_memory()


def generate(model, prompts: list[list[int]], new: int) -> int:
    """The number of tokens that it wrote."""
    return sum(map(len, model.generate(prompts, new)))


def decode(settings: dict, batch: int, device, write: Callable[[list, int], int]) -> dict:
    """Tokens a second of writing to random prompts of one length, reading the prompts included: the second and third
    time, with the queue waited for around each."""
    import torch

    free_memory()
    draw = random.Random(4)
    vocabulary = peers.SHAPES[settings["shape"]]["vocab_size"]
    prompts = [[draw.randrange(3, vocabulary) for _ in range(settings["prompt"])] for _ in range(batch)]
    seconds = []
    for _ in range(3):
        peers.synchronize(torch, device)
        start = time.perf_counter()
        count = write(prompts, settings["new"])
        peers.synchronize(torch, device)
        seconds.append(time.perf_counter() - start)
        assert count == batch * settings["new"], f"{count} tokens were written, not {batch} x {settings['new']}"
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peers.resident()
    return {"speed": count / statistics.mean(seconds[1:]), "first_seconds": seconds[0], "peak": peak}


def peer_decoding(settings: dict, device, report) -> Measurements:
    import torch

    versions = require("transformers", "peft")
    for base, method in (("bf16", "lora"), ("NF4", "qlora")):
        if method == "qlora":
            versions = f"{versions}, {require('bitsandbytes')}"
        spec = {"shape": settings["shape"], "method": method, "rank": RANK}
        adapted = peers.random_peer(torch, spec, device, torch.bfloat16).eval()
        for kind in (f"{base} with LoRA", base):
            model = adapted if kind != base else adapted.unload()
            write = partial(generate_by_peer, model, device)
            for batch in settings["batches"]:
                job = partial(decode, settings, batch, device, write)
                yield f"{kind}, batch {batch}", lambda job=job, versions=versions: job() | {"versions": versions}
        del adapted, model, write, job
        free_memory()


def generate_by_peer(model, device, prompts: list[list[int]], new: int) -> int:
    import torch

    ids = torch.tensor(prompts, device=device)
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return out[:, ids.shape[1] :].numel()


def durability(settings: dict, device, report) -> Measurements:
    """benchmarks/durable_speed.py, each way once, in a process of its own."""
    import durable_speed

    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < settings["room"]:
        raise LeftOut(f"{free / 1e9:.0f} GB of disk are free, two checkpoints want {settings['room'] / 1e9:.0f}")
    spec = {key: settings[key] for key in ("shape", "seq", "batch", "steps")} | {"method": "full", "where": None}
    for way in durable_speed.WAYS:
        yield way, partial(durable_speed.run_side, spec | {"way": way})


# ----------------------------------------------------------------------------------------- a row's process


class Lines:
    """Results, a line of JSON each, in a file that the starting process reads while this one runs."""

    def __init__(self, file: Path):
        self.file = file.open("a")

    def write(self, **line) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def report(self, name: str, status: str, values: dict, error: str = "", seconds: float = 0.0) -> None:
        self.write(end=name, status=status, values=values, error=error, seconds=round(seconds, 3))


def run_row(row: Row, device, lines: Lines, skip: set[str], rehearse: bool) -> int:
    """Runs the measurements that are not to be skipped; returns the exit code."""
    settings = row.settings | (row.rehearsal if rehearse else {})
    measurements = globals()[row.function](settings, device, lines.report)
    while True:
        try:
            name, measure = next(measurements)
        except StopIteration:
            return 0
        except LeftOut as reason:
            lines.write(left_out=str(reason))
            return LEFT_OUT
        if name in skip:
            continue
        lines.write(begin=name)
        start = time.perf_counter()
        status, values, error = "done", {}, ""
        try:
            values = measure()
        except Exception as raised:  # noqa: BLE001 - of whatever kind: it is this measurement's result
            traceback.print_exc()
            status, values, error = "failed", getattr(raised, "values", {}), describe(raised)
        lines.report(name, status, values, error, time.perf_counter() - start)
        del measure
        if status == "failed" and context_lost(device):
            return CONTEXT_LOST


def describe(error: BaseException) -> str:
    """The kind of error, and the first of what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:400]}"


def context_lost(device) -> bool:
    """Whether the GPU takes no more work from this process, as after an access to memory that is not there."""
    import torch

    if device.type != "cuda":
        return False
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError:
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("row", choices=[row.name for row in ROWS])
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--skip", nargs="*", default=[], help="measurements that there are already")
    args = parser.parse_args()
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("no GPU that torch can use; --rehearse runs on the CPU")
    device = torch.device("cpu" if args.rehearse else "cuda")
    row = next(row for row in ROWS if row.name == args.row)
    sys.exit(run_row(row, device, Lines(args.lines), set(args.skip), args.rehearse))


if __name__ == "__main__":
    main()
