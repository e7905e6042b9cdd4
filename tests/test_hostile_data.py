"""Files of strangers, hostile or broken: the end is one line that names the file and the record; or what can be read is
read, and what is left out is counted and said. Never a traceback, never a loss in silence, nothing left in the cache;
soon, and in bounded memory. Most files are rows of CASES. Takes about 40 seconds."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

import data
from common.errors import printable, run
from dataset import token_cache as rows
from interop.resolve import model_folder
from tokenizer import load_tokenizer

ROOT, MB = Path(__file__).parent.parent, 1 << 20
SECONDS = 40  # that a file may take on a busy machine; a hang is what it is for


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAINTUNE_CACHE", str(folder))
        patch.setattr(rows, "cache_folder", lambda: folder)  # conftest.py has put another in its place
        yield folder


@pytest.fixture(scope="module")
def tokenizer(cache):
    return load_tokenizer(model_folder(None))


@pytest.fixture
def load(cache, tokenizer, capsys):
    """load(path) -> (the dataset, or None; what a user sees on stderr; the lines that were said)"""

    def load(path):
        found, said = [], []
        signal.alarm(SECONDS)
        try:
            run(lambda: found.append(data.load([path], tokenizer, 512, print_fn=said.append)))
        except SystemExit as end:
            assert end.code == 2
        finally:
            signal.alarm(0)
        return found[0] if found else None, capsys.readouterr().err, said

    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"takes over {SECONDS} s"))
    yield load
    signal.signal(signal.SIGALRM, before)


# ---- what stands in the files ----


def write(path, content):
    """content: bytes; text; a list of records, for JSONL; a dict of a folder's files; or what writes it to a path"""
    if callable(content):
        content(path)
    elif isinstance(content, dict):
        path.mkdir()
        for name, inside in content.items():
            write(path / name, inside)
    else:
        content = lines(*content) if isinstance(content, list) else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


lines = lambda *records: "".join(json.dumps(record) + "\n" for record in records)
qa = lambda n, **more: {"instruction": f"Say {n}.", "output": f"It is {n}."} | more
turn = lambda role, content="a", **more: {"role": role, "content": content} | more
chat = lambda *turns, **more: {"messages": list(turns)} | more
says = lambda **more: [chat(USER, ANSWER), chat(USER, ANSWER | more)]  # the second answer has this as well
calls = lambda arguments: says(tool_calls=[{"function": {"name": "f", "arguments": arguments}}])
prefers = lambda chosen, rejected, **more: {"chosen": chosen, "rejected": rejected} | more
answered = lambda tree, **more: [node(tree, None, tree=tree), node(tree + "a", tree, "assistant", tree) | more]
with_deep = lambda record, value: json.dumps(record).replace('"DEEP"', value)  # JSON in the place of that string
table = lambda **columns: parquet_of(pyarrow.table(columns))
beside = lambda content, classes: lambda path: (write(path, content), write(path.with_name("classes.txt"), classes))


def squad(*qas, **more):
    return json.dumps({"version": "2", "data": [{"paragraphs": [{"context": "c", "qas": list(qas)}]} | more]})


def node(id, parent, role="prompter", tree="t", **more):
    named = {"message_id": id, "parent_id": parent, "message_tree_id": tree}
    return named | {"role": role, "text": f"I am {id}"} | more


def tree(role=None, root=None, **more):
    """A prompt with a reply of this role."""
    replies = [node("a", "p", role, **more)] if role else []
    return {"message_tree_id": "t", "prompt": node("p", None) | (root or {}) | {"replies": replies}}


def deep(n, key=None):
    """n lists, or objects with this key, in each other."""
    return "[" * n + "]" * n if key is None else f'{{"{key}":' * n + "1" + "}" * n


def parquet_of(table):
    parquet.write_table(table, file := io.BytesIO(), row_group_size=2)
    return file.getvalue()


def zst(content):
    with pyarrow.CompressedOutputStream(file := pyarrow.BufferOutputStream(), "zstd") as stream:
        stream.write(content)
    return file.getvalue().to_pybytes()


