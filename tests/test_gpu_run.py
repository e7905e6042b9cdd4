"""benchmarks/gpu_run.sh, rehearsed on the CPU: rows are measured, killed, left out and gone on with, and become tables.

No figure of a GPU stands here: what is measured is the rehearsal, and all files are in temporary folders.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_rows
import gpu_run
import gpu_tables
import peers
from random_models import DEVIATION, random_model

import lora
from kernels.nf4 import dequantized_weight
from planning import memory as plan

CPU = torch.device("cpu")
EMPTY = f"before\n{gpu_tables.BEGIN}\nstale\n{gpu_tables.END}\nafter\n"


def gpu_run_sh(*words, code: int = 0) -> str:
    environment = os.environ | {"PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)
    line = ["bash", ROOT / "benchmarks" / "gpu_run.sh", *map(str, words)]
    ran = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def tables(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_tables.py", *map(str, words)])
    gpu_tables.main()


def row_of(name: str) -> gpu_rows.Row:
    return next(row for row in gpu_rows.ROWS if row.name == name)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> dict:
    """Of two rows, of which the second is killed after a second: the content, and the file."""
    file = tmp_path_factory.mktemp("rehearsal") / "results.json"
    words = ["--rehearse", "--only", "lora-8b", "kernels", "--limit", "kernels=1", "--out", file]
    said = gpu_run_sh(*words)
    return {"file": file, "said": said, **json.loads(file.read_text())}


def test_a_killed_row_is_recorded_and_the_others_are_kept(rehearsal):
    rows = {row["name"]: row for row in rehearsal["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "environment": "done",
        "lora-8b": "done",
        "kernels": "killed",
    }
    assert rehearsal["environment"]["device"] == gpu_rows.REHEARSAL_NAME and rehearsal["rehearsal"]
    assert [each["name"] for each in rows["lora-8b"]["measurements"]] == ["64, rows", "64, documents"]
    for each in rows["lora-8b"]["measurements"]:
        assert each["status"] == "done" and each["values"]["speed"] > 0 and each["values"]["planned"] > 0
    assert "kernels" in rehearsal["said"] and "had not ended after 1 s" in rehearsal["said"]


def test_results_become_tables_between_the_comments(rehearsal, tmp_path, monkeypatch):
    readme, kernels = tmp_path / "README.md", tmp_path / "kernels.md"
    for file in (readme, kernels):
        file.write_text(EMPTY)
    for _ in range(2):  # again replaces what was written
        tables(monkeypatch, rehearsal["file"], "--readme", readme, "--kernels-readme", kernels)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert text.count("| LoRA of the Llama-3.1-8B shape: full rows of 64 | 2 x 64 |") == 1
    assert gpu_rows.REHEARSAL_NAME in text and "TINY SHAPES" in text and rehearsal["command"] in text
    listed = text[text.index("Failed, or not run") :]
    assert "- kernels (kernels/bench.py: each kernel" in listed and "killed: it had not ended after 1 s" in listed
    assert "- decode-1b (" in listed and "- lora-8b (" not in listed
    assert gpu_tables.UNMEASURED in kernels.read_text()


def test_a_rehearsal_does_not_get_into_the_repository(rehearsal, monkeypatch):
    before = gpu_tables.README.read_text(), gpu_tables.KERNELS_README.read_text()
    with pytest.raises(SystemExit, match="this is a rehearsal"):
        tables(monkeypatch, rehearsal["file"])
    assert before == (gpu_tables.README.read_text(), gpu_tables.KERNELS_README.read_text())


def test_the_tables_of_the_repository_are_those_of_its_results():
    """Without a file in benchmarks/results/, both say that nothing was measured."""
    files = sorted(gpu_tables.RESULTS.glob("*.json"))
    assert not any(json.loads(file.read_text())["rehearsal"] for file in files)
    readmes = gpu_tables.README, gpu_tables.KERNELS_README
    for readme, new in zip(readmes, gpu_tables.tables_of(files), strict=True):
        text = readme.read_text()
        assert gpu_tables.replaced(text, new, readme) == text


def test_rows_beyond_the_budget_are_not_run(tmp_path, monkeypatch):
    """Each row takes a minute of four."""
    now = [0.0]

    class Minute:
        def __init__(self, row, limit, rehearse, work, put, known):
            self.record = {"name": row.name, "what": row.what, "status": "done", "why": "", "seconds": 60.0}
            machine = {"name": "machine", "status": "done", "values": {"device": gpu_rows.REHEARSAL_NAME}}
            self.record["measurements"] = [machine]
            assert 0 < limit <= 252.0 - now[0]

        def run(self) -> dict:
            now[0] += 60.0
            return self.record

    file = tmp_path / "results.json"
    monkeypatch.setattr(gpu_run, "RowRun", Minute)
    monkeypatch.setattr(gpu_run.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--rehearse", "--minutes", "4.2", "--out", str(file)])
    gpu_run.main()
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == [row.name for row in gpu_rows.ROWS]
    assert [row["status"] for row in rows] == ["done"] * 4 + ["not run"] * (len(rows) - 4)
    assert rows[4]["why"] == "the budget of 4.2 minutes was used up"


def test_list_names_every_row():
    said = gpu_run_sh("--list")
    assert all(f"{row.name} " in said and row.what in said for row in gpu_rows.ROWS)
    assert len({row.name for row in gpu_rows.ROWS}) == len(gpu_rows.ROWS)


def test_results_of_another_program_are_not_mixed(rehearsal, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(rehearsal["file"].read_text())
    args = argparse.Namespace(commit=rehearsal["environment"]["commit"])
    record = rehearsal["rows"][0]
    gpu_run.check_same_machine(gpu_run.Results(file, {}), record, args)
    with pytest.raises(SystemExit, match="is of commit .*, here is another; name another --out"):
        gpu_run.check_same_machine(gpu_run.Results(file, {}), record, argparse.Namespace(commit="another"))
    assert "do not share a file" in gpu_run_sh("--only", "compile", "--out", file, code=1)


def test_a_process_is_killed_with_all_that_it_started(tmp_path):
    script = f"sleep 60 & echo $! > {tmp_path}/child; wait"
    with open(os.devnull, "w") as log:
        ending = gpu_run.run_in_group(["sh", "-c", script], 1.0, log)
    assert ending.code is None
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("what it had started is still running")


CRASHES = """
import json, os, sys
lines = open(sys.argv[1], "a")
skip = sys.argv[3:]
for name in "abc":
    if name not in skip:
        print(json.dumps({"begin": name}), file=lines, flush=True)
        if name == "b":
            os.abort()
        line = {"end": name, "status": "done", "values": {}, "error": "", "seconds": 0}
        print(json.dumps(line), file=lines, flush=True)
