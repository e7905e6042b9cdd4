"""What all record formats share: the record that they are read into, the counts, and the format
itself.

A `Format` is a name, the keys of an object in a file, and a function that makes `Record`s of it.
The function receives a `Reading`: the object, its place, and the `ReadStats` in which it counts
what it leaves out. The functions are defined in formats.py, preferences.py and oasst.py; the table
of all formats is `FORMATS` in formats.py.

Nothing is lost in silence. What can't be read is a UserError that names the record; what was left
out (empty answers, unknown keys) is counted in `ReadStats`, to be printed.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from common.errors import UserError
from dataset.arrow_nulls import clean_calls, clean_tools
from dataset.columns import SYSTEM_NAMES, with_system_column
from dataset.messages import (
    RECORD_SWITCHES,
    THOUGHTS,
    LeftOut,
    WrittenObject,
    closest_key,
    json_in,
    json_text,
    leave_out_masked,
    leave_out_media,
    note_extra_keys,
    quote_names,
    read_message,
    read_thought,
    require_field,
    require_object,
    type_name,
    weight_of,
    without_surrogate,
)
from dataset.readers import Container, Text

# How many different reasons are counted each by itself.
MAX_REASONS = 12
# How the reasons begin that formats.OF_PART makes.
OF_PART_BEGINS = "of the "
# How many faulty records of a file are named.
MAX_FAULTS = 20
FILLED_NULLS = "with nulls of other tools, which Arrow filled in, taken out"
THOUGHT_NAMES = frozenset(THOUGHTS)
# Messages, and the weight of each.
WeightedMessages = tuple[list[dict], list[float]]


@dataclass(slots=True)
class Record:
    """One example: a conversation in which the assistant's messages are the answers, or a text.

    messages: [{"role", "content"}, ...]; a message may also have "tool_calls" [{"type", "function":
        {"name", "arguments": object}}], "reasoning_content", "name" and "tool_call_id". None for a
        text.
    text: the text; None for a conversation.
    where: the record's place, as in "FILE line 3"; for messages to the user.
    tools: JSON schemas of the functions that the assistant can call.
    weights: the loss weight of each message; None if all are 1.
    rejected: for a preference, the messages that the rejected answer has where `messages` has the
        chosen one.
    rejected_weights: their loss weights; None if all are 1.
    asked: for a preference, the number of messages in the prompt, before both answers.
    label: for KTO, whether the last answer is a good one.
    first, last: whether a text is the first or the last part of its file; long files are read in
        parts.
    id: the file's own name of the record, where it is read for its prompt (dataset/prompts.py).
    nested: in SQuAD's nested file, the numbers of its article, paragraph and question.
    references: all accepted answers, where the record has several, the first of which is the answer
        that is trained; None where it has one.
    """

    messages: list[dict] | None
    text: str | None
    where: str
    tools: list[dict] | None = None
    weights: list[float] | None = None
    rejected: list[dict] | None = None
    rejected_weights: list[float] | None = None
    asked: int = 0
    label: bool | None = None
    first: bool = True
    last: bool = True
    id: str | int | None = None
    nested: tuple[int, ...] = ()
    references: list[str] | None = None


# The levels of SQuAD's file, and the bits that the number of each takes of 64.
NESTED_LEVELS = ("article", "paragraph", "question")
NESTED_BITS = 21


def pack_nested(numbers: tuple[int, ...]) -> int:
    """Returns a record's numbers in a nested file as one; 0 for other files. Counted from 1."""
    packed = 0
    for number in numbers:
        packed = packed << NESTED_BITS | number
    return packed


def nested_place(packed: int) -> str:
    """Returns e.g. " article 3 paragraph 2 question 5", "" for 0. packed: of `pack_nested`."""
    if packed == 0:
        return ""
    place = ""
    for level in reversed(NESTED_LEVELS):
        place = f" {level} {packed % (1 << NESTED_BITS)}{place}"
        packed >>= NESTED_BITS
    return place


