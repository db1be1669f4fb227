"""No key of their file is dropped in silence, and the command line takes precedence."""

import pytest

from lorasmith.config.migrate.migration import Migration, shown, words
from lorasmith.config.migrate.reading import Foreign
from lorasmith.errors import ConfigError
from tests.support.migrating import AXOLOTL, converted


def migration(folder, values, **given) -> Migration:
    return Migration(Foreign(folder / "theirs.yaml", values), "Axolotl", given)


def test_every_key_is_somewhere(tmp_path):
    keys = "lora_dropout: 0.1\nlora_modules_to_save:\nflash_attention: true\n"
    keys += "what_is_this: 7\nnot_that: false\nnor_this: []\n"
    config, done = converted(tmp_path, AXOLOTL + keys)
    assert config.lora.lora_dropout == 0.1
    assert done.comments["lora.lora_dropout"] == "from lora_dropout"
    assert done.no_effect == {"speed, memory and processes, which lorasmith chooses itself": ["flash_attention"]}
    assert done.unmatched == {"what_is_this: 7": "lorasmith has no such option."}
    assert done.off == ["not_that"]
    assert not done.left
    assert done.head()[1:] == [
        "Not taken over: what_is_this: 7: lorasmith has no such option.",
        "Not needed (speed, memory and processes, which lorasmith chooses itself): flash_attention.",
        "Switched off in the file, and unknown to lorasmith: not_that.",
    ]


def test_the_command_line_takes_precedence(tmp_path):
    given = {"lora": {"r": 4}, "model": {"model": "org/other"}, "data": {"data": ["mine.jsonl"]}, "output": "runs/x"}
    config, done = converted(tmp_path, AXOLOTL.replace("type: chat_template", "type: unknown"), given=given)
    assert (config.lora.r, config.model.model, config.data.data, config.output) == (
        4,
        "org/other",
        ("mine.jsonl",),
        "runs/x",
    )
    assert config.lora.lora_alpha == 32
    assert "lora.r" not in done.comments


def test_all_that_is_refused_is_said_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, AXOLOTL + "qat: true\nrl: grpo\n")
    assert [problem.split(": ")[1:3] for problem in caught.value.problems] == [["rl", "grpo"], ["qat", "true"]]


def test_a_value_that_is_not_possible_is_named_with_its_key(tmp_path):
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, AXOLOTL.replace("lora_r: 16", "lora_r: many"))
    (problem,) = caught.value.problems
    assert problem.endswith("theirs.yaml: lora.r: invalid value 'many': must be a whole number (from lora_r)")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            AXOLOTL.replace("base_model: org/base", "num_epochs: 1"),
            "does not name a base model. Give one with --model.",
        ),
        (AXOLOTL[: AXOLOTL.index("datasets")], "does not name training data. Give the data files after --from FILE."),
        (AXOLOTL + "output_dir: ${HOME}/x\n", "output_dir: ${HOME}/x: contains a variable. Write the value itself."),
    ],
)
def test_what_must_be_there(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, text)
    assert words in str(caught.value)


def test_a_dollar_ends_a_regular_expression_in_yaml_and_begins_a_variable_in_a_script(tmp_path):
    config, _done = converted(tmp_path, AXOLOTL + "lora_target_modules: '.*(q|v)_proj$'\n")
    assert config.lora.target_modules == ".*(q|v)_proj$"
    script = "swift sft --model $MODEL --dataset org/rows --tuner_type lora --target_modules all-linear"
    with pytest.raises(ConfigError, match=r"model: \$MODEL: contains a variable"):
        converted(tmp_path, script, "train.sh")


def test_an_output_folder_with_files_is_not_taken_over(tmp_path):
    (tmp_path / "out").mkdir()
    text = AXOLOTL + f"output_dir: {tmp_path / 'out'}\n"
    assert converted(tmp_path, text)[0].output == str(tmp_path / "out")
    (tmp_path / "out" / "model").write_text("", "utf-8")
    config, done = converted(tmp_path, text)
    assert config.output is None
    assert "give a new one to lorasmith train --output" in " ".join(done.unmatched.values())


def test_an_option_that_another_one_rules_out(tmp_path):
    done = migration(tmp_path, {"a": 0.5})
    done.put("training.beta1", done.take("a"), "a")
    done.default("training.beta2", 0.9)
    for option in ("training.beta1", "training.beta2", "training.eps"):
        done.forget(option)
    assert (done.values, done.comments) == ({"training": {}}, {})
    assert done.unmatched == {"a: 0.5": "lorasmith has no such option."}


def test_a_part_that_is_no_part_is_left(tmp_path):
    done = migration(tmp_path, {"part": 3, "other": {"a": 1, "b": None}})
    assert done.take_part("part") == {}
    assert done.take_part("other") == {"a": 1, "b": None}
    assert done.left == {"part": 3, "other.a": 1}


def test_paths_are_looked_for_here_and_above_the_file(tmp_path, monkeypatch):
    folder = tmp_path / "project" / "configs"
    folder.mkdir(parents=True)
    (tmp_path / "project" / "rows.jsonl").write_text("", "utf-8")
    done = migration(folder, {})
    monkeypatch.chdir(folder)
    assert done.path("rows.jsonl") == tmp_path / "project" / "rows.jsonl"
    monkeypatch.chdir(tmp_path)
    assert str(done.path("rows.jsonl")) == "project/rows.jsonl"
    assert done.path("none.jsonl") is None
    assert done.path("x" * 999) is None


def test_values_are_shown_in_short():
    assert [shown(value) for value in (True, 1e-4, "a\nb", {"a": {}}, [1, "b"], "x" * 99)] == [
        "true", "0.0001", "a b", "{a}", "1, b", "x" * 57 + "...",
    ]  # fmt: skip
    assert words("a, b,") == words(["a", " b"]) == ["a", "b"]
