"""Copies of remote files in the cache: written whole or not at all, gone on with where they broke
off, and kept with what the server said of the version that they are copies of.

The copies of a name lie in `data/KEY/` of the cache folder. Next to a copy are hidden files: `.copy`
with its name and version, and, while it is fetched, `.part` with `.part.copy`.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common.errors import UserError
from common.files import (
    atomic_file,
    cache_folder,
    check_cache_takes_files,
    fsync_path,
    reported_full_cache,
    write_json,
)
from dataset.token_cache import locked
from interop.hub import LEFT_FREE

CONNECT_SECONDS = 10
ANSWER_SECONDS = 30  # without a byte, after which the connection counts as broken
FETCH_ATTEMPTS = 4  # in a row that bring nothing, before a fetch is given up
PAUSE_SECONDS = 0.5  # before the second attempt; twice that before each later one


class BrokenOff(Exception):
    """The connection broke, or there was none. The message says how; it holds no secret."""


@dataclass(frozen=True)
class Use:
    """How copies are used.

    print_fn: is called with a line about what is fetched, or why a copy is used instead.
    asks: False takes a whole copy as it is, in silence: the first process of a machine has asked
        already, and all are to read the same.
    keeps: True takes a copy also where its original has changed since: for a run that goes on.
    """

    print_fn: Callable
    asks: bool = True
    keeps: bool = False


@dataclass(frozen=True)
class Version:
    """What a server says of a file, by which a change is noticed. "" and None: it does not say.

    etag, modified: as HTTP has them; of objects in a bucket, the time of change. size: bytes.
    """

    etag: str = ""
    modified: str = ""
    size: int | None = None

    def is_known(self) -> bool:
        """True if another file would have another version."""
        return bool(self.etag or (self.modified and self.size is not None))

    def is_same(self, other: "Version") -> bool:
        """True if both are of the same file as far as is said: a size may be unknown."""
        sizes = {self.size, other.size} - {None}
        return (self.etag, self.modified) == (other.etag, other.modified) and len(sizes) < 2

    def title(self) -> str:
        """Returns the size for messages."""
        return "of unknown size" if self.size is None else in_bytes(self.size)


def in_bytes(size: int) -> str:
    """Returns a number of bytes for messages, as 12.3 MB or 4,321 bytes."""
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size:,} bytes"


@dataclass
class Stream:
    """The bytes of a file that a server sends.

    version: of the file. start: the place in the file at which they begin. chunks: raises BrokenOff
    where the connection breaks.
    """

    version: Version
    start: int
    chunks: Iterator[bytes]


class Whole(NamedTuple):
    """A copy that is whole, and the version that it is of."""

    path: Path
    version: Version

    def day(self) -> str:
        """Returns when the copy was fetched, as 2026-11-29 14:05."""
        moment = time.localtime(self.path.stat().st_mtime)
        return time.strftime("%Y-%m-%d %H:%M", moment)


class PartialCopy(NamedTuple):
    """What an earlier attempt has left, which can be gone on with: its bytes, and of which version."""

    size: int
    version: Version


@dataclass
class Copy:
    """A file of the cache that is, or will be, the copy of a remote one.

    name: of the remote file, for messages. folder: of the copy.
    label: what the names of the hidden files begin with; "" where the folder has one copy.
    """

    name: str
    folder: Path
    label: str = ""

    def hidden(self, suffix: str) -> Path:
        """Returns the path of one of the files beside the copy."""
        return self.folder / f"{self.label}.{suffix}"

    def whole(self) -> Whole | None:
        """Returns the whole copy, None if there is none."""
        file, version = read_note(self.hidden("copy"))
        if version is None or not file:
            return None
        path = self.folder / file
        try:
            size = path.stat().st_size
        except OSError:
            return None
        # A disk may lose what was written, or a person may have changed it.
        return Whole(path, version) if size == version.size else None

    def part(self) -> PartialCopy | None:
        """Returns what an earlier attempt has left, None if it can't be gone on with."""
        _, version = read_note(self.hidden("part.copy"))
        try:
            size = self.hidden("part").stat().st_size
        except OSError:
            return None
        if version is None or not version.is_known() or not size:
            return None
        return PartialCopy(size, version)

    def finish(self, file: str, version: Version) -> Path:
        """Gives what has arrived its name, and returns its path."""
        part = self.hidden("part")
        fsync_path(part)
        before = self.whole()
        path = self.folder / file
        # In this order: a crash between leaves a file without a note, which is no copy.
        self.hidden("copy").unlink(missing_ok=True)
        os.replace(part, path)
        if before is not None and before.path != path:
            before.path.unlink(missing_ok=True)
        write_note(self.hidden("copy"), file, version)
        self.hidden("part.copy").unlink(missing_ok=True)
        return path