@dataclass
class ReadStats:
    """What was read and what was left out.

    records: the number of records that were read.
    dropped: {reason: number of records that were left out for it}.
    altered: {what was changed or can't be shown: number of records}.
    ignored: the keys that have no meaning here, as a dict in the order of their appearance; of
        messages "messages.KEY".
    facts: those of them that hold words on which answers may rest.
    num_faults: the number of records that can't be read.
    faults: of the first MAX_FAULTS of them (number of the file, "line 3: what is wrong").
    """

    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    altered: Counter[str] = field(default_factory=Counter)
    ignored: dict[str, bool] = field(default_factory=dict)
    facts: dict[str, bool] = field(default_factory=dict)
    num_faults: int = 0
    faults: list[tuple[int, str]] = field(default_factory=list)

    def note_fault(self, container: int, fault: str) -> None:
        """Counts a record that can't be read. container: the number of its file."""
        self.num_faults += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append((container, fault))

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """Returns copies of what may be counted of a record before it turns out to be faulty."""
        return dict(self.dropped), dict(self.altered)

    def restore(self, counts: tuple[dict[str, int], dict[str, int]]) -> None:
        """Sets these back. counts: what `counts` returned."""
        dropped, altered = counts
        self.dropped = Counter(dropped)
        self.altered = Counter(altered)

    def drop(self, reason: str, count: int = 1) -> None:
        """Counts records that were left out.

        Of many different reasons, as a chat template may give, only the first MAX_REASONS are
        counted each by itself.
        """
        # A file's own parts are no faults, and few.
        is_known = reason in self.dropped or reason.startswith(OF_PART_BEGINS)
        if not is_known and len(self.dropped) >= MAX_REASONS:
            reason = "for other reasons"
        self.dropped[reason] += count

    def add(self, other: "ReadStats") -> None:
        """Adds the counts of another part of the same data."""
        self.records += other.records
        # One by one, so that there are no more than MAX_REASONS of all parts together.
        for reason, count in other.dropped.items():
            self.drop(reason, count)
        self.altered += other.altered
        self.ignored |= other.ignored
        self.facts |= other.facts
        self.num_faults += other.num_faults
        self.faults = (self.faults + other.faults)[:MAX_FAULTS]

    def complain_if_empty(self, path: str, purpose: str = "trained on") -> None:
        """Raises UserError if no record was read, with the reasons. purpose: what they are for."""
        if self.records:
            return
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        if reasons:
            raise UserError(f"{path}: no record can be {purpose} ({reasons})")
        raise UserError(f"{path}: is an empty list")


