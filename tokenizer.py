"""Text to token ids and back: sentencepiece and tiktoken behind one small class; chat templates, and which tokens train.

A folder's `tokenizer.json` with byte-level BPE becomes a tiktoken encoding (`byte_pairs`, with the proof that both merge
alike); a `tokenizer.model` is sentencepiece's own file (`pieces`). Whatever would give other ids than the `tokenizers`
library on some text is refused with the reason. A control token is one only where the program or the template writes it:
in text from people `<|im_end|>` is nine characters, unless they ask (`special=True`).

A conversation is one text, written by the folder's Jinja template and tokenised whole, so that no turn is cut off from
its context. Trained are the assistant's answers and what ends each. Where they stand in the text is found by rendering it
a second time with marks around the answers, which must change nothing else.

    python -c "from tokenizer import *; print(load_tokenizer('FOLDER').render([{'role': 'user', 'content': 'Hi'}]))"
"""

import codecs
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import accumulate, islice, pairwise
from pathlib import Path

import jinja2
import tiktoken
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import SentencePieceProcessor

from errors import UserError, read_json, read_text

# The prompt of Taori et al. 2023 (Stanford Alpaca), for models that bring no template. A system turn takes the place of
# the first sentence; in later turns only the headings come again.
ALPACA = """{{ bos_token }}
{%- if messages[0].role != 'system' -%}
Below is an instruction that describes a task. Write a response that appropriately completes the request.
{%- endif -%}
{%- for message in messages -%}
{%- if not (loop.first and message.role == 'system') -%}{{ '\\n\\n' }}{%- endif -%}
{%- if message.role == 'user' -%}{{ '### Instruction:\\n' + message.content }}
{%- elif message.role == 'assistant' -%}{{ '### Response:\\n' + message.content }}{{ eos_token }}
{%- elif message.role == 'system' -%}{{ message.content }}
{%- else -%}{{ raise_exception('there is no place for the role ' + message.role) }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\n\\n### Response:\\n' }}{%- endif -%}
"""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SUPPORTED = "supported are byte-level BPE as of GPT-2, Llama 3, Qwen and SmolLM, and sentencepiece's tokenizer.model"


class TemplateError(UserError):
    """The chat template refuses a conversation, or changes an answer so that it can't be told where it stands."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before anything else. `special`: a control token. `normalized`: looked for only
    where no other added token was found."""

    id: int
    special: bool
    normalized: bool


