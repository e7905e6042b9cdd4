"""A data set by its name on the Hugging Face Hub: hf:org/name[@revision][:subset][:split].

Which files make which split is read from the head of its README (`configs`), and otherwise from the
names of files and folders, as the library `datasets` does it. Only the files of the split that is
asked for are fetched, into huggingface_hub's own cache. A data set that needs a program is not run:
of it, and of formats that are not read here, the Hub's own Parquet copy is taken if there is one.
"""

import functools
import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError, printable
from common.files import atomic_file, reported_full_cache, write_json
from common.remote_names import copy_key
from dataset.folders import (
    PREFERRED,
    TRAIN,
    Fetched,
    Listing,
    holds_records,
    part_of_file,
    part_of_name,
)
from dataset.readers import CLASS_NAMES, KNOWN_SUFFIXES, suffix_of
from interop import hub
from interop.copies import Use, copies_folder, in_bytes, why_read_only

NAME = re.compile(
    r"hf:(?P<repo>[\w-][\w.-]*(/[\w-][\w.-]*)?)(@(?P<revision>[\w-][\w./-]*))?"
    r"(:(?P<subset>[^:]*))?(:(?P<split>[^:]*))?",
    re.ASCII,
)
WANTED = "hf:org/name, hf:org/name:subset or hf:org/name:subset:split is wanted"
README = "README.md"
# Where the Hub keeps copies of data sets, as SUBSET/SPLIT/0000.parquet.
PARQUET_COPY = "refs/convert/parquet"
PARTIAL = "partial-"  # a split's folder there, if the Hub has copied only its beginning
DEFAULT = "default"
# What of a subset's description says which files it has, or nothing about how they are read.
KNOWN_SETTINGS = frozenset(
    ("config_name", "data_files", "data_dir", "default", "description", "version", "features")
)
SHOWN = 12  # names in a message
NOT_ALL = "the cache has not all of it; fetch the rest when the Hub can be reached"


@dataclass
class Subset:
    """A subset of a data set, also called a configuration.

    splits: {name: files of the repository}. is_default: marked as the one that is meant without a
    name. ignored: settings of its description that are not read here. num_others: files of other
    kinds than those of the splits.
    """

    name: str
    splits: dict[str, list[str]]
    is_default: bool = False
    ignored: list[str] = field(default_factory=list)
    num_others: int = 0


@dataclass(frozen=True)
class Repository:
    """A data set's repository at one commit. sizes: {file: bytes}."""

    repo: str
    commit: str
    sizes: dict[str, int]


def fetch_dataset(name: str, part: str, use: Use) -> Fetched:
    """Returns the copies of the files that make a split.

    part: folders.TRAIN, VALIDATION or TEST: decides where the name holds no split.
    Raises UserError where they can't be had and there are no copies.
    """
    match = NAME.fullmatch(name)
    if match is None:
        hint = ""
        if name.startswith("hf://"):
            hint = "; a single file is https://huggingface.co/datasets/org/name/resolve/main/FILE"
        raise UserError(f"{name}: {WANTED}{hint}")
    repo, revision = match["repo"], match["revision"]
    address = f"hf:{repo}@{revision}" if revision else f"hf:{repo}"

    def online() -> Fetched:
        found = list_repository(repo, revision, use)
        return fetch_split(name, match, found, revision, part, use)

    def cached(reason: str) -> Fetched:
        found = saved_repository(repo, revision)
        if found is None:
            raise UserError(f"{name}: {reason}, and the cache has no copy of it")
        if use.asks:
            commit = found.commit[:12]
            use.print_fn(f"NOTE: {name}: {reason}; using the copy in the cache, commit {commit}")
        return fetch_split(name, match, found, revision, part, replace(use, asks=False))

    if not use.asks and saved_repository(repo, revision) is not None:
        return cached("")

    def explain(error) -> str:
        return hub.explain_refusal(error, repo, revision, "dataset")

    return hub.online_or_cached(address, online, cached, explain)