@dataclass(frozen=True)
class Format:
    """A row of the table of formats.

    keys: a record that has all of them has this format.
    optional: keys that are read if they are present; all other keys are ignored and reported, but
        a key that nearly has one of these names is taken for a slip.
    aliases: further keys that are read if they are present, whose names are like other words.
    read: makes the records of one value in the file.
    group: for a format whose records extend over several values, joins a container's payloads to
        groups, and adds (number, UserError) of those that can't be read to a list; else None.
    kind: the type of the value, or several.
    """

    name: str
    keys: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[["Reading"], Iterable[Record]]
    group: Callable[[Container, Iterable, list], Iterator[tuple[int, object]]] | None = None
    kind: type | tuple = dict
    aliases: tuple[str, ...] = ()

    def fits(self, record: dict) -> bool:
        """True if a record has this format: all of its keys, and a label that says something.

        A null or an empty label says nothing.
        """
        if isinstance(record, Text):
            return True
        for key in self.keys:
            if key not in record:
                return False
            if key == "label" and record[key] in (None, ""):
                return False
        return True

    def misfit(self, record: dict, where: str, origin: str = "the first record") -> UserError:
        """Returns the error for a record that does not have this format.

        origin: what has it.
        """
        # All keys are there, so the label is at fault: see `fits`.
        if all(key in record for key in self.keys):
            fault = "null" if record.get("label") is None else "empty"
            return UserError(f"{where}: label is {fault}")
        hint = closest_key(record, self.keys, record)
        why = f"{origin} is {self.name} ({', '.join(self.keys)})"
        return UserError(f"{where}: keys {quote_names(record)}: {why}{hint}")

    def records(
        self,
        value: object,
        where: str,
        stats: ReadStats,
        trees: str,
        from_arrow: bool = False,
        needs_answer: bool = True,
        origin: str = "the first record",
    ) -> Iterable[Record]:
        """Returns the records of one value.

        where: its place, for errors.
        stats: counts what is left out.
        trees: which paths of OASST trees, of oasst.TREES.
        from_arrow: whether the value comes from a Parquet or Arrow file.
        needs_answer: whether a conversation without an answer is a fault.
        origin: what has shown that the file has this format.

        Raises UserError if the value has another format, or a fault.
        """
        if not isinstance(value, self.kind) or not self.fits(value):
            raise self.misfit(require_object(value, where), where, origin)
        try:
            # The keys of grouped values were made by `group`, not by the user.
            if isinstance(value, dict) and not self.group:
                has_system = "system" in self.optional or "system" in self.aliases
                if has_system and not SYSTEM_NAMES.isdisjoint(value):
                    value = with_system_column(value, where)
                leave_out_media(value)
                leave_out_masked(value, where)
                known_keys = self.keys + self.optional
                known_keys += tuple(RECORD_SWITCHES.intersection(value))
                if self.aliases and not value.keys().isdisjoint(self.aliases):
                    known_keys += tuple(key for key in self.aliases if key in value)
                note_extra_keys(value, known_keys, where, stats.ignored, facts=stats.facts)
            return self.read(Reading(value, where, stats, trees, from_arrow, needs_answer))
        except LeftOut as reason:
            stats.drop(str(reason))
            return []


