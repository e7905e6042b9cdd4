"""A file of a web server by its URL, with the copy of it in the cache (interop/copies.py).

The server is asked each time whether the copy is still what it has, by ETag or time of change, and
sends only what is missing. `requests` does the work: proxies, certificates and ~/.netrc as
everywhere; a password is not sent on to another host that a server refers to.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from common.errors import UserError, printable
from common.progress import progress
from common.remote_names import SIGNATURE, copy_key, saved_copy, shown
from dataset.readers import KNOWN_SUFFIXES, suffix_of
from interop.copies import (
    ANSWER_SECONDS,
    CONNECT_SECONDS,
    BrokenOff,
    Copy,
    PartialCopy,
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

WEB_CHUNK = 1 << 18
BACKOFF_SECONDS = 0.5  # before a server is asked once more after a fault; then twice that
# Faults that may have gone by the next attempt.
FAULTS = (429, 500, 502, 503, 504)
# The suffix of a file whose URL has none, by what the server calls its kind.
SUFFIX_OF_TYPE = {
    "text/csv": ".csv",
    "text/tab-separated-values": ".tsv",
    "text/plain": ".txt",
    "text/markdown": ".md",
}
WEB_PAGES = ("text/html", "application/xhtml+xml")
LONGEST_FILE_NAME = 100  # characters of a copy's file name


def fetch_url(url: str, use: Use) -> Path:
    """Returns the copy of a URL's file, fetched or brought up to date.

    Raises UserError where the file can't be had and there is no copy.
    """
    name = shown(url)
    copy = Copy(name, copies_folder(copy_key(url)))
    whole = copy.whole()
    if whole and not use.asks:
        return whole.path
    if saved_copy(url):
        if whole is None:
            problem = "its hidden part was not saved, and the copy that was is not in the cache"
            raise UserError(f"{name}: {problem}; give the URL again")
        use.print_fn(f"NOTE: {name}: using the copy that was fetched on {whole.day()}")
        return whole.path
    problem = why_read_only(copy.folder)
    if problem and whole:
        use.print_fn(f"NOTE: {name}: {problem}; using the copy that was fetched on {whole.day()}")
        return whole.path
    with folder_for_copies(name, copy.folder):
        try:
            return update(url, copy, use)
        except BrokenOff as error:
            whole = copy.whole()
            if whole is None:
                raise UserError(f"{name}: {error}, and the cache has no copy of it") from None
            day = whole.day()
            use.print_fn(f"NOTE: {name}: {error}; using the copy that was fetched on {day}")
            return whole.path


def update(url: str, copy: Copy, use: Use) -> Path:
    """Asks the server for a file, fetches it if the copy is not what the server has, and returns
    the copy.

    Raises BrokenOff where the server can't be reached, UserError where it refuses.
    """
    name = copy.name
    print_fn = use.print_fn
    whole = copy.whole()
    part = copy.part()
    if whole:
        response = ask(url, name, validators(whole.version))
    elif part:
        response = ask(url, name, range_headers(part))
    else:
        response = ask(url, name, {})
    if whole:
        is_same = response.status_code == 304 or (
            whole.version.is_known() and version_of(response).is_same(whole.version)
        )
        if is_same:
            response.close()
            print_fn(f"{name}: is in the cache, unchanged on the server")
            return whole.path
        reason = f"has changed on the server since it was fetched on {whole.day()}"
        if not whole.version.is_known():
            reason = "the server does not say whether it has changed"
        if use.keeps:
            response.close()
            print_fn(f"NOTE: {name}: {reason}; this run goes on with that of {whole.day()}")
            return whole.path
        print_fn(f"NOTE: {name}: {reason}; fetching it again")
        if part and version_of(response).is_same(part.version):
            # An earlier attempt has begun with the new version already.
            response.close()
            response = ask(url, name, range_headers(part))
    response, stream = whole_or_rest(url, name, response, part)
    refuse_other_than_files(response, url, name)

    def open_again(size: int, version: Version) -> Stream:
        again = PartialCopy(size, version)
        headers = range_headers(again) if version.is_known() else {}
        return whole_or_rest(url, name, ask(url, name, headers), again)[1]

    size = stream.version.size
    check_room_for_copy(name, (size or 0) - stream.start, copy.folder)
    begun = f", {in_bytes(stream.start)} of them are here already" if stream.start else ""
    print_fn(f"fetching {name}: {stream.version.title()}{begun}")
    file = file_name(url, response)
    with contextlib.closing(response), progress(file, size, "byte", done=stream.start) as bar:
        return fill(copy, file, stream, open_again, bar)


def whole_or_rest(url: str, name: str, response, part: PartialCopy | None) -> tuple:
    """Returns an answer and its Stream: the rest of the part that is here, or else the whole file,
    for which the server is asked once more if need be."""
    stream = stream_of(response, part)
    if stream is None:
        # The answer is for another version than the part that is here.
        response.close()
        response = ask(url, name, {})
        stream = stream_of(response, None)
    if stream is None:
        response.close()
        status = response.status_code
        raise UserError(f"{name}: the server sends no whole file when asked for it (HTTP {status})")
    return response, stream


def validators(version: Version) -> dict[str, str]:
    """Returns the headers that ask for a file only if it is of another version."""
    headers = {}
    if version.etag:
        headers["If-None-Match"] = version.etag
    elif version.modified:
        headers["If-Modified-Since"] = version.modified
    return headers


def range_headers(part: PartialCopy) -> dict[str, str]:
    """Returns the headers that ask for the rest of a file if it is still of this version, and
    otherwise for all of it (RFC 9110, section 13.1.5)."""
    version = part.version
    # A weak ETag does not say that the bytes are equal.
    condition = version.modified
    if version.etag and not version.etag.startswith("W/"):
        condition = version.etag
    if not condition:
        return {}
    return {"Range": f"bytes={part.size}-", "If-Range": condition}


def version_of(response) -> Version:
    """Returns the version of the file that an answer holds, or a part of which."""
    headers = response.headers
    size = None
    match = re.fullmatch(r"bytes \d+-\d+/(\d+)", headers.get("Content-Range", ""))
    if response.status_code == 206 and match:
        size = int(match[1])
    elif response.status_code == 200 and headers.get("Content-Length", "").isdecimal():
        size = int(headers["Content-Length"])
    return Version(headers.get("ETag", ""), headers.get("Last-Modified", ""), size)


def stream_of(response, part: PartialCopy | None) -> Stream | None:
    """Returns the bytes of an answer. part: that the answer should go on with.

    None where it is a part that does not fit to the one that is here.
    """
    version = version_of(response)
    if response.status_code == 200:
        return Stream(version, 0, chunks_of(response))
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if response.status_code != 206 or part is None or not match:
        return None
    if int(match[1]) != part.size or version.size != part.version.size:
        return None
    # Some servers ignore the condition.
    if version.etag != part.version.etag:
        return None
    return Stream(part.version, part.size, chunks_of(response))


def chunks_of(response) -> Iterator[bytes]:
    """Yields the body of an answer, as it is: a compressed file stays compressed."""
    from urllib3.exceptions import HTTPError, ReadTimeoutError

    try:
        yield from response.raw.stream(WEB_CHUNK, decode_content=False)
    except ReadTimeoutError:
        raise BrokenOff(f"nothing came for {ANSWER_SECONDS} seconds") from None
    except (HTTPError, OSError):
        raise BrokenOff("the connection broke off") from None
    finally:
        response.close()


def ask(url: str, name: str, headers: dict[str, str]):
    """Returns a server's answer, whose body is not read yet: of the status 200, 206, 304 or 416.

    name: of the URL, for messages: errors of the packages would print the URL with its secrets.
    Raises BrokenOff where there is no answer or the server has a fault, UserError where it refuses.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    retry = Retry(
        total=3,
        connect=1,
        read=1,
        backoff_factor=BACKOFF_SECONDS,
        status_forcelist=FAULTS,
        raise_on_status=False,
        # A server may ask for hours.
        respect_retry_after_header=False,
    )
    session = requests.Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    # Bytes are counted, and a compressed file is to stay one.
    session.headers["Accept-Encoding"] = "identity"
    session.headers["User-Agent"] = "plaintune"
    timeout = (CONNECT_SECONDS, ANSWER_SECONDS)
    host = urlsplit(name).netloc.rpartition("@")[2]
    try:
        response = session.get(url, headers=headers, stream=True, timeout=timeout)
    except requests.exceptions.SSLError:
        raise UserError(f"{name}: the certificate of {host} is not one that is trusted") from None
    except requests.exceptions.ProxyError:
        raise BrokenOff("the proxy can't be reached (HTTPS_PROXY, HTTP_PROXY)") from None
    except requests.exceptions.Timeout:
        raise BrokenOff(f"{host} does not answer") from None
    except requests.exceptions.TooManyRedirects:
        raise UserError(f"{name}: {host} refers from one address to another without end") from None
    except requests.exceptions.ConnectionError:
        raise BrokenOff(f"{host} can't be reached") from None
    except (requests.exceptions.RequestException, ValueError):
        # What is no URL, or what a server refers to is none.
        raise UserError(f"{name}: is no address that can be asked for") from None
    is_downgraded = url.lower().startswith("https:") and response.url.lower().startswith("http:")
    if is_downgraded:
        response.close()
        raise UserError(f"{name}: {host} refers to an address without encryption")
    status = response.status_code
    if status in (200, 206, 304, 416):
        return response
    response.close()
    if status in FAULTS or status >= 500:
        raise BrokenOff(f"{host} has a fault (HTTP {status})")
    raise UserError(f"{name}: {explain_status(url, status, printable(response.reason or ''))}")


