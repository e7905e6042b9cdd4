"""JSON that holds records, but not as one of them: parts of the data, tables by their columns; and objects whose keys
are no ids."""

import json

import pytest

from common.errors import UserError
from dataset.formats import REPEATS, open_source
from dataset.prompts import open_prompts
from dataset.records import ReadStats

ASKED = {"role": "user", "content": "q"}


def chat(answer: str) -> dict:
    return {"messages": [ASKED, {"role": "assistant", "content": answer}]}


def error_of(file, value, opened=open_source) -> str:
    file.write_text(json.dumps(value))
    with pytest.raises(UserError) as caught:
        opened(file).read_all()
    return str(caught.value)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_single_preference_of_objects_is_one_record(tmp_path, indent):
    """Of an object of objects, each was taken for a record by an id, and the rejected answer was trained."""
    file = tmp_path / "a.json"
    talks = {"chosen": chat("good")["messages"][1], "rejected": chat("bad")["messages"][1]}
    file.write_text(json.dumps(talks | {"prompt": ASKED}, indent=indent))
    (record,) = open_source(file).read_all()
    assert [each["content"] for each in record.messages] == ["q", "good"] and record.rejected[0]["content"] == "bad"
    both = {"chosen": chat("good"), "rejected": chat("bad")}
    assert "no role, found 'messages'" in error_of(file, both)
    ids = {"17": chat("a"), "train-3": chat("b")}
    file.write_text(json.dumps(ids, indent=indent))
    assert len(open_source(file).read_all()) == 2


LISTS = {
    "parts": ({"train": [chat("a")], "test": [chat("b")]}, "'train', 'test'; save each of these lists as"),
    "parts of anything": ({"train": [{"x": 1}], "dev": [{"x": 2}]}, "'train', 'dev'"),
    "parts that are single records": ({"train": chat("a"), "test": chat("b")}, "keys 'train', 'test': no known format"),
    "a list under data": ({"version": "1", "data": [chat("a")]}, "at 'data'; save that list as"),
    "texts under data": ({"data": [{"text": "a"}]}, "at 'data'"),
    "rows of the Hub's viewer": ({"rows": [{"row_idx": 0, "row": chat("a")}], "features": []}, "at 'rows'"),
    "another name": ({"what_i_made": [{"prompt": "q", "completion": "a"}]}, "at 'what_i_made'"),
    "conversations of records": ({"conversations": [chat("a"), chat("b")]}, "at 'conversations'"),
}
TABLES = {
    "pandas": {"prompt": {"0": "q", "1": "r"}, "completion": {"0": "a", "1": "b"}},
    "pandas, one column": {"text": {"0": "q", "1": "r"}},
    "datasets": {"prompt": ["q", "r"], "completion": ["a", "b"]},
    "datasets, messages": {"messages": [chat("a")["messages"], chat("b")["messages"]]},
    "pandas, split": {"columns": ["prompt", "completion"], "index": [0], "data": [["q", "a"]]},
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", [*LISTS, *TABLES])
def test_what_holds_several_records_is_named_and_what_to_do(tmp_path, name, indent):
    value, words = LISTS.get(name) or (TABLES[name], "holds a table by its columns; write it by its rows")
    file = tmp_path / "a.json"
    for opened in (open_source, open_prompts):
        assert words in error_of(file, value, opened)


def test_records_with_lists_of_objects_are_records(tmp_path):
    file = tmp_path / "a.jsonl"
    documents = {"documents": [{"text": "a passage"}], "tools": [{"name": "f", "parameters": {}}]}
    squad = {"context": "c", "question": "q", "answers": ["a"]}
    for record in (
        chat("a") | documents,
        squad,
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ):
        file.write_text(json.dumps(record))
        assert len(open_source(file).read_all()) == 1


def test_answers_that_begin_with_their_question_are_counted(tmp_path):
    """As a pipeline gives them back that returns the whole text."""
    question = "What is the capital of France?"
    file = tmp_path / "a.jsonl"
    records = [
        {"prompt": question, "completion": f" {question}\nParis."},
        {"prompt": question, "completion": question},
        {"prompt": "Paris", "completion": "Paris is a town."},
        {"prompt": question, "completion": "Paris."},
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    stats = ReadStats()
    source = open_source(file)
    assert len(source.read_all(stats)) == 4 and stats.altered == {REPEATS: 1}
    assert f", 1 {REPEATS}" in source.summary(stats)
