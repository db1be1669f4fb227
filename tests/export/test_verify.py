"""Folders are checked against their certificates and against their runs."""

import json

import pytest
from safetensors.torch import load_file, save_file

from lorasmith.adapters.merge import merge_run
from lorasmith.errors import AdapterError, RunError
from lorasmith.export.mlx import export_mlx
from lorasmith.export.peft_folder import export_peft
from lorasmith.export.verify import format_of, verify

EXPORTS = {
    "peft": (export_peft, "adapter_model.safetensors"),
    "mlx": (export_mlx, "adapters.safetensors"),
    "transformers": (merge_run, "model.safetensors"),
}


@pytest.mark.parametrize("target", EXPORTS)
def test_a_folder_is_that_of_its_certificate_and_of_its_run(target, adapter, tmp_path):
    export, weights = EXPORTS[target]
    folder = tmp_path / "out"
    export(adapter, folder)
    made = verify(folder)
    assert made.content["target"] == target == format_of(folder)[0]
    assert set(made.content["base"]) >= {"model", "config", "tensors", "tokenizer"}
    assert made.content["base"]["model"] == "base"
    assert len(made.content["adapter"]["hash"]) == 64
    assert weights in made.content["files"]
    assert made.content["figures"]["readings"][0]["error"] < 1e-5
    assert str(tmp_path) not in json.dumps(made.content)
    (folder / "README.md").write_text("Mine.", "utf-8")  # a card that somebody has edited
    assert verify(folder).content == made.content
    made.certificate.unlink()
    with pytest.raises(RunError, match="has no certificate"):
        verify(folder)
    assert verify(folder, adapter).content == made.content
    tensors = load_file(folder / weights)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, folder / weights, {"format": "pt"})
    with pytest.raises(RunError, match=f"not the folder of its certificate: {weights} changed"):
        verify(folder)
    with pytest.raises(AdapterError, match="is not the trained model"):
        verify(folder, adapter)


def test_another_folder_has_nothing_to_compare(adapter, tmp_path):
    with pytest.raises(RunError, match="lorasmith did not export this folder"):
        verify(tmp_path, adapter)
