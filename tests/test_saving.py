"""What full fine-tuning writes: the dtype of final/, and how much of what was trained the rounding to it takes."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.helpers import chat_base, command, llama, sentence

import checkpoint
import methods
import train
from checkpoint import load_model, share_lost_by_rounding
from training.defaults import Settings


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*flags): what a short full fine-tuning of a bf16 folder prints, and the weights of its final/."""
    chat_base(tmp_path / "base", dtype=torch.bfloat16, num_hidden_layers=1)
    records = [{"instruction": sentence(i, 4), "output": sentence(i + 1, 3)} for i in range(16)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    outs = iter("abcdefgh")

    def go(*flags):
        out = tmp_path / next(outs)
        words = ["--model", tmp_path / "base", "--data", tmp_path / "data.json", "--method", "full", "--dtype", "fp32"]
        words += ["--steps", 4, "--warmup", 0, "--val-fraction", 0, "--out", out, *flags]
        said, err, code = command(train, monkeypatch, capsys, *words)
        assert code == 0, err
        weights = load_file(out / "final" / "model.safetensors")
        config = json.loads((out / "final" / "config.json").read_text())
        claimed = config.get("dtype") or config["torch_dtype"]
        assert {str(tensor.dtype) for tensor in weights.values()} == {f"torch.{claimed}"}
        return said, weights

    return go


def share_said(said: str) -> float:
    (share,) = re.findall(r"^final/ .*rounding to \w+ loses ([\d.e+-]+) % of what was trained", said, re.MULTILINE)
    return float(share)


def dot(a: dict, b: dict) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


@pytest.mark.parametrize("lr, is_warned", [(6e-7, True), (1e-2, False)])
def test_what_rounding_takes_of_full_fine_tuning_is_said_with_its_share(run, tmp_path, lr, is_warned):
    said, rounded = run("--lr", lr)
    said_in_fp32, exact = run("--lr", lr, "--save-dtype", "fp32")
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}
    assert {t.dtype for t in exact.values()} == {torch.float32}
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    base = load_file(tmp_path / "base" / "model.safetensors")
    update = {name: exact[name] - base[name].float() for name in exact}
    kept = {name: rounded[name].float() - base[name].float() for name in exact}
    share = 1 - dot(kept, update) / dot(update, update)
    assert share_said(said) == pytest.approx(100 * max(share, 0), rel=0.06, abs=1e-4)
    assert (share > 0.9) == is_warned
    assert ("--save-dtype fp32 keeps it" in said) == is_warned
    assert "saved in bf16: as the base's files are (--save-dtype)" in said
    assert "saved in fp32: asked for with --save-dtype" in said_in_fp32 and "rounding to" not in said_in_fp32


def test_a_configuration_that_claims_another_dtype_is_not_believed(run, tmp_path):
    file = tmp_path / "base" / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"dtype": "float32"}))
    said, weights = run()
    assert "saved in bf16: config.json says float32, the weights are bfloat16, which counts (--save-dtype)" in said
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    del raw["dtype"]
    file.write_text(json.dumps(raw | {"torch_dtype": "bfloat16"}))
    said, weights = run("--save-dtype", "fp16")
    assert {t.dtype for t in weights.values()} == {torch.float16} and "rounding to fp16 loses" in said


def test_weights_that_are_in_the_dtype_already_lose_nothing(run):
    said, weights = run("--weights", "bf16")
    assert "rounding to bf16 loses" not in said and {t.dtype for t in weights.values()} == {torch.bfloat16}


def test_only_what_is_trained_counts(tmp_path):
    llama(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=True)
    model = load_model(tmp_path).requires_grad_(False)
    assert share_lost_by_rounding(model, torch.bfloat16) == 0
    first, second = model.blocks[0].mlp.up.weight, model.blocks[1].mlp.up.weight
    with torch.no_grad():
        # Half of the update is lost: the first is below half a step of any number, the second is whole steps.
        first.add_(first.abs() * 2**-12)
        second.add_(first.abs() * 2**-12 * 2**12)
    first.requires_grad_(True)
    assert share_lost_by_rounding(model, torch.bfloat16) == pytest.approx(1, abs=1e-6)
    assert share_lost_by_rounding(model, torch.float32) == 0
    first.requires_grad_(False)
    second.requires_grad_(True)
    assert share_lost_by_rounding(model, torch.bfloat16) < 0.01
    # A base that is gone by the end is no reason to lose what was trained.
    (tmp_path / "model.safetensors").unlink()
    assert share_lost_by_rounding(model, torch.bfloat16) == 0


