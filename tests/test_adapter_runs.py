"""Runs of train.py with adapters of every kind: going on from one, resumed, at the doors of the other scripts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.helpers import chat_base, command
from support.runs import ROOT, records

import convert
import evaluate
import generate
import methods
import train
from checkpoint import load_model
from common.errors import UserError


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    base = chat_base(folder / "base", num_key_value_heads=2)
    data, val = records(folder / "data.jsonl", 30, 0), records(folder / "val.jsonl", 8, 500)
    return ["--model", str(base), "--data", str(data), "--val", str(val), "--batch-size", "4", "--dtype", "fp32"]


def run(monkeypatch, capsys, job, *words) -> str:
    out, err, code = command(train, monkeypatch, capsys, *job, *map(str, words))
    assert code == 0, err
    return out


def weights(folder: Path) -> dict:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def from_peft(base: str, folder: Path, config) -> Path:
    """An adapter that peft made, moved a little from its start."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return folder


def hub_folder(base: str, folder: Path) -> Path:
    """Bottleneck adapters as nobody's preset has them."""
    import adapters

    model = load_model(base)
    adapters.add_bottleneck(model, adapters.Placement(True, False, "residual", "gelu", 2.0), 8.0)
    adapters.save_non_lora(model, folder)
    return folder


STARTS = {
    "vera": lambda base, folder: from_peft(base, folder, peft.VeraConfig(
        r=16, target_modules=["q_proj", "v_proj"], projection_prng_key=7)),
    "ia3": lambda base, folder: from_peft(base, folder, peft.IA3Config(
        target_modules=["q_proj", "k_proj", "down_proj"], feedforward_modules=["k_proj", "down_proj"])),
    "lora": lambda base, folder: from_peft(base, folder, peft.LoraConfig(
        r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "up_proj"], alpha_pattern={"q_proj": 12.3456789})),
    "p-tuning": lambda base, folder: from_peft(base, folder, peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, encoder_hidden_size=16)),
    "prefix-tuning": lambda base, folder: from_peft(base, folder, peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6)),
    "bottleneck": hub_folder,
}  # fmt: skip


@pytest.mark.parametrize("method", STARTS)
def test_a_run_that_goes_on_from_an_adapter_is_resumed_as_it_was(job, tmp_path, monkeypatch, capsys, method):
    start = STARTS[method](job[1], tmp_path / "start")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ["--adapter", start, "--steps", 4, "--save-every", 2, "--eval-every", 2, "--lr", "1e-2"]
    # The method of an adapter need not be typed.
    said = run(monkeypatch, capsys, job, *words, "--out", whole)
    if method not in ("lora", "p-tuning"):
        assert f"method    {method}, as {start} is one of that" in said
    shutil.copytree(whole, cut, symlinks=True)
    for name in ("final", "best", "checkpoints/step-4"):
        shutil.rmtree(cut / name, ignore_errors=name == "best")  # where a validation was better
    # What is at --adapter by now is no matter of the run.
    for file in start.glob("*.safetensors"):
        file.write_bytes(b"")
    run(monkeypatch, capsys, [], "--out", cut, "--resume")
    mine, theirs = weights(whole / "final"), weights(cut / "final")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert (whole / "final/adapter_config.json").read_text() == (cut / "final/adapter_config.json").read_text()
    again = load_model(job[1])
    methods.load_any_adapter(again, cut / "final")


@pytest.mark.parametrize("typed, start", [("bottleneck", "lora"), ("lora", "ia3"), ("ia3", "prefix-tuning")])
def test_an_adapter_of_another_kind_is_named(job, tmp_path, monkeypatch, capsys, typed, start):
    folder = STARTS[start](job[1], tmp_path / "start")
    words = ["--method", typed, "--adapter", folder, "--steps", 1, "--out", tmp_path / "run"]
    _, err, code = command(train, monkeypatch, capsys, *job, *map(str, words))
    assert code and f"is one of --method {start}, not of --method {typed}" in err


