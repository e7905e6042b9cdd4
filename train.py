"""Fine-tunes a language model: flags, set-up, the loop. Read it from `main` downwards.

    python train.py                                                  the bundled task on the default base, in minutes
    python train.py --model FOLDER --data FILE.json                  LoRA on your model and your examples
    python train.py --model FOLDER --data FILE.json --method full    all weights
    python train.py --help                                           every flag with its default

A method is a branch in `prepare`, which leaves an ordinary nn.Module behind; the loop never asks which. A step is
batch x accumulate examples; its loss is the sum of their token losses over the number of their trained tokens, so
how the step is cut changes nothing. Written to --out: config.json, metrics.jsonl, loss.png, best/ and final/.
"""

import dataclasses
import hashlib
import importlib.util
import itertools
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

import checkpoint
import cluster
import distributed
import lora
import optimizers
import plan
import report
import resume
from convert import base_folder
from data import collate, cut_rows, load, most_tokens, row_batches, split
from demo import TASK, Demo
from errors import UserError, reason, run
from examples import IDLE, Dataset, Example
from files import new_file
from flags import LORA, VAL_FRACTION, Flags, parse_flags, replayed, weighted
from formats import Map
from inspection import quick_checks
from kernels import flash_versions
from loading import DTYPES, one_line, pick_device, pick_dtype, pick_tokenizer, put_adapter
from log import Log
from model import Config, Linear, Transformer, quantized
from objectives import training_loss
from order import Stream, shares
from tokenizer import Tokenizer
from watch import Watch, choose_saves, eagerly, pick_up, run_folder, save

COMPILE_SECONDS, COMPILE_SAVES = 20, 0.05  # measured on 2 cores: to compile a block, and the share of a step's time
KEPT = {
    "selective": "products, not norms and attention's probabilities (--remat selective)",
    "block": "the inputs of blocks, which are computed twice (--remat block)",
    "offload": "the inputs of blocks, on the host; blocks are computed twice (--remat offload)",
}
LONG_RUN = 100  # steps of an epoch from which packing is the default on a GPU: with fewer, small data learns too little
STUCK = 0.5  # this share of the weights that a step can't move is worth a word


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
        per_step = flags.batch_size * flags.accumulate * distributed.hands()
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
    """The model with its trainable parameters marked, in shards if it is to be. The one place that knows what a method
    is."""
    torch.manual_seed(flags.seed)
    if flags.lora:
        narrow, mark = dtype, adapt
    else:  # fp32 masters, here or on the host: to the nearest bf16 number, small updates are lost
        narrow, mark = torch.bfloat16 if flags.weights == "bf16" else torch.float32, choose_weights
        narrow = dtype if flags.optimizer_offload else narrow
    if flags.shard in (None, "none"):
        model = checkpoint.load_model(folder, narrow, device, flags.quant)
        mark(model, flags, dtype)
        return model

    def arrange(model: Transformer) -> None:
        mark(model, flags, dtype)
        gathered = None if flags.lora or dtype == narrow else dtype
        distributed.shard(model, flags.shard, device, gathered, flags.shard_offload)

    model = checkpoint.load_model(folder, narrow, "cpu" if flags.shard_offload else device, flags.quant, arrange)
    if flags.shard_offload:  # what is not in shards is not brought to the device when it is needed
        for p in model.parameters():
            p.data = p.data if distributed.is_sharded(p) else p.data.to(device)
    if flags.adapter and not flags.resume:
        lora.fill(model, flags.adapter)
    else:
        for layer in lora.adapted(model).values():
            layer.start()
    return model


def adapt(model: Transformer, flags: Flags, dtype: torch.dtype) -> None:
    """Puts LoRA on, a new one or --adapter."""
    if flags.adapter and not flags.resume:  # a run that goes on has its own by now
        put_adapter(model, flags.adapter)
        layers = lora.adapted(model)
        first = next(iter(layers.values()))
        flags.rank, flags.alpha, flags.dropout = first.rank, first.alpha, first.dropout
        flags.targets = ",".join(lora.target_modules(model, list(layers)))
        return
    for name, value in adapter_settings(flags).items():
        setattr(flags, name, value)
    lora.add_lora(model, flags.rank, flags.alpha, flags.dropout, flags.targets)


