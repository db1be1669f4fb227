"""Adding adapters to a model and removing them: wraps the modules that a LoraConfig selects and freezes the rest."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.i18n import _
from lorasmith.lora.biases import bias_conflict, refuse_rounded_biases, trained_biases
from lorasmith.lora.init import initialize, initialize_parameters
from lorasmith.lora.layer import LoRAEmbedding, LoRALayer, SavedModule
from lorasmith.lora.parameters import LoRAParameters, peft_prefixes
from lorasmith.lora.quantized import count_parameters, keep_layout, weight_device
from lorasmith.lora.ranks import features, rank_and_alpha, rank_of_parameter, refuse_ranks
from lorasmith.lora.router import Router
from lorasmith.lora.target import Targets, find_targets
from lorasmith.lora.token_rows import ROWS, TokenIds, rows_to_train, tied_path
from lorasmith.lora.variant import variant_of, variant_problems

Wrapper = LoRALayer | LoRAEmbedding | LoRAParameters | SavedModule
_Whole = TypeVar("_Whole", LoRAParameters, SavedModule)
PEFT_PREFIX = "base_model.model."  # prefix of every key in PEFT's files


@dataclass(frozen=True)
class Adapter:
    """An adapter in a model. `parameters` holds its tensors by the keys of PEFT's files, `trained` those of training.

    `own_biases`: the values that the base model's biases among them had before this adapter.
    `tokens`: the ids of the tokens whose rows it trains, by the path of the embedding or head.
    `is_whole_model`: it is no adapter, but all weights of the base model, which are trained themselves.
    """

    name: str
    config: LoraConfig
    targets: Targets
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    own_biases: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    is_whole_model: bool = False

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters without the frozen ones, such as B of MiCA."""
        return {key: p for key, p in self.parameters.items() if p.requires_grad}


class ParameterCounts(NamedTuple):
    """Numbers of parameters; tied parameters count once. Formatted like PEFT's print_trainable_parameters."""

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
    seed: int | None = 0,
    strict: bool = True,
    tokens: TokenIds | Sequence[int] = (),
    start: bool = True,
    any_rank: bool = False,
) -> Adapter:
    """Add a new adapter to `model`, make it the active one and freeze all other parameters.

    The logits do not change: B A starts at zero, and fully trained modules start as copies. strict: see `find_targets`.
    seed: None draws A from torch's global generator, in the order in which target_modules names full paths; PEFT draws
    the same numbers. tokens: ids of tokens whose rows are trained; see `rows_to_train`. start: initialize A and B;
    otherwise `restore_values` must give them their values. any_rank: only warn of a rank that exceeds every layer's.

    Raises:
        ConfigError: a pattern matches no module, or one that LoRA or the variant does not support; or biases in half
            precision would be trained.
        AdapterError: the name is in use, or the adapter conflicts with another one. The model is then unchanged.
    """
    plain = _Unwrapped(model)
    if name in plain.adapters or "." in name:
        raise AdapterError(
            _("the adapter name {name!r} is already in use or contains a dot. Choose another name.", name=name)
        )
    if plain.adapters and (config.bias != "none" or plain.has_trained_bias):
        raise bias_conflict(name, config.bias)
    refuse_rounded_biases(model, config)
    with plain:
        targets = find_targets(model, config, strict)
        problems = variant_problems(config, {path: model.get_submodule(path) for path in targets.adapted})
        given = rows_to_train(model, targets, tokens)
        if given and config.alora_invocation_tokens is not None:
            problems.append(_no_rows_of_tokens())
        places = {path: (list(ids), tied_path(model, path)) for path, ids in given.items()}
    if problems:
        raise ConfigError(*problems)
    plain.refuse_clashes(targets, places)
    layers = {path: _base_of(model.get_submodule(path)) for path in targets.adapted}
    refuse_ranks(layers, {path: stack_at(model, path) for path in targets.parameters}, config, targets, any_rank)
    if not plain.adapters:
        model.requires_grad_(False)
    parameters = _add_layers(model, config, targets, router, name, seed, start)
    parameters |= _add_rows(model, places, router, name)
    biases = {PEFT_PREFIX + n: p for n, p in trained_biases(model, config, parameters).items()}
    router.active = name
    if config.alora_invocation_tokens is not None:
        router.partial.add(name)
    own_biases = {key: p.detach().clone() for key, p in biases.items()}
    own_tokens = {path: ids for path, (ids, _tied) in places.items()}
    return Adapter(name, config, targets, parameters | biases, own_biases, own_tokens)


