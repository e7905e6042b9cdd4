"""Real files of every format: ids, masks and weights against transformers' ids and a mask that is found another way.

Each file is read here by a few lines of the test's own. An answer is what a pattern finds in the rendered text, behind
the text that asks for it, and a token is trained if the `tokenizers` library says that all its characters lie in there.
Takes about 50 s.
"""

import csv
import json
import re
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jinja2
import pytest
import transformers
from support.helpers import SHARED, needs_shared

from common.errors import UserError
from dataset.examples import cut
from dataset.formats import open_source
from dataset.token_cache import tokenized_rows
from interop.resolve import model_folder
from tokenizer import load_tokenizer

pytestmark = needs_shared
WHOLE, EACH = 300, 20  # of a file of over twice WHOLE records the first WHOLE are compared, and each 20th
REFUSED, BAD_LABEL, EMPTY = "refused by the chat template", "labelled as a bad answer", "empty answer"
NO_ANSWER, NOT_NEW = "a path without an answer", "a path without an answer of its own"


class Case(NamedTuple):
    """A conversation as a file has it. weights: of each message. lost: why it is not to be trained on."""

    messages: list[dict]
    tools: list[dict] | None = None
    weights: list[float] | None = None
    lost: str | None = None


# ---- the files, each read as its format is defined ----


def whole(name: str):
    return json.loads((SHARED / name).read_bytes())


def lines(name: str) -> list:
    return [json.loads(line) for line in (SHARED / name).read_bytes().split(b"\n") if line]


def table(name: str) -> list[list[str]]:
    with open(SHARED / name, encoding="utf-8", newline="") as file:
        return [*csv.reader(file)]


def said(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def pair(question: str, answer: str) -> Case:
    return Case([said("user", question), said("assistant", answer)])


def pairs(records: list[dict], asks: str, answers: str, more: str | None = None) -> list[Case]:
    """more: the key of a text that follows the question after a blank line, unless it is empty."""
    return [pair(r[asks] + (f"\n\n{r[more]}" if more and r[more] else ""), r[answers]) for r in records]


def last_only(messages: list[dict], lost: str | None = None) -> Case:
    """Of which the last message, an answer, is what was judged."""
    assert messages[-1]["role"] == "assistant"
    return Case(messages, None, [0.0] * (len(messages) - 1) + [1.0], lost)


def called(call: dict) -> dict:
    """A tool call with an object for its arguments, which is what templates want."""
    function, id = call.get("function", call), {"id": call["id"]} if "id" in call else {}
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return id | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def openai(records: list[dict]) -> list[Case]:
    for message in (message for record in records for message in record["messages"]):
        if "tool_calls" in message:
            message["tool_calls"] = [called(call) for call in message["tool_calls"]]
            message["content"] = message.get("content") or ""  # as templates want it
    return [Case(record["messages"], record.get("tools")) for record in records]


def sharegpt_turn(turn: dict) -> dict:
    if turn["from"] == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [called(json.loads(turn["value"]))]}
    roles = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system"}
    return said(roles[turn["from"]], turn["value"])


def sharegpt(records: list[dict]) -> list[Case]:
    cases = []
    for record in records:
        tools = [{"type": "function", "function": tool} for tool in json.loads(record.get("tools", "[]"))]
        cases.append(Case([sharegpt_turn(turn) for turn in record["conversations"]], tools or None))
    return cases


def in_parts(records: list[dict]) -> list[Case]:
    """LLaMA-Factory's messages in parts: a text, a thought, and tool calls in JSON."""
    cases = []
    for record in records:
        messages = []
        for message in record["messages"]:
            found = {part["type"]: part["value"] for part in message["content"]}
            calls = [called(json.loads(p["value"])) for p in message["content"] if p["type"] == "tool_call"]
            turn = {"role": message["role"], "content": found.get("text"), "tool_calls": calls}
            turn["reasoning_content"] = found.get("reasoning")
            messages.append({key: value for key, value in turn.items() if value} | {"content": turn["content"] or ""})
        cases.append(Case(messages, json.loads(record["tools"]) or None))
    return cases


def preferences(records: list[dict]) -> list[Case]:
    return [last_only([sharegpt_turn(turn) for turn in (*r["conversations"], r["chosen"])]) for r in records]


