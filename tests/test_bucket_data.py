"""Objects of S3 by their names, against moto's server on loopback, and of Google Cloud Storage, against an emulator of
it: single ones and folders, credentials and none, what changes, and what is refused."""

import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from common.errors import UserError
from dataset.folders import TEST, TRAIN, VALIDATION
from dataset.formats import open_source
from dataset.records import ReadStats
from interop import bucket_data, copies
from interop.copies import Use

ROWS = b'{"text": "hello"}\n'


def values(*texts: str) -> bytes:
    return b"".join(b'{"text": "%s"}\n' % text.encode() for text in texts)


class S3:
    """A bucket of moto's server."""

    def __init__(self):
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        host, port = self.server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "hush"}
        self.client = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **keys)
        self.client.create_bucket(Bucket="bucket")

    def put(self, key: str, body: bytes, is_public: bool = False) -> None:
        self.client.put_object(Bucket="bucket", Key=key, Body=body, ACL="public-read" if is_public else "private")


@pytest.fixture(scope="module")
def shared_s3():
    s3 = S3()
    yield s3
    s3.server.stop()


@pytest.fixture
def s3(shared_s3, tmp_path, monkeypatch):
    monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path / "cache"))
    for name in bucket_data.AWS_KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", shared_s3.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setattr(copies, "PAUSE_SECONDS", 0.001)
    return shared_s3


def read(name: str, part: str = TRAIN, **use) -> tuple[list[str], str, list[str]]:
    """The texts of all records, the summary, and what is printed."""
    lines: list[str] = []
    source = open_source(bucket_data.fetch_objects(name, part, Use(lines.append, **use)), part=part)
    stats = ReadStats()
    texts = [record.text for record in source.read_all(stats)]
    return texts, source.summary(stats), lines


def refusal(name: str, part: str = TRAIN) -> str:
    with pytest.raises(UserError) as error:
        read(name, part)
    assert "\n" not in str(error.value) and "hush" not in str(error.value)
    return str(error.value)


def test_an_object_is_fetched_once_and_again_when_it_has_changed(s3):
    s3.put("one/a.jsonl", values("a"))
    name = "s3://bucket/one/a.jsonl"
    assert read(name) == (["a"], f"{name}: plain text (JSONL, 1 record)", [f"fetching {name}: 14 bytes"])
    assert read(name)[2] == [f"{name}: is in the cache, unchanged in the bucket"]
    s3.put("one/a.jsonl", values("other"))
    texts, _, lines = read(name, keeps=True)
    assert texts == ["a"] and lines == [f"NOTE: {name}: has changed (1 changed); this run goes on with the copy"]
    texts, _, lines = read(name)
    assert texts == ["other"]
    assert lines == [f"NOTE: {name}: has changed since the copy was fetched: 1 changed", f"fetching {name}: 18 bytes"]


def test_a_folder_is_read_as_one_of_this_disk(s3):
    s3.put("set/train-0.jsonl", values("a", "b"))
    s3.put("set/train-1.jsonl", values("c"))
    s3.put("set/deep/valid.jsonl", values("v"))
    s3.put("set/README.md", b"# No data")
    s3.put("set/.hidden.jsonl", values("h"))
    name = "s3://bucket/set/"
    texts, summary, lines = read(name)
    parts = "train: train-0.jsonl, train-1.jsonl; not read here: deep/valid.jsonl (validation)"
    assert texts == ["a", "b", "c"] and lines == [f"fetching {name}: 2 of 2 files, 42 bytes"]
    assert summary == f"{name}: plain text (2 files of JSONL, 3 records), 1 other files left alone, {parts}"
    assert read(name, VALIDATION)[0] == read(name, TEST)[0] == ["v"]
    s3.put("set/train-1.jsonl", values("cc"))
    s3.put("set/train-2.jsonl", values("d"))
    s3.client.delete_object(Bucket="bucket", Key="set/train-0.jsonl")
    texts, _, lines = read(name)
    assert texts == ["cc", "d"]
    assert lines == [
        f"NOTE: {name}: has changed since the copy was fetched: 1 changed, 1 new, 1 gone",
        f"fetching {name}: 2 of 2 files, 29 bytes",
    ]
    place = open_source(bucket_data.fetch_objects(name, TRAIN, Use(list))).containers[1].place(1)
    assert place == "s3://bucket/set/train-2.jsonl line 1"


