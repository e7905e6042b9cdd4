"""What dataset/formats.py promises: each known format comes out as messages, each bad file as one line with the place.

The container is found by content, so files here are written as bytes under names that say little. Takes about a second.
"""

import json
import pickle
import random
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import UserError
from dataset.formats import open_source
from dataset.records import ReadStats
from dataset.rewrite import as_json
from tokenization.chat_template import Template

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


def read_records(path, trees="best"):
    """All that is read of a file: .records, .source, .stats and .summary()"""
    source, stats = open_source(path, trees), ReadStats()
    records = source.read_all(stats)
    return SimpleNamespace(records=records, source=source, stats=stats, summary=partial(source.summary, stats))


def turns(*contents):
    """user, assistant, user, ... as messages"""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def name_of(loaded):
    return loaded.source.format.name


def kind_of(loaded):
    return loaded.source.containers[0].kind


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
    assert source.source.format.name == "Alpaca"
    assert source.records[0].messages == turns("Add.\n\n1 2", "3")


@pytest.mark.parametrize("record", [{"input": ""}, {"input": " \n"}, {}], ids=["empty", "blank", "absent"])
def test_alpaca_without_input_is_the_instruction_alone(write, record):
    source = read_records(write([{"instruction": "Say hi.", "output": "hi"} | record]))
    assert source.records[0].messages == turns("Say hi.", "hi")


def test_alpaca_system_and_history_become_earlier_turns(write):
    source = read_records(write([ALPACA | {"system": "Be brief.", "history": [["q1", "a1"], ["q2", "a2"]]}]))
    system = {"role": "system", "content": "Be brief."}
    assert source.records[0].messages == [system, *turns("q1", "a1", "q2", "a2", "Add.\n\n1 2", "3")]
    assert source.stats.ignored == {}


def test_alpaca_empty_system_is_no_turn(write):
    assert read_records(write([ALPACA | {"system": ""}])).records[0].messages[0]["role"] == "user"


def test_alpaca_wins_over_the_rendered_text_beside_it(write):
    source = read_records(write([ALPACA | {"text": "Below is an instruction ..."}]))
    assert (name_of(source), [*source.stats.ignored]) == ("Alpaca", ["text"])


def test_messages_come_through_unchanged_and_need_not_begin_with_system_or_user(write):
    conversations = [
        [{"role": "system", "content": "s"}, *turns("q", "a", "q", "a")],
        [{"role": "system", "content": ""}, {"role": "assistant", "content": "a"}],
        [{"role": "assistant", "content": "a"}],
    ]
    source = read_records(write([{"messages": each} for each in conversations]))
    assert name_of(source) == "messages"
    assert [record.messages for record in source.records] == conversations
    assert all(record.text is None for record in source.records)


def test_text_records_and_txt_files_are_texts(write):
    source = read_records(write([{"text": "one"}, {"text": "two\n"}]))
    assert (name_of(source), [record.text for record in source.records]) == ("plain text", ["one", "two\n"])
    source = read_records(write("First\n\nCitizen: {}\n", "play.txt"))
    assert (name_of(source), kind_of(source)) == ("plain text", "TXT")
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


# ---- the other formats: a record, and the messages it makes ----

CALL = {"name": "add", "arguments": {"a": 1}}
TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
THREAD = {"role": "prompter", "text": "q", "replies": [
    {"role": "assistant", "text": "worse", "rank": 1, "replies": [{"role": "prompter", "text": "why?", "replies": []}]},
    {"role": "assistant", "text": "best", "rank": 0, "replies": [
        {"role": "prompter", "text": "and?", "replies": [{"role": "assistant", "text": "more", "replies": []}]}]},
    {"role": "assistant", "text": "gone", "deleted": True, "replies": []},
]}  # fmt: skip
MADE = {  # name of the format: (record, messages)
    "Dolly": ({"instruction": "i", "context": "c", "response": "r"}, turns("i\n\nc", "r")),
    "ShareGPT": (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [{"role": "system", "content": "s"}, *turns("q", "a")],
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, turns("q", "a")),
    "prompt and response": ({"prompt": "q", "response": "a"}, turns("q", "a")),
    "question and answer": ({"question": "q", "answer": "a #### 4"}, turns("q", "a #### 4")),
    "document and summary": ({"document": "d", "summary": "s"}, turns("d", "s")),
    "text and code": ({"text": "t", "code": "c"}, turns("t", "c")),
    "text and its label": ({"text": "t", "label": 3}, turns("t", "3")),
    "text and its category": ({"text": "t", "category": "c"}, turns("t", "c")),
    "context and question": ({"context": "c", "question": "q", "answer": ["a", "b"]}, turns("c\n\nq", "a")),
    "PubMedQA": ({"QUESTION": "q", "CONTEXTS": ["c", "d"], "LONG_ANSWER": "a"}, turns("c\n\nd\n\nq", "a")),
    "OASST trees": ({"message_tree_id": "1", "prompt": THREAD}, turns("q", "best", "and?", "more")),
    "messages": (
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "s"}]}, *turns("q", "a")]},
        [{"role": "system", "content": "s"}, *turns("q", "a")],
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_a_record_makes_these_messages(write, name):
    record, wanted = MADE[name]
    loaded = read_records(write([record]))
    assert name_of(loaded) == name and [each.messages for each in loaded.records] == [wanted]
    assert loaded.records[0].weights is None
    assert loaded.stats.dropped == ({"a deleted reply": 1} if name == "OASST trees" else {})


