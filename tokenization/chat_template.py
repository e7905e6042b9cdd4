"""Chat templates: a Jinja program writes a conversation as text; this file finds the answers in the
text.

A template is a program from a downloaded folder. It runs in jinja2's sandbox, which keeps it from
the interpreter's internals but limits neither time nor memory ('a' * 300_000_000, loops in loops).
So the sandbox runs in a process of its own with limits: `python tokenization/chat_template.py`
reads jobs as lines of JSON and answers with lines of JSON, and `Template` is the caller's side. The
text equals that of transformers' apply_chat_template.

`Template.locate` finds the answers without knowing the template: it renders the conversation a
second time with another text in the place of each answer, between marks that occur nowhere else. If
only these places change, they are the answers. An answer begins where the text that asks for it
ends (add_generation_prompt).
"""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cached_property
from itertools import islice
from os.path import commonprefix

# Limits of a conversation's rendering.
MAX_SECONDS = 10  # of processor time
# So many times as long is waited for, since processes may be stopped, and other work go first.
PATIENCE = 6
SHORT_WAIT = 0.5  # seconds
MAX_MEMORY = 1 << 30  # bytes of address space
MAX_CHARACTERS = 1 << 26  # characters of the text

Span = tuple[int, int]  # [start, end), in characters
Job = tuple[list[dict], list | None, bool]  # messages, tools, add_generation_prompt


class Refused(Exception):
    """The template raised an error, broke a limit, or changes an answer so that it can't be found
    in the text."""


# ---- the process that runs a template ----


def serve_templates() -> None:
    """Renders jobs until the standard input ends; the process's whole life.

    The first line of the input is {"template", "names", "date", "seconds"}. Each further line is a
    list of jobs, {"messages", "tools", "add_generation_prompt"}, and is answered with a line: a list
    of {"text"} or {"error"}, one for each job. A line that takes more seconds of processor time ends
    the process by SIGPROF.
    """
    # Windows has no module `resource`; and a limit can't be raised where it is lower already.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    settings = json.loads(sys.stdin.readline())
    template = None
    template_error = ""
    # Jinja computes what is constant already when it reads the template.
    limit_processor_time(settings["seconds"])
    try:
        template = environment(settings["date"]).from_string(settings["template"])
    except Exception as error:  # noqa: BLE001  a stranger's program may fail in any way
        template_error = error_text(error)
    # The terminal sends Ctrl-C to all processes. This one ends with its input instead.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        if not line.endswith("\n"):
            # The caller was killed while it wrote the line.
            return
        limit_processor_time(settings["seconds"])
        jobs = json.loads(line, parse_float=written_number)
        results = []
        for job in jobs:
            if template is None:
                results.append({"error": template_error})
            else:
                results.append(render_job(template, job, settings["names"]))
        text = json.dumps(results)
        limit_processor_time(0)
        try:
            print(text, flush=True)
        except BrokenPipeError:
            # The caller has ended.
            os._exit(0)


