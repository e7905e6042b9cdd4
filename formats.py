"""The record formats that people have, recognised by looking, read into one: a list of messages, or a text.

    Alpaca      {"instruction", "output"} and maybe "input", "system", "history" (earlier [question, answer] pairs)
    messages    {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}, as OpenAI has it
    plain text  {"text": ...}, or a whole .txt file

`read_records(path)` looks twice: at the first characters for the container (a JSON list, or JSONL, whatever the file is
called), then at the first record's keys for the format, which every other record must have too. A format is one row of
`FORMATS`: its keys, and a function from a record to messages. Nothing is lost in silence: what can't be read is an
error that names the record, and what was left out (empty answers, unknown keys) is in `Source`, to be said out loud.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from errors import UserError, read_text


@dataclass(slots=True)
class Record:
    """One example: messages [{"role", "content"}, ...] with an answer in each assistant turn, or else a text."""

    messages: list[dict[str, str]] | None
    text: str | None
    where: str  # "FILE line 3" of a JSONL, "FILE record 3" otherwise; for messages about this record


@dataclass
class Source:
    """A file as read: its records, and everything that was found out or left out on the way."""

    path: str
    format: str  # a name out of FORMATS
    container: str  # "JSON", "JSONL" or "TXT"
    records: list[Record]
    dropped: dict[str, int]  # reason -> number of records that are not in `records`
    ignored: list[str]  # keys that no format here gives a meaning; inside a message: "messages.KEY"

    def summary(self) -> str:
        """One line to print, e.g. `a.json: Alpaca (JSON, 997 records), dropped 2 (empty answer), ignored keys 'id'`."""
        count = len(self.records)
        line = f"{self.path}: {self.format} ({self.container}, {count:,} record{'' if count == 1 else 's'})"
        line += "".join(f", dropped {left_out:,} ({reason})" for reason, left_out in self.dropped.items())
        return line + (f", ignored keys {_names(self.ignored)}" if self.ignored else "")


def read_records(path: Path | str) -> Source:
    """Reads a data file of any known format.

    path: a UTF-8 file, with or without byte order mark, any line ends, blank lines between JSONL records.
    Returns a Source with at least one record. Records with an empty assistant turn, or an empty text, are left out and
    counted in `dropped`: they would teach to answer nothing.
    Raises UserError with the file and the line or record number: not UTF-8, not JSON, an unknown format, a record of
    another format than the first one's, a missing or wrongly typed field, an unknown role, nothing left to train on.
    """
    text = read_text(path)
    container = _container(path, text)
    values = {"JSON": _json_values, "JSONL": _jsonl_values, "TXT": _txt_value}[container](path, text)
    format, records, dropped, ignored = None, [], Counter(), {}
    for where, record in values:
        if not isinstance(record, dict):
            raise UserError(f"{where}: is {_kind(record)}, an object is wanted")
        if format is None:
            format = next((known for known in FORMATS if known.fits(record)), None)
        if format is None or not format.fits(record):
            raise _misfit(record, where, format)
        _note_extra_keys(record, format.keys + format.optional, where, ignored)
        content = format.read(record, where)
        if isinstance(content, str):
            kind, example, taught = "text", Record(None, content, where), [content]
        else:
            turns = _check_turns(content, where, ignored)
            kind, example = "answer", Record(turns, None, where)
            taught = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        if all(part and not part.isspace() for part in taught):
            records.append(example)
        else:
            dropped[f"empty {kind}"] += 1
    if not records:
        what = f"every {kind} is empty" if dropped else "is an empty list"
        raise UserError(f"{path}: {what}; nothing to train on")
    return Source(str(path), format.name, container, records, dict(dropped), list(ignored))


# ---- formats: a record (dict) to messages or a text; `where` is for the error ----


def _alpaca(record: dict, where: str) -> list[dict]:
    """Alpaca (Taori et al. 2023): the question is the instruction, and after a blank line the input if there is one."""
    turns = []
    if "system" in record and _field(record, "system", str, where):
        turns.append({"role": "system", "content": record["system"]})
    for pair in _field(record, "history", list, where) if "history" in record else ():
        if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
            raise UserError(f"{where}: history holds {_kind(pair)}, [question, answer] pairs of strings are wanted")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = [_field(record, key, str, where) for key in ("instruction", "input") if key in record]
    turns.append({"role": "user", "content": "\n\n".join(part for part in question if part.strip())})
    turns.append({"role": "assistant", "content": _field(record, "output", str, where)})
    return turns


@dataclass(frozen=True)
class Format:
    name: str
    keys: tuple[str, ...]  # a record that has them all has this format
    optional: tuple[str, ...]  # read where present; other keys are ignored and announced
    read: Callable[[dict, str], list[dict] | str]

    def fits(self, record: dict) -> bool:
        return all(key in record for key in self.keys)


# The first row that fits wins: Stanford's own Alpaca file carries a rendered "text" beside its instruction and output.
FORMATS = (
    Format("messages", ("messages",), (), lambda record, where: _field(record, "messages", list, where)),
    Format("Alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
    Format("plain text", ("text",), (), lambda record, where: _field(record, "text", str, where)),
)
ROLES = ("system", "user", "assistant")
# Keys that say to train something else than what is read here (not this answer, not this turn, only with these tools):
# to ignore them would be silent damage. Null, empty, and weight 1 say nothing.
CHANGES_MEANING = {"label", "weight", "tools", "functions", "tool_calls", "function_call"}


# ---- what every format must satisfy ----


def _check_turns(messages: list, where: str, ignored: dict) -> list[dict[str, str]]:
    """The messages with role and content alone. A conversation may begin with any role, but somebody must answer."""
    turns = []
    for number, message in enumerate(messages, 1):
        place = f"{where} message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{place}: is {_kind(message)}, an object with role and content is wanted")
        _note_extra_keys(message, ("role", "content"), place, ignored, "messages.")
        role = _field(message, "role", str, place)
        if role not in ROLES:
            raise UserError(f"{place}: role {_names([role])} is unknown; known: {', '.join(ROLES)}")
        turns.append({"role": role, "content": _field(message, "content", str, place)})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UserError(f"{where}: no assistant message among {len(turns)}; nothing to train on")
    return turns


def _field(record: dict, key: str, kind: type, where: str):
    """record[key], which must be there and of that type."""
    if key not in record:
        raise UserError(f"{where}: no {key}, found {_names(record)}")
    value = record[key]
    if not isinstance(value, kind):
        raise UserError(f"{where}: {key} is {_kind(value)}, {KINDS[kind]} is wanted")
    # JSON can spell half of a UTF-16 pair, which is no character: no tokenizer could encode it.
    if kind is str and not value.isascii() and (half := SURROGATE.search(value)):
        raise UserError(f"{where}: {key} holds a lone surrogate {half[0]!a} at character {half.start() + 1}; mend it")
    return value


def _note_extra_keys(record: dict, known: tuple[str, ...], where: str, ignored: dict, prefix: str = "") -> None:
    """Adds keys beside the known ones to `ignored`; refuses one that is a known key mistyped, or changes meaning."""
    for key, value in record.items():
        if key in known:
            continue
        if key in CHANGES_MEANING and value not in (None, "", "[]", [], {}) and (key, value) != ("weight", 1):
            raise UserError(
                f"{where}: key {key!r} changes what is learnt and is not read yet; remove it to train without"
            )
        if prefix + key not in ignored:
            if hint := _lookalike([key], known, record):
                raise UserError(f"{where}: unknown key {_names([key])}{hint}")
            ignored[prefix + key] = True  # a dict as an ordered set


def _misfit(record: dict, where: str, format: Format | None) -> UserError:
    wanted = [format] if format else FORMATS
    hint = _lookalike(record, [key for known in wanted for key in known.keys], record)
    listed = ", ".join(f"{known.name} ({', '.join(known.keys)})" for known in wanted)
    why = f"the file's first record is {listed}" if format else f"no known format; known: {listed}"
    return UserError(f"{where}: keys {_names(record)}: {why}{hint}")


def _lookalike(keys: Iterable[str], wanted: Iterable[str], record: dict) -> str:
    """The end of an error message, where one of the keys is nearly a wanted key that the record lacks; else empty."""
    missing = [key for key in wanted if key not in record]
    for key in list(keys)[:50]:
        # 0.8 passes a slip of one letter in five; at difflib's own 0.6 "context" would be "text".
        if near := difflib.get_close_matches(key.lower(), missing, n=1, cutoff=0.8):
            return f"; {_names([key])} looks like {near[0]!r} mistyped"
    return ""


# ---- containers: (where, value) of each record ----


def _container(path: Path | str, text: str) -> str:
    """JSON for a list, JSONL for an object a line, TXT for what else a .txt holds."""
    if not text or text.isspace():
        raise UserError(f"{path}: is empty")
    if Path(path).suffix.lower() == ".txt" and not re.match(r'\s*(\[\s*)?\{\s*"', text):
        return "TXT"
    start = SPACE.match(text).end()
    if text[start] in "[{" and not re.compile(r"\{\s*\n").match(text, start):
        return "JSON" if text[start] == "[" else "JSONL"
    found = repr(text[start : start + 10]) if text[start] != "{" else "an object over several lines"
    line = text.count("\n", 0, start) + 1
    raise UserError(f"{path} line {line}: found {found}; not JSON (a list), nor JSONL (an object a line), nor a .txt")


def _txt_value(path: Path | str, text: str) -> Iterator[tuple[str, object]]:
    if "\0" in text:  # UTF-16 without its mark is valid UTF-8, with a NUL at every other place
        raise UserError(f"{path}: holds a NUL at character {text.index(chr(0)) + 1}; save it as UTF-8 text")
    yield f"{path} record 1", {"text": text}


def _jsonl_values(path: Path | str, text: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if line := line.strip():
            where = f"{path} line {number}"
            value, end = _decode(line, 0, where)
            if end < len(line):
                raise _not_json(where, line, SPACE.match(line, end).end(), "more after the record's end")
            yield where, value


def _json_values(path: Path | str, text: str) -> Iterator[tuple[str, object]]:
    """The list's values one at a time, so that each fault is laid at its record's door."""
    at = SPACE.match(text, text.index("[") + 1).end()
    for number in count(1):
        where = f"{path} record {number}"
        if text.startswith("]", at) and number == 1:
            break
        value, at = _decode(text, at, where)
        yield where, value
        at = SPACE.match(text, at).end()
        if not text.startswith(",", at):
            break
        at = SPACE.match(text, at + 1).end()
    if not text.startswith("]", at):
        raise _not_json(where, text, at, "a comma or ] is wanted")
    if (end := SPACE.match(text, at + 1).end()) < len(text):
        raise _not_json(str(path), text, end, "more after the list's end")


def _decode(text: str, at: int, where: str) -> tuple[object, int]:
    """The JSON value that starts at position `at`, and the position after it."""
    try:
        return DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _not_json(where, error.doc, error.pos, error.msg) from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deep") from None
    except ValueError as error:  # _refuse_constant's
        raise UserError(f"{where}: {error}") from None


def _not_json(where: str, text: str, at: int, why: str) -> UserError:
    cut = at >= len(text.rstrip()) or why.startswith("Unterminated string")
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    place = f"line {line} column {column}" if "\n" in text else f"column {column}"
    return UserError(f"{where}: {'JSON cut off' if cut else 'not JSON'} at {place} ({why})")


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON; write null, a string or a number")


SPACE = re.compile(r"\s*")
SURROGATE = re.compile(r"[\ud800-\udfff]")
# Whole numbers of 20 digits and more become floats: int() itself raises beyond 4,300 digits.
DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=lambda s: int(s) if len(s) < 20 else float(s))


# ---- words for what a stranger's file holds ----

KINDS = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}


def _kind(value: object) -> str:
    return KINDS.get(type(value), "a number")


def _names(names: Iterable[str]) -> str:
    """Keys or roles on one line: quoted, escaped, cut to 40 characters, the first eight."""
    names = list(names)
    listed = ", ".join(repr(name[:40]) for name in names[:8]) or "none"
    return listed + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")