def choose_weights(model: Transformer, flags: Flags, dtype: torch.dtype) -> None:
    """Freezes what --train leaves out."""
    if quantized(model):
        raise UserError(f"{model.source}: its weights are in 4 bits, which can't be trained; use --method qlora")
    model.compute_dtype = dtype
    if not flags.train:
        return
    names = {name: checkpoint.published(model, name) for name, _ in model.named_parameters()}
    chosen = {name for name in names if re.search(flags.train, names[name])}
    if not chosen:
        raise UserError(f"--train {flags.train}: matches no parameter (they are named like {names['norm.weight']})")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        if name not in chosen and not parameter.is_meta:  # to be sharded: whether it may be narrow is not known yet
            narrow = parameter.data.to(dtype)
            if torch.equal(narrow.float(), parameter.data):  # frozen means: not even rounded
                parameter.data = narrow


def choose_shards(flags: Flags, config: Config, folder: Path, device: torch.device) -> str:
    """Fills in --shard, and returns a line about it."""
    count, why = distributed.size(), ", asked for with --shard"
    if flags.shard is None:
        size = sum(file.stat().st_size for file in checkpoint.weight_files(folder)) * (0.26 if flags.quant else 1)
        little = size <= distributed.LITTLE * plan.device_memory(device)
        flags.shard = "none" if count == 1 or (flags.lora and little) else "full"
        why = f": the frozen base is small, {size / 1e9:.1f} GB" if flags.shard == "none" else ""
    if flags.shard == "none" and flags.shard_offload:
        raise UserError("--shard-offload: keeps shards on the host, and --shard is none")
    if flags.shard == "hybrid" and count == distributed.on_node():
        raise UserError("--shard hybrid: shards inside a node and copies across nodes, and there is one node")
    if flags.shard == "hybrid" and not distributed.agreed(count % distributed.on_node() == 0):
        raise UserError("--shard hybrid: the nodes must have equally many processes")
    held = {"none": "each holds the whole model", "full": "each holds a part of every tensor"}
    return f"{count} processes, {held.get(flags.shard, 'each node holds the whole model')}{why}"


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
    per_step, examples = flags.batch_size * flags.accumulate * distributed.hands(), sum(stream.draws)
    per_epoch = math.ceil(stream.epoch_rows() / per_step)
    if flags.steps is None:
        if flags.epochs is None:
            flags.epochs = 1.0 if examples >= 1_500 else 2.0 if examples >= 500 else 3.0
        flags.steps = max(1, round(flags.epochs * per_epoch))
    if flags.eval_every is None:
        flags.eval_every = math.ceil(flags.steps / 5)
    return per_epoch


def choose_tokens_at_once(flags: Flags, model: Transformer, device: torch.device) -> int:
    """Tokens of a micro-batch of this process: as many as are of use and, by the plan, fit."""
    setup, layout = way_and_layout(flags)

    def peak(tokens: int) -> float:
        tokens *= flags.context_parallel
        job = plan.Job([tokens], tokens, 1.0, tokens, tokens, tokens, accumulate=2)
        return cluster.memory_a_process(model, setup, layout, job, device.type, flags.context_parallel).peak

    return distributed.from_first(plan.tokens_at_once(device, plan.FITS * plan.device_memory(device), peak))


def describe_job(flags: Flags, data: Data, per_epoch: int, device: torch.device, most: int | None = None) -> plan.Job:
    """What plan.py counts with. most: tokens of a micro-batch."""
    train, val, stream = data.train, data.val, data.stream
    validations = 1 + math.ceil(flags.steps / flags.eval_every) if flags.eval_every else 1
    tokens = train.tokens
    if flags.pack:
        longest = dataclasses.replace(stream).step(flags.batch_size)  # a stream of its own
    else:
        longest = [[i] for i in np.argsort(-train.lengths, kind="stable")[: flags.batch_size]]
    batches = row_batches(
        [[train.examples[i] for i in row] for row in longest], flags.batch_size, "cpu", most or most_tokens(device)
    )
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


