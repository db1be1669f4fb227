"""A variant that comes through the table is computed as itself on every path; one that does not is refused."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.lora import LoraConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.engine.engine import Engine, generate
from lorasmith.engine.padded import Padded
from lorasmith.engine.request import Request
from lorasmith.engine.scoring import prompt_logprobs
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.lora.alora import ALoRA
from lorasmith.lora.dora import DoRA
from lorasmith.lora.files import read_weights, save_adapter
from lorasmith.lora.fused.held import held_weights
from lorasmith.lora.inject import Adapter, inject, remove
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.lora_bias import LoraBias
from lorasmith.lora.merge import merged_weights
from lorasmith.lora.router import Slice
from lorasmith.lora.saved_values import has_effect
from lorasmith.lora.start_values import FromStart
from lorasmith.lora.update import Update
from lorasmith.lora.variant import VARIANTS
from lorasmith.model.base import Base
from lorasmith.model.fast.decoder import adapter_weights
from lorasmith.model.fast.recognize import recognize_modules
from lorasmith.model.forward import hidden
from lorasmith.model.head import loss_sum
from lorasmith.model.row import flatten
from lorasmith.model.verify import enable_fast_parts
from tests.support.families import distance, example, gradients, logits_of, one_row, own_logits, stir, tiny, tiny_base

pytestmark = pytest.mark.usefixtures("exact", "_registered")
LIMIT = 1e-11  # float64: sums in another order
FAMILIES = ("llama", "qwen3", "gemma3_text", "phi3", "gpt2", "bloom")
GAIN = "lora_gain"


class Gained(Update):
    """y = exp(g) * (W x + s B A x), bias included: linear in x, and far from plain LoRA."""

    @classmethod
    def parts(cls, layer: LoRALayer) -> dict[str, tuple[int, ...]]:
        return {GAIN: (layer.out_features,)}

    @torch.no_grad()
    def start(self) -> None:
        self.part(GAIN).zero_()

    def forward(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        return torch.exp(self.part(GAIN)).to(y_TO.dtype) * super().forward(x_TI, y_TO)

    def merged(self, W_OI: Tensor) -> Tensor:
        return torch.exp(self.part(GAIN).double())[:, None] * super().merged(W_OI)


class Squashed(Update):
    """y = tanh(W x + s B A x): autograd keeps the output, which nobody may write over."""

    def forward(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        return torch.tanh(super().forward(x_TI, y_TO))


class Config(LoraConfig):
    """The flags, as the options of a variant have theirs in LoraConfig."""

    use_gain: bool = False
    use_squash: bool = False


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "use_gain", Gained)
    monkeypatch.setitem(VARIANTS, "use_squash", Squashed)


def put(base: Base, name: str = "default", seed: int = 1, **options: Any) -> Adapter:
    """A trained-looking adapter on `base`."""
    adapter = base.adapters[name] = inject(base.model, Config(**({"r": 3} | options)), base.router, name)
    stir(adapter, seed)
    return adapter


def base_with(family: str, **options: Any) -> tuple[Base, Adapter]:
    base = tiny_base(family)
    recognize_modules(base.model)
    return base, put(base, **options)


class Book(nn.Module):
    """What an adapted layer gives, by the book, with its own copy of the parameters."""

    def __init__(self, layer: LoRALayer, adapter: str, own: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.base, self.own = layer.base_layer, own
        self.s, self.kind = layer.updates[adapter].scaling, type(layer.updates[adapter])

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x) + self.s * x @ self.own["lora_A.weight"].t() @ self.own["lora_B.weight"].t()
        if self.kind is Gained:
            return torch.exp(self.own[GAIN]) * y
        return torch.tanh(y) if self.kind is Squashed else y


def by_the_book(base: Base, adapter: Adapter) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The untouched model with each adapted layer written out, and its parameters by the keys of files."""
    model, parameters = tiny(base.source), {}
    for path in adapter.targets.adapted:
        own = {}
        for part in base.model.get_submodule(path).updates[adapter.name].parameters:
            key = f"base_model.model.{path}.{part}"
            own[part] = parameters[key] = nn.Parameter(adapter.parameters[key].detach().clone())
        parent, _dot, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, Book(base.model.get_submodule(path), adapter.name, own))
        getattr(model.get_submodule(parent), child).base = tiny(base.source).get_submodule(path)
    return model, parameters


# --- training ---------------------------------------------------------------------------------------------------------


