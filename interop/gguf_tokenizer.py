"""The tokenizer in a GGUF file (`tokenizer.*`), to and from the files of a Hugging Face folder.

Two kinds exist here: "gpt2", byte-level BPE with merges, which is a tokenizer.json; and "llama",
the BPE of sentencepiece with scores, which is a tokenizer.model. A byte-level file says only by a
name (`tokenizer.ggml.pre`) how a text is split into words. `WORD_SPLITTERS` says what the name
means, in both directions. A name or a file that is not known exactly is refused: with another split
the ids are other ids, and nothing looks wrong.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError, first_line, read_json, read_json_if_there, read_text
from interop.gguf_reader import Gguf
from tokenization.subwords import LLAMA3_WORDS, BytePairs
from tokenizer import Tokenizer, always_writes, load_tokenizer

# tokenizer.ggml.token_type; the numbers are sentencepiece's own.
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5  # fills a row of the embedding
BYTE = 6
BPE_MODEL_TYPE = 2  # of sentencepiece's trainer_spec.model_type
# {name here: name in tokenizer.ggml.NAME_token_id}
SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "eot": "eot",
    "eom": "eom",
    "unk": "unknown",
    "pad": "padding",
}
ADDED_SCORE = -1000.0  # of an added token that sentencepiece does not know
UNUSED_SCORE = -10_000.0  # of a row of the embedding without a token


class Words(NamedTuple):
    """How a text is split into words before the merges, as a tokenizer.json says it.

    steps: the pre-tokenizers.
    nfc: texts are brought into Unicode's form NFC first.
    ignore_merges: a word that is a token is taken whole, as tiktoken does it.
    bos: a text begins with bos where the file does not say.
    differs: which texts llama.cpp splits differently; "" if none.
    """

    steps: list[dict]
    nfc: bool = False
    ignore_merges: bool = False
    bos: bool = False
    differs: str = ""


# GPT-2's words
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def split_pieces(pattern: str) -> list[dict]:
    """Returns the pre-tokenizers that split a text by a regular expression."""
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [cut, BYTE_LEVEL | {"use_regex": False}]


DIGITS = {"type": "Digits", "individual_digits": True}
QWEN2 = split_pieces(LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"))
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# A word's capitals come first, so "plainTune" is two words. The gaps of _CASED: what may follow a
# word of either kind, as in "it's", and how many digits make a number.
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+%s|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*%s|\p{{N}}%s"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = _CASED % ("", "", "") + _REST
GPT_4O = _CASED % (_SUFFIX, _SUFFIX, "{1,3}") + _REST
LLAMA3 = Words(split_pieces(LLAMA3_WORDS), ignore_merges=True, bos=True)
MARKS = "words with combining marks, as in Hindi"
# {tokenizer.ggml.pre: what it means}
WORD_SPLITTERS = {
    "gpt-2": Words([BYTE_LEVEL]),
    "smollm": Words([DIGITS, BYTE_LEVEL]),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": Words(QWEN2, nfc=True, differs="texts that are not in Unicode's form NFC"),
    "deepseek-r1-qwen": Words(QWEN2),
    "tekken": Words(split_pieces(TEKKEN), ignore_merges=True, bos=True, differs=MARKS),
    "gpt-4o": Words(split_pieces(GPT_4O), differs=MARKS),
    "dbrx": Words(split_pieces(LLAMA3_WORDS)),
}
# Phi-3's control tokens, all but three, strip the spaces behind them. llama.cpp knows that from a
# model's name alone.
PHI3 = re.compile(r"phi-?3", re.IGNORECASE)
PHI3_BARE = {"<unk>", "<s>", "<|endoftext|>"}


# ---- in: from a file's fields to a folder's files ----


def special_ids(gguf: Gguf) -> dict[str, int]:
    """Returns the ids of bos, eos, eot, eom, unk and pad, as far as the file names them.

    Raises UserError where an id is out of range, or where the file does not name eos.
    """
    count = len(gguf.field("tokenizer.ggml.tokens", list))
    ids = {}
    for name, gguf_name in SPECIAL.items():
        key = f"tokenizer.ggml.{gguf_name}_token_id"
        value = gguf.fields.get(key)
        if value is not None:
            if type(value) is not int or not 0 <= value < count:
                raise UserError(f"{gguf.file}: {key} is {value!r}, of {count} tokens")
            ids[name] = value
    if "eos" not in ids:
        problem = "has no tokenizer.ggml.eos_token_id, so nothing would end an answer"
        raise UserError(f"{gguf.file}: {problem}")
    return ids


def tokenizer_files(gguf: Gguf) -> dict[str, dict | bytes]:
    """Returns {file name: content} of the tokenizer, its settings and generation_config.json.

    Raises UserError where the file's tokenizer is damaged, or not supported.
    """
    kind = gguf.field("tokenizer.ggml.model", str)
    tokens = gguf.field("tokenizer.ggml.tokens", list)
    types = gguf.field("tokenizer.ggml.token_type", list)
    if kind not in ("gpt2", "llama"):
        supported = "'gpt2' (BPE) and 'llama' (SPM) are"
        raise UserError(f"{gguf.file}: tokenizer {kind!r} is not supported; {supported}")
    are_strings = all(isinstance(token, str) for token in tokens)
    if not are_strings or len(set(tokens)) != len(tokens):
        raise UserError(f"{gguf.file}: tokenizer.ggml.tokens is not a list of different strings")
    if len(types) != len(tokens):
        raise UserError(f"{gguf.file}: {len(tokens)} tokens but {len(types)} token types")
    ids = special_ids(gguf)

    # llama.cpp's defaults where the keys are missing: sentencepiece models and Llama 3 begin a text
    # with bos.
    default_bos = kind == "llama"
    if kind == "gpt2":
        words = WORD_SPLITTERS.get(str(gguf.fields.get("tokenizer.ggml.pre")))
        default_bos = words is not None and words.bos
    add_bos = gguf.field("tokenizer.ggml.add_bos_token", bool, default_bos)
    add_eos = gguf.field("tokenizer.ggml.add_eos_token", bool, False)
    if add_bos and "bos" not in ids:
        raise UserError(f"{gguf.file}: asks for a bos token but has no tokenizer.ggml.bos_token_id")

    settings: dict[str, Any] = {}
    for name in ("bos", "eos", "unk", "pad"):
        if name in ids:
            settings[f"{name}_token"] = tokens[ids[name]]
    settings["add_bos_token"] = add_bos
    settings["add_eos_token"] = add_eos
    settings["clean_up_tokenization_spaces"] = False
    architecture = gguf.fields["general.architecture"]
    settings["model_max_length"] = gguf.field(f"{architecture}.context_length", int)
    settings |= template_settings(gguf)
    files: dict[str, dict | bytes] = {}
    if kind == "gpt2":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        first = [ids["bos"]] if add_bos else []
        last = [ids["eos"]] if add_eos else []
        files["tokenizer.json"] = byte_level_bpe(gguf, tokens, types, first, last)
    else:
        prefix = gguf.field("tokenizer.ggml.add_space_prefix", bool, True)
        is_gemma = architecture.startswith("gemma")
        settings["tokenizer_class"] = "GemmaTokenizer" if is_gemma else "LlamaTokenizer"
        # Like these older tokenizers, llama.cpp puts a space before the text behind each special
        # token.
        settings["legacy"] = True
        settings["add_prefix_space"] = prefix
        settings["added_tokens_decoder"] = added_tokens(gguf, tokens, types)
        files["tokenizer.model"] = sentencepiece_bpe(gguf, tokens, types, ids, prefix)
    files["tokenizer_config.json"] = settings
    files["generation_config.json"] = generation_config(ids)
    return files


def template_settings(gguf: Gguf) -> dict:
    """Returns `chat_template` of tokenizer_config.json: one template, or a list of them by name; {}
    if there is none.

    Every transformers reads that list; only newer ones read additional_chat_templates/*.jinja.
    """
    keys = [key for key in gguf.fields if re.fullmatch(r"tokenizer\.chat_template(\..+)?", key)]
    templates = []
    for key in keys:
        _, _, name = key.partition("template.")
        if not name:
            name = "default"
        templates.append({"name": name, "template": gguf.field(key, str)})
    if keys == ["tokenizer.chat_template"]:
        return {"chat_template": templates[0]["template"]}
    if templates:
        return {"chat_template": templates}
    return {}


def generation_config(ids: dict[str, int]) -> dict:
    """Returns generation_config.json, by which an answer ends at eos, eot or eom."""
    config: dict[str, int | list[int]] = {}
    for name in ("bos", "pad"):
        if name in ids:
            config[f"{name}_token_id"] = ids[name]
    ends = []
    for name in ("eos", "eot", "eom"):
        # Two names may stand for the same token.
        if name in ids and ids[name] not in ends:
            ends.append(ids[name])
    config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return config


def byte_level_bpe(
    gguf: Gguf, tokens: list[str], types: list[int], first: list[int], last: list[int]
) -> dict:
    """Returns tokenizer.json of GPT-2's byte-level BPE, as the tokenizers library reads it.

    tokens, types: text and type of each token, in the order of ids.
    first, last: the ids put before and after an encoded text, each none or one.
    Raises UserError where the split into words is not known, or a merge is not of tokens.
    """
    pre = gguf.field("tokenizer.ggml.pre", str)
    if pre not in WORD_SPLITTERS:
        known = ", ".join(WORD_SPLITTERS)
        raise UserError(f"{gguf.file}: tokenizer.ggml.pre {pre!r} is not supported; {known} are")
    words = WORD_SPLITTERS[pre]
    # The unused tokens only fill ids up to the size of the embedding. Added tokens stay in, since
    # the tokenizers library looks up their ids here.
    vocab = {}
    for id, (token, kind) in enumerate(zip(tokens, types)):
        if kind != UNUSED:
            vocab[token] = id
    merges = gguf.field("tokenizer.ggml.merges", list)
    for i, merge in enumerate(merges):
        left, _, right = str(merge).partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            problem = f"merge {i} ({merge!r}) is not of tokens in its vocabulary"
            raise UserError(f"{gguf.file}: {problem}")
    added = []
    for id_text, settings in added_tokens(gguf, tokens, types).items():
        added.append({"id": int(id_text)} | settings)
    normalizer = {"type": "NFC"} if words.nfc else None
    ends = post_processor(tokens, first, last) if first or last else None
    model = {"type": "BPE", "ignore_merges": words.ignore_merges, "vocab": vocab, "merges": merges}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words.steps},
        "post_processor": ends,
        "decoder": BYTE_LEVEL,
        "model": model,
    }


def post_processor(tokens: list[str], first: list[int], last: list[int]) -> dict:
    """Returns the post-processor of a tokenizer.json that puts the tokens `first` and `last` around
    a text."""

    def special_tokens(ids: list[int]) -> list[dict]:
        return [{"SpecialToken": {"id": tokens[id], "type_id": 0}} for id in ids]

    def around(part: str) -> list[dict]:
        """Returns the pieces of an encoded text. part: "A", the text, or "B", that of a pair."""
        sequence = {"Sequence": {"id": part, "type_id": 0}}
        return [*special_tokens(first), sequence, *special_tokens(last)]

    special = {}
    for id in first + last:
        token = tokens[id]
        special[token] = {"id": token, "ids": [id], "tokens": [token]}
    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": around("A") + around("B"),
        "special_tokens": special,
    }


def added_tokens(gguf: Gguf, tokens: list[str], types: list[int]) -> dict[str, dict]:
    """Returns {id: token}, as `added_tokens_decoder` writes the tokens that a text is searched for
    before anything else.

    Tokens of a sentencepiece model that contain spaces are left out: its tokenizer finds them by
    itself, and no other reader of tokenizer_config.json would know which token is meant.
    """
    is_phi3 = bool(PHI3.search(str(gguf.fields.get("general.name"))))
    is_sentencepiece = gguf.fields["tokenizer.ggml.model"] == "llama"
    result = {}
    for i, (token, kind) in enumerate(zip(tokens, types)):
        if kind not in (UNKNOWN, CONTROL, USER_DEFINED) or not token:
            continue
        if is_sentencepiece and ("▁" in token or " " in token):
            continue
        result[str(i)] = {
            "content": token,
            "rstrip": is_phi3 and token not in PHI3_BARE,
            "special": kind != USER_DEFINED,
            "single_word": False,
            "lstrip": False,
            "normalized": False,
        }
    return result


def sentencepiece_bpe(
    gguf: Gguf, tokens: list[str], types: list[int], ids: dict[str, int], prefix: bool
) -> bytes:
    """Returns tokenizer.model: sentencepiece's protobuf of the pieces with their scores, for BPE
    with byte fallback.

    tokens, types: text and type of each token, in the order of ids.
    ids: of `special_ids`.
    prefix: a text gets a space before its first word.
    Raises UserError where sentencepiece does not accept the pieces.
    """
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    scores = gguf.field("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise UserError(f"{gguf.file}: {len(tokens)} tokens but {len(scores)} scores")
    # One piece must be the unknown one. llama.cpp's converter makes Gemma's a control token.
    if UNKNOWN not in types and "unk" in ids:
        types = list(types)
        types[ids["unk"]] = UNKNOWN
    # llama.cpp's converter writes the spaces of user-defined tokens as spaces; sentencepiece looks
    # for its own mark.
    texts = []
    for token, kind in zip(tokens, types):
        texts.append(token.replace(" ", "▁") if kind == USER_DEFINED else token)
    trainer = {"model_type": "BPE", "vocab_size": len(tokens), "byte_fallback": BYTE in types}
    for name in ("unk", "bos", "eos", "pad"):
        trainer[f"{name}_id"] = ids.get(name, -1)
        if name in ids:
            trainer[f"{name}_piece"] = texts[ids[name]]
    pieces = []
    for text, score, kind in zip(texts, scores, types):
        pieces.append({"piece": text, "score": score, "type": kind})
    normalizer = {"name": "identity", "add_dummy_prefix": prefix, "remove_extra_whitespaces": False}
    try:
        proto = ModelProto(pieces=pieces, trainer_spec=trainer, normalizer_spec=normalizer)
        content = proto.SerializeToString()
        SentencePieceProcessor(model_proto=content)  # raises where the pieces make no model
    except (RuntimeError, ValueError, TypeError) as error:
        problem = f"sentencepiece refuses its tokens ({first_line(error)})"
        raise UserError(f"{gguf.file}: {problem}") from None
    return content


# ---- out: from a folder's files to a file's fields ----


class Vocabulary(NamedTuple):
    """A tokenizer as fields of a GGUF file.

    fields: {key: value}.
    phi3: its control tokens strip spaces as Phi-3's do, which llama.cpp expects of models of that
    name only.
    notes: what llama.cpp does differently, a line each.
    """

    fields: dict
    phi3: bool
    notes: list[str]


class TokenTable(NamedTuple):
    """The tokens of a tokenizer by id: text, type, and score. scores is empty for byte-level
    BPE."""

    texts: dict[int, str]
    kinds: dict[int, int]
    scores: dict[int, float]


def vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Returns the tokenizer of a folder as fields of a GGUF file.

    rows: of the embedding. Tokens beyond them are left out, with a note, and rows beyond the tokens
    get unused ones.
    Raises UserError where a GGUF file can't store the folder's tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    notes: list[str] = []
    config = read_json_if_there(folder / "tokenizer_config.json")
    spec = read_json_if_there(folder / "tokenizer.json")
    if isinstance(tokenizer.model, BytePairs):
        fields, table = byte_level_vocabulary(folder, spec, notes)
    else:
        fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        fields["tokenizer.ggml.add_space_prefix"] = tokenizer.model.prefix != "never"
        table = sentencepiece_tokens(folder, tokenizer, notes)
    enter_added(tokenizer, table)
    fields |= token_lists(folder, table, rows, notes)
    for name, id in ids_to_name(folder, tokenizer, table, notes).items():
        if id is not None and id < rows:
            fields[f"tokenizer.ggml.{name}_token_id"] = id
    fields["tokenizer.ggml.add_bos_token"] = tokenizer.adds_bos and tokenizer.bos_id is not None
    eos_token = tokenizer.names.get("eos_token")
    writes_eos = always_writes(spec.get("post_processor"), eos_token, -1)
    fields["tokenizer.ggml.add_eos_token"] = config.get("add_eos_token", writes_eos) is True
    phi3 = strips_like_phi3(tokenizer, notes)
    return Vocabulary(fields | chat_templates(folder, config), phi3, notes)


def ids_to_name(
    folder: Path, tokenizer: Tokenizer, table: TokenTable, notes: list[str]
) -> dict[str, int | None]:
    """Returns the ids of special tokens by their names in a GGUF file, which names three that end
    an answer: eos, eot and eom.

    Raises UserError where the tokenizer has no eos.
    """
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    unknown = [id for id, kind in table.kinds.items() if kind == UNKNOWN]
    unknown_text = tokenizer.names.get("unk_token")
    if unknown:
        ids["unknown"] = unknown[0]
    elif unknown_text in tokenizer.added:
        ids["unknown"] = tokenizer.added[unknown_text].id
    if ids["eos"] is None:
        file = folder / "tokenizer_config.json"
        raise UserError(f"{file}: names no eos_token, so nothing would end an answer")

    # Llama 3's, which stands for the end of a message after which a tool answers.
    ends = sorted(tokenizer.stop_ids - {ids["eos"]})
    eoms = [id for id in ends if table.texts.get(id) == "<|eom_id|>"]
    if eoms:
        ids["eom"] = eoms[-1]
        ends.remove(eoms[-1])
    if ends:
        ids["eot"] = ends.pop(0)
    if ends:
        left = ", ".join(repr(table.texts.get(id, id)) for id in ends)
        problem = f"{left} may end none where it is served"
        notes.append(f"a GGUF file names three tokens that end an answer; {problem}")
    return ids


def byte_level_vocabulary(folder: Path, spec: dict, notes: list[str]) -> tuple[dict, TokenTable]:
    """Returns the fields `model`, `pre` and `merges`, and the tokens, of a byte-level tokenizer.

    spec: the tokenizer.json, which load_tokenizer has accepted. {}: the folder has none.
    Raises UserError where there is none, or where it splits texts in a way that
    `WORD_SPLITTERS` does not have.
    """
    if not spec:
        file = folder / "tokenizer.model"
        raise UserError(f"{file}: tiktoken's format has no merges; save a tokenizer.json here")
    splits = Words(
        steps=pre_tokenizers(spec.get("pre_tokenizer")),
        nfc=spec.get("normalizer") == {"type": "NFC"},
        ignore_merges=spec["model"].get("ignore_merges") is True,
    )
    names = []
    for name, words in WORD_SPLITTERS.items():
        # What remains decides how a text is split; the others are said by fields of their own.
        if words._replace(bos=False, differs="") == splits:
            names.append(name)
    if not names:
        file = folder / "tokenizer.json"
        problem = "llama.cpp knows ways to cut a text into words by name only"
        known = ", ".join(WORD_SPLITTERS)
        actual = json.dumps(spec.get("pre_tokenizer"))[:120]
        raise UserError(f"{file}: {problem}, and this one is not among {known} ({actual})")
    differs = WORD_SPLITTERS[names[0]].differs
    if differs:
        notes.append(f"llama.cpp cuts {differs} into other tokens than this tokenizer")
    merges = []
    for merge in spec["model"]["merges"]:
        merges.append(merge if isinstance(merge, str) else " ".join(merge))
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": names[0],
        "tokenizer.ggml.merges": merges,
    }
    texts = {id: text for text, id in spec["model"]["vocab"].items()}
    return fields, TokenTable(texts, kinds=dict.fromkeys(texts, NORMAL), scores={})


def pre_tokenizers(spec: dict) -> list[dict]:
    """Returns the pre-tokenizers of a tokenizer.json as `WORD_SPLITTERS` writes them.
    trim_offsets changes no ids."""
    steps = []
    # A pre-tokenizer alone, or a sequence of them.
    for step in spec.get("pretokenizers", [spec]):
        if step["type"] == "ByteLevel":
            step = BYTE_LEVEL | step | {"trim_offsets": True}
        steps.append(step)
    return steps


def sentencepiece_tokens(folder: Path, tokenizer: Tokenizer, notes: list[str]) -> TokenTable:
    """Returns text, type and score of each piece.

    A note is added where llama.cpp splits texts differently in some cases. Raises UserError where
    it does so always.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(tokenizer.model.bare.serialized_model_proto())
    file = folder / "tokenizer.model"
    normalizer = proto.normalizer_spec
    if proto.trainer_spec.model_type != BPE_MODEL_TYPE:
        problem = "its pieces are not merged by scores, as BPE's are"
        raise UserError(f"{file}: {problem}; llama.cpp has no such tokenizer")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        problem = f"normalizes texts ({normalizer.name})"
        raise UserError(f"{file}: {problem}, which llama.cpp does not do")
    texts = {id: text for text, id in tokenizer.model.vocab.items()}
    kinds = {id: proto.pieces[id].type for id in texts}
    scores = {id: proto.pieces[id].score for id in texts}
    if BYTE not in kinds.values():
        raise UserError(f"{file}: has no tokens for single bytes, which llama.cpp needs")
    added = {token.id for token in tokenizer.added.values()}
    kinds_of_others = [kind for id, kind in kinds.items() if id not in added]
    has_user_defined = USER_DEFINED in kinds_of_others
    # llama.cpp puts a space before each part of a text that special tokens cut. This tokenizer puts
    # one at the beginning only ("first"), or none behind the user-defined tokens that sentencepiece
    # finds by itself ("always").
    prefix = tokenizer.model.prefix
    if prefix == "first" or (prefix == "always" and has_user_defined):
        difference = "a space before the text behind each added token"
        notes.append(f"llama.cpp puts {difference}, this tokenizer does not")
    if not file.is_file():
        # The model was made from the merges of a tokenizer.json. There, a piece that no merge makes
        # is a control piece. In a GGUF file it is a token like others, with the lowest score, so
        # that it is merged last.
        unmade = [id for id in texts if kinds[id] == CONTROL and id not in added]
        kinds |= dict.fromkeys(unmade, NORMAL)
        scores |= dict.fromkeys(unmade, min(scores.values()) - 1)
        if unmade:
            few = ", ".join(f"{texts[id]!r}" for id in unmade[:3])
            problem = f"no merges make {len(unmade)} of the tokens ({few})"
            notes.append(f"{problem}; llama.cpp makes them where it can")
    return TokenTable(texts, kinds, scores)


def enter_added(tokenizer: Tokenizer, table: TokenTable) -> None:
    """Enters the added tokens into the table as control or user-defined ones.

    A token that is added in two forms keeps the first.
    """
    entered = set()
    for text, token in tokenizer.added.items():
        if token.id in entered:
            continue
        entered.add(token.id)
        table.texts[token.id] = text
        if table.kinds.get(token.id) != UNKNOWN:
            table.kinds[token.id] = CONTROL if token.special else USER_DEFINED
        if table.scores:
            table.scores.setdefault(token.id, ADDED_SCORE)


def token_lists(folder: Path, table: TokenTable, rows: int, notes: list[str]) -> dict:
    """Returns the fields tokens, token_type and scores, with an item for each row of the embedding.

    Raises UserError where two tokens would have the same text.
    """
    beyond = sorted(id for id in table.texts if id >= rows)
    if beyond:
        where = f"beyond the {rows:,} rows of the embedding"
        first = table.texts[beyond[0]]
        notes.append(f"{len(beyond)} tokens {where} are left out, as {first!r}")
    tokens = []
    types = []
    scores = []
    id_of: dict[str, int] = {}
    for id in range(rows):
        text = table.texts.get(id, f"[PAD{id}]")
        kind = table.kinds.get(id, UNUSED)
        if table.scores and kind == USER_DEFINED:
            # sentencepiece writes the spaces of a user-defined token as its own mark; llama.cpp
            # looks for the token in the text as it is.
            text = text.replace("▁", " ")
        if text in id_of:
            both = f"tokens {id_of[text]} and {id} are both {text!r}"
            raise UserError(f"{folder}: {both}, which llama.cpp can't tell apart")
        id_of[text] = id
        tokens.append(text)
        types.append(kind)
        scores.append(table.scores.get(id, UNUSED_SCORE))
    lists: dict[str, list] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if table.scores:
        lists["tokenizer.ggml.scores"] = scores
    return lists


def strips_like_phi3(tokenizer: Tokenizer, notes: list[str]) -> bool:
    """True if exactly those added tokens strip the spaces behind them that llama.cpp strips for
    Phi-3.

    A note is added where other tokens do.
    """
    added = tokenizer.added
    strips = set()  # on either side
    strips_right = set()
    for text, token in added.items():
        if token.lstrip or token.rstrip or token.single_word:
            strips.add(text)
        if token.rstrip:
            strips_right.add(text)
    of_phi3 = {text for text in added if text not in PHI3_BARE}
    has_phi3_tokens = PHI3_BARE | {"</s>"} <= added.keys()
    if strips == strips_right == of_phi3 and has_phi3_tokens:
        return True
    if strips:
        text = f"{min(strips)!r} strips the spaces beside it"
        notes.append(f"{text}; a GGUF file can't say that, so llama.cpp keeps them")
    return False


def chat_templates(folder: Path, config: dict) -> dict:
    """Returns the fields of the folder's chat templates: none, one, or several by name.

    config: tokenizer_config.json. Raises UserError where its chat_template is of another form.
    """
    # A template in a file of its own replaces one of the same name in tokenizer_config.json.
    template = config.get("chat_template")
    named = {}
    if isinstance(template, str):
        named = {"default": template}
    elif isinstance(template, list):
        for entry in template:
            if isinstance(entry, dict):
                named[entry.get("name")] = entry.get("template")
    if not named and (folder / "chat_template.json").is_file():
        named = {"default": read_json(folder / "chat_template.json").get("chat_template")}
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[file.stem] = read_text(file)
    if (folder / "chat_template.jinja").is_file():
        named["default"] = read_text(folder / "chat_template.jinja")
    for name, text in named.items():
        if not isinstance(name, str) or not isinstance(text, str):
            problem = "its chat_template is neither a text nor a list of names and texts"
            raise UserError(f"{folder}: {problem}")

    fields = {}
    others = []
    for name, text in named.items():
        if not text:
            continue
        key = "tokenizer.chat_template"
        if name != "default":
            key += f".{name}"
            others.append(name)
        fields[key] = text
    if others:
        fields["tokenizer.chat_templates"] = others
    return fields
