"""The same fine-tuning job by plaintune and by its peers, in turn, each in a process of its own, in one run.

    python benchmarks/peers.py dense                      a random Llama, every token trained: full, LoRA, QLoRA
    python benchmarks/peers.py real --data alpaca.json    the default base on real records: train.py and SFTTrainer
    python benchmarks/peers.py task                       the bundled task: train.py and transformers + peft
    python benchmarks/peers.py gpu --shape 8b             LoRA and QLoRA of Llama 3's shapes, random weights

The weights of `gpu` are made on the card, each side's its own, unless unsloth is there, which wants a folder; losses
tell nothing then. Printed of each side: tokens/s (real ones, without padding), peak memory less what importing torch
takes (on a GPU: what torch allocated at most), first and last loss, and the share of the rate that a large product
reaches in this run, with the operations counted as 6 N a token for full fine-tuning, 4 N for LoRA, N without the
embedding table, plus attention's 7 T H d a layer for rows of T tokens. Medians over rounds, ratios of the two sides of
one round. Peers that are not installed (trl, bitsandbytes, unsloth, liger-kernel) are left out and named.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {  # "rehearsal" is no real model's: it is there to try the scripts
    "rehearsal": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "tie_word_embeddings": True},
    "135m": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9,
             "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True},
    "dense": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408, "num_attention_heads": 8,
              "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": False},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
WARM_UP = 2  # steps that are not timed
RATE = 1e-4
DOCUMENT, SPREAD = 160, 0.6  # median length in tokens, spread of its logarithm: about those of instruction data
AT_ONCE = 8  # documents that a peer pads to one length, a common batch size


# ------------------------------------------------------------------------------ one side, in a process of its own


def resident() -> float:
    """Bytes that this process has had at most. (getrusage's figure begins with that of the process that started it.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def pick(torch, spec):
    return torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, spec["dtype"])


