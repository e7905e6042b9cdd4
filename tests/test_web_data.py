"""Files of web servers by their URLs, against a server on loopback: each is fetched once, whole or not at all; what
changes, breaks off or is refused is said in one line; and no secret of a URL is printed or saved."""

import base64
import errno
import gzip
import json
import os
import re
import shutil
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
from support.file_server import FileServer
from support.helpers import chat_base, command
from support.runs import records, torchrun

import data
import evaluate
import flags
import train
from common.errors import UserError
from common.remote_names import copy_key, saved_name, shown
from dataset.formats import open_source
from dataset.records import ReadStats
from interop import copies, remote_data, web_data
from training.metrics import start_wandb

ROWS = b'{"text": "hello"}\n' * 20_000  # 360,000 bytes, more than a chunk


@pytest.fixture(scope="module")
def shared_server():
    server = FileServer()
    yield server
    server.stop()


@pytest.fixture
def server(shared_server, tmp_path, monkeypatch):
    monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(copies, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(web_data, "BACKOFF_SECONDS", 0.001)
    shared_server.files.clear()
    shared_server.asked.clear()
    return shared_server


def fetch(word: str) -> tuple[bytes, list[str]]:
    """The content of the copy, and the lines that are printed; as a new process would."""
    remote_data.COPIES_OF_URLS.clear()
    lines: list[str] = []
    return remote_data.fetch_data(word, print_fn=lines.append).root.read_bytes(), lines


def refusal(word: str) -> str:
    with pytest.raises(UserError) as error:
        fetch(word)
    assert "\n" not in str(error.value)
    return str(error.value)


def statuses(server: FileServer) -> list[tuple[int, str | None, int]]:
    """(status, Range, bytes) of the requests since this was last asked."""
    result = [(status, part, size) for _, status, part, size, _ in server.asked]
    server.asked.clear()
    return result


def test_a_file_is_fetched_once_and_again_only_when_it_has_changed(server):
    url = server.put("/a.jsonl", ROWS)
    assert fetch(url) == (ROWS, [f"fetching {url}: 0.4 MB"])
    assert statuses(server) == [(200, None, len(ROWS))]
    assert fetch(url) == (ROWS, [f"{url}: is in the cache, unchanged on the server"])
    assert statuses(server) == [(304, None, 0)]
    server.put("/a.jsonl", b'{"text": "other"}\n')
    content, lines = fetch(url)
    assert content == b'{"text": "other"}\n' and statuses(server) == [(200, None, 18)]
    assert lines[0].startswith(f"NOTE: {url}: has changed on the server since it was fetched on 20")
    assert lines == [lines[0], f"fetching {url}: 18 bytes"]


@pytest.mark.parametrize("dated", ["Sun, 29 Nov 2026 10:00:00 GMT", ""])
def test_a_server_without_etags(server, dated):
    """By the date; without one there is no telling, and it is fetched again."""
    url = server.put("/a.jsonl", ROWS, etag=False, dated=dated)
    fetch(url)
    content, lines = fetch(url)
    assert content == ROWS
    if dated:
        assert lines == [f"{url}: is in the cache, unchanged on the server"]
    else:
        reason = "the server does not say whether it has changed"
        assert lines == [f"NOTE: {url}: {reason}; fetching it again", f"fetching {url}: 0.4 MB"]


def test_a_server_that_says_no_length_and_looks_at_no_condition(server):
    url = server.put("/a.jsonl", ROWS, no_length=True, ignores_conditions=True)
    fetch(url)
    assert fetch(url) == (ROWS, [f"{url}: is in the cache, unchanged on the server"])


def test_a_cache_that_can_only_be_read(server, monkeypatch):
    url = server.put("/a.jsonl", ROWS)
    fetch(url)

    def refuse(folder):
        raise UserError(f"{folder}: the cache can't be written to")

    monkeypatch.setattr(copies, "check_cache_takes_files", refuse)
    content, lines = fetch(url)
    folder = copies.copies_folder(copy_key(url))
    assert content == ROWS and len(server.asked) == 1
    assert lines[0].startswith(f"NOTE: {url}: {folder}: the cache can't be written to; using the copy that was")
    other = server.put("/b.jsonl", ROWS)
    assert refusal(other) == f"{copies.copies_folder(copy_key(other))}: the cache can't be written to"


def test_what_was_not_there_leaves_nothing_in_the_cache(server):
    refusal(f"{server.url}/none.jsonl")
    assert list((copies.cache_folder() / "data").iterdir()) == []


def test_one_process_asks_once_and_its_sisters_on_the_machine_not_at_all(server, monkeypatch):
    url = server.put("/a.jsonl", ROWS)
    fetch(url)
    first = remote_data.fetch_data(url)
    server.put("/a.jsonl", b'{"text": "other"}\n')
    assert remote_data.fetch_data(url) == first and len(server.asked) == 1
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert fetch(url) == (ROWS, []) and len(server.asked) == 1


def test_a_connection_that_breaks_is_gone_on_with(server):
    url = server.put("/a.jsonl", ROWS, breaks=2)
    assert fetch(url)[0] == ROWS
    half, quarter = len(ROWS) // 2, len(ROWS) // 4
    assert statuses(server) == [
        (200, None, half),
        (206, f"bytes={half}-", quarter),
        (206, f"bytes={half + quarter}-", quarter),
    ]
    url = server.put("/b.jsonl", ROWS, breaks=1, ranges=False)
    assert fetch(url)[0] == ROWS
    assert statuses(server) == [(200, None, half), (200, f"bytes={half}-", len(ROWS))]


def test_what_a_start_could_not_finish_the_next_one_goes_on_with(server, monkeypatch, tmp_path):
    monkeypatch.setattr(copies, "FETCH_ATTEMPTS", 1)
    url = server.put("/a.jsonl", ROWS, breaks=1)
    half = len(ROWS) // 2
    reason = f"cut off at {half:,} of {len(ROWS):,} bytes, the connection broke off"
    assert refusal(url) == f"{url}: {reason}; run it again to go on from there"
    folder = copies.copies_folder(copy_key(url))
    assert {path.name for path in folder.iterdir()} == {".part", ".part.copy"}  # nothing that looks whole
    content, lines = fetch(url)
    assert content == ROWS and lines == [f"fetching {url}: 0.4 MB, 0.2 MB of them are here already"]
    assert statuses(server) == [(200, None, half), (206, f"bytes={half}-", half)]
    # A part of another version is not gone on with.
    url = server.put("/c.jsonl", ROWS, breaks=1)
    refusal(url)
    other = ROWS.replace(b"hello", b"later")
    server.put("/c.jsonl", other)
    assert fetch(url)[0] == other
    # Nor is one that can't be told from another.
    url = server.put("/d.jsonl", ROWS, breaks=1, etag=False)
    assert refusal(url).endswith("the connection broke off; run it again")
    assert fetch(url)[0] == ROWS


def test_a_server_that_answers_a_range_of_another_version(server, monkeypatch):
    """It does not look at If-Range; its ETag tells."""
    monkeypatch.setattr(copies, "FETCH_ATTEMPTS", 1)
    url = server.put("/a.jsonl", ROWS, breaks=1)
    refusal(url)
    other = ROWS.replace(b"hello", b"later")
    server.put("/a.jsonl", other, ignores_conditions=True)
    assert fetch(url)[0] == other


def test_faults_that_pass_and_faults_that_stay(server):
    url = server.put("/a.jsonl", ROWS, statuses=[500, 503])
    assert fetch(url)[0] == ROWS
    server.put("/a.jsonl", ROWS, statuses=[503] * 8)
    content, lines = fetch(url)
    host = url.split("/")[2]
    assert content == ROWS
    assert lines[0].startswith(f"NOTE: {url}: {host} has a fault (HTTP 503); using the copy that was fetched on 20")
    other = server.put("/b.jsonl", ROWS, statuses=[502] * 8)
    assert refusal(other) == f"{other}: {host} has a fault (HTTP 502), and the cache has no copy of it"


def test_without_a_network_the_copy_is_used(server, monkeypatch):
    other = FileServer()
    url = other.put("/a.jsonl", ROWS)
    fetch(url)
    other.stop()
    content, lines = fetch(url)
    host = url.split("/")[2]
    assert content == ROWS and len(lines) == 1
    assert lines[0].startswith(f"NOTE: {url}: {host} can't be reached; using the copy that was fetched on 20")
    missing = url.replace("a.jsonl", "b.jsonl")
    assert refusal(missing) == f"{missing}: {host} can't be reached, and the cache has no copy of it"


def test_refusals_say_what_to_do_and_no_copy_hides_them(server):
    url = server.put("/a.jsonl", ROWS)
    fetch(url)
    private = "is private (HTTP 401); a user and password go into ~/.netrc, a token into the URL"
    for status, said in ((401, private), (404, "is not there (HTTP 404)"), (410, "is not there (HTTP 410)")):
        server.put("/a.jsonl", ROWS, statuses=[status])
        assert refusal(url) == f"{url}: {said}"
    signed = server.put("/a.jsonl", ROWS, statuses=[403]) + "?X-Amz-Signature=abc&id=7"
    expired = "refused (HTTP 403); the URL's signature may have expired, make a new one"
    assert refusal(signed) == f"{url}?X-Amz-Signature=***&id=***: {expired}"
    weighted = f"{server.url}/a.jsonl=3"
    hint = "a weight stands in front of a URL, as in 3=https://host/file"
    assert refusal(weighted) == f"{weighted}: is not there (HTTP 404); {hint}"
    page = server.put("/blob/main/a.jsonl", b"<html>", headers={"Content-Type": "text/html; charset=utf-8"})
    advice = "the file itself has /resolve/ (Hugging Face) or /raw/ (GitHub) for /blob/"
    assert refusal(page) == f"{page}: is a web page, not a file of examples; {advice}"
    odd = server.put("/odd.jsonl", b"x", headers={"Content-Encoding": "br"})
    assert "sends the file compressed by br, which is not read here" in refusal(odd)
    loop = server.put("/loop", b"", location=f"{server.url}/loop")
    assert refusal(loop).endswith("refers from one address to another without end")
    for url in ("https://[", "http://", "https:///a.jsonl", server.put("/ftp", b"", location="ftp://x/a")):
        assert refusal(url).endswith("is no address that can be asked for")
    assert refusal("hdfs://x/a.jsonl") == (
        "hdfs://...: is not read here, but hf:, s3://, gs://, https:// or a file of this disk"
    )


def test_a_password_reaches_its_own_host_only(server, tmp_path):
    login = "Basic " + base64.b64encode(b"me:SECRET").decode()
    url = server.put("/a.jsonl", ROWS, login=login)
    named = url.replace("://", "://me:SECRET@")
    assert fetch(named)[0] == ROWS
    with open(os.open(tmp_path / "netrc", os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
        file.write("machine 127.0.0.1 login me password SECRET\n")
    (tmp_path / "cache").rename(tmp_path / "old")
    assert fetch(url)[0] == ROWS
    (tmp_path / "netrc").unlink()
    elsewhere = FileServer()
    target = elsewhere.put("/b.jsonl", ROWS).replace("127.0.0.1", "localhost")
    moved = server.put("/moved.jsonl", b"", login=login, location=target).replace("://", "://me:SECRET@")
    assert fetch(moved)[0] == ROWS
    assert [login for *_, login in elsewhere.asked] == [None]
    elsewhere.stop()


def test_kinds_are_known_by_the_name_and_by_what_the_server_says(server):
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), table)
    csv = b"prompt,completion\na,b\n"
    cases = {
        server.put("/a.jsonl.gz", gzip.compress(ROWS)): "JSONL in gzip, 20,000 records",
        server.put("/z.jsonl", gzip.compress(ROWS), headers={"Content-Encoding": "gzip"}): "JSONL in gzip, 20,000",
        server.put("/data.parquet", table.getvalue().to_pybytes()): "Parquet, 2 records",
        server.put("/t.csv", csv) + "?v=1": "CSV, 1 record",
        server.put("/export", csv, headers={"Content-Type": "text/csv"}) + "?id=4": "CSV, 1 record",
        server.put("/get", csv, headers={"Content-Disposition": 'attachment; filename="../x y.csv"'}): "CSV, 1 record",
        server.put("/raw", b"Plain words.", headers={"Content-Type": "text/plain"}): "TXT, 1 record",
        server.put("/nothing", ROWS, no_length=True): "JSONL, 20,000 records",
    }
    for url, said in cases.items():
        source = open_source(remote_data.fetch_data(url, print_fn=list))
        stats = ReadStats()
        source.read_all(stats)
        assert source.summary(stats).startswith(f"{shown(url)}: ") and f"({said}" in source.summary(stats), url


def test_errors_name_the_url_and_the_record(server):
    url = server.put("/bad.jsonl", b'{"text": "a"}\n{"text": \n')
    copy = remote_data.fetch_data(f"{url}?token=SECRET", print_fn=list)
    with pytest.raises(UserError) as error:
        open_source(copy).read_all()
    assert str(error.value).startswith(f"{url}?token=*** line 2: ")
    empty = server.put("/empty.jsonl", b"")
    with pytest.raises(UserError, match=f"^{empty}: is empty$"):
        open_source(remote_data.fetch_data(empty, print_fn=list))


def test_a_disk_without_room(server, monkeypatch):
    url = server.put("/a.jsonl", ROWS)
    monkeypatch.setattr(copies, "LEFT_FREE", 1 << 60)
    assert "0.0 GB are to be fetched, 0.0 GB are free in" in refusal(url)
    monkeypatch.undo()


def test_a_disk_that_fills_up_meanwhile(server, monkeypatch, tmp_path):
    url = server.put("/a.jsonl", ROWS)

    def write_chunks(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(copies, "write_chunks", write_chunks)
    folder = copies.copies_folder(copy_key(url))
    advice = "free some space, or set PLAINTUNE_CACHE to another folder"
    assert refusal(url) == f"{folder}: the cache has no room left (No space left on device); {advice}"


def test_a_damaged_copy_is_fetched_again(server):
    url = server.put("/a.jsonl", ROWS)
    fetch(url)
    path = copies.copies_folder(copy_key(url)) / "a.jsonl"
    path.write_bytes(ROWS[:-5])
    assert fetch(url) == (ROWS, [f"fetching {url}: 0.4 MB"])


# ---- weights and secrets ----


@pytest.mark.parametrize(
    "word, name, weight",
    [
        ("https://h/x.jsonl?token=a=3", "https://h/x.jsonl?token=a=3", None),
        ("3=https://h/x.jsonl?token=a=4", "https://h/x.jsonl?token=a=4", 3.0),
        ("0.5=s3://b/year=2024", "s3://b/year=2024", 0.5),
        ("s3://b/year=2024", "s3://b/year=2024", None),
        ("hf:org/name:sub=2", "hf:org/name:sub", 2.0),
        ("2=hf:org/name", "hf:org/name", 2.0),
        ("HTTPS://h/x=1", "HTTPS://h/x=1", None),
        ("a.json=3", "a.json", 3.0),
    ],
)
def test_a_weight_never_hides_in_a_url(word, name, weight):
    assert flags.split_number(word) == (name, weight)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--data", "x=https://h/a?k=SECRET"], "x=https://h/a?k=***: 'x' is no number"),
        (["--data", "0=https://h/a?k=SECRET"], "--data 0=https://h/a?k=***: a weight must be above 0"),
        (["--data", "hf:org/name=x"], "hf:org/name=x: 'x' is no number"),
        (
            ["--replay", "https://h/a?k=0.1"],
            "--replay https://h/a?k=***: SHARE=URL is wanted, a share above 0 and below 1",
        ),
        (["--replay", "hf:org/a"], "--replay hf:org/a: FILE=SHARE is wanted, a share above 0 and below 1"),
    ],
)
def test_what_is_no_weight(words, said):
    with pytest.raises(UserError) as error:
        flags.parse_flags(words)
    assert str(error.value) == said


