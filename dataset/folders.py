"""Which files of a folder hold data, and which of them train, validate and test.

A folder may say itself what is to be trained: files or subfolders called train, valid (validation,
val, dev) and test (eval), as mlx-lm and the Hub have them, also train-00000-of-00002.parquet. Then
only those of the part that is asked for are read. A folder without files to validate or test is
read whole.

Some files describe the others and hold no records: dataset_info.json of LLaMA-Factory, which names
files and their columns (`described_file`), and the JSON beside the Arrow files that the library
`datasets` writes with save_to_disk.
"""

import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError, read_json
from common.files import NamedFile
from dataset.readers import ARROW_SUFFIXES, CLASS_NAMES, KNOWN_SUFFIXES, suffix_of

TRAIN, VALIDATION, TEST = "train", "validation", "test"
# What the parts of data are called in the names of files and folders, and in a column.
PART_NAMES = {
    "train": TRAIN, "training": TRAIN,
    "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION, "dev": VALIDATION,
    "development": VALIDATION, "validate": VALIDATION,
    "test": TEST, "testing": TEST, "eval": TEST, "evaluation": TEST, "holdout": TEST,
    "heldout": TEST, "trainset": TRAIN, "traindata": TRAIN, "devset": VALIDATION,
    "valset": VALIDATION, "testset": TEST, "testdata": TEST, "evalset": TEST, "trn": TRAIN, "tst": TEST,
}  # fmt: skip
# Which part is read where one of these is asked for: the first that is there.
PREFERRED = {TRAIN: (TRAIN,), VALIDATION: (VALIDATION, TEST), TEST: (TEST, VALIDATION)}
# Columns that may hold the part to which a record belongs.
PART_COLUMNS = frozenset(
    ("split", "_split", "data_split", "dataset_split", "split_name", "partition", "subset", "set")
)
# Columns that are true for records of a part. Not is_valid, which says that a record is sound.
PART_SWITCHES = {
    "is_train": TRAIN, "is_training": TRAIN, "in_train": TRAIN,
    "is_validation": VALIDATION, "is_val": VALIDATION, "is_dev": VALIDATION,
    "is_test": TEST, "is_eval": TEST, "is_holdout": TEST, "is_heldout": TEST,
}  # fmt: skip
DESCRIPTION = "dataset_info.json"  # of LLaMA-Factory, and of the library `datasets`
# Names of files beside data that hold no records.
NO_RECORDS = (DESCRIPTION, "dataset_infos.json", "dataset_dict.json")
# Where LLaMA-Factory's entries find their data; only file_name is on this machine.
PLACES = (
    "file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name",
)  # fmt: skip


@dataclass
class Listing:
    """The files that are to be read of a folder.

    num_others: how many of its files are of no known kind.
    part: which part of the data they are; None if the folder has no parts.
    files_of_parts: the files of every part; "" for those that belong to none.
    rename: of data that a dataset_info.json describes: makes a record of a known format of one.
    description: that entry, and None without.
    """

    paths: list[Path]
    num_others: int = 0
    part: str | None = None
    files_of_parts: dict[str, list[Path]] = field(default_factory=dict)
    rename: Callable[[dict], dict] | None = None
    description: dict | None = None

    def note(self, folder: Path | str) -> str:
        """Returns what is said about the parts, "" for data without parts: e.g. "train: train.jsonl;
        not read here: valid.jsonl (validation), test.jsonl (test)"."""
        if self.part is None:
            return ""
        is_read = ""
        others = []
        for part in (TRAIN, VALIDATION, TEST, ""):
            paths = self.files_of_parts.get(part, [])
            names = [os.path.relpath(path, folder) for path in paths[:3]]
            if len(paths) > 3:
                names.append(f"{len(paths) - 3:,} more")
            listed = ", ".join(names)
            if paths and paths == self.paths:
                is_read = f"{part or 'of no part'}: {listed}"
            elif paths:
                others.append(f"{listed} ({part or 'of no part'})")
        if not others:
            return is_read
        return f"{is_read}; not read here: {', '.join(others)}"


@dataclass(frozen=True)
class Fetched:
    """Data that lie elsewhere, of which a copy is on this disk now. As a text, it is their name.

    name: as the user typed it, without its secrets.
    root: the copy: a file, or the folder in which the files of `listing` lie.
    listing: the files that are to be read. Of those of other parts the copies may be missing.
    reads_all: records are read whatever a column of theirs says about their part, since the user
        has named the part.
    """

    name: str
    root: Path
    listing: Listing
    reads_all: bool = False

    def __str__(self) -> str:
        return self.name

    def files(self) -> list[NamedFile]:
        """Returns the files that are to be read, each with the name that messages call it by."""
        if self.root.is_file():
            return [NamedFile(self.root, self.name)]
        start = self.name.rstrip("/")
        files = []
        for path in self.listing.paths:
            files.append(NamedFile(path, f"{start}/{path.relative_to(self.root).as_posix()}"))
        return files


