"""Reads files record by record: JSON, JSONL, CSV, TSV, Parquet, Arrow and plain text, also
compressed by gzip or zstandard.

The kind of a file is recognized by its first bytes; only CSV and TSV, which look like any other
text, are recognized by the file's name. No more than one record is in memory at a time (of Parquet,
Arrow and plain text one batch or part), so memory does not grow with the file.

A `Container` is a file whose kind is known. Its `payloads` yields every record undecoded, with its
number; its `value` decodes one payload. The two are separate so that another process can do the
second.
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

from common.console import number_of
from common.errors import UserError, read_text
from common.files import NamedFile, refuse_pointer
from dataset.arrow_floats import has_short_floats, with_short_floats
from tokenization.chat_template import written_number

MAX_RECORD_BYTES = 128 << 20  # of one record, or of a JSON file that is one object
# As Python objects the values of a record take 30 times its bytes, so their number is limited as
# well. They are counted only in records of more than COUNT_VALUES_FROM bytes.
MAX_VALUES = 3_000_000
COUNT_VALUES_FROM = 1 << 20
# Of a whole number; int() itself raises beyond 4,300 digits, and the sign counts here.
MAX_DIGITS = 4300
PART = 4 << 20  # characters of a plain text that are read at a time
HEAD_BYTES = 1 << 16  # read from the start of a file to recognize its kind
ROWS_AT_A_TIME = 1000  # of Parquet and Arrow, that are Python objects together
CLASS_NAMES = "classes.txt"  # a file next to a CSV of numbered classes: their names
COMPRESSED_SUFFIXES = (".gz", ".zst")
ARROW_SUFFIXES = (".arrow", ".feather")
KNOWN_SUFFIXES = (
    ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", *ARROW_SUFFIXES, ".txt", ".md",
)  # fmt: skip
# Names of columns and of parts of data. An object that has one of them as a key is a record, or holds
# the parts, and its keys are no ids of records.
NO_IDS = frozenset(
    "chosen rejected prompt prompts completion completions response responses answer answers question"
    " questions query messages conversations conversation instruction input output text label data"
    " train training validation valid val dev test eval train_sft test_sft".split()
)
# What Arrow's files and streams begin with.
ARROW_FILE = b"ARROW1"
ARROW_STREAM = b"\xff\xff\xff\xff"


class RecordFault(UserError):
    """A fault of one record of a JSON list, behind which the list goes on."""


class Text(NamedTuple):
    """One part of a plain-text file. A long file is read as several parts, cut at the start of a
    line if it has any.

    first, last: whether this is the first or the last part of its file.
    """

    text: str
    first: bool
    last: bool


@dataclass(frozen=True)
class Container:
    """A file whose kind is known.

    path: as it is opened; as a text, it is what messages call the file.
    kind: JSON, JSONL, CSV, TSV, Parquet, Arrow or TXT; of a compressed file with the compression,
        as in "JSONL in gzip".
    unit: what the numbers of `payloads` count: "line", "record" or "row".
    columns: the names of a table's columns, if its first row is a record.
    header_note: what a user must know about the names of its columns.
    """

    path: Path | NamedFile
    kind: str
    unit: str
    columns: tuple[str, ...] = ()
    header_note: str = ""

    def payloads(self) -> Iterator[tuple[int, object]]:
        """Yields (number, payload) for each record; numbers begin at 1.

        Raises UserError at the place from which on the file can't be read.
        """
        kind = self.kind.split()[0]
        if kind == "Parquet":
            yield from _parquet_rows(self.path)
            return
        if kind == "Arrow":
            yield from _arrow_rows(self.path)
            return
        readers = {
            "JSONL": _lines,
            "JSON": _json_values,
            "CSV": _table_rows,
            "TSV": _table_rows,
            "TXT": _text_parts,
        }
        stream, _ = _open(self.path)
        with stream, _report_damage(self.path):
            yield from readers[kind](stream, self)

    def value(self, number: int, payload: object) -> object:
        """Returns the value of a payload: for a line of JSONL the decoded JSON, for other kinds the
        payload itself.

        Raises UserError that names the record: not UTF-8, not JSON, or too many values; also the
        payload itself, where a row of a table could not be read.
        """
        if isinstance(payload, UserError):
            raise payload
        if not isinstance(payload, bytes):
            return payload
        place = self.place(number)
        if len(payload) > COUNT_VALUES_FROM:
            # A text has at least as many of these characters as values, less one.
            most_values = sum(payload.count(character) for character in (b",", b"[", b"{"))
            if most_values > MAX_VALUES:
                raise _too_many_values(place)
        try:
            line = payload.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            where = f"byte {error.start + 1} of the line"
            raise UserError(f"{place}: not UTF-8 at {where}; save it as UTF-8") from None
        value, end = decode(line, 0, place)
        if end < len(line):
            rest = SPACE.match(line, end).end()
            raise _not_json(place, line, rest, "more after the record's end")
        return value

    def place(self, number: int) -> str:
        """Returns the name of a record for messages, as in "FILE line 3"."""
        return f"{self.path} {self.unit} {number}"


def suffix_of(path: Path) -> str:
    """Returns the suffix in lower case, without that of a compression."""
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        path = Path(path.stem)
    return path.suffix.lower()


# ---- the kind of a file ----


def recognize(path: Path | NamedFile) -> Container:
    """Returns the container of a file. Raises UserError if it is missing, empty or of no known
    kind."""
    refuse_pointer(path)
    head, compression = _read_head(path)
    in_compression = f" in {compression}" if compression else ""

    # Binary files, which are recognized by their first bytes.
    if head[:4] == b"PAR1":
        if compression:
            advice = "Parquet is compressed itself, unpack the file"
            raise UserError(f"{path}: Parquet{in_compression}; {advice}")
        return Container(path, "Parquet", "row")
    if head.startswith((ARROW_FILE, ARROW_STREAM)) and not compression:
        return Container(path, "Arrow", "row")
    if compression:
        inner = _compression(head[:4])
        if inner:
            raise UserError(f"{path}: compressed twice, {inner}{in_compression}; unpack it once")
    if head[:4] == b"PK\x03\x04":
        advice = "unpack it, or export it as CSV"
        raise UserError(f"{path}: a zip archive, or an Excel workbook; {advice}")

    # Text that is not UTF-8, or is none.
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}: not UTF-8 at byte 0 but UTF-16; save it as UTF-8")
    text = head.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")
    if not text or text.isspace():
        raise UserError(f"{path}: is empty")
    # UTF-16 without a byte order mark has a NUL at every other place.
    if "\0" in text:
        _check_utf8(path, head)
        position = text.index("\0") + 1
        raise UserError(f"{path}: holds a NUL at character {position}; save it as UTF-8 text")

    # Tables and plain text go by the name, JSON and JSONL by the first characters.
    suffix = suffix_of(Path(path))
    if suffix in (".csv", ".tsv"):
        return Container(path, suffix[1:].upper() + in_compression, "row")
    if suffix in (".txt", ".md") and not re.match(r'\s*(\[\s*)?\{\s*"', text):
        return Container(path, "TXT" + in_compression, "record")
    start = SPACE.match(text).end()
    if text[start] == "[":
        return Container(path, "JSON" + in_compression, "record")
    if text[start] == "{":
        # JSONL has a whole object in its first line. A JSON file has only a part of one there, or
        # it is one line that holds all the records.
        line, line_end, rest = text[start:].partition("\n")
        is_only_line = not rest.strip() and len(head) < HEAD_BYTES
        is_json = False
        if line_end:
            is_json = _continues_on_next_line(line)
        if is_only_line and not is_json:
            is_json = _is_object_of_objects(line)
        if is_json:
            return Container(path, "JSON" + in_compression, "record")
        return Container(path, "JSONL" + in_compression, "line")

    _check_utf8(path, head)
    line_number = text.count("\n", 0, start) + 1
    beginning = text[start : start + 10]
    known = "not JSON (a list), nor JSONL (an object a line), nor a .txt, .md, .csv or .tsv"
    raise UserError(f"{path} line {line_number}: found {beginning!r}; {known}")


def _read_head(path: Path | NamedFile) -> tuple[bytes, str | None]:
    """Returns the first bytes of a file, decompressed, and its compression. The head of a file that
    begins with blanks is longer, up to the first bytes that are not blank."""
    if os.path.exists(path) and not os.path.isfile(path):
        # A pipe, for example.
        reason = "is no regular file, and would have to be read more than once"
        raise UserError(f"{path}: {reason}; save it first")
    try:
        stream, compression = _open(path)
    except FileNotFoundError:
        if os.path.islink(path):
            reason = f"is a link to {os.readlink(path)}, which is not there"
            raise UserError(f"{path}: {reason}; fetch that file") from None
        raise UserError(f"{path}: no such file") from None
    with stream, _report_damage(path):
        chunks = [stream.read(HEAD_BYTES)]
        while len(chunks) * HEAD_BYTES < MAX_RECORD_BYTES:
            at_end = not chunks[-1]
            is_blank = not chunks[-1].removeprefix(codecs.BOM_UTF8).strip()
            if at_end or not is_blank:
                break
            chunks.append(stream.read(HEAD_BYTES))
    return b"".join(chunks), compression


def _check_utf8(path: Path | NamedFile, head: bytes) -> None:
    """Raises UserError if the first bytes of a file are not UTF-8."""
    try:
        # Incremental, because the last character may be cut.
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _continues_on_next_line(line: str) -> bool:
    """True if a line is the beginning of a JSON object that is not closed yet."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        # The decoder fails behind the last character if nothing is wrong but the end.
        return error.pos >= len(line.rstrip())
    except (RecursionError, ValueError):
        pass
    return False


