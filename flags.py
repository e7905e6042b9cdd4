"""Every flag of train.py: its name, type, default and help in one place, and what can be said about them before a
file is opened."""

import argparse
import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

import lora
import optimizers
import remat
from errors import UserError
from examples import TRAIN_ON
from formats import TREES
from kernels import flash_versions
from loading import parse
from quant import KINDS
from templates import NAMED

LORA = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": lora.ALL}  # of a new adapter
VAL_FRACTION = 0.05  # where --val is not given
LARGEST = 2**31  # of any flag


def flag(default, group: str, text: str, **more):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"group": group, "help": text, **more})
    return field(default=default, metadata={"group": group, "help": text, **more})


@dataclass
class Flags:
    """Every flag: name, type, default and help stand here and nowhere else. None: chosen at the start and printed."""

    model: str | None = flag(
        None,
        "model and data",
        "Hugging Face folder or GGUF file (default: the adapter's base, else SmolLM2-135M-Instruct)",
    )
    data: list[str] = flag(
        [],
        "model and data",
        "files or folders of examples; with weights, they share the draws (default: the bundled task)",
        metavar="FILE[=W]",
    )
    replay: list[str] = flag(
        [], "model and data", "general data against forgetting: this share of all draws is of it", metavar="FILE=SHARE"
    )
    val: str | None = flag(None, "model and data", "file of validation examples", metavar="FILE")
    val_fraction: float | None = flag(
        None, "model and data", f"without --val: this share of the prompts validates; 0: none (default: {VAL_FRACTION})"
    )
    template: str | None = flag(None, "model and data", "chat template in place of the model's own", choices=[*NAMED])
    train_on: str = flag(
        "answers",
        "model and data",
        "of a conversation: every answer of the assistant, the last one, or the user's turns as well",
        choices=[*TRAIN_ON],
    )
    pack: bool | None = flag(
        None, "model and data", "rows of --seq-len tokens, full of whole examples (default: on a GPU, in long runs)"
    )
    map: str | None = flag(
        None,
        "model and data",
        "your function that the records of --data and --val go through",
        metavar="FILE.py:NAME",
    )
    trees: str = flag(
        "best", "model and data", "of OASST trees: the path of best-ranked replies, or every path", choices=[*TREES]
    )
    seq_len: int | None = flag(None, "model and data", "longest example in tokens (default: 2048 or the model's limit)")
    out: str | None = flag(None, "model and data", "folder of the run (default: a new one under runs/)", metavar="DIR")
    plan: bool = flag(False, "watching", "say what each method would take of memory and time, and stop")
    gpus: list[int] = flag(
        [], "watching", "--plan: for so many GPUs of 80 GB in nodes of 8, one line each", metavar="N"
    )
    overwrite: bool = flag(False, "model and data", "replace the run that --out holds")
    resume: str | None = flag(
        None,
        "durability",
        "go on from the newest whole checkpoint under --out, with its flags; `auto`: or begin, where there is none",
        nargs="?",
        const="on",
        choices=["on", "auto"],
    )
    save_every: int | None = flag(
        None, "durability", "steps between checkpoints (default: a fifth of the run, half an hour at most); 0: none"
    )
    keep: int = flag(2, "durability", "checkpoints that are kept: the last so many, and the best validated one")
    save_async: bool = flag(False, "durability", "write checkpoints while the training goes on, from a copy in memory")
    method: str = flag(
        "lora",
        "method",
        "full: the weights themselves; lora: low-rank adapters; qlora: the same on a base in 4 bits (--quant nf4)",
        choices=["full", "lora", "qlora"],
    )
    quant: str | None = flag(None, "method", "of the frozen base, in lora: 4 bits a weight (QLoRA)", choices=[*KINDS])
    rank: int | None = flag(None, "method", f"lora: rank of the update (default: {LORA['rank']})")
    alpha: float | None = flag(
        None, "method", f"lora: the update is scaled by alpha / rank (default: {LORA['alpha']:g})"
    )
    dropout: float | None = flag(None, "method", f"lora: dropout on the adapters' input (default: {LORA['dropout']:g})")
    targets: str | None = flag(
        None, "method", f"lora: names of layers, with commas (default: {LORA['targets']}, every linear of the blocks)"
    )
    adapter: str | None = flag(None, "method", "lora: go on from this adapter folder", metavar="DIR")
    train: str | None = flag(
        None, "method", "full: train only parameters whose published name matches", metavar="REGEX"
    )
    batch_size: int = flag(8, "optimization", "examples in a micro-batch; packed, rows")
    accumulate: int = flag(1, "optimization", "micro-batches in a step")
    steps: int | None = flag(None, "optimization", "optimizer steps (default: from --epochs)")
    epochs: float | None = flag(None, "optimization", "passes over the data (default: by the amount of data)")
    lr: float | None = flag(None, "optimization", "peak learning rate (default: by method and model width)")
    schedule: str = flag("cosine", "optimization", "after warm-up", choices=["cosine", "linear", "constant"])
    warmup: int | None = flag(None, "optimization", "steps of linear warm-up (default: 5 %% of the steps)")
    weight_decay: float | None = flag(None, "optimization", "on matrices only (default: 0.01 for full, 0 for lora)")
    optimizer: str = flag(
        "adamw",
        "optimization",
        "adamw8bit: its moments in a byte each; muon: on the blocks' matrices, AdamW on the rest",
        choices=[*optimizers.NAMES],
    )
    optimizer_offload: bool = flag(
        False, "optimization", "masters, moments and the step on the host: 4 bytes a trained weight are left on the GPU"
    )
    weights: str = flag(
        "fp32",
        "optimization",
        "full: dtype of the trained weights; bf16: rounded up or down at random, right on average; half the memory",
        choices=["fp32", "bf16"],
    )
    clip: float = flag(1.0, "optimization", "largest norm of the gradient; 0: no clipping")
    seed: int = flag(0, "optimization", "of order, initialisation and dropout")
    dtype: str = flag(
        "auto", "machine", "of the products; adapters, optimizer, loss stay fp32", choices=["auto", "fp32", "bf16"]
    )
    device: str = flag("auto", "machine", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    compile: str = flag(
        "auto", "machine", "blocks by torch.compile; auto: where it pays", choices=["auto", "on", "off"]
    )
    attention: str = flag(
        "auto",
        "machine",
        "flash3, flash4: that version of FlashAttention on a GPU, where its package is installed and its numbers are"
        " those of version 2 in the first step",
        choices=["auto", *flash_versions.VERSIONS],
    )
    shard: str | None = flag(
        None,
        "processes",
        "of a model, each process of torchrun holds: all (none), a part of every tensor (full), a part, each node all"
        " (hybrid) (default: full; for adapters on a small base none)",
        choices=["none", "full", "hybrid"],
    )
    shard_offload: bool = flag(
        False, "processes", "--shard: parts of weights, gradients and the optimizer's state on the host"
    )
    reduce: str = flag(
        "last",
        "processes",
        "gradients in shards are added up after a step's last micro-batch, or after each, which takes less memory",
        choices=["last", "each"],
    )
    context_parallel: int = flag(
        1, "processes", "so many processes share each batch's tokens, for long sequences (experimental)", metavar="N"
    )
    timeout: float = flag(600.0, "processes", "seconds that a process waits for another one before it gives up")
    deterministic: bool = flag(
        False, "machine", "bitwise equal runs on one machine: no operation whose order is open, no choice by the clock"
    )
    remat: str = flag(
        "none",
        "machine",
        "selective: norms and attention's probabilities are computed again in the backward; block: whole blocks, of"
        " which only the inputs are kept; offload: those on the host",
        choices=[*remat.KINDS],
    )
    eval_every: int | None = flag(
        None, "watching", "steps between validations (default: a fifth of the run); 0: at the end"
    )
    patience: int = flag(0, "watching", "stop after so many validations without a new best; 0: never")
    profile: int = flag(0, "watching", "profile this many steps, print the table, stop", metavar="N")
    wandb: str | None = flag(None, "watching", "log to this Weights & Biases project as well", metavar="PROJECT")

    @property
    def lora(self) -> bool:
        return self.method != "full"


def parse_flags(argv: list[str]) -> Flags:
    parser = argparse.ArgumentParser("train.py", allow_abbrev=False, description="Fine-tunes a language model.")
    groups = {}
    for f in dataclasses.fields(Flags):
        meta = dict(f.metadata)
        group = meta.pop("group")
        where = groups.setdefault(group, parser.add_argument_group(group))
        name, kind = "--" + f.name.replace("_", "-"), str(f.type)
        default = f.default if f.default is not dataclasses.MISSING else []
        if not (default is None or default is False or default == []):
            meta["help"] += f" (default: {default})"
        if kind == "bool | None":
            where.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, **meta)
        elif f.type is bool:
            where.add_argument(name, action="store_true", default=argparse.SUPPRESS, **meta)
        elif "list" in kind:
            to = int if "int" in kind else str
            where.add_argument(name, nargs="+", action="extend", type=to, default=argparse.SUPPRESS, **meta)
        else:
            to = float if "float" in kind else int if "int" in kind else str
            where.add_argument(name, type=to, default=argparse.SUPPRESS, **meta)
    given = vars(parse(parser, argv))
    flags = Flags(**given)
    check(flags)
    flags.given = set(given)  # no field: of this process, not of the run
    if flags.method == "qlora":
        flags.quant = flags.quant or "nf4"
    return flags


