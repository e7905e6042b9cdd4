"""What formats.py promises: each known format comes out as messages, each bad file as one line with the place.

The container is found by content, so files here are written as bytes under names that say little. Takes about a second.
"""

import json
import random
import time
from pathlib import Path

import pytest

from errors import UserError
from formats import read_records

DATA = Path(__file__).parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture
def write(tmp_path):
    """write(content, name) -> path; content: bytes, str, or one object a line."""

    def write(content, name="data.jsonl"):
        if isinstance(content, list):
            content = "\n".join(json.dumps(record) for record in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    return write


def turns(*contents):
    """user, assistant, user, ... as messages"""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def error_of(path):
    """The message that a user would see, which is always one line and begins with the file's name."""
    with pytest.raises(UserError) as caught:
        read_records(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path)), message
    return message.removeprefix(str(path))


# ---- formats ----


def test_alpaca_question_is_instruction_then_blank_line_then_input(write):
    source = read_records(write([ALPACA]))
    assert source.format == "Alpaca"
    assert source.records[0].messages == turns("Add.\n\n1 2", "3")


@pytest.mark.parametrize("record", [{"input": ""}, {"input": " \n"}, {}], ids=["empty", "blank", "absent"])
def test_alpaca_without_input_is_the_instruction_alone(write, record):
    source = read_records(write([{"instruction": "Say hi.", "output": "hi"} | record]))
    assert source.records[0].messages == turns("Say hi.", "hi")


def test_alpaca_system_and_history_become_earlier_turns(write):
    source = read_records(write([ALPACA | {"system": "Be brief.", "history": [["q1", "a1"], ["q2", "a2"]]}]))
    system = {"role": "system", "content": "Be brief."}
    assert source.records[0].messages == [system, *turns("q1", "a1", "q2", "a2", "Add.\n\n1 2", "3")]
    assert source.ignored == []


def test_alpaca_empty_system_is_no_turn(write):
    assert read_records(write([ALPACA | {"system": ""}])).records[0].messages[0]["role"] == "user"


def test_alpaca_wins_over_the_rendered_text_beside_it(write):
    source = read_records(write([ALPACA | {"text": "Below is an instruction ..."}]))
    assert (source.format, source.ignored) == ("Alpaca", ["text"])


def test_messages_come_through_unchanged_and_need_not_begin_with_system_or_user(write):
    conversations = [
        [{"role": "system", "content": "s"}, *turns("q", "a", "q", "a")],
        [{"role": "system", "content": ""}, {"role": "assistant", "content": "a"}],
        [{"role": "assistant", "content": "a"}],
    ]
    source = read_records(write([{"messages": each} for each in conversations]))
    assert source.format == "messages"
    assert [record.messages for record in source.records] == conversations
    assert all(record.text is None for record in source.records)


def test_text_records_and_txt_files_are_texts(write):
    source = read_records(write([{"text": "one"}, {"text": "two\n"}]))
    assert (source.format, [record.text for record in source.records]) == ("plain text", ["one", "two\n"])
    source = read_records(write("First\n\nCitizen: {}\n", "play.txt"))
    assert (source.format, source.container) == ("plain text", "TXT")
    assert [(record.text, record.messages) for record in source.records] == [("First\n\nCitizen: {}\n", None)]


def test_random_conversations_written_as_jsonl_are_read_back_identical(write):
    draw = random.Random(0)
    alphabet = 'ab ,"\\/\n\r\t\0\x85\u2028\u2029\u00e9\u4e2d\u0640\U0001f600{}[]'

    def content():
        return "x" + "".join(draw.choices(alphabet, k=draw.randrange(20)))

    for ensure_ascii in (True, False):
        conversations = [
            [{"role": draw.choice(("system", "user", "assistant")), "content": content()} for _ in range(n)]
            + [{"role": "assistant", "content": content()}]
            for n in (draw.randrange(6) for _ in range(500))
        ]
        lines = [json.dumps({"messages": each}, ensure_ascii=ensure_ascii) for each in conversations]
        source = read_records(write("\n".join(lines)))
        assert [record.messages for record in source.records] == conversations