"""


def crashing_run(tmp_path, monkeypatch, known=None) -> dict:
    (tmp_path / "row.py").write_text(CRASHES)
    run = gpu_run.RowRun(row_of("kernels"), 30.0, True, tmp_path, lambda record: None, known)
    words = lambda: [sys.executable, str(tmp_path / "row.py"), str(run.lines), "--skip", *run.begun]
    monkeypatch.setattr(run, "words", words)
    return run.run()


def test_a_measurement_that_ends_its_process_costs_only_itself(tmp_path, monkeypatch):
    record = crashing_run(tmp_path, monkeypatch)
    assert record["status"] == "done"
    statuses = [(each["name"], each["status"]) for each in record["measurements"]]
    assert statuses == [("a", "done"), ("b", "failed"), ("c", "done")]
    assert "signal SIGABRT" in record["measurements"][1]["error"]


def test_a_run_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    known = {"measurements": [{"name": name, "status": "done", "values": {"of": "before"}} for name in "ab"]}
    record = crashing_run(tmp_path, monkeypatch, known)
    assert [each["values"] for each in record["measurements"]] == [{"of": "before"}, {"of": "before"}, {}]


def test_a_peer_that_is_not_installed_is_left_out(tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else there(name))
    lines = gpu_rows.Lines(tmp_path / "lines")
    assert gpu_rows.run_row(row_of("lora-8b-peer"), CPU, lines, set(), True) == gpu_rows.LEFT_OUT
    assert json.loads((tmp_path / "lines").read_text()) == {"left_out": "not installed: peft"}


def test_what_a_measurement_raises_is_its_result(tmp_path, monkeypatch):
    def two(settings, device, report):
        yield "wrong", lambda: gpu_rows.compare_losses(lambda: ({}, [1.0, float("nan")]), [1.0, 1.0], "float32")
        yield "right", lambda: gpu_rows.compare_losses(lambda: ({}, [1.0, 1.0]), [1.0, 1.0], "float32")

    monkeypatch.setattr(gpu_rows, "correctness", two)
    assert gpu_rows.run_row(row_of("correctness"), CPU, gpu_rows.Lines(tmp_path / "lines"), set(), True) == 0
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line.get("begin") or line["status"] for line in lines] == ["wrong", "failed", "right", "done"]
    assert "step 2" in lines[1]["error"] and lines[1]["values"]["tolerance"] == gpu_rows.TOLERANCE["float32"]


@pytest.mark.parametrize("weights", [[1.005, 1.0], [1.0, 0.995]])
def test_a_loss_beyond_the_tolerance_fails(weights):
    with pytest.raises(gpu_rows.WrongNumbers):
        gpu_rows.compare_losses(lambda: ({}, weights), [1.0, 1.0], "float32")
    assert gpu_rows.compare_losses(lambda: ({}, weights), [1.0, 1.0], "bfloat16")["largest"] == pytest.approx(0.005)


def test_documents_fill_the_rows_that_the_peer_has():
    spec = {"shape": "rehearsal", "steps": 3, "batch": 2, "seq": 512}
    rows, documents = peers.token_rows(torch, spec), peers.document_rows(torch, spec)
    lengths = [[len(ids) for ids in row] for step in documents for row in step]
    assert all(sum(row) == 512 and row == sorted(row, reverse=True) and min(row) >= 8 for row in lengths)
    assert len({tuple(row) for row in lengths}) == 6 and max(map(len, lengths)) > 2
    whole = [sorted(token for ids in row for token in ids) for step in documents for row in step]
    assert whole == [sorted(row) for step in rows for row in step]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_random_models_have_what_training_would_give_them(method):
    raw = peers.raw_config("rehearsal")
    make = lambda seed: random_model(raw, plan.Recipe(method), torch.bfloat16, CPU, {"rank": 4, "alpha": 8.0}, seed)
    model, again, other = make(1), make(1), make(2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.embed.weight, other.embed.weight)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and model.dtype == torch.bfloat16
    assert len(trained) == (len([*model.parameters()]) if method == "full" else 2 * len(lora.lora_layers(model)))
    gate = model.blocks[0].mlp.gate
    weight = gate.weight if method == "full" else dequantized_weight(gate.base.frozen, torch.float32)
    assert float(weight.detach().float().std()) == pytest.approx(DEVIATION, rel=0.03)
    assert torch.equal(model.norm.weight, torch.ones_like(model.norm.weight))


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    """Every row's code runs, and nothing fails: all that a card changes is the device."""
    file = tmp_path / "results.json"
    gpu_run_sh("--rehearse", "--minutes", 30, "--out", file)
    rows = json.loads(file.read_text())["rows"]
    assert [(row["name"], row["status"]) for row in rows] == [(row.name, "done") for row in gpu_rows.ROWS]
    failed = [(row["name"], each) for row in rows for each in row["measurements"] if each["status"] == "failed"]
    assert failed == []
    section, kernels = gpu_tables.tables_of([file])
    assert "Nothing failed, and all was run." in section and gpu_tables.UNMEASURED not in section + kernels


@pytest.mark.slow
def test_a_run_that_is_killed_keeps_what_it_had_and_goes_on(tmp_path):
    file = tmp_path / "results.json"
    words = [sys.executable, ROOT / "benchmarks" / "gpu_run.py", "--rehearse", "--out", file]
    process = subprocess.Popen([*map(str, words), "--only", "decode-1b"], start_new_session=True)
    measured = lambda: [row for row in json.loads(file.read_text())["rows"] if row["name"] == "decode-1b"]
    for _ in range(600):
        if file.is_file() and measured() and measured()[0]["measurements"]:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (row,) = measured()
    assert row["status"] == "running" and row["measurements"][0]["values"]["speed"] > 0
    kept = {each["name"]: each for each in row["measurements"]}
    limits = [f"{row.name}=0.1" for row in gpu_rows.ROWS if row.name not in ("environment", "decode-1b")]
    gpu_run_sh("--rehearse", "--out", file, "--limit", *limits)
    (row,) = measured()
    assert row["status"] == "done" and len(row["measurements"]) == 8
    assert {each["name"]: each for each in row["measurements"] if each["name"] in kept} == kept