def _is_object_of_objects(line: str) -> bool:
    """True if a file's only line is a JSON object whose values are records by an id."""
    try:
        value = json.loads(line)
    except (RecursionError, ValueError):
        return False
    return isinstance(value, dict) and _are_by_id(value)


def _are_by_id(value: dict) -> bool:
    """True if the values of an object are objects, of which there is at least one, and its keys may
    be their ids."""
    all_are_objects = bool(value) and all(isinstance(each, dict) for each in value.values())
    return all_are_objects and NO_IDS.isdisjoint(str(key).lower() for key in value)


def _compression(start: bytes) -> str | None:
    """Returns "gzip", "zstandard" or None, by the first four bytes of a file."""
    if start[:2] == b"\x1f\x8b":
        return "gzip"
    # zstandard may begin with a skippable frame, whose first byte is 0x50 to 0x5F (RFC 8878).
    is_skippable_frame = start[1:] == b"\x2a\x4d\x18" and start[0] >> 4 == 5
    if start == b"\x28\xb5\x2f\xfd" or is_skippable_frame:
        return "zstandard"
    return None


@contextlib.contextmanager
def _report_damage(path: Path | NamedFile) -> Iterator[None]:
    """Turns the errors of a decompressor (an early end, a wrong checksum) into a UserError of one
    line."""
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        # An error with a number is the operating system's, not the decompressor's.
        if getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{path}: damaged or cut off, {_one_line(error)}") from None


