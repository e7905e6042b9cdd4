"""Answers in JSON, compared field by field.

A field is a leaf of the value: the path to it (keys, and places in lists) and what stands there. So
a value of two levels gets credit for each part that is right, and order and spaces say nothing:

    {"name": "Ada", "born": {"year": 1815}}    has the fields  name = "Ada"  and  born.year = 1815

Strings and truth values must be equal; 1, 1.0 and 1e0 are one number. An empty object or list is a
leaf. An answer is the JSON in it: the whole text, else a block between ``` marks, else the first
object or list that stands in the text. An answer without JSON has no fields.
"""

import json
from collections.abc import Iterator
from decimal import Decimal

from common.errors import UserError
from evals.answers import Answers
from evals.code_similarity import fenced_code
from evals.scores import ItemScores

# Objects and lists in each other; beyond it, a value is no JSON that a program would read.
MAX_NESTING = 100
# Brackets of a text at which no value begins; after so many the rest is not looked at, since each
# may be the beginning of a thousand more.
MAX_MISSES = 1000


class NoJson(ValueError):
    """A text holds no JSON."""


def json_scores(answers: Answers) -> ItemScores:
    """ItemScores answers by the fields of their JSON: precision, recall and F1 over all fields, and the
    share of whole values that are right. Of several references, the one of the best F1 counts."""
    num_parsed = 0
    whole_of_each = []
    f1_of_each = []
    num_right = num_answered = num_wanted = 0
    for text, references in zip(answers.texts, answers.references, strict=True):
        try:
            fields = json_fields(json_value(text))
            num_parsed += 1
        except NoJson:
            fields = None
        best = (-1.0, 0, 0)
        for reference in references:
            wanted = json_fields(json_value(reference))
            right = 0 if fields is None else len(fields & wanted)
            best = max(best, (fields_f1(right, len(fields or ()), len(wanted)), right, len(wanted)))
        f1, right, wanted_count = best
        f1_of_each.append(f1)
        whole_of_each.append(float(f1 == 1))
        num_right += right
        num_answered += len(fields or ())
        num_wanted += wanted_count
    count = len(answers)
    columns = {
        "parsed %": 100 * num_parsed / count,
        "precision %": 100 * num_right / max(num_answered, 1),
        "recall %": 100 * num_right / max(num_wanted, 1),
        "F1 %": 100 * fields_f1(num_right, num_answered, num_wanted),
        "whole %": 100 * sum(whole_of_each) / count,
        "of": float(count),
    }
    formats = dict.fromkeys(columns, ".1f") | {"of": ",.0f"}
    note = (
        f"{num_wanted:,} fields wanted, {num_answered:,} answered, {num_right:,} right; a field is a path"
        " and its value; whole: answers whose JSON equals the reference"
    )
    notes = [note]
    items = {"json fields": f1_of_each, "json whole": whole_of_each}
    return ItemScores(items, columns, formats, notes)


def check_json(references: list[str], where: str) -> None:
    """Raises UserError if a reference of a record is no JSON. where: the record's place."""
    for reference in references:
        try:
            json_value(reference)
        except NoJson:
            raise UserError(
                f"{where}: its reference is no JSON object or list; `json` compares fields, use"
                " `exact` or `f1`"
            ) from None


def fields_f1(num_right: int, num_answered: int, num_wanted: int) -> float:
    """Returns the F1 of so many right fields among those answered and those wanted."""
    if num_answered + num_wanted == 0:
        return 1.0
    return 2 * num_right / (num_answered + num_wanted)


def json_value(text: str):
    """Returns the object or list that a text holds. Raises NoJson if it holds none."""
    for candidate in (text, fenced_code(text)):
        value = strict_json(candidate.strip())
        if isinstance(value, (dict, list)):
            return value
    for value in embedded_json(text):
        return value
    raise NoJson(text)


def embedded_json(text: str, decoder: json.JSONDecoder | None = None) -> Iterator[dict | list]:
    """Yields the objects and lists that stand in a text, one after the other. decoder: by default
    one that keeps every digit."""
    decoder = decoder or EXACT_DECODER
    start = 0
    num_misses = 0
    while start < len(text) and num_misses < MAX_MISSES:
        places = [place for place in (text.find("{", start), text.find("[", start)) if place >= 0]
        if not places:
            return
        start = min(places)
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start += 1
            num_misses += 1
            continue
        if is_shallow(value):
            yield value
        start = end


def strict_json(text: str):
    """Returns the value of a text that is JSON and nothing else; None if it is not."""
    try:
        value, end = EXACT_DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return value if end == len(text) and is_shallow(value) else None


def is_shallow(value: object) -> bool:
    """True if at most MAX_NESTING objects and lists are nested in each other."""
    layer = [value]
    for _ in range(MAX_NESTING):
        layer = [inner for each in layer for inner in children(each)]
        if not layer:
            return True
    return False


def children(value: object) -> list:
    """Returns what an object or a list holds."""
    if isinstance(value, dict):
        return [*value.values()]
    return value if isinstance(value, list) else []


def json_fields(value: object) -> set[tuple]:
    """Returns the leaves of a value: (path, kind, what stands there)."""
    fields = set()
    todo: list[tuple[tuple, object]] = [((), value)]
    while todo:
        path, each = todo.pop()
        if isinstance(each, dict) and each:
            todo += [((*path, key), inner) for key, inner in each.items()]
        elif isinstance(each, list) and each:
            todo += [((*path, place), inner) for place, inner in enumerate(each)]
        elif isinstance(each, (dict, list)):
            fields.add((path, "empty", type(each).__name__))
        else:
            # True equals 1 in Python, and is another value in JSON.
            is_number = isinstance(each, (int, float, Decimal)) and not isinstance(each, bool)
            kind = "number" if is_number else type(each).__name__
            fields.add((path, kind, each))
    return fields


def no_constant(name: str):
    """Refuses NaN and Infinity, which Python's reader takes and JSON has not."""
    raise ValueError(name)


def exact_number(digits: str) -> Decimal:
    """Returns a number with all its digits. Raises ValueError for an exponent beyond all sense."""
    try:
        return Decimal(digits)
    except ArithmeticError:
        raise ValueError(digits) from None


EXACT_DECODER = json.JSONDecoder(
    parse_int=exact_number, parse_float=exact_number, parse_constant=no_constant
)
