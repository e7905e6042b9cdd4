"""Measures a model on a file of examples, or two models side by side.

    python evaluate.py loss  --data FILE [--model M] [--adapter DIR] [--versus base|MODEL|ADAPTER]
    python evaluate.py exact --data FILE ...

`loss` asks how probable the model finds the reference answers (evals/loss.py). `exact` lets the
model answer and counts the answers that equal the reference (evals/exact_match.py). This file reads
the command line, loads what it names and prints a row for each model.
"""

import argparse
import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

import data
import lora
from checkpoint import load_model, read_config
from common import cli, console
from common.device import pick_device, pick_dtype
from common.errors import UserError, run
from dataset.examples import Dataset, ExampleIndex
from dataset.folders import TEST
from dataset.formats import Map, Source, open_source
from dataset.records import ReadStats, Record
from evals.exact_match import EXTRA_TOKENS, ExactResult, exact, split_reference
from evals.loss import loss
from interop import resolve
from interop.resolve import base_folder, base_of_model
from lora import has_lora, is_adapter, remove_lora
from model import Transformer
from tokenizer import Tokenizer

BATCH_SIZE = {"loss": 8, "exact": 32}  # defaults of --batch-size
SHOWN_MISSES = 5  # the default of --show


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
    source = open_source(args.data, map_fn=map_fn, part=TEST)
    records = []
    if args.what == "exact":
        records = records_with_references(source, args.limit)
    targets = pick_targets(args)
    dtype_name = str(dtype).removeprefix("torch.")
    print(f"compute   {args.what} in {dtype_name} on {device.type}: {reason}")

    batch_size = args.batch_size or BATCH_SIZE[args.what]
    model = None
    exact_results: dict[str, ExactResult] = {}
    losses: dict[str, dict[str, float]] = {}
    digests = set()
    # The same for both, so that they answer the same questions.
    last = targets[-1]
    day = args.date or resolve.trained_day(last.adapter or last.folder)
    for target in targets:
        tokenizer = resolve.pick_tokenizer(target.folder, target.adapter, args.template, day)
        if args.what == "loss":
            # A fault in the file is reported before the model is loaded, which may take long.
            config = read_config(target.folder)
            dataset = encode_file(
                args.data, tokenizer, config.max_positions, args.seq_len, args.limit, map_fn
            )
            data.check_tokens(dataset, config.vocab_size, args.data)
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


def records_with_references(source: Source, limit: int | None) -> list[Record]:
    """Reads the first `limit` records (None: all) that hold a good answer to compare with, and
    prints what was read.

    Raises UserError where there is none, or where the first one has no reference: before a model is
    loaded for it.
    """
    stats = ReadStats()
    good = (record for record in source.records(stats) if record.label is not False)
    records = list(islice(good, limit))
    print(f"data      {source.summary(stats)}")
    if not records:
        raise UserError(f"{source.path}: no record with a good answer to compare with")
    split_reference(records[0])
    return records


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
    file: str,
    tokenizer: Tokenizer,
    limit: int,
    seq_len: int | None,
    num_records: int | None,
    map_fn: Map | None,
) -> Dataset:
    """Reads a file as examples of at most `seq_len` tokens.

    limit: the longest text that the model takes, in tokens; also the default of seq_len.
    num_records: how many records are read, from the first one on; None: all.
    map_fn: the user's function that every record goes through first.

    Raises UserError where seq_len is beyond the limit, or where no record fits.
    """
    if seq_len is not None and seq_len > limit:
        raise UserError(f"--seq-len {seq_len}: the model takes at most {limit} tokens")
    dataset = data.load(
        [file], tokenizer, seq_len or limit, print_fn=print, map_fn=map_fn, part=TEST
    )
    if num_records is None:
        return dataset
    print(f"          of which the first {num_records:,}")
    # Examples that are read from a file know the number of their record.
    assert isinstance(dataset.examples, ExampleIndex)
    dataset = dataset.take(dataset.examples.row < num_records)
    if not len(dataset):
        raise UserError(f"--limit {num_records}: none of the first {num_records} records fits")
    return dataset


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
    date_note = resolve.date_note(tokenizer, target.adapter or target.folder)
    print(
        f"{target.name:9} {target.folder}{adapter}: {model.config.family}, {size},"
        f" chat template {tokenizer.template_name}{date_note}",
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
        print(f"\n{name}: {len(shown)} of {len(misses):,} wrong answers")
    for i in shown:
        messages, _ = split_reference(result.records[i])
        questions = [message["content"] for message in messages if message["role"] == "user"]
        question = questions[-1] if questions else ""
        print(f"  question   {console.one_line(question)}")
        print(f"  reference  {console.one_line(result.references[i].strip())}")
        print(f"  answer     {console.one_line(result.answers[i].strip())}\n")


# ---- the command line ----


def evaluation_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line. Raises UserError naming the flag that is wrong."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Measures a model on a file of examples, or two models side by side (--versus).",
        allow_abbrev=False,
    )
    add_data_flags(parser.add_argument_group("what is measured"))
    add_target_flags(parser.add_argument_group("the model"))
    add_answer_flags(parser.add_argument_group("answers of exact"))
    add_batch_flags(parser.add_argument_group("speed and memory"))
    args = cli.parse_args(parser, argv)
    check_evaluation_arguments(args)
    # Only now, since the check has to know whether it was typed.
    if args.show is None:
        args.show = SHOWN_MISSES
    return args