def _open(path: Path | NamedFile) -> tuple[BinaryIO, str | None]:
    """Opens a file for reading its decompressed bytes. Returns the stream, and the compression or
    None."""
    with open(path, "rb") as file:
        compression = _compression(file.read(4))
    if compression == "gzip":
        return gzip.open(path, "rb"), compression
    if compression == "zstandard":
        import pyarrow

        # pyarrow's own stream has no readline, so it is wrapped in a buffered reader.
        decompressed = pyarrow.CompressedInputStream(pyarrow.OSFile(os.fspath(path)), "zstd")
        return io.BufferedReader(_RawStream(decompressed), 1 << 18), compression
    return open(path, "rb", buffering=1 << 18), compression


class _RawStream(io.RawIOBase):
    """Makes of pyarrow's stream one that io.BufferedReader accepts."""

    def __init__(self, stream):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


# ---- one reader for each kind ----


def _lines(stream: BinaryIO, container: Container) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of JSONL, undecoded, without the blank ones.

    Only \\n ends a line: U+2028 may be part of a JSON string.
    """
    for number in count(1):
        line = stream.readline(MAX_RECORD_BYTES + 1)
        if len(line) > MAX_RECORD_BYTES:
            raise _too_long(container.place(number))
        if not line:
            return
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line


def _json_values(stream: BinaryIO, container: Container) -> Iterator[tuple[int, object]]:
    """Yields the values of a JSON file.

    Of a list each element, decoded one at a time, so that an error names the record that caused it.
    Of an object its values if they are records by an id, else the object itself.
    """
    text = _JSONWindow(stream, container.path)
    text.skip_space()
    if text.peek() == "{":
        value = text.decode(str(container.path))
        if text.skip_space():
            raise text.error(str(container.path), "more after the object's end")
        records = value.values() if _are_by_id(value) else [value]
        yield from enumerate(records, 1)
        return
    text.at += 1
    for number in count(1):
        place = container.place(number)
        text.skip_space()
        if number == 1 and text.peek() == "]":
            break
        try:
            value = text.decode(place)
        except RecordFault as fault:
            # `Container.value` raises it.
            value = fault
        yield number, value
        text.skip_space()
        if text.peek() != ",":
            break
        text.at += 1
    if text.peek() != "]":
        raise text.error(place, "a comma or ] is wanted")
    text.at += 1
    if text.skip_space():
        raise text.error(str(container.path), "more after the list's end")


class _JSONWindow:
    """A window that moves over the text of a JSON file, so that the file is never in memory as a
    whole.

    text: the part of the file in memory. at: the position in it up to which it has been decoded.
    lines, column: line ends before `text`, and characters between the last of them and `text`; for
    messages.
    """

    def __init__(self, stream: BinaryIO, path: Path | NamedFile):
        self.chunks = _decoded(stream, path)
        self.text = ""
        self.at = 0
        self.place = str(path)
        self.ended = False
        self.lines = 0
        self.column = 0

    def read_more(self) -> None:
        """Drops the text before `at` and reads on.

        It reads as many characters as are left, so that the time for a long record, which is
        decoded anew after each call, does not grow with the square of its length.
        """
        self.check_size()
        passed = self.text[: self.at]
        if "\n" in passed:
            self.lines += passed.count("\n")
            self.column = len(passed) - passed.rfind("\n") - 1
        else:
            self.column += len(passed)
        rest = self.text[self.at :]
        parts = [rest]
        missing = max(1, len(rest))
        while missing > 0 and not self.ended:
            chunk = next(self.chunks, None)
            if chunk is None:
                self.ended = True
            else:
                parts.append(chunk)
                missing -= len(chunk)
        self.text = "".join(parts)
        self.at = 0

    def check_size(self) -> None:
        """Raises UserError if a value whose end has not been read yet is too large already."""
        bytes_per_character = 1 if self.text.isascii() else 4
        size = (len(self.text) - self.at) * bytes_per_character
        if size > MAX_RECORD_BYTES:
            raise _too_long(self.place)
        if size > COUNT_VALUES_FROM:
            # A text has at least as many of these characters as values, less one.
            most_values = sum(self.text.count(character) for character in ",[{")
            if most_values > MAX_VALUES:
                raise _too_many_values(self.place)

    def peek(self) -> str:
        """Returns the next character, or "" at the end of what has been read."""
        return self.text[self.at : self.at + 1]

    def skip_space(self) -> bool:
        """Moves to the next character that is no white space. True if there is one."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.at < len(self.text)
            self.read_more()

    def decode(self, place: str) -> object:
        """Returns the JSON value that begins here, and moves behind it. place: the record's name,
        for messages."""
        self.place = place
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end - self.at > MAX_RECORD_BYTES:
                    raise _too_long(place)
                self.at = end
                return value
            except json.JSONDecodeError as error:
                # A value that the window's end cuts off fails near that end, except that an
                # unterminated string is reported at its start.
                near_end = error.pos >= len(self.text) - 12
                is_cut = near_end or error.msg.startswith("Unterminated")
                if self.ended or not is_cut:
                    self.at = error.pos
                    raise self.error(place, error.msg) from None
                self.read_more()
            except RecursionError:
                raise UserError(f"{place}: JSON nested too deep") from None
            except ValueError as error:  # of _refuse_constant or _refuse_duplicate_keys
                fault = f"{place}: {error}"
                if self.skip_value():
                    raise RecordFault(fault) from None
                raise UserError(fault) from None

    def skip_value(self) -> bool:
        """Moves behind the value that begins here, whatever it holds. False if its end is not
        found."""
        while True:
            try:
                _, self.at = ANY_VALUE.raw_decode(self.text, self.at)
                return True
            except json.JSONDecodeError:
                if self.ended:
                    return False
                self.read_more()
            except (RecursionError, ValueError):
                return False

    def error(self, place: str, why: str) -> UserError:
        """Returns the error for a fault at `at`, with its line and column in the whole file."""
        return _not_json(place, self.text, self.at, why, self.lines, self.column)


