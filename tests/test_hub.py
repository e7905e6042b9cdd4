"""interop/hub.py against a small Hub on loopback: what is fetched, what is not, and each way in which it can
go wrong."""

import errno
import fcntl
import json
import os
import pty
import random
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
from support.helpers import chat_base, command, llama
from support.loopback_hub import COMMIT, Hub, environment, fork, run

import convert
import evaluate
import generate
import lora
from checkpoint import load_model
from common import errors
from common.files import hub_origin
from interop import hub, resolve

ROOT = Path(hub.__file__).parent.parent


@pytest.fixture
def server():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, bytes]:
    """The files of a small Llama with tokenizer and template."""
    folder = chat_base(tmp_path_factory.mktemp("model"))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sharded")
    theirs = llama(folder)
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="100KB")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def fetch(name: str):
    """As a script would."""
    return lambda: errors.run(lambda: print(hub.fetch(name)))


def fetch_all(names):
    """Each in turn; a line of JSON each."""

    def work():
        for name in names:
            try:
                print(json.dumps({"folder": str(hub.fetch(name))}))
            except errors.UserError as error:
                print(json.dumps({"error": str(error)}))

    return work


def fetched(url: str, home: Path, name: str, **more: str) -> tuple[Path, str]:
    code, out, err = run(url, home, fetch(name), **more)
    assert code == 0, err
    return Path(out.strip()), err


def refused(url: str, home: Path, name: str, **more: str) -> str:
    code, out, err = run(url, home, fetch(name), **more)
    assert code == 2 and not out and err.count("\n") == 1 and err.startswith(f"error: {name}: "), err
    return err


def test_what_a_folder_needs_is_fetched_and_nothing_else(server, model, tmp_path):
    extras = {
        "pytorch_model.bin": b"pickle", "consolidated.safetensors": b"again", "model.fp16.safetensors": b"again",
        "model-Q4.gguf": b"GGUF", "onnx/model.onnx": b"o", "original/consolidated.00.pth": b"p", "args.bin": b"p",
        "README.md": b"r", "modeling_custom.py": b"import os", "sub/config.json": b"{}", "../outside.json": b"{}",
    }  # fmt: skip
    wanted = model | {"additional_chat_templates/rag.jinja": b"{{ messages }}", "merges.txt": b"m"}
    server.repos["org/tiny"] = {"files": wanted | extras}
    folder, said = fetched(server.url, tmp_path, "org/tiny")
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert found == wanted
    assert {path.removeprefix("org/tiny/") for _, path, _ in server.asked} == wanted.keys()
    size = sum(len(content) for name, content in wanted.items() if name != "config.json") / 1e6
    count = f"{len(wanted) - 1} of {len(wanted)} files, {size:,.1f} MB"
    assert said == f"fetching org/tiny, commit {COMMIT[:12]}, from {server.url}: {count}\n"  # and no bar
    again, said = fetched(server.url, tmp_path, "org/tiny")
    assert again == folder and said == f"org/tiny, commit {COMMIT[:12]}, is in the cache\n"
    assert len(server.got("org/tiny")) == len(wanted)  # none a second time


def test_of_shards_those_that_the_index_names(server, sharded, tmp_path):
    assert len(sharded) > 5
    server.repos["org/shards"] = {"files": sharded | {"consolidated.safetensors": b"x", "model-9.safetensors": b"x"}}
    folder, _ = fetched(server.url, tmp_path, "org/shards@v1")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == sharded
    assert load_model(folder).config.num_layers == 3


def test_a_new_commit_with_the_same_weights_costs_no_bytes(server, model, tmp_path):
    server.repos["org/tiny"] = {"files": model}
    old, _ = fetched(server.url, tmp_path, "org/tiny")
    server.repos["org/tiny"]["commit"] = "f" * 40
    new, said = fetched(server.url, tmp_path, "org/tiny")
    assert new != old and (new / "model.safetensors").read_bytes() == model["model.safetensors"]
    assert "commit ffffffffffff, is in the cache" in said
    assert server.got("org/tiny").count("org/tiny/model.safetensors") == 1


