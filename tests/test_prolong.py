"""A run that has ended goes on to more steps: from its last weights and moments, at a rate that is said."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import chat_base, sentence

import optimizers
import train
from common.errors import UserError
from training import outcome
from training.plots import loss_curve


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("inputs")
    base = chat_base(folder / "base")
    lines = [json.dumps({"prompt": sentence(i, 5), "completion": sentence(1000 + i, 5)}) for i in range(60)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    words = ["--model", base, "--data", folder / "data.jsonl", "--lr", 1e-3, "--warmup", 2, "--eval-every", 4]
    return [*words, "--device", "cpu", "--dtype", "fp32", "--val-limit", 0]


def run(monkeypatch, capsys, *words) -> str:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    try:
        train.main()
    finally:
        said = capsys.readouterr().out
    return said


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_finished_run_goes_on_to_more_steps(words, tmp_path, monkeypatch, capsys, method):
    out = tmp_path / "run"
    run(monkeypatch, capsys, *words, "--method", method, "--steps", 12, "--out", out)
    before = lines_of(out)
    stored = load_file(next((out / "final").glob("*.safetensors")))

    said = run(monkeypatch, capsys, "--out", out, "--resume", "--steps", 24)
    # In the middle of one run of 24 steps: after 2 of warm-up, 10 of 22.
    rate = 1e-3 * 0.5 * (1 + math.cos(math.pi * 10 / 22))
    assert f"prolonged from 12 to 24 steps: the rate goes on at {rate:.2g} and falls as in one run of 24" in said
    after = lines_of(out)
    assert after[: len(before)] == before
    steps = [line for line in after if "loss" in line]
    assert [line["step"] for line in steps] == [*range(1, 25)]
    assert steps[12]["lr"] == pytest.approx(rate) and steps[23]["lr"] < 1e-5
    # From the moments too: a fresh optimizer's first step would be as long as the rate for every weight.
    prolonged = load_file(next((out / "final").glob("*.safetensors")))
    assert any(not torch.equal(prolonged[name], stored[name]) for name in stored)
    assert json.loads((out / "final" / "plaintune.json").read_text())["steps"] == 24
    assert json.loads((out / "config.json").read_text())["steps"] == 24

    said = run(monkeypatch, capsys, "--out", out, "--resume")
    assert said == f"complete  {out} has ended; its outcome is {out / 'final'}; --steps above 24 prolongs it\n"
    said = run(monkeypatch, capsys, "--out", out, "--resume", "--steps", 24)
    assert said.startswith("complete")


def test_prolonging_equals_one_run_but_for_the_rate(words, tmp_path, monkeypatch, capsys):
    """With a constant rate there is no difference at all: weights, moments, data order and metrics go on."""
    more = [*words, "--schedule", "constant", "--warmup", 0, "--dropout", 0.2]
    run(monkeypatch, capsys, *more, "--steps", 20, "--out", tmp_path / "whole")
    run(monkeypatch, capsys, *more, "--steps", 10, "--out", tmp_path / "parts")
    run(monkeypatch, capsys, "--out", tmp_path / "parts", "--resume", "--steps", 20)

    def numbers(out: Path) -> list[tuple]:
        # The validation at the end of the first part has no counterpart.
        return [(line["step"], line["loss"], line["grad_norm"]) for line in lines_of(out) if "loss" in line]

    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    name = "final/adapter_model.safetensors"
    ours, theirs = load_file(tmp_path / "parts" / name), load_file(tmp_path / "whole" / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_prolonged_run_that_is_stopped_goes_on(words, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    run(monkeypatch, capsys, *words, "--steps", 10, "--save-every", 5, "--out", out)
    plain = outcome.save_final

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(outcome, "save_final", killed)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, capsys, "--out", out, "--resume", "--steps", 20)
    monkeypatch.setattr(outcome, "save_final", plain)
    said = run(monkeypatch, capsys, "--out", out, "--resume")
    assert "complete" not in said and "after step 20 of 20" in said
    assert json.loads((out / "final" / "plaintune.json").read_text())["steps"] == 20


def test_what_can_not_be_prolonged_says_why(words, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    run(monkeypatch, capsys, *words, "--steps", 8, "--save-every", 0, "--out", out)
    with pytest.raises(UserError, match=r"has ended, and to prolong it .*, but it has none .*start a new run"):
        train.open_run(train.parse_flags(["--out", str(out), "--resume", "--steps", "20"]), train.FolderLock())
    shutil.rmtree(out)
    run(monkeypatch, capsys, *words, "--steps", 12, "--save-every", 5, "--out", out)
    shutil.rmtree(out / "checkpoints" / "step-12")
    with pytest.raises(UserError, match="but the newest is of step 10 of 12"):
        train.open_run(train.parse_flags(["--out", str(out), "--resume", "--steps", "20"]), train.FolderLock())


def test_the_picture_has_the_run_s_name_and_the_replay(tmp_path, monkeypatch):
    from matplotlib import pyplot

    lines = []
    for step in range(1, 60):
        lines.append({"step": step, "loss": 3 / step, "replay_loss": 2 / step if step % 3 else None})
    lines.append({"step": 59, "val_loss": 1.0, "replay_val_loss": 2.0})
    lines[10]["loss"] = None  # a step that was skipped
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "costs $5 and $6: lora of base")
    (figure,) = drawn
    (axes,) = figure.axes
    assert axes.get_ylabel() == "loss per token" and axes.get_xlabel() == "step"
    assert axes.get_title() == r"costs \$5 and \$6: lora of base"
    curves = {line.get_label(): len(line.get_xdata()) for line in axes.get_lines()}
    assert curves == {
        "training with replay, each step": 58, "training with replay, mean of 3 steps": 58, "validation": 1,
        "replayed data, validation": 1, "replayed data, training": 40,
    }  # fmt: skip
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    # A single step is a dot, for it makes no line.
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 3.0}))
    loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "one step")
    assert [line.get_marker() for figure in drawn for line in figure.axes[0].get_lines()][-1] == "o"
    assert axes.get_lines()[0].get_marker() == "None"


def test_muon_computes_in_fp32_where_bf16_has_no_instructions(monkeypatch):
    """To a matrix with singular values near 1, by the same polynomial to bf16's precision."""
    matrix = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(optimizers, "update_dtype", lambda device, dtype=dtype: dtype)
        found[dtype] = optimizers.newton_schulz(matrix)
        assert found[dtype].dtype == dtype
    values = torch.linalg.svdvals(found[torch.float32])
    assert values.min() > 0.6 and values.max() < 1.3
    assert (found[torch.float32] - found[torch.bfloat16].float()).abs().max() < 0.03


def test_muon_s_dtype_is_the_hardware_s(monkeypatch):
    optimizers.update_dtype.cache_clear()
    for name, wanted in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        monkeypatch.setattr(optimizers, "pick_dtype", lambda asked, device, wanted=wanted: (wanted, ""))
        optimizers.update_dtype.cache_clear()
        assert optimizers.update_dtype(torch.device("cpu")) == wanted, name
    optimizers.update_dtype.cache_clear()
