"""The record formats that people have, recognised by looking, read into one: a list of messages, or a text.

    messages          {"messages": [{"role", "content"}, ...]}, as OpenAI has it, with tools and tool calls
    ShareGPT          {"conversations": [{"from", "value"}, ...]}
    Alpaca            {"instruction", "output"} and maybe "input", "system", "history"
    Dolly             {"instruction", "response"} and maybe "context"
    two columns       {"prompt", "completion"}, {"question", "answer"} (GSM8K), {"document", "summary"}, ...: PAIRS
    with a context    {"context", "question", "answer"}; SQuAD, flat or in its nested file; PubMedQA
    classes           {"text", "label"}, also as CSV or TSV
    OASST             trees of ranked replies, nested, or as messages with parent ids: the best path of each, or all
    preferences       {"chosen", "rejected"} with a "prompt" or "conversations", HH-RLHF's transcripts; KTO's "label"
    plain text        {"text"}, or whole .txt and .md files

A format is one row of `FORMATS`: its keys, and a function from a record to `Record`s. The first record's keys decide,
and every other record must have them too. Nothing is lost in silence: what can't be read is an error that names the
record, and what was left out (empty answers, unknown keys) is in `Found`, to be said out loud.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from common.errors import UserError, printable
from dataset.messages import closest_key, quote_names, require_field, require_object, type_name, without_surrogate
from dataset.oasst import OASST_MESSAGES, oasst_tree
from dataset.preferences import kto, preference
from dataset.readers import Container, Text, open_containers
from dataset.records import Format, Reading, ReadStats, Record, answered, asked_before, turn_list, with_system


@dataclass
class Source:
    """A file, or a folder of files, whose format is known and whose records are yet to be read."""

    path: str
    format: "Format"
    containers: list[Container]
    others: int  # files of a folder that are of no known kind
    trees: str  # of OASST trees: which of TREES
    map: "Map | None" = None  # the user's function that records go through first

    def payloads(self) -> Iterator[tuple[int, int, object]]:
        """(number of its container, its number there, payload) of each record."""
        for i, container in enumerate(self.containers):
            payloads = container.payloads()
            for number, payload in self.format.group(container, payloads) if self.format.group else payloads:
                yield i, number, payload

    def read(self, container: int, number: int, payload: object, stats: ReadStats) -> list[Record]:
        """The records of a payload; counts into `found`. Raises UserError that names it."""
        place = self.containers[container].place(number)
        value = self.containers[container].value(number, payload)
        records = []
        for each in [value] if self.map is None else self.map(value, place, stats):
            for record in self.format.records(each, place, stats, self.trees):
                if kind := _nothing_taught(record):
                    stats.dropped[f"empty {kind}"] += 1
                else:
                    records.append(record)
        stats.records += len(records)
        return records

    def records(self, stats: ReadStats) -> Iterator[Record]:
        for each in self.payloads():
            yield from self.read(*each, stats)
        stats.complain_if_empty(self.path)

    def summary(self, stats: ReadStats) -> str:
        """One line to print, e.g. `a.json: Alpaca (JSON, 997 records), dropped 2 (empty answer), ignored keys 'id'`."""
        kinds = sorted({container.kind for container in self.containers})
        files = f"{len(self.containers):,} files of " if Path(self.path).is_dir() else ""
        line = f"{printable(self.path)}: {self.format.name} ({files}{', '.join(kinds)}, {stats.records:,} record"
        line += ")" if stats.records == 1 else "s)"
        line += f", through {self.map.name}" if self.map else ""
        if "OASST" in self.format.name:
            line += f", {self.trees} path{'s' * (self.trees == 'all')} of each tree"
        line += "".join(
            f", dropped {left_out:,} ({printable(reason[:160])})" for reason, left_out in stats.dropped.items()
        )
        line += "".join(f", {count:,} {what}" for what, count in stats.altered.items())
        line += f", {self.others:,} other files left alone" if self.others else ""
        return line + (f", ignored keys {quote_names(stats.ignored)}" if stats.ignored else "")


class Map:
    """--map FILE.py:NAME: a user's function from a record (an object, or {"text"} of a plain text) to a record of any
    known format, a list of them, or None to leave it out. It runs as it is: it is the user's own."""

    def __init__(self, name: str):
        file, _, function = name.rpartition(":")
        self.name, spec = name, None
        if Path(name).is_file():
            raise UserError(f"--map {name}: and which function of it? FILE.py:NAME is wanted")
        if Path(file).is_file() and (spec := spec_from_file_location("user_map", file)) is None:
            raise UserError(f"--map {name}: {file} is no Python file")
        if spec is None:
            raise UserError(f"--map {name}: FILE.py:NAME is wanted, and there is no file {file or name}")
        sys.modules["user_map"] = module = module_from_spec(spec)
        sys.path.append(str(Path(file).resolve().parent))  # for what it imports beside it
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # noqa: BLE001  a user's program may fail in any way
            raise UserError(f"--map {name}: {type(error).__name__}: {error}") from None
        self.function = getattr(module, function, None)
        if not callable(self.function):
            raise UserError(f"--map {name}: {file} has no function {function}")

    def __call__(self, value: object, where: str, stats: ReadStats) -> list:
        part = value if isinstance(value, Text) else None
        try:
            made = self.function(require_object(value, where) if part is None else {"text": part.text})
        except (Exception, SystemExit) as error:  # noqa: BLE001
            raise UserError(f"{where}: --map {self.name}: {type(error).__name__}: {error}") from None
        if part is not None and not (part.first and part.last):
            if not (isinstance(made, dict) and made.keys() == {"text"} and isinstance(made["text"], str)):
                raise UserError(
                    f"{where}: --map {self.name}: of a text this long, which comes in parts, a text is wanted"
                )
            return [part._replace(text=made["text"])]
        if made is None:
            stats.dropped["left out by --map"] += 1
            return []
        made = made if isinstance(made, list) else [made]
        if not all(isinstance(each, dict) for each in made):
            raise UserError(f"{where}: --map {self.name} gives {type_name(made[0])}; a dict, a list of them, or None")
        return made