# ---- containers ----


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a"])
@pytest.mark.parametrize(
    "container, content",
    [
        ("JSON", json.dumps([ALPACA, ALPACA])),
        ("JSON", json.dumps([ALPACA, ALPACA], indent=2)),
        ("JSONL", f"{json.dumps(ALPACA)}\n{json.dumps(ALPACA)}\n"),
    ],
    ids=["one-line list", "indented list", "lines"],
)
def test_container_is_found_by_content_under_any_name(write, name, container, content):
    source = read_records(write(content, name))
    assert (source.container, len(source.records)) == (container, 2)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_byte_order_mark_and_crlf_simply_work(write, bom, end):
    line = json.dumps(ALPACA).encode()
    for content in (end.join([line, b"", line, b"  ", b""]), b"[" + end + line + b"," + end + line + end + b"]" + end):
        records = read_records(write(bom + content)).records
        assert [record.messages for record in records] == [turns("Add.\n\n1 2", "3")] * 2
    assert read_records(write(bom + b"a" + end + b"b", "a.txt")).records[0].text == "a\nb"


def test_where_counts_lines_of_a_jsonl_and_records_of_a_list_from_one(write):
    line = json.dumps(ALPACA)
    path = write(f"\n{line}\n\n{line}")
    assert [record.where for record in read_records(path).records] == [f"{path} line 2", f"{path} line 4"]
    path = write(f"[{line},\n\n{line}]")
    assert [record.where for record in read_records(path).records] == [f"{path} record 1", f"{path} record 2"]


@pytest.mark.parametrize("container", ["JSON", "JSONL"])
def test_reading_time_grows_with_the_file_not_with_its_square(write, container):
    """16 times the records take 16 times as long; a square would take 256. 64 leaves room for a busy machine."""

    def seconds(count):
        lines = [json.dumps(ALPACA | {"id": i}) for i in range(count)]
        path = write("\n".join(lines) if container == "JSONL" else "[" + ",\n".join(lines) + "]")
        start = time.process_time()
        assert len(read_records(path).records) == count
        return time.process_time() - start

    assert seconds(32_000) < 64 * min(seconds(2_000) for _ in range(3))


# ---- what is left out is said ----


def test_empty_answers_are_dropped_and_counted(write):
    chat = {"messages": turns("q", "a", "q", "\n")}
    source = read_records(write([ALPACA | {"output": ""}, ALPACA, ALPACA | {"output": " \n"}]))
    assert (len(source.records), source.dropped) == (1, {"empty answer": 2})
    source = read_records(write([CHAT, chat]))
    assert (len(source.records), source.dropped) == (1, {"empty answer": 1})
    source = read_records(write([{"text": ""}, {"text": "a"}]))
    assert (len(source.records), source.dropped) == (1, {"empty text": 1})


def test_unknown_keys_beside_a_known_format_are_ignored_and_listed(write):
    message = {"role": "assistant", "content": "a", "name": "Al"}
    source = read_records(write([{"messages": [message], "id": 1}, {"messages": [message], "split": None}]))
    assert sorted(source.ignored) == ["id", "messages.name", "split"]
    assert source.records[0].messages == [{"role": "assistant", "content": "a"}]


def test_summary_says_format_container_counts_and_what_was_left_out(write):
    path = write([ALPACA | {"id": 1}, ALPACA, ALPACA | {"output": ""}])
    assert read_records(path).summary() == (
        f"{path}: Alpaca (JSONL, 2 records), dropped 1 (empty answer), ignored keys 'id'"
    )
    path = write("To be", "a.txt")
    assert read_records(path).summary() == f"{path}: plain text (TXT, 1 record)"


# ---- a bad file ends in one line that says what and where ----