def _add_layers(
    model: PreTrainedModel,
    config: LoraConfig,
    targets: Targets,
    router: Router,
    name: str,
    seed: int | None,
    start: bool,
) -> dict[str, nn.Parameter]:
    """Add A and B to the adapted layers, and copies of the modules that are trained in full; their parameters."""
    parameters: dict[str, nn.Parameter] = {}
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for path in targets.adapted:
        layer = _wrap(model, path, router)
        _add_adapter(layer, path, name, config)
        if start:
            initialize(layer, name, config, generator)
        parameters |= {_key(path, part): p for part, p in _own_parameters(layer, name).items()}
    for path, names in targets.by_module.items():
        stack = _wrap_in(LoRAParameters, model, path, router)
        ranks = {own: rank_of_parameter(config, targets, f"{path}.{own}") for own in names}
        stack.add(name, {own: (r, config.scaling(r, alpha)) for own, (r, alpha) in ranks.items()})
        if start:
            initialize_parameters(stack, name, config, generator)
        parameters |= {_key(path, part): p for part, p in stack.own_parameters(name).items()}
    for path in (path for paths in targets.saved.values() for path in paths):
        saved = _wrap_in(SavedModule, model, path, router)
        parameters |= {_key(path, part): p for part, p in saved.add(name).named_parameters()}
    return parameters


def _add_rows(
    model: PreTrainedModel, places: dict[str, tuple[list[int], str | None]], router: Router, name: str
) -> dict[str, nn.Parameter]:
    """Add the rows of single tokens. places: the ids of each embedding or head, and the one that it is tied to."""
    parameters: dict[str, nn.Parameter] = {}
    for path, (ids, tied) in places.items():
        rows = _wrap_in(SavedModule, model, path, router).add_rows(name, ids)
        parameters[_key(path, ROWS)] = rows.rows_NH
        if tied is not None and tied not in places:
            _wrap_in(SavedModule, model, tied, router).share_rows(name, rows)
    return parameters


def _no_rows_of_tokens() -> str:
    return _(
        "lora.alora_invocation_tokens: an aLoRA cannot train the rows of single tokens, which come before the "
        "invocation sequence too. Leave them out."
    )


def remove(model: PreTrainedModel, name: str) -> None:
    """Remove the adapter from every layer. Wrappers without any adapters left are replaced by the original modules."""
    for path, wrapper in _wrappers(model).items():
        wrapper.router.partial.discard(name)
        remove_at(model, path, wrapper, name)


def leave_out(model: PreTrainedModel, adapter: Adapter, paths: Collection[str]) -> Adapter:
    """Remove a new adapter's LoRA from the modules and parameters at `paths`. Returns what is left of the adapter."""
    name, targets = adapter.name, adapter.targets
    stacks = {
        path: own for path, own in targets.by_module.items() if not {f"{path}.{n}" for n in own}.isdisjoint(paths)
    }
    wrappers = {path: wrapper for path, wrapper in _wrappers(model).items() if path in paths or path in stacks}
    left_out = {id(p) for w in wrappers.values() if not isinstance(w, SavedModule)
                for p in _own_parameters(w, name).values()}  # fmt: skip
    again: dict[str, nn.Parameter] = {}  # PEFT's keys depend on how many parameters of a module are adapted
    for path, wrapper in wrappers.items():
        if isinstance(wrapper, LoRAParameters) and wrapper.keep(
            name, [n for n in stacks[path] if f"{path}.{n}" not in paths]
        ):
            again |= {_key(path, part): p for part, p in _own_parameters(wrapper, name).items()}
        else:
            remove_at(model, path, wrapper, name)
    for key in adapter.own_biases:
        adapter.parameters[key].requires_grad_(False)
    kept = {
        k: p for k, p in adapter.parameters.items() if id(p) not in left_out and k not in adapter.own_biases
    } | again
    biases = {PEFT_PREFIX + n: p for n, p in trained_biases(model, adapter.config, kept).items()}
    matched = {pattern: [p for p in own if p not in paths] for pattern, own in targets.matched.items()}
    parameters = {path: pattern for path, pattern in targets.parameters.items() if path not in paths}
    own_biases = {key: p.detach().clone() for key, p in biases.items()}
    left = replace(targets, matched=matched, parameters=parameters)
    return replace(adapter, targets=left, parameters=kept | biases, own_biases=own_biases)


def remove_at(model: nn.Module, path: str, wrapper: Wrapper, name: str) -> None:
    """Remove the adapter from the wrapper at `path`, and the wrapper if it has no other adapters."""
    if name in adapters_of(wrapper):
        wrapper.remove(name)
    if not adapters_of(wrapper):
        _replace(model, path, _original(wrapper))
        if isinstance(wrapper, LoRALayer):
            wrapper.fused_linears.remove(wrapper)


def parameter_keys(targets: Targets) -> dict[str, str]:
    """The paths of the parameters that are adapted directly, by the PEFT keys of their A and B."""
    return {
        _key(module, f"{prefix}{matrix}.weight"): f"{module}.{name}"
        for module, names in targets.by_module.items()
        for name, prefix in peft_prefixes(names).items()
        for matrix in ("lora_A", "lora_B")
    }