def _table_rows(stream: BinaryIO, container: Container) -> Iterator[tuple[int, dict]]:
    """Yields the rows of CSV (RFC 4180) or TSV as objects of strings, with the names in the first
    row as keys, or those of the container. In the place of a row that can't be read comes its
    UserError.

    A file whose first row begins with a number has no names. It is read as one of Zhang et al.
    2015: the number of a class, then texts; the names of the classes are read from a classes.txt in
    the same folder, if there is one.
    """
    rows = _csv_rows(stream, container)
    names = list(container.columns) or None
    classes = None  # of a file without names of columns: the names of its classes
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if names is None:
                raise UserError(f"{container.place(1)}: {_one_line(error)}") from None
            number += 1
            yield number, UserError(f"{container.place(number)}: {_one_line(error)}")
            continue
        # A row of one blank field is a blank line, except in a table of one column, where it is an
        # empty text.
        one_blank_field = len(row) == 1 and not row[0].strip()
        if not row or (one_blank_field and (names is None or len(names) > 1)):
            continue

        # The first row says what the columns are.
        if names is None:
            if row[0].isdecimal() and len(row) > 1:
                names = ["label", *["text"] * (len(row) - 1)]
                classes = _class_names(container.path)
            else:
                names = [name.strip() for name in row]
                _refuse_duplicate_columns(container.path, names)
                if len(names) == 1 and ";" in names[0]:
                    problem = "its columns are separated by semicolons; commas are wanted"
                    raise UserError(f"{container.path}: {problem}")
                continue

        number += 1
        if len(row) != len(names):
            wanted = "1 is wanted" if len(names) == 1 else f"{len(names)} are wanted"
            counts = f"has {number_of(len(row), 'column')}, {wanted}"
            yield number, UserError(f"{container.place(number)}: {counts}")
            continue
        if classes is None:
            yield number, dict(zip(names, row, strict=True))
            continue
        label = row[0]
        if classes:
            # Nine digits are enough for any class, and int() refuses thousands of them.
            is_known = label.isdecimal() and 1 <= int(label[:9]) <= len(classes)
            if not is_known:
                problem = f"class {label[:40]!r}, classes.txt names {len(classes)}"
                yield number, UserError(f"{container.place(number)}: {problem}")
                continue
            label = classes[int(label) - 1]  # the numbers begin at 1
        yield number, {"label": label, "text": "\n".join(row[1:])}


