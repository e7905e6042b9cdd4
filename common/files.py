"""Writes files and folders so that each exists whole or not at all; also JSON, hashes, and the
cache folder.

A crash or a full disk must not leave half a file under its final name. So `atomic_file` and
`atomic_folder` write under a temporary name in the same folder, wait until the disk has the bytes
(fsync), and then rename.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

# org/model or org/model@revision
HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?", re.ASCII)


# How the text begins that Git LFS, XetHub and git-annex leave in place of a file which was not fetched, and
# the command that fetches it. Git LFS was called Hawser before its first release.
POINTERS = (
    (b"version https://git-lfs.github.com/spec/", "Git LFS", "git lfs pull"),
    (b"version https://hawser.github.com/spec/", "Git LFS", "git lfs pull"),
    (b"# xet version ", "XetHub", "git xet checkout"),
    (b"/annex/objects/", "git-annex", "git annex get"),
)
# What to do where the cache can't be used.
SET_CACHE = "set PLAINTUNE_CACHE to another folder"
# Bytes that are read at a time for a CRC-32.
CRC_PART = 1 << 20
# Text of any kind; a web page is one.
MAY_BE_PAGES = (".txt", ".md", ".html", ".htm")
# Bytes. The specification of Git LFS has pointers below this size.
POINTER_BYTES = 1024


@dataclass(frozen=True)
class NamedFile:
    """A file that is the copy of one elsewhere: it is opened by its path on this disk, and messages
    call it by the name that the user knows."""

    path: Path
    name: str

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return self.name


@contextlib.contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder next to `path`, which is renamed to `path` if the block ends without
    an error, and deleted if not.

    replace: whether an existing `path` is replaced.
    Raises FileExistsError if `path` exists and is not replaced; what the block has written is
    deleted. Raises NotADirectoryError if `path` is a file.

    A crash leaves the old folder whole, except in the instant between the two renames that swap the
    folders: then the old one is next to `path`, as `.NAME.replaced-PID`.
    """
    # Resolved, so that a link keeps pointing at the folder and "." has a name.
    path = Path(path).resolve()
    if path.is_file():
        problem = "is a file, a folder is to be written there"
        raise NotADirectoryError(errno.ENOTDIR, problem, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.parent / f".{path.name}.partial-{os.getpid()}"
    old = path.parent / f".{path.name}.replaced-{os.getpid()}"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        yield tmp
        for file in (*tmp.rglob("*"), tmp):
            if file.is_file() and not file.is_symlink():
                # The safetensors package makes files that only their owner can read.
                file.chmod(tmp.stat().st_mode & 0o666)
            fsync_path(file)
        if path.exists() and not replace:
            raise FileExistsError(f"{path} exists")
        if path.exists():
            # A crashed process with the same process id may have left one.
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        tmp.rename(path)
        # The new folder is in place. If this fails, a power cut might bring the old one back.
        with contextlib.suppress(OSError):
            fsync_path(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not path.exists():
            # The block was stopped between the two renames.
            old.rename(path)
        shutil.rmtree(tmp, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yields the name of a file next to `path`, which is renamed to `path` if the block ends
    without an error, and deleted if not.

    The block writes the file and closes it.
    replace: whether an existing `path` is replaced. If not, the file's other name is unlike that of
        any other process, also on another machine that has the same disk.
    Raises FileExistsError if `path` exists by the end of the block and is not replaced.
    """
    tmp = path.parent / f".{path.name}.partial-{os.getpid()}"
    if not replace:
        tmp = tmp.with_name(f"{tmp.name}-{secrets.token_hex(4)}")
    try:
        yield tmp
        fsync_path(tmp)
        if replace:
            os.replace(tmp, path)
        else:
            rename_to_new(tmp, path)
        with contextlib.suppress(OSError):
            fsync_path(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


def rename_to_new(tmp: Path, path: Path) -> None:
    """Gives a file another name. Raises FileExistsError if that is taken, if need be by a process
    that was faster by an instant."""
    try:
        # Unlike a renaming, this never replaces a file. The old name is removed by the caller.
        os.link(tmp, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without links, such as FAT.
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(tmp, path)


def fsync_path(path: Path) -> None:
    """Waits until the disk has a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(value, path: Path) -> None:
    """Writes a value as indented JSON in UTF-8.

    A file name that is not UTF-8 has surrogates in Python; they are escaped, as JSON has it.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_tensors(tensors: dict, path: Path) -> None:
    """Writes a safetensors file. Raises OSError if it can't be written, as all other writers do."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The package reports a full disk as an error of its own, with the number of the system's
        # error in its text.
        match = re.search(r"os error (\d+)", str(error))
        if not match:
            raise
        code = int(match[1])
        raise OSError(code, os.strerror(code), str(path)) from None


def refuse_pointer(path: Path | str) -> None:
    """Raises UserError if a file stands for another one: the pointer of one that Git LFS has not
    fetched, or the page that a site has given in its place."""
    pointer = lfs_pointer(path)
    if pointer:
        raise UserError(f"{path}: {pointer}")
    if is_web_page(path):
        raise UserError(
            f"{path}: is a page of HTML, as sites give in place of a file that one must log in or"
            " agree to terms for; download the file again"
        )


def is_web_page(path: Path | str) -> bool:
    """True if a file begins as a page of HTML does, and its name does not say that it may be one."""
    path = Path(path)
    if path.suffix.lower() in MAY_BE_PAGES or not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(100).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html"))


def lfs_pointer(path: Path | str) -> str | None:
    """Returns what is wrong with a file that is a Git LFS pointer, to be put behind the file's name
    in an error; None if it is none, or no file.

    A folder that was cloned without Git LFS has such a text of three lines in place of each large
    file: "version https://git-lfs.github.com/spec/v1", its hash, its size. The pointers of
    XetHub and git-annex are recognized as well.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size >= POINTER_BYTES:
        return None
    text = path.read_bytes()
    for beginning, name, command in POINTERS:
        if text.startswith(beginning):
            size = re.search(rb"^size (\d{1,18})\r?$", text, re.MULTILINE)
            of_size = f" with {int(size[1]):,} bytes" if size else ""
            return (
                f"is a {name} pointer, not the file{of_size} that it stands for;"
                f" run `{command}` in its repository, or download the file itself"
            )
    return None


def process_exists(pid: int) -> bool:
    """True if a process with this number exists on this machine: the one that a lock's file or a
    temporary folder names. Not for Windows, where os.kill ends the process, whatever the signal."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # It exists and belongs to another user.
        pass
    return True


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """Yields a path to a file or folder that is UTF-8, for packages that take no other.

    A name on a Linux disk may be any bytes; a file that is open has a number as its name as well.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        yield path


def file_crc32(file: Path) -> int:
    """Returns the CRC-32 of a file's bytes: three times as fast as SHA-256, and enough to notice
    damage."""
    crc32 = 0
    with open(file, "rb") as stream:
        while part := stream.read(CRC_PART):
            crc32 = zlib.crc32(part, crc32)
    return crc32


def file_sha256(file: Path) -> str:
    """Returns the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hub_origin(folder: Path) -> tuple[str, str] | None:
    """Returns (org/model, commit) for a folder in the cache of huggingface_hub, else None.

    Such a folder is `models--org--model/snapshots/commit`.
    """
    # The empty strings are for a path of fewer than three parts.
    *_, repo, snapshots, commit = ("", "", *folder.resolve().parts)
    name = repo.removeprefix("models--").replace("--", "/")
    if snapshots != "snapshots" or repo == name or not HUB_NAME.fullmatch(name):
        return None
    return name, commit


def cache_folder() -> Path:
    """Returns the folder for converted models and token rows: $PLAINTUNE_CACHE, else `plaintune` in
    the user's cache folder.

    Raises UserError where the system knows no home folder, as in some containers.
    """
    folder = os.environ.get("PLAINTUNE_CACHE")
    if not folder:
        user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = str(Path(user_cache, "plaintune"))
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        problem = "this user has no home folder to keep converted models and token rows in"
        raise UserError(f"{problem}; {SET_CACHE}") from None


def check_cache_takes_files(folder: Path) -> None:
    """Raises UserError that names $PLAINTUNE_CACHE if no file can be made in a cache folder.

    It makes no folder: what is to be written may be refused for another reason yet.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        # os.access does not know what a network's file system will say.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        problem = f"the cache can't be written to ({error.strerror})"
        raise UserError(f"{folder}: {problem}; {SET_CACHE}") from None


@contextlib.contextmanager
def reported_full_cache(folder: Path) -> Iterator[None]:
    """A block that writes into a cache folder; where its disk is full, the error names
    $PLAINTUNE_CACHE."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        problem = f"the cache has no room left ({error.strerror})"
        raise UserError(f"{folder}: {problem}; free some space, or {SET_CACHE}") from None
