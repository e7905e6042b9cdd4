"""Fine-tunes a language model: flags, set-up, the loop. Read it from `main` downwards.

    python train.py                                                  the bundled task on the default base, in minutes
    python train.py --model FOLDER --data FILE.json                  LoRA on your model and your examples
    python train.py --model FOLDER --data FILE.json --method full    all weights
    python train.py --help                                           every flag with its default

A method is a branch in `prepare`, which leaves an ordinary nn.Module behind; the loop never asks which. A step is
batch x accumulate examples; its loss is the sum of their token losses over the number of their trained tokens, so
how the step is cut changes nothing. Written to --out: config.json, metrics.jsonl, loss.png, best/ and final/.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import lora
import optimizers
import plan
import report
from convert import base_folder
from data import batches_by_length, load, most_tokens, row_batches, split
from demo import TASK, Demo
from errors import UserError, run
from examples import Dataset, Example
from flags import LORA, VAL_FRACTION, Flags, parse_flags, replayed, weighted
from formats import Map
from inspection import quick_checks
from loading import DTYPES, one_line, pick_device, pick_dtype, pick_tokenizer, put_adapter
from model import Config, Linear, Transformer, evaluating, quantized
from objectives import mean_loss, training_loss
from order import Stream, shares
from tokenizer import Tokenizer

COMPILE_SECONDS, COMPILE_SAVES = 20, 0.05  # measured on 2 cores: to compile a block, and the share of a step's time
KEPT = {
    "selective": "products, not norms and attention's probabilities (--remat selective)",
    "block": "the inputs of blocks, which are computed twice (--remat block)",
    "offload": "the inputs of blocks, on the host; blocks are computed twice (--remat offload)",
}
LONG_RUN = 100  # steps of an epoch from which packing is the default on a GPU: with fewer, small data learns too little
STUCK = 0.5  # this share of the weights that a step can't move is worth a word
RUN = ("config.json", "metrics.jsonl", "loss.png", "trace.json", "best", "final", "wandb")  # what a run writes
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, published


# ---------------------------------------------------------------------------------------------------- set-up


@dataclass
class Data:
    """What is trained on, in which order, and what validates: examples like these, and of the replay."""

    train: Dataset
    val: Dataset
    replay_val: Dataset | None
    stream: Stream


def load_data(flags: Flags, tokenizer: Tokenizer, config: Config, device: torch.device) -> Data:
    """The examples as token rows, and their order; says what was found, chosen and left out."""
    seq_len = flags.seq_len or min(2048, config.max_positions)
    if seq_len > config.max_positions:
        raise UserError(f"--seq-len {seq_len}: the model has {config.max_positions} positions")
    flags.seq_len = seq_len

    def read(paths, through=None):
        found = load(paths, tokenizer, seq_len, flags.train_on, flags.trees, print, through)
        largest = max(rows.largest for rows in found.examples.rows)
        if largest >= config.vocab_size:
            names = ", ".join(map(str, paths))
            raise UserError(f"{names}: token {largest} of the tokenizer is beyond the model's {config.vocab_size}")
        return found

    (files, weights), through = weighted(flags.data), Map(flags.map) if flags.map else None
    data = read(files or TASK["train"], through)
    val_files = [flags.val] if flags.val else [] if flags.data else TASK["val"]
    if val_files:
        train, val = data, read(val_files, through)
    else:
        flags.val_fraction = VAL_FRACTION if flags.val_fraction is None else flags.val_fraction
        train, val = split(data, flags.val_fraction)
    if not len(val) and flags.patience:
        raise UserError("--patience counts validations, and there is nothing to validate with; give --val FILE")
    if not len(val) and flags.val_fraction:
        print("          WARNING: no validation, the prompts are too alike to part them; give --val FILE")
    print(
        f"          {len(train):,} examples to train on, {train.tokens:,} tokens of which"
        f" {train.trained_tokens:,} trained; {len(val):,} to validate"
        + f"; turns by the template of {tokenizer.template_name}"
        * train.chat
    )
    for i, line in enumerate(quick_checks(train, val)):
        print(f"{'' if i else 'checked':10}{line}")
    files, formats, replay_val, replay_shares = files or TASK["train"], data.formats, None, []
    if flags.replay:
        more, replay_shares = replayed(flags.replay)
        # where nothing validates, nothing of the replay is held back either
        held = 0.0 if not len(val) else VAL_FRACTION if flags.val_fraction is None else flags.val_fraction
        general = read(more)
        replay, replay_val = split(general, held)
        formats += general.formats
        replay_val = replay_val if len(replay_val) else None
        train, files = train.with_replay(replay), [*files, *more]
    if flags.trees == "all" and not any("OASST" in each for each in formats):
        raise UserError("--trees all: no file holds OASST trees")
    return Data(train, val, replay_val, make_stream(flags, train, files, weights, replay_shares, device))


def make_stream(flags: Flags, train: Dataset, files: list, weights, replay_shares, device: torch.device) -> Stream:
    """The order of the examples: mixed, packed, or neither."""
    sizes = train.examples.sizes
    if 0 in sizes:
        why = "all of it validates; give --val FILE, or --val-fraction 0"
        raise UserError(f"{files[sizes.index(0)]}: no example of it is left to train on, {why}")
    stream = Stream(train.lengths, sizes, shares(sizes, weights, replay_shares), flags.seed)
    if weights or replay_shares:
        total = sum(stream.draws)
        for file, size, draws in zip(files, sizes, stream.draws, strict=True):
            again = f"; runs out after {size * total // draws:,} draws, and begins again" if draws > size else ""
            print(f"          of {total:,} draws an epoch {draws:,} of {file}: {draws / size:.2f} times each{again}")
    packed = dataclasses.replace(stream, seq_len=flags.seq_len)
    asked = flags.pack
    if flags.pack is None:
        per_step = flags.batch_size * flags.accumulate
        flags.pack = device.type == "cuda" and packed.epoch_rows() >= LONG_RUN * per_step
    if not flags.pack:
        return stream
    rows = packed.epoch_rows()
    fill = stream.epoch_tokens() / (rows * flags.seq_len)
    why = "" if asked else f"; an epoch of {LONG_RUN} steps and more, --no-pack for batches of examples"
    print(
        f"packed    {sum(stream.draws):,} examples in {rows:,} rows of {flags.seq_len:,} tokens, {fill:.1%} full{why}"
    )
    return packed


def prepare(flags: Flags, folder: Path, dtype: torch.dtype, device: torch.device) -> Transformer:
    """The model with its trainable parameters marked. The one place that knows what a method is."""
    torch.manual_seed(flags.seed)
    if flags.lora:
        model = checkpoint.load_model(folder, dtype, device, flags.quant)
        if flags.adapter:
            put_adapter(model, flags.adapter)
            layers = lora.adapted(model)
            first = next(iter(layers.values()))
            flags.rank, flags.alpha, flags.dropout = first.rank, first.alpha, first.dropout
            flags.targets = ",".join(lora.target_modules(model, list(layers)))
            return model
        for name, value in adapter_settings(flags).items():
            setattr(flags, name, value)
        lora.add_lora(model, flags.rank, flags.alpha, flags.dropout, flags.targets)
        return model
    # fp32 masters, here or on the host: to the nearest bf16 number, small updates are lost
    narrow = torch.bfloat16 if flags.weights == "bf16" else dtype if flags.optimizer_offload else torch.float32
    model = checkpoint.load_model(folder, narrow, device)
    if quantized(model):
        raise UserError(f"{folder}: its weights are in 4 bits, which can't be trained; use --method qlora")
    model.compute_dtype = dtype
    if flags.train:
        names = {name: checkpoint.published(model, name) for name, _ in model.named_parameters()}
        chosen = {name for name in names if re.search(flags.train, names[name])}
        if not chosen:
            raise UserError(f"--train {flags.train}: matches no parameter (they are named like {names['norm.weight']})")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
            if name not in chosen:
                narrow = parameter.data.to(dtype)
                if torch.equal(narrow.float(), parameter.data):  # frozen means: not even rounded
                    parameter.data = narrow
    return model


def adapter_settings(flags: Flags) -> dict:
    """Of a new adapter: the arguments of lora.add_lora."""
    return {name: default if getattr(flags, name) is None else getattr(flags, name) for name, default in LORA.items()}


def choose_defaults(flags: Flags, model: Transformer, stream: Stream) -> int:
    """Fills in what was left open, and returns the number of steps of an epoch."""
    per_epoch = choose_steps(flags, stream)
    if flags.lr is None:
        # Schulman et al. 2025, "LoRA without regret": the best rate falls with the width, and is ten times as high for
        # LoRA as for full fine-tuning. A base in 4 bits wants half as much again (LOG.md)
        factor = 1 if not flags.lora else 15 if flags.quant else 10
        flags.lr = float(f"{5e-5 * factor * (2000 / model.config.hidden_size) ** 0.78:.1e}")
    if flags.warmup is None:
        flags.warmup = round(0.05 * flags.steps)
    if flags.warmup >= flags.steps:
        raise UserError(f"--warmup {flags.warmup}: longer than the run of {flags.steps} steps")
    if flags.weight_decay is None:
        flags.weight_decay = 0.01 if flags.method == "full" else 0.0
    return per_epoch


def choose_steps(flags: Flags, stream: Stream) -> int:
    """Fills in how long to train and how often to validate, and returns the number of steps of an epoch."""
    per_epoch, examples = math.ceil(stream.epoch_rows() / (flags.batch_size * flags.accumulate)), sum(stream.draws)
    if flags.steps is None:
        if flags.epochs is None:
            flags.epochs = 1.0 if examples >= 1_500 else 2.0 if examples >= 500 else 3.0
        flags.steps = max(1, round(flags.epochs * per_epoch))
    if flags.eval_every is None:
        flags.eval_every = math.ceil(flags.steps / 5)
    return per_epoch


def describe_job(flags: Flags, data: Data, per_epoch: int, device: torch.device) -> plan.Job:
    """What plan.py counts with."""
    train, val, stream = data.train, data.val, data.stream
    validations = 1 + math.ceil(flags.steps / flags.eval_every) if flags.eval_every else 1
    tokens = train.tokens
    if flags.pack:
        longest = dataclasses.replace(stream).step(flags.batch_size)  # a stream of its own
    else:
        longest = [[i] for i in np.argsort(-train.lengths, kind="stable")[: flags.batch_size]]
    batches = row_batches([[train.examples[i] for i in row] for row in longest], flags.batch_size, device)
    largest = max(batches, key=lambda batch: len(batch.tokens))
    return plan.Job(
        lengths=largest.documents.lengths,
        trained=len(largest.targets),
        share=train.trained_tokens / tokens,
        reach=float((train.lengths.astype(float) ** 2).sum()) / tokens,
        tokens=stream.epoch_tokens() / per_epoch * flags.steps + validations * val.tokens / 2,
        to_learn=train.trained_tokens,
        accumulate=flags.accumulate * len(batches),
    )  # half of what is validated: without a backward


def full_rows(flags: Flags, config: Config, device: torch.device) -> plan.Job:
    """The job of a plan for a folder without a tokenizer: rows of --seq-len tokens, all trained."""
    length, steps = flags.seq_len or min(2048, config.max_positions), flags.steps or 1000
    rows = max(1, min(flags.batch_size, most_tokens(device) // length))  # that make a flat batch
    tokens = length * flags.batch_size * flags.accumulate * steps
    print(f"plan      no tokenizer here: for {steps:,} steps of {flags.batch_size} x {flags.accumulate} rows of"
          f" {length:,} tokens, all trained, of new text")  # fmt: skip
    times = flags.accumulate * math.ceil(flags.batch_size / rows)
    return plan.Job([length] * rows, length * rows, 1.0, length, tokens, tokens, times)


def choose_compile(flags: Flags, device: torch.device, seconds: float) -> str:
    """Sets flags.compile to on or off and returns the reason. seconds: what training is expected to take."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # what torch.compile calls
    here = shutil.which(compiler) is not None
    here = here and (device.type != "cuda" or importlib.util.find_spec("triton") is not None)
    if flags.compile == "on" and not here:
        raise UserError(f"--compile on: needs {compiler}{' and triton' * (device.type == 'cuda')}, not found here")
    if flags.compile != "auto":
        return f"compiled blocks {flags.compile}, asked for with --compile"
    pays = seconds * COMPILE_SAVES > 2 * COMPILE_SECONDS and flags.remat != "selective"
    flags.compile = "on" if here and pays else "off"
    reason = "a long run" if here and pays else "a short run" if here else f"no {compiler} here"
    reason = "--remat selective" if flags.remat == "selective" else reason
    return f"compiled blocks {flags.compile}: {reason}"