def list_parts(path: Path, part: str) -> Listing:
    """Returns the files of a folder and its subfolders that are to be read, in the order of their
    names.

    part: TRAIN, VALIDATION or TEST: what is asked for, if the folder has parts.
    Raises UserError if no file is of a known kind or of this part.
    """
    description = path / DESCRIPTION
    if description.is_file():
        entries = llama_factory_entries(description)
        if entries:
            return described_file(path, entries)
    paths, num_others = data_files(path)
    if not paths:
        kinds = f"{', '.join(KNOWN_SUFFIXES)}, each also with .gz or .zst"
        raise UserError(f"{path}: holds no file of a known kind ({kinds})")

    return choose_part(path, path, paths, num_others, part)


def choose_part(
    name: Path | str, folder: Path, paths: list[Path], num_others: int, part: str
) -> Listing:
    """Returns which of a folder's files are to be read. They need not be on this disk.

    name: of the folder, for messages.
    paths, num_others: what `data_files` returns.
    part: TRAIN, VALIDATION or TEST: what is asked for, if the folder has parts.
    Raises UserError if no file is of this part.
    """
    files_of_parts: dict[str, list[Path]] = {}
    for file in paths:
        own_part = part_of_file(file.relative_to(folder)) or ""
        files_of_parts.setdefault(own_part, []).append(file)
    if VALIDATION not in files_of_parts and TEST not in files_of_parts:
        return Listing(paths, num_others)
    choices = PREFERRED[part]
    if part == TRAIN:
        # Files that belong to no part are trained if none is called after the training.
        choices = (TRAIN, "")
    for choice in choices:
        if choice in files_of_parts:
            return Listing(files_of_parts[choice], num_others, part, files_of_parts)
    there = ", ".join(each for each in files_of_parts if each)
    raise UserError(f"{name}: holds no files to be read as {part} ({there} alone); name the files")


def data_files(path: Path) -> tuple[list[Path], int]:
    """Returns the files of a folder and its subfolders that are of a known kind and hold records,
    and the number of all others."""
    paths = []
    num_others = 0
    visited = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        # os.walk goes on into what is left in this list, in its order.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # A symbolic link may lead back to a folder that was visited already.
        real_folder = os.path.realpath(folder)
        if real_folder in visited:
            folders[:] = []
            continue
        visited.add(real_folder)
        names = sorted(name for name in names if not name.startswith("."))
        holding = [name for name in names if holds_records(name, names)]
        paths += [Path(folder, name) for name in holding]
        num_others += len(names) - len(holding)
    return paths, num_others


def holds_records(name: str, names: Collection[str]) -> bool:
    """True if a file is of a known kind and holds records, by its name. names: of all files of its
    folder."""
    is_documentation = name.upper().startswith(("README", "LICENSE", "LICENCE"))
    is_class_names = name == CLASS_NAMES and has_suffix(names, (".csv", ".tsv"))
    is_state = name == "state.json" and has_suffix(names, ARROW_SUFFIXES)
    # What the library `datasets` has computed and kept beside the data.
    is_computed = name.startswith("cache-") and suffix_of(Path(name)) in ARROW_SUFFIXES
    holds_none = is_documentation or is_class_names or is_state or is_computed
    is_known = suffix_of(Path(name)) in KNOWN_SUFFIXES
    return is_known and name not in NO_RECORDS and not holds_none


def has_suffix(names: Collection[str], suffixes: Collection[str]) -> bool:
    """True if one of the names has one of the suffixes, with or without that of a compression."""
    return any(suffix_of(Path(name)) in suffixes for name in names)


def part_of_file(path: Path) -> str | None:
    """Returns the part of the data that a file belongs to by its name, or by the nearest of its
    folders' names; None if no name says so. path: relative to the folder that was given."""
    # Texts have titles, such as test-driven-development.md, where a hyphen joins words.
    is_text = suffix_of(path) in (".txt", ".md")
    separator = r"[._]+" if is_text else r"[\W_]+"
    part = part_of_name(_without_suffixes(path.name), separator)
    for folder in reversed(path.parts[:-1]):
        part = part or part_of_name(folder, r"[\W_]+")
    return part


def _without_suffixes(name: str) -> str:
    """Returns a file's name without the suffixes of its kind and compression."""
    path = Path(name)
    while path.suffix.lower() in (*KNOWN_SUFFIXES, ".gz", ".zst"):
        path = Path(path.stem)
    return path.name


def part_of_name(name: str, separator: str = r"[\W_]+") -> str | None:
    """Returns the part that one of the words of a name says, None if none does, or if two say
    different ones. separator: a pattern of what stands between words."""
    # Parts of a file are numbered: train-00000-of-00002, train1.
    name = re.sub(r"[-._]?\d+([-._]of[-._]\d+)?$", "", name.lower())
    words = [word.rstrip("0123456789") for word in re.split(separator, name)]
    parts = {PART_NAMES[word] for word in words if word in PART_NAMES}
    return parts.pop() if len(parts) == 1 else None


