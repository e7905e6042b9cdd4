"""From the name of data to files on this disk: what --data, --val and --replay of train.py take, and
what data.py and evaluate.py read.

    hf:org/name[@revision][:subset][:split]   interop/hub_data.py
    s3://bucket/key   gs://bucket/key         interop/bucket_data.py
    https://host/file.jsonl                   interop/web_data.py

Copies are kept in the cache and used again. Each start asks whether they are still what is there,
and where there is no network a line says so and the copies are used as they are.
"""

import re
from collections.abc import Callable
from pathlib import Path

import distributed
from common.console import print_stderr
from common.errors import UserError
from common.remote_names import HUB, is_remote, is_url, shown, split_remote
from dataset.folders import TRAIN, Fetched, Listing
from interop.copies import Use

# The copies of the URLs that this process has asked for.
COPIES_OF_URLS: dict[str, Path] = {}
SCHEMES = "hf:, s3://, gs://, https:// or a file of this disk"


def fetch_data(
    word: str | Path | Fetched,
    part: str = TRAIN,
    print_fn: Callable = print_stderr,
    keeps: bool = False,
) -> str | Path | Fetched:
    """Returns the copies of data that lie elsewhere; a file or folder of this disk, and what was
    fetched already, as it is.

    part: folders.TRAIN, VALIDATION or TEST: which part is fetched of data that have parts.
    print_fn: is called with a line about what is fetched, or why a copy is used instead.
    keeps: True uses a copy also where its original has changed since, and says so: for a run that
        goes on.
    Raises UserError where the data can't be had.
    """
    if not isinstance(word, str):
        return word
    if not is_remote(word):
        match = re.match(r"[A-Za-z][\w+.-]*://", word)
        if match and not Path(word).exists():
            raise UserError(f"{match[0]}...: is not read here, but {SCHEMES}")
        return word
    name, weight = split_remote(word)
    if weight is not None:
        raise UserError(f"{shown(word)}: a weight means nothing here; leave {weight}= out")
    use = Use(print_fn, asks=distributed.local_rank() == 0, keeps=keeps)
    if is_url(name):
        path = fetch_url_once(name, use)
        return Fetched(shown(name), path, Listing([path]))
    if name.lower().startswith(HUB):
        from interop.hub_data import fetch_dataset

        return fetch_dataset(HUB + name[len(HUB) :], part, use)
    from interop.bucket_data import fetch_objects

    return fetch_objects(name, part, use)


def fetch_url_once(name: str, use: Use) -> Path:
    """Returns the copy of a URL's file, which a process asks for once: so that a file whose records
    are of several parts is the same for each of them."""
    from interop.web_data import fetch_url

    if name not in COPIES_OF_URLS:
        COPIES_OF_URLS[name] = fetch_url(name, use)
    return COPIES_OF_URLS[name]
