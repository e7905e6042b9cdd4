"""`evaluate.py continual`: the matrix of tasks after trainings, transfer and forgetting."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from support.helpers import chat_base, command, output_of
from support.runs import records

import evaluate
from checkpoint import load_model
from data import load
from evals.continual import notes_on_order, transfer_of
from evals.loss import loss
from lora import add_lora, load_adapter, lora_layers, save_adapter
from tokenizer import load_tokenizer


def test_transfer_and_forgetting_of_three_tasks_by_hand():
    matrix = np.array([[90.0, 20.0, 10.0], [95.0, 80.0, 15.0], [60.0, 70.0, 85.0]])
    found = transfer_of(matrix, np.array([10.0, 5.0, 12.0]))
    assert found["average"] == pytest.approx((60 + 70 + 85) / 3)
    assert found["backward transfer"] == pytest.approx(((60 - 90) + (70 - 80)) / 2)
    # The first task was at its best after the second training.
    assert found["forgetting"] == pytest.approx(((95 - 60) + (80 - 70)) / 2)
    assert found["forward transfer"] == pytest.approx(((20 - 5) + (15 - 12)) / 2)
    assert "forward transfer" not in transfer_of(matrix)


def test_they_equal_their_definitions_written_as_loops_on_200_random_matrices():
    rng = np.random.default_rng(0)
    for _ in range(200):
        T = int(rng.integers(2, 7))
        # Few different numbers, so that there are ties.
        R = rng.integers(0, 5, (T, T)).astype(float)
        b = rng.integers(0, 5, T).astype(float)
        average = sum(R[T - 1][i] for i in range(T)) / T
        backward = sum(R[T - 1][i] - R[i][i] for i in range(T - 1)) / (T - 1)
        forward = sum(R[i - 1][i] - b[i] for i in range(1, T)) / (T - 1)
        forgetting = sum(max(R[j][i] for j in range(T - 1)) - R[T - 1][i] for i in range(T - 1)) / (T - 1)
        found = transfer_of(R, b)
        expected = [average, backward, forgetting, forward]
        names = ["average", "backward transfer", "forgetting", "forward transfer"]
        assert [found[name] for name in names] == pytest.approx(expected)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A base, two adapters on it as two trainings leave them, and two files."""
    folder = tmp_path_factory.mktemp("tasks")
    base = chat_base(folder / "base")
    model = load_model(base)
    add_lora(model, rank=2, alpha=4.0)
    for number in (1, 2):
        torch.manual_seed(number)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.2 * number)
        save_adapter(model, folder / f"run{number}/final")
    (folder / "run1/metrics.jsonl").touch()
    files = [records(folder / f"task{number}.jsonl", 6, 100 * number) for number in (1, 2)]
    return folder, files


def measured(monkeypatch, capsys, *words) -> str:
    return output_of(evaluate, monkeypatch, capsys, "continual", *words)


def refused(monkeypatch, capsys, *words) -> str:
    _, err, code = command(evaluate, monkeypatch, capsys, "continual", *words)
    assert code == 2
    return err.strip().splitlines()[-1]


def numbers_of(out: str, row: str) -> list[float]:
    (line,) = re.findall(rf"^{row} +((?:[-+]?\d+\.\d+\s*)+)", out, re.MULTILINE)
    return [float(word) for word in line.split()]


def test_the_matrix_is_the_loss_of_each_task_by_each_model(tasks, monkeypatch, capsys):
    folder, files = tasks
    # The folder of a run, and an adapter folder.
    runs = [folder / "run1", folder / "run2/final"]
    out = measured(monkeypatch, capsys, *runs, "--data", *files, "--dtype", "fp32")
    expected = []
    for adapter in (None, "run1/final", "run2/final"):
        model = load_model(folder / "base")
        if adapter:
            load_adapter(model, folder / adapter)
        tokenizer = load_tokenizer(folder / "base")
        expected.append([loss(model, load([file], tokenizer, 512))["loss"] for file in files])
    matrix = np.array([numbers_of(out, name) for name in ("base", "after 1", "after 2")])
    assert matrix == pytest.approx(np.array(expected), abs=6e-5)
    wanted = transfer_of(-np.array(expected[1:]), -np.array(expected[0]))
    assert numbers_of(out, "average loss") == pytest.approx([-wanted["average"]], abs=6e-5)
    for name in ("backward transfer", "forgetting", "forward transfer"):
        assert numbers_of(out, name) == pytest.approx([wanted[name]], abs=6e-5)
    assert "loss     1 task1.jsonl  2 task2.jsonl" in out


