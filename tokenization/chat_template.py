"""Chat templates: conversations to text, by a stranger's Jinja program, and where in the text the answers stand.

A template is a program out of a downloaded folder. It runs in jinja2's sandbox, which keeps it from the interpreter's
insides but bounds neither time nor memory ('a' * 300_000_000, loops in loops), so the sandbox stands in a process of
its own with limits: `python tokenization/chat_template.py` reads jobs as lines of JSON and answers with lines of JSON.
`Template` is the other end. The text is that of transformers' apply_chat_template.

`locate` finds the answers without knowing the template: it renders the conversation a second time with another text in
each answer's place, between marks that occur nowhere else. If that changes nothing but those places, they are the
answers; where a turn begins is the end of the text that would have asked for it (add_generation_prompt).
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
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import islice
from os.path import commonprefix

SECONDS, MEMORY, LONGEST = 10, 1 << 30, 1 << 26  # of a conversation: time; address space, bytes; its text, characters

Span = tuple[int, int]  # [start, end), in characters


class Refused(Exception):
    """The template raised an error, broke a limit, or changes an answer so that it can't be told where it stands."""


# ---- the process that runs a template ----


def serve() -> None:
    """Answers jobs until its input ends. First line: {"template", "names"}; then a list of jobs a line, each
    {"messages", "tools", "add_generation_prompt"}. Answers a list of {"text"} or {"error"}."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows; or the limit is lower already
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    setting, template, broken = json.loads(sys.stdin.readline()), None, ""
    try:
        template = environment().from_string(setting["template"])
    except Exception as error:  # noqa: BLE001  somebody's program may fail in any way
        broken = reason(error)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; this process ends with its input
    for line in sys.stdin:
        if not line.endswith("\n"):  # who asks was killed in the middle of it
            return
        answers = []
        for job in json.loads(line):
            try:
                text = template.render(**job, documents=None, **setting["names"]) if template else ""
                answers.append({"error": broken} if broken else {"text": text})
                if len(text) > LONGEST:
                    answers[-1] = {"error": f"it writes over {LONGEST:,} characters"}
            except Exception as error:  # noqa: BLE001
                answers.append({"error": reason(error)})
        try:
            print(json.dumps(answers), flush=True)
        except BrokenPipeError:  # who asked is gone
            os._exit(0)


def reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"it takes more than {MEMORY >> 20} MB of memory"
    return str(error)[:1000] or type(error).__name__


def environment():
    """What transformers promises to templates: a sandbox, tags and helpers."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %}, where a template itself says what an answer is: its text counts."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    jinja.globals["raise_exception"] = raise_exception
    jinja.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    jinja.filters["tojson"] = to_json
    return jinja


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja2's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# ---- the other end ----


@dataclass(frozen=True)
class Answer:
    """An assistant's turn in the text: head, where what would have asked for it ends; [first, last), what is certainly
    the message's. calls: there are tool calls in it, so that the template's own words belong to it as well."""

    head: int
    first: int
    last: int
    calls: bool
    number: int  # of the message
    ends_all: bool  # it is the conversation's last turn


@dataclass
class Rendered:
    """A conversation's text; `other`, the same with another text in each answer's place; quoted: spans of the messages'
    own words in which no control token counts; parts: spans that differ in `other`, and by how much they are longer."""

    text: str
    other: str
    answers: list[Answer]
    quoted: list[Span]
    parts: list[tuple[int, int, int]]
    asked: bool = False  # it ends with the head of an answer

    def moved(self, position: int) -> int:
        """The place in `other` of one in `text` that is not inside a part."""
        return position + sum(growth for _, end, growth in self.parts if end <= position)


