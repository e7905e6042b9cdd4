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
import shutil
from collections.abc import Iterator
from pathlib import Path

# org/model or org/model@revision
HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?", re.ASCII)


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
            if file.is_file():
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
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields the name of a file next to `path`, which is renamed to `path` if the block ends
    without an error, and deleted if not.

    The block writes the file and closes it. An existing `path` is replaced.
    """
    tmp = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        yield tmp
        fsync_path(tmp)
        os.replace(tmp, path)
        with contextlib.suppress(OSError):
            fsync_path(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Waits until the disk has a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(value, path: Path) -> None:
    """Writes a value as indented JSON in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
    """Returns the folder for converted models: $PLAINTUNE_CACHE, else `plaintune` in the user's
    cache folder."""
    folder = os.environ.get("PLAINTUNE_CACHE")
    if not folder:
        user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(user_cache, "plaintune")
    return Path(folder).expanduser()