def test_what_is_saved_of_a_url_holds_no_secret_and_finds_the_copy(server):
    url = server.put("/a.jsonl", ROWS) + "?token=SECRET&format=jsonl"
    fetch(url)
    typed = flags.parse_flags(["--data", f"2={url}", "--val", url, "--replay", f"0.1={url}"])
    saved = flags.as_dict(typed)
    assert "SECRET" not in str(saved)
    masked = url.replace("SECRET", "***")
    assert saved["data"] == (f"2={masked}#copy={copy_key(url)}",)
    again = flags.as_dict(flags.Flags(data=saved["data"], val=saved["val"], replay=saved["replay"]))
    assert again == saved
    server.asked.clear()
    content, lines = fetch(saved["val"])
    assert content == ROWS and server.asked == []
    assert lines[0].startswith(f"NOTE: {masked}: using the copy that was fetched on 20")
    gone = saved_name(url.replace("SECRET", "ANOTHER"))
    problem = "its hidden part was not saved, and the copy that was is not in the cache"
    assert refusal(gone) == f"{masked}: {problem}; give the URL again"


def test_another_signature_is_the_same_file(server):
    url = server.put("/a.jsonl", ROWS)
    fetch(f"{url}?X-Amz-Signature=one&X-Amz-Date=1&part=2")
    statuses(server)
    fetch(f"{url}?X-Amz-Signature=two&X-Amz-Date=3&part=2")
    fetch(f"{url}?X-Amz-Signature=two&X-Amz-Date=3&part=3")
    assert [status for status, *_ in statuses(server)] == [304, 200]
    harmless = "https://h/a.csv?format=csv&download=true"
    assert shown(harmless) == saved_name(harmless) == harmless
    assert shown("https://me:pw@h/a?abc") == "https://***@h/a?***"
    assert saved_name("https://h/a.jsonl") == "https://h/a.jsonl" and saved_name("s3://b/k?x=1") == "s3://b/k?x=1"


