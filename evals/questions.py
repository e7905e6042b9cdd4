"""What the model is asked, and what its answers are compared with: the records of --data.

A record of any format that train.py reads is a question with its last answer as the reference. Two
more forms have their references elsewhere: --references names files with a reference a line (for
translations, whose languages come in files of their own), and BFCL's questions have a file of possible
answers beside them. `--turns all` asks for every answer of a conversation, each time with the true
conversation before it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.errors import UserError
from dataset.folders import Fetched
from dataset.formats import Map
from dataset.prompts import BFCL_FORMAT, BFCL_TURNS, open_prompts
from dataset.readers import KNOWN_SUFFIXES, suffix_of
from dataset.records import ReadStats, Record
from dataset.token_cache import prompt_hash
from evals.answers import question_of
from evals.bfcl import add_possible_answers
from evals.table import EVALUATIONS, imported
from evals.targets import open_with_answers, records_with_references, sample_of_file
from evals.tool_calls import calls_as_json, tool_questions

TOOLS = "tools"  # the evaluation that reads files of its own


def read_questions(
    args: argparse.Namespace, file: str | Path | Fetched, map_fn: Map | None, system: str
) -> list[Record]:
    """Reads the records that are asked, each with an answer to compare with, and prints what was read.

    file: what --data names, fetched. map_fn: the user's function that every record goes through.
    system: the system message of conversations that have none.

    Raises UserError where there is none, or where an evaluation can't use a reference: before a model
    is loaded for it.
    """
    about_tools = TOOLS in args.what
    if args.references:
        records = referenced_records(file, args.references, map_fn, args.skip_bad, system)
        records = drawn(records, args.limit, args.seed)
    else:
        records = records_of_file(
            args,
            args.what,
            file,
            map_fn,
            system,
            ", or texts with an answer a line (--references FILE)",
        )
    if args.turns == "all":
        records = every_answer(records, about_tools)
    if about_tools:
        records = tool_questions(records)
    check_references(args.what, records)
    return records


def read_task(
    args: argparse.Namespace,
    what: list[str],
    file: str | Path | Fetched,
    map_fn: Map | None,
    system: str,
    print_fn: Callable[[str], None],
) -> list[Record]:
    """Reads the records of one of several files whose last answers are asked for, as `evaluate.py
    compare` and `continual` do; else as read_questions.

    what: the names of the evaluations. print_fn: is given the lines about what was read.
    """
    records = records_of_file(args, what, file, map_fn, system, print_fn=print_fn)
    if TOOLS in what:
        if len(what) > 1:
            others = ", ".join(name for name in what if name != TOOLS)
            raise UserError(
                f"{TOOLS}: asks other questions of {file} than {others}; run it by itself"
            )
        records = tool_questions(records)
    check_references(what, records)
    return records


def records_of_file(
    args: argparse.Namespace,
    what: list[str],
    file: str | Path | Fetched,
    map_fn: Map | None,
    system: str,
    advice: str = "",
    print_fn: Callable[[str], None] = print,
) -> list[Record]:
    """Reads --limit records of a file of questions and answers. what: the names of the evaluations.
    advice: as for open_with_answers. print_fn: is given the lines about what was read."""
    if TOOLS in what:
        return records_about_tools(file, map_fn, args, system)
    source = open_with_answers(file, map_fn, args.skip_bad, advice)
    source.system = system
    return records_with_references(source, args.limit, args.seed, print_fn)


def check_references(what: list[str], records: list[Record]) -> None:
    """Raises UserError where a record has no reference, or one that an evaluation can't use."""
    checks: list[Callable] = []
    for name in what:
        if EVALUATIONS[name].check:
            checks.append(imported(EVALUATIONS[name].check))
    for record in records:
        _, references = question_of(record)
        for check in checks:
            check(references, record.where)


def records_about_tools(
    file: str | Path | Fetched, map_fn: Map | None, args: argparse.Namespace, system: str
) -> list[Record]:
    """Reads conversations with tools, or BFCL's questions with their possible answers."""
    source = open_prompts(file, map_fn, args.skip_bad)
    if source.format is BFCL_TURNS:
        raise UserError(
            f"{source.path}: BFCL's tasks of several turns are scored by running its simulated programs,"
            " which is not done here; give one of its single-turn files"
        )
    source.system = system
    stats = ReadStats()
    records = list(source.records(stats))
    print(f"data      {source.summary(stats)}")
    if source.format is BFCL_FORMAT:
        add_possible_answers(records, source.root)
    return drawn(records, args.limit, args.seed)


