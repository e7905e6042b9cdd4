"""The table of record formats, and reading files of any of them. The format of a file is recognized
by its keys.

    messages        {"messages": [{"role", "content"}, ...]}, as OpenAI has it, with tools and tool
                    calls
    ShareGPT        {"conversations": [{"from", "value"}, ...]}
    Alpaca          {"instruction", "output"}; optionally "input", "system", "history"
    Dolly           {"instruction", "response"}; optionally "context"
    two columns     {"prompt", "completion"}, {"question", "answer"} (GSM8K),
                    {"document", "summary"}, ...: PAIRS; the answer may be a list of accepted ones
    summaries       {"dialogue", "summary1"}; optionally "summary2", ... (DialogSum)
    with a context  {"context", "question", "answer"}; SQuAD, flat or in its nested file; PubMedQA
    classes         {"text", "label"}, also as CSV or TSV
    OASST           trees of ranked replies, nested, or as messages with parent ids: oasst.py
    preferences     {"chosen", "rejected"} with a "prompt" or "conversations"; KTO's "label":
                    preferences.py
    plain text      {"text"}, or whole .txt and .md files

A format is one row of `FORMATS`: its keys, and a function from a record of the file to `Record`s.
The keys of the first record decide which format a file has, and every other record must have these
keys too.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from common.console import number_of
from common.errors import UserError, printable
from common.files import NamedFile
from dataset.faults import complaint, fault_kind, nulls_as_texts
from dataset.folders import (
    DESCRIPTION,
    PREFERRED,
    TRAIN,
    VALIDATION,
    Fetched,
    Listing,
    list_parts,
    llama_factory_entries,
    part_of_record,
    says_part,
)
from dataset.layouts import layout_fault
from dataset.messages import (
    THOUGHTS,
    closest_key,
    quote_names,
    require_field,
    require_object,
    type_name,
    without_surrogate,
)
from dataset.oasst import OASST_MESSAGES, oasst_tree
from dataset.preferences import QUESTIONS, TALKS, kto, preference
from dataset.readers import Container, Text, recognize
from dataset.records import (
    Format,
    Reading,
    ReadStats,
    Record,
    joined_talk,
    prompt_weights,
)
from dataset.table_header import with_columns
from dataset.user_map import Map

# What multimodal data have in the text where an image, a video or a sound belongs.
MEDIA_MARK = re.compile(
    r"<(?P<image>image|video|audio)(?:_?[0-9]+)?>"  # LLaVA, ShareGPT-4V, LLaMA-Factory
    r"|<\|(?P<bar>image|video|audio)(?:_[0-9]+|_pad)?\|>"  # Phi 3.5, Qwen 2-VL, Llama 3.2
    r"|<(?P<gap>image|video|audio)_(?:soft_token|placeholder|here)>"  # Gemma 3 and others
    r"|<start_of_(?P<start>image)>"
    r"|<(?P<here>Image|Video|Audio)Here>"  # InternLM-XComposer
    r"|<(?P<tag>img)>[^<\n]{1,300}</img>"  # Qwen-VL
    r"|\[(?P<square>IMG)\]"  # Pixtral
    r"|data:(?P<url>image|video|audio)/[a-z0-9.+-]{1,20};base64,"
)
SEEN_AS = {"image": "image", "img": "image", "video": "video", "audio": "sound"}
# Columns by which a file's owner finds a record again.
ID_KEYS = ("id", "custom_id", "task_id", "question_id", "uid", "example_id", "idx", "index")
# Why a record is left out whose own column says that it belongs to another part of the data.
OF_PART = "of the {} part, by its own column"
# Counted, since the others are not trained.
SEVERAL_ANSWERS = "with several accepted answers, the first of which is trained"
MORE_SUMMARIES = ("summary2", "summary3", "summary4", "summary5")
NO_HEADER = "; if its first row is a record, write one with the names of the columns above it"
# As tools write it that give back a model's prompt together with its answer.
REPEATS = "whose answer begins with the whole question, which is trained with it"
SHORTEST_REPEATED = 20  # characters of a question; shorter ones stand in answers by chance
# So many records are tried to find the format of a file whose first ones can't be read.
MAX_TRIES = 100


class UnknownFormat(UserError):
    """A file whose records are of no known format."""


@dataclass
class Source:
    """A file, or a folder of files, whose format is known and whose records can be read.

    path: what messages call the file or folder. root: where it is on this disk.
    format: a row of FORMATS. containers: its files.
    listing: what is known of the folder: which of its files are read, and as which part.
    trees: which paths of OASST trees are read, one of oasst.TREES.
    map: the user's function that every record goes through first, or None.
    part: records whose own column says that they belong to another part are left out; None reads
        them all.
    for_prompts: the records are read for what they ask, and may lack an answer
        (dataset/prompts.py).
    skip_bad: True leaves records out that can't be read, and counts them by what is wrong; False
        makes one error of them all; None does as well, where there is no --skip-bad to name.
    origin: what has shown that the file has this format.
    system: the system message of conversations that have none; "" for none.
    """

    path: str
    root: Path
    format: Format
    containers: list[Container]
    listing: Listing
    trees: str
    map: Map | None = None
    part: str | None = TRAIN
    for_prompts: bool = False
    skip_bad: bool | None = None
    origin: str = "the first record"
    system: str = ""

    def payloads(self) -> Iterator[tuple[int, int, object]]:
        """Yields (index of the container, number of the record in it, payload) for each record.

        Payloads are undecoded: worker processes decode them.
        """
        for i, container in enumerate(self.containers):
            payloads = container.payloads()
            faults: list[tuple[int, UserError]] = []
            # OASST's messages come one a line, and are joined to trees.
            if self.format.group:
                payloads = self.format.group(container, payloads, faults)
            for number, payload in payloads:
                yield i, number, payload
            # `read` raises and notes them, as it does with all that can't be read.
            for number, error in faults:
                yield i, number, error

    def read(self, container: int, number: int, payload: object, stats: ReadStats) -> list[Record]:
        """Returns the records of one payload, and counts them and what is left out in `stats`.

        What can't be read is noted there as a fault, see `complain_of_faults`. The arguments in
        front are what `payloads` yields.
        """
        counts = stats.counts()
        try:
            records = self.try_read(container, number, payload, stats)
        except UserError as error:
            stats.restore(counts)
            fault = str(error).removeprefix(f"{self.containers[container].path} ")
            stats.note_fault(container, fault)
            if self.skip_bad:
                stats.drop(f"faulty: {fault_kind(fault)}")
            return []
        stats.records += len(records)
        return records

    def try_read(
        self, container: int, number: int, payload: object, stats: ReadStats
    ) -> list[Record]:
        """Returns the records of one payload; `stats` counts what is left out of them.

        Raises UserError that names the record.
        """
        place = self.containers[container].place(number)
        value = self.containers[container].value(number, payload)
        from_arrow = self.containers[container].kind in ("Parquet", "Arrow")
        # Before the user's function, which may leave the column out.
        if self.part is not None and isinstance(value, dict):
            part = part_of_record(value)
            # Records that say nothing are trained.
            if (part or TRAIN) != self.part:
                stats.dropped[OF_PART.format(part or TRAIN)] += 1
                return []
            if part is not None:
                value = {key: each for key, each in value.items() if not says_part(key)}
        if self.listing.rename is not None and isinstance(value, dict):
            value = self.listing.rename(value)
        values = [value]
        if self.map is not None:
            values = self.map(value, place, stats)
        records = []
        needs_answer = not self.for_prompts
        for each in values:
            for record in self.records_of(each, place, stats, from_arrow):
                empty = empty_part(record)
                # Of an empty answer, a prompt remains.
                if empty and (needs_answer or empty == "text"):
                    stats.dropped[f"empty {empty}"] += 1
                    continue
                mark = first_media_mark(record)
                if mark:
                    seen_as = SEEN_AS[mark[mark.lastgroup].lower()]
                    # Between Qwen-VL's tags stands the name of a file.
                    shown = "<img>" if mark.lastgroup == "tag" else mark[0]
                    what = f"with {shown} in the text and no {seen_as}, as characters"
                    stats.altered[what] += 1
                if repeats_question(record):
                    stats.altered[REPEATS] += 1
                if self.system and record.messages is not None:
                    put_system(record, self.system, stats)
                records.append(record)
        if self.for_prompts and isinstance(value, dict):
            _keep_id(records, value, place, stats)
        return records

    def records_of(
        self, value: object, place: str, stats: ReadStats, from_arrow: bool
    ) -> list[Record]:
        """Returns what the format makes of a value; with skip_bad, of one that can't be read, what
        it makes of it with "" for its nulls."""
        counts = stats.counts() if self.skip_bad else ({}, {})
        needs_answer = not self.for_prompts
        try:
            records = self.format.records(
                value, place, stats, self.trees, from_arrow, needs_answer, self.origin
            )
            return [*records]
        except UserError as error:
            filled = nulls_as_texts(value, self.format) if self.skip_bad else None
            if filled is None:
                raise
            stats.restore(counts)
            try:
                records = [
                    *self.format.records(filled, place, stats, self.trees, from_arrow, needs_answer)
                ]
            except UserError:
                # Of the record as it stands in the file.
                raise error from None
        stats.altered["with null taken for an empty text"] += 1
        return records

    def fault_lines(self, stats: ReadStats) -> list[str]:
        """Returns the first faults, each with the name of its file."""
        return [f"{self.containers[file].path} {fault}" for file, fault in stats.faults]

    def complain_of_faults(self, stats: ReadStats, end: UserError | None = None) -> None:
        """Raises an error for all faulty records, unless they are left out.

        stats: of all that was read.
        end: what has made the rest unreadable; it is raised as well.
        """
        if self.skip_bad and end is not None:
            raise end
        if self.skip_bad:
            return
        can_skip = self.skip_bad is not None
        error = complaint(self.path, stats, self.fault_lines(stats), can_skip, end)
        if error is not None:
            raise error

    def reading_key(self) -> list:
        """Returns what decides, besides the files, which records are read, as values of JSON."""
        columns = [container.columns for container in self.containers]
        settings = [self.format.name, self.trees, self.part, self.listing.description]
        return [*settings, bool(self.skip_bad), columns, self.system]

    def has_validation(self, stats: ReadStats) -> bool:
        """True if a part of these data is there to validate with. stats: of all records."""
        in_files = VALIDATION in self.listing.files_of_parts
        return in_files or stats.dropped[OF_PART.format(VALIDATION)] > 0

    def records(self, stats: ReadStats) -> Iterator[Record]:
        """Yields all records, and counts them in `stats`.

        Raises UserError that names the records that can't be read, or if there is none.
        """
        try:
            for container, number, payload in self.payloads():
                yield from self.read(container, number, payload, stats)
        except UserError as error:
            self.complain_of_faults(stats, error)
        self.complain_of_faults(stats)
        stats.complain_if_empty(self.path, "answered" if self.for_prompts else "trained on")

    def read_all(self, stats: ReadStats | None = None) -> list[Record]:
        """Returns all records at once, where they are few; data.py reads large files otherwise.

        stats: counts what is read and left out; None if it is of no interest.
        Raises as `records` does.
        """
        if stats is None:
            stats = ReadStats()
        return list(self.records(stats))

    def summary(self, stats: ReadStats) -> str:
        """Returns one line about the source and what was read.

        E.g. `a.json: Alpaca (JSON, 997 records), dropped 2 (empty answer), ignored keys 'id'`.
        """
        kinds = ", ".join(sorted({container.kind for container in self.containers}))
        files = ""
        if self.root.is_dir():
            count = len(self.containers)
            files = f"{count:,} files of " if count != 1 else "1 file of "
        amount = f"{files}{kinds}, {number_of(stats.records, 'record')}"
        line = f"{printable(self.path)}: {self.format.name} ({amount})"
        # A program's own function has no name.
        if self.map and self.map.name:
            line += f", through {self.map.name}"
        if "OASST" in self.format.name:
            paths = "all paths" if self.trees == "all" else f"{self.trees} path"
            line += f", {paths} of each tree"
        for reason, count in stats.dropped.items():
            # A chat template's own words may be long, and of any characters.
            short_reason = printable(reason[:160])
            line += f", dropped {count:,} ({short_reason})"
        for what, count in stats.altered.items():
            line += f", {count:,} {what}"
        for note in sorted({each.header_note for each in self.containers if each.header_note}):
            line += f", {note}"
        if self.listing.description is not None:
            line += ", as dataset_info.json describes it"
        if self.listing.num_others:
            line += f", {self.listing.num_others:,} other files left alone"
        parts = self.listing.note(self.root)
        if parts:
            line += f", {printable(parts)}"
        if stats.ignored:
            line += f", ignored keys {quote_names(stats.ignored)}"
        return line


def open_source(
    path: Path | str | Fetched,
    trees: str = "best",
    map_fn: Map | None = None,
    part: str = TRAIN,
    skip_bad: bool | None = None,
    prompt_formats: tuple[Format, ...] | None = None,
) -> Source:
    """Recognizes a file, or all files of a folder, by the keys of the first record.

    path: a file in UTF-8, with or without byte order mark, with any line ends; blank lines between
        the records of JSONL are skipped. Or a folder of such files, or data that were fetched.
    trees: which paths of OASST trees are read, one of oasst.TREES.
    map_fn: the user's function that every record goes through first.
    part: folders.TRAIN, VALIDATION or TEST: which files of a folder with such parts are read, and
        which records of a file whose column says where they belong.
    skip_bad: as in `Source`.
    prompt_formats: the table of formats in place of FORMATS, for records that are read for what
        they ask.

    Raises UserError that names the file, or the record by its number: not UTF-8, not JSON, an
    unknown format, empty. Records that can't be read do not count, unless there is no other among
    the first MAX_TRIES.
    """
    reads_all = False
    files: Sequence[Path | NamedFile] = ()
    if isinstance(path, Fetched):
        root, listing, files, reads_all = path.root, path.listing, path.files(), path.reads_all
    else:
        path = root = Path(path)
        listing = local_listing(root, part)
        files = listing.paths
    containers = [with_columns(recognize(file), FORMAT_KEYS, map_fn is not None) for file in files]
    first_error = None
    num_tries = 0
    for container in containers:
        for number, payload in container.payloads():
            place = container.place(number)
            try:
                value = container.value(number, payload)
                has_parts = isinstance(value, dict) and part_of_record(value) is not None
                if listing.rename is not None and isinstance(value, dict):
                    value = listing.rename(value)
                # The function may return several records or none; the first one decides. What it
                # leaves out is counted when the records are read, not now.
                values = [value]
                if map_fn is not None:
                    values = map_fn(value, place, ReadStats())
                if not values:
                    continue
                format = _format_of(values[0], place, prompt_formats or FORMATS)
            except UserError as error:
                if container.kind.startswith(("CSV", "TSV")):
                    error = UserError(f"{error}{NO_HEADER}")
                first_error = first_error or error
                num_tries += 1
                if num_tries == MAX_TRIES:
                    raise first_error from None
                continue
            if map_fn and format.group:
                raise UserError(
                    f"{path}: --map sees one message of {format.name} at a time;"
                    " convert the file first"
                )
            source = Source(str(path), root, format, containers, listing, trees, map_fn)
            source.for_prompts = prompt_formats is not None
            source.skip_bad = skip_bad
            if first_error is not None:
                source.origin = f"{container.unit} {number}"
            if reads_all:
                source.part = None
            elif part != TRAIN:
                source.part = _part_in_column(source, part) if has_parts else None
            return source
    if first_error is not None:
        raise first_error
    why = "is an empty list"
    if map_fn is not None:
        why = f"--map {map_fn.name} gives None for every record of it"
    purpose = "train on" if prompt_formats is None else "answer"
    raise UserError(f"{path}: {why}; nothing to {purpose}")


def local_listing(path: Path, part: str) -> Listing:
    """Returns the files to be read of a file or folder on this disk."""
    if path.is_dir():
        return list_parts(path, part)
    if path.name == DESCRIPTION and llama_factory_entries(path):
        raise UserError(f"{path}: describes data sets of LLaMA-Factory; name its folder, or a file")
    return Listing([path])


def _part_in_column(source: Source, part: str) -> str | None:
    """Returns which records of a file with a column of parts are read where `part` is asked for:
    the first of PREFERRED that is there; None, for all, where the file has no such records.

    Reads the whole file.
    """
    parts = set()
    for container, number, payload in source.payloads():
        # What can't be read is noted when the records are read.
        with contextlib.suppress(UserError):
            value = source.containers[container].value(number, payload)
            if isinstance(value, dict):
                parts.add(part_of_record(value))
    for choice in PREFERRED[part]:
        if choice in parts:
            return choice
    return None


def _keep_id(records: list[Record], value: dict, where: str, stats: ReadStats) -> None:
    """Writes what a file calls a record, by the first of ID_KEYS, into the records made of it."""
    for key in ID_KEYS:
        name = value.get(key)
        if isinstance(name, (str, int)) and not isinstance(name, bool):
            for record in records:
                record.id = without_surrogate(name, f"{where}: {key}")
            # It is no longer left out.
            stats.ignored.pop(key, None)
            return


def put_system(record: Record, system: str, stats: ReadStats) -> None:
    """Puts a system message before a conversation that has none; one that has is counted."""
    if any(message["role"] == "system" for message in record.messages):
        stats.altered["with a system message of their own, which stays"] += 1
        return
    record.messages = [{"role": "system", "content": system}, *record.messages]
    if record.weights is not None:
        record.weights = [1.0, *record.weights]
    if record.rejected is not None:
        record.asked += 1


def texts_of(record: Record) -> Iterator[str]:
    """Yields the text of a record, or the contents of its messages."""
    if record.messages is None:
        yield record.text
        return
    for message in record.messages:
        content = message.get("content")
        if content:
            yield content


def first_media_mark(record: Record) -> re.Match | None:
    """Returns where a record's text has a mark of an image, a video or a sound; None if nowhere."""
    for text in texts_of(record):
        # Most texts have none of these, and this is faster than the search.
        may_hold_one = "<" in text or "[IMG]" in text or ";base64," in text
        mark = MEDIA_MARK.search(text) if may_hold_one else None
        if mark:
            return mark
    return None


