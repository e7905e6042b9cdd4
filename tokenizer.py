"""Text to token ids and back, and conversations to ids with a mask of what is trained.

`load_tokenizer` makes a `Tokenizer` of a Hugging Face folder. Byte-level BPE in a `tokenizer.json` becomes a tiktoken
encoding (`byte_pairs`, with the proof that both merge alike), a `tokenizer.model` is sentencepiece's own file
(`pieces`). What would give other ids than the `tokenizers` library on any text is refused with the reason. A control
token is one only where the program or the template writes it: in text from people `<|im_end|>` is ten characters,
unless they ask (`special=True`).

A conversation is one text, written by the folder's Jinja template and tokenised whole, so that no turn is cut off from
its context. Trained are the assistant's answers and what ends each. Where they stand in the text is found by rendering
it a second time with marks around the answers, which must change nothing else.
"""

import codecs
import json
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from itertools import accumulate, islice, pairwise
from pathlib import Path

import jinja2
import jinja2.ext
import tiktoken
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import SentencePieceProcessor

from errors import UserError, read_json, read_text

Span = tuple[int, int]  # [start, end), in characters where nothing else is said


class TemplateError(UserError):
    """The chat template refuses a conversation, or changes an answer so that it can't be told where it stands."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in the text before anything else is done to it."""

    id: int
    special: bool  # a control token
    normalized: bool  # looked for only in what the others leave


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
    template: str
    template_name: str  # where it comes from: a file's name, or "alpaca (fallback)"

    def __post_init__(self):
        self.special_tokens = {text: token.id for text, token in self.added.items() if token.special}
        self._special_ids = frozenset(self.special_tokens.values())
        self._bytes = self.model.bytes_of | {token.id: text.encode() for text, token in self.added.items()}
        self.vocab_size = max(self._bytes) + 1
        self.description = f"{self.model.kind}, {self.vocab_size:,} tokens{self.model.details}"
        groups = [[text for text, token in self.added.items() if token.normalized == late] for late in (False, True)]
        self._patterns = [_any_of(group) for group in groups if group]
        self._control = _any_of(self.special_tokens)
        self.unlisted_ends = self._turn_end() - self.stop_ids  # no config file names them: a server must be told
        self.stop_ids = self.stop_ids | self.unlisted_ends

    # ---- text ----

    def encode(self, text: str, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """The ids of a text; bos and eos around it on request, where the tokenizer has them.

        special: False takes the text of control tokens for plain text, as the `tokenizers` library does with its
        `encode_special_tokens`; True makes control tokens of it. Added tokens that are not special (`<think>`) are
        found either way. A lone surrogate, which is no character, counts as U+FFFD.
        """
        text = SURROGATE.sub("\ufffd", text)
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for start, end, id in self._cut(text, special):
            ids += self.model.encode(text[start:end], start == 0) if id is None else [id]
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
        """The text cut at its added tokens: (start, end, id) of each, and (start, end, None) of what lies between.
        Special ones count only if `special`, and nowhere that touches a `quoted` span."""
        cuts = [(0, len(text), None)]
        for pattern in self._patterns:
            finer = []
            for start, end, id in cuts:
                for match in pattern.finditer(text, start, end) if id is None else ():
                    token, (a, b) = self.added[match[0]], match.span()
                    if not token.special or (special and not any(a < q and p < b for p, q in quoted)):
                        finer += [(start, a, None), (a, b, token.id)]
                        start = b
                finer.append((start, end, id))
            cuts = [cut for cut in finer if cut[0] < cut[1]]
        return cuts

    # ---- conversations ----

    def render(
        self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """A conversation as the model sees it: ids, and for each whether it is trained.

        messages: {"role", "content"} each, in an order that the template accepts. add_generation_prompt: end with the
        head of an answer. The ids are those of `render_text`, with control tokens where the template writes them and
        none in the messages, and no bos but the template's. Trained is each token that holds a part of an assistant's
        content, and the first of `stop_ids` after it if there is nothing but space between. An answer that ends the
        conversation is trained up to the next of `stop_ids` in any case, and where there is none eos is appended for
        it. An answer of nothing but space is not trained. Raises TemplateError.
        """
        messages = _plain_messages(messages)
        write = partial(self.render_text, tools=tools, add_generation_prompt=add_generation_prompt)
        text, answers, quoted = self._locate(messages, write)
        cuts = self._cut(text, True, quoted)
        stops = [(start, end) for start, end, id in cuts if id in self.stop_ids]
        last = answers[-1] if _is_answer(messages[-1]) and not add_generation_prompt else None
        if last and not any(start >= last[1] for start, _ in stops):
            if self.eos_id is None:
                raise self._error("it ends an answer with no control token, and the tokenizer has no eos_token")
            stops.append((len(text), len(text) + 1))
            cuts.append((*stops[-1], self.eos_id))
        trained = []
        for start, end in answers:
            stop = next((stop for stop in stops if stop[0] >= end), None)
            if stop and ((start, end) == last or not text[end : stop[0]].strip()):
                end = stop[1]
            trained.append((start, end))
        ids, mask = [], []
        for start, end, id in cuts:
            inside = [(max(a, start) - start, min(b, end) - start) for a, b in trained if a < end and start < b]
            if id is None:
                new, flags = self._masked(text[start:end], start == 0, inside)
            else:
                new, flags = [id], [bool(inside)]
            ids += new
            mask += flags
        return ids, mask

    def render_text(self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False) -> str:
        """The template's text, equal to transformers' apply_chat_template(tokenize=False). Raises TemplateError."""
        settings = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        messages = _plain_messages(messages)
        try:
            return self._compiled.render(messages=messages, **settings | self.names)
        except Exception as error:  # noqa: BLE001  a template is somebody's program: it may fail in any way
            raise self._error(str(error) or type(error).__name__) from None

    def save_template(self, folder: Path) -> None:
        """Puts the fallback into a folder that has no template, so that the model is served as it was trained."""
        if self.template == ALPACA:
            (Path(folder) / "chat_template.jinja").write_text(self.template, encoding="utf-8")

    @cached_property
    def _compiled(self) -> jinja2.Template:
        """The template, in the environment that transformers promises to templates: a sandbox, tags and helpers."""
        tags = [loopcontrols, GenerationTag]
        jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=tags)

        def raise_exception(message: str):
            raise jinja2.TemplateError(message)

        jinja.globals["raise_exception"] = raise_exception
        jinja.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        jinja.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        return jinja.from_string(self.template)

    def _error(self, reason: str) -> TemplateError:
        return TemplateError(f"chat template of {self.template_name}: {' '.join(reason.split())}")

    def _turn_end(self) -> set[int]:
        """The control token that the template writes after an answer, found by trying."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text, [(_, end)], _ = self._locate(turns, self.render_text)
        except TemplateError:  # broken, or in want of other turns: said where it is used
            return set()
        controls = [(start, id) for start, _, id in self._cut(text, True) if start >= end and id in self._special_ids]
        return {id for start, id in controls[:1] if id != self.bos_id and not text[end:start].strip()}

    def _locate(self, messages: list[dict], write: Callable) -> tuple[str, list[Span], list[Span]]:
        """The text that write(messages) renders; where in it the answers are; and where the contents are in which no
        control token counts, the answers among them.

        They are found by rendering again with marks at their ends, characters that occur nowhere else: at the ends of
        the stripped contents for templates that strip, which other marks would prevent. Opening and closing marks
        differ, so that no span runs from one content to the next. Contents that are no answers are marked only if they
        look like control tokens: with others a template may do what it likes.
        """
        text = write(messages)
        taken = set(text).union(*(str(message.get("content")) for message in messages))
        marks = "".join(islice((c for c in map(chr, range(0xE000, 0x110000)) if c not in taken), 4))
        a, b, c, d = marks
        marked = re.compile(f"{a}[^{marks}]*{b}|{c}[^{marks}]*{d}")
        for strip in (False, True):
            turns, wanted, spans = [], [], {a: [], c: []}
            for message in messages:
                content, answer = message.get("content"), _is_answer(message)
                if answer or (isinstance(content, str) and self._control.search(content)):
                    inner = content.strip() if strip else content
                    inside = a + inner + b if answer else c + inner + d
                    message = message | {"content": content.replace(inner, inside, 1)}
                    wanted += [inner] if answer else []
                turns.append(message)
            rendered = write(turns)
            for number, match in enumerate(marked.finditer(rendered)):
                start = match.start() - 2 * number  # as it is without the marks before it
                spans[match[0][0]].append((start, start + len(match[0]) - 2))
            unmarked = marked.sub(lambda match: match[0][1:-1], rendered)  # a mark without its fellow stays
            if unmarked == text and [text[start:end] for start, end in spans[a]] == wanted:
                return SURROGATE.sub("\ufffd", text), spans[a], spans[a] + spans[c]
        raise self._error("it rewrites the content of a turn, so that an answer can't be found in it")

    def _masked(self, text: str, first: bool, trained: list[Span]) -> tuple[list[int], list[bool]]:
        """Ids of a text without control tokens, and for each whether it holds a part of the trained spans."""
        ids, spans = self.model.encode_spans(text, first)
        wanted = bytearray(len(self.model.normalize(text).encode()) + 1)
        for span in trained:
            a, b = (len(self.model.normalize(text[:end]).encode()) for end in span)
            wanted[a:b] = b"\1" * (b - a)
        return ids, [any(wanted[a : max(b, a + 1)]) for a, b in spans]  # a piece of width 0 belongs to what follows it


class GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}: there a template itself says what an answer is. Here its text counts."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


SURROGATE = re.compile("[\ud800-\udfff]")  # half a UTF-16 pair


def _any_of(texts: Iterable[str]) -> re.Pattern:
    """Finds any of the texts; where several begin at one place, the longest."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


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


def _is_answer(message: dict) -> bool:
    content = message.get("content")
    return message.get("role") == "assistant" and isinstance(content, str) and bool(content.strip())


# ---- from a folder ----


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json or tokenizer.model, with tokenizer_config.json,
    special_tokens_map.json, chat_template.jinja, config.json and generation_config.json where they exist.

    Raises UserError with file and reason where there is none, or none whose ids would be exactly those of the
    `tokenizers` library (of sentencepiece, where tokenizer.model is all there is).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a Hugging Face model folder is wanted")
    spec_file, config_file, model_file = (folder / f"tokenizer{end}" for end in (".json", "_config.json", ".model"))
    spec, config = _read(spec_file), _read(config_file)
    special = _read(folder / "special_tokens_map.json") | config
    names, listed = _names(config_file, special), _listed(config_file, special)
    added = _added_tokens(spec_file, spec.get("added_tokens") or [])
    added = _added_tokens(config_file, config.get("added_tokens_decoder") or {}, added) | added
    for text, id in _read(folder / "added_tokens.json").items():  # of folders from before added_tokens_decoder
        if type(id) is not int or id < 0:
            raise UserError(f"{folder / 'added_tokens.json'}: {text!r} has id {id!r}, a whole number is wanted")
        added.setdefault(text, AddedToken(id, False, False))
    bpe = spec.get("model")
    if model_file.is_file() and (not spec or (isinstance(bpe, dict) and bpe.get("byte_fallback") is True)):
        model = pieces(model_file, spec, config)
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
    stop_ids = {eos} - {None} | _eos_ids(folder / "config.json") | _eos_ids(folder / "generation_config.json")
    adds_bos = config.get("add_bos_token", not spec or _writes_bos(spec.get("post_processor"), names.get("bos_token")))
    return Tokenizer(model, added, names, bos, eos, pad, adds_bos is True, stop_ids, *_template(folder, config))


def _read(file: Path) -> dict:
    return read_json(file) if file.is_file() else {}


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
    added = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        match entry:
            case {"content": str(text)} if text in known:
                continue
            case {"id": int(id), "content": str(text)} if id >= 0 and text:
                if unknown := [flag for flag in ("lstrip", "rstrip", "single_word") if entry.get(flag)]:
                    raise UserError(f"{path}: added token {text!r} has {unknown[0]}, which is not supported yet")
                special = entry.get("special") is True
                added[text] = AddedToken(id, special, entry.get("normalized", not special) is True)
            case _:
                raise UserError(f"{path}: {str(entry)[:80]} is no added token; it needs an id and a content")
    return added


def _eos_ids(file: Path) -> set[int]:
    """`eos_token_id` of a config.json or generation_config.json: one, several or none."""
    eos = _read(file).get("eos_token_id")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(id) is not int for id in eos):
        raise UserError(f"{file}: eos_token_id is {str(eos)[:40]}, integers are wanted")
    return set(eos)


