"""The commands `data.py convert` and `data.py split`: data files of any known format, written anew
as JSONL.

`convert` writes one file of messages, texts, preferences or labelled answers. `split` writes
train.jsonl, val.jsonl and test.jsonl; which of them a record goes to follows from a hash of the
records that are like it, so that near-duplicates and equal questions stay on one side, whatever the
order of the files. Both leave nothing behind when they fail.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.console import number_of
from common.errors import UserError
from common.files import atomic_file, atomic_folder
from dataset.formats import open_source
from dataset.inspection import survey
from dataset.records import ReadStats, Record
from dataset.text_stats import FACTORS, near_groups
from tokenization.chat_template import to_exact_json

SIDES = ("train", "val", "test")


def convert_files(args: argparse.Namespace) -> None:
    """Runs `data.py convert`: writes all records of args.files to the JSONL file args.out."""
    count = 0
    with atomic_file(Path(args.out)) as tmp, open(tmp, "w", encoding="utf-8") as file:
        for record in all_records(args):
            file.write(as_json(record))
            # A long text comes in parts, and counts with its last one.
            if record.last:
                count += 1
    print(f"written   {args.out}: {number_of(count, 'record')}")


def split_files(args: argparse.Namespace) -> None:
    """Runs `data.py split`: writes the records of args.files to three files in args.out.

    The files are train.jsonl, val.jsonl and test.jsonl.

    args.val, args.test: about which share of the records goes to val.jsonl and test.jsonl.

    Which file a record goes to follows from a hash of all records that are linked to it, as
    near-duplicates or by equal questions. So neither a seed nor the order of the records matters,
    and similar records are in one file. Raises UserError if a file with a share above 0 would be
    empty.
    """
    hashes = linked_hashes(args)
    num_groups = len(np.unique(hashes))
    # Hashed once more, for the smallest of several hashes is not uniform any more. The product
    # overflows, and is meant to.
    with np.errstate(over="ignore"):
        uniform = hashes * FACTORS[0]
    fraction = uniform / 2.0**64
    val_from = 1 - args.val - args.test
    test_from = 1 - args.test
    sides = np.digitize(fraction, [val_from, test_from])
    shares_of_sides = {"train": 1.0, "val": args.val, "test": args.test}
    with atomic_folder(Path(args.out)) as tmp:
        counts = write_sides(args, sides, tmp)
        for name, share in shares_of_sides.items():
            if counts[name]:
                continue
            if share:
                raise UserError(
                    f"{name}.jsonl would be empty: {num_groups:,} groups of records that are alike"
                    " are too few to split"
                )
            (tmp / f"{name}.jsonl").unlink()
    written = ", ".join(f"{name}.jsonl {counts[name]:,}" for name in SIDES if counts[name])
    print(f"written   {args.out}: {written}; {num_groups:,} groups of records that are alike")


def linked_hashes(args: argparse.Namespace) -> np.ndarray:
    """Returns for each record of args.files a hash that all records linked to it share.

    The hashes are uint64 [records].

    A record is linked to its near-duplicates, to records with the same question, and to what those
    are linked to.
    """
    sources = [
        open_source(file, args.trees, args.map, skip_bad=args.skip_bad) for file in args.files
    ]
    surveys = [survey(source) for source in sources]
    groups = near_groups(np.concatenate([each.signatures for each in surveys]))
    prompts = np.concatenate([each.prompts for each in surveys])
    hashes = np.concatenate([each.hashes for each in surveys])
    return smallest_linked(groups, prompts, hashes)


def smallest_linked(groups: np.ndarray, prompts: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Returns for each record the smallest hash of all records that are linked to it, uint64 [N].

    groups: int64 [N], the group of near-duplicates of each record.
    prompts: uint64 [N], the hash of each record's question.
    hashes: uint64 [N], the hash of each record.
    """
    smallest = hashes.copy()
    largest_possible = np.iinfo(np.uint64).max
    # Each round takes the smallest within groups, then within equal questions, until nothing
    # changes any more. Links that lead over several records take several rounds.
    while True:
        before = smallest.copy()
        for keys in (groups, prompts):
            _, inverse = np.unique(keys, return_inverse=True)
            of_key = np.full(inverse.max() + 1, largest_possible, np.uint64)
            np.minimum.at(of_key, inverse, smallest)
            smallest = of_key[inverse]
        if np.array_equal(before, smallest):
            return smallest


