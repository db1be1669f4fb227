"""Variables of a chat template: set for training and for all replies afterwards, refused if the template has none."""

import json
from pathlib import Path

import pytest

from lorasmith.adapters.session import open_adapters
from lorasmith.data.rows.conversation import Message
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.variables import check_variables
from lorasmith.errors import ConfigError
from lorasmith.preflight.check import check
from lorasmith.preflight.suggest import suggest
from tests.support.checks import config
from tests.support.tiny import Watch, rows_file, tokenizer, trained

TEXT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MOOD = TEXT.replace(
    "{% for m", "{% if mood is defined %}mood {{ mood }}{% if loud is true %}!{% endif %} {% endif %}{% for m"
)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mood.jinja"
    path.write_text(MOOD, "utf-8")
    return str(path)


def test_a_variable_is_one_that_the_template_mentions():
    template = Template(tokenizer("llama"), "file", MOOD, (0,))
    check_variables(template, ["mood", "loud"])
    check_variables(template, [])
    with pytest.raises(ConfigError) as caught:
        check_variables(template, ["moods", "depth"])
    assert caught.value.problems == (
        "data.template_kwargs: the chat template has no variable 'moods'. Remove it. Did you mean 'mood'?",
        "data.template_kwargs: the chat template has no variable 'depth'. Remove it.",
    )


def test_a_template_without_variables_has_none():
    with pytest.raises(ConfigError, match="has no variable 'enable_thinking'"):
        check_variables(Template(tokenizer("bloom"), "human-assistant", "", (0,)), ["enable_thinking"])


def test_training_and_replies_have_the_same_variables(tmp_path, file):
    trained(tmp_path / "run", template=file, template_kwargs={"mood": "good", "loud": True})
    metadata = json.loads((tmp_path / "run" / "adapter" / "lorasmith.json").read_text("utf-8"))
    assert metadata["template"]["kwargs"] == {"mood": "good", "loud": True}
    template = open_adapters([tmp_path / "run"]).template
    assert template.render((Message("user", "Hi"),)) == "mood good! user: Hi<eos>assistant:"


def test_a_variable_that_the_template_does_not_have_is_refused_everywhere(tmp_path, file):
    rows, wrong = rows_file(tmp_path / "rows.jsonl"), {"template": file, "template_kwargs": {"moods": "good"}}
    said = "data.template_kwargs: the chat template has no variable 'moods'."
    with pytest.raises(ConfigError, match=said):
        trained(tmp_path / "run", **wrong)
    asked = config(rows)
    asked = asked.model_copy(update={"data": asked.data.model_copy(update=wrong)})
    assert check(asked).problems[0].startswith(said)
    with pytest.raises(ConfigError, match=said):
        suggest(asked, Watch())