def open_source(path: Path | str, trees: str = "best", map_fn: Map | None = None) -> Source:
    """Looks at a file, or at a folder's files, and finds the format by the first record. trees: of OASST trees."""
    containers, others = open_containers(path)
    for container in containers:
        for number, payload in container.payloads():
            value = container.value(number, payload)
            place = container.place(number)
            for each in [value] if map_fn is None else map_fn(value, place, ReadStats()):
                format = next((known for known in FORMATS if isinstance(each, known.kind) and known.fits(each)), None)
                if format is None:
                    raise _unknown_format(require_object(each, place), place)
                if map_fn and format.group:
                    raise UserError(
                        f"{path}: --map sees one message of {format.name} at a time; convert the file first"
                    )
                return Source(str(path), format, containers, others, trees, map_fn)
    why = "is an empty list" if map_fn is None else f"--map {map_fn.name} gives None for every record of it"
    raise UserError(f"{path}: {why}; nothing to train on")


@dataclass
class Loaded:
    """All of a source's records at once."""

    records: list[Record]
    source: Source
    stats: ReadStats

    def summary(self) -> str:
        return self.source.summary(self.stats)


def read_records(path: Path | str, trees: str = "best") -> Loaded:
    """All records of a file of any known format, where they are few; data.py reads large files otherwise.

    path: UTF-8, with or without byte order mark, any line ends, blank lines between JSONL records. Records with an
    empty assistant turn, or an empty text, are left out and counted: they would teach to answer nothing.
    Raises UserError with the file and the line or record number: not UTF-8, not JSON, an unknown format, a record of
    another format than the first one's, a missing or wrongly typed field, an unknown role, nothing left to train on.
    """
    source, stats = open_source(path, trees), ReadStats()
    return Loaded(list(source.records(stats)), source, stats)


def _nothing_taught(record: Record) -> str | None:
    """What is empty, of a record whose text, or one of whose answers, is."""
    if record.messages is None:
        return None if record.text and not record.text.isspace() else "text"
    turns = record.messages if record.rejected is None else [*record.messages, *record.rejected]
    return None if all(is_taught(turn) for turn in turns if turn["role"] == "assistant") else "answer"