def repeats_question(record: Record) -> bool:
    """True if an answer begins with all of the question before it, and goes on."""
    messages = record.messages or []
    for asked, answer in pairwise(messages):
        if (asked["role"], answer["role"]) != ("user", "assistant"):
            continue
        question = (asked.get("content") or "").strip()
        content = (answer.get("content") or "").strip()
        is_longer = len(content) > len(question) >= SHORTEST_REPEATED
        if is_longer and content.startswith(question):
            return True
    return False


def empty_part(record: Record) -> str | None:
    """Returns the part of a record that is empty, "text" or "answer", or None.

    Such a record would teach the model to answer nothing.
    """
    if record.messages is None:
        if not record.text or record.text.isspace():
            return "text"
        return None
    messages = record.messages
    if record.rejected is not None:
        messages = [*messages, *record.rejected]
    for message in messages:
        if message["role"] == "assistant" and _is_empty_answer(message):
            return "answer"
    return None


def _is_empty_answer(message: dict) -> bool:
    """True if an answer says nothing and calls no tool."""
    content = message.get("content")
    has_content = bool(content) and not content.isspace()
    return not has_content and not message.get("tool_calls")


# ---- conversations ----


def _messages(reading: Reading) -> list[Record]:
    """Reads OpenAI's {"messages"}; the weight of an answer may be 0 or any number."""
    values = require_field(reading.record, "messages", list, reading.where)
    messages, weights = reading.read_messages(values)
    messages, weights = reading.with_system(messages, weights)
    return reading.answered_conversation(messages, weights)


