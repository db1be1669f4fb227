"""Wrap the modules that a LoraConfig matches, freeze the rest, and count what is trained."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.i18n import _
from lorasmith.lora.init import initialise
from lorasmith.lora.layer import LoRAEmbedding, LoRALayer, SavedModule
from lorasmith.lora.router import Router
from lorasmith.lora.target import Targets, find_targets, is_key_of
from lorasmith.lora.variant import misplaced, variant_of

Wrapper = LoRALayer | LoRAEmbedding | SavedModule
HALF = (torch.bfloat16, torch.float16)
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
        return _(
            "trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}",
            trainable=self.trainable,
            total=self.total,
            share=share,
        )


def inject(
    model: PreTrainedModel,
    config: LoraConfig,
    router: Router,
    name: str = "default",
    seed: int = 0,
    strict: bool = True,
) -> Adapter:
    """Put a fresh adapter on `model` and make it the active one. Everything that is not its own is frozen.

    The logits do not change: B starts at zero, copies are equal (law 1). strict: see `find_targets`.

    Raises:
        ConfigError: a pattern matches nothing, or something that LoRA or its variant cannot go on; or biases in half
            precision.
        AdapterError: the name is taken, or another adapter trains what this one would. The model is then unchanged.
    """
    plain = _PlainView(model)
    if name in plain.adapters or "." in name:
        raise AdapterError(
            _("the adapter name {name!r} is already in use or contains a dot. Choose another name.", name=name)
        )
    if plain.adapters and (config.bias != "none" or plain.has_trained_bias):
        raise AdapterError(
            _(
                "adapter {name!r}: bias={bias!r} changes the base model itself, so it cannot be shared with "
                "other adapters.",
                name=name,
                bias=config.bias,
            )
        )
    _refuse_rounded_biases(model, config)
    with plain:
        targets = find_targets(model, config, strict)
        problems = misplaced(config, {path: model.get_submodule(path) for path in targets.adapted})
    if problems:
        raise ConfigError(*problems)
    plain.refuse_clashes(targets)
    _refuse_ranks(model, config, targets)
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
    """Take the adapter out of every layer; a wrapper without adapters gives way to what it wraps."""
    for path, wrapper in _wrappers(model).items():
        if name in adapters_of(wrapper):
            wrapper.remove(name)
        if not adapters_of(wrapper):
            _put(model, path, _original(wrapper))
            if isinstance(wrapper, LoRALayer):
                wrapper.fused_linears.remove(wrapper)


def count(model: PreTrainedModel, adapter: Adapter) -> Counts:
    """How many parameters the adapter trains, and how many there are."""
    return Counts(sum(p.numel() for p in adapter.parameters.values()), sum(p.numel() for p in model.parameters()))


def rank_and_alpha(config: LoraConfig, path: str) -> tuple[int, float]:
    """r and lora_alpha of the module at `path`: the first key of rank_pattern and of alpha_pattern that means it."""
    r = next((r for key, r in config.rank_pattern.items() if is_key_of(key, path)), config.r)
    return r, next((alpha for key, alpha in config.alpha_pattern.items() if is_key_of(key, path)), config.lora_alpha)


class _PlainView:
    """Within `with`, the model's wrappers stand aside, so that patterns see the paths of the base alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.wrappers = model, _wrappers(model)
        self.adapters = {name for wrapper in self.wrappers.values() for name in adapters_of(wrapper)}
        own = (p for n, p in model.named_parameters() if n.endswith("bias") and ".modules_to_save." not in n)
        self.has_trained_bias = any(p.requires_grad for p in own)

    def __enter__(self) -> None:
        for path, wrapper in self.wrappers.items():
            _put(self.model, path, _original(wrapper))

    def __exit__(self, *exc: object) -> None:
        for path, wrapper in self.wrappers.items():
            _put(self.model, path, wrapper)

    def refuse_clashes(self, targets: Targets) -> None:
        """Raise AdapterError where one adapter would train a module whole and another put LoRA on it or in it."""
        saved = [path for paths in targets.saved.values() for path in paths]
        problems = []
        for path, wrapper in self.wrappers.items():
            if isinstance(wrapper, SavedModule):
                text = _(
                    "{path}: another adapter trains this module in full, so LoRA cannot be added to it.", path=path
                )
                clash = any(_is_inside(target, path) for target in targets.adapted)
            else:
                text = _("{path}: another adapter has LoRA on this module, so it cannot be trained in full.", path=path)
                clash = any(_is_inside(path, whole) for whole in saved)
            problems += [text] if clash else []
        if problems:
            raise AdapterError(*problems)


