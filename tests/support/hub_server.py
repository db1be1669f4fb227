"""A hub on this machine: the part of Hugging Face's protocol that its client and `datasets` ask when they fetch.

As https://huggingface.co/docs/hub/api has it: what a repository holds, the tree of its files, and the files themselves.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "a" * 40  # the only commit of every repository
FILE = re.compile(r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)")
ABOUT = re.compile(r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/.*)?")
# What a name begins with -> how it is refused.
REFUSED = {"hidden": (401, "RepoNotFound"), "missing": (404, "RepoNotFound"), "gated": (403, "GatedRepo")}


class Hub(ThreadingHTTPServer):
    """`repositories`: kind/org/name -> file -> its bytes. A file in `broken` ends half way; `asked`: every request."""

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.broken, self.asked = repositories, set[str](), list[str]()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub_of(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    """Answers within the block."""
    with Hub(repositories) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        name = next((name for name in REFUSED if f"/{name}" in path), None)
        name = None if name == "gated" and path.startswith("/api/") else name  # what it holds, all may know
        found = FILE.fullmatch(path) or ABOUT.fullmatch(path)
        files = found and self.server.repositories.get(f"{found['kind'] or 'models'}/{found['id']}")
        if found is None or files is None or name:
            status, code = REFUSED.get(name or "missing", (404, "RepoNotFound"))
            self._send(status, b'{"error": "no"}', {"X-Error-Code": code, "X-Error-Message": "no"})
        elif "file" in found.groupdict():
            self._file(found["file"], files)
        else:
            body = self._about(found["id"], found["what"], files)
            self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_POST = do_GET

    def _about(self, name: str, what: str | None, files: Mapping[str, bytes]) -> Any:
        if what in ("tree", "paths-info"):
            length = int(self.headers.get("Content-Length") or 0)
            wanted = json.loads(self.rfile.read(length))["paths"] if length else list(files)
            return [
                {"type": "file", "path": file, "size": len(files[file]), "oid": _tag(files[file])}
                for file in wanted
                if file in files
            ]
        siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
        about = {"id": name, "modelId": name, "sha": SHA, "private": False, "tags": [], "siblings": siblings}
        return about | {"cardData": {"license": "apache-2.0"}, "gated": False, "disabled": False, "downloads": 0}

    def _file(self, file: str, files: Mapping[str, bytes]) -> None:
        if file not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
            return
        headers = {"ETag": f'"{_tag(files[file])}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self._send(206 if begin else 200, files[file][begin:], headers, file in self.server.broken)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], is_broken: bool = False) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if is_broken else body)
        self.close_connection = self.close_connection or is_broken

    def log_message(self, *_words: object) -> None:
        """Nothing on stderr."""


def _tag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