def _sharegpt(reading: Reading) -> list[Record]:
    """Reads ShareGPT's {"conversations"}."""
    values = require_field(reading.record, "conversations", list, reading.where)
    messages, weights = reading.read_messages(values, "conversations")
    messages, weights = reading.with_system(messages, weights)
    return reading.answered_conversation(messages, weights)


# ---- a question and an answer ----


def _join_parts(*parts: str) -> str:
    """Returns the parts of a question, separated by blank lines, without those that are blank."""
    return "\n\n".join(part for part in parts if part.strip())


def _question_and_answer(reading: Reading, question: str, answer: str) -> list[dict]:
    """Returns the two messages."""
    return [{"role": "user", "content": question}, reading.answer(answer)]


def _alpaca(reading: Reading) -> list[Record]:
    """Reads Alpaca (Taori et al. 2023).

    The question is the instruction, a blank line and the input, if any.
    """
    messages, weights = reading.history()
    question = _join_parts(reading.text("instruction"), reading.optional_text("input"))
    messages += _question_and_answer(reading, question, reading.text("output"))
    messages, weights = reading.with_system(messages, [*weights, 1.0, 1.0])
    return reading.conversation(messages, weights)


def _dolly(reading: Reading) -> list[Record]:
    """Reads Dolly (Conover et al. 2023).

    The question is the instruction, a blank line and the context or the input, if any.
    """
    parts = (reading.optional_text("context"), reading.optional_text("input"))
    question = _join_parts(reading.text("instruction"), *parts)
    messages = _question_and_answer(reading, question, reading.text("response"))
    return reading.conversation(*reading.with_system(messages, [1.0, 1.0]))