def drawn(records: list[Record], limit: int | None, seed: int) -> list[Record]:
    """Returns `limit` of the records (None: all), drawn by the seed, and prints that they are."""
    if limit is None or limit >= len(records):
        return records
    prompts = np.array([prompt_hash(record) for record in records], np.uint64)
    chosen = sample_of_file(prompts, np.zeros(len(records), np.int64), limit, seed)
    return [records[i] for i in chosen]


def every_answer(records: list[Record], with_calls: bool) -> list[Record]:
    """Returns a record for each answer of each conversation, which ends with it, and prints how many
    there are. with_calls: tool calls count as answers; else they are left out and counted."""
    result = []
    num_calls = 0
    for record in records:
        messages = record.messages or []
        asked = False
        number = 0
        for i, message in enumerate(messages):
            asked = asked or message["role"] == "user"
            if message["role"] != "assistant" or not asked:
                continue
            calls = message.get("tool_calls") or []
            if calls and not with_calls:
                num_calls += 1
                continue
            number += 1
            references = record.references if i == len(messages) - 1 else None
            if with_calls and (calls or record.tools):
                references = [calls_as_json(calls)]
            where = f"{record.where} answer {number}"
            result.append(
                Record(messages[: i + 1], None, where, record.tools, references=references)
            )
    line = f"          --turns all: {len(result):,} answers of {len(records):,} conversations"
    if num_calls:
        line += f", {num_calls:,} tool calls left out (`tools` compares them)"
    print(line)
    if not result:
        raise UserError("--turns all: no conversation has an answer to a user")
    return result


# ---- references in files of their own ----


def referenced_records(
    file: str | Path | Fetched,
    references: list[str],
    map_fn: Map | None,
    skip_bad: bool,
    system: str,
) -> list[Record]:
    """Reads prompts, and their references, of which line N of each file belongs to prompt N.

    The prompts are the records of a file that generate.py reads, or the lines of a text whose name
    does not end as theirs, as test.en. Raises UserError where the files have other lengths.
    """
    path = Path(str(file))
    if is_plain_text(path):
        records = []
        for number, line in enumerate(text_lines(path), 1):
            message = {"role": "user", "content": line}
            records.append(Record([message], None, f"{path} line {number}"))
        kind = f"a prompt a line ({len(records):,} lines)"
        if map_fn is not None:
            raise UserError("--map: changes records, and a text with a prompt a line has none")
    else:
        source = open_prompts(file, map_fn, skip_bad)
        stats = ReadStats()
        records = list(source.records(stats))
        if any(record.messages is None for record in records):
            raise UserError(f"{path}: plain text asks nothing; give prompts")
        kind = source.summary(stats).removeprefix(f"{path}: ")
    print(f"data      {path}: {kind}")
    columns = []
    for name in references:
        lines = text_lines(Path(name))
        if len(lines) != len(records):
            raise UserError(
                f"--references {name}: {len(lines):,} lines, and {path} has {len(records):,} prompts;"
                " line N is the reference of prompt N"
            )
        columns.append(lines)
    print(f"          references, line by line: {', '.join(references)}")
    result = []
    for record, *accepted in zip(records, *columns, strict=True):
        record.references = [each for each in accepted if each.strip()]
        if record.references and record.messages[-1]["content"].strip():
            if system and record.messages[0]["role"] != "system":
                record.messages = [{"role": "system", "content": system}, *record.messages]
            result.append(record)
    num_empty = len(records) - len(result)
    if num_empty:
        print(f"          {num_empty:,} left out, whose prompt or reference is empty")
    if not result:
        raise UserError(f"--references {', '.join(references)}: every line is empty")
    return result


def is_plain_text(path: Path) -> bool:
    """True if a file is read line by line: a .txt, or one whose name does not end as that of a
    format."""
    suffix = suffix_of(path)
    return path.is_file() and (suffix == ".txt" or suffix not in KNOWN_SUFFIXES)


def text_lines(path: Path) -> list[str]:
    """Returns the lines of a text, without their ends. Raises UserError if it is no UTF-8 text."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a text is wanted") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    # Only what ends a line in every editor: Unicode has more, which stand inside of sentences.
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines
