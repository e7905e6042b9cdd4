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

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from itertools import groupby, takewhile
from pathlib import Path

from common.errors import UserError, printable
from dataset.messages import (
    closest_key,
    json_in,
    note_extra_keys,
    quote_names,
    read_message,
    require_field,
    require_object,
    type_name,
    weight_of,
    without_surrogate,
)
from dataset.readers import Container, Text, open_containers


@dataclass(slots=True)
class Record:
    """One example: messages with an answer in each assistant turn, or else a text.

    messages: [{"role", "content"}, ...], and where there are some "tool_calls" [{"type", "function": {"name",
    "arguments": object}}], "reasoning_content", "name", "tool_call_id". weights: of each message, where not all are 1.
    rejected: of a preference, the messages that stand where `messages` holds the chosen answer, behind so many that
    were `asked`. label: of KTO, whether the answer is a good one. first, last: of a long text's parts.
    """

    messages: list[dict] | None
    text: str | None
    where: str  # "FILE line 3"; for messages about this record
    tools: list[dict] | None = None
    weights: list[float] | None = None
    rejected: list[dict] | None = None
    asked: int = 0
    label: bool | None = None
    first: bool = True
    last: bool = True


REASONS = 12  # that are told apart


@dataclass
class ReadStats:
    """What was found out or left out while records were read."""

    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason: number of records that were left out
    altered: Counter[str] = field(default_factory=Counter)  # what is not as it stands: number of records
    ignored: dict[str, bool] = field(default_factory=dict)  # keys without a meaning here; of a message "messages.KEY"

    def drop(self, reason: str, count: int = 1) -> None:
        """Counts; where a template's words make each reason another one, the first ones only by themselves."""
        known = reason in self.dropped or len(self.dropped) < REASONS
        self.dropped[reason if known else "for other reasons"] += count

    def add(self, other: "ReadStats") -> None:
        self.records += other.records
        for reason, count in other.dropped.items():
            self.drop(reason, count)
        self.altered += other.altered
        self.ignored |= other.ignored

    def complain_if_empty(self, path: str) -> None:
        if not self.records:
            why = "; ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
            raise UserError(f"{path}: " + (f"no record can be trained on ({why})" if why else "is an empty list"))


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
                    raise _misfit(require_object(each, place), place, None)
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


# ---- formats: a record (dict) to Records; `where` is for the error ----


@dataclass(frozen=True)
class Format:
    name: str
    keys: tuple[str, ...]  # a record that has them all has this format
    optional: tuple[str, ...]  # read where present; other keys are ignored and announced
    read: Callable[["Reading"], Iterable[Record]]
    group: Callable[[Container, Iterable], Iterator[tuple[int, object]]] | None = None
    kind: type | tuple = dict

    def fits(self, record: dict) -> bool:
        if isinstance(record, Text):
            return True
        return all(key in record and (key != "label" or record[key] not in (None, "")) for key in self.keys)

    def records(self, value: object, where: str, stats: ReadStats, trees: str) -> Iterable[Record]:
        if not isinstance(value, self.kind) or not self.fits(value):
            raise _misfit(require_object(value, where), where, self)
        if isinstance(value, dict) and not self.group:
            note_extra_keys(value, (*self.keys, *self.optional), where, stats.ignored)
        return self.read(Reading(value, where, stats, trees))


@dataclass
class Reading:
    """A record at hand: what a format's function is given."""

    record: dict
    where: str
    stats: ReadStats
    trees: str

    def text(self, key: str) -> str:
        return require_field(self.record, key, str, self.where)

    def maybe(self, key: str) -> str:
        """The string at a key; "" where it is absent or null."""
        return "" if self.record.get(key) is None else self.text(key)

    def conversation(self, messages: list[dict], weights: list[float] | None = None, **more) -> list[Record]:
        """A Record of plain messages, with the record's weight on each."""
        weight = weight_of(self.record, self.where)
        weights = [1.0] * len(messages) if weights is None else weights
        weights = None if {weight, *weights} == {1.0} else [weight * each for each in weights]
        return [Record(messages, None, self.where, weights=weights, **more)]

    def turns(self, messages: list, key: str = "messages") -> tuple[list[dict], list[float]]:
        """A list of messages in any dialect, checked, and the weight of each."""
        turns, weights = [], []
        for number, message in enumerate(messages, 1):
            turn, weight = read_message(message, f"{self.where} message {number}", self.stats.ignored, key)
            turns.append(turn)
            weights.append(weight)
        return turns, weights

    def tools(self) -> list[dict] | None:
        """The record's tools: JSON schemas in OpenAI's form, given as a list or as JSON in a string."""
        value = next((self.record[key] for key in ("tools", "functions") if self.record.get(key)), None)
        if isinstance(value, str):
            value = json_in(value, f"{self.where}: tools") if value.strip() else None
        if not value:
            return None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise UserError(f"{self.where}: tools is {type_name(value)}, a list of objects is wanted")
        without_surrogate(value, f"{self.where}: tools")
        return [tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool}
                for tool in value]  # fmt: skip


def _messages(reading: Reading) -> list[Record]:
    """OpenAI's {"messages"}; weights of turns 0 or any number."""
    turns, weights = reading.turns(require_field(reading.record, "messages", list, reading.where))
    return _answered(reading, _with_system(reading, turns, weights))


def _sharegpt(reading: Reading) -> list[Record]:
    turns, weights = reading.turns(require_field(reading.record, "conversations", list, reading.where), "conversations")
    return _answered(reading, _with_system(reading, turns, weights))


def _with_system(reading: Reading, turns: list[dict], weights: list[float]) -> tuple[list[dict], list[float]]:
    if not reading.maybe("system").strip():
        return turns, weights
    return [{"role": "system", "content": reading.record["system"]}, *turns], [1.0, *weights]


def _answered(reading: Reading, turned: tuple[list[dict], list[float]], **more) -> list[Record]:
    turns, weights = turned
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UserError(f"{reading.where}: no assistant message among {len(turns)}; nothing to train on")
    return reading.conversation(turns, weights, tools=reading.tools(), **more)


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
            turns, weights = _turn_list(reading, answers, "assistant")
            prompt, before = _asked_before(*_with_system(reading, *_turn_list(reading, asks, "user")))
            return _answered(reading, ([*prompt, *turns], [*before, *weights]))
        turns, weights = _with_system(reading, _pair(reading.text(asks), reading.text(answers)), [1.0, 1.0])
        return reading.conversation(turns, weights)

    return read


def _turn_list(reading: Reading, key: str, role: str) -> tuple[list[dict], list[float]]:
    """The turns at a key and their weights: a list of messages, one message, or a string that is a turn of `role`."""
    value = reading.record.get(key)
    if isinstance(value, str):
        return [{"role": role, "content": without_surrogate(value, f"{reading.where}: {key}")}], [1.0]
    if not isinstance(value, (list, dict)):
        raise UserError(f"{reading.where}: {key} is {type_name(value)}, a string or a list of messages is wanted")
    return reading.turns(value if isinstance(value, list) else [value], key)


def _asked_before(turns: list[dict], weights: list[float]) -> tuple[list[dict], list[float]]:
    """Turns of a prompt, whose own answers are not what is taught."""
    return turns, [0.0 if turn["role"] == "assistant" else weight for turn, weight in zip(turns, weights, strict=True)]


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


# ---- preferences ----


def _preference(reading: Reading) -> list[Record]:
    """A prompt and two answers, each a string, a message or turns; or without a prompt two whole conversations, of
    which the turns that both begin with are the prompt; or two transcripts of HH-RLHF (Bai et al. 2022)."""
    sides = []
    for key in ("chosen", "rejected"):
        value = reading.record[key]
        if isinstance(value, str) and value.startswith("\n\nHuman:"):
            turns = _transcript(value, f"{reading.where}: {key}")
            sides.append((turns, [1.0] * len(turns)))
        else:
            sides.append(_turn_list(reading, key, "assistant"))
    earlier = next((k for k in ("conversations", "messages", "prompt") if reading.record.get(k) is not None), None)
    prompt, before = _with_system(reading, *(_turn_list(reading, earlier, "user") if earlier else ([], [])))
    (one, weights), (other, _) = sides
    if prompt and one[: len(prompt)] == prompt == other[: len(prompt)]:
        prompt, before = [], []  # the answers repeat it
    same = len([*takewhile(lambda pair: pair[0] == pair[1], zip(one, other))])
    prompt, before = _asked_before([*prompt, *one[:same]], [*before, *weights[:same]])
    chosen, weights, rejected = one[same:], weights[same:], other[same:]
    if not chosen and not rejected:
        reading.stats.dropped["chosen and rejected do not differ"] += 1
        return []
    if not prompt:
        raise UserError(f"{reading.where}: nothing is asked before chosen and rejected; a prompt is wanted")
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        if not any(turn["role"] == "assistant" for turn in side):
            raise UserError(f"{reading.where}: {key} has no assistant message of its own")
    more = {"rejected": rejected, "asked": len(prompt), "tools": reading.tools()}
    return reading.conversation([*prompt, *chosen], [*before, *weights], **more)


