"""Files and folders that are there whole or not at all, JSON, hashes, and where things are kept between runs."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?", re.ASCII)  # org/model@revision


@contextlib.contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    An existing `path` is replaced if asked for; else FileExistsError, and what was written is dropped.
    NotADirectoryError where `path` is a file. A crash leaves the old folder whole, but for the instant between the two
    renames that swap it: then it stands beside, as `.NAME.replaced-PID`.
    """
    path = Path(path).resolve()  # a link keeps pointing at the folder, "." has a name
    if path.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, a folder is to be written there", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp, old = (path.parent / f".{path.name}.{state}-{os.getpid()}" for state in ("partial", "replaced"))
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        yield tmp
        for file in (*tmp.rglob("*"), tmp):
            if file.is_file():  # the safetensors package makes files that only their owner reads
                file.chmod(tmp.stat().st_mode & 0o666)
            fsync_path(file)
        if path.exists() and not replace:
            raise FileExistsError(f"{path} exists")
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)  # of a crashed process that had this number
            path.rename(old)
        tmp.rename(path)
        with contextlib.suppress(OSError):  # it is there; a power cut might bring the old one back
            fsync_path(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not path.exists():  # stopped between the renames
            old.rename(path)
        shutil.rmtree(tmp, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields the name of a file beside `path` that becomes `path`, in the place of what stands there, when the block
    ends well, and vanishes when it does not. The block writes and closes it."""
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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(value, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tensors(tensors: dict, path: Path) -> None:
    """A safetensors file. OSError where it can't be written, as every other writer has it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if not found:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None


def file_sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hub_origin(folder: Path) -> tuple[str, str] | None:
    """(org/model, commit) of a folder in huggingface_hub's cache, `models--org--model/snapshots/commit`; else None."""
    *_, repo, snapshots, commit = ("", "", *folder.resolve().parts)
    name = repo.removeprefix("models--").replace("--", "/")
    return (name, commit) if snapshots == "snapshots" and repo != name and HUB_NAME.fullmatch(name) else None


def cache_folder() -> Path:
    """Where converted models are kept: $PLAINTUNE_CACHE, else `plaintune` in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("PLAINTUNE_CACHE") or Path(user_cache, "plaintune")).expanduser()