def read_note(file: Path) -> tuple[str, Version | None]:
    """Returns the name of a copy's file and its version; "" and None if they are not there."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        version = Version(str(value["etag"]), str(value["modified"]), value["size"])
        return Path(value["file"]).name, version
    except (OSError, ValueError, KeyError, TypeError):
        return "", None


def write_note(path: Path, file: str, version: Version) -> None:
    """Writes what `read_note` reads."""
    with atomic_file(path) as tmp:
        write_json({"file": file, **asdict(version)}, tmp)


def copies_folder(key: str) -> Path:
    """Returns the folder of the copies of what has this key (remote_names.copy_key)."""
    return cache_folder() / "data" / key


def fill(
    copy: Copy,
    file: str,
    stream: Stream,
    open_again: Callable[[int, Version], Stream],
    bar: tqdm,
) -> Path:
    """Writes a file that a server sends, whole or not at all, and returns its path.

    file: its name. stream: what the server sends now; it begins behind what an earlier attempt has
    left, or at 0.
    open_again: asks the server for the same file from a place on, after the connection broke.
        Raises BrokenOff if there is none, and UserError if the server refuses.
    bar: advances by the bytes that arrive.
    Raises UserError if it can't be had: the part that arrived is kept for the next start.
    """
    part = copy.hidden("part")
    failures = 0
    with reported_full_cache(copy.folder):
        while True:
            version = stream.version
            if stream.start == 0:
                write_note(copy.hidden("part.copy"), file, version)
            size, reason = write_chunks(part, stream, bar)
            if version.size is not None and size > version.size:
                part.unlink()
                problem = f"sends {size:,} bytes, and has said {version.size:,}"
                raise UserError(f"{copy.name}: the server {problem}")
            if not reason and version.size in (None, size):
                return copy.finish(file, Version(version.etag, version.modified, size))
            failures = 1 if size > stream.start else failures + 1
            if failures >= FETCH_ATTEMPTS:
                raise cut_off(copy, version, size, reason)
            time.sleep(PAUSE_SECONDS * 2 ** (failures - 1))
            try:
                stream = open_again(size, version)
            except BrokenOff as error:
                stream = Stream(version, size, broken(str(error)))
            if stream.start < size:
                # From the beginning once more.
                bar.update(stream.start - size)


def broken(reason: str) -> Iterator[bytes]:
    """Yields nothing, and raises BrokenOff."""
    raise BrokenOff(reason)
    yield b""


def write_chunks(part: Path, stream: Stream, bar: tqdm) -> tuple[int, str]:
    """Writes what a server sends into a file. Returns the bytes in it, and how the connection broke,
    "" if it did not."""
    with open(part, "r+b" if stream.start else "wb") as file:
        file.truncate(stream.start)
        file.seek(stream.start)
        try:
            for chunk in stream.chunks:
                file.write(chunk)
                bar.update(len(chunk))
        except BrokenOff as error:
            return file.tell(), str(error) or "it broke"
        return file.tell(), ""


def cut_off(copy: Copy, version: Version, size: int, reason: str) -> UserError:
    """Returns the error of a file of which only `size` bytes could be had."""
    of_size = "" if version.size is None else f" of {version.size:,}"
    why = reason or "the server ended it"
    advice = "run it again to go on from there" if version.is_known() else "run it again"
    return UserError(f"{copy.name}: cut off at {size:,}{of_size} bytes, {why}; {advice}")


def check_room_for_copy(name: str, size: int, folder: Path) -> None:
    """Raises UserError if `size` bytes more would leave less than LEFT_FREE bytes of the cache's
    disk. Makes the folder."""
    check_cache_takes_files(folder)
    folder.mkdir(parents=True, exist_ok=True)
    room = max(shutil.disk_usage(folder).free - LEFT_FREE, 0)
    if size > room:
        need = f"{size / 1e9:.1f} GB are to be fetched"
        free = f"{room / 1e9:.1f} GB are free in {folder.parent}"
        advice = "free some space, or set PLAINTUNE_CACHE to another folder"
        raise UserError(f"{name}: {need}, {free}; {advice}")


def why_read_only(folder: Path) -> str:
    """Returns why no copy can be written into a folder of the cache, "" if one can: a cache that a
    container has mounted, for example, may be there to be read only."""
    try:
        check_cache_takes_files(folder)
    except UserError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def folder_for_copies(name: str, folder: Path) -> Iterator[None]:
    """Holds a lock for a folder of copies during the block, and makes it; where nothing came of
    that, the folder is not left behind.

    Raises UserError if the cache can't be written to.
    """
    check_room_for_copy(name, 0, folder)
    with locked(folder):
        try:
            yield
        finally:
            # It may have held something already, and then it can't be removed.
            with contextlib.suppress(OSError):
                folder.rmdir()