def _csv_rows(stream: BinaryIO, container: Container) -> Iterator[list[str]]:
    """Returns the rows of CSV or TSV as lists of cells. Its `next` raises csv.Error for a row that
    can't be read, and goes on behind it."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    delimiter = "\t" if container.kind.startswith("TSV") else ","
    return csv.reader(_text_lines(stream, container.path), delimiter=delimiter, strict=True)


def first_rows(container: Container, most: int) -> list[list[str]]:
    """Returns the first rows of a table as lists of cells, without blank ones, up to one that can't
    be read. most: their number at most."""
    rows: list[list[str]] = []
    stream, _ = _open(container.path)
    with stream, _report_damage(container.path), contextlib.suppress(csv.Error, UserError):
        for row in _csv_rows(stream, container):
            if any(cell.strip() for cell in row):
                rows.append(row)
            if len(rows) == most:
                break
    return rows


def _class_names(path: Path | NamedFile) -> list[str]:
    """Returns the lines of the classes.txt in a table's folder; empty if there is no such file."""
    file = Path(path).parent / CLASS_NAMES
    if not file.is_file():
        return []
    return read_text(file, HEAD_BYTES).rstrip("\n").split("\n")


def _refuse_duplicate_columns(path: Path | NamedFile, names: list[str]) -> None:
    """Raises UserError if two columns have the same name, for one of them would be lost."""
    if not names:
        return
    name, occurrences = Counter(names).most_common(1)[0]
    if occurrences > 1:
        raise UserError(f"{path}: two columns are called {name[:40]!r}")


