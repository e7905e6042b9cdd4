"""Times each function of kernels/ against its plain reference and against that reference under torch.compile.

    python kernels/bench.py [--tokens 4096] [--shape 8b|135m] [--only NAME] [--json FILE]

The times are of forward and backward, medians of rounds in which the three alternate. The error is the largest
difference from the plain reference. On a GPU: 8B shapes, also the peak of memory, and for NF4 the share of a copy's
bandwidth. On a CPU: the functions that compute there, at the shape of the default base. kernels/README.md says, with
these figures, what stays in kernels/ and why.
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

BENCH_SHAPES = {  # hidden, intermediate, heads, key-value heads, head_dim, vocabulary
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
    """Returns {name: case} of all functions that compute on the device. shape: a value of SHAPES."""
    D, F, *_ = shape
    make = partial(random_tensor, device=device, dtype=dtype)
    x = make(tokens, D)
    all_cases = {
        **norm_cases(shape, x, make),
        **rope_cases(shape, tokens, make),
        **gate_cases(shape, tokens, make),
        **trained_cases(shape, x, make),
        **lora_cases(shape, x, make),
        **loss_cases(shape, x, make),
        **nf4_cases(shape, make, dtype),
    }
    if device.type == "cuda":
        all_cases |= adamw_cases(F * D, device)
    return all_cases


def random_tensor(
    *size: int, device: torch.device, dtype: torch.dtype, grad: bool = True
) -> Tensor:
    return (0.02 * torch.randn(size, device=device)).to(dtype).requires_grad_(grad)


def norm_cases(shape: tuple, x: Tensor, make: Callable[..., Tensor]) -> dict[str, Case]:
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
    _, _, H, G, d, _ = shape
    q, k = make(tokens, H, d), make(tokens, G, d)
    cos = make(tokens, 1, d // 2, grad=False)
    sin = make(tokens, 1, d // 2, grad=False)

    def ours(q, k):
        return torch.cat(rope_qk(q, k, cos, sin), 1)

    def plain(q, k):
        return torch.cat([rope_reference(q, cos, sin), rope_reference(k, cos, sin)], 1)

    return {"rope q, k": Case(ours, plain, [q, k])}


def gate_cases(shape: tuple, tokens: int, make: Callable[..., Tensor]) -> dict[str, Case]:
    F = shape[1]
    gate, up = make(tokens, F), make(tokens, F)

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
    weights = [make(*size, dtype=torch.float32) for size in ((F, D), (F, D), (D, F))]

    def mlp(linears) -> Callable:
        def run(x, gate_weight, up_weight, down_weight):
            gate, up = linears(x, [gate_weight, up_weight], [None, None])
            return linears(gate, [down_weight], [None], up, "silu")[0]

        return run

    return {"trained MLP": Case(mlp(linears), mlp(linears_reference), [x, *weights])}


def lora_cases(shape: tuple, x: Tensor, make: Callable[..., Tensor]) -> dict[str, Case]:
    """q, k and v, and an MLP, with adapters on frozen weights."""
    D, F, H, G, d, _ = shape

    def adapted(out: int, size: int) -> LoRAWeights:
        weight = make(out, size, grad=False)
        A = make(RANK, size, dtype=torch.float32)
        B = make(out, RANK, dtype=torch.float32)
        return LoRAWeights((weight,), None, A, B, 2.0)

    def adapters(layers: list[LoRAWeights]) -> list[Tensor]:
        return [t for layer in layers for t in (layer.A, layer.B)]

    qkv = [adapted(heads * d, D) for heads in (H, G, G)]
    gate_up = [adapted(F, D), adapted(F, D)]
    down = [adapted(D, F)]

    # A and B are inputs for their gradients' sake; the functions find them in `qkv`, `gate_up` and `down`.
    def qkv_ours(x, *_):
        return torch.cat(lora_linears(x, qkv), 1)

    def qkv_plain(x, *_):
        return torch.cat(lora_linears_reference(x, qkv), 1)

    def mlp(linears) -> Callable:
        def run(x, *_):
            gate, up = linears(x, gate_up)
            return linears(gate, down, up, "silu")[0]

        return run

    return {
        "LoRA q, k, v": Case(qkv_ours, qkv_plain, [x, *adapters(qkv)]),
        "LoRA MLP": Case(
            mlp(lora_linears), mlp(lora_linears_reference), [x, *adapters(gate_up + down)]
        ),
    }


def loss_cases(shape: tuple, x: Tensor, make: Callable[..., Tensor]) -> dict[str, Case]:
    D, vocabulary = shape[0], shape[-1]
    head = make(vocabulary, D, grad=False)
    targets = torch.randint(vocabulary, (len(x),), device=x.device)

    def ours(x):
        return linear_cross_entropy(x, head, targets)[0]

    def plain(x):
        return linear_cross_entropy_reference(x, head, targets)[0]

    return {"head and loss": Case(ours, plain, [x])}


def nf4_cases(shape: tuple, make: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Case]:
    """The dequantisation of the shape's largest matrix, and products with it of few rows, without gradients."""
    D, F, *_ = shape
    frozen = quantize(make(F, D, grad=False).float())

    def product_case(rows: int) -> Case:
        x = make(rows, D, grad=False)
        return Case(
            partial(nf4_linear, x, frozen, None), partial(nf4_linear_reference, x, frozen, None), []
        )

    dequantize = Case(
        partial(nf4_dequantize, frozen, dtype), partial(nf4_dequantize_reference, frozen, dtype), []
    )
    return {
        "NF4 dequantise": dequantize,
        "NF4 linear, 8 rows": product_case(8),
        "NF4 linear, 1 row": product_case(1),
    }


