"""A run that is killed and resumed is the run that was not, bit for bit; what is on the disk is whole or not at all."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.helpers import chat_base, command
from support.runs import (
    EACH_METHOD,
    ROOT,
    after_lines,
    assert_same,
    descendants,
    lines,
    records,
    selected_parameters,
    torchrun,
)

import train
from common.errors import UserError
from common.files import file_sha256
from flags import Flags
from training import checkpointer as resume
from training import metrics


def cut_back(run: Path, step: int) -> None:
    """As if the run had been killed while it went on after this checkpoint."""
    shutil.rmtree(run / "final")
    for path in resume.list_checkpoints(run / resume.FOLDER):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 15, "lo')


@pytest.mark.parametrize("method", EACH_METHOD)
def test_a_resumed_run_is_the_run_that_was_not_stopped(job, tmp_path, monkeypatch, capsys, method):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    out, err, code = command(train, monkeypatch, capsys, *job(method), "--keep", 9, "--out", whole)
    assert code == 0, err
    assert "every 3 steps; the last 9 are kept" in out
    shutil.copytree(whole, cut, symlinks=True)
    names = {path.name for path in (cut / resume.FOLDER).iterdir()}
    assert names == {"step-3", "step-6", "step-9", "step-12", "step-14"}
    cut_back(cut, 6)
    out, err, code = command(train, monkeypatch, capsys, "--out", cut, "--resume")  # its flags are those of the run
    assert code == 0, err
    assert f"resumed   after step 6 of 14, from {cut / 'checkpoints/step-6'}" in out
    assert_same(whole, cut)
    cut_back(cut, 9)
    out, err, code = command(train, monkeypatch, capsys, *job(method), "--out", cut, "--resume", "auto")
    assert code == 0, err
    assert_same(whole, cut)


def test_what_has_ended_is_not_begun_again(job, tmp_path, monkeypatch, capsys):
    words = [*job("lora"), "--out", tmp_path / "run"]
    _, err, code = command(train, monkeypatch, capsys, *words, "--resume")
    assert code == 2 and "no checkpoint under" in err and "--resume auto" in err
    out, err, code = command(train, monkeypatch, capsys, *words, "--resume", "auto")
    assert code == 0 and "beginning" in out
    before = (tmp_path / "run/metrics.jsonl").read_text()
    out, err, code = command(train, monkeypatch, capsys, *words, "--resume", "auto")
    assert code == 0 and out.startswith("complete")
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    _, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 2 and "holds a run already" in err
    _, err, code = command(train, monkeypatch, capsys, *words, "--resume", "--overwrite")
    assert code == 2 and "give one of them" in err
    _, err, code = command(train, monkeypatch, capsys, *job("lora"), "--resume")
    assert code == 2 and "--resume: needs --out" in err


@pytest.fixture
def stopped(job, tmp_path, monkeypatch, capsys):
    """A run of LoRA that stands after step 12."""
    run = tmp_path / "run"
    assert command(train, monkeypatch, capsys, *job("lora"), "--keep", 9, "--out", run)[2] == 0
    shutil.copytree(run, tmp_path / "whole", symlinks=True)
    cut_back(run, 12)
    return run


@pytest.mark.parametrize(
    "words, said",
    [
        (["--lr", "0.5"], r"--lr 0.5 \(it was"),
        (["--seed", "3", "--rank", "16"], r"--rank 16 \(it was 4\), --seed 3 \(it was 0\)"),
        (["--steps", "20"], r"--steps 20 \(it was 14\)"),
        (["--method", "full"], r"--method full \(it was lora\)"),
        (["--batch-size", "5"], "a step had 6 examples"),
        (["--batch-size", "3", "--accumulate", "3"], "a step had 6 examples"),
    ],
)
def test_other_flags_are_refused_and_listed(stopped, monkeypatch, capsys, words, said):
    _, err, code = command(train, monkeypatch, capsys, "--out", stopped, "--resume", *words)
    assert code == 2 and pytest.importorskip("re").search(said, err), err
    assert resume.newest_checkpoint(stopped).state["step"] == 12


def test_a_step_may_be_cut_in_another_way(stopped, tmp_path, monkeypatch, capsys):
    words = ["--batch-size", "2", "--eval-every", "7"]
    out, err, code = command(train, monkeypatch, capsys, "--out", stopped, "--resume", *words)
    assert code == 0, err
    assert "--accumulate 3: 2 x 3 x 1 processes, as many as before" in out
    wanted = [line["loss"] for line in lines(tmp_path / "whole") if "loss" in line]
    assert [line["loss"] for line in lines(stopped) if "loss" in line] == pytest.approx(wanted, rel=1e-5)


def test_another_base_and_other_data_are_refused(stopped, job, tmp_path, monkeypatch, capsys):
    other = chat_base(tmp_path / "other", seed=5, num_key_value_heads=2)
    _, err, code = command(train, monkeypatch, capsys, "--out", stopped, "--resume", "--model", other)
    assert code == 2 and "other weights" in err
    data = records(tmp_path / "data.jsonl", 41, 0)
    _, err, code = command(train, monkeypatch, capsys, "--out", stopped, "--resume", "--data", data)
    assert code == 2 and "the examples are others" in err


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a flipped bit": lambda folder: flip(next(folder.glob("shard*"))),
    "a truncated shard": lambda folder: os.truncate(next(folder.glob("shard*")), 1000),
    "a missing shard": lambda folder: next(folder.glob("shard*")).unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 40),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "another state": lambda folder: flip(folder / "state.json"),
    "a state cut off": lambda folder: os.truncate(folder / "state.json", 10),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(stopped, tmp_path, monkeypatch, capsys, damage):
    DAMAGE[damage](stopped / "checkpoints/step-12")
    out, err, code = command(train, monkeypatch, capsys, "--out", stopped, "--resume")
    assert code == 0, err
    assert "NOTE" in out and "step-12" in out and "the checkpoint before it is taken" in out
    assert "resumed   after step 9 of 14" in out
    assert_same(tmp_path / "whole", stopped)
    assert resume.find_corruption(stopped / "checkpoints/step-12") is None  # written anew


def test_a_damaged_newer_one_costs_no_whole_one(stopped, monkeypatch, capsys):
    for step in (9, 12):
        flip(stopped / f"checkpoints/step-{step}/state.json")
    log_step = metrics.MetricsLogger.log_step

    def log_and_stop(self, step, *numbers):  # a signal that comes while step 8 is at work
        log_step(self, step, *numbers)
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    destroyed = []
    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsLogger, "log_step", log_and_stop)
        patch.setattr(train.distributed, "destroy_process_group", lambda: destroyed.append(True))
        out, _, code = command(train, patch, capsys, "--out", stopped, "--resume", "--keep", "1")
    assert code == 143 and "stopped   after step 8" in out
    assert destroyed  # a signal ends the process group as the last step does
    assert resume.newest_checkpoint(stopped).state["step"] == 8
    assert {path.name for path in resume.list_checkpoints(stopped / "checkpoints")} <= {"step-6", "step-8"}


def test_a_file_that_the_manifest_does_not_name_is_not_read(stopped, tmp_path, monkeypatch, capsys):
    folder = stopped / "checkpoints/step-12"
    shutil.copy(next(folder.glob("shard*")), folder / "shard-00002-model-00001-of-00001.safetensors")
    out, err, code = command(train, monkeypatch, capsys, "--out", stopped, "--resume")
    assert code == 0 and "is not in the manifest" in out and "after step 9" in out, err
    assert_same(tmp_path / "whole", stopped)


def test_answers_of_equal_length_are_other_data(stopped, job, tmp_path, monkeypatch, capsys):
    data = Path(json.loads((stopped / "config.json").read_text())["data"][0])
    swapped = data.read_text().replace(" red", " RED!").replace(" green", " red").replace(" RED!", " green")
    (tmp_path / "data.jsonl").write_text(swapped)
    words = ["--out", stopped, "--resume", "--data", tmp_path / "data.jsonl"]
    _, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 2 and "the examples are others" in err


def test_what_is_typed_as_auto_is_no_difference_and_a_map_is_typed_again(stopped, tmp_path, monkeypatch, capsys):
    state = json.loads((stopped / "checkpoints/step-12/state.json").read_text())
    _, err, code = command(train, monkeypatch, capsys, "--out", stopped, "--resume", "--dtype", "auto", "--plan")
    assert code == 0, err
    with pytest.raises(UserError, match="give it again"):
        resume.restore_flags(Flags(), state | {"flags": state["flags"] | {"map": "x.py:f"}}, stopped)


def test_a_checkpoint_with_the_names_that_flags_had_before_is_resumed(stopped, tmp_path, monkeypatch, capsys):
    for folder in resume.list_checkpoints(stopped / "checkpoints"):
        state = json.loads((folder / "state.json").read_text())
        assert state["flags"].pop("activation_checkpointing") == "none"
        state["flags"]["remat"] = "block"
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["state.json"] = file_sha256(folder / "state.json")
        (folder / "manifest.json").write_text(json.dumps(manifest))
    out, err, code = command(train, monkeypatch, capsys, "--out", stopped, "--resume")
    assert code == 0 and "--activation-checkpointing full" in out, err  # among what is printed at the start
    assert_same(tmp_path / "whole", stopped)  # what is computed again is equal to the bit
    assert json.loads((stopped / "config.json").read_text())["activation_checkpointing"] == "full"


def test_a_flag_s_former_name_is_answered_with_the_new_one(tmp_path, monkeypatch, capsys):
    for word in ("--remat", "--remat=block"):
        _, err, code = command(train, monkeypatch, capsys, word, "block", "--out", tmp_path / "run")
        assert code == 2 and "--remat: is now called --activation-checkpointing" in err and "block is now full" in err


@pytest.mark.slow
def test_a_run_that_version_2478adc_wrote_is_resumed(job, tmp_path):
    """That version's files are checked out of git; its run is cut back to a checkpoint, and goes on here."""
    old = tmp_path / "old"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", old, "2478adc"], cwd=ROOT, check=True)
    try:
        words = [*job("lora"), "--remat", "block", "--keep", "9", "--out", tmp_path / "whole"]
        subprocess.run([sys.executable, "train.py", *map(str, words)], cwd=old, check=True, capture_output=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "cut", symlinks=True)
        cut_back(tmp_path / "cut", 6)
        words = [sys.executable, "train.py", "--out", str(tmp_path / "cut"), "--resume"]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
        assert_same(tmp_path / "whole", tmp_path / "cut")
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", old], cwd=ROOT, check=True)


