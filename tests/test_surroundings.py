"""What is around a run: a second process in its folder, a reader or a terminal that goes away, consoles and file names
that are not UTF-8, a cache that can't be written to or is damaged, another working directory."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.helpers import chat_base, command
from support.runs import ROOT, assert_same, lines, records

import flags
import train
from common import errors, files, folder_lock
from common.errors import UserError
from common.files import file_sha256
from common.folder_lock import FolderLock, find_holder
from interop import resolve
from training import checkpointer


def python(code: str, *words, **more) -> subprocess.CompletedProcess:
    """A program of a few lines in a process of its own."""
    line = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, check=False, timeout=60, **more)


# ----------------------------------------------------------------------------------------------- one run a folder

HOLD = """
import sys, time
from pathlib import Path
from common.folder_lock import FolderLock
with FolderLock() as lock:
    lock.acquire(Path(sys.argv[1]))
    print("locked", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run"), "60"]
    child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"locked\n"
    yield child
    child.kill()
    child.wait()


def test_the_second_process_is_told_who_the_first_is(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "ATTEMPTS", 2)
    run = tmp_path / "run"
    named = rf"run: process {holder.pid} on {socket.gethostname()} is writing into it since \d{{4}}-\d\d-\d\d \d\d:"
    with FolderLock() as lock:
        with pytest.raises(UserError, match=named):
            lock.acquire(run)
        # Whoever was refused removes nothing of the first one's.
        lock.release()
        assert (run / ".lock").is_file()
        assert f"process {holder.pid} on" in find_holder(run)
        # A killed process leaves its file and no lock.
        holder.kill()
        holder.wait()
        assert (run / ".lock").is_file() and find_holder(run) is None
        assert lock.acquire(run) == ""
        assert f"process {os.getpid()} on" in find_holder(run)
    assert not (run / ".lock").exists() and find_holder(run) is None


def test_what_the_lock_made_goes_with_it_unless_something_came_into_it(tmp_path):
    with FolderLock() as lock:
        lock.acquire(tmp_path / "a/b/c")
        assert (tmp_path / "a/b/c/.lock").is_file()
        (tmp_path / "a/file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]
    with FolderLock() as lock:
        lock.acquire(tmp_path / "a")
    assert (tmp_path / "a").is_dir()


def test_a_process_of_another_machine_that_left_its_file_is_named(tmp_path):
    text = {"process": 12, "host": "elsewhere", "since": "2026-01-02 03:04:05"}
    (tmp_path / ".lock").write_text(json.dumps(text))
    with FolderLock() as lock:
        remark = lock.acquire(tmp_path)
    assert remark.startswith("process 12 on elsewhere wrote here since 2026-01-02 03:04:05 and did not end by itself")
    for damaged in ("", "{", "[1]", '{"process": "x"}'):
        (tmp_path / ".lock").write_text(damaged)
        with FolderLock() as lock:
            lock.acquire(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_a_process_of_this_machine_is_known_by_its_number(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(folder_lock, "ATTEMPTS", 1)
    text = {"process": os.getppid(), "host": socket.gethostname(), "since": "2026-01-02 03:04:05"}
    (tmp_path / ".lock").write_text(json.dumps(text))
    with FolderLock() as lock, pytest.raises(UserError, match=f"process {os.getppid()} on"):
        lock.acquire(tmp_path)
    # The number of a process that has ended.
    child = subprocess.Popen(["true"])
    child.wait()
    (tmp_path / ".lock").write_text(json.dumps(text | {"process": child.pid}))
    with FolderLock() as lock:
        assert lock.acquire(tmp_path) == ""


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with FolderLock() as lock, pytest.raises(UserError, match=r"file/run: can't be written to \(Not a directory\)"):
        lock.acquire(tmp_path / "file/run")


def test_two_runs_do_not_share_a_folder(job, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    words = [*job("lora"), "--steps", "5000", "--save-every", "5", "--out", str(out)]
    first = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.time() + 120
        while find_holder(out) is None or first.pid != folder_lock.read_holder(out / ".lock").get("process"):
            assert first.poll() is None and time.time() < deadline
            time.sleep(0.02)
        wanted = f"error: --out {out}: process {first.pid} on {socket.gethostname()} is writing into it since "
        # Before the first one has written anything, and afterwards.
        _, err, code = command(train, monkeypatch, capsys, *words)
        assert code == 2 and err.startswith(wanted) and err.count("\n") == 1, err
        while not checkpointer.list_checkpoints(out / "checkpoints"):
            assert first.poll() is None and time.time() < deadline
            time.sleep(0.02)
        for more in ([], ["--overwrite"], ["--resume"], ["--resume", "auto"]):
            _, err, code = command(train, monkeypatch, capsys, *words, *more)
            assert code == 2 and err.startswith(wanted) and err.count("\n") == 1, err
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert (out / ".lock").is_file() and find_holder(out) is None
    # The next one may go on.
    _, err, code = command(train, monkeypatch, capsys, *words, "--resume", "--lr", "1")
    assert code == 2 and "was made with other flags: --lr 1.0 (it was" in err
    assert not (out / ".lock").exists()


def test_a_refused_run_leaves_no_folder(job, tmp_path, monkeypatch, capsys):
    words = [*job("lora"), "--seq-len", "100000", "--out", tmp_path / "a/run"]
    _, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 2 and "--seq-len 100000" in err
    assert not (tmp_path / "a").exists()


# ----------------------------------------------------------------------------------------------- what is printed


def test_a_run_goes_on_where_nobody_reads_what_it_prints(job, tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    line = [sys.executable, "train.py", *job("lora"), "--out", str(tmp_path / "run")]
    done = subprocess.run(line, cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    remark = "stdout is closed; what follows is not printed, a run's numbers are in metrics.jsonl (Broken pipe)\n"
    assert done.returncode == 0 and done.stderr == remark
    assert lines(tmp_path / "run")[-1]["step"] == 14 and (tmp_path / "run/final").is_dir()


PRINT = """
import os, sys
from common.console import lasting_output
from common.errors import run

def main():
    with lasting_output("nobody reads"):
        for number in range(3):
            print("x" * 100_000, flush=True)
        print("y" * 100_000, file=sys.stderr)
        sys.stdout.write("not flushed")
    os.write(int(sys.argv[1]), b"end")

run(main)
"""


@pytest.mark.parametrize("shell", ["true |", "exec >&-;", "exec 2>&-;", "exec >&- 2>&- <&-;", "exec >/dev/full 2>&1;"])
def test_output_that_goes_nowhere_ends_nothing(shell):
    read_end, write_end = os.pipe()
    line = f'exec {write_end}>&{write_end}; {shell} "$0" -c "$1" {write_end}'
    if shell == "true |":
        line = f'"$0" -c "$1" {write_end} 2>&1 | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, PRINT], cwd=ROOT, check=False, capture_output=True, pass_fds=[write_end]
    )
    os.close(write_end)
    assert done.returncode == 0, done
    assert os.read(read_end, 10) == b"end"
    os.close(read_end)


def test_where_a_script_s_reader_goes_away_before_a_run_the_script_ends():
    code = "from common.errors import run\nrun(lambda: print('x' * 100_000, flush=True))"
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | true; exit ${PIPESTATUS[0]}', sys.executable, code],
        cwd=ROOT,
        check=False,
        capture_output=True,
    )
    assert done.returncode == 1 and done.stderr == b""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16", "ascii:surrogateescape"])
def test_a_console_of_another_encoding_gets_escapes(encoding):
    code = "import sys\nfrom common.errors import UserError, run\n"
    code += "def main():\n    print('\\u6cb3 \\udcff')\n    raise UserError('\\u6cb3 \\udcff: no such file')\nrun(main)"
    done = python(code, env=os.environ | {"PYTHONIOENCODING": encoding})
    codec = encoding.partition(":")[0]
    shown = "河" if codec.startswith("utf") else "\\u6cb3"
    assert done.returncode == 2
    assert done.stdout.decode(codec) == f"{shown} \\udcff\n"
    assert done.stderr.decode(codec) == f"error: {shown} \\udcff: no such file\n"


def test_without_a_locale_nothing_ends_in_a_traceback():
    code = "from common.errors import run\nrun(lambda: print('\\u6cb3'))"
    plain = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = python(code, env=plain)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u6cb3\n", b"")


# ----------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("ignored, wanted", [(False, "1"), (True, "0")])
def test_a_terminal_that_is_closed_stops_a_run_unless_it_runs_under_nohup(ignored, wanted):
    code = "import os, signal, sys, time\nfrom training import signals\n"
    code += "with signals.GracefulStop() as stop:\n    os.kill(os.getpid(), 1)\n    time.sleep(0.2)\n"
    code += "    print(stop.signal)\n    os.kill(os.getpid(), 15)\n    time.sleep(0.2)\n    print(stop.signal)"

    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    done = python(code, preexec_fn=prepare, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [wanted, "15" if ignored else "1"]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGXCPU"])
@pytest.mark.parametrize("ignored", [False, True])
def test_what_schedulers_send_before_they_kill_a_job_stops_a_run(name, ignored):
    """Slurm's --signal=USR1@300, Grid Engine's -notify: they ended the process, and no checkpoint was written."""
    number = int(getattr(signal, name))
    code = "import os, signal, sys, time\nfrom training import signals\n"
    code += "with signals.GracefulStop() as stop:\n    os.kill(os.getpid(), int(sys.argv[1]))\n"
    code += "    time.sleep(0.2)\n    print(stop.signal)"

    def prepare():
        signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)

    done = python(code, number, preexec_fn=prepare, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(0 if ignored else number)), done.stderr


def test_a_run_whose_terminal_is_closed_writes_a_checkpoint(job, tmp_path, monkeypatch, capsys):
    """The terminal is a real one, and what is printed to it fails afterwards."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    words = [*job("lora"), "--steps", "60", "--save-every", "50"]
    assert command(train, monkeypatch, capsys, *words, "--out", whole)[2] == 0
    master, slave = os.openpty()
    line = [sys.executable, "train.py", *words, "--out", str(out)]
    # A session of its own, whose terminal this is. (The tests may run under nohup, which would be inherited.)
    opened = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL);"
    opened += " os.close(os.open(sys.argv[1], os.O_RDWR)); os.execv(sys.executable, sys.argv[2:])"
    line = [sys.executable, "-c", opened, os.ttyname(slave), *line]
    child = subprocess.Popen(line, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    deadline = time.time() + 60
    while not (out / "metrics.jsonl").is_file() or len(lines(out)) < 6:
        assert child.poll() is None and time.time() < deadline
        time.sleep(0.01)
    os.close(master)
    assert child.wait(60) == 128 + signal.SIGHUP
    (kept,) = checkpointer.list_checkpoints(out / "checkpoints")
    assert int(kept.name[5:]) < 60
    assert command(train, monkeypatch, capsys, "--out", out, "--resume")[2] == 0
    assert_same(whole, out)


# ----------------------------------------------------------------------------------------------- names and folders


@pytest.mark.parametrize("method", ["lora", "full"])
def test_file_names_that_are_not_utf8_work(tmp_path, monkeypatch, capsys, method):
    folder = tmp_path / os.fsdecode(b"\xff\xc3\xa9")
    folder.mkdir()
    run = folder / os.fsdecode("河 $x ".encode() + b"\xff")
    base = chat_base(tmp_path / "base", num_key_value_heads=2)
    shutil.copytree(base, folder / "base")
    data = records(folder / os.fsdecode(b"d\xff.jsonl"), 20, 0)
    monkeypatch.chdir(folder)
    words = ["--model", "base", "--data", data.name, "--method", method, "--steps", 4, "--save-every", 2]
    out, err, code = command(train, monkeypatch, capsys, *words, "--out", run)
    assert code == 0, err
    assert "d\\udcff.jsonl" in out
    assert json.loads((run / "config.json").read_text())["data"] == [str(data)]
    losses = [line.get("loss") for line in lines(run)]
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints/step-4")
    monkeypatch.chdir(tmp_path)
    out, err, code = command(train, monkeypatch, capsys, "--out", run, "--resume")
    assert code == 0, err
    assert "resumed   after step 2 of 4" in out
    assert [line.get("loss") for line in lines(run)] == losses


@pytest.fixture
def stopped(tmp_path, monkeypatch, capsys):
    """A run after step 5 of 12, begun in tmp_path/home with relative paths."""
    home = tmp_path / "home"
    chat_base(home / "base", num_key_value_heads=2)
    records(home / "data.jsonl", 20, 0)
    records(home / "val.jsonl", 5, 9)
    monkeypatch.chdir(home)
    words = ["--model", "base", "--data", "data.jsonl=2", "--replay", "val.jsonl=0.1", "--val", "val.jsonl"]
    words += ["--batch-size", 3, "--steps", 12, "--save-every", 5, "--eval-every", 4, "--keep", 9]
    _, err, code = command(train, monkeypatch, capsys, *words, "--out", "run")
    assert code == 0, err
    shutil.copytree(home / "run", tmp_path / "whole")
    shutil.rmtree(home / "run/final")
    shutil.rmtree(home / "run/checkpoints/step-10")
    shutil.rmtree(home / "run/checkpoints/step-12")
    return home / "run"


def test_a_run_is_resumed_from_another_working_directory(stopped, tmp_path, monkeypatch, capsys):
    home = stopped.parent
    saved = json.loads((stopped / "config.json").read_text())
    assert saved["model"] == str(home / "base") and saved["data"] == [f"{home / 'data.jsonl'}=2"]
    assert saved["replay"] == [f"{home / 'val.jsonl'}=0.1"] and saved["out"] == str(stopped)
    monkeypatch.chdir("/")
    _, err, code = command(train, monkeypatch, capsys, "--out", stopped, "--resume")
    assert code == 0, err
    assert_same(tmp_path / "whole", stopped)


def test_a_run_that_was_moved_with_all_its_files_goes_on(stopped, tmp_path, monkeypatch, capsys):
    moved = tmp_path / "elsewhere/moved"
    moved.parent.mkdir()
    stopped.parent.rename(moved)
    monkeypatch.chdir(tmp_path)
    words = ["--out", moved / "run", "--resume"]
    _, err, code = command(train, monkeypatch, capsys, *words)
    advice = "which is not here; if it was moved, give --model again"
    assert code == 2 and f"--model {stopped.parent / 'base'}, {advice}" in err
    monkeypatch.chdir(moved)
    _, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 0, err
    assert_same(tmp_path / "whole", moved / "run")


def test_a_run_of_before_has_relative_paths(stopped, tmp_path, monkeypatch, capsys):
    """It goes on where it was begun; elsewhere the message says that."""
    checkpoint = stopped / "checkpoints/step-5"
    state = json.loads((checkpoint / "state.json").read_text())
    state["flags"] |= {"model": "base", "data": ["data.jsonl=2"], "replay": ["val.jsonl=0.1"], "val": "val.jsonl"}
    del state["directory"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["state.json"] = file_sha256(checkpoint / "state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(tmp_path)
    words = ["--out", stopped, "--resume"]
    _, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 2 and "made with --data data.jsonl=2, which is not here; start from the folder in which" in err
    monkeypatch.chdir(stopped.parent)
    _, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 0, err
    assert_same(tmp_path / "whole", stopped)


def test_a_path_is_compared_by_what_it_names(tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "map.py").touch()
    monkeypatch.chdir(tmp_path)
    typed = flags.Flags(adapter="adapter", map="map.py:f", given=frozenset({"adapter", "map"}))
    saved = flags.as_dict(typed)
    assert (saved["adapter"], saved["map"]) == (str(tmp_path / "adapter"), f"{tmp_path / 'map.py'}:f")
    assert checkpointer.unchanged_flags(typed, {"adapter": saved["adapter"], "map": saved["map"]}, tmp_path) == {}
    assert checkpointer.unchanged_flags(typed, {"adapter": "adapter", "map": "./map.py:f"}, tmp_path) == {}
    with pytest.raises(UserError, match=r"--adapter adapter \(it was other\)"):
        checkpointer.unchanged_flags(typed, {"adapter": "other"}, tmp_path)
    moved = str(tmp_path / "gone")
    with pytest.raises(UserError, match=f"made with --val {moved}, which is not here; if it was moved, give --val"):
        checkpointer.unchanged_flags(typed, {"val": moved}, tmp_path)
    # A name on the Hub is no path.
    taken = checkpointer.unchanged_flags(typed, {"model": "org/model@main"}, tmp_path)
    assert taken == {"model": "org/model@main"} and flags.absolute_path("org/model@main") == "org/model@main"
    (tmp_path / "a=3").touch()
    (tmp_path / "link").symlink_to("adapter")
    assert flags.absolute_path("a=3") == str(tmp_path / "a=3")
    assert flags.absolute_path("link=0.5") == f"{tmp_path / 'link'}=0.5"


def test_a_working_directory_that_is_gone_is_said(monkeypatch, capsys):
    def getcwd():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", getcwd)
    with pytest.raises(SystemExit, match="2"):
        errors.run(lambda: None)
    assert capsys.readouterr().err.startswith("error: the working directory was deleted; change to one that exists")


def test_without_a_home_folder_the_cache_s_variable_is_named(monkeypatch):
    monkeypatch.delenv("PLAINTUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def expanduser(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    with pytest.raises(UserError, match="no home folder .* set PLAINTUNE_CACHE to another folder"):
        files.cache_folder()


def test_a_gguf_file_without_a_cache_to_convert_it_into_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(resolve, "cache_folder", lambda: tmp_path / "file/cache")
    problem = r"file/cache: the cache can't be written to \(Not a directory\); set PLAINTUNE_CACHE to another folder"
    with pytest.raises(UserError, match=problem):
        resolve.model_folder(tmp_path / "model.gguf")

    def convert(path, folder, replace):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(resolve, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(resolve, "gguf_to_folder", convert)
    with pytest.raises(UserError, match="cache: the cache has no room left .* or set PLAINTUNE_CACHE"):
        resolve.model_folder(tmp_path / "model.gguf")


@pytest.mark.parametrize("steps, line", [(2, "no checkpoints, the run is short: 2 steps"), (10, "every 2 steps")])
def test_a_run_of_a_few_steps_writes_no_checkpoint(job, tmp_path, monkeypatch, capsys, steps, line):
    words = job("lora")
    words[words.index("--save-every") : words.index("--save-every") + 2] = []
    out, err, code = command(train, monkeypatch, capsys, *words, "--steps", steps, "--out", tmp_path / "run")
    assert code == 0, err
    assert line in out and (tmp_path / "run/checkpoints").exists() == (steps == 10)
