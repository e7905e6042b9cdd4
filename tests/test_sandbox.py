"""Programs in the sandbox can do no harm, as this user and as one without rights; where it is refused, nothing runs."""

import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.escapes import ESCAPES, ROOT, daemons, try_all

from evals import sandbox
from evals.sandbox import FAILED, PASSED, Limits, SandboxRefused, run_program, run_programs, sandbox_refusal

REFUSAL = sandbox_refusal()
ORDINARY = {"user": 65533, "group": 65533, "extra_groups": []}
SCRIPT = ROOT / "tests" / "support" / "escapes.py"
SYSTEM_PYTHON = "/usr/bin/python3"
# Denies namespaces to this process, as a container does by default, and then runs what is named.
WITHOUT_NAMESPACES = """
import platform, runpy, sys
sys.path.insert(0, {root!r})
from evals.sandbox_child import MACHINES, PR_SET_NO_NEW_PRIVS, install_filter, prctl
prctl(PR_SET_NO_NEW_PRIVS, 1)
install_filter(MACHINES[platform.machine()])
{then}
"""


def needs_namespaces(test):
    """The test, where the kernel allows namespaces; elsewhere, that nothing runs."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        if REFUSAL is None:
            return test(*args, **kwargs)
        with pytest.raises(SandboxRefused, match="refuses the sandbox"):
            run_program("pass", Limits())

    return run


def ordinary_user_can_run() -> bool:
    """True if this is root and there is a Python that everybody can read, and the program as well."""
    if os.geteuid() != 0 or not Path(SYSTEM_PYTHON).exists():
        return False
    words = [SYSTEM_PYTHON, "-c", "import sys; assert sys.version_info >= (3, 11); open(sys.argv[1])", str(SCRIPT)]
    return subprocess.run(words, check=False, **ORDINARY, cwd="/", capture_output=True).returncode == 0


USERS = ["this user"]
if ordinary_user_can_run():
    USERS.append("an ordinary user")


@pytest.fixture(scope="module", params=USERS)
def tried(request) -> dict:
    """What try_all returns; {"refused": why} where the kernel refuses."""
    if request.param == "this user":
        return try_all() if REFUSAL is None else {"refused": REFUSAL}
    words = [SYSTEM_PYTHON, str(SCRIPT)]
    result = subprocess.run(words, check=False, **ORDINARY, cwd="/", capture_output=True, text=True)
    if result.returncode == 0:
        return json.loads(result.stdout)
    return {"refused": result.stderr}


@pytest.mark.parametrize("name", ESCAPES)
def test_no_escape_succeeds(name, tried):
    if "refused" in tried:
        assert "refuses the sandbox" in tried["refused"]
        return
    end, reason = tried["outcomes"][name]
    expected = ESCAPES[name]
    parts = expected.reason if isinstance(expected.reason, tuple) else (expected.reason,)
    assert end == expected.end and any(part in reason for part in parts), (end, reason)


def test_all_is_whole_after_the_escapes(tried, capsys):
    refused = "refused" in tried
    with capsys.disabled():
        counts = (0, len(ESCAPES)) if refused else (len(ESCAPES), 0)
        print(f"\n{counts[0]} escapes tried, {counts[1]} refused to run", end=" ")
    if not refused:
        assert (tried["victim"], tried["connections"], tried["daemons"], tried["python"]) == ("whole", 0, 0, True)


@pytest.mark.parametrize("name", ["deleting a file", "writing to a file", "socket to loopback", "environments of all"])
def test_without_the_sandbox_the_same_programs_get_out(name, tmp_path):
    """So that the tests above can fail."""
    victim = tmp_path / "victim"
    victim.write_text("whole")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        known = {"victim": str(victim), "port": listener.getsockname()[1], "secret": "a-secret", "pid": 1, "name": "x"}
        program = ESCAPES[name].program.format(**known)
        environ = {**os.environ, "SECRET": "a-secret"}
        words = [sys.executable, "-c", program]
        result = subprocess.run(words, check=False, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_namespaces
def test_a_program_has_python_packages_and_a_scratch_folder_of_its_own():
    program = (
        "import os, tempfile, numpy\nassert os.getcwd() == '/scratch' and os.listdir() == []\n"
        "assert tempfile.gettempdir() == '/scratch'\nopen('x', 'w').write('x')\n"
        "assert numpy.ones((50, 50)).sum() == 2500\nassert len(os.sched_getaffinity(0)) == 1"
    )
    # The second one finds nothing of the first.
    assert [run_program(program, Limits()) for _ in range(2)] == [(PASSED, "")] * 2


@needs_namespaces
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x =", "SyntaxError: invalid syntax (program.py, line 1)"),
        ("\0", "SyntaxError: source code string cannot contain null bytes"),
        ("raise ValueError('über\\n河')", "ValueError: über\n河"),
        ("x = '\ud800'", "UnicodeEncodeError"),
        ("input()", "EOFError: EOF when reading a line"),
        ("if __name__ == '__main__': pass\nelse: raise OSError('no main')", "OSError: no main"),
        ("(" * 300, "SyntaxError: too many nested parentheses"),
        ("raise OSError('x' * 10 ** 6)", "OSError: xxx"),
    ],
)
def test_what_a_program_raises_is_told(program, reason):
    outcome = run_program(program, Limits())
    assert outcome.end == FAILED
    assert outcome.reason.startswith(reason)
    assert len(outcome.reason) <= 1000


@needs_namespaces
def test_programs_run_several_at_a_time_and_each_outcome_has_its_number():
    programs = [f"assert {i} % 3, {i}" for i in range(12)]
    outcomes = dict(run_programs(programs, Limits()))
    assert sorted(outcomes) == list(range(12))
    assert sorted(i for i in outcomes if outcomes[i].end != PASSED) == [0, 3, 6, 9]
    assert {outcomes[i].reason for i in (0, 3, 6, 9)} == {f"AssertionError: {i}" for i in (0, 3, 6, 9)}


@needs_namespaces
def test_programs_that_run_are_killed_where_their_results_are_not_wanted_any_more():
    """As at Ctrl-C."""
    start = time.monotonic()
    outcomes = run_programs(["pass", *["import time\ntime.sleep(60)"] * 2], Limits(seconds=60), jobs=2)
    assert next(outcomes) == (0, sandbox.Outcome(PASSED))
    outcomes.close()
    assert time.monotonic() - start < 20


@needs_namespaces
def test_a_killed_parent_takes_the_program_with_it():
    name = f"orphan{os.getpid()}"
    program = f"import ctypes, time\nctypes.CDLL(None).prctl(15, b'{name}')\ntime.sleep(60)"
    code = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom evals.sandbox import Limits, run_program\n"
        f"run_program({program!r}, Limits(seconds=100))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert wait_for(lambda: is_running(name))
    finally:
        parent.kill()
        parent.wait()
    assert wait_for(lambda: not is_running(name))


def is_running(name: str) -> bool:
    return daemons(name) > 0


def wait_for(condition) -> bool:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# ---- refusals ----


def test_where_the_kernel_refuses_namespaces_nothing_runs(tmp_path):
    witness = tmp_path / "ran"
    program = f"open({str(witness)!r}, 'w')"
    then = (
        "from evals.sandbox import Limits, run_program, sandbox_refusal\nprint(sandbox_refusal())\n"
        f"print(run_program({program!r}, Limits()))"
    )
    code = WITHOUT_NAMESPACES.format(root=str(ROOT), then=then)
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    reason = "new namespaces (user, mount, pid, net, ipc, uts, cgroup): Operation not permitted"
    assert result.stdout == f"this machine refuses the sandbox that programs run in: {reason}\n"
    assert result.returncode == 1 and "SandboxRefused" in result.stderr
    assert not witness.exists()


def test_evaluate_ends_in_one_line_where_namespaces_are_refused(tmp_path):
    problem = {"task_id": 1, "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass"}
    (tmp_path / "p.jsonl").write_text(json.dumps(problem))
    words = ["evaluate.py", "pass-at-k", "--data", str(tmp_path / "p.jsonl"), "--allow-code-execution"]
    then = f"sys.argv = {words!r}\nrunpy.run_path({str(ROOT / 'evaluate.py')!r}, run_name='__main__')"
    code = WITHOUT_NAMESPACES.format(root=str(ROOT), then=then)
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(
        r"error: no program is run: this machine refuses the sandbox .*: .* not permitted\n", result.stderr
    )


def test_on_other_systems_and_processors_nothing_runs(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert sandbox_refusal().startswith("programs run in Linux namespaces, and this is ")
    monkeypatch.undo()
    report = json.dumps({"refused": "no seccomp filter is written for this processor, riscv64"}).encode()
    with pytest.raises(SandboxRefused, match="for this processor, riscv64"):
        sandbox.outcome_of(report + b"\n", b"", "token", False)
