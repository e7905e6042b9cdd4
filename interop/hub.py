"""A model by its name on the Hugging Face Hub: `org/model`, or `org/model@revision` for a branch,
tag or commit.

What is fetched is what a model folder needs: config and tokenizer files, and the weights as
safetensors, which are one file or the shards that the index names. Never fetched are pickles, which
can run code, nor GGUF, ONNX, or a second copy of the weights in a folder of the repository.

huggingface_hub does the work, with its cache (which transformers uses as well), its token, and
HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE as everywhere. A broken connection resumes at the
byte where it broke, and a run that was killed keeps the files that it had finished. Where the Hub
can't be reached, the copy in the cache is used, and a line says so.
"""

import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from checkpoint import TEMPLATES, TOKENIZER_FILES, abbreviate, shard_names, weight_files
from common.console import print_stderr
from common.errors import UserError, first_line
from common.files import HUB_NAME

TEXT_FILES = ("config.json", *TOKENIZER_FILES)
TEMPLATE = re.compile(rf"{TEMPLATES}/[\w-]+\.jinja", re.ASCII)
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files
TIMEOUT_SECONDS = 10  # without an answer, after which the Hub counts as out of reach
LEFT_FREE = 100 << 20  # bytes of the disk that a fetch does not fill


def fetch(name: str, print_fn: Callable = print_stderr) -> Path:
    """Fetches the files of a model that are not in huggingface_hub's cache yet, and returns the
    model's folder there.

    name: `org/model` or `org/model@revision`, as HUB_NAME has it.
    print_fn: is called with a line before anything large is fetched, and where the copy in the
    cache is used instead.
    Raises UserError where there is no such model, no permission to read it, no safetensors in it,
    no room on the disk, or no network.
    """
    match = HUB_NAME.fullmatch(name)
    assert match is not None  # resolve.model_folder asks for such names only
    repo, revision = match.groups()
    return online_or_cached(
        name,
        lambda: fetch_online(repo, revision, print_fn),
        lambda reason: find_cached(repo, revision, reason, print_fn),
        lambda error: explain_refusal(error, repo, revision),
    )