def test_squad_flat_and_nested_with_questions_that_have_no_answer(write):
    question = {"question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}}
    loaded = read_records(write([question | {"context": "c"}, question | {"context": "c", "answers": {"text": []}}]))
    assert [each.messages for each in loaded.records] == [turns("c\n\nq", "a")]
    assert loaded.stats.dropped == {"without an answer": 1}
    nested = {"question": "q", "answers": [{"text": "a", "answer_start": 0}]}
    paragraph = {"context": "c", "qas": [nested, {"question": "r", "answers": [], "is_impossible": True}]}
    for text in (json.dumps({"version": "2", "data": [{"paragraphs": [paragraph]}]}, indent=i) for i in (None, 1)):
        loaded = read_records(write(text))
        assert (name_of(loaded), loaded.stats.dropped) == ("SQuAD", {"without an answer": 1})
        assert [each.messages for each in loaded.records] == [turns("c\n\nq", "a")]


def test_tool_calls_in_every_dialect_become_one(write):
    arguments, called = json.dumps(CALL["arguments"]), {"type": "function", "function": CALL}
    calls = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "type": "function", "function": CALL}]},
        {"role": "assistant", "tool_calls": [{"function": CALL | {"arguments": arguments}}]},
        {"role": "assistant", "function_call": CALL | {"arguments": arguments}, "content": None},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(CALL)}]},
    ]
    results = [
        {"role": "tool", "content": "2", "tool_call_id": "x", "name": "add"},
        {"role": "function", "content": "2"},
        {"from": "observation", "value": "2"},
        {"role": "tool", "content": [{"type": "text", "value": "2"}]},
        {"role": "ipython", "content": "2"},
    ]
    for tools in (json.dumps([TOOL]), [TOOL], [{"type": "function", "function": TOOL}]):
        chats = [[*turns("q"), call, result] for call, result in zip(calls, results, strict=True)]
        records = read_records(write([{"messages": chat, "tools": tools} for chat in chats])).records
        for i, record in enumerate(records):
            assert record.tools == [{"type": "function", "function": TOOL}]
            answer = {"role": "assistant", "content": "", "tool_calls": [({} if i else {"id": "x"}) | called]}
            assert record.messages[1] == answer
            assert (record.messages[2]["role"], record.messages[2]["content"]) == ("tool", "2")


def test_thoughts_stand_beside_the_answer(write):
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}]
    given = [{"role": "assistant", "content": parts}, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    for record in read_records(write([{"messages": [*turns("q"), answer]} for answer in given])).records:
        assert record.messages[1] == {"role": "assistant", "content": "a", "reasoning_content": "hm"}


def test_oasst_all_paths_train_each_answer_once(write):
    records = read_records(write([{"message_tree_id": "1", "prompt": THREAD}]), "all").records
    assert [record.messages for record in records] == [turns("q", "best", "and?", "more"), turns("q", "worse")]
    fork = THREAD | {"replies": [THREAD["replies"][1] | {"replies": THREAD["replies"][1]["replies"] * 2}]}
    fork = json.loads(json.dumps(fork))
    fork["replies"][0]["replies"][1]["replies"][0]["text"] = "other"
    records = read_records(write([{"message_tree_id": "1", "prompt": fork}]), "all").records
    assert [record.messages[-1]["content"] for record in records] == ["more", "other"]
    assert [record.weights for record in records] == [None, [1, 0, 1, 1]]


def flat(node: dict, tree: str, parent: str | None = None, ids=None) -> list[dict]:
    """The messages of a nested tree, as the released files have them."""
    ids = iter(range(99)) if ids is None else ids
    id = f"{tree}-{next(ids)}"
    more = {key: node[key] for key in ("text", "role", "rank", "deleted") if key in node}
    message = {"message_id": id, "parent_id": parent, "message_tree_id": tree} | more
    return [message, *(each for reply in node["replies"] for each in flat(reply, tree, id, ids))]


@pytest.mark.parametrize("paths", ["best", "all"])
def test_oasst_messages_make_what_their_trees_make(write, paths):
    trees = [{"message_tree_id": name, "prompt": THREAD} for name in "ab"]
    nested = [record.messages for record in read_records(write(trees), paths).records]
    loaded = read_records(write(flat(THREAD, "a") + flat(THREAD, "b")), paths)
    assert name_of(loaded) == "OASST messages" and [record.messages for record in loaded.records] == nested
    loaded = read_records(write([*flat(THREAD, "a"), *flat(THREAD, "b", "nobody")]), paths)
    assert loaded.stats.dropped["a message whose parents lead to no root"] == 7
    assert "tree 'a' again" in error_of(write(flat(THREAD, "a") + flat(THREAD, "b") + flat(THREAD, "a")))


def message_of_type(kind: str) -> dict:
    """A conversation whose question is a typed part."""
    return {"messages": [{"role": "user", "content": [{"type": kind}]}, {"role": "assistant", "content": "a"}]}


HUMAN = "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:"
PROMPT = turns("q", "x", "r")
PREFERENCES = [
    {"prompt": "r", "chosen": "good", "rejected": "bad"},
    {"prompt": PROMPT, "chosen": turns("", "good")[1:], "rejected": {"role": "assistant", "content": "bad"}},
    {"chosen": [*PROMPT, *turns("", "good")[1:]], "rejected": [*PROMPT, *turns("", "bad")[1:]]},
    {"prompt": "q", "chosen": [*PROMPT, *turns("", "good")[1:]], "rejected": [*PROMPT, *turns("", "bad")[1:]]},
    {"chosen": f"{HUMAN} good", "rejected": f"{HUMAN} bad"},
    {"conversations": [{"from": "human", "value": "r"}], "chosen": {"from": "gpt", "value": "good"},
     "rejected": {"from": "gpt", "value": "bad"}},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(PREFERENCES)))
