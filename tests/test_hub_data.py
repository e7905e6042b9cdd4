"""Data sets by their names on the Hugging Face Hub, against a small Hub on loopback: which files make which split, what
is fetched of them, and each way in which it can go wrong."""

import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from support.helpers import chat_base
from support.loopback_hub import COMMIT, Hub, run
from support.runs import records

import train
from common import errors
from dataset.folders import TEST, TRAIN, VALIDATION
from dataset.formats import open_source
from dataset.records import ReadStats
from interop.remote_data import fetch_data


@pytest.fixture
def server():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


def parquet(text: str, rows: int = 3) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": [text] * rows}), sink)
    return sink.getvalue().to_pybytes()


def jsonl(text: str, rows: int = 2) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for _ in range(rows))


def readme(configs: str) -> bytes:
    return f"---\nlicense: mit\nconfigs:\n{configs}\n---\n# Data\n".encode()


def reading(*words: tuple[str, str], keeps: bool = False):
    """Reads data by name, each as a part; prints a line of JSON each, or ends as a script does."""

    def work():
        for word, part in words:
            source = open_source(fetch_data(word, part, keeps=keeps), part=part)
            stats = ReadStats()
            texts = sorted({record.text for record in source.read_all(stats)})
            validates = source.has_validation(stats)
            line = {"texts": texts, "summary": source.summary(stats), "validates": validates}
            print(json.dumps(line | {"place": source.containers[0].place(1)}))

    return lambda: errors.run(work)


def read(server: Hub, home: Path, *words, **more: str) -> tuple[list[dict], list[str]]:
    """What `reading` prints, and the lines on stderr."""
    words = [(word, TRAIN) if isinstance(word, str) else word for word in words]
    code, out, err = run(server.url, home, reading(*words), PLAINTUNE_CACHE=str(home / "ours"), **more)
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()], err.splitlines()


def refused(server: Hub, home: Path, word: str, part: str = TRAIN, **more: str) -> str:
    work = reading((word, part))
    code, out, err = run(server.url, home, work, PLAINTUNE_CACHE=str(home / "ours"), **more)
    *notes, line = err.splitlines()
    assert code == 2 and not out, err
    assert all(note.startswith(("NOTE: ", "fetching ")) for note in notes), err
    return line


def test_splits_that_the_readme_describes(server, tmp_path):
    configs = """
- config_name: chat
  default: true
  data_files:
  - split: train
    path: "chat/a-*.parquet"
  - split: validation
    path: ["chat/b.parquet"]
- config_name: code
  data_files: "code/**"
  sep: ";"
"""
    files = {"chat/a-0.parquet": parquet("a0"), "chat/a-1.parquet": parquet("a1"), "chat/b.parquet": parquet("b")}
    files |= {"code/x/y.jsonl": jsonl("c"), "chat/other.parquet": parquet("no"), "README.md": readme(configs)}
    server.repos["org/set"] = {"files": files}
    (train, val, code, split, twice), said = read(
        server, tmp_path, "hf:org/set", ("hf:org/set", VALIDATION), "hf:org/set:code", "hf:org/set:chat:validation",
        "hf:org/set@v1:validation",
    )  # fmt: skip
    assert train["texts"] == ["a0", "a1"] and train["validates"]
    assert train["place"] == "hf:org/set/chat/a-0.parquet row 1"
    parts = "train: chat/a-0.parquet, chat/a-1.parquet; not read here: chat/b.parquet (validation)"
    assert train["summary"] == f"hf:org/set: plain text (2 files of Parquet, 6 records), {parts}"
    assert val["texts"] == ["b"] and split["texts"] == ["b"] and twice["texts"] == ["b"]
    assert code["texts"] == ["c"] and not code["validates"] and not split["validates"]
    title = f"hf:org/set, subset chat, split train, commit {COMMIT[:12]}"
    size = len(files["chat/a-0.parquet"]) * 2
    note = "sep of the subset code is not read here"
    assert said[:2] == [
        f"NOTE: hf:org/set: {note}",
        f"fetching {title}, from {server.url}: 2 of 2 files, {size:,} bytes",
    ]
    asked = [path for method, path, _ in server.asked if method == "GET"]
    assert sorted(asked) == sorted(f"org/set/{file}" for file in files if "other" not in file)  # each once
    again, said = read(server, tmp_path, "hf:org/set")
    assert again == [train] and said[-1] == f"{title}, is in the cache"