@functools.cache
def list_repository(repo: str, revision: str | None, use: Use) -> Repository:
    """Returns what the Hub holds of a repository, and keeps it for days without a network. It asks
    once a process, so that all splits are of one commit."""
    commit, files = hub.list_files(repo, revision, "dataset")
    # A name must not lead out of the commit's folder.
    sizes = {file: each.size for file, each in files.items() if ".." not in file.split("/")}
    found = Repository(repo, commit, sizes)
    before = saved_repository(repo, revision)
    if before is not None and before.commit != commit:
        old = f"hf:{repo}@{before.commit[:12]}"
        changed = f"hf:{repo}: has changed on the Hub since it was last fetched"
        if use.keeps:
            use.print_fn(f"NOTE: {changed}; this run goes on with {old}")
            return before
        use.print_fn(f"NOTE: {changed}; as it was then, it is {old}")
    file = list_file(repo, revision)
    # The files themselves go to another cache; without this one they can't be found offline.
    if not why_read_only(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        with reported_full_cache(file.parent), atomic_file(file) as tmp:
            write_json({"commit": commit, "sizes": found.sizes}, tmp)
    return found


def list_file(repo: str, revision: str | None) -> Path:
    """Returns the file that keeps what the Hub held when it was last asked."""
    return copies_folder(copy_key(f"hf:{repo}@{revision or ''}")) / ".list"


def saved_repository(repo: str, revision: str | None) -> Repository | None:
    """Returns what the Hub held when it was last asked, None if it never was."""
    try:
        value = json.loads(list_file(repo, revision).read_text(encoding="utf-8"))
        return Repository(repo, value["commit"], value["sizes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- subsets and splits ----


def fetch_split(
    name: str,
    match: re.Match,
    found: Repository,
    revision: str | None,
    part: str,
    use: Use,
) -> Fetched:
    """Fetches the files of a split that the cache lacks, and returns the copies.

    match: of NAME. use: where it does not ask, UserError is raised for a file that is missing.
    """
    subsets, problem = described_subsets(name, found, use)
    if problem:
        subsets, found = parquet_copy(name, found, revision, problem, use)
    subset, split = pick(name, subsets, match["subset"], match["split"])
    if split is not None:
        files = subset.splits[split]
        chosen = split
        listing_files: dict[str, list[str]] = {}
    else:
        chosen, listing_files = split_for(name, subset, part)
        files = subset.splits[chosen]
    title = f"hf:{found.repo}, subset {printable(subset.name)}, split {printable(chosen)}"
    root = fetch_files(name, title, found, with_class_names(files, found), use)
    listing = Listing([root / file for file in files], subset.num_others)
    if len(listing_files) > 1:
        listing.part = part
        listing.files_of_parts = {
            key: [root / file for file in names] for key, names in listing_files.items()
        }
    return Fetched(name, root, listing, reads_all=split is not None)


def described_subsets(name: str, found: Repository, use: Use) -> tuple[list[Subset], str]:
    """Returns the subsets that the README describes, else the one that the names of the files make.

    With them, "", or why there are none that can be read here.
    """
    described = []
    if README in found.sizes:
        if not use.asks and missing_files(found, [README]):
            raise UserError(f"{name}: {NOT_ALL}")
        readme = hub.download(found.repo, README, found.commit, kind="dataset")
        described = read_configs(readme)
    subsets = [subset_of(name, config, found) for config in described]
    for subset in subsets:
        if subset.ignored and use.asks:
            settings = ", ".join(subset.ignored)
            label = printable(subset.name)
            use.print_fn(f"NOTE: {name}: {settings} of the subset {label} is not read here")
    if subsets:
        if any(subset.splits for subset in subsets):
            return subsets, ""
        return [], "holds no file of a known kind"
    script = f"{found.repo.rpartition('/')[2]}.py"
    if script in found.sizes:
        return [], f"needs its program {script}, which is not run"
    splits, num_others = splits_by_names(data_names(found.sizes))
    if not splits:
        return [], "holds no file of a known kind"
    return [Subset(DEFAULT, splits, num_others=num_others)], ""


def read_configs(readme: Path) -> list[dict]:
    """Returns the descriptions of subsets in the head of a README; none where it has no such head."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(readme) or {}
    except (ValueError, yaml.YAMLError):
        # The Hub takes no such file; an old one may be there.
        return []
    configs = metadata.get("configs")
    if not isinstance(configs, list):
        return []
    return [config for config in configs if isinstance(config, dict)]


def subset_of(name: str, config: dict, found: Repository) -> Subset:
    """Returns the subset that an entry of `configs` describes."""
    label = str(config.get("config_name", DEFAULT))
    folder = str(config.get("data_dir") or "").removeprefix("./").strip("/")
    inside = data_names(found.sizes)
    if folder:
        inside = [file for file in inside if file.startswith(folder + "/")]
    ignored = sorted(map(str, config.keys() - KNOWN_SETTINGS))
    patterns = patterns_of_splits(config.get("data_files"))
    if patterns:
        # A description may name files that would not be found by looking.
        every = [file for file in found.sizes if suffix_of(Path(file)) in KNOWN_SUFFIXES]
        splits = {}
        for split, texts in patterns.items():
            files = [file for text in texts for file in matching(name, folder, text, every)]
            if files:
                splits[split] = list(dict.fromkeys(files))
        num_others = 0
    else:
        splits, num_others = splits_by_names(inside, folder)
    return Subset(label, splits, config.get("default") is True, ignored, num_others)


def patterns_of_splits(value: object) -> dict[str, list[str]]:
    """Returns {split: patterns of file names} of what stands under `data_files`: a text, a list of
    texts, a list of {"split", "path"}, or {split: path}."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, dict):
        value = [{"split": split, "path": path} for split, path in value.items()]
    result: dict[str, list[str]] = {}
    for each in value if isinstance(value, list) else []:
        if isinstance(each, str):
            each = {"split": TRAIN, "path": each}
        if not isinstance(each, dict):
            continue
        path = each.get("path")
        paths = path if isinstance(path, list) else [path]
        texts = [text for text in paths if isinstance(text, str)]
        result.setdefault(str(each.get("split", TRAIN)), []).extend(texts)
    return result


def matching(name: str, folder: str, pattern: str, files: list[str]) -> list[str]:
    """Returns the files whose names a pattern of the README fits, in the order of their names.

    folder: to which the pattern belongs. Raises UserError if the pattern leads elsewhere.
    """
    from fsspec.utils import glob_translate

    if "://" in pattern:
        raise UserError(f"{name}: its files are elsewhere, {printable(pattern[:200])}; name those")
    text = pattern.removeprefix("./").lstrip("/")
    if folder:
        text = f"{folder}/{text}"
    try:
        regex = re.compile(glob_translate(text))
    except ValueError as error:
        shown_pattern = printable(pattern[:200])
        raise UserError(f"{name}: its README names files by {shown_pattern}, {error}") from None
    return sorted(file for file in files if regex.fullmatch(file) or file.startswith(f"{text}/"))


def data_names(sizes: dict[str, int]) -> list[str]:
    """Returns the files of a repository that hold records by their names, in their order."""
    names_of_folders: dict[str, list[str]] = {}
    for file in sizes:
        folder, _, name = file.rpartition("/")
        names_of_folders.setdefault(folder, []).append(name)
    result = []
    for file in sorted(sizes):
        folder, _, name = file.rpartition("/")
        is_hidden = any(each.startswith(".") for each in file.split("/"))
        if not is_hidden and holds_records(name, names_of_folders[folder]):
            result.append(file)
    return result


def splits_by_names(files: list[str], folder: str = "") -> tuple[dict[str, list[str]], int]:
    """Returns {split: files} as the names of files and folders say it, and how many files are left
    out: the commonest kind counts, since the same records may be there as another.

    folder: below which names are looked at.
    """
    kinds = Counter(suffix_of(Path(file)) for file in files)
    if not kinds:
        return {}, 0
    # Of equally common ones Parquet, which the Hub itself writes.
    kind = max(kinds, key=lambda each: (kinds[each], each == ".parquet"))
    splits: dict[str, list[str]] = {}
    for file in files:
        if suffix_of(Path(file)) == kind:
            part = part_of_file(Path(file).relative_to(folder)) or ""
            splits.setdefault(part, []).append(file)
    # As in folders of this disk: where files are called after the training, those count.
    rest = splits.pop("", [])
    if rest and TRAIN not in splits:
        splits[TRAIN] = rest
    return splits, len(files) - sum(map(len, splits.values()))


def pick(
    name: str, subsets: list[Subset], subset: str | None, split: str | None
) -> tuple[Subset, str | None]:
    """Returns the subset that is meant, and the split if the name says one.

    subset, split: of the name. A split of the only subset may stand in the subset's place.
    Raises UserError that lists what there is.
    """
    names = [each.name for each in subsets]
    default = next((each for each in subsets if each.is_default), None)
    if default is None and len(subsets) == 1:
        default = subsets[0]
    if default is None:
        default = next((each for each in subsets if each.name == DEFAULT), None)
    chosen = next((each for each in subsets if each.name == subset), None) if subset else default
    if subset and chosen is None and split is None and default and subset in default.splits:
        chosen, split = default, subset
    if chosen is None:
        problem = f"has no subset {printable(subset)}" if subset else "has several subsets"
        raise UserError(f"{name}: {problem}; name one of {few(names)}, as hf:org/name:subset")
    if split and split not in chosen.splits:
        raise UserError(f"{name}: has no split {printable(split)}, but {few(chosen.splits)}")
    if not chosen.splits:
        raise UserError(
            f"{name}: the subset {printable(chosen.name)} has no file that is read here"
        )
    return chosen, split or None


def few(names) -> str:
    """Returns some names for a message, and how many more there are."""
    names = list(names)
    text = ", ".join(printable(each[:60]) for each in names[:SHOWN])
    more = len(names) - SHOWN
    return f"{text} and {more:,} more" if more > 0 else text


def split_for(name: str, subset: Subset, part: str) -> tuple[str, dict[str, list[str]]]:
    """Returns the split that is read as a part, and {part: files} of all splits; "" for those that
    are called as no part, or of which there are several.

    Raises UserError if several splits might be meant, or none.
    """
    candidates: dict[str, list[str]] = {}
    for choice in PREFERRED:
        exact = [split for split in subset.splits if split == choice]
        alike = [split for split in subset.splits if part_of_name(split) == choice]
        candidates[choice] = exact or alike
    chosen = next((candidates[each] for each in PREFERRED[part] if candidates[each]), [])
    if not chosen and len(subset.splits) == 1:
        chosen = list(subset.splits)
    if len(chosen) != 1:
        problem = f"no split is called {part}"
        if chosen:
            problem = f"several splits may be read as {part}"
        there = few(chosen or subset.splits)
        example = f"hf:org/name:{printable(subset.name)}:SPLIT"
        raise UserError(f"{name}: {problem}; name one of {there}, as {example}")
    (split,) = chosen
    files_of_parts: dict[str, list[str]] = {}
    for other, files in subset.splits.items():
        own = part_of_name(other) or ""
        if candidates.get(own) != [other]:
            own = ""
        if other == split:
            own = part if own not in PREFERRED[part] else own
        files_of_parts.setdefault(own, []).extend(files)
    return split, files_of_parts


def parquet_copy(
    name: str,
    found: Repository,
    revision: str | None,
    problem: str,
    use: Use,
) -> tuple[list[Subset], Repository]:
    """Returns the subsets of the Hub's own Parquet copy of a data set, and that copy.

    problem: why it is needed. use: where it does not ask, what was listed earlier is taken.
    Raises UserError if there is none.
    """
    from huggingface_hub.errors import RevisionNotFoundError

    advice = "look for another data set that holds the same as Parquet or JSON files"
    refusal = UserError(f"{name}: {problem}, and the Hub has no Parquet copy of it; {advice}")
    # The Hub copies the main branch only.
    if revision not in (None, "main"):
        raise UserError(f"{name}: {problem}; without @{revision} a Parquet copy may be there")
    if use.asks:
        try:
            copy = list_repository(found.repo, PARQUET_COPY, use)
        except RevisionNotFoundError:
            raise refusal from None
    else:
        saved = saved_repository(found.repo, PARQUET_COPY)
        if saved is None:
            raise refusal
        copy = saved
    splits_of_subsets: dict[str, dict[str, list[str]]] = {}
    for file in sorted(copy.sizes):
        parts = file.split("/")
        if len(parts) == 3 and file.endswith(".parquet"):
            subset, split, _ = parts
            splits = splits_of_subsets.setdefault(subset, {})
            splits.setdefault(split.removeprefix(PARTIAL), []).append(file)
    if not splits_of_subsets:
        raise refusal
    remark = ""
    if any(f"/{PARTIAL}" in file for file in copy.sizes):
        remark = ", which holds only the beginning of large splits"
    if use.asks:
        use.print_fn(f"NOTE: {name}: {problem}; reading the Hub's Parquet copy{remark}")
    return [Subset(subset, splits) for subset, splits in splits_of_subsets.items()], copy


# ---- files ----


def with_class_names(files: list[str], found: Repository) -> list[str]:
    """Returns files, and the names of classes that lie beside their tables."""
    result = list(files)
    for file in files:
        beside = f"{file.rpartition('/')[0]}/{CLASS_NAMES}".lstrip("/")
        is_table = suffix_of(Path(file)) in (".csv", ".tsv")
        if is_table and beside in found.sizes and beside not in result:
            result.append(beside)
    return result


def missing_files(found: Repository, files: list[str]) -> list[str]:
    """Returns those of a repository's files that the cache lacks."""
    from huggingface_hub import try_to_load_from_cache

    missing = []
    for file in files:
        path = try_to_load_from_cache(found.repo, file, revision=found.commit, repo_type="dataset")
        if not isinstance(path, str):
            missing.append(file)
    return missing


def fetch_files(
    name: str,
    title: str,
    found: Repository,
    files: list[str],
    use: Use,
) -> Path:
    """Fetches files that the cache lacks, and returns the folder of the commit there.

    use: where it does not ask, UserError is raised for a file that is missing.
    """
    from huggingface_hub import constants

    missing = missing_files(found, files)
    title = f"{title}, commit {found.commit[:12]}"
    if missing and not use.asks:
        raise UserError(f"{name}: {NOT_ALL}")
    size = sum(found.sizes[file] for file in missing)
    if missing:
        home = Path(constants.HF_HUB_CACHE)
        home.mkdir(parents=True, exist_ok=True)
        hub.check_room_in_cache(name, home, size)
        count = f"{len(missing):,} of {len(files):,} files, {in_bytes(size)}"
        use.print_fn(f"fetching {title}, from {constants.ENDPOINT}: {count}")
    elif use.asks:
        use.print_fn(f"{title}, is in the cache")
    folder = Path()
    hides_bar = None if missing else True
    with tqdm(total=size, unit="B", unit_scale=True, desc=name[-40:], disable=hides_bar) as bar:
        for file in files:
            path = hub.download(found.repo, file, found.commit, bar, kind="dataset")
            folder = path.parents[file.count("/")]
    return folder