def _two_columns(question_key: str, answer_key: str) -> Callable[[Reading], list[Record]]:
    """Returns the function that reads a question and an answer.

    They are strings, or messages, as trl has them.
    """

    def read(reading: Reading) -> list[Record]:
        record = reading.record
        history, history_weights = reading.history()
        if _is_list_of_texts(record[answer_key]):
            return _several_answers(reading, question_key, record[answer_key])
        if isinstance(record[question_key], list) or isinstance(record[answer_key], list):
            answer = reading.messages_at(answer_key, "assistant")
            prompt = reading.messages_at(question_key, "user")
            names = f"{question_key} and {answer_key}"
            talk, weights, num_asked = joined_talk(prompt, answer, names, reading.where)
            # Answers within the prompt are not trained.
            weights = prompt_weights(talk[:num_asked], weights[:num_asked]) + weights[num_asked:]
            if talk and talk[-1]["role"] == "assistant":
                talk[-1] = reading.with_thought(talk[-1])
            weights = history_weights + weights
            talk, weights = reading.with_system([*history, *talk], weights)
            return reading.answered_conversation(talk, weights)
        answer = reading.text(answer_key)
        messages = _question_and_answer(reading, reading.text(question_key), answer)
        weights = [*history_weights, 1.0, 1.0]
        messages, weights = reading.with_system([*history, *messages], weights)
        return reading.conversation(messages, weights)

    return read


