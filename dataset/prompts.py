"""Reads files for what they ask: the prompts of `generate.py --data`, where no answer need be there.

Every format of training is read (formats.py), and what is asked is what stands before the last
answer, which is the reference. Besides, files that hold prompts alone:

    messages        {"messages": [..., {"role": "user", ...}]}, which end with a question
    one column      {"prompt"}, {"question"}, {"instruction"} with "input", ...: ASKING, GIVEN
    lines           a .txt file with a prompt a line
    BFCL            {"id", "question": [[messages]], "function": [schemas]}

    open_prompts(path)            recognizes a file, as open_source does
    read_prompts(source, ...)     its prompts
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from common.errors import UserError
from dataset.folders import TEST, Fetched
from dataset.formats import FORMATS, Map, Source, open_source
from dataset.messages import CHANGES_MEANING, require_field
from dataset.readers import Container, Text, suffix_of
from dataset.records import Format, Reading, ReadStats, Record

# Columns that hold a prompt where no column of an answer stands beside them. The first one counts.
ASKING = ("prompt", "question", "query", "instruction", "problem")
# The same, unless there is a "text": beside one, they say where it is from.
GIVEN = ("input", "document", "dialogue", "article", "source")
# What such a record may have besides, by the names of other formats. "context" stands before a
# question, "input" and "context" behind an instruction.
BESIDE = ("system", "history", "tools", "functions", "context", "input")
# BFCL's names of types, in those of JSON Schema.
BFCL_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}


@dataclass(slots=True)
class Prompt:
    """What a record asks.

    record: it.
    place: where it stands, from the file's own name on, as in "held_out.jsonl line 3".
    messages: the conversation that an answer is wanted to; None where a text is to be continued.
    text: that text, else None.
    reference: the assistant's message that the record has as its answer, or None.
    """

    record: Record
    place: str
    messages: list[dict] | None
    text: str | None
    reference: dict | None


def open_prompts(
    path: Path | str | Fetched, map_fn: Map | None = None, skip_bad: bool = False
) -> Source:
    """Recognizes a file or folder of prompts. Of data with parts of their own, the part for tests
    is read, as evaluate.py does.

    map_fn: the user's function that every record goes through first.
    skip_bad: leave out records that can't be read.
    Raises UserError as open_source does, and for Markdown, which is one text and not lines.
    """
    source = open_source(
        path, map_fn=map_fn, part=TEST, skip_bad=skip_bad, prompt_formats=PROMPT_FORMATS
    )
    if source.format is not LINES:
        return source
    for i, container in enumerate(source.containers):
        if suffix_of(Path(container.path)) == ".md":
            raise UserError(
                f"{container.path}: Markdown is one text; pipe it into generate.py, or give a .txt"
                " with a prompt a line"
            )
        # For messages: their numbers are those of lines.
        source.containers[i] = replace(container, unit="line")
    return source


def read_prompts(
    source: Source,
    is_complete: bool = False,
    system: str | None = None,
    limit: int | None = None,
    print_fn: Callable[[str], None] = print,
) -> list[Prompt]:
    """Reads the first `limit` prompts (None: all), and prints what was read.

    is_complete: the prompts are texts to be continued, and not messages of a user.
    system: a system message for conversations that have none.
    print_fn: is called with each line.

    Raises UserError that names a record in which nothing is asked, or if there is none at all.
    """
    stats = ReadStats()
    counts: Counter[str] = Counter()
    prompts = []
    folder = Path(source.path)
    if not folder.is_dir():
        folder = folder.parent
    for record in islice(source.records(stats), limit):
        place = record.where.removeprefix(f"{folder}/")
        prompt = split_prompt(record, place, is_complete, counts)
        if system and prompt.messages is not None:
            if prompt.messages[0]["role"] == "system":
                counts["that have a system message of their own, and not --system"] += 1
            else:
                prompt.messages.insert(0, {"role": "system", "content": system})
        prompts.append(prompt)
    # Those of the records before the last one that was asked for.
    source.complain_of_faults(stats)
    print_fn(f"data      {source.summary(stats)}")
    num_references = sum(prompt.reference is not None for prompt in prompts)
    said = "text" if is_complete else "prompt"
    if len(prompts) != 1:
        said += "s"
    if is_complete:
        said += " to continue"
    line = f"          {len(prompts):,} {said}, {num_references:,} with a reference answer"
    for what, count in counts.items():
        line += f", {count:,} {what}"
    print_fn(line)
    return prompts


def split_prompt(record: Record, place: str, is_complete: bool, counts: Counter[str]) -> Prompt:
    """Splits a record into what it asks and its last answer, the reference.

    Of a preference, what is asked stands before both answers, and the chosen one is the reference.
    A bad answer (KTO's label false) is none.

    place: as in Prompt. is_complete: as for read_prompts. counts: counts what a user should know.
    Raises UserError where nothing is asked, or where the record is a text but no text is wanted, or
    the other way round.
    """
    if record.messages is None:
        if not is_complete:
            raise UserError(
                f"{record.where}: is plain text, which asks nothing; add --complete to have it"
                ' continued, or call its column "prompt" to have it answered'
            )
        return Prompt(record, place, None, record.text, None)
    messages = record.messages
    reference = None
    last = len(messages) - 1
    if record.rejected is not None and messages[record.asked]["role"] == "assistant":
        last = record.asked
    if messages and messages[last]["role"] == "assistant":
        reference = messages[last]
        messages = messages[:last]
    if not any(_asks_something(message) for message in messages):
        problem = "no user message that says something before its last answer"
        raise UserError(f"{record.where}: {problem}, so there is no question")
    if record.label is False:
        reference = None
        counts["whose answer is labelled as a bad one"] += 1
    if reference is not None and _says_nothing(reference):
        reference = None
    if not is_complete:
        return Prompt(record, place, list(messages), None, reference)
    if len(messages) > 1 or record.tools:
        what = "has tools" if record.tools else f"has {len(messages)} messages before its answer"
        raise UserError(f"{record.where}: {what}; --complete continues a single text")
    return Prompt(record, place, None, messages[0]["content"], reference)


def _asks_something(message: dict) -> bool:
    """True if a message is a user's, with words in it."""
    return message["role"] == "user" and not _says_nothing(message)


def _says_nothing(message: dict) -> bool:
    """True if a message has neither words nor tool calls."""
    has_words = bool((message.get("content") or "").strip())
    return not has_words and not message.get("tool_calls")


# ---- the formats of prompts alone ----


def _alone(key: str) -> Callable[[Reading], list[Record]]:
    """Returns the function that reads a prompt at a key: a string, a message, or a list of them."""

    def read(reading: Reading) -> list[Record]:
        record = reading.record
        asked, weights = reading.messages_at(key, "user")
        parts = [record[key]]
        if key == "instruction":
            parts += [reading.optional_text("input"), reading.optional_text("context")]
        elif key != "prompt":
            parts.insert(0, reading.optional_text("context"))
        unused = CHANGES_MEANING.difference(BESIDE)
        if isinstance(record[key], str):
            question = "\n\n".join(part for part in parts if part.strip())
            asked = [{"role": "user", "content": question}]
        else:
            unused |= {"context", "input"} - {key}
        # The others say how a record is trained, and nothing is trained here.
        for other in sorted(unused.intersection(record)):
            if record[other] not in (None, ""):
                reading.stats.ignored[other] = True
        history, history_weights = reading.history()
        weights = history_weights + weights
        messages, weights = reading.with_system([*history, *asked], weights)
        return reading.answered_conversation(messages, weights)

    return read


def _bfcl(reading: Reading) -> list[Record]:
    """Reads a question of BFCL (Patil et al. 2025), with the schemas of its functions."""
    turns = require_field(reading.record, "question", list, reading.where)
    if len(turns) != 1 or not isinstance(turns[0], list):
        raise UserError(
            f"{reading.where}: a question of BFCL is a list that holds one list of messages"
        )
    messages, weights = reading.read_messages(turns[0], "question")
    functions = require_field(reading.record, "function", list, reading.where)
    reading.record = reading.record | {"tools": [_standard_types(each) for each in functions]}
    return reading.answered_conversation(messages, weights)


def _standard_types(schema: object) -> object:
    """Returns a schema with the names that JSON Schema has for BFCL's types, at all its levels."""
    if isinstance(schema, list):
        return [_standard_types(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            result[key] = BFCL_TYPES.get(value, value)
        else:
            result[key] = _standard_types(value)
    return result


def _bfcl_turns(reading: Reading) -> list[Record]:
    """Raises UserError: BFCL scores its tasks of several turns by running them."""
    raise UserError(
        f"{reading.where}: BFCL's tasks of several turns are scored by running its simulated programs,"
        " which is not done here; its single-turn files are read"
    )


def _line(reading: Reading) -> list[Record]:
    """Reads a line of a .txt file."""
    message = {"role": "user", "content": reading.record.text}
    return [Record([message], None, reading.where)]


def _lines(
    container: Container, payloads: Iterator, faults: list[tuple[int, UserError]]
) -> Iterator[tuple[int, object]]:
    """Yields (number, Text) for each line of a text that is not blank; other payloads as they are.

    faults: gets nothing; a line that is longer than a part of a text raises UserError, since the
        next parts can't be told from lines.
    """
    line_number = 0
    for number, payload in payloads:
        if not isinstance(payload, Text):
            yield number, payload
            continue
        if not payload.last and not payload.text.endswith("\n"):
            raise UserError(f"{container.path} line {line_number + 1}: is too long for a prompt")
        for line in payload.text.removesuffix("\n").split("\n"):
            line_number += 1
            if line.strip():
                yield line_number, Text(line, True, True)


# Before FORMATS, which have a whole text file as plain text.
LINES = Format("a prompt a line", (), (), _line, group=_lines, kind=Text)

BFCL_FORMAT = Format("BFCL", ("id", "question", "function"), (), _bfcl)
BFCL_TURNS = Format("BFCL turns", ("question", "initial_config"), (), _bfcl_turns)


def _prompt_formats() -> tuple[Format, ...]:
    """Returns the formats of training with those of prompts alone around them."""
    rows = {}
    for key in (*ASKING, *GIVEN):
        others = tuple(name for name in (*BESIDE, *CHANGES_MEANING) if name != key)
        rows[key] = Format(f"{key} alone", (key,), (), _alone(key), aliases=others)
    asking = [rows[key] for key in ASKING]
    given = [rows[key] for key in GIVEN]
    answered = [each for each in FORMATS if each.keys != ("text",)]
    plain_text = [each for each in FORMATS if each.keys == ("text",)]
    return (LINES, BFCL_FORMAT, BFCL_TURNS, *answered, *asking, *plain_text, *given)


PROMPT_FORMATS = _prompt_formats()
