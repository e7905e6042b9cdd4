"""Subword models: they cut text into tokens, with exactly the ids of the `tokenizers` library (or
of sentencepiece).

There are three kinds of file and two engines. Byte-level BPE in a tokenizer.json, and Llama 3's own
tokenizer.model, become a tiktoken encoding (`byte_pairs`, `tiktoken_file`). sentencepiece reads its
own tokenizer.model, and a tokenizer.json that holds the merges of such a model becomes one again
(`pieces`). Both engines merge by other rules than a tokenizer.json; `_merge_order` has the proof
that the outcome is the same. What the proof does not cover is refused with the reason: other ids
would train another model, and nothing would look wrong.
"""

import base64
import json
import math
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import tiktoken
from sentencepiece import SentencePieceProcessor

from common.errors import UserError
from common.files import refuse_pointer

SUPPORTED = (
    "supported are byte-level BPE as of GPT-2, Llama 3, Qwen, Mistral Nemo and SmolLM,"
    " and sentencepiece's BPE"
)

# Limits of a vocabulary, which comes from anybody. The time to spell a token grows with the square
# of its length, and the sum of those squares is about 10**7 in the largest published vocabulary.
LONGEST_TOKEN = 2_000  # characters
SPELLING = 10**8  # of the sum of squares
MODEL_BYTES = 16 << 20  # limit of a tokenizer.model; Gemma's, the largest published one, has 4.7 MB
# Limits of a text. At a million spaces in a row, tiktoken's regex engine runs out of its stack and
# ends the program; to cut a word of as many letters as here takes 0.4 GB.
MOST_SPACES = 900_000
MOST_LETTERS = 8_000_000
RUNS = (
    (r"\s+", MOST_SPACES, "spaces or line ends"),
    (r"\S+", MOST_LETTERS, "characters without a space"),
)


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in the text before the text is cut into subwords.

    normalized: it is looked for only in what the other added tokens leave, and after that is
    normalized.
    """

    id: int
    special: bool  # a control token
    normalized: bool
    lstrip: bool = False  # takes the space before it along
    rstrip: bool = False  # takes the space behind it along
    single_word: bool = False  # does not count inside a word


# ---- byte-level BPE: tokenizer.json to tiktoken ----


@dataclass
class BytePairs:
    """A tiktoken encoding whose ids are those of a tokenizer.json."""

    vocab: dict[str, int]
    encoding: tiktoken.Encoding
    ids: list[int]  # by tiktoken's rank; -1 for a byte that is no token
    bytes_of: dict[int, bytes]  # by id
    nfc: bool  # the text is normalized to Unicode's NFC
    details: str  # a remark for the user, or ""
    kind = "byte-level BPE"
    prefix = "never"  # as in Pieces

    def __post_init__(self):
        # The number of bytes of each id, and 1 at -1, for a byte that is no token. A list is faster
        # than a dictionary, and is used where the ids have few gaps.
        lengths = {id: len(token) for id, token in self.bytes_of.items()}
        self.lengths: list[int] | dict[int, int] = defaultdict(lambda: 1, lengths)
        size = max(self.bytes_of, default=0) + 1
        if size < 4 * len(self.bytes_of):
            self.lengths = [lengths.get(id, 1) for id in range(size)]
            self.lengths.append(1)  # at -1

    def normalize(self, text: str) -> str:
        """Returns the text as `encode` takes it."""
        if not self.nfc:
            return text
        return unicodedata.normalize("NFC", text)

    def encode(self, text: str, first: bool) -> list[int]:
        """Returns the ids of a normalized text without added tokens. first: nothing stands before
        the text."""
        ids = self._ids(text)
        if -1 in ids:
            ids = [id for id in ids if id >= 0]
        return ids

    def encode_spans(
        self, text: str, first: bool, continues: bool = False
    ) -> tuple[list[int], list[int], list[int]]:
        """Returns the ids, and where each begins and ends, in bytes of the text. continues: as in
        Pieces."""
        ids = self._ids(text)
        lengths = map(self.lengths.__getitem__, ids)
        ends = list(accumulate(lengths))
        starts = [0, *ends[:-1]]
        if -1 in ids:
            # A byte that is no token counts for the places of the others, and is dropped.
            places = [i for i, id in enumerate(ids) if id >= 0]
            ids = [ids[i] for i in places]
            starts = [starts[i] for i in places]
            ends = [ends[i] for i in places]
        return ids, starts, ends

    def _ids(self, text: str) -> list[int]:
        """Returns the ids, with -1 for a byte that is no token. Raises UserError for a text that
        tiktoken can't cut."""
        if len(text) > MOST_SPACES:
            for pattern, most, name in RUNS:
                longest = max(map(len, re.findall(pattern, text)), default=0)
                if longest > most:
                    raise UserError(f"a text holds over {most:,} {name} in a row; shorten them")
        id_of_rank = self.ids.__getitem__
        try:
            ranks = self.encoding.encode_ordinary(text)
            return list(map(id_of_rank, ranks))
        except BaseException as error:
            # Rust's regex engine gives up by a panic, which is no Exception for Python.
            if type(error).__name__ != "PanicException":
                raise
            problem = "the tokenizer's regular expression for words takes too long on a text"
            raise UserError(problem) from None


