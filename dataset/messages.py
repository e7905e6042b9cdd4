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
    "bot": "assistant", "ai": "assistant", "model": "assistant", "function_call": "assistant",
    "developer": "system",
    "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool",
}  # fmt: skip
# The names that servers and data sets have for what the assistant thought before it answered.
THOUGHTS = (
    "reasoning_content", "reasoning", "thinking", "thought", "thoughts", "think", "reasoning_text",
    "thinking_content", "reasoning_details", "thinking_blocks", "chain_of_thought", "cot",
    "reasoningContent", "reasoningText", "thinkingContent", "reasoning_trace", "reasoning_traces",
    "reasoning_process", "thinking_process", "thought_process", "thinking_text", "thinking_trace",
    "internal_monologue", "inner_monologue", "inner_thoughts", "scratchpad", "Complex_CoT",
)  # fmt: skip
# The names that a tool call's arguments have: OpenAI's, Llama's, LangChain's.
ARGUMENTS = ("arguments", "parameters", "args")
# The keys of a message that are read, besides those of its role and content, of its thoughts and its
# switches. A key that nearly has one of these names is taken for a slip.
MESSAGE_KEYS = (
    "weight", "name", "tool_call_id", "tool_calls", "function_call", "reasoning_content", "refusal",
)  # fmt: skip

# Switches of a message, by their names in lower case without "_" and "-", with what they mean when
# they are on: True if the message is trained then, False if it is not.
SWITCHES = {
    "train": True, "trained": True, "training": True, "trainable": True, "istrainable": True,
    "istrained": True, "totrain": True, "dotrain": True, "shouldtrain": True, "trainon": True,
    "trainonturn": True, "trainonthis": True, "trainthis": True, "trainturn": True, "learn": True,
    "learnable": True, "loss": True, "hasloss": True, "useloss": True, "withloss": True,
    "computeloss": True, "calculateloss": True, "calcloss": True, "lossmask": True,
    "steplossmask": True, "supervised": True, "supervise": True, "trainmask": True,
    "istarget": True, "losson": True, "computegradient": True,
    "masked": False, "ismasked": False, "maskloss": False, "lossmasked": False, "ignore": False,
    "ignored": False, "ignoreloss": False, "noloss": False, "notrain": False, "notrained": False,
    "donttrain": False, "donottrain": False, "skip": False, "skiptrain": False, "skiptraining": False,
    "skiploss": False, "exclude": False, "excluded": False, "excludefromloss": False,
    "excludefromtraining": False, "untrained": False, "nottrained": False, "nottrainable": False,
}  # fmt: skip
# Numbers by which the loss of a message is multiplied, in the spelling of SWITCHES.
LOSS_FACTORS = (
    "lossweight", "lossweights", "lossscale", "lossfactor", "lossmultiplier", "trainweight",
    "trainingweight", "sampleweight", "learningweight",
)  # fmt: skip
# Words in the names of switches that no table can list. Such a key is refused if it is on or off.
ABOUT_TRAINING = re.compile("train|loss|learn|mask|grad|supervis|target|completion|context")
# Some tools mask what is trained, others what is not, and character ranges mean a part of a message.
UNCLEAR_SWITCHES = ("mask", "trainingdetail", "traindetail", "trainingdetails", "lossmaskdetail")
# Keys of a message that are true or false and say nothing about its training.
HARMLESS_SWITCHES = {
    "redacted", "toxic", "synthetic", "edited", "flagged", "iserror", "error", "endturn",
    "isuser", "ishuman", "isbot", "issystem", "streaming", "stream", "cached", "markdown",
}  # fmt: skip
# Types of parts whose text is trained: OpenAI's, and those of its newer interface.
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
ON = {"1", "true", "yes", "on"}
OFF = {"0", "false", "no", "off"}