def message_of(**fields):
    """A conversation whose first message has these fields; "absent" leaves one out."""
    first = {key: value for key, value in ({"role": "user", "content": "q"} | fields).items() if value != "absent"}
    return {"messages": [first, {"role": "assistant", "content": "a"}]}


BAD_RECORDS = {  # name: (a good record, the bad one that stands third among such, what the error says)
    "alpaca without output": (ALPACA, {"instruction": "a"}, ["'instruction'", "Alpaca (instruction, output)"]),
    "mistyped output": (ALPACA, {"instruction": "a", "outputs": "b"}, ["'outputs' looks like 'output' mistyped"]),
    "mistyped optional key": (ALPACA, {"instruction": "a", "inputs": "b", "output": "c"}, ["'inputs'", "'input'"]),
    "another format": (ALPACA, CHAT, ["'messages'", "first record is Alpaca"]),
    "not an object": (ALPACA, ["a"], ["is a list, an object is wanted"]),
    "output is a number": (ALPACA, ALPACA | {"output": 5}, ["output is a number, a string is wanted"]),
    "output is null": (ALPACA, ALPACA | {"output": None}, ["output is null, a string is wanted"]),
    "input is a boolean": (ALPACA, ALPACA | {"input": True}, ["input is a boolean, a string is wanted"]),
    "system is an object": (ALPACA, ALPACA | {"system": {}}, ["system is an object, a string is wanted"]),
    "history is a string": (ALPACA, ALPACA | {"history": "a"}, ["history is a string, a list is wanted"]),
    "history of strings": (ALPACA, ALPACA | {"history": ["a", "b"]}, ["history holds a string", "pairs"]),
    "history of triples": (ALPACA, ALPACA | {"history": [["a", "b", "c"]]}, ["history holds a list", "pairs"]),
    "text is a list": ({"text": "a"}, {"text": ["a"]}, ["text is a list, a string is wanted"]),
    "messages is a string": (CHAT, {"messages": "a"}, ["messages is a string, a list is wanted"]),
    "message is a string": (CHAT, {"messages": ["a"]}, ["message 1: is a string, an object"]),
    "no messages": (CHAT, {"messages": []}, ["no assistant message"]),
    "no assistant": (CHAT, {"messages": turns("q")}, ["no assistant message"]),
    "no role": (CHAT, message_of(role="absent"), ["message 1: no role, found 'content'"]),
    "no content": (CHAT, message_of(content="absent"), ["message 1: no content, found 'role'"]),
    "mistyped content": (CHAT, message_of(content="absent", contents="q"), ["message 1", "'contents'", "'content'"]),
    "content is null": (CHAT, message_of(content=None), ["message 1: content is null, a string is wanted"]),
    "content is parts": (CHAT, message_of(content=[{"type": "text"}]), ["content is a list, a string is wanted"]),
    "role is a number": (CHAT, message_of(role=1), ["message 1: role is a number, a string is wanted"]),
    "unknown role": (CHAT, message_of(role="tool"), ["message 1: role 'tool' is unknown", "system, user, assistant"]),
    "role of several lines": (CHAT, message_of(role="a\nb" * 99), ["message 1: role 'a\\nba"]),
    "tools": (CHAT, CHAT | {"tools": [{"name": "f"}]}, ["key 'tools' changes"]),
    "a rejected answer": (CHAT, CHAT | {"label": False}, ["key 'label' changes"]),
    "a class": ({"text": "a"}, {"text": "a", "label": 0}, ["key 'label' changes"]),
    "a turn of weight 0": (CHAT, message_of(weight=0), ["message 1: key 'weight' changes"]),
    "a tool call": (CHAT, message_of(tool_calls=[{"id": 1}], content=None), ["message 1: key 'tool_calls' changes"]),
    "surrogate in output": (ALPACA, ALPACA | {"output": "ab\ud800"}, ["output", "'\\ud800' at character 3"]),
    "surrogate in history": (ALPACA, ALPACA | {"history": [["a", "\udfff"]]}, ["message 2", "'\\udfff'"]),
    "surrogate in content": (CHAT, message_of(content="\ud800"), ["message 1: content", "'\\ud800'"]),
    "surrogate in text": ({"text": "a"}, {"text": "\udc00"}, ["text", "'\\udc00'"]),
    "NaN": (ALPACA, ALPACA | {"score": float("nan")}, ["NaN"]),
    "-Infinity": (ALPACA, ALPACA | {"output": float("-inf")}, ["-Infinity"]),
}