def online_or_cached(name: str, online: Callable, cached: Callable, explain: Callable):
    """Returns online(), or cached(reason) where the Hub can't be reached.

    explain: from a refusal of the Hub to what it means.
    Raises UserError, which begins with the name, for all that goes wrong with the Hub.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        return online()
    except OfflineModeIsEnabled:
        return cached("HF_HUB_OFFLINE is set")
    except HfHubHTTPError as error:
        status = error.response.status_code
        # From 500 on the fault is the Hub's. Below, it refuses, and the cache must not hide that.
        if status >= 500:
            return cached(f"{constants.ENDPOINT} has a fault (HTTP {status})")
        raise UserError(f"{name}: {explain(error)}") from None
    except HTTPError as error:  # there is no connection, or none that lasts
        return cached(f"{constants.ENDPOINT} can't be reached ({first_line(error)})")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"no room left in {constants.HF_HUB_CACHE}; free some space, or set HF_HOME"
        else:
            problem = f"the fetch broke off ({first_line(error)}); run it again to continue"
        raise UserError(f"{name}: {problem}") from None


def find_commit(repo: str, revision: str) -> Path | None:
    """Returns the folder of a commit in the cache, where all of it is there; else None. Nothing is
    asked of the Hub: a commit does not change.

    revision: 40 hexadecimal digits; None is returned for any other.
    """
    from huggingface_hub import try_to_load_from_cache

    if not re.fullmatch("[0-9a-f]{40}", revision) or not HUB_NAME.fullmatch(repo):
        return None
    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        # The weights are fetched last. A blob that was removed leaves a link to nothing.
        is_whole = all(file.exists() for file in weight_files(folder))
    except UserError:
        return None
    return folder if is_whole else None


def fetch_online(repo: str, revision: str | None, print_fn: Callable) -> Path:
    """Fetches what the Hub lists and the cache lacks, and returns the folder. Errors of
    huggingface_hub pass through.

    The files are fetched one by one, by hf_hub_download. huggingface_hub.snapshot_download would
    fetch them in its own order, so that a run that was killed may leave weights without a
    tokenizer; and where the Hub fails between, it returns a folder that may be incomplete.

    Raises UserError where the repository holds no model that can be loaded, or the disk has no room
    for it.
    """
    from huggingface_hub import constants

    commit, files = list_files(repo, revision)
    if "config.json" not in files or not {ONE_FILE, INDEX} & files.keys():
        raise UserError(f"{repo}: {why_no_model(files)}")
    # This one is asked for by the revision's own name, so that the cache notes which commit the
    # name stands for.
    folder = download(repo, "config.json", revision).parent
    if folder.name != commit:
        raise UserError(f"{repo}: it was changed while it was being fetched; run it again")

    # The weights come last: where they are complete, everything is.
    names = []
    for name in files:
        if name in TEXT_FILES or TEMPLATE.fullmatch(name):
            names.append(name)
    if ONE_FILE in files:
        names.append(ONE_FILE)
    else:
        shards = shard_names(download(repo, INDEX, commit))
        absent = [name for name in shards if name not in files]
        if absent:
            raise UserError(f"{repo}: its index names {abbreviate(absent)}, which it does not hold")
        names += [INDEX, *shards]

    missing = [name for name in names if not is_cached(folder, files[name])]
    size = sum(files[name].size for name in missing)
    title = f"{repo}, commit {commit[:12]}"
    if missing:
        check_room_in_cache(repo, folder, size)
        count = f"{len(missing)} of {len(names)} files"
        megabytes = f"{size / 1e6:,.1f} MB"
        print_fn(f"fetching {title}, from {constants.ENDPOINT}: {count}, {megabytes}")
    else:
        print_fn(f"{title}, is in the cache")

    # None means that the bar is drawn on a terminal only.
    hides_bar = None if missing else True
    with tqdm(total=size, unit="B", unit_scale=True, desc=repo, disable=hides_bar) as bar:
        # Those that are not missing as well: the commit may be new, and lacks its links to them.
        for name in names:
            download(repo, name, commit, bar)
    return folder


def check_room_in_cache(repo: str, folder: Path, size: int) -> None:
    """Raises UserError if fetching `size` bytes would leave less than LEFT_FREE bytes of the
    cache's disk.
    """
    from huggingface_hub import constants

    room = shutil.disk_usage(folder).free - LEFT_FREE
    if size > room:
        room = max(room, 0)
        need = f"{size / 1e9:.1f} GB are to be fetched"
        free = f"{room / 1e9:.1f} GB are free in {constants.HF_HUB_CACHE}"
        raise UserError(f"{repo}: {need}, {free}; free some space, or set HF_HOME")


def download(
    repo: str, name: str, revision: str | None, bar: tqdm | None = None, kind: str = "model"
) -> Path:
    """Fetches one file into the cache and returns its path there.

    bar: advances by the bytes that arrive. kind: of the repository, "model" or "dataset".
    """
    from huggingface_hub import hf_hub_download

    class ForwardToBar:
        """What huggingface_hub takes for a file's own progress bar: it advances the bar of all
        files, and draws nothing."""

        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def update(self, num_bytes: int = 1):
            if bar is not None:
                bar.update(num_bytes)

        def ignore(self, *_, **__):
            pass

        # All else that huggingface_hub calls.
        __exit__ = ignore
        close = ignore
        set_postfix_str = ignore
        update_transfer = ignore
        set_transfer_postfix_str = ignore

    path = hf_hub_download(
        repo,
        name,
        revision=revision,
        repo_type=kind,
        etag_timeout=TIMEOUT_SECONDS,
        tqdm_class=ForwardToBar,
    )
    return Path(path)


def list_files(repo: str, revision: str | None, kind: str = "model") -> tuple[str, dict]:
    """Returns the commit that a revision stands for, and the repository's files by name, each with
    size and hash. kind: of the repository, "model" or "dataset".

    Raises UserError where the answer is not that of a Hub: it comes from a proxy's page, or from
    another server.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError

    try:
        api = HfApi()
        ask = api.dataset_info if kind == "dataset" else api.model_info
        info = ask(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
        files = {file.rfilename: file for file in info.siblings}
        # The commit becomes the name of a folder, so it must be nothing else.
        has_commit = re.fullmatch("[0-9a-f]{40}", info.sha) is not None
        has_sizes = all(isinstance(file.size, int) for file in info.siblings)
        if has_commit and has_sizes:
            return info.sha, files
        problem = "no commit, or no sizes of files"
    except HFValidationError:
        raise UserError(f"{repo}: no such folder, and no possible name on the Hub") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # The answer was no JSON, or JSON of another kind.
        problem = first_line(error)
    answer = f"{constants.ENDPOINT} does not answer as a Hub does ({problem})"
    raise UserError(f"{repo}: {answer}; is HF_ENDPOINT right?")


def is_cached(folder: Path, file) -> bool:
    """True if the cache holds a file's content, under this commit or another one.

    The cache keeps contents by their hash in `blobs`, and for each commit a folder of links to
    them.
    """
    repository = folder.parents[1]  # of models--org--name/snapshots/commit
    content = file.lfs.sha256 if file.lfs else file.blob_id
    is_in_folder = (folder / file.rfilename).exists()
    return is_in_folder or (repository / "blobs" / content).exists()


def find_cached(repo: str, revision: str | None, reason: str, print_fn: Callable) -> Path:
    """Returns the model's folder in the cache, without asking the Hub, and prints the reason for
    that.

    Raises UserError where the cache does not hold the whole model.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = repo if revision is None else f"{repo}@{revision}"
    try:
        config = hf_hub_download(repo, "config.json", revision=revision, local_files_only=True)
        folder = Path(config).parent
        weight_files(folder)
    except LocalEntryNotFoundError:
        problem = f"{reason}, and it is not in the cache {constants.HF_HUB_CACHE}"
        raise UserError(f"{name}: no such folder; {problem}") from None
    except UserError:
        problem = f"{reason}, and not all of it is in the cache"
        raise UserError(f"{name}: {problem}; fetch the rest when the Hub can be reached") from None
    commit = folder.name[:12]
    print_fn(f"{name}: {reason}; using the copy in the cache, commit {commit}")
    return folder


def explain_refusal(error, repo: str, revision: str | None, kind: str = "model") -> str:
    """Returns what a refusal of the Hub (HTTP 4xx) means and what to do about it. kind: of the
    repository, "model" or "dataset".

    The Hub does not tell strangers whether a private model exists: without a login, both a private
    and a missing model are answered with 401.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    status = error.response.status_code
    page = f"{constants.ENDPOINT}/{repo}"
    absent = "no such folder, and "  # a model's name may be meant for a folder of this disk
    if kind == "dataset":
        page = f"{constants.ENDPOINT}/datasets/{repo}"
        absent = ""
    log_in = "`hf auth login` or HF_TOKEN"
    if get_token():
        log_in += " (the present token gives no access)"
    if isinstance(error, GatedRepoError):
        return f"is gated: ask for access at {page}, then log in by {log_in}"
    if isinstance(error, RevisionNotFoundError):
        return f"{page} has no revision {revision}"
    if status in (401, 403):
        problem = f"{absent}{page} is missing or private (HTTP {status})"
        return f"{problem}; if private, log in by {log_in}"
    if status == 404:
        if kind == "dataset":
            return f"no such data set at {constants.ENDPOINT}"
        return f"{absent}no such model at {constants.ENDPOINT} either"
    return f"{constants.ENDPOINT} refused (HTTP {status}: {first_line(error)})"


def why_no_model(files) -> str:
    """Returns why a repository with files of these names holds no model that can be loaded here."""

    def ending_in(*endings: str) -> list[str]:
        return [name for name in files if name.endswith(endings)]

    gguf_files = ending_in(".gguf")
    pickles = ending_in(".bin", ".pt", ".pth")
    if "adapter_config.json" in files and "config.json" not in files:
        return "is an adapter, not a model"
    if gguf_files and not ending_in(".safetensors", ".bin"):
        few = abbreviate(gguf_files)
        return f"holds GGUF files only; fetch one ({few}) and give the file as --model"
    if "config.json" not in files:
        return "no config.json in it, so it is no model that can be loaded here"
    if pickles:
        reason = "which can run code when loaded and are not fetched"
        advice = "look for a revision with safetensors"
        return f"its weights are pickles ({pickles[0]}), {reason}; {advice}"
    return f"neither {ONE_FILE} nor {INDEX} in it"