def test_data_py_reads_a_url(server, tmp_path, monkeypatch, capsys):
    url = server.put("/chat.jsonl", b'{"prompt": "a", "completion": "b"}\n' * 3) + "?token=SECRET"
    out, err, code = command(data, monkeypatch, capsys, "convert", url, "--out", tmp_path / "out.jsonl")
    assert code == 0 and "SECRET" not in out + err
    assert out.startswith(f"data      {shown(url)}: prompt and completion (JSONL, 3 records)")
    first = {"role": "user", "content": "a"}
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["messages"][0] == first


def test_a_run_and_its_resumption(server, tmp_path, monkeypatch, capsys):
    """Mixed with weights, validated and replayed by URLs; the run goes on with the copies, whatever has become of the
    URLs, and nothing under its folder or in its output holds the secret."""
    base = chat_base(tmp_path / "base", num_key_value_heads=2)
    rows = {name: records(tmp_path / f"{name}.jsonl", 20, seed).read_bytes() for seed, name in enumerate("abc")}
    urls = {name: server.put(f"/{name}.jsonl", body) for name, body in rows.items()}
    secret = f"{urls['a']}?token=SECRET=3"
    words = ["--model", base, "--data", f"2={secret}", urls["b"], "--replay", f"0.1={urls['c']}", "--val", urls["c"]]
    words += ["--batch-size", 4, "--steps", 6, "--save-every", 3, "--eval-every", 0, "--out", tmp_path / "run"]
    out, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 0, err
    masked = f"{urls['a']}?token=***"
    assert f"data      {masked}: prompt and completion (JSONL, 20 records)" in out
    assert re.search(rf"draws an epoch \d+ of {re.escape(masked)}: ", out)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert "SECRET" not in out + err and len(written) > 10
    assert not [path for path in written if b"SECRET" in path.read_bytes()]
    losses = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1]

    shutil.rmtree(tmp_path / "run/final")
    shutil.rmtree(tmp_path / "run/checkpoints/step-6", ignore_errors=True)
    server.put("/b.jsonl", rows["c"])
    del server.files["/a.jsonl"]
    remote_data.COPIES_OF_URLS.clear()
    _, err, code = command(train, monkeypatch, capsys, "--out", tmp_path / "run", "--resume")
    assert code == 0, err
    changed = f"NOTE: {urls['b']}: has changed on the server since it was fetched on "
    (line,) = [line for line in err.splitlines() if line.startswith(changed)]
    assert "; this run goes on with that of 20" in line and f"NOTE: {masked}: using the copy" in err
    assert (
        json.loads(losses)["val_loss"]
        == json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    )

    shutil.rmtree(tmp_path / "run/final")
    shutil.rmtree(tmp_path / "run/checkpoints/step-6", ignore_errors=True)
    remote_data.COPIES_OF_URLS.clear()
    fetch(urls["b"])  # another run has fetched what is there now
    remote_data.COPIES_OF_URLS.clear()
    _, err, code = command(train, monkeypatch, capsys, "--out", tmp_path / "run", "--resume")
    assert code == 2 and "--resume: the examples are others, or in another order, than when" in err


