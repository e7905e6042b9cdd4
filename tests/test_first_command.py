"""`python train.py`: the budget, the trial that times this machine, and the interval of the exact answers."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.helpers import chat_base, sentence

import train
from common.errors import UserError
from flags import parse_flags
from training import calibration, demo
from training.defaults import Settings


def a_demo(budget: float, answering: float) -> demo.Demo:
    """A demonstration whose base has answered, on a machine that took `answering` seconds for it."""
    made = object.__new__(demo.Demo)
    made.budget = budget
    made.answering_seconds = answering
    return made


def test_steps_fill_what_the_answers_leave_of_the_budget(monkeypatch):
    monkeypatch.setattr(demo, "elapsed", lambda: 60.0)
    settings = SimpleNamespace(steps=200, expected_seconds=800.0, ewc=0.0)
    # 0.75 x 600 - 60 - 28 = 362 seconds, at 4 a step.
    assert a_demo(600, 28).steps_within_budget(settings) == 90
    # There is time for all steps.
    assert a_demo(3000, 28).steps_within_budget(settings) == 200
    # Too little time: the fewest steps that teach the task; and never more than there are.
    assert a_demo(100, 28).steps_within_budget(settings) == demo.LEAST_STEPS
    assert a_demo(100, 28).steps_within_budget(SimpleNamespace(steps=9, expected_seconds=800.0, ewc=0.0)) == 9
    # The Fisher information of 50 sequences of 128 tokens, half as long again for adapters: 96 s at 100 tokens/s.
    workload = SimpleNamespace(tokens=80_000)
    more = {"ewc": 1.0, "ewc_samples": 50, "workload": workload, "method": "lora", "quant": None}
    held = SimpleNamespace(steps=200, expected_seconds=800.0, **more)
    assert a_demo(600, 28).steps_within_budget(held) == (362 - 96) // 4


@pytest.mark.parametrize(
    ("words", "dtype", "open_length", "seconds"),
    [
        ([], "fp32", True, 600),
        ([], "bf16", True, 300),
        (["--budget", "2.5"], "bf16", True, 150),
        (["--full-run"], "fp32", False, 600),
        (["--steps", "7"], "fp32", False, 600),
        (["--epochs", "2"], "fp32", False, 600),
    ],
)
def test_the_budget_holds_where_nothing_else_says_how_long(words, dtype, open_length, seconds):
    flags = dataclasses.replace(parse_flags(words), dtype=dtype)
    assert demo.has_budget(flags) is open_length
    assert demo.budget_seconds(flags) == seconds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--budget 5 --steps 3", "--budget and --steps: each says how long the run is"),
        ("--budget 5 --full-run", "--budget and --full-run: each says how long the run is"),
        ("--full-run --epochs 1", "--full-run and --epochs: each says how long the run is"),
        ("--budget 5 --data x.json", "--budget: is for the bundled task, not for one with --data"),
        ("--full-run --model x", "--full-run: is for the bundled task, not for one with --model"),
        ("--budget 0", "--budget 0: must be above 0"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse_flags(words.split())


@pytest.mark.parametrize(("right", "total"), [(0, 100), (83, 100), (195, 200), (200, 200), (1, 16)])
def test_the_interval_is_that_of_scipy(right, total):
    from scipy.stats import binomtest

    expected = binomtest(right, total).proportion_ci(0.95, "wilson")
    assert demo.wilson_interval(right, total) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_trial_of_the_machine_changes_nothing(tmp_path, monkeypatch, capsys, method):
    base = chat_base(tmp_path / "base")
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": sentence(i, 5), "completion": sentence(1000 + i, 5)}) for i in range(40)]
    data.write_text("\n".join(lines))
    numbers = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(train, "measure_pace", lambda *_: calibration.Pace(1e-3, 0.5))
        words = ["--model", base, "--data", data, "--method", method, "--steps", 4, "--out", tmp_path / name]
        words += ["--device", "cpu", "--dtype", "fp32"]
        if method == "lora":
            words += ["--dropout", 0.3]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        train.main()
        said = capsys.readouterr().out
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        numbers.append([(line.get("loss"), line.get("val_loss"), line.get("grad_norm")) for line in lines])
    assert numbers[0] == numbers[1]
    # 0.5 s for each step of the optimizer, and 1 ms for each token.
    expected = float(said.partition("GB of memory, ")[2].split()[0])
    tokens = sum(json.loads(line).get("tokens", 0) for line in (tmp_path / "without" / "metrics.jsonl").open())
    assert expected * 60 >= 4 * 0.5 + 0.9 * tokens * 1e-3 - 6


def test_the_trial_takes_examples_that_cost_the_mean_and_fewer_where_one_step_would_take_long():
    steps = [[(50, 60)], [(70, 20), (65, 400)]]
    chosen = []

    def collate(examples):
        chosen.append([len(example.ids) for example in examples])

    def examples_of_step(step):
        return [[SimpleNamespace(ids=[1] * n) for n in lengths] for lengths in steps[step]]

    loader = SimpleNamespace(examples_of_step=examples_of_step, collate=collate)
    # Tokens of examples of 40 and of 80 tokens: (40 * 40 + 80 * 80) / (40 + 80) = 66.7.
    lengths = np.array([40.0, 80.0])
    for most in (10, 66, 1000):
        calibration.trial_batch(loader, 2, lengths, most)
    calibration.trial_batch(loader, 1, lengths, 1000)
    calibration.trial_batch(loader, 2, np.array([400.0, 20.0]), 1000)
    # At most as many tokens as the first micro-batch has, 110.
    assert chosen == [[65], [65], [65], [60, 50], [400]]


def test_the_pace_counts_tokens_and_steps():
    workload = SimpleNamespace(tokens=1000.0)
    settings = Settings(steps=10, lr=1e-3, warmup=1, weight_decay=0, eval_every=5, save_every=5, val_limit=0,
                        workload=workload)  # fmt: skip
    assert calibration.Pace(0.02, 0.1).expected(settings).expected_seconds == pytest.approx(21.0)


@pytest.mark.parametrize("seed", [0])
@pytest.mark.slow
def test_the_short_form_learns_the_task(tmp_path, monkeypatch, capsys, seed):
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", str(seed), "--out", str(tmp_path / "run")])
    train.main()
    said = capsys.readouterr().out
    result = json.loads((Path(tmp_path) / "run" / "comparison.json").read_text())
    right, total = result["exact"]["tuned"]
    assert total >= 100 and right / total >= 0.8, said
