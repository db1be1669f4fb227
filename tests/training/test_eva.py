"""EVA's start against PEFT's on the same single batch, and against an exact decomposition; and through a run."""

from typing import Any

import peft
import pytest
import torch
from peft import EvaConfig, initialize_lora_eva_weights
from torch import Tensor

from lorasmith.config.lora import LoraConfig
from lorasmith.config.toml import Config
from lorasmith.lora.inject import inject
from lorasmith.lora.layer import LoRALayer
from lorasmith.model.base import Base
from lorasmith.model.row import IGNORED, Example
from lorasmith.training.eva import shuffled, start_eva, start_from_inputs
from tests.support.families import distance, example, logits_of, tiny, tiny_base
from tests.support.tiny import Crash, Watch, adapter_bytes, crash_at, losses, metrics, trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
BATCH = [example(40, seed) for seed in range(4)]


def started(family: str, batch: list[Example] = BATCH, r: int = 4, tokens: int = 10_000) -> tuple[Base, list[str]]:
    base = tiny_base(family, torch.float32)
    config = LoraConfig(r=r, init_lora_weights="eva", target_modules="all-linear")
    base.adapters["default"] = inject(base.model, config, base.router)
    return base, start_from_inputs(base, "default", batch, tokens)


def of_layers(base: Base) -> dict[str, Tensor]:
    layers = {path: m for path, m in base.model.named_modules() if isinstance(m, LoRALayer)}
    return {path: layer.updates["default"].own_matrices[0].detach() for path, layer in layers.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_is_pefts_on_the_same_batch(family: str) -> None:
    """Packed and padded rows. PEFT's labels are not shifted, so those of the same positions are given."""
    base, left = started(family)
    assert left == []
    assert distance(logits_of(base), logits_of(tiny(family, torch.float32))) < 1e-6
    config = peft.LoraConfig(r=4, init_lora_weights="eva", target_modules="all-linear", eva_config=EvaConfig(rho=1.0))
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(tiny(family, torch.float32), config)
    ids = torch.tensor([one.ids for one in BATCH])
    labels = torch.tensor([one.targets for one in BATCH])
    assert IGNORED == -100
    loader = [{"input_ids": ids, "labels": labels}]
    initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    for path, A in of_layers(base).items():
        theirs = model.get_parameter(f"base_model.model.{path}.lora_A.default.weight").detach()
        off = float((A @ theirs.t()).abs().diagonal().sub(1).abs().max())
        assert off < 1e-3, path  # the sign of a direction is free, and both decompositions are approximate


def test_a_is_the_exact_decomposition_of_the_inputs_at_the_labels() -> None:
    base, _left = started("llama", BATCH[:1], r=2)
    seen: list[Tensor] = []
    plain = tiny("llama", torch.float32)
    layer = plain.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0]))
    logits_of(plain, torch.tensor([BATCH[0].ids]))
    X = seen[0][BATCH[0].learned]
    _U, _S, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    A = of_layers(base)["model.layers.1.mlp.down_proj"]
    assert float((A @ Vh[:2].t()).abs().diagonal().sub(1).abs().max()) < 1e-3
    assert (A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all()


def test_too_few_inputs_leave_a_as_it_was() -> None:
    base, left = started("llama", [example(12, 5, learned=0.1)], r=8)
    assert left == list(of_layers(base))
    fresh = tiny_base("llama", torch.float32)
    config = LoraConfig(r=8, init_lora_weights="eva", target_modules="all-linear")
    fresh.adapters["default"] = inject(fresh.model, config, fresh.router)
    assert all(torch.equal(A, of_layers(fresh)[path]) for path, A in of_layers(base).items())


def test_only_the_first_examples_that_fit_are_used() -> None:
    few, all_of_them = (
        started("llama", BATCH[:2]),
        started("llama", BATCH, tokens=sum(e.useful_length for e in BATCH[:2])),
    )
    assert all(torch.equal(A, of_layers(all_of_them[0])[path]) for path, A in of_layers(few[0]).items())
    order = shuffled(BATCH, 1)
    assert sorted(one.source for one in order) == sorted(one.source for one in BATCH)
    assert order == shuffled(BATCH, 1)


def test_a_run_starts_from_its_examples_and_resumes_bit_for_bit(tmp_path: Any) -> None:
    changes = {"init_lora_weights": "eva", "save_every": 1, "r": 2}
    trained(tmp_path / "whole", **changes)
    trained(tmp_path / "plain", r=2)
    assert losses(tmp_path / "whole")[0] == losses(tmp_path / "plain")[0], "B is zero"
    assert losses(tmp_path / "whole")[1:] != losses(tmp_path / "plain")[1:]
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(3), **changes)
    trained(tmp_path / "run", resume=True, **changes)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_it_says_where_there_are_too_few_tokens() -> None:
    report, base = Watch(), tiny_base("llama", torch.float32)
    config = Config(lora=LoraConfig(r=8, init_lora_weights="eva"))
    base.adapters["default"] = inject(base.model, config.lora, base.router)
    start_eva(base, "default", [example(12, 5, learned=0.1)], config, report)
    (text,) = report.warned
    assert "too few tokens for 'eva' in 14 layers, such as model.layers.0.self_attn.q_proj" in text
