"""info as it is typed: what people read, and the line that programs read."""

import json

import pytest

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.errors import AdapterError
from tests.support.commands import as_json, refused, said
from tests.support.peft_folder import peft_folder
from tests.support.tiny import model_folder


def test_info_is_readable_at_width_80(capsys, run):
    lines = said(capsys, "info", run).splitlines()
    labels = [line[:10].rstrip() for line in lines]
    assert [label for label in labels if label] == [
        "adapter", "base", "LoRA", "targets", "size", "template", "data", "run", "held out",
    ]  # fmt: skip
    assert all(len(line) <= 80 for line in lines if not any(name in line for name in (str(run), str(model_folder()))))
    assert "LoRA      r 8, lora_alpha 16" in lines
    text = " ".join(line[10:] for line in lines)
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in text
    assert "parameters in 28 tensors, " in text
    assert "model, replies end with <eos> <|im_end|>" in text
    assert "4 steps, " in text


def test_info_of_a_folder_that_peft_made(capsys, theirs):
    lines = said(capsys, "info", theirs).splitlines()
    assert "LoRA      r 4, lora_alpha 8, scaled by lora_alpha / sqrt(r) (use_rslora)" in lines
    assert "ranks     q_proj=9" in lines
    assert "alphas    v_proj=3" in lines
    assert "template  not stored: the adapter was made by another tool" in lines


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"init_lora_weights": "corda"},
            "init_lora_weights is 'corda', so the adapter belongs to a changed base model",
        ),
        ({"kasa_config": {"beta": 0.1}}, "unsupported PEFT options: kasa_config."),
        ({"option_of_2030": 1, "lora_dropout": 2.0}, "unsupported PEFT options: option_of_2030."),
        ({"lora_dropout": 2.0}, "lora_dropout: "),
    ],
)
def test_info_says_that_an_adapter_cannot_be_loaded_and_why(capsys, tmp_path, options, why):
    folder = peft_folder(tmp_path)
    assert "unusable" not in said(capsys, "info", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    lines = said(capsys, "info", folder).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("unusable  this adapter cannot be loaded: "))
    text = " ".join(line[10:] for line in lines[at:])
    assert text.startswith(f"this adapter cannot be loaded: adapter_config.json: {why}")
    with pytest.raises(AdapterError) as caught:
        AdapterFolder.read(folder).config  # noqa: B018
    assert as_json(capsys, "info", folder)["problems"] == list(caught.value.problems)


def test_info_for_programs(capsys, run):
    found = as_json(capsys, "info", run)
    assert (found["r"], found["template"]) == (8, "model")
    assert found["summary"] == json.loads((run / "summary.json").read_text("utf-8"))


def test_info_of_many_modules_names_some(capsys, tmp_path):
    names = [f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("up", "gate", "down")]
    names += [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in ("q", "k", "v", "o")]
    lines = said(capsys, "info", peft_folder(tmp_path, target_modules=names)).splitlines()
    text = " ".join(" ".join(lines).split())
    assert text.count("_proj") == 12
    assert "_proj and 2 more size" in text
    assert all(len(line) <= 80 for line in lines if "/" not in line)


def test_info_of_nothing(capsys, tmp_path):
    assert refused(capsys, "info", tmp_path / "x") == f"{tmp_path / 'x'}: the folder does not exist."
    (tmp_path / "config.toml").touch()
    assert "this run has not finished" in refused(capsys, "info", tmp_path)
