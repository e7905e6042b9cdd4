"""A model by its name on the Hugging Face Hub: `org/model`, or `org/model@revision` for a branch, tag or commit.

What is fetched is what a model folder needs: config and tokenizer files, and the weights as safetensors, which are one
file or the shards that the index names. Never pickles, which can run code; nor GGUF, ONNX, or a second copy of the
weights in a folder of the repository. The work is huggingface_hub's: its cache (also that of transformers), its token,
and HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE as everywhere. A connection that breaks is taken up where it was,
a run that was killed keeps the files that it had finished. Where the Hub can't be reached, the copy in the cache is
used, and said.
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
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SECONDS = 10  # until the Hub counts as out of reach
LEFT_FREE = 100 << 20  # bytes of the disk that a fetch leaves alone


def fetch(name: str, print_fn: Callable = print_stderr) -> Path:
    """The folder of the Hub's model of that name, in huggingface_hub's cache, fetched as far as it is not there yet.

    name: as NAME has it. say: called with a line before anything large is fetched, or when the cache has to do.
    Raises UserError where there is no such model, no leave to see it, no safetensors in it, no room, or no network.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    repo, revision = HUB_NAME.fullmatch(name).groups()
    try:
        return online(repo, revision, print_fn)
    except OfflineModeIsEnabled:
        return cached(repo, revision, "HF_HUB_OFFLINE is set", print_fn)
    except HfHubHTTPError as error:
        if error.response.status_code >= 500:
            return cached(
                repo, revision, f"{constants.ENDPOINT} has a fault (HTTP {error.response.status_code})", print_fn
            )
        raise UserError(f"{name}: {refusal(error, repo, revision)}") from None
    except HTTPError as error:  # no connection, or none that lasts
        return cached(repo, revision, f"{constants.ENDPOINT} can't be reached ({first_line(error)})", print_fn)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{name}: no room left in {constants.HF_HUB_CACHE}; make some, or set HF_HOME") from None
        raise UserError(f"{name}: the fetch broke off ({first_line(error)}); run it again to go on") from None


def online(repo: str, revision: str | None, print_fn: Callable) -> Path:
    """The folder, with what the Hub has to say about it; its errors as they come."""
    from huggingface_hub import constants

    commit, files = listing(repo, revision)
    if "config.json" not in files or not {ONE_FILE, INDEX} & files.keys():
        raise UserError(f"{repo}: {no_model(files)}")
    folder = download(repo, "config.json", revision).parent  # by the revision's name: the cache notes its commit
    if folder.name != commit:
        raise UserError(f"{repo}: it was changed while it was being fetched; run it again")
    wanted = [name for name in files if name in TEXT_FILES or TEMPLATE.fullmatch(name)]
    if ONE_FILE in files:
        wanted.append(ONE_FILE)
    else:
        shards = shard_names(download(repo, INDEX, commit))
        if missing := [name for name in shards if name not in files]:
            raise UserError(f"{repo}: its index names {abbreviate(missing)}, which it does not hold")
        wanted += [INDEX, *shards]
    missing = [name for name in wanted if not in_cache(folder, files[name])]
    size, what = sum(files[name].size for name in missing), f"{repo}, commit {commit[:12]}"
    if not missing:
        print_fn(f"{what}, is in the cache")
    else:
        room = shutil.disk_usage(folder).free - LEFT_FREE
        if size > room:
            free = f"{max(room, 0) / 1e9:.1f} GB are free in {constants.HF_HUB_CACHE}"
            raise UserError(f"{repo}: {size / 1e9:.1f} GB are to be fetched, {free}; make room, or set HF_HOME")
        count = f"{len(missing)} of {len(wanted)} files, {size / 1e6:,.1f} MB"
        print_fn(f"fetching {what}, from {constants.ENDPOINT}: {count}")
    with tqdm(total=size, unit="B", unit_scale=True, desc=repo, disable=None if missing else True) as bar:
        for name in wanted:  # the weights last: where they are whole, all is
            download(repo, name, commit, bar)
    return folder


