"""Each function of kernels/ against its plain reference and against that reference under torch.compile, in one run.

    python kernels/bench.py [--tokens 4096] [--shape 8b|135m] [--only NAME] [--json FILE]

Forward and backward, medians of turns that alternate, and how far ours is from the plain form. On a GPU: 8B shapes,
the peak of memory, and for NF4 the share of the bandwidth of a copy. On a CPU: what ours does there, at the default
base's shape. What stays in kernels/ and why is said, with these figures, in kernels/README.md.
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

SHAPES = {  # hidden, intermediate, heads, key-value heads, head_dim, vocabulary
    "rehearsal": (128, 256, 4, 2, 32, 512),  # no real model's: to try the script
    "8b": (4096, 14336, 32, 8, 128, 128256),
    "135m": (576, 1536, 9, 3, 64, 49152),
}
WAYS = ("ours", "plain", "compiled")
SECONDS = 1.0  # that each way may take in all


def cases(shape: tuple, tokens: int, device: torch.device, dtype: torch.dtype) -> dict:
    """name: (ours, reference, inputs); gradients are wanted of the inputs that require one."""
    D, F, H, G, d, V = shape

    def numbers(*size, grad=True, dtype=dtype):
        return (0.02 * torch.randn(size, device=device)).to(dtype).requires_grad_(grad)

    def adapted(out, size, frozen=None):
        frozen = frozen or (numbers(out, size, grad=False),)
        return LoRAWeights(frozen, None, *(numbers(*s, dtype=torch.float32) for s in ((16, size), (out, 16))), 2.0)

    x, y, weight = numbers(tokens, D), numbers(tokens, D), numbers(D, grad=False)
    q, k = numbers(tokens, H, d), numbers(tokens, G, d)
    waves = numbers(tokens, 1, d // 2, grad=False), numbers(tokens, 1, d // 2, grad=False)
    gate, up, head = numbers(tokens, F), numbers(tokens, F), numbers(V, D, grad=False)
    targets = torch.randint(V, (tokens,), device=device)
    qkv, mlp = [adapted(n * d, D) for n in (H, G, G)], ([adapted(F, D), adapted(F, D)], [adapted(D, F)])
    frozen = quantize(numbers(F, D, grad=False).float())
    few, one = numbers(8, D, grad=False), numbers(1, D, grad=False)

    def whole_mlp(linears, gate_up):
        def run(x, *_):
            gate, up = linears(x, mlp[0])
            return gate_up(gate, up, mlp[1])

        return run

    masters = [numbers(*size, dtype=torch.float32) for size in ((F, D), (F, D), (D, F))]

    def trained_mlp(linears, gate_up):
        def run(x, *masters):
            gate, up = linears(x, masters[:2], [None, None])
            return gate_up(gate, up, masters[2:])

        return run

    qkv_leaves = [t for linear in qkv for t in (linear.A, linear.B)]
    mlp_leaves = [t for linear in (*mlp[0], *mlp[1]) for t in (linear.A, linear.B)]
    return {
        "rms_norm": (
            lambda x: rms_norm(x, weight, 1e-5), lambda x: rms_norm_reference(x, weight, 1e-5), [x]),
        "sum and rms_norm": (
            lambda x, y: torch.cat(add_rms_norm(x, y, weight, 1e-5), 1),
            lambda x, y: torch.cat(add_rms_norm_reference(x, y, weight, 1e-5), 1), [x, y]),
        "rope q, k": (
            lambda q, k: torch.cat(rope_qk(q, k, *waves), 1),
            lambda q, k: torch.cat([rope_reference(q, *waves), rope_reference(k, *waves)], 1), [q, k]),
        "swiglu": (
            lambda gate, up: Gated.apply(gate, up, "silu"), lambda gate, up: gated_reference(gate, up, "silu"),
            [gate, up]),
        "geglu": (
            lambda gate, up: Gated.apply(gate, up, "gelu"), lambda gate, up: gated_reference(gate, up, "gelu"),
            [gate, up]),
        "trained MLP": (
            trained_mlp(linears, lambda gate, up, down: linears(gate, down, [None], up, "silu")[0]),
            trained_mlp(linears_reference, lambda gate, up, down: linears_reference(gate, down, [None], up, "silu")[0]),
            [x, *masters]),
        "LoRA q, k, v": (
            lambda x, *_: torch.cat(lora_linears(x, qkv), 1),
            lambda x, *_: torch.cat(lora_linears_reference(x, qkv), 1), [x, *qkv_leaves]),
        "LoRA MLP": (
            whole_mlp(lora_linears, lambda gate, up, down: lora_linears(gate, down, up, "silu")[0]),
            whole_mlp(lora_linears_reference, lambda gate, up, down: lora_linears_reference(gate, down, up, "silu")[0]),
            [x, *mlp_leaves]),
        "head and loss": (
            lambda x: linear_cross_entropy(x, head, targets)[0],
            lambda x: linear_cross_entropy_reference(x, head, targets)[0], [x]),
        "NF4 dequantise": (
            lambda: nf4_dequantize(frozen, dtype), lambda: nf4_dequantize_reference(frozen, dtype), []),
        "NF4 linear, 8 rows": (
            lambda: nf4_linear(few, frozen, None), lambda: nf4_linear_reference(few, frozen, None), []),
        "NF4 linear, 1 row": (
            lambda: nf4_linear(one, frozen, None), lambda: nf4_linear_reference(one, frozen, None), []),
    } | (adamw_case(F * D, device) if device.type == "cuda" else {})  # fmt: skip


def adamw_case(count: int, device: torch.device) -> dict:
    """A step with moments in 8 bits on bf16 weights. Its rate is 0, so that both may step as often as they like."""
    weight, grad = (torch.randn(count, device=device).to(torch.bfloat16) for _ in range(2))
    state = {"step": torch.ones((), device=device)}
    for name in ("m", "v"):
        state[name], state[f"{name}_scale"] = quantize_moment(grad.float().square(), name)
    group = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    seed = torch.ones(2, dtype=torch.int64, device=device)

    def ours():
        adamw_step(weight, grad, state, group, seed, None)
        return weight

    def plain():
        m, v = (dequantize_moment(state[name], state[f"{name}_scale"], name) for name in ("m", "v"))
        new = adamw_update(weight.float(), grad.float(), m, v, 1, group).to(weight.dtype)
        return new, quantize_moment(m, "m"), quantize_moment(v, "v")

    return {"AdamW, 8 bits": (ours, lambda: plain()[0], [])}


def once(function, inputs: list[Tensor], cotangent: Tensor | None) -> list[Tensor]:
    """The output and the gradients."""
    if not inputs:
        with torch.no_grad():
            return [function()]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


def clock(run, device: torch.device) -> tuple[float, float]:
    """Seconds, and bytes at the peak beyond those before."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, begin, end = torch.cuda.memory_allocated(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before