def byte_pairs(path: Path, spec: dict, added: dict[str, AddedToken]) -> BytePairs:
    """Makes a tiktoken encoding of a byte-level BPE tokenizer.json, with the same ids.

    path: the file, for messages.
    spec: what it holds.
    added: the added tokens by their texts.

    A control character whose byte is no token (SmolLM2 lacks six) is dropped, as in `tokenizers`.
    One difference is known: two signs with only such a character between them, "!\\x04!", merge
    there and not here.
    Raises UserError where the ids would not be the same.
    """
    normalizer = spec.get("normalizer")
    words = spec.get("pre_tokenizer")
    model, vocab, pairs = _read_bpe(path, spec)
    if model.get("byte_fallback"):
        reason = "its BPE has byte_fallback = True, but no tokenizer.model stands beside it"
        raise refuse(path, reason)
    if normalizer not in (None, {"type": "NFC"}):
        raise refuse(path, f"its normalizer is {json.dumps(normalizer)[:80]}")
    # Here, control tokens are looked for in the text before it is normalized.
    late = [text for text, token in added.items() if token.normalized and token.special]
    if normalizer and late:
        raise refuse(path, f"its control token {late[0]!r} is looked for after NFC")
    pattern, details = _pattern(words)
    if pattern is None:
        raise refuse(path, f"its pre-tokenizer is {json.dumps(words)[:200]}")

    bytes_of = {}
    for text, id in vocab.items():
        if BYTE_OF.keys() >= set(text):
            bytes_of[id] = bytes(BYTE_OF[character] for character in text)
        elif text not in added:
            reason = f"its token {text[:40]!r} is not written in GPT-2's characters for bytes"
            raise refuse(path, reason)

    # Which tokens tiktoken may make, lowest rank first.
    ranks, unmerged = _merge_order(bytes_of, pairs)
    order = sorted(ranks, key=ranks.get)
    if model.get("ignore_merges") is True:
        # tiktoken would merge two tokens that together spell a third, also where that is no merge.
        mergeable = [id for id, parts in unmerged.items() if parts == 2]
        if mergeable:
            token = bytes_of[mergeable[0]]
            reason = f"its token {token!r} is spelled by two tokens that are no merge"
            raise refuse(path, reason)
        order += unmerged.keys() - {token.id for token in added.values()}

    # tiktoken needs a token for each byte; one that the vocabulary lacks gets the id -1.
    all_bytes = {bytes([byte]) for byte in range(256)}
    missing = all_bytes - {*bytes_of.values()}
    needed = missing
    if model.get("unk_token") is None:
        needed = missing - DISPENSABLE
    if needed:
        first = min(needed)
        raise refuse(path, f"it has no token for {len(needed)} of the 256 bytes, e.g. {first}")
    tokens = [bytes_of[id] for id in order] + [*missing]
    ranked = {token: rank for rank, token in enumerate(tokens)}
    try:
        encoding = tiktoken.Encoding(
            str(path), pat_str=pattern, mergeable_ranks=ranked, special_tokens={}
        )
    except ValueError as error:
        cause = "its pre-tokenizer has a regular expression unknown to tiktoken"
        raise refuse(path, f"{cause} ({str(error)[:80]})") from None
    ids = order + [-1] * len(missing)
    return BytePairs(vocab, encoding, ids, bytes_of, normalizer is not None, details)


