"""Objects of Amazon S3 and Google Cloud Storage by name, s3://bucket/key and gs://bucket/key, with
copies of them in the cache (interop/copies.py). A key that is none, but what keys begin with, is a
folder, and is read as one of this disk is (dataset/folders.py).

pyarrow's own file systems do the work. They find credentials, endpoint and region where Amazon's
and Google's tools do: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws, AWS_ENDPOINT_URL,
AWS_REGION; GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default login`. Without any,
a bucket is asked for as anybody may.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from common.errors import UserError, first_line, printable
from common.files import atomic_file, write_json
from common.progress import progress
from common.remote_names import copy_key
from dataset.folders import (
    DESCRIPTION,
    Fetched,
    Listing,
    choose_part,
    holds_records,
    llama_factory_entries,
)
from dataset.readers import CLASS_NAMES, suffix_of
from interop.copies import (
    ANSWER_SECONDS,
    CONNECT_SECONDS,
    BrokenOff,
    Copy,
    Stream,
    Use,
    Version,
    check_room_for_copy,
    copies_folder,
    fill,
    folder_for_copies,
    in_bytes,
    why_read_only,
)

BUCKET_CHUNK = 4 << 20
LIST = ".list"  # of a copied folder: which objects there were, for days without a network
# How the errors of pyarrow's file systems begin that mean: there is no connection.
UNREACHABLE = re.compile(
    "NETWORK_CONNECTION|UNAVAILABLE|REQUEST_TIMEOUT|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE"
    "|DEADLINE_EXCEEDED|[Cc]ould not resolve|[Cc]ould not connect|timed out|timeout|HTTP 5\\d\\d"
)
DENIED = re.compile(
    "ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH"
    "|EXPIRED|INVALID_CLIENT_TOKEN|UNRECOGNIZED_CLIENT|OAuth2|HTTP 40[13]"
)
# Where the keys of Amazon and Google are, for those who are refused.
LOG_IN = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
}
AWS_KEYS = (
    "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)  # fmt: skip


class Denied(Exception):
    """The bucket refuses. The message is the file system's."""


def fetch_objects(name: str, part: str, use: Use) -> Fetched:
    """Returns the copies of an object, or of those objects of a folder that belong to a part.

    part: folders.TRAIN, VALIDATION or TEST.
    Raises UserError where they can't be had and there are no copies.
    """
    scheme, path = check_name(name)
    folder = copies_folder(copy_key(name.rstrip("/")))
    problem = why_read_only(folder)
    old = read_list(folder)
    if problem and old is not None:
        if use.asks:
            use.print_fn(f"NOTE: {name}: {problem}; using the copy in the cache")
        return fetched(name, folder, old, part)
    with folder_for_copies(name, folder):
        old = read_list(folder)
        if old is not None and not use.asks:
            return fetched(name, folder, old, part)
        try:
            return fetch_with_keys(name, scheme, path, folder, part, use)
        except BrokenOff as error:
            if old is None:
                raise UserError(f"{name}: {error}, and the cache has no copy of it") from None
            result = fetched(name, folder, old, part)
            use.print_fn(f"NOTE: {name}: {error}; using the copy in the cache")
            return result


def fetch_with_keys(
    name: str, scheme: str, path: str, folder: Path, part: str, use: Use
) -> Fetched:
    """Fetches an object or folder as `fetch_part` does: without any credentials as anybody may, and
    if the bucket refuses that, as the machine, which may have a role of its own in Amazon's cloud.
    """
    reason = ""
    for bucket in buckets(scheme, path):
        try:
            objects = bucket.list_objects(path)
            if not objects:
                raise UserError(f"{name}: {why_nothing(path)}")
            if DESCRIPTION in objects:
                refuse_description(name, folder, bucket, path, objects[DESCRIPTION])
            return fetch_part(name, folder, bucket, path, objects, part, use)
        except Denied as error:
            reason = str(error)
    raise UserError(f"{name}: {explain_denial(scheme, reason)}")


