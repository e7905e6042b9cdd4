"""Tool calls: does an answer call the functions that it should, with the right arguments?

The calls are read from the text that the model wrote, in the forms that chat templates ask for:

    <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>       Hermes, Qwen, SmolLM
    <function=f>{"x": 1}</function>                                   Llama 3.1's own functions
    {"name": "f", "parameters": {"x": 1}}, or a list of such          Llama 3, Mistral, OpenAI
    [f(x=1)]                                                          as BFCL asks for it

A call is right if its name is that of a wanted one and its arguments are the same JSON (1 and 1.0
are one number); the order of several calls says nothing. An answer is right if it holds the wanted
calls and no other; where none is wanted, if it calls nothing. References of BFCL accept several
values of an argument: evals/bfcl.py.

A reference is JSON: the list of wanted calls, {"name", "arguments"} each.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from common.errors import UserError
from dataset.messages import ARGUMENTS
from dataset.records import Record
from evals.answers import Answers
from evals.bfcl import accepts_calls, is_possible_answer
from evals.code_similarity import fenced_code
from evals.json_fields import embedded_json, json_fields, no_constant
from evals.scores import ItemScores
from tokenization.chat_template import to_exact_json

HERMES_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
LLAMA_CALL = re.compile(r"<function=([^<>\s]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
# What stands before calls in JSON: they say that calls follow, even where these can't be read.
CALL_MARKS = ("[TOOL_CALLS]", "<|python_tag|>", "<tool_call>", "<function=")
STANDARD_DECODER = json.JSONDecoder(parse_constant=no_constant)


class Call(NamedTuple):
    """A call of a function."""

    name: str
    arguments: dict


def tools_scores(answers: Answers) -> ItemScores:
    """ItemScores answers by their tool calls: 1 where all and only the wanted calls are there, else 0."""
    right = []
    right_names = []
    right_decisions = []
    num_malformed = 0
    for record, text, references in zip(
        answers.records, answers.texts, answers.references, strict=True
    ):
        calls = read_calls(text)
        num_malformed += calls is None
        accepted = [json.loads(reference) for reference in references]
        right.append(float(any(are_wanted(calls, wanted, record.tools) for wanted in accepted)))
        names = Counter(call.name for call in calls or ())
        wanted_names = [Counter(names_of(wanted)) for wanted in accepted]
        right_names.append(float(calls is not None and names in wanted_names))
        # Text that was meant as a call is one.
        has_called = calls is None or bool(calls)
        right_decisions.append(float(any(has_called == bool(wanted) for wanted in accepted)))
    count = len(answers)
    columns = {
        "right %": 100 * sum(right) / count,
        "names %": 100 * sum(right_names) / count,
        "call or not %": 100 * sum(right_decisions) / count,
        "malformed": float(num_malformed),
        "of": float(count),
    }
    formats = dict.fromkeys(columns, ".1f") | {"malformed": ",.0f", "of": ",.0f"}
    num_bfcl = sum(
        any(is_possible_answer(json.loads(reference)) for reference in references)
        for references in answers.references
    )
    notes = ["right: all wanted calls and no other, in any order, with equal arguments"]
    if num_bfcl:
        note = (
            "right: as BFCL's check of the syntax tree (Python): each wanted call once, every argument"
            " among its possible answers and of its type"
        )
        notes = [note]
    items = {"tools": right, "tool names": right_names, "tool decision": right_decisions}
    return ItemScores(items, columns, formats, notes)


def names_of(wanted: list) -> list[str]:
    """Returns the names of the calls of a reference."""
    if is_possible_answer(wanted):
        return [name for call in wanted for name in call]
    return [call["name"] for call in wanted]


def are_wanted(calls: list[Call] | None, wanted: list, tools: list[dict] | None) -> bool:
    """True if calls are the wanted ones. calls: None if they could not be read. wanted: of a
    reference. tools: of the record, which BFCL's types are from."""
    if calls is None:
        return False
    if is_possible_answer(wanted):
        return accepts_calls(calls, wanted, tools or [])
    expected = [Call(call["name"], call["arguments"]) for call in wanted]
    return comparable(calls) == comparable(expected)


def comparable(calls: list[Call]) -> Counter:
    """Returns calls in a form in which equal ones are equal, whatever their order."""
    return Counter((call.name, frozenset(json_fields(call.arguments))) for call in calls)


# ---- references ----


