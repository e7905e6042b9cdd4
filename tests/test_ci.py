""".ci/run: what it installs, what becomes of the run where that fails, and which skipped tests it accepts. A copy of it
runs with programs that stand for apt-get and the rest, and with a README whose command prints what pytest would."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORDNET = "/usr/share/wordnet"
TOOLS = ("bash", "awk", "sed", "grep", "tee", "rm", "mktemp", "mkdir", "dirname", "cat", "env", "touch", "chmod")


@pytest.fixture
def machine(tmp_path):
    """machine(...): exit code and output of .ci/run on a machine that has these programs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    wordnet = tmp_path / "wordnet"

    def program(name: str, text: str) -> None:
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)

    def run(
        skips: tuple[str, ...] = (), apt: str | None = "exit 0", uid: int = 0, sudo: str = "", browser: bool = True
    ) -> tuple[int, str]:
        for name in TOOLS:
            place = next(Path(folder) / name for folder in ("/bin", "/usr/bin") if (Path(folder) / name).exists())
            (programs / name).symlink_to(place)
        program("id", f"echo {uid}")
        if sudo:
            program("sudo", sudo)
        if apt is not None:
            program("apt-get", f'echo "apt-get $1 ${{@: -1}} by $(id -u)"\n{apt}')
        if browser:
            program("chromium", "")
            program("chromedriver", "")
        (tmp_path / ".ci").mkdir()
        script = (ROOT / ".ci/run").read_text().replace(WORDNET, str(wordnet))
        (tmp_path / ".ci/run").write_text(script)
        said = "".join(f"echo 'SKIPPED [1] tests/test_a.py:3: {reason}'\n" for reason in skips)
        command = "mkdir -p .venv-test/bin\nprintf '#!/bin/bash\\necho mypy ran' >.venv-test/bin/python\n"
        command += f"chmod +x .venv-test/bin/python\necho the tests ran\n{said}"
        (tmp_path / "README.md").write_text(f"<!-- the command of the tests -->\n```\n{command}```\n")
        done = subprocess.run(
            ["/bin/bash", ".ci/run"], cwd=tmp_path, env={"PATH": str(programs), "HOME": str(tmp_path)},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert "unbound variable" not in done.stderr and "command not found" not in done.stderr, done.stderr
        return done.returncode, done.stdout

    run.wordnet = wordnet
    return run


def test_what_is_there_is_not_installed(machine):
    machine.wordnet.mkdir()
    (machine.wordnet / "data.noun").touch()
    code, said = machine(("needs a GPU", "needs ../shared"))
    assert code == 0 and said.endswith("mypy ran\n") and "installing" not in said and "WARNING" not in said


def test_browser_and_wordnet_are_installed_by_root(machine):
    code, said = machine(browser=False)
    assert code == 0 and "WARNING" not in said
    calls = [line for line in said.splitlines() if line.startswith("apt-get ")]
    assert [call.split()[1] for call in calls] == ["update", "install"] * 2
    assert "apt-get install fonts-dejavu-core by 0" in calls and "apt-get install wordnet-base by 0" in calls


def test_another_user_installs_through_sudo(machine):
    code, said = machine(uid=1000, sudo='shift\n"$@"')
    assert code == 0 and "apt-get install wordnet-base" in said and "WARNING" not in said


@pytest.mark.parametrize(
    ("here", "problem"),
    [
        ({"apt": "exit 100"}, "apt-get has failed, see its message above"),
        ({"apt": None}, "there is no apt-get here"),
        ({"uid": 1000}, "that needs root, or sudo without a password"),
        ({"uid": 1000, "sudo": "exit 1"}, "that needs root, or sudo without a password"),
    ],
)
def test_without_network_or_rights_the_run_goes_on_and_says_what_is_not_tested(machine, here, problem):
    """The test of METEOR's synonyms may skip then; the last lines of the run say so."""
    code, said = machine(("needs WordNet (Debian wordnet-base)",), browser=False, **here)
    assert code == 0 and "the tests ran" in said
    browser = "chromium chromium-driver fonts-dejavu-core could not be installed"
    wordnet = "wordnet-base could not be installed"
    assert said.splitlines()[-2:] == [
        f"WARNING: {browser} ({problem}): without a browser the tests of pages fail",
        f"WARNING: {wordnet} ({problem}): without WordNet METEOR's synonyms are not tested",
    ]


def test_a_list_that_cannot_be_fetched_is_no_end(machine):
    code, said = machine(apt='[ "$1" = install ]')
    assert code == 0 and "apt-get update has failed" in said and "WARNING" not in said


@pytest.mark.parametrize("reason", ["needs WordNet (Debian wordnet-base)", "no reason", "needs chromium"])
def test_a_test_that_skips_with_no_good_reason_fails_the_run(machine, reason):
    code, said = machine((reason, "needs a GPU"))
    assert code == 1 and said.endswith(f"{reason}\ntests were skipped that must run here\n") and "mypy" not in said
