"""Reports what is in data files, before any GPU time is spent: `python data.py inspect`.

`inspect` reads every record once more than training does (`survey`), to find near-duplicates,
scripts, labels, and addresses and secrets that had better not be there; with --html it also writes
the report as a page (dataset/page.html.jinja). What costs nothing is in the token rows already:
`quick_checks` reports that at the start of a training. `main` is the command line of all three
commands; `convert` and `split` are in dataset/rewrite.py.
"""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from common import cli, console
from common.errors import UserError, printable
from common.files import atomic_file
from dataset.columns import ignored_facts
from dataset.examples import TRAIN_ON, TRUNCATE, Dataset, Example, cut, too_long_warning
from dataset.folders import TEST, TRAIN
from dataset.formats import Map, Source, open_source
from dataset.oasst import TREES
from dataset.records import ReadStats, nested_place, pack_nested
from dataset.text_stats import masked, near_groups, private_parts, script, signature
from dataset.token_cache import (
    CONTROL_TOKEN,
    IS_CHAT,
    ONE_WORD_ANSWER,
    PRIVATE_PART,
    RENDERED_CHAT,
    Rows,
    record_hashes,
    tokenized_rows,
    words_of,
)
from dataset.tokenize_pool import ReadingProgress, chunks, in_order, processes_for
from tokenizer import EMPTY_THINK, Tokenizer

MAX_PLACES = 3  # places that are named for each finding
MAX_LABEL_LENGTH = 80  # characters: longer answers are no classes
MAX_LABELS = 200  # more different answers are no classes
MIN_LABELLED = 20  # fewer answers are not called classes
# How many times as many records the most frequent label has as the rarest, from where on that is a
# warning.
IMBALANCE = 10
MAX_HISTOGRAM_WIDTH = 40  # characters of the longest bar in the terminal
DEFAULT_SHOWN = 3  # examples of each file
DEFAULT_SHARE = 0.05  # of the records, for each of val.jsonl and test.jsonl
# Codes that set a terminal's color.
GREEN = "\033[32m"
DIM = "\033[2m"
PLAIN = "\033[0m"


# ---- a second reading ----


@dataclass
class Survey:
    """The result of reading all N records of a source, or of a chunk of it.

    hashes: uint64 [N], a hash of all that a record says.
    prompts: uint64 [N], a hash of what is asked.
    signatures: uint16 [N, 64], MinHash signatures.
    places: int64 [N, 3], file and number of each record, and its place in a nested file.
    scripts: number of records in each script.
    answers: number of times that each last answer is given; "" counts answers that are too long for
        a label.
    may_be_classes: False if there are too many different answers for classes; `answers` is empty
        then.
    private: number of addresses and secrets of each kind.
    examples: for each finding up to MAX_PLACES places, with what is there.
    stats: what was read.
    """

    hashes: np.ndarray
    prompts: np.ndarray
    signatures: np.ndarray
    places: np.ndarray
    scripts: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    may_be_classes: bool = True
    private: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    stats: ReadStats = field(default_factory=ReadStats)


def survey(source: Source) -> Survey:
    """Reads all records of a source with a process a core. Takes 168 bytes of memory a record.

    Raises UserError that names the records that can't be read, unless these are left out.
    """
    parts = []
    # The arrays are set at the end, when all parts are there.
    whole = Survey(hashes=None, prompts=None, signatures=None, places=None)
    reading = ReadingProgress("reading", source)
    work = partial(survey_chunk, source)
    stats = whole.stats
    surveys = in_order(work, reading.of(chunks(source)), processes_for(source))
    for part in with_all_faults(source, stats, surveys):
        parts.append(part)
        stats.add(part.stats)
        reading.update(f"{stats.records:,} records")
        whole.scripts.update(part.scripts)
        whole.answers.update(part.answers)
        whole.private.update(part.private)
        if len(whole.answers) > 2 * MAX_LABELS:
            # They are no classes, and would take memory.
            whole.answers = Counter()
            whole.may_be_classes = False
        for finding, places in part.examples.items():
            all_places = whole.examples.get(finding, []) + places
            whole.examples[finding] = all_places[:MAX_PLACES]
        # These were added to `whole`, and need not be held until the end.
        part.examples = None
        part.scripts = None
        part.answers = None
    reading.close()
    source.complain_of_faults(stats)
    if not parts:
        raise UserError(f"{source.path}: is an empty list")
    whole.hashes = np.concatenate([part.hashes for part in parts])
    whole.prompts = np.concatenate([part.prompts for part in parts])
    whole.signatures = np.concatenate([part.signatures for part in parts])
    whole.places = np.concatenate([part.places for part in parts])
    return whole


