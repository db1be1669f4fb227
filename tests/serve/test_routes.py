"""Every route asks for a key, unless it is meant for all, and stands in both pages about serving."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from lorasmith.serve import app
from lorasmith.serve.auth import Key
from tests.support.paths import ROOT
from tests.support.serving import Running, ask, running

PAGE = {"/", "/page/{name}"}  # open to everybody: it asks for a key itself
OPEN = {"/health", "/ready"} | PAGE  # the others are for whoever monitors the server


@pytest.fixture(scope="module")
def locked(runs: Path) -> Iterator[tuple[Running, list[APIRoute]]]:
    """A server with keys, and its routes."""
    made: list[FastAPI] = []

    class Kept(FastAPI):
        def setup(self) -> None:
            super().setup()
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "FastAPI", Kept)
        with running(runs, [Key(hashlib.sha256(b"mine").hexdigest(), None)]) as served:
            yield served, [route for route in made[0].routes if isinstance(route, APIRoute)]


def test_every_route_that_is_not_for_all_asks_for_a_key(locked: tuple[Running, list[APIRoute]]):
    served, routes = locked
    assert {route.path for route in routes} > OPEN
    for route in routes:
        if route.path not in OPEN:
            for method in route.methods:
                status, body = ask(
                    served, method, re.sub(r"{.*?}", "calm", route.path), {} if method == "POST" else None
                )
                assert (status, body["error"]["code"]) == (401, "invalid_api_key"), f"{method} {route.path}"


@pytest.mark.parametrize("page", ["docs/serving.md", "docs/serving.zh.md"])
def test_every_route_stands_in_the_page(locked: tuple[Running, list[APIRoute]], page: str):
    text = (ROOT / page).read_text("utf-8")
    for path in {route.path for route in locked[1]} - PAGE:
        assert re.sub(r"/{.*?}", "", path) in text, f"{path} is missing in {page}"
