"""Full fine-tuning: all weights of the base model are trained, in the same steps as an adapter is."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorasmith.config.lora import LoraConfig
from lorasmith.config.training import TrainingConfig
from lorasmith.errors import LIBRARY_ERRORS, ConfigError, ModelError, first_line
from lorasmith.i18n import _, listed
from lorasmith.lora.inject import Adapter
from lorasmith.lora.target import Targets, describe_modules
from lorasmith.model.base import Base
from lorasmith.model.target_check import check_targets
from lorasmith.model.verify import trial_loss, use_fast_parts
from lorasmith.report import Report
from lorasmith.system.memory import available_mib

GRADIENT = 4  # bytes of a weight's gradient, and of its value in float32
MOMENTS = {"adamw": 8.0, "adamw8bit": 2.1, "lion": 4.0, "adafactor": 0.1}  # bytes that the optimizer adds per weight


def whole_model(base: Base, name: str, config: TrainingConfig) -> Adapter:
    """All weights of `base`, to be trained as the adapter `name`. Tied weights are one parameter.

    Raises ConfigError if weights, gradients and the optimizer's state need more memory than there is.
    """
    _refuse_too_large(base, config.optimizer)
    base.model.requires_grad_(True)
    base.router.active = name
    return Adapter(name, LoraConfig(), Targets(), dict(base.model.named_parameters()), is_whole_model=True)


def leave_out_unreached(base: Base, name: str, ids: Sequence[int], report: Report) -> None:
    """Leave out what the loss of a trial step on these token ids does not depend on, and say what that is.

    Weight decay would shrink such weights. Experts that only happen to get no token are not among them: the weights of
    all are one tensor. Raises ModelError if the step fails, and for an adapter as `check_targets` does.
    """
    adapter, fast = base.adapters[name], base.fast_parts
    if not adapter.is_whole_model:
        check_targets(base, name, ids, report)
        return
    use_fast_parts(base, frozenset())
    try:
        with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):  # dropout uses it
            loss, _tokens = trial_loss(base, name, ids)
            found: Sequence[Tensor | None] = torch.autograd.grad(
                loss, list(adapter.parameters.values()), allow_unused=True
            )
    except LIBRARY_ERRORS as error:
        raise ModelError(
            _(
                "{base}: a training step of all weights fails in this model ({error}). Train an adapter with --method "
                "lora.",
                base=base.source,
                error=f"{type(error).__name__}: {first_line(error)}",
            )
        ) from error
    finally:
        use_fast_parts(base, fast)
    left = [key for key, gradient in zip(adapter.parameters, found, strict=True) if gradient is None]
    if not left:
        return
    for key in left:
        adapter.parameters[key].requires_grad_(False)
    kept = {key: p for key, p in adapter.parameters.items() if p.requires_grad}
    base.adapters[name] = replace(adapter, parameters=kept)
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in left))
    report.say(_("Not trained, because a text does not reach them: {modules}", modules=describe_modules(modules)))


def bytes_per_weight(dtype: torch.dtype, optimizer: str) -> float:
    """What full fine-tuning needs for each weight: its value in float32, also in the base's `dtype` if that is another,
    its gradient, and the optimizer's state.
    """
    rounded = 0 if dtype in (torch.float32, torch.float64) else dtype.itemsize
    return 2 * GRADIENT + MOMENTS[optimizer] + rounded


def _refuse_too_large(base: Base, optimizer: str) -> None:
    """Raise ConfigError, with what would fit, if the weights and what belongs to each do not fit into memory."""
    free = available_mib(base.device)
    weights = sum(p.numel() for p in base.model.parameters())
    each = bytes_per_weight(base.dtype, optimizer)
    if free is None:
        return
    room = free + sum(p.nbytes for p in base.model.parameters()) / 2**20  # what is loaded is part of the need
    if weights * each / 2**20 <= room:
        return
    others = [name for name in MOMENTS if weights * bytes_per_weight(base.dtype, name) / 2**20 <= room]
    hint = " " + _("It would fit with another --optimizer: {names}.", names=listed(others)) if others else ""
    raise ConfigError(
        _(
            "training.method: full fine-tuning of {base} needs {needed:,.0f} MiB for {weights:,} weights, their "
            "gradients and the optimizer {optimizer}, besides the activations, but {room:,.0f} MiB are available to "
            "this process. Train an adapter with --method lora, or a base model of up to {most:,.0f} million "
            "parameters.",
            base=base.source,
            needed=weights * each / 2**20,
            weights=weights,
            optimizer=optimizer,
            room=room,
            most=room * 2**20 / each / 1e6,
        )
        + hint
    )