def test_preferences_have_a_prompt_and_two_answers(write, number):
    (record,) = read_records(write([PREFERENCES[number]])).records
    prompt = turns("r") if number in (0, 5) else PROMPT
    assert record.messages == [*prompt, {"role": "assistant", "content": "good"}]
    assert record.rejected == [{"role": "assistant", "content": "bad"}]
    assert record.weights == (None if number in (0, 5) else [1, 0, 1, 1])  # the prompt's answers are not taught
    assert record.asked == len(prompt)


SYSTEM = {"role": "system", "content": "s"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
SIDES = {"chosen": [*turns("q"), GOOD], "rejected": [*turns("q"), BAD]}
TWICE = {  # name: (a record whose columns carry the same talk, what is asked)
    "UltraFeedback": ({"prompt": "q", "messages": [*turns("q"), GOOD]} | SIDES, turns("q")),
    "messages with the rejected answer": ({"messages": [*turns("q"), BAD]} | SIDES, turns("q")),
    "messages that only ask": ({"messages": turns("q")} | SIDES, turns("q")),
    "messages, and answers alone": (
        {"messages": [*turns("q"), GOOD], "chosen": "good", "rejected": "bad"}, turns("q")
    ),
    "three columns and answers alone": (
        {"prompt": "q", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "bad"}],
         "messages": [*turns("q"), GOOD], "chosen": [GOOD], "rejected": [BAD]}, turns("q")
    ),
    "a text, and a system message in the sides": (
        {"prompt": "q", "chosen": [SYSTEM, *SIDES["chosen"]], "rejected": [SYSTEM, *SIDES["rejected"]]},
        [SYSTEM, *turns("q")],
    ),
    "messages without the sides' system message": (
        {"messages": [*turns("q"), GOOD], "chosen": [SYSTEM, *SIDES["chosen"]],
         "rejected": [SYSTEM, *SIDES["rejected"]]}, [SYSTEM, *turns("q")],
    ),
    "a prompt with a system message": ({"prompt": [SYSTEM, *turns("q")]} | SIDES, [SYSTEM, *turns("q")]),
    "a system column and a system message": (
        {"system": "s", "prompt": [SYSTEM, *turns("q")]} | SIDES, [SYSTEM, *turns("q")]
    ),
    "only one side is the whole talk": (
        {"prompt": "q", "chosen": SIDES["chosen"], "rejected": "bad"}, turns("q")
    ),
    "an earlier part, and the sides go on": (
        {"prompt": turns("p", "x")} | SIDES, turns("p", "x", "q")
    ),
    "a transcript that asks": (
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "good", "rejected": "bad"}, turns("q")
    ),
    "a text, and transcripts": (
        {"prompt": "q", "chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        turns("q"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
def test_a_talk_in_several_columns_is_asked_once_and_without_its_answer(write, name):
    record, asked = TWICE[name]
    (read,) = read_records(write([record])).records
    assert (read.messages, read.rejected, read.asked) == ([*asked, GOOD], [BAD], len(asked))


@pytest.mark.parametrize("prompt", [turns("q"), "q", [SYSTEM, *turns("q")]], ids=["list", "text", "with system"])
def test_a_completion_that_repeats_its_prompt_is_the_talk(write, prompt):
    for more in ({}, {"label": True}):
        (record,) = read_records(write([{"prompt": prompt, "completion": turns("q", "a")} | more])).records
        system = [SYSTEM] if len(prompt) == 2 else []
        assert (record.messages, record.weights) == ([*system, *turns("q", "a")], None)
    (record,) = read_records(write([{"prompt": turns("q", "a", "r"), "completion": turns("q", "a", "r", "b")}])).records
    assert (record.messages, record.weights) == (turns("q", "a", "r", "b"), [1, 0, 1, 1])


def test_history_stands_before_any_question(write):
    for question, answer in (("query", "response"), ("prompt", "completion"), ("question", "answer")):
        record = {question: "q", answer: "a", "system": "s", "history": [["x", "y"]]}
        loaded = read_records(write([record]))
        assert loaded.records[0].messages == [SYSTEM, *turns("x", "y", "q", "a")] and loaded.stats.ignored == {}
    assert "history holds" in error_of(write([{"query": "q", "response": "a", "history": ["x"]}]))


TRAINS = (
    "train",
    "trainable",
    "loss",
    "loss_mask",
    "learn",
    "train_on_turn",
    "step_loss_mask",
    "isTrainable",
    "train_mask",
    "is_target",
    "weight",
)
MASKS = ("masked", "ignore", "skip", "no_loss", "is_masked", "exclude_from_loss", "do_not_train")


@pytest.mark.parametrize("key", [*TRAINS, *MASKS, "weight"])
def test_switches_of_messages_are_obeyed_under_every_name(write, key):
    chat = lambda value: {"messages": [*turns("q"), GOOD | {key: value}, *turns("r", "b")]}
    off = [True, 1, "true", "Yes"] if key in MASKS else [False, 0, 0.0, "false", "No"]
    off = [0, 0.0, "0"] if key == "weight" else off
    on = {True: [False, 0, "no", None, ""], False: [True, 1, 1.0, "1", None]}[key in MASKS]
    on = [1, 1.0, None] if key == "weight" else on
    loaded = read_records(write([chat(value) for value in off]))
    assert [record.weights for record in loaded.records] == [[1, 0, 1, 1]] * len(off)
    assert loaded.records[0].messages == [*turns("q"), GOOD, *turns("r", "b")] and loaded.stats.ignored == {}
    assert [record.weights for record in read_records(write([chat(value) for value in on])).records] == [None] * len(on)


@pytest.mark.parametrize("key, value", [("is_context", 1), ("gradient_on", 0), ("is_completion", "false"), ("q", True)])
def test_a_switch_that_no_table_lists_is_refused(write, key, value):
    error = error_of(write([{"messages": [*turns("q"), GOOD | {key: value}]}]))
    assert f"message 2: {key!r} may say what is trained, and its meaning is not known" in error
    loaded = read_records(write([{"messages": [*turns("q"), GOOD | {"context": "a text", "turn": 1}]}]))
    assert loaded.records[0].messages == [*turns("q"), GOOD]


def test_roles_in_capitals_and_of_langchain(write):
    said = [{"role": "Human", "content": "q"}, {"role": "AI", "content": "a"}]
    assert read_records(write([{"messages": said}])).records[0].messages == turns("q", "a")
    said[1]["role"] = "Teacher"
    assert "role 'Teacher' is unknown" in error_of(write([{"messages": said}]))


def test_dolly_reads_an_input_as_its_context(write):
    loaded = read_records(write([{"instruction": "Sum it up", "input": "The text", "response": "a"}]))
    assert loaded.records[0].messages == turns("Sum it up\n\nThe text", "a") and loaded.stats.ignored == {}


def test_a_loss_scale_is_a_weight_and_what_is_asked_in_vain_is_counted(write):
    chat = {"messages": [{"role": "user", "content": "q", "train": True}, GOOD | {"loss_scale": 0.5, "weight": 0.5}]}
    loaded = read_records(write([chat, {"messages": [{"role": "user", "content": "q", "train": False}, GOOD]}]))
    assert [record.weights for record in loaded.records] == [[1, 0.25], [0, 1]] or loaded.records[1].weights is None
    assert loaded.stats.altered == {"messages of the user that ask to be trained (--train-on all-turns does)": 1}
    assert read_records(write([{"messages": [*turns("q"), GOOD | {"toxic": False}]}])).stats.ignored == {
        "messages.toxic": True
    }


def test_a_record_is_left_out_where_its_own_switch_says_so(write):
    record = {"prompt": "q", "completion": "a"}
    for off, on in (
        ({"train": False}, {"train": True}),
        ({"masked": 1}, {"masked": 0}),
        ({"no_train": True}, {"no_train": "false"}),
        ({"loss": "no"}, {"loss": None}),
    ):
        loaded = read_records(write([record | off, record | on, record]))
        (key,) = off
        assert loaded.stats.dropped == {f"with {key!r} saying that they are not to be trained": 1}
        assert [each.weights for each in loaded.records] == [None, None] and loaded.stats.ignored == {}


def test_arguments_of_calls_have_several_names(write):
    calls = [{"name": "f", name: {"a": 1}} for name in ("arguments", "parameters", "args")]
    loaded = read_records(write([{"messages": [*turns("q"), {"role": "assistant", "tool_calls": [c]}]} for c in calls]))
    assert [called(record) for record in loaded.records] == [{"a": 1}] * 3


def test_new_names_do_not_make_slips_of_other_words(write):
    chat = {"messages": [*turns("q"), GOOD | {"cost": 1, "link": "x", "reason": "y"}]}
    assert len(read_records(write([chat])).records) == 1
    for key in ("story", "brain", "training", "gloss"):
        assert [*read_records(write([{"question": "q", "answer": "a", key: "x"}])).stats.ignored] == [key]


def test_a_question_stands_before_chosen_and_rejected(write):
    answers = {"chosen": "good", "rejected": "bad"}
    records = [{"question": "q"}, {"instruction": "q", "input": ""}, {"query": "q"}, {"prompt": "q", "question": "z"}]
    loaded = read_records(write([each | answers for each in records]))
    assert [each.messages for each in loaded.records] == [[*turns("q"), GOOD]] * 4
    (record,) = read_records(write([{"instruction": "q", "input": "x", "system": "s"} | answers])).records
    assert record.messages == [SYSTEM, *turns("q\n\nx"), GOOD]


def test_thoughts_have_many_names(write):
    parts = [{"type": "reasoning.text", "text": "hm"}]
    fields = [{"reasoning": "hm"}, {"thinking": "hm"}, {"thought": "hm"}, {"reasoning_details": parts},
              {"reasoningContent": "hm"}, {"thought_process": "hm"}, {"internal_monologue": "hm"}, {"scratchpad": "hm"},
              {"reasoning": "hm", "reasoning_content": "hm", "reasoning_details": [{"data": "x"}]},
              {"reasoning_details": [{"data": "x"}, *parts]}, {"thinking_blocks": [{"thinking": "hm"}]},
              {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "good"}]}]  # fmt: skip
    loaded = read_records(write([{"messages": [*turns("q"), GOOD | each]} for each in fields]))
    assert [record.messages[1] for record in loaded.records] == [GOOD | {"reasoning_content": "hm"}] * len(fields)
    assert loaded.stats.ignored == {}


