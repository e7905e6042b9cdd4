"""SIGTERM and SIGINT end a run after the step at hand, with a checkpoint."""

import os
import signal
import threading
import time
from typing import Self

from distributed import is_rank0

SIGNALS = (signal.SIGTERM, signal.SIGINT)
DEBOUNCE_SECONDS = (
    1.0  # signals within it count as one: torchrun passes on what the terminal has sent already
)


class GracefulStop:
    """While entered, a signal asks for an end after the step at hand; a second one ends the process at once.

    signal: the number of the signal that asked, 0 if none has. The bytes that the signals' C handler writes to a pipe
    are read by a thread, since the main thread may be waiting for another rank, where Python runs no handler.
    """

    def __init__(self):
        self.signal, self.since = 0, 0.0

    def __enter__(self) -> Self:
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        if not self.in_main_thread:
            return self
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.wakeup_before = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        self.handlers_before = {
            number: signal.signal(number, lambda *_: None) for number in SIGNALS
        }
        threading.Thread(target=self.listen, daemon=True).start()
        return self

    def listen(self) -> None:
        while received := os.read(self.read_end, 1):
            number, now = received[0], time.monotonic()
            if number not in SIGNALS:
                continue
            if not self.signal:
                self.signal, self.since = number, now
                if is_rank0():
                    os.write(
                        2,
                        b"\nstopping  after this step, with a checkpoint; once more to stop at once\n",
                    )
            elif now - self.since > DEBOUNCE_SECONDS:
                os._exit(128 + number)
        os.close(self.read_end)

    def __exit__(self, *_) -> None:
        if not self.in_main_thread:
            return
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup_before)
        os.close(self.write_end)  # which ends the thread
