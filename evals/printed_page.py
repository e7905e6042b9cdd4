"""`--html FILE`: what an evaluation prints, as a page.

The page says what the terminal says, since it is made of it: tables are taken as rows where they are printed
(`common.console.table`), the other lines are read by their form. So an evaluation need not know of pages. The
page adds what its reader will ask: the command, hashes of the files and models, versions.
"""

import argparse
import contextlib
import io
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from adapter_files import weights_file
from checkpoint import fingerprint, weight_files
from common.console import Transcript, transcript
from common.errors import UserError, read_json_if_there
from common.files import file_sha256
from common.remote_names import shown
from evals.report import (
    PageBlock,
    PageSection,
    check_report_file,
    command_text,
    masked_note,
    program_versions,
    render_report,
    without_secrets,
    write_report,
)
from evals.run_page import check_spares_run
from evals.targets import Target, pick_targets

# "data      FILE: 50 records": a word in a column of ten characters, and what belongs to it below.
FACT = re.compile(r"([a-z][\w/-]{0,7}) {2,}(\S.*)")
CONTINUED = re.compile(r" {10}(\S.*)")
COLUMN = 10
# "  question   What is it?", and the heading "  wrong to right (1 of 3)".
ANSWER_PART = re.compile(r" {2,4}([a-z]+)  +(.*)")
ANSWER_HEADING = re.compile(r" {2,4}(\S.*)")
# Larger files are not read once more for their hash.
MOST_HASHED_FILE = 1 << 30


@contextlib.contextmanager
def page_of_output(args: argparse.Namespace) -> Iterator[None]:
    """A block that evaluates. With --html its output is written as a page, once it has ended well.

    Raises UserError before it begins where the page can't be written.
    """
    name = getattr(args, "page", None)
    if name is None:
        yield
        return
    file = Path(name)
    check_report_file(file)
    check_spares_run(file)
    with transcript() as kept:
        yield
    blocks, num_masked = blocks_of_output(kept)
    if num_masked:
        blocks.append(PageBlock("note", masked_note(num_masked)))
    made = [PageBlock("text", "This command does it again:"), PageBlock("code", command_typed())]
    made.append(PageBlock("facts", made_rows(args)))
    sections = [PageSection("", blocks), PageSection("How it was made", made)]
    page = render_report(title_of(args), time.strftime("%Y-%m-%d %H:%M"), sections)
    write_report(file, page)
    print(f"\npage      {file}")


def title_of(args: argparse.Namespace) -> str:
    """Returns what the page is about."""
    if args.command == "compare":
        base = "its base" if args.base == "base" else args.base
        return f"{args.tuned} against {base}"
    words = args.what if args.command is None else [args.command]
    files = measured_files(args)
    names = ", ".join(Path(shown(file).rstrip("/")).name for file in files)
    return f"{', '.join(words)} on {names}" if names else ", ".join(words)


def measured_files(args: argparse.Namespace) -> list[str]:
    """Returns the files that a command line reads examples, prompts or answers from, each once."""
    if args.command == "compare":
        files = [args.target, *args.general, *(file for _, file in args.benchmark), args.safety]
    else:
        files = [getattr(args, "data", None), *(getattr(args, "files", None) or [])]
        files += getattr(args, "answers", None) or []
    return list(dict.fromkeys(str(file) for file in files if file))


def command_typed() -> str:
    """Returns the command line, without the secrets that a URL may have."""
    return command_text("evaluate.py", [shown(word) for word in sys.argv[1:]])


# ---- what was printed ----


