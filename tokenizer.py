"""Text to token ids and back, and conversations to ids with a mask of what is trained.

`load_tokenizer` makes a `Tokenizer` of a Hugging Face folder; what cuts plain text into tokens is in
tokenization/subwords.py. What would give other ids than the `tokenizers` library on any text is refused with the
reason. A control token is one only where the program or the template writes it: in text from people `<|im_end|>` is ten
characters, unless they ask (`special=True`).

A conversation is one text, written by the folder's Jinja template (tokenization/chat_template.py) and tokenised whole,
so that no turn is cut off from its context. Trained are the assistant's turns and what ends each; `render` says how
that is proved.
"""

import codecs
import hashlib
import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from os.path import commonprefix
from pathlib import Path

from common.errors import UserError, read_json_if_there, read_text
from tokenization.chat_template import NAMED, Answer, Conversation, Refused, Rendered, Template
from tokenization.subwords import AddedToken, BytePairs, Pieces, byte_pairs, is_tiktoken, pieces, tiktoken_file

Span = tuple[int, int]  # [start, end), in characters where nothing else is said
Turn = tuple[int, int, int]  # [start, end) in ids, and the number of the message that is trained there


class TemplateError(UserError):
    """The chat template refuses a conversation, or changes an answer so that it can't be told where it stands."""