def is_taught(turn: dict) -> bool:
    content = turn.get("content")
    return bool(turn.get("tool_calls")) or bool(content and not content.isspace())


def _messages(reading: Reading) -> list[Record]:
    """OpenAI's {"messages"}; weights of turns 0 or any number."""
    turns, weights = reading.turns(require_field(reading.record, "messages", list, reading.where))
    return answered(reading, with_system(reading, turns, weights))


def _sharegpt(reading: Reading) -> list[Record]:
    turns, weights = reading.turns(require_field(reading.record, "conversations", list, reading.where), "conversations")
    return answered(reading, with_system(reading, turns, weights))


def _asked(*parts: str) -> str:
    """A question of several parts, with a blank line between those that say something."""
    return "\n\n".join(part for part in parts if part.strip())


def _pair(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _alpaca(reading: Reading) -> list[Record]:
    """Alpaca (Taori et al. 2023): the question is the instruction, and after a blank line the input if there is one."""
    record, where, turns = reading.record, reading.where, []
    if reading.maybe("system"):
        turns.append({"role": "system", "content": record["system"]})
    for number, pair in enumerate(require_field(record, "history", list, where) if record.get("history") else (), 1):
        if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
            raise UserError(f"{where}: history holds {type_name(pair)}, [question, answer] pairs of strings are wanted")
        turns += _pair(*(without_surrogate(part, f"{where} history {number}") for part in pair))
    turns += _pair(_asked(reading.text("instruction"), reading.maybe("input")), reading.text("output"))
    return reading.conversation(turns)


def _dolly(reading: Reading) -> list[Record]:
    """Dolly (Conover et al. 2023): the instruction, and after a blank line the context if there is one."""
    question = _asked(reading.text("instruction"), reading.maybe("context"))
    return reading.conversation(_pair(question, reading.text("response")))


def _two_columns(asks: str, answers: str) -> Callable[[Reading], list[Record]]:
    def read(reading: Reading) -> list[Record]:
        """Strings; or turns, as trl has them."""
        first, second = reading.record[asks], reading.record[answers]
        if isinstance(first, list) or isinstance(second, list):
            turns, weights = turn_list(reading, answers, "assistant")
            prompt, before = asked_before(*with_system(reading, *turn_list(reading, asks, "user")))
            return answered(reading, ([*prompt, *turns], [*before, *weights]))
        turns, weights = with_system(reading, _pair(reading.text(asks), reading.text(answers)), [1.0, 1.0])
        return reading.conversation(turns, weights)

    return read


def _context(reading: Reading) -> list[Record]:
    """A question on a text: the text, a blank line, the question. answer: a string, a list, or SQuAD's object; of
    several the first. Without any it can't be answered from the text, and is left out."""
    record = reading.record
    value = record["answers"] if "answers" in record else record["answer"]
    value = value.get("text") if isinstance(value, dict) else value
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(each, (str, dict)) for each in value):
        raise UserError(f"{reading.where}: answer is {type_name(value)}, a string or a list of strings is wanted")
    if not value:
        reading.stats.dropped["without an answer"] += 1
        return []
    answer = require_field(value[0], "text", str, reading.where) if isinstance(value[0], dict) else value[0]
    question = _asked(reading.text("context"), reading.text("question"))
    return reading.conversation(_pair(question, without_surrogate(answer, f"{reading.where}: answer")))


def _squad(reading: Reading) -> list[Record]:
    """SQuAD's file (Rajpurkar et al. 2016): articles of paragraphs of questions."""
    records = []
    for a, article in enumerate(require_field(reading.record, "data", list, reading.where), 1):
        for p, paragraph in enumerate(
            require_field(require_object(article, reading.where), "paragraphs", list, reading.where), 1
        ):
            place = f"{reading.where} article {a} paragraph {p}"
            context = require_field(require_object(paragraph, place), "context", str, place)
            for q, question in enumerate(require_field(paragraph, "qas", list, place), 1):
                asked = require_object(question, place) | {"context": context}
                for key in ("question", "answers"):
                    require_field(asked, key, list if key == "answers" else str, f"{place} question {q}")
                records += _context(Reading(asked, f"{place} question {q}", reading.stats, reading.trees))
    return records


