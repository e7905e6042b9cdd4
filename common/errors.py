"""How a user's mistake is reported: one line that says what is wrong, where, and what to do.

Everything that a user can get wrong (a flag, a file, a record in it, a folder of weights) raises
`UserError`; `run` catches it once, at the top of each script, prints the line and exits with code
2. Any other error that reaches the top is a bug of this program and shows its traceback. `assert`
checks invariants of the program, never a user's input.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

# A JSON file is read whole, and its values may take 25 times its size in memory. The largest
# published one, the tokenizer.json of Gemma, has 33 MB and 2 million values. At these limits Python
# needs 0.8 GB.
JSON_BYTES = 64 << 20
JSON_VALUES = 8_000_000

# Characters. A name in a file from an unknown source may have millions, and would be part of the
# message.
LONGEST_MESSAGE = 2_000
# Of one of several lines.
LONGEST_LINE = 300


class UserError(Exception):
    """A mistake that the user can correct. The message is one line: what is wrong, where, what to
    do."""

    def __str__(self) -> str:
        return super().__str__()[:LONGEST_MESSAGE]


class FaultyRecords(UserError):
    """The faults of several records of a file, a line each; its arguments are these lines."""

    def __str__(self) -> str:
        return "\n".join(printable(line[:LONGEST_LINE]) for line in self.args)


def run(main) -> None:
    """Runs main() as a script.

    A mistake of the user, or an error of input or output, is one line on stderr and exit code 2;
    Ctrl-C is exit code 130; a closed pipe on stdout is exit code 1.
    """
    prepare_standard_streams()
    try:
        check_working_directory()
        main()
    except FaultyRecords as error:
        print_error(*str(error).split("\n"))
        sys.exit(2)
    except UserError as error:
        print_error(str(error))
        sys.exit(2)
    except BrokenPipeError:
        # As in `python evaluate.py ... | head`: nobody reads stdout any more. Without this, Python
        # would fail again when it flushes stdout at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        # As from a full disk, or a folder without permission. The name of the file says all that is
        # known.
        print_error(describe_os_error(error, "input/output"))
        sys.exit(2)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("\nstopped", file=sys.stderr)
        sys.exit(130)


def check_working_directory() -> None:
    """Raises UserError if the working directory was deleted, so that relative paths mean nothing.

    A torch that is built with MKL does not get here: MKL ends the process with a line of its own.
    """
    try:
        os.getcwd()
    except OSError:
        problem = "the working directory was deleted"
        raise UserError(f"{problem}; change to one that exists, and start again") from None


def print_error(message: str, *more_lines: str) -> None:
    """Prints the line that ends a script, and perhaps more, to stderr; where nobody reads them,
    nothing."""
    with contextlib.suppress(OSError):
        print(f"{rank_prefix()}error: {printable(message)}", file=sys.stderr)
        for line in more_lines:
            print(printable(line), file=sys.stderr)


def prepare_standard_streams() -> None:
    """Lets stdout and stderr take every text, and opens the standard streams that are closed.

    What a console's encoding does not have is escaped, and so are the bytes of a file name that is
    not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        is_strict = getattr(stream, "errors", None) in ("strict", "surrogateescape")
        if is_strict and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # The next file that is opened would get the number of a closed stream, and what a library
    # prints from C would be written into it. The numbers are given from the lowest on.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python has no stream for a closed one.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it stays open)


def describe_os_error(error: OSError, where: object) -> str:
    """Returns the file and what is wrong with it. where: stands for the file if the error does not
    name one."""
    return f"{error.filename or where}: {error.strerror or error}"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type if it has no message;
    at most 200 characters."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text[:200]


def rank_prefix() -> str:
    """Returns "rank N: " if torchrun has started several processes, else ""."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ""
    return f"rank {os.environ['RANK']}: "


def printable(text: str) -> str:
    """Returns the text with all characters that are not printable escaped, so that text from a file
    can neither move the cursor nor start a new line."""
    result = []
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        result.append(character)
    return "".join(result)


def read_text(path: Path, most: int | None = None) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark and with line ends as `\\n`.

    Raises UserError if there is no such file, if it is a pointer of Git LFS, if it has more than
    `most` bytes (before it is read), or if it is not UTF-8 (with the byte's number).
    """
    # This late, since that file imports this one.
    from common.files import refuse_pointer

    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, a file is wanted")
    refuse_pointer(path)
    try:
        if most is not None:
            size = path.stat().st_size
            if size > most:
                limit = f"at most {most / 1e6:.2g} MB are read"
                decimals = 0 if size >= 1e6 else 1
                raise UserError(f"{path}: has {size / 1e6:,.{decimals}f} MB, {limit}")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def read_json_if_there(path: Path) -> dict:
    """Returns the JSON object in a file as `read_json` does, or {} if there is no such file."""
    if not Path(path).is_file():
        return {}
    return read_json(path)


def read_json(path: Path, kind: type = dict):
    """Returns the JSON value in a file, of type `kind`.

    Raises UserError that names the file, and for bad JSON the line and column. A file beyond
    JSON_BYTES is refused before it is read, one beyond JSON_VALUES before it is parsed.
    """
    text = read_text(path, JSON_BYTES)
    # A text has at least as many of these characters as values, less one.
    most_values = sum(text.count(character) for character in ",[{")
    if most_values > JSON_VALUES:
        problem = f"holds more than {JSON_VALUES:,} values, too many for a file of this kind"
        raise UserError(f"{path}: {problem}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{path}: not JSON at {where} ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deep") from None
    except ValueError as error:
        # An integer with more digits than Python converts.
        raise UserError(f"{path}: {error}") from None
    if not isinstance(value, kind):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}, {kind.__name__} is wanted")
    return value