class Template:
    """A template in its process, which is started when it is first needed and ends with this object."""

    def __init__(self, source: str, names: dict[str, str]):
        self.source, self.names, self.process = source, names, None

    def render(self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False) -> str:
        return self.run([(messages, tools, add_generation_prompt)])[0]

    def run(self, jobs: list[tuple[list[dict], list | None, bool]]) -> list[str]:
        """The texts of some jobs; Refused with the first one's reason."""
        texts = self.attempt(jobs)
        for text in texts:
            if isinstance(text, Refused):
                raise text
        return texts

    def attempt(self, jobs: list[tuple[list[dict], list | None, bool]]) -> list["str | Refused"]:
        names = ("messages", "tools", "add_generation_prompt")
        line = json.dumps([dict(zip(names, job, strict=True)) for job in jobs]).encode() + b"\n"
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, os.path.abspath(__file__)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            line = json.dumps({"template": self.source, "names": self.names}).encode() + b"\n" + line
        try:
            self.write(line)
            answers = json.loads(self.read_line())
        except (OSError, ValueError):
            self.close()
            raise Refused("the process that runs it ended") from None
        except Refused:
            self.close()
            raise
        return [answer["text"] if "text" in answer else Refused(answer["error"]) for answer in answers]

    def write(self, line: bytes) -> None:
        while line:
            line = line[self.process.stdin.write(line) :]

    def read_line(self) -> bytes:
        end, pieces = time.monotonic() + SECONDS, []
        while not (pieces and pieces[-1].endswith(b"\n")):
            if not select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise Refused(f"it takes longer than {SECONDS} s")
            pieces.append(os.read(self.process.stdout.fileno(), 1 << 20))
            if not pieces[-1]:
                raise Refused(f"it takes more than {MEMORY >> 20} MB of memory, or ended its process otherwise")
        return b"".join(pieces)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close(), self.process.stdout.close()
            self.process = None

    def __del__(self):
        with contextlib.suppress(Exception):  # at the interpreter's end anything may be gone
            self.close()

    # ---- where the answers are ----

    @cached_property
    def asking(self) -> str:
        """What add_generation_prompt puts behind a user's turn, tried with one; "" where it can't be told."""
        turn = [{"role": "user", "content": "a"}]
        with contextlib.suppress(Refused):
            without, asked = self.run([(turn, None, False), (turn, None, True)])
            if asked.startswith(without):
                return asked[len(without) :]
        return ""

    def locate(self, conversations: list["Conversation"], control: re.Pattern) -> list["Rendered | Refused"]:
        """Of each conversation its text and where its answers are; or why the template does not render it, or changes
        contents so that they can't be found. control: finds the texts of control tokens; contents that hold one are
        quoted."""
        plans = [self.plan(conversation, control) for conversation in conversations]
        try:
            results = iter(self.attempt([job for _, jobs in plans for job in jobs]))
        except Refused as reason:  # one of them breaks a limit, or all together do
            one_by_one = ([conversation] for conversation in conversations)
            return [reason] if len(plans) == 1 else [each for one in one_by_one for each in self.locate(one, control)]
        found = []
        for conversation, (ways, jobs) in zip(conversations, plans, strict=True):
            text, *marked = islice(results, len(jobs))
            try:
                found.append(self.find(conversation, ways, text, marked))
            except Refused as reason:
                found.append(reason)
        return found

    def plan(self, conversation: "Conversation", control: re.Pattern) -> tuple[list["Marks"], list[tuple]]:
        """Ways to mark the answers, and what is to be rendered: the conversation as it is, then so marked."""
        messages, tools, asks = conversation.messages, conversation.tools, conversation.add_generation_prompt
        thinks = any(message["role"] == "assistant" and "</think>" in str(message.get("content"))
                     for message in messages if "role" in message)  # fmt: skip
        ways = [Marks(conversation, self.source, control, whole) for whole in ([True, False] if thinks else [True])]
        jobs = [(messages, tools, asks)]
        for marks in ways:
            turns = [marks.message(message, i) for i, message in enumerate(messages)]
            jobs.append((turns, marks.quote(tools), asks))
        return ways, jobs

    def find(self, conversation: "Conversation", ways: list["Marks"], text, marked: list) -> Rendered:
        for result in (text, *marked):
            if isinstance(result, Refused):
                raise result
        why = "it rewrites the content of a turn, or leaves it out, so that an answer can't be found in it"
        if "tool_call" not in self.source and any(message.get("tool_calls") for message in conversation.messages):
            why = "it has no place for tool calls; a model whose template has one is wanted"
        for marks, each in zip(ways, marked, strict=True):
            if (found := marks.read(text, each)) is not None:
                try:
                    return self.answers(*found, conversation)
                except Refused as reason:
                    why = str(reason)
        raise Refused(why)

    def answers(self, rendered: Rendered, extents: dict[int, Span], conversation: "Conversation") -> Rendered:
        """Adds the answers. extents: of each answer's words, by its number."""
        messages, last = conversation.messages, 0
        rendered.asked = conversation.add_generation_prompt
        for i, (first, end) in sorted(extents.items()):
            calls, head = bool(messages[i].get("tool_calls")), first
            if messages[i]["role"] != "assistant":
                head -= rendered.text[last:first].endswith(" ")  # which the word's token takes along
            else:
                head = self.head(rendered.text, messages[:i], conversation.tools, first)
                if not self.asking.strip() and not calls and rendered.text[head:first].strip():
                    head = first  # nothing asks for an answer, so the words before it are a turn's name
            if not last <= head <= first or (calls and head == first):
                raise Refused("it can't be told where an answer begins")
            rendered.answers.append(Answer(head, first, end, calls, i, i == len(messages) - 1))
            last = end
        return rendered

    def head(self, text: str, before: list[dict], tools: list | None, first: int) -> int:
        """Where an answer begins whose first certain word stands at `first`: behind the text that asks for it."""
        if self.asking.strip() and text.endswith(self.asking, 0, first):
            return first
        asked = self.attempt([(before, tools, True)])[0] if before else None
        if isinstance(asked, str):
            if text.startswith(asked):
                return len(asked)
            words = str(before[-1].get("content")).strip()  # of the turn before, which earlier ones do not change
            asks = asked[asked.rfind(words) :] if words in asked else asked
            if words and (at := text.rfind(asks, 0, first)) >= 0:
                return at + len(asks)
        # The template asks otherwise than it writes the answer, with <think>, say
        asking = self.asking
        if isinstance(asked, str):
            without = self.attempt([(before, tools, False)])[0]
            if isinstance(without, str) and asked.startswith(without):
                asking = asked[len(without) :]
                if same := commonprefix([asking, text[len(without) : first]]) if text.startswith(without) else "":
                    return len(without) + len(same)
        at = text.rfind(asking, 0, first) if asking.strip() else -1
        return first if at < 0 else at + len(asking)


