"""Programs that try to get out of the sandbox (evals/sandbox.py), and what is still whole afterwards.

    python tests/support/escapes.py          all of them, by any user's Python 3.11; JSON on stdout

Each comes to its end, and so passes, only if it has got what it wanted.
"""

import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from evals.sandbox import CRASHED, ENDED, FAILED, MEMORY, OUTPUT, TIME, Limits, run_programs

LIMITS = Limits(seconds=1, memory=256 << 20, processes=8, scratch=8 << 20, output=1 << 20)
SECRET = "the-secret-of-the-parent"

LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
CALLED = "\nif {result} < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))"


def libc_call(call: str) -> str:
    return f"{LIBC}result = libc.{call}" + CALLED.format(result="result")


class Escape(NamedTuple):
    """program: {pid}, {victim}, {port}, {name} and {secret} are of the parent. end: what becomes of it. reason: a
    part of why, or several, of which one is enough."""

    program: str
    end: str
    reason: str | tuple[str, ...] = ""


NO_FILE, READ_ONLY, DENIED = "FileNotFoundError", "Read-only file system", "Operation not permitted"

ESCAPES = {
    # ---- processes
    "fork bomb": Escape("import os\nwhile True: os.fork()", FAILED, "Resource temporarily unavailable"),
    "fork bomb that goes on": Escape("import os\nwhile True:\n try: os.fork()\n except OSError: pass", TIME),
    "a thousand threads": Escape(
        "import threading, time\nfor _ in range(1000): threading.Thread(target=time.sleep, args=(3,)).start()",
        FAILED,
        "can't start new thread",
    ),
    "signal to the parent": Escape("import os\nos.kill({pid}, 9)", FAILED, "ProcessLookupError"),
    "signal to init": Escape(
        "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(0.2)\nraise SystemExit('alive')",
        FAILED,
        ("SystemExit: alive", DENIED),
    ),
    "signal to all": Escape("import os\nos.kill(-1, 9)", FAILED, "ProcessLookupError"),
    "signal to its group": Escape("import os\nos.killpg(0, 9)", CRASHED, "SIGKILL"),
    "daemon that outlives it": Escape(
        LIBC + "if os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n"
        "  libc.prctl(15, b'{name}')\n  for fd in range(4): os.close(fd)\n  import time\n  time.sleep(60)\n"
        " os._exit(0)\nos.wait()\nraise SystemExit('a daemon runs')",
        FAILED,
        "a daemon runs",
    ),
    "ptrace of the parent": Escape(libc_call("ptrace(16, {pid}, 0, 0)"), FAILED, DENIED),
    "ptrace of init": Escape(libc_call("ptrace(16, os.getppid(), 0, 0)"), FAILED, DENIED),
    "memory of init": Escape("open('/proc/1/mem', 'rb')", FAILED, "Permission denied"),
    # ---- files
    "deleting a file": Escape("import os\nos.unlink({victim!r})", FAILED, NO_FILE),
    "deleting Python": Escape("import os\nos.unlink(os.__file__)", FAILED, READ_ONLY),
    "writing to a file": Escape("open({victim!r}, 'a').write('x')", FAILED, NO_FILE),
    "writing to /usr": Escape("open('/usr/x', 'w')", FAILED, READ_ONLY),
    "writing to /": Escape("open('/x', 'w')", FAILED, READ_ONLY),
    "writing to /tmp": Escape("open('/tmp/x', 'w')", FAILED, (NO_FILE, READ_ONLY)),
    "writing to /dev/shm": Escape("open('/dev/shm/x', 'w')", FAILED, NO_FILE),
    "writing to /proc/sys": Escape("open('/proc/sys/kernel/core_pattern', 'w')", FAILED, (READ_ONLY, "denied")),
    "reading a file of the parent": Escape("open({victim!r}).read()", FAILED, NO_FILE),
    "reading a file of the user": Escape("open('/root/.bashrc').read(), open('/etc/shadow').read()", FAILED, NO_FILE),
    "through /proc/1/root": Escape("import os\nos.listdir('/proc/1/root/../..')", FAILED, "Permission denied"),
    "filling the disk": Escape(
        "for i in range(100): open(str(i), 'wb').write(bytes(1 << 20))", FAILED, "No space left on device"
    ),
    "one large file": Escape("open('f', 'wb').write(bytes(100 << 20))", FAILED, "File too large"),
    "a million files": Escape("for i in range(10 ** 6): open(str(i), 'w').close()", FAILED, "No space left on device"),
    "a disk as a device": Escape("import os\nos.mknod('sda', 0o60666, 0x800)", FAILED, DENIED),
    # ---- memory, time, output
    "filling the memory": Escape("bytearray(2 << 30)", MEMORY),
    "filling the memory by several": Escape(
        "import os, time\nfor _ in range(5):\n if os.fork() == 0:\n  x = b'x' * (100 << 20)\n  time.sleep(2)\n"
        "  os._exit(0)\nfor _ in range(5): assert os.wait()[1] == 0",
        MEMORY,
    ),
    "memory in no process": Escape("import os\nos.memfd_create('x')", FAILED, DENIED),
    "memory that stays": Escape(libc_call("shmget(0, 1 << 20, 0o1600)"), FAILED, DENIED),
    "endless output": Escape("while True: print('x' * 1000)", OUTPUT),
    "endless verdict": Escape("import os\nwhile True: os.write(3, b'x' * 1000)", OUTPUT),
    "endless loop": Escape("while True: pass", TIME),
    "endless wait": Escape("import time\ntime.sleep(1000)", TIME),
    "raising a limit": Escape(
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", FAILED, "not allowed to raise"
    ),
    # ---- network
    "socket to loopback": Escape(
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)", FAILED, "Network is unreachable"
    ),
    "socket outside": Escape(
        "import socket\nsocket.create_connection(('192.0.2.1', 80), 2)", FAILED, "Network is unreachable"
    ),
    "a name": Escape("import socket\nsocket.getaddrinfo('example.com', 80)", FAILED, "gaierror"),
    "unix socket of the parent": Escape(
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{name}')", FAILED, "ConnectionRefusedError"
    ),
    "socket to the host of a virtual machine": Escape(
        "import socket\nsocket.socket(40, socket.SOCK_STREAM)", FAILED, "Address family not supported"
    ),
    "socket to the kernel": Escape("import socket\nsocket.socket(16, 3)", FAILED, "Address family not supported"),
    # ---- what the parent knows
    "its environment": Escape("import os\nassert os.environ, 'it is empty'", FAILED, "it is empty"),
    "the parent's environment": Escape("open('/proc/{pid}/environ').read()", FAILED, NO_FILE),
    "environments of all": Escape(
        "import os\nfound = ''\nfor pid in os.listdir('/proc'):\n try: found += open(f'/proc/{{pid}}/environ').read()\n"
        " except OSError: pass\nassert '{secret}' in found, 'it is not there'",
        FAILED,
        "it is not there",
    ),
    "descriptors of the parent": Escape(
        "import os\nopened = sorted(int(fd) for fd in os.listdir('/proc/self/fd'))\n"
        "assert opened != [0, 1, 2, 3, opened[-1]], 'none'",
        FAILED,
        "none",
    ),
    # ---- the sandbox itself
    "unshare": Escape(libc_call("unshare(0x10000000)"), FAILED, DENIED),
    "clone into a user namespace": Escape(libc_call("syscall(CLONE, 0x10000011, 0, 0, 0, 0)"), FAILED, DENIED),
    "mounting again": Escape(libc_call("mount(b'none', b'/', None, 0x1020, None)"), FAILED, DENIED),
    "unmounting": Escape(libc_call("umount2(b'/proc', 2)"), FAILED, DENIED),
    "becoming root": Escape("import os\nos.setuid(0)", FAILED, (DENIED, "Invalid argument")),
    "being root": Escape("import os\nassert 0 in (os.geteuid(), *os.getgroups()), 'nobody'", FAILED, "nobody"),
    "capabilities": Escape(
        "caps = [line.split()[1] for line in open('/proc/self/status') if line.startswith('Cap')]\n"
        "assert set(caps) != {{'0' * 16}}, 'none'",
        FAILED,
        "none",
    ),
    # ---- claiming to have passed
    "sys.exit": Escape("import sys\nsys.exit(0)", FAILED, "SystemExit: 0"),
    "os._exit": Escape("import os\nos._exit(0)", ENDED, "exit code 0"),
    "a child that passes": Escape("import os\nif os.fork(): raise ValueError('parent')", FAILED, "ValueError: parent"),
    "a crash": Escape("import ctypes\nctypes.string_at(0)", CRASHED, "SIGSEGV"),
}
CLONE_NUMBERS = {"x86_64": "56", "aarch64": "220"}


