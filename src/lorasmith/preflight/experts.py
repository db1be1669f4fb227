"""What a training does with the experts of a mixture-of-experts model: trained by all-linear, or left out, and why."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from lorasmith.i18n import _, listed
from lorasmith.lora.inject import Adapter, parameter_keys
from lorasmith.lora.quantized import count_parameters
from lorasmith.lora.ranks import rank_of_parameter
from lorasmith.lora.target import ALL_LINEAR
from lorasmith.lora.target_parameters import how_to_leave_out, is_experts
from lorasmith.model.base import Base

_OF_ADAPTER = {"lora_A", "lora_B", "lora_updates", "modules_to_save", "original_module"}
NOTABLE = 0.1  # share of the parameters from which it is worth a warning that they get no adapter


@dataclass(frozen=True)
class Experts:
    """The experts of a model.

    trained: the names of the weights that are adapted directly, with the rank of each; parameters: how many of the
    adapter's are for them.
    left_out: the share of the model's parameters in the weights of experts without an adapter, by the module's name.
    routers: the names of modules that choose the experts and have no adapter.
    """

    trained: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    left_out: dict[str, float] = field(default_factory=dict)
    routers: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[tuple[str, str]]:
        """What to show of the experts, with labels; nothing if the model has none."""
        if self.trained:
            each = listed(_("{name} with rank {rank}", name=name, rank=r) for name, r in self.trained.items())
            yield (
                _("weights"),
                _(
                    "{weights}: {count:,} of the trainable parameters ({option} leaves them out)",
                    weights=each,
                    count=self.parameters,
                    option=how_to_leave_out(self.trained),
                ),
            )
        for name, share in self.left_out.items():
            yield _("experts"), _("no adapter on {name}: {share:.0%} of all parameters", name=name, share=share)
        if self.routers:
            yield (
                _("routers"),
                _("no adapter on {names}: the choice of experts is not trained", names=listed(self.routers)),
            )


def experts_of(base: Base, adapter: Adapter) -> Experts:
    """The experts of `base`, and what `adapter` trains of them; none if all weights are trained."""
    if adapter.is_whole_model:
        return Experts()
    model, targets, keys = base.model, adapter.targets, parameter_keys(adapter.targets)
    own = {
        path.removesuffix(".base_layer"): module
        for path, module in model.named_modules()
        if not _OF_ADAPTER & set(path.split("."))
    }
    total = count_parameters(model) - sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes, counts = Counter[str](), set[int]()
    for path, module in own.items():
        stacks = _weights(module) if is_experts(module) else {}
        counts |= {len(stack) for stack in stacks.values()}
        left = (stack for name, stack in stacks.items() if f"{path}.{name}" not in targets.parameters)
        sizes[path.rpartition(".")[2]] += sum(stack.numel() for stack in left)
    taken = {*targets.adapted, *targets.by_module}
    chooses = {path: weight for path, m in own.items() if (weight := _weights(m).get("weight")) is not None}
    return Experts(
        trained={
            ".".join(path.split(".")[-2:]): rank_of_parameter(adapter.config, targets, path)[0]
            for path in targets.parameters
        },
        parameters=sum(p.numel() for key, p in adapter.parameters.items() if key in keys),
        left_out={name: size / total for name, size in sizes.items() if size},
        routers=list(
            dict.fromkeys(
                path.rpartition(".")[2]
                for path, w in chooses.items()
                if w.dim() == 2 and len(w) in counts and path not in taken
            )
        ),
    )


def expert_warnings(experts: Experts, adapter: Adapter) -> Iterator[str]:
    """A warning if all-linear had to leave out experts that are a large part of the model."""
    config = adapter.config
    asked = config.exclude_modules or config.target_parameters is not None or ALL_LINEAR not in adapter.targets.matched
    for name, share in experts.left_out.items():
        if share >= NOTABLE and not asked:
            yield _(
                "lora.target_modules: {share:.0%} of the model's parameters get no adapter: those of the experts in "
                "{name}, to which LoRA cannot be added.",
                share=share,
                name=name,
            )


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters(recurse=False) if p.dim() > 1 and not name.endswith("bias")}