@dataclass(frozen=True)
class Conversation:
    """What is to be rendered. roles: whose turns count as answers."""

    messages: list[dict]
    tools: list | None = None
    add_generation_prompt: bool = False
    roles: tuple[str, ...] = ("assistant",)

    def is_answer(self, message: dict) -> bool:
        content = message.get("content")
        written = isinstance(content, str) and bool(content.strip())
        return message.get("role") in self.roles and (written or bool(message.get("tool_calls")))


class Marks:
    """Puts another text, between marks, in the place of every answer's words; and marks around whatever looks like a
    control token elsewhere. Reads both back out of the rendered text."""

    def __init__(self, conversation: Conversation, source: str, control: re.Pattern, whole: bool):
        taken = f"{conversation.messages}{conversation.tools}{source}"
        self.is_answer = conversation.is_answer
        self.a, self.b, self.c, self.d = islice((c for c in map(chr, range(0xE000, 0xF8FF)) if c not in taken), 4)
        self.control, self.whole = control, whole  # is a thought in the content a part of the answer's words
        self.parts: list[tuple[int, str]] = []  # of each: number of its message, its words

    def message(self, message: dict, number: int) -> dict:
        if not self.is_answer(message):
            return self.quote(message)
        message = self.quote({key: value for key, value in message.items() if key != "content"}) | (
            {"content": self.words(message["content"], number)} if "content" in message else {}
        )
        if message.get("tool_calls"):
            message["tool_calls"] = [self.call(call, number) for call in message["tool_calls"]]
        return message

    def words(self, content: object, number: int) -> object:
        """An answer's content; of one that thinks first, if not `whole`, what follows the thought, which templates may
        take out. At the ends of the stripped words, since templates strip."""
        if not isinstance(content, str) or not content.strip():
            return self.quote(content)
        inner = (not self.whole and content.rpartition("</think>")[2].strip()) or content.strip()
        before, _, after = content.rpartition(inner)
        self.parts.append((number, inner))
        return self.quote(before) + self.sentinel() + self.quote(after)

    def call(self, call: object, number: int) -> object:
        function = call.get("function") if isinstance(call, dict) else None
        target = function if isinstance(function, dict) else call
        if isinstance(target, dict) and isinstance(target.get("name"), str) and target["name"].strip():
            self.parts.append((number, target["name"]))
            target = target | {"name": self.sentinel()}
        return call | {"function": target} if isinstance(function, dict) else target

    def sentinel(self) -> str:
        return f"{self.a}Other{len(self.parts) - 1}{self.b}"

    def quote(self, value: object) -> object:
        """The value with marks around the strings in it that hold a control token."""
        if isinstance(value, str):
            inner = value.strip()
            return value.replace(inner, self.c + inner + self.d, 1) if self.control.search(inner) else value
        if isinstance(value, dict):
            return {key: value if key == "role" else self.quote(value) for key, value in value.items()}
        return [self.quote(item) for item in value] if isinstance(value, list) else value

    def read(self, text: str, marked: str) -> tuple[Rendered, dict[int, Span]] | None:
        """Rendered, without its answers, and by message's number the extent of its words; None where the template does
        not write every answer's words once, as they are."""
        found = re.compile(f"{self.a}Other(\\d+){self.b}|{self.c}([^{self.c}{self.d}{self.a}{self.b}]*){self.d}")
        rendered, extents, pieces, others, at, done = Rendered(text, "", [], [], []), {}, [], [], 0, 0
        seen: list[int] = []
        for match in found.finditer(marked):
            pieces.append(marked[done : match.start()])
            others.append(pieces[-1])
            at, done = at + len(pieces[-1]), match.end()
            if match[1] is None:
                words, other = match[2], match[2]
            else:
                number, words = self.parts[int(match[1])]
                other = match[0][1:-1]
                seen.append(int(match[1]))
                first, _ = extents.get(number, (at, at))
                extents[number] = (first, at + len(words))
                rendered.parts.append((at, at + len(words), len(other) - len(words)))
            rendered.quoted.append((at, at + len(words)))
            pieces.append(words), others.append(other)
            at += len(words)
        rendered.other = "".join([*others, marked[done:]])
        all_there = {number for number, _ in self.parts} == extents.keys() and len(seen) == len({*seen})
        if not all_there or "".join([*pieces, marked[done:]]) != text:  # a mark without its fellow stays, too
            return None
        return rendered, extents


# ---- named ones, for models that bring none ----

# The prompt of Taori et al. 2023 (Stanford Alpaca): with bos where there is one, eos after each answer, and a system
# turn, if there is one, in the place of the first sentence.
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
# OpenAI's ChatML; needs <|im_start|> and <|im_end|> among the control tokens
CHATML = r"""{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\n' if add_generation_prompt }}"""
# No words of its own: a prompt, a line end, the answer, eos
PLAIN = r"""{{ bos_token }}
{%- for message in messages -%}
{{ message.content }}{{ eos_token if message.role == 'assistant' else '\n' }}
{%- endfor -%}"""
NAMED = {"alpaca": ALPACA, "chatml": CHATML, "plain": PLAIN}


if __name__ == "__main__":
    serve()
