"""What happens to records that can't be read: all of a file are found and named, or, with
--skip-bad, left out and counted by what is wrong with them.

A fault is a UserError of one record. `Source.read` notes it in the `ReadStats` and goes on, so that
a file is read to its end, and `complaint` makes one error of all its faults. What makes the rest of
a file unreadable (a list of JSON that is not closed, a cut compression) still ends it at once.
"""

import re

from common.console import number_of
from common.errors import FaultyRecords, UserError
from dataset.records import Format, ReadStats

# Where the part of a fault begins that differs from record to record.
DETAILS = re.compile(
    r"; | \(|, found | at (?:column|line|byte|character) | looks like "
    r"|(?<=holds a lone surrogate) "
)
# Where in its record a fault is: "message 3: ", "article 1 paragraph 2 question 3: ".
PLACE = re.compile(r"^(?:(?:message|history|article|paragraph|question|record) \d+ ?)+:? ?")
LONGEST_KIND = 80  # characters
# The keys of a message that hold its words.
WORDS = ("content", "value")
# From this share of faulty or cut records on, leaving them out is worth a warning.
WARN_ABOVE = 0.05


def fault_kind(fault: str) -> str:
    """Returns what is wrong with a record, without what differs from record to record.

    fault: behind the name of the file, as in "line 3: JSON cut off at column 17 (...)".
    """
    _, _, problem = fault.partition(": ")
    problem = PLACE.sub("", problem or fault)
    if problem.startswith("keys "):
        return "other keys than the file's format has"
    kind = DETAILS.split(problem, maxsplit=1)[0]
    return kind[:LONGEST_KIND].strip()


def complaint(
    path: str,
    stats: ReadStats,
    lines: list[str],
    can_skip: bool,
    end: UserError | None = None,
) -> UserError | None:
    """Returns the error for the faulty records of a file, or None if there are none.

    path: the file or folder.
    stats: of all that was read of it.
    lines: each of its faults with the name of the file.
    can_skip: whether the command has --skip-bad.
    end: what made the rest of the file unreadable.
    """
    if not stats.num_faults:
        return end
    if end is not None:
        lines = [*lines, f"{end}; what follows was not read"]
    if len(lines) == 1 and stats.num_faults == 1:
        advice = "; mend it, or --skip-bad leaves it out" if can_skip else ""
        return UserError(lines[0] + advice)
    num_shown = len(stats.faults)
    count = f"{number_of(stats.num_faults, 'faulty record')} in {path}"
    if num_shown < stats.num_faults:
        count += f", of which these are the first {num_shown}"
    advice = "mend them"
    if can_skip and end is None:
        advice += ", or --skip-bad leaves them out"
    return FaultyRecords(*lines, f"{count}; {advice}")


def nulls_as_texts(value: object, format: Format) -> dict | None:
    """Returns a record with "" for each null where a text is wanted, or None if there is none.

    value: a record that can't be read as it is.
    """
    if not isinstance(value, dict):
        return None
    columns = (*format.keys, *format.optional, *format.aliases)
    result = {}
    for key, each in value.items():
        if each is None and key in columns:
            each = ""
        elif isinstance(each, list):
            each = [_with_words(message) for message in each]
        result[key] = each
    return result if result != value else None


def _with_words(message: object) -> object:
    """Returns a message with "" for a null in the place of its words. One with tool calls or a
    refusal need not have any."""
    if not isinstance(message, dict) or message.get("tool_calls") or message.get("refusal"):
        return message
    changes = {key: "" for key in WORDS if key in message and message[key] is None}
    return message | changes if changes else message
