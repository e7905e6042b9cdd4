"""The process that evals/sandbox.py starts for each program: it leaves everything behind that a program
could harm, and then runs the program.

    python -I -S evals/sandbox_child.py SETTINGS < PROGRAM     (SETTINGS: JSON, see sandbox.py)

It is started by its path and imports the standard library alone. There are four processes, each the
child of the one before, and each is killed when the one before it dies:

    launcher   stays outside, and maps the users of the new namespaces
    entrance   is in new namespaces: user, mount, pid, net, ipc, uts, cgroup
    init       is process 1 of the pid namespace. It builds the file system, watches time and memory,
               and ends; the kernel then kills every process of the namespace, whatever they did
    program    has no capabilities, another user, a seccomp filter and limits (man 2 setrlimit)

The file system is a new one: of the old one it holds the folders of Python and of the system's
libraries, all read-only, a /proc that shows the namespace alone, five harmless devices, and /scratch,
which is in memory, of limited size, and the only place that can be written to.

What is reported is JSON on the descriptor SETTINGS["status"]: {"refused": why}, {"exit": code},
{"signal": number} or {"limit": "time" | "memory"}.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator

libc = ctypes.CDLL(None, use_errno=True)

# Flags of unshare(2) and clone(2).
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = (
    *(CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC),
    *(CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET),
)
# Flags of mount(2) and umount2(2).
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
# mount_setattr(2), which has this number on every machine.
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
# Options of prctl(2).
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
SECCOMP_MODE_FILTER = 2

# The user and group of the program, "nobody". Not 0: a user 0 of the machine has no limit of
# processes, and owns files.
NOBODY = 65534
# What the new file system has of the old one besides Python.
SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime"),
    *("/nix/store", "/gnu/store"),
)
DEVICES = ("null", "zero", "full", "random", "urandom")
# Where the old file system is, while the new one is built.
OLD = "/old"
# Seconds between two looks at the memory.
LOOK_SECONDS = 0.02

# What the program's process runs. The program is done if it comes to its end: sys.exit or os._exit
# before the tests must not count as a success. A program that looks for the token can still claim to
# have passed; no process can judge itself against that.
RUNNER = """
import os, sys
token = sys.argv[1]
sys.path += sys.argv[2:]
del sys.argv[1:]
# Python itself has set LC_CTYPE.
os.environ.clear()
pid = os.getpid()
try:
    with open("/program.py", encoding="utf-8", errors="surrogatepass") as file:
        source = file.read()
    # As in Chen et al.'s harness: no __main__, so what stands below such an "if" is not run.
    exec(compile(source, "/program.py", "exec"), {})
    verdict = token
except BaseException as error:
    verdict = f"{type(error).__name__}: {error}"
if os.getpid() == pid:
    os.write(3, verdict.encode(errors="backslashreplace")[:1000])
os._exit(0)
"""


class Machine:
    """What is different between processors: numbers of system calls, and the name in seccomp.

    denied: calls that give a program more than its own memory and files: other namespaces and
        mounts, other processes, keys and memory that no limit counts, large rarely used parts of
        the kernel.
    """

    def __init__(self, audit: int, socket: int, clone: int, pivot_root: int, denied: str):
        self.audit = audit
        self.socket = socket
        self.clone = clone
        self.pivot_root = pivot_root
        self.denied = [int(number) for number in denied.split()]


# pidfd_getfd, memfd_secret, the calls of io_uring and of the new mount interface.
EVERYWHERE = " 438 447 425 426 427 428 429 430 431 432 433 442"
# In this order: ptrace process_vm_readv process_vm_writev kcmp | mount umount2 pivot_root chroot unshare
# setns open_by_handle_at | shmget shmat msgget semget memfd_create mq_open | userfaultfd bpf
# perf_event_open add_key request_key keyctl personality quotactl.
MACHINES = {
    "x86_64": Machine(
        0xC000003E,
        41,
        56,
        155,
        "101 310 311 312 165 166 155 161 272 308 304 29 30 68 64 319 240 323 321 298 248 249 250 135 179"
        + EVERYWHERE,
    ),
    "aarch64": Machine(
        0xC00000B7,
        198,
        220,
        41,
        "117 270 271 272 40 39 41 51 97 268 265 194 196 186 190 279 180 282 280 241 217 218 219 92 60"
        + EVERYWHERE,
    ),
}
SYS_CLONE3 = 435
# Unix, IPv4 and IPv6, which the network namespace bounds. Others reach beyond it: AF_VSOCK the host of
# a virtual machine.
ALLOWED_SOCKETS = (1, 2, 10)


class NamespaceRefused(Exception):
    """The kernel refuses a part of the sandbox; the message says which."""


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """A block that raises NamespaceRefused with the kernel's reason. what: it is, for the message."""
    try:
        yield
    except OSError as error:
        raise NamespaceRefused(f"{what}: {error.strerror}") from None


