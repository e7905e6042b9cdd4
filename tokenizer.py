"""Text to token ids and back, and conversations to ids with a mask of what is trained.

`load_tokenizer` makes a `Tokenizer` from a Hugging Face folder; tokenization/subwords.py cuts plain
text into tokens. A tokenizer that would give other ids than the `tokenizers` library on any text is
refused, with the reason. A control token is one only where the program or the template writes it:
in text from people, `<|im_end|>` is ten characters, unless the caller asks for more
(`special=True`).

A conversation is one text, which the folder's Jinja template writes
(tokenization/chat_template.py). It is tokenized as a whole, so that no message is cut off from its
context. The assistant's messages are trained, with the token that ends each; `Tokenizer.render`
says how that is proved.
"""

import codecs
import hashlib
import json
import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from itertools import groupby, pairwise
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError, read_json_if_there, read_text
from tokenization.chat_template import (
    NAMED,
    Answer,
    Conversation,
    Refused,
    Rendered,
    Span,
    Template,
    today,
)
from tokenization.hidden import HiddenParts
from tokenization.subwords import (
    AddedToken,
    BytePairs,
    Pieces,
    byte_pairs,
    is_tiktoken,
    pieces,
    tiktoken_file,
)

# [start, end) in ids, and the number of the message that is trained there.
TrainedSpan = tuple[int, int, int]
# [start, end) in characters, and the id of the added token there; None: plain text.
Cut = tuple[int, int, int | None]

# The files whose contents ids and masks depend on.
READ = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TEMPLATE_BYTES = 4 << 20  # largest chat template that is read
MOST_ADDED = 300_000  # added tokens that are read; the pattern that finds them is made in seconds
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half a UTF-16 pair
# Unicode's White_Space, which an added token may take along. Python's own strip() takes four
# control characters more.
TYPOGRAPHIC_SPACES = "".join(chr(code) for code in range(0x2000, 0x200B))
UNICODE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + TYPOGRAPHIC_SPACES
# --empty-think: think blocks without words are trained as a part of the answer, or not.
EMPTY_THINK = ("train", "mask")
# Characters; what a template writes before an answer, if shorter, may stand in any text.
SHORTEST_HEADER = 8
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)  # of Jinja
EMPTY_BLOCK = re.compile(r"\s*<think>\s*</think>\n*")
RAREST = "\U0010fffd"  # the last character that is for private use
SPARE = re.compile("unused|reserved|extra", re.IGNORECASE)
WORD = ("Nd", "Nl", "Pc")  # Unicode categories of characters in words, with all letters and marks
# Of parts of conversations with fewer characters, the ids are kept from one conversation to the
# next.
SHORT_TEXT = 500
MOST_SHORT_TEXTS = 1000  # that are kept


class TemplateError(UserError):
    """The chat template refuses a conversation, or changes an answer so that it can't be found in
    the text."""


class EncodedChat(NamedTuple):
    """A conversation as ids.

    spans: the trained spans of the ids, in order.
    hidden: of what the template does not show, how many parts of each kind.
    empty_thinks: the messages before whose words a think block stands that is empty.
    asked_otherwise: the answers that the template asks for in other words than it writes before
    them.
    """

    ids: list[int]
    spans: list[TrainedSpan]
    hidden: Counter[str]
    empty_thinks: list[int]
    asked_otherwise: list[int]

    @property
    def is_altered(self) -> bool:
        """True if the template leaves something out, adds something, or asks otherwise."""
        return bool(self.hidden or self.empty_thinks or self.asked_otherwise)