def test_a_refusal_is_the_answer(write):
    fields = [{"content": None, "refusal": "good"}, {"content": "", "refusal": "good"}, {"refusal": None},
              {"content": [{"type": "refusal", "refusal": "good"}]}]  # fmt: skip
    loaded = read_records(write([{"messages": [*turns("q"), GOOD | each]} for each in fields]))
    assert [record.messages[1] for record in loaded.records] == [GOOD] * len(fields)


IMAGE = {"type": "image_url", "image_url": {"url": "a.png"}}
UNSEEN = {  # name: (a record with what a text model can't see, what it is called)
    "LLaVA": ({"image": "a.png", "messages": turns("<image>\nq", "a")}, "an image"),
    "a list": ({"images": ["a.png"], "messages": turns("q", "a")}, "an image"),
    "Arrow's bytes": ({"image": {"bytes": "x", "path": None}, "messages": turns("q", "a")}, "an image"),
    "a video": ({"videos": ["a.mp4"], "messages": turns("<video>q", "a")}, "a video"),
    "a typed part": (
        {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "q"}]}, GOOD]}, "an image"
    ),
    "an empty typed part": (message_of_type("image"), "an image"),
    "a sound": (message_of_type("input_audio"), "a sound"),
    "a file": (message_of_type("file"), "a file"),
    "on a message": ({"messages": [{"role": "user", "content": "q", "images": ["x"]}, GOOD]}, "an image"),
    "a name in another column": ({"image_file": "a.png", "messages": turns("q", "a")}, "an image"),
    "a sound's file": ({"audio_file": "a.wav", "messages": turns("q", "a")}, "a sound"),
    "a tool's screenshot": ({"messages": [*turns("q"), GOOD, {"role": "tool", "content": [IMAGE]}, GOOD]}, "an image"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSEEN)
