"""The optimizers by name, behind one interface: step, learning rate, and a state that a resumed run restores.

LoRA+ (arXiv:2402.12354): B learns with a multiple of the learning rate, `loraplus_lr_ratio`, in each of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.config.training import TrainingConfig
from lorasmith.errors import ConfigError, MissingExtraError
from lorasmith.i18n import _
from lorasmith.system.bitsandbytes import bitsandbytes
from lorasmith.training.optim import FlatParameters

MATRICES = (".lora_A", ".lora_B", ".lora_embedding_")  # in the names of A and B
RATIO = "lr_ratio"  # of a parameter group: its learning rate in multiples of the optimizer's
Groups = list[dict[str, Any]]  # of parameters, as torch's optimizers take them; the first has the ratio 1


class Optimizer:
    """One or two torch optimizers that together update all parameters of a training."""

    def __init__(self, parameters: FlatParameters, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parameters, self.parts = parameters, parts
        self._skips = len(parts) == 1 and parts[0].defaults.get("fused", False)  # by itself, without waiting

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.parts[0].param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = value * group.get(RATIO, 1)

    def step(self, is_finite: Tensor) -> None:
        """Update the parameters, unless `is_finite` is false. Only fused AdamW need not wait for the device to tell."""
        if self._skips:
            # the fused kernel skips the update if found_inf is 1
            self.parts[0].found_inf = (~is_finite).float()  # type: ignore[attr-defined]
            self.parts[0].step()
        elif is_finite:
            for part in self.parts:
                part.step()
        self.parameters.changed()

    def tensors(self) -> dict[str, Tensor]:
        """Its state by name, such as 'exp_avg', or 'exp_avg.3' for the fourth parameter; without the step number."""
        return {key: state[name] for key, name, state in self._states() if name != "step"}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Restore the state after `step` steps. Changes the parameters.

        Raises KeyError for a tensor that is missing, ValueError for one of another shape or dtype.
        """
        self.parameters.zero()
        for part in self.parts:
            part.step()  # it creates the state with the right shapes; its values are then replaced
        for key, name, state in list(self._states()):
            if name == "step":
                state[name] = state[name].fill_(step) if isinstance(state[name], Tensor) else step
                continue
            own, saved = state[name], tensors[key]
            if (own.shape, own.dtype) != (saved.shape, saved.dtype):
                raise ValueError(key)
            own.copy_(saved)

    def _states(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """The key in a checkpoint, the name in the state, and the state, of all tensors and step numbers."""
        every = ((part, p) for part in self.parts for group in part.param_groups for p in group["params"])
        for i, (part, p) in enumerate(every):
            for name, value in part.state[p].items():
                if isinstance(value, Tensor) or name == "step":
                    yield f"{name}.{i}" if i else name, name, part.state[p]


class Lion(torch.optim.Optimizer):
    """Lion (arXiv:2302.06675, algorithm 2): the sign of an average of the gradients, with decoupled weight decay."""

    def __init__(self, params: Groups, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient. There is no `closure`."""
        assert closure is None
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                average = self.state[p]["exp_avg"]
                sign = torch.lerp(p.grad, average, beta1).sign_()
                p.mul_(1 - lr * group["weight_decay"]).add_(sign, alpha=-lr)
                average.lerp_(p.grad, 1 - beta2)


def in_groups(parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> dict[str, nn.Parameter]:
    """The parameters in the order in which those with the same learning rate are adjacent in one flat buffer."""
    return dict(sorted(parameters.items(), key=lambda item: _is_raised(item[0], item[1], config)))


def _is_raised(name: str, p: Tensor, config: TrainingConfig) -> bool:
    """Whether LoRA+ raises this learning rate: that of B and, as in PEFT, of vectors.

    Not that of an embedding's B, which starts at random values as A does elsewhere.
    """
    return config.loraplus_lr_ratio != 1 and (".lora_B." in name or p.dim() == 1)


def make_optimizer(parameters: FlatParameters, config: TrainingConfig) -> Optimizer:
    """The optimizer that training.optimizer names. Raises ConfigError if it cannot update these parameters."""
    return Optimizer(parameters, _MAKERS[config.optimizer](parameters, config))


def _flat_groups(parameters: FlatParameters, config: TrainingConfig) -> Groups:
    """The flat buffer, with LoRA+ in two parts."""
    raised = [_is_raised(name, p, config) for name, p in zip(parameters.names, parameters.tensors, strict=True)]
    if not any(raised):
        return [{"params": [parameters.values]}]
    runs = groupby(zip(raised, parameters.tensors, strict=True), key=lambda pair: pair[0])
    sizes = {is_raised: sum(p.numel() for _raised, p in run) for is_raised, run in runs}
    assert list(sizes) == sorted(sizes), "see in_groups"
    parts = parameters.parts(list(sizes.values()))
    return [
        {"params": [part], RATIO: config.loraplus_lr_ratio if is_raised else 1.0}
        for is_raised, part in zip(sizes, parts, strict=True)
    ]


def _groups(pairs: Iterable[tuple[str, nn.Parameter]], config: TrainingConfig) -> Groups:
    """The parameters one by one, with LoRA+ in two groups."""
    groups: Groups = [{"params": []}, {"params": [], RATIO: config.loraplus_lr_ratio}]
    for name, p in pairs:
        groups[_is_raised(name, p, config)]["params"].append(p)
    return [group for group in groups if group["params"]]


def _adamw(parameters: FlatParameters, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Fused AdamW (arXiv:1711.05101) over the flat buffer, with moments in the parameters' dtype."""
    return [_adamw_of(_flat_groups(parameters, config), config)]


def _adamw_of(groups: Groups, config: TrainingConfig) -> torch.optim.AdamW:
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(
        groups, lr=config.peak_learning_rate, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def require_optimizer(name: str) -> None:
    """Raise MissingExtraError if the optimizer needs a package that is not installed."""
    if name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            _(
                "training.optimizer: adamw8bit requires the bitsandbytes package, which is not installed. Install it "
                "with pip install 'lorasmith[quant]', or use adamw: for LoRA the moments are small."
            )
        )


def _adamw8bit(parameters: FlatParameters, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """AdamW with moments in 8 bits (arXiv:2110.02861), in blocks of the flat buffer."""
    if parameters.values.dtype != torch.float32:
        kind = str(parameters.values.dtype).removeprefix("torch.")
        raise ConfigError(
            _("training.optimizer: adamw8bit does not support parameters in {kind}. Use adamw.", kind=kind)
        )
    optim: Any = bitsandbytes().optim
    betas = (config.beta1, config.beta2)
    return [
        optim.AdamW8bit(
            _flat_groups(parameters, config),
            config.peak_learning_rate,
            betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    ]


def _lion(parameters: FlatParameters, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    betas = (config.beta1, config.beta2)
    return [Lion(_flat_groups(parameters, config), config.peak_learning_rate, betas, config.weight_decay)]


def _adafactor(parameters: FlatParameters, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Adafactor (arXiv:1804.04235) as Trainer uses it: with the learning rate of the schedule, without scaling."""
    from transformers.optimization import Adafactor

    options = {"scale_parameter": False, "relative_step": False, "weight_decay": config.weight_decay}
    groups = _groups(zip(parameters.names, parameters.pieces, strict=True), config)
    return [Adafactor(groups, lr=config.peak_learning_rate, **options)]


def _muon(parameters: FlatParameters, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for A and B, with updates as large as those of AdamW (arXiv:2502.16982); AdamW for all other parameters."""
    pairs = list(zip(parameters.names, parameters.pieces, strict=True))
    matrices = _groups((pair for pair in pairs if any(part in pair[0] for part in MATRICES)), config)
    others = _groups((pair for pair in pairs if not any(part in pair[0] for part in MATRICES)), config)
    muon = torch.optim.Muon(
        matrices, lr=config.peak_learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, _adamw_of(others, config)] if others else [muon]


_MAKERS = {"adamw": _adamw, "adamw8bit": _adamw8bit, "lion": _lion, "adafactor": _adafactor, "muon": _muon}