@pytest.mark.parametrize("container", ["JSON", "JSONL"])
@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named_with_its_number_and_fault(write, name, container):
    good, bad, says = BAD_RECORDS[name]
    records = [good, good, bad, good]
    error = error_of(write(records if container == "JSONL" else json.dumps(records)))
    assert error.startswith(" line 3" if container == "JSONL" else " record 3")
    assert all(part in error for part in says), error


def test_unknown_keys_name_the_records_keys_and_the_known_formats(write):
    error = error_of(write([{"question": "q", "answer": "a"}]))
    assert error.startswith(" line 1: keys 'question', 'answer'")
    assert all(known in error for known in ("messages (messages)", "Alpaca (instruction, output)", "text (text)"))
    assert "mistyped" not in error
    assert "'OUTPUT' looks like 'output'" in error_of(write([{"instruction": "q", "OUTPUT": "a"}]))
    # Dolly: "context" is not "text" mistyped, and "instruction" is there
    assert "mistyped" not in error_of(write([{"instruction": "q", "context": "c", "response": "a"}]))


def test_strange_keys_stay_on_one_short_line(write):
    error = error_of(write([{f"a\n\ud800{i}" + "x" * 1_000: i for i in range(1_000)}]))
    assert "and 992 more" in error and len(error) < 800
    error.encode()
    assert "keys none" in error_of(write("{}"))


def test_keys_that_would_change_the_meaning_pass_when_they_say_nothing(write):
    message = {"role": "assistant", "content": "a", "tool_calls": None, "weight": 1}
    record = {"messages": [message], "tools": [], "functions": None, "label": None}
    assert len(read_records(write([record])).records) == 1


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", ": is empty"),
        (b"\xef\xbb\xbf", ": is empty"),
        (b"\n \r\n\n", ": is empty"),
        (b"[]", ": is an empty list"),
        (b"[ \n ]\n", ": is an empty list"),
        (b"hello\nworld", " line 1: found 'hello\\nworl'; not JSON"),
        (b"\n\n17", " line 3: found '17'"),
        (b'{\n  "text": "a"\n}', " line 1: found an object over several lines"),
        (b'[{"text": "a"}, {"text": ', " record 2: JSON cut off at column 26"),
        (b'[{"text": "a"},\n {"text": "b', " record 2: JSON cut off at line 2 column 11"),
        (b'[{"text": "a"},\n', " record 2: JSON cut off"),
        (b'[\n{"text": "a"}\n', " record 1: JSON cut off at line 3"),
        (b"[", " record 1: JSON cut off"),
        (b'[{"text": "a"},]', " record 2: not JSON at column 16"),
        (b'[{"text": "a"} {"text": "b"}]', " record 1: not JSON at column 16"),
        (b'[{"text": "a"}]\n{"text": "b"}', ": not JSON at line 2 column 1 (more after"),
        (b'{"text": "a"}\n{"text": "b"}\n{"text" "c"}\n{"text": "d"}', " line 3: not JSON at column 9"),
        (b'{"text": "a"}\n{"text": "b",\n{"text": "c"}', " line 2: JSON cut off at column 1"),
        (b'{"text": "a"}\n{"text": "b', " line 2: JSON cut off at column 10"),
        (b'{"text": "a"}\nhello', " line 2: not JSON at column 1"),
        (b'{"text": "a"}\n17', " line 2: is a number, an object is wanted"),
        (b'{"text": "a"} {"text": "b"}', " line 1: not JSON at column 15 (more after"),
        (b"{'text': 'a'}", " line 1: not JSON at column 2"),
        (b'{"text": "a\0"}', " line 1: not JSON at column 12"),
        (b'{"text": "a"}\n{"text": "\xff"}', ": not UTF-8 at byte 24"),
        ("{}".encode("utf-16"), ": not UTF-8 at byte 0"),
        (b'{"text": "a"}\n{"deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", " line 2: JSON nested too deep"),
        (b'[{"deep": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001 + b"]", " record 1: JSON nested too deep"),
        (b'{"text": ""}\n{"text": " "}', ": every text is empty"),
        (b'[{"instruction": "a", "output": ""}]', ": every answer is empty"),
        (b'{"messages": [{"role": "assistant", "content": "\\n"}]}', ": every answer is empty"),
    ],
)
def test_a_bad_file_is_named_with_place_and_fault(write, content, says):
    error = error_of(write(content))
    assert error.startswith(says), error


