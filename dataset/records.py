"""What every record format shares: the record, the statistics of reading, and the format as a row of a table."""

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


@dataclass(slots=True)
class Record:
    """One example: messages with an answer in each assistant turn, or else a text.

    messages: [{"role", "content"}, ...], and where there are some "tool_calls" [{"type", "function": {"name",
    "arguments": object}}], "reasoning_content", "name", "tool_call_id". weights: of each message, where not all are 1.
    rejected: of a preference, the messages that stand where `messages` holds the chosen answer, behind so many that
    were `asked`. label: of KTO, whether the answer is a good one. first, last: of a long text's parts.
    """

    messages: list[dict] | None
    text: str | None
    where: str  # "FILE line 3"; for messages about this record
    tools: list[dict] | None = None
    weights: list[float] | None = None
    rejected: list[dict] | None = None
    asked: int = 0
    label: bool | None = None
    first: bool = True
    last: bool = True


REASONS = 12  # that are told apart


@dataclass
class ReadStats:
    """What was found out or left out while records were read."""

    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason: number of records that were left out
    altered: Counter[str] = field(default_factory=Counter)  # what is not as it stands: number of records
    ignored: dict[str, bool] = field(default_factory=dict)  # keys without a meaning here; of a message "messages.KEY"

    def drop(self, reason: str, count: int = 1) -> None:
        """Counts; where a template's words make each reason another one, the first ones only by themselves."""
        known = reason in self.dropped or len(self.dropped) < REASONS
        self.dropped[reason if known else "for other reasons"] += count

    def add(self, other: "ReadStats") -> None:
        self.records += other.records
        for reason, count in other.dropped.items():
            self.drop(reason, count)
        self.altered += other.altered
        self.ignored |= other.ignored

    def complain_if_empty(self, path: str) -> None:
        if not self.records:
            why = "; ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
            raise UserError(f"{path}: " + (f"no record can be trained on ({why})" if why else "is an empty list"))


@dataclass(frozen=True)
class Format:
    name: str
    keys: tuple[str, ...]  # a record that has them all has this format
    optional: tuple[str, ...]  # read where present; other keys are ignored and announced
    read: Callable[["Reading"], Iterable[Record]]
    group: Callable[[Container, Iterable], Iterator[tuple[int, object]]] | None = None
    kind: type | tuple = dict

    def fits(self, record: dict) -> bool:
        if isinstance(record, Text):
            return True
        return all(key in record and (key != "label" or record[key] not in (None, "")) for key in self.keys)

    def misfit(self, record: dict, where: str) -> UserError:
        hint = closest_key(record, self.keys, record)
        if all(key in record for key in self.keys):
            return UserError(f"{where}: label is {'null' if record.get('label') is None else 'empty'}")
        why = f"the first record is {self.name} ({', '.join(self.keys)})"
        return UserError(f"{where}: keys {quote_names(record)}: {why}{hint}")

    def records(self, value: object, where: str, stats: ReadStats, trees: str) -> Iterable[Record]:
        if not isinstance(value, self.kind) or not self.fits(value):
            raise self.misfit(require_object(value, where), where)
        if isinstance(value, dict) and not self.group:
            note_extra_keys(value, (*self.keys, *self.optional), where, stats.ignored)
        return self.read(Reading(value, where, stats, trees))


@dataclass
class Reading:
    """A record at hand: what a format's function is given."""

    record: dict
    where: str
    stats: ReadStats
    trees: str

    def text(self, key: str) -> str:
        return require_field(self.record, key, str, self.where)

    def maybe(self, key: str) -> str:
        """The string at a key; "" where it is absent or null."""
        return "" if self.record.get(key) is None else self.text(key)

    def conversation(self, messages: list[dict], weights: list[float] | None = None, **more) -> list[Record]:
        """A Record of plain messages, with the record's weight on each."""
        weight = weight_of(self.record, self.where)
        weights = [1.0] * len(messages) if weights is None else weights
        weights = None if {weight, *weights} == {1.0} else [weight * each for each in weights]
        return [Record(messages, None, self.where, weights=weights, **more)]

    def turns(self, messages: list, key: str = "messages") -> tuple[list[dict], list[float]]:
        """A list of messages in any dialect, checked, and the weight of each."""
        turns, weights = [], []
        for number, message in enumerate(messages, 1):
            turn, weight = read_message(message, f"{self.where} message {number}", self.stats.ignored, key)
            turns.append(turn)
            weights.append(weight)
        return turns, weights

    def tools(self) -> list[dict] | None:
        """The record's tools: JSON schemas in OpenAI's form, given as a list or as JSON in a string."""
        value = next((self.record[key] for key in ("tools", "functions") if self.record.get(key)), None)
        if isinstance(value, str):
            value = json_in(value, f"{self.where}: tools") if value.strip() else None
        if not value:
            return None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise UserError(f"{self.where}: tools is {type_name(value)}, a list of objects is wanted")
        without_surrogate(value, f"{self.where}: tools")
        return [tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool}
                for tool in value]  # fmt: skip


def with_system(reading: Reading, turns: list[dict], weights: list[float]) -> tuple[list[dict], list[float]]:
    if not reading.maybe("system").strip():
        return turns, weights
    return [{"role": "system", "content": reading.record["system"]}, *turns], [1.0, *weights]


def answered(reading: Reading, turned: tuple[list[dict], list[float]], **more) -> list[Record]:
    turns, weights = turned
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UserError(f"{reading.where}: no assistant message among {len(turns)}; nothing to train on")
    return reading.conversation(turns, weights, tools=reading.tools(), **more)


def turn_list(reading: Reading, key: str, role: str) -> tuple[list[dict], list[float]]:
    """The turns at a key and their weights: a list of messages, one message, or a string that is a turn of `role`."""
    value = reading.record.get(key)
    if isinstance(value, str):
        return [{"role": role, "content": without_surrogate(value, f"{reading.where}: {key}")}], [1.0]
    if not isinstance(value, (list, dict)):
        raise UserError(f"{reading.where}: {key} is {type_name(value)}, a string or a list of messages is wanted")
    return reading.turns(value if isinstance(value, list) else [value], key)


def asked_before(turns: list[dict], weights: list[float]) -> tuple[list[dict], list[float]]:
    """Turns of a prompt, whose own answers are not what is taught."""
    return turns, [0.0 if turn["role"] == "assistant" else weight for turn, weight in zip(turns, weights, strict=True)]
