"""CSV and TSV: a first row that is a record is read as one, said, or refused with what to write; never lost."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from dataset.formats import Map, open_source
from dataset.records import ReadStats


def read(path: Path, text: str, **more) -> tuple[list[list[str]], str]:
    """What the records say, and the line about the file."""
    path.write_text(text)
    source, stats = open_source(path, **more), ReadStats()
    records = [*source.records(stats)]
    said = [[m["content"] for m in record.messages] if record.messages else [record.text] for record in records]
    return said, source.summary(stats)


def test_two_columns_without_a_header_are_a_question_and_an_answer(tmp_path):
    said, line = read(tmp_path / "a.csv", "What is it?,A cat.\nAnd that?,A dog.\n")
    assert said == [["What is it?", "A cat."], ["And that?", "A dog."]]
    assert line.endswith("question and answer (CSV, 2 records), no header: columns taken as question, answer")
    said, line = read(tmp_path / "a.tsv", "How are you?\tI am well, thank you.\n")
    assert said == [["How are you?", "I am well, thank you."]] and "no header" in line


def test_one_column_without_a_header_is_plain_text(tmp_path):
    said, line = read(tmp_path / "a.csv", '"It was the best of times."\n"It was the worst."\n')
    assert said == [["It was the best of times."], ["It was the worst."]]
    assert line.endswith("plain text (CSV, 2 records), no header: its column taken as text")


@pytest.mark.parametrize("header", ["question,answer", "id,question,answer", ",text,label", "Text here?,text,label"])
def test_a_header_with_the_names_of_a_format_is_one(tmp_path, header):
    row = ",".join("abc"[: header.count(",") + 1])
    said, line = read(tmp_path / "a.csv", f"{header}\n{row}\n")
    assert len(said) == 1 and "no header" not in line


def test_numbered_classes_are_said(tmp_path):
    said, line = read(tmp_path / "a.csv", "3,Title,Words\n4,Other,More words\n3,Third,Last\n")
    assert said[0] == ["Title\nWords", "3"] and line.endswith("no header: columns taken as label, text")


REFUSED = {
    # the text of a file: what is said
    "1,What?,That\n2,Who?,Me\n3,Why?,So\n": "a record and no header; write a row above it with their names, such as id",
    "0,1\na,b\n": "its first row numbers the columns; write the columns' names in their place",
    "Find x.,1,2,3,4,B\n": r"\('Find x.', '1', '2', ...\) is a record and no header; write a row above it",
    "spam,Win now!\nham,Hello there.\nspam,Win more!\nham,See you.\n": "write a row above it with label,text or q",
    "hello,hi there\nbye,see you\n": "no known format.*; if its first row is a record, write one with the names",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_what_would_be_a_guess_is_refused_with_what_to_write(tmp_path, text):
    with pytest.raises(UserError, match=REFUSED[text]):
        read(tmp_path / "a.csv", text)


def test_the_advice_helps(tmp_path):
    said, _ = read(tmp_path / "a.csv", "label,text\nspam,Win now!\nham,Hello there.\nspam,Win more!\nham,See you.\n")
    assert said[0] == ["Win now!", "spam"] and len(said) == 4


def test_a_users_function_reads_columns_of_any_name(tmp_path):
    (tmp_path / "m.py").write_text(
        "def f(record):\n    a, b = record.values()\n    return {'prompt': a, 'completion': b}"
    )
    map_fn = Map(f"{tmp_path}/m.py:f")
    said, line = read(tmp_path / "a.csv", "Frage,Antwort\na,b\n", map_fn=map_fn)
    assert said == [["a", "b"]] and "columns named" not in line
    said, line = read(tmp_path / "a.csv", "What do you want to ask us?,What is the answer?\na,b\n", map_fn=map_fn)
    assert said == [["a", "b"]] and "columns named by the first row: 'What do you want to ask us?'" in line
    with pytest.raises(UserError, match="is a record and no header; write a row above it with names for your"):
        read(tmp_path / "a.csv", "Two and two?,4\na,b\n", map_fn=map_fn)


def test_rows_with_and_without_a_header_are_not_mixed_up_in_the_cache(tmp_path):
    """The columns of a table are a part of what its token rows are found by."""
    keys = []
    for name, text in (("a.csv", "What is it?,A cat.\n"), ("b.csv", "question,answer\nWhat is it?,A cat.\n")):
        (tmp_path / name).write_text(text)
        keys.append(json.dumps(open_source(tmp_path / name).reading_key()))
    assert keys[0] != keys[1]