def compare(ways: dict, inputs: list[Tensor], device: torch.device) -> dict[str, tuple[float, float, float]]:
    """Of each way: median seconds, peak bytes, and its largest distance from the plain form, relative to that."""
    shape = once(ways["plain"], inputs, None)[0].shape if not inputs else ways["plain"](*inputs).shape
    cotangent = torch.randn(shape, device=device).to(inputs[0].dtype if inputs and shape else torch.float32)
    wanted = once(ways["plain"], inputs, cotangent)
    found, errors = {name: [] for name in ways}, {}
    for name, function in ways.items():  # also the warm-up, compilation included
        got = once(function, inputs, cotangent)
        errors[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True))
        start = time.perf_counter()
        clock(lambda function=function: once(function, inputs, cotangent), device)
        turns = max(3, int(SECONDS / max(1e-4, time.perf_counter() - start)))
    for _ in range(min(turns, 50)):
        for name, function in ways.items():
            found[name].append(clock(lambda function=function: once(function, inputs, cotangent), device))
    return {
        name: (statistics.median(t for t, _ in each), max(peak for _, peak in each), errors[name])
        for name, each in found.items()
    }


def rate_of_copy(shape: tuple, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Of a copy that moves as many bytes as the dequantisation of the shape's largest matrix: seconds, and bytes a
    second."""
    D, F, *_ = shape
    moved = F * D * (0.5 + 1 / 64 + 4 / (64 * 256) + dtype.itemsize)
    a, b = torch.empty(2, int(moved / 2), dtype=torch.uint8, device=device)
    seconds = statistics.median(clock(lambda: b.copy_(a), device)[0] for _ in range(20))
    return seconds, moved / seconds


def measurements(
    shape: tuple, tokens: int, device: torch.device, dtype: torch.dtype, only: str = "", compiles: bool = True
) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Of each case whose name has `only` in it, a function that measures it: of each way, seconds, bytes at the peak
    and the largest difference; of dequantisation, how a copy compares."""

    def measure(name: str, ours, plain, inputs: list[Tensor]) -> dict:
        ways = {"ours": ours, "plain": plain}
        if compiles:
            ways["compiled"] = torch.compile(plain)
        keys = ("seconds", "peak", "error")
        result = {way: dict(zip(keys, found)) for way, found in compare(ways, inputs, device).items()}
        if name == "NF4 dequantise":
            seconds, rate = rate_of_copy(shape, dtype, device)
            result["copy"] = {"seconds": seconds, "bytes_per_second": rate}
        return result

    for name, case in cases(shape, tokens, device, dtype).items():
        if only in name:
            yield name, partial(measure, name, *case)


def show(name: str, result: dict, device: torch.device) -> None:
    columns = [f"{1e3 * result[way]['seconds']:.3f}" if way in result else "" for way in WAYS]
    on_gpu = device.type == "cuda"
    columns += [f"{result[way]['peak'] / 1e6:.1f}" if way in result and on_gpu else "" for way in WAYS]
    print(f"{name:20}{''.join(f'{c:>10}' for c in columns)}{result['ours']['error']:9.1e}", flush=True)
    if "copy" in result and on_gpu:
        share, rate = result["copy"]["seconds"] / result["ours"]["seconds"], result["copy"]["bytes_per_second"]
        print(f"{'':20}{share:.0%} of the rate of a copy ({rate / 1e9:,.0f} GB/s)")


def can_compile(device: torch.device) -> bool:
    return device.type == "cuda" or shutil.which("g++") is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    device = pick_device("auto")
    parser.add_argument("--tokens", type=int, default=4096 if device.type == "cuda" else 1024)
    parser.add_argument("--shape", choices=[*SHAPES], default="8b" if device.type == "cuda" else "135m")
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    args = parser.parse_args()
    dtype, _ = pick_dtype("auto", device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    print(f"{name}, torch {torch.__version__}, {dtype}, {args.tokens} tokens, shape {args.shape}; forward and backward")
    print(
        f"{'':20}{'ms: ours':>10}{'plain':>10}{'compiled':>10}{'MB: ours':>10}{'plain':>10}{'compiled':>10}{'error':>9}"
    )
    found = {}
    shape, compiles = SHAPES[args.shape], can_compile(device)
    for name, measure in measurements(shape, args.tokens, device, dtype, args.only, compiles):
        found[name] = measure()
        show(name, found[name], device)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