@dataclass
class Reading:
    """One value that is being read, with what a format's function needs.

    It is the argument of `Format.read`.

    record: the value of the file, an object or a `Text`.
    where, stats, trees, from_arrow, needs_answer: as for `Format.records`.
    """

    record: dict
    where: str
    stats: ReadStats
    trees: str
    from_arrow: bool = False
    needs_answer: bool = True

    def text(self, key: str) -> str:
        """Returns the string at a key. Raises UserError if there is none."""
        return require_field(self.record, key, str, self.where)

    def optional_text(self, key: str) -> str:
        """Returns the string at a key; "" if the key is missing or null."""
        if self.record.get(key) is None:
            return ""
        return self.text(key)

    def tools(self) -> tuple[list[dict] | None, bool]:
        """Returns the record's tools as JSON schemas in OpenAI's form, or None without, and whether
        nulls that Arrow filled in were taken out of them.

        The record has a list, or JSON in a string.
        """
        place = f"{self.where}: tools"
        value = self.record.get("tools") or self.record.get("functions")
        if isinstance(value, str) and value.strip():
            value = json_in(value, place)
            if isinstance(value, list):
                value = [WrittenObject(each) if isinstance(each, dict) else each for each in value]
        elif isinstance(value, str):
            value = None
        if not value:
            return None, False
        # Parquet files have lists of JSON in strings, too.
        if isinstance(value, list) and all(isinstance(tool, str) for tool in value):
            value = [WrittenObject(require_object(json_in(tool, place), place)) for tool in value]
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise UserError(f"{place} is {type_name(value)}, a list of objects is wanted")
        text = without_surrogate(json_text(value, place), place)
        tools = []
        for tool in value:
            has_openai_form = isinstance(tool.get("function"), dict)
            if not has_openai_form:
                tool = type(tool)({"type": "function", "function": tool})
            tools.append(tool)
        if "null" not in text:
            return tools, False
        clean = clean_tools(tools, self.from_arrow)
        return clean, clean != tools

    def read_messages(self, values: list, key: str = "messages") -> WeightedMessages:
        """Reads a list of messages of any dialect. key: the record's key that holds them."""
        messages = []
        weights = []
        for number, value in enumerate(values, 1):
            place = f"{self.where} message {number}"
            message, weight = read_message(value, place, self.stats, key)
            messages.append(message)
            weights.append(weight)
        return messages, weights

    def messages_at(self, key: str, role: str) -> WeightedMessages:
        """Reads the messages at a key: a list of them, a single one, or a string.

        A string is a message of `role`.
        """
        value = self.record.get(key)
        if isinstance(value, str):
            content = without_surrogate(value, f"{self.where}: {key}")
            return [{"role": role, "content": content}], [1.0]
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list):
            fault = f"{key} is {type_name(value)}, a string or a list of messages is wanted"
            raise UserError(f"{self.where}: {fault}")
        return self.read_messages(value, key)

    def with_system(self, messages: list[dict], weights: list[float]) -> WeightedMessages:
        """Returns the messages with the record's "system" in front, if it has one.

        Where the messages begin with the same text, it stands there once. Raises UserError if they
        begin with another one.
        """
        if not self.optional_text("system").strip():
            return messages, weights
        system = {"role": "system", "content": self.record["system"]}
        if messages and messages[0]["role"] == "system":
            if messages[0]["content"].strip() == system["content"].strip():
                return messages, weights
            raise UserError(
                f'{self.where}: "system" and the first message are two different system messages;'
                " leave one out"
            )
        return [system, *messages], [1.0, *weights]

    def answer(self, content: str) -> dict:
        """Returns the message that answers, with what was thought before it, if a column holds
        that."""
        return self.with_thought({"role": "assistant", "content": content})

    def with_thought(self, message: dict) -> dict:
        """Returns an answer with the thought that a column of the record holds, unless it has one
        itself, or there is none."""
        if THOUGHT_NAMES.isdisjoint(self.record) or message.get("reasoning_content"):
            return message
        thought = read_thought(self.record, self.where)
        return message | {"reasoning_content": thought} if thought else message

    def history(self) -> WeightedMessages:
        """Returns the earlier questions and answers of the record's "history".

        It is a list of [question, answer] pairs, or of messages. Raises UserError if it is anything
        else.
        """
        if not self.record.get("history"):
            return [], []
        pairs = require_field(self.record, "history", list, self.where)
        if all(isinstance(each, dict) for each in pairs):
            return self.read_messages(pairs, "history")
        messages = []
        for number, pair in enumerate(pairs, 1):
            if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
                raise UserError(
                    f"{self.where}: history holds {type_name(pair)},"
                    " [question, answer] pairs of strings are wanted, or messages alone"
                )
            for role, content in zip(("user", "assistant"), pair, strict=True):
                without_surrogate(content, f"{self.where} history {number}")
                messages.append({"role": role, "content": content})
        return messages, [1.0] * len(messages)

    def conversation(
        self, messages: list[dict], weights: list[float] | None = None, **more
    ) -> list[Record]:
        """Returns a list of one record with these messages.

        weights: of each message, by default 1; they are multiplied by the record's own.
        more: other fields of `Record`.
        """
        record_weight = weight_of(self.record, self.where)
        if weights is None:
            weights = [1.0] * len(messages)
        all_are_1 = record_weight == 1 and all(weight == 1 for weight in weights)
        if all_are_1:
            # None says the same, and takes no memory.
            weights = None
        else:
            weights = [record_weight * weight for weight in weights]
        return [Record(messages, None, self.where, weights=weights, **more)]

    def answered_conversation(
        self, messages: list[dict], weights: list[float], **more
    ) -> list[Record]:
        """Returns a list of one record with these messages and the record's tools.

        more: other fields of `Record`.
        Raises UserError if there is no message of the assistant where one is needed.
        """
        has_answer = any(message["role"] == "assistant" for message in messages)
        if self.needs_answer and not has_answer:
            raise UserError(
                f"{self.where}: no assistant message among {len(messages)}; nothing to train on"
            )
        tools, changed = self.tools()
        if tools is not None or any("tool_calls" in message for message in messages):
            before = (messages, more.get("rejected"))
            messages = clean_calls(messages, tools, self.from_arrow, self.where)
            if more.get("rejected"):
                rejected = more["rejected"]
                more["rejected"] = clean_calls(rejected, tools, self.from_arrow, self.where)
            if changed or before != (messages, more.get("rejected")):
                self.stats.altered[FILLED_NULLS] += 1
        return self.conversation(messages, weights, tools=tools, **more)