def rate_at(step: int, flags: Flags) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, above 0 from the first step, then the schedule down to 0."""
    if step < flags.warmup:
        return flags.lr * (step + 1) / (flags.warmup + 1)
    progress = (step - flags.warmup) / (flags.steps - flags.warmup)  # 0 at the peak, 1 a step after the last
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return flags.lr * shape[flags.schedule]


# ---------------------------------------------------------------------------------------------------- the loop


class Log:
    """metrics.jsonl, the progress bar and wandb. A step's tensors are read when the next step has been launched, so
    that nothing waits for the device."""

    def __init__(self, flags: Flags, out: Path, flops: float, device: torch.device):
        self.wandb = start_wandb(flags, out) if flags.wandb else None
        self.file = open(out / "metrics.jsonl", "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (open all the while)
        self.bar = tqdm(total=flags.steps, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.start, self.waiting, self.tokens = time.perf_counter(), None, 0
        self.flops, self.device, self.last = flops, device, self.start
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for chip, peak in PEAK_FLOPS.items() if chip in name), None)

    def step(self, step, loss, norm, rate, tokens: int, trained: int, examples: list[Example], more: dict) -> None:
        self.flush()  # waits for the step before this one, so the clock below ticks at the device's pace
        now = time.perf_counter()
        self.waiting = (step, loss, norm, rate, tokens, trained, examples, more, now - self.last)
        self.last = now

    def flush(self) -> None:
        if self.waiting is None:
            return
        (step, loss, norm, rate, tokens, trained, examples, more, seconds), self.waiting = self.waiting, None
        loss, norm = float(loss), float(norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"step {step}: the loss is {loss:g}, the gradient's norm {norm:g}; stopped. Its examples:"
                f" {', '.join(e.where for e in examples[:8])}; try a lower --lr"
            )
        speed, total = tokens / seconds, time.perf_counter() - self.start
        self.tokens += tokens
        line = {"step": step, "loss": loss, "lr": rate, "grad_norm": norm, "tokens": tokens, "trained_tokens": trained}
        line |= {"tokens_per_s": speed, "mfu": self.peak and self.flops * speed / self.peak}
        line |= {name: float(value) for name, value in more.items()}
        self.write(line | {"seconds": total, "memory_mb": report.peak_memory(self.device) / 1e6})
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
        self.bar.update()

    def write(self, line: dict) -> None:
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.wandb:
            self.wandb.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    def pause(self) -> float:
        """Call before work that is no training; give what it returns to `go_on`, so that no step is charged with it."""
        self.flush()
        return time.perf_counter()

    def go_on(self, paused_at: float) -> None:
        self.last += time.perf_counter() - paused_at

    def close(self) -> None:
        self.flush()
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def start_wandb(flags: Flags, out: Path):
    """The wandb run, whose complaints become one line."""
    import wandb

    try:
        return wandb.init(project=flags.wandb, config=dataclasses.asdict(flags), dir=str(out))
    except wandb.errors.Error as error:
        shutil.rmtree(out / "wandb", ignore_errors=True)
        with contextlib.suppress(OSError):
            out.rmdir()
        raise UserError(f"--wandb {flags.wandb}: {error} Or set WANDB_MODE=offline") from None


def step_rows(train: Dataset, stream: Stream, flags: Flags):
    """The rows of examples of step after step, for ever."""
    while True:
        yield [[train.examples[i] for i in row] for row in stream.step(flags.batch_size * flags.accumulate)]


def optimize(model: Transformer, steps, flags: Flags, log: Log, device: torch.device, after_step) -> None:
    """The loop. steps: of each step its rows of examples. after_step(number of steps done) returns True to stop."""
    steppers = optimizers.make_optimizers(model, flags.optimizer, flags.lr, flags.weight_decay, flags.optimizer_offload)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for step, rows in zip(range(flags.steps), steps):
        batches = row_batches(rows, flags.batch_size, device)
        trained = sum(len(batch.targets) for batch in batches)
        weight = sum(batch.weight for batch in batches)  # of the whole step: 1 x 8 is 2 x 4
        tokens = sum(len(batch.tokens) for batch in batches)
        loss, apart, unbalanced = torch.zeros((), device=device), torch.zeros((), device=device), None
        for batch in batches:
            part, balance = training_loss(model, batch, weight, tokens, apart)
            if balance is None:
                part.backward()
            else:
                (part + model.config.experts.balance * balance).backward()
                unbalanced = balance.detach() + (0 if unbalanced is None else unbalanced)
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters, flags.clip or math.inf)
        rate = rate_at(step, flags)
        for optimizer in steppers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        more = {} if unbalanced is None else {"balance_loss": unbalanced}
        if weight_apart := sum(batch.weight_apart for batch in batches):
            more["replay_loss"] = apart / weight_apart
        log.step(step + 1, loss, norm, rate, tokens, trained, [example for row in rows for example in row], more)
        if after_step(step + 1):
            return


def eagerly(flags: Flags):
    """Without compiled blocks: for work whose graphs would not pay, or whose shapes would each be compiled."""
    return torch.compiler.set_stance("force_eager") if flags.compile == "on" else contextlib.nullcontext()


def validate(model: Transformer, val: Dataset, device: torch.device) -> float:
    with evaluating(model):
        return mean_loss(model, batches_by_length(val, 8, device))


def save(model: Transformer, tokenizer: Tokenizer, flags: Flags, folder: Path, base: dict, stored: torch.dtype) -> None:
    """`final/` and `best/`: a Hugging Face folder, or a PEFT adapter folder with the tokenizer and template it was
    trained with; beside it plaintune.json, which names the base and its weights' hash."""

    def also(aside: Path) -> None:
        if flags.method != "full":  # save_model carries them over by itself
            checkpoint.copy_tokenizer(tokenizer.source, aside)
        tokenizer.save_template(aside)
        checkpoint.write_json({**base, "method": flags.method, "quant": flags.quant}, aside / "plaintune.json")

    if flags.method == "full":
        checkpoint.save_model(model, folder, stored, also)
    else:
        lora.save_adapter(model, folder, also)


