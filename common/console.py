"""What reaches the terminal: aligned tables, and text of strangers on one line.

Text out of a stranger's file, or out of a model, is printed as characters that move no cursor.
"""

import sys

from common.errors import printable


def print_stderr(line: str) -> None:
    """Prints a line to stderr at once. Stdout is left to a script's results."""
    print(line, file=sys.stderr, flush=True)


def table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text: the first row is the heading, the first column is left-aligned, numbers right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def one_line(text: str, width: int = 100) -> str:
    """The text on one line of at most `width` characters, whatever it holds: what does not print is escaped."""
    shown = printable(text[:width])
    return shown if len(shown) <= width and len(text) <= width else shown[: width - 3] + "..."
