"""HEAD requests, and pages of other addresses."""

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.serve.auth import Key
from tests.support.serving import HI, Running, curl, running, user

PAGE = "https://chat.example:8443"


def fetch(served: Running, method: str, path: str, **headers: str) -> tuple[int, Any, bytes]:
    """Status, headers and body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = json.dumps({"model": "calm", "messages": user(HI), "max_tokens": 2}).encode() if method == "POST" else None
    request = urllib.request.Request(served.url + path, body, named, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@pytest.fixture(scope="module")
def opened(runs: Path) -> Iterator[Running]:
    """A server that a page of another address may use, under another name."""
    with running(runs, allowed_origins=(PAGE,), allowed_hosts=("host.docker.internal",), context=120) as served:
        yield served


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/calm", "/"])
def test_head_is_answered_as_get_without_a_body(served: Running, path: str):
    status, headers, body = fetch(served, "HEAD", path)
    assert (status, body) == (200, b"")
    told = fetch(served, "GET", path)
    assert headers["Content-Type"] == told[1]["Content-Type"]
    if path != "/metrics":  # which changes
        assert headers["Content-Length"] == str(len(told[2]))
    assert fetch(served, "HEAD", "/v1/nothing")[0] == 404
    assert fetch(served, "HEAD", "/v1/chat/completions")[0] == 405


@pytest.mark.parametrize(
    ("wanted", "says"),
    [("zh-CN,zh;q=0.9,en;q=0.8", "模型"), ("fr, en", "model"), ("fr", "model"), ("en-GB,zh", "model")],
)
def test_an_error_is_in_the_language_of_the_client(served: Running, wanted: str, says: str):
    _status, _headers, body = fetch(served, "GET", "/v1/models/none", Accept_Language=wanted)
    assert says in json.loads(body)["error"]["message"]
    body = json.dumps({"model": "calm", "messages": user("word " * 300)})  # read in another thread
    text = curl(f"{served.url}/v1/chat/completions", "-d", body, "-H", f"Accept-Language: {wanted}")[1]
    assert ("tokens" in text) == (says == "model"), text


def test_a_page_that_is_allowed_may_use_the_server(opened: Running):
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
    status, headers, _body = fetch(opened, "OPTIONS", "/v1/chat/completions", Origin=PAGE, **asked)
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, PAGE)
    assert "authorization" in headers["Access-Control-Allow-Headers"]
    assert "DELETE" in headers["Access-Control-Allow-Methods"]
    status, headers, _body = fetch(opened, "POST", "/v1/chat/completions", Origin=PAGE)
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, PAGE)


def test_other_pages_may_not(opened: Running, served: Running):
    other = {"Origin": "https://evil.example", "Access_Control_Request_Method": "POST"}
    assert fetch(opened, "OPTIONS", "/v1/chat/completions", **other)[0] == 400
    status, headers, _body = fetch(opened, "POST", "/v1/chat/completions", Origin="https://evil.example")
    assert (status, headers["Access-Control-Allow-Origin"]) == (403, None)
    assert fetch(served, "OPTIONS", "/v1/chat/completions", **other)[0] == 405
    assert fetch(served, "POST", "/v1/chat/completions", Origin=PAGE)[0] == 403


def test_all_pages_may_where_the_server_says_so(runs: Path):
    with running(runs, [Key(hashlib.sha256(b"mine").hexdigest(), None)], allowed_origins=("*",)) as served:
        _status, headers, _body = fetch(served, "GET", "/v1/models", Origin=PAGE, Authorization="Bearer mine")
        assert headers["Access-Control-Allow-Origin"] == "*"
        assert fetch(served, "GET", "/v1/models", Origin=PAGE)[0] == 401  # the key is asked for all the same


def test_a_name_of_this_machine_that_is_allowed_is_answered(opened: Running, served: Running):
    port = opened.url.rpartition(":")[2]
    assert curl(f"{opened.url}/v1/models", "-H", f"Host: Host.Docker.Internal:{port}")[0] == 200
    assert curl(f"{opened.url}/v1/models", "-H", "Host: evil.example")[0] == 403
    status, text = curl(f"{served.url}/v1/models", "-H", "Host: host.docker.internal")
    assert (status, "--allowed-hosts" in text) == (403, True)
