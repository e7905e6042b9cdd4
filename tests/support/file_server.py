"""A web server on loopback that does what real ones do, and what goes wrong with them: ranges, ETags, dates,
conditions, redirects, logins, faults that pass, bodies that break off, files that change."""

import threading
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class File:
    """body: the content. breaks: how many answers end in the middle. statuses: what the next answers are instead.
    etag, dated, ranges: whether the server gives ETags and dates and answers ranges. headers: more of them. login: the
    Authorization that is wanted. location: where the server sends to. no_length: says no length.
    ignores_conditions: answers with what is there, whatever version is asked for."""

    body: bytes
    breaks: int = 0
    statuses: list[int] = field(default_factory=list)
    etag: bool = True
    dated: str = ""
    ranges: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    login: str = ""
    location: str = ""
    no_length: bool = False
    ignores_conditions: bool = False


class FileServer(ThreadingHTTPServer):
    """files: by path. asked: (path with query, status, the Range, bytes sent, Authorization) of each request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, File] = {}
        self.asked: list[tuple[str, int, str | None, int, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def put(self, path: str, body: bytes, **more) -> str:
        self.files[path] = File(body, **more)
        return self.url + path

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        file = self.server.files.get(urlsplit(self.path).path)
        if file is None:
            return self.answer(404, b"not here")
        if file.statuses:
            return self.answer(file.statuses.pop(0), b"<html>secret trace</html>")
        if file.login and self.headers.get("Authorization") != file.login:
            return self.answer(401, b"who?")
        if file.location:
            return self.answer(302, b"", {"Location": file.location})
        headers = dict(file.headers)
        tag = f'"{sha256(file.body).hexdigest()[:16]}"'
        if file.etag:
            headers["ETag"] = tag
        if file.dated:
            headers["Last-Modified"] = file.dated
        versions = {tag if file.etag else None, file.dated or None} - {None}
        known = self.headers.get("If-None-Match") or self.headers.get("If-Modified-Since")
        if known in versions and not file.ignores_conditions:
            return self.answer(304, b"", headers)
        start = 0
        asked = self.headers.get("Range")
        is_same = self.headers.get("If-Range") in versions
        if asked and file.ranges and (is_same or file.ignores_conditions):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(file.body) - 1}/{len(file.body)}"
        self.answer(206 if start else 200, file.body[start:], headers, file)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, file: File | None = None):
        headers = {"Content-Length": str(len(body))} | (headers or {})
        if file is not None and file.no_length:
            del headers["Content-Length"]
            self.close_connection = True
        breaks = file is not None and file.breaks > 0
        if breaks:
            file.breaks -= 1
            body = body[: len(body) // 2]
        # Before the client has an answer, and asks what was asked.
        asked = (self.path, status, self.headers.get("Range"), len(body), self.headers.get("Authorization"))
        self.server.asked.append(asked)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if breaks:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
