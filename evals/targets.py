"""What evaluate.py measures: the file and the models that a command line names.

`Opened` holds them. The models are loaded one at a time, since two may not fit into memory.
"""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
from adapter_files import OWN_BASE, has_adapter, is_adapter, remove_adapter, virtual_tokens_in
from adapting.score_head import head_labels, require_lm_head
from checkpoint import load_model, read_config
from common.device import pick_device, pick_dtype
from common.errors import UserError
from dataset.examples import Dataset, ExampleIndex, draw_examples
from dataset.folders import TEST, Fetched
from dataset.formats import Map, Source, UnknownFormat, open_source
from dataset.prompts import open_prompts
from dataset.records import ReadStats, Record
from dataset.token_cache import prompt_hash
from evals.answers import split_reference
from evals.arguments import BATCH_SIZE, kind_of
from interop import resolve
from interop.remote_data import fetch_data
from interop.resolve import base_folder, base_of_model
from methods import put_adapter_on
from model import Transformer
from tokenizer import Tokenizer

# What a model with a score head is measured by; everything else asks for the next token.
BY_SCORE_HEAD = ["classify"]


@dataclass
class Target:
    """A model to measure: a base model, by its folder, and perhaps an adapter on it."""

    name: str
    folder: Path
    adapter: str | None

    def max_positions(self) -> int:
        """Returns the longest text that the model takes, in tokens."""
        limit = read_config(self.folder).max_positions
        return limit if self.adapter is None else limit - virtual_tokens_in(self.adapter)

    def score_labels(self) -> tuple[str, ...] | None:
        """Returns the labels of the model's score head; None if it has an LM head."""
        return head_labels(read_config(self.folder), self.adapter)


class Opened:
    """What a command line names, opened: the file, and the models, which are loaded one at a time.

    targets: what is measured, in order.
    files: what --data names, fetched; file: the first of them.
    map_fn: the user's function that every record goes through, if there is one.
    day, system: date and system message of the prompts, the same for all targets, so that they
        answer the same questions.
    batch_size: --batch-size, or its default.
    """

    def __init__(self, args: argparse.Namespace, targets: list[Target] | None = None):
        """targets: what is measured; None: what --model, --adapter and --versus name."""
        self.args = args
        self.device = pick_device(args.device)
        self.dtype, self.reason = pick_dtype(args.dtype, self.device)
        self.map_fn = Map(args.map) if args.map else None
        self.files = [fetch_data(file, TEST) for file in args.files]
        self.file = self.files[0]
        self.targets = targets or pick_targets(args)
        for target in self.targets:
            if [*args.what] != BY_SCORE_HEAD:
                require_lm_head(target.folder, read_config(target.folder), target.adapter)
        last = self.targets[-1]
        trained = last.adapter or last.folder
        self.day = args.date or resolve.trained_day(trained)
        self.system = args.system
        if self.system is None:
            self.system = resolve.trained_system(trained)
        self.batch_size = args.batch_size or BATCH_SIZE[kind_of(args.what)]
        self.model: Transformer | None = None
        self.printed: set[str] = set()

    def print_once(self, line: str) -> None:
        """Prints a line about the file, unless it was printed: a second model that reads the file in
        the same way has nothing new to say of it."""
        fact = line.removesuffix(data.FROM_CACHE)
        if fact not in self.printed:
            print(line)
        self.printed.add(fact)

    def print_computation(self) -> None:
        """Prints what is computed, in which dtype and where."""
        dtype_name = str(self.dtype).removeprefix("torch.")
        what = ", ".join(self.args.what)
        print(f"compute   {what} in {dtype_name} on {self.device.type}: {self.reason}")

    def tokenizer_of(self, target: Target) -> Tokenizer:
        """Returns the tokenizer of a target, with the date and system message of all."""
        tokenizer = resolve.pick_tokenizer(
            target.folder, target.adapter, self.args.template, self.day, system=self.system
        )
        data.check_system(tokenizer)
        return tokenizer

    def load(self, target: Target, tokenizer: Tokenizer) -> Transformer:
        """Loads the model of a target, and prints what it is. Two targets may share a base, which is
        then loaded once; else the memory of the first is free before the second is loaded."""
        model = self.model
        if model is None or model.source != target.folder:
            model = self.model = None
            model = load_model(target.folder, self.dtype, self.device, self.args.quant)
        elif has_adapter(model):
            remove_adapter(model)
        if target.adapter is not None:
            put_adapter_on(model, target.adapter)
        self.model = model
        print_target(target, model, tokenizer)
        return model


# ---- the models ----


def pick_targets(args: argparse.Namespace) -> list[Target]:
    """Returns what is measured, in order: what --versus names, if it is given, then what --model
    and --adapter name."""
    folder = base_folder(args.model, args.adapter)
    name = "adapter" if args.adapter else "model"
    mine = Target(name, folder, args.adapter)
    if args.versus is None:
        return [mine]
    if args.versus == "base":
        base: Path | None = folder
        if not args.adapter:
            # Then it is the one that a model trained here names.
            base = base_of_model(folder)
        if base is None:
            raise UserError(
                "--versus base: needs --adapter, or a --model trained here whose base is still in"
                " place"
            )
        if base.name == OWN_BASE and is_adapter(base.parent):
            print(
                f"NOTE: base is {base}, the 4 bits that LoftQ's adapter makes up for: worse than the"
                " model that they were made of, which --versus FOLDER compares with"
            )
        return [Target("base", base, None), mine]
    if is_adapter(args.versus):
        return [Target("versus", base_folder(args.model, args.versus), args.versus), mine]
    return [Target("versus", base_folder(args.versus, None), None), mine]


