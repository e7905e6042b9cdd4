"""What can go wrong in the middle of a run: signals, processes that die or hang, disks that are full, numbers that are
none, a GPU that is too small. Each with the promised behaviour, and nothing lost."""

import builtins
import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.helpers import command, llama
from support.runs import ROOT, after_lines, assert_same, descendants, exact, final, lines, torchrun

import checkpoint
import train
from objectives import SupervisedRun, supervised_loss
from optimizers import make_optimizers
from training import checkpointer as resume
from training import metrics as log
from training import signals
from training.calibration import Pace

# ----------------------------------------------------------------------------------------------- signals


def start(words: list[str], out: Path, processes: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    line = [sys.executable, *launcher, "train.py", *words, "--out", str(out)]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(when, child: subprocess.Popen) -> None:
    deadline = time.time() + 120
    while not when():
        assert child.poll() is None and time.time() < deadline, child.communicate()[0][-3000:]
        time.sleep(0.002)


def workers(child: subprocess.Popen) -> list[int]:
    """The processes of a torchrun that train, in order of ranks."""
    found = {}
    for pid in descendants(child.pid)[1:]:
        with open(f"/proc/{pid}/environ", "rb") as stream:
            variables = dict(each.split(b"=", 1) for each in stream.read().split(b"\0") if b"=" in each)
        if b"RANK" in variables:
            found.setdefault(int(variables[b"RANK"]), pid)  # a parent before its children
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize(
    "number, processes",
    [(signal.SIGINT, 1), (signal.SIGTERM, 2), pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow)],
)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(job, tmp_path, number, processes):
    words = [*job("lora"), "--batch-size", str(6 // processes), "--steps", "60", "--save-every", "50"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    said, _ = start(words, whole, processes).communicate()
    child = start(words, out, processes)
    wait_for(after_lines(out, 6, 0.0), child)
    child.send_signal(number)
    said = child.communicate()[0]
    assert child.returncode == (128 + number if processes == 1 else 1), said
    assert "stopping  after this step" in said and f"train.py --out {out} --resume goes on" in said
    (kept,) = resume.list_checkpoints(out / "checkpoints")
    assert f"stopped   after step {kept.name[5:]};" in said and int(kept.name[5:]) < 60
    done, _ = start(["--resume"], out, processes).communicate()
    assert f"resumed   after step {kept.name[5:]}" in done
    assert_same(whole, out)


def test_a_second_signal_ends_it_at_once_and_a_repeated_one_does_not():
    script = "import os, signal, time\nfrom training import signals\nsignals.DEBOUNCE_SECONDS = 0.5\n"
    script += "with signals.GracefulStop() as stop:\n"
    script += "    os.kill(os.getpid(), 15)\n    time.sleep(0.1)\n    os.kill(os.getpid(), 15)\n    time.sleep(0.6)\n"
    script += "    print(stop.signal, flush=True)\n    os.kill(os.getpid(), 2)\n    time.sleep(5)\nprint('never')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stdout == "15\n", done


def test_signals_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with signals.GracefulStop():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


# ----------------------------------------------------------------------------------------------- processes


def test_a_dead_process_stops_the_others_within_seconds(job, tmp_path):
    words = [*job("lora"), "--batch-size", "3", "--steps", "200", "--save-every", "5", "--shard", "full"]
    child = start(words, tmp_path / "out", 2)
    wait_for(after_lines(tmp_path / "out", 20, 0.0), child)
    os.kill(workers(child)[1], signal.SIGKILL)
    begin = time.time()
    said = child.communicate(timeout=60)[0]
    assert time.time() - begin < 20 and child.returncode == 1
    assert "SIGKILL" in said  # torchrun's word on the one that died
    assert "rank 0: error: another process has ended, or was waited for too long" in said or "SIGTERM" in said
    assert 'train.py", line' not in said  # a traceback of ours
    assert resume.newest_checkpoint(tmp_path / "out") is not None


def test_a_process_that_hangs_is_waited_for_so_long(job, tmp_path):
    words = [*job("full"), "--batch-size", "3", "--steps", "400", "--save-every", "100", "--timeout", "4"]
    words += ["--eval-every", "0"]  # while something is saved, processes wait longer: it is stopped in between
    child = start(words, tmp_path / "out", 2)
    wait_for(after_lines(tmp_path / "out", 110, 0.0), child)
    first, second = workers(child)
    os.kill(second, signal.SIGSTOP)
    begin = time.time()
    while Path(f"/proc/{first}").exists() and "Z" not in Path(f"/proc/{first}/stat").read_text().split(")")[1][:3]:
        assert time.time() - begin < 30
        time.sleep(0.05)
    assert time.time() - begin > 2
    os.kill(second, signal.SIGCONT)
    said = child.communicate(timeout=60)[0]
    assert child.returncode == 1
    assert "rank 0: error: another process has ended, or was waited for too long" in said
    found = resume.newest_checkpoint(tmp_path / "out")
    assert found is not None and f"{found.folder.name} is whole" in said


# ----------------------------------------------------------------------------------------------- numbers


def scale_losses(monkeypatch, factor) -> None:
    """Multiplies the loss of each micro-batch by factor(model)."""

    def scaled(self, model, batch, totals, losses):
        times = factor(model)
        before = losses.loss.clone()
        loss = supervised_loss(model, batch, totals, losses)
        losses.loss = before + (losses.loss - before) * times
        return loss * times

    monkeypatch.setattr(SupervisedRun, "__call__", scaled)


@pytest.mark.parametrize("method", ["full", "lora", "muon", "adamw8bit", "bf16 weights"])
def test_a_step_without_a_finite_loss_is_skipped_and_counted(job, tmp_path, monkeypatch, capsys, method):
    calls, moved = [], []

    def factor(model) -> float:
        calls.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return math.nan if len(calls) == 5 else 1.0

    scale_losses(monkeypatch, factor)
    # The trial of the machine's pace computes losses of its own.
    monkeypatch.setattr(train, "measure_pace", lambda *_: Pace(1e-3, 0.0))
    out, err, code = command(train, monkeypatch, capsys, *job(method), "--out", tmp_path / "run")
    assert code == 0, err
    assert "step 5: the loss is nan" in out and "skipped, 1 in a row of at most 10" in out
    found = [line for line in lines(tmp_path / "run") if "val_loss" not in line]
    assert [line["step"] for line in found if line["loss"] is None] == [5] and found[4]["skipped"] == 1
    assert len(found) == 14 and all(math.isfinite(line["loss"]) for line in found if line["step"] != 5)
    moved = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(calls)]
    assert not moved[4] and moved[3] and moved[5]
    state = json.loads((tmp_path / "run/checkpoints/step-12/state.json").read_text())
    assert (state["skipped"], state["in_a_row"]) == (1, 0)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_changes_nothing(tmp_path, kind, dtype):
    llama(tmp_path / "base")
    models = [checkpoint.load_model(tmp_path / "base", dtype) for _ in range(2)]
    for model, spoilt in zip(models, (False, True), strict=True):
        steppers = make_optimizers(model, kind, 1e-2, 0.1)
        for step in range(4):
            torch.manual_seed(step)
            values = {name: torch.randn(p.shape).to(dtype) for name, p in model.named_parameters()}
            for bad in (True, False) if spoilt and step == 2 else (False,):
                torch.manual_seed(step)
                for name, p in model.named_parameters():
                    p.grad = values[name] * (math.nan if bad else 1)
                for stepper in steppers:
                    stepper.step(torch.tensor(float(bad)))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_ten_in_a_row_end_the_run_and_their_examples_are_kept(job, tmp_path, monkeypatch, capsys):
    calls = []

    def factor(_) -> float:
        calls.append(1)
        return math.inf if len(calls) > 3 else 1.0

    scale_losses(monkeypatch, factor)
    # The trial of the machine's pace computes losses of its own.
    monkeypatch.setattr(train, "measure_pace", lambda *_: Pace(1e-3, 0.0))
    _, err, code = command(train, monkeypatch, capsys, *job("lora"), "--out", tmp_path / "run")
    assert code == 2 and "the 10th step in a row" in err and "try a lower --lr" in err
    assert "data.jsonl" in err and "step-12 is whole" in err
    examples = [json.loads(line) for line in (tmp_path / "run/bad_batch.jsonl").read_text().splitlines()]
    assert len(examples) in (4, 6) and all(e["where"] in err for e in examples)
    assert all(len(e["ids"]) == len(e["trained"]) and sum(e["trained"]) > 0 for e in examples)
    assert len(lines(tmp_path / "run")) == 13 + 4  # and validations after 0, 4, 8, 12
    # a run that goes on remembers how many there were
    scale_losses(monkeypatch, lambda _: math.nan)
    _, err, code = command(train, monkeypatch, capsys, "--out", tmp_path / "run", "--resume")
    assert code == 2 and "step 13: the loss is nan" in err and "the 10th step in a row" in err


# ----------------------------------------------------------------------------------------------- disks


class Disk:
    """Every call that writes, counted from the moment that a run's metrics.jsonl is opened; of these some fail."""

    def __init__(self, monkeypatch, fails):
        self.fails, self.calls, self.failed, self.begun = fails, 0, [], False
        init = log.DurableJSONL.__init__

        def begin(lines, *arguments):
            init(lines, *arguments)
            self.begun = True

        monkeypatch.setattr(log.DurableJSONL, "__init__", begin)
        for owner, name in ((os, "pwrite"), (os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "rename"),
                            (os, "symlink"), (shutil, "copyfile"), (builtins, "open")):  # fmt: skip
            monkeypatch.setattr(owner, name, self.watched(name, getattr(owner, name)))
        import io

        import safetensors.torch

        monkeypatch.setattr(io, "open", self.watched("open", io.open))
        monkeypatch.setattr(safetensors.torch, "save_file", self.watched("save_file", safetensors.torch.save_file))

    def watched(self, name: str, call):
        def watching(*arguments, **named):
            mode = arguments[1] if name == "open" and len(arguments) > 1 else named.get("mode", "r")
            if self.begun and (name != "open" or (isinstance(mode, str) and set(mode) & set("wax"))):
                self.calls += 1
                if self.fails(self.calls):
                    self.failed.append(name)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[name == "save_file"]))
            return call(*arguments, **named)

        return watching


