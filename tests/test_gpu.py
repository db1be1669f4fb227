"""What a card can run: `make gpu` is the command for the first day with one."""

import pytest
import torch

from lorasmith import load
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.loading.load import load_base
from lorasmith.lora.inject import inject
from lorasmith.model.head import loss_sum
from tests.support.families import examples, one_row, stir
from tests.support.tiny import model_folder, trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_loss_and_gradients_equal_the_processors(family):
    """One row, float32: the card's loss and gradients are the processor's within float32's rounding."""
    found = {}
    for device in ("cpu", "cuda"):
        base = load_base(ModelConfig(model=str(model_folder(family)), device=device, dtype="float32"))
        base.adapters["default"] = inject(base.model, LoraConfig(), base.router, "default")
        stir(base.adapters["default"])
        loss = loss_sum(base, one_row(examples()).to(base.device))
        loss.backward()
        gradients = torch.cat([p.grad.flatten().cpu() for p in base.adapters["default"].parameters.values()])
        found[device] = (loss.item(), gradients, base.layout)
    (cpu_loss, cpu_gradients, cpu_layout), (loss, gradients, layout) = found["cpu"], found["cuda"]
    assert layout == cpu_layout
    assert loss == pytest.approx(cpu_loss, rel=1e-4)
    assert (gradients - cpu_gradients).norm() <= 1e-3 * cpu_gradients.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_and_a_reply(tmp_path, dtype):
    """The main job on the card: it learns, and a reply does not depend on what is decoded beside it."""
    summary = trained(tmp_path / "run", device="cuda", dtype=dtype, max_steps=20)
    assert summary.loss_before is not None
    assert summary.loss_after is not None
    assert summary.loss_after < summary.loss_before
    session = load(tmp_path / "run", device="cuda", dtype=dtype)
    alone = session.generate("Why is the sky blue?", max_new_tokens=8)
    beside = session.generate(["Why is the sky blue?", "What do cats eat?"], max_new_tokens=8)
    assert session.base.device.type == "cuda"
    assert dtype == "bfloat16" or beside[0] == alone  # in bfloat16 rounding may decide between two likely tokens
