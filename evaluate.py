"""Measures a model on a file of examples, or two models side by side.

    python evaluate.py loss  --data FILE [--model M] [--adapter DIR] [--versus base|MODEL|ADAPTER]
    python evaluate.py exact --data FILE ...

`loss` asks how probable the model finds the reference answers (evals/loss.py). `exact` lets the
model answer and counts the answers that equal the reference (evals/exact_match.py). This file reads
the command line, loads what it names and prints a row for each model.
"""

from common.errors import run
from common.script_flags import BATCH_SIZE, evaluation_arguments
from common.threads import choose_wait_policy

if __name__ == "__main__":
    # This is read when torch is loaded.
    choose_wait_policy()
    # --help and a mistake in a flag are answered here: what is imported below takes seconds.
    run(evaluation_arguments)

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
import lora
from checkpoint import load_model, read_config
from common import console
from common.device import pick_device, pick_dtype
from common.errors import UserError
from dataset.examples import Dataset, ExampleIndex, draw_examples
from dataset.folders import TEST, Fetched
from dataset.formats import Map, Source, open_source
from dataset.records import ReadStats, Record
from dataset.token_cache import prompt_hash
from evals.exact_match import ExactResult, exact, split_reference
from evals.loss import loss
from interop import resolve
from interop.remote_data import fetch_data
from interop.resolve import base_folder, base_of_model
from lora import has_lora, is_adapter, remove_lora
from model import Transformer
from tokenizer import Tokenizer


@dataclass
class Target:
    """A model to measure: a base model, by its folder, and perhaps an adapter on it."""

    name: str
    folder: Path
    adapter: str | None


def main() -> None:
    args = evaluation_arguments()
    device = pick_device(args.device)
    dtype, reason = pick_dtype(args.dtype, device)
    map_fn = Map(args.map) if args.map else None
    examples = fetch_data(args.data, TEST)
    source = open_source(examples, map_fn=map_fn, part=TEST, skip_bad=args.skip_bad)
    targets = pick_targets(args)
    # The same for both, so that they answer the same questions.
    last = targets[-1]
    day = args.date or resolve.trained_day(last.adapter or last.folder)
    system = args.system
    if system is None:
        system = resolve.trained_system(last.adapter or last.folder)
    source.system = system
    records = []
    if args.what == "exact":
        records = records_with_references(source, args.limit, args.seed)
    dtype_name = str(dtype).removeprefix("torch.")
    print(f"compute   {args.what} in {dtype_name} on {device.type}: {reason}")

    batch_size = args.batch_size or BATCH_SIZE[args.what]
    model = None
    exact_results: dict[str, ExactResult] = {}
    losses: dict[str, dict[str, float]] = {}
    digests = set()
    said: set[str] = set()

    def print_new(line: str) -> None:
        # A second model that reads the file in the same way has nothing new to say of it.
        fact = line.removesuffix(data.FROM_CACHE)
        if fact not in said:
            print(line)
        said.add(fact)

    for target in targets:
        tokenizer = resolve.pick_tokenizer(
            target.folder, target.adapter, args.template, day, system=system
        )
        data.check_system(tokenizer)
        if args.what == "loss":
            # A fault in the file is reported before the model is loaded, which may take long.
            config = read_config(target.folder)
            dataset = encode_file(
                args, examples, tokenizer, config.max_positions, map_fn, print_new
            )
            data.check_tokens(dataset, config.vocab_size, str(examples))
            if len(targets) == 2:
                digests.add(digest_of_ids(dataset))
        # Two targets may share a base, which is then loaded once.
        if model is None or model.source != target.folder:
            # The memory of the first model is free before the second one is loaded.
            model = None
            model = load_model(target.folder, dtype, device, args.quant)
        elif has_lora(model):
            remove_lora(model)
        if target.adapter is not None:
            lora.put_adapter_on(model, target.adapter)
        print_target(target, model, tokenizer)
        if args.what == "exact":
            result = exact(model, tokenizer, records, args.max_new_tokens, batch_size)
            exact_results[target.name] = result
        else:
            losses[target.name] = loss(model, dataset, batch_size)

    if args.what == "exact":
        print_exact(exact_results, args.show)
        return
    if len(digests) > 1:
        print(
            "WARNING: the two models read the file as different tokens, so their losses per token"
            " don't compare"
        )
    print_table(losses, {"loss": ".4f", "perplexity": ".3f", "tokens": ",.0f"})


