"""Files to values, one at a time: JSON, JSONL, CSV, TSV, Parquet and plain text, gzip or zstandard around any of them.

What a file holds is found by looking at its first bytes (only CSV and TSV, which look like any text, by their names).
Nothing is ever held but the record at hand, so memory does not grow with the file. A `Container` gives payloads, each
with its number; `value` makes a payload's value, which another process may do.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.errors import UserError, read_text

LONGEST = 128 << 20  # bytes of a record, or of a JSON file that is one object
MANY = 1 << 20  # bytes from which a record's values are counted
VALUES = 3_000_000  # that it may hold; as objects they take 30 times its bytes
PART = 4 << 20  # characters of a plain text that are read at a time
HEAD = 1 << 16  # bytes that are looked at to tell what a file is
PACKED = {".gz": "gzip", ".zst": "zstandard"}
CLASS_NAMES = "classes.txt"  # beside a CSV of numbered classes: their names
KNOWN = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".md")


class Text(NamedTuple):
    """A part of a plain-text file; a long one comes in several, cut where a line begins."""

    text: str
    first: bool
    last: bool


@dataclass(frozen=True)
class Container:
    path: Path
    kind: str  # JSON, JSONL, CSV, TSV, Parquet or TXT; with the compression: "JSONL in gzip"
    unit: str  # what `number` counts: line, record or row

    def payloads(self) -> Iterator[tuple[int, object]]:
        """(number from 1, payload) of each record. Raises UserError where the file ends to make sense."""
        kind = self.kind.split()[0]
        if kind == "Parquet":
            yield from _parquet_rows(self.path)
            return
        read = {"JSONL": _lines, "JSON": _json_values, "CSV": _rows, "TSV": _rows, "TXT": _text_parts}[kind]
        stream, _ = _open(self.path)
        with stream, _intact(self.path):
            yield from read(stream, self)

    def value(self, number: int, payload: object) -> object:
        """The value of a payload: of a JSONL's line, its JSON."""
        if not isinstance(payload, bytes):
            return payload
        where = self.place(number)
        if len(payload) > MANY and sum(map(payload.count, (b",", b"[", b"{"))) > VALUES:
            raise _too_many(where)
        try:
            line = payload.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 at byte {error.start + 1} of the line; save it as UTF-8") from None
        value, end = decode(line, 0, where)
        if end < len(line):
            raise _not_json(where, line, SPACE.match(line, end).end(), "more after the record's end")
        return value

    def place(self, number: int) -> str:
        return f"{self.path} {self.unit} {number}"


def open_containers(path: Path | str) -> tuple[list[Container], int]:
    """The containers of a file, or of a folder's files of known kinds in the order of their names; and how many others
    there are in the folder."""
    path = Path(path)
    if not path.is_dir():
        return [_look(path)], 0
    found, others, seen = [], 0, set()
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back
            folders[:] = []
            continue
        seen.add(real)
        tables = any(_suffix(Path(name)) in (".csv", ".tsv") for name in names)
        for name in sorted(name for name in names if not name.startswith(".")):
            about = name.upper().startswith(("README", "LICENSE", "LICENCE")) or (name == CLASS_NAMES and tables)
            if _suffix(Path(name)) in KNOWN and not about:
                found.append(Path(folder, name))
            else:
                others += 1
    if not found:
        raise UserError(f"{path}: holds no file of a known kind ({', '.join(KNOWN)}, each maybe with .gz or .zst)")
    return [_look(each) for each in found], others


def _suffix(path: Path) -> str:
    return (Path(path.stem) if path.suffix.lower() in PACKED else path).suffix.lower()


# ---- what a file is ----