def test_where_all_are_damaged_nothing_is_begun(stopped, monkeypatch, capsys):
    for folder in resume.list_checkpoints(stopped / "checkpoints"):
        flip(folder / "state.json")
    for how in ("on", "auto"):
        _, err, code = command(train, monkeypatch, capsys, "--out", stopped, "--resume", how)
        assert code == 2 and "no checkpoint is whole" in err and "state.json" in err
    assert len(resume.list_checkpoints(stopped / "checkpoints")) == 4


def test_nothing_is_unpickled(stopped, monkeypatch, capsys):
    """No file of a run is a pickle, and none is read where one stands."""
    import pickle

    files = [path for path in stopped.rglob("*") if path.is_file()]
    assert {path.suffix for path in (stopped / "checkpoints").rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert len(files) > 10
    marker = stopped / "hacked"
    hostile = pickle.dumps(type("X", (), {"__reduce__": lambda self: (os.mkdir, (str(marker),))})())
    (stopped / "checkpoints/step-12/.metadata").write_bytes(hostile)
    (stopped / "checkpoints/step-12/shard-00002.pt").write_bytes(hostile)
    assert command(train, monkeypatch, capsys, "--out", stopped, "--resume")[2] == 0
    assert not marker.exists()


def test_leftovers_are_ignored_and_taken_away(stopped, tmp_path, monkeypatch, capsys):
    for name in ("checkpoints/.step-13.partial-99", "checkpoints/.step-12.replaced-99", ".final.partial-7"):
        (stopped / name).mkdir()
        (stopped / name / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    (stopped / "best").rename(stopped / ".best.replaced-7")  # killed between the two renames
    assert command(train, monkeypatch, capsys, "--out", stopped, "--resume")[2] == 0
    assert not [path for path in stopped.rglob(".*")]
    assert_same(tmp_path / "whole", stopped)


def test_the_last_ones_and_the_best_are_kept(job, tmp_path, monkeypatch, capsys):
    words = [*job("lora"), "--lr", "0.2", "--eval-every", 3, "--out", tmp_path / "run"]  # a rate that learns nothing
    assert command(train, monkeypatch, capsys, *words)[2] == 0
    losses = {line["step"]: line["val_loss"] for line in lines(tmp_path / "run") if "val_loss" in line}
    best = min((step for step in losses if 0 < step < 14), key=losses.get)
    kept = {int(path.name[5:]) for path in resume.list_checkpoints(tmp_path / "run/checkpoints")}
    assert kept == {12, 14, best}
    states = {step: json.loads((tmp_path / f"run/checkpoints/step-{step}/state.json").read_text()) for step in kept}
    assert all(states[step]["val_loss"] == losses[step] for step in kept)


# ----------------------------------------------------------------------------------------------- processes


BY_PROCESSES = (
    "full",
    "lora",
    "asynchronous",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qlora", "adamw8bit", "muon")),
)


@pytest.fixture(scope="module")
def by_processes(request, job, tmp_path_factory) -> Path:
    """NAME/N: the jobs of the tests at hand by N processes, and NAME/N-M: cut back to step 6 and resumed by M."""
    folder = tmp_path_factory.mktemp("processes")
    names = sorted(name for (name,) in selected_parameters(request, "name"))
    extra = {name: ["--shard", "none" if name == "lora" else "full", "--keep", 9] for name in names}
    for n in (1, 2):
        size = ["--batch-size", 6 // n]
        jobs = [[*job(name), *extra[name], *size, "--out", str(folder / name / str(n))] for name in names]
        torchrun(n, "tests/support/run_jobs.py", json.dumps(jobs))
    pairs = [(2, 2), (2, 1), (2, 3), (1, 2)]
    for n, m in pairs:
        for name in names:
            shutil.copytree(folder / name / str(n), folder / name / f"{n}-{m}", symlinks=True)
            cut_back(folder / name / f"{n}-{m}", 6)
    for m in (1, 2, 3):
        words = ["--resume", "--batch-size", 6 // m]
        jobs = [["--out", str(folder / name / f"{n}-{to}"), *words, *extra[name][:2]]
                for name in names for n, to in pairs if to == m]  # fmt: skip
        torchrun(m, "tests/support/run_jobs.py", json.dumps(jobs))
    return folder


@pytest.mark.parametrize("name", BY_PROCESSES)
def test_two_processes_resume_to_the_bit(by_processes, name):
    assert_same(by_processes / name / "2", by_processes / name / "2-2")


@pytest.mark.parametrize("pair", ["2-1", "2-3", "1-2"])
@pytest.mark.parametrize("name", BY_PROCESSES)
def test_other_numbers_of_processes_resume_to_rounding(by_processes, name, pair):
    close = 1e-3 if name in ("adamw8bit", "muon") else 1e-5
    wanted, found = lines(by_processes / name / "1"), lines(by_processes / name / pair)
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for key in ("loss", "val_loss"):
        assert [line[key] for line in found if key in line] == pytest.approx(
            [line[key] for line in wanted if key in line], rel=close
        )


@pytest.mark.parametrize(
    "words",
    [
        "--context-parallel 2 --dropout 0.2",
        pytest.param("--shard full --targets v_proj,q_proj", marks=pytest.mark.slow),
    ],
)
def test_the_layout_of_processes_is_taken_up(job, tmp_path, words):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    processes = 2 if "context" in words else 1
    torchrun(processes, "train.py", *job("lora"), *words.split(), "--out", whole)
    shutil.copytree(whole, cut, symlinks=True)
    cut_back(cut, 9) if (cut / "checkpoints/step-9").exists() else cut_back(cut, 12)
    said = torchrun(processes, "train.py", "--out", cut, "--resume")
    assert ("share each batch" if processes == 2 else "each holds a part of every tensor") in said
    assert_same(whole, cut)


# ----------------------------------------------------------------------------------------------- kill -9


def run_and_kill(words: list[str], processes: int, out: Path, when) -> bool:
    """Starts a run and kills all its processes as soon as when() says so; False where it ended before."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    line = [sys.executable, *launcher, "train.py", *words, "--out", str(out), "--resume", "auto"]
    child = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while child.poll() is None and not when():
        time.sleep(0.002)
        assert time.time() < deadline
    killed = child.poll() is None
    for pid in descendants(child.pid) if killed else []:
        os.kill(pid, signal.SIGKILL)
    error = child.communicate()[1]
    assert killed or child.returncode == 0, error[-3000:]
    return killed


def while_saving(out: Path, count: int):
    """True while a checkpoint is half written, after so many lines."""
    enough = after_lines(out, count, 0.0)
    return lambda: enough() and any((out / "checkpoints").glob(".step-*.partial-*"))


def kills(job, folder: Path, method: str, processes: int, instants: list) -> int:
    """Compares a run that was killed at these instants, one after the other, with one that was not. instants: (lines
    that metrics.jsonl has then, seconds more, or None: while a checkpoint is being written)."""
    words = [*job(method), "--batch-size", str(6 // processes), "--shard", "full" if processes > 1 else "none"]
    whole, out, killed = folder / "whole", folder / "killed", 0
    assert not run_and_kill(words, processes, whole, lambda: False)
    for count, more in instants:
        killed += run_and_kill(words, processes, out, while_saving(out, count) if more is None else
                               after_lines(out, count, more))  # fmt: skip
    assert not run_and_kill(words, processes, out, lambda: False)
    assert_same(whole, out)
    return killed


@pytest.mark.parametrize(
    "method, processes, instants",
    [
        ("full", 1, [(5, None)]),
        ("lora", 2, [(4, 0.02)]),
        pytest.param("qlora", 1, [(11, None)], marks=pytest.mark.slow),
        *(
            pytest.param(name, 2, [(6, None)], marks=pytest.mark.slow)
            for name in (
                "bottleneck",
                "prompt-tuning",
                "p-tuning",
                "prefix-tuning",
                "ia3",
                "variants",
                "vera",
                "new tokens",
            )
        ),
        pytest.param("loftq", 1, [(6, None)], marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(job, tmp_path, method, processes, instants):
    assert kills(job, tmp_path, method, processes, instants) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "asynchronous"])
def test_killed_at_random_instants(job, tmp_path, method, processes):
    """20 instants and more in all, two or three a run."""
    rng = random.Random(f"{method} {processes}")
    instants = [(rng.randrange(18), rng.choice([None, rng.random() * 0.1])) for _ in range(4)]
    print(kills(job, tmp_path, method, processes, sorted(instants, key=lambda pair: pair[0])), "killed", instants)


# ----------------------------------------------------------------------------------------------- determinism


@pytest.fixture
def as_before():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "muon", "adamw8bit", "8 bits, bf16"])
def test_deterministic_runs_are_equal_to_the_bit(job, tmp_path, monkeypatch, capsys, as_before, method):
    for name in ("whole", "again"):
        words = [*job(method, "--deterministic"), "--keep", 9, "--out", tmp_path / name]
        out, err, code = command(train, monkeypatch, capsys, *words)
        assert code == 0 and torch.are_deterministic_algorithms_enabled(), err
        assert "compiled blocks off: --deterministic" in out
    assert_same(tmp_path / "whole", tmp_path / "again")
    torch.use_deterministic_algorithms(False)
    cut_back(tmp_path / "again", 9)
    _, err, code = command(train, monkeypatch, capsys, "--out", tmp_path / "again", "--resume")
    assert code == 0 and torch.are_deterministic_algorithms_enabled(), err
    assert_same(tmp_path / "whole", tmp_path / "again")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "8 bits, bf16"])
def test_deterministic_runs_are_equal_to_the_bit_on_a_gpu_and_resume(
    job, tmp_path, monkeypatch, capsys, as_before, method
):
    for name in ("whole", "again"):
        words = [*job(method, "--deterministic", "--device", "cuda"), "--keep", 9, "--out", tmp_path / name]
        _, err, code = command(train, monkeypatch, capsys, *words)
        assert code == 0, err
    assert_same(tmp_path / "whole", tmp_path / "again")
    cut_back(tmp_path / "again", 9)
    _, err, code = command(train, monkeypatch, capsys, "--out", tmp_path / "again", "--resume")
    assert code == 0, err
    assert_same(tmp_path / "whole", tmp_path / "again")
