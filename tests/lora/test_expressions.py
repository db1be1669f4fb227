"""An expression that would never end is refused; others match as in the standard library."""

import re
import time

import pytest

from lorasmith.errors import ConfigError
from lorasmith.lora import expressions
from lorasmith.lora.expressions import by_end, ends_with, full_match, key_matches, limited_time, match

ENDLESS = r"(a|ab|b|[a-z.])*\d"
OTHERS = (r".*\.[qk]_proj", r"model\.layers\.(\d+)\..*", "lm_head", r".*(?<!up)_proj", "")
PATHS = ("model.layers.3.self_attn.q_proj", "lm_head", "model.layers.13.mlp.up_proj")


@pytest.mark.parametrize(
    "expression", [r".*\.[qk]_proj", r"model\.layers\.(\d+)\..*", "lm_head", r".*(?<!up)_proj", ""]
)
def test_others_match_as_in_the_standard_library(expression):
    for path in PATHS:
        assert bool(full_match(expression, path)) == bool(re.fullmatch(expression, path))
        assert bool(match(expression, path)) == bool(re.match(expression, path))


def test_the_time_is_that_of_all_expressions_together_where_it_is_limited(monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 0.3)
    path = "model." + "layers.ab." * 40 + "q_proj"
    with limited_time():
        assert full_match(".*q_proj", path)
        with pytest.raises(ConfigError, match="takes longer"):
            full_match(ENDLESS, path)
        with pytest.raises(ConfigError, match="takes longer"):
            full_match(".*q_proj", path)
    assert full_match(".*q_proj", path)


def test_paths_are_found_by_all_their_ends():
    found = by_end(["", "a.b.c", "b.c", "c.b"])
    assert found == {
        "": [""],
        "a.b.c": ["a.b.c"],
        "b.c": ["a.b.c", "b.c"],
        "c": ["a.b.c", "b.c"],
        "c.b": ["c.b"],
        "b": ["c.b"],
    }
    assert all(ends_with(path, name) for name, paths in found.items() for path in paths)


def test_an_expression_that_would_not_end_is_refused(monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 0.2)
    path, began = "model." + "layers.ab." * 40 + "q_proj", time.monotonic()
    with pytest.raises(ConfigError, match=r"takes longer than 0\.2 s on the module path model\.layers"):
        full_match(ENDLESS, path)
    with pytest.raises(ConfigError, match="without repetitions within repetitions"):
        key_matches(ENDLESS, path)
    assert time.monotonic() - began < 20
