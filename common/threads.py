"""How threads wait for each other, chosen by what else runs on this machine.

torch's threads meet after each operation. By default (libgomp's) the first one to arrive spins: it
looks again and again whether the others are there, for milliseconds, which is the fastest way on a
machine that has nothing else to do. Beside another busy process it is the slowest: the spinning
thread holds the very core that the late one waits for. Threads that sleep instead lose a little
alone and gain much in company. On 2 cores, tokens/s of the bundled task, alone and beside one busy
process (benchmarks/busy_machine.py): bf16 449 and 125 spinning, 377 and 253 asleep; fp32 with AVX2
242 and 89 spinning, 231 and 135 asleep. A bound on the spinning has no better of both: what is
short enough to help in company costs as much alone.

libgomp reads the environment when it is loaded, so the choice is made before torch is imported.
"""

import os
import sys
import time
from pathlib import Path

VARIABLE = "OMP_WAIT_POLICY"
# A user who has set one of these has chosen.
SET_BY_USER = (VARIABLE, "GOMP_SPINCOUNT")
# Seconds in which the load of the other processes is measured.
MEASURING_SECONDS = 0.1
# So many cores that others keep busy are no neighbour yet.
LEAST_BUSY = 0.4


class OtherLoad:
    """The load of all other processes on the cores that this one may use.

    Known on Linux only.
    """

    def __init__(self):
        self.before = busy_seconds()
        self.own_before = time.process_time()
        self.since = time.monotonic()

    def cores(self) -> float:
        """Returns how many cores the others kept busy, on average, since the last call; 0 where
        that is not known."""
        now = time.monotonic()
        busy = busy_seconds()
        own = time.process_time()
        others = (busy - self.before) - (own - self.own_before)
        cores = max(0.0, others / max(now - self.since, 1e-3))
        self.before = busy
        self.own_before = own
        self.since = now
        return cores


def busy_seconds() -> float:
    """Returns the seconds that this process's cores have worked since the machine was started; 0
    where that is not known."""
    file = Path("/proc/stat")
    if not file.is_file():
        return 0.0
    cores = {f"cpu{number}" for number in usable_cores()}
    ticks = 0
    for line in file.read_text().splitlines():
        name, *fields = line.split()
        if name in cores:
            # user, nice, system, idle, iowait, irq, softirq: see proc_stat(5).
            user, nice, system, _, _, irq, softirq = map(int, fields[:7])
            ticks += user + nice + system + irq + softirq
    return ticks / os.sysconf("SC_CLK_TCK")


def usable_cores() -> set[int]:
    """Returns the numbers of the logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def num_threads() -> int:
    """Returns how many threads torch will have: OMP_NUM_THREADS, or one a physical core."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit():
        return int(given)
    siblings = set()
    for number in usable_cores():
        file = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        siblings.add(file.read_text() if file.is_file() else str(number))
    return len(siblings)


def choose_wait_policy() -> None:
    """Lets threads sleep while they wait, if other processes keep some of their cores busy.

    Has no effect once torch is loaded, where the user has chosen, or outside Linux.
    """
    is_set = any(name in os.environ for name in SET_BY_USER)
    threads = num_threads()
    if sys.platform != "linux" or "torch" in sys.modules or is_set or threads == 1:
        return
    load = OtherLoad()
    time.sleep(MEASURING_SECONDS)
    busy = load.cores()
    if busy >= LEAST_BUSY and len(usable_cores()) - busy < threads:
        os.environ[VARIABLE] = "passive"
        # Read by `wait_policy_note`.
        os.environ["PLAINTUNE_BUSY_CORES"] = f"{busy:.1f}"


def wait_policy_note() -> str:
    """Returns a line about what `choose_wait_policy` has chosen; "" where it chose nothing."""
    busy = os.environ.get("PLAINTUNE_BUSY_CORES")
    if busy is None:
        return ""
    return (
        f"others keep {busy} of {len(usable_cores())} cores busy, so threads sleep while they wait"
        f" for each other ({VARIABLE}=active: they spin, which is faster alone)"
    )