def _look(path: Path) -> Container:
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file, and would have to be read more than once; save it first")
    try:
        stream, packing = _open(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    with stream, _intact(path):
        parts = [stream.read(HEAD)]
        while parts[-1] and not parts[-1].removeprefix(codecs.BOM_UTF8).strip() and len(parts) * HEAD < LONGEST:
            parts.append(stream.read(HEAD))  # blank so far
    head, packed = b"".join(parts), f" in {packing}" if packing else ""
    if head[:4] == b"PAR1":
        if packed:
            raise UserError(f"{path}: Parquet{packed}; Parquet is compressed inside, unpack the file")
        return Container(path, "Parquet", "row")
    if packed and _packing(head[:4]):
        raise UserError(f"{path}: holds {_packing(head[:4])} inside{packed}; unpack it once")
    if head[:4] == b"PK\x03\x04":
        raise UserError(f"{path}: a zip archive, or an Excel workbook; unpack it, or export it as CSV")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}: not UTF-8 at byte 0 but UTF-16; save it as UTF-8")
    text = head.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")
    if not text or text.isspace():
        raise UserError(f"{path}: is empty")
    if "\0" in text:  # UTF-16 without its mark has one at every other place
        _check_utf8(path, head)
        raise UserError(f"{path}: holds a NUL at character {text.index(chr(0)) + 1}; save it as UTF-8 text")
    suffix = _suffix(path)
    if suffix in (".csv", ".tsv"):
        return Container(path, suffix[1:].upper() + packed, "row")
    if suffix in (".txt", ".md") and not re.match(r'\s*(\[\s*)?\{\s*"', text):
        return Container(path, "TXT" + packed, "record")
    start = SPACE.match(text).end()
    if text[start] == "[":
        return Container(path, "JSON" + packed, "record")
    if text[start] == "{":
        line, end, rest = text[start:].partition("\n")
        one_object = (end and _goes_on(line)) or (not rest.strip() and len(head) < HEAD and _by_id(line))
        return Container(path, ("JSON" if one_object else "JSONL") + packed, "record" if one_object else "line")
    _check_utf8(path, head)
    line = text.count("\n", 0, start) + 1
    found = repr(text[start : start + 10])
    raise UserError(
        f"{path} line {line}: found {found}; not JSON (a list), nor JSONL (an object a line), nor a .txt, .md, .csv or"
        " .tsv"
    )


def _check_utf8(path: Path, head: bytes) -> None:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _goes_on(line: str) -> bool:
    """Whether a line begins a JSON object that the next one goes on with."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip())
    except (RecursionError, ValueError):
        pass
    return False


def _by_id(line: str) -> bool:
    """Whether a file's only line is an object of objects."""
    try:
        value = json.loads(line)
    except (RecursionError, ValueError):
        return False
    return isinstance(value, dict) and _all_objects(value)


def _all_objects(value: dict) -> bool:
    return bool(value) and all(isinstance(each, dict) for each in value.values())


def _packing(start: bytes) -> str | None:
    skippable = start[1:] == b"\x2a\x4d\x18" and start[0] >> 4 == 5  # a frame that zstd may begin with
    return "gzip" if start[:2] == b"\x1f\x8b" else "zstandard" if start == b"\x28\xb5\x2f\xfd" or skippable else None


@contextlib.contextmanager
def _intact(path: Path) -> Iterator[None]:
    """Around reading a file that may be packed: what its end or its checksum says becomes one line."""
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the system's word, not that of what unpacks
            raise
        raise UserError(f"{path}: damaged or cut off, {_one_line(error)}") from None


def _open(path: Path) -> tuple[BinaryIO, str | None]:
    """The file's bytes, unpacked where it is packed, and how it was."""
    with open(path, "rb") as file:
        packing = _packing(file.read(4))
    if packing == "gzip":
        return gzip.open(path, "rb"), packing
    if packing == "zstandard":
        import pyarrow

        # buffered: pyarrow's own stream has no readline
        unpacked = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return io.BufferedReader(_Raw(unpacked), 1 << 18), packing
    return open(path, "rb", buffering=1 << 18), packing


class _Raw(io.RawIOBase):
    """pyarrow's stream as one that io.BufferedReader takes."""

    def __init__(self, stream):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


# ---- the kinds ----


def _lines(stream: BinaryIO, container: Container) -> Iterator[tuple[int, bytes]]:
    """JSONL: its lines but blank ones, undecoded. Only \\n ends one: U+2028 may stand inside a JSON string."""
    for number in count(1):
        line = stream.readline(LONGEST + 1)
        if len(line) > LONGEST:
            raise _too_long(container.place(number))
        if not line:
            return
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            yield number, line


def _json_values(stream: BinaryIO, container: Container) -> Iterator[tuple[int, object]]:
    """A list's values one at a time, so that each fault is laid at its record's door; or the one object's, or its
    values where all are objects themselves (by an id)."""
    text = _Buffer(stream, container.path)
    text.skip_space()
    if text.peek() == "{":
        value = text.decode(str(container.path))
        if text.skip_space():
            raise text.fault(str(container.path), "more after the object's end")
        yield from enumerate(value.values() if _all_objects(value) else [value], 1)
        return
    text.at += 1
    for number in count(1):
        where = container.place(number)
        text.skip_space()
        if number == 1 and text.peek() == "]":
            break
        yield number, text.decode(where)
        text.skip_space()
        if text.peek() != ",":
            break
        text.at += 1
    if text.peek() != "]":
        raise text.fault(where, "a comma or ] is wanted")
    text.at += 1
    if text.skip_space():
        raise text.fault(str(container.path), "more after the list's end")