def explain_status(url: str, status: int, reason: str) -> str:
    """Returns what a server's refusal means, and what to do about it."""
    query = urlsplit(url).query
    is_signed = any(SIGNATURE.fullmatch(key) for key, _ in parse_qsl(query))
    if status in (400, 401, 403) and is_signed:
        return f"refused (HTTP {status}); the URL's signature may have expired, make a new one"
    if status in (401, 403, 407):
        advice = "a user and password go into ~/.netrc, a token into the URL"
        return f"is private (HTTP {status}); {advice}"
    if status in (404, 410):
        hint = ""
        if re.search(r"=[0-9.]+$", url) and not query:
            hint = "; a weight stands in front of a URL, as in 3=https://host/file"
        return f"is not there (HTTP {status}){hint}"
    return f"refused (HTTP {status} {reason[:80]})"


def refuse_other_than_files(response, url: str, name: str) -> None:
    """Raises UserError if an answer is a web page, or compressed in a way that is not read here."""
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "zstd"):
        response.close()
        problem = f"sends the file compressed by {printable(encoding[:20])}"
        raise UserError(f"{name}: the server {problem}, which is not read here; fetch it by hand")
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in WEB_PAGES:
        response.close()
        hint = "it may ask for a login, or show the file; look at it in a browser"
        if "/blob/" in url:
            hint = "the file itself has /resolve/ (Hugging Face) or /raw/ (GitHub) for /blob/"
        raise UserError(f"{name}: is a web page, not a file of examples; {hint}")


def file_name(url: str, response) -> str:
    """Returns the name of a copy, whose suffix says what kind of table or text it is: by the URL,
    by the name that the server gives, or by the kind that it says."""
    by_url = unquote(urlsplit(url).path).rpartition("/")[2]
    disposition = response.headers.get("Content-Disposition", "")
    match = re.search(r'filename="?([^";]+)', disposition)
    by_server = match[1].strip() if match else ""
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    by_kind = f"{by_url or 'data'}{SUFFIX_OF_TYPE.get(kind, '')}"
    for name in (by_url, by_server, by_kind):
        suffix = suffix_of(Path(name))
        if suffix in KNOWN_SUFFIXES:
            # A name from elsewhere must be no path, and not hidden.
            plain = re.sub(r"[^\w.-]", "_", name.rpartition("/")[2], flags=re.ASCII).lstrip("._")
            return plain[-LONGEST_FILE_NAME:] or f"data{suffix}"
    return "data"
