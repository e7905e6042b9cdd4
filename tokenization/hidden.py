"""What a chat template leaves out of a conversation: system messages, tools, thoughts, names.

Answers need no look here: `Template.locate` refuses a conversation of which the template does not
write every answer. Of everything else a template may drop what it has no place for, and says
nothing. `HiddenParts.count` looks for the words of each part in the text, in their order. Where
they are missing, the template may still have written them in another form. So the conversation is
rendered again with other words in their place: if the text stays the same, they are not shown.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tokenization.chat_template import Conversation, Job, Refused, Rendered, Template

# Words of fewer characters may stand in a text by chance.
SHORT_WORDS = 8
# So many proofs that parts of a kind are not shown, and none that one is in another form, suffice.
ENOUGH_PROOFS = 16
# A character of Unicode's private use area, which makes other words of words.
CHANGE = "\uf8fe"
# What is not shown of an answer whose words are.
TRIMMED = "leading spaces of answers"
AROUND_THOUGHTS = "parts of answers before or between thoughts"


class Part(NamedTuple):
    """A part of a conversation that a template may leave out.

    kind: what the user is told: "system messages".
    words: what stands in the text if the template shows the part.
    message, key: where the part is: the number of its message (-1: none) and the message's key.
    """

    kind: str
    words: str
    message: int
    key: str


class HiddenParts:
    """Counts what one template does not show; remembers what was proved."""

    def __init__(self, template: Template):
        self.template = template
        self.num_proved: Counter[str] = Counter()  # by kind, the parts proved to be left out
        self.rewritten: set[str] = set()  # kinds of which a part was shown in another form
        self.found: set[str] = set()  # kinds of which a part was found that is no chance

    def count(
        self, conversations: list[Conversation], results: list["Rendered | Refused"]
    ) -> list[Counter[str]]:
        """Returns for each conversation how many parts of each kind are not shown.

        results: of `Template.locate`; what was refused has no counts.
        """
        # Most conversations share it, since making a Counter takes its time.
        nothing: Counter[str] = Counter()
        counts = [nothing] * len(conversations)
        doubtful: list[tuple[int, list[Part]]] = []
        for i, (conversation, result) in enumerate(zip(conversations, results, strict=True)):
            if isinstance(result, Refused):
                continue
            num_trimmed = trimmed_answers(conversation, result)
            if num_trimmed:
                counts[i] = Counter({TRIMMED: num_trimmed})
            unproved = []
            for part in self.missing(conversation, result):
                if self.is_known(part.kind):
                    counts[i] = counts[i] + Counter([part.kind])
                else:
                    unproved.append(part)
            if unproved:
                doubtful.append((i, unproved))
        for i, part in self.prove(conversations, results, doubtful):
            counts[i] = counts[i] + Counter([part.kind])
        return counts

    def is_known(self, kind: str) -> bool:
        """True if parts of a kind that are not found need no proof any more."""
        return kind not in self.rewritten and self.num_proved[kind] >= ENOUGH_PROOFS

    def missing(self, conversation: Conversation, rendered: Rendered) -> list[Part]:
        """Returns the parts whose words are not found in the text, or may be there by chance."""
        text = rendered.text
        spoken = []  # the parts that stand in the text in the order of the messages
        missing = []
        position = 0
        in_order = True
        for part in parts_of(conversation):
            if part.key in ("content", "reasoning_content"):
                spoken.append(part)
                if in_order:
                    start = text.find(part.words, position)
                    position = start + len(part.words)
                    in_order = start >= 0 and position <= last_place(part, conversation, rendered)
            elif not is_written(part.words, text):
                missing.append(part)
        if not in_order:
            missing += missing_in_any_order(conversation, spoken, text)
        is_missing = {*missing}
        for part in spoken:
            if part in is_missing:
                continue
            if len(part.words) >= SHORT_WORDS:
                self.found.add(part.kind)
            elif part.kind not in self.found:
                missing.append(part)
        return missing

    def prove(
        self,
        conversations: list[Conversation],
        results: list["Rendered | Refused"],
        doubtful: list[tuple[int, list[Part]]],
    ) -> Iterator[tuple[int, Part]]:
        """Yields those of the doubtful parts that are proved to be left out, each with the number
        of its conversation."""
        # All parts of a conversation together first: mostly, all of them are left out.
        singles: list[tuple[int, list[Part]]] = []
        for i, parts, is_hidden in self.try_changes(conversations, results, doubtful):
            if is_hidden:
                for part in parts:
                    self.num_proved[part.kind] += 1
                    yield i, part
            elif len(parts) > 1:
                singles += [(i, [part]) for part in parts]
            else:
                self.note_shown(parts[0])
        for i, parts, is_hidden in self.try_changes(conversations, results, singles):
            if is_hidden:
                self.num_proved[parts[0].kind] += 1
                yield i, parts[0]
            else:
                self.note_shown(parts[0])

    def note_shown(self, part: Part) -> None:
        """Remembers that the template shows a part whose words were not found for certain."""
        self.found.add(part.kind)
        if len(part.words) >= SHORT_WORDS:
            self.rewritten.add(part.kind)

    def try_changes(
        self,
        conversations: list[Conversation],
        results: list["Rendered | Refused"],
        changes: list[tuple[int, list[Part]]],
    ) -> Iterator[tuple[int, list[Part], bool]]:
        """Yields (conversation, parts, True if other words in the place of these parts leave the
        text as it is) for each of the changes."""
        if not changes:
            return
        jobs = [changed(conversations[i], parts) for i, parts in changes]
        try:
            texts = self.template.try_all(jobs)
        except Refused as refusal:
            # A limit is broken. Then nothing is said.
            texts = [refusal] * len(jobs)
        for (i, parts), text in zip(changes, texts, strict=True):
            result = results[i]
            assert isinstance(result, Rendered)
            # What the template refuses with other words, it has read.
            yield i, parts, text == result.text


def trimmed_answers(conversation: Conversation, rendered: Rendered) -> int:
    """Returns how many answers begin with space that the template takes off."""
    count = 0
    for answer in rendered.answers:
        message = conversation.messages[answer.message]
        content = message.get("content")
        if not isinstance(content, str) or not content[:1].isspace():
            continue
        # Of an answer with a thought in it, only what follows that is looked for in the text.
        if message["role"] != "assistant" or "</think>" in content:
            continue
        space = content[: len(content) - len(content.lstrip())]
        if not rendered.text[answer.begin : answer.first].endswith(space):
            count += 1
    return count


def last_place(part: Part, conversation: Conversation, rendered: Rendered) -> int:
    """Returns where in the text a part must have ended: a thought that is a field stands before the
    words of its answer."""
    is_field = "reasoning_content" in conversation.messages[part.message]
    if part.key == "reasoning_content" and is_field:
        for answer in rendered.answers:
            if answer.message == part.message:
                return answer.first
    return len(rendered.text)


def parts_of(conversation: Conversation) -> Iterator[Part]:
    """Yields the parts of a conversation that a template may leave out, in order."""
    messages = conversation.messages
    last_user = -1
    for i, message in enumerate(messages):
        if message.get("role") == "user":
            last_user = i
    names = {"system": "system messages", "user": "user messages", "tool": "tool results"}
    for i, message in enumerate(messages):
        role = message.get("role")
        if role == "assistant":
            yield from parts_of_answer(message, i, i < last_user)
            continue
        kind = names.get(str(role), f"messages of the {role}")
        words = message.get("content")
        if isinstance(words, str) and words.strip():
            yield Part(kind, words.strip(), i, "content")
        for key, label in (("name", "names"), ("tool_call_id", "ids")):
            words = message.get(key)
            if isinstance(words, str) and words.strip():
                yield Part(f"{label} of {kind}", words.strip(), i, key)
    for tool in conversation.tools or ():
        name = function_name(tool)
        if name:
            # One part for all, since a template shows all tools or none.
            yield Part("lists of tools", name, -1, "tools")
            break


def parts_of_answer(message: dict, number: int, is_earlier: bool) -> Iterator[Part]:
    """Yields the parts of an assistant's message that a template may leave out: thoughts, and of
    tool calls the arguments and the id.

    is_earlier: the user speaks after this message, and templates may leave its thought out.
    """
    kind = "thoughts of earlier answers" if is_earlier else "thoughts"
    before, between = words_around_thoughts(message)
    if before:
        yield Part(AROUND_THOUGHTS, before, number, "reasoning_content")
    words = thought_of(message)
    if words:
        yield Part(kind, words, number, "reasoning_content")
    if between:
        yield Part(AROUND_THOUGHTS, between, number, "reasoning_content")
    for call in message.get("tool_calls") or ():
        if not isinstance(call, dict):
            continue
        if isinstance(call.get("id"), str) and call["id"].strip():
            yield Part("ids of tool calls", call["id"].strip(), number, "id")
        function = call.get("function", call)
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, dict) and arguments:
            # Where the name of an argument stands, its value does.
            name = max(arguments, key=len)
            yield Part("arguments of tool calls", name, number, "arguments")


def thought_of(message: dict) -> str:
    """Returns the words of an answer's thought, which is a field or stands before </think> in the
    content; "" without."""
    thought = message.get("reasoning_content")
    if isinstance(thought, str) and thought.strip():
        return thought.strip()
    content = message.get("content")
    if not isinstance(content, str) or "</think>" not in content:
        return ""
    before, _, _ = content.partition("</think>")
    _, _, inner = before.rpartition("<think>")
    return inner.strip()


def words_around_thoughts(message: dict) -> tuple[str, str]:
    """Returns what an answer says before its first thought, and from there to the end of its last
    one; "" for nothing. Templates that take the thought for the beginning leave it out."""
    content = message.get("content")
    if not isinstance(content, str) or "</think>" not in content:
        return "", ""
    thought, _, rest = content.partition("</think>")
    before, mark, _ = thought.partition("<think>")
    between, mark_of_last, _ = rest.rpartition("</think>")
    return (before.strip() if mark else ""), (between.strip() if mark_of_last else "")


def function_name(tool: object) -> str:
    """Returns the name of a tool's function, or ""."""
    if not isinstance(tool, dict):
        return ""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def is_written(words: str, text: str) -> bool:
    """True if words stand in a text, as they are or as JSON writes them."""
    if words in text:
        return True
    escaped = json.dumps(words, ensure_ascii=False)[1:-1]
    return escaped != words and escaped in text


