"""One configuration from a file and flags: merged, checked once, written back."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.toml import SECTIONS, Config, load_config, to_toml
from lorasmith.config.values import CommandLineText, check
from lorasmith.errors import ConfigError


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path | None, flags: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, flags)
    return sorted(caught.value.problems)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = toml(tmp_path, 'output = "a"\n[lora]\nr = 4\nlora_alpha = 5\n[training]\nseed = 3\n')
    config = load_config(path, {"lora": {"r": 16}, "output": "b"})
    assert (config.lora.r, config.lora.lora_alpha, config.training.seed, config.output) == (16, 5.0, 3, "b")
    assert config.lora.bias == "none"


def test_a_flag_mends_a_wrong_value_of_the_file(tmp_path):
    assert load_config(toml(tmp_path, "[lora]\nr = 0\n"), {"lora": {"r": 2}}).lora.r == 2


def test_all_problems_come_at_once_each_with_the_way_out(tmp_path):
    text = (
        '[lora]\nr = 0\ntarget_moduls = ["a"]\nsched = 1\n[training]\nlora_alpha = 1\nschedule = "cosin"\n[trainin]\n'
    )
    assert problems(toml(tmp_path, text), {"training": {"save_every": "x", "beta1": CommandLineText("1")}}) == [
        "lora.r: invalid value 0: must be greater than 0",
        "lora.sched: unknown key.",
        "lora.target_moduls: unknown key. Did you mean 'target_modules'?",
        "trainin: unknown key. Did you mean 'training'?",
        "training.beta1: invalid value '1': must be less than 1",
        "training.lora_alpha: unknown key. Did you mean 'lora.lora_alpha'?",
        "training.save_every: invalid value 'x': must be a whole number or 'epoch'",
        "training.schedule: invalid value 'cosin': must be 'cosine', 'linear' or 'constant'",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("lora = 3", "lora: invalid value 3: must be a section with keys"),
        ("[lora]\ntarget_modules = 3", "lora.target_modules: invalid value 3: must be text or a list"),
        ("[lora]\nrank_pattern = 3", "lora.rank_pattern: invalid value 3: must be pairs of name=value"),
        ("[data]\nheld_out = true", "data.held_out: invalid value True: must be a number or text"),
        ("[lora]\nuse_rslora = 'x'", "lora.use_rslora: invalid value 'x': must be true or false"),
        ("[lora]\nr = 1.5", "lora.r: invalid value 1.5: must be a whole number"),
        ("[training]\nlearning_rate = 'x'", "training.learning_rate: invalid value 'x': must be a number"),
        (
            "[lora]\ntarget_modules = ''",
            "lora: no module would be adapted: name modules in target_modules, or use all-linear",
        ),
        ("[lora]\nrank_pattern = {'(' = 1}", "lora.rank_pattern: '(' is not a valid regular expression: "),
        ("r = 3", "r: unknown key. Did you mean 'lora.r'?"),
    ],
)
def test_the_voice_of_a_problem(tmp_path, text, line):
    (found,) = problems(toml(tmp_path, text), {"lora": {"r": 2}} if text.startswith("lora") else {})
    assert found.startswith(line)


def test_toml_that_cannot_be_read_names_file_line_and_column(tmp_path):
    path = toml(tmp_path, "[lora]\nr = = 3\n")
    (found,) = problems(path, {})
    assert str(path) in found
    assert "line 2, column 5" in found
    (found,) = problems(tmp_path / "none.toml", {})
    assert found == f"{tmp_path / 'none.toml'}: cannot be read: No such file or directory"
    path.write_bytes(b"output = '\xff'")
    assert problems(path, {}) == [f"{path}: invalid UTF-8 at byte 10; save the file as UTF-8"]


def test_a_list_of_one_name_stays_a_list_and_a_text_an_expression(tmp_path):
    path = toml(tmp_path, '[lora]\ntarget_modules = ["q_proj"]\nexclude_modules = "lm_head"\n')
    config = load_config(path, {})
    assert config.lora.target_modules == ("q_proj",)
    assert config.lora.exclude_modules == "lm_head"


def test_a_part_alone_is_checked_in_the_same_voice():
    with pytest.raises(ConfigError) as caught:
        check(SamplingConfig, {"temperature": CommandLineText("-1"), "topp": 1}, "sampling")
    assert sorted(caught.value.problems) == [
        "sampling.temperature: invalid value '-1': must be at least 0",
        "sampling.topp: unknown key. Did you mean 'top_p'?",
    ]


def test_the_written_file_holds_every_key_and_the_reasons(tmp_path):
    reasons = {"model.dtype": "this CPU\nhas no bf16", "model.layout": "packed: probed", "lora.modules_to_save": "tied"}
    text = to_toml(Config(), {**reasons, "seen": "a fact"})
    for name, part in SECTIONS.items():
        assert f"[{name}]" in text
        for key in part.model_fields:
            assert f"\n{key} = " in text or f"\n# {key}: not set" in text
    assert '# dtype: this CPU has no bf16\ndtype = "auto"' in text
    assert "[model]\n# model.layout: packed: probed\n" in text
    assert text.startswith("# seen: a fact\n")
    assert load_config(toml(tmp_path, text), {}) == Config()


printable = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(
    printable,
    st.lists(printable, min_size=1),
    st.floats(1e-300, 1e30),
    st.dictionaries(st.from_regex(r"[\w. \"]+", fullmatch=True), st.integers(1, 99)),
)
def test_whatever_is_written_is_read_back_equal(tmp_path_factory, text, names, number, ranks):
    flags = {
        "model": {"model": text},
        "lora": {"modules_to_save": names, "rank_pattern": ranks, "use_rslora": True},
        "training": {"eps": number, "save_every": 7},
        "data": {"held_out": text, "data": names, "max_length": 9},
        "output": text,
    }
    config = load_config(None, flags)
    path = tmp_path_factory.mktemp("toml") / "run.toml"
    path.write_text(to_toml(config, {"model.model": text, text: text}), encoding="utf-8", newline="")
    assert load_config(path, {}) == config