def raise_errno(result: int) -> None:
    """Raises OSError if a function of libc has failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Calls mount(2)."""
    words = [os.fsencode(word) if word is not None else None for word in (source, target, kind)]
    raise_errno(libc.mount(*words, ctypes.c_ulong(flags), options.encode()))


def prctl(option: int, *words: int) -> None:
    """Calls prctl(2)."""
    raise_errno(libc.prctl(option, *[ctypes.c_ulong(word) for word in (*words, 0, 0, 0, 0)[:4]]))


# ---- the four processes ----


def main() -> None:
    settings = json.loads(sys.argv[1])
    for name in ("status", "verdict"):
        # A copy that is closed where Python starts anew, and that is not descriptor 3.
        inherited = settings[name]
        settings[name] = fcntl.fcntl(inherited, fcntl.F_DUPFD_CLOEXEC, inherited + 1)
        os.close(inherited)
    program = sys.stdin.buffer.read()
    run_reporting(settings, lambda: launch(settings, program))


def run_reporting(settings: dict, function: Callable[[], None]) -> None:
    """Runs a process's function and ends the process. What the kernel refuses is reported."""
    code = 0
    try:
        function()
    except NamespaceRefused as error:
        report(settings, {"refused": str(error)})
        code = 1
    except Exception as error:  # noqa: BLE001 (whatever it is, nothing was run)
        report(settings, {"refused": f"{type(error).__name__}: {error}"})
        code = 1
    finally:
        # Not back into the code of the parent, of which a forked process has a copy.
        os._exit(code)


def report(settings: dict, status: dict) -> None:
    """Writes what happened, for sandbox.py."""
    os.write(settings["status"], (json.dumps(status) + "\n").encode())


def die_with_parent(parent: int | None) -> None:
    """Lets the kernel kill this process when its parent dies. parent: its pid, to notice one that is
    dead already; None in a pid namespace that does not know it."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def launch(settings: dict, program: bytes) -> None:
    """Is the launcher: starts the entrance, and maps its users."""
    die_with_parent(settings["parent"])
    if platform.machine() not in MACHINES:
        raise NamespaceRefused(
            f"no seccomp filter is written for this processor, {platform.machine()}"
        )
    with step("/proc/self/oom_score_adj"), open("/proc/self/oom_score_adj", "w") as file:
        # Where the machine's memory runs out, the program is killed and not its parent.
        file.write("1000")
    me = os.getpid()
    entered, has_entered = os.pipe()
    mapped, has_mapped = os.pipe()
    entrance = os.fork()
    if entrance == 0:
        os.close(entered)
        os.close(has_mapped)
        run_reporting(settings, lambda: enter(settings, program, me, has_entered, mapped))
    os.close(has_entered)
    os.close(mapped)
    if os.read(entered, 1):
        map_users(entrance)
        os.write(has_mapped, b".")
    os.waitpid(entrance, 0)


def map_users(pid: int) -> None:
    """Says which users the namespace of a process has: `nobody`, and for root also root, so that it
    can build the file system from folders that nobody else can read."""
    user, group = os.geteuid(), os.getegid()
    with step("the map of users of the new user namespace"):
        if user == 0:
            users = groups = f"0 0 1\n{NOBODY} {NOBODY} 1\n"
        else:
            # The only map that a user may write: himself.
            users, groups = f"{NOBODY} {user} 1\n", f"{NOBODY} {group} 1\n"
            write_text(f"/proc/{pid}/setgroups", "deny")
        write_text(f"/proc/{pid}/uid_map", users)
        write_text(f"/proc/{pid}/gid_map", groups)


def write_text(path: str, text: str) -> None:
    """Writes a file of /proc, which takes its text in one piece."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def enter(settings: dict, program: bytes, parent: int, has_entered: int, mapped: int) -> None:
    """Is the entrance: goes into new namespaces, and starts init in them."""
    with step("new namespaces (user, mount, pid, net, ipc, uts, cgroup)"):
        raise_errno(libc.unshare(ctypes.c_int(sum(NAMESPACES))))
    # After the call above, which may forget it.
    die_with_parent(parent)
    os.write(has_entered, b".")
    if not os.read(mapped, 1):
        os._exit(1)
    is_root = os.geteuid() == 0
    init = os.fork()
    if init == 0:
        run_reporting(settings, lambda: be_init(settings, program, is_root))
    os.waitpid(init, 0)