def test_a_base_of_gpt2_is_compared_with_its_transposed_matrices(tmp_path):
    """Its files hold [in, out]; compared without turning them, a trained weight would be far from its base."""
    config = transformers.GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=1, n_head=4)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    weight = dict(model.named_parameters())["blocks.0.mlp.up.weight"]
    model.requires_grad_(False)
    weight.requires_grad_(True)
    with torch.no_grad():
        weight.add_(weight.abs() * 2**-12)
    assert share_lost_by_rounding(model, torch.bfloat16) == pytest.approx(1, abs=1e-6)
    assert checkpoint.stored_dtype(tmp_path) == torch.bfloat16


def test_save_dtype_is_for_full_fine_tuning(tmp_path, monkeypatch, capsys):
    words = ("--method", "lora", "--save-dtype", "fp32", "--out", tmp_path / "out")
    _, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 2 and err == "error: --save-dtype: is for --method full, not for --method lora\n"


def test_a_run_that_is_resumed_may_be_given_options_of_its_own_method(run, tmp_path, monkeypatch, capsys):
    run("--save-every", 2, "--eval-every", 0)
    out = tmp_path / "a"
    shutil.rmtree(out / "final")
    said, err, code = command(train, monkeypatch, capsys, "--resume", "--out", out, "--save-dtype", "fp32")
    assert code == 0 and "saved in fp32: asked for with --save-dtype" in said, err
    (tmp_path / "new").mkdir()
    words = ["--resume", "auto", "--save-dtype", "fp32"]
    _, err, code = command(train, monkeypatch, capsys, *words, "--out", tmp_path / "new")
    assert code == 2 and "--save-dtype: is for --method full, not for --method lora" in err


@pytest.mark.parametrize("name, value", [("model.layers.0.mlp.up_proj.weight", 7e4), ("model.norm.weight", -7e4)])
def test_a_base_that_is_too_large_for_fp16_is_refused_before_the_training(
    name, value, run, tmp_path, monkeypatch, capsys
):
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights[name].view(-1)[0] = value
    capsys.readouterr()  # transformers' progress bar
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    words = ["--model", tmp_path / "base", "--data", tmp_path / "data.json", "--method", "full", "--steps", 1]
    words += ["--dtype", "fp32", "--out", tmp_path / "new", "--save-dtype"]
    said, err, code = command(train, monkeypatch, capsys, *words, "fp16")
    problem = f"{name} of {tmp_path / 'base'} holds weights too large for it; take bf16 or fp32"
    assert code == 2 and err == f"error: --save-dtype fp16: {problem}\n"
    assert "validation" not in said and not (tmp_path / "new").exists()
    assert command(train, monkeypatch, capsys, *words, "bf16")[2] == 0


def test_what_becomes_too_large_for_fp16_in_training_is_stored_in_fp32(tmp_path):
    """The training is not lost, and what was not asked for is said."""
    llama(tmp_path / "base")
    model = load_model(tmp_path / "base")
    settings = Settings(steps=1, lr=1.0, warmup=0, weight_decay=0, eval_every=0, save_every=0, save_dtype="fp16")
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[2, 3] = 65_504.0  # the largest number of fp16
    assert "WARNING" not in methods.save_full(model, settings, tmp_path / "a", lambda folder: None)
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[2, 3] = 65_600.0
    remark = methods.save_full(model, settings, tmp_path / "b", lambda folder: None)
    name = "model.layers.1.mlp.up_proj.weight"
    assert remark == f"WARNING: stored in fp32, for {name} has become too large for fp16 (--save-dtype)"
    stored = {folder: load_file(tmp_path / folder / "model.safetensors")[name] for folder in "ab"}
    assert stored["a"].dtype == torch.float16 and stored["b"].dtype == torch.float32
    assert stored["b"][2, 3] == 65_600.0
