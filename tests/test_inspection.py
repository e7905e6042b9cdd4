"""data.py inspect, convert, split; what dataset/text_stats.py tells of texts; --map; and the lines at the start of a
training.
"""

import json
import random
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.helpers import SHARED, needs_shared

from common.errors import UserError
from data import load, main, split
from dataset import inspection
from dataset.formats import Map, open_source
from dataset.text_stats import near_groups, private_parts, script, signature, text_hash
from interop.resolve import model_folder
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_folder(None))


@pytest.fixture
def command(monkeypatch, capsys):
    """command("inspect", FILE, ...) -> what it printed"""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return run


def written(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def sentence(draw: random.Random, words: int) -> str:
    return " ".join("".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(words))


# ---- texts ----


def jaccard(a: str, b: str) -> float:
    sets = [{tuple(words[i : i + 3]) for i in range(len(words) - 2)} for words in (a.split(), b.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_signatures_estimate_jaccard_similarity():
    draw, errors = random.Random(0), []
    for _ in range(150):
        a = sentence(draw, 80).split()
        b = [word if draw.random() < 0.97 else "changed" for word in a[: draw.randint(40, 80)]]
        texts = " ".join(a), " ".join(b)
        estimate = float(np.mean(signature(texts[0]) == signature(texts[1])))
        errors.append(estimate - jaccard(*texts))
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.08  # of 64 places: 1/8 at the most
    assert np.array_equal(signature("One, two:  THREE four!"), signature("one two three\nfour"))
    assert np.mean(signature("红豆生南国春来发几枝愿君多采撷") == signature("红豆生南国春来发几枝愿君多采")) > 0.6


def test_near_groups_are_those_of_all_pairs():
    """Against the quadratic way: groups linked by pairs that are ALIKE by estimate."""
    draw, texts = random.Random(1), []
    for _ in range(60):
        words = sentence(draw, 60).split()
        texts += [" ".join(words[: 60 - draw.randint(0, 12)]) for _ in range(draw.randint(1, 4))]
    draw.shuffle(texts)
    signatures = np.stack([signature(text) for text in texts])
    alike = (signatures[:, None] == signatures).mean(-1) >= 0.8
    wanted = np.arange(len(texts))
    while True:
        least = np.array([wanted[row].min() for row in alike])
        if np.array_equal(least, wanted):
            break
        wanted = least
    got = near_groups(signatures)
    same = (got[:, None] == got) == (wanted[:, None] == wanted)
    assert same.mean() > 0.999 and len(set(wanted.tolist())) < len(texts) - 20


def test_no_pattern_takes_the_square_of_a_text():
    for hostile in ("@ " + "a" * 300_000, "eyJ-" * 80_000, "sk-" * 100_000, "a.b@" * 80_000, "secret = '" * 40_000):
        start = time.process_time()
        private_parts(hostile)
        assert time.process_time() - start < 10, hostile[:10]  # seconds; the square would take minutes


def test_scripts_hashes_and_what_had_better_not_be_there():
    texts = {"LATIN": "Hello, 你", "CYRILLIC": "Привет", "CJK": "你好 ok", "HANGUL": "안녕하세요", "ARABIC": "مرحبا",
             "DEVANAGARI": "नमस्ते", "THAI": "สวัสดี", "HIRAGANA": "こんにちは", "none": "12 + 3!"}  # fmt: skip
    assert {script(text): text for text in texts.values()} == texts
    assert text_hash(" A b\nC ") == text_hash("a B c") != text_hash("ab c")
    secrets = {
        "e-mail address": "write to jane.doe@example.org, please",
        "AWS key": "AKIAIOSFODNN7EXAMPLE",
        "API key": "use sk-abcdefghijklmnopqrstuvwx",
        "private key": "-----BEGIN RSA PRIVATE KEY-----",
        "token (JWT)": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
        "password": 'password = "correcthorse"',
    }
    for kind, text in secrets.items():
        assert [found for found, _ in private_parts(text)] == [kind], text
    for harmless in ("the secret of passwords", "a @ b", "sk-learn", "ghost", "1@2", "eyJ"):
        assert private_parts(harmless) == []


# ---- inspect ----


def findings(said: str) -> dict[str, str]:
    """{name: value} of the lines of a report."""
    return {m[1].strip(): m[2] for m in re.finditer(r"^  [ !] (.{32}) (.+)$", said, re.MULTILINE)}


def test_inspect_finds_what_was_put_in(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    records = [{"instruction": sentence(draw, 12), "output": sentence(draw, 40)} for _ in range(60)]
    near = records[5] | {"output": records[5]["output"] + " end"}
    other_answer = records[6] | {"output": sentence(draw, 30)}
    odd = [
        {"instruction": "mail?", "output": "Ask jane.doe@example.org or john@example.org about it, any day."},
        {"instruction": "token?", "output": "It writes <|im_end|> at the end of each turn, as all of them do."},
        {"instruction": "one word", "output": "Yes."},
        {"instruction": "empty", "output": " "},
        {"instruction": "long", "output": "word " * 300},
    ]
    file = written(Path("a.jsonl"), [*records, records[3], records[3], near, other_answer, *odd])
    against = written(Path("test.jsonl"), [records[0], near | {"instruction": records[5]["instruction"]}, odd[2]])
    said = command("inspect", file, "--seq-len", 250, "--against", against, "--show", 2)
    got = findings(said)
    assert f"{file}: Alpaca (JSONL, 68 records), dropped 1 (empty answer)" in said
    assert got["exact duplicates"] == "2" and got["near-duplicates"] == "1"
    assert got["questions with several answers"] == "2"  # the near-duplicate's, too
    assert got["empty, left out"] == "1" and got["answers of one word"] == "1"
    assert got["control tokens spelled in text"].startswith("1 ")
    assert got["looks like: e-mail address"] == "2" and "jane..." not in got and f"{file} line 65: jane...rg" in said
    assert got["scripts"] == "LATIN 100.0%"
    assert got["--seq-len 250"] == "1 record whose answer does not fit into --seq-len 250"
    assert f"{file} line 61 is line 4" in said and f"{file} line 63 is line 6" in said
    assert got["exact overlap"] == got["same question"] == "3 of 3 in test.jsonl"
    assert said.count("\n--- ") == 2 and "[[" in said
    counted = re.findall(r"^ +[\d,]+ to [\d,]+ +([\d,]+)", said, re.MULTILINE)
    assert sum(int(n.replace(",", "")) for n in counted) == 68


def test_labels_are_balanced_or_not(tmp_path, command):
    rows = [
        {"text": f"text number {i} {'x' * (i % 7)}", "label": "rare" if i % 50 == 0 else "often"} for i in range(200)
    ]
    said = command("inspect", written(tmp_path / "a.jsonl", rows), "--show", 0)
    assert findings(said)["labels"] == "often 98.0%, rare 2.0%; most to least 196 to 4" and "  ! labels" in said


def test_what_is_shown_as_trained_is_what_is_trained(tmp_path, tokenizer, command):
    turns = [{"role": "user", "content": "a <b> & [[c]]?"}, {"role": "assistant", "content": "d\n<script>e</script>"}]
    file = written(tmp_path / "a.jsonl", [{"messages": turns}])
    page = tmp_path / "page.html"
    said = command("inspect", file, "--html", page)
    assert said.count("[[d\n<script>e</script><|im_end|>]]") == 1
    assert "user\na <b> & [[c]]?<|im_end|>" in said

    class Reader(HTMLParser):
        marked, seen, inside = "", "", False

        def handle_starttag(self, tag, attrs):
            assert tag != "script" and not any(name in ("src", "href") for name, _ in attrs)
            self.inside = tag == "mark" or (self.inside and tag != "pre")

        def handle_endtag(self, tag):
            self.inside = self.inside and tag != "mark"

        def handle_data(self, data):
            self.seen += data
            self.marked += data * self.inside

    reader = Reader()
    reader.feed(page.read_text())
    assert reader.marked == "d\n<script>e</script><|im_end|>" and "a <b> & [[c]]?" in reader.seen


def test_the_terminal_is_not_moved_by_what_stands_in_the_data(tmp_path, command):
    text = "\x1b[2Jcleared\x07 \u202eturned"
    said = command("inspect", written(tmp_path / "a.jsonl", [{"instruction": text, "output": text}]))
    assert "\x1b" not in said and "\x07" not in said and "\u202e" not in said and "\\x1b[2Jcleared" in said


def test_colours_in_a_terminal(tokenizer, tmp_path):
    (example,) = load([written(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}])], tokenizer, 99).examples
    said = inspection.in_terminal(example, tokenizer, True)
    assert said.endswith("\033[32ma<|im_end|>\033[0m") and said.startswith("\033[2m")


# ---- convert and split ----

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
EVERY = [
    [{"instruction": "i", "input": "j", "output": "o", "weight": 0.5}],
    [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}] * 2}],
    [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x", "weight": 0},
                   {"role": "user", "content": "r"}, {"role": "assistant", "tool_calls": [CALL], "content": ""},
                   {"role": "tool", "content": "2", "name": "add"}, {"role": "assistant", "content": "2"}],
      "tools": [{"type": "function", "function": {"name": "add"}}]}],
    [{"prompt": "q", "chosen": "good", "rejected": "bad"}],
    [{"prompt": "q", "chosen": "good", "rejected": "bad", "weight": 0.5},
     {"prompt": "r", "chosen": "x", "rejected": "y", "weight": 0}],
    [{"messages": [{"role": "user", "content": "q", "weight": 0}, {"role": "assistant", "content": "a"}]}],
    [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 3}],
      "label": True}],
    [{"chosen": "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: y",
      "rejected": "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: z"}],
    [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False}],
    [{"text": "plain\ntext"}],
    [{"text": "t", "label": 4}],
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(EVERY)))
def test_what_convert_writes_is_read_as_the_same_records(tmp_path, command, number):
    file = written(tmp_path / "a.jsonl", EVERY[number])
    command("convert", file, "--out", tmp_path / "b.jsonl")
    records = lambda path: open_source(path).read_all()
    bare = lambda path: [(r.messages, r.text, r.tools, r.weights, r.rejected, r.asked, r.label) for r in records(path)]
    assert bare(tmp_path / "b.jsonl") == bare(file)
    with pytest.raises(UserError, match=r"b\.jsonl: exists already"):
        command("convert", file, "--out", tmp_path / "b.jsonl")


