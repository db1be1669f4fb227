"""Which errors the tests really raise: with --every-error each text of docs/errors.md must be among them.

`make test` gives that option for a run of all tests; some tests alone raise some errors, and are not asked.
"""

import re
from functools import cache
from typing import Any

import pytest
from tools.error_texts import error_texts
from tools.errors_page import Notes

from lorasmith.errors import LorasmithError


class Recorder:
    """A plugin of pytest: notes errors while tests run, gathers what the processes of xdist noted, and compares."""

    def __init__(self) -> None:
        self.raised: set[str] = set()

    def listen(self) -> None:
        """From now on every error that is made is noted."""
        make = LorasmithError.__init__

        def noted(error: LorasmithError, *problems: str) -> None:
            make(error, *problems)
            self.raised.update(*map(texts_in, problems))

        LorasmithError.__init__ = noted  # type: ignore[method-assign]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["raised"] = sorted(self.raised)
        elif session.config.getoption("every_error") and self.missing():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.raised.update(getattr(node, "workeroutput", {}).get("raised", ()))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        if config.getoption("every_error"):
            for text in sorted(self.missing()):
                terminalreporter.write_line(f"FAILED docs/errors.md - raised by no test: {text!r}", red=True)

    def missing(self) -> set[str]:
        """Texts of the page that no test raised."""
        return set(forms()) - self.raised


@cache
def forms() -> dict[str, re.Pattern[str]]:
    """Every text of the page with what it looks like once its values are filled in."""
    return {one.text: form(one.text) for one in error_texts() if one.text not in Notes.read().parts}


def form(text: str) -> re.Pattern[str]:
    """Anything may stand for `{name}`."""
    return re.compile(".*".join(map(re.escape, literals(text))), re.DOTALL)


def literals(text: str) -> list[str]:
    """What stands around each `{name}`. Braces that are meant are written twice."""
    words = re.split(r"\{(?!\{)[^{}]*\}(?!\})", text)
    return [word.replace("{{", "{").replace("}}", "}") for word in words]


@cache
def literal(text: str) -> str:
    """The longest of `literals`, which is looked for first, because an expression takes a hundred times as long."""
    return max(literals(text), key=len)


@cache
def texts_in(problem: str) -> frozenset[str]:
    """The texts that a problem holds; of two where one is a case of the other ('{why}', 'no such file'), that one."""
    found = {text for text, form in forms().items() if literal(text) in problem and form.search(problem)}
    return frozenset(text for text in found if not any(_is_case(other, text) for other in found - {text}))


def _is_case(text: str, general: str) -> bool:
    """Whether `text` is a case of `general`. Two that differ only in the names of their values are not."""
    return bool(forms()[general].search(text)) and not forms()[text].search(general)