# Keys that ask for another training than the one that is done here (not of this answer, not of this
# message, only with these tools). To ignore them would be silent damage, so they are refused; but
# null, empty, and weight 1 ask for nothing.
CHANGES_MEANING = {"label", "weight", "tools", "functions", "tool_calls", "function_call"}
CHANGES_MEANING |= {"chosen", "rejected", "assistant_mask", "assistant_masks", "completion_mask"}
# Switches that mean as much for a whole record; "ignore" and "skip" are names of other things there.
RECORD_SWITCHES = {"train", "trainable", "masked", "loss", "loss_mask", "no_train", "do_not_train"}
RECORD_SWITCHES |= {"dont_train", "do_train", "to_train", "should_train", "is_trainable"}
RECORD_SWITCHES |= {"exclude_from_training", "exclude_from_loss", "skip_training", "is_trained"}

# Keys of a record or a message that hold what a text model can't see, and types of such parts.
MEDIA = {
    "image": "an image", "images": "an image", "image_url": "an image", "image_urls": "an image",
    "image_path": "an image", "image_paths": "an image", "image_file": "an image",
    "input_image": "an image", "img": "an image", "pixel_values": "an image",
    "image_files": "an image", "image_filename": "an image", "image_name": "an image",
    "image_names": "an image", "image_data": "an image", "image_base64": "an image",
    "image_bytes": "an image", "img_path": "an image", "img_url": "an image", "imgs": "an image",
    "picture": "an image", "pictures": "an image", "photo": "an image", "photos": "an image",
    "screenshot": "an image", "screenshots": "an image",
    "video": "a video", "videos": "a video", "video_url": "a video", "video_path": "a video",
    "input_video": "a video", "video_file": "a video", "video_files": "a video",
    "audio": "a sound", "audios": "a sound", "audio_url": "a sound", "audio_path": "a sound",
    "input_audio": "a sound", "audio_file": "a sound", "audio_files": "a sound",
    "audio_paths": "a sound", "wav": "a sound", "wav_path": "a sound", "speech": "a sound",
    "file": "a file", "input_file": "a file", "document": "a file",
}  # fmt: skip
# Of these, the keys of a record that are no column of text in any format.
MEDIA_KEYS = frozenset(MEDIA) - {"file", "input_file", "document", "speech"}
# Objects and lists in each other, in tools and arguments.
MAX_DEPTH = 100
# Names of columns that hold what an answer rests on, or another talk than the one that is read.
FACT_NAMES = frozenset(
    "text texts context contexts passage passages document documents doc paragraph paragraphs"
    " background evidence fact facts article source_text knowledge support story transcript abstract"
    " excerpt content body input question prompt instruction query answer response completion output"
    " history".split()
)
# Characters of the shortest words in such a column, and of those in a column of any other name.
SHORTEST_FACT = 20
LONG_TEXT = 200
SURROGATE = re.compile(r"[\ud800-\udfff]")


class LeftOut(Exception):
    """A record that is left out and counted, because a text model can't learn from it. The message
    is the reason, as it stands behind a count: "with an image"."""


class WrittenObject(dict):
    """An object that stood in the file as JSON in a string, so that its nulls are the writer's."""


# ---- a message ----


