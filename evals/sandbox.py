"""Runs a program that nobody has looked at, such as one that a model wrote, where it can do no harm.

Each program has processes of its own in new namespaces (user, mount, pid, net, ipc, uts, cgroup):
no network, no file of this machine that can be written to and none of a person's that can be read,
no other process, an empty environment; with limits of time, memory, processes, files and output, and
a seccomp filter. When it ends, or goes beyond a limit, the kernel kills all of its processes.

evals/sandbox_child.py does that, from inside. Where the kernel refuses any part of it, nothing is run:
`sandbox_refusal` has the reason. There is no weaker way to run a program.
"""

import contextlib
import json
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from common.errors import UserError
from common.threads import usable_cores

CHILD = Path(__file__).with_name("sandbox_child.py")
# A program may wait, by the clock, for so many times the processor time that it has.
CLOCK_FACTOR = 4
# Seconds after which the launcher is killed, should it not end when it has to.
GRACE_SECONDS = 10
# So often a program that runs is looked after, should it be stopped.
LOOKS_SECONDS = 0.2
# Bytes that are read at a time.
PIPE_PART = 1 << 16

# What became of a program.
PASSED = "passed"
FAILED = "raised an exception"
ENDED = "ended before its end"
CRASHED = "was killed by a signal"
TIME = "ran out of time"
MEMORY = "ran out of memory"
OUTPUT = "wrote too much"
ENDS = (PASSED, FAILED, ENDED, CRASHED, TIME, MEMORY, OUTPUT)

# It needs a thread, so that a limit of processes which counts those of others shows.
PROBE = """
import threading
thread = threading.Thread(target=int)
thread.start()
thread.join()
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    seconds: of processor time, for each of its processes; CLOCK_FACTOR times as many by the clock,
        for all of it.
    memory: bytes, of the address space of each process, and resident of all together.
    processes: with its threads.
    scratch: bytes of files, which are in memory.
    output: bytes that it may write to stdout and stderr.
    """

    seconds: int = 3
    memory: int = 1 << 30
    processes: int = 32
    scratch: int = 64 << 20
    output: int = 4 << 20


class Outcome(NamedTuple):
    """What became of a program.

    end: one of ENDS.
    reason: of FAILED the exception, of ENDED the exit code, of CRASHED the signal; else "".
    """

    end: str
    reason: str = ""


class SandboxRefused(UserError):
    """The kernel refuses a part of the sandbox, and nothing was run."""


def sandbox_refusal() -> str | None:
    """Returns why no program can be run on this machine; None if one can: it was tried."""
    if sys.platform != "linux":
        return f"programs run in Linux namespaces, and this is {platform.system()}"
    try:
        outcome = run_program(PROBE, Limits())
    except SandboxRefused as error:
        return str(error)
    if outcome.end != PASSED:
        return f"a trial of the sandbox {outcome.end} ({outcome.reason})"
    return None


def run_programs(
    programs: Sequence[str], limits: Limits, jobs: int | None = None
) -> Iterator[tuple[int, Outcome]]:
    """Runs programs, several at a time, and yields (number, outcome) as each ends.

    jobs: how many at a time; default: as many as cores.
    Raises SandboxRefused.
    """
    cores: SimpleQueue[int] = SimpleQueue()
    for core in sorted(usable_cores()):
        cores.put(core)
    jobs = min(jobs or cores.qsize(), cores.qsize())

    stopped = threading.Event()

    def run_one(number: int) -> tuple[int, Outcome]:
        # No two programs at a time have the same core.
        core = cores.get()
        try:
            return number, run_program(programs[number], limits, core, stopped)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            waiting = {pool.submit(run_one, number) for number in range(len(programs))}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            # After an error or Ctrl-C, those that run are killed, and those that have not begun do not
            # begin.
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


