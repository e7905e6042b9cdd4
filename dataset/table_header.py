"""Whether the first row of a CSV or TSV file names its columns, or is a record already.

It is a header if it has the names that some format wants, or if each of its cells could be a name:
short, without a number, none of them twice. Such a row is never read as a record, and any other is
never lost as a header: where two columns have no names they are taken as question and answer, one
is a text, and a line says so. Where that would be a guess, the file is refused, with the row that
is to be written above.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from common.errors import UserError
from dataset.messages import quote_names
from dataset.readers import CLASS_NAMES, Container, first_rows

LOOKED_AT = 50  # rows
LONGEST_NAME = 40  # characters of a column's name
LONGEST_HEADING = 200  # characters of one where a function of the user's reads the columns
MOST_WORDS = 3  # in a column's name
# The columns of a table without a header, by their number.
TAKEN_AS = {1: ("text",), 2: ("question", "answer")}
NUMBER = re.compile(r"[-+]?[\d.,]*\d%?")


def with_columns(
    container: Container, known: Iterable[tuple[str, ...]], has_map: bool
) -> Container:
    """Returns a table with the names of its columns, if its first row is a record; any other file,
    and a table with a header, as it is.

    known: for each format the columns that it wants.
    has_map: whether a function of the user's reads the columns, which may have any names then.

    Raises UserError, with what to write, where the columns' meaning would be a guess.
    """
    if not container.kind.startswith(("CSV", "TSV")):
        return container
    rows = first_rows(container, LOOKED_AT)
    if not rows:
        return container
    first = [cell.strip() for cell in rows[0]]
    names = set(first)
    has_known_names = any(names.issuperset(columns) for columns in known)
    # A row of one cell with semicolons is refused where it is read.
    is_other_separator = len(first) == 1 and ";" in first[0]
    if has_known_names or is_other_separator:
        return container
    if len(first) > 1 and first == [str(i) for i in range(len(first))]:
        advice = "write the columns' names in their place, such as question,answer"
        raise UserError(f"{container.path}: its first row numbers the columns; {advice}")
    if len(first) > 1 and first[0].isdecimal():
        return _numbered_classes(container, rows)
    if has_map:
        return _with_headings(container, first)
    if len(names) == len(first) and all(map(_could_be_name, first)):
        return container

    columns = TAKEN_AS.get(len(first))
    if columns is None:
        raise _no_header(container, first, "their names, such as question,answer,source")
    if len(columns) == 2 and _are_classes([row[0] for row in rows]):
        raise _no_header(container, first, "label,text or question,answer")
    note = f"no header: columns taken as {', '.join(columns)}"
    if len(columns) == 1:
        note = "no header: its column taken as text"
    return replace(container, columns=columns, header_note=note)


def _could_be_name(cell: str) -> bool:
    """True if a cell could be the name of a column."""
    is_short = 0 < len(cell) <= LONGEST_NAME and len(cell.split()) <= MOST_WORDS
    return is_short and (cell[0].isalpha() or cell[0] == "_") and cell[-1] not in ".?!,;:"


def _are_classes(cells: list[str]) -> bool:
    """True if the first cells of the rows could be classes: short, and few different ones."""
    is_short = all(len(cell) <= LONGEST_NAME for cell in cells)
    return len(cells) >= 4 and is_short and 2 * len(set(cells)) <= len(cells)


def _numbered_classes(container: Container, rows: list[list[str]]) -> Container:
    """Returns a table whose first row begins with a number, of classes as Zhang et al. 2015 have
    them. Raises UserError if the numbers count the rows."""
    numbers = [row[0].strip() for row in rows]
    has_class_names = (Path(container.path).parent / CLASS_NAMES).is_file()
    if not has_class_names and len(numbers) >= 3 and len(set(numbers)) == len(numbers):
        first = [cell.strip() for cell in rows[0]]
        raise _no_header(container, first, "their names, such as id,question,answer")
    return replace(container, header_note="no header: columns taken as label, text")


def _with_headings(container: Container, first: list[str]) -> Container:
    """Returns a table whose columns a function of the user's reads. Raises UserError if its first
    row can't be one of names."""
    is_plain = len(set(first)) == len(first) and all(first[1:])
    has_numbers = any(NUMBER.fullmatch(cell) for cell in first)
    is_long = any(len(cell) > LONGEST_HEADING for cell in first)
    if has_numbers or is_long or not is_plain:
        raise _no_header(container, first, "names for your function, such as a,b,c")
    if all(map(_could_be_name, first)):
        return container
    return replace(container, header_note=f"columns named by the first row: {quote_names(first)}")


def _no_header(container: Container, first: list[str], wanted: str) -> UserError:
    """Returns the error for a table whose first row is a record. wanted: what is to stand above."""
    row = quote_names(first[:3]) + (", ..." if len(first) > 3 else "")
    problem = f"its first row ({row}) is a record and no header"
    return UserError(f"{container.path}: {problem}; write a row above it with {wanted}")