@pytest.fixture(scope="module")
def loftq(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("loftq") / "run"
    words = ["--method", "qlora", "--init", "loftq", "--steps", "2", "--save-every", "0", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "train.py", *job, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return out, done.stdout


def test_loftq_brings_its_base_and_every_door_finds_it(loftq, job, tmp_path, monkeypatch, capsys):
    out, said = loftq
    final = out / "final"
    assert f"next      python generate.py --adapter {final}" in said and "--quant" not in said.partition("next ")[2]
    card = (final / "README.md").read_text()
    assert "THIS/base" in card and "--quant nf4" not in card.partition("## What it was made from")[0]
    named = json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == (final / "base").resolve()
    # Its own base, without a warning; the original one with it, and what to do.
    ask = ["--adapter", final, "--prompt", "hello", "--max-new-tokens", 3]
    answer, err, code = command(generate, monkeypatch, capsys, *ask)
    assert code == 0 and "brings it along" in err + answer and "WARNING" not in err + answer
    _, err, code = command(generate, monkeypatch, capsys, *ask, "--model", job[1])
    assert code == 0 and "without --model it gets the base that it brings along" in err
    said, err, code = command(evaluate, monkeypatch, capsys, "loss", "--adapter", final, "--versus", "base", "--data",
                              job[5])  # fmt: skip
    assert code == 0 and "the 4 bits that LoftQ's adapter makes up for" in said, err
    _, err, code = command(convert, monkeypatch, capsys, "merge", final, tmp_path / "merged")
    assert code == 0, err
    _, err, code = command(
        convert, monkeypatch, capsys, "to-gguf", final / "base", tmp_path / "x.gguf", "--adapter", final
    )
    assert code and "`convert.py merge` it" in err
    # A run that goes on from it brings the base along again.
    more = tmp_path / "more"
    run(monkeypatch, capsys, job[2:], "--method", "qlora", "--adapter", final, "--steps", 1, "--out", more)
    assert (more / "final/base/config.json").is_file()


def test_what_has_no_place_in_a_gguf_file_says_what_to_do(job, tmp_path, monkeypatch, capsys):
    for kind, advice in (("ia3", "`convert.py merge` it"), ("prefix-tuning", "llama.cpp has nothing for it")):
        folder = STARTS[kind](job[1], tmp_path / kind)
        words = ["to-gguf", job[1], tmp_path / "x.gguf", "--adapter", folder]
        _, err, code = command(convert, monkeypatch, capsys, *map(str, words))
        assert code and advice in err
    _, err, code = command(
        convert, monkeypatch, capsys, "merge", tmp_path / "prefix-tuning", tmp_path / "m", "--model", job[1]
    )
    assert code and "no update of weights" in err


@pytest.mark.parametrize("words, said", [
    ("--method prefix-tuning --encoder none --encoder-size 7", "there is no encoder"),
    ("--method p-tuning --encoder none", "is --method prompt-tuning"),
    ("--method prefix-tuning --encoder lstm", "a prefix has mlp or none"),
    ("--method prompt-tuning --prompt-init words", "must be vocabulary, random, or text:"),
    ("--method prompt-tuning --prompt-init text:", "no text stands behind"),
    ("--method ia3 --rank 4", "--rank: is for --method lora"),
    ("--method prompt-tuning --virtual-tokens 512", "leave no room for a text"),
    ("--init loftq", "give --quant nf4 as well"),
    ("--rank-pattern q_proj=100000", "no layer here is larger than"),
    ("--alpha-pattern q_proj=1e12", "below a billion"),
    ("--layers 0-99999999999", "no model has so many layers"),
    ("--method vera --ewc 10", "full fine-tuning and the updates of LoRA alone"),
    ("--dora --ewc 10", "whose start is no update of zero"),
])  # fmt: skip
def test_bad_words_end_in_one_line(job, tmp_path, monkeypatch, capsys, words, said):
    words = [*words.split(), "--steps", "1", "--out", str(tmp_path / "run")]
    _, err, code = command(train, monkeypatch, capsys, *job, *words)
    assert code and said in err and "Traceback" not in err


@pytest.mark.parametrize("method", ["vera", "bottleneck", "prompt-tuning", "p-tuning", "prefix-tuning", "ia3"])
def test_the_plan_has_a_row_for_the_method_that_is_asked_for(job, tmp_path, monkeypatch, capsys, method):
    words = ["--rank", "8"] if method == "vera" else []
    said, err, code = command(train, monkeypatch, capsys, *job, "--method", method, *words, "--plan")
    assert code == 0, err
    assert f"plan      --method {method}:" in said
    assert [line.split()[0] for line in said.splitlines()].count(method) == 1


def test_zero_rows_of_a_weight_stay_zero_with_dora(job):
    import adapter_files
    import lora

    model = load_model(job[1])
    with torch.no_grad():
        model.blocks[0].attention.q.weight[3] = 0
    lora.add_lora(model, 4, 8.0, variant=lora.Variant(dora=True))
    tokens = torch.arange(5)[None]
    logits = model(tokens)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        adapter_files.merge(model)
        assert torch.allclose(model(tokens), logits, atol=1e-4)


@pytest.mark.parametrize("add", ["vera", "dora"])
def test_variants_that_peft_has_not_for_experts_are_refused_there(tmp_path, add):
    import lora

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=32,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    with pytest.raises(UserError, match="routed experts"):
        if add == "vera":
            lora.add_vera(model, 4)
        else:
            lora.add_lora(model, 4, 8.0, variant=lora.Variant(dora=True))
    lora.add_lora(model, 4, 8.0, targets="q_proj,v_proj", variant=lora.Variant(dora=True))