def _writes_bos(post_processor: object, bos: str | None) -> bool:
    """Whether a tokenizer.json's post-processor begins every text with bos."""
    match post_processor:
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": text}}, *_]}:
            return text == bos
        case {"type": "Sequence", "processors": [*parts]}:
            return any(_writes_bos(part, bos) for part in parts)
    return False


def _template(folder: Path, config: dict) -> tuple[str, str]:
    """(template, the file that it comes from)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text(file), file.name
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default", 0)
    if found is None:
        return ALPACA, "alpaca (fallback)"
    if not isinstance(found, str):
        raise UserError(f"{folder / 'tokenizer_config.json'}: chat_template is no text, and no list with a 'default'")
    return found, "tokenizer_config.json"


# The prompt of Taori et al. 2023 (Stanford Alpaca), for models that bring no template: with bos where there is one, eos
# after each answer, and a system turn, if there is one, in the place of the first sentence.
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
SUPPORTED = "supported are byte-level BPE as of GPT-2, Llama 3, Qwen and SmolLM, and sentencepiece's tokenizer.model"


# ---- byte-level BPE: tokenizer.json to tiktoken ----


@dataclass
class BytePairs:
    """A tiktoken encoding whose ids are those of a tokenizer.json."""

    vocab: dict[str, int]
    encoding: tiktoken.Encoding
    ids: list[int]  # by tiktoken's rank; -1 for a byte that is no token
    bytes_of: dict[int, bytes]  # by id
    nfc: bool
    details: str
    kind = "byte-level BPE"
    prefix = "never"  # as in Pieces

    def normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def encode(self, text: str, first: bool) -> list[int]:
        """Ids of a text without control tokens; `first` where nothing stands before it."""
        return [id for id in self._ids(text) if id >= 0]

    def encode_spans(self, text: str, first: bool) -> tuple[list[int], list[Span]]:
        """The ids, and what each stands for, in bytes of the normalized text."""
        ids = self._ids(text)
        spans = pairwise(accumulate((len(self.bytes_of.get(id, b"?")) for id in ids), initial=0))
        return [id for id in ids if id >= 0], [span for id, span in zip(ids, spans, strict=True) if id >= 0]

    def _ids(self, text: str) -> list[int]:
        if len(text) > MOST_SPACES and re.search(rf"\s{{{MOST_SPACES}}}", text):
            raise UserError(f"a text holds over {MOST_SPACES:,} spaces or line ends in a row; shorten them")
        ids = self.ids
        return [ids[rank] for rank in self.encoding.encode_ordinary(self.normalize(text))]


MOST_SPACES = 900_000  # in a row; at a million tiktoken's regex engine runs out of its stack and ends the program


def byte_pairs(path: Path, spec: dict, added: dict[str, AddedToken]) -> BytePairs:
    """A byte-level BPE tokenizer.json as a tiktoken encoding that gives the same ids.

    A control character whose byte is no token (SmolLM2 lacks six) is dropped, as in `tokenizers`. One limit is known:
    two signs that only such a character parts, "!\\x04!", merge there and not here.
    """

    def refuse(reason: str) -> UserError:
        return UserError(f"{path}: {reason}, which can't be reproduced exactly; {SUPPORTED}")

    model, normalizer, words = (spec.get(key) for key in ("model", "normalizer", "pre_tokenizer"))
    kind, vocab, merges = (model.get(key) if isinstance(model, dict) else None for key in ("type", "vocab", "merges"))
    well_formed = isinstance(merges, list) and isinstance(vocab, dict) and {*map(type, vocab.values())} <= {int}
    if kind != "BPE" or not well_formed:
        raise refuse(f"its model, of type {str(kind)[:40]}, is no BPE with a vocab of integer ids and a list of merges")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise refuse(f"its BPE has {key} = {str(model[key])[:40]}")
    if normalizer not in (None, {"type": "NFC"}):
        raise refuse(f"its normalizer is {json.dumps(normalizer)[:80]}")
    if normalizer and (late := [text for text, token in added.items() if token.normalized]):
        raise refuse(f"its added token {late[0]!r} is looked for after NFC")
    pattern, details = _pattern(words)
    if pattern is None:
        raise refuse(f"its pre-tokenizer is {json.dumps(words)[:200]}")

    bytes_of, pairs = {}, {}
    for text, id in vocab.items():
        if BYTE_OF.keys() >= set(text):
            bytes_of[id] = bytes(BYTE_OF[character] for character in text)
        elif text not in added:
            raise refuse(f"its token {text[:40]!r} is not written in GPT-2's characters for bytes")
    for rank, merge in enumerate(merges):
        try:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            pairs[vocab[left], vocab[right]] = rank, vocab[left + right]
        except (KeyError, TypeError, ValueError):
            raise refuse(f"its merge number {rank}, {str(merge)[:40]!r}, is not two tokens that make a third") from None
    order, whole_words = _merge_order(bytes_of, pairs)
    if model.get("ignore_merges") is True:
        if split := [id for id, parts in whole_words.items() if parts == 2]:
            raise refuse(f"its token {bytes_of[split[0]]!r} is spelled by two tokens that are no merge")
        order += whole_words.keys() - {token.id for token in added.values()}
    missing = {bytes([byte]) for byte in range(256)} - {*bytes_of.values()}
    if needed := missing if model.get("unk_token") is not None else missing - DISPENSABLE:
        raise refuse(f"it has no token for {len(needed)} of the 256 bytes, e.g. {min(needed)}")
    ranked = {token: rank for rank, token in enumerate([*map(bytes_of.get, order), *missing])}
    try:
        encoding = tiktoken.Encoding(str(path), pat_str=pattern, mergeable_ranks=ranked, special_tokens={})
    except ValueError as error:
        raise refuse(f"its pre-tokenizer has a regular expression unknown to tiktoken ({str(error)[:80]})") from None
    return BytePairs(vocab, encoding, order + [-1] * len(missing), bytes_of, normalizer is not None, details)


# GPT-2 writes each byte as one character: as itself where it is printable in Latin-1, the others as U+0100 and on.
_printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_others = sorted({*range(256)} - {*_printable})
BYTE_OF = {chr(b): b for b in _printable} | {chr(0x100 + n): b for n, b in enumerate(_others)}
# Bytes that a vocabulary may lack: those never in UTF-8, those of the empty planes 4 to 11, ASCII's control characters.
DISPENSABLE = {bytes([b]) for b in (*range(9), *range(14, 32), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100))}


Pairs = dict[tuple[int, int], tuple[int, int]]  # the ids of two tokens: rank of their merge, id of what it makes


def _merge_order(bytes_of: dict[int, bytes], pairs: Pairs) -> tuple[list[int], dict[int, int]]:
    """The ids in the order in which tiktoken must rank them to merge as `tokenizers` does, those of single bytes first;
    and of the tokens that merges do not make, the number of tokens that they spell instead.

    The two merge by different rules. `tokenizers` ranks pairs of tokens (by their place in `merges`); tiktoken ranks
    tokens, and any two neighbours that together spell one may merge. Both merge the lowest rank first, the leftmost
    among equals. So they agree if each token t, spelled from its bytes by `merges` alone, comes out whole, and has the
    rank of the last pair merged. For wherever in a text two neighbours spell t, no merge has crossed the ends of t;
    between them has happened what happens to t alone; so these two are that last pair, which both rank alike. A token
    that does not come out whole never comes out of a longer text either, but is one where it is a whole word and the
    file says `ignore_merges`. That is what tiktoken always does, so without `ignore_merges` it must get no rank.
    """
    byte_ids = {token[0]: id for id, token in bytes_of.items() if len(token) == 1}
    ranks, unmade = {}, {}
    for id, token in bytes_of.items():
        if len(token) > 1:
            last = _spell([byte_ids.get(byte, -1) for byte in token], pairs)
            if tuple(last) in pairs:
                ranks[id] = pairs[tuple(last)][0]
            else:
                unmade[id] = len(last)
    return [*byte_ids.values(), *sorted(ranks, key=ranks.get)], unmade


def _spell(parts: list[int], pairs: Pairs) -> list[int]:
    """Merges tokens, lowest rank and leftmost first (Sennrich et al. 2016), until two are left or no two merge."""
    while len(parts) > 2:
        found = [pairs.get(pair, (len(pairs), -1)) for pair in pairwise(parts)]
        rank, merged = best = min(found)
        if rank == len(pairs):
            break
        at = found.index(best)
        parts[at : at + 2] = [merged]
    return parts


GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _pattern(pre_tokenizer: object) -> tuple[str | None, str]:
    """The regular expression that cuts a text into the pre-tokenizer's words, None if there is none, and a remark."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else []
    match steps:
        case [*before, {"type": "ByteLevel", "add_prefix_space": False} as last]:
            gpt2 = last.get("use_regex", True)
        case _:
            return None, ""
    match gpt2, before:
        case True, []:
            return GPT2_WORDS, ""
        case True, [{"type": "Digits", "individual_digits": bool(single)}]:
            # Digits are cut out first and GPT-2's pattern sees what is left: no space joins them, and spaces before one
            # end the text. A digit is Nd, Nl or No, as in Rust's char::is_numeric, of Unicode 16 (tokenizers 0.23 has
            # the 13 that are new in 17, tiktoken 0.14 not yet).
            pattern = GPT2_WORDS.replace(r" ?\p{N}+", r"\p{N}" if single else r"\p{N}+")
            return pattern.replace(r"(?!\S)", r"(?![^\s\p{N}])"), ", digits split" if single else ", numbers split off"
        case False, [{"type": "Split", "pattern": {"Regex": str(split)}, "behavior": "Isolated", "invert": False}]:
            # What the pattern does not match is a word for tokenizers, and nothing for tiktoken.
            if _same_regex(split):
                return rf"{split}|(?:(?!{split})[\s\S])+", ""
    return None, ""