# GPT-2 writes each byte as one character: as itself where it is printable in Latin-1, the others
# from U+0100 on.
_printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_others = sorted({*range(256)} - {*_printable})
BYTE_OF = {chr(b): b for b in _printable} | {chr(0x100 + n): b for n, b in enumerate(_others)}
# Bytes that a vocabulary may lack: those that UTF-8 never uses, those of the empty Unicode planes 4
# to 11, and ASCII's control characters.
_dispensable = [*range(9), *range(14, 32), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)]
DISPENSABLE = {bytes([byte]) for byte in _dispensable}


def refuse(path: Path, reason: str) -> UserError:
    """Returns the error that names a tokenizer file and why it is refused."""
    return UserError(f"{path}: {reason}, which can't be reproduced exactly; {SUPPORTED}")


# {the ids of two tokens: the rank of their merge, the id of the result}
Pairs = dict[tuple[int, int], tuple[int, int]]


def _read_bpe(path: Path, spec: dict) -> tuple[dict, dict[str, int], Pairs]:
    """Returns the `model` of a tokenizer.json, its vocabulary and its merges. Raises UserError
    where it is no BPE model that can be reproduced, or too large."""
    model = spec.get("model")
    if not isinstance(model, dict):
        model = {}
    kind = model.get("type")
    vocab = model.get("vocab")
    merges = model.get("merges")
    has_ids = False
    if isinstance(vocab, dict):
        # Not isinstance: true and false are integers for Python.
        has_ids = all(type(id) is int and id >= 0 for id in vocab.values())
    if kind != "BPE" or not has_ids or not isinstance(merges, list):
        actual = f"its model, of type {str(kind)[:40]}"
        wanted = "BPE with a vocab of integer ids and a list of merges"
        raise refuse(path, f"{actual}, is no {wanted}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise refuse(path, f"its BPE has {key} = {str(model[key])[:40]}")
    longest = max(map(len, vocab), default=0)
    if longest > LONGEST_TOKEN:
        counts = f"{longest:,} characters, more than {LONGEST_TOKEN:,}"
        raise refuse(path, f"one of its tokens has {counts}")
    if sum(len(token) ** 2 for token in vocab) > SPELLING:
        raise refuse(path, "its tokens are too long to be spelled in reasonable time")
    pairs = {}
    for rank, merge in enumerate(merges):
        try:
            # Older files write the two with a space between them, newer ones as a list.
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            pairs[vocab[left], vocab[right]] = rank, vocab[left + right]
        except (KeyError, TypeError, ValueError):
            actual = f"its merge number {rank}, {str(merge)[:40]!r}"
            raise refuse(path, f"{actual}, is not two tokens that make a third") from None
    return model, vocab, pairs


def _merge_order(
    tokens: dict[int, bytes] | dict[int, str], pairs: Pairs
) -> tuple[dict[int, int], dict[int, int]]:
    """Finds an order of tokens by which tiktoken and sentencepiece merge as `tokenizers` does.

    tokens: the spelling of each id, in bytes or characters. pairs: the merges.
    Returns (ranks, unmerged). ranks: of each token that merges make, its rank; -1 for single bytes
    or characters, which come first. unmerged: of each token that merges do not make, the number of
    tokens that they spell instead.

    They merge by different rules. `tokenizers` ranks pairs of tokens (by their place in `merges`);
    tiktoken ranks tokens, sentencepiece scores them, and any two neighbours that together spell one
    may merge. All merge the lowest rank first, the leftmost among equals. So they agree if each
    token t, spelled from its bytes by `merges` alone, comes out whole, and has the rank of the last
    pair merged. For wherever in a text two neighbours spell t, no merge has crossed the ends of t;
    between them has happened what happens to t alone; so these two are that last pair, which all
    rank alike. A token that does not come out whole never comes out of a longer text either, but is
    one where it is a whole word and the file says `ignore_merges`. That is what tiktoken always
    does, so without `ignore_merges` it must get no rank.
    """
    singles = {token[0]: id for id, token in tokens.items() if len(token) == 1}
    ranks = dict.fromkeys(singles.values(), -1)
    unmerged = {}
    for id, token in tokens.items():
        if len(token) <= 1:
            continue
        symbols = [singles.get(symbol, -1) for symbol in token]
        parts = _spell(symbols, pairs)
        last_pair = tuple(parts)
        if last_pair in pairs:
            rank, _ = pairs[last_pair]
            ranks[id] = rank
        else:
            unmerged[id] = len(parts)
    return ranks, unmerged


def _spell(parts: list[int], pairs: Pairs) -> list[int]:
    """Merges tokens, lowest rank and leftmost first (Sennrich et al. 2016), until two are left or
    no two merge."""
    no_merge = math.inf, -1
    while len(parts) > 2:
        candidates = [pairs.get(pair, no_merge) for pair in pairwise(parts)]
        best = min(candidates)
        rank, merged = best
        if rank == math.inf:
            break
        at = candidates.index(best)
        parts[at : at + 2] = [merged]
    return parts


GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _pattern(pre_tokenizer: object) -> tuple[str | None, str]:
    """Returns the regular expression that cuts a text into the same words as a tokenizer.json's
    pre-tokenizer (None if there is none), and a remark for the user."""
    steps = []
    if isinstance(pre_tokenizer, dict):
        steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    match steps:
        case [*before, {"type": "ByteLevel", "add_prefix_space": False} as last]:
            uses_gpt2_words = last.get("use_regex", True)
        case _:
            return None, ""
    match uses_gpt2_words, before:
        case True, []:
            return GPT2_WORDS, ""
        case True, [{"type": "Digits", "individual_digits": bool(single)}]:
            # Digits are cut out first and GPT-2's pattern sees what is left: no space joins them,
            # and spaces before one end the text. A digit is Nd, Nl or No, as in Rust's
            # char::is_numeric, of Unicode 16 (tokenizers 0.23 has the 13 that are new in 17,
            # tiktoken 0.14 not yet).
            numbers = r"\p{N}" if single else r"\p{N}+"
            details = ", digits split" if single else ", numbers split off"
            pattern = GPT2_WORDS.replace(r" ?\p{N}+", numbers)
            pattern = pattern.replace(r"(?!\S)", r"(?![^\s\p{N}])")
            return pattern, details
        case False, [
            {
                "type": "Split",
                "pattern": {"Regex": str(split)},
                "behavior": "Isolated",
                "invert": False,
            }
        ]:
            # What the pattern does not match is a word for tokenizers, and nothing for tiktoken.
            if _same_regex(split):
                return rf"{split}|(?:(?!{split})[\s\S])+", ""
    return None, ""


# The syntax that Oniguruma (in tokenizers) and Rust's regex (in tiktoken) read alike. They differ
# on . ^ $ \w \b {2}+ && and others.
_one = r"\\[sSrnt]|\\[^\w\s]|\\[pP]\{[A-Z][a-z]?\}"
_class = rf"\[\^?(?:{_one}|(?!&&|--|~~)[^\\\[\]^])*\]"
SAME_REGEX = re.compile(
    rf"(?:{_one}|{_class}|\(\?(?:i?:|!)|[()|?*+]|\{{\d+(?:,\d*)?\}}(?!\+)|[^\\\[\](){{}}|?*+.^$])*"
)


def _same_regex(pattern: str) -> bool:
    """True if both engines read the pattern alike, and it never matches an empty word, which would
    kill tiktoken."""
    try:
        # Python's re does not know \p{...}; a letter in its place matches as little of an empty
        # text.
        python_pattern = re.sub(r"\\[pP]\{\w+\}", "a", pattern)
        if not SAME_REGEX.fullmatch(pattern):
            return False
        return not re.match(python_pattern, "")
    except (re.error, RecursionError, OverflowError):
        return False


# ---- sentencepiece ----


@dataclass
class Pieces:
    """A sentencepiece model. It cuts text by itself; what it can't know is where to put a space
    before the text.

    prefix: when `spaced` is used: "always", "first" (only where the whole text begins) or "never".
    """

    vocab: dict[str, int]
    spaced: SentencePieceProcessor  # puts a space before the text
    bare: SentencePieceProcessor  # does not
    prefix: str
    only_if_missing: bool  # not before a text that begins with a space
    bytes_of: dict[int, bytes]  # by id
    control: dict[str, AddedToken]  # the model's own control tokens
    names: dict[str, str]  # bos_token and eos_token, where tokenizer_config.json does not name them
    details: str  # a remark for the user, or ""
    kind = "sentencepiece"
    nfc = False

    def normalize(self, text: str) -> str:
        """Returns the text: sentencepiece normalizes inside, and counts in the bytes of what it was
        given."""
        return text

    def encode(self, text: str, first: bool) -> list[int]:
        """Returns the ids of a text without added tokens. first: nothing stands before the text."""
        return self._processor(text, first).encode(text)

    def encode_spans(
        self, text: str, first: bool, continues: bool = False
    ) -> tuple[list[int], list[int], list[int]]:
        """Returns the ids, and where each begins and ends, in bytes of the text. A piece of width 0
        counts as one byte, because it belongs to what follows it.

        continues: plain text stands directly before the text, so that no space is put between.
        """
        processor = self.bare if continues else self._processor(text, first)
        result = processor.encode(text.encode(), return_type="offset_mapping")
        starts = [start for start, _ in result["offsets"]]
        ends = [max(end, start + 1) for start, end in result["offsets"]]
        return result["ids"], starts, ends

    def _processor(self, text: str, first: bool) -> SentencePieceProcessor:
        """Returns the processor that puts a space before this text, or the one that does not."""
        needs_space = self.prefix == "always" or (self.prefix == "first" and first)
        has_space = self.only_if_missing and text.startswith((" ", "▁"))
        if needs_space and not has_space:
            return self.spaced
        return self.bare


def pieces(folder: Path, spec: dict, config: dict) -> Pieces:
    """Loads a sentencepiece model: tokenizer.model, or the merges in tokenizer.json where there is
    no other file.

    spec: what tokenizer.json holds, or {}.
    config: what tokenizer_config.json holds, or {}.

    Text is cut at control tokens, and sentencepiece may put a space before each part, or only
    before the first. A tokenizer.json says which in its normalizer or pre-tokenizer; without one,
    transformers' key `legacy` in tokenizer_config.json does (true: each part; default: false).
    Raises UserError where the file is damaged, or where spaces are treated in another way.
    """
    file = folder / "tokenizer.model"
    json_file = folder / "tokenizer.json"
    control: set[str] = set()
    names: dict[str, str] = {}
    if file.is_file():
        check_size(file)
        try:
            spaced = SentencePieceProcessor(model_file=str(file))
            bare = SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError):
            raise UserError(f"{file}: not a sentencepiece model; {SUPPORTED}") from None
        vocab = {bare.id_to_piece(id): id for id in range(len(bare))}
        _check_same_vocabulary(folder, vocab, spec)
        byte_tokens = {}
        for piece, id in vocab.items():
            if bare.is_byte(id):
                byte_tokens[id] = bytes([int(piece[1:-1], 16)])  # of <0x0A>
            if bare.is_control(id) or bare.is_unknown(id):
                control.add(piece)
        for name, id in (("bos_token", bare.bos_id()), ("eos_token", bare.eos_id())):
            # sentencepiece writes -1 where there is none.
            if id >= 0 and name not in config:
                names[name] = bare.id_to_piece(id)
        details = ""
    else:
        vocab, proto, byte_tokens = _json_pieces(json_file, spec)
        spaced = SentencePieceProcessor(model_proto=proto)
        bare = SentencePieceProcessor(model_proto=proto)
        details = ", out of tokenizer.json"
    prefix, only_if_missing = _space_prefix(json_file, spec, config, bare)
    spaced.override_normalizer_spec(add_dummy_prefix=True)
    bare.override_normalizer_spec(add_dummy_prefix=False)
    bytes_of = {id: piece.replace("▁", " ").encode() for piece, id in vocab.items()}
    bytes_of |= byte_tokens
    controls = {}
    for text in control:
        controls[text] = AddedToken(vocab[text], special=True, normalized=False)
    return Pieces(vocab, spaced, bare, prefix, only_if_missing, bytes_of, controls, names, details)


