"""A folder for mlx-lm: the base model with it is the trained model, in mlx-lm itself where that is installed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorasmith.adapters.merge import adapter_logits
from lorasmith.adapters.session import open_adapters
from lorasmith.config.model import ModelConfig
from lorasmith.errors import AdapterError, ModelError, RunError
from lorasmith.export import mlx
from lorasmith.export.mlx import FAMILIES, export_mlx
from lorasmith.export.readback.adapters import has_mlx_lm
from tests.support.exported import adapter_of, folder_of
from tests.support.model_folders import configure


def exported(tmp_path: Path, family: str = "llama", base: dict[str, Any] | None = None, **options: Any) -> Path:
    adapter = adapter_of(folder_of(family, tmp_path / "base", **base or {}), tmp_path / "adapter", **options)
    made = export_mlx(adapter, tmp_path / "mlx")
    assert made.content["figures"]["readings"][0]["error"] < 1e-5
    return tmp_path / "mlx"


@pytest.mark.skipif(not has_mlx_lm(), reason="mlx-lm is not installed; make export-check installs it")
@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_computes_the_logits_of_the_trained_model(family, tmp_path):
    from mlx import core
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    folder, ids = exported(tmp_path, family), [3, 7, 11, 250, 8, 9]
    session = open_adapters([tmp_path / "adapter"], ModelConfig(dtype="float32"))
    (wanted,) = adapter_logits(session, [ids])
    values = json.loads((tmp_path / "base" / "config.json").read_text())
    if "rope_theta" in values["rope_parameters"]:  # mlx-lm 0.32 does not read the new name of transformers 5
        configure(tmp_path / "base", rope_theta=values["rope_parameters"]["rope_theta"])
    model = load_adapters(load_model(tmp_path / "base")[0], str(folder))
    found = torch.from_numpy(np.array(model(core.array([ids]))[0].astype(core.float32)))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize(
    ("options", "rank", "scale"),
    [
        ({"r": 4, "lora_alpha": 6.0}, 4, 1.5),
        ({"r": 4, "lora_alpha": 6.0, "use_rslora": True}, 4, 3.0),
        ({"r": 4, "lora_alpha": 4.0, "rank_pattern": {"q_proj": 2}}, 4, 1.0),
        ({"r": 2, "lora_alpha": 6.0, "alpha_pattern": {"q_proj": 3.0}}, 2, 1.0),
    ],
)
def test_there_is_one_rank_and_one_scale(options, rank, scale, tmp_path):
    config = json.loads((exported(tmp_path, **options) / "adapter_config.json").read_text())
    found = config["lora_parameters"]
    assert (found["rank"], found["scale"], found["dropout"]) == (rank, pytest.approx(scale), 0.0)
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", 2)
    assert "self_attn.q_proj" in found["keys"]


def test_the_output_head_has_no_layer_number(tmp_path):
    folder = exported(tmp_path, r=4, target_modules=["q_proj", "lm_head"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == ["lm_head", "self_attn.q_proj"]


def test_what_mlx_lm_does_not_have_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="lm_head: it shares its weight with the embedding"):
        exported(tmp_path / "a", base={"tie_word_embeddings": True}, r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ModelError, match=r"transformer\.h\.0\..*what mlx-lm calls this layer in models of type gpt2"):
        exported(tmp_path / "b", "gpt2")
    with pytest.raises(AdapterError, match="mlx-lm reads only A and B of linear layers"):
        exported(tmp_path / "c", r=4, use_dora=True)


def test_faults_are_noticed_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(mlx, "folded", lambda factors, _formula: factors)
    with pytest.raises(AdapterError, match="is not the trained model"):
        exported(tmp_path, r=4, lora_alpha=6.0, alpha_pattern={"q_proj": 3.0})
    assert not (tmp_path / "mlx").exists()


def test_a_folder_of_others_is_not_replaced(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="already exists"):
        exported(tmp_path)