def check(flags: Flags) -> None:
    """Everything about the flags that can be said before a file is opened."""
    positive = ("steps", "epochs", "lr", "batch_size", "accumulate", "seq_len", "rank", "alpha", "keep", "timeout")
    positive = (*positive, "context_parallel")
    at_least_0 = (
        "warmup",
        "weight_decay",
        "clip",
        "eval_every",
        "save_every",
        "patience",
        "profile",
        "seed",
        "dropout",
    )
    for names, ok, wanted in ((positive, lambda v: v > 0, "above 0"), (at_least_0, lambda v: v >= 0, "0 or more")):
        for name in names:
            value = getattr(flags, name)
            if value is not None and not (ok(value) and value < LARGEST):
                above = f" and below {LARGEST:g}" if value >= LARGEST else ""
                raise UserError(f"--{name.replace('_', '-')} {value:g}: must be {wanted}{above}")
    if flags.val_fraction is not None and not 0 <= flags.val_fraction < 1:
        raise UserError(f"--val-fraction {flags.val_fraction:g}: must be at least 0 and below 1")
    weighted(flags.data), replayed(flags.replay)
    if flags.seq_len == 1:
        raise UserError("--seq-len 1: must be 2 or more, the first token of an example is never trained")
    if flags.val_fraction is not None and (flags.val or not flags.data):
        raise UserError("--val-fraction parts the files of --data; with --val or without --data it means nothing")
    if flags.steps is not None and flags.epochs is not None:
        raise UserError("--steps and --epochs: give one of them")
    if flags.quant and not flags.lora:
        raise UserError(f"--quant {flags.quant}: 4 bits can't be trained; a frozen base with --method lora can")
    if flags.adapter and not flags.lora:
        raise UserError("--adapter goes on from a LoRA adapter and needs --method lora")
    shape = [f"--{name}" for name in LORA if getattr(flags, name) is not None]
    if shape and (flags.adapter or not flags.lora):
        reason = "the adapter that --adapter names has its own" if flags.adapter else "is for --method lora"
        raise UserError(f"{shape[0]}: {reason}")
    if flags.remat == "selective" and flags.compile == "on":
        raise UserError("--remat selective with --compile on: the compiler chooses what to compute again by itself")
    if flags.patience and flags.eval_every == 0:
        raise UserError("--patience counts validations, and --eval-every 0 has one, at the end")
    if flags.lora and flags.weights == "bf16":
        raise UserError("--weights bf16 is for --method full; adapters are fp32, and cast for the products")
    if flags.optimizer == "muon" and flags.weights == "bf16":
        raise UserError("--weights bf16: Muon rounds to the nearest, which loses small steps; take adamw or adamw8bit")
    if flags.shard_offload and (flags.optimizer != "adamw" or flags.optimizer_offload):
        raise UserError("--shard-offload: the host steps by AdamW, and has the optimizer's state already")
    if flags.optimizer_offload and flags.optimizer != "adamw":
        raise UserError(f"--optimizer-offload: the host steps by AdamW, not by --optimizer {flags.optimizer}")
    if flags.optimizer_offload and flags.weights == "bf16":
        raise UserError("--optimizer-offload: keeps fp32 masters on the host, which --weights bf16 is to do without")
    if flags.train and flags.method != "full":
        raise UserError("--train chooses among the model's own weights and needs --method full")
    if flags.train:
        try:
            re.compile(flags.train)
        except re.error as error:
            raise UserError(f"--train {flags.train}: no regular expression ({error})") from None
    if flags.gpus and not flags.plan:
        raise UserError("--gpus is what --plan is to plan for; a run has as many as torchrun starts processes")
    if not all(0 < count < LARGEST for count in flags.gpus):
        raise UserError("--gpus: numbers above 0 are wanted")
    check_out(flags)


