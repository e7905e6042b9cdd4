"""sweep.py: which trials run, what comes of them, and what is refused. Most runs are of a stand-in for train.py, which
writes what train.py would; the last tests are of train.py itself."""

import dataclasses
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from support.helpers import chat_base, command, output_of, refusal_of
from support.runs import after_lines, lines, records

import sweep
import train
from common.errors import UserError
from training import sweep_words
from training.sweep_results import Result, RunOutcome, edge_remarks, read_outcome, rows_of_trials, sweep_table
from training.sweep_search import Search, combination
from training.sweep_words import Range, Sweep, num_rungs, read_values, sweep_arguments

ROOT = Path(__file__).resolve().parents[1]
BASE = "--data assets/booking_val.jsonl --steps 300"
# Loss: 1 at a rate of 1e-3, higher at others; a little less for higher ranks, and other for other seeds.
STAND_IN = """
import json, math, os, pathlib, sys, time
words = sys.argv[1:]
typed = dict(zip(words, words[1:]))
lr, rank, seed = float(typed.get("--lr", 1e-3)), int(typed.get("--rank", 8)), int(typed.get("--seed", 0))
steps, out = typed.get("--steps", "9"), pathlib.Path(typed["--out"])
with open(out.parent / "order.txt", "a") as file:
    file.write(f"{out.name} {os.environ.get('OMP_NUM_THREADS')}\\n")
if lr == 7 or "--dora" in words:
    print("something", flush=True)
    sys.exit(f"error: {out.name} can not go on")
if lr == 8:
    os.kill(os.getpid(), 9)
for _ in range(600 if lr == 9 and not (out / "again").exists() else 0):
    out.mkdir(exist_ok=True)
    (out / "again").touch()
    time.sleep(0.1)
for name in ("best", "final", "checkpoints/step-9"):
    (out / name).mkdir(parents=True, exist_ok=True)
loss = 1 + math.log10(lr / 1e-3) ** 2 - rank / 1000 + seed / 100 + 1 / int(steps)
metrics = [{"step": 0, "val_loss": 9.0}, {"step": 4, "loss": 2.0, "tokens_per_s": 5, "memory_mb": 1e3}]
metrics += [{"step": 4, "val_loss": loss, "kl_base": 0.5}, {"step": 9, "val_loss": loss + 0.1, "kl_base": 0.6}]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in metrics))
config = {"eval_metric": None, "forget_limit": None, "forget_data": None}
(out / "config.json").write_text(json.dumps(config))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """The folder of a sweep of the stand-in."""
    file = tmp_path / "stand_in.py"
    file.write_text(STAND_IN)
    monkeypatch.setattr(sweep, "TRAIN_SCRIPT", file)
    monkeypatch.chdir(ROOT)
    return tmp_path / "out"


def parse(typed: str) -> Sweep:
    return sweep_arguments(shlex.split(typed))


def program() -> list[str]:
    """What starts sweep.py with the stand-in as a process."""
    text = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sweep, pathlib\n"
    text += f"sweep.TRAIN_SCRIPT = pathlib.Path({str(sweep.TRAIN_SCRIPT)!r})\n"
    return [sys.executable, "-c", text + "from common.errors import run\nrun(sweep.main)"]


def order(out: Path) -> list[str]:
    return [line.split()[0] for line in (out / "order.txt").read_text().splitlines()]


# ---- what is typed ----


@pytest.mark.parametrize(
    ("name", "words", "values"),
    [
        ("lr", ["1e-4,3e-4", "1e-3"], ("1e-4", "3e-4", "1e-3")),
        ("lr", ["auto,1e-3"], ("auto", "1e-3")),
        ("lr", ["1e-5..1e-2"], Range(1e-5, 1e-2)),
        ("rank", ["2..64"], Range(2, 64)),
        ("method", ["lora,full"], ("lora", "full")),
        ("dora", ["yes,no"], ("yes", "no")),
        ("dora", [], ("yes",)),
        ("pack", ["no", "yes"], ("no", "yes")),
        ("targets", ["q_proj,v_proj", "all"], ("q_proj,v_proj", "all")),
        ("system", ["Be brief, please.", ""], ("Be brief, please.", "")),
        ("data", ["a.json=2", "b.json"], ("a.json=2", "b.json")),
    ],
)
def test_values_of_an_option(name, words, values):
    assert read_values(name, words) == values


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("lr", ["1e-4,1e-4"], "--lr 1e-4: comes twice"),
        ("lr", [","], "--lr: a value is wanted, or several"),
        ("lr", ["0..1"], "--lr 0..1: a range begins above 0 and ends at a higher number"),
        ("lr", ["2..1"], "a range begins above 0"),
        ("lr", ["1..nan"], "a range begins above 0"),
        ("lr", ["1..x"], "--lr 1..x: a range is two numbers, as 1e-5..1e-2"),
        ("rank", ["1.5..8"], "--rank 1.5..8: whole numbers are wanted"),
        ("dora", ["on"], "--dora on: yes or no is wanted, or both: yes,no"),
    ],
)
def test_what_are_no_values(name, words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        read_values(name, words)


def test_words_of_a_trial():
    typed = parse(f"--lr 1e-4,3e-4 --dora yes,no --pack yes,no --seq-len 64 --seed 0,1 -- {BASE}")
    assert typed.space == {"lr": ("1e-4", "3e-4"), "dora": ("yes", "no"), "pack": ("yes", "no")}
    assert typed.base == (*BASE.split(), "--seq-len", "64") and typed.seeds == ("0", "1")
    values = {"lr": "1e-4", "dora": "yes", "pack": "no"}
    assert typed.words_of(values, "1") == [*typed.base, "--lr", "1e-4", "--dora", "--no-pack", "--seed", "1"]
    assert typed.words_of({"dora": "no", "pack": "yes"}) == [*typed.base, "--pack"]
    halved = parse(f"--lr 1e-4..1e-2 --trials 9 --search halving -- {BASE}")
    assert halved.words_of({}, None, 1 / 9)[-2:] == ["--steps", "33"] and halved.words_of({})[-2:] == ["--steps", "300"]
    epochs = parse("--lr 1,2,3 --trials 3 --search halving -- --data assets/booking_val.jsonl --epochs 3")
    assert epochs.words_of({}, None, 1 / 3)[-2:] == ["--epochs", "1"]


@pytest.mark.parametrize(
    ("typed", "search", "trials"),
    [
        ("--lr 1,2 --rank 1,2,3", "grid", 6),
        ("--lr 1,2 --rank 1,2,3 --trials 9", "grid", 6),
        ("--lr 1,2 --rank 1,2,3 --trials 4", "tpe", 4),
        ("--lr 1..2 --trials 4", "tpe", 4),
        ("--lr 1..2 --trials 4 --search random", "random", 4),
        ("--lr 1,2 --trials 4 --search random", "random", 2),
    ],
)
def test_the_search_that_is_chosen(typed, search, trials, monkeypatch):
    found = parse(f"{typed} -- {BASE}")
    assert (found.search, found.trials) == (search, trials)
    if search == "tpe":
        find = sweep_words.importlib.util.find_spec
        monkeypatch.setattr(
            sweep_words.importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name)
        )
        assert parse(f"{typed} -- {BASE}").search == "random"
        with pytest.raises(UserError, match="--search tpe: Optuna is not installed; pip install optuna"):
            parse(f"{typed} --search tpe -- {BASE}")


REFUSED = [
    ("", "nothing to compare: no option has several values"),
    ("--lr 1e-4", "nothing to compare: no option has several values"),
    ("--seed 0,1", "nothing to compare: --seed alone repeats one trial"),
    ("--lr 1,2 --seed 1..4", "--seed: a trial is repeated with each of its seeds; list them"),
    ("--lr 1..2", "--lr 1..2: say how many are drawn: --trials N"),
    ("--lr 1..2 --trials 3 --search grid", "--lr 1..2: a grid has no ranges, list values"),
    ("--lr 1,2,3 --trials 2 --search grid", "--search grid: has 3 combinations, more than --trials 2"),
    ("--lr 1,2 --search random", "--search random: draws trials; say how many: --trials N"),
    ("--lr 1,2 --trials 0", "--trials 0: must be above 0"),
    ("--lr 1,2 --at-once 0", "--at-once 0: must be above 0"),
    ("--lr 1,0", "--lr 0: must be above 0 (in the trial with --lr 0)"),
    ("--rank 4,8 --method lora,full", "not for --method full (in the trial with --rank 4 --method full)"),
    ("--lrr 1,2", "--lrr: no such flag; did you mean --lr?"),
    ("--learning-rate 1,2", "--learning-rate: no such flag; here it is --lr 1,2"),
    ("--lr 1,2 -- --out x", "--out: stands before the --"),
    ("--lr 1,2 -- --plan", "--plan: is not for the runs of a sweep"),
    ("--lr 1,2 --device cpu,cuda", "--device: says where a run computes or reports; give one value"),
    ("--lr 1,2 --eval-metric exact,f1", "--eval-metric: says by what the trials are compared; give one value"),
    ("--objective sft,dft", "--objective: its values have validation losses that can't be compared; add --eval-metric"),
    ("--seq-len 64,128", "--seq-len: its values have validation losses that can't be compared"),
    ("--data assets/booking_val.jsonl assets/booking_train.jsonl", "can't be compared; give the same --val for all"),
    ("--lr 1,2 -- --val-fraction 0", "--val-fraction 0: without validation no trial has a score"),
    ("--lr 1,2,3 --trials 3 --search halving -- --steps 9", "the first of 2 rungs would train 3.0 of --steps 9"),
    ("--steps 10,20 --lr 1,2,3 --trials 3 --search halving", "--search halving: says itself how long each run is"),
    ("--resume", "--resume: needs --out, the folder of the sweep that is to go on"),
    ("--resume --out nowhere", "--resume: no sweep in nowhere (sweep.json)"),
    ("--resume --out nowhere --lr 1,2", "--resume: the sweep goes on as it was begun; leave --lr out"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "said"), REFUSED, ids=[typed for typed, _ in REFUSED])
def test_what_is_refused(typed, said, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    own, sign, base = typed.partition("--  ") if "-- " not in typed else typed.partition("-- ")
    words = f"{own}" if "--resume" in typed else f"{own} -- --data assets/booking_val.jsonl {base if sign else ''}"
    if "data assets" in own:
        words = f"{own} -- --steps 4"
    with pytest.raises(UserError) as error:
        parse(words)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_options_that_change_the_loss_go_with_a_score_of_answers():
    assert parse(f"--objective sft,dft --eval-metric exact -- {BASE}").trials == 2
    assert parse("--data a.json b.json -- --val assets/booking_val.jsonl --steps 4").trials == 2


def test_lengths_that_differ_between_trials_are_refused(monkeypatch):
    with pytest.raises(UserError, match="give --steps N behind --"):
        parse("--lr 1,2")
    with pytest.raises(UserError, match="--search halving: trains parts of a run; say how long a whole one is"):
        parse("--lr 1,2,3 --trials 3 --search halving -- --data assets/booking_val.jsonl")
    assert parse("--lr 1,2 -- --full-run").trials == 2


@pytest.mark.parametrize("words", ["--search grid", "--draw-seed 5", "--processes 2", "--trials 3"])
def test_a_resumed_sweep_takes_no_other_flags(words, tmp_path, monkeypatch):
    sweep_words.save_sweep(parse(f"--lr 1,2 --at-once 2 --out {tmp_path} -- {BASE}"))
    with pytest.raises(UserError, match=f"the sweep goes on as it was begun; leave {words.split()[0]} out"):
        parse(f"--resume --out {tmp_path} {words}")
    assert parse(f"--resume --out {tmp_path}").at_once == 2
    assert parse(f"--resume --out {tmp_path} --at-once 1").at_once == 1
    with pytest.raises(UserError, match="--at-once 0: must be above 0"):
        parse(f"--resume --out {tmp_path} --at-once 0")


def test_a_range_is_the_same_when_the_sweep_is_resumed(tmp_path):
    begun = parse(f"--lr 0.000123456789..0.01 --trials 3 --out {tmp_path} -- {BASE}")
    sweep_words.save_sweep(begun)
    assert parse(f"--resume --out {tmp_path}").space == begun.space


def test_a_folder_that_is_used_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="holds something else; name another folder"):
        parse(f"--lr 1,2 --out {tmp_path} -- {BASE}")
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="holds a sweep already; name another folder, or add --resume"):
        parse(f"--lr 1,2 --out {tmp_path} -- {BASE}")
    for text in ("{}", '{"space": 3, "directory": "/"}', '{"directory": "/", "space": {}, "base": [], "other": 1}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(UserError, match="is not a file of sweep.py"):
            parse(f"--resume --out {tmp_path}")


# ---- which trials ----


def trials_of(typed: str, score=lambda trial: 1.0) -> list[list]:
    """The rounds of a search. score: of a trial; None where it fails."""
    return rounds_of(parse(f"{typed} -- {BASE}"), score)


def rounds_of(found: Sweep, score) -> list[list]:
    results: list[Result] = []
    rounds = []
    for trials in Search(found).rounds(results):
        rounds.append(trials)
        for trial in trials:
            for seed in found.seeds or [None]:
                results.append(result(trial.number, score(trial), trial.values, trial.rung, seed))
    return rounds


def result(number, score, values=None, rung=None, seed=None, higher=False, loss=None) -> Result:
    outcome = None
    if score is not None:
        loss = score if loss is None else loss
        outcome = RunOutcome(score, "validation loss", higher, loss, 9, 5.0, "best", 0.1, 1e3)
    return Result(f"trial-{number}", number, rung, values or {}, seed, 1.0, "" if outcome else "died", outcome)


def test_a_grid_has_every_combination_in_order():
    (trials,) = trials_of("--lr 1,2 --method lora,full --warmup 1,2,3")
    wanted = [dict(zip(("lr", "method", "warmup"), v)) for v in itertools.product("12", ("lora", "full"), "123")]
    assert [trial.values for trial in trials] == wanted and [trial.number for trial in trials] == [*range(1, 13)]


def test_drawn_trials_are_all_different_and_follow_from_the_seed():
    typed = "--lr 1,2,3,4 --rank 1,2,3 --trials 9 --search random"
    (trials,) = trials_of(typed)
    assert len({tuple(trial.values.items()) for trial in trials}) == 9
    assert trials_of(typed) == [trials] and trials_of(f"{typed} --draw-seed 1") != [trials]
    with pytest.raises(UserError, match="--trials 20: the ranges have only 3 different values"):
        trials_of("--rank 1..3 --trials 20 --search random")


def test_combinations_are_drawn_from_a_grid_that_is_never_built():
    space = {"lr": ("1", "2"), "method": ("lora", "full"), "warmup": ("1", "2", "3")}
    grid = [dict(zip(space, values)) for values in itertools.product(*space.values())]
    assert [combination(space, number) for number in range(12)] == grid
    found = dataclasses.replace(parse(f"--lr 1,2 --trials 2 --search random -- {BASE}"), trials=5)
    drawn = Search(dataclasses.replace(found, space=space)).combinations()
    assert drawn == random.Random(0).sample(grid, 5)
    many = dataclasses.replace(found, space={name: tuple("123456789") for name in "abcdefghijkl"})
    assert len(Search(many).combinations()) == 5


def test_a_range_is_drawn_by_its_logarithm():
    (trials,) = trials_of("--lr 1e-5..1e-1 --rank 1..64 --trials 400 --search random")
    rates = [math.log10(float(trial.values["lr"])) for trial in trials]
    assert min(rates) >= -5 and max(rates) <= -1
    # Of 400, a hundred fall into each factor of ten; 5 standard deviations are 43.
    for place in range(-5, -1):
        assert abs(sum(place <= rate < place + 1 for rate in rates) - 100) < 43
    assert {int(trial.values["rank"]) for trial in trials} <= {*range(1, 65)}


def test_successive_halving_keeps_a_third_and_trains_it_three_times_as_long():
    assert [num_rungs(n) for n in (1, 2, 3, 8, 9, 26, 27, 81)] == [1, 1, 2, 2, 3, 3, 4, 5]
    typed = "--lr 1e-5..1e-1 --trials 27 --search halving --seed 0,1"
    rounds = trials_of(typed, lambda trial: float(trial.values["lr"]))
    assert [len(trials) for trials in rounds] == [27, 9, 3, 1]
    assert [trials[0].share for trials in rounds] == pytest.approx([1 / 27, 1 / 9, 1 / 3, 1])
    by_rate = sorted(rounds[0], key=lambda trial: float(trial.values["lr"]))
    for count, trials in zip((9, 3, 1), rounds[1:]):
        assert {trial.number for trial in trials} == {trial.number for trial in by_rate[:count]}
    assert Search(parse(f"{typed} -- {BASE}")).total_cost == 2 * 4 * 27
    # Those that die are not kept.
    rounds = trials_of(typed, lambda trial: None if trial.number % 3 else 1.0)
    assert all(trial.number % 3 == 0 for trial in rounds[1])
    assert len(trials_of(typed, lambda trial: None)) == 1


def test_tpe_is_optunas_own(tmp_path):
    typed = f"--lr 1e-5..1e-1 --rank 1,2,4 --trials 14 --out {tmp_path}"

    def score(trial) -> float:
        return abs(math.log10(float(trial.values["lr"])) + 3) + int(trial.values["rank"]) / 10

    found = parse(f"{typed} -- {BASE}")
    rounds = rounds_of(found, score)
    assert [len(trials) for trials in rounds] == [1] * 14
    # The twelfth is what Optuna chooses after the eleven before it.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=11))
    space = {
        "lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True),
        "rank": optuna.distributions.CategoricalDistribution(("1", "2", "4")),
    }
    before = [trials[0] for trials in rounds[:11]]
    for trial in sorted(before, key=lambda trial: (score(trial), trial.number)):
        params = {"lr": float(trial.values["lr"]), "rank": trial.values["rank"]}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=score(trial)))
    asked = study.ask(space).params
    assert rounds[11][0].values == {"lr": f"{asked['lr']:.2g}", "rank": asked["rank"]}
    # What was chosen stays, whatever the results were.
    results = [result(1, 1.0, rounds[0][0].values)]
    same = next(Search(found).rounds(results))[0]
    assert (same.number, same.values) == (2, rounds[1][0].values)


def test_a_resumed_tpe_runs_the_seeds_that_are_missing(tmp_path):
    found = parse(f"--lr 1e-5..1e-1 --trials 2 --seed 0,1 --search tpe --out {tmp_path} -- {BASE}")
    (first,) = next(Search(found).rounds([]))
    (again,) = next(Search(found).rounds([result(1, 1.0, first.values, seed="0")]))
    assert again == first
    (second,) = next(Search(found).rounds([result(1, 1.0, first.values, seed=seed) for seed in "01"]))
    assert second.number == 2


# ---- what came of a run ----


def written(folder: Path, *validations: dict, **config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in validations))
    config = {"eval_metric": None, "forget_limit": None, "forget_data": None} | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_score_is_that_of_the_best_validation_after_the_start(tmp_path):
    losses = (1.0, 3.0, 2.0, None, 2.5)
    run = written(tmp_path, *({"step": i, "val_loss": loss, "kl_base": i / 10} for i, loss in enumerate(losses)))
    outcome, error = read_outcome(run)
    assert not error and (outcome.score, outcome.step, outcome.first, outcome.kl_base) == (2.0, 2, 1.0, 0.2)
    assert not outcome.is_better_than_first and outcome.weights == "final"
    (run / "best").mkdir()
    assert read_outcome(run)[0].weights == "best"


def test_a_score_of_answers_is_the_highest_and_the_loss_decides_between_equal_ones(tmp_path):
    rows = [(0, 2.0, 0.0), (1, 1.0, 50.0), (2, 0.9, 75.0), (3, 0.8, 75.0), (4, 0.7, 60.0)]
    run = written(tmp_path, *({"step": s, "val_loss": v, "val_exact": e} for s, v, e in rows), eval_metric="exact")
    outcome, _ = read_outcome(run)
    assert (outcome.score, outcome.loss, outcome.step, outcome.higher) == (75.0, 0.8, 3, True)
    assert outcome.key == -75 and outcome.is_better_than_first


def test_what_has_forgotten_too_much_has_no_score(tmp_path):
    rows = [{"step": s, "val_loss": v, "kl_base": k, "general_loss_rise": g}
            for s, v, k, g in ((0, 2.0, 0.0, 0.0), (1, 1.5, 0.1, 0.5), (2, 1.0, 0.4, 0.1))]  # fmt: skip
    assert read_outcome(written(tmp_path, *rows, forget_limit=0.2))[0].step == 1
    assert read_outcome(written(tmp_path, *rows, forget_limit=0.2, forget_data="x"))[0].step == 2
    assert read_outcome(written(tmp_path, *rows, forget_limit=0.05)) == (
        None,
        "no validation under --forget-limit 0.05",
    )
    assert read_outcome(written(tmp_path, rows[0]))[1] == "no validation after the training, so it has no score"


def test_trials_are_compared_by_the_mean_of_their_seeds():
    results = [result(1, 1.0, seed="0"), result(1, 3.0, seed="1"), result(2, 1.5, seed="0"), result(2, 1.7, seed="1")]
    results += [result(3, 0.1, seed="0"), result(3, None, seed="1")]
    rows = rows_of_trials(results)
    # One whose other seed has died is behind those of which none has.
    assert [row.number for row in rows] == [2, 1, 3]
    assert (rows[0].mean, rows[0].low, rows[0].high) == (pytest.approx(1.6), 1.5, 1.7)
    higher = rows_of_trials([result(1, 5.0, higher=True, loss=1.0), result(2, 7.0, higher=True, loss=2.0)])
    assert [row.number for row in higher] == [2, 1]
    rungs = rows_of_trials([result(1, 1.0, rung=0), result(2, 2.0, rung=0), result(2, 1.8, rung=1)])
    assert [(row.number, row.rung) for row in rungs] == [(2, 1), (1, 0)]


@pytest.mark.parametrize(
    ("typed", "best", "said"),
    [
        ("--lr 1e-4,3e-4,1e-3", {"lr": "3e-4"}, []),
        (
            "--lr 1e-3,1e-4",
            {"lr": "1e-3"},
            ["the best --lr, 1e-3, is at the highest end of what was tried; one above it"],
        ),
        ("--rank 2,4", {"rank": "2"}, ["the best --rank, 2, is at the lowest end of what was tried; one below it"]),
        ("--method lora,full", {"method": "lora"}, []),
        ("--lr 1e-5..1e-1 --trials 2", {"lr": "0.05"}, ["is at the highest end"]),
        ("--lr 1e-5..1e-1 --trials 2", {"lr": "0.03"}, []),
    ],
)
def test_a_best_value_at_the_end_of_its_range_is_said(typed, best, said):
    (row,) = rows_of_trials([result(1, 1.0, best)])
    remarks = edge_remarks(parse(f"{typed} -- {BASE}"), row)
    assert len(remarks) == len(said) and all(a in b for a, b in zip(said, remarks))


# ---- sweeps of the stand-in ----


def test_a_sweep_ends_with_table_picture_weights_and_command(stand_in, monkeypatch, capsys):
    out = output_of(
        sweep, monkeypatch, capsys, "--lr", "1e-4,1e-3,1e-2", "--rank", "4,8", "--out", stand_in, "--", *BASE.split()
    )
    assert order(stand_in) == [f"trial-00{i}" for i in range(1, 7)]
    assert "sweep     6 trials of --lr and --rank, every combination" in out
    assert re.search(r"trial-001 --lr 1e-4 --rank 4: validation loss 1\.99\d\d, \d+ s, \d+ s left", out)
    table = (stand_in / "table.txt").read_text()
    assert table in out and [line.split()[0] for line in table.splitlines()[2:]] == ["4", "3", "2", "6", "1", "5"]
    assert (stand_in / "sweep.png").read_bytes()[:4] == b"\x89PNG" and (stand_in / "sweep.png").stat().st_size > 10_000
    assert "the best --rank, 8, is at the highest end" in out and "the best --lr" not in out
    assert f"best      trial 4, validation loss 0.9953; its weights: {stand_in / 'trial-004' / 'best'}" in out
    assert f"command   python train.py {BASE} --lr 1e-3 --rank 8" in out
    kept = {path.parent.name for path in stand_in.glob("trial-*/best")}
    assert kept == {"trial-004"} and len([*stand_in.glob("trial-*/metrics.jsonl")]) == 6
    # A sweep that has ended trains nothing more.
    (stand_in / "order.txt").write_text("")
    again = output_of(sweep, monkeypatch, capsys, "--out", stand_in, "--resume")
    assert order(stand_in) == [] and table in again and "6 runs done before" in again


def test_weights_are_kept_where_asked_for_and_seeds_are_means(stand_in, monkeypatch, capsys):
    words = ["--lr", "1e-3,2e-3", "--seed", "0,3", "--keep-all", "--out", stand_in, "--", *BASE.split()]
    out = output_of(sweep, monkeypatch, capsys, *words)
    assert len([*stand_in.glob("trial-*/best")]) == 4
    assert order(stand_in) == [f"trial-00{i}-seed-{seed}" for i in (1, 2) for seed in (0, 3)]
    assert re.search(r"^1 +1e-3 +1\.0103 +0\.9953 to 1\.0253 +2 ", out, re.MULTILINE)
    assert "command   python train.py --data assets/booking_val.jsonl --steps 300 --lr 1e-3 --seed 0" in out


def test_the_weights_of_the_best_run_of_the_best_trial_are_there(stand_in, monkeypatch, capsys):
    # The second trial is the better one, and its first seed the better run, which ends when no other has.
    words = ["--lr", "2e-3,1e-3", "--seed", "0,3", "--out", stand_in, "--", *BASE.split()]
    out = output_of(sweep, monkeypatch, capsys, *words)
    best = stand_in / "trial-002-seed-0" / "best"
    assert [*stand_in.glob("trial-*/best")] == [best] and f"its weights: {best}" in out


def test_a_trial_that_dies_is_counted_and_the_others_go_on(stand_in, monkeypatch, capsys):
    words = ["--lr", "7,8,1e-3,2e-3", "--out", stand_in, "--", *BASE.split()]
    out = output_of(sweep, monkeypatch, capsys, *words)
    assert "trial-001 --lr 7: FAILED, exit code 1: error: trial-001 can not go on" in out
    assert "trial-002 --lr 8: FAILED, killed by SIGKILL; the last line of its log: it said nothing" in out
    assert f"WARNING   2 runs of 4 failed; the lines above and the logs in {stand_in} say why" in out
    assert "best      trial 3" in out and "something\n" in (stand_in / "trial-001.log").read_text()
    # They are tried again, and only they.
    (stand_in / "order.txt").write_text("")
    again = output_of(sweep, monkeypatch, capsys, "--out", stand_in, "--resume")
    assert order(stand_in) == ["trial-001", "trial-002"] and "2 runs done before, 2 runs failed: tried again" in again


def test_trials_that_all_die_end_the_sweep(stand_in, monkeypatch, capsys):
    words = ["--lr", "1,2,3,4,5", "--out", stand_in, "--", *BASE.split(), "--dora"]
    _, err, code = command(sweep, monkeypatch, capsys, *words)
    said = "error: the first 3 runs have ended with the same words, and no other has ended: exit code 1: error: "
    assert code == 2 and err.startswith(said) and err.count("\n") == 1
    assert len(order(stand_in)) == 3
    two = ["--lr", "7,8", "--out", stand_in.parent / "two", "--", *BASE.split()]
    _, err, code = command(sweep, monkeypatch, capsys, *two)
    assert code == 2 and err.startswith("error: none of 2 runs has a score; the first, trial-001: exit code 1")


def test_nothing_is_written_where_the_values_are_too_few(stand_in, monkeypatch, capsys):
    words = ["--rank", "1..3", "--trials", 20, "--search", "random", "--out", stand_in, "--", *BASE.split()]
    refused = refusal_of(sweep, monkeypatch, capsys, *words)
    assert "--trials 20: the ranges have only 3 different values" in refused and not stand_in.exists()


def test_a_run_that_leaves_no_measurements_is_counted_and_the_others_go_on(stand_in, monkeypatch, capsys):
    with sweep.TRAIN_SCRIPT.open("a") as file:
        file.write("if lr == 6:\n    (out / 'metrics.jsonl').unlink()\n")
    out = output_of(sweep, monkeypatch, capsys, "--lr", "6,1e-3", "--out", stand_in, "--", *BASE.split())
    assert "trial-001 --lr 6: FAILED, what it measured can't be read" in out and "best      trial 2" in out


def test_a_result_that_was_written_in_part_is_measured_again(stand_in, monkeypatch, capsys):
    words = ["--lr", "1e-3,2e-3", "--out", stand_in, "--", *BASE.split()]
    output_of(sweep, monkeypatch, capsys, *words)
    file = stand_in / "results.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-20])
    (stand_in / "order.txt").write_text("")
    output_of(sweep, monkeypatch, capsys, "--out", stand_in, "--resume")
    assert order(stand_in) == ["trial-002"] and file.read_text().count("\n") == 2
    file.write_text("no results\n")
    refused = refusal_of(sweep, monkeypatch, capsys, "--out", stand_in, "--resume")
    assert f"{file}: is not a file of sweep.py" in refused and file.read_text() == "no results\n"


def test_the_words_of_a_run_of_several_processes_are_its_own(tmp_path):
    log = tmp_path / "log"
    log.write_text("step 1\nrank 1: error: the loss is nan\nE1201 torch/elastic: failed\n" + "=" * 60 + "\n")
    assert sweep.last_words(log, 1) == "exit code 1: rank 1: error: the loss is nan"
    log.write_text("error: an old one\n" + "x\n" * 20_000)
    assert sweep.last_words(log, 1) == "exit code 1: x"


def test_the_command_is_that_of_the_winner_with_its_processes_and_its_steps(stand_in, monkeypatch, capsys):
    found = parse(f"--lr 1e-3,2e-3,3e-3 --trials 3 --search halving --processes 2 --out {stand_in} -- {BASE}")
    # The run of all steps has died, so that the best is one of the first rung.
    results = [result(n, float(n), {"lr": f"{n}e-3"}, rung=0) for n in (1, 2, 3)]
    results.append(result(1, None, {"lr": "1e-3"}, rung=1))
    stand_in.mkdir()
    sweep.report_sweep(found, results)
    typed = "torchrun --standalone --nproc-per-node 2 train.py"
    assert f"command   {typed} {BASE} --lr 1e-3 --steps 100\n" in capsys.readouterr().out


def test_a_signal_that_comes_while_a_run_is_started_ends_it(stand_in, monkeypatch, capsys):
    class Signalled(subprocess.Popen):
        def __init__(self, *words, **options):
            super().__init__(*words, **options)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sweep.subprocess, "Popen", Signalled)
    begin = time.monotonic()
    words = ["--lr", "9,1e-3", "--out", stand_in, "--", *BASE.split()]
    out, _, code = command(sweep, monkeypatch, capsys, *words)
    # Without the signal it would take a minute.
    assert code == 128 + signal.SIGTERM and "stopped   go on by" in out and time.monotonic() - begin < 30


def test_several_at_once_share_the_cores(stand_in, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = ["--lr", "1e-3,2e-3,3e-3", "--at-once", 2, "--out", stand_in, "--", *BASE.split()]
    output_of(sweep, monkeypatch, capsys, *words)
    threads = {line.split()[1] for line in (stand_in / "order.txt").read_text().splitlines()}
    from common.threads import num_threads

    assert threads == {str(max(1, num_threads() // 2))} and len(order(stand_in)) == 3


def test_halving_runs_fewer_and_longer(stand_in, monkeypatch, capsys):
    words = ["--lr", "1e-5..1e-1", "--trials", 9, "--search", "halving", "--out", stand_in, "--", *BASE.split()]
    out = output_of(sweep, monkeypatch, capsys, *words)
    rungs = [name.partition("rung-")[2] for name in order(stand_in)]
    assert rungs == ["1"] * 9 + ["2"] * 3 + ["3"]
    steps = {json.loads(line)["outcome"]["score"] for line in (stand_in / "results.jsonl").open()}
    assert len(steps) == 13 and re.search(r" 1/3 .*\n.* 1/3 .*\n.* 1/9 ", out) and "command   python train.py" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_a_resumed_sweep_goes_on(stand_in, number):
    words = ["--lr", "1e-3,9,2e-3", "--out", str(stand_in), "--", *BASE.split()]
    started = subprocess.Popen([*program(), *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (stand_in / "trial-002" / "again").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    started.send_signal(number)
    out, _ = started.communicate(timeout=30)
    assert started.returncode == 128 + number
    assert f"stopped   go on by: python sweep.py --out {stand_in} --resume" in out
    again = [*program(), "--out", str(stand_in), "--resume"]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert order(stand_in) == ["trial-001", "trial-002", "trial-002", "trial-003"]
    assert "1 run done before" in done.stdout and "best      trial 1" in done.stdout


def test_a_sweep_is_resumed_where_it_was_begun_and_by_one_process(stand_in, tmp_path, monkeypatch, capsys):
    words = ["--lr", "1e-3,2e-3", "--out", stand_in, "--", *BASE.split()]
    output_of(sweep, monkeypatch, capsys, *words)
    from common.folder_lock import FolderLock

    with FolderLock() as lock:
        lock.acquire(stand_in)
        assert "is writing into it" in refusal_of(sweep, monkeypatch, capsys, "--out", stand_in, "--resume")
    monkeypatch.chdir(tmp_path)
    refused = refusal_of(sweep, monkeypatch, capsys, "--out", stand_in, "--resume")
    assert f"--resume: the sweep was begun in {ROOT}; start from there" in refused


def test_a_second_signal_ends_the_run_at_once(stand_in):
    # A run that does not hear the first one.
    sweep.TRAIN_SCRIPT.write_text("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + STAND_IN)
    words = ["--lr", "9,2e-3", "--out", str(stand_in), "--", *BASE.split()]
    started = subprocess.Popen([*program(), *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (stand_in / "trial-001" / "again").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(1)
    started.send_signal(signal.SIGTERM)
    out, _ = started.communicate(timeout=30)
    assert started.returncode == 128 + signal.SIGTERM and "stopped   go on by" in out


def test_a_sweep_goes_on_where_nobody_reads_what_it_prints(stand_in):
    words = ["--lr", "1e-3,2e-3,3e-3", "--out", str(stand_in), "--", *BASE.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen([*program(), *words], cwd=ROOT, **pipes)
    assert started.stdout.readline().startswith("sweep     3 trials")
    started.stdout.close()
    said = started.stderr.read()
    assert started.wait(60) == 0 and "Traceback" not in said and "stdout is closed" in said
    assert len(order(stand_in)) == 3 and (stand_in / "sweep.png").is_file()


def test_a_folder_of_any_name_is_named_so_that_it_can_be_typed(stand_in, monkeypatch, capsys):
    monkeypatch.chdir(stand_in.parent)
    base = ["--data", ROOT / "assets/booking_val.jsonl", "--system", "It's ü $x", "--steps", "9"]
    out = output_of(sweep, monkeypatch, capsys, "--lr", "1e-3,2e-3", "--out", "a b/ü $x", "--", *base)
    typed = shlex.split(re.search(r"command   python train.py (.*)", out)[1])
    assert typed == [*map(str, base), "--lr", "1e-3"] and Path("a b/ü $x/sweep.png").is_file()


def test_each_of_several_runs_has_gpus_of_its_own(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = parse(f"--lr 1,2 --at-once 2 --processes 2 -- {BASE}")
    assert sweep.devices_of_slots(found) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,6")
    one_each = dataclasses.replace(found, processes=1)
    assert sweep.devices_of_slots(one_each) == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "7"}]
    with pytest.raises(UserError, match="--at-once 2: takes 4 GPUs, and there are 3"):
        sweep.devices_of_slots(found)


def test_a_long_table_has_the_best_and_names_those_without_a_score():
    found = parse(f"--lr 1e-5..1e-1 --trials 40 -- {BASE}")
    results = [result(n, 100.0 - n, {"lr": f"{n}e-4"}) for n in range(1, 36)] + [result(36, None, {"lr": "1"})]
    rows = sweep_table(found, results).splitlines()
    assert [line.split()[0] for line in rows[2:32]] == [str(n) for n in range(35, 5, -1)]
    assert rows[32:] == ["(5 more in results.jsonl)", "trial 36 (--lr 1): died"]


# ---- sweeps of train.py ----


def test_the_winners_command_gives_the_winner_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chat_base(tmp_path / "base")
    records(tmp_path / "train.jsonl", 24, 0)
    words = "--model base --data train.jsonl --val-fraction 0.3 --steps 3 --batch-size 4 --dtype fp32 --device cpu"
    out = output_of(sweep, monkeypatch, capsys, "--lr", "1e-2,1e-5", "--rank", 2, "--out", "mine", "--", *words.split())
    typed = shlex.split(re.search(r"command   python (train.py .*)", out)[1])
    assert typed[-4:] == ["--rank", "2", "--lr", "1e-2"]
    output_of(train, monkeypatch, capsys, *typed[1:], "--out", "again")
    assert lines(Path("again"))[-1]["val_loss"] == lines(Path("mine/trial-001"))[-1]["val_loss"]
    assert Path("mine/trial-001/final/adapter_model.safetensors").is_file()
    assert os.listdir("mine").count("sweep.png") == 1


def test_a_training_that_diverges_is_counted_and_named_by_its_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chat_base(tmp_path / "base")
    records(tmp_path / "train.jsonl", 24, 0)
    words = "--model base --data train.jsonl --val-fraction 0.3 --steps 3 --batch-size 4 --dtype fp32 --device cpu"
    typed = ["--lr", "1e9,1e-3", "--out", "mine", "--", *words.split(), "--method", "full"]
    out = output_of(sweep, monkeypatch, capsys, *typed)
    assert re.search(r"trial-001 --lr 1e9: FAILED, exit code 2: error: .* is nan; stopped, try a lower --lr", out)
    assert "WARNING   1 run of 2 failed" in out and "best      trial 2" in out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_sweep_has_the_results_of_a_whole_one(number, tmp_path):
    chat_base(tmp_path / "base")
    records(tmp_path / "train.jsonl", 24, 0)
    words = "--model base --data train.jsonl --val-fraction 0.3 --steps 40 --eval-every 10 --batch-size 4 --dtype fp32"
    line = [sys.executable, str(ROOT / "sweep.py"), "--lr", "1e-3,1e-2"]
    base = ["--", *words.split(), "--device", "cpu"]
    subprocess.run([*line, "--out", "whole", *base], cwd=tmp_path, check=True, capture_output=True)
    started = subprocess.Popen([*line, "--out", "cut", *base], cwd=tmp_path, stdout=subprocess.DEVNULL)
    reached = after_lines(tmp_path / "cut/trial-001", 12, 0)
    while not reached():
        assert started.poll() is None
        time.sleep(0.02)
    started.send_signal(number)
    started.wait(60)
    again = [*line[:2], "--out", "cut", "--resume"]
    while (done := subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=False)).returncode:
        # A run whose sweep was killed goes on by itself; until it has ended it is named.
        assert number == signal.SIGKILL and "from an earlier start; wait for it or end it" in done.stderr
        time.sleep(1)
    scores = [
        [json.loads(each)["outcome"]["score"] for each in (tmp_path / name / "results.jsonl").open()]
        for name in ("whole", "cut")
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 2