class Encoded(NamedTuple):
    """A text with spans, as ids.

    spans: [start, end) of each span in the ids.
    is_exact: no token holds both a part of a span and a part of anything else.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    is_exact: bool


class Padding(NamedTuple):
    """The token that a batch of texts is padded with.

    id, text: None if no token is fit for it.
    note: a clause that says why it is another than the tokenizer's own, or why there is none; "" where
        it is the tokenizer's own.
    """

    id: int | None
    text: str | None
    note: str


@dataclass
class Tokenizer:
    """What `load_tokenizer` returns.

    Further attributes: special_tokens (id by text), vocab_size, description (a text for the user),
    and unlisted_ends: the ids in stop_ids that no config file names, so that a server must be told
    of them.
    """

    model: "BytePairs | Pieces"
    added: dict[str, AddedToken]
    names: dict[str, str]  # bos_token, eos_token, ... as the template may write them
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    adds_bos: bool  # in this model's training, plain text begins with bos
    # Each ends generation: eos of every config file, and what ends an answer in the template.
    stop_ids: set[int]
    # "default", and "tool_use" if conversations with tools have a template of their own.
    templates: dict[str, str]
    template_name: str  # where they come from: a file's name, or "alpaca (fallback)"
    source: Path  # the folder
    # The date that a template may write, as 2026-11-29; "" for today.
    day: str = ""
    # One of EMPTY_THINK.
    empty_think: str = "train"
    # The system message of conversations that have none of their own; "" for none.
    system: str = ""
    adds_eos: bool = False  # in this model's training, plain text ends with eos

    def __post_init__(self) -> None:
        self.special_tokens = {
            text: token.id for text, token in self.added.items() if token.special
        }
        self._special_ids = frozenset(self.special_tokens.values())
        # An added token that is not special stands for the bytes that the subword model knows,
        # where it knows it: Gemma's "▁▁" is two spaces.
        plain_ids = {token.id for token in self.added.values() if not token.special}
        known_ids = plain_ids & self.model.bytes_of.keys()
        self._bytes = dict(self.model.bytes_of)
        for text, token in self.added.items():
            if token.id not in known_ids:
                self._bytes[token.id] = text.encode()
        self.vocab_size = max(self._bytes) + 1
        self.description = f"{self.model.kind}, {self.vocab_size:,} tokens{self.model.details}"

        # Late tokens are looked for in what the others leave, and after it is normalized.
        late = [text for text, token in self.added.items() if token.normalized]
        self._patterns = [_any_of(self.added.keys() - {*late})]
        self._late_pattern: re.Pattern | None = None
        if late and self.model.nfc:
            # They are looked for in another text, the normalized one, and so in their own
            # normalized form.
            normalized = {self.model.normalize(text): self.added[text] for text in late}
            self.added |= normalized
            self._late_pattern = _any_of(normalized)
        elif late:
            self._patterns.append(_any_of(late))
        self._control = _any_of(self.special_tokens)
        # {(a short part of a conversation, True if it begins one, True if it goes on behind a
        # seam): its ids}
        self._short_texts: dict[tuple[str, bool, bool], list[int]] = {}
        self.day = self.day or today()
        self._jinja = {
            name: Template(source, self.names, self.day) for name, source in self.templates.items()
        }
        self._hidden_parts = {name: HiddenParts(template) for name, template in self._jinja.items()}
        # The trial needs all that is above.
        self._answer_ends = self._answer_end()
        self.unlisted_ends = self._answer_ends - self.stop_ids
        self.stop_ids = self.stop_ids | self.unlisted_ends

    # ---- text ----

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, special: bool = False
    ) -> list[int]:
        """Returns the ids of a text.

        bos, eos: put these tokens around it, where the tokenizer has them.
        special: False takes the text of control tokens for plain text, as the `tokenizers` library
        does with its `encode_special_tokens`; True makes control tokens of it. Added tokens that
        are not special (`<think>`) are found either way. A lone surrogate, which is no character,
        counts as U+FFFD.
        """
        text = _replace_surrogates(text)
        ids: list[int] = []
        if bos and self.bos_id is not None:
            ids.append(self.bos_id)
        for start, end, id in self._cut(text, special):
            if id is not None:
                ids.append(id)
                continue
            part = self.model.normalize(text[start:end])
            if self._late_pattern is None:
                # The common case, without the work for where each token begins and ends.
                new = self.model.encode(part, start == 0)
            else:
                new, _, _ = self._subwords(part, start == 0)
            ids += new
        if eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Returns the text of ids. Bytes that are not UTF-8 become U+FFFD; ids beyond the
        vocabulary become nothing.

        skip_special: leave out control tokens.
        """
        return "".join(self.stream(ids, skip_special))

    def num_bytes(self, ids: Iterable[int]) -> int:
        """Returns the bytes that ids stand for in UTF-8. Control tokens stand for none."""
        return sum(len(self._bytes.get(id, b"")) for id in ids if id not in self._special_ids)

    def stream(
        self, ids: Iterable[int], skip_special: bool = False, first: bool = True
    ) -> Iterator[str]:
        """Yields the same text as `decode` in pieces, as the ids come; no piece ends inside a
        character.

        first: the ids begin a text. False where they continue one: then a space at the beginning
        belongs to the text.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        at_start = first and self.model.prefix != "never"
        for id in ids:
            if skip_special and id in self._special_ids:
                continue
            new = self._bytes.get(id, b"")
            if new and at_start:
                # sentencepiece has put a space before the first word.
                new = new.removeprefix(b" ")
                at_start = False
            # The decoder keeps bytes at the end that only begin a character for the next token.
            text = utf8.decode(new)
            if text:
                yield text
        text = utf8.decode(b"", final=True)
        if text:
            yield text

    def _cut(
        self,
        text: str,
        special: bool,
        quoted: Collection[Span] = (),
        seams: Collection[int] = (),
    ) -> list[Cut]:
        """Cuts a text at its added tokens.

        special: special tokens count as well, but nowhere that touches one of the `quoted` spans.
        seams: positions, ascending, at which the text is cut before added tokens are looked for, so
        that what stands before a seam is cut as if the text ended there.
        Returns the tokens and the plain text between them, in order. The space that a token takes
        along is in neither.
        """
        edges = [0, *seams, len(text)]
        cuts: list[Cut] = [(start, end, None) for start, end in pairwise(edges)]
        for pattern in self._patterns:
            finer: list[Cut] = []
            for cut in cuts:
                start, end, id = cut
                if id is None:
                    finer += self._find(pattern, text, (start, end), special, quoted)
                else:
                    finer.append(cut)
            cuts = finer
        return cuts

    def _find(
        self,
        pattern: re.Pattern,
        text: str,
        span: Span,
        special: bool,
        quoted: Collection[Span] = (),
    ) -> Iterator[Cut]:
        """Yields the same as `_cut` for a span of the text and the added tokens that one pattern
        finds."""
        start, end = span
        done = start  # up to where the text is yielded
        for match in pattern.finditer(text, start, end):
            token = self.added[match[0]]
            a, b = match.span()
            if token.special and not special:
                continue
            if token.special and _touches((a, b), quoted):
                continue
            # The token before it has taken along the space that it begins with.
            if a < done:
                continue
            if token.single_word:
                before = text[max(start, a - 1) : a]
                after = text[b : min(end, b + 1)]
                if _in_word(before) or _in_word(after):
                    continue
            plain_end = a
            if token.lstrip:
                plain_end = done + len(text[done:a].rstrip(UNICODE_SPACE))
            if done < plain_end:
                yield done, plain_end, None
            yield a, b, token.id
            done = b
            if token.rstrip:
                done = end - len(text[b:end].lstrip(UNICODE_SPACE))
        if done < end:
            yield done, end, None

    def _subwords(
        self, text: str, first: bool, continues: bool = False
    ) -> tuple[list[int], list[int], list[int]]:
        """Encodes a normalized text in which only late added tokens are left. first: nothing stands
        before it. continues: plain text stands directly before it.

        Returns the ids, and where each begins and ends, in bytes of the text.
        """
        if self._late_pattern is None:
            return self.model.encode_spans(text, first, continues)
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        for start, end, id in self._find(self._late_pattern, text, (0, len(text)), False):
            part = text[start:end]
            if id is None:
                at_start = start == 0
                new, new_starts, new_ends = self.model.encode_spans(
                    part, first and at_start, continues and at_start
                )
            else:
                new, new_starts, new_ends = [id], [0], [len(part.encode())]
            offset = len(text[:start].encode())
            ids += new
            starts += [offset + position for position in new_starts]
            ends += [offset + position for position in new_ends]
        return ids, starts, ends

    # ---- conversations ----

    def render(
        self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Encodes a conversation as the model sees it: returns the ids, and for each True if it is
        trained.

        messages: {"role", "content", "tool_calls"} each, in an order that the template accepts.
        tools: what the template is told of the tools.
        add_generation_prompt: end with the beginning of an answer.

        The ids are those of `render_text`, with control tokens where the template writes them and
        none in the messages, and with no bos but the template's. Where an answer begins, the text
        is cut and both sides are encoded apart: generation has only the first side to ask with, so
        what it asks with is just what was trained up to there. Trained is what the template
        writes for an assistant's message behind the text that asks for it, tool calls and thoughts
        included, and the first of `stop_ids` after it, if there is nothing but space between. An
        answer that ends the conversation is trained up to the next of `stop_ids` in any case, and
        where there is none, eos is appended for it. An answer of nothing but space is not trained.

        Proof that nothing else is trained: the trained ids decode to just that text, and with
        another text in the place of each answer, the ids that are not trained stay the same. Raises
        TemplateError where that fails.
        """
        (result,) = self.render_each([(messages, tools)], add_generation_prompt)
        if isinstance(result, UserError):
            raise result
        mask = [False] * len(result.ids)
        for start, end, _ in result.spans:
            mask[start:end] = [True] * (end - start)
        return result.ids, mask

    def render_each(
        self,
        conversations: list[tuple[list[dict], list | None]],
        add_generation_prompt: bool = False,
        roles: tuple[str, ...] = ("assistant",),
    ) -> list["EncodedChat | UserError"]:
        """Encodes many conversations as `render` does, which the template's process takes together.

        conversations: (messages, tools) each.
        roles: the roles whose messages are trained; of a user's message, its words and what ends
        them.
        Returns for each conversation its ids and what is trained of them, or why it has none. With
        add_generation_prompt, what the template does not show is not looked for.
        """
        results: list = [None] * len(conversations)
        by_template: dict[str, list[tuple[int, Conversation]]] = {}
        for i, (messages, tools) in enumerate(conversations):
            try:
                plain = _plain_messages(messages)
            except TemplateError as error:
                results[i] = error
                continue
            conversation = Conversation(plain, tools, add_generation_prompt, roles)
            name = self.which_template(tools)
            by_template.setdefault(name, []).append((i, conversation))
        # Each template has a process of its own, which renders all its conversations in one go.
        for name, numbered in by_template.items():
            same_template = [conversation for _, conversation in numbered]
            located = self._jinja[name].locate(same_template, self._control)
            hidden: list[Counter[str]] = [Counter()] * len(located)
            if not add_generation_prompt:
                hidden = self._hidden_parts[name].count(same_template, located)
            for (i, _), rendered, counts in zip(numbered, located, hidden, strict=True):
                # Besides a TemplateError, it may be a limit of the tokenizer.
                try:
                    results[i] = self._encode_chat(rendered, counts)
                except UserError as error:
                    results[i] = error
        return results

    def _encode_chat(self, rendered: "Rendered | Refused", hidden: Counter[str]) -> EncodedChat:
        """Returns a conversation as ids. hidden: is put into the result. Raises TemplateError where
        the proof that `render` describes fails."""
        if isinstance(rendered, Refused):
            raise self._error(str(rendered))
        text = _replace_surrogates(rendered.text)
        cuts = self._cut(text, True, rendered.quoted, rendered.seams)
        stops = [(start, end) for start, end, id in cuts if id in self.stop_ids]
        # The answer that ends the conversation. With a generation prompt, that is still to come.
        last_answer = None
        if not rendered.has_generation_prompt:
            last_answer = next((answer for answer in rendered.answers if answer.is_last), None)
        needs_eos = False
        if last_answer is not None:
            needs_eos = not any(start >= last_answer.last for start, _ in stops)
        if needs_eos and self.eos_id is None:
            raise self._error(
                "it ends an answer with no control token, and the tokenizer has no eos_token"
            )

        spans = []
        for answer in rendered.answers:
            is_last = answer is last_answer
            spans.append(self._trained_text(answer, text, cuts, stops, is_last))
        cache: dict = {}
        encoded = self._tokens(text, cuts, spans, cache)
        # A prompt is not trained on, so it needs no proof.
        is_proved = True
        if encoded.spans and not rendered.has_generation_prompt:
            is_proved = self._only_answers_are_trained(rendered, text, spans, encoded, cache)
        if not is_proved:
            raise self._error("a token holds a part of an answer and of what stands around it")

        ids = encoded.ids
        trained = []
        for (start, end), answer in zip(encoded.spans, rendered.answers, strict=True):
            trained.append((start, end, answer.message))
        if needs_eos and self.eos_id is not None:
            ids.append(self.eos_id)
            # The answer that ends the conversation is the last of them.
            start, _, message = trained[-1]
            trained[-1] = (start, len(ids), message)
        empty_thinks = []
        asked_otherwise = []
        for answer in rendered.answers:
            if EMPTY_BLOCK.match(text, answer.begin):
                empty_thinks.append(answer.message)
            if not answer.is_as_asked:
                asked_otherwise.append(answer.message)
        return EncodedChat(ids, trained, hidden, empty_thinks, asked_otherwise)

    def _only_answers_are_trained(
        self, rendered: Rendered, text: str, spans: list[Span], encoded: Encoded, cache: dict
    ) -> bool:
        """True if the proof that `render` describes succeeds.

        text: that of `rendered`, without lone surrogates.
        spans: the trained spans of the text.
        encoded: what `_tokens` has made of them.
        cache: as in `_tokens`.
        """

        def in_other(spans: list[Span]) -> list[Span]:
            moved = []
            for start, end in spans:
                other_start = rendered.position_in_other(start)
                other_end = rendered.position_in_other(end)
                moved.append((other_start, other_end))
            return moved

        # The same conversation with another text in the place of each answer.
        other = _replace_surrogates(rendered.other)
        other_seams = [rendered.position_in_other(seam) for seam in rendered.seams]
        other_cuts = self._cut(other, True, in_other(rendered.quoted), other_seams)
        other_encoded = self._tokens(other, other_cuts, in_other(spans), cache)
        if not (encoded.is_exact and other_encoded.is_exact):
            return False
        for (a, b), (start, end) in zip(encoded.spans, spans, strict=True):
            if not self._spells(encoded.ids[a:b], text[start:end]):
                return False
        outside = _outside(encoded.ids, encoded.spans)
        return outside == _outside(other_encoded.ids, other_encoded.spans)

    def _trained_text(
        self, answer: Answer, text: str, cuts: list[Cut], stops: list[Span], is_last: bool
    ) -> Span:
        """Returns the trained span of the text: from the beginning of the answer to its end, with
        the stop token that ends it."""
        begin = answer.begin
        empty_block = EMPTY_BLOCK.match(text, begin)
        if self.empty_think == "mask" and empty_block:
            begin = empty_block.end()
        for start, end, id in cuts:
            # An added token that the answer begins inside of is trained as a whole.
            if id is not None and start < begin < end:
                begin = start
                break
        stop = next((stop for stop in stops if stop[0] >= answer.last), None)
        if stop is None:
            end = len(text) if is_last else answer.last
            return begin, end
        stop_start, stop_end = stop
        between = [id for start, _, id in cuts if answer.last <= start < stop_start]
        only_space = not text[answer.last : stop_start].strip()
        # The template writes more words after a tool call, which belong to it.
        only_words = answer.has_tool_calls and not any(id in self._special_ids for id in between)
        if only_space or only_words or is_last:
            return begin, stop_end
        return begin, answer.last

    def _tokens(self, text: str, cuts: list[Cut], spans: list[Span], cache: dict) -> Encoded:
        """Encodes a text that is cut at its added tokens.

        spans: spans of characters, ascending.
        cache: ids of parts that came before, by (text, first, continues).
        """
        ids: list[int] = []
        # The positions of beginnings (0) and ends (1) of spans, ascending.
        bounds: list[tuple[int, int]] = []
        for start, end in spans:
            bounds += [(start, 0), (end, 1)]
        # The number of ids before each bound. The first len(places) bounds are placed so far.
        places: list[int] = []
        is_exact = True
        plain_end = -1  # where the last plain text ended
        for start, end, id in cuts:
            inside = []  # bounds within plain text, which are placed below
            while len(places) < len(bounds) and bounds[len(places)][0] < end:
                position, is_end = bounds[len(places)]
                if position <= start:
                    places.append(len(ids))
                elif id is not None:
                    # A span that begins or ends inside an added token takes it as a whole.
                    places.append(len(ids) + is_end)
                else:
                    inside.append((len(places), position, is_end))
                    places.append(-1)
            if id is not None:
                ids.append(id)
                continue
            part = text[start:end]
            first = start == 0
            # Behind a seam, plain text goes on.
            continues = start == plain_end
            plain_end = end
            if not inside:
                ids += self._cached_subwords(part, first, continues, cache)
                continue
            new, starts, ends = self._subwords(self.model.normalize(part), first, continues)
            for i, position, is_end in inside:
                before = self.model.normalize(text[start:position])
                byte = len(before.encode())
                token = bisect_right(ends, byte)  # the first one that ends behind the bound
                if token < len(new) and starts[token] < byte:
                    is_exact = False
                    token += is_end
                places[i] = len(ids) + token
            ids += new
        # The bounds at the end of the text.
        while len(places) < len(bounds):
            places.append(len(ids))
        id_spans = list(zip(places[::2], places[1::2], strict=True))
        return Encoded(ids, id_spans, is_exact)

    def _cached_subwords(self, part: str, first: bool, continues: bool, cache: dict) -> list[int]:
        """Returns the ids of a part of a conversation. Short ones, such as a system message that
        all conversations have, are kept from one conversation to the next; long ones in `cache`."""
        known = self._short_texts if len(part) < SHORT_TEXT else cache
        key = (part, first, continues)
        if key not in known:
            if len(self._short_texts) > MOST_SHORT_TEXTS:
                self._short_texts.clear()
            normalized = self.model.normalize(part)
            if self._late_pattern is None and not continues:
                # The common case, without the work for where each token begins and ends.
                known[key] = self.model.encode(normalized, first)
            else:
                known[key], _, _ = self._subwords(normalized, first, continues)
        return known[key]

    def _spells(self, ids: list[int], text: str) -> bool:
        """True if ids decode to a part of a text. With sentencepiece, which puts spaces in front of
        words, spaces do not count."""
        text = self.model.normalize(text)
        if self.model.prefix == "never":
            try:
                spelled = b"".join(map(self._bytes.__getitem__, ids))
            except KeyError:
                return False
            return spelled.decode("utf-8", "replace") == text
        decoded = "".join(self.stream(ids, first=False))
        return decoded.replace(" ", "") == text.replace(" ", "")

    def render_text(
        self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Returns the template's text, equal to transformers' apply_chat_template(tokenize=False).
        Raises TemplateError."""
        try:
            template = self._jinja[self.which_template(tools)]
            return template.render(_plain_messages(messages), tools, add_generation_prompt)
        except Refused as refusal:
            raise self._error(str(refusal)) from None

    def spells_control(self, text: str) -> bool:
        """True if a text holds the text of a control token."""
        return self._control.search(text) is not None

    def spells_answer_header(self, text: str) -> bool:
        """True if a text holds what the template writes before an answer."""
        header = self._answer_header
        return bool(header) and header in text

    @cached_property
    def _answer_header(self) -> str:
        """What the template writes before an answer; "" if it might stand in any text."""
        header = self._jinja["default"].generation_prompt.strip()
        return header if len(header) >= SHORTEST_HEADER else ""

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that ids and masks depend on: the folder's files, the templates, the stop
        tokens, and the date where a template writes it."""
        settings = [self.templates, sorted(self.stop_ids), self.adds_bos, self.empty_think]
        # Another day makes other ids only where a template writes it.
        if self.writes_date:
            settings.append(self.day)
        digest = hashlib.sha256(json.dumps(settings).encode())
        for name in READ:
            path = self.source / name
            if path.is_file():
                digest.update(name.encode() + path.read_bytes())
        return digest.hexdigest()

    def first_difference(self, other: "Tokenizer") -> str:
        """Returns the first id that is another token in another tokenizer, in words; "" if there is none."""
        for id in sorted(self._bytes.keys() | other._bytes.keys()):
            mine, theirs = self._bytes.get(id), other._bytes.get(id)
            if mine != theirs:
                words = [
                    each.decode("utf-8", "replace") if each else None for each in (mine, theirs)
                ]
                return f"token {id} is {words[0]!r} here, {words[1]!r} there"
        return ""

    @property
    def writes_date(self) -> bool:
        """True if a template may write the date."""
        return any(
            "strftime_now" in COMMENT.sub("", template) for template in self.templates.values()
        )

    @property
    def date_note(self) -> str:
        """A text for the user about the date in the prompt; "" where the template writes none."""
        if not self.writes_date:
            return ""
        return f"date {self.day} in the prompt, from the template"

    def why_no_system(self, text: str) -> str:
        """Returns why the template can't write a system message, found by a trial; "" if it can.
        text: of the message."""
        messages = [
            {"role": "system", "content": text},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
        (result,) = self.render_each([(messages, None)])
        if isinstance(result, UserError):
            return str(result)
        if result.hidden:
            return f"chat template of {self.template_name}: it leaves system messages out"
        return ""

    def forget_processes(self) -> None:
        """Makes a forked process start template processes of its own instead of using its
        parent's."""
        for template in self._jinja.values():
            template.process = None

    def padding(self, rows: int) -> Padding:
        """Returns a padding token that no text ends with, so that the last token of a text that is not
        padding is the text's last token.

        A text ends with the tokenizer's eos, with what the template writes last, or with plain text,
        which holds no special token. The tokenizer's own padding token is kept if it is none of
        these. Else it is another special token that the template does not write: one that is called
        after padding, the unknown token, one that is reserved or unused, or any other.

        rows: of the model's embedding table, which must have the token.
        """
        ends, written = self._texts_ends()
        by_id = {id: text for text, id in self.special_tokens.items() if id < rows}
        if self.pad_id in by_id and self.pad_id not in ends:
            return Padding(self.pad_id, by_id[self.pad_id], "")
        reason = "the tokenizer names no padding token"
        if self.pad_id is not None:
            own = self.decode([self.pad_id])
            reason = f"texts may end with the tokenizer's own, {own}"
            if self.pad_id >= rows:
                reason = f"the model has no embedding for the tokenizer's own, {own}"
        unfit = ends | written | {self.bos_id}
        unknown = self.names.get("unk_token")
        # A character that no vocabulary has. Where it becomes the unknown token, texts may end with it.
        if unknown in self.special_tokens and self.special_tokens[unknown] in self.encode(RAREST):
            unfit.add(self.special_tokens[unknown])
        candidates = {text: id for id, text in sorted(by_id.items()) if id not in unfit}
        choices = [text for text in candidates if "pad" in text.lower()]
        choices += [text for text in candidates if text == unknown]
        choices += [text for text in candidates if SPARE.search(text)]
        choices += candidates
        if not choices:
            return Padding(None, None, f"no token is fit for padding ({reason})")
        text = choices[0]
        return Padding(candidates[text], text, f"the padding token is {text}: {reason}")

    def _texts_ends(self) -> tuple[set[int], set[int]]:
        """Returns the ids that texts may end with, and the special ones that the template writes, found
        by trials."""
        ends = self._answer_ends | {id for id in (self.eos_id,) if id is not None}
        written: set[int] = set()
        system, question, answer = (
            {"role": role, "content": "a"} for role in ("system", "user", "assistant")
        )
        trials = ([question], [question, answer], [system, question, answer])
        for chat in self.render_each([(messages, None) for messages in trials]):
            # Not every template takes a system message.
            if isinstance(chat, EncodedChat):
                ends.add(chat.ids[-1])
                written |= self._special_ids.intersection(chat.ids)
        return ends, written

    def save_template(self, folder: Path) -> None:
        """Writes a named template into a folder, so that the model is served with the template it
        was trained with. One that came from files is copied with them."""
        template = self.templates["default"]
        if template in NAMED.values():
            (Path(folder) / "chat_template.jinja").write_text(template, encoding="utf-8")

    def which_template(self, tools: list | None) -> str:
        """Returns the name of the template that writes a conversation with these tools."""
        if tools is not None and "tool_use" in self._jinja:
            return "tool_use"
        return "default"

    def _error(self, reason: str) -> TemplateError:
        """Returns an error of one line that names the template."""
        one_line = " ".join(reason.split())
        return TemplateError(f"chat template of {self.template_name}: {one_line}")

    def _answer_end(self) -> set[int]:
        """Returns the control token that the template writes after an answer, found by a trial; or
        an empty set."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        template = self._jinja[self.which_template(None)]
        (rendered,) = template.locate([Conversation(messages)], self._control)
        # A template that is broken, or that needs other messages, is reported where it is used.
        if isinstance(rendered, Refused) or not rendered.answers:
            return set()
        answer_end = rendered.answers[0].last
        for start, _, id in self._cut(rendered.text, True):
            if start >= answer_end and id in self._special_ids:
                follows_directly = not rendered.text[answer_end:start].strip()
                # A bos there begins what follows, and does not end the answer.
                if id is not None and id != self.bos_id and follows_directly:
                    return {id}
                return set()
        return set()


def _replace_surrogates(text: str) -> str:
    """Returns the text with U+FFFD for each lone surrogate."""
    if text.isascii():
        return text
    return LONE_SURROGATE.sub("\ufffd", text)


def _touches(span: Span, others: Collection[Span]) -> bool:
    """True if a span has a character in common with one of the others."""
    start, end = span
    # A loop, since any() with a generator takes twice the time, and this runs for every token.
    for other_start, other_end in others:
        if start < other_end and other_start < end:
            return True
    return False


def _outside(ids: list[int], spans: list[tuple[int, int]]) -> list[int]:
    """Returns the ids that are in none of the spans."""
    outside = []
    done = 0
    for start, end in spans:
        outside += ids[done:start]
        done = end
    return outside + ids[done:]


def _in_word(character: str) -> bool:
    """True for a character of a word: a letter, a mark, a digit or a connector; False for the empty
    string."""
    if not character:
        return False
    category = unicodedata.category(character)
    return category[0] in "LM" or category in WORD


def _any_of(texts: Iterable[str]) -> re.Pattern:
    """Compiles a pattern that finds any of the texts; where several begin at one place, the
    longest.

    The pattern is a tree by characters, since Python tries the branches of a flat list of thousands
    one by one.
    Raises UserError where the tree is too deep.
    """
    words = sorted({*texts})
    try:
        return re.compile(_prefix_tree(words, 0) if words else "(?!)")
    except RecursionError:
        raise UserError(
            "the tokenizer's added tokens are beginnings of each other, in a chain too long to be searched for"
        ) from None


def _prefix_tree(words: list[str], depth: int) -> str:
    """Returns a regular expression for what follows the first `depth` characters, in which all
    words are equal.

    words: different, sorted.
    """
    branches = []
    longer = [word for word in words if len(word) > depth]
    # The words are sorted, so that those with the same next character stand together.
    for _, group in groupby(longer, key=lambda word: word[depth]):
        same_start = list(group)
        common = len(commonprefix(same_start))
        shared = same_start[0][depth:common]
        branches.append(re.escape(shared) + _prefix_tree(same_start, common))
    if not branches:
        return ""
    rest = branches[0]
    if len(branches) > 1:
        rest = f"(?:{'|'.join(branches)})"
    if len(words[0]) == depth:
        # The first word ends here.
        return f"(?:{rest})?"
    return rest


def _plain_messages(messages: list[dict]) -> list[dict]:
    """Returns messages without empty fields, and with a string for a content that is a list of text
    parts."""
    if not messages:
        raise TemplateError("an empty conversation; at least one message is needed")
    plain = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and all(_is_text_part(part) for part in content):
            text = "".join(str(part.get("text", "")) for part in content)
            message = message | {"content": text}
        plain.append({key: value for key, value in message.items() if value is not None})
    return plain


def _is_text_part(part: object) -> bool:
    """True for a part of a content that is text, and no image or sound."""
    return isinstance(part, dict) and part.get("type") == "text"


# ---- from a folder ----


def check_date(day: str) -> None:
    """Raises UserError if the value of --date is no date."""
    try:
        is_date = date.fromisoformat(day).isoformat() == day
    except ValueError:
        is_date = False
    if not is_date:
        raise UserError(f"--date {day}: is no date; write it as 2026-11-29")


def load_tokenizer(
    folder: Path | str,
    template: str | None = None,
    base: Path | None = None,
    day: str = "",
    empty_think: str = "train",
    system: str = "",
) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face folder: tokenizer.json or tokenizer.model, with
    tokenizer_config.json, special_tokens_map.json, chat_template.jinja, config.json and
    generation_config.json where they exist.

    template: the name of one of chat_template.NAMED, to be used in place of the folder's own.
    base: where `folder` is an adapter's, the folder of its base model, whose config.json and
    generation_config.json name more stop tokens.
    day: what a template writes that asks for the date, as 2026-11-29; "" for today.
    empty_think: one of EMPTY_THINK.
    system: the system message of conversations that have none of their own.

    Raises UserError with file and reason where there is no tokenizer, or none whose ids would be
    exactly those of the `tokenizers` library (of sentencepiece, where there is only a
    tokenizer.model).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a Hugging Face model folder")
    spec_file = folder / "tokenizer.json"
    config_file = folder / "tokenizer_config.json"
    spec = read_json_if_there(spec_file)
    config = read_json_if_there(config_file)
    special = read_json_if_there(folder / "special_tokens_map.json") | config
    names = _names(config_file, special)
    listed = _listed(config_file, special)
    added = _all_added_tokens(folder, spec, config)
    model, control, default_names = _subword_model(folder, spec, config, added)
    added = control | added
    names = default_names | names
    _mark_special(config_file, model, added, names, listed)

    ids = {name: added[text].id for name, text in names.items() if text in added}
    stop_ids = set()
    if "eos_token" in ids:
        stop_ids.add(ids["eos_token"])
    for place in {folder, Path(base or folder)}:
        stop_ids |= _eos_ids(place / "config.json")
        stop_ids |= _eos_ids(place / "generation_config.json")
    # A tokenizer.json says it in its post-processor. Without one, bos is the rule.
    writes_bos, writes_eos = True, False
    if spec:
        writes_bos = always_writes(spec.get("post_processor"), names.get("bos_token"), 0)
        writes_eos = always_writes(spec.get("post_processor"), names.get("eos_token"), -1)
    adds_bos = config.get("add_bos_token", writes_bos)
    adds_eos = config.get("add_eos_token", writes_eos)
    if template == "chatml" and not {"<|im_start|>", "<|im_end|>"} <= added.keys():
        missing = "the tokenizer has no <|im_start|> and <|im_end|>"
        raise UserError(
            f"{folder}: {missing}, which the template chatml writes; take alpaca or plain"
        )
    templates, template_name = _templates(folder, config, template)
    return Tokenizer(
        model,
        added,
        names,
        bos_id=ids.get("bos_token"),
        eos_id=ids.get("eos_token"),
        pad_id=ids.get("pad_token"),
        adds_bos=adds_bos is True,
        stop_ids=stop_ids,
        templates=templates,
        template_name=template_name,
        source=folder,
        day=day,
        empty_think=empty_think,
        system=system,
        adds_eos=adds_eos is True,
    )


def _all_added_tokens(folder: Path, spec: dict, config: dict) -> dict[str, AddedToken]:
    """Returns the added tokens of a folder. tokenizer.json is believed first, then
    tokenizer_config.json, then added_tokens.json, which is of folders from before
    added_tokens_decoder."""
    added = _added_tokens(folder / "tokenizer.json", spec.get("added_tokens") or [])
    decoder = config.get("added_tokens_decoder") or {}
    added = _added_tokens(folder / "tokenizer_config.json", decoder, added) | added
    file = folder / "added_tokens.json"
    for text, id in read_json_if_there(file).items():
        if type(id) is not int or id < 0:
            raise UserError(f"{file}: {text!r} has id {id!r}; it must be a whole number, 0 or more")
        added.setdefault(text, AddedToken(id, False, False))
    return added


def _subword_model(
    folder: Path, spec: dict, config: dict, added: dict[str, AddedToken]
) -> tuple["BytePairs | Pieces", dict[str, AddedToken], dict[str, str]]:
    """Loads what cuts plain text into tokens. Returns it with the control tokens and the names
    (bos_token, ...) that it brings along. Raises UserError where there is none."""
    spec_file = folder / "tokenizer.json"
    model_file = folder / "tokenizer.model"
    bpe = spec.get("model")
    if not spec and model_file.is_file() and is_tiktoken(model_file):
        model, control = tiktoken_file(model_file)
        return model, control, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    # Byte fallback is of tokenizers that were converted from sentencepiece.
    has_byte_fallback = isinstance(bpe, dict) and bpe.get("byte_fallback") is True
    if has_byte_fallback or (not spec and model_file.is_file()):
        sentencepiece = pieces(folder, spec, config)
        return sentencepiece, sentencepiece.control, sentencepiece.names
    if spec:
        return byte_pairs(spec_file, spec, added), {}, {}
    raise UserError(
        f"{folder}: no tokenizer (neither tokenizer.json nor tokenizer.model); copy the model's here"
    )


def _mark_special(
    config_file: Path,
    model: "BytePairs | Pieces",
    added: dict[str, AddedToken],
    names: dict[str, str],
    listed: list[str],
) -> None:
    """Makes special tokens of those that tokenizer_config.json names or lists. Raises UserError for
    one that is not in the vocabulary, unless it is one that nothing here uses."""
    named = list(names.items())
    named += [("additional_special_tokens", text) for text in listed]
    for name, text in named:
        if text in added:
            added[text] = replace(added[text], special=True)
        elif text in model.vocab:
            added[text] = AddedToken(model.vocab[text], True, False)
        elif name in ("bos_token", "eos_token", "additional_special_tokens"):
            raise UserError(
                f"{config_file}: {name} {text!r} is not in the vocabulary; name one that is"
            )


def _names(path: Path, config: dict) -> dict[str, str]:
    """Returns the texts of bos_token, eos_token and so on. In the file each is a string or an
    object with `content`, and an empty one is none."""
    names = {}
    for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        name = f"{kind}_token"
        value = config.get(name)
        if not value:
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise UserError(f"{path}: {name} is neither a string nor an object with content")
        names[name] = text
    return names


def _listed(path: Path, config: dict) -> list[str]:
    """Returns the texts of additional_special_tokens (transformers 4) and extra_special_tokens (5):
    lists, or objects."""
    texts = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(key) or []
        if isinstance(values, dict):
            values = values.values()
        for value in values:
            text = value.get("content") if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise UserError(
                    f"{path}: additional_special_tokens holds what is neither a string nor an"
                    " object with content"
                )
            texts.append(text)
    return texts


def _added_tokens(
    path: Path, entries: list | dict, known: Collection[str] = ()
) -> dict[str, AddedToken]:
    """Returns the tokens of tokenizer.json's `added_tokens`, or of tokenizer_config.json's
    `added_tokens_decoder` (objects by id), without the `known` ones."""
    if isinstance(entries, dict) and _is_decoder(entries):
        entries = [entry | {"id": int(id)} for id, entry in entries.items()]
    # Anything else counts as one entry, which is refused below unless it is a token.
    if not isinstance(entries, list):
        entries = [entries]
    if len(entries) > MOST_ADDED:
        raise UserError(f"{path}: {len(entries):,} added tokens, at most {MOST_ADDED:,} are read")
    added = {}
    for entry in entries:
        match entry:
            case {"content": str(text)} if text in known:
                continue
            case {"id": int(id), "content": str(text)} if (
                id >= 0 and text and not LONE_SURROGATE.search(text)
            ):
                special = entry.get("special") is True
                normalized = entry.get("normalized", not special) is True
                added[text] = AddedToken(
                    id,
                    special,
                    normalized,
                    lstrip=entry.get("lstrip") is True,
                    rstrip=entry.get("rstrip") is True,
                    single_word=entry.get("single_word") is True,
                )
            case _:
                raise UserError(
                    f"{path}: {str(entry)[:80]} is no added token; it needs an id and a content"
                )
    return added


def _is_decoder(entries: dict) -> bool:
    """True if an object is an `added_tokens_decoder`: objects by decimal number."""
    return all(isinstance(entry, dict) and id.isdecimal() for id, entry in entries.items())


def _eos_ids(file: Path) -> set[int]:
    """Returns `eos_token_id` of a config.json or generation_config.json: one, several or none."""
    eos = read_json_if_there(file).get("eos_token_id")
    if eos is None:
        return set()
    if not isinstance(eos, list):
        eos = [eos]
    if any(type(id) is not int for id in eos):
        raise UserError(
            f"{file}: eos_token_id is {str(eos)[:40]}; it must be an integer or a list of integers"
        )
    return set(eos)


def always_writes(post_processor: object, token: str | None, at: int) -> bool:
    """True if a tokenizer.json's post-processor puts this token before (at 0) or behind (at -1)
    every text."""
    match post_processor:
        case {"type": "TemplateProcessing", "single": [_, *_] as template}:
            match template[at]:
                case {"SpecialToken": {"id": id}}:
                    return id == token
            return False
        case {"type": "Sequence", "processors": [*processors]}:
            return any(always_writes(processor, token, at) for processor in processors)
    return False


def _templates(folder: Path, config: dict, named: str | None) -> tuple[dict[str, str], str]:
    """Returns (templates by name, where they come from). As in transformers, files come before
    tokenizer_config.json.

    named: the name of one of chat_template.NAMED, which comes before both.
    """
    if named is not None:
        return {"default": NAMED[named]}, f"{named} (asked for)"

    file = folder / "chat_template.jinja"
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    templates = {}
    for path in [file, *others]:
        if path.is_file():
            name = "default" if path == file else path.stem
            templates[name] = read_text(path, TEMPLATE_BYTES)
    if "default" in templates:
        return templates, file.name

    file = folder / "tokenizer_config.json"
    value = config.get("chat_template")
    if value is None:
        return {"default": NAMED["alpaca"]}, "alpaca (fallback)"
    if isinstance(value, str):
        return {"default": value}, file.name
    # transformers 4 wrote several templates as a list of {"name", "template"}.
    by_name: dict = {}
    if isinstance(value, dict):
        by_name = value
    elif isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict):
                by_name[str(entry.get("name"))] = entry.get("template")
    are_texts = all(isinstance(template, str) for template in by_name.values())
    if "default" not in by_name or not are_texts:
        raise UserError(f"{file}: chat_template is no text, and no list with a 'default'")
    return by_name, file.name
