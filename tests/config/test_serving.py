"""Options of the server: defaults that reach no other machine, and bounds."""

import pytest

from lorasmith.config.serving import ServeConfig
from lorasmith.config.values import check
from lorasmith.errors import ConfigError


def test_by_default_no_other_machine_reaches_the_server():
    assert ServeConfig().host == "127.0.0.1"
    assert ServeConfig().keys is None


@pytest.mark.parametrize(
    ("option", "lowest", "too_low", "too_high"),
    [
        ("port", 0, -1, 65536),
        ("slots", 1, 0, 4097),
        ("queue", 0, -1, 1_000_001),
        ("cache_tokens", 1, 0, 1_000_000_001),
        ("context", 2, 1, 10_000_001),
        ("body_mib", 0.01, 0, 1025),
        ("drain", 0, -1, 86_401),
    ],
)
def test_numbers_have_bounds(option, lowest, too_low, too_high):
    assert getattr(check(ServeConfig, {option: lowest}, "serve"), option) == lowest
    for value in (too_low, too_high):
        with pytest.raises(ConfigError, match=rf"^serve\.{option}: invalid value {value}: must be "):
            check(ServeConfig, {option: value}, "serve")


@pytest.mark.parametrize(
    ("option", "right", "wrong", "says"),
    [
        ("allowed_origins", ("*", "http://localhost:3000", "app://obsidian.md"), "localhost:3000", "is not an origin"),
        ("allowed_origins", ("https://a.example",), "https://a.example/", "but no path"),
        ("allowed_hosts", ("host.docker.internal", "::1", "10.0.0.7"), "http://a", "is not a host name"),
        ("allowed_hosts", ("my_box",), "a.example:80", "without a scheme and a port"),
    ],
)
def test_origins_and_hosts_are_told_apart(option, right, wrong, says):
    assert getattr(check(ServeConfig, {option: right}, "serve"), option) == right
    with pytest.raises(ConfigError, match=says):
        check(ServeConfig, {option: (wrong,)}, "serve")
