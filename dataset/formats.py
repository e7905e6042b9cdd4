"""The table of record formats, and reading files of any of them. The format of a file is recognized by its keys.

    messages          {"messages": [{"role", "content"}, ...]}, as OpenAI has it, with tools and tool calls
    ShareGPT          {"conversations": [{"from", "value"}, ...]}
    Alpaca            {"instruction", "output"}; optionally "input", "system", "history"
    Dolly             {"instruction", "response"}; optionally "context"
    two columns       {"prompt", "completion"}, {"question", "answer"} (GSM8K), {"document", "summary"}, ...: PAIRS
    with a context    {"context", "question", "answer"}; SQuAD, flat or in its nested file; PubMedQA
    classes           {"text", "label"}, also as CSV or TSV
    OASST             trees of ranked replies, nested, or as messages with parent ids: oasst.py
    preferences       {"chosen", "rejected"} with a "prompt" or "conversations"; KTO's "label": preferences.py
    plain text        {"text"}, or whole .txt and .md files

A format is one row of `FORMATS`: its keys, and a function from a record of the file to `Record`s. The keys of the first
record decide which format a file has, and every other record must have these keys too.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from common.errors import UserError, printable
from dataset.messages import (
    closest_key,
    quote_names,
    require_field,
    require_object,
    type_name,
    without_surrogate,
)
from dataset.oasst import OASST_MESSAGES, oasst_tree
from dataset.preferences import kto, preference
from dataset.readers import Container, Text, open_containers
from dataset.records import Format, Reading, ReadStats, Record, prompt_weights


@dataclass
class Source:
    """A file, or a folder of files, whose format is known and whose records can be read.

    path: the file or folder. format: a row of FORMATS. containers: its files.
    others: the number of files in the folder that are of no known kind.
    trees: which paths of OASST trees are read, one of oasst.TREES.
    map: the user's function that every record goes through first, or None.
    """

    path: str
    format: Format
    containers: list[Container]
    others: int
    trees: str
    map: "Map | None" = None

    def payloads(self) -> Iterator[tuple[int, int, object]]:
        """Yields (index of the container, number of the record in it, payload) for each record, undecoded."""
        for i, container in enumerate(self.containers):
            payloads = container.payloads()
            if self.format.group:
                payloads = self.format.group(container, payloads)
            for number, payload in payloads:
                yield i, number, payload

    def read(self, container: int, number: int, payload: object, stats: ReadStats) -> list[Record]:
        """Returns the records of one payload, and counts them and what is left out in `stats`.

        The arguments in front are what `payloads` yields. Raises UserError that names the record.
        """
        place = self.containers[container].place(number)
        value = self.containers[container].value(number, payload)
        values = [value] if self.map is None else self.map(value, place, stats)
        records = []
        for each in values:
            for record in self.format.records(each, place, stats, self.trees):
                empty = empty_part(record)
                if empty:
                    stats.dropped[f"empty {empty}"] += 1
                else:
                    records.append(record)
        stats.records += len(records)
        return records

    def records(self, stats: ReadStats) -> Iterator[Record]:
        """Yields all records, and counts them in `stats`. Raises UserError that names a record, or if there is none."""
        for container, number, payload in self.payloads():
            yield from self.read(container, number, payload, stats)
        stats.complain_if_empty(self.path)

    def read_all(self, stats: ReadStats | None = None) -> list[Record]:
        """Returns all records at once, where they are few; data.py reads large files in another way.

        stats: counts what is read and left out; None if it is of no interest. Raises as `records` does.
        """
        return list(self.records(ReadStats() if stats is None else stats))

    def summary(self, stats: ReadStats) -> str:
        """Returns one line: `a.json: Alpaca (JSON, 997 records), dropped 2 (empty answer), ignored keys 'id'`."""
        kinds = ", ".join(sorted({container.kind for container in self.containers}))
        files = f"{len(self.containers):,} files of " if Path(self.path).is_dir() else ""
        unit = "record" if stats.records == 1 else "records"
        line = (
            f"{printable(self.path)}: {self.format.name} ({files}{kinds}, {stats.records:,} {unit})"
        )
        if self.map:
            line += f", through {self.map.name}"
        if "OASST" in self.format.name:
            paths = "all paths" if self.trees == "all" else f"{self.trees} path"
            line += f", {paths} of each tree"
        for reason, count in stats.dropped.items():
            line += f", dropped {count:,} ({printable(reason[:160])})"
        for what, count in stats.altered.items():
            line += f", {count:,} {what}"
        if self.others:
            line += f", {self.others:,} other files left alone"
        if stats.ignored:
            line += f", ignored keys {quote_names(stats.ignored)}"
        return line


class Map:
    """The user's function of --map FILE.py:NAME, which every record goes through before its format is recognized.

    It gets an object ({"text"} for plain text), and returns an object of any known format, a list of them, or None to
    leave the record out. It runs with no protection, because it is the user's own.
    """

    def __init__(self, name: str):
        """Imports the file. name: FILE.py:NAME. Raises UserError if it can't be imported or has no such function."""
        self.name = name
        file, _, function = name.rpartition(":")
        if Path(name).is_file():
            raise UserError(f"--map {name}: names no function of the file; FILE.py:NAME is wanted")
        if not Path(file).is_file():
            raise UserError(
                f"--map {name}: FILE.py:NAME is wanted, and there is no file {file or name}"
            )
        spec = spec_from_file_location("user_map", file)
        if spec is None:
            raise UserError(f"--map {name}: {file} is no Python file")
        module = module_from_spec(spec)
        sys.modules["user_map"] = module
        sys.path.append(
            str(Path(file).resolve().parent)
        )  # so that it can import the files next to it
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # noqa: BLE001  a user's program may fail in any way
            raise UserError(f"--map {name}: {type(error).__name__}: {error}") from None
        self.function = getattr(module, function, None)
        if not callable(self.function):
            raise UserError(f"--map {name}: {file} has no function {function}")

    def __call__(self, value: object, where: str, stats: ReadStats) -> list:
        """Returns the records that the function makes of one. Raises UserError if it fails or returns anything else."""
        is_text = isinstance(value, Text)
        argument = {"text": value.text} if is_text else require_object(value, where)
        try:
            result = self.function(argument)
        except (Exception, SystemExit) as error:  # noqa: BLE001
            raise UserError(
                f"{where}: --map {self.name}: {type(error).__name__}: {error}"
            ) from None

        # The parts of a long text are put together again, so each must stay a text.
        if is_text and not (value.first and value.last):
            if not (
                isinstance(result, dict)
                and result.keys() == {"text"}
                and isinstance(result["text"], str)
            ):
                raise UserError(
                    f'{where}: --map {self.name}: a text this long is read in parts; of each part {{"text": string}} is'
                    " wanted"
                )
            return [value._replace(text=result["text"])]

        if result is None or result == []:
            stats.dropped["left out by --map"] += 1
            return []
        records = result if isinstance(result, list) else [result]
        wrong = [each for each in records if not isinstance(each, dict)]
        if wrong:
            raise UserError(
                f"{where}: --map {self.name} gives {type_name(wrong[0])}; a dict, a list of them, or None is wanted"
            )
        return records