USER, ANSWER, DELETED = turn("user"), turn("assistant"), {"deleted": True}
GOOD, LIST = lines(qa(1), qa(2)), json.dumps([qa(1), qa(2)])
MANY = lines(*(qa(n * n * 7919 % 100_003) for n in range(2_000))).encode()
GZ, ZST, SHORT = gzip.compress(MANY), zst(MANY), gzip.compress(GOOD.encode())
PARQUET = table(instruction=[f"Say {n}" for n in range(99)], output=[f"It is {n}" for n in range(99)])
NO_UTF8 = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"]).buffers())
TOOL = pyarrow.struct({"name": "string", "at": pyarrow.timestamp("s")})
TIMED = pyarrow.array([[{"name": "f", "at": 1}]], pyarrow.list_(TOOL))
LATE = pyarrow.array([1 << 60], "duration[ms]")
TWICE = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, ["instruction", "output", "output"])
RANKS = {"a": float("nan"), "b": 1.0, "c": 0.0}
RANKED = [node("t", None, rank=0.0), *(node(id, "t", "assistant", rank=rank) for id, rank in RANKS.items())]
LONG = [qa(n, output="a" * 99) for n in range(10_000)]  # over 1 MB: read by several processes
LOOP = lambda path: path.symlink_to(path)
BROKEN, WHOLE, NESTED = ": damaged or cut off", ": no whole Parquet file", "nested too deep"

