"""Columns beside those of a format: system messages and thoughts under other names are read, words on which answers may
rest are warned of; numbers of Parquet, earlier turns, and the places of nested files are what their writer meant."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from support.helpers import chat_base, command

import data
from common.errors import UserError
from data import load
from dataset.formats import open_source
from dataset.inspection import quick_checks
from dataset.records import ReadStats, nested_place, pack_nested
from dataset.token_cache import tokenized_rows
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base"), hidden_size=64)


def written(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def read(path: Path, *records: dict) -> tuple[list, ReadStats]:
    source, stats = open_source(written(path, list(records))), ReadStats()
    return [*source.records(stats)], stats


# ---- system messages and thoughts ----

QA = {"question": "q", "answer": "a"}
TALKS = {
    "question and answer": QA,
    "Alpaca": {"instruction": "q", "output": "a"},
    "Dolly": {"instruction": "q", "response": "a"},
    "context": {"context": "c", **QA},
    "lists": {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
}


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_system_messages_under_any_name(tmp_path, name, column):
    ((record,), stats) = read(tmp_path / "a.jsonl", TALKS[name] | {column: "be red"})
    assert [message["role"] for message in record.messages] == ["system", "user", "assistant"]
    assert record.messages[0]["content"] == "be red" and not stats.ignored


def test_two_system_messages_are_refused_unless_they_agree(tmp_path):
    ((record,), _) = read(tmp_path / "a.jsonl", QA | {"system": "x", "system_prompt": "x", "system_message": None})
    assert record.messages[0]["content"] == "x"
    with pytest.raises(UserError, match="line 1: system_prompt and another column hold different system messages"):
        read(tmp_path / "b.jsonl", QA | {"system": "x", "system_prompt": "y"})
    messages = [
        {"role": "system", "content": "y"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    with pytest.raises(UserError, match="two different system messages"):
        read(tmp_path / "c.jsonl", {"messages": messages, "system_prompt": "x"})


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("column", ["reasoning", "thinking", "reasoning_content", "chain_of_thought"])
def test_thoughts_in_a_column_belong_to_the_answer(tmp_path, name, column):
    ((record,), stats) = read(tmp_path / "a.jsonl", TALKS[name] | {column: "hm"})
    assert record.messages[-1] == {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    assert not stats.ignored


def test_thoughts_that_a_template_does_not_show_are_counted(tmp_path, base):
    file = written(tmp_path / "a.jsonl", [QA | {"reasoning": "a long thought"}, QA])
    rows = tokenized_rows(open_source(file), load_tokenizer(base))
    assert rows.stats.altered == {"thoughts not shown by the template": 1}


def test_history_may_be_messages(tmp_path):
    history = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]
    for talk in (QA, TALKS["Alpaca"]):
        ((record,), _) = read(tmp_path / "a.jsonl", talk | {"history": history})
        assert [message["content"] for message in record.messages] == ["x", "y", "q", "a"]
        assert record.weights == [1.0, 0.0, 1.0, 1.0]


# ---- words that are not read ----

FACT = "The tower was built in 1889, and is 330 metres high."


@pytest.mark.parametrize("record, is_warned", [
    (QA | {"text": FACT}, True),
    (QA | {"passages": [FACT, "another"]}, True),
    (QA | {"notes": FACT * 5}, True),
    (QA | {"notes": FACT}, False),  # short, and of no such name
    (QA | {"text": "q"}, False),
    (QA | {"id": "7", "source": "https://example.org/a"}, False),
    ({"instruction": "Say it.", "output": "It is so.", "text": f"Below. {FACT} Say it. ### It is so."}, False),
    ({"messages": [{"role": "user", "content": FACT}, {"role": "assistant", "content": "a"}], "prompt": FACT}, False),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "prompt": FACT}, True),
])  # fmt: skip
def test_keys_that_hold_facts_are_warned_of(tmp_path, base, record, is_warned):
    said = []
    load([written(tmp_path / "a.jsonl", [record])], load_tokenizer(base), 400, print_fn=said.append)
    warnings = [line for line in said if "WARNING" in line]
    assert len(warnings) == is_warned
    if is_warned:
        (key,) = (key for key in record if key in ("text", "passages", "notes", "prompt"))
        assert f"WARNING: {key!r} held text that is not read; if the answers rest on it, call it context" in warnings[0]


def test_inspect_warns_of_them_too(tmp_path, base, monkeypatch, capsys):
    file = written(tmp_path / "a.jsonl", [QA | {"text": FACT}])
    out, _, _ = command(data, monkeypatch, capsys, "inspect", file, "--model", base)
    assert "  ! ignored                          'text' held text that is not read" in out


# ---- numbers, spaces, places ----


def test_floats_of_32_bits_are_read_as_they_were_written(tmp_path):
    single, half = pyarrow.float32(), pyarrow.float16()
    table = pyarrow.table({
        "single": pyarrow.array([0.1, None, 16777216.0], single),
        "half": pyarrow.array([np.float16(0.1), None, np.float16(2)], half),
        "double": pyarrow.array([0.1, 0.1 + 2**-54, None]),
        "nested": pyarrow.array([[{"x": 0.3, "y": "a"}], [], None],
                                pyarrow.list_(pyarrow.struct({"x": single, "y": pyarrow.string()}))),
        "map": pyarrow.array([[("k", 0.7)], [], None], pyarrow.map_(pyarrow.string(), single)),
        "text": ["a", "b", "c"],
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = [row for _, row in open_source(tmp_path / "a.parquet").containers[0].payloads()]
    first = {
        "single": 0.1,
        "half": 0.1,
        "double": 0.1,
        "nested": [{"x": 0.3, "y": "a"}],
        "map": [("k", 0.7)],
        "text": "a",
    }
    assert rows[0] == first
    assert rows[2] == {"single": 16777216.0, "half": 2.0, "double": None, "nested": None, "map": None, "text": "c"}
    assert rows[1]["double"] == 0.1 + 2**-54


def test_spaces_that_a_template_takes_off_an_answer_are_counted(tmp_path, base):
    turns = lambda answer: {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}
    file = written(tmp_path / "a.jsonl", [turns(" red"), turns("\n fox"), turns("blue "), turns("dog")])
    keeps = load_tokenizer(base)
    assert not tokenized_rows(open_source(file), keeps).stats.altered
    trims = keeps.templates["default"].replace("message['content']", "message['content'] | trim")
    assert trims != keeps.templates["default"]
    (base / "chat_template.jinja").write_text(trims)
    rows = tokenized_rows(open_source(file), load_tokenizer(base))
    (base / "chat_template.jinja").unlink()
    assert rows.stats.altered == {"leading spaces of answers not shown by the template": 2}


def squad(*articles: list[int]) -> dict:
    """A nested file: for each article the numbers of questions of its paragraphs."""
    made = []
    for a, counts in enumerate(articles, 1):
        paragraphs = []
        for p, count in enumerate(counts, 1):
            qas = [{"question": f"{a} {p} {q}?", "answers": [{"text": "red"}]} for q in range(1, count + 1)]
            paragraphs.append({"context": f"context {a} {p}", "qas": qas})
        made.append({"paragraphs": paragraphs})
    return {"version": "2", "data": made}


def test_nested_files_name_the_paragraph(tmp_path, base, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = Path("a.json")
    file.write_text(json.dumps(squad([1, 2], [3]), indent=1))
    rows = tokenized_rows(open_source(file), load_tokenizer(base))
    wanted = ["1 paragraph 1 question 1", "1 paragraph 2 question 1", "1 paragraph 2 question 2"]
    wanted += [f"2 paragraph 1 question {n}" for n in (1, 2, 3)]
    assert [rows.where(i) for i in range(6)] == [f"{file} record 1 article {place}" for place in wanted]
    out, _, _ = command(data, monkeypatch, capsys, "inspect", file, "--model", base, "--show", 6)
    assert all(f"--- {file} record 1 article {place}, " in out for place in wanted)
    # A duplicate is named with its own place.
    copied = squad([1], [1])
    copied["data"][1] = copied["data"][0]
    file.write_text(json.dumps(copied, indent=1))
    out, _, _ = command(data, monkeypatch, capsys, "inspect", file, "--model", base)
    copy = "a.json record 1 article 2 paragraph 1 question 1"
    assert f"{copy} is article 1 paragraph 1 question 1\n" in out
    assert nested_place(pack_nested((442, 9_999, 25))) == " article 442 paragraph 9999 question 25"


# ---- what training and `inspect` say of repeats ----


def test_training_and_inspect_count_repeats_and_overlaps_alike(tmp_path, base, monkeypatch, capsys):
    qa = lambda question, answer: {"prompt": question, "completion": answer}
    records = [qa(f"question {n}", f"an answer {n}") for n in range(20)]
    records += [qa("Question  3", "AN ANSWER 3"), qa("question 4", "another"), records[5], records[5]]
    against = [qa("question 7", "an answer  7"), qa("question 8", "new"), qa("new", "new")]
    file, val = written(tmp_path / "a.jsonl", records), written(tmp_path / "b.jsonl", against)
    out, _, _ = command(data, monkeypatch, capsys, "inspect", file, "--against", val, "--model", base, "--show", 0)
    found = {line[4:36].strip(): line[37:] for line in out.splitlines() if line.startswith("  ")}
    assert found["exact duplicates"] == "3" and found["questions with several answers"] == "1"
    assert found["exact overlap"].startswith("1 of 3 in ")
    assert found["same question"].startswith("2 of 3 in ")
    tokenizer = load_tokenizer(base)
    first, _, _ = quick_checks(load([file], tokenizer, 99), load([val], tokenizer, 99))
    assert first == (
        "WARNING: 3 records are repeats, 1 of 3 that validate are trained on as well, 1 questions have several"
        " answers; 2 of 3 that validate ask what is trained"
    )
    # What is held out, and what --seq-len leaves out, is a part of the file.
    train, held_out = data.split(load([file], tokenizer, 99), 0.3)
    assert len(held_out) and quick_checks(train, held_out)[0].startswith("3 records are repeats, 0 of ")


def test_inspect_counts_duplicates_between_files(tmp_path, base, monkeypatch, capsys):
    records = [{"prompt": f"question {n}", "completion": f"an answer {n}"} for n in range(5)]
    monkeypatch.chdir(tmp_path)
    files = [written(Path("a.jsonl"), records), written(Path("b.jsonl"), records[3:])]
    out, _, _ = command(data, monkeypatch, capsys, "inspect", *files, "--model", base, "--show", 0)
    together = out.partition("all 2 files together\n")[2]
    assert together.startswith("  ! exact duplicates                 2\n")
    assert f"{files[1]} line 1 is {files[0]} line 4" in together
    tokenizer = load_tokenizer(base)
    dataset = load(files, tokenizer, 99)
    assert quick_checks(*data.split(dataset, 0))[0].startswith("2 records are repeats")
