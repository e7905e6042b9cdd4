"""New tokens: from a file of texts to a tokenizer that knows them (--add-tokens), and to the ids whose
rows of the embedding table are trained (--train-tokens).

A new token is found wherever its text stands, whatever is around it, and is no special one: it is shown
in answers. Its id is the next that is free. Many tables have more rows than their tokenizer has tokens,
and then it takes one of these; else the table grows.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from checkpoint import TOKENIZER_FILES, copy_tokenizer
from common.choices import ADDED_TOKENS
from common.errors import UserError, printable, read_json_if_there, read_text
from common.files import (
    atomic_folder,
    cache_folder,
    check_cache_takes_files,
    reported_full_cache,
    write_json,
)
from families import Config
from tokenizer import Tokenizer, load_tokenizer

TOKEN_FILE_BYTES = 4 << 20
MOST_TOKENS = 100_000


class NewTokens(NamedTuple):
    """Tokens that a tokenizer gets.

    texts: in the order of their ids.
    first_id: the id of the first; the others follow.
    parts: of each, the ids that its text had before.
    """

    texts: tuple[str, ...]
    first_id: int
    parts: tuple[tuple[int, ...], ...]

    @property
    def ids(self) -> range:
        return range(self.first_id, self.first_id + len(self.texts))


def file_of_new_tokens(settings) -> Path | None:
    """Returns the file that a run's new tokens are read from: that of --add-tokens; once the run is
    resumed the copy in its own folder, which nobody changes. None where none are added."""
    if not settings.add_tokens:
        return None
    if settings.resume and settings.out:
        kept = Path(settings.out) / ADDED_TOKENS
        if kept.is_file():
            return kept
    return Path(settings.add_tokens)


def read_token_texts(file: Path) -> tuple[str, ...]:
    """Reads a file of new tokens, one on each line; empty lines count for nothing.

    Raises UserError, with the line, where one stands twice, or begins or ends with white space.
    """
    if file.suffix.lower() in (".json", ".jsonl", ".csv"):
        raise UserError(f"--add-tokens {file}: a text file is wanted, with one token on each line")
    if not file.is_file():
        problem = "is a folder" if file.is_dir() else "no such file"
        raise UserError(f"--add-tokens {file}: {problem}; a text file is wanted")
    first_line: dict[str, int] = {}
    for number, text in enumerate(read_text(file, TOKEN_FILE_BYTES).split("\n"), 1):
        if not text.strip():
            continue
        where = f"--add-tokens {file}: line {number}: {printable(text[:60])!r}"
        if text != text.strip():
            raise UserError(f"{where} begins or ends with white space; write the token alone")
        if text in first_line:
            raise UserError(f"{where} stands in line {first_line[text]} already")
        first_line[text] = number
    if not first_line:
        raise UserError(f"--add-tokens {file}: there is no token in it; write one on each line")
    if len(first_line) > MOST_TOKENS:
        raise UserError(
            f"--add-tokens {file}: {len(first_line):,} tokens, at most {MOST_TOKENS:,} are added"
        )
    return tuple(first_line)


def new_tokens_of(settings, folder: Path) -> NewTokens | None:
    """Returns the tokens that a run adds to the tokenizer of its base; None where it adds none.

    folder: of the base.
    Raises UserError where the file can't be read, or a token is there already.
    """
    file = file_of_new_tokens(settings)
    if file is None:
        return None
    return find_new_tokens(Path(folder), file, read_token_texts(file))


def check_room_for_tokens(tokens: NewTokens | None, config: Config, quant: str | None) -> None:
    """Raises UserError if tokens need rows of an output head that is in 4 bits. quant: of the base."""
    if tokens is not None and quant == "nf4+head" and tokens.ids.stop > config.vocab_size:
        raise UserError(
            "--add-tokens: an output head in 4 bits can't get more rows; take --quant nf4 in place of"
            " nf4+head"
        )


@functools.lru_cache(maxsize=1)
def find_new_tokens(folder: Path, file: Path, texts: tuple[str, ...]) -> NewTokens:
    """Returns texts as new tokens of a folder's tokenizer. file: for messages.

    Raises UserError for a text that is a token already.
    """
    tokenizer = load_tokenizer(folder)
    parts = []
    for text in texts:
        known = id_of_token(tokenizer, text)
        if known is not None:
            raise UserError(
                f"--add-tokens {file}: {printable(text[:60])!r} is a token already, id {known}; take it"
                " out of the file (--train-tokens trains the row of one that is there)"
            )
        parts.append(tuple(tokenizer.encode(text)))
    return NewTokens(texts, tokenizer.vocab_size, tuple(parts))


def id_of_token(tokenizer: Tokenizer, text: str) -> int | None:
    """Returns the id of the token with this text; None where there is none."""
    if text in tokenizer.added:
        return tokenizer.added[text].id
    ids = tokenizer.encode(text)
    if len(ids) == 1 and tokenizer.decode(ids) == text:
        return ids[0]
    # One that no text contains, as of an unused place.
    return tokenizer.model.vocab.get(text)


def ids_of_tokens(settings, folder: Path) -> list[int]:
    """Returns the ids of --train-tokens, in their order. folder: of the base.

    Raises UserError for a text that is no token.
    """
    if not settings.train_tokens:
        return []
    tokenizer = load_tokenizer(Path(folder))
    ids = []
    for text in settings.train_tokens.split(","):
        if text != text.strip() or not text:
            raise UserError(
                f"--train-tokens {settings.train_tokens}: {text[:60]!r} begins or ends with white space, or"
                " is empty; write TOKEN,TOKEN"
            )
        id = id_of_token(tokenizer, text)
        if id is None:
            raise UserError(
                f"--train-tokens {settings.train_tokens}: {printable(text[:60])!r} is no token of"
                f" {folder}; --add-tokens adds one"
            )
        if id in ids:
            raise UserError(
                f"--train-tokens {settings.train_tokens}: {printable(text[:60])!r} is named twice"
            )
        ids.append(id)
    return ids


def check_unchanged(settings, folder: Path, tokenizer: Tokenizer) -> NewTokens | None:
    """Returns the tokens that a run adds, for keep_new_tokens. Raises UserError if their file has changed
    since the run's tokenizer was made. folder: of the base."""
    tokens = new_tokens_of(settings, folder)
    if tokens is not None and tokenizer.source != extended_tokenizer(folder, tokens):
        raise UserError(f"--add-tokens {settings.add_tokens}: has changed while the run began")
    return tokens


