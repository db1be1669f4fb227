"""LoRA on parameters against dense mathematics, against PEFT in both directions, and several adapters in one batch."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError
from lorasmith.lora.files import save_adapter
from lorasmith.lora.inject import Adapter, inject, leave_out, remove
from lorasmith.lora.merge import merge_into, merged_weights
from lorasmith.lora.parameters import LoRAParameters, ParameterUpdate, peft_prefixes
from lorasmith.model.base import Base
from tests.support.experts import LAYOUTS, moe_base, tiny_moe
from tests.support.families import IDS, distance, far_apart, logits_of, own_logits, stir

LIMIT = 1e-12  # float64, the models' own casts down taken out: sums in another order
NAMES = {"jetmoe": ("input_linear.weight", "output_linear.weight")}
MATCHED = {"jetmoe": "kv_proj"}  # a linear layer of each
pytestmark = [pytest.mark.usefixtures("exact"), pytest.mark.filterwarnings("ignore::UserWarning:peft")]


def names(family: str) -> tuple[str, ...]:
    return NAMES.get(family, ("experts.gate_up_proj", "experts.down_proj"))


def adapted(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Base, Adapter]:
    base = moe_base(family, dtype)
    adapter = inject(base.model, LoraConfig(**({"r": 4, "lora_alpha": 6} | options)), base.router)
    stir(adapter)
    base.adapters["default"] = adapter
    return base, adapter


def in_peft(family: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return peft.PeftModel.from_pretrained(tiny_moe(family), folder, is_trainable=True).eval()


def trainable(theirs: Any) -> dict[str, torch.nn.Parameter]:
    return {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}


def gradients(logits: Tensor, parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    direction = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    found = torch.autograd.grad(
        (logits * direction).sum(), list(parameters.values()), materialize_grads=True, allow_unused=True
    )
    return dict(zip(parameters, found, strict=True))


def assert_same(base: Base, adapter: Adapter, theirs: Any) -> None:
    """Equal logits, keys and gradients, on both paths, and all far from what the base alone gives."""
    logits, parameters = own_logits(theirs), trainable(theirs)
    assert adapter.parameters.keys() == parameters.keys()
    wanted = gradients(logits, parameters)
    assert distance(logits_of(tiny_moe(base.source)), logits) > 0.01
    for fused in (True, False):
        base.router.fused = fused
        ours = own_logits(base.model)
        assert distance(ours, logits) < LIMIT
        assert not far_apart(gradients(ours, adapter.parameters), wanted, LIMIT)
    base.router.fused = True


@pytest.mark.parametrize("transposed", [False, True])
def test_an_update_is_the_dense_sum_for_each_expert(transposed: bool) -> None:
    E, O, I, r = 3, 4, 5, 2
    weight = torch.randn(E, I, O, dtype=torch.float64) if transposed else torch.randn(E, O, I, dtype=torch.float64)
    update = ParameterUpdate(weight, transposed, r, 0.3)
    assert (update.lora_A.shape, update.lora_B.shape) == ((E * r, I), (O, r * E))
    for p in update.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64)
    for e in range(E):
        A_RI, B_OR = update.lora_A[e * r : (e + 1) * r], update.lora_B[:, e::E]
        delta = 0.3 * B_OR @ A_RI
        assert torch.allclose(update.merged(weight)[e], weight[e] + (delta.t() if transposed else delta), atol=1e-14)


def test_a_parameter_of_two_dimensions_is_one_expert() -> None:
    weight = torch.randn(4, 5, dtype=torch.float64)
    update = ParameterUpdate(weight, True, 2, 0.3)  # only stacks can be transposed
    for p in update.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64)
    assert torch.allclose(update.merged(weight), weight + 0.3 * update.lora_B @ update.lora_A, atol=1e-14)


def test_peft_wraps_a_module_once_for_each_parameter() -> None:
    assert peft_prefixes(["a", "b", "c"]) == {"a": "base_layer.base_layer.", "b": "base_layer.", "c": ""}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_state_dict_has_pefts_names_and_is_read_by_them(family: str) -> None:
    base, adapter = adapted(family, target_modules=(), target_parameters=names(family))
    state = base.model.state_dict()
    own = {f"base_model.model.{key}".replace(".default.", "."): p for key, p in state.items() if "lora_" in key}
    assert own.keys() == adapter.parameters.keys()
    for p in adapter.parameters.values():
        p.data.zero_()
    assert not any(base.model.load_state_dict({key: p + 1 for key, p in state.items()}, strict=True))
    assert all(bool((p == 1).all()) for p in adapter.parameters.values())


@torch.no_grad()
def test_several_active_adapters_add_up() -> None:
    base, _first = adapted("mixtral", target_modules=(), target_parameters=names("mixtral"))
    second = inject(
        base.model, LoraConfig(r=2, target_modules=(), target_parameters=names("mixtral")[:1]), base.router, "b"
    )
    stir(second)
    base.router.activate(["default", "b"])
    both = base.model(IDS).logits
    merge_into(base.model, ["default", "b"], keep=False, check=False)
    base.router.activate([])
    assert distance(base.model(IDS).logits, both) < LIMIT
    base.router.activate(["default"])
    assert not distance(base.model(IDS).logits, both) < 1e-3


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_new_adapter_changes_nothing_and_peft_reads_what_is_saved(family: str, tmp_path: Path) -> None:
    base = moe_base(family)
    before = logits_of(base.model)
    adapter = inject(base.model, LoraConfig(r=4, lora_alpha=6), base.router)
    assert len(adapter.targets.parameters) == {"qwen3_moe": 2, "deepseek_v3": 2, "jetmoe": 8}.get(family, 4)
    assert distance(logits_of(base.model), before) < LIMIT
    stir(adapter)
    save_adapter(adapter, base.model, tmp_path, "the/base")
    assert_same(base, adapter, in_peft(family, tmp_path))
    again = moe_base(family)
    AdapterFolder.read(tmp_path).load_into(again, "default")
    assert distance(logits_of(again.model), logits_of(base.model)) < LIMIT
    assert again.adapters["default"].targets.by_module == adapter.targets.by_module


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_folder_of_peft_is_the_same_here(family: str, tmp_path: Path) -> None:
    first, second = names(family)
    theirs = peft.get_peft_model(
        tiny_moe(family),
        peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=6, use_rslora=True, target_modules=[MATCHED.get(family, "o_proj")],
            target_parameters=[second, first], rank_pattern={second: 3}, alpha_pattern={first: 9},
        ),
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for p in trainable(theirs).values():
        p.data += torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2
    theirs.save_pretrained(tmp_path)
    base = moe_base(family)
    AdapterFolder.read(tmp_path).load_into(base, "default")
    assert_same(base, base.adapters["default"], theirs)
    save_adapter(base.adapters["default"], base.model, tmp_path / "ours", "the/base")
    assert distance(own_logits(in_peft(family, tmp_path / "ours")), own_logits(theirs)) < LIMIT


@pytest.mark.parametrize("family", LAYOUTS)
def test_ten_steps_equal_pefts(family: str, tmp_path: Path) -> None:
    base, adapter = adapted(family)
    save_adapter(adapter, base.model, tmp_path, "the/base")
    theirs = in_peft(family, tmp_path)
    start = {key: p.detach().clone() for key, p in adapter.parameters.items()}
    for model, parameters in ((base.model, adapter.parameters), (theirs, trainable(theirs))):
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.0)
        for step in range(10):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS.roll(step, 1)).loss.backward()
            optimizer.step()
    ended = {key: p.detach() for key, p in trainable(theirs).items()}
    assert max(float((ended[key] - start[key]).abs().max()) for key in start) > 5e-3
    assert not far_apart({key: p.detach() for key, p in adapter.parameters.items()}, ended, 1e-9)


@pytest.mark.parametrize("family", LAYOUTS)
def test_merging_gives_the_same_model_and_the_same_replies(family: str) -> None:
    base, adapter = adapted(family)
    plain = tiny_moe(family)
    own = dict(plain.named_parameters())
    for name, weight in merged_weights(base.model, adapter).items():
        own[name].data.copy_(weight)
    assert distance(own_logits(plain), own_logits(base.model)) < LIMIT
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(plain.generate(IDS, **options), base.model.generate(IDS, **options))


def test_several_adapters_in_a_batch_equal_each_alone() -> None:
    base, _first = adapted("mixtral")
    stir(inject(base.model, LoraConfig(r=2, target_parameters=("experts.down_proj",)), base.router, "other"), 2)
    alone = {}
    for name in ("default", "other", None):
        base.router.active = name
        alone[name] = logits_of(base.model)
    router, rows = base.router, ["default", "other", "default", None]
    router.route([(name, 8 * i, 8 * i + 8) for i, name in enumerate(rows)])
    mixed = logits_of(base.model, torch.cat([IDS, IDS]))
    for i, name in enumerate(rows):
        assert distance(mixed[i], alone[name][i % 2]) < LIMIT
    remove(base.model, "other")
    router.route(None)
    router.active = "default"
    assert torch.equal(logits_of(base.model), alone["default"])
    remove(base.model, "default")
    assert not any(isinstance(m, LoRAParameters) for m in base.model.modules())


def test_experts_that_sort_their_tokens_compute_one_adapter_at_a_time() -> None:
    base, _adapter = adapted("jetmoe")
    alone = logits_of(base.model)
    base.router.route([("default", 0, 8), ("default", 8, 16)])
    assert torch.equal(logits_of(base.model), alone)
    base.router.route([("default", 0, 8), (None, 8, 16)])
    with pytest.raises(AdapterError, match="a JetMoeParallelExperts cannot compute several adapters in one batch"):
        logits_of(base.model)


def test_the_plain_path_keeps_no_sum_for_backward() -> None:
    base, adapter = adapted("jetmoe")
    own = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    shapes = {base.model.get_submodule(path).weight.shape[1:] for path in adapter.targets.by_module}
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        if {t.shape[-2:], t.shape[-2:][::-1]} & shapes:
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        own_logits(base.model, IDS[:1, :7])  # no activation has the shape of a weight then
    assert not [t.shape for t in kept if t.untyped_storage().data_ptr() not in own]


def test_leaving_out_one_weight_renames_the_other() -> None:
    base, adapter = adapted("mixtral")
    paths = [path for path in adapter.targets.parameters if path.endswith("gate_up_proj")]
    values = {key: p for key, p in adapter.parameters.items() if "experts.lora_" in key}
    left = leave_out(base.model, adapter, paths)
    assert {key: p for key, p in left.parameters.items() if "experts" in key} == values
    assert left.targets.by_module == {
        "model.layers.0.mlp.experts": ["down_proj"],
        "model.layers.1.mlp.experts": ["down_proj"],
    }
    gone = leave_out(base.model, left, list(left.targets.parameters))
    assert not [key for key in gone.parameters if "experts" in key]
    assert not any(isinstance(m, LoRAParameters) for m in base.model.modules())


def test_attributes_are_those_of_the_module() -> None:
    base, _adapter = adapted("mixtral")
    wrapper = base.model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(wrapper, LoRAParameters)
    assert wrapper.num_experts == 4
    with pytest.raises(AttributeError):
        _missing = wrapper.no_such_thing