def read_message(message: object, where: str, stats, source: str) -> tuple[dict, float]:
    """Reads one message of any dialect.

    message: the value in the file.
    where: the place of the message, for errors.
    stats: the `ReadStats` to which keys without a meaning here are added, and what this message
        asks for in vain.
    source: the record's key that holds the messages; ignored keys are named "source.KEY".

    Returns the message as `Record` has it, and its weight. Raises UserError that names the place
    and the fault, and LeftOut if the message holds what is no text.
    """
    message = require_object(message, where)
    role_key = "role"
    content_key = "content"
    # ShareGPT.
    if "from" in message and "role" not in message:
        role_key = "from"
        content_key = "value"
    loss_factor = 1.0
    asks_to_be_trained = False
    thought = ""
    # Most messages have no other keys than these two, and the work for others is saved.
    is_plain = len(message) == 2 and role_key in message and content_key in message
    if not is_plain:
        known_keys = (role_key, content_key, *MESSAGE_KEYS)
        extra_keys = [key for key in message if key not in known_keys and key not in THOUGHTS]
        if extra_keys:
            leave_out_media(message)
            loss_factor, asks_to_be_trained, switches = read_switches(message, extra_keys, where)
            present_thoughts = [key for key in THOUGHTS if key in message]
            known_keys = (*known_keys, *switches, *present_thoughts)
            note_extra_keys(message, known_keys, where, stats.ignored, f"{source}.")
        thought = read_thought(message, where)

    role = require_field(message, role_key, str, where)
    content_is_call = role == "function_call"
    written_role = role
    role = SAME_ROLE.get(role.lower(), role.lower())
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise UserError(f"{where}: role {quote_names([written_role])} is unknown; known: {known}")
    if asks_to_be_trained and role != "assistant":
        answer = "--train-on all-turns does" if role == "user" else "which it is not"
        stats.altered[f"messages of the {role} that ask to be trained ({answer})"] += 1

    # The content is a tool call in JSON, or a list of typed parts, or a string. It may be null
    # beside tool calls or a refusal.
    result = {"role": role}
    calls = message.get("tool_calls") or message.get("function_call")
    refusal = message.get("refusal")
    value = message.get(content_key)
    if content_is_call:
        content = require_field(message, content_key, str, where)
        calls = json_in(content, f"{where}: {content_key}")
    elif isinstance(value, list):
        content, calls_in_parts, thoughts_in_parts = read_parts(value, where)
        if not calls:
            calls = calls_in_parts
        if not thought:
            thought = thoughts_in_parts
        if content or not calls:
            result["content"] = content
    elif value is not None or not (calls or refusal):
        result["content"] = require_field(message, content_key, str, where)
    if refusal:
        result["content"] = read_refusal(message, result.get("content"), where)

    # Tool calls, thoughts and refusals, which only the assistant has.
    if (calls or thought or refusal) and role != "assistant":
        what = "a tool call" if calls else "a thought" if thought else "a refusal"
        raise UserError(f"{where}: {what} of the {role}; only the assistant can have one")
    if thought:
        result["reasoning_content"] = thought
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
        stats.ignored[f"{source}.name"] = True

    weight = weight_of(message, where) * loss_factor
    if role != "assistant" and weight not in (0.0, 1.0):
        raise UserError(
            f"{where}: a weight on a message of the {role}, which is not trained;"
            " put it on an answer"
        )
    return result, weight


def read_thought(message: dict, where: str) -> str:
    """Returns what the assistant thought before its answer, "" if nothing: a string, or else typed
    parts, under one of the names in THOUGHTS.

    Raises UserError if two names hold different strings, or if no part has a text.
    """
    thoughts = {}
    parts = {}
    for key in THOUGHTS:
        value = message.get(key)
        if isinstance(value, list) and value:
            parts[key] = value
        elif value:
            thoughts[key] = require_field(message, key, str, where)
    # Some servers give the same thought under two names, and once more in parts.
    if len(set(thoughts.values())) > 1:
        names = " and ".join(thoughts)
        raise UserError(f"{where}: {names} hold different thoughts; leave one out")
    for thought in thoughts.values():
        return thought
    for key, value in parts.items():
        texts = [text_of_thought(part, f"{where}: {key}") for part in value]
        thought = "\n".join(text for text in texts if text)
        if not thought:
            raise UserError(f"{where}: {key} has no part with a text; leave it out")
        return thought
    return ""


def text_of_thought(part: object, where: str) -> str:
    """Returns the text of a part of a thought, as OpenRouter's reasoning_details have it; "" for one
    without, as an encrypted part."""
    if isinstance(part, str):
        return without_surrogate(part, where)
    part = require_object(part, f"{where}: a part")
    for key in ("text", "thinking", "summary", "content"):
        if isinstance(part.get(key), str):
            return without_surrogate(part[key], where)
    return ""