def test_wandb_gets_no_secret(server, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = ["--data", "https://h/a.jsonl?token=SECRET", "--wandb", "mine"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    (tmp_path / "run").mkdir()
    start_wandb(flags.parse_flags(words), tmp_path / "run").finish()
    (log,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.time() + 30
    while b"https://h/a.jsonl?token=***" not in log.read_bytes():
        assert time.time() < deadline
        time.sleep(0.1)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if b"SECRET" in path.read_bytes()]


@pytest.mark.slow  # three processes of torch
def test_two_processes_of_a_machine_fetch_once(server, tmp_path, monkeypatch):
    base = chat_base(tmp_path / "base", num_key_value_heads=2)
    url = server.put("/a.jsonl", records(tmp_path / "a.jsonl", 20, 0).read_bytes())
    words = ["train.py", "--model", base, "--data", url, "--steps", 1, "--batch-size", 2, "--out", tmp_path / "run"]
    out = torchrun(2, *words, OMP_NUM_THREADS="1")
    assert out.count(f"fetching {url}") == 1 and statuses(server) == [(200, None, len(server.files["/a.jsonl"].body))]


def test_evaluate_reads_a_url(server, tmp_path, monkeypatch, capsys):
    base = chat_base(tmp_path / "base", num_key_value_heads=2)
    url = server.put("/a.jsonl", records(tmp_path / "a.jsonl", 4, 0).read_bytes()) + "?token=SECRET"
    out, err, code = command(evaluate, monkeypatch, capsys, "loss", "--model", base, "--data", url)
    assert code == 0, err
    assert f"data      {shown(url)}: prompt and completion (JSONL, 4 records)" in out and "SECRET" not in out + err
