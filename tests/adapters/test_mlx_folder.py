"""Adapters of mlx-lm in PEFT's form: the same change of the weights, or refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorasmith.adapters.imported import import_adapter
from lorasmith.adapters.mlx_folder import alpha_of, write_as_peft
from lorasmith.adapters.session import open_adapters
from lorasmith.config.model import ModelConfig
from lorasmith.errors import AdapterError
from lorasmith.export.mlx import CONFIG, WEIGHTS, export_mlx, has_mlx_lm
from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.exported import folder_of
from tests.support.families import distance, logits_of
from tests.support.foreign_folders import mlx_folder
from tests.support.model_folders import configure
from tests.support.tiny import model_folder

IDS = torch.tensor([[3, 7, 11, 250, 8, 9]])
LIMIT = 1e-5  # float32: sums in another order
WIDE = ModelConfig(dtype="float32", device="cpu")

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def folder(path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "adapters.safetensors")
    whole = {"fine_tune_type": "lora", "model": "org/base", "lora_parameters": {"rank": 2, "scale": 20.0}} | config
    (path / "adapter_config.json").write_text(json.dumps(whole))
    return path


def matrices(path: str, rank: int = 2) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_a": torch.randn(8, rank), f"{path}.lora_b": torch.randn(rank, 6)}


def as_peft(source: Path, target: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    target.mkdir()
    write_as_peft(source, target)
    return json.loads((target / "adapter_config.json").read_text()), load_file(target / "adapter_model.safetensors")


def test_matrices_are_transposed_and_the_scale_is_kept(tmp_path):
    given = matrices(Q)
    config, found = as_peft(folder(tmp_path / "mlx", given), tmp_path / "peft")
    a, b = (found[f"base_model.model.{Q}.lora_{part}.weight"] for part in "AB")
    assert torch.equal(a, given[f"{Q}.lora_a"].t())
    assert torch.equal(b, given[f"{Q}.lora_b"].t())
    assert config["lora_alpha"] / config["r"] == 20.0
    assert (config["target_modules"], config["base_model_name_or_path"]) == ([Q], "org/base")
    assert config["use_dora"] is False


def test_ranks_of_single_layers(tmp_path):
    config, _found = as_peft(folder(tmp_path / "mlx", matrices(Q, 4) | matrices(V, 1)), tmp_path / "peft")
    (pattern,) = config["rank_pattern"]
    assert (config["r"], config["rank_pattern"][pattern], config["alpha_pattern"][pattern]) == (4, 1, 20.0)
    assert pattern == "^model\\.layers\\.0\\.self_attn\\.v_proj"


def test_dora_has_its_magnitudes(tmp_path):
    given = matrices(Q) | {f"{Q}.m": torch.rand(6)}
    config, found = as_peft(folder(tmp_path / "mlx", given, fine_tune_type="dora"), tmp_path / "peft")
    assert config["use_dora"] is True
    assert torch.equal(found[f"base_model.model.{Q}.lora_magnitude_vector"], given[f"{Q}.m"])


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (matrices(Q), {"fine_tune_type": "full"}, "fine_tune_type is full: these are trained weights of the model"),
        (matrices(Q), {"lora_parameters": {"rank": 2}}, r"lora_parameters\.scale must be a number, but is None"),
        ({f"{Q}.lora_a": torch.randn(4, 8, 2)}, {}, r"lora_a of shape \(4, 8, 2\) is no matrix of a linear layer"),
        ({f"{Q}.weight": torch.randn(4, 8)}, {}, r"q_proj\.weight of shape \(4, 8\) is no matrix"),
        ({}, {}, "there is no lora_a in it"),
    ],
)
def test_what_is_not_low_rank_of_linear_layers_is_refused(tensors, config, words, tmp_path):
    (tmp_path / "peft").mkdir()
    with pytest.raises(AdapterError, match=words):
        write_as_peft(folder(tmp_path / "mlx", tensors, **config), tmp_path / "peft")
    assert not any((tmp_path / "peft").iterdir())


def test_damaged_weights_are_an_error(tmp_path):
    source = folder(tmp_path / "mlx", matrices(Q))
    (source / "adapters.safetensors").write_bytes(b"x" * 40)
    (tmp_path / "peft").mkdir()
    with pytest.raises(AdapterError, match=r"adapters\.safetensors: cannot be read"):
        write_as_peft(source, tmp_path / "peft")


def changed(folder: Path, **changes: object) -> Path:
    """The folder with other options; None takes one away."""
    values = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


@torch.no_grad()
def by_formula(base: Path, folder: Path) -> torch.Tensor:
    """The logits of the base model with the weights that mlx-lm's `fuse` makes, in float64."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tensors, scale = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())["lora_parameters"]["scale"]
    for path in {key.rpartition(".")[0] for key in tensors}:
        W = model.get_submodule(path).weight
        fused = W.double() + scale * (tensors[f"{path}.lora_a"].double() @ tensors[f"{path}.lora_b"].double()).t()
        if (m := tensors.get(f"{path}.m")) is not None:
            fused *= (m.double() / fused.norm(dim=1))[:, None]
        W.copy_(fused)
    return logits_of(model, IDS)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(("rank", "scale"), [(4, 20.0), (3, 0.1)])