def rows_at_once(flags: Flags, length: int, device: torch.device | str) -> int:
    """Rows of so many tokens that make a flat batch."""
    return max(1, min(flags.batch_size, most_tokens(device) // length))


def full_rows(flags: Flags, config: Config, device: torch.device) -> plan.Job:
    """The job of a plan for a folder without a tokenizer: rows of --seq-len tokens, all trained."""
    length, steps = flags.seq_len or min(2048, config.max_positions), flags.steps or 1000
    rows = rows_at_once(flags, length, device)
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
    if device.type == "cuda":
        flags.compile = "off"
        return "compiled blocks off: what they save on GPUs is not measured yet, --compile on tries them"
    pays = seconds * COMPILE_SAVES > 2 * COMPILE_SECONDS and flags.remat != "selective" and not flags.deterministic
    flags.compile = "on" if here and pays else "off"
    reason = "a long run" if here and pays else "a short run" if here else f"no {compiler} here"
    reason = "--remat selective" if flags.remat == "selective" else reason
    reason = "--deterministic, and whether it pays is a matter of the clock" if flags.deterministic else reason
    return f"compiled blocks {flags.compile}: {reason}"


def choose_attention(name: str, model: Transformer, examples: list[Example], device: torch.device) -> str:
    """Puts another version of FlashAttention in place, held against version 2 on these examples; a line about it."""
    batch = collate(examples, device, distributed.context)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()

    def step() -> list[torch.Tensor]:
        loss, balance = training_loss(model, batch, max(batch.weight, 1.0), max(batch.counted, 1))
        (loss if balance is None else loss + balance).backward()
        found = [loss, *(distributed.local(p.grad) for p in parameters if p.grad is not None)]
        for p in parameters:
            p.grad = None
        return found

    error = flash_versions.use(name, device, step)
    return f"{name}: loss and gradients of a first step within {error:.1e} of FlashAttention 2's"


def rate_at(step: int, flags: Flags) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, above 0 from the first step, then the schedule down to 0."""
    if step < flags.warmup:
        return flags.lr * (step + 1) / (flags.warmup + 1)
    progress = (step - flags.warmup) / (flags.steps - flags.warmup)  # 0 at the peak, 1 a step after the last
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return flags.lr * shape[flags.schedule]


# ---------------------------------------------------------------------------------------------------- the loop


def step_parts(
    train: Dataset, stream: Stream, flags: Flags, device: torch.device, first: int = 0, most: int | None = None
):
    """Of step `first` and all after it, for ever: this process's micro-batches, lists of examples. All processes have
    as many, since they compute together: who has fewer rows gets idle ones. most: tokens of a micro-batch."""
    most = most or most_tokens(device)
    for step in itertools.count(first):
        rows = stream.step(flags.batch_size * flags.accumulate * distributed.hands())
        sizes = [int(train.lengths[row].sum()) for row in rows]
        hands = distributed.deal(sizes, distributed.hands())
        cuts = [cut_rows([sizes[i] for i in hand], flags.batch_size, most * flags.context_parallel) for hand in hands]
        hand, parts = hands[distributed.hand()], cuts[distributed.hand()]
        chosen = [[example for k in part for example in keyed(train, rows, hand[k], step, flags)] for part in parts]
        yield chosen + [[IDLE]] * (max(map(len, cuts)) - len(parts))


def keyed(train: Dataset, rows: list[list[int]], number: int, step: int, flags: Flags) -> list[Example]:
    """A row's examples, each with a number for dropout that follows from the seed and its place in the run."""
    examples = [train.examples[i] for i in rows[number]]
    if not flags.dropout:
        return examples
    places = (f"{flags.seed} {step} {number} {place}".encode() for place in range(len(examples)))
    keys = [int.from_bytes(hashlib.blake2b(place, digest_size=7).digest(), "little") for place in places]
    return [dataclasses.replace(example, key=key) for example, key in zip(examples, keys, strict=True)]


def optimize(
    model: Transformer, steppers: list, steps, flags: Flags, log: Log, device: torch.device, after_step, first: int = 0
) -> None:
    """The loop. steppers: the optimizers; steps: of each step from `first` on, this process's micro-batches.
    after_step(number of steps done, a signal or 0) returns True to stop."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for step, parts in zip(range(first, flags.steps), steps):
        batches = [collate(part, device, distributed.context) for part in parts]
        counts = [[len(b.targets), b.weight, b.counted, b.weight_apart, 0] for b in batches]
        counts[0][-1] = log.stop.asked  # a signal, which all processes have to hear of at the same step
        # of the whole step, over all processes: 1 x 8 is 2 x 4
        counts = distributed.total(torch.tensor(counts, dtype=torch.float64).sum(0))
        trained, weight, tokens, weight_apart, asked = counts.tolist()
        loss, apart, unbalanced = torch.zeros((), device=device), torch.zeros((), device=device), None
        for number, batch in enumerate(batches, 1):
            distributed.expect_sums(model, number == len(batches) or flags.reduce == "each")
            part, balance = training_loss(model, batch, weight, tokens, apart)
            if balance is None:
                part.backward()
            else:
                (part + model.config.experts.balance * balance).backward()
                unbalanced = balance.detach() + (0 if unbalanced is None else unbalanced)
            loss += part.detach()
        distributed.add_gradients(parameters)
        norm = distributed.clip(parameters, flags.clip or math.inf)
        sums = [loss, apart, torch.zeros_like(loss) if unbalanced is None else unbalanced]
        sums = distributed.total(torch.stack(sums))
        bad = (~(sums[0] + norm).isfinite()).float()  # such a step is none, and is counted
        rate = rate_at(step, flags)
        for optimizer in steppers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step(bad)
            optimizer.zero_grad()
        more = {} if unbalanced is None else {"balance_loss": sums[2]}
        if weight_apart:
            more["replay_loss"] = sums[1] / weight_apart
        examples = [example for part in parts for example in part]
        log.step(step + 1, sums[0], norm, rate, int(tokens), int(trained), examples, more)
        if after_step(step + 1, int(asked)):
            return


# ---------------------------------------------------------------------------------------------------- the whole


def main() -> None:
    try:
        train(parse_flags(sys.argv[1:]))
    except torch.OutOfMemoryError as error:  # before the loop, which knows more
        what = str(error).partition(".")[0]
        raise UserError(f"out of memory: {what}; --plan says what fits, --method qlora takes least") from None
    except RuntimeError as error:
        if not distributed.lost(error):
            raise
        raise distributed.gone(error) from None
    distributed.stop()


def train(flags: Flags) -> None:
    device, found = join(flags)
    if found and found.complete:
        return
    dtype, why = pick_dtype(flags.dtype, device)
    with distributed.in_turn():
        folder = base_folder(flags.model, flags.adapter)
    config = checkpoint.read_config(folder)
    if flags.plan and plan_from_config(flags, folder, config, device, dtype):
        return
    if config.experts and distributed.context:
        raise UserError("--context-parallel: not with routed experts, whose balance is of whole batches")
    tokenizer = pick_tokenizer(folder, flags.adapter, flags.template)
    with distributed.in_turn():
        data = load_data(flags, tokenizer, config, device)
    if flags.plan:
        job = describe_job(flags, data, choose_steps(flags, data.stream), device)
        plan.show(config, job, device, dtype, adapter_settings(flags))
        return
    shards = choose_shards(flags, config, folder, device)
    model = prepare(flags, folder, dtype, device)
    model.remat = flags.remat
    per_epoch = choose_defaults(flags, model, data.stream)
    most = choose_tokens_at_once(flags, model, device)
    job = describe_job(flags, data, per_epoch, device, most)
    flops = plan.flops_a_token(model, job.reach, job.share, flags.remat)
    rate = distributed.from_first(plan.product_rate(config, device, dtype))
    seconds = job.tokens * flops / (plan.EFFICIENCY * rate * distributed.size())
    why_compile = choose_compile(flags, device, seconds)
    describe(flags, model, folder, tokenizer, job, per_epoch, dtype, device, most, f"{why}; {why_compile}", seconds)
    alone = distributed.size() == 1 and flags.shard == "none"
    if not alone:
        together = f"; {flags.context_parallel} share each batch's tokens (experimental)" * bool(distributed.context)
        print(f"processes {shards}{together}")
    if found:
        print(f"resumed   after step {found.state['step']:,} of {flags.steps:,}, from {found.folder}")
    other_job = flags.data or flags.model or flags.adapter or flags.profile or not alone
    demo = None if other_job else Demo(model, tokenizer, seconds)
    if flags.compile == "on":
        model.compile_blocks()
    if flags.attention != "auto":  # before the run's folder is made: where it is refused, none is left
        first = next(step_parts(data.train, dataclasses.replace(data.stream), flags, device, most=most))
        print(f"attention {choose_attention(flags.attention, model, first[0], device)}")

    flags.device, flags.dtype = device.type, next(name for name, known in DTYPES.items() if known == dtype)
    base, stored = identify(flags, folder, data), checkpoint.stored_dtype(config)
    if found:
        resume.check_same(found, base)
    out = Path(distributed.by_first(lambda: run_folder(flags, found)))
    steppers = optimizers.make_optimizers(model, flags.optimizer, flags.lr, flags.weight_decay, flags.optimizer_offload)
    print(f"saves     {choose_saves(flags, model, out, seconds)}")
    log = Log(flags, out, flops, device, found and found.state)
    if distributed.is_first():
        with new_file(out / "config.json") as aside:
            checkpoint.write_json(dataclasses.asdict(flags), aside)
    distributed.ready(flags.timeout)
    keep = lambda name: save(model, tokenizer, flags, out / name, base, stored)
    saver = resume.Saver(out, flags.keep, flags.save_async, log.bar.write)
    watch = Watch(model, steppers, data.val, data.replay_val, data.stream, flags, log, keep, saver, base, device, most)
    if found:
        watch.go_on(found)
    steps = step_parts(data.train, data.stream, flags, device, watch.done, most)
    if flags.profile:
        profile(model, steppers, steps, flags, log, device, out)
        return
    carry_out(watch, steps, out, lambda: relief(flags, config, job, device, dtype))
    finish(watch, out, f"{folder.name}, {flags.method}", demo)
    say_next(flags, out / watch.verdict(), data.train.chat)


def join(flags: Flags) -> tuple[torch.device, resume.Found | None]:
    """Joins the other processes, if there are any, and takes up the run that is to go on, if one is: the flags are its
    own from then on."""
    device = pick_device(flags.device)
    if distributed.launched() or flags.shard not in (None, "none"):
        device = distributed.start(device)
    found = pick_up(flags) if flags.resume else None
    if found and found.complete:
        return device, found
    if flags.shard not in (None, "none"):  # of the run that goes on, it may be
        device = distributed.start(device)
    if found is None:
        distributed.share_batches(flags.context_parallel)
    if flags.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of two sizes, cuBLAS chooses as it likes
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if device.type != "cuda" and (flags.optimizer_offload or flags.shard_offload or flags.remat == "offload"):
        name = "--remat offload" if flags.remat == "offload" else "--optimizer-offload"
        name = "--shard-offload" if flags.shard_offload else name
        raise UserError(f"{name}: is for GPUs; on {device.type} everything is in the host's memory as it is")
    return device, found


def identify(flags: Flags, folder: Path, data: Data) -> dict:
    """What a run is made from, by hashes. UserError where the processes have different things."""
    sha = checkpoint.fingerprint(folder) if distributed.local_rank() == 0 else None  # once a machine
    digest = resume.data_digest(
        *(data.train.lengths, data.train.trained, data.train.prompts, data.val.lengths, data.val.prompts),
        *(tuple(data.stream.draws), flags.seq_len, flags.pack, flags.seed, data.replay_val and data.replay_val.prompts),
        *(rows.contents for rows in data.train.examples.rows),
    )
    first = distributed.from_first((sha, digest))
    if not distributed.agreed(sha in (None, first[0]) and digest == first[1]):
        raise UserError("the processes do not have the same base or the same examples (a --map that draws at random?)")
    return {"base": str(folder.resolve()), "base_sha256": first[0], "data": digest}


def carry_out(watch: Watch, steps, out: Path, relief: Callable[[], str]) -> None:
    """The training, and what is said where it can't go on. relief: for when memory ran out."""
    log, saver = watch.log, watch.saver
    try:
        with log.stop:
            if not watch.done:
                watch.after_step(0)
            more = watch.flags, log, watch.device, watch.after_step, watch.done
            optimize(watch.model, watch.steppers, steps, *more)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: {str(error).partition('.')[0]}. {relief()}") from None
    except (UserError, RuntimeError) as error:
        error = distributed.gone(error) if distributed.lost(error) else error
        if not isinstance(error, UserError):
            raise
        whole = f"; {out / resume.FOLDER / saver.newest} is whole" if saver.newest else ""
        raise UserError(f"{error}{whole}") from None
    finally:
        log.bar.close()
    saver.wait()
    log.close()
    if watch.interrupted:
        sys.exit(128 + watch.interrupted)


def finish(watch: Watch, out: Path, title: str, demo: Demo | None) -> None:
    """final/, the picture of the losses, and what the bundled task has taught."""
    model, flags, log, saver = watch.model, watch.flags, watch.log, watch.saver
    model.eval()
    trained = [distributed.local(p) for p in model.parameters() if p.requires_grad]
    if not distributed.agreed(all(bool(p.isfinite().all()) for p in trained)):
        raise UserError(f"step {flags.steps}: weights are no numbers any more; nothing saved, try a lower --lr")
    again = f"--out {out} --resume goes on from {saver.newest}"
    try:
        with distributed.patient():
            watch.keep("final")
    except RuntimeError as error:
        if not distributed.lost(error) or not saver.newest:
            raise
        raise UserError(f"{distributed.gone(error)}; {again}") from None
    except OSError as error:
        raise UserError(
            f"final/ could not be written, {reason(error, out)}{f'; make room, then {again}' * bool(saver.newest)}"
        ) from None
    if distributed.is_first():
        report.loss_curve(out / "metrics.jsonl", out / "loss.png", title)
    seconds = time.perf_counter() - log.start
    memory, best = report.peak_memory(watch.device) / 1e9, "best/, " * watch.kept
    print(f"trained   {log.tokens:,} tokens in {seconds:.0f} s; peak memory {memory:.2f} GB;"
          f" in {out}: final/, {best}metrics.jsonl, loss.png")  # fmt: skip
    if demo:
        with eagerly(flags):
            demo.finish(out / "metrics.jsonl")


def plan_from_config(flags: Flags, folder: Path, config: Config, device: torch.device, dtype: torch.dtype) -> bool:
    """Prints the plans that need no data; False where --plan is to look at them."""
    if flags.gpus:
        seq_len = min(flags.seq_len or 2048, config.max_positions)
        rows = rows_at_once(flags, seq_len, "cuda")
        cluster.show(config, flags.gpus, seq_len, rows, flags.accumulate, adapter_settings(flags))
        return True
    if any((folder / f"tokenizer.{kind}").is_file() for kind in ("json", "model")):
        return False
    plan.show(config, full_rows(flags, config, device), device, dtype, adapter_settings(flags))
    return True


def relief(flags: Flags, config: Config, job: plan.Job, device: torch.device, dtype: torch.dtype) -> str:
    setup, layout = way_and_layout(flags)
    shape = flags.batch_size, flags.accumulate, flags.seq_len
    return cluster.relief(config, setup, layout, job, shape, device, dtype, adapter_settings(flags))


def describe(flags, model, folder, tokenizer, job, per_epoch, dtype, device, most, why, seconds) -> None:
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
        f"{f' x {distributed.hands()}' * (distributed.hands() > 1)}"
        f" {'rows' if flags.pack else 'examples'} ({flags.steps / per_epoch:.2f} epochs);"
        f" {optimizers.NAMES[flags.optimizer]}, rate {flags.lr:g},"
        f" {flags.schedule} after {flags.warmup} steps of warm-up, decay {flags.weight_decay:g}, clip {flags.clip:g},"
        f" seed {flags.seed}"
    )
    if most < most_tokens(device):
        print(f"          in micro-batches of at most {most:,} tokens; more do not fit")
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
    setup, layout = way_and_layout(flags)
    memory = cluster.memory_a_process(model, setup, layout, job, device.type, flags.context_parallel)
    print(f"expected  {memory.peak / 1e9:.1f} GB of memory, {seconds / 60:.1f} min of training", flush=True)


def way_and_layout(flags: Flags) -> tuple[plan.Setup, cluster.Layout]:
    """What plan.py and cluster.py call this run."""
    method = "qlora" if flags.quant else flags.method
    setup = plan.Setup(method, flags.optimizer, flags.weights, flags.optimizer_offload, flags.remat)
    shards = {"none": 1, "hybrid": distributed.on_node()}.get(flags.shard, distributed.size())
    return setup, cluster.Layout(distributed.size(), shards)


def profile(model, steppers, steps, flags, log, device, out: Path) -> None:
    """--profile N: the first N steps under torch.profiler; prints the dearest operations and writes trace.json."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        optimize(model, steppers, steps, flags, log, device, lambda done, _: done >= flags.profile)
    log.close()
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=25))
    if not distributed.is_first():
        return
    profiler.export_chrome_trace(str(out / "trace.json"))
    print(f"profiled  {flags.profile} steps; {out / 'trace.json'} opens in chrome://tracing or ui.perfetto.dev")


def say_next(flags: Flags, made: Path, chat: bool) -> None:
    where = f"--{'adapter' if flags.lora else 'model'} {shlex.quote(str(made))}"
    base = f"--model {shlex.quote(flags.model)} " if flags.model and flags.lora else ""
    base += f"--quant {flags.quant} " if flags.quant else ""
    print(f"next      python generate.py {base}{where}{'' if chat else ' --complete'}")


if __name__ == "__main__":
    run(main)