def part_of_record(record: dict) -> str | None:
    """Returns the part of the data that a record's own column says, e.g. {"split": "train"} or
    {"is_test": true}."""
    others = None
    for column, value in record.items():
        name = str(column).lower()
        if name in PART_COLUMNS and isinstance(value, str) and len(value) < 40:
            part = part_of_name(value)
            if part:
                return part
        if name in PART_SWITCHES and str(value).lower() in ("1", "true", "yes", "1.0"):
            return PART_SWITCHES[name]
        if name in PART_SWITCHES and str(value).lower() in ("0", "false", "no", "0.0"):
            # What is not of the training was held out of it, and the other way round.
            others = TEST if PART_SWITCHES[name] == TRAIN else others or TRAIN
    return others


def says_part(column: object) -> bool:
    """True if a column may say to which part of the data a record belongs."""
    name = str(column).lower()
    return name in PART_COLUMNS or name in PART_SWITCHES


# ---- LLaMA-Factory's description of a folder ----


def llama_factory_entries(file: Path) -> dict[str, dict]:
    """Returns the data sets that LLaMA-Factory's dataset_info.json describes, by their names; none
    if the file is another program's."""
    value = read_json(file, object)
    if not isinstance(value, dict):
        return {}
    entries = {}
    for name, entry in value.items():
        if isinstance(entry, dict) and any(isinstance(entry.get(key), str) for key in PLACES):
            entries[name] = entry
    return entries


def described_file(folder: Path, entries: dict[str, dict]) -> Listing:
    """Returns the file of the only entry of a dataset_info.json whose data are in the folder.

    Raises UserError that lists the files if there are several, or none.
    """
    local = {}
    for name, entry in entries.items():
        file = folder / str(entry.get("file_name"))
        # A folder from somewhere else must not name files outside of it.
        if file.exists() and file.resolve().is_relative_to(folder.resolve()):
            local[name] = entry
    place = f"{folder}: its {DESCRIPTION} is LLaMA-Factory's"
    if not local:
        names = ", ".join(list(entries)[:8])
        raise UserError(f"{place}, and none of the files that it names is there ({names})")
    if len(local) > 1:
        files = ", ".join(str(folder / entry["file_name"]) for entry in list(local.values())[:8])
        raise UserError(f"{place} and describes {len(local)} data sets; name one of {files}")
    ((_, entry),) = local.items()
    path = folder / entry["file_name"]
    paths = [path]
    if path.is_dir():
        paths, _ = data_files(path)

    def rename(record: dict) -> dict:
        return renamed(record, entry)

    return Listing(paths, rename=rename, description=entry)


def renamed(record: dict, entry: dict) -> dict:
    """Returns a record with the names of this program's formats, as an entry of LLaMA-Factory's
    dataset_info.json describes its columns and its messages' tags."""
    columns = entry.get("columns") or {}
    tags = entry.get("tags") or {}
    has_messages = entry.get("formatting") in ("sharegpt", "openai")
    table = {"system": "system", "tools": "tools", "history": "history", "images": "images"}
    table |= {"videos": "videos", "audios": "audios", "chosen": "chosen", "rejected": "rejected"}
    table["kto_tag"] = "label"
    if has_messages:
        table["messages"] = "conversations"
    elif entry.get("ranking"):
        table |= {"prompt": "prompt"}
    else:
        table |= {"prompt": "instruction", "query": "input", "response": "output"}
    result = dict(record)
    for column, name in table.items():
        theirs = columns.get(column)
        if isinstance(theirs, str) and theirs in record and theirs != name:
            result.pop(theirs, None)
            result[name] = record[theirs]
    if entry.get("ranking") and not has_messages:
        query = record.get(columns.get("query", ""))
        if isinstance(query, str) and query and isinstance(result.get("prompt"), str):
            result["prompt"] += "\n\n" + query
            result.pop(columns["query"], None)
    if tags:
        for key in ("conversations", "chosen", "rejected"):
            if isinstance(result.get(key), list):
                result[key] = [retagged(message, tags) for message in result[key]]
            elif isinstance(result.get(key), dict):
                result[key] = retagged(result[key], tags)
    return result


def retagged(message: object, tags: dict) -> object:
    """Returns a message as {"role", "content"}. tags: of LLaMA-Factory's dataset_info.json."""
    role_tag = tags.get("role_tag", "from")
    content_tag = tags.get("content_tag", "value")
    if not isinstance(message, dict) or role_tag not in message or content_tag not in message:
        return message
    roles = {
        tags.get("user_tag", "human"): "user",
        tags.get("assistant_tag", "gpt"): "assistant",
        tags.get("observation_tag", "observation"): "tool",
        tags.get("function_tag", "function_call"): "function_call",
        tags.get("system_tag", "system"): "system",
    }
    result = {key: value for key, value in message.items() if key not in (role_tag, content_tag)}
    role = message[role_tag]
    result["role"] = roles.get(role, role) if isinstance(role, str) else role
    result["content"] = message[content_tag]
    return result
