"""The bundled task: made again byte for byte, checked by Python's json and datetime, and split by meaning."""

import json
import re
from datetime import datetime

import pytest

from assets import make_booking
from assets.make_booking import MONTHS, NUMBERS, WEEKDAYS
from data import ASSETS, BUNDLED_TASK
from interop.resolve import model_folder
from tokenizer import load_tokenizer


def notes(part: str) -> list[tuple[str, dict]]:
    turns = [json.loads(line)["messages"] for line in BUNDLED_TASK[part][0].read_text().splitlines()]
    assert all([turn["role"] for turn in record] == ["system", "user", "assistant"] for record in turns)
    return [(record[1]["content"], json.loads(record[2]["content"])) for record in turns]


def test_the_script_makes_the_same_bytes(tmp_path):
    make_booking.make(tmp_path)
    for file, *_ in BUNDLED_TASK.values():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("part", BUNDLED_TASK)
def test_answers_say_what_the_notes_say(part):
    for note, answer in notes(part):
        assert list(answer) == ["name", "guests", "time"] and answer["name"] in note
        when = datetime.fromisoformat(answer["time"])
        assert str(when.year) in note
        day = re.search(
            r"\b(\d{1,2})(?:st|nd|rd|th)?(?: of)? [A-Z][a-z]{2}|[A-Z][a-z]+ (\d{1,2})(?:st|nd|rd|th)?,? \d{4}", note
        )
        if day:
            assert int(day[1] or day[2]) == when.day and MONTHS[when.month - 1][:3] in note
        weekday = re.search("|".join(WEEKDAYS), note)
        assert not weekday or weekday[0] == WEEKDAYS[when.weekday()]
        clock = re.search(r"(\d{1,2}):(\d\d)\s*(am|pm|in the (?:morning|afternoon|evening))?", note)
        if clock:
            late = clock[3] and clock[3] not in ("am", "in the morning")
            hour = int(clock[1]) % 12 + 12 * bool(late) if clock[3] else int(clock[1])
            assert (hour, int(clock[2])) == (when.hour, when.minute), note
        said = re.search(rf"(?:(quarter past|half past) )?\b({'|'.join(NUMBERS)}) in the (\w+)", note)
        if said:
            minutes = {"quarter past": 15, "half past": 30, None: 0}[said[1]]
            hour = NUMBERS.index(said[2]) % 12 + 12 * (said[3] != "morning")
            assert 60 * hour + minutes == 60 * when.hour + when.minute, note
        if "noon" in note and "afternoon" not in note:
            assert (when.hour, when.minute) == (12, 0), note
        assert not re.search(r"\b(1 people|one guests|12 pm)\b", note)


def test_numeric_dates_are_not_ambiguous():
    for part in BUNDLED_TASK:
        for note, _ in notes(part):
            for a, b in re.findall(r"\b(\d{1,2})[./](\d{1,2})[./]\d{4}", note):
                assert max(int(a), int(b)) > 12


def test_no_test_date_is_trained_on_and_some_names_are_new():
    dates = {part: {answer["time"][:10] for _, answer in notes(part)} for part in BUNDLED_TASK}
    names = {part: {answer["name"] for _, answer in notes(part)} for part in BUNDLED_TASK}
    assert not dates["train"] & dates["test"] and not dates["train"] & dates["val"] and not dates["val"] & dates["test"]
    assert 0 < len(names["test"] - names["train"]) < len(names["test"])
    assert len(notes("test")) >= 200


def test_general_text_is_long_enough_to_measure_on():
    tokens = load_tokenizer(model_folder(None)).encode((ASSETS / "general.txt").read_text())
    assert 5_000 <= len(tokens) < 6_000