def test_convert_keeps_a_long_text_whole_and_kinds_apart(tmp_path, command, monkeypatch):
    monkeypatch.setattr("dataset.readers.PART", 100)
    (tmp_path / "a.txt").write_text("".join(f'line "{i}" \\ é\n' for i in range(300_000)))
    said = command("convert", tmp_path / "a.txt", "--out", tmp_path / "b.jsonl")
    (record,) = open_source(tmp_path / "b.jsonl").read_all()
    assert record.text == (tmp_path / "a.txt").read_text() and "b.jsonl: 1 record\n" in said
    chat = written(tmp_path / "c.jsonl", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(UserError, match="c.jsonl line 1: is of another kind"):
        command("convert", tmp_path / "a.txt", chat, "--out", tmp_path / "d.jsonl")
    assert not (tmp_path / "d.jsonl").exists()


def test_split_refuses_what_can_not_be_parted(tmp_path, command):
    file = written(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}] * 20)
    with pytest.raises(UserError, match=r"\.jsonl would be empty: 1 groups"):
        command("split", file, "--out", tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_a_page_is_written_over_a_page_only(tmp_path, command):
    file = written(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}])
    before = file.read_text()
    with pytest.raises(UserError, match="is no page of this program"):
        command("inspect", file, "--html", file)
    assert file.read_text() == before
    for _ in range(2):
        command("inspect", file, "--html", tmp_path / "page.html")