# What Oniguruma (in tokenizers) and Rust's regex (in tiktoken) read alike; . ^ $ \w \b {2}+ && and others they do not.
_one = r"\\[sSrnt]|\\[^\w\s]|\\[pP]\{[A-Z][a-z]?\}"
_class = rf"\[\^?(?:{_one}|(?!&&|--|~~)[^\\\[\]^])*\]"
SAME_REGEX = re.compile(rf"(?:{_one}|{_class}|\(\?(?:i?:|!)|[()|?*+]|\{{\d+(?:,\d*)?\}}(?!\+)|[^\\\[\](){{}}|?*+.^$])*")


def _same_regex(pattern: str) -> bool:
    """Whether both engines take the pattern alike, and never for an empty word, which tiktoken dies of."""
    try:
        return bool(SAME_REGEX.fullmatch(pattern)) and not re.match(re.sub(r"\\[pP]\{\w+\}", "a", pattern), "")
    except re.error:
        return False


# ---- sentencepiece ----


@dataclass
class Pieces:
    """A tokenizer.model, which knows all by itself but where to put a space before the text."""

    vocab: dict[str, int]
    spaced: SentencePieceProcessor  # puts a space before the text
    bare: SentencePieceProcessor  # does not
    prefix: str  # "always", "first" (only where the whole text begins) or "never" is it `spaced`
    spare: bool  # never before a text that begins with a space
    bytes_of: dict[int, bytes]
    control: dict[str, AddedToken]
    names: dict[str, str]  # bos_token and eos_token, where tokenizer_config.json says nothing of them
    kind = "sentencepiece"
    details = ""

    def normalize(self, text: str) -> str:
        return text  # sentencepiece does it inside, and counts in the bytes of what it was given

    def encode(self, text: str, first: bool) -> list[int]:
        return self._processor(text, first).encode(text)

    def encode_spans(self, text: str, first: bool) -> tuple[list[int], list[Span]]:
        found = self._processor(text, first).encode(text.encode(), return_type="offset_mapping")
        return found["ids"], found["offsets"]

    def _processor(self, text: str, first: bool) -> SentencePieceProcessor:
        wanted = self.prefix == "always" or (self.prefix == "first" and first)
        return self.spaced if wanted and not (self.spare and text.startswith((" ", "▁"))) else self.bare