def test_missing_file_folder_and_utf_16_text_are_refused(write, tmp_path):
    assert error_of(tmp_path / "none.json").startswith(": no such file")
    assert error_of(tmp_path).startswith(": is a folder")
    assert error_of(write("ab".encode("utf-16-le"), "a.txt")).startswith(": holds a NUL at character 2")


def test_numbers_of_any_length_are_no_fault(write):
    record = json.dumps(ALPACA)[:-1] + f', "id": {"9" * 10_000}, "score": 1e999}}'
    assert read_records(write(record)).ignored == ["id", "score"]


# ---- real files ----


@real_data
@pytest.mark.parametrize(
    "name, format, container, count",
    [
        ("alpaca_en_1k.json", "Alpaca", "JSON", 999),
        ("openai_toy_chat_4.jsonl", "messages", "JSONL", 4),
        ("c4_text.jsonl", "plain text", "JSONL", 300),
        ("tinyshakespeare.txt", "plain text", "TXT", 1),
    ],
)
def test_real_files_are_read_whole(name, format, container, count):
    source = read_records(DATA / name)
    assert (source.format, source.container, len(source.records)) == (format, container, count)
    assert source.dropped == {} and source.ignored == []


@real_data
def test_real_records_hold_what_the_file_holds():
    alpaca = json.loads((DATA / "alpaca_en_1k.json").read_text())
    for record, want in zip(read_records(DATA / "alpaca_en_1k.json").records, alpaca, strict=True):
        question = want["instruction"] + ("\n\n" + want["input"] if want["input"] else "")
        assert record.messages == turns(question, want["output"])
    chats = [json.loads(line)["messages"] for line in (DATA / "openai_toy_chat_4.jsonl").open()]
    assert [record.messages for record in read_records(DATA / "openai_toy_chat_4.jsonl").records] == chats
    text = (DATA / "tinyshakespeare.txt").read_text()
    assert read_records(DATA / "tinyshakespeare.txt").records[0].text == text


@real_data
@pytest.mark.parametrize(
    "name, says",
    [
        ("kto_en_demo.json", " record 1: key 'label'"),
        ("openai_drone_training_2.jsonl", " line 1: key 'tools'"),
        ("dolly_sample.json", " record 1: keys 'instruction', 'context', 'response', 'category': no known format"),
        ("gsm8k_train.jsonl", " line 1: keys 'question', 'answer': no known format"),
        ("pubmedqa_ori_pqal.json", " line 1: "),
        ("TruthfulQA.csv", " line 1: found 'Type,Categ'"),
        ("HumanEval.jsonl.gz", ": not UTF-8 at byte 1"),
    ],
)
def test_real_files_of_other_formats_are_refused_rather_than_misread(name, says):
    assert error_of(DATA / name).startswith(says)
