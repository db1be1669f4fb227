"""Starts of A and B that are computed from W, against PEFT: values, ten steps, and folders in both directions."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.lora.files import read_weights, save_adapter
from lorasmith.lora.inject import Adapter, count, inject
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.merge import merged_weights
from lorasmith.lora.saved_values import has_moved
from lorasmith.lora.start_values import FromStart
from lorasmith.model.base import Base
from lorasmith.model.head import loss_sum
from tests.support.families import distance, example, logits_of, one_row, own_logits, stir, tiny, tiny_base
from tests.support.tiny import Crash, adapter_bytes, crash_at, losses, metrics, model_folder, trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
LIMIT = 1e-5  # PEFT computes these starts in float32 only
STEPS = 10
KINDS = [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama"), ("mica", "llama"), ("mica", "gpt2")]  # PEFT's OLoRA
# has the wrong shapes for Conv1D
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 6, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"q_proj": 3}},
}


def both(kind: str, family: str, **options: Any) -> tuple[Base, Adapter, Any]:
    """A new adapter of ours and of PEFT on the same base in float32."""
    base = tiny_base(family, torch.float32)
    config = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": kind} | options
    adapter = base.adapters["default"] = inject(base.model, LoraConfig(**config), base.router, strict=False)
    theirs = peft.get_peft_model(tiny(family, torch.float32), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    return base, adapter, theirs


def of_peft(model: Any) -> dict[str, nn.Parameter]:
    named = {n.replace(".default", ""): p for n, p in model.named_parameters() if ".lora_" in n}
    return {name: p for name, p in named.items() if p.requires_grad}


def steps(parameters: list[nn.Parameter], logits: Any) -> list[float]:
    """Ten steps of AdamW, and their losses."""
    optimizer, found = torch.optim.AdamW(parameters, lr=1e-2), []
    for _step in range(STEPS):
        optimizer.zero_grad()
        loss = torch.log_softmax(logits(), -1)[..., 7].mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("kind", "family"), KINDS)
def test_ten_steps_equal_those_of_peft(kind: str, family: str, options: str) -> None:
    base, adapter, theirs = both(kind, family, **OPTIONS[options])
    before, weights = logits_of(tiny(family, torch.float32)), base_bits(base)
    assert distance(logits_of(base), before) < LIMIT
    assert not has_moved(adapter, base.model)
    named = of_peft(theirs)
    assert adapter.trained.keys() == named.keys()
    for key, p in adapter.parameters.items():
        assert distance(p, theirs.get_parameter(key.replace(".weight", ".default.weight"))) < LIMIT, key
    ours = steps(list(adapter.trained.values()), lambda: own_logits(base))
    assert ours == pytest.approx(steps(list(named.values()), lambda: own_logits(theirs)), abs=LIMIT)
    assert ours[-1] < ours[0] - 0.1
    assert max(distance(adapter.trained[key], named[key]) for key in named) < 1e-3  # Adam amplifies rounding
    assert distance(logits_of(base), logits_of(theirs)) < 1e-4
    assert has_moved(adapter, base.model)
    assert base_bits(base) == weights, "the base model is shared with other adapters"


def base_bits(base: Base) -> list[bytes]:
    named = base.model.named_parameters()
    return [p.detach().numpy().tobytes() for name, p in named if ".lora_" not in name]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_it_is_saved_as_plain_lora_for_the_untouched_base(kind: str, options: str, tmp_path: Path) -> None:
    base, adapter, _theirs = both(kind, "llama", **OPTIONS[options])
    stir(adapter)
    save_adapter(adapter, base.model, tmp_path, "")
    theirs = peft.PeftModel.from_pretrained(tiny("llama", torch.float32), tmp_path)
    assert distance(logits_of(base), logits_of(theirs)) < LIMIT
    again = tiny_base("llama", torch.float32)
    AdapterFolder.read(tmp_path).load_into(again, "default")
    assert distance(logits_of(base), logits_of(again)) < LIMIT
    assert distance(logits_of(base), logits_of(tiny("llama", torch.float32))) > 0.01


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_saved_folder_is_the_one_that_peft_converts_to(kind: str, rslora: bool, tmp_path: Path) -> None:
    base, adapter, theirs = both(kind, "llama", use_rslora=rslora)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = kind
    move(adapter, theirs)
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    save_adapter(adapter, base.model, tmp_path / "ours", "")
    ours, wanted = read_weights(tmp_path / "ours"), read_weights(tmp_path / "theirs")
    assert ours.keys() == wanted.keys()
    assert max(distance(ours[key], wanted[key]) for key in ours) < LIMIT
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for key in ("r", "lora_alpha", "init_lora_weights", "use_rslora"):
        assert configs[0][key] == pytest.approx(configs[1][key]), key


@torch.no_grad()
def move(adapter: Adapter, theirs: Any) -> None:
    """The same random step for both."""
    generator = torch.Generator().manual_seed(3)
    for key, p in adapter.trained.items():
        step = torch.randn(p.shape, generator=generator) * 0.1
        p += step
        of_peft(theirs)[key] += step


@pytest.mark.parametrize(("kind", "family"), KINDS)
def test_a_folder_of_peft_that_needs_its_changed_base_is_read_as_peft_reads_it(
    kind: str, family: str, tmp_path: Path
) -> None:
    """PEFT computes the start from W again, and takes it out of W."""
    _base, adapter, theirs = both(kind, family)
    move(adapter, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["init_lora_weights"] == kind
    read = peft.PeftModel.from_pretrained(tiny(family, torch.float32), tmp_path / "theirs")
    base = tiny_base(family, torch.float32)
    AdapterFolder.read(tmp_path / "theirs").load_into(base, "default")
    assert distance(logits_of(base), logits_of(read)) < LIMIT
    assert distance(logits_of(base), logits_of(theirs)) < LIMIT
    save_adapter(base.adapters["default"], base.model, tmp_path / "ours", "")
    converted = peft.PeftModel.from_pretrained(tiny(family, torch.float32), tmp_path / "ours")
    assert distance(logits_of(base), logits_of(converted)) < LIMIT


@pytest.mark.parametrize("kind", ["pissa_niter_4", "corda", "lora_ga"])
def test_a_folder_that_belongs_to_a_base_nobody_has_is_refused(kind: str, tmp_path: Path) -> None:
    base, adapter, _theirs = both("pissa", "llama")
    stir(adapter)
    save_adapter(adapter, base.model, tmp_path, "")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": kind}))
    with pytest.raises(AdapterError, match=rf"init_lora_weights is '{kind}'.*path_initial_model_for_weight_conversion"):
        AdapterFolder.read(tmp_path).load_into(tiny_base("llama"), "default")


@pytest.mark.parametrize("kind", ["pissa", "olora", "mica"])
def test_merged_equals_unmerged_and_pefts(kind: str) -> None:
    base, adapter, theirs = both(kind, "llama")
    move(adapter, theirs)
    wanted = theirs.merge_and_unload()
    for name, weight in merged_weights(base.model, adapter).items():
        assert distance(weight, wanted.get_parameter(name)) < LIMIT, name


def test_the_approximate_decomposition_is_near_the_exact_one_and_follows_the_seed() -> None:
    kinds = ["pissa", "pissa_niter_64", "pissa_niter_64"]
    starts = [both_products(inject_into(tiny_base("llama"), kind)) for kind in kinds]
    assert starts[1].keys() == starts[0].keys()
    assert all(torch.equal(starts[1][key], starts[2][key]) for key in starts[1])
    assert max(distance(starts[1][key], starts[0][key]) for key in starts[0]) < 0.2


def inject_into(base: Base, kind: str, **options: Any) -> Base:
    config = LoraConfig(**({"r": 4, "init_lora_weights": kind} | options))
    base.adapters["default"] = inject(base.model, config, base.router)
    return base


def both_products(base: Base) -> dict[str, Tensor]:
    layers = {path: layer for path, layer in base.model.named_modules() if isinstance(layer, LoRALayer)}
    pairs = {path: layer.updates["default"].own_matrices for path, layer in layers.items()}
    return {path: (B @ A).detach() for path, (A, B) in pairs.items()}


def test_olora_of_conv1d_decomposes_the_weight_as_it_is_used() -> None:
    """PEFT decomposes the transposed one, which has the wrong shapes."""
    base = inject_into(tiny_base("gpt2"), "olora", lora_alpha=4)
    layer = base.model.transformer.h[0].attn.c_attn
    A, B = layer.updates["default"].own_matrices
    W_OI = layer.base_layer.weight.t()
    assert distance(B.t() @ B, torch.eye(4, dtype=torch.float64)) < 1e-12
    assert distance(B @ A, B @ B.t() @ W_OI) < 1e-12
    assert distance(logits_of(base), logits_of(tiny("gpt2"))) < 1e-12


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_packed_rows_are_fused_as_plain_lora_is(kind: str) -> None:
    base = inject_into(tiny_base("llama"), kind)
    stir(base.adapters["default"])
    batch = [example(9, 1), example(14, 2)]
    wanted = loss_sum(base, one_row(batch))
    update = base.model.model.layers[0].self_attn.q_proj.updates["default"]
    assert isinstance(update, FromStart)
    assert update.is_low_rank
    assert [matrix.shape for matrix in update.matrices] == [(8, 32), (32, 8)]
    alone = [loss_sum(base, one_row([one])) * one.weight for one in batch]
    assert distance(wanted, sum(alone) / sum(one.weight for one in batch)) < 1e-6


@pytest.mark.parametrize("other", [{"use_dora": True}, {"alora_invocation_tokens": (5,)}])
def test_mica_is_no_part_of_another_variant_as_in_peft(other: dict[str, Any]) -> None:
    """PEFT would not load the folder."""
    options = {"r": 2, "init_lora_weights": "mica", "target_modules": ["q_proj"]}
    theirs = peft.LoraConfig(
        **options, **{key: value if value is True else list(value) for key, value in other.items()}
    )
    with pytest.raises(ValueError, match="unsupported variant combination"):
        peft.get_peft_model(tiny("llama", torch.float32), theirs)
    base = tiny_base("llama")
    (flag,) = other
    with pytest.raises(ConfigError, match=rf"lora\.{flag} and lora\.init_lora_weights=mica are mutually exclusive"):
        inject(base.model, LoraConfig(**options, **other), base.router)


def test_mica_counts_and_trains_a_alone() -> None:
    base = inject_into(tiny_base("llama"), "mica", target_modules=("q_proj", "embed_tokens"))
    adapter = base.adapters["default"]
    assert all(".lora_A." in key or key.endswith("lora_embedding_A") for key in adapter.trained)
    assert count(base.model, adapter).trainable == sum(p.numel() for p in adapter.trained.values())
    config = peft.LoraConfig(r=4, init_lora_weights="mica", target_modules=["q_proj", "embed_tokens"])
    theirs = peft.get_peft_model(tiny("llama", torch.float32), config).get_parameter(
        "base_model.model.model.embed_tokens.lora_embedding_B.default"
    )
    ours = adapter.parameters["base_model.model.model.embed_tokens.lora_embedding_B"]
    assert distance(ours.abs(), theirs.abs()) < 1e-4  # another dtype may give another sign


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "pissa", "use_dora": True}, "use_dora and lora.init_lora_weights=pissa are mutually"),
        ({"init_lora_weights": "olora", "target_modules": ("embed_tokens", "q_proj")}, "embed_tokens is an embedding"),
        ({"init_lora_weights": "pissa", "r": 20}, "k_proj has only 16 singular values, so its rank cannot be 20"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs an even rank, but r is 3"),
    ],
)
def test_what_has_no_such_start_is_refused_and_the_model_is_unchanged(options: dict[str, Any], words: str) -> None:
    base = tiny_base("llama")
    before = [name for name, _module in base.model.named_modules()]
    with pytest.raises(ConfigError, match=words):
        inject(base.model, LoraConfig(**options), base.router)
    assert [name for name, _module in base.model.named_modules()] == before


def test_a_quantized_base_is_refused() -> None:
    base = tiny_base("llama")
    layer = base.model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"pissa: .*q_proj: its start is computed from the weights"):
        inject(base.model, LoraConfig(init_lora_weights="pissa"), base.router)


# --- through the training path ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "mica", "orthogonal", "gaussian", "random"])
def test_a_run_trains_it_and_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    changes = {"init_lora_weights": kind, "save_every": 1, "eval_every": 1, "r": 4}
    trained(tmp_path / "whole", **changes)
    trained(tmp_path / "plain", r=4)
    assert losses(tmp_path / "whole") != losses(tmp_path / "plain")
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(3), **changes)
    trained(tmp_path / "run", resume=True, **changes)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    ranks = {len(p) for key, p in read_weights(tmp_path / "whole" / "adapter").items() if ".lora_A." in key}
    assert ranks == {8 if kind.startswith(("pissa", "olora")) else 4}
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    ids, before = torch.arange(3, 30)[None], AutoModelForCausalLM.from_pretrained(model_folder())
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "whole" / "adapter")
    assert distance(logits_of(theirs, ids), logits_of(before, ids)) > 1e-4