def limit_processor_time(seconds: float) -> None:
    """Ends this process by SIGPROF after so much processor time from now on; 0: no longer.

    Not by the clock, which goes on while processes are stopped or wait for others: a template would
    be refused for that. The signal ends a long computation within the interpreter as well.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def render_job(template, job: dict, names: dict[str, str]) -> dict[str, str]:
    """Returns {"text"} of a job, or {"error"} with the reason. names: bos_token, eos_token, ... for
    the template."""
    try:
        text = template.render(**job, documents=None, **names)
    except Exception as error:  # noqa: BLE001
        return {"error": error_text(error)}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"it writes over {MAX_CHARACTERS:,} characters"}
    return {"text": text}


def error_text(error: Exception) -> str:
    """Returns what to tell the user about an exception of a template."""
    if isinstance(error, MemoryError):
        return f"it takes more than {MAX_MEMORY >> 20} MB of memory"
    message = str(error)[:1000]
    return message if message else type(error).__name__


def environment(day: str):
    """The jinja2 environment that transformers promises to templates: a sandbox, tags and helpers.

    day: the date that templates may write, as 2026-11-29. It is a setting, and not the clock's, so
    that a run that goes on on another day writes what it wrote before.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %}: a template's own marks around an answer. Only the
        text between them is used, since `Template.locate` needs no marks."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)  # the word `generation` itself
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        # At midnight, since another second in each prompt would teach nothing.
        return datetime.fromisoformat(day).strftime(format)

    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    jinja.globals["raise_exception"] = raise_exception
    jinja.globals["strftime_now"] = strftime_now
    jinja.filters["tojson"] = to_json
    return jinja


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Replaces jinja2's own filter, which escapes for HTML: no model was trained on that."""
    return to_exact_json(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


# ---- numbers, digit by digit ----


class WrittenNumber(float):
    """A number of a JSON text whose digits Python would write in another way: 1.10 or 1e5, or more
    digits than a float holds. It is that float, and is written as it stood in the text.

    text: how it stood there.
    """

    __slots__ = ("text",)
    # Whether this process has one, so that JSON without any is written at once.
    exists = False

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.text = text
        WrittenNumber.exists = True
        return number

    def __reduce__(self):
        return WrittenNumber, (self.text,)

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def written_number(text: str) -> float:
    """Returns the number of a JSON text; the argument `parse_float` of a JSON decoder."""
    number = float(text)
    if repr(number) == text:
        return number
    return WrittenNumber(text)


def to_exact_json(value: object, **options) -> str:
    """Returns `json.dumps(value, **options)`, in which every WrittenNumber stands as it was
    written."""
    if not WrittenNumber.exists:
        return json.dumps(value, **options)
    # json.dumps writes a subclass of float as the float. So each is written as a string between
    # marks that nobody can know, which is then freed from its quotes.
    mark = os.urandom(8).hex()
    text = json.dumps(mark_numbers(value, mark), **options)
    return re.sub(f'"{mark}([^"]*){mark}"', r"\1", text)


def mark_numbers(value: object, mark: str) -> object:
    """Returns a value with every WrittenNumber as its text between marks."""
    if isinstance(value, WrittenNumber):
        return mark + value.text + mark
    if isinstance(value, dict):
        return {key: mark_numbers(each, mark) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [mark_numbers(each, mark) for each in value]
    return value


# ---- the caller's side ----


@dataclass(frozen=True)
class Conversation:
    """A conversation to render. roles: the roles whose messages count as answers."""

    messages: list[dict]
    tools: list | None = None
    add_generation_prompt: bool = False
    roles: tuple[str, ...] = ("assistant",)

    def is_answer(self, message: dict) -> bool:
        """True if the message is of one of the roles and holds words or tool calls."""
        if message.get("role") not in self.roles:
            return False
        content = message.get("content")
        has_words = isinstance(content, str) and bool(content.strip())
        return has_words or bool(message.get("tool_calls"))


@dataclass(frozen=True)
class Answer:
    """An assistant's message in the text.

    begin: where the text that asks for the answer ends, so that all from here on is the answer's.
    [first, last): the words that are certainly the message's.
    has_tool_calls: the template's own words for the calls belong to the answer as well.
    message: the number of the message in the conversation.
    is_last: it is the last message of the conversation.
    is_as_asked: False for a last answer that a server would ask for in other words than stand
    before it: with <think> at the end, for example, or with the system message.
    """

    begin: int
    first: int
    last: int
    has_tool_calls: bool
    message: int
    is_last: bool
    is_as_asked: bool = True


@dataclass
class Rendered:
    """The text of a conversation, and where the answers are in it.

    text: the text. other: the same, with another text in the place of each answer.
    answers: the answers, in their order in the text.
    seams: where generation stops writing the prompt and the model goes on: the beginnings of the
    answers that a template asks for, ascending.
    quoted: spans of the messages' own words, in which the text of a control token is plain text.
    parts: (start, end, growth) of each span that differs in `other`, where it is `growth`
    characters longer.
    has_generation_prompt: the text ends with the beginning of an answer that is still to be
    written.
    """

    text: str
    other: str
    answers: list[Answer]
    quoted: list[Span]
    parts: list[tuple[int, int, int]]
    has_generation_prompt: bool = False
    seams: list[int] = field(default_factory=list)

    def position_in_other(self, position: int) -> int:
        """Returns the position in `other` of a position in `text` that is not inside one of the
        parts."""
        growths = [growth for _, end, growth in self.parts if end <= position]
        return position + sum(growths)


def today() -> str:
    """Returns the date, as 2026-11-29."""
    return date.today().isoformat()


class Template:
    """A template in a process of its own, which starts at the first use and ends with this object.

    source: the Jinja program. names: bos_token, eos_token, ... as the template may write them.
    day: the date that it may write, as 2026-11-29; "" for today.
    """

    def __init__(self, source: str, names: dict[str, str], day: str = ""):
        self.source = source
        self.names = names
        self.day = day or today()
        self.process = None

    def render(
        self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Returns the text of a conversation. Raises Refused with the reason."""
        return self.render_all([(messages, tools, add_generation_prompt)])[0]

    def render_all(self, jobs: list[Job]) -> list[str]:
        """Returns the texts of several jobs. Raises Refused with the reason of the first one that
        has none."""
        texts = self.try_all(jobs)
        for text in texts:
            if isinstance(text, Refused):
                raise text
        return texts

    def try_all(self, jobs: list[Job]) -> list["str | Refused"]:
        """Returns the text of each job, or why the template does not write it. Raises Refused where
        a limit is broken, since the process ends then and no job has a result."""
        lines = self.encode_jobs(jobs)
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, os.path.abspath(__file__)]
            # Without buffers, so that `read_line` can wait for the pipe itself.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
            settings = {"template": self.source, "names": self.names, "date": self.day}
            settings["seconds"] = MAX_SECONDS
            lines = json.dumps(settings).encode() + b"\n" + lines
        try:
            self.write(lines)
            results = json.loads(self.read_line())
        except (OSError, ValueError):
            self.close()
            raise Refused("the process that runs it ended") from None
        except Refused:
            self.close()
            raise
        texts: list[str | Refused] = []
        for result in results:
            if "text" in result:
                texts.append(result["text"])
            else:
                texts.append(Refused(result["error"]))
        return texts

    def encode_jobs(self, jobs: list[Job]) -> bytes:
        """Returns the line of JSON that `serve_templates` reads."""
        objects = []
        for messages, tools, prompted in jobs:
            job = {"messages": messages, "tools": tools, "add_generation_prompt": prompted}
            objects.append(job)
        return to_exact_json(objects).encode() + b"\n"

    def write(self, lines: bytes) -> None:
        """Writes all of some lines to the process: a write to a pipe may take a part only."""
        while lines:
            written = self.process.stdin.write(lines)
            lines = lines[written:]

    def read_line(self) -> bytes:
        """Reads a line from the process. Raises Refused where it takes longer than MAX_SECONDS, or
        where the process has ended."""
        output = self.process.stdout
        has_own_clock = hasattr(signal, "setitimer")
        longest_wait = MAX_SECONDS * PATIENCE if has_own_clock else MAX_SECONDS
        waited = 0.0
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            # In short waits, so that a time in which this process was stopped counts as one of them.
            start = time.monotonic()
            readable, _, _ = select.select([output], [], [], SHORT_WAIT)
            if not readable:
                waited += min(SHORT_WAIT, time.monotonic() - start)
                if waited >= longest_wait:
                    raise Refused(f"it takes longer than {MAX_SECONDS} s")
                continue
            part = os.read(output.fileno(), 1 << 20)
            if not part and has_own_clock and self.process.wait() == -signal.SIGPROF:
                raise Refused(f"it takes longer than {MAX_SECONDS} s")
            if not part:
                limit = f"{MAX_MEMORY >> 20} MB"
                raise Refused(
                    f"it takes more than {limit} of memory, or ended its process otherwise"
                )
            parts.append(part)
        return b"".join(parts)

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def __del__(self):
        # When the interpreter ends, anything that `close` needs may be gone.
        with contextlib.suppress(Exception):
            self.close()

    # ---- where the answers are ----

    @cached_property
    def generation_prompt(self) -> str:
        """The text that add_generation_prompt appends to a user's message, found by a trial; "" if
        it can't be told."""
        messages = [{"role": "user", "content": "a"}]
        with contextlib.suppress(Refused):
            without, prompted = self.render_all([(messages, None, False), (messages, None, True)])
            if prompted.startswith(without):
                return prompted[len(without) :]
        return ""

    def locate(
        self, conversations: list[Conversation], control: re.Pattern
    ) -> list["Rendered | Refused"]:
        """Renders conversations and finds their answers.

        control: finds the texts of control tokens; words of messages that hold one become quoted
        spans.
        Returns for each conversation its text with the answers, or why the template does not write
        it or changes the messages so that they can't be found.
        """
        plans = [self.plan(conversation, control) for conversation in conversations]
        all_jobs = []
        for _, jobs in plans:
            all_jobs += jobs
        results: list[Rendered | Refused] = []
        try:
            texts = iter(self.try_all(all_jobs))
        except Refused as refusal:
            if len(conversations) == 1:
                return [refusal]
            # One of them breaks a limit, or all together do: each is tried by itself.
            for conversation in conversations:
                results += self.locate([conversation], control)
            return results
        for conversation, (ways, jobs) in zip(conversations, plans, strict=True):
            text, *marked_texts = islice(texts, len(jobs))
            try:
                results.append(self.find_answers(conversation, ways, text, marked_texts))
            except Refused as refusal:
                results.append(refusal)
        return results

    def plan(
        self, conversation: Conversation, control: re.Pattern
    ) -> tuple[list["Marks"], list[Job]]:
        """Returns the ways to mark the answers, best first, and what to render: the conversation as it
        is, then, for each way, with its marks."""
        messages = conversation.messages
        tools = conversation.tools
        prompted = conversation.add_generation_prompt
        # A template may leave out a thought that is a part of the content. Then only the words
        # after it are looked for.
        has_thoughts = False
        for message in messages:
            if message.get("role") == "assistant" and "</think>" in str(message.get("content")):
                has_thoughts = True
        ways = [Marks(conversation, self.source, control, whole=True)]
        if has_thoughts:
            ways.append(Marks(conversation, self.source, control, whole=False))
        jobs: list[Job] = [(messages, tools, prompted)]
        for marks in ways:
            marked_messages = [marks.message(message, i) for i, message in enumerate(messages)]
            jobs.append((marked_messages, marks.quote(tools), prompted))
        return ways, jobs

    def find_answers(
        self,
        conversation: Conversation,
        ways: list["Marks"],
        text: "str | Refused",
        marked_texts: list["str | Refused"],
    ) -> Rendered:
        """Finds the answers by the first of the marked texts that allows it. Raises Refused with
        the reason."""
        for each in (text, *marked_texts):
            if isinstance(each, Refused):
                raise each
        has_calls = any(message.get("tool_calls") for message in conversation.messages)
        if has_calls and "tool_call" not in self.source:
            reason = "it has no place for tool calls; use a model whose template has one"
        else:
            cause = "it rewrites the content of a message, or leaves it out"
            reason = f"{cause}, so that an answer can't be found in it"
        for marks, marked in zip(ways, marked_texts, strict=True):
            result = marks.read(text, marked)
            if result is None:
                continue
            rendered, extents = result
            try:
                return self.add_answers(rendered, extents, conversation)
            except Refused as refusal:
                reason = str(refusal)
        raise Refused(reason)

    def add_answers(
        self, rendered: Rendered, extents: dict[int, Span], conversation: Conversation
    ) -> Rendered:
        """Adds the answers to a rendered conversation, and returns it.

        extents: for each answer, by the number of its message, the span of its words.
        Raises Refused where it can't be told where an answer begins.
        """
        messages = conversation.messages
        rendered.has_generation_prompt = conversation.add_generation_prompt
        previous_end = 0
        for i, (first, last) in sorted(extents.items()):
            has_calls = bool(messages[i].get("tool_calls"))
            is_as_asked = True
            if messages[i]["role"] == "assistant":
                begin, is_as_asked = self.answer_begin(
                    rendered.text, messages[:i], conversation.tools, first
                )
                # Templates move tools and drop thoughts when the conversation goes on. So it is the
                # last answer that must be asked for in the words that stand before it.
                is_as_asked = is_as_asked or i < len(messages) - 1
                has_words_before = bool(rendered.text[begin:first].strip())
                asks_for_answers = bool(self.generation_prompt.strip())
                if has_words_before and not asks_for_answers and not has_calls:
                    # Nothing asks for an answer, so the words before it are the name of the role.
                    begin = first
            else:
                begin = first
                # The token of the first word may take the space before it along.
                if rendered.text[previous_end:first].endswith(" "):
                    begin -= 1
            in_order = previous_end <= begin <= first
            # The template writes its own words for a call before the name of the function.
            lacks_call = has_calls and begin == first
            if not in_order or lacks_call:
                raise Refused("it can't be told where an answer begins")
            is_last = i == len(messages) - 1
            # Nothing asks for a user's message.
            if messages[i]["role"] == "assistant":
                rendered.seams.append(begin)
            answer = Answer(begin, first, last, has_calls, i, is_last, is_as_asked)
            rendered.answers.append(answer)
            previous_end = last
        return rendered

    def answer_begin(
        self, text: str, before: list[dict], tools: list | None, first: int
    ) -> tuple[int, bool]:
        """Returns where an answer begins, behind the text that asks for it, and False if that text
        is another than what a server asks with.

        before: the messages before the answer. first: position of the first word that is certainly
        the answer's.
        """
        generation_prompt = self.generation_prompt
        if generation_prompt.strip() and text.endswith(generation_prompt, 0, first):
            return first, True

        # The messages before the answer, rendered with the generation prompt, are the beginning of
        # the text.
        prompted = None
        if before:
            prompted = self.try_all([(before, tools, True)])[0]
        if isinstance(prompted, str):
            if text.startswith(prompted):
                return len(prompted), True
            # The rest of the conversation may change how earlier messages are written. The last one
            # before the answer stays the same, so its words and what follows them are looked for.
            words = str(before[-1].get("content")).strip()
            ending = prompted
            if words in prompted:
                ending = prompted[prompted.rfind(words) :]
            position = text.rfind(ending, 0, first)
            if words and position >= 0:
                return position + len(ending), False

            # The template asks for an answer in other words than it writes before one: with
            # <think>, for example. Then the answer begins behind what both have in common.
            without = self.try_all([(before, tools, False)])[0]
            if isinstance(without, str) and prompted.startswith(without):
                generation_prompt = prompted[len(without) :]
                if text.startswith(without):
                    common = commonprefix([generation_prompt, text[len(without) : first]])
                    if common:
                        return len(without) + len(common), False

        if generation_prompt.strip():
            position = text.rfind(generation_prompt, 0, first)
            if position >= 0:
                return position + len(generation_prompt), False
        # Before the first message of all nothing asks, nor where the template refuses to.
        return first, not isinstance(prompted, str)


class Marks:
    """Puts another text, between marks, in the place of every answer's words, and marks around any
    other string that holds the text of a control token; then reads both back out of the rendered
    text.

    The marks are four characters of Unicode's private use area that occur neither in the
    conversation nor in the template. source: the template. control: finds the texts of control
    tokens. whole: a thought in the content is a part of the answer's words; False: only what
    follows the thought is.
    """

    def __init__(self, conversation: Conversation, source: str, control: re.Pattern, whole: bool):
        used = f"{conversation.messages}{conversation.tools}{source}"
        private_use = map(chr, range(0xE000, 0xF8FF))
        free = (character for character in private_use if character not in used)
        self.open_answer, self.close_answer, self.open_quote, self.close_quote = islice(free, 4)
        self.is_answer = conversation.is_answer
        self.control = control
        self.whole = whole
        # Of each replaced part: the number of its message, and its words.
        self.parts: list[tuple[int, str]] = []

    def message(self, message: dict, number: int) -> dict:
        """Returns a message with marks. number: its place in the conversation."""
        if not self.is_answer(message):
            return self.quote(message)
        others = {key: value for key, value in message.items() if key != "content"}
        marked = self.quote(others)
        if "content" in message:
            marked["content"] = self.words(message["content"], number)
        if marked.get("tool_calls"):
            marked["tool_calls"] = [self.call(call, number) for call in marked["tool_calls"]]
        return marked

    def words(self, content: object, number: int) -> object:
        """Returns an answer's content with another text in the place of its words; unless `whole`,
        only the words after a thought are replaced, since templates may leave thoughts out.

        Space around the words stays outside of the marks, since templates strip it.
        """
        if not isinstance(content, str) or not content.strip():
            return self.quote(content)
        inner = content.strip()
        if not self.whole:
            _, _, behind_thought = content.rpartition("</think>")
            # A message may be nothing but a thought.
            if behind_thought.strip():
                inner = behind_thought.strip()
        before, _, after = content.rpartition(inner)
        return self.quote(before) + self.replacement(number, inner) + self.quote(after)

    def call(self, call: object, number: int) -> object:
        """Returns a tool call with another text in the place of the function's name."""
        # OpenAI's form has the function as an object in the call; others have its name in the call.
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            return call | {"function": self.with_other_name(call["function"], number)}
        return self.with_other_name(call, number)

    def with_other_name(self, function: object, number: int) -> object:
        """Returns a function to call with another text in the place of its name, if it has one."""
        if not isinstance(function, dict):
            return function
        name = function.get("name")
        if not isinstance(name, str) or not name.strip():
            return function
        return function | {"name": self.replacement(number, name)}

    def replacement(self, number: int, words: str) -> str:
        """Notes a part, the words of message `number`, and returns the text with marks that takes
        their place."""
        part = len(self.parts)
        self.parts.append((number, words))
        return f"{self.open_answer}Other{part}{self.close_answer}"

    def quote(self, value: object) -> object:
        """Returns a value with marks around those strings in it that hold the text of a control
        token."""
        if isinstance(value, str):
            inner = value.strip()
            if not self.control.search(inner):
                return value
            return value.replace(inner, self.open_quote + inner + self.close_quote, 1)
        if isinstance(value, dict):
            quoted = {}
            for key, item in value.items():
                # Templates compare the role with names.
                quoted[key] = item if key == "role" else self.quote(item)
            return quoted
        if isinstance(value, list):
            return [self.quote(item) for item in value]
        return value

    def read(self, text: str, marked: str) -> tuple[Rendered, dict[int, Span]] | None:
        """Finds the marks in a marked text, and with them the words in the text.

        Returns the rendered conversation, still without its answers, and for each answer, by the
        number of its message, the span of its words; or None where the template does not write
        every part once and unchanged.
        """
        rendered = Rendered(text, "", [], [], [])
        extents: dict[int, Span] = {}
        texts: list[str] = []  # pieces of `text`, as it should be
        others: list[str] = []  # the same pieces of `other`
        parts: list[int] = []  # numbers of the parts, in the order in which they were found
        position = 0  # in `text`
        done = 0  # in `marked`
        for match in self.find_marks(marked):
            between = marked[done : match.start()]
            position += len(between)
            done = match.end()
            if match[1] is None:
                words = match[2]
                other = words
                end = position + len(words)
            else:
                part = int(match[1])
                if part >= len(self.parts):
                    return None  # the template changes digits
                number, words = self.parts[part]
                other = match[0][1:-1]  # without the marks
                end = position + len(words)
                parts.append(part)
                # A message with words and calls has several parts, and extends over all of them.
                first, _ = extents.get(number, (position, position))
                extents[number] = (first, end)
                growth = len(other) - len(words)
                rendered.parts.append((position, end, growth))
            rendered.quoted.append((position, end))
            texts += [between, words]
            others += [between, other]
            position = end
        rest = marked[done:]
        rendered.other = "".join(others) + rest
        unmarked = "".join(texts) + rest
        all_answers = {number for number, _ in self.parts} == extents.keys()
        all_once = len(parts) == len({*parts})
        # A mark without its partner stays in the marked text, so that the texts differ.
        if not all_answers or not all_once or unmarked != text:
            return None
        return rendered, extents

    def find_marks(self, marked: str) -> Iterator[re.Match]:
        """Yields matches whose group 1 is the number of a replaced part, or whose group 2 is quoted
        words."""
        any_mark = f"{self.open_answer}{self.close_answer}{self.open_quote}{self.close_quote}"
        replaced = f"{self.open_answer}Other(\\d+){self.close_answer}"
        quoted = f"{self.open_quote}([^{any_mark}]*){self.close_quote}"
        return re.finditer(f"{replaced}|{quoted}", marked)


# ---- named templates, for models that have none ----

# The prompt of Taori et al. 2023 (Stanford Alpaca), with bos where the tokenizer has one and eos
# after each answer. A system message takes the place of the first sentence.
ALPACA = r"""{{ bos_token }}
{%- if messages[0].role != 'system' -%}
Below is an instruction that describes a task. Write a response that appropriately completes the request.
{%- endif -%}
{%- for message in messages -%}
{{ '\n\n' if message.role != 'system' or not loop.first }}
{%- if message.role == 'user' -%}{{ '### Instruction:\n' + message.content }}
{%- elif message.role == 'assistant' -%}{{ '### Response:\n' + message.content }}{{ eos_token }}
{%- elif message.role == 'system' -%}{{ message.content }}
{%- else -%}{{ raise_exception('it has no place for the role ' + message.role) }}{%- endif -%}
{%- endfor -%}
{{ '\n\n### Response:\n' if add_generation_prompt }}"""
# OpenAI's ChatML. The tokenizer must have the control tokens <|im_start|> and <|im_end|>.
CHATML = r"""{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\n' if add_generation_prompt }}"""
# A template without words of its own: a prompt, a line end, the answer, eos.
PLAIN_TEXT = r"""{{ bos_token }}
{%- for message in messages -%}
{{ message.content }}{{ eos_token if message.role == 'assistant' else '\n' }}
{%- endfor -%}"""
NAMED = {"alpaca": ALPACA, "chatml": CHATML, "plain": PLAIN_TEXT}


if __name__ == "__main__":
    serve_templates()
