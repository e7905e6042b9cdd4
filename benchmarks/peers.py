"""The same fine-tuning job by plaintune and by its peers, in turn, each in a process of its own, in one run.

    python benchmarks/peers.py dense                      a random Llama, every token trained: full, LoRA, QLoRA
    python benchmarks/peers.py real --data alpaca.json    the default base on real records: train.py and SFTTrainer
    python benchmarks/peers.py task                       the bundled task: train.py and transformers + peft
    python benchmarks/peers.py gpu --shape 8b             LoRA and QLoRA of Llama 3's shapes, random weights

Printed of each side: tokens/s (real ones, without padding), peak memory less what importing torch takes (on a GPU:
what torch allocated at most), first and last loss, and the share of the rate that a large product reaches in this run,
with the operations counted as 6 N a token for full fine-tuning, 4 N for LoRA, N without the embedding table, plus
attention's 7 T H d a layer for rows of T tokens. Medians over rounds, ratios of the two sides of one round. Peers that
are not installed (trl, bitsandbytes, unsloth, liger-kernel) are left out and named.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "dense": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408, "num_attention_heads": 8,
              "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": False},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
WARM_UP = 2  # steps that are not timed
RATE = 1e-4


# ------------------------------------------------------------------------------ one side, in a process of its own


def resident() -> float:
    """Bytes that this process has had at most. (getrusage's figure begins with that of the process that started it.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def pick(torch, spec):
    return torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, spec["dtype"])


def outcome(torch, device, before: float, tokens: list[int], seconds: list[float], losses: list[float]) -> dict:
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident() - before
    speed = sum(tokens[WARM_UP:]) / sum(seconds[WARM_UP:])
    return {"speed": speed, "peak": peak, "first": losses[0], "last": losses[-1]}


def token_rows(torch, spec) -> list:
    generator = torch.Generator().manual_seed(1)
    shape = spec["steps"], spec["batch"], spec["seq"]
    return torch.randint(0, SHAPES[spec["shape"]]["vocab_size"], shape, generator=generator).tolist()


