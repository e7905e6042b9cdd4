"""Files of strangers, hostile or broken: the end is one line that names the file and the record, or the records that can
be read are, and each that is left out is counted and said. Never a traceback, never a loss in silence, never something
left in the cache, and in bounded memory. tests/test_formats.py and tests/test_data.py have the good files."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

import data
from convert import model_folder
from errors import run
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
MB = 1 << 20
SECONDS = 20  # that a file may take


def late(*_):
    raise TimeoutError


signal.signal(signal.SIGALRM, late)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAINTUNE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tokenizer(cache):
    return load_tokenizer(model_folder(None))


@pytest.fixture
def load(cache, tokenizer, capsys):
    """load(path) -> (dataset, None), or (None, what a user sees on stderr); and the lines that were said."""

    def load(path):
        found, said = [], []
        signal.alarm(SECONDS)
        try:
            run(lambda: found.append(data.load([path], tokenizer, 512, say=said.append)))
        except SystemExit as end:
            assert end.code == 2
        finally:
            signal.alarm(0)
        return found[0] if found else None, capsys.readouterr().err, said

    return load


# ---- what stands in the files ----


def qa(n, **more):
    return {"instruction": f"Say {n}.", "output": f"It is {n}."} | more


def lines(*records):
    """JSONL; of records that are strings already, as they are."""
    return "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records) + "\n"


def turn(role, content="a", **more):
    return {"role": role, "content": content} | more


USER, ANSWER = turn("user"), turn("assistant")


def chat(*turns, **more):
    return {"messages": list(turns)} | more


def says(**more):
    """A good conversation, then one whose answer has this as well."""
    return lines(chat(USER, ANSWER), chat(USER, ANSWER | more))


def calls(arguments, **more):
    return says(tool_calls=[{"function": {"name": "f", "arguments": arguments} | more}])


def prefers(chosen, rejected, **more):
    return {"chosen": chosen, "rejected": rejected} | more


def squad(paragraphs):
    return json.dumps({"version": "2", "data": [{"title": "t", "paragraphs": paragraphs}]})


def questions(*qas):
    return squad([{"context": "c", "qas": list(qas)}])


def node(id, parent, role="prompter", tree="t", **more):
    named = {"message_id": id, "parent_id": parent, "message_tree_id": tree}
    return named | {"role": role, "text": f"I am {id}"} | more


def answered(tree, **more):
    """A prompt and its answer, whose message ids are the tree's and that with an a."""
    return [node(tree, None, tree=tree), node(tree + "a", tree, "assistant", tree) | more]


def tree(*replies, **root):
    return {"message_tree_id": "t", "prompt": node("p", None) | root | {"replies": list(replies)}}


def deep(n, key=None):
    """n lists, or objects, in each other."""
    start, end = ("[", "]") if key is None else (f'{{"{key}":', "}")
    return start * n + ("" if key is None else "1") + end * n


def with_deep(record, value):
    """The record's JSON with this JSON in the place of the string DEEP."""
    return json.dumps(record).replace('"DEEP"', value)


def table(names=("instruction", "output"), **columns):
    """Parquet. Columns that are lists get the type that pyarrow finds."""
    columns = columns or {name: ["a", "b", "c"] for name in names}
    return parquet_of(pyarrow.table(columns))


def parquet_of(table):
    file = io.BytesIO()
    parquet.write_table(table, file, row_group_size=2)
    return file.getvalue()


def zst(content):
    file = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(file, "zstd") as stream:
        stream.write(content)
    return file.getvalue().to_pybytes()


def middle(content, with_=b"\xff" * 16):
    at = len(content) // 2
    return content[:at] + with_ + content[at + len(with_) :]


def folder(**files):
    """name__ext=content"""

    def write(path):
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("__", ".")).write_bytes(content.encode())

    return write


def loop(path):
    path.symlink_to(path.name)


def loop_in_folder(path):
    folder(a__jsonl=GOOD)(path)
    (path / "b.jsonl").symlink_to("b.jsonl")


def linked_folder(path):
    """A folder that holds a link to itself and one to a folder with two records more."""
    folder(a__jsonl=GOOD)(path)
    folder(b__jsonl=lines(qa(3), qa(4)))(path.parent / "elsewhere")
    (path / "here").symlink_to(".")
    (path / "linked").symlink_to("../elsewhere")


