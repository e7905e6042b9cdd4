"""JSON that holds records, but not as one of them: whole parts of the data in one file, or a table
by its columns. Read as a record, it would be another talk than the one that was meant.

    lists of records     {"train": [{...}, ...], "test": [{...}, ...]}, {"data": [{...}, ...]}
    pandas, by columns   {"prompt": {"0": "...", "1": "..."}, "completion": {...}}
    datasets, by columns {"prompt": ["...", "..."], "completion": ["...", "..."]}
    pandas, "split"      {"columns": [...], "index": [...], "data": [[...], ...]}
"""

from collections.abc import Callable

from dataset.messages import quote_names

BY_COLUMNS = (
    "holds a table by its columns; write it by its rows, a record a line"
    " (pandas: orient='records', lines=True; the library `datasets`: to_json)"
)
# Keys of a record that hold its messages.
TALK_KEYS = ("messages", "conversations")
# Keys of an object that hold records, whatever these are.
LIST_KEYS = frozenset(
    "data rows records examples samples items instances dataset train training validation valid val"
    " dev test eval".split()
)


def layout_fault(value: dict, is_record: bool, fits_a_format: Callable[[dict], bool]) -> str:
    """Returns why an object is no record but holds several, with what to do; "" for all others.

    is_record: whether it has the keys of a record.
    fits_a_format: a function that says so of an object within it.
    """
    columns = list(value.values())
    all_are_objects = bool(columns) and all(isinstance(each, dict) and each for each in columns)
    if all_are_objects and all(_are_row_numbers(each, columns[0]) for each in columns):
        return BY_COLUMNS
    all_are_lists = bool(columns) and all(isinstance(each, list) and each for each in columns)
    if all_are_lists and is_record and all(_are_cells(each, columns[0]) for each in columns):
        return BY_COLUMNS
    if isinstance(value.get("columns"), list) and _are_lists(value.get("data")):
        return BY_COLUMNS

    keys = []
    for key, each in value.items():
        first = each[0] if isinstance(each, list) and each else None
        if not isinstance(first, dict):
            continue
        holds_talks = any(isinstance(first.get(name), list) for name in TALK_KEYS)
        may_be_records = str(key).lower() in LIST_KEYS or fits_a_format(first)
        if holds_talks or (may_be_records and not is_record):
            keys.append(key)
    if not keys:
        return ""
    its_own = "that list" if len(keys) == 1 else "each of these lists"
    return f"holds lists of records, at {quote_names(keys)}; save {its_own} as a file of its own"


def _are_row_numbers(column: dict, first: dict) -> bool:
    """True if the keys of a column are numbers of rows, the same as those of the first column."""
    return column.keys() == first.keys() and all(str(key).isdecimal() for key in column)


def _are_cells(column: list, first: list) -> bool:
    """True if a list may be a column: as long as the first one, and without objects, which are
    messages or tools."""
    return len(column) == len(first) and not any(isinstance(each, dict) for each in column)


def _are_lists(value: object) -> bool:
    """True if a value is a list of lists."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, list) for each in value)
