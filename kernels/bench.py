"""Times each function of kernels/ against its plain reference and against that reference under torch.compile.

    python kernels/bench.py [--tokens 4096] [--shape 8b|135m] [--only NAME] [--json FILE]

The times are of forward and backward, medians of rounds in which the three alternate. The error is
the largest difference from the plain reference. On a GPU: 8B shapes, also the peak of memory, and
for NF4 the share of a copy's bandwidth. On a CPU: the functions that compute there, at the shape of
the default base. kernels/README.md says, with these figures, what stays in kernels/ and why.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.device import pick_device, pick_dtype
from kernels.adamw import adamw_step
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.linear import linears, linears_reference
from kernels.lora_linear import LoRAWeights, lora_linears, lora_linears_reference
from kernels.nf4 import nf4_dequantize, nf4_dequantize_reference, nf4_linear, nf4_linear_reference
from kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from kernels.rope import rope_qk, rope_reference
from kernels.swiglu import Gated, gated_reference
from optimizers import adamw_update, dequantize_moment, quantize_moment
from quant import quantize

# Hidden size D, intermediate size F, heads H, key-value heads G, head_dim d, vocabulary.
BENCH_SHAPES = {
    "rehearsal": (128, 256, 4, 2, 32, 512),  # of no real model: to try the script
    "8b": (4096, 14336, 32, 8, 128, 128256),
    "135m": (576, 1536, 9, 3, 64, 49152),
}
WAYS = ("ours", "plain", "compiled")
SECONDS = 1.0  # the time that each way may take in all rounds together
MAX_ROUNDS = 50
RANK = 16  # of the adapters
EPS = 1e-5  # of the norms


class Case(NamedTuple):
    """A function and its plain reference. Both take the inputs, of which gradients are computed.

    Without inputs, only the forward is timed.
    """

    ours: Callable
    plain: Callable
    inputs: list[Tensor]


# ---- the cases ----


def cases(shape: tuple, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    """Returns {name: case} of all functions that compute on the device.

    shape: a value of BENCH_SHAPES.
    """
    D, F, *_ = shape
    make = partial(random_tensor, device=device, dtype=dtype)
    x = make(tokens, D)
    all_cases = norm_cases(shape, x, make)
    all_cases |= rope_cases(shape, tokens, make)
    all_cases |= gate_cases(shape, tokens, make)
    all_cases |= trained_cases(shape, x, make)
    all_cases |= lora_cases(shape, x, make)
    all_cases |= loss_cases(shape, x, make)
    all_cases |= nf4_cases(shape, make, dtype)
    # On a CPU there is no kernel of it: the plain form computes.
    if device.type == "cuda":
        all_cases |= adamw_cases(F * D, device)
    return all_cases


def random_tensor(
    *size: int, device: torch.device, dtype: torch.dtype, grad: bool = True
) -> Tensor:
    """Returns normal random numbers, as small as weights are when a model is initialised."""
    numbers = 0.02 * torch.randn(size, device=device)
    return numbers.to(dtype).requires_grad_(grad)


def norm_cases(shape: tuple, x: Tensor, make: Callable[..., Tensor]) -> dict[str, Case]:
    """RMSNorm, alone and behind the sum with the residual stream."""
    D = shape[0]
    y = make(len(x), D)
    weight = make(D, grad=False)

    def ours(x):
        return rms_norm(x, weight, EPS)

    def plain(x):
        return rms_norm_reference(x, weight, EPS)

    def add_ours(x, y):
        return torch.cat(add_rms_norm(x, y, weight, EPS), 1)

    def add_plain(x, y):
        return torch.cat(add_rms_norm_reference(x, y, weight, EPS), 1)

    return {
        "rms_norm": Case(ours, plain, [x]),
        "sum and rms_norm": Case(add_ours, add_plain, [x, y]),
    }


def rope_cases(shape: tuple, tokens: int, make: Callable[..., Tensor]) -> dict[str, Case]:
    """The rotation of q and k."""
    _, _, H, G, d, _ = shape
    q = make(tokens, H, d)
    k = make(tokens, G, d)
    cos = make(tokens, 1, d // 2, grad=False)
    sin = make(tokens, 1, d // 2, grad=False)

    # Next to each other, since a case has one output: [tokens, H + G, d].
    def ours(q, k):
        return torch.cat(rope_qk(q, k, cos, sin), 1)

    def plain(q, k):
        rotated_q = rope_reference(q, cos, sin)
        rotated_k = rope_reference(k, cos, sin)
        return torch.cat([rotated_q, rotated_k], 1)

    return {"rope q, k": Case(ours, plain, [q, k])}


def gate_cases(shape: tuple, tokens: int, make: Callable[..., Tensor]) -> dict[str, Case]:
    """act(gate) * up, for two activations."""
    F = shape[1]
    gate = make(tokens, F)
    up = make(tokens, F)

    def gate_case(activation: str) -> Case:
        def ours(gate, up):
            return Gated.apply(gate, up, activation)

        def plain(gate, up):
            return gated_reference(gate, up, activation)

        return Case(ours, plain, [gate, up])

    return {"swiglu": gate_case("silu"), "geglu": gate_case("gelu")}


def trained_cases(shape: tuple, x: Tensor, make: Callable[..., Tensor]) -> dict[str, Case]:
    """An MLP whose fp32 weights are trained."""
    D, F, *_ = shape
    gate_weight = make(F, D, dtype=torch.float32)
    up_weight = make(F, D, dtype=torch.float32)
    down_weight = make(D, F, dtype=torch.float32)

    def mlp(linears: Callable) -> Callable:
        def run(x, gate_weight, up_weight, down_weight):
            gate, up = linears(x, [gate_weight, up_weight], [None, None])
            (out,) = linears(gate, [down_weight], [None], up, "silu")
            return out

        return run

    inputs = [x, gate_weight, up_weight, down_weight]
    return {"trained MLP": Case(mlp(linears), mlp(linears_reference), inputs)}


def lora_cases(shape: tuple, x: Tensor, make: Callable[..., Tensor]) -> dict[str, Case]:
    """q, k and v, and an MLP, with adapters on frozen weights."""
    D, F, H, G, d, _ = shape

    def adapted(out: int, size: int) -> LoRAWeights:
        weight = make(out, size, grad=False)
        A = make(RANK, size, dtype=torch.float32)
        B = make(out, RANK, dtype=torch.float32)
        return LoRAWeights((weight,), None, A, B, 2.0)

    def adapters(layers: list[LoRAWeights]) -> list[Tensor]:
        tensors = []
        for layer in layers:
            tensors += [layer.A, layer.B]
        return tensors

    qkv = [adapted(heads * d, D) for heads in (H, G, G)]
    gate_up = [adapted(F, D), adapted(F, D)]
    down = [adapted(D, F)]

    # A and B are inputs for their gradients' sake; the functions find them in `qkv`, `gate_up` and
    # `down`.
    def qkv_ours(x, *_):
        return torch.cat(lora_linears(x, qkv), 1)

    def qkv_plain(x, *_):
        return torch.cat(lora_linears_reference(x, qkv), 1)

    def mlp(linears: Callable) -> Callable:
        def run(x, *_):
            gate, up = linears(x, gate_up)
            (out,) = linears(gate, down, up, "silu")
            return out

        return run

    qkv_inputs = [x, *adapters(qkv)]
    mlp_inputs = [x, *adapters(gate_up + down)]
    return {
        "LoRA q, k, v": Case(qkv_ours, qkv_plain, qkv_inputs),
        "LoRA MLP": Case(mlp(lora_linears), mlp(lora_linears_reference), mlp_inputs),
    }


def loss_cases(shape: tuple, x: Tensor, make: Callable[..., Tensor]) -> dict[str, Case]:
    """The output head and the cross-entropy behind it."""
    D, *_, vocabulary = shape
    head = make(vocabulary, D, grad=False)
    targets = torch.randint(vocabulary, (len(x),), device=x.device)

    def ours(x):
        return linear_cross_entropy(x, head, targets)[0]

    def plain(x):
        return linear_cross_entropy_reference(x, head, targets)[0]

    return {"head and loss": Case(ours, plain, [x])}


def nf4_cases(shape: tuple, make: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Case]:
    """The dequantisation of the shape's largest matrix, and products with it of few rows.

    Without gradients: the products are those of generation.
    """
    D, F, *_ = shape
    frozen = quantize(make(F, D, grad=False).float())

    def product_case(rows: int) -> Case:
        x = make(rows, D, grad=False)
        ours = partial(nf4_linear, x, frozen, None)
        plain = partial(nf4_linear_reference, x, frozen, None)
        return Case(ours, plain, [])

    dequantize = partial(nf4_dequantize, frozen, dtype)
    dequantize_plain = partial(nf4_dequantize_reference, frozen, dtype)
    return {
        "NF4 dequantise": Case(dequantize, dequantize_plain, []),
        "NF4 linear, 8 rows": product_case(8),
        "NF4 linear, 1 row": product_case(1),
    }


def adamw_cases(count: int, device: torch.device) -> dict[str, Case]:
    """A step on `count` bf16 weights with 8-bit moments.

    lr is 0, so that both may step any number of times.
    """
    weight = torch.randn(count, device=device).to(torch.bfloat16)
    grad = torch.randn(count, device=device).to(torch.bfloat16)
    state = {"step": torch.ones((), device=device)}
    for name in ("m", "v"):
        # Squares serve as m, too: any moments do that are of the right size.
        codes, scale = quantize_moment(grad.float().square(), name)
        state[name] = codes
        state[f"{name}_scale"] = scale
    group = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    seed = torch.ones(2, dtype=torch.int64, device=device)

    def ours():
        adamw_step(weight, grad, state, group, seed, None)
        return weight

    def plain_step():
        m = dequantize_moment(state["m"], state["m_scale"], "m")
        v = dequantize_moment(state["v"], state["v_scale"], "v")
        new = adamw_update(weight.float(), grad.float(), m, v, 1, group).to(weight.dtype)
        return new, quantize_moment(m, "m"), quantize_moment(v, "v")

    def plain():
        return plain_step()[0]

    return {"AdamW, 8 bits": Case(ours, plain, [])}


# ---- the measurement ----


def once(function, inputs: list[Tensor], cotangent: Tensor | None) -> list[Tensor]:
    """Returns the output and the gradients of the inputs. cotangent: the gradient of the output."""
    if not inputs:
        with torch.no_grad():
            return [function()]
    out = function(*inputs)
    grads = torch.autograd.grad(out, inputs, cotangent)
    return [out.detach(), *grads]


def clock(run, device: torch.device) -> tuple[float, float]:
    """Returns the seconds that run() takes and its peak of memory.

    The peak is in bytes beyond what was allocated before; on a CPU it is 0.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # Events, so that the time is the GPU's and not that of the launches.
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    seconds = begin.elapsed_time(end) / 1e3
    return seconds, torch.cuda.max_memory_allocated() - before


