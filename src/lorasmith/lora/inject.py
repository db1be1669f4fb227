"""Wrap the modules that a LoraConfig matches, freeze the rest, and count what is trained."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.config import LoraConfig
from lorasmith.lora.init import initialise
from lorasmith.lora.layer import LoRAEmbedding, LoRALayer, SavedModule
from lorasmith.lora.router import Router
from lorasmith.lora.target import Targets, find_targets

PEFT_PREFIX = "base_model.model."  # what PEFT's wrapper puts before every path in its files


@dataclass(frozen=True)
class Adapter:
    """One adapter inside a model. `parameters` are its trainable tensors under the keys of PEFT's files."""

    name: str
    config: LoraConfig
    targets: Targets
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


class Counts(NamedTuple):
    """Numbers of parameters; tied ones count once. Printed in PEFT's words."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"


def inject(model: PreTrainedModel, config: LoraConfig, router: Router, name: str = "default", seed: int = 0) -> Adapter:
    """Put a fresh adapter on `model` and make it the active one. Everything that is not its own is frozen.

    The logits do not change: B starts at zero, copies are equal (law 1).

    Raises:
        ConfigError: a pattern matches nothing, or something that LoRA cannot go on.
        AdapterError: the name is taken, or biases are trained beside another adapter.
    """
    plain = _PlainView(model)
    if name in plain.adapters or "." in name:
        raise AdapterError(_("the adapter name {name!r} is taken or holds a dot. Choose another.", name=name))
    if plain.adapters and (config.bias != "none" or plain.has_trained_bias):
        raise AdapterError(
            _("adapter {name!r}: bias={bias!r} changes the base itself, so it cannot share it.", name=name, bias=config.bias)
        )
    with plain:
        targets = find_targets(model, config)
    if not plain.adapters:
        model.requires_grad_(False)
    parameters: dict[str, nn.Parameter] = {}
    generator = torch.Generator().manual_seed(seed)
    for path in targets.adapted:
        layer = _wrapped(model, path, router)
        _add(layer, path, name, config, generator)
        parameters |= {_key(path, part): p for part, p in _own_parameters(layer, name).items()}
    for path in (path for paths in targets.saved.values() for path in paths):
        saved = _saved(model, path, router)
        parameters |= {_key(path, part): p for part, p in saved.add(name).named_parameters()}
    parameters |= _biases(model, config, parameters)
    router.active = name
    return Adapter(name, config, targets, parameters)


def remove(model: PreTrainedModel, name: str) -> None:
    """Take the adapter out of every layer; the wrappers stay, empty, and cost nothing."""
    for module in model.modules():
        if isinstance(module, LoRALayer | LoRAEmbedding) and name in module.scaling:
            module.remove(name)
        elif isinstance(module, SavedModule) and name in module.modules_to_save:
            module.remove(name)


def count(model: PreTrainedModel, adapter: Adapter) -> Counts:
    """How many parameters the adapter trains, and how many there are."""
    return Counts(sum(p.numel() for p in adapter.parameters.values()), sum(p.numel() for p in model.parameters()))


def rank_and_alpha(config: LoraConfig, path: str) -> tuple[int, float]:
    """r and lora_alpha of the module at `path`, after rank_pattern and alpha_pattern (PEFT's matching)."""

    def matches(key: str) -> bool:
        return re.match(rf"(.*\.)?({key})$", path) is not None

    r = next((r for key, r in config.rank_pattern.items() if matches(key)), config.r)
    return r, next((alpha for key, alpha in config.alpha_pattern.items() if matches(key)), config.lora_alpha)


class _PlainView:
    """Within `with`, the model's wrappers stand aside, so that patterns see the paths of the base alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        wrappers = {p: m for p, m in model.named_modules() if isinstance(m, LoRALayer | LoRAEmbedding | SavedModule)}
        self.model, self.wrappers = model, wrappers
        names = {n for m in wrappers.values() for n in (m.modules_to_save if isinstance(m, SavedModule) else m.scaling)}
        self.adapters = names
        self.has_trained_bias = any(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias"))

    def __enter__(self) -> None:
        for path, wrapper in self.wrappers.items():
            original = wrapper.original_module if isinstance(wrapper, SavedModule) else wrapper.base_layer
            _put(self.model, path, original)

    def __exit__(self, *exc: object) -> None:
        for path, wrapper in self.wrappers.items():
            _put(self.model, path, wrapper)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _dot, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _wrapped(model: nn.Module, path: str, router: Router) -> LoRALayer | LoRAEmbedding:
    module = model.get_submodule(path)
    if isinstance(module, LoRALayer | LoRAEmbedding):
        return module
    if isinstance(module, SavedModule):
        raise AdapterError(_("{path}: another adapter trains it whole, so LoRA cannot go on it too.", path=path))
    layer: LoRALayer | LoRAEmbedding
    if isinstance(module, nn.Embedding):
        layer = LoRAEmbedding(module, router)
    else:
        layer = LoRALayer(module, *_shape(module), router)
    _put(model, path, layer.train(module.training))
    return layer


def _saved(model: nn.Module, path: str, router: Router) -> SavedModule:
    module = model.get_submodule(path)
    if isinstance(module, LoRALayer | LoRAEmbedding):
        raise AdapterError(_("{path}: another adapter has LoRA on it, so it cannot be trained whole too.", path=path))
    if not isinstance(module, SavedModule):
        module = SavedModule(module, router).train(module.training)
        _put(model, path, module)
    return module


def _shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features); Conv1D stores its weight as [in, out]."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.weight.shape[0], module.weight.shape[1]  # type: ignore[index, return-value, union-attr]


def _add(layer: LoRALayer | LoRAEmbedding, path: str, name: str, config: LoraConfig, generator: torch.Generator) -> None:
    r, alpha = rank_and_alpha(config, path)
    device = next(layer.base_layer.parameters()).device
    if isinstance(layer, LoRAEmbedding):
        layer.add(name, r, config.scaling(r, alpha), device)
    else:
        layer.add(name, r, config.scaling(r, alpha), config.lora_dropout, device)
        layer.lora_dropout.train(layer.training)
    initialise(layer, name, config, generator)


def _own_parameters(layer: LoRALayer | LoRAEmbedding, name: str) -> dict[str, nn.Parameter]:
    if isinstance(layer, LoRAEmbedding):
        return {"lora_embedding_A": layer.lora_embedding_A[name], "lora_embedding_B": layer.lora_embedding_B[name]}
    return {"lora_A.weight": layer.lora_A[name].weight, "lora_B.weight": layer.lora_B[name].weight}


def _key(path: str, part: str) -> str:
    return f"{PEFT_PREFIX}{path}.{part}"


def _biases(model: nn.Module, config: LoraConfig, own: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The base's biases that `bias` asks to train, under PEFT's keys."""
    if config.bias == "none":
        return {}
    mine = {id(p) for p in own.values()}
    named = [(n, p) for n, p in model.named_parameters() if n.endswith("bias") and id(p) not in mine]
    if config.bias == "lora_only":
        named = [(n, p) for n, p in named if n.endswith(".base_layer.bias")]
    for _name, parameter in named:
        parameter.requires_grad_(True)
    return {PEFT_PREFIX + n: p for n, p in named}