def assert_steps_by_the_book(base: Base, adapter: Adapter) -> None:
    """Loss and gradients of a step, against one example after the other through plain modules."""
    model, parameters = by_the_book(base, adapter)
    batch = [example(9, 1), example(14, 2), example(5, 3)]
    wanted = torch.zeros((), dtype=torch.float64)
    for one in batch:
        losses = F.cross_entropy(
            own_logits(model, torch.tensor([one.ids]))[0], torch.tensor(one.targets), reduction="none"
        )
        wanted = wanted + (losses * torch.tensor(one.weights, dtype=torch.float64)).sum()
    wanted = wanted / sum(one.weight for one in batch)
    loss = loss_sum(base, one_row(batch))
    assert distance(loss, wanted) < 1e-6  # the head sums in float32
    loss.backward()
    theirs = torch.autograd.grad(wanted, list(parameters.values()))
    for (key, ours), plain in zip(gradients(adapter).items(), theirs, strict=True):
        assert distance(ours, plain) < 1e-5, key


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["use_gain", "use_squash"])
def test_a_step_equals_plain_autograd(family: str, kind: str, passes: Any) -> None:
    """Fused linears and MLPs are switched on, and leave these layers to themselves."""
    base, adapter = base_with(family, target_modules="all-linear", **{kind: True})
    enable_fast_parts(base, "default", list(range(3, 27)))
    assert "plain" not in base.why
    before = passes.count
    assert_steps_by_the_book(base, adapter)
    assert passes.count == before == 0


@pytest.mark.parametrize("targets", [("k_proj",), ("q_proj", "gate_proj"), ("down_proj", "v_proj")])
def test_a_step_with_the_variant_on_some_layers(targets: tuple[str, ...]) -> None:
    base, adapter = base_with("llama", target_modules=targets, use_squash=True)
    enable_fast_parts(base, "default", list(range(3, 27)))
    assert_steps_by_the_book(base, adapter)


def test_dropout_falls_on_the_input_of_a_in_training_alone() -> None:
    base, adapter = base_with("llama", lora_dropout=0.5, use_gain=True)
    assert not torch.equal(logits_of(base), logits_of(base))
    base.model.eval()
    assert distance(logits_of(base), logits_of(by_the_book(base, adapter)[0])) < LIMIT


def test_a_fresh_adapter_changes_no_bit() -> None:
    base = tiny_base("llama")
    before = logits_of(base)
    inject(base.model, Config(use_gain=True), base.router)
    assert torch.equal(logits_of(base), before)


# --- rows of several adapters, and decoding ---------------------------------------------------------------------------