def check_name(name: str) -> tuple[str, str]:
    """Returns ("s3", "bucket/key") of s3://bucket/key. Raises UserError if it names no object."""
    scheme, _, path = name.partition("://")
    path = path.strip("/")
    parts = path.split("/")
    if not path or "" in parts or ".." in parts or "." in parts:
        raise UserError(f"{name}: {scheme}://bucket/key is wanted")
    # As pyarrow's and other programs' URIs have them.
    has_settings = re.search(r"\?\w+=", path) is not None
    if "@" in parts[0] or ":" in parts[0] or has_settings:
        where = LOG_IN[scheme.lower()]
        # Not the name, which may hold a key.
        problem = "a name holds neither credentials nor settings"
        raise UserError(f"{scheme}://: {problem}; they belong in {where}")
    return scheme.lower(), path


def why_nothing(path: str) -> str:
    """Returns why a name that no key begins with may be wrong."""
    if "*" in path:
        return "there is no such object, and patterns are not read here; name the folder"
    if re.search(r"=[0-9.]+$", path):
        return "there is no such object; a weight stands in front, as in 3=s3://bucket/key"
    return "there is no such object or folder"


def explain_denial(scheme: str, reason: str) -> str:
    """Returns what a refusal means and what to do about it."""
    where = LOG_IN[scheme]
    # Amazon's own name of it, as in AWS Error ACCESS_DENIED.
    match = re.search(r"AWS Error (\w+)", reason)
    short = match[1] if match else printable(first_line(OSError(reason)))[:120]
    return f"is private, or missing ({short}); credentials: {where}"


# ---- the file systems ----


class Bucket:
    """A file system of pyarrow, whose errors are sorted: BrokenOff, Denied, UserError."""

    def __init__(self, scheme: str, system):
        self.scheme = scheme
        self.system = system

    def sorted_errors(self, work: Callable):
        """Returns work(), whose OSErrors are turned into one of the three kinds."""
        try:
            return work()
        except OSError as error:
            text = str(error)
            if UNREACHABLE.search(text):
                raise BrokenOff(f"{self.scheme}:// can't be reached ({cause_of(text)})") from None
            if DENIED.search(text):
                raise Denied(text) from None
            raise UserError(f"{self.scheme}://: {printable(first_line(error))}") from None

    def list_objects(self, path: str) -> dict[str, Version]:
        """Returns {key below the path: version} of the objects of a folder, {"": version} of a path
        that is an object, and nothing where there is neither."""
        from pyarrow import fs

        info = self.sorted_errors(lambda: self.system.get_file_info(path))
        if info.type == fs.FileType.File:
            return {"": version_of_info(info)}
        if info.type == fs.FileType.NotFound:
            return {}
        selector = fs.FileSelector(path, recursive=True)
        infos = self.sorted_errors(lambda: self.system.get_file_info(selector))
        objects = {}
        for each in infos:
            key = each.path.removeprefix(path).lstrip("/")
            parts = key.split("/")
            is_hidden = any(part.startswith(".") or not part for part in parts)
            if each.type == fs.FileType.File and not is_hidden:
                objects[key] = version_of_info(each)
        return dict(sorted(objects.items()))

    def stream(self, path: str, start: int, version: Version) -> Stream:
        """Returns the bytes of an object from a place on. Raises BrokenOff and Denied."""
        file = self.sorted_errors(lambda: self.system.open_input_file(path))

        def chunks() -> Iterator[bytes]:
            with file:
                self.sorted_errors(lambda: file.seek(start))
                while chunk := self.sorted_errors(lambda: file.read(BUCKET_CHUNK)):
                    yield chunk

        return Stream(version, start, chunks())


def buckets(scheme: str, path: str) -> Iterator[Bucket]:
    """Yields the file systems by which a path may be read, in the order in which they are tried."""
    if scheme == "gs":
        yield Bucket(scheme, google_system())
        return
    if not has_aws_keys():
        yield Bucket(scheme, amazon_system(path, anonymous=True))
    yield Bucket(scheme, amazon_system(path))


def cause_of(text: str) -> str:
    """Returns what a file system's error says of the connection, as Could not connect to server."""
    pattern = r"(?:Details: |CURL error \[\d+\]=)([\w :.-]{1,200}?)( error_info|\n|$)"
    match = re.search(pattern, text)
    return match[1].rpartition(": ")[2] if match else "no answer"


def version_of_info(info) -> Version:
    """Returns the version of an object, which is its size and the time of its last change."""
    return Version("", str(info.mtime_ns or ""), info.size)


