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
from dataset.messages import (
    closest_key,
    json_in,
    note_extra_keys,
    quote_names,
    read_message,
    require_field,
    require_object,
    type_name,
    weight_of,
    without_surrogate,
)
from dataset.readers import Container, Text

# How many different reasons are counted each by itself.
MAX_REASONS = 12
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
    asked: for a preference, the number of messages in the prompt, before both answers.
    label: for KTO, whether the last answer is a good one.
    first, last: whether a text is the first or the last part of its file; long files are read in
        parts.
    """

    messages: list[dict] | None
    text: str | None
    where: str
    tools: list[dict] | None = None
    weights: list[float] | None = None
    rejected: list[dict] | None = None
    asked: int = 0
    label: bool | None = None
    first: bool = True
    last: bool = True


@dataclass
class ReadStats:
    """What was read and what was left out.

    records: the number of records that were read.
    dropped: {reason: number of records that were left out for it}.
    altered: {what was changed or can't be shown: number of records}.
    ignored: the keys that have no meaning here, as a dict in the order of their appearance; of
        messages "messages.KEY".
    """

    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    altered: Counter[str] = field(default_factory=Counter)
    ignored: dict[str, bool] = field(default_factory=dict)

    def drop(self, reason: str, count: int = 1) -> None:
        """Counts records that were left out.

        Of many different reasons, as a chat template may give, only the first MAX_REASONS are
        counted each by itself.
        """
        is_known = reason in self.dropped
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

    def complain_if_empty(self, path: str) -> None:
        """Raises UserError if no record was read, with the reasons."""
        if self.records:
            return
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        if reasons:
            raise UserError(f"{path}: no record can be trained on ({reasons})")
        raise UserError(f"{path}: is an empty list")


@dataclass(frozen=True)
class Format:
    """A row of the table of formats.

    keys: a record that has all of them has this format.
    optional: keys that are read if they are present; all other keys are ignored and reported.
    read: makes the records of one value in the file.
    group: for a format whose records extend over several values, joins a container's payloads to
        groups; else None.
    kind: the type of the value, or several.
    """

    name: str
    keys: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[["Reading"], Iterable[Record]]
    group: Callable[[Container, Iterable], Iterator[tuple[int, object]]] | None = None
    kind: type | tuple = dict

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

    def misfit(self, record: dict, where: str) -> UserError:
        """Returns the error for a record that does not have this format.

        The first record of its file has it.
        """
        # All keys are there, so the label is at fault: see `fits`.
        if all(key in record for key in self.keys):
            fault = "null" if record.get("label") is None else "empty"
            return UserError(f"{where}: label is {fault}")
        hint = closest_key(record, self.keys, record)
        why = f"the first record is {self.name} ({', '.join(self.keys)})"
        return UserError(f"{where}: keys {quote_names(record)}: {why}{hint}")

    def records(self, value: object, where: str, stats: ReadStats, trees: str) -> Iterable[Record]:
        """Returns the records of one value.

        where: its place, for errors.
        stats: counts what is left out.
        trees: which paths of OASST trees, of oasst.TREES.

        Raises UserError if the value has another format, or a fault.
        """
        if not isinstance(value, self.kind) or not self.fits(value):
            raise self.misfit(require_object(value, where), where)
        # The keys of grouped values were made by `group`, not by the user.
        if isinstance(value, dict) and not self.group:
            known_keys = self.keys + self.optional
            note_extra_keys(value, known_keys, where, stats.ignored)
        return self.read(Reading(value, where, stats, trees))


@dataclass
class Reading:
    """One value that is being read, with what a format's function needs.

    It is the argument of `Format.read`.

    record: the value of the file, an object or a `Text`.
    where, stats, trees: as for `Format.records`.
    """

    record: dict
    where: str
    stats: ReadStats
    trees: str

    def text(self, key: str) -> str:
        """Returns the string at a key. Raises UserError if there is none."""
        return require_field(self.record, key, str, self.where)

    def optional_text(self, key: str) -> str:
        """Returns the string at a key; "" if the key is missing or null."""
        if self.record.get(key) is None:
            return ""
        return self.text(key)

    def tools(self) -> list[dict] | None:
        """Returns the record's tools as JSON schemas in OpenAI's form, or None without.

        The record has a list, or JSON in a string.
        """
        value = self.record.get("tools") or self.record.get("functions")
        if isinstance(value, str) and value.strip():
            value = json_in(value, f"{self.where}: tools")
        elif isinstance(value, str):
            value = None
        if not value:
            return None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise UserError(
                f"{self.where}: tools is {type_name(value)}, a list of objects is wanted"
            )
        without_surrogate(value, f"{self.where}: tools")
        tools = []
        for tool in value:
            has_openai_form = isinstance(tool.get("function"), dict)
            if not has_openai_form:
                tool = {"type": "function", "function": tool}
            tools.append(tool)
        return tools

    def read_messages(self, values: list, key: str = "messages") -> WeightedMessages:
        """Reads a list of messages of any dialect. key: the record's key that holds them."""
        messages = []
        weights = []
        for number, value in enumerate(values, 1):
            place = f"{self.where} message {number}"
            message, weight = read_message(value, place, self.stats.ignored, key)
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
        """Returns the messages with the record's "system" in front, if it has one."""
        if not self.optional_text("system").strip():
            return messages, weights
        system = {"role": "system", "content": self.record["system"]}
        return [system, *messages], [1.0, *weights]

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
        Raises UserError if there is no message of the assistant.
        """
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(
                f"{self.where}: no assistant message among {len(messages)}; nothing to train on"
            )
        return self.conversation(messages, weights, tools=self.tools(), **more)


def prompt_weights(messages: list[dict], weights: list[float]) -> list[float]:
    """Returns the weights of a prompt's messages, with 0 for its answers.

    Only the answer to the prompt is trained.
    """
    result = []
    for message, weight in zip(messages, weights, strict=True):
        result.append(0.0 if message["role"] == "assistant" else weight)
    return result