def count(model: PreTrainedModel, adapter: Adapter) -> ParameterCounts:
    """The number of parameters that the adapter trains, and of all parameters of the model."""
    return ParameterCounts(sum(p.numel() for p in adapter.trained.values()), count_parameters(model))


class _Unwrapped:
    """Context manager that temporarily puts the original modules in place of the wrappers; see `unwrapped`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.wrappers = model, _wrappers(model)
        self.adapters = adapter_names(model)
        own = (
            p
            for n, p in model.named_parameters()
            if n.endswith("bias") and not (".modules_to_save." in n or ".lora_" in n)
        )
        self.has_trained_bias = any(p.requires_grad for p in own)

    def __enter__(self) -> None:
        for path, wrapper in self.wrappers.items():
            _replace(self.model, path, _original(wrapper))

    def __exit__(self, *exc: object) -> None:
        for path, wrapper in self.wrappers.items():
            _replace(self.model, path, wrapper)

    def refuse_clashes(self, targets: Targets, rows: Collection[str]) -> None:
        """Raise AdapterError if a module would be fully trained by one adapter and have LoRA from another.

        rows: the paths of modules of which some rows are trained, for which the same holds.
        """
        saved = [*(path for paths in targets.saved.values() for path in paths), *rows]
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


def unwrapped(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Remove the model's wrappers inside the block, so that modules have the paths of the base model."""
    return _Unwrapped(model)


def module_paths(model: PreTrainedModel) -> list[str]:
    """The paths of all modules of the base model, whether it has adapters or not."""
    with unwrapped(model):
        return [path for path, _module in model.named_modules()]


def _is_inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".")


def _wrappers(model: nn.Module) -> dict[str, Wrapper]:
    return {p: m for p, m in model.named_modules() if isinstance(m, Wrapper)}


def adapter_names(model: nn.Module) -> set[str]:
    """The names of all adapters in the model."""
    return {name for wrapper in _wrappers(model).values() for name in adapters_of(wrapper)}


def adapters_of(wrapper: Wrapper) -> list[str]:
    """The names of the adapters on a wrapper."""
    if isinstance(wrapper, SavedModule):
        return list(wrapper.modules_to_save)
    return list(wrapper.scaling if isinstance(wrapper, LoRAEmbedding) else wrapper.updates)


def _original(wrapper: Wrapper) -> nn.Module:
    return wrapper.original_module if isinstance(wrapper, SavedModule) else wrapper.base_layer


def _base_of(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, LoRALayer | LoRAEmbedding | LoRAParameters) else module


def stack_at(model: nn.Module, path: str) -> nn.Parameter:
    """The base model's parameter at `path`, whose module may be wrapped."""
    module, _dot, name = path.rpartition(".")
    return _base_of(model.get_submodule(module)).get_parameter(name)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _dot, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _wrap(model: nn.Module, path: str, router: Router) -> LoRALayer | LoRAEmbedding:
    module = model.get_submodule(path)
    if isinstance(module, LoRALayer | LoRAEmbedding):
        return module
    layer: LoRALayer | LoRAEmbedding
    if isinstance(module, nn.Embedding):
        layer = LoRAEmbedding(module, router)
    else:
        keep_layout(module)
        layer = LoRALayer(module, *features(module), router)
    _replace(model, path, layer)
    return layer


def _wrap_in(kind: type[_Whole], model: nn.Module, path: str, router: Router) -> _Whole:
    """The wrapper of this kind at `path`, which is put there if it is missing."""
    module = model.get_submodule(path)
    if not isinstance(module, kind):
        module = kind(module, router).train(module.training)
        _replace(model, path, module)
    return module


def _add_adapter(layer: LoRALayer | LoRAEmbedding, path: str, name: str, config: LoraConfig) -> None:
    r, alpha = rank_and_alpha(config, path)
    device = weight_device(layer.base_layer)
    if isinstance(layer, LoRAEmbedding):
        layer.add(name, r, config.scaling(r, alpha), device)
        B = layer.lora_embedding_B[name]
    else:
        layer.add(name, r, config.scaling(r, alpha), config.lora_dropout, device, variant_of(config))
        _A, B = layer.updates[name].own_matrices
    B.requires_grad_(config.init_lora_weights != "mica")  # MiCA trains A alone
    layer.train(layer.base_layer.training)


def _own_parameters(layer: LoRALayer | LoRAEmbedding | LoRAParameters, name: str) -> dict[str, nn.Parameter]:
    if isinstance(layer, LoRAParameters):
        return layer.own_parameters(name)
    if isinstance(layer, LoRAEmbedding):
        return {"lora_embedding_A": layer.lora_embedding_A[name], "lora_embedding_B": layer.lora_embedding_B[name]}
    return layer.updates[name].parameters


def _key(path: str, part: str) -> str:
    return f"{PEFT_PREFIX}{path}.{part}"