def test_records_with_what_a_text_model_cannot_see_are_left_out_and_counted(write, name):
    record, what = UNSEEN[name]
    empty = {"images": [], "image": None, "audio": "", "video": {"bytes": None, "path": None}}
    loaded = read_records(write([record, CHAT | empty, record]))
    assert [each.messages for each in loaded.records] == [CHAT["messages"]]
    assert loaded.stats.dropped == {f"with {what}, which a text model can't see": 2}


def test_a_mark_for_an_image_that_is_not_there_is_counted(write):
    loaded = read_records(write([{"messages": turns("<image>\nq", "a")}, CHAT]))
    assert loaded.stats.altered == {"with <image> in the text and no image, as characters": 1}
    assert len(loaded.records) == 2
    others = [{"messages": turns(f"{mark} q", "a")} for mark in ("<video>", "<audio>", "<image_1>", "<imagery>")]
    assert read_records(write(others)).stats.altered == {
        "with <video> in the text and no video, as characters": 1,
        "with <audio> in the text and no sound, as characters": 1,
        "with <image_1> in the text and no image, as characters": 1,
    }
    images = ["<|image_1|>", "<|image_pad|>", "<image_soft_token>", "<start_of_image>", "<ImageHere>", "[IMG]"]
    images += ["<|image|>", "<img>a.png</img>", "<img>b.png</img>", "data:image/png;base64,"]
    others = [
        {"messages": turns(f"{mark} q", "a")} for mark in [*images, "<|audio_1|>", "<img src='a.png'>", "<image "]
    ]
    counted = read_records(write(others)).stats.altered
    said = "with {} in the text and no image, as characters"
    wanted = {said.format(mark): 1 for mark in images if "<img>" not in mark} | {said.format("<img>"): 2}
    assert counted == wanted | {"with <|audio_1|> in the text and no sound, as characters": 1}


# ---- numbers ----


def test_digits_pass_unchanged(write):
    """From JSON, and from JSON in strings, to the JSON of a template and of `data.py convert`."""
    digits = (
        '{"a": 50000000000000000000, "b": -1234567890123456789012, "c": 1.10, "d": 1e5, "e": [3.14159265358979323846]}'
    )
    call = f'{{"name": "f", "arguments": {digits}}}'
    quoted = json.dumps({"name": "f", "arguments": digits})
    tool = f'[{{"name": "f", "parameters": {{"maximum": 18446744073709551616, "minimum": 0.10, "x": {digits}}}}}]'
    lines = [
        f'{{"messages": [{{"role": "assistant", "content": "", "tool_calls": [{each}]}}], "tools": {tools}}}'
        for each in (call, quoted) for tools in (tool, json.dumps(tool))
    ]  # fmt: skip
    template = Template("{{ messages[0].tool_calls[0].function.arguments | tojson }} {{ tools | tojson }}", {})
    for record in pickle.loads(pickle.dumps(read_records(write("\n".join(lines))).records)):
        written = '[{"type": "function", "function": ' + tool[1:-1] + "}]"
        rendered = template.render(record.messages, record.tools)
        assert rendered == f"{digits} {written}"
        line = as_json(record)
        assert digits in line and written in line
    big = read_records(write('{"text": "t", "label": 50000000000000000000}')).records[0]
    assert big.messages == turns("t", "50000000000000000000")


def test_numbers_that_json_cannot_hold_are_refused_by_record(write, tmp_path):
    for number in ("1e999", "-1e999", "9" * 5_000):
        call = f'{{"role": "assistant", "tool_calls": [{{"name": "f", "arguments": {{"a": [{number}]}}}}]}}'
        error = error_of(write(f'{json.dumps(CHAT)}\n{{"messages": [{call}]}}'))
        assert error.startswith(" line 2 message 1: arguments of f holds a number that JSON can't hold"), error
        error = error_of(
            write(f'{json.dumps(CHAT)[:-1]}, "tools": [{{"name": "f", "parameters": {{"a": {number}}}}}]}}')
        )
        assert error.startswith(" line 1: tools holds a number"), error
    for number in (float("nan"), float("inf")):
        call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": number}}]}
        error = error_of(table(tmp_path, [{"messages": [call]}]))
        assert error.startswith(" row 1 message 1: arguments of f holds a number"), error


# ---- Arrow's nulls ----


def schema(required=(), **properties) -> dict:
    return {"type": "object", "properties": properties, "required": list(required)}


def calling(name: str, arguments, parameters: dict) -> dict:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": arguments}]}
    return {"messages": [*turns("q"), call], "tools": [{"name": name, "parameters": parameters}]}


