"""Everything that scores a model, or two side by side, on a file.

    python evaluate.py loss  --data FILE [--model M] [--adapter DIR] [--versus base|MODEL|ADAPTER]
    python evaluate.py exact --data FILE ...

`loss` asks how likely the model finds the right answers (mean -log p per trained token, and its exponential, the
perplexity). `exact` lets it answer: greedily, from the turns before the last answer, and counts the answers that equal
the reference, spaces at the ends aside. A model that scores well on the first can still fail at the second: there each
token was predicted from a right beginning. Both depend on nothing but model and file: not on the batch size, but for
rounding.
"""

import argparse
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import lora
import objectives
from checkpoint import load_model, read_config
from common import cli, console
from common.device import pick_device, pick_dtype
from common.errors import UserError, run
from dataset.examples import Dataset
from dataset.formats import Map, ReadStats, Record, open_source
from interop import resolve
from interop.resolve import base_folder
from lora import adapter_metadata, has_lora, is_adapter, remove_lora
from model import Transformer, eval_mode, packed_weights
from tokenizer import TemplateError, Tokenizer

EXTRA_TOKENS = (
    8  # tokens that an answer may be longer than the longest reference: enough to see that it goes on, and cheap
)


def loss(model: Transformer, dataset: Dataset, batch_size: int = 8) -> dict[str, float]:
    """loss per trained token (nats), its perplexity, and the number of those tokens. Dropout is off meanwhile."""
    with eval_mode(model):
        value = objectives.mean_loss(model, data.batches_by_length(dataset, batch_size, model.device))
    perplexity = math.exp(value) if value < 700 else math.inf  # exp(710) is beyond a float
    return {"loss": value, "perplexity": perplexity, "tokens": dataset.trained_tokens}


@dataclass
class ExactResult:
    """The answers to some records, in the records' order. prompt_tokens: mean length of a prompt."""

    records: list[Record]
    references: list[str]
    answers: list[str]
    prompt_tokens: float

    @property
    def hits(self) -> list[bool]:
        return [got.strip() == want.strip() for got, want in zip(self.answers, self.references, strict=True)]

    @property
    def right(self) -> int:
        return sum(self.hits)

    @property
    def total(self) -> int:
        return len(self.records)

    @property
    def share(self) -> float:
        return self.right / self.total


def exact(
    model: Transformer,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    shots: Sequence[Record] = (),
) -> ExactResult:
    """Greedy answers to each record's turns before its last assistant turn, beside that turn.

    max_new_tokens: default, the longest reference in tokens and ROOM more. shots: examples put before each question as
    earlier turns (few-shot prompting, Brown et al. 2020).
    Raises UserError naming the record that has no reference, that the template refuses, or that is too long.
    """
    asked = [split_reference(record, shots) for record in records]
    references = [reference for _, reference in asked]
    prompts = []
    for record, (turns, _) in zip(records, asked, strict=True):
        try:
            ids, _ = tokenizer.render(turns, record.tools, add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(f"{record.where}: {console.one_line(str(error), 200)}") from None
        if len(ids) >= model.config.max_positions:
            raise UserError(
                f"{record.where}: {len(ids):,} tokens before the answer; the model takes {model.config.max_positions:,}"
            )
        prompts.append(ids)
    if max_new_tokens is None:
        max_new_tokens = EXTRA_TOKENS + max(len(tokenizer.encode(text, bos=False, eos=False)) for text in references)
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike together: less padding in the cache
    bar = tqdm(total=len(order), unit="answer", disable=None, leave=False)  # None: quiet where no terminal is
    with bar, packed_weights(model, max_new_tokens):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for i, ids in zip(
                batch, model.generate([prompts[i] for i in batch], max_new_tokens, stop=tokenizer.stop_ids), strict=True
            ):
                answers[i] = tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.stop_ids else ids, skip_special=True)
            bar.update(len(batch))
    return ExactResult(list(records), references, answers, sum(map(len, prompts)) / len(prompts))


