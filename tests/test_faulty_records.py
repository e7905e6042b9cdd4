"""Records that can't be read: all of a file are named at once, or --skip-bad leaves them out and counts them."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from support.helpers import chat_base, command

import data
import evaluate
import train
from common.errors import FaultyRecords, UserError
from dataset.faults import fault_kind
from dataset.formats import Map, open_source
from dataset.records import ReadStats
from dataset.token_cache import tokenized_rows
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base"), hidden_size=64)


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def written(path: Path, records: list) -> Path:
    """A file of JSONL; a string is a line as it is."""
    lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
    path.write_text("\n".join(lines))
    return path


qa = lambda n, **more: {"instruction": f"Say {n}.", "output": f"It is {n}."} | more
SIX_FAULTS = [
    qa(1),
    qa(2, output=5),
    "{bad",
    {"foo": 1},
    qa(5, weight=-1),
    qa(6),
    qa(7, instruction=None),
    qa(8, output=None),
]
LINES = [
    "line 2: output is a number, a string is wanted",
    "line 3: not JSON at column 2 (Expecting property name enclosed in double quotes)",
    "line 4: keys 'foo': the first record is Alpaca (instruction, output)",
    "line 5: weight is -1, a number from 0 to 1,000,000 is wanted",
    "line 7: instruction is null, a string is wanted",
    "line 8: output is null, a string is wanted",
]  # fmt: skip


def test_all_faults_of_a_file_are_named(tmp_path, tokenizer):
    file = written(tmp_path / "a.jsonl", SIX_FAULTS)
    wanted = [f"{file} {line}" for line in LINES]
    with pytest.raises(FaultyRecords) as caught:
        data.load([file], tokenizer, 99, skip_bad=False)
    advice = "; mend them, or --skip-bad leaves them out"
    assert str(caught.value).split("\n") == [*wanted, f"6 faulty records in {file}{advice}"]
    # Where there is no such flag, none is named.
    with pytest.raises(FaultyRecords) as caught:
        open_source(file).read_all()
    assert str(caught.value).split("\n") == [*wanted, f"6 faulty records in {file}; mend them"]


def test_one_fault_is_one_line(tmp_path, tokenizer):
    file = written(tmp_path / "a.jsonl", [qa(1), qa(2, output=5)])
    with pytest.raises(UserError) as caught:
        data.load([file], tokenizer, 99, skip_bad=False)
    assert str(caught.value) == f"{file} {LINES[0]}; mend it, or --skip-bad leaves it out"


def test_of_many_faults_the_first_20_are_named(tmp_path, tokenizer):
    """Over 1 MB, so that several processes read it: they give the same lines."""
    records = [qa(n, output=n if n % 100 == 99 else "word " * 30) for n in range(9_000)]
    file = written(tmp_path / "a.jsonl", records)
    assert file.stat().st_size > 1 << 20
    with pytest.raises(FaultyRecords) as caught:
        data.load([file], tokenizer, 99, skip_bad=False)
    *named, last = str(caught.value).split("\n")
    assert named == [f"{file} line {n}00: output is a number, a string is wanted" for n in range(1, 21)]
    assert last.startswith(f"90 faulty records in {file}, of which these are the first 20; mend them")


def test_skip_bad_leaves_faulty_records_out_counted_by_kind(tmp_path, tokenizer):
    file = written(tmp_path / "a.jsonl", SIX_FAULTS)
    said = []
    examples = data.load([file], tokenizer, 99, print_fn=said.append, skip_bad=True).examples
    (rows,) = examples.rows
    assert rows.stats.dropped == {
        "faulty: output is a number, a string is wanted": 1,
        "faulty: not JSON": 1,
        "faulty: other keys than the file's format has": 1,
        "faulty: weight is -1, a number from 0 to 1,000,000 is wanted": 1,
        "empty answer": 1,
    }
    # A null question stays as an empty text; a null answer is an empty answer.
    assert rows.stats.altered == {"with null taken for an empty text": 2} and rows.stats.records == 3
    assert [example.source for example in examples] == [f"{file} line {n}" for n in (1, 6, 7)]
    assert "dropped 1 (faulty: not JSON)" in said[0]
    assert said[1] == f"          left out by --skip-bad: 4 faulty records, the first: {file} {LINES[0]}"
    assert said[2] == "          WARNING: 57.1 % of the records are faulty"
    again = []
    data.load([file], tokenizer, 99, print_fn=again.append, skip_bad=True)
    assert again == [f"{said[0]}, tokenised before", *said[1:]]


def test_rows_with_and_without_skip_bad_are_not_mixed_up(tmp_path, tokenizer):
    file = written(tmp_path / "a.jsonl", [qa(1), qa(2, input=None), qa(3, output=None)])
    kept = tokenized_rows(open_source(file, skip_bad=True), tokenizer)
    assert len(kept) == 2 and not kept.cached
    with pytest.raises(UserError, match="line 3: output is null"):
        tokenized_rows(open_source(file, skip_bad=False), tokenizer)
    assert tokenized_rows(open_source(file, skip_bad=True), tokenizer).cached


def test_nulls_in_messages_count_as_empty_texts(tmp_path):
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    records = [
        {"messages": [{"role": "system", "content": None}, user, answer]},
        {"messages": [user, call]},
        {"messages": [user, {"role": "assistant", "content": None}]},
        {"messages": None},
    ]
    source, stats = open_source(written(tmp_path / "a.jsonl", records), skip_bad=True), ReadStats()
    first, second = source.records(stats)
    assert first.messages == [{"role": "system", "content": ""}, user, answer]
    assert second.messages[1]["content"] == ""
    assert stats.altered == {"with null taken for an empty text": 2}
    assert stats.dropped == {"empty answer": 1, "faulty: messages is null, a list is wanted": 1}


def csv_of(path: Path) -> None:
    path.write_text('instruction,output\na,b\na,b,c\n"x"y,z\nc,d\ne\n')


def json_of(path: Path) -> None:
    path.write_text(json.dumps([qa(1), qa(2, output=1), {}, qa(4)]))


def parquet_of(path: Path) -> None:
    columns = {"instruction": ["a", None, "c"], "output": ["b", "b", "d"], "weight": [1.0, 1.0, -1.0]}
    parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize("write, faults, kept", [
    (csv_of, ["row 2: has 3 columns, 2 are wanted", "row 3: ',' expected after '\"'",
              "row 5: has 1 column, 2 are wanted"], 2),
    (json_of, ["record 2: output is a number, a string is wanted",
               "record 3: keys none: the first record is Alpaca (instruction, output)"], 2),
    (parquet_of, ["row 2: instruction is null, a string is wanted",
                  "row 3: weight is -1.0, a number from 0 to 1,000,000 is wanted"], 2),
], ids=["CSV", "JSON", "Parquet"])  # fmt: skip
def test_faults_of_every_kind_of_file(tmp_path, write, faults, kept):
    file = tmp_path / f"a.{write.__name__.removesuffix('_of')}"
    write(file)
    with pytest.raises(FaultyRecords) as caught:
        open_source(file).read_all()
    assert str(caught.value).split("\n")[:-1] == [f"{file} {fault}" for fault in faults]
    assert len(open_source(file, skip_bad=True).read_all()) == kept


def test_a_list_goes_on_behind_what_is_no_json(tmp_path):
    records = [qa(1), qa(2, score=float("nan")), qa(3, id=float("inf")), qa(4)]
    text = json.dumps(records).replace('"Say 4."', '"Say 4.", "output": "twice"')
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FaultyRecords) as caught:
        open_source(tmp_path / "a.json").read_all()
    faults = ["2: NaN is not JSON", "3: Infinity is not JSON", "4: key 'output' stands twice in an object"]
    for line, fault in zip(str(caught.value).split("\n"), faults, strict=False):
        assert line.startswith(f"{tmp_path / 'a.json'} record {fault}")
    assert len(open_source(tmp_path / "a.json", skip_bad=True).read_all()) == 1


def test_trees_without_their_faulty_messages(tmp_path):
    node = lambda id, parent, role, **more: {"message_id": id, "parent_id": parent, "role": role, "text": id} | more
    records = [node("a", None, "prompter"), "{", node("b", "a", "assistant"), {"message_id": "c"}]
    file = written(tmp_path / "a.jsonl", records)
    with pytest.raises(FaultyRecords, match="line 2: JSON cut off") as caught:
        open_source(file).read_all()
    assert "line 4: keys 'message_id': the first record is OASST messages" in str(caught.value)


def test_the_first_record_may_be_the_faulty_one(tmp_path):
    file = written(tmp_path / "a.jsonl", ["{bad", {"foo": 1}, qa(3), qa(4)])
    with pytest.raises(FaultyRecords, match="line 1: not JSON") as caught:
        open_source(file).read_all()
    assert "line 2: keys 'foo': line 3 is Alpaca (instruction, output)" in str(caught.value)
    assert len(open_source(file, skip_bad=True).read_all()) == 2
    # A file in which nothing can be read is still one error.
    with pytest.raises(UserError, match="line 1: keys 'foo': no known format"):
        open_source(written(tmp_path / "b.jsonl", [{"foo": 1}] * 9), skip_bad=True)


def test_what_ends_a_file_is_an_error_even_with_skip_bad(tmp_path):
    whole = json.dumps([qa(1), qa(2, output=1), qa(3)])
    (tmp_path / "a.json").write_text(whole[:-9])
    with pytest.raises(UserError, match="record 3: JSON cut off"):
        open_source(tmp_path / "a.json", skip_bad=True).read_all()
    with pytest.raises(FaultyRecords) as caught:
        open_source(tmp_path / "a.json").read_all()
    first, second, last = str(caught.value).split("\n")
    assert "record 2: output is a number" in first and second.endswith("what follows was not read")
    assert last == f"1 faulty record in {tmp_path / 'a.json'}; mend them"


def test_a_users_function_that_fails_is_a_fault_of_its_record(tmp_path):
    (tmp_path / "m.py").write_text("def f(record): return {'prompt': record['q'], 'completion': record['a']}")
    file = written(tmp_path / "a.jsonl", [{"q": "x", "a": "y"}, {"q": "x"}, {"a": "y"}])
    stats = ReadStats()
    source = open_source(file, map_fn=Map(f"{tmp_path}/m.py:f"), skip_bad=True)
    assert len([*source.records(stats)]) == 1 and stats.num_faults == 2
    assert [fault.rpartition(": ")[2] for _, fault in stats.faults] == ["'a'", "'q'"]


def test_faults_are_counted_by_what_is_wrong():
    kinds = {
        "line 3: JSON cut off at line 1 column 9 (Expecting value)": "JSON cut off",
        "line 3 message 2: no content, found 'role'": "no content",
        "record 1 article 2 paragraph 3 question 4: no answers, found 'id'": "no answers",
        "row 4: has 3 columns, 2 are wanted": "has 3 columns, 2 are wanted",
        "line 9: keys 'a', 'b': the first record is Alpaca": "other keys than the file's format has",
        "line 9: output holds a lone surrogate '\\ud800' at character 4; correct it": "output holds a lone surrogate",
    }
    assert {fault: fault_kind(fault) for fault in kinds} == kinds


def test_data_py_names_and_skips_them(tmp_path, base, monkeypatch, capsys):
    file = written(tmp_path / "a.jsonl", [*SIX_FAULTS, *[qa(n) for n in range(10, 60)]])
    words = ["inspect", file, "--model", base, "--show", 0]
    _, error, code = command(data, monkeypatch, capsys, *words)
    assert code == 2 and error.startswith(f"error: {file} {LINES[0]}\n{file} {LINES[1]}\n")
    out, _, code = command(data, monkeypatch, capsys, *words, "--skip-bad")
    assert code == 0 and "  ! faulty, left out                 4\n" in out and LINES[1] in out
    out, _, code = command(data, monkeypatch, capsys, "convert", file, "--skip-bad", "--out", tmp_path / "b.jsonl")
    assert code == 0 and out.endswith("b.jsonl: 53 records\n") and "dropped 1 (faulty: not JSON)" in out
    for words in (["convert", file, "--out", tmp_path / "c.jsonl"], ["split", file, "--out", tmp_path / "parts"]):
        _, error, code = command(data, monkeypatch, capsys, *words)
        assert code == 2 and "6 faulty records" in error and not Path(words[-1]).exists()
    words += ["--skip-bad", "--val", 0.3, "--test", 0.3]
    _, error, code = command(data, monkeypatch, capsys, *words)
    assert code == 0 and sorted(file.name for file in (tmp_path / "parts").iterdir()), error


def test_train_and_evaluate_take_skip_bad(tmp_path, base, monkeypatch, capsys):
    file = written(tmp_path / "a.jsonl", [*SIX_FAULTS, *[qa(n) for n in range(10, 60)]])
    words = ["--model", base, "--data", file, "--plan", "--device", "cpu"]
    _, error, code = command(train, monkeypatch, capsys, *words)
    assert code == 2 and error.splitlines()[-1].endswith("or --skip-bad leaves them out")
    out, error, code = command(train, monkeypatch, capsys, *words, "--skip-bad")
    assert code == 0 and "left out by --skip-bad: 4 faulty records" in out, error
    words = ["loss", "--model", base, "--data", file, "--dtype", "fp32", "--device", "cpu"]
    assert command(evaluate, monkeypatch, capsys, *words)[2] == 2
    out, _, code = command(evaluate, monkeypatch, capsys, *words, "--skip-bad")
    assert code == 0 and "left out by --skip-bad: 4 faulty records" in out
