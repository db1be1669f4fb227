"""The result of a check on a terminal and in a pipe."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from lorasmith.cli.check_result import histogram_lines, row_text, show, verdict
from lorasmith.preflight.check import CheckResult, check
from lorasmith.preflight.lengths import Bar
from lorasmith.preflight.rows import TextSpan
from tests.support.checks import config
from tests.support.tiny import rows_file


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> CheckResult:
    files = rows_file(tmp_path_factory.mktemp("check") / "rows.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return check(config(files))


@pytest.mark.parametrize("width", [80, 120])
def test_in_color_or_between_marks(checked, width, monkeypatch):
    def screen(**options: Any) -> str:
        file = io.StringIO()
        show(checked, Console(file=file, width=width, **options))
        return file.getvalue()

    color = screen(force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    marks = [screen(force_terminal=True, color_system="standard"), screen()]
    assert "\x1b[32m" in color
    assert "[[" not in color
    assert all(len(re.sub(r"\x1b\[\d+m", "", line)) <= width for line in marks[0].splitlines())
    for text in marks:
        assert "\x1b[32m" not in text
        assert "<|im_end|>]]" in text
        assert text.rstrip().removesuffix("\x1b[0m").endswith("ready to train")


@pytest.mark.parametrize(
    ("problems", "warnings", "text"),
    [
        (["a"], ["b"], "1 problem found; fix it first"),
        (["a", "b"], [], "2 problems found; fix them first"),
        ([], ["a", "b"], "ready to train; read the warnings first (2)"),
        ([], [], "ready to train"),
    ],
)
def test_the_last_line_says_whether_to_train(problems, warnings, text):
    assert verdict(CheckResult(problems, warnings)) == text


def test_bars_are_as_long_as_their_rows_and_none_that_has_rows_is_empty():
    lines = histogram_lines([Bar(1, 1, 400, 0), Bar(2, 99, 1, 0), Bar(100, 197, 0, 0), Bar(198, 295, 200, 3)], 250, "#")
    assert [ends.strip() for ends, _text in lines] == ["1", "2-99", "100-197", "198-295"]
    assert [text.count("#") for _ends, text in lines] == [40, 1, 0, 20]
    assert lines[3][1].endswith("200 (3 of them truncated at 250)")
    assert lines[2][1] == "0"


def test_marks_enclose_an_answer_with_its_stop_token():
    spans = [TextSpan("read", "Hi"), TextSpan("learned", "Yes"), TextSpan("stop", "</s>"), TextSpan("read", "x" * 500)]
    text = row_text(spans, marked=True).plain
    assert text.startswith("Hi[[Yes</s>]]xxx")
    assert "180 characters omitted" in text
    assert row_text(spans, marked=True, whole=True).plain == "Hi[[Yes</s>]]" + "x" * 500