def split_reference(record: Record, shots: Sequence[Record] = ()) -> tuple[list[dict[str, str]], str]:
    """The turns that ask (the record's system turn, the shots' turns, the record's other turns), and the reference."""
    for each in (record, *shots):
        if each.messages is None:
            raise UserError(f"{each.where}: plain text has no reference answer to compare with; use `evaluate.py loss`")
    last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
    turns, system = record.messages[:last], []
    if not any(message["role"] == "user" for message in turns):
        raise UserError(f"{record.where}: no user turn before its last assistant turn, so nothing is asked")
    while turns and turns[0]["role"] == "system":
        system, turns = [*system, turns[0]], turns[1:]
    examples = [message for shot in shots for message in shot.messages if message["role"] != "system"]
    if record.messages[last].get("tool_calls"):
        raise UserError(f"{record.where}: its last answer is a tool call; words are what is compared here")
    return [*system, *examples, *turns], record.messages[last]["content"]


# ---- the command ----


@dataclass
class Target:
    """What is scored: a base, by its folder, and maybe an adapter on it."""

    name: str
    folder: Path
    adapter: str | None


def main() -> None:
    args = arguments()
    device = pick_device(args.device)
    dtype, why = pick_dtype(args.dtype, device)
    map_fn = Map(args.map) if args.map else None
    source = open_source(args.data, map_fn=map_fn)
    if args.what == "exact":
        found = ReadStats()
        good = (record for record in source.records(found) if record.label is not False)
        records = [*islice(good, args.limit)]
        print(f"data      {source.summary(found)}")
        if not records:
            raise UserError(f"{args.data}: no record with a good answer to compare with")
        split_reference(records[0])  # a file without references is refused before a model is loaded for it
    sides = pick_targets(args)
    print(f"compute   {args.what} in {str(dtype).removeprefix('torch.')} on {device.type}: {why}")
    model, results, sets = None, {}, []
    for side in sides:
        tokenizer = resolve.pick_tokenizer(side.folder, side.adapter, args.template)
        if args.what == "loss":  # a fault in the file is told before a model is loaded for it
            limit = read_config(side.folder).max_positions
            dataset = encode(args.data, tokenizer, limit, args.seq_len, args.limit, map_fn)
            if len(sides) == 2:
                sets.append(digest(dataset))
        if model is None or model.source != side.folder:
            model = None  # the other model goes before this one comes
            model = load_model(side.folder, dtype, device, args.quant)
        elif has_lora(model):
            remove_lora(model)
        if side.adapter is not None:
            lora.put_adapter_on(model, side.adapter)
        print(f"{side.name:9} {side.folder}" + (f" + {side.adapter}" if side.adapter else ""), end=": ")
        kind = f"{model.config.family}, {model.size / 1e6:,.1f} M parameters{resolve.quantized_suffix(model)}"
        print(f"{kind}, template {tokenizer.template_name}", flush=True)
        if args.what == "exact":
            results[side.name] = exact(model, tokenizer, records, args.max_new_tokens, args.batch_size or 32)
        else:
            results[side.name] = loss(model, dataset, args.batch_size or 8)
    if len(sets) == 2 and sets[0] != sets[1]:
        print("WARNING: the two read the file as different tokens, so a loss per token does not compare them")
    if args.what == "loss":
        print_table(results, {"loss": ".4f", "perplexity": ".3f", "tokens": ",.0f"})
    else:
        rows = {
            name: {"right": r.right, "of": r.total, "exact %": 100 * r.share, "prompt tokens": r.prompt_tokens}
            for name, r in results.items()
        }
        print_table(rows, {"right": ",.0f", "of": ",.0f", "exact %": ".1f", "prompt tokens": ".1f"})
        for name, result in results.items():
            print_misses(name, result, args.show)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Score a model, or two.", allow_abbrev=False)
    add = parser.add_argument
    add("what", choices=["loss", "exact"], help="loss per token, or greedy answers against references")
    add("--data", metavar="FILE", required=True, help="records of any known format")
    add("--map", metavar="FILE.py:NAME", help="your function that every record goes through first")
    resolve.add_model_flags(parser)
    add("--versus", metavar="X", help="compare with: base (without the --adapter), a model, or an adapter folder")
    add("--limit", type=int, metavar="N", help="only the first N records")
    add("--batch-size", type=int, metavar="N", help="examples at a time (default: 8, exact 32)")
    add("--seq-len", type=int, metavar="N", help="loss: longest example in tokens (default: the model's limit)")
    add(
        "--max-new-tokens", type=int, metavar="N", help=f"exact: default, the longest reference and {EXTRA_TOKENS} more"
    )
    add("--show", type=int, metavar="K", help="exact: misses to show (default: 5)")
    args = cli.parse_args(parser, argv)
    for flag, least in {"limit": 1, "batch_size": 1, "seq_len": 2, "max_new_tokens": 1, "show": 0}.items():
        value, name = getattr(args, flag), "--" + flag.replace("_", "-")
        if value is not None and value < least:
            raise UserError(f"{name} {value}: must be {least} or more")
        if value is not None and flag in {"loss": ("max_new_tokens", "show"), "exact": ("seq_len",)}[args.what]:
            raise UserError(f"{name}: means nothing to `{args.what}`")
    args.show = 5 if args.show is None else args.show
    return args


