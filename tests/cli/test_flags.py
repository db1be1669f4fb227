"""Every field is a flag with a help text; what is typed reaches the configuration."""

import pytest

from lorasmith.cli import chat, generate, train
from lorasmith.cli.flags import FLAG_SECTIONS, config_of, flag_name, given
from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.toml import SECTIONS, Config
from lorasmith.config.values import check
from lorasmith.errors import ConfigError


def typed(*argv: str) -> Config:
    args, problems = train.parser().read(argv)
    assert problems == []
    return config_of(args)


def test_every_field_has_a_flag_of_its_own_and_a_description():
    flags = [flag for action in train.parser()._actions for flag in action.option_strings]
    seen = 0
    for name, part in SECTIONS.items():
        for key, field in part.model_fields.items():
            assert flags.count(flag_name(f"{name}.{key}")) == 1, key
            assert field.description, key
            seen += 1
    assert seen >= 39
    assert "--output" in flags
    assert all(field.description for field in FLAG_SECTIONS["sampling"].model_fields.values())


def test_every_flag_reaches_its_field(tmp_path):
    values = {
        "model": {"model": "m", "dtype": "float32", "quantize": "int8", "device": "cpu", "trust_remote_code": True},
        "data": {
            "roles": {"agent": "assistant"},
            "data": ("a", "b"), "max_samples": 5, "map": {"instruction": "question"},
            "held_out": 0.5, "held_out_seed": 3, "train_rows": 7,
            "template": "model", "template_kwargs": {"effort": "high"}, "system": "s", "learn": "answers",
            "max_length": 9, "too_long": "drop", "fill": {"name": "Ada"}, "skip_bad_rows": 0.1, "system_as": "user",
            "special_tokens": "tokens", "leading_answer": "drop", "add_tokens": ("<a>", "</a>"),
        },
        "lora": {
            "r": 3, "lora_alpha": 4.0, "lora_dropout": 0.5, "target_modules": ("x", "y"), "exclude_modules": "z",
            "target_parameters": ("u", "v"),
            "layers_to_transform": (1, 2), "last_layers": None, "rank_pattern": {"a=b": 3}, "alpha_pattern": {"c": 2.5},
            "modules_to_save": ("h",), "bias": "all", "use_rslora": True, "use_dora": True,
            "lora_bias": True, "alora_invocation_tokens": None,  # which excludes bias and modules_to_save
            "init_lora_weights": "gaussian",
        },
        "training": {
            "start_from": "runs/first", "batch_size": 2, "accumulate": 3, "epochs": 0.5, "max_steps": 4,
            "learning_rate": 1e-3, "schedule": "cosine", "warmup": 5.0, "min_learning_rate": 1e-5,
            "optimizer": "adamw8bit", "loraplus_lr_ratio": 16.0,
            "beta1": 0.8, "beta2": 0.7, "eps": 1e-6, "weight_decay": 0.1, "clip": 0.5,
            "gradient_checkpointing": True, "row_tokens": 64, "log_every": 2, "eval_every": 3, "save_every": 6,
            "keep_checkpoints": 4, "seed": 7, "patience": 2, "samples": ("Why?", "考试有哪些技巧？"),
            "tensorboard": True, "report_to": ("wandb", "mlflow"),
            "generate": 5, "max_new_tokens": 9, "metric": ("a.py:f",), "method": "simpo",
        },
        "preference": {
            "beta": 0.5, "gamma": 0.7, "label_smoothing": 0.1, "rpo_alpha": 0.2,
            "desirable_weight": 1.0, "undesirable_weight": 1.0,  # the defaults, because simpo does not use them
        },
    }  # fmt: skip
    argv = []
    for name, part in SECTIONS.items():
        assert set(values[name]) == set(part.model_fields)  # a new field must come here too
        for key, value in ((k, v) for k, v in values[name].items() if v is not None):
            items = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
            words = list(map(str, items)) if isinstance(items, (tuple, list)) else [str(value)]
            argv += [flag_name(f"{name}.{key}"), *([] if value is True else words)]
    assert typed(*argv) == Config.model_validate(values)
    assert typed("--last-layers", "2").lora.last_layers == 2  # which excludes layers_to_transform
    assert typed("--alora-invocation-tokens", "5", "7").lora.alora_invocation_tokens == (5, 7)
    assert typed("--learn", "all").data.learn == "all"  # which no training on preferences has
    weights = typed("--method", "kto", "--desirable-weight", "2", "--undesirable-weight", "0.5").preference
    assert (weights.desirable_weight, weights.undesirable_weight) == (2.0, 0.5)


@pytest.mark.parametrize(
    "argv", [("a", "b"), ("--data", "a", "b"), ("a", "--data", "b"), ("--data", "a", "--data", "b")]
)
def test_data_by_place_or_by_flag(argv):
    assert typed("--output", "run", *argv).data.data == ("a", "b")
    assert typed(*argv, "--r", "3").data.data == ("a", "b")


def test_flags_may_stand_between_words():
    args, problems = generate.parser().read(["run", "--temperature", "1", "hello"])
    assert (args.run, args.prompt, problems) == ("run", "hello", [])
    assert typed("a", "--r", "3", "b").data.data == ("a", "b")


@pytest.mark.parametrize(("word", "value"), [("10", 10.0), ("0.1", 0.1), ("held.jsonl", "held.jsonl")])
def test_held_out_is_a_number_or_a_file(word, value):
    assert typed("--held-out", word).data.held_out == value


def test_one_target_is_an_expression_several_are_names():
    assert typed("--target-modules", r".*\.q_proj").lora.target_modules == r".*\.q_proj"
    assert typed("--target-modules", "q", "v").lora.target_modules == ("q", "v")
    assert typed("--modules-to-save", "head").lora.modules_to_save == ("head",)


def test_a_switch_goes_both_ways_over_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[lora]\nuse_rslora = true\n")
    assert typed("--config", str(path)).lora.use_rslora
    assert not typed("--config", str(path), "--no-use-rslora").lora.use_rslora


def test_unknown_flags_are_not_guessed():
    _args, problems = train.parser().read(["d", "--learning-rat", "1", "--batch=2"])
    assert problems == [
        "unknown option --learning-rat. Did you mean '--learning-rate'?",
        "unknown option --batch. Did you mean '--batch-size'?",
    ]


def test_a_pair_without_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"lora.rank_pattern: invalid value \['q'\]: must be pairs of name=value"):
        typed("--rank-pattern", "q")


def test_columns_are_mapped_from_names_that_rows_have():
    assert typed("a", "--map", "instruction=frage", "output=a b").data.map == {"instruction": "frage", "output": "a b"}
    assert typed("a", "--map", "output=a=b").data.map == {"output": "a=b"}
    assert typed("a", "--rank-pattern", "(?=q)q_proj=4").lora.rank_pattern == {"(?=q)q_proj": 4}
    with pytest.raises(
        ConfigError,
        match=r"data\.map: unknown column 'question': no row format uses it; known columns are chosen, ",
    ):
        typed("--map", "question=instruction")


def test_sampling_flags_make_a_sampling_config():
    args, _problems = chat.parser().read(["run", "--temperature", "0.7", "--stop", "\n\n", "--model", "m"])
    values = given(args)
    assert check(SamplingConfig, values["sampling"]) == SamplingConfig(temperature=0.7, stop=("\n\n",))
    assert values["model"] == {"model": "m"}