def test_an_adapter_notes_the_name_of_its_base_and_is_put_on_it_again(server, model, tmp_path):
    """Under the name it works on every machine, for peft too; the cache's path is this machine's own."""
    server.repos["org/tiny"] = {"files": model}
    folder, _ = fetched(server.url, tmp_path, "org/tiny")
    base, adapter = load_model(folder), tmp_path / "adapter"
    lora.add_lora(base, 2, 4.0)
    lora.save_adapter(base, adapter)
    config = peft.PeftConfig.from_pretrained(adapter)
    assert (config.base_model_name_or_path, config.revision) == ("org/tiny", COMMIT)
    find = lambda: errors.run(lambda: print(resolve.base_folder(None, adapter)))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code, out, _ = run(server.url, elsewhere, find)
    first, second = out.splitlines()
    assert code == 0 and first == f"base      org/tiny@{COMMIT}: {adapter} was made on it"
    assert Path(second).is_relative_to(elsewhere) and (Path(second) / "model.safetensors").is_file()
    del server.repos["org/tiny"]
    other = tmp_path / "other"
    other.mkdir()
    code, _, err = run(server.url, other, find)
    assert code == 2 and err.startswith(f"error: {adapter}: its base can't be fetched; give --model (org/tiny@")
    assert err.count("\n") == 1
    assert hub_origin(Path("/home/models--x/snapshots/y")) is hub_origin(Path("/a")) is hub_origin(Path("/")) is None


def test_a_commit_that_is_in_the_cache_is_not_asked_for_again(server, model, tmp_path):
    """The user of an adapter has given no name, and the adapter's names a commit, which never changes."""
    server.repos["org/tiny"] = {"files": model}
    folder, _ = fetched(server.url, tmp_path, "org/tiny")
    base, adapter = load_model(folder), tmp_path / "adapter"
    lora.add_lora(base, 2, 4.0)
    lora.save_adapter(base, adapter)
    find = lambda: errors.run(lambda: print(resolve.base_folder(None, adapter)))
    nobody = "http://127.0.0.1:9"
    code, out, err = run(nobody, tmp_path, find)
    assert code == 0 and out == f"base      org/tiny@{COMMIT}: {adapter} was made on it\n{folder}\n" and not err
    (folder / "model.safetensors").resolve().unlink()
    code, _, err = run(nobody, tmp_path, find)
    assert code == 2 and "its base can't be fetched; give --model" in err
    code, out, _ = run(server.url, tmp_path, find)
    assert code == 0 and (folder / "model.safetensors").is_file()


def test_a_connection_that_breaks_is_taken_up_where_it_was(server, model, tmp_path):
    large = random.Random(0).randbytes(25_000_000)  # huggingface_hub counts in pieces of 10 MiB
    server.repos["org/tiny"] = {"files": model | {"model.safetensors": large}, "breaks": "model.safetensors"}
    folder, _ = fetched(server.url, tmp_path, "org/tiny")
    assert (folder / "model.safetensors").read_bytes() == large
    ranges = [part for method, path, part in server.asked if method == "GET" and path.endswith("model.safetensors")]
    assert ranges == [None, f"bytes={10 << 20}-"]


def test_a_killed_run_keeps_the_files_that_it_had(server, sharded, tmp_path):
    last = max(name for name in sharded if name.endswith(".safetensors"))
    server.repos["org/shards"] = {"files": sharded, "stalls": last}
    first = fork(fetch("org/shards"), tmp_path / "first", environment(server.url, tmp_path))
    deadline = time.time() + 60
    while ("GET", f"org/shards/{last}", None) not in server.asked and time.time() < deadline:
        time.sleep(0.01)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert "not all of it is in the cache" in refused(server.url, tmp_path, "org/shards", HF_HUB_OFFLINE="1")
    server.asked.clear()
    del server.repos["org/shards"]["stalls"]
    folder, said = fetched(server.url, tmp_path, "org/shards")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == sharded
    assert server.got("org/shards") == [f"org/shards/{last}"] and f": 1 of {len(sharded)} files" in said


