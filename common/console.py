"""Prints to the terminal: aligned tables, and text from unknown sources on one line.

Text that comes from a file of an unknown source, or from a model, may have control characters. They
are escaped, so that they can't move the cursor.
"""

import sys

from common.errors import printable


def print_stderr(line: str) -> None:
    """Prints a line to stderr at once. Stdout is left to a script's results."""
    print(line, file=sys.stderr, flush=True)


def table(rows: list[list[str]]) -> str:
    """Returns rows of cells as aligned text. The first row is the heading; the first column is
    aligned left, all others right."""
    widths = []
    for column in range(len(rows[0])):
        lengths = [len(row[column]) for row in rows]
        widths.append(max(lengths))
    lines = []
    for row in rows:
        # Names are read from the left, numbers are compared from the right.
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:]):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells))
    heading, *body = lines
    rule = "-" * len(heading)
    return "\n".join([heading, rule, *body])


def one_line(text: str, width: int = 100) -> str:
    """Returns the text on one line of at most `width` characters, with what is not printable
    escaped."""
    # Cut before it is escaped, for the text may be long; an escape is longer than its character.
    line = printable(text[:width])
    if len(text) > width or len(line) > width:
        return line[: width - 3] + "..."
    return line