def number_of_rows(path: Path | NamedFile) -> int:
    """Returns the number of rows of a Parquet file, which stands in its footer; 0 for one that can't
    be read, which is reported when it is."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(os.fspath(path)) as file:
            return file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError):
        return 0


def _parquet_rows(path: Path | NamedFile) -> Iterator[tuple[int, dict]]:
    """Yields the rows of a Parquet file, read a batch at a time.

    Classes that the library `datasets` wrote as numbers are replaced by their names.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(os.fspath(path)) as file:
            batches = file.iter_batches(batch_size=ROWS_AT_A_TIME)
            for number, row in _rows_of_batches(path, file.schema_arrow, batches):
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        problem = f"no whole Parquet file after row {number}, {_one_line(error)}"
        raise UserError(f"{path}: {problem}") from None


def _arrow_rows(path: Path | NamedFile) -> Iterator[tuple[int, dict]]:
    """Yields the rows of an Arrow file or stream, as the library `datasets` writes them with
    save_to_disk, read a batch at a time."""
    import pyarrow

    number = 0
    try:
        with pyarrow.memory_map(os.fspath(path)) as source:
            with open(path, "rb") as file:
                is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
            if is_file:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                reader = pyarrow.ipc.open_stream(source)
                batches = iter(reader)
            for number, row in _rows_of_batches(path, reader.schema, _in_small_batches(batches)):
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        problem = f"no whole Arrow file after row {number}, {_one_line(error)}"
        raise UserError(f"{path}: {problem}") from None


def _in_small_batches(batches: Iterator) -> Iterator:
    """Yields batches of at most ROWS_AT_A_TIME rows, so that few are Python objects at a time."""
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
            yield batch.slice(start, ROWS_AT_A_TIME)


def _rows_of_batches(
    path: Path | NamedFile, schema, batches: Iterator
) -> Iterator[tuple[int, dict]]:
    """Yields (number, row) of Arrow's batches, with the names of classes in place of their numbers,
    and with numbers of 32 bits and fewer as their writer wrote them."""
    _refuse_duplicate_columns(path, schema.names)
    class_columns = _class_columns(schema.metadata or {})
    short_floats = {name: schema.field(name).type for name in schema.names}
    short_floats = {name: kind for name, kind in short_floats.items() if has_short_floats(kind)}
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            for column, kind in short_floats.items():
                row[column] = with_short_floats(row[column], kind)
            for column, classes in class_columns.items():
                label = row.get(column)
                # A missing label is None, or -1 in test sets.
                if type(label) is int and 0 <= label < len(classes):
                    row[column] = classes[label]
            yield number, row


def _class_columns(metadata: dict) -> dict[str, list[str]]:
    """Returns {column: names of its classes}, from the metadata that `datasets` writes into Parquet
    files."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        columns = {}
        for name, feature in features.items():
            if feature.get("_type") == "ClassLabel":
                columns[name] = list(feature["names"])
        return columns
    except (ValueError, KeyError, TypeError, AttributeError):
        # Written by another library, or damaged: then the rows are read as they are.
        return {}


def _text_parts(stream: BinaryIO, container: Container) -> Iterator[tuple[int, Text]]:
    """Yields the text of a plain-text file; in several parts if it is longer than PART
    characters."""
    unread = ""
    num_characters = 0
    first = True
    number = 1
    for chunk in _decoded(stream, container.path):
        # UTF-16 without a byte order mark is valid UTF-8, with a NUL at every other place.
        if "\0" in chunk:
            at = num_characters + chunk.index("\0") + 1
            problem = f"holds a NUL at character {at}"
            raise UserError(f"{container.path}: {problem}; save it as UTF-8 text")
        num_characters += len(chunk)
        unread += chunk
        if len(unread) > PART:
            # Behind the last line end that something follows, so that the next part is not empty.
            cut = unread.rfind("\n", 0, -1) + 1
            if cut == 0:
                # There is none. One character stays, for the same reason.
                cut = len(unread) - 1
            yield number, Text(_normalize_line_ends(unread[:cut]), first, False)
            unread = unread[cut:]
            first = False
            number += 1
    yield number, Text(_normalize_line_ends(unread), first, True)


def _normalize_line_ends(text: str) -> str:
    """Returns the text with `\\n` for the line ends of Windows and of old Macs."""
    if "\r" not in text:
        return text
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ---- from bytes to text, from text to JSON ----


def _decoded(stream: BinaryIO, path: Path | NamedFile) -> Iterator[str]:
    """Yields the text of a UTF-8 file in chunks, without its byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_bytes = 0
    first = True
    while True:
        data = stream.read(1 << 20)
        # Bytes of a character that the previous chunk began.
        pending, _ = decoder.getstate()
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at = num_bytes - len(pending) + error.start
            raise UserError(f"{path}: not UTF-8 at byte {at}; save it as UTF-8") from None
        num_bytes += len(data)
        if first:
            text = text.removeprefix("\ufeff")
            first = False
        if not data:
            return
        yield text