def _is_list_of_texts(value: object) -> bool:
    """True if a value is a list of strings, at least one."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(each, str) for each in value)


def _several_answers(reading: Reading, question_key: str, answers: list[str]) -> list[Record]:
    """Returns the record of a question with several accepted answers, the first of which is trained."""
    for answer in answers:
        without_surrogate(answer, f"{reading.where}: answer")
    # An answer that says nothing is none. Where all are such, the record is left out as empty.
    answers = [answer for answer in answers if answer.strip()] or answers
    history, weights = reading.history()
    messages = _question_and_answer(reading, reading.text(question_key), answers[0])
    messages, weights = reading.with_system([*history, *messages], [*weights, 1.0, 1.0])
    return reading.conversation(messages, weights, references=_accepted(reading, answers))


def _accepted(reading: Reading, answers: list[str]) -> list[str] | None:
    """Returns the different answers of some that say something, and counts records with several;
    None if there are not two."""
    different = [answer for answer in dict.fromkeys(answers) if answer.strip()]
    if len(different) < 2:
        return None
    reading.stats.altered[SEVERAL_ANSWERS] += 1
    return different


def _numbered_summaries(reading: Reading) -> list[Record]:
    """Reads a dialogue with the summaries of several writers, as DialogSum's part for tests has it
    (Chen et al. 2021)."""
    summaries = [reading.text("summary1")]
    for key in MORE_SUMMARIES:
        if reading.record.get(key) is not None:
            summaries.append(reading.text(key))
    return _several_answers(reading, "dialogue", summaries)


# ---- a question about a text ----


def _context(reading: Reading) -> list[Record]:
    """Reads a question about a text: the text, a blank line, the question.

    The answer is a string, a list of them, or SQuAD's object; the first of several is trained, and
    all are accepted. A question without an answer can't be answered from the text, and is left out.
    """
    record = reading.record
    value = record["answers"] if "answers" in record else record["answer"]
    # SQuAD's object has lists of texts and of their places.
    if isinstance(value, dict):
        value = value.get("text")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(each, (str, dict)) for each in value):
        fault = f"answer is {type_name(value)}, a string or a list of strings is wanted"
        raise UserError(f"{reading.where}: {fault}")
    if not value:
        reading.stats.dropped["without an answer"] += 1
        return []
    answers = []
    for each in value:
        if isinstance(each, dict):
            each = require_field(each, "text", str, reading.where)
        answers.append(without_surrogate(each, f"{reading.where}: answer"))
    question = _join_parts(reading.text("context"), reading.text("question"))
    messages = _question_and_answer(reading, question, answers[0])
    messages, weights = reading.with_system(messages, [1.0, 1.0])
    return reading.conversation(messages, weights, references=_accepted(reading, answers))


def _is_squad(value: dict) -> bool:
    """True if a record's "data" begin with an article of paragraphs."""
    articles = value["data"]
    first = articles[0] if isinstance(articles, list) and articles else None
    return isinstance(first, dict) and "paragraphs" in first


