"""What stands in data files, before a GPU second is spent: `python data.py inspect`, `convert` and `split`.

`inspect` reads every record once more than training does: for near-duplicates, scripts, labels and what had better not
be there. What costs nothing is in the token rows already; `quick_checks` says that much at the start of a training.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import cli, console
from common.errors import UserError, printable
from common.files import atomic_file, atomic_folder
from dataset.examples import TRAIN_ON, Dataset, Example, cut
from dataset.formats import Map, Source, open_source
from dataset.oasst import TREES
from dataset.records import ReadStats, Record
from dataset.text_stats import FACTORS, masked, near_groups, private_parts, script, signature, text_hash
from dataset.token_cache import (
    CHAT,
    CONTROL,
    ONE_WORD,
    PRIVATE,
    Rows,
    chunks,
    in_order,
    processes_for,
    prompt_hash,
    tokenized_rows,
    words_of,
)
from tokenizer import Tokenizer

SHOWN = 3  # places that are named of each finding
LABEL = 80  # characters: longer answers are no classes
LABELS = 200  # more different answers are no classes
GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"


# ---- a second reading ----


@dataclass
class Survey:
    """What a reading of all records found. places: (file, number) of each; groups: of near-duplicates."""

    hashes: np.ndarray
    prompts: np.ndarray
    signatures: np.ndarray
    places: np.ndarray
    scripts: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    classes: bool = True
    private: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)  # finding: where, and what


def survey(source: Source) -> Survey:
    """Reads a source with a process a core; memory: 160 bytes a record."""
    parts, bar = [], tqdm(unit="record", desc="reading", disable=None, leave=False)
    whole = Survey(*([None] * 4))
    for part in in_order(partial(look, source), chunks(source), processes_for(source)):
        parts.append(part)
        bar.update(len(part.hashes))
        for name in ("scripts", "answers", "private"):
            getattr(whole, name).update(getattr(part, name))
        if len(whole.answers) > 2 * LABELS:  # no classes; forgotten, so that they take no memory
            whole.answers, whole.classes = Counter(), False
        for what, places in part.examples.items():
            whole.examples[what] = (whole.examples.get(what, []) + places)[:SHOWN]
        part.examples = part.scripts = part.answers = None
    bar.close()
    if not parts:
        raise UserError(f"{source.path}: is an empty list")
    for name in ("hashes", "prompts", "signatures", "places"):
        setattr(whole, name, np.concatenate([getattr(part, name) for part in parts]))
    return whole


def look(source: Source, chunk: list) -> Survey:
    """What a process does with a chunk."""
    stats, records, places = ReadStats(), [], []
    for container, number, payload in chunk:
        new = source.read(container, number, payload, stats)
        records += new
        places += [(container, number)] * len(new)
    part = Survey(
        hashes=np.array([text_hash(canonical(record)) for record in records], np.uint64),
        prompts=np.array([prompt_hash(record) for record in records], np.uint64),
        signatures=np.array([signature(words_of(record)) for record in records], np.uint16).reshape(-1, 64),
        places=np.array(places, np.int64).reshape(-1, 2),
    )
    for record in records:
        words = words_of(record)
        part.scripts[script(words)] += 1
        for kind, text in private_parts(words):
            part.private[kind] += 1
            note(part, kind, f"{record.where}: {masked(text)}")
        if record.messages is not None:
            answer = next(turn for turn in reversed(record.messages) if turn["role"] == "assistant")
            words = answer.get("content") or ""
            part.answers[words if len(words) <= LABEL else ""] += 1
            if len(words.split(None, 1)) == 1 and not answer.get("tool_calls"):
                note(part, "one word", f"{record.where}: {words.strip()[:40]!r}")
    return part


def canonical(record: Record) -> str:
    """All that a record says: roles and tool calls, too."""
    if record.messages is None:
        return record.text
    turns = [*record.messages, *(record.rejected or ())]
    said = [f"{turn['role']} {turn.get('content') or ''} {turn.get('tool_calls') or ''}" for turn in turns]
    return "\n".join([*said, str(record.tools or "")])


def note(part: Survey, what: str, place_text: str) -> None:
    if len(places := part.examples.setdefault(what, [])) < SHOWN:
        places.append(place_text)


# ---- findings ----


@dataclass
class Finding:
    """A line of the report: what, how much of it, where for example."""

    name: str
    value: str
    examples: list[str] = field(default_factory=list)
    warns: bool = False


def duplicates(facts: Survey, where: Callable[[int], str]) -> list[Finding]:
    """Within one source: records that stand twice, nearly twice, and questions with several answers."""
    _, first, same = np.unique(facts.hashes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[same] != np.arange(len(same)))
    groups = near_groups(facts.signatures)
    near = np.flatnonzero(groups != np.arange(len(groups)))
    near = near[~np.isin(near, again)]
    unique = np.unique(np.stack([facts.prompts, facts.hashes], 1), axis=0)
    _, answers = np.unique(unique[:, 0], return_counts=True)
    pairs = lambda these, origin: [same_as(where(i), where(origin[i])) for i in these[:SHOWN].tolist()]
    return [
        Finding("exact duplicates", f"{len(again):,}", pairs(again, first[same]), len(again) > 0),
        Finding("near-duplicates", f"{len(near):,}", pairs(near, groups), len(near) > 0),
        Finding("questions with several answers", f"{int((answers > 1).sum()):,}"),
    ]


def same_as(one: str, other: str) -> str:
    """ "a.json record 7 is record 5"; two files are both named."""
    file = one.rsplit(" ", 2)[0]
    return f"{one} is {other.removeprefix(file + ' ')}"


def overlap(mine: Survey, other: Survey, name: str, where: Callable, where_other: Callable) -> list[Finding]:
    """Between a source and one that validates or tests."""
    exact = np.flatnonzero(np.isin(other.hashes, mine.hashes))
    asked = int(np.isin(other.prompts, mine.prompts).sum())
    groups = near_groups(np.concatenate([mine.signatures, other.signatures]))
    split = len(mine.hashes)
    near = np.flatnonzero(np.isin(groups[split:], groups[:split]))
    near = near[~np.isin(near, exact)]
    of = f" of {len(other.hashes):,} in {name}"
    return [
        Finding("exact overlap", f"{len(exact):,}{of}", [where_other(i) for i in exact[:SHOWN]], len(exact) > 0),
        Finding("near overlap", f"{len(near):,}{of}", [where_other(i) for i in near[:SHOWN]], len(near) > 0),
        Finding("same question", f"{asked:,}{of}", warns=asked > 0),
    ]


def contents(facts: Survey, rows: Rows) -> list[Finding]:
    """Answers, labels, scripts, control tokens, addresses and secrets."""
    dropped = {reason: count for reason, count in rows.stats.dropped.items() if reason.startswith("empty")}
    one_word, control = (int((rows.records[:, 2] & sign > 0).sum()) for sign in (ONE_WORD, CONTROL))
    where = [rows.where(i) for i in np.flatnonzero(rows.records[:, 2] & CONTROL)[:SHOWN]]
    total = max(1, len(facts.hashes))
    lines = [
        Finding("empty, left out", f"{sum(dropped.values()):,}", warns=bool(dropped)),
        Finding("answers of one word", f"{one_word:,}", facts.examples.get("one word", [])),
        Finding("control tokens spelled in text", f"{control:,} (kept as plain text)", where, control > 0),
        Finding("scripts", ", ".join(f"{s} {n / total:.1%}" for s, n in facts.scripts.most_common(6))),
    ]
    if labels := classes(facts):
        most, least = labels[0], labels[-1]
        shown = ", ".join(f"{one_line(label)} {n / total:.1%}" for label, n in labels[:12])
        more = f", ... {len(labels):,} in all" if len(labels) > 12 else ""
        balance = f"; most to least {most[1]:,} to {least[1]:,}"
        lines.append(Finding("labels", shown + more + balance, warns=most[1] > 10 * least[1]))
    for kind, count in facts.private.most_common():
        lines.append(Finding(f"looks like: {kind}", f"{count:,}", facts.examples[kind], True))
    if not facts.private:
        lines.append(Finding("addresses and secrets", "none found"))
    return [line for line in lines if line.value]


def classes(facts: Survey) -> list[tuple[str, int]]:
    """The answers and how often each is given, the commonest first, where they look like classes."""
    total = sum(facts.answers.values())
    short = facts.classes and total >= 20 and not facts.answers[""]
    return facts.answers.most_common() if short and 2 <= len(facts.answers) <= min(LABELS, total // 4) else []


def lengths(rows: Rows, seq_len: int, last_only: bool) -> list[Finding]:
    whole = np.diff(rows.starts)
    data = cut([rows], seq_len, last_only)
    at = [int(each) for each in np.percentile(whole, (0, 50, 90, 99, 100))]
    names = ("shortest", "median", "90 %", "99 %", "longest")
    trained = int((rows.spans[:, 1] - rows.spans[:, 0])[rows.weights > 0].sum()) if len(rows.spans) else 0
    lines = [
        Finding("tokens", f"{len(rows.ids):,}, of which {trained / max(1, len(rows.ids)):.1%} trained"),
        Finding("tokens a record", ", ".join(f"{name} {value:,}" for name, value in zip(names, at, strict=True))),
    ]
    lost = "; ".join(f"{count:,} records {reason}" for reason, count in data.dropped.items())
    texts = int((rows.records[:, 2] & CHAT == 0).sum())
    if pieces := len(data) - int((rows.records[:, 2] & CHAT > 0).sum()) if texts else 0:
        lost = "; ".join(filter(None, [lost, f"plain text comes in {pieces:,} pieces of up to so many tokens"]))
    lines.append(Finding(f"--seq-len {seq_len:,}", lost or "holds every record whole", warns=bool(data.dropped)))
    return lines


def histogram(values: np.ndarray, bars: int = 12) -> list[tuple[str, int]]:
    """(label, count) of bins whose edges grow by a factor."""
    low, high = max(1, int(values.min())), int(values.max()) + 1
    edges = np.unique(np.geomspace(low, high, bars + 1).round().astype(np.int64))
    edges = edges if len(edges) > 1 else np.array([low, high])
    counts, _ = np.histogram(values, edges)
    return [(f"{a:,} to {b - 1:,}", int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]


# ---- what training says at its start ----


def quick_checks(train: Dataset, val: Dataset) -> list[str]:
    """Three lines out of the token rows: repeats, lengths, contents."""
    mine, other = (unique_rows(data) for data in (train, val))
    _, copies = np.unique(mine["contents"], return_counts=True)
    # of a text some pieces may validate and others not
    asked = other["contents"][other["signs"] & CHAT > 0]
    twice, shared = int((copies - 1).sum()), int(np.isin(asked, mine["contents"]).sum())
    pairs = np.unique(np.stack([mine["prompts"], mine["contents"]], 1), axis=0)[:, 0]
    several = int((np.unique(pairs, return_counts=True)[1] > 1).sum())
    at = [int(each) for each in np.percentile(train.lengths, (50, 99, 100))]
    signs = {
        "answers of one word": ONE_WORD,
        "control tokens spelled in text": CONTROL,
        "addresses or secrets": PRIVATE,
    }
    counts = {name: int((mine["signs"] & sign > 0).sum()) for name, sign in signs.items()}
    held = ", ".join(f"{count:,} with {name}" for name, count in counts.items() if count)
    return [
        "WARNING: " * (shared > 0)
        + f"{twice:,} records are repeats, {shared:,} of {len(asked):,} that validate are trained on as well, "
        + f"{several:,} questions have several answers",
        f"tokens an example: median {at[0]:,}, 99 % up to {at[1]:,}, longest {at[2]:,}",
        f"records: {held or 'none with addresses, secrets or control tokens'}; `data.py inspect` says more",
    ]


def unique_rows(data: Dataset) -> dict[str, np.ndarray]:
    """Hashes and signs of the records that examples come from, each once."""
    pieces = data.examples
    parts = {"contents": [], "prompts": [], "signs": []}
    for number, rows in enumerate(pieces.rows):
        mine = np.unique(pieces.row[pieces.source == number])
        parts["contents"].append(rows.contents[mine])
        parts["prompts"].append(rows.prompts[mine])
        parts["signs"].append(rows.records[mine, 2])
    return {name: np.concatenate(each) for name, each in parts.items()}


# ---- how it looks ----


def spans_of(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """The example's text in runs of trained and untrained tokens."""
    trained = np.asarray(example.loss_weights) > 0
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(trained)]
    for a, b in pairwise(edges):
        yield "".join(tokenizer.stream([int(i) for i in example.ids[a:b]], first=a == 0)), bool(trained[a])