def _text_lines(stream: BinaryIO, path: Path | NamedFile) -> Iterator[str]:
    """Yields the lines of a UTF-8 file, each with its line end."""
    parts = []  # of the line whose end has not been read yet
    size = 0  # characters in them
    for chunk in _decoded(stream, path):
        if "\0" in chunk:
            raise UserError(f"{path}: holds a NUL; save it as UTF-8 text")
        first, *lines = chunk.split("\n")
        parts.append(first)
        size += len(first)
        for line in lines:
            yield "".join(parts) + "\n"
            parts = [line]
            size = len(line)
        if size > MAX_RECORD_BYTES:
            raise _too_long(str(path))
    last = "".join(parts)
    if last:
        yield last


def decode(text: str, at: int, place: str) -> tuple[object, int]:
    """Returns the JSON value that begins at position `at`, and the position after it.

    Raises UserError that names the place. place: the record's name, for messages.
    """
    try:
        return DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _not_json(place, error.doc, error.pos, error.msg) from None
    except RecursionError:
        raise UserError(f"{place}: JSON nested too deep") from None
    except ValueError as error:  # of _refuse_constant or _refuse_duplicate_keys
        raise UserError(f"{place}: {error}") from None


def _not_json(
    place: str, text: str, at: int, why: str, lines: int = 0, column: int = 0
) -> UserError:
    """Returns the error for JSON that is wrong at position `at` of `text`.

    lines, column: line ends before `text`, and characters between the last of them and `text`.
    """
    is_cut = at >= len(text.rstrip()) or why.startswith("Unterminated string")
    fault = "JSON cut off" if is_cut else "not JSON"
    line = lines + text.count("\n", 0, at) + 1
    if "\n" in text[:at]:
        # The line begins in this text; what stands before the text is on earlier lines.
        column = 0
    column += at - text.rfind("\n", 0, at)
    where = f"column {column}"
    # The place of a record of JSONL names its line already.
    if lines or "\n" in text:
        where = f"line {line} {where}"
    return UserError(f"{place}: {fault} at {where} ({why})")


def _too_long(place: str) -> UserError:
    """Returns the error for a record of more than MAX_RECORD_BYTES."""
    limit = f"{MAX_RECORD_BYTES >> 20} MB"
    advice = "put each on a line of its own"
    return UserError(f"{place}: longer than {limit}, too much for a record; {advice}")


def _too_many_values(place: str) -> UserError:
    """Returns the error for a record of more than MAX_VALUES."""
    return UserError(f"{place}: holds more than {MAX_VALUES:,} values, too many for a record")


def _one_line(error: Exception) -> str:
    """Returns the words of an error on one line, of at most 120 characters."""
    return " ".join(str(error).split())[:120]


def _refuse_constant(name: str):
    """Refuses NaN and Infinity, which Python's decoder would accept."""
    raise ValueError(f"{name} is not JSON; write null, a string or a number")


def _refuse_duplicate_keys(pairs: list[tuple[str, object]]) -> dict:
    """Returns the object of these pairs. Raises ValueError if a key occurs twice, for one value
    would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        occurrences = Counter(key for key, _ in pairs)
        key, _ = occurrences.most_common(1)[0]
        raise ValueError(f"key {key[:40]!r} stands twice in an object")
    return value


def _parse_int(digits: str) -> int | float:
    """Returns the number; infinity if it has more than MAX_DIGITS, which is refused wherever it
    would be trained, and does no harm elsewhere."""
    if len(digits) <= MAX_DIGITS:
        return int(digits)
    return float(digits)


SPACE = re.compile(r"\s*")
# Finds the end of a value that DECODER refuses for what it holds.
ANY_VALUE = json.JSONDecoder(parse_int=_parse_int)
DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant,
    parse_int=_parse_int,
    parse_float=written_number,
    object_pairs_hook=_refuse_duplicate_keys,
)
