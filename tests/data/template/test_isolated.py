"""Chat templates of adapters, which must not keep a server busy or take its memory."""

import time
from collections.abc import Iterator

import pytest

from lorasmith.data.rows.conversation import Message, RowError
from lorasmith.data.template import isolated
from lorasmith.data.template.chat_template import CHATML, JinjaTemplate
from lorasmith.data.template.isolated import IsolatedRenderer
from lorasmith.errors import AdapterError
from lorasmith.loading.tokenizer import load_tokenizer
from tests.support import tiny

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
MESSAGES = (
    Message("system", "Be brief."),
    Message("user", 'Schön \ud83d "quoted" & <b>\n😀'),
    Message(
        "assistant",
        "a",
        tool_calls=({"type": "function", "function": {"name": "look", "arguments": {"x": [1, None]}}},),
    ),
)
TEMPLATES = [
    CHATML,
    "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools | tojson }}{{ extra }}",
    "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    "{% generation %}x{% endgeneration %}",
]


@pytest.fixture(scope="module")
def renderer() -> Iterator[IsolatedRenderer]:
    made = IsolatedRenderer(frozenset({"{{ 1 }}"}))
    yield made
    made.close()


@pytest.mark.parametrize("text", TEMPLATES)
def test_the_text_is_that_of_transformers(renderer: IsolatedRenderer, text: str) -> None:
    tokenizer = load_tokenizer(tiny.model_folder())
    here = JinjaTemplate(tokenizer, text, {"extra": {"a": [1.5, "é"]}})
    there = JinjaTemplate(tokenizer, text, {"extra": {"a": [1.5, "é"]}}, renderer=renderer)
    assert there.behavior == here.behavior
    for prompt in (True, False):
        for tools in ((), (TOOL,)):
            assert there.render(MESSAGES, prompt, "", tools) == here.render(MESSAGES, prompt, "", tools)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 1 s"),
        ("{{ 10 ** (10 ** 9) }}", "takes longer than 1 s"),
        ("{{ 'x' * 10 ** 10 }}", "more than 1024 MiB of memory"),
        ("{{ '%0999999999d' % 1 }}{{ '%0999999999d' % 1 }}", "1024 MiB of memory|longer than 1 s"),
        ("{{ 'x' * 3 * 10 ** 6 }}", "far longer than the messages"),
    ],
)
def test_a_template_that_does_not_end_or_multiplies_text_is_stopped(
    renderer: IsolatedRenderer, text: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer.render("", [{"role": "user", "content": "?"}], {})  # it has started
    monkeypatch.setattr(isolated, "SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(AdapterError, match=says):
        renderer.render(text, [{"role": "user", "content": "?"}], {})
    assert time.monotonic() - began < 30  # the first error of a test run takes a while
    monkeypatch.setattr(isolated, "SECONDS", 10.0)
    assert renderer.render("{{ messages[0].content }}", [{"role": "user", "content": "?"}], {}) == "?"


def test_what_the_template_refuses_is_said_and_the_process_goes_on(renderer: IsolatedRenderer) -> None:
    template = JinjaTemplate(
        load_tokenizer(tiny.model_folder()), "{{ raise_exception('no system') }}", {}, renderer=renderer
    )
    process = renderer._process
    with pytest.raises(RowError, match="no system"):
        template.render(MESSAGES, False, "row 3")
    with pytest.raises(ValueError, match="expected token"):
        renderer.render("{{ 1 2 }}", [], {})
    with pytest.raises(ValueError, match="unsafe"):
        renderer.render("{{ messages.__class__.__mro__ }}", [], {})
    assert renderer._process is process


def test_a_trusted_template_needs_no_process() -> None:
    apart = IsolatedRenderer(frozenset({CHATML}))
    JinjaTemplate(load_tokenizer(tiny.model_folder()), CHATML, {}, renderer=apart).render(MESSAGES[:2], True, "")
    assert apart._process is None


def test_a_process_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated.sys, "executable", "/bin/true")
    with pytest.raises(AdapterError, match="could not be started"):
        IsolatedRenderer(frozenset()).render("", [], {})