def test_the_imported_adapter_computes_mlx_lms_formula(kind, rank, scale, tmp_path):
    folder = mlx_folder(tmp_path / "theirs", model_folder(), kind, rank, scale)
    found = import_adapter(folder, tmp_path / "out", model=WIDE)
    assert found.program == "mlx-lm"
    session = open_adapters([tmp_path / "out"], WIDE)
    wanted = by_formula(model_folder(), folder)
    assert distance(logits_of(session.base, IDS), wanted) < LIMIT
    session.base.router.active = None
    assert distance(logits_of(session.base, IDS), wanted) > 0.001


@pytest.mark.skipif(not has_mlx_lm(), reason="mlx-lm is not installed; make export-check installs it")
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_lm_reads_the_fixture_and_computes_the_same(kind, tmp_path):
    from mlx import core
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    base = folder_of("llama", tmp_path / "base")
    folder = changed(mlx_folder(tmp_path / "theirs", base, kind), num_layers=2)
    options = json.loads((folder / CONFIG).read_text())["lora_parameters"]
    changed(folder, lora_parameters=options | {"keys": ["self_attn.q_proj", "mlp.down_proj"]})
    import_adapter(folder, tmp_path / "out", model=WIDE)
    session = open_adapters([tmp_path / "out"], WIDE)
    wanted = logits_of(session.base, IDS)[0]
    configure(base, rope_theta=777.0)  # mlx-lm 0.32 does not read the new name of transformers 5
    model = load_adapters(load_model(base)[0], str(folder))
    found = torch.from_numpy(np.array(model(core.array(IDS.tolist()))[0].astype(core.float32)))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize(("rank", "scale"), [(4, 20.0), (3, 0.1), (6, 1 / 3)])
def test_import_and_export_give_the_same_bytes_of_matrices(rank, scale, tmp_path):
    folder = mlx_folder(tmp_path / "theirs", model_folder(), "lora", rank, scale)
    import_adapter(folder, tmp_path / "ours", model=WIDE)
    assert export_mlx(tmp_path / "ours", tmp_path / "again", WIDE) < LIMIT
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((place / CONFIG).read_text())["lora_parameters"] for place in (folder, tmp_path / "again")]
    assert configs[0]["scale"] == configs[1]["scale"]
    assert configs[0]["rank"] == configs[1]["rank"]


def test_an_alpha_gives_the_scale_exactly():
    assert alpha_of(20.0, 8) == 160.0
    pairs = [(scale, rank) for scale in (0.1, 0.3, 1 / 3, 2.0, 10.7, 20.0) for rank in range(1, 70)]
    assert sum(alpha_of(scale, rank) / rank == scale for scale, rank in pairs) > 0.9 * len(pairs)
    assert all(abs(alpha_of(scale, rank) / rank - scale) <= math.ulp(scale) for scale, rank in pairs)
    assert all(alpha_of(scale, 2**n) / 2**n == scale for scale, _rank in pairs for n in range(8))


def test_an_alpha_that_versions_read_differently_is_refused(tmp_path):
    old = {"rank": 2, "alpha": 16, "scale": 10.0}
    with pytest.raises(
        AdapterError, match="lora_parameters contains alpha, which versions of mlx-lm read"
    ):
        as_peft(folder(tmp_path / "mlx", matrices(Q), lora_parameters=old), tmp_path / "peft")


def test_errors_name_the_folder_that_was_given(tmp_path):
    theirs = mlx_folder(tmp_path / "theirs", model_folder())
    with pytest.raises(AdapterError) as caught:
        import_adapter(theirs, tmp_path / "out", model=ModelConfig(model=str(model_folder("gpt2")), dtype="float32"))
    assert str(caught.value).startswith(f"{theirs / CONFIG}: lora.target_modules: ")
    assert not (tmp_path / "out").exists()


def test_the_quantized_base_of_mlx_lm_needs_the_real_one(tmp_path):
    theirs = mlx_folder(tmp_path / "theirs", model_folder())
    for name in ("mlx-community/Llama-3.2-1B-Instruct-4bit", "org/tiny-mxfp4"):
        with pytest.raises(AdapterError, match=f"trained on {name}, a model quantized for mlx-lm"):
            import_adapter(changed(theirs, model=name), tmp_path / "out")
    import_adapter(theirs, tmp_path / "out", model=ModelConfig(model=str(model_folder()), dtype="float32"))