def keep_new_tokens(tokens: NewTokens | None, out: Path) -> None:
    """Writes the tokens that a run adds into its folder, for a resume."""
    if tokens is not None and not (out / ADDED_TOKENS).is_file():
        text = "".join(f"{text}\n" for text in tokens.texts)
        (out / ADDED_TOKENS).write_text(text, encoding="utf-8")


# ---- the tokenizer's files ----


def folder_of_new_tokens(settings, folder: Path) -> Path | None:
    """Returns a folder with the tokenizer of a run that adds tokens to that of its base; None where it
    adds none. folder: of the base."""
    tokens = new_tokens_of(settings, folder)
    return None if tokens is None else extended_tokenizer(folder, tokens)


def extended_tokenizer(folder: Path, tokens: NewTokens) -> Path:
    """Returns a folder in the cache with the tokenizer of a folder and its new tokens: a copy of its
    files, for load_tokenizer and for final/. folder: of the base."""
    digest = hashlib.sha256(json.dumps(tokens).encode())
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    cache = cache_folder()
    place = cache / "tokenizers" / digest.hexdigest()[:32]
    if place.is_dir():
        return place
    check_cache_takes_files(cache)
    with reported_full_cache(cache), atomic_folder(place, replace=True) as tmp:
        copy_tokenizer(folder, tmp)
        write_new_tokens(tmp, tokens)
    return place


def write_new_tokens(folder: Path, tokens: NewTokens) -> None:
    """Adds tokens to the files of a tokenizer: to tokenizer.json, and to whichever of the older lists
    there are; without tokenizer.json to added_tokens.json, which belongs to those older ones."""
    spec_file = folder / "tokenizer.json"
    spec = read_json_if_there(spec_file)
    if spec:
        spec["added_tokens"] = list(spec.get("added_tokens") or [])
        for id, text in zip(tokens.ids, tokens.texts, strict=True):
            spec["added_tokens"].append({"id": id} | added_token(text))
        write_json(spec, spec_file)
    config_file = folder / "tokenizer_config.json"
    config = read_json_if_there(config_file)
    if config.get("added_tokens_decoder"):
        for id, text in zip(tokens.ids, tokens.texts, strict=True):
            config["added_tokens_decoder"][str(id)] = added_token(text)
        write_json(config, config_file)
    older_file = folder / "added_tokens.json"
    if older_file.is_file() or not spec:
        known = read_json_if_there(older_file)
        write_json(known | dict(zip(tokens.texts, tokens.ids, strict=True)), older_file)


def added_token(text: str) -> dict:
    """Returns a new token as the `tokenizers` library describes it."""
    return {
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
