"""Which files of a folder are read, and as which part; Arrow files; files that stand for others. Takes seconds."""

import json
from pathlib import Path

import pyarrow
import pytest
import torch
from support.helpers import chat_base

import data
from common.errors import UserError
from common.files import lfs_pointer
from dataset.folders import TEST, VALIDATION, part_of_file, part_of_name
from dataset.formats import Map, open_source
from dataset.records import ReadStats
from flags import parse_flags
from tokenizer import load_tokenizer


def chat(name: object) -> dict:
    return {"messages": [{"role": "user", "content": f"q {name}"}, {"role": "assistant", "content": f"{name}"}]}


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def make(folder, **files):
    """Writes records as JSONL; a name with / is in a subfolder."""
    for name, records in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(records if isinstance(records, str) else lines(*records))
    return folder


def answers(path, part="train"):
    """The answers that are read, and the summary."""
    source, stats = open_source(path, part=part), ReadStats()
    records = source.read_all(stats)
    return [record.messages[-1]["content"] for record in records], source.summary(stats)


def error_of(path, part="train") -> str:
    with pytest.raises(UserError) as caught:
        answers(path, part)
    return str(caught.value).removeprefix(str(path))


# ---- parts ----

LAYOUTS = {  # name: (files of train, of validation, of test)
    "mlx-lm": (["train.jsonl"], ["valid.jsonl"], ["test.jsonl"]),
    "the Hub's shards": (
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        ["data/validation-00000-of-00001.jsonl"],
        ["data/test-00000-of-00001-3fa9.jsonl"],
    ),
    "folders": (["train/0.jsonl", "train/1.jsonl"], ["val/0.jsonl"], ["test/a.jsonl"]),
    "names of their own": (["my_Train.jsonl"], ["my_dev.jsonl"], ["my_eval2.jsonl"]),
    "train_sft": (["train_sft.jsonl"], [], ["test_sft.jsonl"]),
    "compressed suffixes": (["a.train.jsonl"], ["a.val.json"], []),
    "unnamed files train": (["conversations.jsonl"], [], ["heldout.jsonl"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_with_parts_gives_the_part_that_is_asked_for(tmp_path, name):
    train, validation, test = LAYOUTS[name]
    make(tmp_path, **{file: [chat(file)] for file in (*train, *validation, *test)})
    found, summary = answers(tmp_path)
    assert found == train and train[0] in summary
    for file in (*validation, *test):
        assert file in summary.partition("not read here: ")[2]
    assert answers(tmp_path, VALIDATION)[0] == (validation or test)
    assert answers(tmp_path, TEST)[0] == (test or validation)


def test_a_folder_without_parts_is_read_whole(tmp_path):
    make(tmp_path, **{"train.jsonl": [chat(1)], "more.jsonl": [chat(2)], "c/train_test.jsonl": [chat(3)]})
    (tmp_path / "test-driven-development.txt").write_text("")  # refused as empty if it were read as data
    (tmp_path / "test-driven-development.txt").unlink()
    for part in ("train", VALIDATION, TEST):
        found, summary = answers(tmp_path, part)
        assert sorted(found) == ["1", "2", "3"] and "not read here" not in summary


def test_files_of_no_part_beside_named_ones_are_left_alone_and_said(tmp_path):
    make(tmp_path, **{"train.jsonl": [chat(1)], "extra.jsonl": [chat(2)], "test.jsonl": [chat(3)]})
    found, summary = answers(tmp_path)
    assert found == ["1"]
    assert "train: train.jsonl; not read here: test.jsonl (test), extra.jsonl (of no part)" in summary


def test_a_folder_of_tests_alone_trains_nothing(tmp_path):
    make(tmp_path, **{"test.jsonl": [chat(1)], "val.jsonl": [chat(2)]})
    assert error_of(tmp_path).startswith(": holds no files to be read as train (")
    assert answers(tmp_path, TEST)[0] == ["1"]
    (tmp_path / "val.jsonl").unlink()
    assert answers(tmp_path, TEST)[1].endswith("1 record), test: test.jsonl")


def test_words_of_names():
    parts = {"train": "train", "valid": VALIDATION, "dev_set": VALIDATION, "testing": TEST, "Test2": TEST,
             "development-1-of-2": VALIDATION, "train_test": None, "latest": None, "trained": None,
             "my_trn": "train", "my_tst": TEST}  # fmt: skip
    assert {name: part_of_name(name) for name in parts} == parts
    assert part_of_file(Path("test-driven-development.md")) is None  # a title, not a part
    assert part_of_file(Path("wiki.test.txt")) == TEST


def test_a_column_says_the_part_of_each_record(tmp_path):
    rows = [("train", 1), ("test", 2), ("validation", 3), ("train_sft", 4), (None, 5), ("french", 6)]
    make(tmp_path, **{"a.jsonl": [chat(number) | {"split": split} for split, number in rows]})
    found, summary = answers(tmp_path / "a.jsonl")
    assert found == ["1", "4", "5", "6"] and "ignored keys 'split'" in summary
    assert "dropped 1 (of the test part, by its own column)" in summary
    assert "dropped 1 (of the validation part, by its own column)" in summary
    assert answers(tmp_path / "a.jsonl", VALIDATION)[0] == ["3"]
    assert answers(tmp_path / "a.jsonl", TEST)[0] == ["2"]
    make(tmp_path, **{"b.jsonl": [chat(1) | {"split": "train"}, chat(2) | {"split": "train"}]})
    assert answers(tmp_path / "b.jsonl", TEST)[0] == ["1", "2"]  # it has no other
    (tmp_path / "m.py").write_text("def f(r): return {'prompt': 'q', 'completion': r['messages'][1]['content']}")
    mapped = open_source(tmp_path / "a.jsonl", map_fn=Map(f"{tmp_path / 'm.py'}:f"))
    assert [record.messages[-1]["content"] for record in mapped.read_all()] == ["1", "4", "5", "6"]
    make(tmp_path, **{"c.csv": "split,instruction,output\ntrain,q,1\ndev,q,2\ntest,q,3\n"})
    assert answers(tmp_path / "c.csv")[0] == ["1"]


def test_a_switch_says_the_part_of_each_record(tmp_path):
    """{"is_test": true} was an ignored key, and the test was trained."""
    rows = [{"is_test": True}, {"is_test": False}, {"is_train": 0}, {"is_train": "True"}, {"is_val": 1}, {}]
    rows += [{"is_train": False, "is_val": True}, {"is_val": 0, "is_test": "1"}, {"is_valid": False}, {"is_test": None}]
    make(tmp_path, **{"a.jsonl": [chat(number) | row for number, row in enumerate(rows)]})
    found, summary = answers(tmp_path / "a.jsonl")
    assert found == ["1", "3", "5", "8", "9"] and "dropped 3 (of the test part, by its own column)" in summary
    assert answers(tmp_path / "a.jsonl", VALIDATION)[0] == ["4", "6"]
    assert answers(tmp_path / "a.jsonl", TEST)[0] == ["0", "2", "7"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(chat_base(tmp_path_factory.mktemp("base")))


def training(tokenizer, *words):
    words = ["--model", "none", *map(str, words)]
    return data.load_training_data(parse_flags(words), tokenizer, 512, 500, torch.device("cpu"))


def test_a_run_validates_on_the_part_that_its_data_have(tokenizer, tmp_path, capsys):
    parts = {"train": range(6), "validation": range(6, 9), "test": range(9, 14)}
    make(tmp_path, **{f"a/{name}.jsonl": map(chat, numbers) for name, numbers in parts.items()})
    make(tmp_path, **{"b.jsonl": [chat(i) | {"split": name} for name, numbers in parts.items() for i in numbers]})
    make(tmp_path, **{"more.jsonl": map(chat, range(20, 24)), "own.jsonl": map(chat, range(30, 32))})
    for file in ("a", "b.jsonl"):
        run = training(tokenizer, "--data", tmp_path / file)
        assert (len(run.train), len(run.val), run.val_fraction) == (6, 3, None)
        assert "6 examples to train on" in capsys.readouterr().out
        run = training(tokenizer, "--data", tmp_path / file, tmp_path / "more.jsonl")
        assert (len(run.train), len(run.val)) == (10, 3)
        run = training(tokenizer, "--data", tmp_path / file, "--val", tmp_path / "own.jsonl")
        assert (len(run.train), len(run.val)) == (6, 2)
        run = training(tokenizer, "--data", tmp_path / file, "--val-fraction", "0")
        assert (len(run.train), len(run.val)) == (6, 0)
        run = training(tokenizer, "--data", tmp_path / "more.jsonl", "--val", tmp_path / file)
        assert (len(run.train), len(run.val)) == (4, 3)


# ---- files that describe others ----


def test_dataset_info_of_llama_factory_names_the_file_and_its_columns(tmp_path):
    columns = {"prompt": "ask", "query": "more", "response": "say", "system": "sys"}
    info = {"mine": {"file_name": "mine.json", "columns": columns}, "far": {"hf_hub_url": "a/b"}}
    record = {"ask": "q", "more": "x", "say": "a", "sys": "s"}
    make(tmp_path, **{"dataset_info.json": json.dumps(info), "mine.json": json.dumps([record])})
    source = open_source(tmp_path)
    assert [each.messages for each in source.read_all()] == [
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q\n\nx"},
            {"role": "assistant", "content": "a"},
        ]
    ]
    assert "as dataset_info.json describes it" in source.summary(ReadStats())


def test_dataset_info_names_the_tags_of_messages(tmp_path):
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "it", "system_tag": "boss"}
    entry = {"file_name": "m.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags}
    talk = [{"who": "boss", "what": "s"}, {"who": "me", "what": "q"}, {"who": "it", "what": "a"}]
    make(tmp_path, **{"dataset_info.json": json.dumps({"m": entry}), "m.jsonl": [{"talk": talk}]})
    (record,) = open_source(tmp_path).read_all()
    assert [(each["role"], each["content"]) for each in record.messages] == [
        ("system", "s"), ("user", "q"), ("assistant", "a"),
    ]  # fmt: skip
    info = {"m": entry | {"formatting": "openai"}}
    make(tmp_path, **{"dataset_info.json": json.dumps(info)})
    assert open_source(tmp_path).read_all()[0].messages == record.messages
    ranking = {"file_name": "m.jsonl", "ranking": True, "columns": {"prompt": "ask", "chosen": "yes", "rejected": "no"}}
    make(
        tmp_path,
        **{"dataset_info.json": json.dumps({"m": ranking}), "m.jsonl": [{"ask": "q", "yes": "a", "no": "b"}]},
    )
    (record,) = open_source(tmp_path).read_all()
    assert (record.asked, record.messages[-1]["content"], record.rejected[0]["content"]) == (1, "a", "b")


def test_dataset_info_of_several_sets_or_of_none_is_refused_by_name(tmp_path):
    info = {name: {"file_name": f"{name}.jsonl"} for name in ("a", "b")}
    make(tmp_path, **{"dataset_info.json": json.dumps(info), "a.jsonl": [chat(1)], "b.jsonl": [chat(2)]})
    error = error_of(tmp_path)
    assert error == (
        f": its dataset_info.json is LLaMA-Factory's and describes 2 data sets;"
        f" name one of {tmp_path / 'a.jsonl'}, {tmp_path / 'b.jsonl'}"
    )
    assert (
        error_of(tmp_path / "dataset_info.json") == ": describes data sets of LLaMA-Factory; name its folder, or a file"
    )
    make(tmp_path, **{"dataset_info.json": json.dumps({"far": {"hf_hub_url": "a/b"}})})
    assert "none of the files that it names is there (far)" in error_of(tmp_path)


def arrow(path, records, stream=True, metadata=None):
    """Writes an Arrow stream, as save_to_disk does, or a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(records).replace_schema_metadata(metadata)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)
    return path


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "x"}
    for part, count in (("train", 3), ("test", 1)):
        arrow(tmp_path / "d" / part / "data-00000-of-00001.arrow", [chat(i) for i in range(count)])
        arrow(tmp_path / "d" / part / "cache-1f.arrow", [{"indices": 1}])
        make(tmp_path / "d" / part, **{"state.json": json.dumps(state), "dataset_info.json": '{"features": {}}'})
    make(tmp_path / "d", **{"dataset_dict.json": '{"splits": ["train", "test"]}'})
    found, summary = answers(tmp_path / "d")
    assert found == ["0", "1", "2"] and "1 file of Arrow, 3 records" in summary
    assert "not read here: test/data-00000-of-00001.arrow (test)" in summary
    assert answers(tmp_path / "d" / "test", "train")[0] == ["0"]


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files_have_names_of_classes_and_an_end(tmp_path, stream):
    names = json.dumps({"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}})
    rows = [{"text": f"{i}", "label": i % 2} for i in range(2_500)]
    path = arrow(tmp_path / "a.arrow", rows, stream, {"huggingface": names})
    found, summary = answers(path)
    assert found == ["no", "yes"] * 1_250 and "(Arrow, 2,500 records)" in summary
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 3])
    assert error_of(path).startswith(": no whole Arrow file after row ")


# ---- files that stand for others ----

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.jsonl.gz", "a.arrow", "a"])
def test_a_pointer_of_git_lfs_is_named_under_every_name(tmp_path, name):
    texts = {POINTER: "Git LFS", POINTER.replace("\n", "\r\n"): "Git LFS",
             "/annex/objects/SHA256E-s12--ab.json\n": "git-annex"}  # fmt: skip
    for text, kind in texts.items():
        (tmp_path / name).write_bytes(text.encode())
        assert error_of(tmp_path / name).startswith(f": is a {kind} pointer, not the file")
        assert ("12,345 bytes" in lfs_pointer(tmp_path / name)) == (kind == "Git LFS")
    if name in ("a.jsonl", "a.csv"):
        make(tmp_path, **{"b.jsonl": [chat(1)]})
        assert error_of(tmp_path).startswith(f"/{name}: is a git-annex pointer")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a"])
def test_a_page_that_a_site_gave_in_place_of_a_file_is_named(tmp_path, name):
    for start in ("<!DOCTYPE html>", "\ufeff\n <html lang=en>"):
        (tmp_path / name).write_text(start + "<body>Sign in, please</body></html>", encoding="utf-8")
        assert error_of(tmp_path / name).startswith(": is a page of HTML, as sites give in place of a file")
    page = tmp_path / "page.txt"
    page.write_text("<!DOCTYPE html><p>Text to learn</p>")
    assert open_source(page).read_all()[0].text == "<!DOCTYPE html><p>Text to learn</p>"


def test_what_only_looks_like_a_pointer_is_none(tmp_path):
    for text in ("version 2", "", "x" + POINTER, POINTER + "x" * 1024):
        (tmp_path / "a.txt").write_text(text)
        assert lfs_pointer(tmp_path / "a.txt") is None
    assert lfs_pointer(tmp_path) is None and lfs_pointer(tmp_path / "none") is None


def test_names_of_classes_that_are_a_pointer(tmp_path):
    (tmp_path / "classes.txt").write_text(POINTER)
    (tmp_path / "a.csv").write_text("1,a\n2,b\n")
    with pytest.raises(UserError, match="classes.txt: is a Git LFS pointer"):
        answers(tmp_path / "a.csv")


def test_a_link_to_a_file_that_is_not_there_says_so(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("../objects/none")
    assert error_of(tmp_path / "a.jsonl") == ": is a link to ../objects/none, which is not there; fetch that file"