def test_runs_that_do_not_follow_each_other_are_noted(tmp_path):
    runs = []
    for name, start in (("one", None), ("two", "one/final"), ("three", "one/final")):
        (tmp_path / name / "final").mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").touch()
        adapter = start and str(tmp_path / start)
        (tmp_path / name / "config.json").write_text(json.dumps({"adapter": adapter, "model": None}))
        runs.append(str(tmp_path / name))
    assert notes_on_order(runs[:2]) == []
    (note,) = notes_on_order(runs)
    assert note.startswith(f"NOTE: {runs[2]} was trained from {runs[0]}/final, not from {runs[1]}: ")
    (note,) = notes_on_order(runs[1::-1])
    assert f"{runs[0]} was trained from the default base, not from {runs[1]}" in note
    assert notes_on_order([f"{run}/final" for run in runs]) == []


def test_scores_of_answers_are_in_percent_and_the_base_can_be_left_out(tasks, monkeypatch, capsys):
    folder, files = tasks
    runs = [folder / "run1/final", folder / "run2/final"]
    words = [*runs, "--data", *files, "--metric", "f1", "--base", "none", "--max-new-tokens", 3, "--limit", 4]
    out = measured(monkeypatch, capsys, *words)
    assert "F1 %     1 task1.jsonl  2 task2.jsonl" in out and "average F1 %" in out
    assert not re.search(r"^base +\d", out, re.MULTILINE) and "forward transfer" not in out
    matrix = np.array([numbers_of(out, name) for name in ("after 1", "after 2")])
    assert matrix.shape == (2, 2) and (matrix >= 0).all() and (matrix <= 100).all()
    assert "(A loss" not in out


def test_scores_are_those_of_their_evaluation(tasks, monkeypatch, capsys):
    folder, files = tasks
    adapters = [folder / "run1/final", folder / "run2/final"]
    more = ["--max-new-tokens", 12, "--limit", 5, "--device", "cpu", "--dtype", "fp32"]
    words = [*adapters, "--data", *files, "--metric", "chrf", "--base", "none", *more]
    out = measured(monkeypatch, capsys, *words)
    assert "chrF2    1 task1.jsonl" in out
    for number, adapter in enumerate(adapters, 1):
        wanted = []
        for file in files:
            words = ["chrf", "--adapter", adapter, "--data", file, "--show", 0, *more]
            said = output_of(evaluate, monkeypatch, capsys, *words)
            # chrF2 of all answers together, which is not the mean of theirs.
            wanted.append(float(re.search(r"^adapter +(\d+\.\d+)", said, re.MULTILINE)[1]))
        assert numbers_of(out, f"after {number}") == pytest.approx(wanted, abs=0.051) and sum(wanted) > 0


def test_what_can_t_be_measured_is_refused_in_one_line(tasks, monkeypatch, capsys, tmp_path):
    folder, files = tasks
    one, two = folder / "run1", folder / "run2/final"
    wanted = "error: continual: wants a file of --data for each RUN, the task of that training; there are 2 and 1"
    assert refused(monkeypatch, capsys, one, two, "--data", files[0]) == wanted
    told = refused(monkeypatch, capsys, one, "--data", files[0])
    assert told == "error: continual: is about two trainings or more; `evaluate.py compare` is for one"
    told = refused(monkeypatch, capsys, one, two, "--data", files[0], files[0])
    assert told.endswith(": name each file once")
    told = refused(monkeypatch, capsys, one, two, "--data", *files, "--max-new-tokens", 3)
    assert told == "error: --max-new-tokens: --metric loss does not use it"
    told = refused(monkeypatch, capsys, one, two, "--data", *files, "--metric", "f1", "--seq-len", 30)
    assert told == "error: --seq-len: --metric f1 does not use it"
    (tmp_path / "metrics.jsonl").touch()
    told = refused(monkeypatch, capsys, tmp_path, two, "--data", *files)
    assert told == f"error: {tmp_path}: the run has not ended, there is no final/"
    assert "nothing.jsonl" in refused(monkeypatch, capsys, one, two, "--data", files[0], tmp_path / "nothing.jsonl")


def test_a_model_that_does_not_say_where_it_came_from_has_no_row_for_the_base(tasks, monkeypatch, capsys, tmp_path):
    folder, files = tasks
    shutil.copytree(folder / "base", tmp_path / "copy")
    words = [folder / "base", tmp_path / "copy", "--data", *files, "--limit", 2]
    out = measured(monkeypatch, capsys, *words)
    assert f"NOTE: {folder / 'base'} does not say what it was trained from, so there is no row for the base" in out
    assert numbers_of(out, "backward transfer") == [0.0]