def _squad(reading: Reading) -> list[Record]:
    """Reads SQuAD's file (Rajpurkar et al. 2016).

    It has articles of paragraphs, and questions about each paragraph.
    """
    records = []
    articles = require_field(reading.record, "data", list, reading.where)
    for a, article in enumerate(articles, 1):
        article = require_object(article, reading.where)
        paragraphs = require_field(article, "paragraphs", list, reading.where)
        for p, paragraph in enumerate(paragraphs, 1):
            place = f"{reading.where} article {a} paragraph {p}"
            paragraph = require_object(paragraph, place)
            context = require_field(paragraph, "context", str, place)
            questions = require_field(paragraph, "qas", list, place)
            for q, question in enumerate(questions, 1):
                record = require_object(question, place) | {"context": context}
                where = f"{place} question {q}"
                require_field(record, "question", str, where)
                require_field(record, "answers", list, where)
                for answered in _context(Reading(record, where, reading.stats, reading.trees)):
                    answered.nested = (a, p, q)
                    records.append(answered)
    return records


def _pubmedqa(reading: Reading) -> list[Record]:
    """Reads PubMedQA (Jin et al. 2019): the parts of an abstract, a question about it, an answer.

    The answer is the long one, not yes or no.
    """
    parts = require_field(reading.record, "CONTEXTS", list, reading.where)
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f"{reading.where}: CONTEXTS holds what is no string")
    for part in parts:
        without_surrogate(part, reading.where)
    question = _join_parts(*parts, reading.text("QUESTION"))
    messages = _question_and_answer(reading, question, reading.text("LONG_ANSWER"))
    return reading.conversation(messages)


