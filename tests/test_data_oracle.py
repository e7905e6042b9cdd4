"""Real files of every format: ids, masks and weights against transformers' ids and a mask found another way.

Each file is read here by a few lines of this test's own, and an answer is where a pattern finds it in the text, as far
as the offsets of the `tokenizers` library say that a token lies in it. Of large files a part is compared.
"""

import csv
import json
import re
from collections import Counter
from typing import NamedTuple

import jinja2
import numpy as np
import pytest
import transformers
from helpers import SHARED, needs_shared

from convert import model_folder
from data import cut
from errors import UserError
from formats import open_source
from rows import Rows, tokenised
from tokenizer import load_tokenizer

pytestmark = needs_shared
WHOLE, EACH = 300, 20  # of a file of over twice WHOLE records, the first WHOLE and each 20th are compared
SKIPPED = "an answer's words hold a control token"
REFUSED = "refused by the chat template"
EMPTY = "empty answer"


class Case(NamedTuple):
    """A conversation as a file has it; lost: why it is not to be trained on."""

    messages: list[dict]
    tools: list[dict] | None = None
    weights: list[float] | None = None  # of each message
    lost: str | None = None


# ---- the files, read by the words of whoever defined their formats ----


def whole(name: str):
    return json.loads((SHARED / name).read_bytes())


def lines(name: str) -> list:
    return [json.loads(line) for line in (SHARED / name).read_bytes().split(b"\n") if line.strip()]