def test_a_convert_that_fails_leaves_nothing(tmp_path, command):
    file = written(tmp_path / "a.jsonl", [{"text": "a"}, {"text": 1}])
    with pytest.raises(UserError, match="line 2: text is a number"):
        command("convert", file, "--out", tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="line 2: text is a number"):
        command("split", file, "--out", tmp_path / "parts")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_split_keeps_together_what_is_alike(tmp_path, command):
    draw, records = random.Random(0), []
    for i in range(300):
        question, answer = sentence(draw, 10), sentence(draw, 60)
        for k in range(draw.choice((1, 1, 2, 3))):  # the same question, or nearly the same text
            records.append({"prompt": question if i % 2 else question + " x" * k, "completion": answer + " y" * k})
    draw.shuffle(records)
    sides = {}
    for name in ("one", "two"):
        file = written(tmp_path / f"{name}.jsonl", records)
        said = command("split", file, "--out", tmp_path / name, "--val", 0.2, "--test", 0.1)
        parts = {
            side: (tmp_path / name / f"{side}.jsonl").read_text().splitlines() for side in ("train", "val", "test")
        }
        sides[name] = {side: sorted(lines) for side, lines in parts.items()}
        draw.shuffle(records)
    assert sides["one"] == sides["two"]  # whatever the order
    assert sum(map(len, sides["one"].values())) == len(records)
    for side, share in (("val", 0.2), ("test", 0.1)):
        assert 0.4 * share < len(sides["one"][side]) / len(records) < 2 * share
    answers = [{json.loads(line)["messages"][1]["content"].rstrip(" y") for line in lines} for lines in parts.values()]
    assert not answers[0] & answers[1] and not answers[0] & answers[2] and not answers[1] & answers[2]
    assert "groups of records that are alike" in said


