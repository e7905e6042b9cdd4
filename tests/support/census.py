"""What one training step asks of a GPU, counted without one: launches, bytes through memory, operations, waits.

    python tests/support/census.py [--model llama-8b] [--method lora] [--layers 1 2] [--documents 40] [--tokens 16384]

The step runs on fake tensors (fake_cuda.py): every operation that would launch a kernel is a row. Counted are bytes
that the operation reads and writes, floating point operations, and every place where the host waits for the GPU. Two
numbers of layers give what one layer costs. --roofline adds how long a step would take on an H100 if every row ran at
the given share of the card's rates: AN ESTIMATE from published rates, never a measurement.
"""

import fake_cuda  # first: it changes torch

# isort: split
import argparse
import collections
import dataclasses
import json
import traceback
from dataclasses import dataclass

import numpy as np
import torch
from fake_cuda import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
LLAMA |= {"rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False, "num_key_value_heads": 8}
GEMMA = {"rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256}
MODELS = {  # as published
    "llama-8b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-1b": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"tie_word_embeddings": True},
    "smollm-135m": LLAMA
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "mistral-7b": LLAMA
    | {"model_type": "mistral", "vocab_size": 32000, "rope_theta": 10000.0, "sliding_window": 4096}
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "qwen3-8b": LLAMA
    | {"model_type": "qwen3", "vocab_size": 151936, "rms_norm_eps": 1e-6, "head_dim": 128}
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "gemma2-9b": GEMMA
    | {"model_type": "gemma2", "vocab_size": 256000, "max_position_embeddings": 8192, "sliding_window": 4096}
    | {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0}
    | {"final_logit_softcapping": 30.0},
    "gemma3-1b": GEMMA
    | {"model_type": "gemma3_text", "vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512}
    | {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4}
    | {"num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    | {"sliding_window_pattern": 6},
    "mixtral-8x7b": LLAMA
    | {"model_type": "mixtral", "vocab_size": 32000, "rope_theta": 1e6, "num_local_experts": 8}
    | {"num_experts_per_tok": 2, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32},
}
ADAPTER = {"rank": 16, "alpha": 16.0, "dropout": 0.0, "targets": "all"}
NO_KERNEL = set(
    """view _unsafe_view reshape t transpose permute slice select split split_with_sizes unsqueeze squeeze expand detach
    alias as_strided unbind chunk narrow _reshape_alias unflatten empty empty_like new_empty empty_strided sym_size
    is_pinned lift_fresh record_stream _pin_memory diagonal unfold view_as unsafe_split set_ device is_same_size
    _has_compatible_shallow_copy_type""".split()
)  # operations that launch nothing: they look at memory that is there, or ask for some
WAITS = ("nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount", "repeat_interleave")
PASSES = {  # of a kernel that goes over a tensor more than once: how often besides the first time
    "triton.cross_entropy.softmax_kernel": {"logits": 2},  # read twice, and the gradient is written
    "triton.adamw.adamw_kernel": {"weights": 1, "m": 1, "v": 1},  # read and written
    "triton.swiglu.gate_backward_kernel": {"grad": 1},  # the gradient of up is written where it was read
}


@dataclass
class Row:
    phase: str
    name: str
    bytes: int
    flops: int
    shapes: tuple = ()


def touched(t: torch.Tensor) -> int:
    """Bytes of memory behind a tensor, each counted once where it is expanded."""
    numbers = 1
    for size, stride in zip(t.shape, t.stride()):
        numbers *= size if stride else min(size, 1)
    return numbers * t.element_size()


class Census(TorchDispatchMode):
    """Collects rows while it is active. syncs: (phase, what waits and where)."""

    def __init__(self):
        super().__init__()
        self.rows: list[Row] = []
        self.syncs: list[tuple[str, str]] = []
        self.phase = "?"
        self.lengths: list[int] = []  # of the documents that attention is counted for

    def on_launch(self, kernel, args, grid, options, bound) -> None:
        name = f"triton.{fake_cuda.kernel_name(kernel)}"
        tensors = {k: v for k, v in bound.items() if isinstance(v, torch.Tensor)}
        distinct = {(t.untyped_storage()._cdata, t.storage_offset()): t for t in tensors.values()}
        again = PASSES.get(name, {})
        size = sum(map(touched, distinct.values())) + sum(more * touched(tensors[k]) for k, more in again.items())
        self.rows.append(Row(self.phase, name, size, 0, tuple(grid)))

    def on_operator(self, name: str, tensors: list[torch.Tensor]) -> None:
        self.rows.append(
            Row(self.phase, name, sum(map(touched, tensors)), self.attention_flops(name, tensors[0], None))
        )

    def attention_flops(self, name: str, q: torch.Tensor, window: int | None) -> int:
        """Of causal attention inside the documents: two products of each pair forward, five backward."""
        reach = [n if window is None else min(n, window) for n in self.lengths]
        pairs = sum(n * m - m * (m - 1) // 2 for n, m in zip(self.lengths, reach))
        products = {"backward": 5, "delta": 0}.get(name.rpartition("_")[2], 2)
        return products * 2 * pairs * q.shape[1] * q.shape[-1]  # [tokens, heads, d] or [1, heads, tokens, d]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        if name == "_local_scalar_dense":  # a fake tensor has no number: any will do
            if args[0].is_cuda:
                self.syncs.append((self.phase, f"item at {here()}"))
            return {torch.bool: False}.get(args[0].dtype, 0.0 if args[0].dtype.is_floating_point else 1)
        out = func(*args, **kwargs)
        read = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        written = [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
        if not any(t.is_cuda for t in read + written):
            return out
        by_mask = name == "index" and any(t.dtype == torch.bool for t in read[1:])
        if name in WAITS or by_mask:
            self.syncs.append((self.phase, f"{name} at {here()}"))
        crosses = len({t.device.type for t in read + written}) > 1
        if name in ("_to_copy", "copy_") and crosses and not kwargs.get("non_blocking"):
            self.syncs.append((self.phase, f"copy between host and GPU at {here()}"))
        if name not in NO_KERNEL and name != "prim::device":
            size = self.bytes_of(name, kwargs, read, written)
            shapes = tuple(tuple(t.shape) for t in read)
            flops = flops_of(func, name, args, kwargs, read, out)
            if name.startswith("_flash_attention"):
                back = kwargs.get("window_size_left", -1)
                flops = self.attention_flops(name, read[0], None if back < 0 else back + 1)
            self.rows.append(Row(self.phase, name, size, flops, shapes))
        return out

    def bytes_of(self, name: str, kwargs: dict, read: list, written: list) -> int:
        if name in ("embedding", "index_select", "gather"):
            return 2 * touched(written[0])
        if name in ("index_add", "index_copy"):
            return 2 * touched(written[0]) + 2 * touched(read[-1])
        if name in ("new_zeros", "zeros", "zeros_like", "ones_like", "full", "zero_", "fill_"):
            return sum(map(touched, written))
        views = {(t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), tuple(t.stride())): t for t in read}
        size = sum(map(touched, views.values())) + sum(map(touched, written))
        return size - (touched(read[0]) if name == "copy_" else 0)  # what it overwrites is not read


def flops_of(func, name: str, args: tuple, kwargs: dict, read: list, out) -> int:
    if name in ("mm", "addmm", "addmm_"):
        left, right = read[:2] if name == "mm" else read[-2:]
        return 2 * left.shape[0] * left.shape[1] * right.shape[1]
    if name == "_grouped_mm":  # every row with one expert's matrix, or with what it is the gradient of
        return 2 * read[0].numel() * read[1].shape[-1]
    count = flop_registry.get(func._overloadpacket)
    try:
        return count(*args, **kwargs, out_val=out) if count else 0
    except Exception:  # noqa: BLE001 - torch's own counters do not know all layouts
        return 0


NOT_OURS = "the test"  # or autograd, which is called by it


def here() -> str:
    """The line of the program that is running."""
    ours = str(ROOT)
    others = ("/tests/", "/site-packages/")  # an environment may lie inside the project's folder
    stack = traceback.extract_stack()
    frames = [f for f in stack if f.filename.startswith(ours) and not any(part in f.filename for part in others)]
    return f"{frames[-1].filename.removeprefix(ours + '/')}:{frames[-1].lineno}" if frames else NOT_OURS


def make_model(raw: dict, method: str, dtype: torch.dtype, layers: int | None = None, adapter: dict = ADAPTER):
    """A model on the fake GPU, ready to be trained."""
    import adapter_files
    import lora
    from families import Config
    from model import stack_expert_weights
    from planning import memory as plan

    config = Config.from_hf(raw)
    if layers:
        config = dataclasses.replace(config, layers=config.layers[:layers])
    model = plan.meta_model(config, plan.Recipe(method), dtype, adapter)
    with fake_cuda.fake_tensors():
        model.to_empty(device="cuda")
        stack_expert_weights(model)  # as load_model and add_lora do, on the device
        if adapter_files.has_adapter(model):
            lora.set_casts(model)
        return model.train()


def document_lengths(documents: int, tokens: int) -> list[int]:
    """Lengths that vary as real answers do (log-normal), `tokens` in all."""
    drawn = np.random.default_rng(0).lognormal(0, 0.6, documents)
    lengths = np.maximum(8, drawn * tokens / drawn.sum()).astype(int)
    lengths[-1] += tokens - lengths.sum()
    return lengths.tolist()


def training_step(
    model, lengths: list[int], trained: float = 0.5, steps: int = 2, checkpointing: str = "none", kind=Census
):
    """Runs `steps` steps as train.py does, and returns the census of the last: the first makes tables that stay. kind:
    Census, or a class that sees more."""
    import distributed
    import objectives
    import optimizers
    from data import collate
    from dataset.examples import Example

    masks = [np.arange(n) >= (1 - trained) * n for n in lengths]
    examples = [Example(np.zeros(n, np.int64), mask.astype(np.float32)) for n, mask in zip(lengths, masks)]
    model.activation_checkpointing = checkpointing
    parameters = [p for p in model.parameters() if p.requires_grad]
    with fake_cuda.fake_tensors():
        steppers = optimizers.make_optimizers(model, "adamw", 1e-4, 0.0)
        for _ in range(steps):
            census = kind()
            census.lengths = lengths
            fake_cuda.on_launch, fake_cuda.on_operator = census.on_launch, census.on_operator
            with census:
                census.phase = "batch"
                batch = collate(examples, "cuda")
                census.phase = "forward"
                totals = objectives.StepTotals(len(batch.targets), batch.loss_weight_sum, sum(lengths))
                losses = objectives.Losses(torch.device("cuda"))
                loss = objectives.supervised_loss(model, batch, totals, losses)
                census.phase = "backward"
                loss.backward()
                census.phase = "clipping"
                norm = distributed.clip_grad_norm_(parameters, 1.0)
                found_inf = (~(losses.loss + norm).isfinite()).float()
                census.phase = "optimizer"
                for stepper in steppers:
                    stepper.step(found_inf)
                    stepper.zero_grad()
                del loss, losses, norm
    return census


# ---- an estimate of time ----

PEAK, BANDWIDTH = 989e12, 3.35e12  # of an H100 SXM: operations a second in bf16, bytes a second, as published
GEMM, SKINNY, ELEMENTWISE, FLASH = 0.66, 0.62, 0.80, 300e12  # shares of those that large kernels reach elsewhere
LAUNCH = 2.5e-6  # seconds: no kernel takes less


def seconds(row: Row) -> float:
    """An estimate."""
    if "flash_attention" in row.name or "flex_attention" in row.name:
        return max(row.flops / (FLASH * (0.75 if "backward" in row.name else 1)), LAUNCH)
    if row.name in ("mm", "addmm", "addmm_", "_grouped_mm") and row.flops > 1e11:
        return max(row.flops / (PEAK * GEMM), row.bytes / (BANDWIDTH * 0.8))
    if row.name in ("mm", "addmm", "addmm_"):
        return max(row.bytes / (BANDWIDTH * SKINNY), row.flops / (PEAK * 0.3), 2 * LAUNCH)
    return max(row.bytes / (BANDWIDTH * ELEMENTWISE), LAUNCH)


def summary(census: Census) -> dict:
    """By phase: launches, bytes, operations, the estimate in seconds, waits, and the rows by name."""
    out = {}
    for phase in dict.fromkeys(row.phase for row in census.rows):
        rows = [row for row in census.rows if row.phase == phase]
        names = collections.defaultdict(lambda: [0, 0, 0])
        for row in rows:
            for i, number in enumerate((1, row.bytes, row.flops)):
                names[row.name][i] += number
        out[phase] = {
            "launches": len(rows),
            "bytes": sum(row.bytes for row in rows),
            "flops": sum(row.flops for row in rows),
            "seconds": sum(map(seconds, rows)),
            "syncs": [what for where, what in census.syncs if where == phase],
            "names": dict(names),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[*MODELS], default="llama-8b")
    parser.add_argument("--method", choices=["lora", "full", "qlora"], default="lora")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--activation-checkpointing", default="none")
    parser.add_argument("--roofline", action="store_true", help="estimate how long a step takes on an H100")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    lengths = document_lengths(args.documents, args.tokens)
    raw = MODELS[args.model]
    found = {}
    for layers in args.layers:
        model = make_model(raw, args.method, torch.bfloat16, layers)
        found[layers] = summary(training_step(model, lengths, checkpointing=args.activation_checkpointing))
    if args.json:
        print(json.dumps(found))
        return
    for layers, phases in found.items():
        print(f"== {args.model}, {args.method}, {layers} layers, {args.tokens:,} tokens in {args.documents} documents")
        for phase, what in phases.items():
            sums = f"{what['bytes'] / 1e9:.2f} GB, {what['flops'] / 1e12:.2f} TFLOP"
            print(f"{phase}: {what['launches']} launches, {sums}")
            for sync in sorted(set(what["syncs"])):
                print(f"    WAITS {what['syncs'].count(sync)} times: {sync}")
            for name, (count, size, flops) in sorted(what["names"].items(), key=lambda each: -each[1][1]):
                print(f"    {name:48}{count:5}{size / 1e9:9.3f} GB{flops / 1e12:9.3f} TFLOP")
    if len(found) > 1:
        (few, first), *_, (many, last) = found.items()
        for phase in ("forward", "backward"):
            a, b = first[phase], last[phase]
            each = lambda key, a=a, b=b: (b[key] - a[key]) / (many - few)
            print(f"a layer, {phase}: {each('launches'):.1f} launches, {each('bytes') / 1e9:.2f} GB")
        if args.roofline:
            print(roofline(found, raw["num_hidden_layers"], args.tokens))


def roofline(found: dict, layers: int, tokens: int) -> str:
    (few, first), *_, (many, last) = found.items()
    whole = 0.0
    for phase, what in first.items():
        a_layer = (last[phase]["seconds"] - what["seconds"]) / (many - few)
        whole += what["seconds"] + a_layer * (layers - few)
    return f"ESTIMATE, not measured: {1e3 * whole:.0f} ms a step, {tokens / whole:,.0f} tokens/s on an H100"


if __name__ == "__main__":
    main()