def run_program(
    program: str,
    limits: Limits,
    core: int | None = None,
    stopped: threading.Event | None = None,
) -> Outcome:
    """Runs a Python program and returns what became of it.

    core: the one that it runs on; default: the first.
    stopped: where it is set, the program is killed.
    Raises SandboxRefused with the reason where a part of the sandbox is refused.
    """
    token = secrets.token_hex(16)
    status, status_end = os.pipe()
    verdict, verdict_end = os.pipe()
    settings = {
        "parent": os.getpid(),
        "status": status_end,
        "verdict": verdict_end,
        "token": token,
        "core": min(usable_cores()) if core is None else core,
        "cpu_seconds": limits.seconds,
        "seconds": limits.seconds * CLOCK_FACTOR,
        "memory": limits.memory,
        "processes": limits.processes,
        "scratch": limits.scratch,
        **python_files(),
    }
    try:
        launcher = subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(status_end, verdict_end),
            start_new_session=True,
            env={},
            cwd="/",
        )
    except BaseException:
        os.close(status)
        os.close(verdict)
        raise
    finally:
        os.close(status_end)
        os.close(verdict_end)

    def kill() -> None:
        # The processes of the sandbox have asked to be killed with it.
        launcher.kill()

    try:
        assert launcher.stdin is not None and launcher.stdout is not None
        send(launcher.stdin, program)
        pipes = {"status": status, "verdict": verdict, "output": launcher.stdout.fileno()}
        seconds = settings["seconds"] + GRACE_SECONDS
        received, too_much = read_pipes(pipes, limits.output, seconds, kill, stopped)
    finally:
        kill()
        launcher.wait()
        launcher.stdout.close()
        os.close(status)
        os.close(verdict)
    return outcome_of(received["status"], received["verdict"], token, too_much)


def send(stream, program: str) -> None:
    """Writes the program to the launcher, which reads all of it first."""
    # A launcher that was killed, or could not start, is reported by what it has not said.
    with contextlib.suppress(BrokenPipeError), stream:
        stream.write(program.encode(errors="surrogatepass"))


def read_pipes(
    pipes: dict[str, int],
    most: int,
    seconds: float,
    kill: Callable[[], None],
    stopped: threading.Event | None = None,
) -> tuple[dict[str, bytes], bool]:
    """Reads pipes until every process that can write to them has ended. A sandbox that writes too
    much, or that has not ended after `seconds` or when `stopped` is set, is killed.

    pipes: descriptors by name. most: bytes of "output" and "verdict".
    Returns what came through each ("output" is counted and thrown away), and whether it was too much.
    """
    received = dict.fromkeys(pipes, b"")
    count = 0
    is_killed = False
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for name, descriptor in pipes.items():
            selector.register(descriptor, selectors.EVENT_READ, name)
        while selector.get_map():
            left = deadline - time.monotonic()
            ready = selector.select(min(max(left, 0), LOOKS_SECONDS))
            is_over = left <= 0 or (stopped is not None and stopped.is_set())
            if not ready and is_over:
                if is_killed:
                    break
                kill()
                is_killed = True
                deadline = time.monotonic() + GRACE_SECONDS
            for key, _ in ready:
                part = os.read(key.fd, PIPE_PART)
                if not part:
                    selector.unregister(key.fd)
                    continue
                if key.data != "status":
                    count += len(part)
                if count > most:
                    kill()
                elif key.data != "output":
                    received[key.data] += part
    return received, count > most


def outcome_of(status: bytes, verdict: bytes, token: str, too_much: bool) -> Outcome:
    """Returns what the sandbox's reports mean. token: what a program writes that came to its end."""
    if too_much:
        return Outcome(OUTPUT)
    line, _, _ = status.partition(b"\n")
    # Without a report, the launcher was killed: by us, or by somebody else.
    reported = json.loads(line) if line else {"limit": "time"}
    if "refused" in reported:
        raise SandboxRefused(
            f"this machine refuses the sandbox that programs run in: {reported['refused']}"
        )
    text = verdict.decode(errors="replace")
    if text == token:
        return Outcome(PASSED)
    if reported.get("limit") == "memory" or text.startswith("MemoryError"):
        return Outcome(MEMORY)
    if reported.get("limit") == "time" or reported.get("signal") == signal.SIGXCPU:
        return Outcome(TIME)
    if text:
        return Outcome(FAILED, text)
    if "signal" in reported:
        return Outcome(CRASHED, signal_name(reported["signal"]))
    return Outcome(ENDED, f"exit code {reported['exit']}")


def signal_name(number: int) -> str:
    """Returns the name of a signal, as SIGSEGV."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def python_files() -> dict:
    """Returns what a program's Python needs: the interpreter, the folders that it reads, and those
    of installed packages for its sys.path."""
    # Not that of a virtual environment, which is a link, and reads a file beside it.
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    folders = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *packages}
    folders |= {os.path.dirname(python), sys.base_prefix + "/lib"}
    library = sysconfig.get_config_var("LIBDIR")
    if library:
        folders.add(library)
    visible: list[str] = []
    for folder in sorted(os.path.realpath(folder) for folder in folders if folder):
        is_inside = any(Path(folder).is_relative_to(other) for other in visible)
        # Of a folder such as /, everything would be shown.
        if os.path.isdir(folder) and not is_inside and len(Path(folder).parts) > 2:
            visible.append(folder)
    paths = sorted(os.path.realpath(folder) for folder in packages)
    return {"python": python, "visible": visible, "path": paths}
