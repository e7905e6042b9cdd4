"""Reads a message of any dialect of chat data into one form, and names what is wrong with a
stranger's record.

`read_message` reads the messages of OpenAI (tool calls whose arguments are an object or a string,
content in parts, thoughts, weights) and of ShareGPT. Below it stand the checks that every format
uses: types of fields, unknown keys, text that no tokenizer could encode. What can't be read is a
UserError that names the place and the fault.
"""

import difflib
import json
import re
from collections.abc import Iterable

from common.errors import UserError
from dataset.readers import DECODER, Text

ROLES = ("system", "user", "assistant", "tool")
# The names that other dialects have for these roles.
SAME_ROLE = {
    "human": "user", "prompter": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "bot": "assistant", "model": "assistant", "function_call": "assistant",
    "developer": "system",
    "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool",
}  # fmt: skip
# The keys of a message that are read, or that say nothing about the training, besides those of its
# role and content.
MESSAGE_KEYS = (
    "weight", "name", "tool_call_id", "tool_calls", "function_call", "reasoning_content",
    "thinking", "refusal",
)  # fmt: skip
# Keys that ask for another training than the one that is done here (not of this answer, not of this
# message, only with these tools). To ignore them would be silent damage, so they are refused; but
# null, empty, and weight 1 ask for nothing.
CHANGES_MEANING = {"label", "weight", "tools", "functions", "tool_calls", "function_call"}
CHANGES_MEANING |= {"train", "loss", "masked", "loss_mask", "chosen", "rejected"}
# Objects and lists in each other, in tools and arguments.
MAX_DEPTH = 100
SURROGATE = re.compile(r"[\ud800-\udfff]")


# ---- a message ----


def read_message(message: object, where: str, ignored: dict, source: str) -> tuple[dict, float]:
    """Reads one message of any dialect.

    message: the value in the file.
    where: the place of the message, for errors.
    ignored: names of keys without a meaning here; those of this message are added.
    source: the record's key that holds the messages; ignored keys are named "source.KEY".

    Returns the message as `Record` has it, and its weight. Raises UserError that names the place
    and the fault.
    """
    message = require_object(message, where)
    role_key = "role"
    content_key = "content"
    # ShareGPT.
    if "from" in message and "role" not in message:
        role_key = "from"
        content_key = "value"
    known_keys = (role_key, content_key, *MESSAGE_KEYS)
    note_extra_keys(message, known_keys, where, ignored, f"{source}.")

    role = require_field(message, role_key, str, where)
    content_is_call = role == "function_call"
    role = SAME_ROLE.get(role, role)
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise UserError(f"{where}: role {quote_names([role])} is unknown; known: {known}")

    # The content is a tool call in JSON, or a list of typed parts, or a string. It may be null
    # beside tool calls.
    result = {"role": role}
    calls = message.get("tool_calls") or message.get("function_call")
    thought = message.get("reasoning_content") or message.get("thinking")
    if content_is_call:
        content = require_field(message, content_key, str, where)
        calls = json_in(content, f"{where}: {content_key}")
    elif isinstance(message.get(content_key), list):
        content, calls_in_parts, thoughts_in_parts = read_parts(message[content_key], where)
        if not calls:
            calls = calls_in_parts
        if not thought:
            thought = thoughts_in_parts
        if content or not calls:
            result["content"] = content
    elif message.get(content_key) is not None or not calls:
        result["content"] = require_field(message, content_key, str, where)

    # Tool calls and thoughts, which only the assistant has.
    if (calls or thought) and role != "assistant":
        what = "a tool call" if calls else "a thought"
        raise UserError(f"{where}: {what} of the {role}; only the assistant can have one")
    if thought:
        # As if it were a field of this name, whatever it was called, for the error's sake.
        as_field = {"reasoning_content": thought}
        result["reasoning_content"] = require_field(as_field, "reasoning_content", str, where)
    if calls:
        # Chat templates read it.
        result.setdefault("content", "")
        if not isinstance(calls, list):
            calls = [calls]
        result["tool_calls"] = [read_call(call, where) for call in calls]

    if role == "tool":
        for key in ("name", "tool_call_id"):
            if message.get(key):
                result[key] = require_field(message, key, str, where)
    elif message.get("name") is not None:
        ignored[f"{source}.name"] = True

    weight = weight_of(message, where)
    if role != "assistant" and weight not in (0.0, 1.0):
        raise UserError(
            f"{where}: a weight on a message of the {role}, which is not trained;"
            " put it on an answer"
        )
    return result, weight