def hh_rlhf(records: list[dict]) -> list[Case]:
    """The chosen transcript; both have all turns but the last answer in common."""
    cases = []
    for record in records:
        sides = [record[key].rpartition("\n\nAssistant:") for key in ("chosen", "rejected")]
        assert sides[0][0] == sides[1][0]
        spoken = record["chosen"].replace("\n\nHuman:", "\0user\0").replace("\n\nAssistant:", "\0assistant\0")
        words = spoken.split("\0")[1:]
        messages = [said(role, content.strip()) for role, content in zip(words[::2], words[1::2], strict=True)]
        cases.append(last_only(messages, None if all(side[2].strip() for side in sides) else EMPTY))
    return cases


def paths_below(message: dict) -> list[list[dict]]:
    replies = sorted(message["replies"], key=lambda reply: 99 if reply.get("rank") is None else reply["rank"])
    return [[message, *path] for reply in replies for path in paths_below(reply)] or [[message]]


def oasst(trees: list[dict], paths: str) -> list[Case]:
    """Of each tree the path of the best replies, or all paths: each answer trained once, no question at the end."""
    cases = []
    for tree in trees:
        trained = set()
        for path in paths_below(tree["prompt"])[: 1 if paths == "best" else None]:
            path = path[:-1] if path[-1]["role"] == "prompter" else path
            roles = {"prompter": "user", "assistant": "assistant"}
            weights = [float(m["role"] == "assistant" and m["message_id"] not in trained) for m in path]
            trained |= {m["message_id"] for m in path}
            lost = None if any(weights) else NOT_NEW if path else NO_ANSWER
            cases.append(Case([said(roles[m["role"]], m["text"]) for m in path], None, weights, lost))
    return cases


def xquad(name: str) -> list[Case]:
    paragraphs = [p for article in whole(name)["data"] for p in article["paragraphs"]]
    return [pair(f"{p['context']}\n\n{q['question']}", q["answers"][0]["text"]) for p in paragraphs for q in p["qas"]]


def pubmedqa(name: str) -> list[Case]:
    records = whole(name).values()
    return [pair("\n\n".join([*r["CONTEXTS"], r["QUESTION"]]), r["LONG_ANSWER"]) for r in records]


def ag_news(name: str) -> list[Case]:
    classes = (SHARED / name).with_name("classes.txt").read_text().split()
    return [pair(f"{title}\n{text}", classes[int(number) - 1]) for number, title, text in table(name)]


HH, OASST = "hh_rlhf_harmless_test_500.jsonl", "oasst_en_100_tree.jsonl"
TOOLS = {
    "glaive_toolcall_en_demo.json": lambda name: sharegpt(whole(name)),
    "reason_tool_use_demo_50.jsonl": lambda name: in_parts(lines(name)),
    "openai_drone_training_2.jsonl": lambda name: openai(lines(name)),
    "mistral_finetune_tool_calls_example.json": lambda name: openai([whole(name)]),
}
SOME = TOOLS | {
    "kto_en_demo.json": lambda name: [last_only(r["messages"], None if r["label"] else BAD_LABEL) for r in whole(name)],
    "alpaca_en_1k.json": lambda name: pairs(whole(name), "instruction", "output", "input"),
    "mbpp.jsonl": lambda name: pairs(lines(name), "text", "code"),
    "xquad/xquad.th.json": xquad,
}
FILES = SOME | {
    **{f"xquad/xquad.{language}.json": xquad for language in ("ar", "de", "en", "hi", "ru", "zh")},
    "dolly_sample.json": lambda name: pairs(whole(name), "instruction", "response", "context"),
    "sharegpt_dummy_conversation.json": lambda name: sharegpt(whole(name)),
    "openai_toy_chat_4.jsonl": lambda name: openai(lines(name)),
    "preference_en_300.json": lambda name: preferences(whole(name)),
    "dolly_hhrlhf_train_small_500.jsonl": lambda name: pairs(lines(name), "prompt", "response"),
    "gsm8k_train.jsonl": lambda name: pairs(lines(name), "question", "answer"),
    "pubmedqa_ori_pqal.json": pubmedqa,
    "dialogsum.dev.jsonl": lambda name: pairs(lines(name), "dialogue", "summary"),
    "xsum_sample.json": lambda name: pairs(lines(name), "document", "summary"),
    "banking77/train.csv": lambda name: [pair(*row) for row in table(name)[1:]],
    "ag_news/test_3000.csv": ag_news,
}

