"""Options of the data: templates by name or file, and columns that row formats read."""

import pytest

from lorasmith.config.data import COLUMNS, TEMPLATES, DataConfig
from lorasmith.config.values import CommandLineText, check
from lorasmith.errors import ConfigError


@pytest.mark.parametrize("name", [*TEMPLATES, "./chat.jinja", "chat.jinja", "a/b", r"a\b"])
def test_a_template_is_a_known_name_or_a_path(name):
    assert DataConfig(template=name).template == name


def test_a_template_with_a_misspelled_name_is_refused():
    with pytest.raises(ConfigError, match=r"^data\.template: 'chatlm' is not one of .* Did you mean 'chatml'\?$"):
        check(DataConfig, {"template": "chatlm"}, "data")


def test_variables_of_the_template_are_json_on_the_command_line_and_toml_in_a_file():
    words = {"a": "false", "b": "3", "c": "0.5", "d": "high", "e": '"false"', "f": "[1]", "g": "x=y"}
    typed = check(DataConfig, {"template_kwargs": {k: CommandLineText(v) for k, v in words.items()}}, "data")
    wanted = {"a": False, "b": 3, "c": 0.5, "d": "high", "e": "false", "f": "[1]", "g": "x=y"}
    assert typed.template_kwargs == wanted
    assert {k: type(v) for k, v in typed.template_kwargs.items()} == {k: type(v) for k, v in wanted.items()}
    assert DataConfig(template_kwargs={"a": False, "b": "3"}).template_kwargs == {"a": False, "b": "3"}
    with pytest.raises(ConfigError, match=r"^data\.template_kwargs: invalid value \{'a': \[1\]\}: must be "):
        check(DataConfig, {"template_kwargs": {"a": [1]}}, "data")


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "tokenize", "a b", "1x", ""])
def test_a_variable_that_lorasmith_sets_itself_is_refused(name):
    with pytest.raises(ConfigError, match=rf"^data\.template_kwargs: '{name}' cannot be set: "):
        check(DataConfig, {"template_kwargs": {name: True}}, "data")


def test_columns_are_mapped_to_known_ones():
    assert DataConfig(map=dict.fromkeys(COLUMNS, "mine")).map.keys() == set(COLUMNS)
    with pytest.raises(ConfigError, match=r"^data\.map: unknown column 'answer'"):
        check(DataConfig, {"map": {"answer": "mine"}}, "data")


def test_columns_of_one_file_take_precedence():
    columns = {"output": "a", "talks.jsonl:output": "b", "x/other.jsonl:messages": "c"}
    config = DataConfig(map=columns)
    assert config.map_of("data/talks.jsonl") == config.map_of("talks.jsonl") == {"output": "b"}
    assert config.map_of("x/other.jsonl") == {"output": "a", "messages": "c"}
    assert config.map_of("other.jsonl") == {"output": "a"}
    with pytest.raises(ConfigError, match=r"^data\.map: unknown column 'answer'"):
        check(DataConfig, {"map": {"talks.jsonl:answer": "mine"}}, "data")


def test_roles_stand_for_known_ones():
    assert DataConfig(roles={"agent": "assistant"}).roles == {"agent": "assistant"}
    with pytest.raises(ConfigError, match=r"^data\.roles: agent=asistant: 'asistant' is not a role; .*'assistant'\?$"):
        check(DataConfig, {"roles": {"agent": "asistant"}}, "data")


@pytest.mark.parametrize("number", [-0.1, 1.5, float("nan")])
def test_bad_rows_are_a_number_or_a_fraction(number):
    assert DataConfig(skip_bad_rows=0.1).skip_bad_rows == 0.1
    assert DataConfig(skip_bad_rows=7).skip_bad_rows == 7
    with pytest.raises(ConfigError, match=r"^data\.skip_bad_rows: "):
        check(DataConfig, {"skip_bad_rows": number}, "data")


@pytest.mark.parametrize(
    ("option", "value"), [("max_length", 1), ("max_length", 10_000_001), ("learn", "nothing"), ("too_long", "cut")]
)
def test_another_value_is_refused_by_name(option, value):
    with pytest.raises(ConfigError, match=rf"^data\.{option}: invalid value "):
        check(DataConfig, {option: value}, "data")


def test_tokens_to_add_are_words_that_are_given_once():
    assert DataConfig(add_tokens=("<call>", "</call>", "a b")).add_tokens == ("<call>", "</call>", "a b")
    for tokens, text in (
        (["<a>", "<a>"], "'<a>' is given twice; give it once"),
        ([" <a>"], "' <a>' is empty, or begins or ends with white space"),
        ([""], "'' is empty, or begins"),
    ):
        with pytest.raises(ConfigError, match=rf"^data\.add_tokens: {text}"):
            check(DataConfig, {"add_tokens": tokens}, "data")