def compare(
    ways: dict[str, Callable], inputs: list[Tensor], device: torch.device
) -> dict[str, dict[str, float]]:
    """Returns for each way {"seconds": median, "peak": bytes, "error": ...}.

    error: the largest difference from the plain way, of output and gradients, as a fraction of its
    largest value.
    """
    cotangent = random_cotangent(ways["plain"], inputs, device)
    expected = once(ways["plain"], inputs, cotangent)
    runs = {name: partial(once, function, inputs, cotangent) for name, function in ways.items()}
    errors = {}
    # The first call is also the warm-up, which includes compiling.
    for name, run in runs.items():
        errors[name] = relative_error(run(), expected)
        start = time.perf_counter()
        clock(run, device)
        seconds_of_call = max(1e-4, time.perf_counter() - start)
        rounds = max(3, int(SECONDS / seconds_of_call))
    clocked: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    # All ways in each round, so that a machine that slows down slows them all.
    for _ in range(min(rounds, MAX_ROUNDS)):
        for name, run in runs.items():
            clocked[name].append(clock(run, device))
    result = {}
    for name, pairs in clocked.items():
        seconds = statistics.median(seconds for seconds, _ in pairs)
        peak = max(peak for _, peak in pairs)
        result[name] = {"seconds": seconds, "peak": peak, "error": errors[name]}
    return result