@dataclass
class Tokenizer:
    """What `load_tokenizer` returns. Ids are the model's; `vocab_size` is one more than the highest."""

    model: "BytePairs | Pieces"
    added: dict[str, AddedToken]
    names: dict[str, str]  # bos_token, eos_token, ... as the template may write them
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    adds_bos: bool  # whether plain text of this model's training begins with bos
    stop_ids: set[int]  # each ends generation: eos of every config file, and what ends a turn in the template
    template: str
    template_name: str  # the file that it comes from, or "alpaca (fallback)"

    def __post_init__(self):
        self.special_tokens = {text: token.id for text, token in self.added.items() if token.special}
        self._special_ids = frozenset(self.special_tokens.values())
        self._bytes = self.model.bytes_of | {token.id: text.encode() for text, token in self.added.items()}
        groups = [[t for t, token in self.added.items() if token.normalized == later] for later in (False, True)]
        # The longest first: where several tokens begin at one place, the longest is meant.
        self._patterns = [
            re.compile("|".join(map(re.escape, sorted(group, key=len, reverse=True)))) for group in groups if group
        ]
        self._plain_only = all(token.special for token in self.added.values())
        self.vocab_size = max(self._bytes, default=-1) + 1
        self.stop_ids = self.stop_ids | self._turn_end()

    @property
    def description(self) -> str:
        return f"{self.model.kind}, {self.vocab_size:,} tokens{self.model.details}"

    # ---- text ----

    def encode(self, text: str, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """The ids of a text; bos and eos around it on request, where the tokenizer has them.

        special: False takes the text of control tokens as plain text, as the `tokenizers` library does with its
        `encode_special_tokens`; True makes control tokens of it. Added tokens that are not special (`<think>`) are found
        either way. A lone surrogate, which is no character, counts as U+FFFD.
        """
        text = _without_surrogates(text)
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for start, end, id in self._cut(text, special):
            ids += self.model.encode(text[start:end], start == 0) if id is None else [id]
        return ids + [self.eos_id] if eos and self.eos_id is not None else ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD; ids beyond the vocabulary are nothing."""
        return "".join(self.stream(ids, skip_special))

    def stream(self, ids: Iterable[int], skip_special: bool = False) -> Iterator[str]:
        """The same text in pieces as the ids come, none of which ends inside a character."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        at_start = self.model.starts_with_space
        for id in ids:
            new = b"" if skip_special and id in self._special_ids else self._bytes.get(id, b"")
            if new and at_start:  # the space that sentencepiece put before the first word
                new, at_start = new.removeprefix(b" "), False
            if text := utf8.decode(new):
                yield text
        if text := utf8.decode(b"", final=True):
            yield text

    def _cut(self, text: str, special: bool, quoted: list[tuple[int, int]] = ()) -> list[tuple[int, int, int | None]]:
        """Cuts text at its added tokens: (start, end, id), where id is None for what lies between. Special ones count
        only if `special`, and nowhere that touches a `quoted` span."""
        cuts = [(0, len(text), None)] if text else []
        for pattern in [] if self._plain_only and not special else self._patterns:
            finer = []
            for start, end, id in cuts:
                for match in pattern.finditer(text, start, end) if id is None else ():
                    token, (a, b) = self.added[match[0]], match.span()
                    if token.special and (not special or any(a < q and p < b for p, q in quoted)):
                        continue
                    finer += [(start, a, None)] * (start < a) + [(a, b, token.id)]
                    start = b
                finer += [(start, end, id)] * (start < end)
            cuts = finer
        return cuts

    # ---- conversations ----

    def render(
        self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """A conversation as the model sees it: ids, and True for each that is trained.

        messages: {"role", "content"} each, in an order that the template accepts. add_generation_prompt: end with the
        head of an answer, ready for one. The ids are those of `render_text` with the template's control tokens as such
        and the messages' as plain text; no bos but the template's. Trained are the tokens that hold a part of an
        assistant's content, and with it the token that ends the turn: the first of `stop_ids` after nothing but space.
        Where the template ends the last answer with none, whatever it writes there is trained and eos appended. An answer
        of nothing but space is not trained. Raises TemplateError.
        """
        messages = _plain_messages(messages)
        text = self.render_text(messages, tools, add_generation_prompt)
        answers, quoted = self._locate(messages, text, tools, add_generation_prompt)
        text = _without_surrogates(text)
        cuts = self._cut(text, True, quoted)
        open_end = messages[-1]["role"] == "assistant" and not add_generation_prompt
        trained, unfinished = self._with_turn_ends(text, cuts, answers, open_end)
        ids, mask = [], []
        for start, end, id in cuts:
            inside = [(max(a, start) - start, min(b, end) - start) for a, b in trained if a < end and start < b]
            if id is not None:
                new, flags = [id], [bool(inside)]
            elif inside:
                new, flags = self._masked(text[start:end], start == 0, inside)
            else:
                new = self.model.encode(text[start:end], start == 0)
                flags = [False] * len(new)
            ids, mask = ids + new, mask + flags
        return (ids + [self.eos_id], mask + [True]) if unfinished else (ids, mask)

    def render_text(
        self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text that the template makes of a conversation, as transformers' apply_chat_template(tokenize=False)."""
        try:
            return self._compiled.render(
                messages=_plain_messages(messages),
                **{"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt} | self.names,
            )
        except TemplateError:
            raise
        except Exception as error:  # a template is somebody's program: it may fail in any way
            raise self._error(str(error) or type(error).__name__) from None

    def save_template(self, folder: Path) -> None:
        """Puts the fallback template into a folder that has none of its own, so that it is served as it was trained."""
        if self.template == ALPACA:
            (Path(folder) / "chat_template.jinja").write_text(self.template, encoding="utf-8")

    @cached_property
    def _compiled(self) -> jinja2.Template:
        """The template in the environment that transformers documents: sandboxed, blocks trimmed, three helpers."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def raise_exception(message: str):
            raise self._error(message)

        def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        return environment.from_string(self.template)

    def _error(self, reason: str) -> TemplateError:
        return TemplateError(f"chat template of {self.template_name}: {' '.join(str(reason).split())}")

    def _turn_end(self) -> set[int]:
        """The control token that the template writes after an answer, found by trying."""
        answer = "\ue000"
        try:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
            text = self.render_text(turns)
        except TemplateError:  # one that wants other turns, or is broken: said where it is used
            return set()
        after = [cut for cut in self._cut(text, True) if cut[2] in self._special_ids and cut[0] > text.rfind(answer) >= 0]
        ends = after and after[0][2] != self.bos_id and not text[text.rfind(answer) + 1 : after[0][0]].strip()
        return {after[0][2]} if ends else set()

    def _locate(self, messages: list[dict], text: str, tools, add_generation_prompt: bool):
        """Where the rendered text holds the answers, and where contents whose control tokens are plain text (answers among
        them): two lists of [start, end) in characters.

        The marks, characters that occur nowhere else, stand at the content's ends; where the template strips contents,
        which these marks prevent, at the ends of the stripped content.
        """
        contents = [message["content"] for message in messages if isinstance(message.get("content"), str)]
        taken = set(text).union(*contents)
        marks = "".join(islice((c for c in map(chr, range(0xE000, 0x110000)) if c not in taken), 4))
        is_control = [any(special in content for special in self.special_tokens) for content in contents]
        for strip in (False, True):
            marked, wanted = [], []
            for message in messages:
                content = message.get("content")
                answer = message["role"] == "assistant"
                if isinstance(content, str) and content.strip() and (answer or is_control[contents.index(content)]):
                    inner = content.strip() if strip else content
                    before, after = content.split(inner, 1)
                    first, last = marks[:2] if answer else marks[2:]
                    message = message | {"content": before + first + inner + last + after}
                    wanted += [inner] if answer else []
                marked.append(message)
            found = _unmark(self.render_text(marked, tools, add_generation_prompt), marks)
            if found and found[0] == text and [text[a:b] for a, b in found[1]] == wanted:
                return found[1], found[1] + found[2]
        raise self._error("it rewrites the content of a turn, so where the answers stand is unknown")

    def _with_turn_ends(
        self, text: str, cuts: list[tuple[int, int, int | None]], answers: list[tuple[int, int]], open_end: bool
    ) -> tuple[list[tuple[int, int]], bool]:
        """The answers' spans stretched over the tokens that end them; True if eos must be appended to the last one."""
        stops = [(start, end) for start, end, id in cuts if id in self.stop_ids]
        trained = []
        for number, (start, end) in enumerate(answers):
            stop = next((stop for stop in stops if stop[0] >= end), None)
            last = open_end and number == len(answers) - 1
            if stop and (last or not text[end : stop[0]].strip()):
                trained.append((start, stop[1]))
            elif last and self.eos_id is None:
                raise self._error("it ends an answer without a control token, and the tokenizer has no eos_token")
            elif last:
                return [*trained, (start, len(text))], True
            else:
                trained.append((start, end))
        return trained, False

    def _masked(self, text: str, first: bool, trained: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Ids of a text without control tokens, and True for those that hold a part of the spans (in characters)."""
        ids, spans = self.model.encode_spans(text, first)
        wanted = bytearray(len(self.model.normalize(text).encode()) + 1)
        for span in trained:
            a, b = (len(self.model.normalize(text[:end]).encode()) for end in span)
            wanted[a:b] = b"\1" * (b - a)
        return ids, [any(wanted[a : max(b, a + 1)]) for a, b in spans]


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json or tokenizer.model, with tokenizer_config.json,
    special_tokens_map.json, chat_template.jinja, config.json and generation_config.json where they exist.

    Raises UserError naming the file and the reason where there is none, or none whose ids would be exactly those of the
    `tokenizers` library (of sentencepiece, for a tokenizer.model alone).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a Hugging Face model folder is wanted")
    optional = lambda name: read_json(folder / name) if (folder / name).is_file() else {}  # noqa: E731
    config, spec = optional("tokenizer_config.json"), optional("tokenizer.json")
    path, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    added = _added_tokens(path, spec.get("added_tokens") or [])
    model_spec = spec.get("model")
    if isinstance(model_spec, dict) and model_spec.get("byte_fallback") is True and model_file.is_file():
        model, vocab = pieces(model_file, config, spec)
    elif spec:
        model, vocab = byte_pairs(path, spec, added)
    elif model_file.is_file():
        model, vocab = pieces(model_file, config, None)
    else:
        raise UserError(f"{folder}: no tokenizer (neither tokenizer.json nor tokenizer.model); copy the model's here")
    path = folder / "tokenizer_config.json"
    added = _configured_tokens(path, config, optional("added_tokens.json")) | model.control | added
    names = _names(path, {"bos_token": model.bos, "eos_token": model.eos} | optional("special_tokens_map.json") | config)
    extra = config.get("additional_special_tokens")
    for text in [*names.values(), *(extra if isinstance(extra, list) else [])]:
        id = added[text].id if text in added else vocab.get(text) if isinstance(text, str) else None
        if id is not None:
            added[text] = AddedToken(id, True, added[text].normalized if text in added else False)
    for name in ("bos_token", "eos_token"):
        if name in names and names[name] not in added:
            raise UserError(f"{path}: {name} {names[name]!r} is not in the vocabulary; name one that is")
    ids = {name: added[text].id for name, text in names.items() if text in added}
    stop_ids = {ids["eos_token"]} if "eos_token" in ids else set()
    for name in ("config.json", "generation_config.json"):
        stop_ids |= _eos_ids(folder / name, optional(name).get("eos_token_id"))
    adds_bos = config.get("add_bos_token")
    return Tokenizer(
        model=model,
        added=added,
        names=names,
        **{f"{name}_id": ids.get(f"{name}_token") for name in ("bos", "eos", "pad")},
        adds_bos=adds_bos if isinstance(adds_bos, bool) else _writes_bos(spec.get("post_processor"), model),
        stop_ids=stop_ids,
        **dict(zip(("template", "template_name"), _template(folder, config), strict=True)),
    )