# ---- --map ----


def test_a_users_function_maps_records(tmp_path, tokenizer):
    (tmp_path / "m.py").write_text(
        "def f(record):\n"
        "    if record['n'] == 1: return None\n"
        "    if record['n'] == 4: return []\n"
        "    made = {'prompt': record['ask'], 'completion': str(record['n'])}\n"
        "    return [made, made] if record['n'] == 2 else made\n"
        "def wrong(record): return record['no']\n"
        "def mixed(record): return [record, 'text']\n"
        "three = 3\n"
    )
    file = written(tmp_path / "a.jsonl", [{"ask": f"q{n}", "n": n} for n in range(5)])
    said = []
    data = load([file], tokenizer, 99, print_fn=said.append, map_fn=Map(f"{tmp_path}/m.py:f"))
    texts = [tokenizer.decode(e.ids[e.loss_weights > 0].tolist()) for e in data.examples]
    assert texts == ["0<|im_end|>", "2<|im_end|>", "2<|im_end|>", "3<|im_end|>"]
    assert "through" in said[0] and "dropped 2 (left out by --map)" in said[0]
    for name, why in (("wrong", "line 1: --map .*wrong: KeyError: 'no'"), ("none", "has no function none"),
                      ("three", "has no function three"), ("mixed", "mixed gives a string; a dict")):  # fmt: skip
        with pytest.raises(UserError, match=why):
            load([file], tokenizer, 99, map_fn=Map(f"{tmp_path}/m.py:{name}"))
    for name in ("m.py", f"{tmp_path}/none.py:f", f"{tmp_path}/m.py"):
        with pytest.raises(UserError, match="FILE.py:NAME is wanted"):
            Map(name)
    for result, why in (("'a'", "gives a string; a dict"), ("None", "gives None for every record")):
        (tmp_path / "odd.py").write_text(f"def f(record): return {result}")
        with pytest.raises(UserError, match=why):
            load([file], tokenizer, 99, map_fn=Map(f"{tmp_path}/odd.py:f"))
    # what the file reads besides can't be known, so nothing is taken out of the cache
    (tmp_path / "helper.py").write_text("from dataclasses import dataclass\nword = 'x'\n")
    (tmp_path / "m.py").write_text(
        "from __future__ import annotations\nimport helper\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int\n"
        "def f(record): return {'prompt': 'other', 'completion': helper.word}\n"
    )
    for _ in range(2):
        data = load([file], tokenizer, 99, map_fn=Map(f"{tmp_path}/m.py:f"))
        assert not data.examples.rows[0].cached and len(data) == 5


