"""A message in any dialect of chat data, read into one; and the words for what else a stranger's record holds.

`read_message` takes OpenAI's messages (tool calls with arguments as object or string, content in parts, thoughts,
weights) and ShareGPT's turns. Everything that can't be read is a UserError that names the place and the fault.
"""

import difflib
import json
import re
from collections.abc import Iterable

from common.errors import UserError
from dataset.readers import DECODER, Text

ROLES = ("system", "user", "assistant", "tool")
SAME_ROLE = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "bot": "assistant", "model": "assistant", "function_call": "assistant", "developer": "system",
    "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool",
}  # fmt: skip
# Keys that say to train something else than what is read here (not this answer, not this turn, only with these tools):
# to ignore them would be silent damage. Null, empty, and weight 1 say nothing.
CHANGES_MEANING = {"label", "weight", "tools", "functions", "tool_calls", "function_call"}
CHANGES_MEANING |= {"train", "loss", "masked", "loss_mask", "chosen", "rejected"}


# ---- a message, in any dialect ----


def read_message(message: object, where: str, ignored: dict, source: str) -> tuple[dict, float]:
    """A message as `Record` has it, and its weight."""
    message = require_object(message, where)
    said, names = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    calls = message.get("tool_calls") or message.get("function_call")
    known = (said, names, *MESSAGE_KEYS)
    note_extra_keys(message, known, where, ignored, f"{source}.")
    role = require_field(message, said, str, where)
    is_call = role == "function_call"
    role = SAME_ROLE.get(role, role)
    if role not in ROLES:
        raise UserError(f"{where}: role {quote_names([role])} is unknown; known: {', '.join(ROLES)}")
    turn, thought = {"role": role}, message.get("reasoning_content") or message.get("thinking")
    if is_call:
        calls = json_in(require_field(message, names, str, where), f"{where}: {names}")
    elif isinstance(message.get(names), list):
        content, called, thoughts = read_parts(message[names], where)
        calls, thought = calls or called, thought or thoughts
        if content or not calls:
            turn["content"] = content
    elif message.get(names) is not None or not calls:
        turn["content"] = require_field(message, names, str, where)
    if calls or thought:
        if role != "assistant":
            raise UserError(f"{where}: {'a tool call' if calls else 'a thought'} of the {role}; only assistants have")
        if thought:
            turn["reasoning_content"] = require_field({"reasoning_content": thought}, "reasoning_content", str, where)
        if calls:
            turn.setdefault("content", "")  # templates ask for it
            calls = calls if isinstance(calls, list) else [calls]
            turn["tool_calls"] = [read_call(call, where) for call in calls]
    if role == "tool":
        turn |= {key: require_field(message, key, str, where) for key in ("name", "tool_call_id") if message.get(key)}
    elif message.get("name") is not None:
        ignored[f"{source}.name"] = True
    weight = weight_of(message, where)
    if role != "assistant" and weight not in (0.0, 1.0):
        raise UserError(f"{where}: a weight on a turn of the {role}, which is not trained; put it on an answer")
    return turn, weight


MESSAGE_KEYS = (
    "weight", "name", "tool_call_id", "tool_calls", "function_call", "reasoning_content", "thinking", "refusal",
)  # fmt: skip


def read_parts(parts: list, where: str) -> tuple[str, list, str]:
    """Content in typed parts: its text, its tool calls, its thoughts."""
    text, calls, thoughts = [], [], []
    for part in parts:
        kind = require_object(part, f"{where}: a part of content").get("type")
        value = next((part[key] for key in (kind, "text", "value") if isinstance(key, str) and key in part), None)
        if kind == "tool_call":
            calls.append(json_in(value, f"{where}: tool_call") if isinstance(value, str) else value)
        elif kind in ("text", "reasoning", "thinking"):
            if not isinstance(value, str):
                raise UserError(f"{where}: a {kind} part of content holds {type_name(value)}, a string is wanted")
            (text if kind == "text" else thoughts).append(without_surrogate(value, f"{where}: content"))
        else:
            raise UserError(
                f"{where}: content holds a part of type {quote_names([str(kind)])}; text is what is trained"
            )
    return "".join(text), calls, "\n".join(thoughts)


def read_call(call: object, where: str) -> dict:
    """{"type": "function", "function": {"name", "arguments": object}}, and the id where there is one."""
    call = require_object(call, f"{where}: a tool call")
    function = require_object(call.get("function", call), f"{where}: a tool call")
    name, arguments = require_field(function, "name", str, f"{where}: a tool call"), function.get("arguments")
    if isinstance(arguments, str):
        arguments = json_in(arguments, f"{where}: arguments of {name[:40]}") if arguments.strip() else {}
    arguments = require_object({} if arguments is None else arguments, f"{where}: arguments of {name[:40]}")
    plain = {"type": "function", "function": {"name": name, "arguments": arguments}}
    without_surrogate(arguments, f"{where}: arguments of {name[:40]}")
    return ({"id": without_surrogate(call["id"], f"{where}: id")} if isinstance(call.get("id"), str) else {}) | plain