def synchronize(torch, device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Seconds from the end of the warm-up to the last step's. A GPU's queue is waited for at these two moments alone:
    between them the host runs ahead of the device, as in a real run."""

    def __init__(self, torch, device, steps: int):
        self.torch, self.device, self.steps, self.moments = torch, device, steps, []

    def after_step(self, done: int) -> None:
        if done in (WARM_UP, self.steps):
            synchronize(self.torch, self.device)
            self.moments.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return self.moments[-1] - self.moments[0]


def outcome(torch, device, before: float, tokens: list[int], seconds: float, losses: list[float]) -> dict:
    """tokens, losses: of all steps; seconds: of those after the warm-up; before: bytes that do not count."""
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident() - before
    speed = sum(tokens[WARM_UP:]) / seconds
    return {"speed": speed, "peak": peak, "first": losses[0], "last": losses[-1]}


def token_rows(torch, spec) -> list:
    """Random rows, [steps][batch][seq]."""
    generator = torch.Generator().manual_seed(1)
    shape = spec["steps"], spec["batch"], spec["seq"]
    return torch.randint(0, SHAPES[spec["shape"]]["vocab_size"], shape, generator=generator).tolist()


def document_rows(torch, spec) -> list:
    """The rows of `token_rows`, each cut into documents of log-normal lengths, the longest first, as packing puts them:
    [steps][batch][documents][tokens]. Every row is full."""
    median, lengths = spec.get("document", DOCUMENT), random.Random(2)

    def cut(row: list[int]) -> list[list[int]]:
        parts = []
        while row:
            wanted = round(median * lengths.lognormvariate(0, SPREAD))
            size = wanted if 8 <= wanted <= len(row) - 8 else len(row)  # no document of a token or two
            parts.append(row[:size])
            row = row[size:]
        return sorted(parts, key=len, reverse=True)

    return [[cut(row) for row in step] for step in token_rows(torch, spec)]


def usual_loop(torch, model, device, rate: float, steps: list, collate, before: float) -> dict:
    """What a peer's user writes: forward, backward, clip, step. steps: of each its micro-batches; collate: a
    micro-batch to the model's arguments, its number of real tokens with them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    tokens, losses, clock = [], [], Clock(torch, device, len(steps))
    for done, batches in enumerate(steps, 1):
        total, count = torch.zeros((), device=device), 0
        for batch in batches:
            arguments, real = collate(torch, batch, device)
            loss = model(**arguments).loss / len(batches)
            loss.backward()
            total += loss.detach()
            count += real
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        tokens.append(count)
        clock.after_step(done)
    return outcome(torch, device, before, tokens, clock.seconds, [float(loss) for loss in losses])


def whole_rows(torch, rows: list[list[int]], device) -> tuple[dict, int]:
    ids = torch.tensor(rows, device=device)
    return {"input_ids": ids, "labels": ids}, ids.numel()


def padded_records(torch, records: list, device) -> tuple[dict, int]:
    """(ids, which of them are trained) of each, padded to the longest with a mask; labels -100 where nothing is."""
    longest = max(len(ids) for ids, _ in records)
    ids, mask = torch.zeros(2, len(records), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (numbers, trained) in enumerate(records):
        n = len(numbers)
        ids[row, :n], mask[row, :n] = torch.tensor(numbers), 1
        labels[row, :n] = torch.where(torch.tensor(trained), ids[row, :n], -100)
    arguments = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in arguments.items()}, int(mask.sum())


def rows_by_plaintune(torch, spec) -> dict:
    """train.py's own loop over the rows."""
    before = resident()
    sys.path.insert(0, str(ROOT))
    from random_models import random_model

    import checkpoint
    import lora
    from common import device as settings  # noqa: F401  its settings of oneDNN and glibc are train.py's
    from planning import memory as plan

    device, dtype = pick(torch, spec)
    full = spec["method"] == "full"
    weights = spec.get("weights", "fp32")
    torch.manual_seed(0)
    if spec["folder"] is None:
        setup = plan.Recipe(spec["method"], weights=weights)
        model = random_model(raw_config(spec["shape"]), setup, dtype, device, adapter(spec))
    else:
        quant = "nf4" if spec["method"] == "qlora" else None
        narrow = torch.bfloat16 if weights == "bf16" else torch.float32
        model = checkpoint.load_model(spec["folder"], narrow if full else dtype, device, quant)
        if not full:
            lora.add_lora(model, **adapter(spec))
    model.compute_dtype = dtype
    model.activation_checkpointing = spec.get("checkpointing", "none")
    if spec.get("compile"):
        model.compile_blocks()
    rows = [[[row] for row in step] for step in token_rows(torch, spec)]
    return train_by_plaintune(torch, model, spec, rows, device, before)[0]


def adapter(spec) -> dict:
    return {"rank": spec["rank"], "alpha": 2.0 * spec["rank"]}


class GivenSteps:
    """In place of data.MicroBatches: steps that are the same for every side.

    steps: for each step its micro-batches, for each of those its examples.
    """

    def __init__(self, steps: list, device):
        self.steps = steps
        self.device = device

    def step(self, number: int) -> list:
        from data import collate

        return [collate(examples, self.device) for examples in self.steps[number]]


def train_by_plaintune(torch, model, spec, rows: list, device, before: float) -> tuple[dict, list[float]]:
    """Trains a model of ours by train.py's loop. rows: [steps][batch][documents][tokens], all trained but each
    document's first token. Returns the outcome, and the loss of every step."""
    import train
    from data import max_tokens_per_micro_batch, split_micro_batches
    from dataset.examples import Example
    from objectives import make_objective
    from optimizers import make_optimizers
    from training.defaults import Settings
    from training.metrics import MetricsLogger
    from training.signals import GracefulStop
    from training.state import TrainState

    settings = Settings(
        method=spec["method"], steps=len(rows), lr=spec.get("rate", RATE), warmup=0, schedule="constant",
        weight_decay=0.0, batch_size=spec["batch"], clip=1.0, seed=0, weights=spec.get("weights", "fp32"),
        optimizer_offload=spec.get("offload", False),
    )  # fmt: skip
    steps = []
    for step in rows:
        sizes = [sum(map(len, row)) for row in step]
        # Rows of one size stay in the peer's order.
        cuts = split_micro_batches(sizes, spec["batch"], max_tokens_per_micro_batch(device))
        documents = [[document for i in cut for document in step[i]] for cut in cuts]
        steps.append([[Example(ids, [False] + [True] * (len(ids) - 1)) for ids in cut] for cut in documents])
    clock = Clock(torch, device, len(rows))

    class EveryStep:
        """In place of the evaluator."""

        was_interrupted = False

        def due(self, state) -> bool:
            return state.step > 0

        def run(self, state, stop) -> bool:
            clock.after_step(state.step)
            return False

    loader = GivenSteps(steps, device)
    optimizers = make_optimizers(model, "adamw", settings.lr, 0.0, settings.optimizer_offload)
    with tempfile.TemporaryDirectory() as folder:
        state = TrainState()
        metrics = MetricsLogger(settings, Path(folder), 1.0, device, state)
        parts = (settings, model, make_objective(settings, None), optimizers, loader, state, metrics, GracefulStop())
        train.train_loop(*parts, EveryStep())
        metrics.close()
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    tokens, losses = ([line[key] for line in lines] for key in ("tokens", "loss"))
    return outcome(torch, device, before, tokens, clock.seconds, losses), losses


def rows_by_peft(torch, spec) -> dict:
    """The usual loop over transformers' model, with peft, and bitsandbytes for QLoRA."""
    before = resident()
    import transformers

    device, dtype = pick(torch, spec)
    torch.manual_seed(0)
    if spec["folder"] is None:
        model = random_peer(torch, spec, device, dtype)
    else:
        more = {}
        if spec["method"] == "qlora":
            more["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        model = transformers.AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=dtype, **more).to(device)
        model = with_peft(model, spec)
    if spec.get("checkpointing", "none") != "none":
        checkpoint_gradients(model)
    model.train()
    steps = [[rows] for rows in token_rows(torch, spec)]
    return usual_loop(torch, model, device, RATE, steps, whole_rows, before)


def with_peft(model, spec):
    if spec["method"] == "full":
        return model
    import peft

    config = peft.LoraConfig(
        r=spec["rank"], lora_alpha=2 * spec["rank"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def checkpoint_gradients(model) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


def random_peer(torch, spec, device, dtype):
    """transformers' model of a shape with random weights, made on the device, with its linears in bitsandbytes' NF4 for
    QLoRA, and adapters by peft unless all of it is trained. FlashAttention's own package computes where there is one,
    else PyTorch's attention."""
    import transformers

    settings = raw_config(spec["shape"])
    settings.pop("architectures")
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn")
    attention = "flash_attention_2" if flash else "sdpa"
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    if spec["method"] == "qlora":
        to_4_bits(torch, model, dtype)
    return with_peft(model, spec)


def to_4_bits(torch, model, dtype) -> None:
    """What loading with BitsAndBytesConfig does to a model's linears, for a model that is in memory already."""
    import bitsandbytes

    wide = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    for name, linear in wide.items():
        settings = {"compress_statistics": True, "quant_type": "nf4"}
        narrow = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, device="meta", **settings
        )
        weight = linear.weight.data
        narrow.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **settings).to(weight.device)
        model.set_submodule(name, narrow)
    model.is_loaded_in_4bit = True  # peft asks for it


def rows_by_unsloth(torch, spec) -> dict:
    """unsloth's model and adapters in the same loop; only on a GPU."""
    import unsloth

    device, dtype = pick(torch, spec)
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        spec["folder"], max_seq_length=spec["seq"], dtype=dtype, load_in_4bit=spec["method"] == "qlora"
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=spec["rank"], lora_alpha=2 * spec["rank"], use_gradient_checkpointing=False
    )
    steps = [[rows] for rows in token_rows(torch, spec)]
    return usual_loop(torch, model, device, RATE, steps, whole_rows, 0.0)


def records_by_peft(torch, spec) -> dict:
    """Records' batches as train.py makes them, padded to their longest row with a mask, by transformers + peft."""
    before = resident()
    import transformers

    device, dtype = pick(torch, spec)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=dtype).to(device)
    model = with_peft(model, spec | {"method": "lora"}).train()
    steps = [[batch] for batch in json.loads(Path(spec["batches"]).read_text())]
    return usual_loop(torch, model, device, 1.3e-3, steps, padded_records, before)


