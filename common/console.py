"""Prints to the terminal: aligned tables, and text from unknown sources on one line.

Text that comes from a file of an unknown source, or from a model, may have control characters. They
are escaped, so that they can't move the cursor.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO, cast

from common.errors import printable


def print_stderr(line: str) -> None:
    """Prints a line to stderr at once. Stdout is left to a script's results."""
    print(line, file=sys.stderr, flush=True)


class LastingStream:
    """A stream of text whose failures end nothing: what can't be written is dropped.

    remark: a line that is printed to stderr when nobody reads the stream any more; "" for none.
    """

    def __init__(self, stream: TextIO, remark: str = ""):
        self.stream = stream
        self.remark = remark

    def write(self, text: str) -> int:
        """Writes a text as far as it can be. Returns its length."""
        try:
            self.stream.write(text)
        except OSError as error:
            self.drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.drop(error)

    def close_quietly(self) -> None:
        """Writes what is left in the stream's buffer, so that Python need not do it at its exit."""
        try:
            self.stream.flush()
        except OSError:
            self.redirect_to_nothing()

    def drop(self, error: OSError) -> None:
        """Gives the stream up, unless the disk of its file is full: there may be room later."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return
        self.redirect_to_nothing()
        remark = self.remark
        self.remark = ""
        if remark:
            print_stderr(f"{remark} ({error.strerror})")

    def redirect_to_nothing(self) -> None:
        """Lets the stream's file descriptor go nowhere; Python's buffer is emptied into it."""
        # A stream in memory, as tests have it, has no descriptor.
        with contextlib.suppress(io.UnsupportedOperation):
            number = self.stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)

    def __getattr__(self, name: str):
        """Returns what the stream has besides, as `isatty` and `encoding`."""
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting_output(remark: str) -> Iterator[None]:
    """A block that goes on where stdout or stderr is closed: `| head`, a terminal that is gone, a
    log on a full disk.

    remark: a line that is printed to stderr when nobody reads stdout any more.
    """
    before = (sys.stdout, sys.stderr)
    stdout = LastingStream(sys.stdout, remark)
    stderr = LastingStream(sys.stderr)
    sys.stdout = cast(TextIO, stdout)
    sys.stderr = cast(TextIO, stderr)
    try:
        yield
    finally:
        stdout.close_quietly()
        stderr.close_quietly()
        sys.stdout, sys.stderr = before


class Transcript:
    """What is printed while it is open: the text so far, and the rows of each table by its text."""

    def __init__(self) -> None:
        self.text = ""
        self.tables: dict[str, list[list[str]]] = {}


class KeptStream(LastingStream):
    """A stream whose text a transcript keeps as well."""

    def __init__(self, stream: TextIO, kept: Transcript):
        super().__init__(stream)
        self.kept = kept

    def write(self, text: str) -> int:
        self.kept.text += text
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


# The transcript that is open, if one is.
_open: list[Transcript] = []


@contextlib.contextmanager
def transcript() -> Iterator[Transcript]:
    """A block of which everything that it prints to stdout is kept as well, with the rows of its tables."""
    kept = Transcript()
    before = sys.stdout
    sys.stdout = cast(TextIO, KeptStream(before, kept))
    _open.append(kept)
    try:
        yield kept
    finally:
        _open.remove(kept)
        sys.stdout = before


def number_of(number: int, unit: str) -> str:
    """Returns a number with what it counts: 1 record, 2,000 records. unit: a word for one of them,
    to which an s is added for others."""
    return f"{number:,} {unit}" if number == 1 else f"{number:,} {unit}s"


def format_duration(seconds: float) -> str:
    """Returns a time as a person says it: 45 s, 12 min, 3.4 h, 2.1 days."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 10:
        return f"{minutes:.1f} min"
    if minutes < 60:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    if hours < 48:
        return f"{hours:.1f} h"
    days = hours / 24
    return f"{days:.1f} days" if days < 10 else f"{days:,.0f} days"


def table(rows: list[list[str]]) -> str:
    """Returns rows of cells as aligned text. The first row is the heading; the first column is
    aligned left, all others right."""
    widths = []
    for column in range(len(rows[0])):
        lengths = [len(row[column]) for row in rows]
        widths.append(max(lengths))
    lines = []
    for row in rows:
        # Names are read from the left, numbers are compared from the right.
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:]):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells))
    heading, *body = lines
    rule = "-" * len(heading)
    text = "\n".join([heading, rule, *body])
    for kept in _open:
        kept.tables[text] = rows
    return text


def one_line(text: str, width: int = 100) -> str:
    """Returns the text on one line of at most `width` characters, with what is not printable
    escaped."""
    # Cut before it is escaped, for the text may be long; an escape is longer than its character.
    line = printable(text[:width])
    if len(text) > width or len(line) > width:
        return line[: width - 3] + "..."
    return line


def both_ends(text: str, width: int = 100) -> str:
    """Returns the text on one line of at most `width` characters; of a longer one its beginning and
    its end, as of a question that stands behind a long text."""
    if len(text) <= width:
        return one_line(text, width)
    half = (width - 5) // 2
    beginning = printable(text[:half])[:half]
    end = printable(text[-half:])[-half:]
    return f"{beginning} ... {end}"
