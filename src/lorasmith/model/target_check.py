"""Check before a training that the model calls the modules that its adapter targets.

Some models read the weight of a layer and compute with it themselves: Mamba's fused kernels never call `out_proj`, so
LoRA on it would have no effect. Modules that only happen to get no tokens, such as experts, are not a problem.
"""

from collections.abc import Sequence

import torch
from torch import nn

from lorasmith.errors import LIBRARY_ERRORS, ConfigError, ModelError, first_line
from lorasmith.i18n import _
from lorasmith.lora.inject import Adapter
from lorasmith.lora.layer import SavedModule
from lorasmith.model.base import Base
from lorasmith.model.verify import trial_loss, use_fast_parts


def check_targets(base: Base, name: str, ids: Sequence[int]) -> None:
    """Try a training step of adapter `name` on these token ids.

    Raises:
        ConfigError: the model computes with the weights of some targets without calling them; names all of these.
        ModelError: the step fails with this adapter.
    """
    fast = base.fast_parts
    use_fast_parts(base, frozenset())  # the fast parts are chosen later
    try:
        with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):  # dropout uses it
            paths = _computed_with(base, name, ids, _uncalled(base, name, ids))
    finally:
        use_fast_parts(base, fast)
    _refuse(base, base.adapters[name], paths)


def _uncalled(base: Base, name: str, ids: Sequence[int]) -> list[str]:
    """Paths of the adapter's modules that are not called in a step."""
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
    """Those of `paths` whose frozen weights the loss depends on, according to autograd."""
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
    unseen: list[torch.Tensor | None] = list(gradients)  # torch's annotation does not allow None
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