TEXT, NUMBER = {"type": "string", "description": "d"}, {"type": "integer", "enum": [1, 2]}
NESTED = {"type": "object", "properties": {"x": NUMBER}}


def called(record) -> dict:
    return record.messages[-1]["tool_calls"][0]["function"]["arguments"]


def test_nulls_that_arrow_filled_in_are_taken_out_and_counted(tmp_path):
    records = [
        calling("f", {"a": "x"}, schema(["a"], a=TEXT)),
        calling("g", {"b": 1, "c": {"x": 1}}, schema(["b"], b=NUMBER, c=NESTED)),
        calling("g", {"b": 2, "c": {"y": 1}}, schema(["b"], b=NUMBER, c=NESTED)),
        calling("h", {"a": "x"}, schema(a=TEXT, b=NUMBER)),  # b may be left out, and null is no integer
    ]
    loaded = read_records(table(tmp_path, records))
    assert [called(record) for record in loaded.records] == [
        {"a": "x"}, {"b": 1, "c": {"x": 1}}, {"b": 2, "c": {"y": 1}}, {"a": "x"},
    ]  # fmt: skip
    for record, wanted in zip(loaded.records, records, strict=True):
        assert record.tools == [{"type": "function", "function": wanted["tools"][0]}]
    assert loaded.stats.altered == {"with nulls of other tools, which Arrow filled in, taken out": 4}
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(each) for each in records))
    plain = read_records(tmp_path / "a.jsonl")
    assert [called(record) for record in plain.records] == [called(record) for record in loaded.records]
    assert plain.stats.altered == {}


def test_a_tool_without_parameters_is_called_without_arguments(tmp_path):
    bare = calling("now", {}, {})
    del bare["tools"][0]["parameters"]
    records = [calling("f", {"a": "x"}, schema(a=TEXT)), calling("g", {}, schema()), bare]
    loaded = read_records(table(tmp_path, records))
    assert [called(record) for record in loaded.records] == [{"a": "x"}, {}, {}]
    assert loaded.records[2].tools == [{"type": "function", "function": {"name": "now"}}]


def test_nulls_that_may_be_meant_are_refused_or_kept(tmp_path, write):
    nullable = {"type": ["string", "null"]}
    both = [calling("f", {"a": "x", "b": "y"}, schema(a=TEXT, b=nullable))]
    both += [calling("f", {"a": "x", "b": None}, schema(a=TEXT, b=nullable))]
    assert " row 2: arguments of f: 'b' is null" in error_of(table(tmp_path, both))
    assert called(read_records(write(both)).records[1]) == {"a": "x", "b": None}  # JSON says what was written
    needed = [each | {"tools": [{"name": "f", "parameters": schema(["b"], a=TEXT, b=nullable)}]} for each in both]
    assert called(read_records(table(tmp_path, needed)).records[1]) == {"a": "x", "b": None}
    toolless = [{"messages": each["messages"]} for each in both]
    assert " row 2: arguments of f: 'b' is null" in error_of(table(tmp_path, toolless))
    strings = [calling("f", json.dumps({"a": None}), schema(a=nullable)) for _ in range(2)]
    assert called(read_records(table(tmp_path, strings)).records[0]) == {"a": None}  # the writer's own


def test_kto_labels_the_last_answer(write):
    for record in ({"messages": turns("q", "a", "r", "b")}, {"prompt": turns("q", "a", "r"), "completion": "b"}):
        loaded = read_records(write([record | {"label": True}, record | {"label": False}]))
        assert name_of(loaded) == "KTO" and [each.label for each in loaded.records] == [True, False]
        assert all(each.messages == turns("q", "a", "r", "b") for each in loaded.records)
        assert all(each.weights == [1, 0, 1, 1] for each in loaded.records)


# ---- containers ----


def table(folder, rows, name="data.parquet", **metadata):
    import pyarrow
    import pyarrow.parquet

    made = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(made.replace_schema_metadata(metadata), folder / name)
    return folder / name


