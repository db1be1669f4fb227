"""The line per request: what stands in it, and what does not."""

import logging
import re

import pytest

from lorasmith.serve import access_log
from tests.support.serving import HI, Running, curl, user, wait_for


def test_a_request_has_a_line_without_its_content(served: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lorasmith.access"):
        served.client().chat.completions.create(model="loud", messages=user(HI), max_tokens=2)
        wait_for(lambda: caplog.records)
    (line,) = caplog.messages
    assert re.fullmatch(r"[\d-]{10} [\d:]{8} 127\.0\.0\.1 POST /v1/chat/completions 200 \d+\.\d\d s loud", line)


def test_no_path_begins_a_new_line_and_probes_are_left_out(served: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lorasmith.access"):
        for path in ("/health", "/ready", "/metrics", "/no%0Athing?key=secret", "/" + "x" * 999):
            curl(served.url + path)
        wait_for(lambda: len(caplog.records) == 2)
    first, second = caplog.messages
    assert first.split()[2:6] == ["127.0.0.1", "GET", "/no%0Athing", "404"]
    assert second.split()[4] == "/" + "x" * 199


def test_it_goes_to_standard_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "log", logging.Logger("another"))
    access_log.show_log()
    access_log.log.info("%s", "a line")
    assert capsys.readouterr().err == "a line\n"
