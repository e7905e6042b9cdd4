"""Text to token ids and back: sentencepiece and tiktoken behind one small class; chat templates, and which tokens train.

A folder's `tokenizer.json` with byte-level BPE becomes a tiktoken encoding (`byte_pairs`, with the proof that both merge
alike); a `tokenizer.model` is sentencepiece's own file (`pieces`). What would give other ids than the `tokenizers`
library on any text is refused with the reason. A control token is one only where the program or the template writes it:
in text from people `<|im_end|>` is ten characters, unless they ask (`special=True`).

A conversation is one text, written by the folder's Jinja template and tokenised whole, so that no turn is cut off from
its context. Trained are the assistant's answers and what ends each. Where they stand in the text is found by rendering it
a second time with marks around the answers, which must change nothing else.
"""

import codecs
import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import accumulate, islice, pairwise
from pathlib import Path

import jinja2
import tiktoken
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import SentencePieceProcessor

from errors import UserError, read_json, read_text

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
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SUPPORTED = "supported are byte-level BPE as of GPT-2, Llama 3, Qwen and SmolLM, and sentencepiece's tokenizer.model"


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
    """What `load_tokenizer` returns."""

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
        self.vocab_size = max(self._bytes, default=-1) + 1
        self.description = f"{self.model.kind}, {self.vocab_size:,} tokens{self.model.details}"
        groups = [[text for text, token in self.added.items() if token.normalized == late] for late in (False, True)]
        self._patterns = [_any_of(group) for group in groups if group]
        self._all_special = len(self.special_tokens) == len(self.added)
        self._looks_like_control = _any_of(self.special_tokens).search
        self.stop_ids = self.stop_ids | self._turn_end()

    # ---- text ----

    def encode(self, text: str, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """The ids of a text; bos and eos around it on request, where the tokenizer has them.

        special: False takes the text of control tokens for plain text, as the `tokenizers` library does with its
        `encode_special_tokens`; True makes control tokens of it. Added tokens that are not special (`<think>`) are found
        either way. A lone surrogate, which is no character, counts as U+FFFD.
        """
        text = _without_surrogates(text)
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for start, end, id in self._cut(text, special):
            ids += self.model.encode(text[start:end], start == 0) if id is None else [id]
        return ids + [self.eos_id] if eos and self.eos_id is not None else ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD; ids beyond the vocabulary become nothing."""
        return "".join(self.stream(ids, skip_special))

    def stream(self, ids: Iterable[int], skip_special: bool = False) -> Iterator[str]:
        """The same text in pieces, as the ids come; none ends inside a character."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        at_start = self.model.prefix != "never"
        for id in ids:
            new = b"" if skip_special and id in self._special_ids else self._bytes.get(id, b"")
            if new and at_start:  # the space that sentencepiece put before the first word
                new, at_start = new.removeprefix(b" "), False
            if text := utf8.decode(new):
                yield text
        if text := utf8.decode(b"", final=True):
            yield text

    def _cut(self, text: str, special: bool, quoted: list[tuple[int, int]] = ()) -> list[tuple[int, int, int | None]]:
        """The text cut at its added tokens: (start, end, id) of each, and (start, end, None) of what lies between.
        Special ones count only if `special`, and nowhere that touches a `quoted` span."""
        cuts = [(0, len(text), None)] if text else []
        for pattern in [] if self._all_special and not special else self._patterns:
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
        """A conversation as the model sees it: ids, and for each whether it is trained.

        messages: {"role", "content"} each, in an order that the template accepts. add_generation_prompt: end with the
        head of an answer. The ids are those of `render_text`, with control tokens where the template writes them and
        none in the messages, and no bos but the template's. Trained is each token that holds a part of an assistant's
        content, and the end of the turn: the first of `stop_ids`, if there is nothing but space before it. A last answer
        that the template ends with none is trained to the end of the text, and eos is appended. An answer of nothing but
        space is not trained. Raises TemplateError.
        """
        messages = _plain_messages(messages)
        text = self.render_text(messages, tools, add_generation_prompt)
        answers, quoted = self._locate(messages, text, tools, add_generation_prompt)
        text = _without_surrogates(text)
        cuts = self._cut(text, True, quoted)
        last = messages[-1]
        complete = (
            last.get("role") == "assistant" and str(last.get("content", "")).strip() and not add_generation_prompt
        )
        trained, unfinished = self._stretch(answers, text, cuts, bool(complete))
        ids, mask = [], []
        for start, end, id in cuts:
            inside = [(max(a, start) - start, min(b, end) - start) for a, b in trained if a < end and start < b]
            if id is None:
                new, flags = self._masked(text[start:end], start == 0, inside)
            else:
                new, flags = [id], [bool(inside)]
            ids += new
            mask += flags
        return (ids + [self.eos_id], mask + [True]) if unfinished else (ids, mask)

    def render_text(
        self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The template's text, equal to transformers' apply_chat_template(tokenize=False). Raises TemplateError."""
        settings = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._compiled.render(messages=_plain_messages(messages), **settings | self.names)
        except TemplateError:
            raise
        except Exception as error:  # noqa: BLE001  a template is somebody's program: it may fail in any way
            raise self._error(str(error) or type(error).__name__) from None

    def save_template(self, folder: Path) -> None:
        """Puts the fallback into a folder that has no template, so that the model is served as it was trained."""
        if self.template == ALPACA:
            (Path(folder) / "chat_template.jinja").write_text(self.template, encoding="utf-8")

    @cached_property
    def _compiled(self) -> jinja2.Template:
        """The template, in the environment that transformers promises to templates: a sandbox and three helpers."""
        blocks = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
        environment = ImmutableSandboxedEnvironment(**blocks)

        def raise_exception(message: str):
            raise self._error(message)

        def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
            return json.dumps(
                value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
            )

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
            text = self.render_text([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}])
        except TemplateError:  # broken, or in want of other turns: said where it is used
            return set()
        end = text.rfind(answer) + 1
        after = [cut for cut in self._cut(text, True) if end and cut[0] >= end and cut[2] in self._special_ids]
        return {id for start, _, id in after[:1] if id != self.bos_id and not text[end:start].strip()}

    def _locate(self, messages: list[dict], text: str, tools, add_generation_prompt: bool):
        """Where the rendered text holds the answers, and where contents whose control tokens are plain text (the answers
        among them): two lists of [start, end) in characters.

        The marks are characters that occur nowhere else, and stand at the ends of the content; for templates that strip
        contents, which such marks prevent, at the ends of the stripped content.
        """
        taken = set(text).union(*(str(message.get("content")) for message in messages))
        marks = "".join(islice((c for c in map(chr, range(0xE000, 0x110000)) if c not in taken), 4))
        for strip in (False, True):
            marked, wanted = [], []
            for message in messages:
                content, answer = message.get("content"), message.get("role") == "assistant"
                if isinstance(content, str) and content.strip() and (answer or self._looks_like_control(content)):
                    inner = content.strip() if strip else content
                    first, last = marks[:2] if answer else marks[2:]
                    message = message | {"content": content.replace(inner, first + inner + last, 1)}
                    wanted += [inner] if answer else []
                marked.append(message)
            found = _unmark(self.render_text(marked, tools, add_generation_prompt), marks)
            if found and found[0] == text and [text[a:b] for a, b in found[1]] == wanted:
                return found[1], found[1] + found[2]
        raise self._error("it rewrites the content of a turn, so that an answer can't be found in it")

    def _stretch(self, answers: list[tuple[int, int]], text: str, cuts: list, complete: bool):
        """The answers' spans stretched over the tokens that end them; and whether the last one wants an eos appended."""
        stops = [(start, end) for start, end, id in cuts if id in self.stop_ids]
        trained = []
        for number, (start, end) in enumerate(answers, 1):
            last = complete and number == len(answers)
            stop = next((stop for stop in stops if stop[0] >= end), None)
            if stop and (last or not text[end : stop[0]].strip()):
                end = stop[1]
            elif last and self.eos_id is None:
                raise self._error("it ends an answer with no control token, and the tokenizer has no eos_token")
            elif last:
                return [*trained, (start, len(text))], True
            trained.append((start, end))
        return trained, False

    def _masked(self, text: str, first: bool, trained: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Ids of a text without control tokens, and for each whether it holds a part of the spans (in characters)."""
        ids, spans = self.model.encode_spans(text, first)
        wanted = bytearray(len(self.model.normalize(text).encode()) + 1)
        for span in trained:
            a, b = (len(self.model.normalize(text[:end]).encode()) for end in span)
            wanted[a:b] = b"\1" * (b - a)
        return ids, [any(wanted[a : max(b, a + 1)]) for a, b in spans]  # a piece of width 0 belongs to what follows it


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json or tokenizer.model, with tokenizer_config.json,
    special_tokens_map.json, chat_template.jinja, config.json and generation_config.json where they exist.

    Raises UserError with file and reason where there is none, or none whose ids would be exactly those of the
    `tokenizers` library (of sentencepiece, where tokenizer.model is all there is).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a Hugging Face model folder is wanted")
    stems = ("tokenizer", "tokenizer_config", "special_tokens_map", "config", "generation_config")
    files = {stem: folder / f"{stem}.json" for stem in stems}
    spec, config, fallback, *others = (read_json(file) if file.is_file() else {} for file in files.values())
    names = _names(files["tokenizer_config"], fallback | config)
    added = _added_tokens(files["tokenizer"], spec.get("added_tokens") or [])
    more = _added_tokens(files["tokenizer_config"], config.get("added_tokens_decoder") or {}, added)
    added = more | added
    model_file, model = folder / "tokenizer.model", spec.get("model")
    if model_file.is_file() and (not spec or (isinstance(model, dict) and model.get("byte_fallback") is True)):
        model, vocab = pieces(model_file, spec, config)
        added = model.control | added
        names = model.names | names
    elif spec:
        model, vocab = byte_pairs(files["tokenizer"], spec, added)
    else:
        raise UserError(f"{folder}: no tokenizer (neither tokenizer.json nor tokenizer.model); copy the model's here")
    for name, text in names.items():
        if text in added or text in vocab:
            added[text] = replace(added.get(text) or AddedToken(vocab[text], True, False), special=True)
        elif name in ("bos_token", "eos_token"):
            raise UserError(f"{files['tokenizer_config']}: {name} {text!r} is not in the vocabulary; name one that is")
    ids = {name: added[text].id for name, text in names.items() if text in added}
    stop_ids = {ids["eos_token"]} if "eos_token" in ids else set()
    for name, other in zip(stems[3:], others, strict=True):
        eos = other.get("eos_token_id")
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if any(type(id) is not int for id in eos):
            raise UserError(f"{files[name]}: eos_token_id is {str(eos)[:40]}, integers are wanted")
        stop_ids |= set(eos)
    adds_bos = config.get("add_bos_token", not spec or _writes_bos(spec.get("post_processor"), names.get("bos_token")))
    special_ids = [ids.get(name) for name in ("bos_token", "eos_token", "pad_token")]
    return Tokenizer(model, added, names, *special_ids, adds_bos is True, stop_ids, *_template(folder, config))


# ---- byte-level BPE: tokenizer.json to tiktoken ----

# GPT-2 writes each byte as one character: as itself where it is printable in Latin-1, the others as U+0100 and on.
_printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {b: b for b in _printable} | {0x100 + n: b for n, b in enumerate(sorted({*range(256)} - {*_printable}))}
# Bytes that a vocabulary may lack: those never in UTF-8, those of the empty planes 4 to 11, and ASCII's control characters.
DISPENSABLE = {bytes([b]) for b in (*range(9), *range(14, 32), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100))}
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What Oniguruma (in tokenizers) and Rust's regex (in tiktoken) read alike; . ^ $ \w \b {2}+ && and others they do not.
_one = r"\\[sSrnt]|\\[^\w\s]|\\[pP]\{[A-Z][a-z]?\}"
_class = rf"\[\^?(?:{_one}|(?!&&|--|~~)[^\\\[\]^])*\]"
SAME_REGEX = re.compile(rf"(?:{_one}|{_class}|\(\?(?:i?:|!)|[()|?*+]|\{{\d+(?:,\d*)?\}}(?!\+)|[^\\\[\](){{}}|?*+.^$])*")
UNUSUAL = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
MOST_SPACES = 900_000  # in a row; at a million tiktoken's regex engine runs out of its stack and ends the program


@dataclass
class BytePairs:
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
        ids = self._ids(text)
        return [id for id in ids if id >= 0] if self.ids[-1] < 0 else ids

    def encode_spans(self, text: str, first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and what each stands for: [start, end) in the bytes of the normalized text."""
        ids = self._ids(text)
        spans = pairwise(accumulate((len(self.bytes_of.get(id, b"?")) for id in ids), initial=0))
        return [id for id in ids if id >= 0], [span for id, span in zip(ids, spans, strict=True) if id >= 0]

    def _ids(self, text: str) -> list[int]:
        if len(text) > MOST_SPACES and re.search(rf"\s{{{MOST_SPACES}}}", text):
            raise UserError(f"a text holds over {MOST_SPACES:,} spaces or line ends in a row; shorten them")
        ids = self.ids
        return [ids[rank] for rank in self.encoding.encode_ordinary(self.normalize(text))]


def byte_pairs(path: Path, spec: dict, added: dict[str, AddedToken]) -> tuple[BytePairs, dict[str, int]]:
    """A byte-level BPE tokenizer.json as a tiktoken encoding that gives the same ids, and its vocabulary.

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
    if unusual := [key for key in UNUSUAL if model.get(key)]:
        raise refuse(f"its BPE has {unusual[0]} = {str(model[unusual[0]])[:40]}")
    if normalizer not in (None, {"type": "NFC"}):
        raise refuse(f"its normalizer is {json.dumps(normalizer)[:80]}")
    if normalizer and (late := [text for text, token in added.items() if token.normalized]):
        raise refuse(f"its added token {late[0]!r} is looked for after NFC")
    pattern, details = _pattern(words)
    if pattern is None:
        raise refuse(f"its pre-tokenizer is {json.dumps(words)[:200]}")
    bytes_of = {}
    for text, id in vocab.items():
        try:
            bytes_of[id] = codecs.charmap_encode(text, "strict", BYTE_OF)[0]
        except UnicodeEncodeError:
            if text not in added:
                raise refuse(f"its token {text[:40]!r} is not written in GPT-2's characters for bytes") from None
    pairs = {}
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
    if missing - DISPENSABLE or (missing and model.get("unk_token") is not None):
        raise refuse(
            f"it has no token for {len(missing)} of the 256 bytes, e.g. {min(missing - DISPENSABLE or missing)}"
        )
    ranked = {token: rank for rank, token in enumerate([*map(bytes_of.get, order), *missing])}
    try:
        encoding = tiktoken.Encoding(str(path), pat_str=pattern, mergeable_ranks=ranked, special_tokens={})
    except ValueError as error:
        raise refuse(f"its pre-tokenizer has a regular expression unknown to tiktoken ({str(error)[:80]})") from None
    return BytePairs(encoding, order + [-1] * len(missing), bytes_of, normalizer is not None, details), vocab


def _merge_order(bytes_of: dict[int, bytes], pairs: dict[tuple[int, int], tuple[int, int]]):
    """The ids in the order in which tiktoken must rank them to merge as `tokenizers` does, those of single bytes first;
    and of the tokens that merges do not make, the number of tokens that they spell instead.

    The two merge by different rules. `tokenizers` ranks pairs of tokens (by their place in `merges`); tiktoken ranks
    tokens, and any two neighbours that together spell one may merge. Both merge the lowest rank first, the leftmost among
    equals. So they agree if each token t, spelled from its bytes by `merges` alone, comes out whole, and has the rank of
    the last pair merged. For wherever in a text two neighbours spell t, no merge has crossed the ends of t; between them
    has happened what happens to t alone; so these two are that last pair, which both rank alike. A token that does
    not come out whole never comes out of a longer text either, but is one where it is a whole word and the file says
    `ignore_merges`. That is what tiktoken always does, so without `ignore_merges` it must get no rank.
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


def _spell(parts: list[int], pairs: dict[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Merges tokens, lowest rank and leftmost first (Sennrich et al. 2016), until two are left or no two merge."""
    none = (len(pairs), -1)
    while len(parts) > 2:
        found = [pairs.get(pair, none) for pair in pairwise(parts)]
        best = min(found)
        if best is none:
            break
        at = found.index(best)
        parts[at : at + 2] = [best[1]]
    return parts


def _pattern(pre_tokenizer) -> tuple[str | None, str]:
    """The regular expression that cuts a text into the pre-tokenizer's words, None if there is none, and a remark."""
    steps = [pre_tokenizer]
    if isinstance(pre_tokenizer, dict) and isinstance(pre_tokenizer.get("pretokenizers"), list):
        steps = pre_tokenizer["pretokenizers"]
    match steps:
        case [*before, {"type": "ByteLevel", "add_prefix_space": False} as last]:
            gpt2 = last.get("use_regex", True)
        case _:
            return None, ""
    match before:
        case [] if gpt2:
            return GPT2_WORDS, ""
        case [{"type": "Digits", "individual_digits": bool(single)}] if gpt2:
            # Digits are cut out first and GPT-2's pattern sees what is left: no space joins them, and spaces before one
            # end the text. A digit is Nd, Nl or No, as in Rust's char::is_numeric, of Unicode 16 (tokenizers 0.23 has
            # the 13 that are new in 17, tiktoken 0.14 not yet).
            pattern = GPT2_WORDS.replace(r" ?\p{N}+", r"\p{N}" if single else r"\p{N}+")
            return pattern.replace(r"(?!\S)", r"(?![^\s\p{N}])"), ", digits split" if single else ", numbers split off"
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}] if (
            not gpt2
        ):
            # What the pattern does not match is a word for tokenizers, and nothing for tiktoken.
            return rf"{pattern}|(?:(?!{pattern})[\s\S])+" if _same_regex(pattern) else None, ""
    return None, ""


def _same_regex(pattern: str) -> bool:
    """Whether both engines take the pattern alike, and never for an empty word, which tiktoken dies of."""
    try:
        return bool(SAME_REGEX.fullmatch(pattern)) and not re.match(re.sub(r"\\[pP]\{\w+\}", "a", pattern), "")
    except re.error:
        return False


# ---- sentencepiece ----


@dataclass
class Pieces:
    spaced: SentencePieceProcessor  # puts a space before the text
    bare: SentencePieceProcessor  # does not
    prefix: str  # "always", "first" (only where the whole text begins) or "never" is it `spaced`
    spare: bool  # never before a text that begins with a space
    bytes_of: dict[int, bytes]
    control: dict[str, AddedToken]
    names: dict[str, str]
    kind = "sentencepiece"
    details = ""

    def normalize(self, text: str) -> str:
        return text  # sentencepiece does it inside, and counts in the bytes of what it was given

    def encode(self, text: str, first: bool) -> list[int]:
        return self._processor(text, first).encode(text)

    def encode_spans(self, text: str, first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._processor(text, first).encode(text.encode(), return_type="offset_mapping")
        return found["ids"], found["offsets"]

    def _processor(self, text: str, first: bool) -> SentencePieceProcessor:
        wanted = self.prefix == "always" or (self.prefix == "first" and first)
        return self.spaced if wanted and not (self.spare and text.startswith((" ", "▁"))) else self.bare


def pieces(file: Path, spec: dict, config: dict) -> tuple[Pieces, dict[str, int]]:
    """A sentencepiece model and its vocabulary.

    Text is cut at control tokens, and each piece may get sentencepiece's space in front, or only the first: a
    tokenizer.json says it in its normalizer or pre-tokenizer; else it is transformers' key `legacy` (each; default no).
    """
    try:
        spaced, bare = (SentencePieceProcessor(model_file=str(file)) for _ in range(2))
    except (OSError, RuntimeError):
        raise UserError(f"{file}: not a sentencepiece model; {SUPPORTED}") from None
    vocab = {bare.id_to_piece(id): id for id in range(len(bare))}
    prefix, spare = "always" if config.get("legacy") is True else "first", False
    if not bare.normalize("a").startswith("▁"):
        prefix = "never"
    if spec:
        listed = spec["model"].get("vocab")
        if not isinstance(listed, dict) or any(vocab.get(text, id) != id for text, id in listed.items()):
            raise UserError(f"{file.parent}: tokenizer.json and tokenizer.model have different vocabularies; keep one")
        space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        match [spec.get("normalizer"), spec.get("pre_tokenizer")]:
            case [{"normalizers": [{"type": "Prepend", "prepend": "▁"}, last]}, None] if last == space:
                prefix = "always"
            case [
                None,
                {"type": "Metaspace", "prepend_scheme": "always" | "first" | "never" as prefix, "split": False},
            ]:
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
    return Pieces(spaced, bare, prefix, spare, bytes_of, control, names), vocab


# ---- the rest of the folder ----


def _names(path: Path, config: dict) -> dict[str, str]:
    """bos_token, eos_token and so on, each written as a string or as an object with `content`; empty is none."""
    names = {name: config[name] for name in NAMED if config.get(name)}
    names = {name: value.get("content") if isinstance(value, dict) else value for name, value in names.items()}
    for name, value in names.items():
        if not isinstance(value, str):
            raise UserError(f"{path}: {name} is neither a string nor an object with content")
    return names


def _added_tokens(path: Path, entries: list | dict, known: Collection[str] = ()) -> dict[str, AddedToken]:
    """The tokens of tokenizer.json's `added_tokens` or tokenizer_config.json's `added_tokens_decoder` (objects by id)."""
    if isinstance(entries, dict) and all(isinstance(entry, dict) and id.isdecimal() for id, entry in entries.items()):
        entries = [entry | {"id": int(id)} for id, entry in entries.items()]
    added = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        match entry:
            case {"content": str(text)} if text in known:
                continue
            case {"id": int(id), "content": str(text)} if id >= 0 and text:
                for flag in ("lstrip", "rstrip", "single_word"):
                    if entry.get(flag):
                        raise UserError(f"{path}: added token {text!r} has {flag}, which is not supported yet")
                special = entry.get("special") is True
                added[text] = AddedToken(id, special, entry.get("normalized", not special) is True)
            case _:
                raise UserError(f"{path}: {str(entry)[:80]} is no added token; it needs an id and a content")
    return added


def _writes_bos(post_processor, bos: str | None) -> bool:
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
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}.get(
            "default", 0
        )
    if not isinstance(found, str | None):
        raise UserError(f"{folder / 'tokenizer_config.json'}: chat_template is no text, and no list with a 'default'")
    return (ALPACA, "alpaca (fallback)") if found is None else (found, "tokenizer_config.json")


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


def _any_of(texts: Iterable[str]) -> re.Pattern:
    """Finds any of the texts; where several begin at one place, the longest."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _unmark(text: str, marks: str) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]] | None:
    """The text without its marks; the spans between marks 0 and 1, and between 2 and 3. None if they are not in pairs."""
    parts = re.split(f"([{marks}])", text)  # text, mark, text, mark, ..., text
    ends = list(accumulate(map(len, parts[::2])))
    spans = {marks[:2]: [], marks[2:]: []}
    for number in range(0, len(ends) - 1, 2):
        pair = "".join(parts[2 * number + 1 : 2 * number + 4 : 2])
        if pair not in spans:
            return None
        spans[pair].append((ends[number], ends[number + 1]))
    return "".join(parts[::2]), *spans.values()


def _without_surrogates(text: str) -> str:
    """Halves of UTF-16 pairs are no characters, and no tokenizer encodes them: each becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
    return text
