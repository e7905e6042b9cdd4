"""A small Hugging Face Hub on loopback, that serves repositories and takes uploads, and processes that use it.

huggingface_hub reads HF_ENDPOINT, HF_HOME and the rest when it is imported: each use is a process of its own, forked
off this one, which has torch already, and importing huggingface_hub anew.
"""

import base64
import hashlib
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from support.helpers import child_life

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories by name: {"files": {path: bytes}} and what else a test wants of it.

    users: {token: what the Hub says of its owner}. refused: {path of a request: HTTP status} of requests that fail.
    created: what was asked for in each request for a new repository. blobs: large files by their hashes.
    """

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.repos, self.asked = {}, []  # asked: (method, path, Range) of each request for a file
        self.users, self.refused, self.created, self.blobs = {}, {}, [], {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def got(self, repo: str) -> list[str]:
        return [path for method, path, _ in self.asked if method == "GET" and path.startswith(repo + "/")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, body: bytes, status: int = 200, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[-1] == "whoami-v2":
            user = self.server.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
            return self.send(json.dumps(user or {}).encode(), 200 if user else 401)
        # A data set is org/name here as well; its branches are repositories of their own under their names and commits.
        if parts[0] == "datasets":
            parts = parts[1:]
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repo = self.server.repos.get(name)
        branches = {} if repo is None else repo.get("branches", {})
        asked = parts[5:6] if parts[0] == "api" else parts[3:4]
        repo = branches.get("".join(asked), repo)
        if repo is None:
            return self.send(b'{"error":"Repository not found"}', 404, X_Error_Code="RepoNotFound")
        if repo.get("token") and self.headers.get("Authorization") != f"Bearer {repo['token']}":
            return self.send(b"{}", 401, X_Error_Message="Invalid username or password.")
        if "answer" in repo:
            return self.send(*repo["answer"])
        if parts[0] == "api":
            return self.listing(name, repo, parts[4:])
        if repo.get("gated"):
            return self.send(b"{}", 403, X_Error_Code="GatedRepo")
        return self.file(name, repo, "/".join(parts[4:]))

    def listing(self, name: str, repo: dict, rest: list[str]):
        if rest[:1] == ["revision"] and rest[1] not in ("main", "v1", repo.get("commit", COMMIT), repo.get("branch")):
            return self.send(b"{}", 404, X_Error_Code="RevisionNotFound")
        files = []
        for path, content in repo["files"].items():
            large = path.endswith((".safetensors", ".bin"))
            sha = hashlib.sha256(content).hexdigest()
            lfs = {"size": len(content), "sha256": sha, "oid": sha, "pointerSize": 130}
            files.append({"type": "file", "path": path, "rfilename": path, "size": len(content), "oid": sha[:40]})
            files[-1] |= {"blobId": sha[:40]} | ({"lfs": lfs} if large else {})
        if rest[:1] == ["tree"]:
            return self.send(json.dumps(files).encode())
        found = {
            "id": name,
            "sha": repo.get("commit", COMMIT),
            "siblings": files,
            "private": repo.get("private", False),
        }
        return self.send(json.dumps(found).encode())

    def file(self, name: str, repo: dict, path: str):
        asked = self.headers.get("Range")
        self.server.asked.append((self.command, f"{name}/{path}", asked))
        content = repo["files"][path]
        sha = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{sha if path.endswith(".safetensors") else sha[:40]}"', "Accept_Ranges": "bytes"}
        headers["X_Repo_Commit"] = repo.get("commit", COMMIT)
        if self.command == "GET" and path == repo.get("stalls"):
            time.sleep(60)
        if self.command == "GET" and path == repo.get("breaks"):
            del repo["breaks"]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        if asked:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.send(content[start:], 206, **headers)
        return self.send(content, **headers)

    # ---- uploads ----

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        if path in self.server.refused:
            return self.send(b"{}", self.server.refused[path])
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.server.created.append(wanted)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.server.repos[name] = {"files": {}, "private": wanted["visibility"] == "private"}
            return self.send(json.dumps({"url": f"{self.server.url}/{name}"}).encode())
        if path == "/api/validate-yaml":
            return self.send(b'{"errors": [], "warnings": []}')
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}
            return self.send(json.dumps({"objects": objects, "transfer": "basic"}).encode())
        if "/preupload/" in path:
            files = []
            for each in json.loads(body)["files"]:
                mode = "lfs" if each["path"].endswith(".safetensors") else "regular"
                files.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False})
            return self.send(json.dumps({"files": files}).encode())
        assert "/commit/" in path, path
        return self.commit("/".join(path.split("/")[3:5]), body)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self.send(b"")

    def commit(self, name: str, body: bytes):
        files = self.server.repos[name]["files"]
        for line in body.splitlines():
            change = json.loads(line)
            value = change["value"]
            match change["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        url = f"{self.server.url}/{name}/commit/{COMMIT}"
        self.send(json.dumps({"success": True, "commitOid": COMMIT, "commitUrl": url}).encode())


def environment(url: str, home: Path, **more: str) -> dict[str, str]:
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return mine | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"} | more


def fork(work, output: Path, env: dict[str, str]) -> int:
    """The number of a process that calls work() in another environment; the files `output`.out and .err get what it
    writes, unless .err is there as a link, to a terminal say."""
    child = os.fork()
    if child:
        return child

    def elsewhere():
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{output}.{name}", os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.environ.clear()
        os.environ.update(env)
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]
        work()

    child_life(elsewhere)


def run(url: str, home: Path, work, **more: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of work() in a process of its own."""
    output = home / "said"
    status = os.waitpid(fork(work, output, environment(url, home, **more)), 0)[1]
    return os.waitstatus_to_exitcode(status), *(Path(f"{output}.{name}").read_text() for name in ("out", "err"))