def open_source(path: Path | str, trees: str = "best", map_fn: Map | None = None) -> Source:
    """Recognizes a file, or all files of a folder, by the keys of the first record.

    path: a file in UTF-8, with or without byte order mark, with any line ends; blank lines between the records of JSONL
        are skipped. Or a folder of such files.
    trees: which paths of OASST trees are read, one of oasst.TREES.
    map_fn: the user's function that every record goes through first.

    Raises UserError that names the file, or the record by its number: not UTF-8, not JSON, an unknown format, empty.
    """
    containers, num_others = open_containers(path)
    for container in containers:
        for number, payload in container.payloads():
            value = container.value(number, payload)
            place = container.place(number)
            # The function may return several records or none; the first one decides.
            values = [value] if map_fn is None else map_fn(value, place, ReadStats())
            if not values:
                continue
            format = _format_of(values[0], place)
            if map_fn and format.group:
                raise UserError(
                    f"{path}: --map sees one message of {format.name} at a time; convert the file first"
                )
            return Source(str(path), format, containers, num_others, trees, map_fn)
    why = "is an empty list"
    if map_fn is not None:
        why = f"--map {map_fn.name} gives None for every record of it"
    raise UserError(f"{path}: {why}; nothing to train on")


def empty_part(record: Record) -> str | None:
    """Returns the part of a record that is empty, "text" or "answer", or None.

    Such a record would teach the model to answer nothing.
    """
    if record.messages is None:
        is_empty = not record.text or record.text.isspace()
        return "text" if is_empty else None
    messages = record.messages
    if record.rejected is not None:
        messages = [*messages, *record.rejected]
    for message in messages:
        if message["role"] == "assistant" and _is_empty_answer(message):
            return "answer"
    return None