def read_refusal(message: dict, content: str | None, where: str) -> str:
    """Returns the text with which the assistant refuses, which is its answer (OpenAI).

    content: what else it says. Raises UserError if both say something, since one would be lost.
    """
    refusal = require_field(message, "refusal", str, where)
    if content and content.strip() and content != refusal:
        raise UserError(
            f"{where}: content and refusal both hold an answer, and only one can be trained;"
            " leave one out"
        )
    return refusal


def read_switches(message: dict, keys: list[str], where: str) -> tuple[float, bool, list[str]]:
    """Returns what the switches of a message multiply its loss with (0 for one that is not to be
    trained), whether one asks for it to be trained, and the keys that were such switches.

    keys: those of the message that are not known otherwise.
    Raises UserError for a switch whose meaning or value is not clear, or two that contradict.
    """
    factor = 1.0
    found: dict[str, bool] = {}  # True if the switch asks for the message to be trained
    read_keys = []
    for key in keys:
        value = message[key]
        name = str(key).lower().replace("_", "").replace("-", "")
        if name in LOSS_FACTORS:
            factor *= weight_of({"weight": value}, where, key)
            read_keys.append(key)
        elif name in SWITCHES:
            read_keys.append(key)
            if value is not None and value != "":
                found[key] = is_on(value, f"{where}: {key}") == SWITCHES[name]
        elif value is None or name in HARMLESS_SWITCHES:
            continue
        elif name in UNCLEAR_SWITCHES or isinstance(value, bool) or is_unlisted(name, value):
            raise UserError(
                f"{where}: {quote_names([key])} may say what is trained, and its meaning is not"
                ' known; write "weight": 0 on a message that is not to be trained, or take the key out'
            )
    if len(set(found.values())) > 1:
        raise UserError(f"{where}: {quote_names(found)} contradict each other; leave one out")
    if False in found.values():
        factor = 0.0
    return factor, True in found.values(), read_keys


def is_unlisted(name: str, value: object) -> bool:
    """True if a key of a message is a switch of training by its name, and on or off, as 0 or "false".

    name: of the key, in the spelling of SWITCHES.
    """
    is_switch = isinstance(value, (int, float, str)) and str(value).lower() in ON | OFF
    return is_switch and ABOUT_TRAINING.search(name) is not None


def leave_out_masked(record: dict, where: str) -> None:
    """Raises LeftOut if a record's own switch says that it is not to be trained, UserError if the
    switch has another value than true or false."""
    # NeMo's key names the speaker that is not trained. Here only answers are.
    mask = record.get("mask") if "conversations" in record else None
    if mask and str(mask).lower() not in ("user", "human"):
        raise UserError(
            f'{where}: mask is {str(mask)[:40]}, and "User" is what can be masked here;'
            ' write "weight": 0 on messages that are not to be trained'
        )
    for key in RECORD_SWITCHES.intersection(record):
        value = record[key]
        if value is None or value == "":
            continue
        name = key.replace("_", "")
        if is_on(value, f"{where}: {key}") != SWITCHES[name]:
            raise LeftOut(f"with {key!r} saying that they are not to be trained")


def is_on(value: object, what: str) -> bool:
    """Returns the meaning of a switch: true or false, 1 or 0, or such a word. Raises UserError if it
    is none. what: its name, for errors."""
    word = str(value).lower()
    if isinstance(value, float) and value in (0.0, 1.0):
        word = str(int(value))
    if isinstance(value, (bool, int, float, str)) and word in ON | OFF:
        return word in ON
    shown = word[:40] if isinstance(value, (int, float, str)) else type_name(value)
    raise UserError(f"{what} is {shown}, true or false is wanted")


