"""The tokenizer that a GGUF file holds under `tokenizer.*`, to and from the files of a Hugging Face folder.

Two kinds exist here: "gpt2", byte-level BPE with merges, which is a tokenizer.json; and "llama", the BPE of
sentencepiece with scores, which is a tokenizer.model. A byte-level file says how text falls into words by a name only
(`tokenizer.ggml.pre`); `WORDS` says what the name means, in both directions. A name or a file that is not known
exactly is refused: with another split the ids are other ids, and nothing looks wrong.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError, first_line, read_json, read_json_if_there, read_text
from interop.gguf_reader import Gguf
from tokenization.subwords import LLAMA3_WORDS, BytePairs
from tokenizer import Tokenizer, always_writes, load_tokenizer

# tokenizer.ggml.token_type; the numbers are sentencepiece's own.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIAL = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}


class Words(NamedTuple):
    """How a text falls into words before the merges, as a tokenizer.json says it."""

    steps: list[dict]  # pre-tokenizers
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token is taken whole, as tiktoken does it
    bos: bool = False  # a text begins with bos where the file does not say
    differs: str = ""  # which texts llama.cpp cuts otherwise


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}  # GPT-2's words


def split(pattern: str) -> list[dict]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [cut, BYTE_LEVEL | {"use_regex": False}]


DIGITS = {"type": "Digits", "individual_digits": True}
QWEN2 = split(LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"))
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+%s|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*%s|\p{{N}}%s"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = Words(split(LLAMA3_WORDS), ignore_merges=True, bos=True)
MARKS = "words with combining marks, as in Hindi"
WORDS = {  # by tokenizer.ggml.pre
    "gpt-2": Words([BYTE_LEVEL]),
    "smollm": Words([DIGITS, BYTE_LEVEL]),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": Words(QWEN2, nfc=True, differs="texts that are not in Unicode's form NFC"),
    "deepseek-r1-qwen": Words(QWEN2),
    "tekken": Words(split(_CASED % ("", "", "") + _REST), ignore_merges=True, bos=True, differs=MARKS),
    "gpt-4o": Words(split(_CASED % (_SUFFIX, _SUFFIX, "{1,3}") + _REST), differs=MARKS),
    "dbrx": Words(split(LLAMA3_WORDS)),
}
# llama.cpp knows from a model's name alone that Phi-3's control tokens take the space behind them along, all but three
PHI3 = re.compile(r"phi-?3", re.IGNORECASE)
PHI3_BARE = {"<unk>", "<s>", "<|endoftext|>"}


# ---- in: from a file's fields to a folder's files ----


def special_ids(gguf: Gguf) -> dict[str, int]:
    """The ids of bos, eos, eot, eom, unk and pad, as far as the file names them; eos it must name."""
    count, ids = len(gguf.field("tokenizer.ggml.tokens", list)), {}
    for name, key in SPECIAL.items():
        value = gguf.fields.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            if type(value) is not int or not 0 <= value < count:
                raise UserError(f"{gguf.file}: tokenizer.ggml.{key}_token_id is {value!r}, of {count} tokens")
            ids[name] = value
    if "eos" not in ids:
        raise UserError(f"{gguf.file}: has no tokenizer.ggml.eos_token_id, so nothing would end an answer")
    return ids


def tokenizer_files(gguf: Gguf) -> dict[str, dict | bytes]:
    """{file name: content} of the tokenizer, its settings and generation_config.json."""
    kind = gguf.field("tokenizer.ggml.model", str)
    tokens = gguf.field("tokenizer.ggml.tokens", list)
    types = gguf.field("tokenizer.ggml.token_type", list)
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{gguf.file}: tokenizer {kind!r} is not supported; 'gpt2' (BPE) and 'llama' (SPM) are")
    if not all(isinstance(token, str) for token in tokens) or len(set(tokens)) != len(tokens):
        raise UserError(f"{gguf.file}: tokenizer.ggml.tokens is not a list of different strings")
    if len(types) != len(tokens):
        raise UserError(f"{gguf.file}: {len(tokens)} tokens but {len(types)} token types")
    ids = special_ids(gguf)
    # llama.cpp's defaults where the keys are missing: sentencepiece models and Llama 3 start with bos
    words = WORDS.get(str(gguf.fields.get("tokenizer.ggml.pre"))) if kind == "gpt2" else None
    add_bos = gguf.field("tokenizer.ggml.add_bos_token", bool, words.bos if words else kind == "llama")
    add_eos = gguf.field("tokenizer.ggml.add_eos_token", bool, False)
    if add_bos and "bos" not in ids:
        raise UserError(f"{gguf.file}: asks for a bos token but has no tokenizer.ggml.bos_token_id")
    settings = {f"{name}_token": tokens[ids[name]] for name in ("bos", "eos", "unk", "pad") if name in ids}
    settings |= {"add_bos_token": add_bos, "add_eos_token": add_eos, "clean_up_tokenization_spaces": False}
    settings["model_max_length"] = gguf.field(f"{gguf.fields['general.architecture']}.context_length", int)
    keys = [key for key in gguf.fields if re.fullmatch(r"tokenizer\.chat_template(\..+)?", key)]
    templates = [{"name": key.partition("template.")[2] or "default", "template": gguf.field(key, str)} for key in keys]
    if keys == ["tokenizer.chat_template"]:
        settings["chat_template"] = templates[0]["template"]
    elif keys:  # every transformers reads this list; additional_chat_templates/*.jinja only the newer ones
        settings["chat_template"] = templates
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "pad") if name in ids}
    generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if kind == "gpt2":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        first, last = [ids["bos"]] if add_bos else [], [ids["eos"]] if add_eos else []
        files = {"tokenizer.json": byte_level_bpe(gguf, tokens, types, first, last)}
    else:
        prefix = gguf.field("tokenizer.ggml.add_space_prefix", bool, True)
        gemma = gguf.fields["general.architecture"].startswith("gemma")
        # legacy: llama.cpp, too, puts a space before each piece of text that follows a token of its own
        settings |= {"tokenizer_class": "GemmaTokenizer" if gemma else "LlamaTokenizer", "legacy": True}
        settings |= {"add_prefix_space": prefix, "added_tokens_decoder": added_tokens(gguf, tokens, types)}
        files = {"tokenizer.model": sentencepiece_bpe(gguf, tokens, types, ids, prefix)}
    return files | {"tokenizer_config.json": settings, "generation_config.json": generation}


def byte_level_bpe(gguf: Gguf, tokens: list[str], types: list[int], first: list[int], last: list[int]) -> dict:
    """tokenizer.json of GPT-2's byte-level BPE, as the tokenizers library reads it.

    first, last: the ids put before and after an encoded text, each none or one.
    """
    pre = gguf.field("tokenizer.ggml.pre", str)
    if pre not in WORDS:
        raise UserError(f"{gguf.file}: tokenizer.ggml.pre {pre!r} is not supported; {', '.join(WORDS)} are")
    words = WORDS[pre]
    # The unused ones only fill ids up to the size of the embedding. Added tokens stay in: the tokenizers library looks
    # up their ids here.
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind != UNUSED}
    merges = gguf.field("tokenizer.ggml.merges", list)
    for i, merge in enumerate(merges):
        left, _, right = str(merge).partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise UserError(f"{gguf.file}: merge {i} ({merge!r}) is not of tokens in its vocabulary")
    before, after = ([{"SpecialToken": {"id": tokens[i], "type_id": 0}} for i in ids] for ids in (first, last))
    one, two = ([*before, {"Sequence": {"id": part, "type_id": 0}}, *after] for part in "AB")
    around = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in first + last}
    template = {"type": "TemplateProcessing", "single": one, "pair": one + two, "special_tokens": around}
    return {
        "version": "1.0",
        "added_tokens": [{"id": int(i)} | token for i, token in added_tokens(gguf, tokens, types).items()],
        "normalizer": {"type": "NFC"} if words.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words.steps},
        "post_processor": template if around else None,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "ignore_merges": words.ignore_merges, "vocab": vocab, "merges": merges},
    }


def added_tokens(gguf: Gguf, tokens: list[str], types: list[int]) -> dict[str, dict]:
    """{id: token} as `added_tokens_decoder` writes the tokens that are looked for in the text before anything else.

    Of a sentencepiece model not those that hold spaces: its tokenizer finds them by itself, and no other reader of
    tokenizer_config.json would know which token is meant.
    """
    phi3 = bool(PHI3.search(str(gguf.fields.get("general.name"))))
    rules = {"single_word": False, "lstrip": False, "normalized": False}
    spaced = ("▁", " ") if gguf.fields["tokenizer.ggml.model"] == "llama" else ()
    return {
        str(i): {"content": token, "rstrip": phi3 and token not in PHI3_BARE, "special": kind != USER_DEFINED} | rules
        for i, (token, kind) in enumerate(zip(tokens, types))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token and not any(space in token for space in spaced)
    }


def sentencepiece_bpe(gguf: Gguf, tokens: list[str], types: list[int], ids: dict[str, int], prefix: bool) -> bytes:
    """tokenizer.model: sentencepiece's protobuf of the pieces with their scores, for BPE with byte fallback.

    prefix: whether a text gets a space before its first word.
    """
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    scores = gguf.field("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise UserError(f"{gguf.file}: {len(tokens)} tokens but {len(scores)} scores")
    if UNKNOWN not in types and "unk" in ids:  # llama.cpp's converter makes Gemma's a control token; one must be
        types = types[: ids["unk"]] + [UNKNOWN] + types[ids["unk"] + 1 :]
    # llama.cpp's converter writes the spaces of user-defined tokens out; sentencepiece looks for its own mark
    pieces = [token.replace(" ", "▁") if kind == USER_DEFINED else token for token, kind in zip(tokens, types)]
    special = {f"{name}_id": ids.get(name, -1) for name in ("unk", "bos", "eos", "pad")}
    special |= {f"{name}_piece": pieces[ids[name]] for name in ("unk", "bos", "eos", "pad") if name in ids}
    try:
        content = ModelProto(
            pieces=[
                {"piece": piece, "score": score, "type": kind} for piece, score, kind in zip(pieces, scores, types)
            ],
            trainer_spec={"model_type": "BPE", "vocab_size": len(tokens), "byte_fallback": BYTE in types} | special,
            normalizer_spec={"name": "identity", "add_dummy_prefix": prefix, "remove_extra_whitespaces": False},
        ).SerializeToString()
        SentencePieceProcessor(model_proto=content)  # its own judgement of the pieces
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{gguf.file}: sentencepiece refuses its tokens ({first_line(error)})") from None
    return content


# ---- out: from a folder's files to a file's fields ----


class Vocabulary(NamedTuple):
    """What goes into a file, and what must be said about it."""

    fields: dict  # by key
    phi3: bool  # its control tokens take spaces along as Phi-3's, which llama.cpp believes of models of that name only
    notes: list[str]  # what llama.cpp does otherwise


def vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer of a folder as fields of a GGUF file.

    rows: of the embedding; tokens beyond them are left out, and said, and rows beyond the tokens get unused ones.
    Raises UserError where the folder's tokenizer has no equal in a GGUF file.
    """
    tokenizer, notes = load_tokenizer(folder), []
    config = read_json_if_there(folder / "tokenizer_config.json")
    spec = read_json_if_there(folder / "tokenizer.json")
    if isinstance(tokenizer.model, BytePairs):
        if not spec:
            raise UserError(
                f"{folder / 'tokenizer.model'}: tiktoken's format has no merges; save a tokenizer.json here"
            )
        fields = byte_level_fields(folder / "tokenizer.json", spec)
        if differs := WORDS[fields["tokenizer.ggml.pre"]].differs:
            notes.append(f"llama.cpp cuts {differs} into other tokens than this tokenizer")
        texts = {id: text for text, id in spec["model"]["vocab"].items()}
        kinds, scores = dict.fromkeys(texts, NORMAL), {}
    else:
        fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        fields["tokenizer.ggml.add_space_prefix"] = tokenizer.model.prefix != "never"
        texts, kinds, scores = sentencepiece_tokens(folder, tokenizer, notes)
    enter_added(tokenizer, texts, kinds, scores)
    fields |= token_lists(folder, texts, kinds, scores, rows, notes)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    ids["unknown"] = next((id for id, kind in kinds.items() if kind == UNKNOWN), None)
    if ids["unknown"] is None and tokenizer.names.get("unk_token") in tokenizer.added:
        ids["unknown"] = tokenizer.added[tokenizer.names["unk_token"]].id
    if ids["eos"] is None:
        raise UserError(f"{folder / 'tokenizer_config.json'}: names no eos_token, so nothing would end an answer")
    ends = sorted(tokenizer.stop_ids - {ids["eos"]}, key=lambda id: (texts.get(id) == "<|eom_id|>", id))
    if ends and texts.get(ends[-1]) == "<|eom_id|>":
        ids["eom"] = ends.pop()
    if ends:
        ids["eot"] = ends.pop(0)
    if ends:
        left = ", ".join(repr(texts.get(id, id)) for id in ends)
        notes.append(f"a GGUF file names three tokens that end an answer; {left} may end none where it is served")
    for name, id in ids.items():
        if id is not None and id < rows:
            fields[f"tokenizer.ggml.{name}_token_id"] = id
    fields["tokenizer.ggml.add_bos_token"] = tokenizer.adds_bos and tokenizer.bos_id is not None
    closes = always_writes(spec.get("post_processor"), tokenizer.names.get("eos_token"), -1)
    fields["tokenizer.ggml.add_eos_token"] = config.get("add_eos_token", closes) is True
    phi3 = strips_like_phi3(tokenizer, notes)
    return Vocabulary(fields | chat_templates(folder, config), phi3, notes)


