"""--lr auto: the rate that short trainings say, of which nothing is left in the run."""

import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.helpers import chat_base, output_of, refusal_of
from support.runs import EXACT, lines, preferences, records, torchrun

import train
from flags import parse_flags
from training import lr_probe
from training.defaults import auto_factor
from training.lr_probe import RATIO, Probe, bracket_best, lowest_of_parabola, probe_steps

QUICK = "--steps 6 --eval-every 0 --dtype fp32 --device cpu --compile off --batch-size 4 --seed 3".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto")
    chat_base(folder / "base")
    records(folder / "train.jsonl", 40, 0)
    records(folder / "val.jsonl", 8, 1000)
    preferences(folder / "pairs.jsonl", 24, 0)
    return folder


def words(files, out, *more, lr="auto") -> list:
    data = ["--model", files / "base", "--data", files / "train.jsonl", "--val", files / "val.jsonl"]
    return [*data, *QUICK, "--lr", lr, "--out", out, *more]


# ---- the search ----


@pytest.mark.parametrize("optimum", [1e-5, 3e-4, 1e-3, 2.2e-3, 0.04])
def test_the_lowest_loss_is_bracketed_and_found(optimum):
    asked = []

    def loss(lr):
        asked.append(lr)
        return 1 + 0.1 * math.log(lr / optimum) ** 2

    probes = bracket_best(loss, 1e-3)
    assert len(asked) == len(set(asked)) == len(probes) <= lr_probe.MOST_PROBES
    assert [each.lr for each in probes] == sorted(asked)
    if len(probes) < lr_probe.MOST_PROBES:
        # Of a parabola the lowest point is known to the digit, wherever it was looked for.
        assert lowest_of_parabola(probes) == pytest.approx(optimum, rel=1e-6)


def test_no_more_rates_are_tried_than_are_needed():
    assert len(bracket_best(lambda lr: abs(math.log(lr / 1e-3)), 1e-3)) == 3


def test_a_rate_that_diverges_is_only_the_upper_end():
    probes = bracket_best(lambda lr: math.inf if lr > 1e-3 else -math.log(lr), 1e-3)
    assert [math.isfinite(each.loss) for each in probes] == [True, True, False]
    assert 1e-3 / math.sqrt(RATIO) <= lowest_of_parabola(probes) < 1e-3
    assert all(math.isinf(each.loss) for each in bracket_best(lambda lr: math.inf, 1e-3))


def test_the_lowest_point_is_that_of_a_fitted_parabola():
    losses = [2.0, 1.5, 1.8]
    probes = [Probe(1e-3 * RATIO**i, loss) for i, loss in enumerate(losses)]
    a, b, _ = np.polyfit([0, 1, 2], losses, 2)
    assert lowest_of_parabola(probes) == pytest.approx(1e-3 * RATIO ** (-b / (2 * a)))
    # The end of what was tried is the best that is known.
    assert lowest_of_parabola(probes[:2]) == probes[1].lr
    assert lowest_of_parabola([Probe(1.0, 2.0), Probe(2.5, 2.0), Probe(6.25, 2.0)]) == 1.0


def test_a_probe_is_a_part_of_the_run():
    assert [probe_steps(steps) for steps in (1, 2, 10, 60, 100, 200, 4000)] == [1, 1, 5, 8, 12, 25, 50]


def test_the_first_guess_follows_batch_and_alpha():
    def factor(typed: str) -> float:
        return auto_factor(dataclasses.replace(parse_flags(typed.split()), steps=9))

    assert factor("") == pytest.approx(1)
    assert factor("--batch-size 8 --accumulate 4") == pytest.approx(2)
    assert factor("--alpha 32") == pytest.approx(0.5) and factor("--rank 64") == pytest.approx(1)
    assert factor("--rank 32 --rslora") == pytest.approx(0.5)
    assert factor("--method full --batch-size 2") == pytest.approx(0.5)


# ---- runs ----