def check_out(flags: Flags) -> None:
    """Whether --out can be the folder of this run."""
    if flags.out and Path(flags.out).is_file():
        raise UserError(f"--out {flags.out}: is a file; name a folder")
    if flags.resume and not flags.out:
        raise UserError("--resume: needs --out, the folder of the run that is to go on")
    if flags.resume and flags.profile:
        raise UserError("--profile looks at a run's first steps, and --resume has them behind it")
    if flags.resume and flags.overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it; give one of them")
    there = Path(flags.out).iterdir() if flags.out and Path(flags.out).exists() else ()
    if any(not path.name.startswith(".") for path in there):
        if not (Path(flags.out) / "metrics.jsonl").is_file():
            raise UserError(f"--out {flags.out}: holds something that is no run of train.py; name another folder")
        if not (flags.overwrite or flags.resume):
            raise UserError(
                f"--out {flags.out}: holds a run already; name another folder, or add --resume or --overwrite"
            )
        files, word = [*weighted(flags.data)[0], *replayed(flags.replay)[0]], "resume" if flags.resume else "overwrite"
        for read in filter(None, (flags.model, flags.adapter, flags.val, *files)):
            if Path(flags.out).resolve() in (Path(read).resolve(), *Path(read).resolve().parents):
                raise UserError(f"--{word}: {read} lies in --out {flags.out}, and would be gone before it is used")