def pair(question: str, answer: str) -> Case:
    return Case([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def pairs(records: list[dict], asks: str, answers: str, more: str = "") -> list[Case]:
    """more: a key whose text, where there is any, follows the question after a blank line."""
    return [pair(r[asks] + (f"\n\n{r[more]}" if more and r[more] else ""), r[answers]) for r in records]


def called(call: dict) -> dict:
    """A tool call with its arguments as an object, which is what chat templates want."""
    function = call.get("function", call)
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {key: call[key] for key in ("id",) if key in call} | {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def openai(records: list[dict]) -> list[Case]:
    return [
        Case([m | {"tool_calls": [called(c) for c in m["tool_calls"]]} if "tool_calls" in m else m
              for m in record["messages"]], record.get("tools"))
        for record in records
    ]  # fmt: skip


def sharegpt_turn(turn: dict) -> dict:
    roles = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system"}
    if turn["from"] == "function_call":
        return {"role": "assistant", "tool_calls": [called(json.loads(turn["value"]))]}
    return {"role": roles[turn["from"]], "content": turn["value"]}


def sharegpt(records: list[dict]) -> list[Case]:
    cases = []
    for record in records:
        tools = [{"type": "function", "function": tool} for tool in json.loads(record.get("tools", "[]"))]
        cases.append(Case([sharegpt_turn(turn) for turn in record["conversations"]], tools or None))
    return cases


def typed_parts(records: list[dict]) -> list[Case]:
    """LLaMA-Factory's messages of parts: text, reasoning, and tool calls that are JSON."""
    cases = []
    for record in records:
        messages = []
        for message in record["messages"]:
            turn = {"role": message["role"]}
            for part in message["content"]:
                match part["type"]:
                    case "text":
                        turn["content"] = turn.get("content", "") + part["value"]
                    case "reasoning":
                        turn["reasoning_content"] = part["value"]
                    case "tool_call":
                        turn.setdefault("tool_calls", []).append(called(json.loads(part["value"])))
            messages.append(turn)
        cases.append(Case(messages, json.loads(record["tools"]) or None))
    return cases


def kto(records: list[dict]) -> list[Case]:
    """The label is that of the last turn, an answer."""
    cases = []
    for record in records:
        messages = record["messages"]
        assert messages[-1]["role"] == "assistant"
        weights = [0.0] * (len(messages) - 1) + [1.0]
        cases.append(Case(messages, None, weights, None if record["label"] else "labelled as a bad answer"))
    return cases


def preferences(records: list[dict]) -> list[Case]:
    cases = []
    for record in records:
        prompt = [sharegpt_turn(turn) for turn in record["conversations"]]
        cases.append(Case([*prompt, sharegpt_turn(record["chosen"])], None, [0.0] * len(prompt) + [1.0]))
    return cases


def transcript(text: str) -> list[dict]:
    """HH-RLHF's: each turn is a blank line, who speaks, and what they say."""
    turns = []
    for chunk in text.replace("\n\nHuman:", "\0user\0").replace("\n\nAssistant:", "\0assistant\0").split("\0"):
        if chunk in ("user", "assistant"):
            turns.append({"role": chunk})
        elif turns:
            turns[-1]["content"] = chunk.strip()
    return turns


def hh_rlhf(records: list[dict]) -> list[Case]:
    """The chosen transcript; trained is what the rejected one does not have."""
    cases = []
    for record in records:
        chosen, rejected = transcript(record["chosen"]), transcript(record["rejected"])
        same = 0
        while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
            same += 1
        lost = None
        if same == min(len(chosen), len(rejected)):
            lost = "chosen and rejected do not differ"
        elif not all(turn["content"] for turn in chosen + rejected):
            lost = EMPTY
        cases.append(Case(chosen, None, [0.0] * same + [1.0] * (len(chosen) - same), lost))
    return cases


def ranked(message: dict) -> list[dict]:
    return sorted(message["replies"], key=lambda reply: reply.get("rank") if reply.get("rank") is not None else 99)


def paths_below(message: dict) -> list[list[dict]]:
    return [[message, *path] for reply in ranked(message) for path in paths_below(reply)] or [[message]]


def oasst(trees: list[dict], every: bool) -> list[Case]:
    """The first path of each tree, or all of them, each answer trained once; a question at the end goes."""
    cases = []
    for tree in trees:
        trained = set()
        for path in paths_below(tree["prompt"])[: None if every else 1]:
            while path and path[-1]["role"] == "prompter":
                path.pop()
            roles = {"prompter": "user", "assistant": "assistant"}
            messages = [{"role": roles[m["role"]], "content": m["text"]} for m in path]
            weights = [float(m["role"] == "assistant" and m["message_id"] not in trained) for m in path]
            trained |= {m["message_id"] for m in path}
            lost = None if any(weights) else f"a path without an answer{' of its own' * bool(path)}"
            cases.append(Case(messages, None, weights, lost))
    return cases


def xquad(name: str) -> list[Case]:
    paragraphs = [p for article in whole(name)["data"] for p in article["paragraphs"]]
    return [
        pair(f"{p['context']}\n\n{qa['question']}", qa["answers"][0]["text"]) for p in paragraphs for qa in p["qas"]
    ]


def pubmedqa(name: str) -> list[Case]:
    records = whole(name).values()
    return [pair("\n\n".join([*r["CONTEXTS"], r["QUESTION"]]), r["LONG_ANSWER"]) for r in records]


def banking(name: str) -> list[Case]:
    with open(SHARED / name, encoding="utf-8", newline="") as file:
        return [pair(row["text"], row["category"]) for row in csv.DictReader(file)]


def ag_news(name: str) -> list[Case]:
    classes = (SHARED / "ag_news" / "classes.txt").read_text().split()
    with open(SHARED / name, encoding="utf-8", newline="") as file:
        return [pair(f"{title}\n{said}", classes[int(number) - 1]) for number, title, said in csv.reader(file)]


HH = "hh_rlhf_harmless_test_500.jsonl"
OASST = "oasst_en_100_tree.jsonl"
TOOL_FILES = {
    "glaive_toolcall_en_demo.json": lambda name: sharegpt(whole(name)),
    "reason_tool_use_demo_50.jsonl": lambda name: typed_parts(lines(name)),
    "openai_drone_training_2.jsonl": lambda name: openai(lines(name)),
    "mistral_finetune_tool_calls_example.json": lambda name: openai([whole(name)]),
}
FILES = TOOL_FILES | {
    "alpaca_en_1k.json": lambda name: pairs(whole(name), "instruction", "output", "input"),
    "dolly_sample.json": lambda name: pairs(whole(name), "instruction", "response", "context"),
    "sharegpt_dummy_conversation.json": lambda name: sharegpt(whole(name)),
    "openai_toy_chat_4.jsonl": lambda name: openai(lines(name)),
    "kto_en_demo.json": lambda name: kto(whole(name)),
    "preference_en_300.json": lambda name: preferences(whole(name)),
    OASST: lambda name: oasst(lines(name), every=False),
    "dolly_hhrlhf_train_small_500.jsonl": lambda name: pairs(lines(name), "prompt", "response"),
    "gsm8k_train.jsonl": lambda name: pairs(lines(name), "question", "answer"),
    "pubmedqa_ori_pqal.json": pubmedqa,
    **{f"xquad/xquad.{language}.json": xquad for language in ("ar", "de", "en", "hi", "ru", "th", "zh")},
    "dialogsum.dev.jsonl": lambda name: pairs(lines(name), "dialogue", "summary"),
    "xsum_sample.json": lambda name: pairs(lines(name), "document", "summary"),
    "mbpp.jsonl": lambda name: pairs(lines(name), "text", "code"),
    "banking77/train.csv": banking,
    "ag_news/test_3000.csv": ag_news,
}

# ---- the slow way to ids and masks ----

CHATML = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)"
LLAMA = r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)"
NEMO = r"\[/(?:INST|TOOL_RESULTS)\](?!\[TOOL_RESULTS\])(.*?</s>)"
TOKENIZERS = {  # where an answer and its end stand; whether a turn's text is the same in a longer conversation
    "base": (CHATML, True),
    "qwen2_5": (CHATML, True),
    "qwen3": (CHATML, False),  # thoughts of earlier turns are taken out
    "llama3_1": (LLAMA, True),
    "mistral_nemo": (NEMO, False),  # tools stand before the last question
}


class Oracle:
    """Both tokenizers of a folder, and the ids and masks of transformers' one."""

    def __init__(self, name: str, folder):
        self.pattern, self.steady = re.compile(TOKENIZERS[name][0], re.DOTALL), TOKENIZERS[name][1]
        self.ours, self.theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        if name == "llama3_1":  # the folder's own is Llama 3's, without tools
            template = (SHARED / "chat_templates" / "llama3_1.jinja").read_text()
            self.theirs.chat_template = template
        special = [token.content for token in self.theirs.added_tokens_decoder.values() if token.special]
        self.control = re.compile("|".join(map(re.escape, special)))

    def text(self, messages: list[dict], tools, **asked) -> str:
        return self.theirs.apply_chat_template(messages, tools=tools, tokenize=False, **asked)

    def ids_and_weights(self, case: Case) -> tuple[list[int], list[float]]:
        """Ids by transformers, and of each token the weight of the answer that all its characters lie in."""
        offsets = {"return_offsets_mapping": True}
        both = self.theirs.apply_chat_template(case.messages, tools=case.tools, tokenizer_kwargs=offsets)
        text = self.text(case.messages, case.tools)
        numbers = [i for i, message in enumerate(case.messages) if message["role"] == "assistant"]
        weights = [0.0] * len(both["input_ids"])
        for number, found in zip(numbers, self.pattern.finditer(text), strict=True):
            first, end = found.span(1)
            prompt = self.text(case.messages[:number], case.tools, add_generation_prompt=True) if number else ""
            assert not self.steady or text[:first] == prompt  # just what a server would have put before the answer
            for i, (a, b) in enumerate(both["offset_mapping"]):
                assert b <= first or a >= end or first <= a < b <= end, "a token holds more than the answer"
                if first <= a and b <= end:
                    weights[i] = case.weights[number] if case.weights else 1.0
        return both["input_ids"], weights
