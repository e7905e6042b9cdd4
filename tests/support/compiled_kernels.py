"""Every Triton kernel through Triton's own compiler, for GPUs that are not here, and what each takes of them.

    python tests/support/compiled_kernels.py [--arch 80 90 100]

Needs no GPU and no torch with CUDA; prints a line a kernel, or with --json a list of the same. Shapes are those of
Llama 3.1 8B where nothing else is said. `resources` is also for other scripts: of a compiled kernel, registers a
thread, bytes that spill to local memory, shared memory, and how many loads move 16 bytes a thread (a kernel bound by
memory needs these). So is `cases`: benchmarks/gpu_run.sh launches them all on a GPU that is there, so their tensors
hold zeros, which are valid ids and indices. Imported, this file fakes nothing.
"""

if __name__ == "__main__":
    import fake_cuda  # first: it changes torch

# isort: split
import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDE_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.\S*128")
D, F, H, G, HEAD_DIM, V = 4096, 14336, 32, 8, 128, 128256  # Llama 3.1 8B
N = 16384  # tokens
bf16, fp32, uint8, int64 = torch.bfloat16, torch.float32, torch.uint8, torch.int64


def resources(compiled) -> dict:
    """Of a compiled kernel, read out of its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = run_tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "registers": registers,
        "spilled": stack,
        "shared": compiled.metadata.shared,
        "wide_loads": len(WIDE_LOAD.findall(code)),
    }


def run_tool(name: str, *words: str) -> str:
    return subprocess.run([BINARIES / name, *words], capture_output=True, text=True, check=True).stdout


def cases(device: str = "cuda") -> Iterator[tuple[str, Callable]]:
    """(name, a call that launches one kernel or several)."""
    from kernels import adamw, cross_entropy, decode_attention, experts, grouped, nf4, rms_norm, rope, swiglu
    from kernels.attention import Scores

    def made(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    yield from norms(rms_norm, made)
    whole, part = made(N, 1, HEAD_DIM // 2), made(N, 1, HEAD_DIM // 8)
    yield "rope", lambda: rope.rotate_qk(made(N, H, HEAD_DIM), made(N, G, HEAD_DIM), whole, whole)
    yield "rope of a quarter", lambda: rope.rotate_qk(made(N, H, HEAD_DIM), made(N, H, HEAD_DIM), part, part)
    for act in swiglu.ACTIVATIONS:
        yield f"gate, {act}", lambda act=act: swiglu.gated(made(N, F), made(N, F), act)
        for product in (False, True):
            backward = lambda act=act, product=product: swiglu.gated_backward(*made(3, N, F), act, product)
            yield f"gate, {act}, backward{' and product' if product else ''}", backward
    stacked = made(N, 2 * 8192)  # gate and up as halves of one matrix
    yield "gate, stacked", lambda: swiglu.gated(*stacked.chunk(2, -1), "silu")
    yield "gate, stacked, backward", lambda: swiglu.gated_backward(made(N, 8192), *stacked.chunk(2, -1), "silu", True)
    loss, losses, targets = cross_entropy.softmax_on_gpu, made(2048, dtype=fp32), made(2048, dtype=int64)
    for cap in (None, 30.0):
        for vocabulary, weights in ((V, None), (151669, losses)):  # the second one is odd, so rows are padded
            logits = made(2048, -(-vocabulary // 16) * 16)[:, :vocabulary]
            each = lambda x=logits, cap=cap, weights=weights: loss(x, targets, losses, True, cap, weights)
            yield f"loss, soft-cap {cap}, vocabulary {vocabulary}", each
    reweighted = {"label smoothing": (30.0, 0.1, False), "DFT": (None, 0.0, True)}
    for name, (cap, *rest) in reweighted.items():
        logits = made(2048, 151680)[:, :151669]
        each = lambda x=logits, cap=cap, rest=rest: loss(x, targets, losses, True, cap, losses, *rest)
        yield f"loss with {name}, soft-cap {cap}", each
    for double in (True, False):
        absmax = made(F, D // 64, dtype=uint8 if double else fp32)
        nested = (made(F * D // 64 // 256, dtype=fp32), made(1, dtype=fp32)) if double else (None, None)
        frozen = nf4.NF4(made(F, D // 2, dtype=uint8), absmax, *nested)
        name = f"nf4{', double quantisation' if double else ''}"
        yield name, lambda frozen=frozen: nf4.dequantize_nf4_on_gpu(frozen, bf16)
        for rows in (1, 2, 8):
            times = lambda rows=rows, frozen=frozen: nf4.multiply_on_gpu(made(rows, D), frozen, None)
            yield f"{name}, times {rows} rows", times
    E, active, inner = 128, 8, 768  # Qwen3-30B-A3B
    token, share = made(N * active, dtype=int64), made(N * active, dtype=fp32)
    wide, narrow = made(N * active, 2 * inner), made(N * active, inner)
    yield "experts, gate and up", lambda: experts.gated_experts(wide, share, "silu")
    yield "experts, gate and up, backward", lambda: experts.gated_backward_with_weights(narrow, wide, share, "silu")
    yield "experts, sum", lambda: experts.sum_rows(made(N * active, 2048), made(N, active, dtype=int64))
    rows_of = grouped.Groups(token, made(E, dtype=torch.int32))
    for rank in (16, 64):
        low, A, B = made(N * active, rank), made(E, rank, 2048), made(E, inner, rank)
        forward = lambda low=low, B=B: grouped.add_low_rank(wide[:, inner:], low, B.transpose(1, 2), 2.0, rows_of)
        yield f"experts, adapters of rank {rank}", forward
        rows = made(N * active, 2048)
        backward = lambda low=low, A=A, rows=rows: grouped.add_low_rank(rows, low, A, 1.0, rows_of)
        yield f"experts, adapters of rank {rank}, backward", backward
    for double in (True, False):
        absmax = made(E, inner, 2048 // 64, dtype=uint8 if double else fp32)
        nested = (made(E, inner * 2048 // 64 // 256, dtype=fp32), made(E, 1, dtype=fp32)) if double else (None, None)
        frozen = nf4.NF4(made(E, inner, 1024, dtype=uint8), absmax, *nested)
        name = f"nf4 of experts{', double quantisation' if double else ''}"
        yield name, lambda frozen=frozen: grouped.dequantize_experts_on_gpu(frozen, bf16)
        product = grouped.Product([*frozen], 4, True, E // 2, [None, None])  # gate and up of half as many
        few = grouped.Groups(made(64, dtype=int64), made(E // 2, dtype=torch.int32))
        times = lambda product=product, few=few: grouped.multiply_few_on_gpu(made(64, 2048), product, few)
        yield f"{name}, times 64 rows", times
    group, seed = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}, made(2, dtype=int64)
    for dtype, bits in ((fp32, 8), (bf16, 8), (bf16, 32)):
        state = {"step": made(dtype=fp32)}
        for moment in ("m", "v"):
            state[moment] = made(F * D, dtype=uint8 if bits == 8 else fp32)
            state[f"{moment}_scale"] = made(F * D // 256, dtype=fp32)
        tensors = made(F * D, dtype=dtype), made(F * D, dtype=dtype), state
        step = lambda tensors=tensors: adamw.adamw_step(*tensors, group, seed, made(dtype=fp32))
        yield f"AdamW, {bits} bits, weights of {dtype.itemsize} bytes", step
    kinds = {"": (1, HEAD_DIM, Scores(0.1), bf16), ", as Gemma": (1, 256, Scores(0.1, 512, 50.0), bf16)}
    kinds |= {", 64 lines": (64, HEAD_DIM, Scores(0.1), bf16), ", fp32": (2, 64, Scores(0.1), fp32)}
    for name, (lines, size, scores, dtype) in kinds.items():
        cache, new = made(lines, G, 1024, size, dtype=dtype), made(lines, G, size, dtype=dtype)
        numbers = made(1, dtype=int64), made(lines, dtype=int64)
        given = made(lines, H, size, dtype=dtype), new, new, cache, cache, *numbers, scores
        yield f"decoding's attention{name}", lambda given=given: decode_attention.decode_attention(*given)


def norms(rms_norm, made: Callable) -> Iterator[tuple[str, Callable]]:
    """Of rows as wide as models are, of heads, and of odd rows; weights are frozen or trained, which are in fp32."""

    def forward(*shape: int, adds: bool) -> Callable:
        x = made(*shape)
        return lambda: rms_norm.normalize_on_gpu(x, x if adds else None, made(shape[-1]), 1e-5, 0.0)

    def backward(*shape: int, adds: bool, trained: bool) -> Callable:
        x, scale = made(*shape), made(*shape[:-1], 1, dtype=fp32)
        weight = made(shape[-1], dtype=fp32 if trained else bf16)
        return lambda: rms_norm.backward_on_gpu(x, x, weight, scale, 0.0, trained, x if adds else None)

    heads = {"norm of heads": (N, H, HEAD_DIM), "norm of heads of 64": (N, H, 64), "norm of odd heads": (N, H, 22)}
    for name, shape in {"norm": (N, D), **heads}.items():
        yield name, forward(*shape, adds=False)
        yield f"{name} backward", backward(*shape, adds=False, trained=False)
        yield f"{name} backward, weight trained", backward(*shape, adds=False, trained=True)
    for width in (576, 1152, 3584, D, 8192, 16384):
        name = f"sum and norm of {width}"
        yield name, forward(N, width, adds=True)
        yield f"{name} backward", backward(N, width, adds=True, trained=False)
        yield f"{name} backward, weight trained", backward(N, width, adds=True, trained=True)


def compile_all(archs: list[int]) -> list[dict]:
    """A row a launch: name, arch, kernel, its resources, or the error that compiling it ended with."""
    rows = []

    def on_launch(kernel, args, grid, options, bound):
        compiled = fake_cuda.compile_launch(kernel, args, grid, options)
        rows.append({"name": name, "arch": arch, "kernel": fake_cuda.kernel_name(kernel)} | resources(compiled))

    fake_cuda.on_launch = on_launch
    for arch in archs:
        fake_cuda.compile_for(arch)
        with fake_cuda.fake_tensors():
            for name, launch in cases():
                try:
                    launch()
                except Exception as error:  # noqa: BLE001 - of whatever kind: the table shows it
                    rows.append({"name": name, "arch": arch, "error": last_cause(error)})
    return rows


def last_cause(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {str(error)[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = compile_all(args.arch)
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        where = f"sm_{row['arch']:<4}{row['name']:40}"
        if "error" in row:
            print(f"{where}FAILED {row['error']}")
        else:
            print(
                f"{where}{row['kernel']:36}registers {row['registers']:3}, spilled {row['spilled']},"
                f" shared {row['shared']:6}, loads of 16 bytes {row['wide_loads']}"
            )
    print(f"{sum('error' in row for row in rows)} of {len(rows)} failed")


if __name__ == "__main__":
    main()