class _Buffer:
    """A window of a text that moves over it: `text` from where nothing is needed any more, `at` in it."""

    def __init__(self, stream: BinaryIO, path: Path):
        self.chunks, self.text, self.at, self.where = _decoded(stream, path), "", 0, str(path)
        self.ended, self.lines, self.column = False, 0, 0  # of what is gone: line ends, characters after the last

    def more(self) -> None:
        """Lets go what lies before `at` and reads on: as much again as there is, so that long records take no square
        of their length."""
        self.check_size()
        gone = self.text[: self.at]
        if "\n" in gone:
            self.lines, self.column = self.lines + gone.count("\n"), len(gone) - gone.rfind("\n") - 1
        else:
            self.column += len(gone)
        parts, wanted = [self.text[self.at :]], max(1, len(self.text) - self.at)
        while wanted > 0 and not self.ended:
            chunk = next(self.chunks, None)
            self.ended = chunk is None
            parts.append(chunk or "")
            wanted -= len(parts[-1])
        self.text, self.at = "".join(parts), 0

    def check_size(self) -> None:
        """Before a value that is not at its end yet gets more room."""
        size = (len(self.text) - self.at) * (1 if self.text.isascii() else 4)
        if size > LONGEST:
            raise _too_long(self.where)
        if size > MANY and sum(map(self.text.count, ",[{")) > VALUES:
            raise _too_many(self.where)

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def skip_space(self) -> bool:
        """Moves to what is no space; whether there is any."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.at < len(self.text)
            self.more()

    def decode(self, where: str) -> object:
        """The JSON value that begins here."""
        self.where = where
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end - self.at > LONGEST:
                    raise _too_long(where)
                self.at = end
                return value
            except json.JSONDecodeError as error:
                # a value that is cut off by the window's end fails there, or says where its string began
                near_end = error.pos >= len(self.text) - 12 or error.msg.startswith("Unterminated")
                if self.ended or not near_end:
                    self.at = error.pos
                    raise self.fault(where, error.msg) from None
                self.more()
            except RecursionError:
                raise UserError(f"{where}: JSON nested too deep") from None
            except ValueError as error:  # _refuse_constant's
                raise UserError(f"{where}: {error}") from None

    def fault(self, where: str, why: str) -> UserError:
        return _not_json(where, self.text, self.at, why, self.lines, self.column)


def _rows(stream: BinaryIO, container: Container) -> Iterator[tuple[int, dict]]:
    """CSV (RFC 4180) and TSV: an object a row by the names in the first one, all of it strings. Without names: that of
    Zhang et al. 2015, the number of a class, then texts; names of the classes are read from a classes.txt beside it."""
    csv.field_size_limit(LONGEST)
    delimiter = "\t" if container.kind.startswith("TSV") else ","
    rows = csv.reader(_text_lines(stream, container.path), delimiter=delimiter, strict=True)
    names, number = None, 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{container.place(number + 1)}: {_one_line(error)}") from None
        if not row or (len(row) == 1 and not row[0].strip() and (names is None or len(names) > 1)):
            continue  # a blank line, unless an empty text
        if names is None:
            if row[0].isdecimal() and len(row) > 1:
                names, classes = ["label", *["text"] * (len(row) - 1)], _class_names(container.path)
            else:
                names, classes = [name.strip() for name in row], None
                _no_column_twice(container.path, names)
                if len(names) == 1 and ";" in names[0]:
                    raise UserError(f"{container.path}: its columns are parted by semicolons; commas are wanted")
                continue
        number += 1
        if len(row) != len(names):
            raise UserError(f"{container.place(number)}: has {len(row)} columns, {len(names)} are wanted")
        if classes is None:
            yield number, dict(zip(names, row, strict=True))
            continue
        label = row[0]
        if classes:
            if not (label.isdecimal() and 1 <= int(label[:9]) <= len(classes)):
                raise UserError(f"{container.place(number)}: class {label[:40]!r}, classes.txt names {len(classes)}")
            label = classes[int(label) - 1]
        yield number, {"label": label, "text": "\n".join(row[1:])}


def _class_names(path: Path) -> list[str]:
    beside = path.parent / CLASS_NAMES
    return read_text(beside, HEAD).rstrip("\n").split("\n") if beside.is_file() else []


def _no_column_twice(path: Path, names: list[str]) -> None:
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise UserError(f"{path}: two columns are called {name[:40]!r}")


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """A row group at a time. Classes that `datasets` wrote as numbers get their names back."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _no_column_twice(path, file.schema_arrow.names)
            names = _class_columns(file.schema_arrow.metadata or {})
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    for column, classes in names.items():
                        if type(row.get(column)) is int and 0 <= row[column] < len(classes):
                            row[column] = classes[row[column]]
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: no whole Parquet file after row {number}, {_one_line(error)}") from None


