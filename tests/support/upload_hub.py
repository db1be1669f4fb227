"""A hub on this machine that takes uploads: creating, asking what exists, large files by LFS, and the commit.

As in huggingface_hub 2: hf_api.py (create_repo, create_commit), _commit_api.py, lfs.py.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "t" * 34
REPOSITORY = r"(?P<repo>[^/]+/[^/]+)"


class UploadHub(ThreadingHTTPServer):
    """`repositories`: org/name -> file -> its bytes; `private`: org/name -> bool; `asked`: every request.

    `refuses`: what a path begins with -> the status that it gets. `large`: bytes from which a file goes by LFS.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.messages: list[str] = []
        self.stored: dict[str, bytes] = {}
        self.refuses: dict[str, int] = {}
        self.large = 1_000

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    """Answers within the block."""
    with UploadHub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: UploadHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.server.asked.append(f"{self.command} {path}")
        status = next((code for begin, code in self.server.refuses.items() if path.startswith(begin)), None)
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        if status is not None:
            self._send(status, {"error": "not allowed"})
            return
        for pattern, answer in ROUTES:
            if (found := re.fullmatch(pattern, path)) is not None:
                self._send(*answer(self.server, body, **found.groupdict()))
                return
        self._send(404, {"error": "no such page"})

    do_POST = do_PUT = do_GET

    def _body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        missing = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **missing}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_words: object) -> None:
        """Nothing on stderr."""


def _about(hub: UploadHub, _body: bytes, repo: str) -> tuple[int, Any]:
    if repo not in hub.repositories:
        return 404, {"error": "Repository not found"}
    siblings = [{"rfilename": name} for name in hub.repositories[repo]]
    return 200, {"id": repo, "sha": "a" * 40, "private": hub.private[repo], "siblings": siblings, "tags": []}


def _create(hub: UploadHub, body: bytes) -> tuple[int, Any]:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    hub.repositories[name] = {".gitattributes": b""}
    hub.private[name] = asked.get("private", asked.get("visibility") == "private")
    return 200, {"url": f"{hub.url}/{name}", "name": name, "id": "1"}


def _valid(_hub: UploadHub, body: bytes) -> tuple[int, Any]:
    content = json.loads(body)["content"]
    return (200, {}) if content.startswith("---\n") else (400, {"errors": [{"message": "no metadata"}]})


def _modes(hub: UploadHub, body: bytes, repo: str) -> tuple[int, Any]:
    files = [
        {"path": one["path"], "uploadMode": "lfs" if one["size"] >= hub.large else "regular", "shouldIgnore": False}
        for one in json.loads(body)["files"]
    ]
    return (200, {"files": files}) if repo in hub.repositories else (404, {})


def _batch(hub: UploadHub, body: bytes, repo: str) -> tuple[int, Any]:
    objects = [
        {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}} for one in json.loads(body)["objects"]
    ]
    return 200, {"objects": objects, "transfer": "basic"}


def _store(hub: UploadHub, body: bytes, oid: str) -> tuple[int, Any]:
    if hashlib.sha256(body).hexdigest() != oid:
        return 400, {"error": "another file"}
    hub.stored[oid] = body
    return 200, {}


def _commit(hub: UploadHub, body: bytes, repo: str) -> tuple[int, Any]:
    for line in body.splitlines():
        one = json.loads(line)
        value = one["value"]
        if one["key"] == "file":
            hub.repositories[repo][value["path"]] = base64.b64decode(value["content"])
        elif one["key"] == "lfsFile":
            hub.repositories[repo][value["path"]] = hub.stored[value["oid"]]
        elif one["key"] == "header":
            hub.messages.append(value["summary"])
    return 200, {"commitUrl": f"{hub.url}/{repo}/commit/{'b' * 40}", "commitOid": "b" * 40, "pullRequestUrl": None}


ROUTES: list[tuple[str, Any]] = [
    (rf"/api/models/{REPOSITORY}", _about),
    (r"/api/repos/create", _create),
    (r"/api/validate-yaml", _valid),
    (rf"/api/models/{REPOSITORY}/preupload/main", _modes),
    (rf"/{REPOSITORY}\.git/info/lfs/objects/batch", _batch),
    (r"/lfs/(?P<oid>[0-9a-f]+)", _store),
    (rf"/api/models/{REPOSITORY}/commit/main", _commit),
]