# name: (suffix of the file, or "" for a folder; content; what is to be seen). To be seen: a pattern, of what the error
# says after the file's name; or how many records there are, all kept; or (how many, {pattern of a reason: how many are
# left out for it}), and then maybe a text that the first one holds.
CASES = {
    # gzip, zstandard
    "gz cut in its middle": ("jsonl.gz", GZ[: len(GZ) // 2], BROKEN),
    "gz with a wrong checksum": ("jsonl.gz", GZ[:-8] + b"12345678", f"{BROKEN}, CRC"),
    "gz then garbage": ("jsonl.gz", GZ + b"garbage", BROKEN),
    "gz then zeros, as on tapes": ("jsonl.gz", SHORT + bytes(512), 2),
    "gz of two members": ("jsonl.gz", SHORT * 2, 4),
    "gz of nothing": ("jsonl.gz", gzip.compress(b""), ": is empty"),
    "gz of gz": ("jsonl.gz", gzip.compress(GZ), ".*gzip"),
    "gz of Parquet": ("parquet.gz", gzip.compress(PARQUET), ": Parquet in gzip.*unpack"),
    "zst cut in its middle": ("jsonl.zst", ZST[: len(ZST) // 2], BROKEN),
    "zst of garbage": ("jsonl.zst", ZST[:4] + b"garbage" * 99, BROKEN),
    "zst of two frames": ("jsonl.zst", zst(GOOD.encode()) * 2, 4),
    # Parquet
    "Parquet of other columns": ("parquet", table(frage=["a"], antwort=["b"]), " row 1: keys 'frage', 'antwort': no"),
    "Parquet without its end": ("parquet", PARQUET[:-4], WHOLE),
    "Parquet cut in its middle": ("parquet", PARQUET[: len(PARQUET) // 2], WHOLE),
    "Parquet broken in its middle": ("parquet", PARQUET[:9000] + bytes(900) + PARQUET[9900:], WHOLE),
    "Parquet of bytes": ("parquet", table(instruction=[b"a"], output=[b"b"]), " row 1: instruction is bytes"),
    "Parquet of text that is not UTF-8": ("parquet", table(text=NO_UTF8), ".*row.*utf-8"),
    "Parquet of null rows": ("parquet", table(instruction=["a", None], output=["b", None]), " row 2: .* is null"),
    "Parquet of conversations": ("parquet", table(messages=[[USER, ANSWER], [turn("system"), USER, ANSWER]]), 2),
    "Parquet without rows": ("parquet", table(text=pyarrow.array([], "string")), ": .*empty"),
    "Parquet of a column twice": ("parquet", parquet_of(TWICE), ": two columns are called 'output'"),
    "Parquet of a time in tools": ("parquet", table(messages=[[USER, ANSWER]], tools=TIMED), " row 1: .*tools"),
    "Parquet of a time beyond Python's": ("parquet", table(text=["a"], at=LATE), ".*row"),
    "Parquet of a rank that is NaN": ("parquet", parquet_of(pyarrow.Table.from_pylist(RANKED)), (1, {}, "I am c")),
    # CSV, TSV
    "CSV with a row too long": ("csv", "instruction,output\na,b\na,b,c\n", " row 2: has 3 columns, 2"),
    "CSV with an open quote": ("csv", 'instruction,output\na,b\na,"b\na,b\na,b\n', " row 2: "),
    "CSV without a header": ("csv", "What is it?,A cat.\nAnd that?,A dog.\n", (2, {}, "What is it?")),
    "CSV of a header alone": ("csv", "instruction,output\n", ": .*(empty|nothing to train on)"),
    "CSV of a column twice": ("csv", "instruction,output,output\na,b,c\n", ": two columns are called 'output'"),
    "CSV of an empty text": ("csv", 'text\na\n""\nb\n', (3, {"empty text": 1})),
    "CSV with a mark and CRLF": ("csv", "\ufeffinstruction,output\r\na,b\r\n\r\nc,d\r\n", 2),
    "CSV with a NUL": ("csv", "instruction,output\na,b\nc,\0\n", "(:| row 2:) .*NUL"),
    "CSV in Latin-1": ("csv", "instruction,output\na,b\nd,\xe9\n".encode("latin-1"), ".* not UTF-8 at byte"),
    "CSV with a field of 3 MB": ("csv", f"instruction,output\na,b\na,{'word ' * 600_000}\n", (2, {"--seq-len 512": 1})),
    "CSV of 100,000 columns": ("csv", ",".join(f"c{n}" for n in range(100_000)) + "\n1\n", " row 1: has 1 column,"),
    "CSV of classes, no last line end": ("csv", beside("2,a\n1,b\n", "Red\nBlue"), (2, {}, "Blue")),
    "TSV with an open quote": ("tsv", 'instruction\toutput\na\tb\na\t"b\n', " row 2: "),
    # JSON
    "a list that is cut": ("json", LIST[:-20], " record 2: JSON cut off at column"),
    "a comma too many": ("json", LIST[:-1] + ",]", " record 3: not JSON at column"),
    "comments": ("json", '[\n// mine\n{"text": "a"}]', " record 1: not JSON at line 2 column 1"),
    "a string": ("json", '"text"', """ line 1: found '"text"'; not JSON"""),
    "a number": ("json", "17\n", " line 1: found '17"),
    "an object of many lines": ("json", json.dumps(qa(1), indent=2), 1),
    "an object of objects": ("json", json.dumps({"a": qa(1), "b": qa(2, output="")}, indent=2), (2, {"empty": 1})),
    "an object of an id twice": ("json", f'{{"a": {json.dumps(qa(1))},\n"a": {json.dumps(qa(2))}}}', ".*'?a'? .*twice"),
    "a key twice": ("jsonl", GOOD + '{"instruction": "a", "output": "b", "output": "c"}', " line 3: .*output.* twice"),
    "objects of many lines": ("json", json.dumps(qa(1), indent=2) * 2, ": not JSON at line 4 column .*more after"),
    "objects side by side": ("jsonl", GOOD + '{"instruction": "a", "output": "b"} {}', " line 3: .*more after"),
    "NaN": ("jsonl", [qa(1), qa(2, score=float("nan"))], " line 2: NaN is not JSON"),
    "a number of 5,000 digits": ("jsonl", lines(qa(1))[:-2] + f', "id": {"7" * 5000}}}', 1),
    "10,000 lists in a key": ("jsonl", GOOD + with_deep(qa(3, id="DEEP"), deep(10_000)), f" line 3: .*{NESTED}"),
    "10,000 objects in a key": ("json", f"[{with_deep(qa(3, id='DEEP'), deep(10_000, 'a'))}]", f".* 1: .*{NESTED}"),
    "10,000 lists as the file": ("json", deep(10_000), f" record 1: .*{NESTED}"),
    "10,000 objects, a line each": ("json", deep(10_000, "a").replace(":", ":\n"), f".*{NESTED}"),
    "10,000 lists in arguments' JSON": ("jsonl", calls(deep(10_000)), " line 2 message 2: arguments of f"),
    "10,000 replies in each other": ("jsonl", deep(10_000, "replies"), f" line 1: .*{NESTED}"),
    "UTF-16": ("json", LIST.encode("utf-16"), ": not UTF-8 .*UTF-16"),
    "UTF-16 without its mark": ("jsonl", GOOD.encode("utf-16-le"), ".*(UTF-|NUL)"),
    "a mark of UTF-8": ("jsonl", "\ufeff" + GOOD, 2),
    "line separators in a text": ("jsonl", '{"text": "a\u2028b\x85c"}', (1, {}, "a\u2028b\x85c")),
    "a byte that is not UTF-8": ("jsonl", (GOOD + GOOD).encode().replace(b"Say 2", b"S\xff", 1), " line 2: not UTF-8"),
    "a byte that is not UTF-8 in a list": ("json", LIST.encode().replace(b"Say 2", b"\xff"), ".* not UTF-8 at byte"),
    "blank lines": ("jsonl", f"\n\r\n{lines(qa(1))} \n\n{{}}", " line 6: keys none"),
    "blank lines of 100 kB": ("jsonl", "\n" * 100_000 + GOOD, 2),
    "surrogate in a content": ("jsonl", says(content="\ud800"), " line 2 message 2: content .*surrogate"),
    "surrogate in a role": ("jsonl", says(role="\ud800"), r" line 2 message 2: role .*\\ud800"),
    "surrogate in a key that says nothing": ("jsonl", [qa(1), qa(2) | {"\ud800": 1}], 2),
    "surrogate in arguments": ("jsonl", calls({"a": ["\udfff"]}), " line 2 message 2: arguments of f .*surrogate"),
    "surrogate in a call's id": ("jsonl", says(tool_calls=[{"id": "\ud800", "name": "f"}]), " line 2 .*surrogate"),
    "surrogate in a tool's name": ("jsonl", [chat(USER, turn("tool", name="\ud800"), ANSWER)], " line 1 .*surrogate"),
    # plain text
    "text with NULs": ("txt", "To be\0or not", ": holds a NUL at character 6"),
    "text of nothing": ("txt", "", ": is empty"),
    "text of spaces": ("txt", " \n\t\n", ": is empty"),
    "text cut in a character": ("txt", "To be é".encode()[:-1], ": not UTF-8 at byte 6"),
    ".md that is a JSON list": ("md", LIST, 2),
    # folders, links, pipes
    "a folder of nothing": ("", {}, ": holds no file of a known kind"),
    "a folder of unknown files": ("", {"a.py": "pass", "b.pdf": "%PDF"}, ": holds no file of a known kind"),
    "a folder with a broken file": ("", {"a.jsonl": GOOD, "b.jsonl": GOOD + "{", "c.jsonl": GOOD}, "/b.jsonl line 3: "),
    "a folder with a link to itself": ("", {"a.jsonl": GOOD, "b.jsonl": LOOP}, "/b.jsonl: Too many levels of symbolic"),
    "a pipe": ("jsonl", os.mkfifo, ": .*(pipe|no file|not a file|regular)"),
    "a name that is not UTF-8": ("\udcff.jsonl", GOOD, 2),
    "a name of two lines": ("\nb.jsonl", '{"text": 5}', " line 1: text is a number"),
    # conversations
    "two formats": ("jsonl", [qa(1), chat(USER, ANSWER)], " line 2: keys 'messages': the first record is Alpaca"),
    "an unknown role": ("jsonl", [chat(USER, ANSWER), chat(turn("boss"), ANSWER)], " line 2 message 1: role 'boss'"),
    "roles out of order": ("jsonl", [chat(USER, USER, ANSWER), chat(ANSWER, USER), chat(turn("tool"), ANSWER)], 3),
    "no messages": ("jsonl", [chat(USER, ANSWER), chat()], " line 2: no assistant message among 0"),
    "a content that is a number": ("jsonl", says(content=7), " line 2 message 2: content is a number"),
    "a thought that is a number": ("jsonl", says(reasoning_content=7), " line 2 message 2: .*reasoning_content is"),
    "arguments that are no JSON": ("jsonl", calls("{"), " line 2 message 2: arguments of f is no JSON"),
    "arguments of NaN": ("jsonl", calls('{"x": NaN}'), " line 2 message 2: arguments of f"),
    "a call of the user's": ("jsonl", [chat(USER | {"tool_calls": [{"name": "f"}]})], " line 1 message 1: a tool call"),
    "calls that the template leaves out": ("jsonl", calls({}), (2, {"refused by the chat template": 1})),
    "ShareGPT without from": ("jsonl", [{"conversations": [{"value": "a"}]}], " line 1 message 1: no (from|role)"),
    "ShareGPT's call that is no JSON": ("jsonl", [{"conversations": [{"from": "human", "value": "a"},
        {"from": "function_call", "value": "f(x)"}]}], " line 1 message 2: value is no JSON"),
    "a prompt of strings": ("jsonl", [{"prompt": ["a", "b"], "completion": "c"}], " line 1 message 1: is a string"),
    "null as input": ("jsonl", [qa(1, input=None), qa(2, input="")], 2),
    "one bad record in 10,000": ("jsonl", [*LONG[:8_765], qa(1, output=1), *LONG[8_766:]], " line 8766: output is a"),
    "two bad records in 10,000": ("json", json.dumps([*LONG[:7_000], qa(1, output=None), {}, *LONG[7_002:]]),
        " record 7001: output is null"),
    "a bad row in 5,000": ("parquet", table(text=["a"] * 4_000 + [None] + ["a"] * 999), " row 4001: text is null"),
    "keys of 1 MB": ("jsonl", [qa(1), qa(2) | {"k" * MB: 1}, qa(3) | {"K\n" * MB: "v" * MB}], 3),
    "a role of 1 MB": ("jsonl", says(role="r" * MB), " line 2 message 2: role 'rrr"),
    # weights
    "a weight below 0": ("jsonl", [qa(1), qa(2, weight=-1)], " line 2: weight is -1"),
    "a weight of NaN": ("csv", "instruction,output,weight\na,b,nan\n", " row 1: weight is nan"),
    "a weight that is a word": ("jsonl", [qa(1, weight="much")], " line 1: weight is much"),
    "a weight that is huge": ("jsonl", lines(qa(1))[:-2] + f', "weight": {"7" * 5000}}}', " line 1: weight is inf"),
    "weights of next to nothing": ("jsonl", [qa(1), qa(2, weight=0), qa(3, weight=1e-300)], (3, {"without a tr": 2})),
    # preferences, KTO
    "KTO's label as a word": ("jsonl", [{"prompt": "a", "completion": "b", "label": "true"}], " line 1: label is a"),
    "KTO's bad answer": ("jsonl", [chat(USER, ANSWER, label=good) for good in (True, False)], (2, {"bad answer": 1})),
    "a preference without a prompt": ("jsonl", [prefers("a", "b")], " line 1: nothing is asked .* prompt is wanted"),
    "chosen is what is rejected": ("jsonl", [prefers("a", "b", prompt="q"), prefers("a", "a", prompt="q")],
        (2, {"chosen and rejected do not differ": 1})),
    "HH that begins with an assistant": ("jsonl", [prefers("\n\nAssistant: a", "\n\nAssistant: b")], " line 1: noth"),
    "HH without an assistant": ("jsonl", [prefers("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a")], " line 1: .*rejec"),
    # questions on texts
    "SQuAD without answers": ("json", squad({"question": "q"}), " .*article 1 paragraph 1 question 1: no answers"),
    "SQuAD's paragraphs as a string": ("json", squad(paragraphs="none"), " .*: paragraphs is a string"),
    "SQuAD's unanswerable": ("json", squad({"question": "q", "answers": [{"text": "a"}]},
        {"question": "r", "answers": []}), (2, {"without an answer": 1})),
    # trees
    "a tree without answers": ("jsonl", [tree(), tree("assistant")], (2, {"without an answer": 1})),
    "a tree whose root is deleted": ("jsonl", [tree("assistant", DELETED), tree("assistant")], (2, {"delet": 1})),
    "a tree of deleted answers": ("jsonl", [tree("assistant", deleted=True)], ": no record .*answer"),
    "a tree with an unknown role": ("jsonl", [tree("boss")], " line 1: role 'boss' is unknown"),
    "a tree whose ranks are words": ("jsonl", [tree("assistant", rank="first")], " line 1: .*rank"),
    "messages in a cycle": ("jsonl", [*answered("t"), node("b", "c"), node("c", "b")], (3, {"no root": 2})),
    "orphaned messages": ("jsonl", [*answered("t"), node("b", "nobody")], (2, {"no root": 1})),
    "a message twice": ("jsonl", [*answered("t"), node("ta", "t")], " line [13]: message_id 'ta' stands twice"),
    "a tree that comes again": ("jsonl", [*answered("t"), *answered("u"), node("v", "t")], " line 5: tree '?t'? again"),
    "a root that is deleted": ("jsonl", [*answered("t"), node("v", None, tree="v", deleted=True)], (2, {"delet": 1})),
    "a message without a text": ("jsonl", [*answered("t"), *answered("u", text=None)], " line 4: text is null"),
    "a message of an unknown role": ("jsonl", [*answered("t"), *answered("u", role="boss")], " line 4: role 'boss'"),
    "a tree's id that is a list": ("jsonl", [node("t", None, tree=["t"])], " line 1: message_tree_id is a list"),
    "a message's id that is an object": ("jsonl", [node({"a": 1}, None, tree=None)], " line 1: message_id is an obj"),
    "5,000 messages below each other": ("jsonl", [node("0", None),
        *(node(f"{n}", f"{n - 1}", "assistant") for n in range(1, 5_000))], " line 1: replies nested over 1,000 deep"),
    # classes
    "a class that is null": ("jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": None}], " line 2: .*null"),
    "a class that is a float": ("jsonl", [{"text": "a", "label": 0.5}], " line 1: label is a number, .*whole number"),
    "a class that is empty": ("csv", "text,label\na,x\nb,\n", " row 2: .*(null|empty)"),
}  # fmt: skip


def check_error(path, error, wanted):
    start = f"error: {printable(str(path))}"
    assert error.startswith(start) and re.match(wanted, error.removeprefix(start)), error
    assert error.endswith("\n") and len(error) < 3_000
    # One line; or, where several records are faulty, a line each and one with their number.
    first, *more = error[:-1].split("\n")
    assert first.isprintable() and all(line.isprintable() for line in more)
    if more:
        assert more[-1].startswith(f"{len(more)} faulty records in {printable(str(path))}"), error


def check_found(found, said, records, dropped):
    """That so many records are kept, and left out for these reasons; that each is said, and each example is trained."""
    (rows,) = found.examples.rows
    left_out = rows.stats.dropped | {why: n for why, n in found.dropped.items() if not why.startswith("cut to")}
    by_pattern = {reason: sum(n for why, n in left_out.items() if re.search(reason, why)) for reason in dropped}
    assert by_pattern == dropped and sum(left_out.values()) == sum(dropped.values()), left_out
    assert len(set(found.examples.row.tolist())) == records - sum(dropped.values())
    assert all(any(why in line and f"{n:,}" in line for line in said) for why, n in left_out.items()), said
    assert all(line.isprintable() and len(line) < 3_000 for line in said)
    assert all(sum(example.loss_weights) > 0 for example in found.examples)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_ends_in_a_line_or_in_what_can_be_read(load, tokenizer, cache, tmp_path, name):
    suffix, content, wanted = CASES[name]
    path, before = tmp_path / f"a.{suffix}".rstrip("."), sorted(cache.rglob("*"))
    write(path, content)
    found, error, said = load(path)
    if isinstance(wanted, str):
        assert found is None, said
        check_error(path, error, wanted)
        assert sorted(cache.rglob("*")) == before
    else:
        records, dropped, text = (*wanted, "")[:3] if isinstance(wanted, tuple) else (wanted, {}, "")
        assert found is not None and not error, error
        check_found(found, said, records, dropped)
        assert text in tokenizer.decode(found.examples[0].ids)


@pytest.mark.parametrize("place", ["key", "key in a large list", "arguments", "arguments' JSON", "tools"])
def test_at_any_depth_a_record_is_read_or_named(load, tmp_path, place):
    """Where Python's own recursion ends depends on what is done with a value: decoded, sent on, encoded, copied."""
    for n in (100, 400, 500, 600, 800, 970, 980, 990, 1_000):
        value, path = deep(n, "a"), tmp_path / ("a.json" if "list" in place else "a.jsonl")
        record = calls(value if "JSON" in place else "DEEP")[1]
        if "key" in place or "tools" in place:
            record = chat(USER, ANSWER, **{"tools": [{"name": "DEEP"}]} if place == "tools" else {"id": "DEEP"})
        first = json.dumps(chat(USER, ANSWER, id="x" * 2 * MB * ("list" in place)))
        both = first, with_deep(record, value)
        path.write_text(f"[{', '.join(both)}]" if "list" in place else "\n".join(both))
        found, error, said = load(path)
        if found is None:
            check_error(path, error, " (line|record) 2")
        else:
            check_found(found, said, 2, {"chat template": 1} if "arguments" in place else {})


def test_a_text_of_one_line_of_20_mb_comes_whole(load, tokenizer, tmp_path):
    text = "x" * MB + "many words " * (19 * MB // 11)
    (tmp_path / "a.txt").write_text(text)
    found, _, _ = load(tmp_path / "a.txt")
    assert not found.dropped
    assert tokenizer.decode((id for e in found.examples for id in e.ids), skip_special=True) == text


def test_names_of_classes_are_read_anew_when_they_change(load, tokenizer, tmp_path):
    for names in ("Red\nBlue\n", "Green\nBlack\n"):
        beside("1,a\n2,b\n", names)(tmp_path / "a.csv")
        assert names.partition("\n")[0] in tokenizer.decode(load(tmp_path / "a.csv")[0].examples[0].ids)


def test_names_of_classes_that_are_not_utf_8(load, tmp_path):
    beside("1,a\n2,b\n", b"\xe9\nb\n")(tmp_path / "a.csv")
    check_error(tmp_path / "classes.txt", load(tmp_path / "a.csv")[1], ".*not UTF-8")


def test_linked_folders_are_followed_or_it_is_said_that_they_are_not(load, tmp_path):
    write(tmp_path / "a", {"a.jsonl": GOOD, "here": lambda path: path.symlink_to(path.parent)})
    write(tmp_path / "b", {"b.jsonl": [qa(3), qa(4)]})
    (tmp_path / "a" / "there").symlink_to(tmp_path / "b")
    found, _, said = load(tmp_path / "a")
    assert len(found) == 4 or re.search("left alone|link", said[0].rpartition(": ")[2]), said


def test_after_an_error_the_cache_holds_what_it_held_and_the_mended_file_is_read(load, cache, tmp_path):
    path, before = tmp_path / "a.jsonl", sorted(cache.rglob("*"))
    write(path, [*LONG, {}])
    check_error(path, load(path)[1], " line 10001: keys none")
    assert sorted(cache.rglob("*")) == before
    write(path, LONG)
    assert len(load(path)[0]) == 10_000
    assert {each.name.partition("-")[0] for each in {*cache.iterdir()} - {*before}} == {"rows"}


def test_through_the_command_line(cache, tokenizer, tmp_path):
    names = ["gz cut in its middle", "Parquet of other columns", "10,000 lists in a key"]
    names += ["one bad record in 10,000", "a folder with a broken file"]
    started, before = [], sorted(cache.rglob("*"))
    for i, name in enumerate(names):
        suffix, content, wanted = CASES[name]
        write(folder := tmp_path / f"{i}", {f"a.{suffix}".rstrip("."): content})
        command = [sys.executable, ROOT / "train.py", "--data", *folder.iterdir(), "--plan"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append((command[3], wanted, subprocess.Popen(command, cwd=folder, **pipes)))
    for path, wanted, process in started:
        out, error = process.communicate(timeout=60)
        assert process.returncode == 2 and "Traceback" not in out + error, error
        check_error(path, error, wanted)
        assert [*path.parent.iterdir()] == [path]
    assert sorted(cache.rglob("*")) == before


HUGE = {  # name: (suffix, what stands before 200 MB of x, what the error says)
    "a line": ("jsonl", '{"text": "a"}\n{"text": "', " line 2: longer than 128 MB"),
    "an element, not ASCII": ("json", '[{"text": "a"},\n{"text": "😀', " record 2: longer than 128 MB"),
    "a line in gzip": ("jsonl.gz", '{"text": "', " line 1: longer than 128 MB"),
    "an element in gzip": ("json.gz", '[{"text": "', " record 1: longer than 128 MB"),
    "a field in zstandard": ("csv.zst", 'text\na\n"', ".*longer than 128 MB"),
}
LOAD = """
import re, resource, sys, data
from common.errors import run
from interop.resolve import model_folder
from tokenizer import load_tokenizer

try:
    run(lambda: data.load([sys.argv[1]], load_tokenizer(model_folder(None)), 512))
finally:  # kB; this process's ru_maxrss would begin with its parent's
    peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]
    print(max(int(peak), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of memory")
@pytest.mark.parametrize("name", HUGE)
def test_200_mb_in_one_record_are_refused_in_little_memory(cache, tokenizer, tmp_path, name):
    suffix, start, wanted = HUGE[name]
    path = tmp_path / f"a.{suffix}"
    pack = {".gz": gzip.compress, ".zst": zst}.get(path.suffix, bytes)
    part, end = pack(b"x" * MB), pack(b'"}]' if "json" in suffix.split(".") else b'"}\n')
    with open(path, "wb") as file:
        file.writelines([pack(start.encode()), *[part] * 200, end])
    try:
        words = [sys.executable, "-c", LOAD, path]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=2 * SECONDS, check=False)
    finally:
        path.unlink()
    check_error(path, done.stderr, wanted)
    assert int(done.stdout) < 1_000_000