def joined_talk(
    prompt: WeightedMessages, answer: WeightedMessages, names: str, where: str
) -> tuple[list[dict], list[float], int]:
    """Returns the talk that two columns hold together: its messages, their weights, and how many
    of the messages belong to what is asked.

    prompt: the column that asks.
    answer: the other one, which holds only what is new, or the whole talk once more.
    names: of both columns, for the error.

    Where the answer's column repeats the prompt, it is the talk: with a system message that the
    prompt lacks, or the other way round; or where the prompt is one message of a user that the
    talk holds. Raises UserError if both seem to hold talks that are not the same.
    """
    asked, asked_weights = prompt
    new, new_weights = answer
    num_first = len(asked)  # how many messages of the prompt stand before those of the answer
    num_asked = len(asked)
    system, question = split_system(asked)
    system_of_new, talk = split_system(new)
    systems_agree = not system or not system_of_new or same_messages(system, system_of_new)
    begins_with_question = same_messages(question, talk[: len(question)])
    places = [i for i, message in enumerate(new) if same_messages([message], asked)]
    if not asked or not new or new[0]["role"] == "assistant":
        # The prompt's column may hold the answer as well, which is no part of its own prompt.
        repeats = len(asked) > len(new) > 0 and same_messages(asked[-len(new) :], new)
        if repeats:
            num_first -= len(new)
        num_asked = num_first
    elif systems_agree and begins_with_question:
        num_first = 0 if system_of_new else len(system)
        num_asked = max(len(system), len(system_of_new)) + len(question)
    elif places and asked[0]["role"] == "user":
        num_first = 0
        num_asked = places[0] + 1
    elif asked[-1]["role"] != "assistant" or new[0]["role"] == "system":
        # Else the prompt is an earlier part of the talk, and the answer's column goes on from it.
        raise UserError(
            f"{where}: {names} hold two talks that are not the same; leave one column out, or make"
            " them agree"
        )
    messages = asked[:num_first] + new
    weights = asked_weights[:num_first] + new_weights
    return messages, weights, num_asked


def split_system(messages: list[dict]) -> tuple[list[dict], list[dict]]:
    """Returns the system messages at the beginning, and the others."""
    count = 0
    while count < len(messages) and messages[count]["role"] == "system":
        count += 1
    return messages[:count], messages[count:]


def same_messages(some: list[dict], others: list[dict]) -> bool:
    """True if two lists of messages say the same, but for space around what they say."""
    if len(some) != len(others):
        return False
    for one, other in zip(some, others, strict=True):
        if one == other:
            continue
        is_plain = one.keys() == other.keys() == {"role", "content"}
        if not is_plain or one["role"] != other["role"]:
            return False
        if one["content"].strip() != other["content"].strip():
            return False
    return True


def prompt_weights(messages: list[dict], weights: list[float]) -> list[float]:
    """Returns the weights of a prompt's messages, with 0 for its answers.

    Only the answer to the prompt is trained.
    """
    result = []
    for message, weight in zip(messages, weights, strict=True):
        result.append(0.0 if message["role"] == "assistant" else weight)
    return result