@pytest.fixture(scope="module")
def short(job, tmp_path_factory):
    """The flags of a run of 6 steps with one checkpoint, and that run."""
    words = [*job("lora"), "--steps", "6", "--eval-every", "3", "--keep", "1"]
    whole = tmp_path_factory.mktemp("short") / "whole"
    subprocess.run([sys.executable, "train.py", *words, "--out", str(whole)], cwd=ROOT, check=True, capture_output=True)
    return words, whole


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))])
def test_a_disk_that_is_full_for_one_write_costs_no_run(short, tmp_path, monkeypatch, capsys, part):
    """ENOSPC at each write that a run makes, one run after the other."""
    words, whole = short
    warned, number = 0, part + 1
    while True:
        out = tmp_path / f"out{number}"
        with monkeypatch.context() as patch:
            disk = Disk(patch, lambda call, number=number: call == number)
            said, err, code = command(train, patch, capsys, *words, "--out", out)
        if not disk.failed:
            break
        assert "Traceback" not in err
        warned += "training goes on" in said
        if code:
            assert code == 2 and "No space left" in err, (disk.failed, err)
            assert not (out / "final").exists() or "loss.png" in err or "config.json" in err, err
            again = ["--resume", "auto"] if not (out / "final").exists() else []
            if again:
                _, err, code = command(train, monkeypatch, capsys, *words, "--out", out, *again)
                assert code == 0, err
        assert exact(out) == exact(whole), (number, disk.failed)
        mine, wanted = final(out), final(whole)
        assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
        assert all(resume.find_corruption(folder) is None for folder in resume.list_checkpoints(out / "checkpoints"))
        shutil.rmtree(out)
        number += 4
    assert number > 12 and warned > 2