def read_parts(parts: list, where: str) -> tuple[str, list, str]:
    """Reads a content that is a list of typed parts.

    Returns its text, its tool calls and its thoughts.
    """
    texts = []
    calls = []
    thoughts = []
    for part in parts:
        part = require_object(part, f"{where}: a part of content")
        kind = part.get("type")
        # The value stands at the key that the type names, or at "text" or "value".
        value = None
        for key in (kind, "text", "value"):
            if isinstance(key, str) and key in part:
                value = part[key]
                break
        if kind == "tool_call":
            if isinstance(value, str):
                value = json_in(value, f"{where}: tool_call")
            calls.append(value)
        elif kind in ("text", "reasoning", "thinking"):
            if not isinstance(value, str):
                fault = f"a {kind} part of content holds {type_name(value)}, a string is wanted"
                raise UserError(f"{where}: {fault}")
            without_surrogate(value, f"{where}: content")
            if kind == "text":
                texts.append(value)
            else:
                thoughts.append(value)
        else:
            name = quote_names([str(kind)])
            raise UserError(
                f"{where}: content holds a part of type {name}; text is what is trained"
            )
    return "".join(texts), calls, "\n".join(thoughts)


def read_call(call: object, where: str) -> dict:
    """Returns {"type": "function", "function": {"name", "arguments": object}}.

    The "id" is in front if there is one.

    call: an object of this form, or only its "function"; arguments may be JSON in a string.
    """
    call = require_object(call, f"{where}: a tool call")
    function = require_object(call.get("function", call), f"{where}: a tool call")
    name = require_field(function, "name", str, f"{where}: a tool call")
    place = f"{where}: arguments of {name[:40]}"
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = json_in(arguments, place)
    elif isinstance(arguments, str):
        arguments = {}
    # A function without parameters; JSON in a string may be null as well.
    if arguments is None:
        arguments = {}
    arguments = require_object(arguments, place)
    without_surrogate(arguments, place)
    result = {}
    if isinstance(call.get("id"), str):
        result["id"] = without_surrogate(call["id"], f"{where}: id")
    return result | {"type": "function", "function": {"name": name, "arguments": arguments}}


def json_in(text: str, what: str) -> object:
    """Returns the value of JSON in a string.

    what: a name of the string, for errors.
    Raises UserError if it is no JSON.
    """
    text_without_space = text.strip()
    try:
        value, end = DECODER.raw_decode(text_without_space)
        if end == len(text_without_space):
            return value
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{what} is no JSON: {text[:60]!r}")


# ---- checks that every format uses ----


def weight_of(record: dict, where: str) -> float:
    """Returns the weight of a record or message: its "weight", by default 1.0.

    Raises UserError if it is no number from 0 to 1,000,000.
    """
    weight = record.get("weight")
    if weight is None or weight == "":
        return 1.0
    number = weight
    # In a CSV everything is a string.
    if isinstance(weight, str):
        try:
            number = float(weight)
        except ValueError:
            number = None
    # A bool is an int, too; NaN is not between any numbers.
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number or not 0 <= number <= 1e6:
        shown = str(weight)[:40]
        raise UserError(f"{where}: weight is {shown}, a number from 0 to 1,000,000 is wanted")
    return float(number)