def be_init(settings: dict, program: bytes, is_root: bool) -> None:
    """Is process 1: builds the file system, starts the program, and watches it."""
    die_with_parent(None)
    # Blocked, so that sigtimedwait waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    build_file_system(settings, program)
    # The program's descriptors are closed here, so that they end with its processes.
    pid = os.fork()
    if pid == 0:
        run_reporting(settings, lambda: become_program(settings, is_root))
    os.close(settings["verdict"])
    os.close(0)
    os.close(1)
    os.close(2)
    report(settings, watch(pid, settings))


def watch(pid: int, settings: dict) -> dict:
    """Waits until the program ends, or goes beyond its time or its memory. Returns what happened."""
    deadline = time.monotonic() + settings["seconds"]
    while True:
        with contextlib.suppress(ChildProcessError):
            # Those whose parents have died are ours to reap.
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == pid:
                    code = os.waitstatus_to_exitcode(ended[1])
                    return {"exit": code} if code >= 0 else {"signal": -code}
        if time.monotonic() > deadline:
            return {"limit": "time"}
        if memory_in_use() > settings["memory"]:
            return {"limit": "memory"}
        signal.sigtimedwait({signal.SIGCHLD}, LOOK_SECONDS)


def memory_in_use() -> int:
    """Returns the resident bytes of all processes of the namespace but this one."""
    pages = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            # It may have ended.
            with contextlib.suppress(OSError), open(f"/proc/{name}/statm") as file:
                pages += int(file.read().split()[1])
    return pages * resource.getpagesize()


# ---- the file system ----


def build_file_system(settings: dict, program: bytes) -> None:
    """Makes the file system of the program, and leaves the old one."""
    machine = MACHINES[platform.machine()]
    with step("a new file system"):
        # What is mounted here stays here.
        mount("none", "/", None, MS_REC | MS_PRIVATE)
        mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,mode=755")
        os.mkdir("/tmp" + OLD)
        os.chdir("/tmp")
        raise_errno(libc.syscall(machine.pivot_root, b".", b"." + OLD.encode()))
        os.chdir("/")
    for path in [*SYSTEM, *settings["visible"]]:
        with step(f"a read-only view of {path}"):
            show(path)
    for name in DEVICES:
        with step(f"/dev/{name}"):
            show(f"/dev/{name}")
    with step("/proc of the new pid namespace"):
        os.mkdir("/proc")
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    with step("no further user namespaces"):
        write_text("/proc/sys/user/max_user_namespaces", "0")
    with open("/program.py", "wb") as file:
        file.write(program)
    os.mkdir("/scratch")
    with step("leaving the old file system"):
        raise_errno(libc.umount2(OLD.encode(), MNT_DETACH))
        os.rmdir(OLD)
    with step("a read-only file system (Linux 5.12 or later)"):
        attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
        size = ctypes.c_size_t(len(attributes))
        flags = (SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, size)
        raise_errno(libc.syscall(*flags))
    with step("the scratch folder"):
        options = f"size={settings['scratch']},nr_inodes=4096,mode=700,uid={NOBODY},gid={NOBODY}"
        mount("tmpfs", "/scratch", "tmpfs", MS_NOSUID | MS_NODEV, options)
        os.chdir("/scratch")