def _check_same_vocabulary(folder: Path, vocab: dict[str, int], spec: dict) -> None:
    """Raises UserError if a tokenizer.json beside a tokenizer.model gives a piece another id.

    vocab: of the tokenizer.model. spec: what the tokenizer.json holds, or {}.
    """
    listed = spec["model"].get("vocab") if spec else {}
    is_same = isinstance(listed, dict)
    if is_same:
        # A tokenizer.json may list further tokens, which were added.
        is_same = all(vocab.get(text, id) == id for text, id in listed.items())
    if not is_same:
        problem = "tokenizer.json and tokenizer.model have different vocabularies"
        raise UserError(f"{folder}: {problem}; keep one")


def _space_prefix(
    json_file: Path, spec: dict, config: dict, model: SentencePieceProcessor
) -> tuple[str, bool]:
    """Returns `prefix` and `only_if_missing` of `Pieces`. model: as the file has it, without an
    override."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    match [spec.get("normalizer"), spec.get("pre_tokenizer")]:
        case _ if not spec:
            if not model.normalize("a").startswith("▁"):
                return "never", False
            if config.get("legacy") is True:
                return "always", False
            return "first", False
        case [{"normalizers": [{"type": "Prepend", "prepend": "▁"}, last]}, None] if last == space:
            return "always", False
        case [None, {"type": "Metaspace", "prepend_scheme": prefix, "split": False}] if prefix in (
            "always",
            "first",
            "never",
        ):
            return prefix, True
        case [normalizer, None | {"type": "Split", "pattern": {"String": " "}}] if (
            normalizer == space
        ):
            return "never", False
        case other:
            raise refuse(json_file, f"it treats spaces by {json.dumps(other)[:200]}")


def _json_pieces(path: Path, spec: dict) -> tuple[dict[str, int], bytes, dict[int, bytes]]:
    """Makes a sentencepiece model of the merges of a tokenizer.json with byte fallback.

    Returns its vocabulary, the model as sentencepiece's protobuf, and its byte tokens by id. The
    score of a piece is minus the rank of its merge, so that sentencepiece merges alike
    (`_merge_order`). A token that no merge makes becomes a control piece, which no text becomes.
    One difference is known: U+2581 in the text itself, which is sentencepiece's sign for a space,
    may be cut otherwise.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model, vocab, pairs = _read_bpe(path, spec)
    if model.get("ignore_merges"):
        raise refuse(path, "its BPE has byte_fallback and ignore_merges")
    byte_ids = {}
    for byte in range(256):
        name = f"<0x{byte:02X}>"
        if name not in vocab:
            raise refuse(path, "its BPE has byte_fallback, but not all of its 256 tokens")
        byte_ids[vocab[name]] = byte
    texts = {id: text for text, id in vocab.items()}
    spellings = {id: text for id, text in texts.items() if id not in byte_ids}
    ranks, _ = _merge_order(spellings, pairs)
    size = max(texts) + 1
    if size > 2 * len(vocab) + 1000:
        raise refuse(path, f"its ids go up to {size - 1:,} with {len(vocab):,} tokens")
    unknown = vocab.get(str(model.get("unk_token")))
    if unknown is None:
        # sentencepiece must have an unknown token, so one is added behind the last.
        unknown = size
        size += 1
    Piece = ModelProto.SentencePiece
    kinds = dict.fromkeys(ranks, Piece.NORMAL)
    kinds |= dict.fromkeys(byte_ids, Piece.BYTE)
    kinds[unknown] = Piece.UNKNOWN
    entries = []
    for id in range(size):
        kind = kinds.get(id, Piece.CONTROL)
        text = f"<no text {id}>"
        if id in kinds and id in texts:
            text = texts[id]
        entries.append(Piece(piece=text, score=-ranks.get(id, 0), type=kind))
    trainer = {"model_type": "BPE", "vocab_size": size, "byte_fallback": True}
    trainer |= {"unk_id": unknown, "bos_id": -1, "eos_id": -1, "pad_id": -1}
    normalizer = {"name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    proto = ModelProto(pieces=entries, trainer_spec=trainer, normalizer_spec=normalizer)
    byte_tokens = {id: bytes([byte]) for id, byte in byte_ids.items()}
    return vocab, proto.SerializeToString(), byte_tokens


# ---- Llama 3's own tokenizer.model ----

TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SIZE = 128_000
# Llama 3.1's names. Llama 3 had reserved tokens in the places of finetune_right_pad_id, eom_id and
# python_tag.
LLAMA3_CONTROL = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1"
    " finetune_right_pad_id reserved_special_token_2 start_header_id end_header_id eom_id eot_id"
    " python_tag"
).split()
LLAMA3_CONTROL += [f"reserved_special_token_{number}" for number in range(3, 248)]