def pieces(file: Path, spec: dict, config: dict) -> Pieces:
    """A sentencepiece model, by tokenizer.model and, for its spaces, by tokenizer.json or tokenizer_config.json.

    Text is cut at control tokens, and each piece may get sentencepiece's space in front, or only the first: a
    tokenizer.json says it in its normalizer or pre-tokenizer; else it is transformers' key `legacy` (each; default no).
    """
    try:
        spaced, bare = (SentencePieceProcessor(model_file=str(file)) for _ in range(2))
    except (OSError, RuntimeError):
        raise UserError(f"{file}: not a sentencepiece model; {SUPPORTED}") from None
    vocab = {bare.id_to_piece(id): id for id in range(len(bare))}
    listed = spec["model"].get("vocab") if spec else {}
    if not isinstance(listed, dict) or any(vocab.get(text, id) != id for text, id in listed.items()):
        raise UserError(f"{file.parent}: tokenizer.json and tokenizer.model have different vocabularies; keep one")
    space, spare = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, False
    match [spec.get("normalizer"), spec.get("pre_tokenizer")]:
        case _ if not spec:
            wanted = bare.normalize("a").startswith("▁")
            prefix = "never" if not wanted else "always" if config.get("legacy") is True else "first"
        case [{"normalizers": [{"type": "Prepend", "prepend": "▁"}, last]}, None] if last == space:
            prefix = "always"
        case [None, {"type": "Metaspace", "prepend_scheme": "always" | "first" | "never" as prefix, "split": False}]:
            spare = True
        case [normalizer, None | {"type": "Split", "pattern": {"String": " "}}] if normalizer == space:
            prefix = "never"
        case other:
            what = f"it treats spaces by {json.dumps(other)[:200]}, which can't be reproduced exactly"
            raise UserError(f"{file.parent / 'tokenizer.json'}: {what}; {SUPPORTED}")
    spaced.override_normalizer_spec(add_dummy_prefix=True)
    bare.override_normalizer_spec(add_dummy_prefix=False)
    bytes_of = {id: piece.replace("▁", " ").encode() for piece, id in vocab.items()}
    bytes_of |= {id: bytes([int(piece[1:-1], 16)]) for piece, id in vocab.items() if bare.is_byte(id)}
    control = {t: AddedToken(id, True, False) for t, id in vocab.items() if bare.is_control(id) or bare.is_unknown(id)}
    ends = {"bos_token": bare.bos_id(), "eos_token": bare.eos_id()}
    names = {name: bare.id_to_piece(id) for name, id in ends.items() if id >= 0 and name not in config}
    return Pieces(vocab, spaced, bare, prefix, spare, bytes_of, control, names)