def pick_targets(args: argparse.Namespace) -> list[Target]:
    """What to score, in order: what --versus names (the base it is, mostly), then what --model and --adapter name."""
    folder = base_folder(args.model, args.adapter)
    mine = Target("adapter" if args.adapter else "model", folder, args.adapter)
    if args.versus is None:
        return [mine]
    if args.versus == "base":
        base = folder if args.adapter else Path(str(adapter_metadata(folder).get("base")))  # of a model trained here
        if not (base / "config.json").is_file():
            raise UserError("--versus base: needs --adapter, or a --model trained here whose base is still in place")
        return [Target("base", base, None), mine]
    if is_adapter(args.versus):
        return [Target("versus", base_folder(args.model, args.versus), args.versus), mine]
    return [Target("versus", base_folder(args.versus, None), None), mine]


def encode(
    file: str, tokenizer: Tokenizer, limit: int, seq_len: int | None, first: int | None, map_fn: Map | None
) -> Dataset:
    """limit: the model's positions."""
    if seq_len is not None and seq_len > limit:
        raise UserError(f"--seq-len {seq_len}: the model takes {limit}")
    dataset = data.load([file], tokenizer, seq_len or limit, print_fn=print, map_fn=map_fn)
    if first is None:
        return dataset
    print(f"          of which the first {first:,}")
    dataset = dataset.take(dataset.examples.row < first)
    if not len(dataset):
        raise UserError(f"--limit {first}: none of the first {first} records fits")
    return dataset


def digest(dataset: Dataset) -> str:
    """Equal for equal tokens, whatever the vocabulary's size."""
    made = hashlib.sha256()
    for example in dataset.examples:
        made.update(np.int64(len(example.ids)))
        made.update(example.ids.astype(np.int64))
    return made.hexdigest()


def print_table(results: dict[str, dict[str, float]], columns: dict[str, str]) -> None:
    """A row a side and, of two, their difference (the second less the first)."""
    rows = [
        [name, *(format(result[column], form) for column, form in columns.items())] for name, result in results.items()
    ]
    if len(results) == 2:
        first, second = results.values()
        rows.append(["change", *(format(second[c] - first[c], "+" + form) for c, form in columns.items())])
    table = [["", *columns], *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    print()
    for name, *cells in table:
        print(
            name.ljust(widths[0])
            + "".join("  " + cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        )


def print_misses(name: str, result: ExactResult, most: int) -> None:
    misses = [i for i, hit in enumerate(result.hits) if not hit][:most]
    if misses:
        print(f"\n{name}: {len(misses)} of {result.total - result.right:,} misses")
    for i in misses:
        asked = [message["content"] for message in split_reference(result.records[i])[0] if message["role"] == "user"]
        print(f"  asked   {console.one_line(asked[-1] if asked else '')}")
        print(f"  wanted  {console.one_line(result.references[i].strip())}")
        print(f"  got     {console.one_line(result.answers[i].strip())}\n")


if __name__ == "__main__":
    run(main)
