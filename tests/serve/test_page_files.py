"""The files of the page: their types and headers, and nothing besides them."""

import urllib.request

import pytest

from tests.support.serving import Running, curl


@pytest.mark.parametrize(
    ("path", "kind"), [("", "text/html"), ("page/main.js", "text/javascript"), ("page/style.css", "text/css")]
)
def test_the_page_is_served_with_its_types_and_nothing_else_is(served: Running, path: str, kind: str):
    with urllib.request.urlopen(f"{served.url}/{path}", timeout=20) as reply:
        assert reply.headers["Content-Type"].split(";")[0] == kind
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
    for other in ("page/app.py", "page/..%2Fapp.py", "page/none.js"):
        assert curl(f"{served.url}/{other}")[0] == 404