def test_a_disk_that_stays_full_keeps_the_older_checkpoint(job, tmp_path, monkeypatch, capsys):
    words = [*job("lora"), "--out", tmp_path / "out"]
    whole = [*job("lora"), "--out", tmp_path / "whole"]
    assert command(train, monkeypatch, capsys, *whole)[2] == 0
    with monkeypatch.context() as patch:
        full = lambda call: (tmp_path / "out/checkpoints/step-6").is_dir()
        disk = Disk(patch, full)
        said, err, code = command(train, patch, capsys, *words)
    assert code == 2 and "final/ could not be written" in err and "--resume goes on from step-6" in err
    assert "no checkpoint" in said and "step-6 is the newest that is whole; training goes on" in said
    assert "its lines wait in memory, training goes on" in said and said.count("wait in memory") == 1
    assert len(disk.failed) > 5
    assert command(train, monkeypatch, capsys, "--out", tmp_path / "out", "--resume")[2] == 0
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_a_full_disk_of_the_first_process_stops_no_other(job, tmp_path):
    words = [*job("full"), "--batch-size", "3", "--shard", "full", "--timeout", "20"]
    torchrun(2, "tests/support/run_jobs.py", json.dumps([[*words, "--out", str(tmp_path / "whole")]]))
    said = torchrun(
        2, "tests/support/run_jobs.py", json.dumps([[*words, "--out", str(tmp_path / "out")]]), FULL_DISK="1"
    )
    assert "best/ was not written" in said and "training goes on" in said
    assert_same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