def byte_level_fields(path: Path, spec: dict) -> dict:
    """model, pre and merges of a tokenizer.json that load_tokenizer has taken."""
    found = Words(
        _steps(spec.get("pre_tokenizer")),
        spec.get("normalizer") == {"type": "NFC"},
        spec["model"].get("ignore_merges") is True,
    )
    names = [name for name, words in WORDS.items() if words._replace(bos=False, differs="") == found]
    if not names:
        raise UserError(
            f"{path}: llama.cpp knows ways to cut a text into words by name only, and this one is not among"
            f" {', '.join(WORDS)} ({json.dumps(spec.get('pre_tokenizer'))[:120]})"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": names[0], "tokenizer.ggml.merges": merges}


def _steps(pre_tokenizer: dict) -> list[dict]:
    """A tokenizer.json's pre-tokenizers as `WORDS` writes them; trim_offsets changes no ids."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [BYTE_LEVEL | step | {"trim_offsets": True} if step["type"] == "ByteLevel" else step for step in steps]


def sentencepiece_tokens(
    folder: Path, tokenizer: Tokenizer, notes: list[str]
) -> tuple[dict[int, str], dict[int, int], dict[int, float]]:
    """Text, type and score of each piece by its id. What llama.cpp would cut otherwise is refused, or said."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(tokenizer.model.bare.serialized_model_proto())
    file, of_merges = folder / "tokenizer.model", not (folder / "tokenizer.model").is_file()
    if proto.trainer_spec.model_type != 2:
        raise UserError(f"{file}: its pieces are not merged by scores, as BPE's are; llama.cpp has no such tokenizer")
    if proto.normalizer_spec.precompiled_charsmap or proto.normalizer_spec.remove_extra_whitespaces:
        raise UserError(f"{file}: normalizes texts ({proto.normalizer_spec.name}), which llama.cpp does not do")
    texts = {id: text for text, id in tokenizer.model.vocab.items()}
    kinds = {id: proto.pieces[id].type for id in texts}
    scores = {id: proto.pieces[id].score for id in texts}
    if BYTE not in kinds.values():
        raise UserError(f"{file}: has no tokens for single bytes, which llama.cpp needs")
    added = {token.id for token in tokenizer.added.values()}
    inside = tokenizer.model.prefix == "always" and any(kinds[id] == USER_DEFINED for id in kinds.keys() - added)
    if tokenizer.model.prefix == "first" or inside:
        notes.append("llama.cpp puts a space before the text behind each added token, this tokenizer does not")
    if of_merges:  # what no merge makes is a control piece there; in a file it is a token like others, made last
        unmade = [id for id in texts if kinds[id] == CONTROL and id not in added]
        kinds |= dict.fromkeys(unmade, NORMAL)
        scores |= dict.fromkeys(unmade, min(scores.values()) - 1)
        if unmade:
            few = ", ".join(repr(texts[id]) for id in unmade[:3])
            notes.append(f"no merges make {len(unmade)} of the tokens ({few}); llama.cpp makes them where it can")
    return texts, kinds, scores


def enter_added(tokenizer: Tokenizer, texts: dict[int, str], kinds: dict[int, int], scores: dict[int, float]) -> None:
    """Makes control and user-defined tokens of the added ones; a token found in two forms keeps the first."""
    entered = set()
    for text, token in tokenizer.added.items():
        if token.id not in entered:
            entered.add(token.id)
            texts[token.id] = text
            if kinds.get(token.id) != UNKNOWN:
                kinds[token.id] = CONTROL if token.special else USER_DEFINED
            if scores:
                scores.setdefault(token.id, -1000.0)


def token_lists(folder: Path, texts: dict, kinds: dict, scores: dict, rows: int, notes: list[str]) -> dict:
    """tokens, token_type and scores, one for each row of the embedding."""
    beyond = [texts[id] for id in sorted(texts) if id >= rows]
    if beyond:
        notes.append(f"{len(beyond)} tokens beyond the {rows:,} rows of the embedding are left out, as {beyond[0]!r}")
    tokens = [texts.get(id, f"[PAD{id}]") for id in range(rows)]
    types = [kinds.get(id, UNUSED) for id in range(rows)]
    if scores:  # sentencepiece writes spaces as its own mark, llama.cpp looks for these in the text as it is
        tokens = [text.replace("▁", " ") if kind == USER_DEFINED else text for text, kind in zip(tokens, types)]
    seen: dict[str, int] = {}
    for id, text in enumerate(tokens):
        if text in seen:
            raise UserError(
                f"{folder}: tokens {seen[text]} and {id} are both {text!r}, which llama.cpp can't tell apart"
            )
        seen[text] = id
    lists = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if scores:
        lists["tokenizer.ggml.scores"] = [scores.get(id, -10_000.0) for id in range(rows)]
    return lists


def strips_like_phi3(tokenizer: Tokenizer, notes: list[str]) -> bool:
    """Whether just those added tokens take the space behind them along that llama.cpp thinks of in Phi-3."""
    wanted = {text for text in tokenizer.added if text not in PHI3_BARE}
    flags = {text for text, token in tokenizer.added.items() if token.lstrip or token.rstrip or token.single_word}
    rstrip = {text for text, token in tokenizer.added.items() if token.rstrip}
    if flags == rstrip == wanted and PHI3_BARE | {"</s>"} <= tokenizer.added.keys():
        return True
    if flags:
        notes.append(f"{min(flags)!r} takes the space beside it along; a GGUF file can't say that, llama.cpp leaves it")
    return False


def chat_templates(folder: Path, config: dict) -> dict:
    """The keys of the folder's chat templates: none, one, or several by name."""
    found = config.get("chat_template")
    named = {"default": found} if isinstance(found, str) else {}
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if not named and (folder / "chat_template.json").is_file():
        named = {"default": read_json(folder / "chat_template.json").get("chat_template")}
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[file.stem] = read_text(file)
    if (folder / "chat_template.jinja").is_file():
        named["default"] = read_text(folder / "chat_template.jinja")
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in named.items()):
        raise UserError(f"{folder}: its chat_template is neither a text nor a list of names and texts")
    keys = {}
    for name, text in named.items():
        if text:
            keys["tokenizer.chat_template" + (f".{name}" if name != "default" else "")] = text
    if others := [name for name in named if name != "default" and named[name]]:
        keys["tokenizer.chat_templates"] = others
    return keys