# ---------------------------------------------------------------------------------------------------- the whole


def main() -> None:
    flags = parse_flags(sys.argv[1:])
    device = pick_device(flags.device)
    if device.type != "cuda" and (flags.optimizer_offload or flags.remat == "offload"):
        name = "--optimizer-offload" if flags.optimizer_offload else "--remat offload"
        raise UserError(f"{name}: is for GPUs; on {device.type} everything is in the host's memory as it is")
    dtype, why = pick_dtype(flags.dtype, device)
    folder = base_folder(flags.model, flags.adapter)
    config = checkpoint.read_config(folder)
    if flags.plan and not any((folder / f"tokenizer.{kind}").is_file() for kind in ("json", "model")):
        plan.show(config, full_rows(flags, config, device), device, dtype, adapter_settings(flags))
        return
    tokenizer = pick_tokenizer(folder, flags.adapter, flags.template)
    data = load_data(flags, tokenizer, config, device)
    if flags.plan:
        job = describe_job(flags, data, choose_steps(flags, data.stream), device)
        plan.show(config, job, device, dtype, adapter_settings(flags))
        return
    model = prepare(flags, folder, dtype, device)
    model.remat = flags.remat
    per_epoch = choose_defaults(flags, model, data.stream)
    job = describe_job(flags, data, per_epoch, device)
    flops = plan.flops_a_token(model, job.reach, job.share, flags.remat)
    seconds = job.tokens * flops / (plan.EFFICIENCY * plan.product_rate(config, device, dtype))
    why_compile = choose_compile(flags, device, seconds)
    describe(flags, model, folder, tokenizer, job, per_epoch, dtype, device, f"{why}; {why_compile}", seconds)
    other_job = flags.data or flags.model or flags.adapter or flags.profile
    demo = None if other_job else Demo(model, tokenizer, seconds)
    if flags.compile == "on":
        model.compile_blocks()

    flags.device, flags.dtype = str(device), next(name for name, known in DTYPES.items() if known == dtype)
    base = {"base": str(folder.resolve()), "base_sha256": checkpoint.fingerprint(folder)}
    stored = checkpoint.stored_dtype(config)
    out = run_folder(flags)
    log = Log(flags, out, flops, device)
    checkpoint.write_json(dataclasses.asdict(flags), out / "config.json")
    keep = lambda name: save(model, tokenizer, flags, out / name, base, stored)
    watch, steps = Watch(model, data.val, data.replay_val, flags, log, keep), step_rows(data.train, data.stream, flags)
    try:
        if flags.profile:
            profile(model, steps, flags, log, device, out)
            return
        watch.after_step(0)
        optimize(model, steps, flags, log, device, watch.after_step)
    except KeyboardInterrupt:
        if watch.kept:
            how = "--adapter" if flags.lora else "--model"
            log.bar.write(f"stopped   {how} {out / 'best'} goes on from the best validation so far")
        raise
    finally:
        log.bar.close()
    log.close()
    model.eval()
    if not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
        raise UserError(f"step {flags.steps}: weights are no numbers any more; nothing saved, try a lower --lr")
    keep("final")
    report.loss_curve(out / "metrics.jsonl", out / "loss.png", f"{folder.name}, {flags.method}")
    seconds = time.perf_counter() - log.start
    print(f"trained   {log.tokens:,} tokens in {seconds:.0f} s; peak memory {report.peak_memory(device) / 1e9:.2f} GB;"
          f" in {out}: final/, {'best/, ' * watch.kept}metrics.jsonl, loss.png")  # fmt: skip
    if demo:
        with eagerly(flags):
            demo.finish(out / "metrics.jsonl")
    say_next(flags, out / watch.verdict(), data.train.chat)