def adamw_cases(count: int, device: torch.device) -> dict[str, Case]:
    """A step on `count` bf16 weights with 8-bit moments. lr is 0, so that both may step any number of times."""
    weight = torch.randn(count, device=device).to(torch.bfloat16)
    grad = torch.randn(count, device=device).to(torch.bfloat16)
    state = {"step": torch.ones((), device=device)}
    for name in ("m", "v"):
        state[name], state[f"{name}_scale"] = quantize_moment(grad.float().square(), name)
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
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


def clock(run, device: torch.device) -> tuple[float, float]:
    """Returns the seconds that run() takes and, on a GPU, the bytes of memory at its peak beyond those before it."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
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

    error: the largest difference from the plain way, of output and gradients, as a fraction of its largest value.
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
        rounds = max(3, int(SECONDS / max(1e-4, time.perf_counter() - start)))
    clocked = {name: [] for name in runs}
    for _ in range(min(rounds, MAX_ROUNDS)):
        for name, run in runs.items():
            clocked[name].append(clock(run, device))
    result = {}
    for name, pairs in clocked.items():
        seconds = statistics.median(seconds for seconds, _ in pairs)
        result[name] = {
            "seconds": seconds,
            "peak": max(peak for _, peak in pairs),
            "error": errors[name],
        }
    return result


def random_cotangent(function, inputs: list[Tensor], device: torch.device) -> Tensor | None:
    """Returns a random gradient of the output, in the inputs' dtype (fp32 for a scalar); None without inputs."""
    if not inputs:
        return None
    shape = function(*inputs).shape
    dtype = inputs[0].dtype if shape else torch.float32
    return torch.randn(shape, device=device).to(dtype)


def relative_error(results: list[Tensor], expected: list[Tensor]) -> float:
    errors = []
    for a, b in zip(results, expected, strict=True):
        errors.append(float((a - b).abs().max() / b.abs().max()))
    return max(errors)


def rate_of_copy(shape: tuple, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Returns the seconds and the bytes a second of a copy that moves as many bytes as the NF4 case.

    That case reads codes, absmax and nested scales of the shape's largest matrix, and writes it in dtype.
    """
    D, F, *_ = shape
    bytes_per_weight = 0.5 + 1 / 64 + 4 / (64 * 256) + dtype.itemsize
    moved = F * D * bytes_per_weight
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

    shape: a value of SHAPES.
    compiles: whether the reference is also measured under torch.compile.

    The function returns what `compare` does, {way: {"seconds", "peak", "error"}}; for the dequantisation of NF4 also
    "copy": {"seconds", "bytes_per_second"}.
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
    """Prints a line of the table: milliseconds and, on a GPU, megabytes of each way, and the error of ours."""
    on_gpu = device.type == "cuda"
    times, peaks = [], []
    for way in WAYS:
        stats = result.get(way)
        times.append(f"{1e3 * stats['seconds']:.3f}" if stats else "")
        peaks.append(f"{stats['peak'] / 1e6:.1f}" if stats and on_gpu else "")
    columns = "".join(f"{column:>10}" for column in times + peaks)
    print(f"{name:20}{columns}{result['ours']['error']:9.1e}", flush=True)
    if "copy" in result and on_gpu:
        share = result["copy"]["seconds"] / result["ours"]["seconds"]
        rate = result["copy"]["bytes_per_second"]
        print(f"{'':20}{share:.0%} of the rate of a copy ({rate / 1e9:,.0f} GB/s)")


def can_compile(device: torch.device) -> bool:
    """True if torch.compile works here: on a CPU it needs a C++ compiler."""
    return device.type == "cuda" or shutil.which("g++") is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    device = pick_device("auto")
    on_gpu = device.type == "cuda"
    default_tokens, default_shape = (4096, "8b") if on_gpu else (1024, "135m")
    parser.add_argument("--tokens", type=int, default=default_tokens, help="tokens of the inputs")
    parser.add_argument(
        "--shape",
        choices=[*BENCH_SHAPES],
        default=default_shape,
        help="the model whose sizes are used",
    )
    parser.add_argument(
        "--only", default="", help="measure only the cases whose name contains this"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results to this file as well"
    )
    args = parser.parse_args()
    dtype, _ = pick_dtype("auto", device)
    hardware = (
        torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of a CPU"
    )
    print(
        f"{hardware}, torch {torch.__version__}, {dtype}, {args.tokens} tokens, shape {args.shape};"
        " forward and backward"
    )
    headings = ["ms: ours", "plain", "compiled", "MB: ours", "plain", "compiled"]
    print(f"{'':20}{''.join(f'{heading:>10}' for heading in headings)}{'error':>9}")
    results = {}
    compiles = can_compile(device)
    for name, measure in measurements(
        BENCH_SHAPES[args.shape], args.tokens, device, dtype, args.only, compiles
    ):
        results[name] = measure()
        print_result(name, results[name], device)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