def blocks_of_output(kept: Transcript) -> tuple[list[PageBlock], int]:
    """Returns what was printed as blocks, and how many secrets were masked in it.

    Tables first, since they are what a reader looks for; what was read and loaded stands below.
    """
    text, num_masked = without_secrets(kept.text)
    lines = text.splitlines()
    tables = {}
    for table, rows in kept.tables.items():
        clean = [[without_secrets(cell)[0] for cell in row] for row in rows]
        tables[tuple(without_secrets(table)[0].splitlines())] = clean
    facts: list[list[str]] = []
    results: list[PageBlock] = []
    i = 0
    while i < len(lines):
        found = next((each for each in tables if tuple(lines[i : i + len(each)]) == each), None)
        if found is not None:
            results.append(PageBlock("table", tables[found]))
            i += len(found)
            continue
        add_line(lines[i], facts, results)
        i += 1
    if facts:
        results += [PageBlock("heading", "What was measured"), PageBlock("facts", facts)]
    return results, num_masked


def add_line(line: str, facts: list[list[str]], results: list[PageBlock]) -> None:
    """Adds a line that is in no table to what it belongs to."""
    fact = FACT.fullmatch(line)
    more = CONTINUED.fullmatch(line)
    part = ANSWER_PART.fullmatch(line)
    heading = ANSWER_HEADING.fullmatch(line)
    if not line.strip():
        return
    if fact and fact.start(2) == COLUMN:
        # What follows a table is a result, as how many answers have changed.
        if any(block.kind == "table" for block in results):
            results.append(PageBlock("text", f"{fact[1]}: {fact[2]}"))
        else:
            facts.append([fact[1], fact[2]])
    elif more and facts:
        facts[-1][1] += f"; {more[1]}"
    elif part:
        # A card begins with its question.
        if part[1] == "question" or results[-1:] == [] or results[-1].kind != "answers":
            results.append(PageBlock("answers", [[]]))
        cards = results[-1].value
        assert isinstance(cards, list)
        cards[-1].append([part[1], part[2] or "(nothing)"])
    elif heading:
        results.append(PageBlock("heading", heading[1]))
    elif line.startswith("WARNING"):
        results.append(PageBlock("warning", line.removeprefix("WARNING").lstrip(": ")))
    else:
        results.append(PageBlock("note" if line.startswith("NOTE") else "text", line))


# ---- how it was made ----


def made_rows(args: argparse.Namespace) -> list[list[str]]:
    """Returns the hashes of what was measured, and versions."""
    rows = []
    for file in measured_files(args):
        path = Path(file)
        # A file that is gone by now has no hash, and the evaluation was right all the same.
        with contextlib.suppress(OSError):
            if path.is_file() and path.stat().st_size <= MOST_HASHED_FILE:
                rows.append([f"SHA-256 of {path.name}", file_sha256(path)])
    # Which models they are is printed once more.
    quietly = contextlib.redirect_stdout(io.StringIO())
    with contextlib.suppress(OSError, UserError), quietly:
        for target in targets_of(args):
            rows += target_rows(target)
    rows.append(["versions", program_versions()])
    return rows


def targets_of(args: argparse.Namespace) -> list[Target]:
    """Returns the models that a command line names; none where it names saved answers."""
    if args.command == "compare":
        from evals.compare import pick_models

        return pick_models(args)
    if args.command == "continual":
        from evals.continual import models_of_runs

        base, trained = models_of_runs(args)
        return [base, *trained] if base else trained
    if getattr(args, "answers", None):
        return []
    return pick_targets(args)


def target_rows(target: Target) -> list[list[str]]:
    """Returns the hashes of a model: of its base, and of the adapter on it."""
    rows = []
    facts = {}
    if target.adapter is not None:
        folder = Path(target.adapter)
        facts = read_json_if_there(folder / "plaintune.json")
        digest = file_sha256(weights_file(folder))
        rows.append([f"SHA-256 of {target.name}, adapter", digest, target.adapter])
    sha256 = facts.get("base_sha256")
    if sha256 is None:
        size = sum(file.stat().st_size for file in weight_files(target.folder))
        sha256 = (
            fingerprint(target.folder) if size <= MOST_HASHED_FILE else "not computed, for its size"
        )
    rows.append([f"SHA-256 of {target.name}, weights", sha256, str(target.folder)])
    return rows