def test_splits_by_the_names_of_files_and_folders(server, tmp_path):
    files = {"data/train-00000-of-00002.parquet": parquet("t"), "data/train-00001-of-00002.parquet": parquet("u")}
    files |= {"data/validation-00000-of-00001.parquet": parquet("v"), "data/test-00000-of-00001.parquet": parquet("w")}
    server.repos["org/names"] = {"files": files | {"train.jsonl": jsonl("again"), "README.md": b"# none"}}
    server.repos["org/one"] = {"files": {"alpaca.json": jsonl("one"), "README.md": b"---\nlicense: mit\n---\n"}}
    server.repos["org/folders"] = {"files": {"train/a.jsonl": jsonl("x"), "dev/a.jsonl": jsonl("y")}}
    (train, val, test, one, whole, folder, dev), _ = read(
        server, tmp_path, "hf:org/names", ("hf:org/names", VALIDATION), ("hf:org/names", TEST), "hf:org/one",
        ("hf:org/one", TEST), "hf:org/folders", ("hf:org/folders", TEST),
    )  # fmt: skip
    assert [each["texts"] for each in (train, val, test)] == [["t", "u"], ["v"], ["w"]]
    # The same records as another kind, which are fewer files.
    assert "1 other files left alone" in train["summary"]
    assert one["texts"] == whole["texts"] == ["one"] and not one["validates"]
    assert folder["texts"] == ["x"] and dev["texts"] == ["y"]
    assert not [path for _, path, _ in server.asked if path == "org/names/train.jsonl"]
    rest = {"train.jsonl": jsonl("t"), "extra.jsonl": jsonl("e"), "test.jsonl": jsonl("w")}
    server.repos["org/rest"] = {"files": rest | {"../outside.jsonl": jsonl("out"), "sub/../../x.jsonl": jsonl("out")}}
    server.repos["org/part"] = {"files": {"part.jsonl": jsonl("p"), "test.jsonl": jsonl("w")}}
    (rest, part), _ = read(server, tmp_path, "hf:org/rest", "hf:org/part")
    assert rest["texts"] == ["t"] and "1 other files left alone" in rest["summary"] and part["texts"] == ["p"]


def test_what_is_not_clear_is_asked_for(server, tmp_path):
    two = "- config_name: main\n  data_files: a.jsonl\n- config_name: socratic\n  data_files: b.jsonl\n"
    server.repos["org/two"] = {"files": {"a.jsonl": jsonl("a"), "b.jsonl": jsonl("b"), "README.md": readme(two)}}
    sft = "- config_name: default\n  data_files:\n"
    files = {}
    for split in ("train_sft", "train_gen", "test_sft", "test_gen"):
        sft += f"  - split: {split}\n    path: data/{split}-*\n"
        files[f"data/{split}-0.parquet"] = parquet(split)
    server.repos["org/sft"] = {"files": files | {"README.md": readme(sft)}}
    assert refused(server, tmp_path, "hf:org/two") == (
        "error: hf:org/two: has several subsets; name one of main, socratic, as hf:org/name:subset"
    )
    assert refused(server, tmp_path, "hf:org/two:x") == (
        "error: hf:org/two:x: has no subset x; name one of main, socratic, as hf:org/name:subset"
    )
    assert refused(server, tmp_path, "hf:org/two:main:x") == "error: hf:org/two:main:x: has no split x, but train"
    assert refused(server, tmp_path, "hf:org/sft") == (
        "error: hf:org/sft: several splits may be read as train; name one of train_sft, train_gen,"
        " as hf:org/name:default:SPLIT"
    )
    for word in ("hf:", "hf:a/b/c", "hf:a/b:c:d:e", "hf:../x", "hf:a b"):
        assert refused(server, tmp_path, word).startswith(f"error: {word}: hf:org/name, hf:org/name:subset or ")
    (chosen, main), _ = read(server, tmp_path, "hf:org/sft:train_gen", "hf:org/two:main")
    assert chosen["texts"] == ["train_gen"] and main["texts"] == ["a"]


