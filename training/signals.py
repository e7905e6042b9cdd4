"""SIGTERM, SIGINT, SIGHUP and the signals of schedulers end a run after the step at hand, with a
checkpoint.

A cluster's scheduler sends SIGTERM some time before it kills a job, or what it was told to send:
SIGUSR1 (Slurm's --signal=USR1@300, Grid Engine's -notify), SIGUSR2 (Grid Engine, LSF), SIGXCPU (a
limit of processor time). Ctrl-C sends SIGINT; a terminal or a connection that is closed sends
SIGHUP, which `nohup` has a program ignore.
"""

import contextlib
import os
import signal
import threading
import time
from typing import Self

from distributed import is_rank0

SIGNALS = [signal.SIGTERM, signal.SIGINT]
# Who starts a run may have it ignore these. Windows has none of them.
IGNORABLE = [
    getattr(signal, name)
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
]
# Signals within a second count as one: torchrun passes on what the terminal has sent already.
DEBOUNCE_SECONDS = 1.0
STOPPING = b"\nstopping  after this step, with a checkpoint; once more to stop at once\n"


class ValidationInterrupted(Exception):
    """A signal came during a validation, to this rank or another."""


class GracefulStop:
    """While entered, a signal asks for an end after this step; a second one ends the process.

    signal: the number of the signal that asked, 0 if none has.

    Python runs a signal's handler in the main thread, between two of its instructions, and that
    thread may be waiting for another rank. So a thread reads the bytes that the C handler writes to
    a pipe.
    """

    def __init__(self):
        self.signal = 0
        # When it came, by the monotonic clock.
        self.since = 0.0

    def __enter__(self) -> Self:
        # Python lets only the main thread set handlers.
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        if not self.in_main_thread:
            return self
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.wakeup_before = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        self.handlers_before = {}
        for number in (*SIGNALS, *IGNORABLE):
            # Under nohup the run is to outlive its terminal.
            if number in IGNORABLE and signal.getsignal(number) == signal.SIG_IGN:
                continue
            # A handler that does nothing, since the default one would end the process.
            self.handlers_before[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self.listen, daemon=True).start()
        return self

    def listen(self) -> None:
        """Reads a byte for each signal, its number, until the pipe is closed."""
        while True:
            received = os.read(self.read_end, 1)
            if not received:
                break
            number = received[0]
            now = time.monotonic()
            if number not in self.handlers_before:
                continue
            if not self.signal:
                self.signal = number
                self.since = now
                if is_rank0():
                    # Straight to standard error, whose buffer another thread may be using. With a
                    # terminal that is gone there is none.
                    with contextlib.suppress(OSError):
                        os.write(2, STOPPING)
            elif now - self.since > DEBOUNCE_SECONDS:
                os._exit(128 + number)
        os.close(self.read_end)

    def __exit__(self, *_) -> None:
        if not self.in_main_thread:
            return
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup_before)
        # This ends the thread.
        os.close(self.write_end)