def write_sides(args: argparse.Namespace, sides: np.ndarray, folder: Path) -> Counter[str]:
    """Writes each record of args.files to the file of its side.

    Returns how many records each file got.

    sides: int64 [records], 0 for train.jsonl, 1 for val.jsonl, 2 for test.jsonl.
    folder: where the files are written.
    """
    counts: Counter[str] = Counter()
    files = [open(folder / f"{name}.jsonl", "w", encoding="utf-8") for name in SIDES]  # noqa: SIM115
    try:
        remaining = iter(sides.tolist())
        side = 0
        for record in all_records(args):
            side_of_record = next(remaining, None)
            if side_of_record is None:
                raise UserError(
                    f"{record.where}: was not there a moment ago; is the file being written?"
                )
            # The parts of a long text stay together.
            if record.first:
                side = side_of_record
            files[side].write(as_json(record))
            if record.last:
                counts[SIDES[side]] += 1
    finally:
        for file in files:
            file.close()
    return counts


def all_records(args: argparse.Namespace) -> Iterator[Record]:
    """Yields the records of all files of args.files, and prints a line about each file.

    Raises UserError if they are of two kinds, since one file of two kinds could not be read again.
    """
    first_kind = None
    for file in args.files:
        source = open_source(file, args.trees, args.map, skip_bad=args.skip_bad)
        stats = ReadStats()
        for record in source.records(stats):
            # A text, a preference, a labelled answer, or an ordinary conversation.
            kind = (record.messages is None, record.rejected is None, record.label is None)
            if first_kind is None:
                first_kind = kind
            if kind != first_kind:
                raise UserError(
                    f"{record.where}: is of another kind than the records before it;"
                    " write two files"
                )
            yield record
        print(f"data      {source.summary(stats)}")


def as_json(record: Record) -> str:
    """Returns a record as a line of JSONL, of which dataset/formats.py makes the same record again.

    A long text's record is a part of it, and so is what comes back: the line begins with the first
    part and ends with the last.
    """
    if record.messages is None:
        quoted = json.dumps(record.text, ensure_ascii=False)
        line = quoted[1:-1]
        if record.first:
            line = '{"text": "' + line
        if record.last:
            line += '"}\n'
        return line
    weights = record.weights or [1.0] * len(record.messages)
    record_weight = weight_of_record(record, weights)
    messages = []
    for message, weight in zip(record.messages, weights, strict=True):
        # The reader multiplies a message's weight by the record's.
        if weight != record_weight:
            message = message | {"weight": weight / record_weight}
        messages.append(message)
    fields = {}
    if record.rejected is not None:
        fields["prompt"] = messages[: record.asked]
        fields["chosen"] = messages[record.asked :]
        fields["rejected"] = record.rejected
    else:
        fields["messages"] = messages
        if record.label is not None:
            fields["label"] = record.label
    if record_weight != 1:
        fields["weight"] = record_weight
    if record.tools:
        fields["tools"] = record.tools
    return to_exact_json(fields, ensure_ascii=False) + "\n"


def weight_of_record(record: Record, weights: list[float]) -> float:
    """Returns the weight of the record as a whole.

    Its messages share it unless they have their own.

    A message that is no answer has no weight of its own but 0, so its weight is the record's.
    """
    for message, weight in zip(record.messages, weights, strict=True):
        if weight and message["role"] != "assistant":
            return weight
    return 1.0
