"""A result on the Hub (train.py --push, convert.py push) against a Hub on loopback: what is uploaded, who may see it,
each refusal before the training, and a failure after it, which loses nothing."""

import json
import sys
from pathlib import Path

import pytest
from support.helpers import chat_base, sentence
from support.loopback_hub import Hub, run

import convert
import train
from common.errors import UserError
from common.errors import run as run_script
from flags import parse_flags
from interop import push

TOKEN = "hf_loopback"
ME = {"name": "me", "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "guests", "roleInOrg": "read"}]}
ONLINE = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}  # xet's servers are others than the Hub's


@pytest.fixture
def server():
    server = Hub()
    server.users[TOKEN] = ME | {"auth": {"accessToken": {"role": "write"}}}
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base, examples, and an adapter folder as peft writes it."""
    home = tmp_path_factory.mktemp("push")
    chat_base(home / "base", num_key_value_heads=2)
    records = [{"prompt": sentence(i, 4), "completion": sentence(i + 50, 3)} for i in range(24)]
    (home / "examples.json").write_text(json.dumps(records))
    adapter = home / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "r": 2}))
    (adapter / "adapter_model.safetensors").write_bytes(b"large" * 200)
    (adapter / "README.md").write_text("---\nlibrary_name: peft\n---\n# A card")
    (adapter / ".DS_Store").write_bytes(b"of a file manager")
    return home


def script(module, *words):
    """A script with these words, as work for a process of its own."""

    def work():
        sys.argv = ["script.py", *map(str, words)]
        run_script(module.main)

    return work


def training(home: Path, out: Path, *words):
    job = ("--model", home / "base", "--data", home / "examples.json", "--steps", 2, "--dtype", "fp32")
    return script(train, *job, "--batch-size", 2, "--compile", "off", "--out", out, *words)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


def test_a_folder_becomes_a_private_repository(server, home, tmp_path):
    code, out, err = run(server.url, tmp_path, script(convert, "push", home / "adapter", "lab/mine"), **ONLINE)
    assert code == 0, err
    page = f"{server.url}/lab/mine"
    assert out == f"pushed    {home / 'adapter'} to {page} (private; {page}/settings makes it public)\n"
    assert server.created == [{"name": "mine", "organization": "lab", "visibility": "private"}]
    assert server.repos["lab/mine"]["files"] == files_of(home / "adapter")


def test_weights_of_before_go_and_other_files_stay(server, home, tmp_path):
    """Else a loader might put this adapter's settings on the weights of another result."""
    before = dict.fromkeys(["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"], b"old")
    kept = {"figure.png": b"theirs", "README.md": b"old"}
    server.repos["me/mine"] = {"files": before | kept, "private": False}
    code, out, err = run(server.url, tmp_path, script(convert, "push", home / "adapter", "me/mine"), **ONLINE)
    assert code == 0 and out.endswith("(public)\n") and not server.created, err
    assert server.repos["me/mine"]["files"] == {"figure.png": b"theirs"} | files_of(home / "adapter")


def test_a_run_is_pushed_with_its_card(server, home, tmp_path):
    code, out, err = run(server.url, tmp_path, training(home, tmp_path / "run", "--push", "me/tuned"), **ONLINE)
    assert code == 0, err
    lines = out.splitlines()
    page = f"{server.url}/me/tuned"
    assert lines[0] == f"push      after the run to {page}, a new repository; it is private"
    assert lines[-1].startswith(f"pushed    {tmp_path / 'run/final'} to {page} (private")
    pushed = server.repos["me/tuned"]["files"]
    assert pushed == files_of(tmp_path / "run/final")
    card = pushed["README.md"].decode()
    assert "--push" not in card and str(tmp_path) not in card and TOKEN not in card
    note = f"NOTE: adapter_config.json names the base by a path of this machine, {(home / 'base').resolve()}; others"
    assert note in out


REFUSED = {
    "no token": ("me/x", {"HF_TOKEN": ""}, {}, "there is no token; log in by `hf auth login`, or set HF_TOKEN"),
    "an unknown token": ("me/x", {"HF_TOKEN": "hf_other"}, {}, "the Hub does not know the token (HTTP 401)"),
    "a reading token": ("me/x", {"HF_TOKEN": "hf_read"}, {}, "the token may only read; make one that may write"),
    "others": ("they/x", {}, {}, "they is neither the token's user, me, nor one of its organizations"),
    "a guest": ("guests/x", {}, {}, "me may only read in guests"),
    "offline": ("me/x", {"HF_HUB_OFFLINE": "1"}, {}, "HF_HUB_OFFLINE is set"),
    "nobody there": ("me/x", {"HF_ENDPOINT": "http://127.0.0.1:9"}, {}, "http://127.0.0.1:9 can't be reached ("),
    "no new ones": ("me/x", {}, {"/api/repos/create": 403}, "the token may not write to me/x (HTTP 403)"),
}


@pytest.mark.parametrize(("name", "environment", "refused", "message"), REFUSED.values(), ids=REFUSED)
def test_each_refusal_comes_before_the_training(name, environment, refused, message, server, home, tmp_path):
    server.users["hf_read"] = ME | {"auth": {"accessToken": {"role": "read"}}}
    server.refused |= refused
    work = training(home, tmp_path / "run", "--push", name)
    code, out, err = run(server.url, tmp_path, work, **(ONLINE | environment))
    assert code == 2 and err.startswith(f"error: --push {name}: {message}") and err.count("\n") == 1, err
    assert "validation loss" not in out and not (tmp_path / "run").exists()


def test_a_push_that_fails_loses_nothing_and_is_repeated_by_its_line(server, home, tmp_path):
    server.refused["/api/models/me/tuned/commit/main"] = 400
    final = tmp_path / "run/final"
    code, _, err = run(server.url, tmp_path, training(home, tmp_path / "run", "--push", "me/tuned"), **ONLINE)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith(f"error: {final} is not on the Hub (me/tuned: {server.url} refused (HTTP 400")
    assert last.endswith(f"and whole here; python convert.py push {final} me/tuned tries again")
    assert (final / "adapter_model.safetensors").is_file() and not server.repos["me/tuned"]["files"]
    # The same command again does not train again, and says how to push.
    again = training(home, tmp_path / "run", "--push", "me/tuned", "--resume")
    code, out, err = run(server.url, tmp_path, again, **ONLINE)
    assert code == 0 and f"NOTE      nothing is pushed again; python convert.py push {final} me/tuned does it" in out
    server.refused.clear()
    code, _, err = run(server.url, tmp_path, script(convert, "push", final, "me/tuned"), **ONLINE)
    assert code == 0 and server.repos["me/tuned"]["files"] == files_of(final), err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push", "mine"], "--push mine: ORG/NAME is wanted"),
        (["--push", "me/mine@v1"], "--push me/mine@v1: ORG/NAME is wanted"),
        (["--push", "me/mine", "--profile", "3"], "--push: a run under --profile has no result"),
    ],
)
def test_what_is_no_name_is_refused_at_once(words, message):
    with pytest.raises(UserError, match=message):
        parse_flags(words)


def test_a_folder_that_is_no_result_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no config.json nor adapter_config.json"):
        push.push_folder(tmp_path, "me/mine")
    with pytest.raises(UserError, match="mine: org/name is wanted"):
        (tmp_path / "config.json").write_text("{}")
        push.push_folder(tmp_path, "mine")
