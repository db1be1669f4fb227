"""Five lines of Python do what the command line does."""

import subprocess
import sys

import pytest
import torch

import lorasmith
from lorasmith import LoraConfig, load, train, train_each
from lorasmith.cli.main import main
from lorasmith.errors import ConfigError
from tests.support.tiny import Watch, adapter_bytes, flags, model_folder, rows_file, settings


def test_all_names_are_there_and_are_loaded_when_asked_for():
    assert sorted(lorasmith.__all__) == lorasmith.__all__
    assert all(getattr(lorasmith, name) for name in lorasmith.__all__)
    code = "import sys, lorasmith; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = lorasmith.trian


def test_the_lines_of_the_docstring_run(tmp_path, monkeypatch, capsys):
    """Its five lines, as they stand there, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    rows_file(tmp_path / "rows.jsonl")
    code = [line for line in (lorasmith.__doc__ or "").splitlines()[1:] if line.strip()]
    assert len(code) <= 5
    monkeypatch.setattr("lorasmith.api.run.train", _on_a_tiny_model(lorasmith.api.run.train))
    exec("\n".join(line.strip() for line in code), {})
    before, after = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert after < before
    assert (tmp_path / "runs" / "mine" / "adapter").is_dir()


def _on_a_tiny_model(real):
    def run(config, *rest):
        model = config.model.model_copy(update={"model": str(model_folder()), "dtype": "float32"})
        data = config.data.model_copy(update={"held_out": 3.0})
        return real(config.model_copy(update={"model": model, "data": data}), *rest)

    return run


def test_python_and_the_command_line_train_the_same_adapter(tmp_path):
    files = rows_file(tmp_path / "rows.jsonl")
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    train(files, lora=LoraConfig(r=4, lora_alpha=4), output=one, **settings())
    assert main(["train", files, "--output", str(two), "--r", "4", "--lora-alpha", "4", *flags(settings())]) == 0
    train([files], config=one / "config.toml", output=str(three))
    assert adapter_bytes(one) == adapter_bytes(two) == adapter_bytes(three)


def test_options_beside_lora_win_and_its_defaults_do_not_hide_the_file(tmp_path):
    files = rows_file(tmp_path / "rows.jsonl")
    (tmp_path / "run.toml").write_text("[lora]\nr = 2\nlora_alpha = 3.0\n", "utf-8")
    options = settings(max_steps=1)
    train(files, lora=LoraConfig(lora_alpha=5), config=tmp_path / "run.toml", output=tmp_path / "run", **options)
    text = (tmp_path / "run" / "config.toml").read_text("utf-8")
    assert "r = 2\nlora_alpha = 5.0\n" in text


def test_an_unknown_option_is_an_error_with_a_suggestion(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown option learning_rat\. Did you mean 'learning_rate'\?"):
        train("rows.jsonl", learning_rat=1.0)
    with pytest.raises(ConfigError, match=r"lora\.r: invalid value 0"):
        train("rows.jsonl", r=0)
    train(rows_file(tmp_path / "rows.jsonl"), output=tmp_path / "run", **settings(max_steps=1))
    session = load(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"sampling\.temperatur: unknown key\. Did you mean 'temperature'\?"):
        session.generate("Hello!", temperatur=1)


def test_load_answers_with_the_adapter_or_without(tmp_path):
    train(rows_file(tmp_path / "rows.jsonl"), output=tmp_path / "run", **settings(learning_rate=0.1))
    session = load(tmp_path / "run")
    assert session.names == ["run"]
    answer = session.generate("Why is the sky blue?", max_new_tokens=12)
    assert isinstance(answer, str)
    assert session.generate(["Why is the sky blue?", "No?"], max_new_tokens=12)[0] == answer
    assert session.generate("Why is the sky blue?", None, max_new_tokens=12) != answer
    assert not session.base.model.training


def test_the_report_hears_what_happens(tmp_path):
    watch, silent = Watch(), tmp_path / "silent"
    train(rows_file(tmp_path / "rows.jsonl"), output=tmp_path / "run", report=watch, **settings())
    text = "\n".join(watch.said)
    for part in (
        "trainable params: 7,424 ||",
        "packed",
        "4 steps of 4 examples",
        "on 3 held-out examples: too few examples to tell",
        "Finished. The adapter is in ",
    ):
        assert part in text
    assert watch.tasks.count("training") == 4
    train(tmp_path / "rows.jsonl", output=silent, **settings())


def test_nothing_is_printed_without_a_report(tmp_path, capfd):
    train(rows_file(tmp_path / "rows.jsonl"), output=tmp_path / "run", **settings())
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_off_in_the_callers_program(outer, tmp_path):
    files, plain, within = rows_file(tmp_path / "rows.jsonl"), tmp_path / "plain", tmp_path / "within"
    train(files, output=plain, **settings())
    with outer():
        train(files, output=within, **settings())
        session = load(within)
        answer = session.generate("Why is the sky blue?", max_new_tokens=12)
    assert adapter_bytes(plain) == adapter_bytes(within)
    assert session.generate("Why is the sky blue?", max_new_tokens=12) == answer, "later too, outside of it"
    assert session.base.layout == load(plain).base.layout == "packed"


def test_an_adapter_for_each_name(tmp_path):
    (tmp_path / "data").mkdir()
    files = [rows_file(tmp_path / "data" / f"{name}.jsonl", range(i, i + 12)) for i, name in enumerate("ab")]
    found = train_each({"a": files[0], "b": [files[1]]}, output=tmp_path / "out", **settings())
    assert [*found] == ["a", "b"]
    assert found["b"].run == str(tmp_path / "out" / "b")
    folder = train_each(tmp_path / "data", output=tmp_path / "folder", **settings())
    assert [one.loss_after for one in folder.values()] == [one.loss_after for one in found.values()]
    again = train_each(output=tmp_path / "out", resume=True)
    assert [one.loss_after for one in again.values()] == [one.loss_after for one in found.values()]
    with pytest.raises(ConfigError, match=r"train\(\) trains one adapter, but the data has names \(a, b\)"):
        train([f"a={files[0]}", f"b={files[1]}"], output=tmp_path / "one", **settings())
    with pytest.raises(ConfigError, match="the files have no adapters' names"):
        train_each({"a shop": files[0]}, output=tmp_path / "none", **settings())