def test_parquet_with_nested_messages_and_named_classes(tmp_path):
    loaded = read_records(table(tmp_path, [CHAT] * 3))
    assert (name_of(loaded), kind_of(loaded)) == ("messages", "Parquet")
    assert [record.messages for record in loaded.records] == [CHAT["messages"]] * 3
    names = json.dumps({"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}})
    records = read_records(table(tmp_path, [{"text": "t", "label": 1}, {"text": "u", "label": 0}], huggingface=names))
    assert [record.messages for record in records.records] == [turns("t", "yes"), turns("u", "no")]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_packed_files_of_every_kind(tmp_path, suffix):
    import pyarrow

    contents = {"a.json": json.dumps([ALPACA] * 5), "a.jsonl": json.dumps(ALPACA), "a.txt": "text\r\nhere",
                "a.csv": "text,label\na,b\n", "a.tsv": 'text\tlabel\n"a\tb"\tc\n'}  # fmt: skip
    for name, content in contents.items():
        path = tmp_path / f"{name}.{suffix}"
        with pyarrow.output_stream(str(path), compression={"gz": "gzip", "zst": "zstd"}[suffix]) as stream:
            stream.write(content.encode())
        (tmp_path / name).write_text(content, newline="")
        plain, packed = read_records(tmp_path / name), read_records(path)
        bare = lambda loaded: [(record.messages, record.text) for record in loaded.records]
        assert bare(plain) == bare(packed) and kind_of(packed).startswith(kind_of(plain) + " in ")


def test_csv_as_spreadsheets_write_it(write):
    rows = 'text,label\r\n"a ""b"", c\nd",x\r\n\r\ne,y\r\n'
    loaded = read_records(write(b"\xef\xbb\xbf" + rows.encode(), "a.csv"))
    assert [record.messages for record in loaded.records] == [turns('a "b", c\nd', "x"), turns("e", "y")]
    assert loaded.records[1].where.endswith("a.csv row 2")


def test_csv_without_names_is_classes_and_texts(write, tmp_path):
    loaded = read_records(write('"2","t","d"\n"1","u","e"\n', "a.csv"))
    assert [record.messages for record in loaded.records] == [turns("t\nd", "2"), turns("u\ne", "1")]
    (tmp_path / "classes.txt").write_text("World\nSports\n")
    assert read_records(write('"2","t","d"\n', "a.csv")).records[0].messages == turns("t\nd", "Sports")


def test_a_folder_is_its_files_in_order(tmp_path, write):
    (tmp_path / "d" / "b").mkdir(parents=True)
    for name, content in {"d/b/2.txt": "two", "d/1.md": "one", "d/3.jsonl": '{"text": "three"}', "d/x.png": "no",
                          "d/.hidden.txt": "no"}.items():  # fmt: skip
        (tmp_path / name).write_text(content)
    loaded = read_records(tmp_path / "d")
    assert [record.text for record in loaded.records] == ["one", "three", "two"]
    assert "3 files of JSONL, TXT, 3 records), 1 other files left alone" in loaded.summary()
    (tmp_path / "d" / "4.jsonl").write_text(json.dumps(ALPACA))
    assert "4.jsonl line 1: keys" in error_of(tmp_path / "d")


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
    assert (kind_of(source), len(source.records)) == (container, 2)


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
    assert (len(source.records), source.stats.dropped) == (1, {"empty answer": 2})
    source = read_records(write([CHAT, chat]))
    assert (len(source.records), source.stats.dropped) == (1, {"empty answer": 1})
    source = read_records(write([{"text": ""}, {"text": "a"}]))
    assert (len(source.records), source.stats.dropped) == (1, {"empty text": 1})


def test_unknown_keys_beside_a_known_format_are_ignored_and_listed(write):
    message = {"role": "assistant", "content": "a", "name": "Al"}
    source = read_records(write([{"messages": [message], "id": 1}, {"messages": [message], "split": None}]))
    assert sorted(source.stats.ignored) == ["id", "messages.name", "split"]
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
    "content is of an unknown type": (
        CHAT,
        message_of(content=[{"type": "hologram"}]),
        ["message 1: content", "'hologram'", "text is"],
    ),
    "content is a part without text": (
        CHAT,
        message_of(content=[{"type": "text"}]),
        ["holds null, a string is wanted"],
    ),
    "role is a number": (CHAT, message_of(role=1), ["message 1: role is a number, a string is wanted"]),
    "unknown role": (CHAT, message_of(role="boss"), ["message 1: role 'boss' is unknown", "system, user, assistant"]),
    "role of several lines": (CHAT, message_of(role="a\nb" * 99), ["message 1: role 'a\\nba"]),
    "tools are numbers": (CHAT, CHAT | {"tools": [1]}, ["tools is a list, a list of objects is wanted"]),
    "tools are no JSON": (CHAT, CHAT | {"tools": "[{"}, ["tools is no JSON: '[{'"]),
    "tools of Alpaca": (ALPACA, ALPACA | {"tools": [{"name": "f"}]}, ["key 'tools' changes"]),
    "a rejected answer": (CHAT, CHAT | {"label": False}, ["key 'label' changes"]),
    "a class": ({"text": "a"}, {"text": "a", "label": 0}, ["key 'label' changes"]),
    "a user's turn of weight 2": (CHAT, message_of(weight=2), ["message 1: a weight on a message of the user"]),
    "a negative weight": (ALPACA, ALPACA | {"weight": -1}, ["weight is -1, a number from 0"]),
    "a record's mask of another speaker": (
        {"conversations": CHAT["messages"], "mask": "User"},
        {"conversations": CHAT["messages"], "mask": "Assistant"},
        ["mask is Assistant, and"],
    ),
    "a user's loss scale": (CHAT, message_of(loss_scale=0.5), ["message 1: a weight on a message of the user"]),
    "a thought without a text": (
        CHAT,
        message_of(role="assistant", reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}]),
        ["message 1: reasoning_details has no part with a text"],
    ),
    "a record's switch that is none": (CHAT, CHAT | {"loss": 2.5}, ["loss is 2.5, true or false is wanted"]),
    "arguments under two names": (
        CHAT,
        message_of(role="assistant", tool_calls=[{"name": "f", "arguments": {}, "parameters": {"a": 1}}]),
        ["message 1: arguments of f: stand under 'arguments', 'parameters'"],
    ),
    "an unknown switch": (CHAT, message_of(odd=False), ["message 1: 'odd' may say what is trained", '"weight": 0']),
    "a switch of two meanings": (CHAT, message_of(mask=1), ["message 1: 'mask' may say what is trained"]),
    "a switch that is no switch": (CHAT, message_of(train=0.5), ["message 1: train is 0.5, true or false is wanted"]),
    "a mask of tokens": (CHAT, message_of(loss_mask=[0, 1]), ["message 1: loss_mask is a list, true or false"]),
    "switches that contradict": (
        CHAT,
        message_of(role="assistant", train=True, masked=True),
        ["message 1: 'train', 'masked' contradict each other"],
    ),
    "two thoughts": (
        CHAT,
        message_of(role="assistant", reasoning="a", thinking="b"),
        ["message 1: reasoning and thinking hold different thoughts"],
    ),
    "a thought that is a switch": (
        CHAT,
        message_of(role="assistant", thinking=True),
        ["message 1: thinking is a boolean, a string is wanted"],
    ),
    "an answer and a refusal": (
        CHAT,
        message_of(role="assistant", refusal="no"),
        ["message 1: content and refusal both hold an answer"],
    ),
    "a user's refusal": (CHAT, message_of(content=None, refusal="no"), ["message 1: a refusal of the user"]),
    "two system messages": (
        CHAT,
        {"system": "s", "messages": [{"role": "system", "content": "t"}, *turns("q", "a")]},
        ['"system" and the first message are two different system messages'],
    ),
    "a prompt of another talk": (
        PREFERENCES[0],
        {"prompt": "other", "chosen": turns("q", "a"), "rejected": turns("q", "b")},
        ["prompt and chosen hold two talks that are not the same"],
    ),
    "two answers to two systems": (
        PREFERENCES[0],
        {"chosen": [SYSTEM, *turns("q", "a")], "rejected": [SYSTEM | {"content": "t"}, *turns("q", "b")]},
        ["chosen and rejected begin with different messages, and share no prompt"],
    ),
    "messages of another talk": (
        PREFERENCES[0],
        {"prompt": "q", "messages": turns("z", "y", "z"), "chosen": turns("q", "a"), "rejected": turns("q", "b")},
        ["messages and chosen hold two talks"],
    ),
    "a completion of another talk": (
        {"prompt": "q", "completion": "a"},
        {"prompt": turns("other"), "completion": turns("q", "a")},
        ["prompt and completion hold two talks"],
    ),
    "infinite arguments": (
        CHAT,
        message_of(role="assistant", tool_calls=[{"name": "f", "arguments": '{"a": 1e999}'}]),
        ["message 1: arguments of f holds a number that JSON can't hold"],
    ),
    "a user's tool call": (CHAT, message_of(tool_calls=[{"name": "f"}]), ["message 1: a tool call of the user"]),
    "a nameless call": (
        CHAT,
        message_of(role="assistant", tool_calls=[{"id": 1}]),
        ["message 1: a tool call: no name"],
    ),
    "arguments are no JSON": (
        CHAT,
        message_of(role="assistant", tool_calls=[{"name": "f", "arguments": "{"}]),
        ["arguments of f is no JSON"],
    ),
    "surrogate in output": (ALPACA, ALPACA | {"output": "ab\ud800"}, ["output", "'\\ud800' at character 3"]),
    "surrogate in history": (ALPACA, ALPACA | {"history": [["a", "\udfff"]]}, ["history 1", "'\\udfff'"]),
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
    error = error_of(write([{"ask": "q", "say": "a"}]))
    assert error.startswith(" line 1: keys 'ask', 'say'")
    assert all(known in error for known in ("messages (messages)", "Alpaca (instruction, output)", "text (text)"))
    assert "mistyped" not in error
    assert "'OUTPUT' looks like 'output'" in error_of(write([{"instruction": "q", "OUTPUT": "a"}]))
    # Dolly: "context" is not "text" mistyped, and "instruction" is there
    assert "mistyped" not in error_of(write([{"instruction": "q", "context": "c"}]))