@dataclass
class Watch:
    """Validation before, during and after the training: what is best so far, and when to stop."""

    model: Transformer
    val: Dataset
    replay_val: Dataset | None
    flags: Flags
    log: Log
    keep: Callable[[str], None]  # writes the model under this name
    first: float = math.nan  # the loss before the training
    last: float = math.nan
    best: float = math.inf
    since_best: int = 0  # validations
    kept: bool = False  # is there a best/

    def after_step(self, done: int) -> bool:
        """Validates where it is due after so many steps; True stops the training."""
        every, end = self.flags.eval_every, done == self.flags.steps
        if not len(self.val) or not (end or (every and done % every == 0)):
            return False
        paused = self.log.pause()
        with eagerly(self.flags):
            self.last = validate(self.model, self.val, self.model.device)
            replay = validate(self.model, self.replay_val, self.model.device) if self.replay_val else None
        if not math.isfinite(self.last):
            raise UserError(f"step {done}: the validation loss is {self.last:g}; stopped, try a lower --lr")
        self.log.write({"step": done, "val_loss": self.last} | ({} if replay is None else {"replay_val_loss": replay}))
        said = "" if replay is None else f", of the replay {replay:.4f}"
        self.log.bar.write(f"step {done:>5}: validation loss {self.last:.4f}{said}")
        better = self.last < self.best
        self.since_best = 0 if better else self.since_best + 1
        self.best = min(self.best, self.last)
        if done == 0:
            self.first = self.last  # of what was there before: nothing to keep
        elif better:
            self.keep("best")
            self.kept = True
        self.log.go_on(paused)
        stop = bool(self.flags.patience) and self.since_best >= self.flags.patience and not end
        if stop:
            self.log.bar.write(f"stopped   {self.since_best} validations without a new best (--patience)")
        return stop

    def verdict(self) -> str:
        """Which of best and final is the one to use; says so where the end is not the best of the run."""
        if self.first <= self.best:
            print(f"WARNING   no validation was better than the {self.first:.4f} before training; try a lower --lr")
        if not (self.kept and self.best < self.last):
            return "final"
        print(f"          best/ has validation loss {self.best:.4f}, final/ {self.last:.4f}")
        return "best"


