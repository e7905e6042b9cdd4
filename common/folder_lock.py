"""One process at a time writes into a folder; whoever comes second learns who the first is.

The lock is flock's, on the file `.lock` in the folder. The system gives it back when the process
ends, however it ends; what a killed process leaves is a file without a lock, which hinders nobody.
The file holds the process, its machine and when it began, as JSON, for the second one's message.

How far a lock reaches is the file system's matter. On a local disk, and on NFS unless it is mounted
with `nolock` or `local_lock`, it is certain. Where it holds on each machine alone, nothing tells a
process of another machine that is alive from one that was killed: then a line says what is known.
"""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Self

from common.errors import UserError
from common.files import process_exists

LOCK_FILE = ".lock"
# The lock is tried for a second: a process that was killed may have workers that live so long, and
# `find_holder` of another process has it for an instant.
ATTEMPTS = 11
SECONDS_BETWEEN = 0.1


class FolderLock:
    """A folder's lock, from `acquire` on until the block ends.

    with FolderLock() as lock:
        lock.acquire(folder)
    """

    def __init__(self) -> None:
        self.file: Path | None = None
        self.descriptor = -1
        # The folders that were made for it, the innermost first.
        self.new_folders: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def acquire(self, folder: Path, is_new: bool = False) -> str:
        """Locks a folder, which is made where there is none.

        is_new: it was made just now, and is removed with the lock if nothing comes into it.
        Returns a line that the user must read, or "".
        Raises UserError where another process has the lock, which it names, or where the folder
        can't be written to.
        """
        try:
            # Absolute, so that `release` finds it from another working directory too.
            file = folder.absolute() / LOCK_FILE
            above = (file.parent, *file.parent.parents)
            self.new_folders = [each for each in above if not each.exists()]
            if is_new:
                self.new_folders = [file.parent]
            for _ in range(ATTEMPTS):
                # Within the loop: a process that has failed may remove the folder now.
                file.parent.mkdir(parents=True, exist_ok=True)
                descriptor = open_locked(file)
                if descriptor is not None:
                    break
                time.sleep(SECONDS_BETWEEN)
            else:
                raise UserError(f"{folder}: {describe_holder(read_holder(file))}; {ADVICE}")
        except OSError as error:
            raise UserError(f"{folder}: can't be written to ({error.strerror})") from None
        self.file = file
        self.descriptor = descriptor
        before = read_holder(file)
        write_holder(descriptor)
        return remark_on_holder_before(before)

    def release(self) -> None:
        """Gives the lock back, and removes its file and the folders that were made for it if
        nothing has come into them."""
        if self.file is not None:
            # Before it is closed: afterwards the file may be another process's.
            with contextlib.suppress(OSError):
                self.file.unlink()
            os.close(self.descriptor)
            self.file = None
        for folder in self.new_folders:
            # A folder that holds something is not removed by this.
            with contextlib.suppress(OSError):
                folder.rmdir()
        self.new_folders = []


ADVICE = "wait until it ends, stop it, or name another folder"


def open_locked(file: Path) -> int | None:
    """Opens a file and locks it. Returns its descriptor, or None where another process has the
    lock."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        # The folder was removed just now.
        return None
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had the lock removes the file when it ends, perhaps after it was opened here.
        is_current = os.path.samestat(os.fstat(descriptor), os.stat(file))
    except (BlockingIOError, FileNotFoundError):
        is_current = False
    except (ImportError, OSError):
        # Windows, or a file system without locks: all that is known is what stands in the file.
        is_current = not is_alive_here(read_holder(file))
    if not is_current:
        os.close(descriptor)
        return None
    return descriptor


def find_holder(folder: Path) -> str | None:
    """Returns a sentence about the process that has a folder's lock, or None if none has it."""
    file = Path(folder) / LOCK_FILE
    try:
        import fcntl

        with open(file, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return describe_holder(read_holder(file))
    except (ImportError, OSError):
        return None
    return None


def read_holder(file: Path) -> dict:
    """Returns what a process has written into its lock's file, or {}."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def write_holder(descriptor: int) -> None:
    """Writes this process, its machine and the time into its lock's file."""
    holder = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    # On a full disk the lock holds all the same, and only its message says less.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())


def describe_holder(holder: dict) -> str:
    """Returns "process 12 on HOST is writing into it since ..."."""
    if not holder:
        return "another process is writing into it"
    process = f"process {holder.get('process')} on {holder.get('host')}"
    return f"{process} is writing into it since {holder.get('since')}"


def is_alive_here(holder: dict) -> bool:
    """True if the process in a lock's file is another one of this machine, and exists."""
    pid = holder.get("process")
    is_another = isinstance(pid, int) and pid != os.getpid()
    if os.name != "posix" or not is_another or holder.get("host") != socket.gethostname():
        return False
    return process_exists(pid)


def remark_on_holder_before(holder: dict) -> str:
    """Returns what a user must know of a process that left the lock's file behind, or "".

    A process that ends by itself removes the file. On this machine one that left it is gone, since
    it would have the lock. On another machine it may be alive where locks don't reach so far.
    """
    if not holder or holder.get("host") == socket.gethostname():
        return ""
    process = f"process {holder.get('process')} on {holder.get('host')}"
    return (
        f"{process} wrote here since {holder.get('since')} and did not end by itself; if it still"
        " runs, which can't be seen from this machine, stop one of the two"
    )