KINDS = {
    "lora": "--dropout 0.2 --rank 4",
    "full": "--method full --accumulate 2",
    "8 bits, bf16": "--method full --weights bf16 --optimizer adamw8bit --dtype bf16",
    "muon": "--optimizer muon --method full",
    "new rows": "--train-tokens <|im_end|> --neftune 5",
    "dpo": "--objective dpo --val-fraction 0.2 PAIRS",
    "prefix": "--method prefix-tuning --pack --seq-len 96",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_is_the_one_of_which_the_rate_was_typed(files, tmp_path, monkeypatch, capsys, kind):
    typed = KINDS[kind].split()
    start = words(files, tmp_path / "auto", *typed)
    if typed[-1] == "PAIRS":
        data = ["--model", files / "base", "--data", files / "pairs.jsonl"]
        start = [*data, *QUICK, "--lr", "auto", "--out", tmp_path / "auto", *typed[:-1]]
    out = output_of(train, monkeypatch, capsys, *start)
    said = re.search(r"lr auto   --lr (\S+), from \S+ .* and (\d) trainings of 3 steps: validation loss by rate", out)
    lr = float(said[1])
    config = json.loads((tmp_path / "auto" / "config.json").read_text())
    assert config["lr"] == lr and max(line["lr"] for line in lines(tmp_path / "auto") if "lr" in line) == lr
    plain = [f"{lr:g}" if word == "auto" else word for word in start]
    plain[plain.index(tmp_path / "auto")] = tmp_path / "typed"
    output_of(train, monkeypatch, capsys, *plain)
    mine, theirs = lines(tmp_path / "auto"), lines(tmp_path / "typed")
    assert [{name: line.get(name) for name in EXACT} for line in mine] == [
        {name: line.get(name) for name in EXACT} for line in theirs
    ]
    for file in (tmp_path / "typed" / "final").glob("*.safetensors"):
        other = load_file(tmp_path / "auto" / "final" / file.name)
        assert all(torch.equal(value, other[name]) for name, value in load_file(file).items())


def test_probes_prefer_the_rate_that_whole_runs_prefer(files, tmp_path, monkeypatch, capsys):
    losses = {}
    for lr in ("auto", "1e-4", "10"):
        output_of(train, monkeypatch, capsys, *words(files, tmp_path / lr, "--rank", 4, lr=lr))
        losses[lr] = lines(tmp_path / lr)[-1]["val_loss"]
    assert losses["auto"] < min(losses["1e-4"], losses["10"]) - 0.05


def test_a_resumed_run_keeps_its_rate_and_tries_none(files, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    start = [*words(files, run), "--save-every", 2]
    output_of(train, monkeypatch, capsys, *start)
    whole = lines(run)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-6")
    for more in (["--out", run, "--resume"], [*start, "--resume"]):
        out = output_of(train, monkeypatch, capsys, *more)
        assert "lr auto" not in out
    assert [{name: line.get(name) for name in EXACT} for line in lines(run)] == [
        {name: line.get(name) for name in EXACT} for line in whole
    ]


def test_two_processes_agree_on_a_rate(files, tmp_path):
    base = words(files, tmp_path / "two", "--shard", "full", "--method", "full", "--batch-size", 2)
    out = torchrun(2, "train.py", *base)
    (lr,) = set(re.findall(r"lr auto   --lr (\S+),", out))
    one = [*words(files, tmp_path / "one", "--method", "full")]
    alone = torchrun(1, "train.py", *one)
    assert float(lr) == pytest.approx(float(re.search(r"lr auto   --lr (\S+),", alone)[1]), rel=0.15)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--objective grpo --reward assets/booking_reward.py:reward", "not where the model writes answers"),
        ("--objective distill --teacher self --own-answers", "not where the model writes answers"),
        ("--ewc 10", "--lr auto: is not for --ewc"),
        ("--lr fast", "--lr: a number or auto is wanted, not 'fast'"),
        ("--lr 0", "--lr 0: must be above 0"),
    ],
)
def test_runs_that_probes_do_not_stand_for_are_refused(files, tmp_path, monkeypatch, capsys, typed, said):
    refused = refusal_of(train, monkeypatch, capsys, *words(files, tmp_path / "run", *typed.split()))
    assert said in refused and not (tmp_path / "run").exists()


def test_without_validation_there_is_nothing_to_compare(files, tmp_path, monkeypatch, capsys):
    start = ["--model", files / "base", "--data", files / "train.jsonl", *QUICK, "--out", tmp_path / "run"]
    refused = refusal_of(train, monkeypatch, capsys, *start, "--lr", "auto", "--val-fraction", 0)
    assert "--lr auto: compares validation losses, and --val-fraction 0 has none" in refused
    (files / "one.jsonl").write_text("".join((files / "train.jsonl").read_text().splitlines(True)[:1]))
    few = [files / "one.jsonl" if word == files / "train.jsonl" else word for word in start]
    refused = refusal_of(train, monkeypatch, capsys, *few, "--lr", "auto")
    assert "nothing validates; give --val FILE" in refused


def test_a_reference_that_is_not_there_yet_is_said(files, tmp_path, monkeypatch, capsys):
    start = ["--model", files / "base", "--data", files / "pairs.jsonl", *QUICK, "--out", tmp_path / "run"]
    more = ["--objective", "dpo", "--method", "full", "--lr", "auto"]
    refused = refusal_of(train, monkeypatch, capsys, *start, *more)
    assert "where no adapter can be switched off; give --lr" in refused


def test_rates_that_all_diverge_are_said(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lr_probe, "validate", lambda *_: {"loss": math.nan})
    refused = refusal_of(train, monkeypatch, capsys, *words(files, tmp_path / "run"))
    assert "--lr auto: no rate trains, all losses are infinite" in refused and not (tmp_path / "run").exists()