# ---- classes and plain text ----


def _classes(text_key: str, label_key: str) -> Callable[[Reading], list[Record]]:
    """Returns the function that reads a text and its class.

    The text is the question, the class the answer.
    """

    def read(reading: Reading) -> list[Record]:
        label = reading.record[label_key]
        # A bool is an int, too.
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            fault = f"{label_key} is {type_name(label)}, a string or a whole number is wanted"
            raise UserError(f"{reading.where}: {fault}")
        answer = without_surrogate(str(label), f"{reading.where}: {label_key}")
        return reading.conversation(_question_and_answer(reading, reading.text(text_key), answer))

    return read


def _plain(reading: Reading) -> list[Record]:
    """Reads {"text"}, or a part of a plain-text file."""
    part = reading.record
    if isinstance(part, Text):
        return [Record(None, part.text, reading.where, first=part.first, last=part.last)]
    return [Record(None, reading.text("text"), reading.where)]


# ---- the table of formats ----

# Columns of a question and an answer. A record that has several of these pairs is read by the first
# one.
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
    ("input", "output"), ("problem", "solution"), ("document", "summary"), ("dialogue", "summary"),
    ("article", "highlights"), ("source", "target"), ("text", "code"), ("question", "answers"),
)  # fmt: skip
# Columns of a text and its class.
CLASSES = (
    ("text", "label"), ("sentence", "label"), ("text", "category"), ("text", "intent"),
)  # fmt: skip
# Optional keys of conversations.
CHAT = ("system", "tools", "functions", "weight")
PREFERENCE = (*TALKS, *CHAT)