def _is_empty_answer(message: dict) -> bool:
    content = message.get("content")
    has_content = bool(content) and not content.isspace()
    return not has_content and not message.get("tool_calls")


# ---- conversations ----


def _messages(reading: Reading) -> list[Record]:
    """Reads OpenAI's {"messages"}; the weight of an answer may be 0 or any number."""
    messages, weights = reading.read_messages(
        require_field(reading.record, "messages", list, reading.where)
    )
    messages, weights = reading.with_system(messages, weights)
    return reading.answered_conversation(messages, weights)


def _sharegpt(reading: Reading) -> list[Record]:
    """Reads ShareGPT's {"conversations"}."""
    values = require_field(reading.record, "conversations", list, reading.where)
    messages, weights = reading.read_messages(values, "conversations")
    messages, weights = reading.with_system(messages, weights)
    return reading.answered_conversation(messages, weights)


# ---- a question and an answer ----


def _join_parts(*parts: str) -> str:
    """Returns the parts of a question, separated by blank lines, without those that are blank."""
    return "\n\n".join(part for part in parts if part.strip())


def _question_and_answer(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _alpaca(reading: Reading) -> list[Record]:
    """Reads Alpaca (Taori et al. 2023): the question is the instruction, a blank line and the input, if any."""
    record, where = reading.record, reading.where
    messages = []
    if reading.optional_text("system"):
        messages.append({"role": "system", "content": record["system"]})
    history = require_field(record, "history", list, where) if record.get("history") else []
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
            raise UserError(
                f"{where}: history holds {type_name(pair)}, [question, answer] pairs of strings are wanted"
            )
        question, answer = (without_surrogate(part, f"{where} history {number}") for part in pair)
        messages += _question_and_answer(question, answer)
    question = _join_parts(reading.text("instruction"), reading.optional_text("input"))
    messages += _question_and_answer(question, reading.text("output"))
    return reading.conversation(messages)


def _dolly(reading: Reading) -> list[Record]:
    """Reads Dolly (Conover et al. 2023): the question is the instruction, a blank line and the context, if any."""
    question = _join_parts(reading.text("instruction"), reading.optional_text("context"))
    return reading.conversation(_question_and_answer(question, reading.text("response")))


def _two_columns(question_key: str, answer_key: str) -> Callable[[Reading], list[Record]]:
    """Returns the function that reads a question and an answer: strings, or messages, as trl has them."""

    def read(reading: Reading) -> list[Record]:
        record = reading.record
        if isinstance(record[question_key], list) or isinstance(record[answer_key], list):
            answer, answer_weights = reading.messages_at(answer_key, "assistant")
            prompt, weights = reading.with_system(*reading.messages_at(question_key, "user"))
            weights = prompt_weights(prompt, weights)
            return reading.answered_conversation([*prompt, *answer], [*weights, *answer_weights])
        messages = _question_and_answer(reading.text(question_key), reading.text(answer_key))
        return reading.conversation(*reading.with_system(messages, [1.0, 1.0]))

    return read


# ---- a question about a text ----


def _context(reading: Reading) -> list[Record]:
    """Reads a question about a text: the text, a blank line, the question.

    The answer is a string, a list of them, or SQuAD's object; the first of several is taken. A question without an
    answer can't be answered from the text, and is left out.
    """
    record = reading.record
    value = record["answers"] if "answers" in record else record["answer"]
    if isinstance(value, dict):
        value = value.get("text")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(each, (str, dict)) for each in value):
        raise UserError(
            f"{reading.where}: answer is {type_name(value)}, a string or a list of strings is wanted"
        )
    if not value:
        reading.stats.dropped["without an answer"] += 1
        return []
    answer = value[0]
    if isinstance(answer, dict):
        answer = require_field(answer, "text", str, reading.where)
    question = _join_parts(reading.text("context"), reading.text("question"))
    without_surrogate(answer, f"{reading.where}: answer")
    return reading.conversation(_question_and_answer(question, answer))


