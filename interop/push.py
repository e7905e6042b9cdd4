"""A result on the Hugging Face Hub: a model or adapter folder becomes a repository `org/name`.

huggingface_hub does the work, with its token (`hf auth login`, HF_TOKEN) and HF_ENDPOINT as
everywhere. A new repository is private, since a public one can't be taken back: who has fetched it
has it. Of a repository that is there already, files of the same names are replaced, and weights that
the folder does not have are removed, so that what is loaded is what was pushed; its history keeps
them.

`check_can_push` is for the beginning of a run, and takes seconds, so that no hours are lost to a
token that may not write; `make_repository` for the moment at which the training begins.
"""

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import UserError, first_line, printable, read_json
from common.files import HUB_NAME
from interop.hub import TIMEOUT_SECONDS

# What says which weights a repository holds. Where the pushed folder has no such file, the
# repository must not have one either: an adapter's would be put on a model's.
WEIGHT_PATTERNS = [
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter.safetensors",
]
# A folder is pushed if it holds one of these.
CONFIG_FILES = ("config.json", "adapter_config.json")


def check_can_push(name: str, print_fn: Callable[[str], None] = print) -> None:
    """Makes sure that there is a Hub, and a token that may write to a repository of this name.

    name: `org/name`.
    print_fn: is called with a line that says where the result will be, and who can see it.
    Raises UserError where there is no token, one that may not write, or no network.
    """
    with reported_refusal(name):
        is_there, is_private = find_repository(name)
    state = "which is there already" if is_there else "a new repository"
    seen_by = "private" if is_private else "PUBLIC"
    print_fn(f"push      after the run to {page_of(name)}, {state}; it is {seen_by}")


def make_repository(name: str) -> None:
    """Makes a private repository, unless there is one of this name, which stays as it is.

    Raises UserError where that is refused.
    """
    with reported_refusal(name):
        if not find_repository(name)[0]:
            create_private(name)


def find_repository(name: str) -> tuple[bool, bool]:
    """Returns whether a repository is there, and whether it is private, as a new one will be. Errors
    of huggingface_hub pass through; UserError is raised where the token may not write to it."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if get_token() is None:
        raise UserError(
            "there is no token; log in by `hf auth login`, or set HF_TOKEN to one that may write"
        )
    api = HfApi()
    is_there, is_private = False, True
    # Asked first, because it is the call that gives up where nobody answers.
    with contextlib.suppress(RepositoryNotFoundError):
        is_private = bool(api.model_info(name, timeout=TIMEOUT_SECONDS).private)
        is_there = True
    check_may_write(name, api.whoami())
    return is_there, is_private


def create_private(name: str) -> None:
    """Makes a private repository. Another process may have been faster, which is no error."""
    from huggingface_hub import HfApi

    HfApi().create_repo(name, private=True, exist_ok=True)


@contextlib.contextmanager
def reported_refusal(name: str) -> Iterator[None]:
    """A block that asks the Hub; where that fails, a UserError says why, and names --push."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (the Hub's libraries have errors of many types)
        raise UserError(f"--push {name}: {why_not(error, name)}") from None


def check_may_write(name: str, me: dict) -> None:
    """Raises UserError if a token can't write to a repository of this name.

    me: what the Hub says of the token's owner.
    """
    token = (me.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UserError("the token may only read; make one that may write")
    owner = name.partition("/")[0]
    user = me.get("name")
    organizations = {each.get("name"): each.get("roleInOrg") for each in me.get("orgs") or []}
    if owner != user and owner not in organizations:
        raise UserError(
            f"{owner} is neither the token's user, {user}, nor one of its organizations"
        )
    if organizations.get(owner) == "read":
        raise UserError(f"{user} may only read in {owner}")


def push_folder(folder: Path, name: str, print_fn: Callable[[str], None] = print) -> None:
    """Uploads a model or adapter folder as the repository `org/name`.

    print_fn: is called with a line that says where it is, and how it is published.
    Raises UserError where that fails, with the command that tries again; the folder is not changed.
    """
    folder = Path(folder)
    match = HUB_NAME.fullmatch(name)
    if not match or match[2]:
        raise UserError(f"{name}: org/name is wanted, a name for a model on the Hub")
    if not any((folder / each).is_file() for each in CONFIG_FILES):
        raise UserError(
            f"{folder}: holds no {' nor '.join(CONFIG_FILES)}; give a model or an adapter"
        )
    note = private_path_note(folder)
    if note:
        print_fn(note)
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        is_there, is_private = find_repository(name)
        if not is_there:
            create_private(name)
        HfApi().upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Result of plaintune",
            delete_patterns=WEIGHT_PATTERNS,
            # Of file managers and editors.
            ignore_patterns=[".*"],
        )
    except Exception as error:  # noqa: BLE001 (as above, and the command must be told in any case)
        again = f"python convert.py push {shlex.quote(str(folder))} {name}"
        reason = why_not(error, name)
        raise UserError(
            f"{folder} is not on the Hub ({name}: {reason}), and whole here; {again} tries again"
        ) from None
    page = page_of(name)
    seen_by = f"private; {page}/settings makes it public" if is_private else "public"
    print_fn(f"pushed    {folder} to {page} ({seen_by})")


def private_path_note(folder: Path) -> str | None:
    """Returns a line where an adapter names its base by a path, which others don't have; else
    None."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not Path(base).is_absolute():
        return None
    return (
        f"NOTE: adapter_config.json names the base by a path of this machine, {printable(base[:200])}; others will"
        " have to say which model it is for (train with --model org/name to have it named)"
    )


def page_of(name: str) -> str:
    """Returns the address of a repository's page."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"


def why_not(error: Exception, name: str) -> str:
    """Returns why the Hub could not be written to, and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "the Hub does not know the token (HTTP 401); log in by `hf auth login`"
        if status == 403:
            return f"the token may not write to {name} (HTTP 403); make one that may"
        return f"{constants.ENDPOINT} refused (HTTP {status}: {first_line(error)})"
    if isinstance(error, HTTPError | OSError):
        return f"{constants.ENDPOINT} can't be reached ({first_line(error)})"
    return first_line(error)