def _context_formats() -> list[Format]:
    """Returns the rows of the table for a question about a text."""
    formats = []
    for answer in ("answers", "answer"):
        keys = ("context", "question", answer)
        more = ("system", *THOUGHTS)
        formats.append(Format("context and question", keys, ("weight",), _context, aliases=more))
    return formats


def _two_column_formats() -> list[Format]:
    """Returns the rows of the table for PAIRS and CLASSES."""
    formats = []
    for question, answer in PAIRS:
        name = f"{question} and {answer}"
        read = _two_columns(question, answer)
        keys = (question, answer)
        more = ("history", *THOUGHTS)
        formats.append(Format(name, keys, ("system", "weight"), read, aliases=more))
    for text, label in CLASSES:
        name = f"{text} and its {label}"
        formats.append(Format(name, (text, label), ("weight",), _classes(text, label)))
    return formats


# The first row that fits wins: Stanford's own Alpaca file has a rendered "text" in each record,
# next to instruction and output, and is no plain text.
FORMATS = (
    Format(
        "preferences",
        ("chosen", "rejected"),
        PREFERENCE,
        preference,
        aliases=(*QUESTIONS, "input"),
    ),
    Format("KTO", ("messages", "label"), CHAT, kto),
    Format("KTO", ("conversations", "label"), CHAT, kto),
    Format("KTO", ("prompt", "completion", "label"), CHAT, kto),
    Format("messages", ("messages",), CHAT, _messages),
    Format("ShareGPT", ("conversations",), CHAT, _sharegpt),
    Format("OASST trees", ("message_tree_id", "prompt"), ("tree_state",), oasst_tree),
    OASST_MESSAGES,
    Format(
        "Alpaca",
        ("instruction", "output"),
        ("input", "system", "history", "weight"),
        _alpaca,
        aliases=THOUGHTS,
    ),
    Format(
        "Dolly",
        ("instruction", "response"),
        ("context", "input", "weight"),
        _dolly,
        aliases=("system", *THOUGHTS),
    ),
    Format("SQuAD", ("data",), ("version",), _squad),
    Format("PubMedQA", ("QUESTION", "CONTEXTS", "LONG_ANSWER"), ("weight",), _pubmedqa),
    *_context_formats(),
    *_two_column_formats(),
    Format(
        "dialogue and summaries",
        ("dialogue", "summary1"),
        ("system", "weight"),
        _numbered_summaries,
        aliases=("history", *MORE_SUMMARIES),
    ),
    Format("plain text", ("text",), (), _plain, kind=(dict, Text)),
)
# The keys of each format, and of both together all columns that some format reads.
FORMAT_KEYS = [format.keys for format in FORMATS if format.kind is dict or dict in format.kind]
# The formats that the error about an unknown one lists.
COMMON = (
    "messages", "ShareGPT", "Alpaca", "prompt and completion", "text and its label", "preferences",
    "plain text", "prompt alone",
)  # fmt: skip


def _format_of(value: object, where: str, formats: tuple[Format, ...]) -> Format:
    """Returns the first format of a table that fits a value.

    Raises UnknownFormat with the known ones if none does, UserError if the value holds several records.
    """

    def fitting(each: object) -> Format | None:
        for format in formats:
            if isinstance(each, format.kind) and format.fits(each):
                return format
        return None

    def has_columns(each: dict) -> bool:
        # A text alone may be a part of anything.
        format = fitting(each)
        return format is not None and len(format.keys) > 1

    found = fitting(value)
    if isinstance(value, dict):
        # SQuAD's key is also what others call a list of records.
        is_record = found is not None and (found.read is not _squad or _is_squad(value))
        fault = layout_fault(value, is_record, has_columns)
        if fault:
            raise UserError(f"{where}: {fault}")
    if found is not None:
        return found
    record = require_object(value, where)
    all_keys = []
    known_formats = []
    for format in formats:
        all_keys += format.keys
        if format.name in COMMON:
            keys = ", ".join(format.keys)
            known_formats.append(f"{format.name} ({keys})")
    hint = closest_key(record, all_keys, record)
    known = ", ".join(known_formats)
    raise UnknownFormat(
        f"{where}: keys {quote_names(record)}: no known format; known: {known}, and more at the"
        f" head of dataset/formats.py; --map FILE.py:NAME makes one of them{hint}"
    )