GOOD = lines(qa(1), qa(2))
MANY = lines(*(qa(n * n * 7919 % 100_003) for n in range(5_000)))
GZ = gzip.compress(MANY.encode())
ZST = zst(MANY.encode())
PARQUET = table(instruction=[f"Say {n}" for n in range(99)], output=[f"It is {n}" for n in range(99)])
LIST = json.dumps([qa(1), qa(2)])
SQUAD_ANSWER = {"text": ["a"], "answer_start": [0]}
NESTED = "nested too deep"

# name: (file name, content, what is to be seen). Content: bytes, text, or a function that writes the file. To be seen:
# a pattern of what the error says after the file's name; or a number of records, all kept; or (number of records,
# {pattern of a reason: how many were left out for it}); and then maybe a text that the first one holds.
CASES = {
    # gzip, zstandard
    "gz cut in its middle": ("a.jsonl.gz", GZ[: len(GZ) // 2], ": damaged or cut off, Compressed file ended"),
    "gz cut in its head": ("a.jsonl.gz", GZ[:7], ": damaged or cut off"),
    "gz without its checksum": ("a.jsonl.gz", GZ[:-8], ": damaged or cut off"),
    "gz with a wrong checksum": ("a.jsonl.gz", GZ[:-8] + b"12345678", ": damaged or cut off, CRC"),
    "gz broken in its middle": ("a.jsonl.gz", middle(GZ), ": damaged or cut off"),
    "gz then garbage": ("a.jsonl.gz", GZ + b"garbage", ": damaged or cut off"),
    "gz then zeros, as on tapes": ("a.jsonl.gz", gzip.compress(GOOD.encode()) + bytes(512), 2),
    "gz of two members": ("a.jsonl.gz", gzip.compress(GOOD.encode()) * 2, 4),
    "gz of nothing": ("a.jsonl.gz", gzip.compress(b""), ": is empty"),
    "gz of gz": ("a.jsonl.gz", gzip.compress(GZ), ".*gzip"),
    "gz of Parquet": ("a.parquet.gz", gzip.compress(PARQUET), ": Parquet in gzip.*unpack"),
    "zst cut in its middle": ("a.jsonl.zst", ZST[: len(ZST) // 2], ": damaged or cut off, Truncated"),
    "zst that lacks a byte": ("a.jsonl.zst", ZST[:-1], ": damaged or cut off, Truncated"),
    "zst of garbage": ("a.jsonl.zst", ZST[:4] + b"garbage" * 99, ": damaged or cut off"),
    "zst then garbage": ("a.jsonl.zst", ZST + b"garbage", ": damaged or cut off"),
    "zst of two frames": ("a.jsonl.zst", zst(GOOD.encode()) * 2, 4),
    "zst of nothing": ("a.jsonl.zst", zst(b""), ": is empty"),
    "bzip2": ("a.jsonl.bz2", b"BZh91AY&SY" + bytes(99), " line 1: found 'BZh91AY&SY'; not JSON"),
    # Parquet
    "Parquet with other columns": ("a.parquet", table(("frage", "antwort")), " row 1: keys 'frage', 'antwort': no known"),
    "Parquet without its end": ("a.parquet", PARQUET[:-4], ": no whole Parquet file"),
    "Parquet cut in its middle": ("a.parquet", PARQUET[: len(PARQUET) // 2], ": no whole Parquet file"),
    "Parquet of its first bytes": ("a.parquet", b"PAR1", ": no whole Parquet file"),
    "Parquet broken in its middle": ("a.parquet", middle(PARQUET, bytes(2000)), ": no whole Parquet file after row"),
    "Parquet of bytes": ("a.parquet", table(instruction=[b"a"], output=[b"b"]), " row 1: instruction is bytes"),
    "Parquet of bytes as text": ("a.parquet", parquet_of(pyarrow.table({"text": pyarrow.Array.from_buffers(
        pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"]).buffers())})), ": .*row.*utf-8"),
    "Parquet with a null row": ("a.parquet", table(instruction=["a", None], output=["b", None]), " row 2: .* is null"),
    "Parquet of null rows": ("a.parquet", table(text=[None, None]), " row 1: text is null"),
    "Parquet of conversations": ("a.parquet", table(messages=[[USER, ANSWER], [turn("system"), ANSWER]]), 2),
    "Parquet with a bad role": ("a.parquet", table(messages=[[USER, ANSWER], [turn("boss"), ANSWER]]), " row 2 .*'boss'"),
    "Parquet without rows": ("a.parquet", table(text=pyarrow.array([], "string")), ": .*empty"),
    "Parquet without columns": ("a.parquet", parquet_of(pyarrow.table({})), ": .*empty"),
    "Parquet of a column twice": ("a.parquet", parquet_of(pyarrow.Table.from_arrays(
        [pyarrow.array(["a"])] * 3, ["instruction", "output", "output"])), ": two columns are called 'output'"),
    "Parquet of a time in tools": ("a.parquet", table(messages=[[USER, ANSWER]], tools=pyarrow.array(
        [[{"name": "f", "at": 1}]], pyarrow.list_(pyarrow.struct(
            {"name": pyarrow.string(), "at": pyarrow.timestamp("s")})))), " row 1: .*tools"),
    "Parquet of a time beyond Python's": ("a.parquet", table(text=["a"], at=pyarrow.array(
        [1 << 60], pyarrow.duration("ms"))), ": .*row|.* row 1"),
    "Parquet of ranks that are NaN": ("a.parquet", table(**{key: [each[key] for each in answered("t", rank=float("nan"))]
        for key in answered("t", rank=0.0)[1] if key != "rank"}, rank=[None, float("nan")]), 1),
    "Parquet under a name of CSV": ("a.csv", PARQUET, 99),
    # CSV, TSV
    "CSV with a row too long": ("a.csv", "instruction,output\na,b\na,b,c\n", " row 2: has 3 columns, 2"),
    "CSV with a row too short": ("a.csv", "instruction,output\na\na,b\n", " row 1: has 1 columns, 2"),
    "CSV with an open quote": ("a.csv", 'instruction,output\na,b\na,"b\na,b\na,b\n', " row 2: "),
    "CSV with more after a quote": ("a.csv", 'instruction,output\na,"b"c\n', " row 1: "),
    "CSV without a header": ("a.csv", "What is it?,A cat.\nAnd that?,A dog.\n", " row 1: keys 'What is it.*no known"),
    "CSV of a header alone": ("a.csv", "instruction,output\n", ": .*(empty|nothing to train on)"),
    "CSV of a column twice": ("a.csv", "instruction,output,output\na,b,c\n", ": two columns are called 'output'"),
    "CSV with semicolons": ("a.csv", "instruction;output\na;b\n", " row 1: keys 'instruction;output'"),
    "CSV of an empty text": ("a.csv", 'text\na\n""\nb\n', (3, {"empty text": 1})),
    "CSV of an empty answer": ("a.csv", "instruction,output\na,b\na,\n", (2, {"empty answer": 1})),
    "CSV with a mark and CRLF": ("a.csv", "\ufeffinstruction,output\r\na,b\r\n\r\nc,d\r\n", 2),
    "CSV with a NUL": ("a.csv", "instruction,output\na,b\nc,\0\n", "(: | row 2: ).*NUL"),
    "CSV in Latin-1": ("a.csv", "instruction,output\na,b\nd,\xe9\n".encode("latin-1"), ": not UTF-8 at byte 25"),
    "CSV in UTF-16": ("a.csv", "instruction,output\na,b\n".encode("utf-16"), ": not UTF-8 .*UTF-16"),
    "CSV with a field of 3 MB": ("a.csv", f"instruction,output\na,b\na,{'word ' * (3 * MB // 5)}\n",
        (2, {"does not fit into --seq-len 512": 1})),
    "CSV of 100,000 columns": ("a.csv", ",".join(f"c{n}" for n in range(100_000)) + "\n1\n", " row 1: has 1 columns"),
    "CSV of classes beyond classes.txt": ("a.csv", lambda path: [path.write_text("1,a\n3,b\n"),
        path.with_name("classes.txt").write_text("x\ny\n")], " row 2: class '3', classes.txt names 2"),
    "CSV of classes, no last line end": ("a.csv", lambda path: [path.write_text("2,a\n1,b\n"),
        path.with_name("classes.txt").write_text("Red\nBlue")], (2, {}, "Blue")),
    "CSV of classes in Latin-1": ("a.csv", lambda path: [path.write_text("1,a\n2,b\n"),
        path.with_name("classes.txt").write_bytes(b"\xe9\nb\n")], "/../classes.txt: not UTF-8"),
    "TSV with an open quote": ("a.tsv", 'instruction\toutput\na\tb\na\t"b\n', " row 2: "),
    "TSV that is a CSV": ("a.tsv", "instruction,output\na,b\n", " row 1: keys 'instruction,output'"),
    # JSON
    "a list that is cut": ("a.json", LIST[:-20], " record 2: JSON cut off at column"),
    "a list that is cut behind a record": ("a.json", LIST[:-1], " record 2: JSON cut off at column"),
    "a comma too many": ("a.json", LIST[:-1] + ",]", " record 3: not JSON at column"),
    "a comma too few": ("a.json", LIST.replace("}, {", "} {"), " record 1: not JSON at column .*comma"),
    "two lists": ("a.json", LIST + LIST, ": not JSON at column .*more after the list's end"),
    "comments": ("a.json", '[\n// mine\n{"text": "a"}]', " record 1: not JSON at line 2 column 1"),
    "a comment in front": ("a.jsonl", "# mine\n" + GOOD, " line 1: found '# mine"),
    "a string": ("a.json", '"text"', """ line 1: found '"text"'; not JSON"""),
    "a number": ("a.json", "17\n", " line 1: found '17"),
    "a list of numbers": ("a.json", "[1, 2]", " record 1: is a number, an object is wanted"),
    "an object": ("a.json", json.dumps(qa(1)), 1),
    "an object of many lines": ("a.json", json.dumps(qa(1), indent=2), 1),
    "an object of objects": ("a.json", json.dumps({"a": qa(1), "b": qa(2, output="")}, indent=2), (2, {"empty": 1})),
    "an object of objects, an id twice": ("a.json", f'{{"a": {json.dumps(qa(1))},\n"a": {json.dumps(qa(2))}}}',
        ".*'a' .*twice"),
    "objects of many lines": ("a.json", json.dumps(qa(1), indent=2) * 2, ": not JSON at line 4 column .*more after"),
    "objects side by side": ("a.jsonl", GOOD + '{"instruction": "a", "output": "b"} {}', " line 3: .*more after"),
    "a key twice": ("a.jsonl", GOOD + '{"instruction": "a", "output": "b", "output": "c"}', " line 3: .*'output' .*twice"),
    "NaN": ("a.jsonl", GOOD + json.dumps(qa(3, score=float("nan"))), " line 3: NaN is not JSON"),
    "-Infinity": ("a.json", json.dumps([qa(1), qa(2, output=float("-inf"))]), " record 2: -Infinity is not JSON"),
    "a number of 5,000 digits": ("a.jsonl", lines(qa(1))[:-2] + f', "id": {"7" * 5000}}}', 1),
    "a class of 5,000 digits": ("a.jsonl", f'{{"text": "a", "label": {"7" * 5000}}}', " line 1: label is"),
    "10,000 lists in a key": ("a.jsonl", GOOD + with_deep(qa(3, id="DEEP"), deep(10_000)), f" line 3: .*{NESTED}"),
    "10,000 objects in a key": ("a.json", f"[{with_deep(qa(3, id='DEEP'), deep(10_000, 'a'))}]", f" record 1: .*{NESTED}"),
    "10,000 lists as the file": ("a.json", deep(10_000), f" record 1: .*{NESTED}"),
    "10,000 lists on a line": ("a.jsonl", GOOD + deep(10_000), f" line 3: .*{NESTED}"),
    "10,000 objects as the file": ("a.json", deep(10_000, "a"), f".*{NESTED}"),
    "10,000 objects, a line each": ("a.json", deep(10_000, "a").replace(":", ":\n"), f".*{NESTED}"),
    "10,000 lists as a content": ("a.jsonl", lines(chat(USER, ANSWER), with_deep(chat(USER, turn("assistant", "DEEP")),
        deep(10_000))), f" line 2: .*{NESTED}"),
    "10,000 lists in arguments": ("a.jsonl", calls(deep(10_000)), " line 2 message 2: arguments of f"),
    "10,000 replies in each other": ("a.jsonl", deep(10_000, "replies"), f" line 1: .*{NESTED}"),
    "UTF-16": ("a.json", LIST.encode("utf-16"), ": not UTF-8 .*UTF-16"),
    "UTF-16 without its mark": ("a.jsonl", GOOD.encode("utf-16-le"), ".*(UTF-8|NUL)"),
    "a mark of UTF-8": ("a.jsonl", "\ufeff" + GOOD, 2),
    "a mark of UTF-8 in the middle": ("a.jsonl", GOOD + "\ufeff" + GOOD, " line 3: not JSON"),
    "line separators in a text": ("a.jsonl", json.dumps(qa(1, output="a\u2028b\x85c"), ensure_ascii=False),
        (1, {}, "a\u2028b\x85c")),
    "bytes that are not UTF-8": ("a.jsonl", (GOOD + GOOD).encode().replace(b"Say 2", b"S\xff", 1), " line 2: not UTF-8"),
    "bytes that are not UTF-8 in a list": ("a.json", LIST.encode().replace(b"Say 2", b"\xff"), ": not UTF-8 at byte"),
    "blank lines": ("a.jsonl", "\n\r\n" + lines(qa(1)) + " \n\n" + lines({"instruction": "a"}), " line 6: keys"),
    "blank lines of 100 kB": ("a.jsonl", "\n" * 100_000 + GOOD, 2),
    "surrogate in a content": ("a.jsonl", says(content="\ud800"), " line 2 message 2: content .*surrogate"),
    "surrogate in a role": ("a.jsonl", says(role="\ud800"), r" line 2 message 2: role '\\ud800' is unknown"),
    "surrogate in a key that says nothing": ("a.jsonl", lines(qa(1), qa(2) | {"\ud800": 1}), 2),
    "surrogate in arguments": ("a.jsonl", calls({"a": ["\udfff"]}), " line 2 message 2: arguments of f .*surrogate"),
    "surrogate in a key of arguments": ("a.jsonl", calls({"\ud800": 1}), " line 2 message 2: arguments .*surrogate"),
    "surrogate in arguments' JSON": ("a.jsonl", calls('{"a": "\\ud800"}'), " line 2 message 2: arguments .*surrogate"),
    "surrogate in a call's id": ("a.jsonl", says(tool_calls=[{"id": "\ud800", "name": "f"}]), " line 2 .*surrogate"),
    "surrogate in a tool's name": ("a.jsonl", lines(chat(USER, turn("tool", name="\ud800"), ANSWER)), " line 1 .*surr"),
    "surrogate in tools": ("a.jsonl", lines(chat(USER, ANSWER, tools=[{"name": "\ud800"}])), " line 1: tools .*surr"),
    "surrogate in a class": ("a.jsonl", lines({"text": "a", "label": "\udc00"}), " line 1: label .*surrogate"),
    "no record": ("a.json", " [ ]\n", ": .*empty"),
    # plain text
    "text with NULs": ("a.txt", "To be\0or not", ": holds a NUL at character 6"),
    "text of nothing": ("a.txt", "", ": is empty"),
    "text of spaces": ("a.txt", " \n\t\n", ": is empty"),
    "text cut in a character": ("a.txt", "To be é".encode()[:-1], ": not UTF-8 at byte 6"),
    "text with a mark alone": ("a.md", "\ufeff", ": is empty"),
    "text that is a picture": ("a.txt", b"\x89PNG\r\n\x1a\n" + bytes(99), ": not UTF-8 at byte 0"),
    ".md that is a JSON list": ("a.md", LIST, 2),
    ".txt of a letter": ("a.txt", "a", 1),
    # folders, links, pipes
    "a folder of nothing": ("a", folder(), ": holds no file of a known kind"),
    "a folder of unknown files": ("a", folder(a__py="pass", b__pdf="%PDF"), ": holds no file of a known kind"),
    "a folder with a broken file": ("a", folder(a__jsonl=GOOD, b__jsonl=GOOD + "{", c__jsonl=GOOD), "/b.jsonl line 3: "),
    "a folder with an empty file": ("a", folder(a__jsonl=GOOD, b__jsonl=""), "/b.jsonl: is empty"),
    "a folder of two formats": ("a", folder(a__jsonl=GOOD, b__jsonl=lines(chat(USER, ANSWER))), "/b.jsonl line 1: keys"),
    "a folder of good and unknown files": ("a", folder(a__jsonl=GOOD, b__pdf="%PDF"), 2),
    "a link to itself": ("a.jsonl", loop, ": Too many levels of symbolic links"),
    "a folder with a link to itself": ("a", loop_in_folder, "/b.jsonl: Too many levels of symbolic links"),
    "a link to nothing": ("a.jsonl", lambda path: path.symlink_to("nothing"), ": no such file"),
    "a pipe": ("a.jsonl", os.mkfifo, ": .*(pipe|no file|not a file|regular)"),
    "a name of two lines": ("a\nb.jsonl", '{"text": 5}', " line 1: text is a number"),
    # conversations
    "two formats": ("a.jsonl", lines(qa(1), chat(USER, ANSWER)), " line 2: keys 'messages': the first record is Alpaca"),
    "an unknown role": ("a.jsonl", lines(chat(USER, ANSWER), chat(turn("boss"), ANSWER)), " line 2 message 1: role 'boss'"),
    "user after user": ("a.jsonl", lines(chat(USER, USER, ANSWER), chat(ANSWER, ANSWER, USER)), 2),
    "tool first, system last": ("a.jsonl", lines(chat(turn("tool"), ANSWER, turn("system"))), 1),
    "no answer": ("a.jsonl", lines(chat(USER, ANSWER), chat(USER)), " line 2: no assistant message"),
    "no messages": ("a.jsonl", lines(chat(USER, ANSWER), chat()), " line 2: no assistant message among 0"),
    "messages are a string": ("a.jsonl", lines({"messages": "[]"}), " line 1: messages is a string, a list is wanted"),
    "a content that is a number": ("a.jsonl", says(content=7), " line 2 message 2: content is a number"),
    "a content of an object": ("a.jsonl", says(content={"text": "a"}), " line 2 message 2: content is an object"),
    "a content with an image": ("a.jsonl", says(content=[{"type": "image_url"}]), " line 2 message 2: .*'image_url'"),
    "a thought that is a number": ("a.jsonl", says(reasoning_content=7), " line 2 message 2: .*reasoning_content is a num"),
    "arguments that are no JSON": ("a.jsonl", calls("{"), " line 2 message 2: arguments of f is no JSON"),
    "arguments of NaN": ("a.jsonl", calls('{"x": NaN}'), " line 2 message 2: arguments of f"),
    "arguments that are a list": ("a.jsonl", calls([1]), " line 2 message 2: arguments of f: is a list"),
    "calls that are a number": ("a.jsonl", says(tool_calls=7), " line 2 message 2: a tool call: is a number"),
    "a call of the user's": ("a.jsonl", lines(chat(turn("user", tool_calls=[{"name": "f"}]), ANSWER)),
        " line 1 message 1: a tool call of the user"),
    "tools that are no JSON": ("a.jsonl", lines(chat(USER, ANSWER, tools="[{")), " line 1: tools is no JSON"),
    "ShareGPT without from": ("a.jsonl", lines({"conversations": [{"value": "a"}]}), " line 1 message 1: no (from|role)"),
    "ShareGPT's call that is no JSON": ("a.jsonl", lines({"conversations": [{"from": "human", "value": "a"},
        {"from": "function_call", "value": "f(x)"}]}), " line 1 message 2: value is no JSON"),
    "prompt of strings": ("a.jsonl", lines({"prompt": ["a", "b"], "completion": "c"}), " line 1 message 1: is a string"),
    "Alpaca with null as input": ("a.jsonl", lines(qa(1, input=None), qa(2, input="")), 2),
    "Alpaca with null as output": ("a.jsonl", lines(qa(1), qa(2, output=None)), " line 2: output is null"),
    "one bad record in 10,000": ("a.jsonl", lines(*(qa(n, output=n if n == 8_765 else "a" * 99) for n in range(10_000))),
        " line 8766: output is a number"),
    "two bad records in 10,000": ("a.json", json.dumps([qa(n, output=None if n in (7_000, 7_001) else "a" * 99)
        for n in range(10_000)]), " record 7001: output is null"),
    "a bad row in 10,000": ("a.parquet", table(text=[None if n == 7_776 else "a" for n in range(10_000)]),
        " row 7777: text is null"),
    "keys of 1 MB": ("a.jsonl", lines(qa(1), qa(2) | {"k" * MB: 1}, qa(3) | {"K" * MB: "v" * MB}), 3),
    "a role of 1 MB": ("a.jsonl", says(role="r" * MB), " line 2 message 2: role 'rrr"),
    "a tool's name of 1 MB": ("a.jsonl", says(tool_calls=[{"name": "n" * MB}]), (2, {"does not fit": 1})),
    "keys that are only long": ("a.jsonl", lines({"k" * MB: 1, "l\n" * MB: 2}), " line 1: keys 'kkk.*no known format"),
    # weights
    "a weight below 0": ("a.jsonl", lines(qa(1), qa(2, weight=-1)), " line 2: weight is -1"),
    "a weight of NaN": ("a.csv", "instruction,output,weight\na,b,nan\n", " row 1: weight is nan"),
    "a weight that is a word": ("a.jsonl", lines(qa(1, weight="much")), " line 1: weight is much"),
    "a weight that is huge": ("a.jsonl", lines(qa(1))[:-2] + ', "weight": 1e999}', " line 1: weight is inf"),
    "a weight of 5,000 digits": ("a.jsonl", lines(qa(1))[:-2] + f', "weight": {"7" * 5000}}}', " line 1: weight is"),
    "weights that are nothing": ("a.jsonl", lines(qa(1), qa(2, weight=0), qa(3, weight=1e-300)),
        (3, {"without a trained token": 2})),
    "a weight on a question": ("a.jsonl", lines(chat(turn("user", weight=2), ANSWER)), " line 1 message 1: a weight on"),
    # preferences, KTO
    "KTO's label as a word": ("a.jsonl", lines({"prompt": "a", "completion": "b", "label": "true"}), " line 1: label is a"),
    "KTO's bad answers": ("a.jsonl", lines(*({"prompt": "a", "completion": "b", "label": n > 0} for n in range(3))),
        (3, {"labelled as a bad answer": 1})),
    "a preference without a prompt": ("a.jsonl", lines(prefers("a", "b")), " line 1: nothing is asked .* prompt is wanted"),
    "chosen is what is rejected": ("a.jsonl", lines(prefers("a", "b", prompt="q"), prefers("a", "a", prompt="q")),
        (2, {"chosen and rejected do not differ": 1})),
    "chosen is always what is rejected": ("a.jsonl", lines(prefers("a", "a", prompt="q")), ": no record .*1 chosen and"),
    "rejected is a number": ("a.jsonl", lines(prefers("a", 1, prompt="q")), " line 1: rejected is a number"),
    "HH that begins with an assistant": ("a.jsonl", lines(prefers("\n\nAssistant: a", "\n\nAssistant: b")), " line 1: noth"),
    "HH without an assistant": ("a.jsonl", lines(prefers("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a")), " line 1: .*rej"),
    # questions on texts
    "SQuAD without answers": ("a.json", questions({"question": "q"}), " .*article 1 paragraph 1 question 1: no answers"),
    "SQuAD's paragraphs as a string": ("a.json", squad("none"), " .*: paragraphs is a string"),
    "SQuAD's articles as strings": ("a.json", '{"version": "2", "data": ["a"]}', " .*: is a string, an object is wanted"),
    "SQuAD's answer as a number": ("a.json", questions({"question": "q", "answers": [{"text": 4}]}), " .*text is a number"),
    "SQuAD's unanswerable": ("a.json", questions({"question": "q", "answers": [{"text": "a"}]},
        {"question": "r", "answers": [], "is_impossible": True}), (2, {"without an answer": 1})),
    "SQuAD, flat and unanswerable": ("a.jsonl", lines(*({"context": "c", "question": "q", "answers": answers}
        for answers in (SQUAD_ANSWER, {"text": [], "answer_start": []}))), (2, {"without an answer": 1})),
    # trees
    "a tree without answers": ("a.jsonl", lines(tree(), tree(node("a", "p", "assistant"))), (2, {"without an answer": 1})),
    "a tree whose root is deleted": ("a.jsonl", lines(tree(node("a", "p", "assistant"), deleted=True),
        tree(node("b", "p", "assistant"))), (2, {"delet|without an answer": 1})),
    "a tree of deleted answers": ("a.jsonl", lines(tree(node("a", "p", "assistant", deleted=True))), ": no record .*answer"),
    "a tree with an unknown role": ("a.jsonl", lines(tree(node("a", "p", "boss"))), " line 1: role 'boss' is unknown"),
    "a tree whose ranks are words": ("a.jsonl", lines(tree(node("a", "p", "assistant", rank="first"))), " line 1: .*rank"),
    "a tree whose replies are a word": ("a.jsonl", lines(tree() | {"prompt": {"replies": "none"}}), " line 1: replies is"),
    "messages in a cycle": ("a.jsonl", lines(*answered("t"), node("b", "c"), node("c", "b", "assistant")),
        (3, {"no root": 2})),
    "messages in nothing but a cycle": ("a.jsonl", lines(node("b", "c"), node("c", "b")), ": no record .*2 .*no root"),
    "a message that is its own parent": ("a.jsonl", lines(*answered("t"), node("b", "b")), (2, {"no root": 1})),
    "orphaned messages": ("a.jsonl", lines(*answered("t"), node("b", "nobody")), (2, {"no root": 1})),
    "a message twice": ("a.jsonl", lines(*answered("t"), node("ta", "t")), " line [13]: message_id 'ta' stands twice"),
    "a tree that comes again": ("a.jsonl", lines(*answered("t"), *answered("u"), node("v", "t")), " line 5: tree t again"),
    "a root that is deleted": ("a.jsonl", lines(*answered("t"), *answered("u", deleted=False),
        node("v", None, tree="v", deleted=True)), (3, {"delet|without an answer": 1})),
    "a message without a text": ("a.jsonl", lines(*answered("t"), *answered("u", text=None)), " line 4: text is null"),
    "a message of an unknown role": ("a.jsonl", lines(*answered("t"), *answered("u", role="boss")), " line 4: role 'boss'"),
    "a tree's id that is a list": ("a.jsonl", lines(node("t", None, tree=["t"])), " line 1: message_tree_id is a list"),
    "a message's id that is an object": ("a.jsonl", lines(node({"a": 1}, None, tree=None)), " line 1: message_id is an obj"),
    "10,000 messages below each other": ("a.jsonl", lines(node("0", None), *(node(str(n), str(n - 1), "assistant")
        for n in range(1, 10_000))), " line 1: replies nested over 1,000 deep"),
    # classes
    "a class that is null": ("a.jsonl", lines({"text": "a", "label": "x"}, {"text": "b", "label": None}), " line 2: .*null"),
    "a class that is a float": ("a.jsonl", lines({"text": "a", "label": 0.5}), " line 1: label is a number, .*whole number"),
    "a class that is empty in a CSV": ("a.csv", "text,label\na,x\nb,\n", " row 2: .*(null|empty)"),
    "PubMedQA's contexts as numbers": ("a.jsonl", lines({"QUESTION": "q", "CONTEXTS": [1], "LONG_ANSWER": "a"}),
        " line 1: CONTEXTS"),
}  # fmt: skip


def write(path, content):
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_ends_in_a_line_or_in_what_can_be_read(load, tokenizer, cache, tmp_path, name):
    file, content, wanted = CASES[name]
    path, before = tmp_path / file, sorted(cache.rglob("*"))
    write(path, content)
    found, error, said = load(path)
    if isinstance(wanted, str):
        assert found is None and error.count("\n") == 1 and len(error) < 3_000, (found, said, error[:3_000])
        start = f"error: {path}".replace("\n", "\\n")
        assert error.startswith(start) and re.match(wanted, error.removeprefix(start)), error
        assert sorted(cache.rglob("*")) == before  # nothing is left behind
        return
    records, dropped, text = (*wanted, "")[:3] if isinstance(wanted, tuple) else (wanted, {}, "")
    assert found is not None, error
    (rows,) = found.examples.rows
    left_out = rows.found.dropped | {why: n for why, n in found.dropped.items() if not why.startswith("cut to")}
    assert len(set(found.examples.row.tolist())) == records - sum(dropped.values()), left_out
    assert sum(left_out.values()) == sum(dropped.values()), left_out
    for reason, count in dropped.items():
        assert sum(n for why, n in left_out.items() if re.search(reason, why)) == count, left_out
    assert all(any(why in line and f"{n:,}" in line for line in said) for why, n in left_out.items()), said
    assert not error and all("\n" not in line and len(line) < 3_000 for line in said)
    assert all(sum(example.trained) > 0 for example in found.examples)
    assert text in tokenizer.decode(found.examples[0].ids)