def test_a_small_disk_in_earnest(job, tmp_path, monkeypatch, capsys):
    """A file system of its own, in memory, of a size that holds some checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], check=False).returncode:
        pytest.skip("may not mount")
    try:
        monkeypatch.setattr(resume, "check_disk_space", lambda *_: None)
        words = [*job("full"), "--save-every", "2", "--keep", "9", "--out", place / "run"]
        said, err, code = command(train, monkeypatch, capsys, *words)
        assert code == 0 and "No space left" in said and "training goes on" in said, said + err
        kept = resume.list_checkpoints(place / "run/checkpoints")
        assert kept and all(resume.find_corruption(folder) is None for folder in kept)
        whole = [*job("full"), "--save-every", "0", "--out", tmp_path / "whole"]
        assert command(train, monkeypatch, capsys, *whole)[2] == 0
        assert_same(place / "run", tmp_path / "whole")
    finally:
        subprocess.run(["umount", place], check=True)


def test_too_little_room_is_found_before_training(job, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    _, err, code = command(train, monkeypatch, capsys, *job("lora"), "--out", tmp_path / "run")
    assert code == 2 and "4 checkpoints, best/ and final/ take" in err and "0.1 MB are free" in err
    assert not (tmp_path / "run").exists()
    words = [word for word in job("full") if word not in ("--save-every", "3")]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4_500_000))
    out, err, code = command(train, monkeypatch, capsys, *words, "--out", tmp_path / "run")
    assert code == 0 and "no checkpoints, the disk has no room for 4" in out, out + err


def test_a_folder_that_takes_no_file_is_found_before_training(job, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(resume.os, "fsync", refuse)
    _, err, code = command(train, monkeypatch, capsys, *job("lora"), "--out", tmp_path / "run")
    assert code == 2 and "can't be written to (Read-only file system)" in err
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------- a small GPU


@pytest.mark.parametrize("method, helps", [("lora", "--method qlora"), ("full", "--activation-checkpointing full")])
def test_out_of_memory_says_what_helps(job, tmp_path, monkeypatch, capsys, method, helps):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...")

    monkeypatch.setattr(SupervisedRun, "__call__", full)
    _, err, code = command(train, monkeypatch, capsys, *job(method), "--out", tmp_path / "run")
    assert code == 2 and err.startswith("error: out of memory: CUDA out of memory. The plan expected")
    assert helps in err and ("--seq-len" in err or "--batch-size 3 --accumulate 2" in err)
    assert len(err.partition("what helps most: ")[2].split("), ")) == 3 and "weights 0.00" in err


# ----------------------------------------------------------------------------------------------- two hosts


def shell(line: str) -> None:
    subprocess.run(line, shell=True, check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Two network namespaces of this machine, joined by a cable that can be pulled."""
    names = [f"host{i}-{os.getpid()}" for i in range(2)]
    try:
        shell(f"ip netns add {names[0]} && ip netns add {names[1]}")
    except subprocess.CalledProcessError:
        pytest.skip("may not make network namespaces")
    try:
        shell(f"ip link add cable0 netns {names[0]} type veth peer name cable1 netns {names[1]}")
        for i, name in enumerate(names):
            shell(f"ip -n {name} addr add 10.77.0.{i + 1}/24 dev cable{i} && ip -n {name} link set cable{i} up")
            shell(f"ip -n {name} link set lo up")
        yield names
    finally:
        for name in names:
            subprocess.run(f"ip netns pids {name} | xargs -r kill -9; ip netns del {name}", shell=True, check=False)


def on_hosts(hosts: list[str], words: list[str], out: Path) -> list[subprocess.Popen]:
    """One torchrun a host, which find each other at the first one's address."""
    children = []
    for i, name in enumerate(hosts):
        line = ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME=cable{i}", sys.executable, "-m"]
        line += ["torch.distributed.run", "--nnodes", "2", "--node-rank", str(i), "--nproc-per-node", "1"]
        line += ["--rdzv-backend", "static", "--master-addr", "10.77.0.1", "--master-port", "29411"]
        line += ["train.py", *words, "--out", str(out), "--resume", "auto"]
        into = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        children.append(subprocess.Popen(line, cwd=ROOT, **into))
    return children


@pytest.mark.slow
@pytest.mark.parametrize("method, shard", [("full", "full"), ("lora", "none"), ("full", "hybrid")])
def test_two_hosts_of_which_one_is_cut_off(job, hosts, tmp_path, method, shard):
    words = [*job(method), "--batch-size", "3", "--shard", shard, "--timeout", "8", "--steps", "40"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    for child in on_hosts(hosts, words, whole):
        said = child.communicate(timeout=180)[0]
        assert child.returncode == 0, said[-3000:]
    children = on_hosts(hosts, words, out)
    wait_for(after_lines(out, 12, 0.0), children[0])
    shell(f"ip -n {hosts[1]} link set cable1 down")
    begin = time.time()
    said = children[0].communicate(timeout=120)[0]
    assert time.time() - begin < 60 and children[0].returncode != 0
    assert "another process has ended, or was waited for too long" in said and "is whole" in said
    children[1].communicate(timeout=120)
    assert children[1].returncode != 0 and not (out / "final").exists()
    shell(f"ip -n {hosts[1]} link set cable1 up")
    for child in on_hosts(hosts, words, out):
        said = child.communicate(timeout=180)[0]
        assert child.returncode == 0, said[-3000:]
    assert_same(whole, out)
