"""What a run says while it works: lines where no terminal is, bars, time left, validation's size, signals, load."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.helpers import chat_base, sentence

import train
from common import progress, threads
from common.console import format_duration, number_of
from training import metrics, validation

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base") / "base")


def write_data(file: Path, count: int) -> Path:
    lines = [json.dumps({"prompt": sentence(i, 5), "completion": sentence(1000 + i, 5)}) for i in range(count)]
    file.write_text("\n".join(lines) + "\n")
    return file


def run(monkeypatch, capsys, *words) -> str:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    train.main()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59, "59 s"),
        (90, "1.5 min"),
        (900, "15 min"),
        (7200, "2.0 h"),
        (200_000, "2.3 days"),
        (1e8, "1,157 days"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds, text):
    assert format_duration(seconds) == text


def test_one_of_a_thing_is_not_several():
    said = [number_of(number, "record") for number in (0, 1, 2, 1000)]
    assert said == ["0 records", "1 record", "2 records", "1,000 records"]


def test_lines_stand_where_no_terminal_is(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.progress("reading", 200, "record") as bar:
        bar.update(10)
        now[0] += 31
        bar.set_postfix_str("5 tokens")
        bar.update(40)
        now[0] += 1
        bar.update(50)
    said = capsys.readouterr()
    assert said.out == ""
    # 50 records took 31 seconds, so the other 150 take 93.
    assert said.err == "reading: 50 of 200 records, 5 tokens, 1.6 min left\n"


def test_bytes_are_counted_in_megabytes(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.progress("x.jsonl", 90_000_000, "byte", done=30_000_000) as bar:
        now[0] += 40
        bar.update(20_000_000)
    # 20 MB took 40 seconds; the 30 MB of an earlier start do not count.
    assert capsys.readouterr().err == "x.jsonl: 50 of 90 MB, 1.3 min left\n"


def test_a_bar_stands_on_a_terminal_and_nothing_on_other_ranks(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.progress("reading", 2, "record") as bar:
        bar.update(1)
    assert "reading:   0%" in terminal.getvalue()
    terminal.truncate(0)
    with progress.progress("reading", 2, "record", shown=False) as bar:
        bar.update(1)
    assert "reading" not in terminal.getvalue()


def test_log_every_prints_loss_speed_and_time_left(base, tmp_path, monkeypatch, capsys):
    data = write_data(tmp_path / "data.jsonl", 40)
    words = ["--model", base, "--data", data, "--steps", 6, "--eval-every", 0]
    said = run(monkeypatch, capsys, *words, "--out", tmp_path / "a", "--log-every", 2)
    lines = [line for line in said.splitlines() if " of 6: loss " in line]
    assert [line.split()[1] for line in lines] == ["2", "4", "6"]
    assert all("tokens/s, " in line and line.endswith(" left") for line in lines)
    assert lines[-1].endswith("0 s left")
    said = run(monkeypatch, capsys, *words, "--out", tmp_path / "b")
    assert " of 6: loss " not in said, "a short run is quiet"
    monkeypatch.setattr(metrics, "LINE_SECONDS", 0)
    said = run(monkeypatch, capsys, *words, "--out", tmp_path / "c")
    assert said.count(" of 6: loss ") == 6
    said = run(monkeypatch, capsys, *words, "--out", tmp_path / "d", "--log-every", 0)
    assert " of 6: loss " not in said


def val_losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["val_loss"] for line in lines if "val_loss" in line]


@pytest.mark.slow
def test_validation_is_kept_under_a_tenth_of_the_training(base, tmp_path, monkeypatch, capsys):
    data = write_data(tmp_path / "data.jsonl", 100)
    val = write_data(tmp_path / "val.jsonl", 900)
    words = ["--model", base, "--data", data, "--val", val, "--device", "cpu"]

    said = run(monkeypatch, capsys, *words, "--steps", 10, "--out", tmp_path / "a")
    assert "validates on 16 of 900 examples, chosen by their hash" in said, "never fewer than 16"
    said = run(monkeypatch, capsys, *words, "--steps", 250, "--eval-every", 50, "--lr", 1e-5, "--out", tmp_path / "b")
    count = int(said.partition("validates on ")[2].split()[0])
    # 250 steps of 8 train on 2,000 examples; 6 validations, whose tokens take half of the time, on a tenth of that.
    assert count == pytest.approx(2 * 0.1 * 2000 / 6, rel=0.1)

    # The given limit holds, 0 is all, and the examples are the same whatever the order of the file.
    run(monkeypatch, capsys, *words, "--steps", 2, "--val-limit", 20, "--out", tmp_path / "c")
    lines = val.read_text().splitlines()
    val.write_text("\n".join(reversed(lines)) + "\n")
    run(monkeypatch, capsys, *words, "--steps", 2, "--val-limit", 20, "--out", tmp_path / "d")
    assert val_losses(tmp_path / "d") == pytest.approx(val_losses(tmp_path / "c"), rel=1e-5)
    said = run(monkeypatch, capsys, *words, "--steps", 2, "--val-limit", 0, "--out", tmp_path / "e")
    assert "validates on" not in said
    assert val_losses(tmp_path / "e")[0] != pytest.approx(val_losses(tmp_path / "c")[0], rel=1e-5)


@pytest.mark.parametrize("interrupted_at", [0, 4])
def test_a_signal_ends_a_validation_at_once_and_the_resumed_run_equals_a_whole_one(
    base, tmp_path, monkeypatch, capsys, interrupted_at
):
    data = write_data(tmp_path / "data.jsonl", 40)
    val = write_data(tmp_path / "val.jsonl", 64)
    words = ["--model", base, "--data", data, "--val", val, "--steps", 8, "--eval-every", 4, "--device", "cpu"]
    words += ["--val-limit", 0, "--dtype", "fp32"]
    run(monkeypatch, capsys, *words, "--out", tmp_path / "whole")

    batches = []
    plain = validation.until_signal

    def with_a_signal(all_batches, num_tokens, stop):
        for batch in plain(all_batches, num_tokens, stop):
            batches.append(batch)
            # The third batch of the validation after step `interrupted_at`.
            if len(batches) == 8 * (interrupted_at // 4) + 3:
                os.kill(os.getpid(), signal.SIGTERM)
                while not stop.signal:
                    time.sleep(0.001)
            yield batch

    monkeypatch.setattr(validation, "until_signal", with_a_signal)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, capsys, *words, "--out", tmp_path / "cut")
    assert ended.value.code == 128 + signal.SIGTERM
    assert len(batches) == 8 * (interrupted_at // 4) + 3, "no batch after the signal"
    said = capsys.readouterr().out
    assert f"stopped   after step {interrupted_at}; " in said
    monkeypatch.setattr(validation, "until_signal", plain)
    run(monkeypatch, capsys, *words, "--out", tmp_path / "cut", "--resume", "auto")

    def numbers(out: Path) -> list[tuple]:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line.get("loss"), line.get("val_loss"), line.get("grad_norm")) for line in lines]

    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_a_busy_neighbour_is_seen_and_an_idle_machine_is_not(monkeypatch):
    """With numbers of our own for the clock of the cores."""
    busy = [0.0]
    now = [0.0]
    monkeypatch.setattr(threads, "busy_seconds", lambda: busy[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: 0.25 * now[0])
    load = threads.OtherLoad()
    busy[0], now[0] = 2.5, 2.0
    # 2.5 seconds of work in 2, of which this process did 0.5.
    assert load.cores() == pytest.approx(1.0)
    now[0] = 4.0
    assert load.cores() == 0.0


@pytest.mark.parametrize(
    ("busy", "cores", "given", "policy"),
    [(1.0, 2, {}, "passive"), (0.1, 2, {}, None), (1.0, 4, {"OMP_NUM_THREADS": "2"}, None),
     (1.0, 2, {"OMP_NUM_THREADS": "1"}, None), (1.0, 2, {"OMP_WAIT_POLICY": "active"}, "active"),
     (1.0, 2, {"GOMP_SPINCOUNT": "7"}, None)],
)  # fmt: skip
def test_threads_sleep_where_others_take_their_cores(monkeypatch, busy, cores, given, policy):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PLAINTUNE_BUSY_CORES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(threads, "usable_cores", lambda: set(range(1000, 1000 + cores)))
    monkeypatch.setattr(threads.OtherLoad, "cores", lambda self: busy)
    threads.choose_wait_policy()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    assert bool(threads.wait_policy_note()) == (policy == "passive")
    # What it has set is taken away with the test.
    for name in ("OMP_WAIT_POLICY", "PLAINTUNE_BUSY_CORES"):
        monkeypatch.delenv(name, raising=False)


def test_the_policy_is_chosen_before_torch_is_loaded():
    """A neighbour keeps a core busy; the program under test has as many threads as there are cores."""
    script = "import os, sys; sys.argv = ['train.py', '--model', 'nowhere/at/all']\n"
    script += "import runpy\ntry:\n    runpy.run_path('train.py', run_name='__main__')\nexcept SystemExit:\n    pass\n"
    script += "print(os.environ.get('OMP_WAIT_POLICY'))"
    cores = len(threads.usable_cores())
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP"))}
    environment |= {"OMP_NUM_THREADS": str(max(2, cores)), "HF_HUB_OFFLINE": "1"}
    captured = {"capture_output": True, "text": True}
    try:
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, env=environment, **captured)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert done.stdout.splitlines()[-1] == "passive", done.stderr


def test_a_run_that_another_program_slows_down_says_so_once(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    watch = metrics.SlowdownWatch(torch.device("cpu"))
    busy = [0.0]
    monkeypatch.setattr(watch.load, "cores", lambda: busy[0])
    assert not any(watch.note(200.0) for _ in range(20))
    assert not any(watch.note(60.0) for _ in range(5)), "slow by itself, with nobody else there"
    busy[0] = 0.9
    said = [watch.note(60.0) for _ in range(10)]
    assert [bool(line) for line in said] == [False] * 4 + [True] + [False] * 5
    assert said[4].startswith("60 tokens/s, 200 before: others keep 0.9 cores busy")
