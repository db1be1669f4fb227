"""Templates: values are escaped, and none may be missing."""

import pytest
from jinja2 import TemplateNotFound, UndefinedError

from lorasmith.pages.page import render_template

VALUES = {"facts": [], "most": 1, "words": {"title": "<b>Title</b>", "problems": "Problems", "ready": "Ready."}}


class Result:
    """As much of a check as the template asks for."""

    problems = ("a < b & c",)
    warnings = notes = lengths = rows = ()


def test_values_are_escaped():
    text = render_template("check.html", checked=Result, **VALUES)
    assert "<h1>&lt;b&gt;Title&lt;/b&gt;</h1>" in text
    assert "a &lt; b &amp; c" in text
    assert "<b>" not in text


def test_a_missing_value_is_an_error_and_no_blank():
    with pytest.raises(UndefinedError):
        render_template("check.html", checked=Result, **VALUES | {"words": {}})


def test_an_unknown_page_is_an_error():
    with pytest.raises(TemplateNotFound):
        render_template("nothing.html")