def random_cotangent(function, inputs: list[Tensor], device: torch.device) -> Tensor | None:
    """Returns a random gradient of the output, or None without inputs.

    It is in the inputs' dtype, but for a scalar, which is a loss in fp32.
    """
    if not inputs:
        return None
    shape = function(*inputs).shape
    dtype = inputs[0].dtype if shape else torch.float32
    return torch.randn(shape, device=device).to(dtype)


def relative_error(results: list[Tensor], expected: list[Tensor]) -> float:
    """Returns the largest difference of a tensor, as a fraction of its largest expected value."""
    errors = []
    for a, b in zip(results, expected, strict=True):
        largest_difference = (a - b).abs().max()
        errors.append(float(largest_difference / b.abs().max()))
    return max(errors)


def rate_of_copy(shape: tuple, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Returns the seconds and the bytes a second of a copy as large as the NF4 case.

    That case reads codes, absmax and nested scales of the shape's largest matrix, and writes it in
    dtype.
    """
    D, F, *_ = shape
    codes = 0.5
    absmax = 1 / 64  # a byte for each block
    nested = 4 / (64 * 256)  # an fp32 number for 256 blocks
    bytes_per_weight = codes + absmax + nested + dtype.itemsize
    moved = F * D * bytes_per_weight
    # A copy moves each byte twice: it is read and written.
    source, target = torch.empty(2, int(moved / 2), dtype=torch.uint8, device=device)
    copy = partial(target.copy_, source)
    seconds = statistics.median(clock(copy, device)[0] for _ in range(20))
    return seconds, moved / seconds


def measurements(
    shape: tuple,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    only: str = "",
    compiles: bool = True,
) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Yields (name, a function that measures the case) for each case whose name contains `only`.

    shape: a value of BENCH_SHAPES.
    compiles: whether the reference is also measured under torch.compile.

    The function returns what `compare` does, {way: {"seconds", "peak", "error"}}; for the
    dequantisation of NF4 also "copy": {"seconds", "bytes_per_second"}.
    """

    def measure(name: str, case: Case) -> dict:
        ways = {"ours": case.ours, "plain": case.plain}
        if compiles:
            ways["compiled"] = torch.compile(case.plain)
        result = compare(ways, case.inputs, device)
        if name == "NF4 dequantise":
            seconds, rate = rate_of_copy(shape, dtype, device)
            result["copy"] = {"seconds": seconds, "bytes_per_second": rate}
        return result

    for name, case in cases(shape, tokens, device, dtype).items():
        if only in name:
            yield name, partial(measure, name, case)


# ---- the output ----


def print_result(name: str, result: dict, device: torch.device) -> None:
    """Prints a line of the table.

    It has the milliseconds of each way and, on a GPU, the megabytes, and the error of ours.
    """
    on_gpu = device.type == "cuda"
    times = []
    peaks = []
    for way in WAYS:
        stats = result.get(way)
        time_text = ""
        peak_text = ""
        if stats:
            milliseconds = 1e3 * stats["seconds"]
            time_text = f"{milliseconds:.3f}"
        if stats and on_gpu:
            megabytes = stats["peak"] / 1e6
            peak_text = f"{megabytes:.1f}"
        times.append(time_text)
        peaks.append(peak_text)
    columns = "".join(f"{column:>10}" for column in times + peaks)
    error = result["ours"]["error"]
    print(f"{name:20}{columns}{error:9.1e}", flush=True)
    if "copy" in result and on_gpu:
        share = result["copy"]["seconds"] / result["ours"]["seconds"]
        gigabytes_per_second = result["copy"]["bytes_per_second"] / 1e9
        print(f"{'':20}{share:.0%} of the rate of a copy ({gigabytes_per_second:,.0f} GB/s)")


def can_compile(device: torch.device) -> bool:
    """True if torch.compile works here: on a CPU it needs a C++ compiler."""
    return device.type == "cuda" or shutil.which("g++") is not None


def read_arguments(on_gpu: bool) -> argparse.Namespace:
    """Returns the arguments of the command line. On a GPU their defaults are larger."""
    tokens = 4096 if on_gpu else 1024
    shape = "8b" if on_gpu else "135m"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tokens", type=int, default=tokens, help="tokens of the inputs")
    add("--shape", choices=[*BENCH_SHAPES], default=shape, help="the model whose sizes are used")
    add("--only", default="", help="measure only the cases whose name contains this")
    add("--json", type=Path, metavar="FILE", help="write the results to this file as well")
    return parser.parse_args()


def main() -> None:
    device = pick_device("auto")
    on_gpu = device.type == "cuda"
    args = read_arguments(on_gpu)
    dtype, _ = pick_dtype("auto", device)
    hardware = f"{torch.get_num_threads()} threads of a CPU"
    if on_gpu:
        hardware = torch.cuda.get_device_name()
    print(
        f"{hardware}, torch {torch.__version__}, {dtype}, {args.tokens} tokens, shape {args.shape};"
        " forward and backward"
    )
    headings = ["ms: ours", "plain", "compiled", "MB: ours", "plain", "compiled"]
    columns = "".join(f"{heading:>10}" for heading in headings)
    print(f"{'':20}{columns}{'error':>9}")
    shape = BENCH_SHAPES[args.shape]
    compiles = can_compile(device)
    results = {}
    for name, measure in measurements(shape, args.tokens, device, dtype, args.only, compiles):
        results[name] = measure()
        print_result(name, results[name], device)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
