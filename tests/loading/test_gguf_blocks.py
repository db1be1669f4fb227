"""Training on the blocks of a GGUF file: the same values, losses and answers as on the converted model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from lorasmith.adapters.session import open_adapters
from lorasmith.cli.main import main
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.errors import ConfigError
from lorasmith.loading import load as loading
from lorasmith.loading.gguf import convert_gguf, gguf_file
from lorasmith.loading.gguf_blocks import GgufBlocks
from lorasmith.loading.load import load_base
from lorasmith.lora.gguf_weight import GgufWeight, has_formats
from lorasmith.lora.inject import inject
from lorasmith.lora.quantized import QuantizedEmbedding, QuantizedLinear, plain_weight
from lorasmith.model.base import Base
from lorasmith.model.forward import row_of
from lorasmith.model.head import loss_sum
from lorasmith.model.row import Example
from lorasmith.model.verify import enable_fast_parts
from lorasmith.report import Report
from lorasmith.training.loftq import refuse_without_error
from tests.support.tiny import Watch, model_folder
from tests.support.tiny_gguf import write_tiny_gguf

IDS = [7 * i % 250 for i in range(1, 33)]
pytestmark = pytest.mark.skipif(not has_formats(), reason="transformers before 5.23 has no formats of GGUF in torch")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf")


def load(gguf: Path, form: Any, dtype: Any = "float32", report: Report | None = None) -> Base:
    return load_base(ModelConfig(model=str(gguf), quantize=form, dtype=dtype, device="cpu"), report)


def three_losses(base: Base) -> Tensor:
    torch.manual_seed(0)
    adapter = base.adapters["default"] = inject(base.model, LoraConfig(r=4), base.router)
    enable_fast_parts(base, "default", IDS[:16])
    row = row_of(base, [Example(IDS[:-1], IDS[1:], [1.0] * 31, "")], 31.0, "default")
    optimizer, losses = torch.optim.AdamW(list(adapter.parameters.values()), lr=1e-2), []
    for _step in range(3):
        loss = loss_sum(base, row)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return torch.tensor(losses)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_losses_are_those_of_the_converted_model(gguf: Path, dtype: str) -> None:
    """Also those of q and k, whose rows llama.cpp stores in another order."""
    watch = Watch()
    kept, plain = load(gguf, "gguf", dtype, watch), load(gguf, "none", dtype)
    assert watch.warned == []
    layers = {n: m for n, m in kept.model.named_modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)}
    assert len(layers) == 2 * 7 + 2
    for name, layer in layers.items():
        assert isinstance(layer.quantized, GgufWeight)
        assert torch.equal(layer.weight, plain.model.get_submodule(name).weight)
    assert kept.model.lm_head.quantized is kept.model.model.embed_tokens.quantized
    assert kept.identity == plain.identity
    losses, wanted = three_losses(kept), three_losses(plain)
    assert wanted[0] - wanted[-1] > 0.01
    assert float(((losses - wanted) / wanted).abs().max()) < (1e-6 if dtype == "float32" else 1e-2)


def test_a_file_without_quantized_weights_is_told(tmp_path: Path) -> None:
    watch = Watch()
    base = load(write_tiny_gguf(tmp_path / "tiny.gguf", quantized=False), "gguf", report=watch)
    assert not any(isinstance(m, QuantizedLinear) for m in base.model.modules())
    (text,) = [text for text in watch.warned if text.startswith("model.quantize: ")]
    assert text.startswith("model.quantize: 15 weights, such as model.")
    assert three_losses(base)[0] > 0


def test_only_a_weight_with_the_same_values_is_kept(gguf: Path, tmp_path: Path) -> None:
    folder = convert_gguf(gguf, tmp_path / "out", Report())
    W = plain_weight(
        load_base(ModelConfig(model=str(folder), dtype="float32")).model.model.layers[0].mlp.up_proj, torch.float32
    )
    name, blocks = "model.layers.0.mlp.up_proj.weight", GgufBlocks(gguf)
    assert blocks.weight_of(name, W, torch.float32) is not None
    assert torch.equal(blocks.weight_of(name, W.flip(0), torch.float32).dequantized(), W.flip(0))
    changed = W.clone()
    changed[3, 5] += 1e-3
    for other in (changed, W[:40], W.t().contiguous()):
        assert blocks.weight_of(name, other, torch.float32) is None
    for unknown in ("model.layers.0.mlp.other.weight", "model.norm.weight"):
        assert blocks.weight_of(unknown, W, torch.float32) is None


def test_what_is_no_gguf_file_is_refused(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.quantize: gguf keeps the quantized weights of a GGUF file, but .* is"
    ):
        load_base(ModelConfig(model=str(model_folder()), quantize="gguf"))
    monkeypatch.setattr(loading, "has_formats", lambda: False)
    with pytest.raises(ConfigError, match=r"model\.quantize: gguf needs transformers 5\.23 or newer, but 5"):
        load(gguf, "gguf")


def test_the_file_of_a_model(gguf: Path, tmp_path: Path) -> None:
    assert gguf_file(str(gguf), Report()) == gguf
    assert gguf_file(str(tmp_path), Report()) is None
    assert gguf_file("org/name", Report()) is None


def test_loftq_has_no_error_to_start_from(gguf: Path) -> None:
    with pytest.raises(ConfigError, match="which a GGUF file does not contain"):
        refuse_without_error(load(gguf, "gguf"), LoraConfig(init_lora_weights="loftq"))


def test_a_format_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.Q5_0.gguf", kind=GGMLQuantizationType.Q5_0)
    with pytest.raises(ConfigError, match=r"model\.quantize: gguf cannot keep the weights of .*Q5_0\.gguf: .*type 6"):
        GgufBlocks(gguf)


def test_a_run_is_used_with_the_same_weights(gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its notes name the file, not the folder that it was converted to."""
    rows, run = tmp_path / "rows.jsonl", str(tmp_path / "run")
    rows.write_text("".join(json.dumps({"prompt": f"{i} ", "completion": "hello"}) + "\n" for i in range(6)), "utf-8")
    few = ["--held-out", "2", "--max-steps", "2", "--dtype", "float32"]
    assert main(["train", str(rows), "--output", run, "--model", str(gguf), "--quantize", "gguf", *few]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert found["after"] == pytest.approx(summary["loss_after"], rel=1e-5)
    assert main(["generate", str(tmp_path / "run"), "hello", "--max-new-tokens", "4"]) == 0
    session = open_adapters([tmp_path / "run"], ModelConfig())
    assert isinstance(session.base.model.lm_head.quantized, GgufWeight)