def _transcript(text: str, where: str) -> list[dict]:
    parts = re.split(r"\n\n(Human|Assistant):", without_surrogate(text, where))
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": said.strip()} for role, said in zip(parts[1::2], parts[2::2])]


def _kto(reading: Reading) -> list[Record]:
    """KTO (Ethayarajh et al. 2024): a conversation, or prompt and completion, and whether its last answer is good."""
    label = require_field(reading.record, "label", bool, reading.where)
    if "completion" in reading.record:
        parts = _turn_list(reading, "prompt", "user"), _turn_list(reading, "completion", "assistant")
        turns, weights = ([*a, *b] for a, b in zip(*parts, strict=True))
    else:
        key = "messages" if "messages" in reading.record else "conversations"
        turns, weights = reading.turns(require_field(reading.record, key, list, reading.where), key)
    turns, weights = _with_system(reading, turns, weights)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    before = _asked_before(turns[:last], weights[:last])[1]
    return _answered(reading, (turns, [*before, *weights[last:]]), label=label)


# ---- OASST ----


def _oasst_tree(reading: Reading) -> list[Record]:
    """A tree of OpenAssistant (Koepf et al. 2023): the prompt at its root, ranked replies below each message.

    Of a tree comes the path of best-ranked replies, or every path; then an answer that several paths share is trained
    in the first of them. A path ends with an answer; deleted messages, with all below them, are left out.
    """
    paths, taught, stack = [], set(), [(require_object(reading.record["prompt"], reading.where), ())]
    if stack[0][0].get("deleted") is True:
        reading.stats.dropped["a deleted prompt"] += 1
        return []
    while stack:
        node, path = stack.pop()
        path = (*path, node)
        if len(path) > 1000:
            raise UserError(f"{reading.where}: replies nested over 1,000 deep")
        replies = node.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise UserError(f"{reading.where}: replies is {type_name(replies)}, a list of messages is wanted")
        kept = [reply for reply in replies if reply.get("deleted") is not True]
        if len(kept) < len(replies):
            reading.stats.dropped["a deleted reply"] += len(replies) - len(kept)
        replies = sorted(kept, key=lambda reply: _rank(reply, reading.where))
        wanted = replies if reading.trees == "all" else replies[:1]
        stack += [(reply, path) for reply in reversed(wanted)]
        if not wanted:
            paths.append(path)
    records = []
    for path in paths:
        turns, weights = [], []
        for node in path:
            where = node.get(WHERE, reading.where)
            role = OASST_ROLES.get(require_field(node, "role", str, where))
            if role is None:
                raise UserError(f"{where}: role {quote_names([node['role']])} is unknown; prompter or assistant")
            turns.append({"role": role, "content": require_field(node, "text", str, where)})
            weights.append(0.0 if id(node) in taught else 1.0)
        while turns and turns[-1]["role"] != "assistant":
            turns.pop(), weights.pop()
        new = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and weights[i]]
        if not new:
            reading.stats.dropped["a path without an answer of its own" if turns else "a path without an answer"] += 1
            continue
        taught |= {id(path[i]) for i in new}
        records += reading.conversation(turns, weights)
    return records


WHERE = "\0where"  # a key that no file has: the place of a message
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