# ---- ids and masks, the slow way ----

CHATML = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)"
LLAMA = r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)"
GEMMA = r"<start_of_turn>model\n(.*?<end_of_turn>)"
NEMO = r"\[/(?:INST|TOOL_RESULTS)\](?!\[TOOL_RESULTS\])(.*?</s>)"
TOKENIZERS = {  # where an answer and its end stand; a template that is not the folder's; the files
    "base": (CHATML, None, FILES),
    "qwen2_5": (CHATML, None, SOME),
    "qwen3": (CHATML, None, TOOLS),
    "qwen3, later": (CHATML, "qwen3", TOOLS),
    "llama3_1": (LLAMA, "llama3_1", TOOLS),
    "gemma3": (GEMMA, None, SOME),
    "mistral_nemo": (NEMO, None, TOOLS),
}
MOVING = ("qwen3", "qwen3, later", "mistral_nemo")  # these rewrite earlier turns: thoughts go, tools move on
NO_TOOLS = dict(zip(TOOLS, (153, 31, 2, 1), strict=True))  # conversations with a tool call in them
REFUSALS = {  # of those files
    "base": NO_TOOLS,  # it leaves calls out
    "gemma3": NO_TOOLS,
    "mistral_nemo": NO_TOOLS | {"mistral_finetune_tool_calls_example.json": 0},  # it wants ids of nine letters
    "llama3_1": {"reason_tool_use_demo_50.jsonl": 10},  # it wants one call at a time
}


class Oracle:
    """A folder's tokenizer, ours and transformers', and what the latter makes of conversations."""

    def __init__(self, name: str, folder: Path):
        self.name, self.answer = name, re.compile(TOKENIZERS[name][0], re.DOTALL)
        self.ours, self.theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        special = [token.content for token in self.theirs.added_tokens_decoder.values() if token.special]
        self.control = re.compile("|".join(map(re.escape, special)))

    def ids_and_weights(self, case: Case) -> tuple[list[int], list[float]] | None:
        """None where the template refuses the conversation, or does not write all answers."""
        render, offsets = self.theirs.apply_chat_template, {"return_offsets_mapping": True}
        try:
            encoded = render(case.messages, tools=case.tools, tokenizer_kwargs=offsets)
        except jinja2.TemplateError:
            return None
        text = render(case.messages, tools=case.tools, tokenize=False)
        answers = [i for i, message in enumerate(case.messages) if message["role"] == "assistant"]
        weights = [0.0] * len(encoded["input_ids"])
        for number, found in zip(answers, self.answer.finditer(text), strict=True):
            message, (first, end) = case.messages[number], found.span(1)
            words = [message.get("content", ""), *(c["function"]["name"] for c in message.get("tool_calls", []))]
            if not all(each.strip() in found[1] for each in words):
                return None
            if self.name not in MOVING:  # just what a server puts before the answer
                before = case.messages[:number]
                assert text[:first] == render(before, tools=case.tools, tokenize=False, add_generation_prompt=True)
            for i, (a, b) in enumerate(encoded["offset_mapping"]):
                assert b <= first or end <= a or first <= a < b <= end, "a token lies half in the answer"
                if first <= a < end:
                    weights[i] = case.weights[number] if case.weights else 1.0
        return encoded["input_ids"], weights

    def compare(self, path: Path, cases: list[Case], paths: str = "best") -> Counter:
        """Asserts that ours makes the same of a file; returns why how many records are left out."""
        wanted, lost = [], Counter()  # wanted: None where it is not compared
        for i, case in enumerate(cases):
            if case.lost:
                lost[case.lost] += 1
            elif len(cases) > 2 * WHOLE and i >= WHOLE and i % EACH:
                wanted.append(None)
            elif want := self.ids_and_weights(case):
                assert not self.control.search(f"{case.messages} {case.tools}")  # which only ours takes for plain text
                wanted.append(want)
            else:
                lost[REFUSED] += 1
        source = open_source(path, paths)
        if not wanted:
            with pytest.raises(UserError, match=rf"no record can be trained on \({len(cases)} {REFUSED}"):
                tokenized_rows(source, self.ours)
            return lost
        rows, dropped, wrong = tokenized_rows(source, self.ours), Counter(), []
        for reason, count in rows.stats.dropped.items():
            dropped[REFUSED if reason.startswith(REFUSED) else reason] += count
        assert dropped == lost and len(rows) == rows.stats.records == len(wanted)
        for i, want in enumerate(wanted):
            ids = rows.ids[rows.starts[i] : rows.starts[i + 1]].tolist()
            weights = [0.0] * len(ids)
            for k in range(rows.span_starts[i], rows.span_starts[i + 1]):
                a, b = rows.spans[k]
                weights[a:b] = [float(rows.weights[k])] * int(b - a)
            if want and (ids, weights) != want:
                wrong.append(f"{rows.where(i)}: {'mask' if ids == want[0] else 'ids'}")
        assert not wrong
        return lost