def test_without_the_hub_the_cache_does_and_it_is_said(server, model, tmp_path):
    server.repos["org/tiny"] = {"files": model}
    folder, _ = fetched(server.url, tmp_path, "org/tiny")
    server.repos["org/tiny"]["answer"] = (b"<html>down</html>", 503)
    found, said = fetched(server.url, tmp_path, "org/tiny")
    assert found == folder and "HTTP 503" in said
    server.shutdown()
    server.server_close()
    names = ("org/tiny", f"org/tiny@{COMMIT}", "org/other")
    for env, why in (({}, f"{server.url} can't be reached ("), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")):
        _, out, err = run(server.url, tmp_path, fetch_all(names), **env)
        *found, other = map(json.loads, out.splitlines())
        assert found == [{"folder": str(folder)}] * 2
        for name, line in zip(names, err.splitlines(), strict=False):
            assert line.startswith(f"{name}: {why}") and line.endswith(f"the cache, commit {COMMIT[:12]}")
        assert err.count("\n") == 2
        assert other["error"].startswith(f"org/other: no such folder; {why}")
        assert other["error"].endswith(f", and it is not in the cache {tmp_path / 'hub'}")


def test_each_refusal_is_one_line_that_says_what_to_do(server, model, sharded, tmp_path):
    def but(files, **changes):
        return {"files": {name: content for name, content in (files | changes).items() if content is not None}}

    def index(*names):
        weight_map = json.dumps({"weight_map": {str(number): name for number, name in enumerate(names)}})
        return but(model, **{"model.safetensors": None, "model.safetensors.index.json": weight_map.encode()})

    none = {"model.safetensors": None}
    server.repos = {
        "a/private": {"files": model, "token": "secret"},
        "a/gated": {"files": model, "gated": True},
        "a/pickles": but(model, **none, **{"pytorch_model.bin": b"p"}),
        "a/gguf": but({}, **{"m-Q4_K_M.gguf": b"G", "README.md": b"r"}),
        "a/adapter": but({}, **{"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}),
        "a/dataset": but({}, **{"data.parquet": b"x"}),
        "a/weightless": but(model, **none),
        "a/tricky": index("../../../../etc/passwd.safetensors"),
        "a/absolute": index("/etc/passwd.safetensors"),
        "a/short": index("model-1.safetensors"),
        "a/page": {"answer": (b"<html>Sign in to the network</html>", 200)},
        "a/list": {"answer": (b"[1, 2]", 200)},
        "a/nocommit": but(model) | {"commit": "../../../../tmp/x"},
        "a/rate": {"answer": (b"{}", 429)},
        "a/tiny": {"files": model},
    }
    said = {
        "a/missing": ["no such folder", f"no such model at {server.url}"],
        "a/private": ["missing or private (HTTP 401)", "`hf auth login` or HF_TOKEN"],
        "a/gated": [f"is gated: ask for access at {server.url}/a/gated, then log in by `hf auth login` or HF_TOKEN"],
        "a/tiny@nowhere": [f"{server.url}/a/tiny has no revision nowhere"],
        "a/pickles": ["pytorch_model.bin", "can run code"],
        "a/gguf": ["GGUF files only", "m-Q4_K_M.gguf", "--model"],
        "a/adapter": ["is an adapter"],
        "a/dataset": ["no config.json"],
        "a/weightless": ["neither model.safetensors nor model.safetensors.index.json"],
        "a/tricky": ["weight_map must map tensor names to names"],
        "a/absolute": ["weight_map must map tensor names to names"],
        "a/short": ["index names model-1.safetensors, which it does not hold"],
        "a/page": ["does not answer as a Hub does", "is HF_ENDPOINT right?"],
        "a/list": ["does not answer as a Hub does"],
        "a/nocommit": ["does not answer as a Hub does", "no commit"],
        "a/rate": ["refused (HTTP 429"],
        "a--b/c": ["no possible name on the Hub"],
    }
    code, out, err = run(server.url, tmp_path, fetch_all(said))
    assert code == 0, err
    for (name, words), line in zip(said.items(), out.splitlines(), strict=True):
        error = json.loads(line)["error"]
        assert error.startswith(name) or "tri" in name or "abs" in name
        assert all(word in error for word in words) and "\n" not in error, error
    assert not any("etc/passwd" in path for _, path, _ in server.asked)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(file.suffix == ".safetensors" or "passwd" in file.name for file in files)


def test_a_token_opens_what_is_private(server, model, tmp_path):
    server.repos["org/mine"] = {"files": model, "token": "hf_secret"}
    assert "(the present token gives no access)" in refused(server.url, tmp_path, "org/mine", HF_TOKEN="hf_wrong")
    folder, _ = fetched(server.url, tmp_path, "org/mine", HF_TOKEN="hf_secret")
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("moment", ["before", "on the way"])
def test_no_room(server, model, tmp_path, moment):
    server.repos["org/tiny"] = {"files": model}

    def work():
        if moment == "before":
            hub.shutil.disk_usage = lambda _: SimpleNamespace(free=hub.LEFT_FREE + 1000)
        else:
            from huggingface_hub import file_download

            def full(*_, **__):
                raise OSError(errno.ENOSPC, "No space left on device")

            file_download.http_get = full
        fetch("org/tiny")()

    code, _, err = run(server.url, tmp_path, work)
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("error: org/tiny: ") and line.endswith("set HF_HOME")
    assert ("GB are to be fetched, 0.0 GB are free in" if moment == "before" else "no room left in") in line
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_terminal_sees_a_bar(server, model, tmp_path):
    server.repos["org/tiny"] = {"files": model}
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    (tmp_path / "said.err").symlink_to(os.ttyname(slave))
    child = fork(fetch("org/tiny"), tmp_path / "said", environment(server.url, tmp_path))
    assert os.waitpid(child, 0)[1] == 0
    assert "org/tiny: 100%|" in os.read(master, 100_000).decode()


def test_what_is_here_wins_over_the_hub_and_paths_are_no_names(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda name: pytest.fail(f"fetched {name}"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert resolve.model_folder("org/tiny") == Path("org/tiny")
    for path in ("org/model.gguf", "./org/x", "org/x/y", "/org/x", "x/", "x", "../x", "~/x", "org/x@", "or g/x"):
        with pytest.raises(convert.UserError, match="no such folder"):
            resolve.model_folder(path)


def test_training_by_name(server, model, tmp_path):
    server.repos["org/tiny"] = {"files": model}
    records = [{"instruction": f"Say {n}", "output": f"It is {n}."} for n in range(12)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    words = "train.py --model org/tiny --dtype fp32 --data data.json --steps 1 --out run".split()
    python, env = [sys.executable, str(ROOT / words[0]), *words[1:]], environment(server.url, tmp_path / "home")
    done = subprocess.run(python, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert f"fetching org/tiny, commit {COMMIT[:12]}" in done.stderr
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("script", [evaluate, generate])
def test_scoring_and_generating_by_name(model, tmp_path, monkeypatch, capsys, script):
    for name, content in model.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "text.txt").write_text("the red fox runs")
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda name: asked.append(name) or tmp_path)
    words = (
        ["loss", "--data", tmp_path / "text.txt"] if script is evaluate else ["--prompt", "a", "--max-new-tokens", 2]
    )
    _, err, code = command(script, monkeypatch, capsys, *words, "--model", "org/tiny@v1", "--dtype", "fp32")
    assert code == 0 and asked == ["org/tiny@v1"], err