def add_data_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags that say what is measured, and on what."""
    add = group.add_argument
    add(
        "what",
        choices=["loss", "exact"],
        help="loss: how probable the model finds the reference answers, as the mean of -log p for"
        " each token (in nats, lower is better) and as perplexity, its exponential. exact: the"
        " model writes the answers itself, always taking the most probable token, and an answer is"
        " right if it equals the reference, apart from spaces and line ends around it; this takes"
        " longer, and is for tasks with one right answer",
    )
    add(
        "--data",
        metavar="FILE",
        required=True,
        help="file of examples that the model was not trained on, in any format that train.py"
        " reads; required. exact takes conversations, and the last message of the assistant is the"
        " reference",
    )
    add(
        "--map",
        metavar="FILE.py:NAME",
        help="a Python function of yours that changes every record before it is read: from a"
        " record to a record of a known format, to a list of them, or to None to leave the record"
        " out; default: none. Give the one that you gave to train.py",
    )
    add(
        "--limit",
        type=int,
        metavar="N",
        help="use only the first N records, for a quick look; default: all of them",
    )
    add(
        "--seq-len",
        type=int,
        metavar="N",
        help="loss: longest example, in tokens; a longer one is shortened or left out, which is"
        " counted and printed; default: the most that the model takes. Lower it if memory runs"
        " out, or give the value that train.py had",
    )


def add_target_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of the model, and of a second one to compare it with."""
    # It only adds arguments, which a group can do as well as a parser.
    resolve.add_model_flags(group)  # type: ignore[arg-type]
    group.add_argument(
        "--versus",
        metavar="X",
        help="a second model to compare with. base: the model without --adapter, or the model that"
        " a --model made by train.py was trained from; otherwise a model as --model takes it, or"
        " an adapter folder. It is measured first, and the last row of the table is the change"
        " from it to your model; default: no comparison",
    )


def add_answer_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of the answers that `exact` generates and prints."""
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="exact: longest answer, in tokens; default: the tokens of the longest reference, and"
        f" {EXTRA_TOKENS} more. Change it to allow longer answers, or to save time",
    )
    group.add_argument(
        "--show",
        type=int,
        metavar="K",
        help="exact: how many wrong answers of each model are printed, with question and"
        f" reference; 0: none; default: {SHOWN_MISSES}",
    )


def add_batch_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flag that trades memory for speed."""
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="examples that are computed at a time; the results are the same up to rounding;"
        f" default: {BATCH_SIZE['loss']} for loss, {BATCH_SIZE['exact']} for exact. Lower it if"
        " memory runs out; a higher one may be faster on a GPU",
    )


def check_evaluation_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for a number out of its range, and for a flag that the chosen measurement
    does not use."""
    minimum = {"limit": 1, "batch_size": 1, "seq_len": 2, "max_new_tokens": 1, "show": 0}
    belongs_to = {"max_new_tokens": "exact", "show": "exact", "seq_len": "loss"}
    for option, least in minimum.items():
        value = getattr(args, option)
        if value is None:
            continue
        flag = "--" + option.replace("_", "-")
        if value < least:
            raise UserError(f"{flag} {value}: must be {least} or more")
        # An option of both measurements is in no way wrong.
        owner = belongs_to.get(option, args.what)
        if owner != args.what:
            raise UserError(f"{flag}: is for `{owner}`; `{args.what}` does not use it")


if __name__ == "__main__":
    run(main)
