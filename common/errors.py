"""What a user's mistake looks like: one line that says what is wrong, where, and what to do.

Everything that a user can get wrong (a flag, a file, a record in it, a folder of weights) raises `UserError`; `run`
catches it once, at the top of each script, prints the line and leaves with exit code 2. Anything else that escapes is
a bug of ours and shows its traceback. `assert` is for our own invariants, never for a user's input.
"""

import json
import os
import sys
from pathlib import Path

# A JSON file is read whole, and what it holds may take 25 times its size in memory. Gemma's tokenizer.json, the largest
# published, has 33 MB and 2 million values; at these bounds Python needs 0.8 GB.
JSON_BYTES = 64 << 20
JSON_VALUES = 8_000_000
LONGEST_MESSAGE = 2_000  # characters: a name in a stranger's file may have millions


class UserError(Exception):
    """A mistake that its maker can mend. The message is one line: what is wrong, where, what to do."""

    def __str__(self) -> str:
        return super().__str__()[:LONGEST_MESSAGE]


def run(main) -> None:
    """Calls main() as a script's whole life: exit code 0, or one line on stderr and 2 (mistake) or 130 (Ctrl-C)."""
    try:
        main()
    except UserError as error:
        print(f"{rank_prefix()}error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `python evaluate.py ... | head`: the reader has left, nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk, a folder without permission: the file's name is all there is to say
        print(rank_prefix() + printable(f"error: {describe_os_error(error, 'input/output')}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def describe_os_error(error: OSError, where: object) -> str:
    """Which file, and what is the matter with it. where: in place of a file that is not named."""
    return f"{error.filename or where}: {error.strerror or error}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; the name of its type where it has no message."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def rank_prefix() -> str:
    """Of several processes that torchrun started, which one this is."""
    return f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""


def printable(text: str) -> str:
    """The text with what does not print escaped: a stranger's file must move no cursor and end no line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_text(path: Path, most: int | None = None) -> str:
    """A UTF-8 text file, byte order mark dropped and line ends as `\\n`. UserError naming the file, else the byte; also
    where it has over `most` bytes, before it is read."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, a file is wanted")
    try:
        if most is not None and (size := path.stat().st_size) > most:
            raise UserError(f"{path}: {size / 1e6:,.0f} MB, at most {most / 1e6:.0f} are read")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def read_json_if_there(path: Path) -> dict:
    """As read_json; {} where there is no such file."""
    return read_json(path) if Path(path).is_file() else {}


def read_json(path: Path, kind: type = dict):
    """The JSON value in a file, of type `kind`. UserError names the file and, for bad JSON, line and column; also where
    it is beyond JSON_BYTES or JSON_VALUES, before it is read or parsed."""
    text = read_text(path, JSON_BYTES)
    if sum(map(text.count, ",[{")) > JSON_VALUES:  # no fewer than there are values
        raise UserError(f"{path}: holds more than {JSON_VALUES:,} values, too many for a file of this kind")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at line {error.lineno} column {error.colno} ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deep") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise UserError(f"{path}: {error}") from None
    if not isinstance(value, kind):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}, {kind.__name__} is wanted")
    return value