def usual_loop(torch, model, device, rate: float, batches: list, collate, before: float) -> dict:
    """What a peer's user writes: forward, backward, clip, step. collate: a batch to the model's arguments, its number
    of real tokens with them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    tokens, seconds, losses = [], [], []
    for batch in batches:
        start = time.perf_counter()
        arguments, count = collate(torch, batch, device)
        loss = model(**arguments).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))  # waits for the device
        seconds.append(time.perf_counter() - start)
        tokens.append(count)
    return outcome(torch, device, before, tokens, seconds, losses)


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
    import checkpoint
    import loading  # noqa: F401  its settings of oneDNN and glibc are train.py's
    import lora
    import train
    from data import cut_rows, most_tokens
    from examples import Example
    from optimizers import make_optimizers

    device, dtype = pick(torch, spec)
    full = spec["method"] == "full"
    flags = train.Flags(
        method=spec["method"], steps=spec["steps"], lr=RATE, warmup=0, schedule="constant", weight_decay=0.0,
        batch_size=spec["batch"], clip=1.0, seed=0, dtype="bf16", weights=spec.get("weights", "fp32"),
        remat=spec.get("remat", "none"),
    )  # fmt: skip
    quant = "nf4" if spec["method"] == "qlora" else None
    narrow = torch.bfloat16 if flags.weights == "bf16" else torch.float32
    torch.manual_seed(0)
    model = checkpoint.load_model(spec["folder"], narrow if full else dtype, device, quant)
    model.compute_dtype, model.remat = dtype, flags.remat
    if not full:
        lora.add_lora(model, spec["rank"], 2.0 * spec["rank"])
    if spec.get("compile"):
        model.compile_blocks()
    trained, most = [False] + [True] * (spec["seq"] - 1), most_tokens(device)
    # in the order that the peer has them
    steps = [
        [[Example(step[i], trained) for i in part] for part in cut_rows([spec["seq"]] * len(step), spec["batch"], most)]
        for step in token_rows(torch, spec)
    ]
    steppers = make_optimizers(model, "adamw", RATE, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        log = train.Log(flags, Path(folder), 1.0, device)
        train.optimize(model, steppers, steps, flags, log, device, lambda *_: False)
        log.close()
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["tokens"] / line["tokens_per_s"] for line in lines]
    return outcome(torch, device, before, [line["tokens"] for line in lines], seconds, [line["loss"] for line in lines])


def rows_by_peft(torch, spec) -> dict:
    """The usual loop over transformers' model, with peft, and bitsandbytes for QLoRA."""
    before = resident()
    import peft
    import transformers

    device, dtype = pick(torch, spec)
    torch.manual_seed(0)
    more = {}
    if spec["method"] == "qlora":
        more["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=dtype, **more).to(device)
    if spec["method"] != "full":
        config = peft.LoraConfig(
            r=spec["rank"], lora_alpha=2 * spec["rank"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config)
    if spec.get("remat", "none") != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    return usual_loop(torch, model, device, RATE, token_rows(torch, spec), whole_rows, before)


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
    return usual_loop(torch, model, device, RATE, token_rows(torch, spec), whole_rows, 0.0)


def records_by_peft(torch, spec) -> dict:
    """Records' batches as train.py makes them, padded to their longest row with a mask, by transformers + peft."""
    before = resident()
    import peft
    import transformers

    device, dtype = pick(torch, spec)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=dtype).to(device)
    config = peft.LoraConfig(
        r=spec["rank"], lora_alpha=2 * spec["rank"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config).train()
    batches = json.loads(Path(spec["batches"]).read_text())
    return usual_loop(torch, model, device, 1.3e-3, batches, padded_records, before)


def records_by_plaintune(torch, spec) -> dict:
    """train.py, as its user calls it."""
    before = resident()  # of python and torch; train.py runs in this very process
    sys.path.insert(0, str(ROOT))
    import train

    out = tempfile.mkdtemp()
    sys.argv = ["train.py", *spec["flags"], "--out", out + "/run"]
    train.main()
    lines = [json.loads(line) for line in Path(out, "run", "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    tokens = [line["tokens"] for line in steps]
    seconds = [line["tokens"] / line["tokens_per_s"] for line in steps]
    device, _ = pick(torch, spec)
    found = outcome(torch, device, before, tokens, seconds, [line["loss"] for line in steps])
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
    if spec["best"]:
        more = {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": False}
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


def run_side(name: str, spec: dict) -> dict:
    """The side's result, from a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        words = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--side",
            name,
            "--spec",
            json.dumps(spec),
            "--into",
            file.name,
        ]
        done = subprocess.run(words, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-1500:]}")
        return json.loads(Path(file.name).read_text())


# ------------------------------------------------------------------------------------------------------- the jobs


def write_random_model(folder: Path, shape: str) -> None:
    """A folder of this shape with random weights, by plaintune alone; in bf16 where it is large."""
    sys.path.insert(0, str(ROOT))
    import torch

    import checkpoint
    from model import Config, Transformer

    raw = SHAPES[shape] | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
    raw |= {"max_position_embeddings": 16384, "rope_theta": 500000.0, "hidden_act": "silu", "bos_token_id": 1}
    raw |= {"eos_token_id": 2, "attention_bias": False, "mlp_bias": False}
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(Config.from_hf(raw))
    dtype = torch.float32 if shape == "dense" else torch.bfloat16
    weights = {}
    for name, p in model.named_parameters():
        weights[checkpoint.published(model, name)] = (
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


def in_turn(sides: dict[str, tuple[str, dict]], rounds: int) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (function, spec) in sides.items():
            found[name].append(run_side(function, spec))
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
        write_random_model(Path(folder), shape)
        for dtype in args.dtypes:
            for method in args.methods:
                spec = {"folder": folder, "shape": shape, "method": method, "dtype": dtype, "rank": 16,
                        "seq": args.seq, "batch": args.batch, "steps": args.steps + WARM_UP, "remat": args.remat,
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
    from convert import model_folder
    from formats import read_records

    folder, rate = model_folder(None), 2e-4
    with tempfile.TemporaryDirectory() as work:
        records = json.loads(Path(args.data).read_text(encoding="utf-8"))
        parts = {"train": records[: args.records], "val": records[args.records : 2 * args.records]}
        for name, part in parts.items():
            Path(work, f"{name}.json").write_text(json.dumps(part))
        messages = [record.messages for record in read_records(Path(work, "train.json")).records]
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
        spec = {"folder": str(folder), "dtype": "bfloat16", "rank": 16, "rate": rate, "flags": flags}
        spec |= {"messages": f"{work}/messages.jsonl", "best": False}
        sides = {"plaintune": ("records_by_plaintune", spec)}
        if importlib.util.find_spec("trl"):
            sides["trl, as documented"] = ("records_by_trl", spec)
            sides["trl, its best settings"] = ("records_by_trl", spec | {"best": True})
        shape = {"head_dim": 64} | read_json(folder / "config.json")
        size = {"rows": 1686, "inner": shape["hidden_size"], "outer": shape["intermediate_size"]}
        product = run_side("product_rate", spec | size)["rate"]
        found = in_turn(sides, args.rounds)
        title = f"real: {args.records} records of {Path(args.data).name}, one epoch of batch 8, LoRA rank 16, bf16"
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
    from convert import model_folder
    from data import load
    from demo import TASK
    from order import Stream
    from tokenizer import load_tokenizer

    folder = model_folder(None)
    data = load(TASK["train"], load_tokenizer(folder), 2048)
    stream = Stream(data.lengths, [len(data)], [len(data)], 0)
    order = [stream.step(8) for _ in range(args.steps + WARM_UP)]
    with tempfile.TemporaryDirectory() as work:
        examples = [[data.examples[i] for (i,) in step] for step in order]
        batches = [[[each.ids.tolist(), (each.trained > 0).tolist()] for each in step] for step in examples]
        Path(work, "batches.json").write_text(json.dumps(batches))
        flags = ["--data", *map(str, TASK["train"]), "--val-fraction", "0", "--eval-every", "0"]
        flags += ["--steps", str(args.steps + WARM_UP), "--schedule", "constant", "--warmup", "0"]
        spec = {"folder": str(folder), "dtype": "bfloat16", "rank": 8, "flags": flags, "steady": True}
        spec |= {"batches": f"{work}/batches.json"}
        sides = {"plaintune": ("records_by_plaintune", spec), "transformers + peft": ("records_by_peft", spec)}
        shape = {"head_dim": 64} | read_json(folder / "config.json")
        size = {"rows": 8 * 78, "inner": shape["hidden_size"], "outer": shape["intermediate_size"]}
        product = run_side("product_rate", spec | size)["rate"]
        title = (
            f"task: the bundled one, {args.steps} steps of batch 8, LoRA rank 8, bf16, median of {args.rounds} rounds"
        )
        show(title, in_turn(sides, args.rounds), operations(shape, "lora", 80), product)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("job", nargs="?", choices=["dense", "real", "task", "gpu"], default="dense")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="that are timed")
    parser.add_argument("--methods", nargs="+", choices=["full", "lora", "qlora"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--shape", choices=["1b", "8b"], default="8b", help="of the job gpu")
    parser.add_argument("--seq", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--remat", default="none", choices=["none", "selective", "block"])
    parser.add_argument("--compile", action="store_true", help="ours by torch.compile, block by block")
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data" / "alpaca_en_1k.json"))
    parser.add_argument("--records", type=int, default=96)
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
    args.dtypes = args.dtypes or (["bfloat16"] if gpu else ["float32", "bfloat16"])
    args.seq, args.batch = args.seq or (4096 if gpu else 512), args.batch or (1 if gpu else 4)
    if args.job in ("dense", "gpu"):
        rows_job(args, args.shape if gpu else "dense")
    else:
        {"real": real_job, "task": task_job}[args.job](args)


if __name__ == "__main__":
    main()