def test_strange_keys_stay_on_one_short_line(write):
    error = error_of(write([{f"a\n\ud800{i}" + "x" * 1_000: i for i in range(1_000)}]))
    assert "and 992 more" in error and len(error) < 1000
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
        (b'{"text": "a\0"}', ": holds a NUL at character 12"),
        (b'{"text": "a"}\n{"text": "\xff"}', " line 2: not UTF-8 at byte 11 of the line"),
        ("{}".encode("utf-16"), ": not UTF-8 at byte 0"),
        (b'{"text": "a"}\n{"deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", " line 2: JSON nested too deep"),
        (b'[{"deep": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001 + b"]", " record 1: JSON nested too deep"),
        (b'{"text": ""}\n{"text": " "}', ": no record can be trained on (2 empty text)"),
        (b'[{"instruction": "a", "output": ""}]', ": no record can be trained on (1 empty answer)"),
        (b'{"messages": [{"role": "assistant", "content": "\\n"}]}', ": no record can be trained on (1 empty answer)"),
    ],
)
def test_a_bad_file_is_named_with_place_and_fault(write, content, says):
    error = error_of(write(content))
    assert error.startswith(says), error


def test_missing_file_folder_and_utf_16_text_are_refused(write, tmp_path):
    assert error_of(tmp_path / "none.json").startswith(": no such file")
    assert error_of(tmp_path).startswith(": holds no file of a known kind")
    assert error_of(write("ab".encode("utf-16-le"), "a.txt")).startswith(": holds a NUL at character 2")


def test_numbers_of_any_length_are_no_fault(write):
    record = json.dumps(ALPACA)[:-1] + f', "id": {"9" * 10_000}, "score": 1e999}}'
    assert [*read_records(write(record)).stats.ignored] == ["id", "score"]


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
    assert (name_of(source), kind_of(source), len(source.records)) == (format, container, count)
    assert source.stats.dropped == {} and source.stats.ignored == {}


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
        ("TruthfulQA.csv", " row 1: keys 'Type', 'Category', 'Question'"),
        ("HumanEval.jsonl.gz", " line 1: keys 'task_id', 'prompt', 'entry_point'"),
        ("arc_easy_icl_500.jsonl", " line 1: keys 'choices', 'query', 'gold': no known format"),
        ("multi30k/val.en", " line 1: found 'A group of'"),
        ("banking77/categories.json", " record 1: is a string, an object is wanted"),
    ],
)
def test_real_files_of_other_formats_are_refused_rather_than_misread(name, says):
    assert error_of(DATA / name).startswith(says)