def records_by_plaintune(torch, spec) -> dict:
    """train.py, as its user calls it."""
    before = resident()  # of python and torch; train.py runs in this very process
    sys.path.insert(0, str(ROOT))
    import train

    out = tempfile.mkdtemp()
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[spec["dtype"]]
    sys.argv = ["train.py", *spec["flags"], "--dtype", dtype, "--out", out + "/run"]
    train.main()
    lines = [json.loads(line) for line in Path(out, "run", "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    tokens = [line["tokens"] for line in steps]
    seconds = [line["tokens"] / line["tokens_per_s"] for line in steps]
    device, _ = pick(torch, spec)
    timed = sum(seconds[WARM_UP:])
    found = outcome(torch, device, before, tokens, timed, [line["loss"] for line in steps])
    if not spec.get("steady"):
        found["speed"] = sum(tokens) / sum(seconds)
    return found | {"seconds": sum(seconds), "adapter": out + "/run/final"}


def records_by_trl(torch, spec) -> dict:
    """trl's SFTTrainer, as its documentation sets it up; best: with the settings that make it fastest."""
    before = resident()
    import datasets
    import peft
    import transformers
    import trl

    device, _ = pick(torch, spec)
    records = [json.loads(line) for line in Path(spec["messages"]).read_text().splitlines()]
    rows = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in records]
    out, more = tempfile.mkdtemp(), {}
    if spec["dtype"] == "float32":
        # By itself it computes in bf16, which takes many times as long where the instructions are missing.
        more["bf16"] = False
    if spec["best"]:
        more |= {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": False}
        more["model_init_kwargs"] = {"dtype": spec["dtype"]}
    settings = trl.SFTConfig(
        output_dir=out, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=spec["rate"], logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=device.type == "cpu", dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True, **more,
    )  # fmt: skip
    config = peft.LoraConfig(r=spec["rank"], lora_alpha=2 * spec["rank"], target_modules="all-linear")
    trainer = trl.SFTTrainer(
        model=spec["folder"], args=settings, train_dataset=datasets.Dataset.from_list(rows), peft_config=config,
        processing_class=transformers.AutoTokenizer.from_pretrained(spec["folder"]),
    )  # fmt: skip
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident() - before
    return {"speed": tokens / seconds, "peak": peak, "first": losses[0], "last": losses[-1], "seconds": seconds,
            "adapter": out}  # fmt: skip


def product_rate(torch, spec) -> dict:
    """FLOP/s of a product of the job's shape."""
    device, dtype = pick(torch, spec)
    x = torch.randn(spec["rows"], spec["inner"], device=device).to(dtype)
    w = torch.randn(spec["inner"], spec["outer"], device=device).to(dtype)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        float((x @ w)[0, 0])
        times.append(time.perf_counter() - start)
    return {"rate": 2 * x.numel() * w.shape[1] / statistics.median(times)}


SIDES = {
    f.__name__: f
    for f in (
        *(rows_by_plaintune, rows_by_peft, rows_by_unsloth),
        *(records_by_plaintune, records_by_peft, records_by_trl, product_rate),
    )
}


def run_side(name: str, spec: dict, script: str = __file__) -> dict:
    """The side's result, from a process of its own. script: that has the side among its SIDES."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        words = [
            sys.executable,
            "-W",
            "ignore",
            script,
            "--side",
            name,
            "--spec",
            json.dumps(spec),
            "--into",
            file.name,
        ]
        done = subprocess.run(words, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} ended with {done.returncode}: {done.stderr[-1500:]}")
        return json.loads(Path(file.name).read_text())


# ------------------------------------------------------------------------------------------------------- the jobs


def raw_config(shape: str) -> dict:
    """What config.json says of a model of this shape."""
    raw = SHAPES[shape] | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
    raw |= {"max_position_embeddings": 16384, "rope_theta": 500000.0, "hidden_act": "silu", "bos_token_id": 1}
    return raw | {"eos_token_id": 2, "attention_bias": False, "mlp_bias": False}


def write_random_model(folder: Path, shape: str) -> None:
    """A folder of this shape with random weights, by plaintune alone; in bf16 where it is large."""
    sys.path.insert(0, str(ROOT))
    import torch

    import checkpoint
    from model import Config, Transformer

    raw = raw_config(shape)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(Config.from_hf(raw))
    dtype = torch.float32 if shape == "dense" else torch.bfloat16
    weights = {}
    for name, p in model.named_parameters():
        weights[checkpoint.hf_name(model, name)] = (
            torch.ones(p.shape, dtype=dtype) if p.dim() == 1 else (0.02 * torch.randn(p.shape)).to(dtype)
        )
    checkpoint.write_json(raw | {"dtype": str(dtype)[6:]}, folder / "config.json")
    checkpoint.save_shards([checkpoint.Stored(*each) for each in weights.items()], folder)


def operations(shape: dict, method: str, seq: float) -> float:
    """FLOP a token of a training step, by the formula that is printed."""
    D, F, L = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    H, G, d = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    N = L * (2 * D * H * d + 2 * D * G * d + 3 * D * F) + shape["vocab_size"] * D
    return (6 if method == "full" else 4) * N + 7 * seq * H * d * L


def machine_has_bf16() -> bool:
    """True if train.py would compute in bf16 on this CPU."""
    sys.path.insert(0, str(ROOT))
    import torch

    from common.device import pick_dtype

    return pick_dtype("auto", torch.device("cpu"))[0] == torch.bfloat16


def in_turn(sides: dict[str, tuple[str, dict]], rounds: int) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (function, spec) in sides.items():
            found[name].append(run_side(function, spec))
            print(f"  ({name}: {found[name][-1]['speed']:,.0f} tokens/s)", flush=True)
    return found


def show(title: str, found: dict[str, list[dict]], flops: float, rate: float) -> None:
    print(f"\n{title}")
    ours = found["plaintune"]
    for name, results in found.items():
        speed, peak = (statistics.median(r[key] for r in results) for key in ("speed", "peak"))
        line = f"  {name:26}{speed:9,.0f} tokens/s {peak / 2**20:9,.0f} MiB   loss {results[0]['first']:.4f} to"
        line += f" {results[0]['last']:.4f}   {speed * flops / rate:5.0%} of {rate / 1e9:,.0f} GFLOP/s"
        if name != "plaintune":
            faster = [a["speed"] / b["speed"] for a, b in zip(ours, results)]
            smaller = statistics.median(a["peak"] / b["peak"] for a, b in zip(ours, results))
            line += f"   ours: {statistics.median(faster):.2f} times as fast ({min(faster):.2f} to {max(faster):.2f})"
            line += f", {smaller:.2f} of the memory"
        print(line, flush=True)


def rows_job(args, shape: str) -> None:
    shapes = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        if shape == "dense" or importlib.util.find_spec("unsloth"):  # which loads models from folders alone
            write_random_model(Path(folder), shape)
        else:
            folder = None
        for dtype in args.dtypes:
            for method in args.methods:
                spec = {"folder": folder, "shape": shape, "method": method, "dtype": dtype, "rank": 16,
                        "seq": args.seq, "batch": args.batch, "steps": args.steps + WARM_UP,
                        "checkpointing": args.activation_checkpointing,
                        "compile": args.compile}  # fmt: skip
                sides = {"plaintune": ("rows_by_plaintune", spec)}
                if method == "full" and dtype == "bfloat16":
                    sides["plaintune, bf16 weights"] = ("rows_by_plaintune", spec | {"weights": "bf16"})
                if method != "qlora" or importlib.util.find_spec("bitsandbytes"):
                    name = "transformers" + " + peft" * (method != "full") + " + bnb" * (method == "qlora")
                    sides[name] = ("rows_by_peft", spec)
                if method != "full" and importlib.util.find_spec("unsloth"):
                    sides["unsloth"] = ("rows_by_unsloth", spec)
                size = {
                    "rows": args.seq * args.batch,
                    "inner": shapes["hidden_size"],
                    "outer": shapes["intermediate_size"],
                }
                rate = run_side("product_rate", spec | size)["rate"]
                title = f"{shape}, {method}, {dtype}, {args.batch} x {args.seq} tokens, median of {args.rounds} rounds"
                show(title, in_turn(sides, args.rounds), operations(shapes, method, args.seq), rate)


def real_job(args) -> None:
    """The first records of a file, one epoch at batch 8, LoRA rank 16 on all linears; validated on those after them."""
    sys.path.insert(0, str(ROOT))
    from checkpoint import read_json
    from dataset.formats import open_source
    from interop.resolve import model_folder

    folder, rate = model_folder(None), 2e-4
    with tempfile.TemporaryDirectory() as work:
        records = json.loads(Path(args.data).read_text(encoding="utf-8"))
        parts = {"train": records[: args.records], "val": records[args.records : 2 * args.records]}
        for name, part in parts.items():
            Path(work, f"{name}.json").write_text(json.dumps(part))
        messages = [record.messages for record in open_source(Path(work, "train.json")).read_all()]
        Path(work, "messages.jsonl").write_text("\n".join(map(json.dumps, messages)))
        flags = ["--data", f"{work}/train.json", "--rank", "16", "--alpha", "32", "--epochs", "1", "--lr", str(rate)]
        flags += [
            "--schedule",
            "linear",
            "--warmup",
            "0",
            "--val-fraction",
            "0",
            "--eval-every",
            "0",
            "--seq-len",
            "1024",
        ]
        spec = {"folder": str(folder), "dtype": args.dtypes[0], "rank": 16, "rate": rate, "flags": flags}
        spec |= {"messages": f"{work}/messages.jsonl", "best": False}
        sides = {"plaintune": ("records_by_plaintune", spec)}
        if importlib.util.find_spec("trl"):
            sides["trl, as documented"] = ("records_by_trl", spec)
            sides["trl, its best settings"] = ("records_by_trl", spec | {"best": True})
        shape = {"head_dim": 64} | read_json(folder / "config.json")
        size = {"rows": 1686, "inner": shape["hidden_size"], "outer": shape["intermediate_size"]}
        product = run_side("product_rate", spec | size)["rate"]
        found = in_turn(sides, args.rounds)
        title = f"real: {args.records} records of {Path(args.data).name}, one epoch of batch 8, LoRA rank 16"
        title += f", {args.dtypes[0]}"
        show(title, found, operations(shape, "lora", 300), product)
        for name, results in found.items():
            words = ["--model", str(folder), "--adapter", results[0]["adapter"], "--data", f"{work}/val.json"]
            words = [sys.executable, str(ROOT / "evaluate.py"), "loss", *words, "--seq-len", "1024"]
            said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            seconds = statistics.median(r["seconds"] for r in results)
            print(f"  {name:26}{seconds:7.0f} s of training; on the {len(parts['val'])} records after them:")
            print("      " + said.strip().splitlines()[-1])


def task_job(args) -> None:
    """The bundled task by train.py's defaults; the peer trains on the same batches in the same order."""
    sys.path.insert(0, str(ROOT))
    from checkpoint import read_json
    from data import BUNDLED_TASK, load
    from dataset.sampler import Sampler
    from interop.resolve import model_folder
    from tokenizer import load_tokenizer

    folder = model_folder(None)
    data = load(BUNDLED_TASK["train"], load_tokenizer(folder), 2048)
    stream = Sampler(data.lengths, [len(data)], [len(data)], 0)
    order = [stream.step(8) for _ in range(args.steps + WARM_UP)]
    with tempfile.TemporaryDirectory() as work:
        examples = [[data.examples[i] for (i,) in step] for step in order]
        batches = [[[each.ids.tolist(), (each.loss_weights > 0).tolist()] for each in step] for step in examples]
        Path(work, "batches.json").write_text(json.dumps(batches))
        flags = ["--data", *map(str, BUNDLED_TASK["train"]), "--val-fraction", "0", "--eval-every", "0"]
        flags += ["--steps", str(args.steps + WARM_UP), "--schedule", "constant", "--warmup", "0"]
        spec = {"folder": str(folder), "dtype": args.dtypes[0], "rank": 8, "flags": flags, "steady": True}
        spec |= {"batches": f"{work}/batches.json"}
        sides = {"plaintune": ("records_by_plaintune", spec), "transformers + peft": ("records_by_peft", spec)}
        shape = {"head_dim": 64} | read_json(folder / "config.json")
        size = {"rows": 8 * 78, "inner": shape["hidden_size"], "outer": shape["intermediate_size"]}
        product = run_side("product_rate", spec | size)["rate"]
        title = (
            f"task: the bundled one, {args.steps} steps of batch 8, LoRA rank 8, {args.dtypes[0]}, median of"
            f" {args.rounds} rounds"
        )
        show(title, in_turn(sides, args.rounds), operations(shape, "lora", 80), product)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("job", nargs="?", choices=["dense", "real", "task", "gpu"], default="dense")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="that are timed")
    parser.add_argument("--methods", nargs="+", choices=["full", "lora", "qlora"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--shape", choices=["1b", "8b", "rehearsal"], default="8b", help="of the job gpu")
    parser.add_argument("--seq", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--activation-checkpointing", default="none", choices=["none", "selective", "full"])
    parser.add_argument("--compile", action="store_true", help="ours by torch.compile, block by block")
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data" / "alpaca_en_1k.json"))
    parser.add_argument("--records", type=int, help="of the job real; default: 96, or 48 without bf16 instructions")
    for hidden in ("--side", "--spec", "--into"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        import torch

        Path(args.into).write_text(json.dumps(SIDES[args.side](torch, json.loads(args.spec))))
        return
    absent = [name for name in ("trl", "bitsandbytes", "unsloth", "liger_kernel") if not importlib.util.find_spec(name)]
    versions = {}
    for name in ("torch", "transformers", "peft", "trl", "bitsandbytes"):
        if importlib.util.find_spec(name):
            versions[name] = importlib.metadata.version(name)
    print(", ".join(f"{name} {version}" for name, version in versions.items()) + f"; {os.cpu_count()} cores")
    print(f"not installed: {', '.join(absent) or 'nothing'}; FLOP a token: 6 N full, 4 N LoRA, + 7 T H d a layer")
    gpu = args.job == "gpu"
    args.methods = args.methods or (["lora", "qlora"] if gpu else ["full", "lora", "qlora"])
    has_bf16 = gpu or machine_has_bf16()
    if not args.dtypes:
        # Without bf16 instructions a product in bf16 takes many times as long as one in fp32.
        args.dtypes = ["bfloat16"] if has_bf16 else ["float32"]
        if args.job == "dense" and has_bf16:
            args.dtypes = ["float32", "bfloat16"]
        print(
            f"dtype: {' and '.join(args.dtypes)}, as this machine {'has' if has_bf16 else 'has no'} bf16 instructions"
        )
    if args.records is None:
        args.records = 96 if has_bf16 else 48
    args.seq, args.batch = args.seq or (4096 if gpu else 512), args.batch or (1 if gpu else 4)
    if args.job in ("dense", "gpu"):
        rows_job(args, args.shape if gpu else "dense")
    else:
        {"real": real_job, "task": task_job}[args.job](args)


if __name__ == "__main__":
    main()