def _rank(reply: dict, where: str) -> float:
    rank = math.inf if reply.get("rank") is None else reply["rank"]
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise UserError(f"{reply.get(WHERE, where)}: rank is {type_name(rank)}, a number or null is wanted")
    return math.inf if math.isnan(rank) else rank


def _oasst_messages(reading: Reading) -> list[Record]:
    """The messages of one tree, as `_oasst_group` puts them together."""
    nodes, roots, children = {}, [], {}
    for message in reading.record["messages"]:
        where = message[WHERE]
        id = message["message_id"]
        if id in nodes:
            raise UserError(f"{where}: message_id {id[:40]!r} stands twice")
        nodes[id] = message | {"replies": []}
        parent = message["parent_id"]
        if parent is not None and not isinstance(parent, str):
            raise UserError(f"{where}: parent_id is {type_name(parent)}, a string or null is wanted")
        roots.append(id) if parent is None else children.setdefault(parent, []).append(id)
    for parent, ids in children.items():
        if parent in nodes:
            nodes[parent]["replies"] = [nodes[id] for id in ids]
    reached, stack = set(), list(roots)
    while stack:  # a cycle has no root, and is never reached
        id = stack.pop()
        reached.add(id)
        stack += children.get(id, [])
    if lost := len(nodes.keys() - reached):
        reading.stats.dropped["a message whose parents lead to no root"] += lost
    records = []
    for id in roots:
        records += _oasst_tree(Reading({"prompt": nodes[id]}, reading.where, reading.stats, reading.trees))
    return records


def _oasst_group(container: Container, payloads: Iterable) -> Iterator[tuple[int, object]]:
    """Messages put together by tree, which must stand in a row, so that a tree is held and not the file."""
    done = set()

    def values():
        for number, payload in payloads:
            where = container.place(number)
            value = require_object(container.value(number, payload), where)
            if not OASST_MESSAGES.fits(value):
                raise _misfit(value, where, OASST_MESSAGES)
            require_field(value, "message_id", str, where)
            if value.get("message_tree_id") is not None:
                require_field(value, "message_tree_id", str, where)
            yield number, value | {WHERE: where}

    tree = lambda pair: pair[1].get("message_tree_id") or pair[1]["message_id"]
    for key, group in groupby(values(), tree):
        group = list(group)
        if key in done:
            raise UserError(f"{container.place(group[0][0])}: tree {str(key)[:40]!r} again; sort the file by tree")
        done.add(key)
        yield group[0][0], {"messages": [value for _, value in group], **dict.fromkeys(OASST_MESSAGES.keys)}


OASST_MESSAGES = Format(
    "OASST messages", ("message_id", "parent_id", "text", "role"), (), _oasst_messages, _oasst_group
)
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
    Format("preferences", ("chosen", "rejected"), ("prompt", "conversations", "messages", *CHAT), _preference),
    Format("KTO", ("messages", "label"), CHAT, _kto),
    Format("KTO", ("conversations", "label"), CHAT, _kto),
    Format("KTO", ("prompt", "completion", "label"), CHAT, _kto),
    Format("messages", ("messages",), CHAT, _messages),
    Format("ShareGPT", ("conversations",), CHAT, _sharegpt),
    Format("OASST trees", ("message_tree_id", "prompt"), ("tree_state",), _oasst_tree),
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
TREES = ("best", "all")  # the path of best-ranked replies, or every path
COMMON = ("messages", "ShareGPT", "Alpaca", "prompt and completion", "text and its label", "preferences", "plain text")


def _misfit(record: dict, where: str, format: Format | None) -> UserError:
    wanted = [format] if format else FORMATS
    hint = closest_key(record, [key for known in wanted for key in known.keys], record)
    if format and all(key in record for key in format.keys):
        return UserError(f"{where}: label is {'null' if record.get('label') is None else 'empty'}")
    if format:
        why = f"the first record is {format.name} ({', '.join(format.keys)})"
    else:
        common = [f"{known.name} ({', '.join(known.keys)})" for known in FORMATS if known.name in COMMON]
        why = f"no known format; known: {', '.join(common)}, and more at the head of dataset/formats.py"
        why += "; --map FILE.py:NAME makes one of them"
    return UserError(f"{where}: keys {quote_names(record)}: {why}{hint}")