def with_all_faults(source: Source, stats: ReadStats, parts: Iterator) -> Iterator:
    """Yields the parts. If there is an error, raises one of all faults so far. stats: of these."""
    try:
        yield from parts
    except UserError as error:
        source.complain_of_faults(stats, error)
        raise


def survey_chunk(source: Source, chunk: list) -> Survey:
    """Reads the records of a chunk; this runs in a worker process."""
    stats = ReadStats()
    records = []
    places = []
    for container, number, payload in chunk:
        new = source.read(container, number, payload, stats)
        records += new
        places += [(container, number, pack_nested(record.nested)) for record in new]
    both_hashes = [record_hashes(record) for record in records]
    signatures = [signature(words_of(record)) for record in records]
    # The shapes are given, since a chunk may have no record.
    part = Survey(
        hashes=np.array([text for _, text in both_hashes], np.uint64),
        prompts=np.array([prompt for prompt, _ in both_hashes], np.uint64),
        signatures=np.array(signatures, np.uint16).reshape(-1, 64),
        places=np.array(places, np.int64).reshape(-1, 3),
        stats=stats,
    )
    for record in records:
        words = words_of(record)
        part.scripts[script(words)] += 1
        for kind, text in private_parts(words):
            part.private[kind] += 1
            add_example(part, kind, f"{record.where}: {masked(text)}")
        if record.messages is not None:
            answers = [each for each in record.messages if each["role"] == "assistant"]
            last_answer = answers[-1]
            answer = last_answer.get("content") or ""
            label = answer if len(answer) <= MAX_LABEL_LENGTH else ""
            part.answers[label] += 1
            is_one_word = len(answer.split(None, 1)) == 1
            if is_one_word and not last_answer.get("tool_calls"):
                add_example(part, "one word", f"{record.where}: {answer.strip()[:40]!r}")
    return part


def add_example(part: Survey, finding: str, place: str) -> None:
    """Adds a place to the examples of a finding, if there are fewer than MAX_PLACES."""
    places = part.examples.setdefault(finding, [])
    if len(places) < MAX_PLACES:
        places.append(place)


# ---- findings ----


@dataclass
class Finding:
    """A line of the report: its name, the amount, example places, and whether it is a warning."""

    name: str
    value: str
    examples: list[str] = field(default_factory=list)
    warns: bool = False


def duplicates(result: Survey, where: Callable[[int], str]) -> list[Finding]:
    """Returns the findings within one source.

    They are duplicates, near-duplicates, and questions with several answers.

    where: from a record's number to its place.
    """
    numbers = np.arange(len(result.hashes))
    exact, original = repeats(result.hashes)
    # A group has the number of its first record.
    groups = near_groups(result.signatures)
    near = np.flatnonzero(groups != numbers)
    near = near[~np.isin(near, exact)]
    num_several = count_several_answers(result.prompts, result.hashes)

    def examples(copies: np.ndarray, originals: np.ndarray) -> list[str]:
        lines = []
        for i in copies[:MAX_PLACES].tolist():
            lines.append(same_as(where(i), where(originals[i])))
        return lines

    return [
        Finding("exact duplicates", f"{len(exact):,}", examples(exact, original), len(exact) > 0),
        Finding("near-duplicates", f"{len(near):,}", examples(near, groups), len(near) > 0),
        Finding("questions with several answers", f"{num_several:,}"),
    ]


