"""Which modules of an adapter a training would leave as they are, found by trying before it begins.

Some models take the weight of a layer and compute with it themselves: Mamba's fused kernels never call `out_proj`, so
LoRA on it would not be seen. A module that merely gets no tokens, an expert's or one for images, is none of these.
"""

from collections.abc import Sequence

import torch
from torch import nn

from lorasmith.errors import LIBRARY_ERRORS, ConfigError, ModelError, first_line
from lorasmith.i18n import _
from lorasmith.lora.inject import Adapter
from lorasmith.lora.layer import SavedModule
from lorasmith.model.base import Base
from lorasmith.model.verify import trial_loss, use


def refuse_untrained(base: Base, name: str, ids: Sequence[int]) -> None:
    """Try a step on `ids` in the mode that trainings run in.

    Raises:
        ConfigError: the model computes with the weights of some targets without calling these; all by name.
        ModelError: the model fails with this adapter on it.
    """
    fast = base.fast
    use(base, frozenset())  # what runs fast is decided later
    try:
        with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):  # dropout draws from it
            paths = _computed_with(base, name, ids, _uncalled(base, name, ids))
    finally:
        use(base, fast)
    _refuse(base, base.adapters[name], paths)


def _uncalled(base: Base, name: str, ids: Sequence[int]) -> list[str]:
    """Paths of the adapter's modules that a step does not call."""
    targets, called = base.adapters[name].targets, set[nn.Module]()
    handles = [m.register_forward_pre_hook(lambda m, _inputs: called.add(m)) for m in base.model.modules()]
    try:
        trial_loss(base, name, ids)
    except LIBRARY_ERRORS as error:
        raise ModelError(
            _(
                "{base}: a training step with LoRA on {targets} fails in this model ({error}). Choose other modules "
                "with --target-modules or --exclude-modules.",
                base=base.source,
                targets=", ".join(_last_names(targets.adapted)),
                error=f"{type(error).__name__}: {first_line(error)}",
            )
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    paths = [*targets.adapted, *(path for saved in targets.saved.values() for path in saved)]
    return [path for path in paths if base.model.get_submodule(path) not in called]


def _computed_with(base: Base, name: str, ids: Sequence[int], paths: Sequence[str]) -> list[str]:
    """Those of `paths` whose frozen weights take part in the loss: autograd says it exactly."""
    weights: dict[str, nn.Parameter] = {}
    for path in paths:
        wrapper = base.model.get_submodule(path)
        frozen = wrapper.original_module if isinstance(wrapper, SavedModule) else wrapper.base_layer
        assert isinstance(frozen, nn.Module)
        weight = next(frozen.parameters())
        weights |= {path: weight} if weight.is_floating_point() else {}
    if not weights:
        return []
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        loss, _tokens = trial_loss(base, name, ids)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    unseen: list[torch.Tensor | None] = list(gradients)  # torch's annotation says that none is None
    return [path for path, gradient in zip(weights, unseen, strict=True) if gradient is not None]


def _refuse(base: Base, adapter: Adapter, paths: Sequence[str]) -> None:
    whole = {path for saved in adapter.targets.saved.values() for path in saved}
    kind, problems = type(base.model).__name__, []
    if targets := _last_names([path for path in paths if path not in whole]):
        problems.append(
            _(
                "lora.target_modules: {kind} computes with the weight of {names} and never calls the module, so LoRA "
                "on it would change nothing. Leave it out: --exclude-modules {flags}",
                kind=kind,
                names=", ".join(targets),
                flags=" ".join(targets),
            )
        )
    if saved := _last_names([path for path in paths if path in whole]):
        problems.append(
            _(
                "lora.modules_to_save: {kind} computes with the weight of {names} and never calls the module, so a "
                "trained copy would change nothing. Leave it out.",
                kind=kind,
                names=", ".join(saved),
            )
        )
    if problems:
        raise ConfigError(*problems)


def _last_names(paths: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