def missing_in_any_order(conversation: Conversation, spoken: list[Part], text: str) -> list[Part]:
    """Returns those of the spoken parts that stand in the text less often than in the
    conversation."""
    missing = [part for part in spoken if not is_written(part.words, text)]
    is_missing = {*missing}
    written = [part.words for part in spoken if part not in is_missing]
    for message in conversation.messages:
        if message.get("role") == "assistant":
            _, _, answer = str(message.get("content") or "").rpartition("</think>")
            written.append(answer)
    all_written = "\n".join(written)
    for part in spoken:
        if part in is_missing or part.words not in text:
            continue
        if text.count(part.words) < all_written.count(part.words):
            missing.append(part)
    return missing


def changed(conversation: Conversation, parts: list[Part]) -> Job:
    """Returns the job that renders a conversation with other words in the place of some parts."""
    messages = list(conversation.messages)
    tools = conversation.tools
    done = set()
    for part in parts:
        # All calls of a message are changed together.
        if part.key in ("id", "arguments") and (part.message, part.key) in done:
            continue
        done.add((part.message, part.key))
        if part.key == "tools":
            tools = [with_other_name(tool) for tool in tools or ()]
            continue
        message = messages[part.message]
        if part.key in ("id", "arguments"):
            calls = [with_other_call(call, part.key) for call in message["tool_calls"]]
            messages[part.message] = message | {"tool_calls": calls}
            continue
        key = part.key
        # A thought may be a part of the content.
        if key == "reasoning_content" and not message.get(key):
            key = "content"
        words = message[key].replace(part.words, part.words + CHANGE, 1)
        messages[part.message] = message | {key: words}
    return messages, tools, conversation.add_generation_prompt


def with_other_name(tool: object) -> object:
    """Returns a tool with another name of its function."""
    if not isinstance(tool, dict) or not function_name(tool):
        return tool
    other = {"name": function_name(tool) + CHANGE}
    if "function" in tool:
        return tool | {"function": tool["function"] | other}
    return tool | other


def with_other_call(call: dict, key: str) -> dict:
    """Returns a tool call with another id, or with other arguments. key: which of them."""
    if key == "id":
        # Other letters, and as many: some templates count them.
        id = "".join("b" if letter == "a" else "a" for letter in call.get("id", ""))
        return call | {"id": id} if id else call
    function = call.get("function", call)
    arguments = function.get("arguments")
    if not isinstance(arguments, dict):
        return call
    other = {name + CHANGE: value for name, value in arguments.items()}
    if "function" in call:
        return call | {"function": function | {"arguments": other}}
    return call | {"arguments": other}