def plain_paths(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Within it the model's wrappers stand aside, so that its modules have the paths of the base alone."""
    return _PlainView(model)


def _is_inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".")


def _wrappers(model: nn.Module) -> dict[str, Wrapper]:
    return {p: m for p, m in model.named_modules() if isinstance(m, LoRALayer | LoRAEmbedding | SavedModule)}


def adapters_of(wrapper: Wrapper) -> list[str]:
    """The adapters on a wrapper."""
    if isinstance(wrapper, SavedModule):
        return list(wrapper.modules_to_save)
    return list(wrapper.updates if isinstance(wrapper, LoRALayer) else wrapper.scaling)


def _original(wrapper: Wrapper) -> nn.Module:
    return wrapper.original_module if isinstance(wrapper, SavedModule) else wrapper.base_layer


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _dot, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _wrapped(model: nn.Module, path: str, router: Router) -> LoRALayer | LoRAEmbedding:
    module = model.get_submodule(path)
    if isinstance(module, LoRALayer | LoRAEmbedding):
        return module
    layer: LoRALayer | LoRAEmbedding
    if isinstance(module, nn.Embedding):
        layer = LoRAEmbedding(module, router)
    else:
        layer = LoRALayer(module, *_shape(module), router)
    _put(model, path, layer)
    return layer


def _saved(model: nn.Module, path: str, router: Router) -> SavedModule:
    module = model.get_submodule(path)
    if not isinstance(module, SavedModule):
        module = SavedModule(module, router).train(module.training)
        _put(model, path, module)
    return module


def _shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features); Conv1D stores its weight as [in, out]."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.weight.shape[0], module.weight.shape[1]  # type: ignore[index, return-value]


def _add(
    layer: LoRALayer | LoRAEmbedding, path: str, name: str, config: LoraConfig, generator: torch.Generator
) -> None:
    r, alpha = rank_and_alpha(config, path)
    device = next(layer.base_layer.parameters()).device
    if isinstance(layer, LoRAEmbedding):
        layer.add(name, r, config.scaling(r, alpha), device)
    else:
        layer.add(name, r, config.scaling(r, alpha), config.lora_dropout, device, variant_of(config))
    layer.train(layer.base_layer.training)
    initialise(layer, name, config, generator)


def _own_parameters(layer: LoRALayer | LoRAEmbedding, name: str) -> dict[str, nn.Parameter]:
    if isinstance(layer, LoRAEmbedding):
        return {"lora_embedding_A": layer.lora_embedding_A[name], "lora_embedding_B": layer.lora_embedding_B[name]}
    return layer.updates[name].parameters


def _key(path: str, part: str) -> str:
    return f"{PEFT_PREFIX}{path}.{part}"


def _refuse_ranks(model: PreTrainedModel, config: LoraConfig, targets: Targets) -> None:
    """B A of a layer [O, I] has at most rank min(O, I): a rank beyond that of every layer only takes memory.

    PEFT takes any; one that is beyond some of the layers alone (the small ones of grouped queries) is usual.
    """
    ranks = {path: rank_and_alpha(config, path)[0] for path in targets.adapted}
    if not ranks:
        return
    most = max(_largest_rank(model.get_submodule(path)) for path in ranks)
    path = max(ranks, key=lambda path: ranks[path])
    if ranks[path] > most:
        raise ConfigError(
            _(
                "lora.r: {path} would have rank {rank}, and the layers of this model can have {most} at most. "
                "Use a smaller rank; 8 to 64 is usual.",
                path=path,
                rank=ranks[path],
                most=most,
            )
        )


def _largest_rank(module: nn.Module) -> int:
    """Of a change to a module that LoRA adapts, wrapped already or not; a 4-bit weight's own shape is another."""
    base = module.base_layer if isinstance(module, LoRALayer | LoRAEmbedding) else module
    shape = (base.num_embeddings, base.embedding_dim) if isinstance(base, nn.Embedding) else _shape(base)
    return min(shape)


def _refuse_rounded_biases(model: PreTrainedModel, config: LoraConfig) -> None:
    """The base's biases have no copy in float32: in half precision every step would round them."""
    half = [n for n, p in model.named_parameters() if n.endswith("bias") and p.dtype in HALF]
    if config.bias != "none" and half:
        raise ConfigError(
            _(
                "lora.bias: {bias!r} trains biases of the base model, such as {name}, but this base model is "
                "in half precision, which would round them at every step. Load it with --dtype float32.",
                bias=config.bias,
                name=half[0],
            )
        )


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