def records_with_references(source: Source, limit: int | None, seed: int) -> list[Record]:
    """Reads `limit` records (None: all) that hold a good answer to compare with, and prints what was
    read. seed: draws them.

    Raises UserError where there is none, or where the first one has no reference: before a model is
    loaded for it.
    """
    stats = ReadStats()
    records = [record for record in source.records(stats) if record.label is not False]
    print(f"data      {source.summary(stats)}")
    if not records:
        raise UserError(f"{source.path}: no record with a good answer to compare with")
    split_reference(records[0])
    if limit is None or limit >= len(records):
        return records
    prompts = np.array([prompt_hash(record) for record in records], np.uint64)
    chosen = sample_of_file(prompts, np.zeros(len(records), np.int64), limit, seed)
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
        return [Target("base", base, None), mine]
    if is_adapter(args.versus):
        return [Target("versus", base_folder(args.model, args.versus), args.versus), mine]
    return [Target("versus", base_folder(args.versus, None), None), mine]


def encode_file(
    args: argparse.Namespace,
    file: str | Path | Fetched,
    tokenizer: Tokenizer,
    max_positions: int,
    map_fn: Map | None,
    print_fn: Callable[[str], None],
) -> Dataset:
    """Reads the file of --data as examples of at most --seq-len tokens, of which --limit are drawn.

    file: what --data names, fetched.
    max_positions: the longest text that the model takes, in tokens; also the default of --seq-len.
    map_fn: the user's function that every record goes through first.
    print_fn: is given lines about what was read and left out.

    Raises UserError where --seq-len is beyond the limit, or where no record fits.
    """
    seq_len = args.seq_len
    if seq_len is not None and seq_len > max_positions:
        raise UserError(f"--seq-len {seq_len}: the model takes at most {max_positions} tokens")
    dataset = data.load(
        [file],
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
    (rows,) = index.rows
    prompts = rows.prompts[index.row]
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


# ---- what is printed ----


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


def print_exact(results: dict[str, ExactResult], show: int) -> None:
    """Prints the table of the exact matches, and the first `show` wrong answers of each target."""
    rows = {}
    for name, result in results.items():
        rows[name] = {
            "right": result.right,
            "of": result.total,
            "exact %": 100 * result.accuracy,
            "prompt tokens": result.prompt_tokens,
        }
    print_table(rows, {"right": ",.0f", "of": ",.0f", "exact %": ".1f", "prompt tokens": ".1f"})
    for name, result in results.items():
        print_misses(name, result, show)


def print_table(results: dict[str, dict[str, float]], columns: dict[str, str]) -> None:
    """Prints a row for each target and, for two targets, their difference: the second one minus the
    first.

    results: for each target, its numbers by column. columns: the format of each column's numbers,
    by its heading.
    """
    rows = [["", *columns]]
    for name, result in results.items():
        row = [name]
        for column, spec in columns.items():
            row.append(format(result[column], spec))
        rows.append(row)
    if len(results) == 2:
        first, second = results.values()
        changes = ["change"]
        for column, spec in columns.items():
            changes.append(format(second[column] - first[column], "+" + spec))
        rows.append(changes)
    print("\n" + console.table(rows))


def print_misses(name: str, result: ExactResult, show: int) -> None:
    """Prints the first `show` wrong answers of a target, each with its question and its reference,
    on a line each."""
    misses = [i for i, hit in enumerate(result.hits) if not hit]
    shown = misses[:show]
    if shown:
        several = f" first {len(shown)} of its" if len(shown) < len(misses) else ""
        print(f"\n{name}:{several} {console.number_of(len(misses), 'wrong answer')}")
    for i in shown:
        messages, _ = split_reference(result.records[i])
        questions = [message["content"] for message in messages if message["role"] == "user"]
        question = questions[-1] if questions else ""
        print(f"  question   {console.both_ends(question)}")
        print(f"  reference  {console.one_line(result.references[i].strip())}")
        print(f"  answer     {console.one_line(result.answers[i].strip())}\n")


if __name__ == "__main__":
    run(main)