def run_folder(flags: Flags) -> Path:
    """The empty folder of the run: --out, from which --overwrite has taken what an earlier run wrote, or a new one."""
    if flags.out is None:
        Path("runs").mkdir(exist_ok=True)
        for number in itertools.count(1):
            out = Path("runs") / (time.strftime(f"%Y%m%d-%H%M%S-{flags.method}") + f"-{number}" * (number > 1))
            with contextlib.suppress(FileExistsError):  # of a run that began in the same second
                out.mkdir()
                flags.out = str(out)
                return out
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    for path in (out / name for name in RUN):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return out


def describe(flags, model, folder, tokenizer, job, per_epoch, dtype, device, why, seconds) -> None:
    """The first lines: everything that was chosen, and what to expect."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = model.size - (trained if flags.lora else 0)
    how = f"rank {flags.rank}, alpha {flags.alpha:g} on {flags.targets}" if flags.lora else flags.train or "all"
    how = f"going on from {flags.adapter}" if flags.adapter else how
    print(f"model     {folder}: {model.config.family}, {total:,} parameters; tokenizer: {tokenizer.description}")
    if (folder / "source.json").is_file():  # by convert.py
        source = checkpoint.read_json(folder / "source.json")
        kinds = ", ".join(f"{count} {kind}" for kind, count in source.get("tensor_types", {}).items())
        print(f"          made of {one_line(str(source.get('file')))}, dequantised; its tensors are {kinds}")
    for end in sorted(tokenizer.unlisted_ends):
        print(f"          NOTE: answers end with {tokenizer.decode([end])!r}, id {end}, which neither config.json nor")
        print("          generation_config.json lists as an end; tell the server that will run the model to stop there")
    share = f"{100 * trained / total:.2f} % of the model's"
    print(f"method    {flags.method} ({how}): {trained:,} parameters trained, {share}")
    if flags.lora:
        layers = lora.adapted(model).values()
        held = 100 * sum(layer.base.in_features * layer.base.out_features for layer in layers) / total
        print(f"          the {len(layers):,} adapted layers hold {held:.1f} % of the model")
    if experts := model.config.experts:
        inside = [layer for name, layer in model.named_modules() if ".experts." in name and isinstance(layer, Linear)]
        held = 100 * sum(layer.in_features * layer.out_features for layer in inside) / total
        trains = any(p.requires_grad for name, p in model.named_parameters() if ".experts." in name)
        print(
            f"          {experts.count} experts a layer, {experts.active} a token, hold {held:.1f} % of the model"
            f"{'' if trains else ', NOT trained'}; balance loss x {experts.balance:g}"
        )
    if layers := quantized(model).values():
        share = 100 * sum(layer.in_features * layer.out_features for layer in layers) / total
        size = sum(p.nbytes for layer in layers for p in layer.nf4.parameters())
        print(f"base      {len(layers):,} linears, {share:.1f} % of the model, in NF4: {size / 1e6:,.1f} MB; ", end="")
        rest = "embeddings and norms" if model.head in layers else "embeddings, norms and head"
        print(f"{rest} in {str(dtype).removeprefix('torch.')}")
        for name in model.unquantized:
            print(f"          NOTE: {name} stays in 16 bits, its rows are no whole blocks of 64")
    if model.config.unheeded:
        print(f"          NOTE: config.json's {', '.join(model.config.unheeded)} plays no part in training here")
    print(f"machine   {device}, {str(dtype).removeprefix('torch.')}: {why}")
    print(
        f"run       {flags.steps:,} steps of {flags.batch_size} x {flags.accumulate}"
        f" {'rows' if flags.pack else 'examples'} ({flags.steps / per_epoch:.2f} epochs);"
        f" {optimizers.NAMES[flags.optimizer]}, rate {flags.lr:g},"
        f" {flags.schedule} after {flags.warmup} steps of warm-up, decay {flags.weight_decay:g}, clip {flags.clip:g},"
        f" seed {flags.seed}"
    )
    if flags.remat != "none":
        print(f"          kept for the backward: {KEPT[flags.remat]}")
    if flags.weights == "bf16":
        print("          trained weights in bfloat16, rounded up or down at random, right on average")
    if flags.optimizer_offload:
        print(f"          masters and moments in fp32 on the host; weights on the GPU in {str(model.dtype)[6:]}")
    stuck = optimizers.too_small([p for p in model.parameters() if p.requires_grad], flags.lr)
    if stuck > STUCK:
        fate = "they move at random, right on average" if flags.weights == "bf16" else "raise --lr"
        print(
            f"          NOTE: steps of --lr {flags.lr:g} are too small for {100 * stuck:.0f} % of the weights; {fate}"
        )
    setup = plan.Setup(flags.method, flags.optimizer, flags.weights, flags.optimizer_offload, flags.remat)
    memory = plan.expected_memory(model, setup, job.lengths, job.trained, device.type, job.accumulate)
    print(f"expected  {memory.peak / 1e9:.1f} GB of memory, {seconds / 60:.1f} min of training", flush=True)


def profile(model, steps, flags, log, device, out: Path) -> None:
    """--profile N: the first N steps under torch.profiler; prints the dearest operations and writes trace.json."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        optimize(model, steps, flags, log, device, lambda done: done >= flags.profile)
    log.close()
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=25))
    profiler.export_chrome_trace(str(out / "trace.json"))
    print(f"profiled  {flags.profile} steps; {out / 'trace.json'} opens in chrome://tracing or ui.perfetto.dev")


def say_next(flags: Flags, made: Path, chat: bool) -> None:
    where = f"--{'adapter' if flags.lora else 'model'} {shlex.quote(str(made))}"
    base = f"--model {shlex.quote(flags.model)} " if flags.model and flags.lora else ""
    base += f"--quant {flags.quant} " if flags.quant else ""
    print(f"next      python generate.py {base}{where}{'' if chat else ' --complete'}")


if __name__ == "__main__":
    run(main)