def json_in(text: str, what: str) -> object:
    """The value of JSON that stands in a string."""
    try:
        value, end = DECODER.raw_decode(text.strip())
        if end == len(text.strip()):
            return value
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{what} is no JSON: {text[:60]!r}")


# ---- what every format must satisfy ----


def weight_of(record: dict, where: str) -> float:
    weight = record.get("weight")
    if weight is None or weight == "":
        return 1.0
    with_number = weight
    if isinstance(weight, str):  # of a CSV
        try:
            with_number = float(weight)
        except ValueError:
            with_number = None
    if isinstance(with_number, bool) or not isinstance(with_number, (int, float)) or not 0 <= with_number <= 1e6:
        raise UserError(f"{where}: weight is {str(weight)[:40]}, a number from 0 to 1,000,000 is wanted")
    return float(with_number)


def require_object(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{where}: is {type_name(value)}, an object is wanted")
    return value


def require_field(record: dict, key: str, kind: type, where: str):
    """record[key], which must be there and of that type."""
    if key not in record:
        raise UserError(f"{where}: no {key}, found {quote_names(record)}")
    value = record[key]
    if not isinstance(value, kind):
        raise UserError(f"{where}: {key} is {type_name(value)}, {KINDS[kind]} is wanted")
    return without_surrogate(value, f"{where}: {key}") if kind is str else value


def without_surrogate(value, what: str):
    """The value. JSON can spell half of a UTF-16 pair, which is no character: no tokenizer could encode it."""
    text = value
    if not isinstance(value, str):
        try:
            check_depth(value, what)
            text = json.dumps(value, ensure_ascii=False)
        except TypeError as error:  # of Parquet
            raise UserError(f"{what}: {error}, as JSON has it") from None
    if not text.isascii() and (half := SURROGATE.search(text)):
        raise UserError(f"{what} holds a lone surrogate {half[0]!a} at character {half.start() + 1}; mend it")
    return value


def check_depth(value: object, what: str) -> None:
    layer, depth = [value], 0
    while layer:
        if depth > DEEPEST:
            raise UserError(f"{what}: nested over {DEEPEST} deep")
        inside = [each.values() if isinstance(each, dict) else each for each in layer if isinstance(each, (dict, list))]
        layer, depth = [each for part in inside for each in part], depth + 1


DEEPEST = 100  # of tools and arguments


def note_extra_keys(record: dict, known: tuple[str, ...], where: str, ignored: dict, prefix: str = "") -> None:
    """Adds keys beside the known ones to `ignored`; refuses one that is a known key mistyped, or changes meaning."""
    for key, value in record.items():
        if key in known:
            continue
        if key in CHANGES_MEANING and value not in (None, "", "[]", [], {}) and (key, value) != ("weight", 1):
            raise UserError(f"{where}: key {key!r} changes what is learnt and has no meaning here; remove it"
                            " to train without")  # fmt: skip
        name = prefix + SURROGATE.sub("\ufffd", str(key))
        if name not in ignored:
            if hint := closest_key([key], known, record):
                raise UserError(f"{where}: unknown key {quote_names([key])}{hint}")
            ignored[name] = True  # a dict as an ordered set


def closest_key(keys: Iterable[str], wanted: Iterable[str], record: dict) -> str:
    """The end of an error message, where one of the keys is nearly a wanted key that the record lacks; else empty."""
    missing = [key for key in wanted if key not in record]
    for key in list(keys)[:50]:
        # 0.8 passes a slip of one letter in five; at difflib's own 0.6 "context" would be "text".
        if near := difflib.get_close_matches(str(key).lower(), missing, n=1, cutoff=0.8):
            return f"; {quote_names([key])} looks like {near[0]!r} mistyped"
    return ""


SURROGATE = re.compile(r"[\ud800-\udfff]")

# ---- words for what a stranger's file holds ----

KINDS = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", type(None): "null", bytes: "bytes"}
KINDS |= {Text: "plain text", int: "a number", float: "a number"}


def type_name(value: object) -> str:
    return KINDS.get(type(value), f"a {type(value).__name__}")


def quote_names(names: Iterable[str]) -> str:
    """Keys or roles on one line: quoted, escaped, cut to 40 characters, the first eight."""
    names = list(names)
    listed = ", ".join(repr(str(name)[:40]) for name in names[:8]) or "none"
    return listed + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")