def repeats(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of the records that say what an earlier one says, and for each record the
    number of the first that says the same. hashes: uint64 [N], of `record_hashes`."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    original = first[inverse]
    return np.flatnonzero(original != np.arange(len(hashes))), original


def count_several_answers(prompts: np.ndarray, contents: np.ndarray) -> int:
    """Returns how many questions come with more than one content.

    prompts, contents: uint64 [N], hashes of each record's question, and of all that it says.
    """
    pairs = np.stack([prompts, contents], 1)
    distinct = np.unique(pairs, axis=0)
    _, num_answers = np.unique(distinct[:, 0], return_counts=True)
    return int((num_answers > 1).sum())


def same_as(place: str, other: str) -> str:
    """Returns e.g. "a.json record 7 is record 5".

    Of the other's place, only what differs is named: its file too if it is another one, and in a
    nested file the numbers from the first that differs on.
    """
    # A place is "FILE unit number", and a file's name may have spaces. In a nested file more follows.
    match = re.match(r"(.+) (?:line|record|row) \d+", place)
    file = match[1] if match else ""
    shown = other
    if other.startswith(f"{file} "):
        mine = place.removeprefix(f"{file} ").split(" ")
        theirs = other.removeprefix(f"{file} ").split(" ")
        # In pairs: "record", "1", "article", "3".
        while len(theirs) > 2 and mine[:2] == theirs[:2]:
            del mine[:2], theirs[:2]
        shown = " ".join(theirs)
    return f"{place} is {shown}"


def overlap(
    mine: Survey, other: Survey, name: str, where_other: Callable[[int], str]
) -> list[Finding]:
    """Returns how many records of a file that validates or tests are in a source too.

    mine: the source.
    other, name: the other file.
    where_other: from the number of a record of the other file to its place.
    """
    exact = np.flatnonzero(np.isin(other.hashes, mine.hashes))
    num_same_prompt = int(np.isin(other.prompts, mine.prompts).sum())
    # Both together, since groups are of one set of signatures.
    groups = near_groups(np.concatenate([mine.signatures, other.signatures]))
    num_mine = len(mine.hashes)
    near = np.flatnonzero(np.isin(groups[num_mine:], groups[:num_mine]))
    near = near[~np.isin(near, exact)]
    total = f" of {len(other.hashes):,} in {name}"
    exact_places = [where_other(i) for i in exact[:MAX_PLACES]]
    near_places = [where_other(i) for i in near[:MAX_PLACES]]
    return [
        Finding("exact overlap", f"{len(exact):,}{total}", exact_places, len(exact) > 0),
        Finding("near overlap", f"{len(near):,}{total}", near_places, len(near) > 0),
        Finding("same question", f"{num_same_prompt:,}{total}", warns=num_same_prompt > 0),
    ]


def faulty_finding(stats: ReadStats, lines: list[str]) -> Finding:
    """Returns the finding on records that could not be read and are left out; an empty one without
    them. lines: what is wrong with the first of them."""
    count = f"{stats.num_faults:,}" if stats.num_faults else ""
    return Finding("faulty, left out", count, lines, warns=True)


def contents(result: Survey, rows: Rows, fault_lines: list[str]) -> list[Finding]:
    """Returns the findings on what records say.

    They are on empty and one-word answers, faults, control tokens, scripts, labels, addresses and
    secrets. fault_lines: what is wrong with the first records that can't be read.
    """
    flags = rows.records[:, 2]
    num_empty = 0
    for reason, count in rows.stats.dropped.items():
        if reason.startswith("empty"):
            num_empty += count
    num_one_word = int((flags & ONE_WORD_ANSWER > 0).sum())
    with_control = np.flatnonzero(flags & CONTROL_TOKEN)
    control_places = [rows.where(i) for i in with_control[:MAX_PLACES]]
    total = max(1, len(result.hashes))
    scripts = shares(result.scripts.most_common(6), total)
    one_word_places = result.examples.get("one word", [])
    num_control = len(with_control)
    rendered = np.flatnonzero(flags & RENDERED_CHAT)
    rendered_places = [rows.where(i) for i in rendered[:MAX_PLACES]]
    num_rendered = len(rendered)
    as_characters = f"{num_rendered:,} (trained as plain characters; give them as messages)"
    control = f"{num_control:,} (kept as plain text)"
    findings = [
        Finding("empty, left out", f"{num_empty:,}", warns=num_empty > 0),
        faulty_finding(result.stats, fault_lines),
        Finding("answers of one word", f"{num_one_word:,}", one_word_places),
        Finding("control tokens spelled in text", control, control_places, num_control > 0),
        Finding("scripts", scripts),
    ]
    if num_rendered:
        findings.append(Finding("chats rendered already", as_characters, rendered_places, True))
    labels = classes(result)
    if labels:
        findings.append(label_balance(labels, total))
    for kind, count in result.private.most_common():
        findings.append(Finding(f"looks like: {kind}", f"{count:,}", result.examples[kind], True))
    if not result.private:
        findings.append(Finding("addresses and secrets", "none found"))
    return [finding for finding in findings if finding.value]


def shares(counts: list[tuple[str, int]], total: int) -> str:
    """Returns e.g. "Latin 90.0%, Greek 10.0%". counts: (name, count) of each."""
    return ", ".join(f"{name} {count / total:.1%}" for name, count in counts)


def classes(result: Survey) -> list[tuple[str, int]]:
    """Returns (answer, how often it is given), the most frequent first.

    Returns nothing if the answers are no classes.
    """
    total = sum(result.answers.values())
    if not result.may_be_classes or result.answers[""] or total < MIN_LABELLED:
        return []
    # Classes have at least four records each, on average.
    if not 2 <= len(result.answers) <= min(MAX_LABELS, total // 4):
        return []
    return result.answers.most_common()


def label_balance(labels: list[tuple[str, int]], total: int) -> Finding:
    """Returns the finding that lists labels with their shares.

    labels: what `classes` returned.
    total: number of records.
    """
    _, largest = labels[0]
    _, smallest = labels[-1]
    listed = [(console.one_line(label, 30), count) for label, count in labels[:12]]
    value = shares(listed, total)
    if len(labels) > 12:
        value += f", ... {len(labels):,} in all"
    value += f"; most to least {largest:,} to {smallest:,}"
    return Finding("labels", value, warns=largest > IMBALANCE * smallest)


def lengths(rows: Rows, data: Dataset, seq_len: int, truncate: str) -> list[Finding]:
    """Returns the findings on tokens: how many there are, and what seq_len tokens do not hold.

    data: the examples that `cut` has made of the rows. truncate: one of TRUNCATE.
    """
    num_tokens = len(rows.ids)
    num_trained = 0
    if len(rows.spans):
        span_lengths = rows.spans[:, 1] - rows.spans[:, 0]
        num_trained = int(span_lengths[rows.weights > 0].sum())
    share = num_trained / max(1, num_tokens)
    names = ("shortest", "median", "90 %", "99 %", "longest")
    values = np.percentile(np.diff(rows.starts), (0, 50, 90, 99, 100))
    quantiles = []
    for name, value in zip(names, values, strict=True):
        quantiles.append(f"{name} {int(value):,}")

    is_chat = rows.records[:, 2] & IS_CHAT > 0
    changes = []
    for reason, count in data.dropped.items():
        changes.append(f"{console.number_of(count, 'record')} {reason}")
    if not is_chat.all():
        num_pieces = len(data) - int(is_chat.sum())
        if num_pieces:
            pieces = console.number_of(num_pieces, "piece")
            changes.append(f"plain text comes in {pieces} of up to {seq_len:,} tokens")
    if not changes:
        changes.append("holds every record whole")
    warning = too_long_warning([rows], data.dropped, truncate)
    if warning:
        changes.append(warning)
    return [
        Finding("tokens", f"{num_tokens:,}, of which {share:.1%} trained"),
        Finding("tokens a record", ", ".join(quantiles)),
        Finding(f"--seq-len {seq_len:,}", "; ".join(changes), warns=bool(data.dropped)),
    ]


def histogram(values: np.ndarray, bars: int = 12) -> list[tuple[str, int]]:
    """Returns (label, count) of each bin. The edges of the bins grow by a factor.

    values: integers, at least one.
    bars: the number of bins at most.
    """
    low = max(1, int(values.min()))
    high = int(values.max()) + 1
    exact_edges = np.geomspace(low, high, bars + 1)
    # Whole numbers, of which small ones may come twice.
    edges = np.unique(exact_edges.round().astype(np.int64))
    if len(edges) == 1:
        edges = np.array([low, high])
    counts, _ = np.histogram(values, edges)
    bins = []
    for (start, stop), count in zip(pairwise(edges), counts, strict=True):
        bins.append((f"{start:,} to {stop - 1:,}", int(count)))
    return bins


# ---- what training reports at its start ----


def rendered_chats(rows: Rows) -> str:
    """Returns a warning about chats that are rendered already, or "" if there are none."""
    flagged = np.flatnonzero(rows.records[:, 2] & RENDERED_CHAT)
    if not len(flagged):
        return ""
    return (
        f"{len(flagged):,} of {len(rows):,} records hold the markup of a chat template, the first in"
        f" {rows.where(flagged[0])}: it is trained as plain characters, not as control tokens; give"
        " the chats as messages, with a role and content each, and the template writes its markup"
        " itself"
    )


def quick_checks(train: Dataset, val: Dataset) -> list[str]:
    """Returns three lines about the token rows: repeats, lengths, contents.

    The numbers of the first are those that `data.py inspect` reports of the same files: of all
    their records, also of those that are left out for their length, or that --limit leaves out.
    """
    # What is held out of a file is compared with what is left of it to train on, else whole files.
    is_held_out = val.examples.rows is train.examples.rows
    mine = record_columns(train)
    trained = mine if is_held_out else record_columns(train, whole=True)
    whole = record_columns(train, whole=True)
    other = record_columns(val, whole=not is_held_out)
    num_repeats = len(repeats(whole["texts"])[0])
    num_several = count_several_answers(whole["prompts"], whole["texts"])
    # Only conversations: of one text some pieces may validate and others not.
    is_chat = other["flags"] & IS_CHAT > 0
    num_chats = int(is_chat.sum())
    num_shared = int(np.isin(other["texts"][is_chat], trained["texts"]).sum())
    num_asked = int(np.isin(other["prompts"][is_chat], trained["prompts"]).sum())
    first_line = (
        f"{num_repeats:,} records are repeats, {num_shared:,} of {num_chats:,} that validate"
        f" are trained on as well, {num_several:,} questions have several answers"
    )
    if num_asked:
        first_line += f"; {num_asked:,} of {num_chats:,} that validate ask what is trained"
        first_line = f"WARNING: {first_line}"
    median, high, longest = np.percentile(train.lengths, (50, 99, 100)).astype(int).tolist()
    return [
        first_line,
        f"tokens an example: median {median:,}, 99 % up to {high:,}, longest {longest:,}",
        f"records: {flagged_records(mine['flags'])}; `data.py inspect` says more",
    ]


def flagged_records(flags: np.ndarray) -> str:
    """Returns how many records have which flags. flags: int64 [records]."""
    names = {
        ONE_WORD_ANSWER: "answers of one word",
        CONTROL_TOKEN: "control tokens spelled in text",
        PRIVATE_PART: "addresses or secrets",
    }
    parts = []
    for flag, name in names.items():
        count = int((flags & flag > 0).sum())
        # Then one word is what this task asks for, as a label; `data.py inspect` lists the labels.
        if flag == ONE_WORD_ANSWER and 2 * count > len(flags):
            continue
        if count:
            parts.append(f"{count:,} with {name}")
    return ", ".join(parts) or "none with addresses, secrets or control tokens"


def record_columns(data: Dataset, whole: bool = False) -> dict[str, np.ndarray]:
    """Returns texts and prompts (hashes) and flags of the records that examples come from.

    Each record comes once, of however many pieces it has been cut into.
    whole: also of the records of the same files that no example comes from.
    """
    index = data.examples
    text_hashes, prompt_hashes, flags = [], [], []
    for source, rows in enumerate(index.rows):
        records = np.arange(len(rows))
        if not whole:
            is_here = index.source == source
            records = np.unique(index.row[is_here])
        text_hashes.append(rows.texts[records])
        prompt_hashes.append(rows.prompts[records])
        flags.append(rows.records[records, 2])
    return {
        "texts": np.concatenate(text_hashes),
        "prompts": np.concatenate(prompt_hashes),
        "flags": np.concatenate(flags),
    }


# ---- how it looks ----


def spans_of(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Yields the example's text in runs of tokens, as (text, True if it is trained)."""
    trained = np.asarray(example.loss_weights) > 0
    changes = np.flatnonzero(trained[1:] != trained[:-1]) + 1
    edges = [0, *changes.tolist(), len(trained)]
    for start, stop in pairwise(edges):
        ids = [int(i) for i in example.ids[start:stop]]
        # Only where a text begins, the tokenizer may have put a space in front of it.
        text = "".join(tokenizer.stream(ids, first=start == 0))
        yield text, bool(trained[start])


def in_terminal(example: Example, tokenizer: Tokenizer, color: bool) -> str:
    """Returns the example's text for a terminal.

    Trained parts are in green, or in [[brackets]] without color.
    """
    parts = []
    for text, is_trained in spans_of(example, tokenizer):
        shown = "\n".join(printable(line) for line in text.split("\n"))
        if color:
            code = GREEN if is_trained else DIM
            parts.append(f"{code}{shown}{PLAIN}")
        elif is_trained:
            parts.append(f"[[{shown}]]")
        else:
            parts.append(shown)
    return "".join(parts)


# Only a file with this line in it is a page of this program, which --html may overwrite.
PAGE_MARK = '<meta name="generator" content="plaintune">'


def page(
    title: str,
    parts: list[tuple[str, list[Finding]]],
    bins: list[tuple[str, int]],
    examples: list[Example],
    tokenizer: Tokenizer,
) -> str:
    """Returns the whole report as one HTML file that loads nothing.

    It is rendered from dataset/page.html.jinja.

    title: the heading.
    parts: for each source, its summary and its findings.
    bins: (label, count) of the bars of the histogram.
    examples: the examples to show.

    Autoescape escapes everything that comes out of the data.
    """
    # Training imports this module too, and does not need jinja2.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["printable"] = printable
    environment.filters["thousands"] = "{:,}".format
    template = environment.get_template("page.html.jinja")
    examples_with_spans = []
    for example in examples:
        spans = list(spans_of(example, tokenizer))
        examples_with_spans.append((example, spans))
    return template.render(
        title=title,
        tokenizer=tokenizer,
        parts=parts,
        bins=bins,
        largest_count=max(count for _, count in bins),
        examples=examples_with_spans,
    )


def check_overwritable(file: str) -> None:
    """Raises UserError if --html names a file that exists and is no page of this program."""
    if not Path(file).exists():
        return
    beginning = Path(file).read_text(encoding="utf-8", errors="replace")[:200]
    if PAGE_MARK not in beginning:
        raise UserError(
            f"--html {file}: the file exists and is no page of this program; give another name"
        )


def print_report(
    parts: list[tuple[str, list[Finding]]],
    bins: list[tuple[str, int]],
    examples: list[Example],
    tokenizer: Tokenizer,
) -> None:
    """Prints the report. Arguments: as those of `page`."""
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for summary, findings in parts:
        print(summary)
        for finding in findings:
            mark = "!" if finding.warns else " "
            print(f"  {mark} {finding.name:32} {finding.value}")
            for example in finding.examples:
                print(f"        {console.one_line(example, 110)}")
    print("\ntokens a record")
    largest_count = max(count for _, count in bins)
    label_width = max(len(label) for label, _ in bins)
    for label, count in bins:
        bar = "#" * round(MAX_HISTOGRAM_WIDTH * count / largest_count)
        print(f"  {label:>{label_width}}  {count:>9,}  {bar}")
    if examples:
        trained = f"{GREEN}green{PLAIN}" if color else "[[in brackets]]"
        print(
            f"\nexamples as the model sees them; chat template: {tokenizer.template_name};"
            f" trained: {trained}"
        )
    for example in examples:
        print(f"\n--- {printable(example.source)}, {len(example.ids):,} tokens")
        print(in_terminal(example, tokenizer, color))


# ---- the commands ----


def main(
    load_tokenizer: Callable[[str | None, str | None, str], tuple[Tokenizer, int]],
    fetch_data: Callable,
) -> None:
    """Runs `data.py inspect`, `convert` or `split`.

    load_tokenizer: from --model, --template and --empty-think to a tokenizer and the number of
        positions of its model.
    fetch_data: from the name of data that lie elsewhere, and the part that is asked for, to copies
        of them. Both are arguments, since this folder imports nothing that knows of models or hosts.
    """
    # rewrite.py imports this module.
    from dataset.rewrite import convert_files, split_files

    args = arguments()
    # Not while the flags are parsed, which data.py does twice: it runs the user's file.
    args.map = Map(args.map) if args.map else None
    args.files = [fetch_data(file, TRAIN) for file in args.files]
    args.against = [fetch_data(file, TEST) for file in args.against or ()]
    if args.command == "inspect":
        empty_think = args.empty_think or EMPTY_THINK[0]
        inspect(args, *load_tokenizer(args.model, args.template, empty_think))
    elif args.command == "convert":
        convert_files(args)
    else:
        split_files(args)


# The flags that only one or two of the commands have.
FLAGS_OF = {
    "inspect": (
        "model",
        "template",
        "empty_think",
        "system",
        "train_on",
        "seq_len",
        "truncate",
        "against",
        "show",
        "html",
    ),
    "convert": ("out",),
    "split": ("out", "val", "test"),
}


FILES_HELP = (
    "files or folders of any known format, on this disk or by name: hf:org/name[:subset][:split],"
    " s3://bucket/key, gs://bucket/key, https://host/file"
)


def make_data_parser() -> argparse.ArgumentParser:
    """Returns the parser of all three commands."""
    parser = argparse.ArgumentParser(
        prog="data.py", description="Look at data, or rewrite it.", allow_abbrev=False
    )
    add = parser.add_argument
    commands = (
        "inspect: report what is in the files; convert: write them as one JSONL file of messages;"
        " split: write train.jsonl, val.jsonl and test.jsonl, chosen by a hash, so the same each"
        " time; records with one prompt, or nearly alike, stay together"
    )
    add("command", choices=["inspect", "convert", "split"], help=commands)
    add("files", nargs="+", metavar="FILE", help=FILES_HELP)
    trees = "which paths of OASST trees to read (default: best)"
    add("--trees", choices=[*TREES], default="best", help=trees)
    skip_bad = "leave out records that can't be read, and count them, instead of stopping at them"
    add("--skip-bad", action="store_true", help=skip_bad)
    add(
        "--map",
        metavar="FILE.py:NAME",
        help="your function that every record goes through first, as in train.py",
    )
    model = (
        "inspect: the model whose tokenizer and template to use (default: SmolLM2-135M-Instruct)"
    )
    add("--model", metavar="M", help=model)
    add("--template", help="inspect: chat template in place of the model's own")
    empty_think = "inspect: whether empty think blocks of a template are trained (default: train)"
    add("--empty-think", choices=[*EMPTY_THINK], help=empty_think)
    system = "inspect: system message before conversations that have none, as in train.py"
    add("--system", metavar="TEXT", help=system)
    train_on = "inspect: which messages are trained (default: answers)"
    add("--train-on", choices=[*TRAIN_ON], help=train_on)
    seq_len = "inspect: tokens of an example at most (default: 2048, or the model's limit)"
    add("--seq-len", type=int, metavar="N", help=seq_len)
    truncate = "inspect: what becomes of longer conversations, as in train.py (default: drop)"
    add("--truncate", choices=[*TRUNCATE], help=truncate)
    against = (
        "inspect: validation or test files; records that stand there too, to the letter or nearly,"
        " are counted"
    )
    add("--against", nargs="+", metavar="FILE", help=against)
    show = f"inspect: examples to show of each file (default: {DEFAULT_SHOWN})"
    add("--show", type=int, metavar="K", help=show)
    add("--html", metavar="PAGE", help="inspect: write the report as an HTML page as well")
    add(
        "--out",
        metavar="PATH",
        help="convert: the JSONL file to write; split: the folder (required)",
    )
    for name, verb in (("--val", "validate"), ("--test", "test")):
        text = (
            f"split: share of the records that {verb}, a number as 0.05 (default: {DEFAULT_SHARE})"
        )
        add(name, type=float, metavar="F", help=text)
    return parser


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the checked command line. Raises UserError that names the flag.

    argv: the words, by default the process's own.
    """
    args = cli.parse_args(make_data_parser(), argv)
    command = args.command
    foreign = set()  # the flags of other commands alone
    for names in FLAGS_OF.values():
        foreign.update(names)
    foreign.difference_update(FLAGS_OF[command])
    for name in foreign:
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: means nothing to `{command}`")
    if command != "inspect":
        check_output(command, args.out)
    if args.html and not Path(args.html).resolve().parent.is_dir():
        raise UserError(f"--html {args.html}: there is no such folder")
    if args.seq_len is not None and args.seq_len < 2:
        raise UserError(f"--seq-len {args.seq_len}: must be 2 or more")
    if args.show is not None and args.show < 0:
        raise UserError(f"--show {args.show}: must be 0 or more")
    # Not defaults of the parser, which could not tell whether the flag was given.
    if args.val is None:
        args.val = DEFAULT_SHARE
    if args.test is None:
        args.test = DEFAULT_SHARE
    if args.val < 0 or args.test < 0 or args.val + args.test >= 1:
        raise UserError(
            f"--val {args.val:g} --test {args.test:g}: each share must be 0 or more,"
            " both together below 1"
        )
    return args


def check_output(command: str, out: str | None) -> None:
    """Raises UserError if --out is missing, exists, or has no name for what the command writes."""
    if out is None:
        raise UserError(f"`{command}` needs --out")
    if command == "convert" and not out.endswith(".jsonl"):
        raise UserError(f"--out {out}: convert writes JSONL; give a name that ends with .jsonl")
    if Path(out).exists():
        raise UserError(f"--out {out}: exists already; give another name")


def inspect(args: argparse.Namespace, tokenizer: Tokenizer, max_positions: int) -> None:
    """Prints what is in the files, as a model with this tokenizer will see it.

    max_positions: of the model.
    """
    seq_len = args.seq_len or min(2048, max_positions)
    roles, last_only = TRAIN_ON[args.train_on or "answers"]
    truncate = args.truncate or TRUNCATE[0]
    num_shown = DEFAULT_SHOWN if args.show is None else args.show
    if args.system is None:
        # As train.py does with a model that was trained here.
        args.system = tokenizer.system
    reason = tokenizer.why_no_system(args.system) if args.system else ""
    if reason:
        raise UserError(f"--system: can't be shown to the model ({reason})")
    others = []
    for file in args.against:
        other_source, other = survey_file(file, args)
        others.append((str(file), other_source, other))
    parts = []
    all_lengths = []
    all_results = []
    shown = []
    for file in args.files:
        source = open_source(file, args.trees, args.map, skip_bad=args.skip_bad)
        source.system = args.system or ""
        rows = tokenized_rows(source, tokenizer, roles, with_heads=truncate == "prompt")
        result = survey(source)
        all_results.append((source, result))
        dataset = cut([rows], seq_len, last_only, truncate)
        findings = lengths(rows, dataset, seq_len, truncate)
        findings += duplicates(result, partial(place, source, result))
        # The file's name stands above already, unless there are several.
        fault_lines = [fault for _, fault in result.stats.faults]
        if len(source.containers) > 1:
            fault_lines = source.fault_lines(result.stats)
        findings += contents(result, rows, fault_lines)
        fact_keys = ignored_facts(result.stats)
        if fact_keys:
            findings.append(Finding("ignored", fact_keys, warns=True))
        for name, other_source, other in others:
            findings += overlap(result, other, name, partial(place, other_source, other))
        findings += [Finding("cache", note, warns=True) for note in rows.notes]
        parts.append((source.summary(rows.stats), findings))
        all_lengths.append(np.diff(rows.starts))
        examples = dataset.examples
        if len(examples):
            # Spread evenly over the file.
            num_picks = min(num_shown, len(examples))
            picks = np.linspace(0, len(examples) - 1, num_picks).astype(int)
            shown += [examples[i] for i in picks]
    if len(all_results) > 1:
        parts.append((f"all {len(all_results)} files together", duplicates_of_all(all_results)))
    bins = histogram(np.concatenate(all_lengths))
    print_report(parts, bins, shown, tokenizer)
    if args.html:
        check_overwritable(args.html)
        title = ", ".join(Path(str(file)).name for file in args.files)
        html = page(title, parts, bins, shown, tokenizer)
        with atomic_file(Path(args.html)) as tmp:
            tmp.write_text(html, encoding="utf-8", errors="backslashreplace")
        print(f"page      {args.html}")


def survey_file(file: str, args: argparse.Namespace) -> tuple[Source, Survey]:
    """Opens and reads a file of --against; of a folder with parts, the one for tests."""
    source = open_source(file, args.trees, args.map, TEST, args.skip_bad)
    source.system = args.system or ""
    return source, survey(source)


def duplicates_of_all(results: list[tuple[Source, Survey]]) -> list[Finding]:
    """Returns the findings on duplicates within and between several files."""
    together = Survey(
        hashes=np.concatenate([result.hashes for _, result in results]),
        prompts=np.concatenate([result.prompts for _, result in results]),
        signatures=np.concatenate([result.signatures for _, result in results]),
        places=np.concatenate([result.places for _, result in results]),
    )
    firsts = np.cumsum([0, *[len(result.hashes) for _, result in results]])

    def where(i: int) -> str:
        number = int(np.searchsorted(firsts, i, side="right")) - 1
        source, result = results[number]
        return place(source, result, i - firsts[number])

    return duplicates(together, where)


def place(source: Source, result: Survey, i: int) -> str:
    """Returns the place of record i of a survey, e.g. "a.jsonl line 3"."""
    container, number, nested = result.places[i]
    return source.containers[container].place(int(number)) + nested_place(int(nested))