def tool_questions(records: list[Record]) -> list[Record]:
    """Returns the records as questions about tools, with a reference each, and prints how many are
    left out.

    Of a conversation with calls, the last message that calls is the reference, and what stands before
    it the question. A conversation that has tools and calls none is to be answered without a call.
    Records with neither are left out. Raises UserError if none is left.
    """
    questions = []
    num_left_out = 0
    num_without_call = 0
    for record in records:
        if record.references is not None and is_calls(record.references[0]):
            questions.append(record)
            continue
        messages = record.messages or []
        answers = [i for i, each in enumerate(messages) if each["role"] == "assistant"]
        calling = [i for i in answers if messages[i].get("tool_calls")]
        if not answers or not (calling or record.tools):
            num_left_out += 1
            continue
        last = (calling or answers)[-1]
        num_without_call += not calling
        reference = calls_as_json(messages[last].get("tool_calls") or [])
        questions.append(
            Record(messages[: last + 1], None, record.where, record.tools, references=[reference])
        )
    line = f"          {len(questions):,} questions about tools"
    if num_without_call:
        line += f", {num_without_call:,} to be answered without a call"
    if num_left_out:
        line += f", {num_left_out:,} records without tools left out"
    print(line)
    if not questions:
        raise UserError("tools: no record has tools or a tool call")
    return questions


def is_calls(reference: str) -> bool:
    """True if a reference is a list of calls in JSON, {"name", "arguments"} each or BFCL's."""
    try:
        value = json.loads(reference)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, list):
        return False
    return is_possible_answer(value) or all(is_written_call(each) for each in value)


def is_written_call(value: object) -> bool:
    """True if a value is {"name", "arguments": object}."""
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        return False
    return isinstance(value["name"], str) and isinstance(value["arguments"], dict)


def calls_as_json(tool_calls: list[dict]) -> str:
    """Returns the calls of a message as the JSON of a reference."""
    return to_exact_json([call["function"] for call in tool_calls], ensure_ascii=False)


# ---- the calls in a text ----


def read_calls(text: str) -> list[Call] | None:
    """Returns the calls that a text holds, [] if it holds none; None where it begins calls that
    can't be read."""
    blocks = HERMES_CALL.findall(text)
    named = LLAMA_CALL.findall(text)
    if blocks:
        calls = [call for block in blocks for call in calls_in_json(block)]
        return calls if len(calls) >= len(blocks) else None
    if named:
        calls = []
        for name, arguments in named:
            values = [each for each in embedded_json(arguments, STANDARD_DECODER)]
            if len(values) != 1 or not isinstance(values[0], dict):
                return None
            calls.append(Call(name, values[0]))
        return calls
    calls = list(calls_in_json(text)) or calls_in_python(text)
    if not calls and any(mark in text for mark in CALL_MARKS):
        return None
    return calls


def calls_in_json(text: str) -> Iterator[Call]:
    """Yields the calls that stand in a text as JSON objects, or in lists of them."""
    for value in embedded_json(text, STANDARD_DECODER):
        for each in value if isinstance(value, list) else [value]:
            call = call_of(each)
            if call is not None:
                yield call


def call_of(value: object) -> Call | None:
    """Returns the call that a JSON value is; None if it is none."""
    if not isinstance(value, dict):
        return None
    function = value.get("function")
    if isinstance(function, dict):
        value = function
    name = value.get("name", function if isinstance(function, str) else None)
    keys = [key for key in ARGUMENTS if key in value]
    if not isinstance(name, str) or len(keys) != 1:
        return None
    arguments = value[keys[0]]
    if isinstance(arguments, str) and arguments.strip():
        values = [each for each in embedded_json(arguments, STANDARD_DECODER)]
        arguments = values[0] if len(values) == 1 else arguments
    if arguments is None or arguments == "":
        arguments = {}
    return Call(name, arguments) if isinstance(arguments, dict) else None


def calls_in_python(text: str) -> list[Call]:
    """Returns the calls of a text that is a Python call with literal keyword arguments, or a list of
    them; [] if it is anything else."""
    source = fenced_code(text).strip()
    # What is no call is seen without Python's parser, which a long text keeps busy.
    if not source.startswith("[") and not re.match(r"[\w.]+\(", source):
        return []
    try:
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    calls = []
    for node in tree.elts if isinstance(tree, ast.List) else [tree]:
        if not isinstance(node, ast.Call) or node.args:
            return []
        arguments = {}
        try:
            for keyword in node.keywords:
                arguments[keyword.arg] = literal_as_json(ast.literal_eval(keyword.value))
            name = ast.unparse(node.func)
        except (ValueError, TypeError, RecursionError):
            return []
        if None in arguments:
            return []
        calls.append(Call(name, arguments))
    return calls


def literal_as_json(value: object) -> object:
    """Returns a literal of Python as the value of JSON that it stands for: tuples are lists. Raises
    ValueError for what JSON has not."""
    if isinstance(value, dict):
        return {key: literal_as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [literal_as_json(inner) for inner in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"{type(value).__name__} is no value of JSON")