def has_aws_keys() -> bool:
    """True if the environment or ~/.aws holds credentials of Amazon's."""
    if any(os.environ.get(key) for key in AWS_KEYS):
        return True
    files = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"}
    for variable, file in files.items():
        path = Path(os.environ.get(variable) or f"~/.aws/{file}").expanduser()
        if path.is_file():
            return True
    return False


def amazon_system(path: str, anonymous: bool = False):
    """Returns pyarrow's file system of S3, or of a server that speaks its language."""
    from pyarrow import fs

    settings = {
        "anonymous": anonymous,
        "connect_timeout": CONNECT_SECONDS,
        "request_timeout": ANSWER_SECONDS,
        "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=3),
    }
    # pyarrow itself looks at these only where it is given a URI.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        settings["endpoint_override"] = endpoint
    if region:
        settings["region"] = region
    elif not endpoint:
        bucket = path.partition("/")[0]
        try:
            settings["region"] = fs.resolve_s3_region(bucket)
        except OSError as error:
            if UNREACHABLE.search(str(error)):
                raise BrokenOff(f"s3:// can't be reached ({cause_of(str(error))})") from None
            raise UserError(f"s3://{bucket}: there is no such bucket") from None
    return fs.S3FileSystem(**settings)


def google_system():
    """Returns pyarrow's file system of Google Cloud Storage."""
    from pyarrow import fs

    limit = timedelta(seconds=CONNECT_SECONDS)
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator:
        scheme, _, host = emulator.rpartition("://")
        return fs.GcsFileSystem(
            anonymous=True,
            endpoint_override=host.rstrip("/"),
            scheme=scheme or "http",
            retry_time_limit=limit,
        )
    return fs.GcsFileSystem(anonymous=not has_google_keys(), retry_time_limit=limit)


def has_google_keys() -> bool:
    """True if the environment names credentials of Google's, or gcloud has written some."""
    if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        return True
    home = os.environ.get("CLOUDSDK_CONFIG") or "~/.config/gcloud"
    return Path(home, "application_default_credentials.json").expanduser().is_file()


# ---- copies ----


def refuse_description(
    name: str, folder: Path, bucket: Bucket, path: str, version: Version
) -> None:
    """Raises UserError if a folder has a description of LLaMA-Factory's, by which its files would
    have to be read."""
    copy = copy_of(name, folder, path, DESCRIPTION)
    whole = copy.whole()
    if whole is None or whole.version != version:
        with progress(DESCRIPTION, version.size, "byte") as bar:
            fetch_object(copy, bucket, path, DESCRIPTION, version, bar)
    if llama_factory_entries(folder / DESCRIPTION):
        problem = (
            f"its {DESCRIPTION} is LLaMA-Factory's, which is read in folders of this disk only"
        )
        raise UserError(f"{name}: {problem}; name one of its files, or copy the folder here")


def fetch_part(
    name: str,
    folder: Path,
    bucket: Bucket,
    path: str,
    objects: dict[str, Version],
    part: str,
    use: Use,
) -> Fetched:
    """Fetches what a part of the data needs and the cache lacks, and returns the copies.

    objects: what `list_objects` returns of the path.
    """
    print_fn = use.print_fn
    result = fetched(name, folder, objects, part, must_exist=False)
    wanted = wanted_keys(result, folder, path, objects)
    old = read_list(folder)
    changes = changes_of(old, objects, wanted)
    if changes and old is not None and use.keeps:
        kept = fetched(name, folder, old, part, must_exist=False)
        if all(path.is_file() for path in kept.listing.paths):
            print_fn(f"NOTE: {name}: has changed ({changes}); this run goes on with the copy")
            return kept
    if changes:
        print_fn(f"NOTE: {name}: has changed since the copy was fetched: {changes}")
    missing = []
    for key in wanted:
        whole = copy_of(name, folder, path, key).whole()
        if whole is None or whole.version != objects[key]:
            missing.append(key)
    if not missing:
        print_fn(f"{name}: is in the cache, unchanged in the bucket")
    else:
        size = sum(objects[key].size or 0 for key in missing)
        parts = [copy_of(name, folder, path, key).part() for key in missing]
        done = sum(each.size for each in parts if each is not None)
        check_room_for_copy(name, size - done, folder)
        count = "" if len(wanted) == 1 else f"{len(missing):,} of {len(wanted):,} files, "
        print_fn(f"fetching {name}: {count}{in_bytes(size)}")
        with progress(name, size, "byte") as bar:
            for key in missing:
                fetch_object(copy_of(name, folder, path, key), bucket, path, key, objects[key], bar)
    with atomic_file(folder / LIST) as tmp:
        write_json({key: asdict(version) for key, version in objects.items()}, tmp)
    return result