@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    """Makes the oracle of each name, once."""
    base = model_folder(None)

    def make(name: str) -> Oracle:
        template, folder = TOKENIZERS[name][1], SHARED / "tokenizers" / name.partition(",")[0]
        if template:
            folder, files = tmp_path_factory.mktemp(template), folder.glob("*.json")
            for file in (*files, SHARED / "chat_templates" / f"{template}.jinja"):
                shutil.copy(file, folder / (file.name if file.suffix == ".json" else "chat_template.jinja"))
        return Oracle(name, base if name == "base" else folder)

    return cache(make)


@pytest.fixture(autouse=True)
def rows_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name, file", [(name, file) for name, (*_, files) in TOKENIZERS.items() for file in files])
def test_conversations(name, file, oracles):
    lost = oracles(name).compare(SHARED / file, FILES[file](file))
    assert lost == Counter({REFUSED: REFUSALS.get(name, {}).get(file, 0), BAD_LABEL: 150 * ("kto" in file)})


@pytest.mark.parametrize("name", ["base", "qwen2_5", "gemma3"])
def test_transcripts_and_a_line_that_is_broken(name, oracles, tmp_path):
    assert oracles(name).compare(SHARED / HH, hh_rlhf(lines(HH))) == {EMPTY: 1}
    broken = (SHARED / HH).read_bytes().split(b"\n")
    broken[352] = broken[352][:40]
    (tmp_path / HH).write_bytes(b"\n".join(broken))
    with pytest.raises(UserError, match=f"{HH} line 353: JSON cut off at column 12"):
        tokenized_rows(open_source(tmp_path / HH), oracles(name).ours)


@pytest.mark.parametrize("name", ["base", "qwen2_5"])
def test_trees(name, oracles):
    for paths, lost in ("best", {}), ("all", {NOT_NEW: 71}):
        assert oracles(name).compare(SHARED / OASST, oasst(lines(OASST), paths), paths) == lost


@pytest.mark.parametrize("name", ["base", "mistral_nemo"])
@pytest.mark.parametrize("file", ["c4_text.jsonl", "tinyshakespeare.txt", "wikitext-2/valid.txt"])
def test_plain_text_is_trained_but_for_its_first_token(name, file, oracles, monkeypatch):
    """The `tokenizers` library is told to take control tokens in it (Nemo's <unk>) for plain text, too."""
    ours, eos, theirs = oracles(name).ours, oracles(name).theirs.eos_token_id, oracles(name).theirs.backend_tokenizer
    monkeypatch.setattr(theirs, "encode_special_tokens", True)
    data = cut([tokenized_rows(open_source(SHARED / file), ours)], seq_len=1 << 30)
    texts = [r["text"] for r in lines(file)] if file.endswith("jsonl") else [(SHARED / file).read_bytes().decode()]
    for example, text in zip(data.examples, texts, strict=True):
        ids = [*theirs.encode(text).ids, eos]
        assert example.ids.tolist() == ids and example.loss_weights.tolist() == [0.0] + [1.0] * (len(ids) - 1)