def weighted(words: list[str]) -> tuple[list[str], list[float] | None]:
    """The files of --data and their weights, which are 1 where others have some; None where none has."""
    parts = [number_behind(word) for word in words]
    weights = [1.0 if weight is None else weight for _, weight in parts]
    for word, weight in zip(words, weights, strict=True):
        if not 0 < weight < 1e9:
            raise UserError(f"--data {word}: a weight must be above 0")
    return [file for file, _ in parts], None if all(weight is None for _, weight in parts) else weights


def replayed(words: list[str]) -> tuple[list[str], list[float]]:
    """The files of --replay and their shares of all draws."""
    parts = [number_behind(word) for word in words]
    for word, (_, share) in zip(words, parts, strict=True):
        if share is None or not 0 < share < 1:
            raise UserError(f"--replay {word}: FILE=SHARE is wanted, a share above 0 and below 1")
    if sum(share for _, share in parts) >= 1:
        raise UserError("--replay: the shares leave no draw to --data")
    return [file for file, _ in parts], [share for _, share in parts]


def number_behind(word: str) -> tuple[str, float | None]:
    """(a.json, 3.0) of a.json=3; a file whose own name ends so is itself."""
    file, sign, number = word.rpartition("=")
    if not word or (sign and not file):
        raise UserError(f"{word!r}: names no file")
    if not sign or Path(word).exists():
        return word, None
    try:
        return file, float(number)
    except ValueError:
        if Path(file).exists():
            raise UserError(f"{word}: {number!r} is no number") from None
    return word, None