# ---- at the start of a training ----


def test_quick_checks_count_repeats_overlap_and_contents(tmp_path, tokenizer):
    records = [{"prompt": f"question {i}", "completion": f"a longer answer {i}"} for i in range(30)]
    more = [records[2], records[0] | {"completion": "another one"}, {"prompt": "w", "completion": "a@b.org"}]
    train = load([written(tmp_path / "a.jsonl", records + more)], tokenizer, 99)
    val = load(
        [written(tmp_path / "b.jsonl", [records[4], {"prompt": "new", "completion": "a new one"}])], tokenizer, 99
    )
    first, second, third = inspection.quick_checks(train, val)
    assert first.startswith("WARNING: 1 records are repeats, 1 of 2 that validate are trained on as well, 1 questions")
    assert re.fullmatch(r"tokens an example: median \d+, 99 % up to \d+, longest \d+", second)
    assert third.startswith("records: 1 with answers of one word, 1 with addresses or secrets; ")
    parted = inspection.quick_checks(*split(train, 0.2))
    assert " 0 of " in parted[0]
    # Where most answers are one word, the task asks for one word: nothing to report.
    labels = [{"prompt": f"question {i}", "completion": "yes" if i % 2 else "no"} for i in range(30)]
    train = load([written(tmp_path / "labels.jsonl", labels)], tokenizer, 99)
    assert inspection.quick_checks(train, val)[2].startswith("records: none with addresses, secrets or control tokens")


@needs_shared
def test_the_command_on_a_real_file(tmp_path):
    words = [
        "inspect",
        SHARED / "banking77" / "train.csv",
        "--against",
        SHARED / "banking77" / "test.csv",
        "--show",
        "1",
    ]
    done = subprocess.run([sys.executable, ROOT / "data.py", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    got = findings(done.stdout)
    assert got["exact duplicates"] == "4" and "... 77 in all" in got["labels"]
    assert "text and its category (CSV, 10,003 records)" in done.stdout
    words = [sys.executable, ROOT / "data.py", "inspect", "none.json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: none.json: no such file\n")


def test_flags_of_other_commands_are_refused(tmp_path):
    for words, why in (
        (["convert", "a"], "needs --out"), (["convert", "a", "--out", "b.csv"], "ends with .jsonl"),
        (["inspect", "a", "--html", "no/such/page.html"], "there is no such folder"),
        (["inspect", "a", "--out", "b"], "--out: means nothing to `inspect`"),
        (["split", "a", "--out", "b", "--show", "1"], "--show: means nothing to `split`"),
        (["split", "a", "--out", str(tmp_path / "b"), "--val", "0.7", "--test", "0.4"], "together below 1"),
        (["inspect", "a", "--seq-len", "1"], "--seq-len 1: must be 2 or more"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            inspection.arguments(words)


def test_plain_text_is_said_to_be_cut(tmp_path, command):
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(2000))))
    said = command("inspect", tmp_path / "a.txt", "--seq-len", 128, "--show", 0)
    assert re.search(r"plain text comes in \d\d pieces", findings(said)["--seq-len 128"])


def test_source_is_named_as_it_is(tmp_path):
    source = open_source(written(tmp_path / "a.jsonl", [{"text": "a"}]))
    assert source.containers[0].place(3) == f"{tmp_path / 'a.jsonl'} line 3"