def _pubmedqa(reading: Reading) -> list[Record]:
    """PubMedQA (Jin et al. 2019): the abstract's parts and the question; the long answer."""
    parts = require_field(reading.record, "CONTEXTS", list, reading.where)
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f"{reading.where}: CONTEXTS holds what is no string")
    question = _asked(*(without_surrogate(part, reading.where) for part in parts), reading.text("QUESTION"))
    return reading.conversation(_pair(question, reading.text("LONG_ANSWER")))


def _classes(text: str, label: str) -> Callable[[Reading], list[Record]]:
    def read(reading: Reading) -> list[Record]:
        """The text asks, the class answers."""
        value = reading.record[label]
        if isinstance(value, (bool, float)) or not isinstance(value, (str, int)):
            raise UserError(f"{reading.where}: {label} is {type_name(value)}, a string or a whole number is wanted")
        answer = without_surrogate(str(value), f"{reading.where}: {label}")
        return reading.conversation(_pair(reading.text(text), answer))

    return read


def _plain(reading: Reading) -> list[Record]:
    part = reading.record
    if isinstance(part, Text):
        return [Record(None, part.text, reading.where, first=part.first, last=part.last)]
    return [Record(None, reading.text("text"), reading.where)]


# Columns that ask and that answer. The names in front of these are looked for first
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
    ("input", "output"), ("problem", "solution"), ("document", "summary"), ("dialogue", "summary"),
    ("article", "highlights"), ("source", "target"), ("text", "code"),
)  # fmt: skip
CHAT = ("system", "tools", "functions", "weight")
CLASSES = (("text", "label"), ("sentence", "label"), ("text", "category"), ("text", "intent"))
# The first row that fits wins: Stanford's own Alpaca file carries a rendered "text" beside its instruction and output.
FORMATS = (
    Format("preferences", ("chosen", "rejected"), ("prompt", "conversations", "messages", *CHAT), preference),
    Format("KTO", ("messages", "label"), CHAT, kto),
    Format("KTO", ("conversations", "label"), CHAT, kto),
    Format("KTO", ("prompt", "completion", "label"), CHAT, kto),
    Format("messages", ("messages",), CHAT, _messages),
    Format("ShareGPT", ("conversations",), CHAT, _sharegpt),
    Format("OASST trees", ("message_tree_id", "prompt"), ("tree_state",), oasst_tree),
    OASST_MESSAGES,
    Format("Alpaca", ("instruction", "output"), ("input", "system", "history", "weight"), _alpaca),
    Format("Dolly", ("instruction", "response"), ("context", "weight"), _dolly),
    Format("SQuAD", ("data",), ("version",), _squad),
    Format("PubMedQA", ("QUESTION", "CONTEXTS", "LONG_ANSWER"), ("weight",), _pubmedqa),
    Format("context and question", ("context", "question", "answers"), ("weight",), _context),
    Format("context and question", ("context", "question", "answer"), ("weight",), _context),
    *(Format(f"{a} and {b}", (a, b), ("system", "weight"), _two_columns(a, b)) for a, b in PAIRS),
    *(Format(f"{a} and its {b}", (a, b), ("weight",), _classes(a, b)) for a, b in CLASSES),
    Format("plain text", ("text",), (), _plain, kind=(dict, Text)),
)
COMMON = ("messages", "ShareGPT", "Alpaca", "prompt and completion", "text and its label", "preferences", "plain text")


def _unknown_format(record: dict, where: str) -> UserError:
    hint = closest_key(record, [key for known in FORMATS for key in known.keys], record)
    common = [f"{known.name} ({', '.join(known.keys)})" for known in FORMATS if known.name in COMMON]
    why = f"no known format; known: {', '.join(common)}, and more at the head of dataset/formats.py"
    why += "; --map FILE.py:NAME makes one of them"
    return UserError(f"{where}: keys {quote_names(record)}: {why}{hint}")