def test_tables_bring_the_names_of_their_classes(s3):
    s3.put("labels/train.csv", b"1,a\n2,b\n")
    s3.put("labels/classes.txt", b"World\nSports\n")
    bucket_data.fetch_objects("s3://bucket/labels", TRAIN, Use(list))
    (folder,) = (copies.cache_folder() / "data").iterdir()
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {"train.csv", "classes.txt"}


def test_a_folder_that_llama_factory_describes(s3):
    s3.put("factory/a.jsonl", values("a"))
    s3.put("factory/dataset_info.json", b'{"mine": {"file_name": "a.jsonl", "columns": {"prompt": "text"}}}')
    name = "s3://bucket/factory"
    problem = "its dataset_info.json is LLaMA-Factory's, which is read in folders of this disk only"
    assert refusal(name) == f"{name}: {problem}; name one of its files, or copy the folder here"
    s3.put("datasets/a.jsonl", values("a"))
    s3.put("datasets/dataset_info.json", b'{"builder_name": "json"}')
    assert read("s3://bucket/datasets")[0] == ["a"]


def test_a_part_that_an_earlier_start_has_left(s3, monkeypatch):
    body = ROWS * 5000
    s3.put("big/a.jsonl", body)
    name = "s3://bucket/big/a.jsonl"
    monkeypatch.setattr(bucket_data, "BUCKET_CHUNK", 20_000)
    monkeypatch.setattr(copies, "FETCH_ATTEMPTS", 1)
    stream = bucket_data.Bucket.stream
    starts = []

    def breaking(self, path, start, version):
        result = stream(self, path, start, version)
        starts.append(start)

        def chunks():
            yield next(result.chunks)
            raise copies.BrokenOff("the connection broke off")

        return copies.Stream(version, start, chunks() if len(starts) == 1 else result.chunks)

    monkeypatch.setattr(bucket_data.Bucket, "stream", breaking)
    reason = f"cut off at 20,000 of {len(body):,} bytes, the connection broke off"
    assert refusal(name) == f"{name}: {reason}; run it again to go on from there"
    assert len(read(name)[0]) == 5000 and starts == [0, 20_000]


def test_an_object_that_changes_while_it_is_fetched(s3, monkeypatch):
    s3.put("moving/a.jsonl", values("a"))
    name = "s3://bucket/moving/a.jsonl"
    fill = copies.fill

    def and_change(*arguments):
        path = fill(*arguments)
        s3.put("moving/a.jsonl", values("longer"))
        return path

    monkeypatch.setattr(bucket_data, "fill", and_change)
    assert refusal(name) == f"{name}: changed while it was fetched; run it again"
    monkeypatch.setattr(bucket_data, "fill", fill)
    assert read(name)[0] == ["longer"]