def check_size(file: Path) -> None:
    """Raises UserError for a tokenizer.model that is too large to be one, or only the pointer of a
    file that Git LFS has not fetched."""
    refuse_pointer(file)
    size = file.stat().st_size
    if size > MODEL_BYTES:
        raise UserError(f"{file}: {size / 1e6:,.0f} MB, at most {MODEL_BYTES / 1e6:.0f} are read")


def is_tiktoken(file: Path) -> bool:
    """True if a tokenizer.model is a list of base64 tokens with their ranks instead of
    sentencepiece's protobuf."""
    with open(file, "rb") as lines:
        return TIKTOKEN_LINE.fullmatch(lines.readline(1000)) is not None


def tiktoken_file(file: Path) -> tuple[BytePairs, dict[str, AddedToken]]:
    """Loads Llama 3's tokenizer.model, and returns it with its control tokens, which the file
    itself does not hold.
    Raises UserError for a damaged file, and for one of another model."""
    check_size(file)
    bytes_of = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        token, _, rank = line.partition(b" ")
        try:
            bytes_of[int(rank)] = base64.b64decode(token, validate=True)
        except ValueError:
            problem = f"line {number} is no base64 token with its rank"
            raise UserError(f"{file}: {problem}; copy the file again") from None
    has_all_ranks = sorted(bytes_of) == [*range(LLAMA3_SIZE)]
    num_different = len({*bytes_of.values()})
    if not has_all_ranks or num_different < LLAMA3_SIZE:
        actual = f"a tiktoken file of {len(bytes_of):,} tokens"
        supported = f"only Llama 3's, of {LLAMA3_SIZE:,}, is supported"
        raise UserError(f"{file}: {actual}; {supported}")
    ranked = {token: rank for rank, token in bytes_of.items()}
    encoding = tiktoken.Encoding(
        str(file), pat_str=LLAMA3_WORDS, mergeable_ranks=ranked, special_tokens={}
    )
    # Tokens are written as text where they are text, so that a name can be looked up.
    vocab = {token.decode(errors="replace"): id for id, token in bytes_of.items()}
    added = {}
    for id, name in enumerate(LLAMA3_CONTROL, LLAMA3_SIZE):
        added[f"<|{name}|>"] = AddedToken(id, special=True, normalized=False)
    ids = [*range(LLAMA3_SIZE)]  # in this format a token's rank is its id
    details = ", in tiktoken's format"
    return BytePairs(vocab, encoding, ids, bytes_of, False, details), added