def show(path: str) -> None:
    """Lets the new file system have a file or folder of the old one, if there is one."""
    old = OLD + path
    if not os.path.lexists(old) or os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), path)
        return
    if os.path.isdir(old):
        os.mkdir(path)
    else:
        with open(path, "w"):
            pass
    mount(old, path, None, MS_BIND | MS_REC)


# ---- the program ----


def become_program(settings: dict, is_root: bool) -> None:
    """Gives up every right, and becomes the program."""
    os.setsid()
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(settings["verdict"], 3)
    os.sched_setaffinity(0, {settings["core"]})
    set_limits(settings, is_root)
    give_up_rights(is_root)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    words = [settings["python"], "-I", "-S", "-c", RUNNER, settings["token"], *settings["path"]]
    with step(f"starting {settings['python']}"):
        os.execve(settings["python"], words, {})


def set_limits(settings: dict, is_root: bool) -> None:
    """Sets the limits of the program's process, which its children inherit."""
    cpu = settings["cpu_seconds"]
    processes = settings["processes"]
    if not is_root:
        # Entrance and init belong to the same user.
        processes += 2
    limits = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: settings["memory"],
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_FSIZE: settings["scratch"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_STACK: 8 << 20,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    for limit, value in limits.items():
        soft, hard = value if isinstance(value, tuple) else (value, value)
        # A limit of this machine that is lower stays.
        _, most = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(limit, (soft, hard))


def give_up_rights(is_root: bool) -> None:
    """Drops user, groups and capabilities, for good, and installs the seccomp filter."""
    with step("dropping capabilities"):
        for capability in range(64):
            try:
                prctl(PR_CAPBSET_DROP, capability)
            except OSError as error:
                # There is no capability of this number.
                if error.errno != errno.EINVAL:
                    raise
                break
        if is_root:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        # _LINUX_CAPABILITY_VERSION_3, of this process; effective, permitted, inheritable, twice.
        raise_errno(libc.capset(struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", *[0] * 6)))
        prctl(PR_SET_NO_NEW_PRIVS, 1)
    with step("a seccomp filter"):
        install_filter(MACHINES[platform.machine()])


def install_filter(machine: Machine) -> None:
    """Denies calls to this process and its children, for good; it has no new privileges before."""
    code = b"".join(filter_program(machine))
    instructions = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions, and where they are.
    fprog = struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions))
    buffer = ctypes.create_string_buffer(fprog, len(fprog))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(buffer))


def filter_program(machine: Machine) -> list[bytes]:
    """Returns the instructions of a seccomp filter (classic BPF, man 2 seccomp), which answers the
    denied calls with an error."""
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, error = 0x80000000, 0x7FFF0000, 0x00050000
    # Offsets in struct seccomp_data: the call's number, the machine, the first argument.
    number, architecture, argument = 0, 4, 16

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    program = [
        instruction(load, architecture),
        instruction(equal, machine.audit, 1, 0),
        instruction(answer, kill),
        instruction(load, number),
        # Calls of x32, which have numbers of their own.
        instruction(at_least, 0x40000000, 0, 1),
        instruction(answer, error | errno.ENOSYS),
        # Its flags are in memory, where a filter can't look; libc uses clone then.
        instruction(equal, SYS_CLONE3, 0, 1),
        instruction(answer, error | errno.ENOSYS),
    ]
    for denied in machine.denied:
        program.append(instruction(equal, denied, 0, 1))
        program.append(instruction(answer, error | errno.EPERM))
    # A new process may not be in new namespaces.
    program += [
        instruction(equal, machine.clone, 0, 4),
        instruction(load, argument),
        instruction(any_bit, sum(NAMESPACES), 0, 1),
        instruction(answer, error | errno.EPERM),
        instruction(answer, allow),
    ]
    program.append(instruction(equal, machine.socket, 0, 2 + len(ALLOWED_SOCKETS)))
    program.append(instruction(load, argument))
    for i, family in enumerate(ALLOWED_SOCKETS):
        program.append(instruction(equal, family, len(ALLOWED_SOCKETS) - i, 0))
    program.append(instruction(answer, error | errno.EAFNOSUPPORT))
    program.append(instruction(answer, allow))
    return program


if __name__ == "__main__":
    main()