def several(family: str, **of_plain: Any) -> tuple[Base, dict[str | None, nn.Module]]:
    """A base with two variants and a plain adapter, and a model by the book for each."""
    base, first = base_with(family, use_gain=True, target_modules="all-linear")
    others = {"squash": put(base, "squash", 2, use_squash=True), "lora": put(base, "lora", 3, **of_plain)}
    base.router.active = None
    books: dict[str | None, nn.Module] = {None: tiny(family), "default": by_the_book(base, first)[0]}
    return base, books | {name: by_the_book(base, adapter)[0] for name, adapter in others.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_row_of_several_adapters(family: str) -> None:
    """Packed (llama, gpt2) and padded (bloom): each token with its own."""
    base, books = several(family)
    base.model.eval()
    batch = [example(length, length, learned=1.0) for length in (7, 4, 9, 6)]
    row = flatten(batch, 1.0, None)
    slots = tuple(Slice(name, span.start, span.end) for name, span in zip(books, row.spans, strict=True))
    with torch.no_grad():
        states = hidden(base, replace(row, slots=slots))
    for slot, one in zip(slots, batch, strict=True):
        alone = books[slot.adapter].get_decoder()(torch.tensor([one.ids]), use_cache=False).last_hidden_state[0]
        assert distance(states[slot.start : slot.end], alone.detach()) < LIMIT, slot.adapter


def requests(names: Sequence[str | None], lengths: Sequence[int], new: int = 5) -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    settings = SamplingConfig(max_new_tokens=new)
    return [
        Request(torch.randint(3, 90, (n,), generator=generator).tolist(), settings, name, ())
        for n, name in zip(lengths, names, strict=True)
    ]


def logits_while(engine: Engine, act: Callable[[], Any]) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    inner = engine._layout.run

    def spy(chunks: Any) -> Tensor:
        logits = inner(chunks)
        ready = [chunk.running.key for chunk in chunks if chunk.running.pending == 0]
        for key, row in zip(ready, logits, strict=True):
            found.setdefault(key, []).append(row.clone())
        return logits

    engine._layout.run = spy  # type: ignore[method-assign]
    act()
    return found


@pytest.mark.parametrize("prepack", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2", "bloom"])
def test_decoding_gives_the_variants_logits(family: str, prepack: bool) -> None:
    """In the adapter bank's rows and padded ones, few tokens and many, beside plain adapters, before and after."""
    base, books = several(family)
    base.tokenizer = Letters()  # type: ignore[assignment]
    engine = Engine(base, prepack=prepack)
    assert isinstance(engine._layout, Padded) == (family == "bloom")
    names = ("lora", "default", None, "squash", "lora", "default")
    for lengths in ((4, 7, 3, 9, 5, 6), (30, 12, 25, 9, 31, 28)):
        asked, answers = requests(names, lengths), dict[int, list[int]]()

        def act(asked: list[Request] = asked, answers: dict[int, list[int]] = answers) -> None:
            for event in generate(engine, asked):
                answers.setdefault(event.key, []).append(event.token)

        found = [*dict(sorted(logits_while(engine, act).items())).values()]
        limit = 1e-5  # logits come in float32
        for i, (one, name) in enumerate(zip(asked, names, strict=True)):
            ids = torch.tensor([[*one.ids, *answers[i][:-1]]])
            wanted = logits_of(books[name], ids)[0, len(one.ids) - 1 :]  # type: ignore[arg-type]
            assert distance(torch.stack(found[i]), wanted) < limit, (name, lengths)


def test_a_variant_that_comes_while_the_engine_decodes_in_groups() -> None:
    """And when it has gone, the layers are in groups again."""
    base, _adapter = base_with("llama")
    base.tokenizer = Letters()  # type: ignore[assignment]
    engine = Engine(base)

    def answers(name: str) -> Tensor:
        asked = requests([name, "default"], [9, 6])
        found = logits_while(engine, partial(list, generate(engine, asked)))
        return torch.stack(found[min(found)])

    first = answers("default")
    late = put(base, "late", 2, use_gain=True, target_modules=("q_proj", "up_proj"))
    ids = requests(["late"], [9])[0].ids
    wanted = logits_of(by_the_book(base, late)[0], torch.tensor([ids]))[0, -1]  # type: ignore[arg-type]
    assert distance(answers("late")[0], wanted) < 1e-5
    remove(base.model, "late")
    del base.adapters["late"]
    assert distance(answers("default"), first) < 1e-6


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_prompt_is_scored_with_the_variant(family: str) -> None:
    base, books = several(family)
    (asked,) = requests(["default"], [9])
    (told,) = prompt_logprobs(base, [asked])
    logprobs = torch.log_softmax(logits_of(books["default"], torch.tensor([asked.ids])), -1)[0]  # type: ignore[arg-type]
    wanted = [float(logprobs[i, token]) for i, token in enumerate(asked.ids[1:])]
    assert [one.logprob for one in told if one] == pytest.approx(wanted, abs=1e-5)


class Letters:
    """A tokenizer whose token i is one letter."""

    def decode(self, ids: Sequence[int], **_options: object) -> str:
        return "".join(chr(256 + i) for i in ids)

    def get_added_vocab(self) -> dict[str, int]:
        return {}


def test_a_variant_is_not_held_outside_the_model() -> None:
    """Where it would be served as plain LoRA from the adapter bank."""
    base, adapter = base_with("llama", use_squash=True)
    tensors = {key: p.detach() for key, p in adapter.parameters.items()}
    plain = tiny_base("llama")
    paths = adapter.targets.adapted
    assert held_weights(plain.model, adapter.config, tensors, Path(), paths, 0) is None
    assert held_weights(plain.model, LoraConfig(r=3), tensors, Path(), paths, 0) is not None
    assert not adapter_weights(base, adapter).read(), "nor are its matrices given to the bank from the model"


class LowRankHeir(FromStart):
    """A subclass of an update that is low rank, which does not say that it is."""


def test_being_low_rank_is_not_inherited() -> None:
    base, _adapter = base_with("llama")
    layer = base.model.model.layers[0].mlp.up_proj
    for kind, is_low_rank in ((Update, True), (FromStart, True), (ALoRA, True), (LoraBias, False), (DoRA, False),
                              (LowRankHeir, False), (Gained, False)):  # fmt: skip
        layer.updates["default"] = kind(layer, "default", 1.0)
        assert layer.is_low_rank == is_low_rank, kind
        assert (layer.fusable("default") is not None) == is_low_rank, kind


# --- merging and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged(family: str) -> None:
    base, adapter = base_with(family, use_gain=True, target_modules="all-linear")
    if family in ("gpt2", "bloom"):  # whose biases the gain changes too, which no weight holds
        for path in adapter.targets.adapted:
            base.model.get_submodule(path).base_layer.bias.data.zero_()
    model = copy.deepcopy(base.model)
    for path in adapter.targets.adapted:
        parent, _dot, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, model.get_submodule(path).base_layer)
    weights = merged_weights(base.model, adapter)
    assert {type(model.get_submodule(name.rpartition(".")[0])) for name in weights} <= {nn.Linear, Conv1D}
    for name, weight in weights.items():
        model.get_parameter(name).data.copy_(weight)
    assert distance(logits_of(Base(**{**base.__dict__, "model": model})), logits_of(base)) < LIMIT


def test_a_saved_variant_is_refused_by_name_where_no_option_knows_it(tmp_path: Path) -> None:
    base, adapter = base_with("llama", use_gain=True)
    save_adapter(adapter, base.model, tmp_path, "")
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["use_gain"] is True
    assert any(key.endswith(GAIN) for key in read_weights(tmp_path))
    with pytest.raises(AdapterError, match="use_gain"):
        AdapterFolder.read(tmp_path).load_into(tiny_base("llama"), "default")


def test_parts_of_a_variant_alone_are_no_effect() -> None:
    _base, adapter = base_with("llama", use_gain=True)
    assert has_effect(adapter.parameters)
    with torch.no_grad():
        for key, parameter in adapter.parameters.items():
            if "lora_B" in key:
                parameter.zero_()
    assert not has_effect(adapter.parameters)


def test_removing_leaves_nothing() -> None:
    base, _adapter = base_with("llama", use_gain=True)
    put(base, "second", use_gain=True)
    remove(base.model, "default")
    assert not [name for name, _p in base.model.named_parameters() if "default" in name]
    remove(base.model, "second")
    assert {n: p.shape for n, p in base.model.named_parameters()} == {
        n: p.shape for n, p in tiny("llama").named_parameters()
    }


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_variant_goes_on_linear_layers_only() -> None:
    base = tiny_base("llama")
    with pytest.raises(ConfigError, match=r"lora\.use_gain: model\.embed_tokens is an embedding"):
        inject(base.model, Config(use_gain=True, target_modules=("embed_tokens", "q_proj")), base.router)
    assert not any(isinstance(module, LoRALayer) for module in base.model.modules())


def test_two_variants_at_once() -> None:
    base = tiny_base("llama")
    with pytest.raises(ConfigError, match=r"lora\.use_gain and lora\.use_squash are mutually exclusive"):
        inject(base.model, Config(use_gain=True, use_squash=True), base.router)


class Unregistered(Gained):
    """Nobody knows it."""


class Subclass(LoRALayer):
    """Nobody knows it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().unfused(x, *args, **kwargs)


def test_an_update_that_is_not_in_the_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    monkeypatch.setattr("lorasmith.lora.inject.variant_of", lambda config: Unregistered)
    with pytest.raises(AdapterError, match="Unregistered is not a registered variant"):
        inject(base.model, LoraConfig(), base.router)


@pytest.mark.parametrize("how", ["an update", "a layer"])
def test_what_is_smuggled_in_is_never_taken_for_plain_lora(how: str, tmp_path: Path, passes: Any) -> None:
    base, adapter = base_with("llama", target_modules="all-linear")
    enable_fast_parts(base, "default", list(range(3, 27)))
    layer = base.model.model.layers[0].self_attn.q_proj
    plain = logits_of(base)
    if how == "an update":
        layer.updates["default"] = Squashed(layer, "default", 1.0)
        layer.updates["default"].__class__ = type("Stranger", (Squashed,), {})
    else:
        layer.__class__ = Subclass
    base.router.route(None)
    alone, before = logits_of(base), passes.count
    assert distance(alone, plain) > 0.01
    base.model.eval()
    row = flatten([example(9, 1)], 1.0, "default")
    fast = hidden(base, row).detach()
    assert passes.count > before, "the other layers are still fused"
    base.router.fused = False
    for module in base.model.modules():
        module.plain = True
    assert distance(fast, hidden(base, row).detach()) < LIMIT
    base.tokenizer = Letters()  # type: ignore[assignment]
    engine = Engine(base)
    (asked,) = requests(["default"], [9])
    (rows,) = logits_while(engine, partial(list, generate(engine, [asked]))).values()
    wanted = logits_of(base, torch.tensor([asked.ids]))[0, -1]
    assert distance(rows[0], wanted) < 1e-5
    for act in (lambda: merged_weights(base.model, adapter), lambda: save_adapter(adapter, base.model, tmp_path, "")):
        with pytest.raises(AdapterError, match=r"Stranger is not a registered|Subclass is a subclass of LoRALayer"):
            act()