def try_all() -> dict:
    """Runs every program. Returns {"outcomes": {name: [end, reason]}}, and what is left: "victim", its file's text;
    "connections" that were accepted; "daemons" that are alive; "python", whether its files are there."""
    os.environ["SECRET"] = SECRET
    name = f"esc{os.getpid()}"
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder, socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        victim = Path(folder) / "victim.txt"
        victim.write_text("whole")
        tcp.bind(("127.0.0.1", 0))
        unix.bind("\0" + name)
        for listener in (tcp, unix):
            listener.listen()
            listener.setblocking(False)
        known = {"pid": os.getpid(), "victim": str(victim), "port": tcp.getsockname()[1], "name": name}
        programs = []
        for escape in ESCAPES.values():
            program = escape.program.replace("CLONE", CLONE_NUMBERS[os.uname().machine])
            programs.append(program.format(secret=SECRET, **known))
        names = list(ESCAPES)
        for number, outcome in run_programs(programs, LIMITS):
            outcomes[names[number]] = [*outcome]
        # Time to be killed; a daemon would sleep for a minute.
        time.sleep(0.2)
        text = victim.read_text() if victim.exists() else None
        connections = sum(has_connection(listener) for listener in (tcp, unix))
    return {
        "outcomes": outcomes,
        "victim": text,
        "connections": connections,
        "daemons": daemons(name),
        "python": os.path.exists(os.__file__),
        "user": os.getuid(),
    }


def has_connection(listener: socket.socket) -> bool:
    try:
        listener.accept()
    except BlockingIOError:
        return False
    return True


def daemons(name: str) -> int:
    """The number of processes of this machine with that name."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            count += path.read_text().strip() == name
        except OSError:
            pass
    return count


if __name__ == "__main__":
    print(json.dumps(try_all()))