@dataclass
class Tokenizer:
    """What `load_tokenizer` returns. More: special_tokens (id by text), unlisted_ends, vocab_size, description."""

    model: "BytePairs | Pieces"
    added: dict[str, AddedToken]
    names: dict[str, str]  # bos_token, eos_token, ... as the template may write them
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    adds_bos: bool  # whether plain text begins with bos in this model's training
    stop_ids: set[int]  # each ends generation: eos of every config file, and what ends a turn in the template
    templates: dict[str, str]  # "default", and "tool_use" if there is another one for conversations with tools
    template_name: str  # where they come from: a file's name, or "alpaca (fallback)"
    source: Path  # the folder

    def __post_init__(self):
        self.special_tokens = {text: token.id for text, token in self.added.items() if token.special}
        self._special_ids = frozenset(self.special_tokens.values())
        # what the model knows of a plain one is what it says: Gemma's "▁▁" are two spaces
        known = {token.id for token in self.added.values() if not token.special} & self.model.bytes_of.keys()
        added = {token.id: text.encode() for text, token in self.added.items() if token.id not in known}
        self._bytes = self.model.bytes_of | added
        self.vocab_size = max(self._bytes) + 1
        self.description = f"{self.model.kind}, {self.vocab_size:,} tokens{self.model.details}"
        late = [text for text, token in self.added.items() if token.normalized]
        self._patterns = [_any_of(self.added.keys() - {*late}), *([_any_of(late)] if late else [])]
        self._late = None
        if late and self.model.nfc:  # looked for in another text, and in its form
            self._patterns.pop()
            self.added |= {self.model.normalize(text): self.added[text] for text in late}
            self._late = _any_of(map(self.model.normalize, late))
        self._control = _any_of(self.special_tokens)
        self._short: dict[tuple[str, bool], list[int]] = {}  # ids of short parts of conversations
        self._jinja = {name: Template(source, self.names) for name, source in self.templates.items()}
        self.unlisted_ends = self._turn_end() - self.stop_ids  # no config file names them: a server must be told
        self.stop_ids = self.stop_ids | self.unlisted_ends

    # ---- text ----

    def encode(self, text: str, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """The ids of a text; bos and eos around it on request, where the tokenizer has them.

        special: False takes the text of control tokens for plain text, as the `tokenizers` library does with its
        `encode_special_tokens`; True makes control tokens of it. Added tokens that are not special (`<think>`) are
        found either way. A lone surrogate, which is no character, counts as U+FFFD.
        """
        text = _without_halves(text)
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for start, end, id in self._cut(text, special):
            if id is not None:
                ids.append(id)
                continue
            part = self.model.normalize(text[start:end])
            if self._late is None:
                ids += self.model.encode(part, start == 0)
            else:
                ids += self._subwords(part, start == 0)[0]
        return ids + [self.eos_id] if eos and self.eos_id is not None else ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD; ids beyond the vocabulary become nothing."""
        return "".join(self.stream(ids, skip_special))

    def stream(self, ids: Iterable[int], skip_special: bool = False, first: bool = True) -> Iterator[str]:
        """The same text in pieces, as the ids come; none ends inside a character. first: the ids begin a text; False
        where they go on from one, whose last word a space may part from theirs."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        at_start = first and self.model.prefix != "never"
        for id in ids:
            new = b"" if skip_special and id in self._special_ids else self._bytes.get(id, b"")
            if new and at_start:  # the space that sentencepiece put before the first word
                new, at_start = new.removeprefix(b" "), False
            if text := utf8.decode(new):
                yield text
        if text := utf8.decode(b"", final=True):
            yield text

    def _cut(self, text: str, special: bool, quoted: Collection[Span] = ()) -> list[tuple[int, int, int | None]]:
        """The text cut at its added tokens: (start, end, id) of each, and (start, end, None) of what lies between; the
        space that a token takes along is in neither. Special ones count only if `special`, and nowhere that touches a
        `quoted` span."""
        cuts = [(0, len(text), None)]
        for pattern in self._patterns:
            cuts = [
                finer
                for cut in cuts
                for finer in ([cut] if cut[2] is not None else self._find(pattern, text, cut[:2], special, quoted))
            ]
        return cuts

    def _find(self, pattern: re.Pattern, text: str, where: Span, special: bool, quoted: Collection[Span] = ()):
        """The same of the part `where` of the text, for the tokens that one pattern finds."""
        done, stop = where
        for match in pattern.finditer(text, *where):
            token, (a, b) = self.added[match[0]], match.span()
            if token.special and (not special or any(a < q and p < b for p, q in quoted)):
                continue
            beside = text[where[0] : a][-1:], text[b:stop][:1]
            if a < done or (token.single_word and any(map(_in_word, beside))):
                continue
            before = done + len(text[done:a].rstrip(SPACE)) if token.lstrip else a
            if done < before:
                yield done, before, None
            yield a, b, token.id
            done = stop - len(text[b:stop].lstrip(SPACE)) if token.rstrip else b
        if done < stop:
            yield done, stop, None

    def _subwords(self, text: str, first: bool) -> tuple[list[int], list[int], list[int]]:
        """Ids of a normalized text that holds no early added token, and where each begins and ends, in its bytes."""
        if self._late is None:
            return self.model.encode_spans(text, first)
        ids, starts, ends = [], [], []
        for start, end, id in self._find(self._late, text, (0, len(text)), False):
            at = len(text[:start].encode())
            if id is None:
                new, begin, stop = self.model.encode_spans(text[start:end], first and start == 0)
            else:
                new, begin, stop = [id], [0], [len(text[start:end].encode())]
            ids += new
            starts += [at + a for a in begin]
            ends += [at + b for b in stop]
        return ids, starts, ends

    # ---- conversations ----

    def render(
        self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """A conversation as the model sees it: ids, and for each whether it is trained.

        messages: {"role", "content", "tool_calls"} each, in an order that the template accepts. add_generation_prompt:
        end with the head of an answer. The ids are those of `render_text`, with control tokens where the template
        writes them and none in the messages, and no bos but the template's. Trained is what the template writes for an
        assistant's turn behind the text that asks for it, tool calls and thoughts included, and the first of
        `stop_ids` after it, if there is nothing but space between. An answer that ends the conversation is trained up
        to the next of `stop_ids` in any case, and where there is none eos is appended for it. An answer of nothing but
        space is not trained.

        Proof that nothing else is: the trained ids decode to just that text, and with another text in the answers'
        places the ids that are not trained stay the same. Raises TemplateError where that fails.
        """
        (result,) = self.render_each([(messages, tools)], add_generation_prompt)
        if isinstance(result, UserError):
            raise result
        ids, turns = result
        mask = [False] * len(ids)
        for start, end, _ in turns:
            mask[start:end] = [True] * (end - start)
        return ids, mask

    def render_each(
        self,
        conversations: list[tuple[list[dict], list | None]],
        add_generation_prompt: bool = False,
        roles: tuple[str, ...] = ("assistant",),
    ) -> list["tuple[list[int], list[Turn]] | UserError"]:
        """The same of many (messages, tools), which the template's process takes together: of each its ids and the
        trained spans of them, in order; or why it has none. roles: whose turns are trained; of a user's the words and
        what ends them."""
        results: list = [None] * len(conversations)
        by_template: dict[str, list[tuple[int, Conversation]]] = {}
        for i, (messages, tools) in enumerate(conversations):
            try:
                each = Conversation(_plain_messages(messages), tools, add_generation_prompt, roles)
                by_template.setdefault(self.which_template(tools), []).append((i, each))
            except TemplateError as error:
                results[i] = error
        for name, numbered in by_template.items():
            found = self._jinja[name].locate([each for _, each in numbered], self._control)
            for (i, _), rendered in zip(numbered, found, strict=True):
                try:
                    results[i] = self._ids_and_turns(rendered)
                except UserError as error:  # a tokenizer's limit as well
                    results[i] = error
        return results

    def _ids_and_turns(self, found: "Rendered | Refused") -> tuple[list[int], list["Turn"]]:
        if isinstance(found, Refused):
            raise self._error(str(found))
        text, other = (_without_halves(each) for each in (found.text, found.other))
        cuts = self._cut(text, True, found.quoted)
        stops = [(start, end) for start, end, id in cuts if id in self.stop_ids]
        last = next((a for a in found.answers if a.ends_all and not found.asked), None)
        end = [self.eos_id] if last and not any(start >= last.last for start, _ in stops) else []
        if end == [None]:
            raise self._error("it ends an answer with no control token, and the tokenizer has no eos_token")
        spans = [self._extent(answer, text, cuts, stops, answer is last) for answer in found.answers]
        seen: dict = {}
        ids, turns, whole = self._tokens(text, cuts, spans, seen)
        if turns and not found.asked:  # a prompt is not trained on
            moved = lambda spans: [(found.moved(a), found.moved(b)) for a, b in spans]
            cuts = self._cut(other, True, moved(found.quoted))
            others = self._tokens(other, cuts, moved(spans), seen)
            said = all(self._spells(ids[a:b], text[c:d]) for (a, b), (c, d) in zip(turns, spans, strict=True))
            if not (whole and others[2] and said and _outside(ids, turns) == _outside(*others[:2])):
                raise self._error("a token holds a part of an answer and of what stands around it")
        numbered = [(a, b, answer.number) for (a, b), answer in zip(turns, found.answers, strict=True)]
        if end:
            numbered[-1] = (numbered[-1][0], len(ids) + 1, numbered[-1][2])
        return ids + end, numbered

    def _extent(self, answer: Answer, text: str, cuts: list, stops: list[Span], is_last: bool) -> Span:
        """The trained part of the text: from the head of the answer to its end, the stop that ends it included."""
        head = next((start for start, end, id in cuts if id is not None and start < answer.head < end), answer.head)
        stop = next((stop for stop in stops if stop[0] >= answer.last), None)
        if stop is None:
            return head, len(text) if is_last else answer.last
        between = [(start, id) for start, _, id in cuts if answer.last <= start < stop[0]]
        near = not text[answer.last : stop[0]].strip()
        near |= answer.calls and not any(id in self._special_ids for _, id in between)
        return head, stop[1] if near or is_last else answer.last

    def _tokens(
        self, text: str, cuts: list, spans: list[Span], seen: dict
    ) -> tuple[list[int], list[tuple[int, int]], bool]:
        """Ids of a text cut at its added tokens; where in them each of the spans of characters begins and ends; and
        whether no token holds a part of a span and of anything else. seen: ids of parts that came before."""
        ids: list[int] = []
        bounds = [(at, i % 2) for i, at in enumerate(at for span in spans for at in span)]  # ascending; 1: an end
        found, whole, next_bound = [], True, 0
        for start, end, id in cuts:
            inside = []
            while next_bound < len(bounds) and bounds[next_bound][0] < end:
                at, is_end = bounds[next_bound]
                next_bound += 1
                if at <= start:
                    found.append(len(ids))
                elif id is not None:
                    found.append(len(ids) + is_end)
                else:
                    found.append(-1)
                    inside.append((len(found) - 1, at, is_end))
            if id is not None:
                ids.append(id)
                continue
            part, first = text[start:end], start == 0
            if not inside:
                known = self._short if len(part) < 500 else seen  # a system turn that all conversations have, say
                if (part, first) not in known:
                    if len(self._short) > 1000:
                        self._short.clear()
                    known[part, first] = self._subwords(self.model.normalize(part), first)[0]
                ids += known[part, first]
                continue
            new, starts, ends = self._subwords(self.model.normalize(part), first)
            for i, at, is_end in inside:
                byte = len(self.model.normalize(text[start:at]).encode())
                token = bisect_right(ends, byte)
                if token < len(new) and starts[token] < byte:
                    whole, token = False, token + is_end
                found[i] = len(ids) + token
            ids += new
        found += [len(ids)] * (len(bounds) - next_bound)
        return ids, list(zip(found[::2], found[1::2], strict=True)), whole

    def _spells(self, ids: list[int], wanted: str) -> bool:
        """Whether ids say a part of the text. Of the space that sentencepiece puts in front of a word none is asked."""
        wanted = self.model.normalize(wanted)
        if self.model.prefix == "never":
            return b"".join([self._bytes.get(id, b"") for id in ids]).decode("utf-8", "replace") == wanted
        return "".join(self.stream(ids, first=False)).replace(" ", "") == wanted.replace(" ", "")

    def render_text(self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False) -> str:
        """The template's text, equal to transformers' apply_chat_template(tokenize=False). Raises TemplateError."""
        try:
            template = self._jinja[self.which_template(tools)]
            return template.render(_plain_messages(messages), tools, add_generation_prompt)
        except Refused as reason:
            raise self._error(str(reason)) from None

    def spells_control(self, text: str) -> bool:
        """Whether a text holds that of a control token."""
        return self._control.search(text) is not None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that ids and masks depend on: the folder's files, the templates, the ends."""
        hashed = hashlib.sha256(json.dumps([self.templates, sorted(self.stop_ids), self.adds_bos]).encode())
        for name in READ:
            if (self.source / name).is_file():
                hashed.update(name.encode() + (self.source / name).read_bytes())
        return hashed.hexdigest()

    def forget_processes(self) -> None:
        """In a forked process: lets go of its parent's template processes, to start its own."""
        for template in self._jinja.values():
            template.process = None

    def save_template(self, folder: Path) -> None:
        """Puts a named template into a folder, so that the model is served as it was trained; one out of files comes
        with them."""
        if self.templates["default"] in NAMED.values():
            (Path(folder) / "chat_template.jinja").write_text(self.templates["default"], encoding="utf-8")

    def which_template(self, tools: list | None) -> str:
        """The name of the one that a conversation with these tools is written by."""
        return "tool_use" if tools is not None and "tool_use" in self._jinja else "default"

    def _error(self, reason: str) -> TemplateError:
        return TemplateError(f"chat template of {self.template_name}: {' '.join(reason.split())}")

    def _turn_end(self) -> set[int]:
        """The control token that the template writes after an answer, found by trying."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (found,) = self._jinja[self.which_template(None)].locate([Conversation(turns)], self._control)
        if isinstance(found, Refused):  # broken, or in want of other turns: said where it is used
            return set()
        text, end = found.text, found.answers[0].last if found.answers else 0
        controls = [(start, id) for start, _, id in self._cut(text, True) if start >= end and id in self._special_ids]
        return {id for start, id in controls[:1] if end and id != self.bos_id and not text[end:start].strip()}


def _without_halves(text: str) -> str:
    """The text with U+FFFD for each lone surrogate."""
    return text if text.isascii() else SURROGATE.sub("\ufffd", text)


def _outside(ids: list[int], turns: list[tuple[int, int]]) -> list[int]:
    """The ids that are in none of the spans."""
    edges = [0, *(at for turn in turns for at in turn), len(ids)]
    return [id for a, b in zip(edges[::2], edges[1::2], strict=True) for id in ids[a:b]]


READ = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a UTF-16 pair
# Unicode's White_Space, which an added token may take along; Python's own strip() takes four control characters more
SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def _in_word(character: str) -> bool:
    return bool(character) and (unicodedata.category(character)[0] in "LM" or unicodedata.category(character) in WORD)


WORD = ("Nd", "Nl", "Pc")  # with letters and marks
TEMPLATE_BYTES = 4 << 20
MOST_ADDED = 300_000  # tokens; the search for them is made in seconds


def _any_of(texts: Iterable[str]) -> re.Pattern:
    """Finds any of the texts; where several begin at one place, the longest. A tree by characters, since Python tries
    the branches of a flat list of thousands one by one."""

    def tree(words: list[str], at: int) -> str:  # all begin alike, up to `at`; sorted
        branches = []
        for _, group in groupby((word for word in words if len(word) > at), key=lambda word: word[at]):
            group = list(group)
            same = len(commonprefix(group))  # of one word all of it
            branches.append(re.escape(group[0][at:same]) + tree(group, same))
        rest = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
        return (f"(?:{rest})?" if len(words[0]) == at else rest) if branches else ""

    words = sorted({*texts})
    try:
        return re.compile(tree(words, 0) if words else "(?!)")
    except RecursionError:
        raise UserError(
            "the tokenizer's added tokens are beginnings of each other, too deep to be looked for"
        ) from None


def _plain_messages(messages: list[dict]) -> list[dict]:
    """Messages without empty fields, and with a string for content that came as a list of text parts."""
    if not messages:
        raise TemplateError("an empty conversation; at least one message is wanted")
    plain = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            message = message | {"content": "".join(str(part.get("text", "")) for part in content)}
        plain.append({key: value for key, value in message.items() if value is not None})
    return plain


# ---- from a folder ----


def load_tokenizer(folder: Path | str, template: str | None = None, base: Path | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json or tokenizer.model, with tokenizer_config.json,
    special_tokens_map.json, chat_template.jinja, config.json and generation_config.json where they exist. template: one
    of templates.NAMED in place of the folder's own. base: a model's folder whose config.json and generation_config.json
    name more ends, where `folder` is an adapter's.

    Raises UserError with file and reason where there is none, or none whose ids would be exactly those of the
    `tokenizers` library (of sentencepiece, where tokenizer.model is all there is).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a Hugging Face model folder is wanted")
    spec_file, config_file, model_file = (folder / f"tokenizer{end}" for end in (".json", "_config.json", ".model"))
    spec, config = read_json_if_there(spec_file), read_json_if_there(config_file)
    special = read_json_if_there(folder / "special_tokens_map.json") | config
    names, listed = _names(config_file, special), _listed(config_file, special)
    added = _added_tokens(spec_file, spec.get("added_tokens") or [])
    added = _added_tokens(config_file, config.get("added_tokens_decoder") or {}, added) | added
    for text, id in read_json_if_there(
        folder / "added_tokens.json"
    ).items():  # of folders from before added_tokens_decoder
        if type(id) is not int or id < 0:
            raise UserError(f"{folder / 'added_tokens.json'}: {text!r} has id {id!r}, a whole number is wanted")
        added.setdefault(text, AddedToken(id, False, False))
    bpe = spec.get("model")
    if not spec and model_file.is_file() and is_tiktoken(model_file):
        model, control = tiktoken_file(model_file)
        added = control | added
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"} | names
    elif isinstance(bpe, dict) and bpe.get("byte_fallback") is True or (not spec and model_file.is_file()):
        model = pieces(folder, spec, config)
        added, names = model.control | added, model.names | names
    elif spec:
        model = byte_pairs(spec_file, spec, added)
    else:
        raise UserError(f"{folder}: no tokenizer (neither tokenizer.json nor tokenizer.model); copy the model's here")
    for name, text in [*names.items(), *(("additional_special_tokens", text) for text in listed)]:
        if text in added or text in model.vocab:
            added[text] = replace(added.get(text) or AddedToken(model.vocab[text], True, False), special=True)
        elif name in ("bos_token", "eos_token", "additional_special_tokens"):
            raise UserError(f"{config_file}: {name} {text!r} is not in the vocabulary; name one that is")
    ids = {name: added[text].id for name, text in names.items() if text in added}
    bos, eos, pad = map(ids.get, ("bos_token", "eos_token", "pad_token"))
    stop_ids = {eos} - {None}
    for place in {folder, Path(base or folder)}:
        stop_ids |= _eos_ids(place / "config.json") | _eos_ids(place / "generation_config.json")
    opens = not spec or always_writes(spec.get("post_processor"), names.get("bos_token"), 0)
    adds_bos = config.get("add_bos_token", opens)
    if template == "chatml" and not {"<|im_start|>", "<|im_end|>"} <= added.keys():
        lack = "the tokenizer has no <|im_start|> and <|im_end|>"
        raise UserError(f"{folder}: {lack}, which the template chatml writes; take alpaca or plain")
    chat = _templates(folder, config, template)
    return Tokenizer(model, added, names, bos, eos, pad, adds_bos is True, stop_ids, *chat, folder)


def _names(path: Path, config: dict) -> dict[str, str]:
    """bos_token, eos_token and so on, each written as a string or as an object with `content`; empty is none."""
    names = {}
    for name in (f"{what}_token" for what in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")):
        if value := config.get(name):
            names[name] = value.get("content") if isinstance(value, dict) else value
            if not isinstance(names[name], str):
                raise UserError(f"{path}: {name} is neither a string nor an object with content")
    return names


def _listed(path: Path, config: dict) -> list[str]:
    """The texts of additional_special_tokens (transformers 4) and extra_special_tokens (5): lists, or objects."""
    texts = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(key) or []
        for value in values.values() if isinstance(values, dict) else values:
            texts.append(value.get("content") if isinstance(value, dict) else value)
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path}: additional_special_tokens holds what is neither a string nor an object with content")
    return texts


def _added_tokens(path: Path, entries: list | dict, known: Collection[str] = ()) -> dict[str, AddedToken]:
    """The tokens, but the known, of tokenizer.json's `added_tokens` or tokenizer_config.json's `added_tokens_decoder`
    (objects by id)."""
    if isinstance(entries, dict) and all(isinstance(entry, dict) and id.isdecimal() for id, entry in entries.items()):
        entries = [entry | {"id": int(id)} for id, entry in entries.items()]
    if isinstance(entries, list) and len(entries) > MOST_ADDED:
        raise UserError(f"{path}: {len(entries):,} added tokens, at most {MOST_ADDED:,} are read")
    added = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        match entry:
            case {"content": str(text)} if text in known:
                continue
            case {"id": int(id), "content": str(text)} if id >= 0 and text and not SURROGATE.search(text):
                special = entry.get("special") is True
                strips = [entry.get(flag) is True for flag in ("lstrip", "rstrip", "single_word")]
                added[text] = AddedToken(id, special, entry.get("normalized", not special) is True, *strips)
            case _:
                raise UserError(f"{path}: {str(entry)[:80]} is no added token; it needs an id and a content")
    return added


def _eos_ids(file: Path) -> set[int]:
    """`eos_token_id` of a config.json or generation_config.json: one, several or none."""
    eos = read_json_if_there(file).get("eos_token_id")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(id) is not int for id in eos):
        raise UserError(f"{file}: eos_token_id is {str(eos)[:40]}, integers are wanted")
    return set(eos)


def always_writes(post_processor: object, token: str | None, at: int) -> bool:
    """Whether a tokenizer.json's post-processor puts this token before (at 0) or behind (at -1) every text."""
    match post_processor:
        case {"type": "TemplateProcessing", "single": [_, *_] as pieces}:
            piece = pieces[at].get("SpecialToken") if isinstance(pieces[at], dict) else None
            return isinstance(piece, dict) and "id" in piece and piece["id"] == token
        case {"type": "Sequence", "processors": [*parts]}:
            return any(always_writes(part, token, at) for part in parts)
    return False


def _templates(folder: Path, config: dict, named: str | None) -> tuple[dict[str, str], str]:
    """(templates by name, where they come from). As in transformers, files come before tokenizer_config.json."""
    if named is not None:
        return {"default": NAMED[named]}, f"{named} (asked for)"
    found, file = {}, folder / "chat_template.jinja"
    for path in [file, *sorted((folder / "additional_chat_templates").glob("*.jinja"))]:
        if path.is_file():
            found["default" if path == file else path.stem] = read_text(path, TEMPLATE_BYTES)
    if "default" in found:
        return found, file.name
    found, file = config.get("chat_template"), folder / "tokenizer_config.json"
    if found is None:
        return {"default": NAMED["alpaca"]}, "alpaca (fallback)"
    if isinstance(found, list):  # several, by name
        found = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
    found = {"default": found} if isinstance(found, str) else found
    if not isinstance(found, dict) or "default" not in found or not all(isinstance(t, str) for t in found.values()):
        raise UserError(f"{file}: chat_template is no text, and no list with a 'default'")
    return found, file.name