def in_terminal(example: Example, tokenizer: Tokenizer, colour: bool) -> str:
    show = lambda text: "\n".join(printable(line) for line in text.split("\n"))
    if colour:
        return "".join(f"{GREEN if yes else DIM}{show(text)}{PLAIN}" for text, yes in spans_of(example, tokenizer))
    return "".join(f"[[{show(text)}]]" if yes else show(text) for text, yes in spans_of(example, tokenizer))


# By this line a page of this program is known: no other file is overwritten.
PAGE_MARK = '<meta name="generator" content="plaintune">'


def page(title: str, parts: list[tuple[str, list[Finding]]], bins, examples, tokenizer: Tokenizer) -> str:
    """Returns the whole report as one HTML file that loads nothing, rendered from dataset/page.html.jinja.

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
    return environment.get_template("page.html.jinja").render(
        title=title,
        tokenizer=tokenizer,
        parts=parts,
        bins=bins,
        largest_count=max(count for _, count in bins),
        examples=[(example, list(spans_of(example, tokenizer))) for example in examples],
    )


def one_line(text: str) -> str:
    return console.one_line(text, 30)


# ---- the commands ----


def main(load_tokenizer: Callable[[str | None, str | None], tuple[Tokenizer, int]]) -> None:
    """Runs `data.py inspect`, `convert` or `split`. load_tokenizer: from --model and --template to a tokenizer and the
    number of positions of its model."""
    args = arguments()
    if args.command == "inspect":
        inspect(args, *load_tokenizer(args.model, args.template))
    elif args.command == "convert":
        convert(args)
    else:
        split(args)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="data.py", description="Look at data, or rewrite it.", allow_abbrev=False)
    add = parser.add_argument
    add("command", choices=["inspect", "convert", "split"], help="what stands in files; as messages; in three files")
    add("files", nargs="+", metavar="FILE", help="files or folders of any known format")
    add("--trees", choices=[*TREES], default="best", help="of OASST trees: which paths (default: best)")
    add("--map", metavar="FILE.py:NAME", help="your function that every record goes through first")
    add("--model", metavar="M", help="inspect: whose tokenizer and template (default: the default base's)")
    add("--template", help="inspect: chat template in place of the model's own")
    add("--train-on", choices=[*TRAIN_ON], help="inspect: whose turns are trained (default: answers)")
    add(
        "--seq-len",
        type=int,
        metavar="N",
        help="inspect: of what is cut or dropped (default: as train.py)",
    )
    add("--against", nargs="+", metavar="FILE", help="inspect: files that validate or test, to find overlaps with")
    add("--show", type=int, metavar="K", help="inspect: examples to show of each file (default: 3)")
    add("--html", metavar="PAGE", help="inspect: write the report as an HTML page as well")
    add("--out", metavar="PATH", help="convert: the JSONL file; split: the folder")
    add("--val", type=float, metavar="F", help="split: share of the records that validate (default: 0.05)")
    add("--test", type=float, metavar="F", help="split: share of the records that test (default: 0.05)")
    args = cli.parse_args(parser, argv)
    belongs = {"inspect": ("model", "template", "train_on", "seq_len", "against", "show", "html"),
               "convert": ("out",), "split": ("out", "val", "test")}  # fmt: skip
    for flag in {name for names in belongs.values() for name in names} - {*belongs[args.command]}:
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')}: means nothing to `{args.command}`")
    if args.command != "inspect" and args.out is None:
        raise UserError(f"`{args.command}` wants --out")
    if args.command == "convert" and not args.out.endswith(".jsonl"):
        raise UserError(f"--out {args.out}: what convert writes is JSONL; name it so")
    if args.html and not Path(args.html).resolve().parent.is_dir():
        raise UserError(f"--html {args.html}: there is no such folder")
    if args.command != "inspect" and Path(args.out).exists():
        raise UserError(f"--out {args.out}: is there already; name another")
    args.map = Map(args.map) if args.map else None
    if args.seq_len is not None and args.seq_len < 2:
        raise UserError(f"--seq-len {args.seq_len}: must be 2 or more")
    if args.show is not None and args.show < 0:
        raise UserError(f"--show {args.show}: must be 0 or more")
    args.val, args.test = (0.05 if share is None else share for share in (args.val, args.test))
    if args.val < 0 or args.test < 0 or args.val + args.test >= 1:
        raise UserError(f"--val {args.val:g} --test {args.test:g}: shares of 0 or more, together below 1")
    return args


def inspect(args: argparse.Namespace, tokenizer: Tokenizer, max_positions: int) -> None:
    """Prints what stands in the files, as a model of this tokenizer and so many positions will see it."""
    seq_len = args.seq_len or min(2048, max_positions)
    roles, last_only = TRAIN_ON[args.train_on or "answers"]
    others = [(file, read_other(file, args)) for file in args.against or ()]
    parts, all_lengths, shown, findings = [], [], [], 0
    for file in args.files:
        source = open_source(file, args.trees, args.map)
        rows = tokenized_rows(source, tokenizer, roles)
        facts = survey(source)
        where = partial(place, source, facts)
        lines = [*lengths(rows, seq_len, last_only), *duplicates(facts, where), *contents(facts, rows)]
        for name, (other, other_source) in others:
            lines += overlap(facts, other, name, where, partial(place, other_source, other))
        parts.append((source.summary(rows.stats), lines))
        all_lengths.append(np.diff(rows.starts))
        examples = cut([rows], seq_len, last_only).examples
        count = 3 if args.show is None else args.show
        picks = np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int) if len(examples) else ()
        shown += [examples[i] for i in picks]
        findings += sum(line.warns for line in lines)
    bins = histogram(np.concatenate(all_lengths))
    print_report(parts, bins, shown, tokenizer)
    if args.html:
        check_overwritable(args.html)
        html = page(", ".join(Path(file).name for file in args.files), parts, bins, shown, tokenizer)
        with atomic_file(Path(args.html)) as tmp:
            tmp.write_text(html, encoding="utf-8")
        print(f"page      {args.html}")


def check_overwritable(file: str) -> None:
    """Raises UserError if --html names a file that exists and is no page of this program."""
    if not Path(file).exists():
        return
    beginning = Path(file).read_text(encoding="utf-8", errors="replace")[:200]
    if PAGE_MARK not in beginning:
        raise UserError(f"--html {file}: the file exists and is no page of this program; give another name")


def read_other(file: str, args: argparse.Namespace) -> tuple[Survey, Source]:
    source = open_source(file, args.trees, args.map)
    return survey(source), source


def place(source: Source, facts: Survey, i: int) -> str:
    container, number = facts.places[i]
    return source.containers[container].place(int(number))


def print_report(parts, bins, examples, tokenizer: Tokenizer) -> None:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for summary, findings in parts:
        print(summary)
        for finding in findings:
            print(f"  {'!' if finding.warns else ' '} {finding.name:32} {finding.value}")
            for each in finding.examples:
                print(f"        {console.one_line(each, 110)}")
    print("\ntokens a record")
    most, wide = max(count for _, count in bins), max(len(name) for name, _ in bins)
    for name, count in bins:
        print(f"  {name:>{wide}}  {count:>9,}  {'#' * round(40 * count / most)}")
    if examples:
        print(f"\nas the model sees them, by the template of {tokenizer.template_name};"
              f" trained: {f'{GREEN}green{PLAIN}' if colour else '[[in brackets]]'}")  # fmt: skip
    for example in examples:
        print(f"\n--- {printable(example.source)}, {len(example.ids):,} tokens")
        print(in_terminal(example, tokenizer, colour))


def as_json(record: Record) -> str:
    """A record as a line of clean JSONL, of which dataset/formats.py makes the same record again; of a text's part, a
    part.
    """
    if record.messages is None:
        text = json.dumps(record.text, ensure_ascii=False)[1:-1]
        return '{"text": "' * record.first + text + '"}\n' * record.last
    tools = {"tools": record.tools} if record.tools else {}
    weights = record.weights or [1.0] * len(record.messages)
    # the record's own is what weighs turns that are no answers
    own = next((w for w, t in zip(weights, record.messages, strict=True) if w and t["role"] != "assistant"), 1.0)
    turns = [turn if weight == own else turn | {"weight": weight / own}
             for turn, weight in zip(record.messages, weights, strict=True)]  # fmt: skip
    if record.rejected is not None:
        made = {"prompt": turns[: record.asked], "chosen": turns[record.asked :], "rejected": record.rejected}
    else:
        made = {"messages": turns} | ({} if record.label is None else {"label": record.label})
    made |= {} if own == 1 else {"weight": own}
    return json.dumps(made | tools, ensure_ascii=False) + "\n"


def all_records(args: argparse.Namespace) -> Iterator[Record]:
    """Of one kind, for a file of two could not be read again."""
    first = None
    for file in args.files:
        source, stats = open_source(file, args.trees, args.map), ReadStats()
        for record in source.records(stats):
            kind = (record.messages is None, record.rejected is None, record.label is None)
            if kind != (first := first or kind):
                raise UserError(f"{record.where}: is of another kind than what stands before it; write two files")
            yield record
        print(f"data      {source.summary(stats)}")


def convert(args: argparse.Namespace) -> None:
    count = 0
    with atomic_file(Path(args.out)) as tmp, open(tmp, "w", encoding="utf-8") as file:
        for record in all_records(args):
            file.write(as_json(record))
            count += record.last
    print(f"written   {args.out}: {count:,} records")


def split(args: argparse.Namespace) -> None:
    """A record's side follows from a hash of its group of near-duplicates and equal questions, so that neither seed nor
    order matters, and what is alike is on one side."""
    sources = [open_source(file, args.trees, args.map) for file in args.files]
    surveys = [survey(source) for source in sources]
    groups = near_groups(np.concatenate([each.signatures for each in surveys]))
    prompts = np.concatenate([each.prompts for each in surveys])
    hashes = np.concatenate([each.hashes for each in surveys])
    smallest = joined(groups, prompts, hashes)
    with np.errstate(over="ignore"):  # anew, for the smallest of several numbers is no longer any
        drawn = smallest * FACTORS[0]
    sides, counts = np.digitize(drawn / 2.0**64, [1 - args.val - args.test, 1 - args.test]), Counter()
    with atomic_folder(Path(args.out)) as tmp:
        names = ("train", "val", "test")
        files = [open(tmp / f"{name}.jsonl", "w", encoding="utf-8") for name in names]  # noqa: SIM115
        try:
            drawn, side = iter(sides.tolist()), 0
            for record in all_records(args):
                new = next(drawn, None)
                if new is None:
                    raise UserError(f"{record.where}: was not there a moment ago; is the file being written?")
                side = new if record.first else side  # a long text's parts stay together
                files[side].write(as_json(record))
                counts[names[side]] += record.last
        finally:
            for file in files:
                file.close()
        for name, share in zip(names, (1.0, args.val, args.test), strict=True):
            if not counts[name] and share:
                raise UserError(f"{name}.jsonl would be empty: {len(np.unique(smallest)):,} groups of records that are"
                                " alike are too few to part")  # fmt: skip
            if not counts[name]:
                (tmp / f"{name}.jsonl").unlink()
    print(f"written   {args.out}: " + ", ".join(f"{name}.jsonl {counts[name]:,}" for name in names if counts[name])
          + f"; {len(np.unique(smallest)):,} groups of records that are alike")  # fmt: skip


def joined(groups: np.ndarray, prompts: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Of each record a hash that all have which are linked to it by a group or by an equal question: the smallest."""
    smallest = hashes.copy()
    while True:
        before = smallest.copy()
        for keys in (groups, prompts):
            _, inverse = np.unique(keys, return_inverse=True)
            least = np.full(inverse.max() + 1, np.iinfo(np.uint64).max, np.uint64)
            np.minimum.at(least, inverse, smallest)
            smallest = least[inverse]
        if np.array_equal(before, smallest):
            return smallest
