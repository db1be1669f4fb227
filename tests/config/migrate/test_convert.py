"""Whose file it is, and the TOML file that it becomes."""

import tomllib

import pytest

from lorasmith.config.migrate.convert import PROGRAMS, converted_toml
from lorasmith.config.toml import Config
from lorasmith.errors import ConfigError
from lorasmith.i18n import using_language
from tests.support.migrating import AXOLOTL, LLAMA_FACTORY, MLX_LM, MS_SWIFT, TRL, converted, described


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    described(tmp_path)


@pytest.mark.parametrize(
    ("text", "program"),
    [(LLAMA_FACTORY, "LLaMA-Factory"), (AXOLOTL, "Axolotl"), (MS_SWIFT, "ms-swift"), (TRL, "TRL"), (MLX_LM, "mlx-lm")],
)
def test_a_program_is_known_by_its_keys(tmp_path, text, program):
    config, done = converted(tmp_path, text)
    assert done.program == program
    assert config.model.model.endswith("org/base")
    written = converted_toml(config, done)
    assert Config.model_validate(tomllib.loads(written)) == config
    assert written.startswith(f"# Converted from {tmp_path / 'theirs.yaml'} ({program}).\n")


def test_no_key_belongs_to_two_programs():
    keys = [key for part in PROGRAMS.values() for key in part.SIGNATURE]
    assert len(keys) == len(set(keys))


def test_every_value_says_where_it_is_from(tmp_path):
    config, done = converted(tmp_path, AXOLOTL + "lora_dropout: 0.1\nfoo: 1\n")
    lines = converted_toml(config, done).splitlines()
    assert "# Not taken over: foo: 1: lorasmith has no such option." in lines
    assert lines[lines.index("lora_dropout = 0.1") - 1].endswith(" (from lora_dropout)")
    at = lines.index('schedule = "cosine"')
    assert lines[at - 1].endswith(" (not set in the file; this is the default of Axolotl)")
    assert not lines[lines.index("row_tokens = 2048") - 1].endswith(")")


def test_unknown_and_ambiguous_files(tmp_path):
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, "learning_rate: 1e-4\nbase_model: a\n")
    assert "not recognized as a training configuration. It needs at least 2 keys of one program" in str(caught.value)
    assert all(name in str(caught.value) for name in PROGRAMS)
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, "stage: sft\ncutoff_len: 9\nbase_model: a\nsequence_len: 9\n")
    assert "(cutoff_len, stage) and as many of Axolotl (base_model, sequence_len)" in str(caught.value)


def test_in_chinese(tmp_path):
    with using_language("zh"):
        config, done = converted(tmp_path, AXOLOTL + "foo: 1\nflash_attention: true\nbar: false\n")
        text = converted_toml(config, done)
        assert "lorasmith 没有这个选项" in text
        with pytest.raises(ConfigError) as caught:
            converted(tmp_path, AXOLOTL + "rl: grpo\n")
    assert "强化学习" in str(caught.value)
