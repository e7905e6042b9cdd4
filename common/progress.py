"""Shows how far a long piece of work is: a bar on a terminal, elsewhere a line every so often.

Both say how much time is left. Work that is done before the first line is due prints nothing.
"""

import sys
import time
from types import TracebackType
from typing import Protocol, Self

from tqdm import tqdm

from common.console import format_duration, print_stderr

# Seconds between two lines where no terminal is.
LINE_SECONDS = 30.0


class Progress(Protocol):
    """What tqdm and `ProgressLines` have in common."""

    def update(self, n: float = 1) -> bool | None:
        """Counts n more units as done."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Sets what is shown beside the count."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error) -> None: ...


def progress(
    what: str, total: int | None, unit: str, shown: bool = True, done: int = 0
) -> Progress:
    """Returns the progress of a piece of work.

    what: its name, such as "validating".
    unit: in the singular. Of "byte" there are many, which are shown as kB, MB and GB.
    total: of its units; None if that is not known beforehand.
    shown: False for nothing at all, as on ranks other than 0.
    done: units that were done before.
    """
    if shown and not sys.stderr.isatty():
        return ProgressLines(what, total, unit, done)
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        unit="B" if unit == "byte" else " " + unit,
        unit_scale=unit == "byte",
        disable=not shown,
        leave=False,
        dynamic_ncols=True,
    )


class ProgressLines:
    """Prints a line to stderr every LINE_SECONDS: in a log, a bar would be a mess."""

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0):
        self.what = what
        self.total = total
        self.unit = unit
        self.done_before = done
        self.count = float(done)
        self.postfix = ""
        self.start = time.monotonic()
        self.last_line = self.start

    def update(self, n: float = 1) -> None:
        self.count += n
        now = time.monotonic()
        if now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            print_stderr(self.line(now - self.start))

    def line(self, seconds: float) -> str:
        """Returns the line that is printed `seconds` after the start."""
        count, total, unit = self.count, self.total, f"{self.unit}s"
        if self.unit == "byte":
            count, unit = count / 1e6, "MB"
            total = total and round(total / 1e6)
        parts = [f"{self.what}: {count:,.0f} {unit}"]
        if total is not None:
            parts = [f"{self.what}: {count:,.0f} of {total:,} {unit}"]
        if self.postfix:
            parts.append(self.postfix)
        done_now = self.count - self.done_before
        if self.total and done_now:
            left = seconds * (self.total - self.count) / done_now
            parts.append(f"{format_duration(left)} left")
        return ", ".join(parts)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        self.postfix = s

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