def leave_out_media(record: dict) -> None:
    """Raises LeftOut if a key of a record or a message holds an image, a video or a sound."""
    for key in MEDIA_KEYS.intersection(record):
        value = record[key]
        # Arrow's images without an image are objects of nulls.
        if isinstance(value, dict):
            value = any(each is not None for each in value.values())
        if isinstance(value, list):
            value = any(each is not None for each in value)
        if value:
            raise LeftOut(f"with {MEDIA[key]}, which a text model can't see")


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
        if isinstance(kind, str) and kind in MEDIA:
            raise LeftOut(f"with {MEDIA[kind]}, which a text model can't see")
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
        elif kind in TEXT_PARTS or kind in THOUGHTS:
            if not isinstance(value, str):
                fault = f"a {kind} part of content holds {type_name(value)}, a string is wanted"
                raise UserError(f"{where}: {fault}")
            without_surrogate(value, f"{where}: content")
            if kind in TEXT_PARTS:
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
    # Arrow fills "function" in with null where a call has its name and arguments itself.
    function = call if call.get("function") is None else call["function"]
    function = require_object(function, f"{where}: a tool call")
    name = require_field(function, "name", str, f"{where}: a tool call")
    place = f"{where}: arguments of {name[:40]}"
    keys = [key for key in ARGUMENTS if function.get(key) is not None]
    if len(keys) > 1:
        raise UserError(f"{place}: stand under {quote_names(keys)}; leave one out")
    arguments = function[keys[0]] if keys else None
    if isinstance(arguments, str) and arguments.strip():
        arguments = json_in(arguments, place)
        if isinstance(arguments, dict):
            arguments = WrittenObject(arguments)
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


def weight_of(record: dict, where: str, name: str = "weight") -> float:
    """Returns the weight of a record or message: its "weight", by default 1.0.

    name: what it is called in errors.
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
        raise UserError(f"{where}: {name} is {shown}, a number from 0 to 1,000,000 is wanted")
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
    text = value if isinstance(value, str) else json_text(value, what)
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


def json_text(value: object, what: str) -> str:
    """Returns a value as JSON. Raises UserError if JSON can't hold it, or if it is nested too
    deep."""
    check_depth(value, what)
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        # Parquet has types that JSON has not.
        raise UserError(f"{what}: {error}") from None
    except ValueError:
        raise UserError(
            f"{what} holds a number that JSON can't hold (NaN, Infinity, or one as large as 1e999);"
            " write it as a string"
        ) from None


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
    record: dict,
    known: tuple[str, ...],
    where: str,
    ignored: dict,
    prefix: str = "",
    facts: dict | None = None,
) -> None:
    """Adds the keys of a record that are not in `known` to `ignored`, each with the prefix, and of
    these to `facts` the ones on whose words an answer may rest.

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
            # The first record that has the key shows what it holds.
            if facts is not None and holds_facts(key, value, record, known):
                facts[name] = True


def holds_facts(key: str, value: object, record: dict, known: tuple[str, ...]) -> bool:
    """True if a key that is not read holds words on which an answer may rest: long ones, or those of
    a key with such a name.

    known: the keys that are read. Words that they hold too, or that hold all of theirs, as a prompt
    that was rendered from them, say nothing new.
    """
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        return False
    words = value.strip()
    least = SHORTEST_FACT if str(key).lower() in FACT_NAMES else LONG_TEXT
    if len(words) < least:
        return False
    texts = []
    for name in known:
        each = record.get(name)
        for part in each if isinstance(each, list) else [each]:
            if isinstance(part, dict):
                part = part.get("content", part.get("value"))
            if isinstance(part, str) and part.strip():
                texts.append(part.strip())
    is_rendered = bool(texts) and all(text in words for text in texts)
    return not is_rendered and not any(words in text for text in texts)


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
TYPE_NAMES |= {WrittenObject: "an object", Text: "plain text", int: "a number", float: "a number"}


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