def test_a_public_object_needs_no_credentials(s3, monkeypatch):
    s3.put("public/a.jsonl", values("a"), is_public=True)
    s3.put("private/a.jsonl", values("a"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert read("s3://bucket/public/a.jsonl")[0] == ["a"]
    keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials"
    name = "s3://bucket/private/a.jsonl"
    assert refusal(name) == f"{name}: is private, or missing (ACCESS_DENIED); credentials: {keys}"


def test_what_is_not_there(s3):
    for key in ("none.jsonl", "set-none/"):
        assert refusal(f"s3://bucket/{key}") == f"s3://bucket/{key}: there is no such object or folder"
    assert refusal("s3://absent/x").startswith("s3://absent/x: there is no such object or folder")
    weight = "there is no such object; a weight stands in front, as in 3=s3://bucket/key"
    assert refusal("s3://bucket/a.jsonl=3") == f"s3://bucket/a.jsonl=3: {weight}"
    pattern = "there is no such object, and patterns are not read here; name the folder"
    assert refusal("s3://bucket/*.jsonl") == f"s3://bucket/*.jsonl: {pattern}"
    for name in ("s3://", "s3://bucket//a", "s3://bucket/../a"):
        assert refusal(name) == f"{name}: s3://bucket/key is wanted"
    for name in ("s3://key:hush@bucket/a", "s3://bucket/a?secret_key=hush&region=us-east-1"):
        assert refusal(name).startswith("s3://: a name holds neither credentials nor settings; they belong in AWS_")
    s3.put("other/a.bin", b"x")
    assert refusal("s3://bucket/other") == "s3://bucket/other: holds no file of a known kind, of 1 files"


def test_without_a_network_the_copies_are_used(s3, monkeypatch):
    s3.put("off/train.jsonl", values("a"))
    s3.put("off/valid.jsonl", values("v"))
    name = "s3://bucket/off"
    read(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    texts, _, lines = read(name)
    reason = "s3:// can't be reached (Could not connect to server)"
    assert texts == ["a"] and lines == [f"NOTE: {name}: {reason}; using the copy in the cache"]
    assert read(name, asks=False)[2] == []
    assert refusal(name, VALIDATION) == f"{name}: can't be reached, and the cache has not all of it"
    assert refusal("s3://bucket/on") == f"s3://bucket/on: {reason}, and the cache has no copy of it"


def test_a_cache_that_can_only_be_read(s3, monkeypatch):
    s3.put("fixed/a.jsonl", values("a"))
    name = "s3://bucket/fixed"
    read(name)
    monkeypatch.setattr(bucket_data, "why_read_only", lambda folder: "the cache can't be written to")
    assert read(name)[2] == [f"NOTE: {name}: the cache can't be written to; using the copy in the cache"]


# ---- Google's ----

EMULATOR = """
import http.server, os, sys
import gcp_storage_emulator.server as emulator
emulator.server.HTTPServer = http.server.ThreadingHTTPServer  # for more than one connection
server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
server.start()
print(server._api._httpd.server_address[1], flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.fixture(scope="module")
def google():
    """The emulator, in a process of its own: pyarrow holds Python's lock while it opens a file."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", EMULATOR], text=True, **pipes) as process:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"

        def put(key: str, body: bytes) -> None:
            address = f"{url}/upload/storage/v1/b/bucket/o?uploadType=media&name={key}"
            headers = {"Content-Type": "application/octet-stream"}
            urllib.request.urlopen(urllib.request.Request(address, body, headers, method="POST")).read()

        put.url = url
        yield put
        process.stdin.close()
        process.wait(10)


def test_google_cloud_storage(google, tmp_path, monkeypatch):
    monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
    monkeypatch.setattr(bucket_data, "CONNECT_SECONDS", 1)
    google("set/train.jsonl", values("a", "b"))
    google("set/valid.jsonl", values("v"))
    name = "gs://bucket/set"
    texts, summary, lines = read(name)
    assert texts == ["a", "b"] and lines == [f"fetching {name}: 28 bytes"]
    parts = "train: train.jsonl; not read here: valid.jsonl (validation)"
    assert summary == f"{name}: plain text (1 file of JSONL, 2 records), {parts}"
    assert read(f"{name}/valid.jsonl")[0] == ["v"]
    assert read(name)[2] == [f"{name}: is in the cache, unchanged in the bucket"]
    time.sleep(1.1)  # a change is told by the second
    google("set/train.jsonl", values("c", "d"))
    assert read(name)[0] == ["c", "d"]
    assert refusal("gs://bucket/none") == "gs://bucket/none: there is no such object or folder"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    texts, _, lines = read(name)
    reason = "gs:// can't be reached (Could not connect to server)"
    assert texts == ["c", "d"] and lines == [f"NOTE: {name}: {reason}; using the copy in the cache"]


def test_which_credentials_are_looked_for(tmp_path, monkeypatch):
    for name in (*bucket_data.AWS_KEYS, "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CLOUDSDK_CONFIG", raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert not bucket_data.has_aws_keys() and not bucket_data.has_google_keys()
    for file in (".aws/config", ".config/gcloud/application_default_credentials.json"):
        path = Path(tmp_path, file)
        path.parent.mkdir(parents=True)
        path.write_text("")
    assert bucket_data.has_aws_keys() and bucket_data.has_google_keys()