def test_a_named_split_is_read_whatever_a_column_says(server, tmp_path):
    rows = b'{"text": "a", "split": "test"}\n{"text": "b", "split": "train"}\n'
    server.repos["org/column"] = {"files": {"all.jsonl": rows}}
    (by_column, all_records), _ = read(server, tmp_path, "hf:org/column", "hf:org/column:default:train")
    assert by_column["texts"] == ["b"] and all_records["texts"] == ["a", "b"]


def test_a_program_is_not_run_and_the_hub_s_parquet_copy_is_read(server, tmp_path):
    copy = {"plain/train/0000.parquet": parquet("t"), "plain/partial-test/0000.parquet": parquet("w")}
    branch = {"files": copy, "commit": "e" * 40, "branch": "refs/convert/parquet"}
    branches = {branch["branch"]: branch, branch["commit"]: branch}
    scripted = {"old.py": b"import os", "raw.jsonl": jsonl("raw")}
    server.repos["org/old"] = {"files": scripted, "branches": branches}
    server.repos["org/gone"] = {"files": {"gone.py": b"import os"}}
    server.repos["org/images"] = {"files": {"a.tar": b"x"}}
    (train, test), said = read(server, tmp_path, "hf:org/old", ("hf:org/old", TEST))
    assert train["texts"] == ["t"] and test["texts"] == ["w"]
    why = "needs its program old.py, which is not run"
    remark = "reading the Hub's Parquet copy, which holds only the beginning of large splits"
    assert said[0] == f"NOTE: hf:org/old: {why}; {remark}" and "commit eeeeeeeeeeee" in said[1]
    assert not [path for _, path, _ in server.asked if path.endswith((".py", ".jsonl"))]
    line = refused(server, tmp_path, "hf:org/gone")
    why = "needs its program gone.py, which is not run, and the Hub has no Parquet copy of it"
    assert line == f"error: hf:org/gone: {why}; look for another data set that holds the same as Parquet or JSON files"
    line = refused(server, tmp_path, "hf:org/images")
    assert line.startswith("error: hf:org/images: holds no file of a known kind, and the Hub has no Parquet copy")
    line = refused(server, tmp_path, "hf:org/gone@v1")
    assert line.endswith("which is not run; without @v1 a Parquet copy may be there")


def test_private_gated_missing(server, tmp_path):
    data = {"files": {"train.jsonl": jsonl("a")}}
    server.repos["org/private"] = data | {"token": "hf_right"}
    server.repos["org/gated"] = data | {"gated": True}
    page = f"{server.url}/datasets/org"
    hint = "if private, log in by `hf auth login` or HF_TOKEN"
    line = refused(server, tmp_path, "hf:org/private")
    assert line == f"error: hf:org/private: {page}/private is missing or private (HTTP 401); {hint}"
    (found,), _ = read(server, tmp_path, "hf:org/private", HF_TOKEN="hf_right")
    assert found["texts"] == ["a"]
    line = refused(server, tmp_path, "hf:org/gated")
    advice = f"ask for access at {page}/gated, then log in by `hf auth login` or HF_TOKEN"
    assert line == f"error: hf:org/gated: is gated: {advice}"
    assert refused(server, tmp_path, "hf:org/none") == f"error: hf:org/none: no such data set at {server.url}"
    line = refused(server, tmp_path, "hf:org/gated@v9")
    assert line == f"error: hf:org/gated@v9: {page}/gated has no revision v9"