def _class_columns(metadata: dict) -> dict[str, list[str]]:
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {name: list(f["names"]) for name, f in features.items() if f.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _text_parts(stream: BinaryIO, container: Container) -> Iterator[tuple[int, Text]]:
    """The whole text, in parts where it is long."""
    waiting, done, first, number = "", 0, True, 1
    for chunk in _decoded(stream, container.path):
        if "\0" in chunk:  # UTF-16 without its mark is valid UTF-8, with a NUL at every other place
            at = done + chunk.index("\0") + 1
            raise UserError(f"{container.path}: holds a NUL at character {at}; save it as UTF-8 text")
        done += len(chunk)
        waiting += chunk
        if len(waiting) > PART:
            cut = waiting.rfind("\n", 0, -1) + 1 or len(waiting) - 1
            yield number, Text(_line_ends(waiting[:cut]), first, False)
            waiting, first, number = waiting[cut:], False, number + 1
    yield number, Text(_line_ends(waiting), first, True)


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


# ---- bytes to text, text to JSON ----


def _decoded(stream: BinaryIO, path: Path) -> Iterator[str]:
    """UTF-8 to text, in chunks, without byte order mark."""
    decoder, done, first = codecs.getincrementaldecoder("utf-8")(), 0, True
    while True:
        data = stream.read(1 << 20)
        held = decoder.getstate()[0]  # bytes of a character that the last chunk began
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at = done - len(held) + error.start
            raise UserError(f"{path}: not UTF-8 at byte {at}; save it as UTF-8") from None
        done += len(data)
        if first:
            text, first = text.removeprefix("\ufeff"), False
        if not data:
            return
        yield text


def _text_lines(stream: BinaryIO, path: Path) -> Iterator[str]:
    waiting, size = [], 0
    for chunk in _decoded(stream, path):
        if "\0" in chunk:
            raise UserError(f"{path}: holds a NUL; save it as UTF-8 text")
        first, *lines = chunk.split("\n")
        waiting.append(first)
        size += len(first)
        for line in lines:
            yield "".join(waiting) + "\n"
            waiting, size = [line], len(line)
        if size > LONGEST:
            raise _too_long(str(path))
    if last := "".join(waiting):
        yield last


def decode(text: str, at: int, where: str) -> tuple[object, int]:
    """The JSON value that starts at position `at`, and the position after it."""
    try:
        return DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _not_json(where, error.doc, error.pos, error.msg) from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deep") from None
    except ValueError as error:  # _refuse_constant's
        raise UserError(f"{where}: {error}") from None


def _not_json(where: str, text: str, at: int, why: str, lines: int = 0, column: int = 0) -> UserError:
    """lines, column: of what stood before `text`."""
    cut = at >= len(text.rstrip()) or why.startswith("Unterminated string")
    line = lines + text.count("\n", 0, at) + 1
    column = at - text.rfind("\n", 0, at) + (column if "\n" not in text[:at] else 0)
    place = f"line {line} column {column}" if lines or "\n" in text else f"column {column}"
    return UserError(f"{where}: {'JSON cut off' if cut else 'not JSON'} at {place} ({why})")


def _too_long(where: str) -> UserError:
    return UserError(f"{where}: longer than {LONGEST >> 20} MB, too much for a record; is it one a line?")


def _too_many(where: str) -> UserError:
    return UserError(f"{where}: holds more than {VALUES:,} values, too many for a record")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON; write null, a string or a number")


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """An object of which no key stands twice, for one of the two would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {key[:40]!r} stands twice in an object")
    return made


SPACE = re.compile(r"\s*")
# Whole numbers of 20 digits and more become floats: int() itself raises beyond 4,300 digits.
DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant,
    parse_int=lambda s: int(s) if len(s) < 20 else float(s),
    object_pairs_hook=_unique,
)
