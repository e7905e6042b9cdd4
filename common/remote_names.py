"""The names of data that lie elsewhere: hf:org/name, s3://, gs:// and https://. Their weights, and
what of them may be printed and saved.

    hf:org/name[@revision][:subset][:split]   a data set of the Hugging Face Hub
    s3://bucket/key   gs://bucket/key         an object, or a folder of objects
    https://host/file.jsonl?token=...         a file of a web server

A weight stands in front of such a name, 3=https://host/file.jsonl, since a URL may hold signs of
equality itself: nothing of it is ever taken for a weight.

The query of a URL often holds a secret: a token, or a signature. So the values of a query, and a
password, are neither printed nor written to the disk. In their place a saved URL has the key of the
copy that was fetched, by which a resumed run finds it.
"""

import contextlib
import hashlib
import re
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

REMOTE = re.compile(r"(?:hf:|(?:s3|gs|https?)://).*", re.IGNORECASE | re.DOTALL)
# 3=https://host/file.jsonl. Text in front that is no number is reported as such.
WEIGHTED = re.compile(rf"([^=/:?#]*)=({REMOTE.pattern})", re.IGNORECASE | re.DOTALL)
HUB = "hf:"
HIDDEN = "***"
# What a saved URL has behind its end: the key of the copy that was fetched.
COPY = "copy="
KEY_DIGITS = 24
# Values of a query that are no secrets, and say which file it is.
HARMLESS = frozenset(
    ("download", "raw", "dl", "format", "export", "ref", "alt", "output", "versionid")
)
# What signs a URL for a time (Amazon, Google, CloudFront, Azure): the file is the same with
# another signature.
SIGNATURE = re.compile(
    r"x-amz-.*|x-goog-.*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id"
    r"|sig|se|st|sp|sv|sr|ss|srt|spr|skoid|sktid|skt|ske|sks|skv",
    re.IGNORECASE,
)


def is_remote(word: object) -> bool:
    """True if a word names data that lie elsewhere, with or without a weight in front."""
    return isinstance(word, str) and bool(REMOTE.fullmatch(word) or WEIGHTED.fullmatch(word))


def split_remote(word: str) -> tuple[str, str | None]:
    """Returns (https://host/a.jsonl, "3") of 3=https://host/a.jsonl, and None for the weight where
    there is none.

    The name of a data set of the Hub holds no sign of equality, so hf:org/name=3 is understood too.
    """
    match = WEIGHTED.fullmatch(word)
    if match and not REMOTE.fullmatch(word):
        return match[2], match[1]
    if word.lower().startswith(HUB) and "=" in word:
        name, _, number = word.rpartition("=")
        return name, number
    return word, None


def is_url(name: str) -> bool:
    """True for https:// and http://."""
    return name.lower().startswith(("https://", "http://"))


def shown(word: object) -> str:
    """Returns a word of the command line as it may be printed: a URL without its password, the
    values of its query, and its fragment. All else is returned as it is."""
    text = str(word)
    if not is_remote(text):
        return text
    name, number = split_remote(text)
    if not is_url(name):
        return text
    front = text[: -len(name)] if number is not None else ""
    try:
        scheme, netloc, path, query, _ = urlsplit(name)
    except ValueError:
        # As for https://[host, which is no URL.
        return f"{front}{name.partition(':')[0]}://{HIDDEN}"
    host = netloc.rpartition("@")[2]
    if host != netloc:
        host = f"{HIDDEN}@{host}"
    # Not by parse_qsl alone: a query may be a single value without a name.
    fields = []
    for field in query.split("&") if query else []:
        key, sign, value = field.partition("=")
        if not sign:
            fields.append(HIDDEN if field else "")
        elif key.lower() in HARMLESS or not value:
            fields.append(field)
        else:
            fields.append(f"{key}={HIDDEN}")
    return front + urlunsplit((scheme, host, path, "&".join(fields), ""))


def saved_name(word: str) -> str:
    """Returns a remote word as config.json and checkpoints hold it: where something of a URL is
    hidden, the key of its copy stands behind it."""
    name, _ = split_remote(word)
    # What is hidden may be a user's name alone. A fragment is never sent.
    if not is_url(name) or shown(name) == name.partition("#")[0]:
        return word
    return f"{shown(word)}#{COPY}{copy_key(name)}"


def saved_copy(name: str) -> str | None:
    """Returns the key of a URL that `saved_name` has made, None for any other name."""
    match = re.search(rf"#{COPY}([0-9a-f]{{{KEY_DIGITS}}})$", name)
    return match[1] if match and is_url(name) else None


def copy_key(name: str) -> str:
    """Returns 24 hexadecimal digits that stand for what a name names: for a URL without password,
    signature and fragment, since another signature does not make it another file."""
    saved = saved_copy(name)
    if saved is not None:
        return saved
    with contextlib.suppress(ValueError):  # for https://[host, which is no URL
        name = without_signature(name)
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:KEY_DIGITS]


def without_signature(name: str) -> str:
    """Returns a URL without password, signature and fragment; any other name as it is."""
    if is_url(name):
        scheme, netloc, path, query, _ = urlsplit(name)
        netloc = netloc.rpartition("@")[2].lower()
        # A single value without a name stays as it is.
        if any(SIGNATURE.fullmatch(key) for key, _ in parse_qsl(query)):
            fields = parse_qsl(query, keep_blank_values=True)
            query = urlencode([each for each in fields if not SIGNATURE.fullmatch(each[0])])
        name = urlunsplit((scheme.lower(), netloc, path, query, ""))
    return name
