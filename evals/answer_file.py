"""The file of answers of `generate.py --data`, which a killed run goes on with.

While not all answers are there, they are in OUT.partial: a line that holds the settings, then a
line an answer, in the order in which they were generated. A batch is written in one piece and
waited for (fsync), so a kill or a power cut costs at most the batch that was being generated. A
line that was cut off at the end is cut away. When all answers are there, OUT is written in the order
of the records, at once and whole, and OUT.partial is removed.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

from common.errors import UserError, describe_os_error
from common.files import atomic_file
from common.folder_lock import open_locked

# What the settings of the first line are called in a message. Those without a name here may differ
# when a run goes on.
SETTING_NAMES = {
    "prompts": "the prompts (--data, --map, --limit, --system, --complete, --template, --date)",
    "model": "the weights of the model (--model)",
    "adapter": "the adapter (--adapter)",
    "quant": "--quant",
    "merge": "--merge",
    "dtype": "--dtype",
    "samples": "--samples",
    "seed": "--seed",
    "max_new_tokens": "--max-new-tokens",
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repetition_penalty": "--repetition-penalty",
}
# What the first line of a partial file begins with.
FIRST_LINE = b'{"settings": '
# Of these settings, the values are hashes, which say nothing to a reader.
HASHES = ("prompts", "model", "adapter")


class LinePlace(NamedTuple):
    """Where a line stands in the partial file, in bytes, and how its answer ended."""

    offset: int
    length: int
    finish: str


class AnswerFile:
    """A file of answers that is being written, until the `with` block ends.

    out: the file. partial: the one that holds the answers until all are there.
    places: of every answer that is there, by (record, sample).
    settings: those that the answers are generated with, once `begin` was called.
    """

    def __init__(self, out: Path, overwrite: bool, is_one_of_several: bool = False):
        """is_one_of_several: a command writes more than one. What is partial stays when the file is
        finished, until `remove_partial`: the same command then goes on with the others.

        Raises UserError where the file can't be written, or is there and not to be replaced.
        """
        self.out = out
        self.is_one_of_several = is_one_of_several
        self.partial = out.with_name(out.name + ".partial")
        self.overwrite = overwrite
        self.places: dict[tuple[int, int], LinePlace] = {}
        self.settings: dict = {}
        self.opened = contextlib.ExitStack()
        if out.is_dir():
            raise UserError(f"--out {out}: is a folder, the name of a file is wanted")
        can_go_on = is_one_of_several and self.partial.exists()
        if out.exists() and not overwrite and not can_go_on:
            raise UserError(f"--out {out}: is there already; --overwrite replaces it")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        # The partial file is free for another process then. Where its disk is full, the error was
        # raised when it was written to.
        with contextlib.suppress(OSError):
            self.opened.close()

    def begin(self, settings: dict, new_seed: int | None) -> None:
        """Opens the partial file; where it holds answers already, these count.

        settings: what the answers depend on. A seed of None is that of the answers which are there,
        or new_seed where there are none.
        Raises UserError where the answers there were generated with other settings (and are not to
        be replaced), or where another process is writing.
        """
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            descriptor = open_locked(self.partial)
        except OSError as error:
            raise UserError(f"--out {describe_os_error(error, self.partial)}") from None
        if descriptor is None:
            raise UserError(f"{self.partial}: another process is writing it; name another --out")
        self.stream = self.opened.enter_context(os.fdopen(descriptor, "r+b"))
        before = self.read_settings()
        # A first line that was cut off has no answers behind it.
        if before is not None:
            changes = differences(before, settings)
            if not changes:
                self.settings = before
                self.read_places()
                return
            if not self.overwrite:
                raise UserError(
                    f"{self.partial}: holds answers that were generated with other settings:"
                    f" {'; '.join(changes)}. Give the same ones to go on, or --overwrite to begin"
                    " anew"
                )
        self.stream.seek(0)
        self.stream.truncate()
        if settings["seed"] is None:
            settings = settings | {"seed": new_seed}
        self.settings = settings
        self.append([json.dumps({"settings": settings}) + "\n"])

    def read_settings(self) -> dict | None:
        """Returns the settings in the first line; None if the file is empty, or the line cut off.

        Raises UserError if the first line is another program's.
        """
        self.stream.seek(0)
        line = self.stream.readline()
        if not line.endswith(b"\n") and FIRST_LINE.startswith(line[: len(FIRST_LINE)]):
            return None
        try:
            return dict(json.loads(line)["settings"])
        except (ValueError, KeyError, TypeError):
            problem = "is in the way, and holds no answers of generate.py"
            raise UserError(f"{self.partial}: {problem}; move it, or name another --out") from None

    def read_places(self) -> None:
        """Finds the answers that are there, and cuts off a last line that is not whole.

        Raises UserError for a line that is damaged.
        """
        offset = self.stream.tell()
        number = 1
        for line in self.stream:
            number += 1
            if not line.endswith(b"\n"):
                break
            try:
                answer = json.loads(line)
                key = (answer["record"], answer.get("sample", 1))
                self.places[key] = LinePlace(offset, len(line), answer["finish"])
            except (ValueError, KeyError, TypeError):
                problem = f"line {number} is damaged"
                raise UserError(
                    f"{self.partial}: {problem}; delete the file to begin anew"
                ) from None
            offset += len(line)
        self.stream.seek(offset)
        self.stream.truncate()

    def write(self, answers: Iterable[tuple[tuple[int, int], str, str]]) -> None:
        """Writes the answers of a batch, and waits until the disk has them.

        answers: of each (record, sample), its line, and how it ended.
        """
        offset = self.stream.seek(0, os.SEEK_END)
        lines = []
        places = {}
        for key, line, finish in answers:
            length = len(line.encode())
            places[key] = LinePlace(offset, length, finish)
            offset += length
            lines.append(line)
        self.append(lines)
        self.places |= places

    def append(self, lines: list[str]) -> None:
        """Writes lines at the end in one piece, and waits until the disk has them."""
        try:
            self.stream.write("".join(lines).encode())
            self.stream.flush()
            os.fsync(self.stream.fileno())
        except OSError as error:
            # The system's error does not name the file.
            raise OSError(error.errno, error.strerror, str(self.partial)) from None

    def finish(self) -> None:
        """Writes OUT in the order of the records, and removes the partial file, unless others are to
        be finished as well."""
        with atomic_file(self.out) as tmp, open(tmp, "wb") as file:
            for key in sorted(self.places):
                place = self.places[key]
                self.stream.seek(place.offset)
                file.write(self.stream.read(place.length))
        if not self.is_one_of_several:
            self.remove_partial()

    def remove_partial(self) -> None:
        """Removes the partial file, whose answers are in OUT."""
        self.partial.unlink(missing_ok=True)


def differences(before: dict, now: dict) -> list[str]:
    """Returns the settings that differ, in words."""
    changes = []
    for key, name in SETTING_NAMES.items():
        old, new = before.get(key), now.get(key)
        if old == new or (key == "seed" and new is None):
            continue
        if key in HASHES:
            changes.append(name)
        else:
            changes.append(f"{name} {old}, now {new}")
    return changes