def _squad(reading: Reading) -> list[Record]:
    """Reads SQuAD's file (Rajpurkar et al. 2016): articles of paragraphs, and questions about each paragraph."""
    records = []
    for a, article in enumerate(require_field(reading.record, "data", list, reading.where), 1):
        article = require_object(article, reading.where)
        for p, paragraph in enumerate(require_field(article, "paragraphs", list, reading.where), 1):
            place = f"{reading.where} article {a} paragraph {p}"
            context = require_field(require_object(paragraph, place), "context", str, place)
            for q, question in enumerate(require_field(paragraph, "qas", list, place), 1):
                record = require_object(question, place) | {"context": context}
                where = f"{place} question {q}"
                require_field(record, "question", str, where)
                require_field(record, "answers", list, where)
                records += _context(Reading(record, where, reading.stats, reading.trees))
    return records


def _pubmedqa(reading: Reading) -> list[Record]:
    """Reads PubMedQA (Jin et al. 2019): the parts of an abstract and a question about it; the long answer."""
    parts = require_field(reading.record, "CONTEXTS", list, reading.where)
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f"{reading.where}: CONTEXTS holds what is no string")
    for part in parts:
        without_surrogate(part, reading.where)
    question = _join_parts(*parts, reading.text("QUESTION"))
    return reading.conversation(_question_and_answer(question, reading.text("LONG_ANSWER")))


# ---- classes and plain text ----


def _classes(text_key: str, label_key: str) -> Callable[[Reading], list[Record]]:
    """Returns the function that reads a text and its class: the text is the question, the class the answer."""

    def read(reading: Reading) -> list[Record]:
        label = reading.record[label_key]
        if isinstance(label, (bool, float)) or not isinstance(label, (str, int)):
            fault = f"{label_key} is {type_name(label)}, a string or a whole number is wanted"
            raise UserError(f"{reading.where}: {fault}")
        answer = without_surrogate(str(label), f"{reading.where}: {label_key}")
        return reading.conversation(_question_and_answer(reading.text(text_key), answer))

    return read


def _plain(reading: Reading) -> list[Record]:
    """Reads {"text"}, or a part of a plain-text file."""
    part = reading.record
    if isinstance(part, Text):
        return [Record(None, part.text, reading.where, first=part.first, last=part.last)]
    return [Record(None, reading.text("text"), reading.where)]


# ---- the table of formats ----

# Columns of a question and an answer. A record that has several of these pairs is read by the first one.
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
    ("input", "output"), ("problem", "solution"), ("document", "summary"), ("dialogue", "summary"),
    ("article", "highlights"), ("source", "target"), ("text", "code"),
)  # fmt: skip
CLASSES = (
    ("text", "label"),
    ("sentence", "label"),
    ("text", "category"),
    ("text", "intent"),
)  # columns of classes
CHAT = ("system", "tools", "functions", "weight")  # optional keys of conversations
# The first row that fits wins: Stanford's own Alpaca file has a rendered "text" in each record, next to instruction and
# output, and is no plain text.
FORMATS = (
    Format(
        "preferences",
        ("chosen", "rejected"),
        ("prompt", "conversations", "messages", *CHAT),
        preference,
    ),
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
# The formats that the error about an unknown one lists.
COMMON = (
    "messages",
    "ShareGPT",
    "Alpaca",
    "prompt and completion",
    "text and its label",
    "preferences",
    "plain text",
)


def _format_of(value: object, where: str) -> Format:
    """Returns the first format of the table that fits a value. Raises UserError with the known ones if none does."""
    for format in FORMATS:
        if isinstance(value, format.kind) and format.fits(value):
            return format
    record = require_object(value, where)
    all_keys = [key for format in FORMATS for key in format.keys]
    hint = closest_key(record, all_keys, record)
    known = ", ".join(
        f"{format.name} ({', '.join(format.keys)})" for format in FORMATS if format.name in COMMON
    )
    raise UserError(
        f"{where}: keys {quote_names(record)}: no known format; known: {known}, and more at the head of"
        f" dataset/formats.py; --map FILE.py:NAME makes one of them{hint}"
    )