def file_of_target(path: Path, target: Target, targets: Sequence[Target]) -> Path:
    """Returns the file that is a target's, where a flag names one: the path itself for the last of the
    targets, for another one (--versus) with the target's name before the suffix."""
    if target is targets[-1]:
        return path
    return path.with_name(f"{path.stem}.{target.name}{path.suffix}")


def print_target(target: Target, model: Transformer, tokenizer: Tokenizer) -> None:
    """Prints a line that says what is measured: folder, adapter, size, chat template."""
    adapter = f" + {target.adapter}" if target.adapter else ""
    size = f"{model.size / 1e6:,.1f} M parameters{resolve.quantized_suffix(model)}"
    folder = target.adapter or target.folder
    notes = resolve.date_note(tokenizer, folder) + resolve.system_note(tokenizer, folder)
    print(
        f"{target.name:9} {target.folder}{adapter}: {model.config.family}, {size},"
        f" chat template {tokenizer.template_name}{notes}",
        flush=True,
    )


# ---- the examples ----


def open_with_answers(
    file: str | Path | Fetched, map_fn: Map | None, skip_bad: bool, advice: str = ""
) -> Source:
    """Recognizes a file of questions with answers; of data with parts of their own, the part for
    tests.

    map_fn: the user's function that every record goes through first. skip_bad: leave out records that
    can't be read. advice: what else can be done where the records are questions alone.
    Raises UserError as open_source does, and where the records are questions alone.
    """
    try:
        return open_source(file, map_fn=map_fn, part=TEST, skip_bad=skip_bad)
    except UnknownFormat as unknown:
        try:
            questions = open_prompts(file, map_fn, skip_bad)
        except UserError:
            raise unknown from None
    raise UserError(
        f"{questions.path}: {questions.format.name}, with no answer to compare with; give records that"
        f" have one{advice}"
    )


def records_with_references(
    source: Source, limit: int | None, seed: int, print_fn: Callable[[str], None] = print
) -> list[Record]:
    """Reads `limit` records (None: all) that hold a good answer to compare with, and prints what was
    read. seed: draws them. print_fn: is given the lines.

    Raises UserError where there is none, or where the first one has no reference: before a model is
    loaded for it.
    """
    stats = ReadStats()
    records = [record for record in source.records(stats) if record.label is not False]
    print_fn(f"data      {source.summary(stats)}")
    if not records:
        raise UserError(f"{source.path}: no record with a good answer to compare with")
    split_reference(records[0])
    if limit is None or limit >= len(records):
        return records
    return draw_records(records, limit, seed, print_fn)


def draw_records(
    records: list[Record], limit: int, seed: int, print_fn: Callable[[str], None] = print
) -> list[Record]:
    """Returns `limit` of the records in their order, drawn by the seed. print_fn: is given the line
    that says so."""
    prompts = np.array([prompt_hash(record) for record in records], np.uint64)
    chosen = sample_of_file(prompts, np.zeros(len(records), np.int64), limit, seed, print_fn)
    return [records[i] for i in chosen]


def sample_of_file(
    prompts: np.ndarray,
    starts: np.ndarray,
    limit: int,
    seed: int,
    print_fn: Callable[[str], None] = print,
) -> np.ndarray:
    """Returns the numbers of `limit` examples, ascending, and prints that they are drawn. The same
    ones for every model, since nothing that they are drawn by depends on its tokenizer.

    prompts, starts: of `dataset.examples.draw_examples`.
    print_fn: is given the line that says so.
    """
    print_fn(f"          --limit: {limit:,} of {len(prompts):,}, drawn by --seed {seed}")
    order = np.arange(len(prompts))
    one_source = np.zeros(len(prompts), np.int64)
    return draw_examples(prompts, starts, order, one_source, limit, seed)


def encode_files(
    args: argparse.Namespace,
    files: Sequence[str | Path | Fetched],
    tokenizer: Tokenizer,
    max_positions: int,
    map_fn: Map | None,
    print_fn: Callable[[str], None] = print,
) -> Dataset:
    """Reads the files of --data as examples of at most --seq-len tokens, of which --limit are drawn.

    files: what --data names, fetched.
    max_positions: the longest text that the model takes, in tokens; also the default of --seq-len.
    map_fn: the user's function that every record goes through first.
    print_fn: is given lines about what was read and left out.

    Raises UserError where --seq-len is beyond the limit, or where no record fits.
    """
    seq_len = args.seq_len
    if seq_len is not None and seq_len > max_positions:
        raise UserError(f"--seq-len {seq_len}: the model takes at most {max_positions} tokens")
    dataset = data.load(
        files,
        tokenizer,
        seq_len or max_positions,
        print_fn=print_fn,
        map_fn=map_fn,
        part=TEST,
        skip_bad=args.skip_bad,
    )
    if args.limit is None or args.limit >= len(dataset):
        return dataset
    # Examples that are read from a file know the number of their record.
    assert isinstance(dataset.examples, ExampleIndex)
    index = dataset.examples
    prompts = np.zeros(len(dataset), np.uint64)
    for i, rows in enumerate(index.rows):
        own = index.source == i
        prompts[own] = rows.prompts[index.row[own]]
    chosen = sample_of_file(prompts, index.start, args.limit, args.seed, print_fn)
    return dataset.take(chosen)


def digest_of_ids(dataset: Dataset) -> str:
    """Returns a hash of a dataset's ids: equal for equal ids, whatever integer type the
    vocabulary's size asks for."""
    digest = hashlib.sha256()
    for example in dataset.examples:
        # The length first, so that the ends of examples count.
        digest.update(np.int64(len(example.ids)).tobytes())
        digest.update(np.asarray(example.ids, np.int64).tobytes())
    return digest.hexdigest()