def require_object(value: object, where: str) -> dict:
    """Returns the value. Raises UserError if it is no object."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: is {type_name(value)}, an object is wanted")
    return value


def require_field(record: dict, key: str, kind: type, where: str):
    """Returns record[key].

    Raises UserError if it is missing, not of type `kind`, or a string with a surrogate.
    """
    if key not in record:
        raise UserError(f"{where}: no {key}, found {quote_names(record)}")
    value = record[key]
    if not isinstance(value, kind):
        raise UserError(f"{where}: {key} is {type_name(value)}, {TYPE_NAMES[kind]} is wanted")
    if kind is str:
        return without_surrogate(value, f"{where}: {key}")
    return value


def without_surrogate(value, what: str):
    """Returns the value, a string or any JSON. Raises UserError if there is a surrogate in it.

    JSON can spell half of a UTF-16 surrogate pair, which is no character: no tokenizer could encode
    it.
    """
    text = value
    if not isinstance(value, str):
        try:
            check_depth(value, what)
            text = json.dumps(value, ensure_ascii=False)
        except TypeError as error:
            # Parquet has types that JSON has not.
            raise UserError(f"{what}: {error}") from None
    # Most texts are, and this is faster than the search.
    if text.isascii():
        return value
    half = SURROGATE.search(text)
    if half:
        number = half.start() + 1  # counted from 1
        raise UserError(
            f"{what} holds a lone surrogate {half[0]!a} at character {number}; correct it"
        )
    return value


def check_depth(value: object, what: str) -> None:
    """Raises UserError if more than MAX_DEPTH objects and lists are nested in each other."""
    # Layer after layer and not by recursion, which a value that is too deep would end.
    layer = [value]
    depth = 0
    while layer:
        if depth > MAX_DEPTH:
            raise UserError(f"{what}: nested over {MAX_DEPTH} deep")
        next_layer = []
        for each in layer:
            if isinstance(each, dict):
                next_layer.extend(each.values())
            elif isinstance(each, list):
                next_layer.extend(each)
        layer = next_layer
        depth += 1


def note_extra_keys(
    record: dict, known: tuple[str, ...], where: str, ignored: dict, prefix: str = ""
) -> None:
    """Adds the keys of a record that are not in `known` to `ignored`, each with the prefix.

    Raises UserError for a key that changes what is trained, and for one that looks like a known key
    mistyped.
    """
    for key, value in record.items():
        if key in known:
            continue
        if key in CHANGES_MEANING:
            asks_for_nothing = value in (None, "", "[]", [], {}) or (key, value) == ("weight", 1)
            if not asks_for_nothing:
                raise UserError(
                    f"{where}: key {key!r} changes what is trained, and is not supported here;"
                    " remove it to train without"
                )
        name = prefix + SURROGATE.sub("\ufffd", str(key))
        if name not in ignored:
            hint = closest_key([key], known, record)
            if hint:
                raise UserError(f"{where}: unknown key {quote_names([key])}{hint}")
            # A dict serves as an ordered set.
            ignored[name] = True


def closest_key(keys: Iterable[str], expected: Iterable[str], record: dict) -> str:
    """Returns the end of an error message about a mistyped key, or "".

    A key is mistyped if it is nearly an expected key that the record lacks.
    """
    missing = [key for key in expected if key not in record]
    for key in list(keys)[:50]:
        # 0.8 passes a slip of one letter in five. At difflib's default of 0.6 "context" would be
        # taken for "text".
        name = str(key).lower()
        matches = difflib.get_close_matches(name, missing, n=1, cutoff=0.8)
        if matches:
            return f"; {quote_names([key])} looks like {matches[0]!r} mistyped"
    return ""


# ---- words for what a stranger's file holds ----

TYPE_NAMES = {
    str: "a string",
    list: "a list",
    dict: "an object",
    bool: "a boolean",
    type(None): "null",
    bytes: "bytes",
}
TYPE_NAMES |= {Text: "plain text", int: "a number", float: "a number"}


def type_name(value: object) -> str:
    """Returns the name of a value's type with its article, as JSON calls it: "a string"."""
    return TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def quote_names(names: Iterable[str]) -> str:
    """Returns the first eight of some keys or roles on one line.

    Each is quoted, escaped and cut to 40 characters: they are a stranger's, and may be anything.
    """
    names = list(names)
    if not names:
        return "none"
    listed = ", ".join(repr(str(name)[:40]) for name in names[:8])
    num_more = len(names) - 8
    if num_more > 0:
        listed += f" and {num_more:,} more"
    return listed