def test_without_the_hub_the_copy_is_used_and_a_new_commit_is_said(server, tmp_path):
    files = {"train.jsonl": jsonl("old"), "valid.jsonl": jsonl("v"), "README.md": b"# Data"}
    server.repos["org/set"] = {"files": files}
    read(server, tmp_path, "hf:org/set")
    server.repos["org/set"] = {"files": files | {"train.jsonl": jsonl("new")}, "commit": "f" * 40}
    goes_on = reading(("hf:org/set", TRAIN), keeps=True)
    code, out, err = run(server.url, tmp_path, goes_on, PLAINTUNE_CACHE=str(tmp_path / "ours"))
    note = f"has changed on the Hub since it was last fetched; this run goes on with hf:org/set@{COMMIT[:12]}"
    assert code == 0 and json.loads(out)["texts"] == ["old"] and err.startswith(f"NOTE: hf:org/set: {note}\n")
    (changed,), said = read(server, tmp_path, "hf:org/set")
    note = "has changed on the Hub since it was last fetched; as it was then, it is"
    assert changed["texts"] == ["new"] and said[0] == f"NOTE: hf:org/set: {note} hf:org/set@{COMMIT[:12]}"
    server.shutdown()
    server.server_close()
    for env, why in (({}, f"{server.url} can't be reached ("), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")):
        (found,), said = read(server, tmp_path, "hf:org/set", **env)
        assert found == changed and len(said) == 1
        assert said[0].startswith(f"NOTE: hf:org/set: {why}")
        assert said[0].endswith("; using the copy in the cache, commit ffffffffffff")
        line = refused(server, tmp_path, "hf:org/set", VALIDATION, **env)
        rest = "the cache has not all of it; fetch the rest when the Hub can be reached"
        assert line == f"error: hf:org/set: {rest}"
        gone = {"HF_HOME": str(tmp_path / "gone"), **env}
        assert refused(server, tmp_path, "hf:org/set", **gone) == f"error: hf:org/set: {rest}"
        line = refused(server, tmp_path, "hf:org/other", **env)
        assert line.startswith(f"error: hf:org/other: {why}") and line.endswith(", and the cache has no copy of it")


def test_a_run_on_a_split_is_validated_by_the_other(server, tmp_path):
    chats = {name: records(tmp_path / name, 12, i).read_bytes() for i, name in enumerate(("train.jsonl", "dev.jsonl"))}
    server.repos["org/chat"] = {"files": chats}
    base = chat_base(tmp_path / "base", num_key_value_heads=2)
    words = ["--model", base, "--data", "2=hf:org/chat", "--steps", 1, "--batch-size", 2, "--out", tmp_path / "run"]

    def work():
        sys.argv = ["train.py", *map(str, words)]
        errors.run(train.main)

    code, out, err = run(server.url, tmp_path, work, PLAINTUNE_CACHE=str(tmp_path / "ours"))
    assert code == 0, err
    parts = "train: train.jsonl; not read here: dev.jsonl (validation)"
    summary = "data      hf:org/chat: prompt and completion (1 file of JSONL, 12 records)"
    assert f"{summary}, {parts}\n" in out and "12 examples to train on" in out and "; 12 to validate" in out
    assert "split validation" in err


def test_other_processes_of_a_machine_ask_nothing(server, tmp_path):
    server.repos["org/set"] = {"files": {"train.jsonl": jsonl("a")}}
    read(server, tmp_path, "hf:org/set")
    server.asked.clear()
    server.repos["org/set"]["answer"] = (b"{}", 403)
    (found,), said = read(server, tmp_path, "hf:org/set", LOCAL_RANK="1")
    assert found["texts"] == ["a"] and said == [] and server.asked == []


@pytest.mark.parametrize("head", [b"---\nconfigs: 3\n---\n", b"---\n[: {\n---\n", b"---\nconfigs:\n- 3\n---\n"])
def test_a_readme_whose_head_says_nothing_useful(server, tmp_path, head):
    server.repos["org/odd"] = {"files": {"README.md": head, "train.jsonl": jsonl("a")}}
    (found,), _ = read(server, tmp_path, "hf:org/odd")
    assert found["texts"] == ["a"]


def test_a_readme_that_leads_elsewhere(server, tmp_path):
    configs = readme("- config_name: a\n  data_files: https://elsewhere/x.jsonl")
    server.repos["org/away"] = {"files": {"README.md": configs, "train.jsonl": jsonl("a")}}
    line = refused(server, tmp_path, "hf:org/away")
    assert line == "error: hf:org/away: its files are elsewhere, https://elsewhere/x.jsonl; name those"
    configs = readme("- config_name: a\n  data_files: data/**.jsonl")
    server.repos["org/stars"] = {"files": {"README.md": configs, "data/train.jsonl": jsonl("a")}}
    line = refused(server, tmp_path, "hf:org/stars")
    assert line.startswith("error: hf:org/stars: its README names files by data/**.jsonl, Invalid pattern: ")
    configs = readme("- config_name: a\n  data_files:\n  - split: train\n    path: data\n  - split: x\n    path: none")
    server.repos["org/folder"] = {"files": {"README.md": configs, "data/deep/a.jsonl": jsonl("a"), "b.jsonl": b"x"}}
    (found,), _ = read(server, tmp_path, "hf:org/folder")
    assert found["texts"] == ["a"]