def changes_of(
    before: dict[str, Version] | None, objects: dict[str, Version], wanted: list[str]
) -> str:
    """Returns what has changed in a bucket, as "1 file changed, 2 new", "" for nothing.

    before, objects: what `list_objects` has returned then and now. wanted: keys that are to be read.
    """
    if before is None:
        return ""
    counts = {
        "changed": sum(key in before and before[key] != objects[key] for key in wanted),
        "new": sum(key not in before for key in wanted),
        "gone": sum(key not in objects for key in before),
    }
    texts = [f"{count:,} {what}" for what, count in counts.items() if count]
    return ", ".join(texts)


def fetch_object(copy: Copy, bucket: Bucket, path: str, key: str, version: Version, bar) -> None:
    """Fetches one object. Raises UserError if it changes meanwhile."""
    full = f"{path}/{key}" if key else path
    copy.folder.mkdir(parents=True, exist_ok=True)
    part = copy.part()
    start = part.size if part is not None and part.version == version else 0
    bar.update(start)

    def open_again(size: int, version: Version) -> Stream:
        return bucket.stream(full, size, version)

    fill(copy, copy.label[1:], bucket.stream(full, start, version), open_again, bar)
    now = bucket.list_objects(full).get("")
    if now != version:
        copy.hidden("copy").unlink()
        raise UserError(f"{copy.name}: changed while it was fetched; run it again")


def copy_of(name: str, folder: Path, path: str, key: str) -> Copy:
    """Returns the copy of an object. key: below the path; "" for the path itself."""
    parent, _, file = (key or path).rpartition("/")
    title = f"{name.rstrip('/')}/{key}" if key else name
    return Copy(title, folder / parent if key else folder, f".{file}")


def wanted_keys(result: Fetched, folder: Path, path: str, objects: dict[str, Version]) -> list[str]:
    """Returns the keys of the files that are to be read, and of the names of their classes."""
    if "" in objects:
        return [""]
    keys = [file.relative_to(folder).as_posix() for file in result.listing.paths]
    for key in list(keys):
        beside = f"{key.rpartition('/')[0]}/{CLASS_NAMES}".lstrip("/")
        is_table = suffix_of(Path(key)) in (".csv", ".tsv")
        if is_table and beside in objects and beside not in keys:
            keys.append(beside)
    return keys


def fetched(
    name: str, folder: Path, objects: dict[str, Version], part: str, must_exist: bool = True
) -> Fetched:
    """Returns what is to be read of a copied object or folder.

    must_exist: raises UserError if a copy is missing.
    """
    if "" in objects:
        file = name.rstrip("/").rpartition("/")[2]
        result = Fetched(name, folder / file, Listing([folder / file]))
    else:
        names_of_folders: dict[str, list[str]] = {}
        for key in objects:
            parent, _, file = key.rpartition("/")
            names_of_folders.setdefault(parent, []).append(file)
        paths = []
        for key in objects:
            parent, _, file = key.rpartition("/")
            if holds_records(file, names_of_folders[parent]):
                paths.append(folder / key)
        if not paths:
            raise UserError(f"{name}: holds no file of a known kind, of {len(objects):,} files")
        listing = choose_part(name, folder, paths, len(objects) - len(paths), part)
        result = Fetched(name, folder, listing)
    if must_exist:
        for path in result.listing.paths:
            if not path.is_file():
                raise UserError(f"{name}: can't be reached, and the cache has not all of it")
    return result


def read_list(folder: Path) -> dict[str, Version] | None:
    """Returns what `list_objects` has returned when the copies were fetched; None if there are
    none."""
    try:
        value = json.loads((folder / LIST).read_text(encoding="utf-8"))
        return {key: Version(**version) for key, version in value.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