def download(repo: str, name: str, revision: str | None, bar: tqdm | None = None) -> Path:
    """One file, in the cache; the bar goes on by its bytes."""
    from huggingface_hub import hf_hub_download

    class Part:
        """What huggingface_hub takes for the file's own bar."""

        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def update(self, bytes: int = 1):
            if bar is not None:
                bar.update(bytes)

        def nothing(self, *_, **__):
            pass

        __exit__ = close = set_postfix_str = update_transfer = set_transfer_postfix_str = nothing

    return Path(hf_hub_download(repo, name, revision=revision, etag_timeout=SECONDS, tqdm_class=Part))


def listing(repo: str, revision: str | None) -> tuple[str, dict]:
    """The commit that a revision is, and its files by name, each with size and hash. UserError where what answers is no
    Hub: a proxy's page, or another server."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=SECONDS)
        files = {file.rfilename: file for file in info.siblings}
        if re.fullmatch("[0-9a-f]{40}", info.sha) and all(isinstance(file.size, int) for file in info.siblings):
            return info.sha, files
        error = ValueError("no commit, or no sizes of files")
    except HFValidationError:
        raise UserError(f"{repo}: no such folder, and no possible name on the Hub") from None
    except HfHubHTTPError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as problem:  # no JSON, or JSON of another kind
        error = problem
    answer = f"{constants.ENDPOINT} does not answer as a Hub does ({first_line(error)})"
    raise UserError(f"{repo}: {answer}; is HF_ENDPOINT right?")


def in_cache(folder: Path, file) -> bool:
    """Whether a file is there, if only under another commit: the cache keeps contents by their hash, and a folder of
    links for each commit."""
    content = file.lfs.sha256 if file.lfs else file.blob_id
    return (folder / file.rfilename).exists() or (folder.parents[1] / "blobs" / content).exists()


def cached(repo: str, revision: str | None, why: str, print_fn: Callable) -> Path:
    """The folder without the Hub, `why` being the reason; UserError where the cache does not have all of it."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = repo if revision is None else f"{repo}@{revision}"
    try:
        folder = Path(hf_hub_download(repo, "config.json", revision=revision, local_files_only=True)).parent
        weight_files(folder)
    except LocalEntryNotFoundError:
        raise UserError(f"{name}: no such folder; {why}, and it is not in the cache {constants.HF_HUB_CACHE}") from None
    except UserError:
        raise UserError(f"{name}: {why}, and not all of it is in the cache; fetch the rest when it can be") from None
    print_fn(f"{name}: {why}; taking the copy in the cache, commit {folder.name[:12]}")
    return folder


def refusal(error, repo: str, revision: str | None) -> str:
    """What the Hub's refusal (HTTP 4xx) means and what to do. It does not tell strangers whether a private model is
    there: to who is not logged in, both that and a missing one are 401."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    code, page = error.response.status_code, f"{constants.ENDPOINT}/{repo}"
    log_in = "`hf auth login` or HF_TOKEN" + (" (the token in use does not do)" if get_token() else "")
    if isinstance(error, GatedRepoError):
        return f"is gated: ask for access at {page}, then log in by {log_in}"
    if isinstance(error, RevisionNotFoundError):
        return f"{page} has no revision {revision}"
    if code in (401, 403):
        return f"no such folder, and {page} is missing or private (HTTP {code}); if private, log in by {log_in}"
    if code == 404:
        return f"no such folder, and no such model at {constants.ENDPOINT} either"
    return f"{constants.ENDPOINT} refused (HTTP {code}: {first_line(error)})"


def no_model(files) -> str:
    """What a repository is that holds no model which can be loaded here."""

    def some(*endings: str) -> list[str]:
        return [name for name in files if name.endswith(endings)]

    if "adapter_config.json" in files and "config.json" not in files:
        return "is an adapter, not a model"
    if some(".gguf") and not some(".safetensors", ".bin"):
        return f"holds GGUF files only; fetch one ({abbreviate(some('.gguf'))}) and give the file as --model"
    if "config.json" not in files:
        return "no config.json in it, so it is no model that can be loaded here"
    if pickles := some(".bin", ".pt", ".pth"):
        what = f"its weights are pickles ({pickles[0]})"
        return f"{what}, which can run code when loaded and are not fetched; look for a revision with safetensors"
    return f"neither {ONE_FILE} nor {INDEX} in it"
