"""The experts of an adapter folder, one by one, as they are combined, and as PEFT stores them: in one A and B for all.

PEFT wraps a module once for each of its adapted parameters, and names A and B after the depth of the wrapper. So which
parameter a pair belongs to follows from the names in target_parameters and from their order in the module.

    lora_A [E*R, I] holds expert after expert; lora_B [O, R*E] has the expert as its fastest index
    E = experts, I = in_features, O = out_features, R = rank
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError
from lorasmith.i18n import _, listed
from lorasmith.lora.combine import Factors, padded
from lorasmith.lora.expressions import ends_with
from lorasmith.lora.parameters import peft_prefixes
from lorasmith.lora.ranks import rank_and_alpha

# the parameters of experts in the order in which the modules of transformers have them
_ORDER = (
    "w1", "v1", "w2", "gate_proj", "gate_up_proj", "gate_up_proj_bias", "up_proj", "down_proj", "down_proj_bias",
)  # fmt: skip
_EXPERT = re.compile(r"(?P<path>.+)\[(?P<expert>\d+)\]")
_WRAPPED = ".base_layer"


@dataclass(frozen=True)
class Place:
    """Where the A and B of a parameter are: `path` with its wrappers, as in the keys of a file, and its module."""

    path: str
    module: str
    name: str

    @property
    def parameter(self) -> str:
        """The path of the parameter."""
        return f"{self.module}.{self.name}"


def places(config: LoraConfig, paths: Collection[str]) -> list[Place]:
    """Where the parameters of `config.target_parameters` are among `paths`, those of all pairs of A and B in a file.

    Raises AdapterError if that cannot be told.
    """
    patterns = {name: tuple(name.rpartition(".")[::2]) for name in config.target_parameters or ()}
    if bare := [name for name, (module, _name) in patterns.items() if not module]:
        raise AdapterError(
            _(
                "target_parameters has {name} without its module, so the folder alone does not tell which tensors "
                "belong to it. Put the module before it in adapter_config.json, such as experts.{name}.",
                name=bare[0],
            )
        )
    found, used = list[Place](), set[str]()
    for module in dict.fromkeys(map(_unwrapped, paths)):
        here = {name: pattern for pattern, (end, name) in patterns.items() if ends_with(module, end)}
        used |= {pattern for pattern, (end, _name) in patterns.items() if ends_with(module, end)}
        for name, prefix in peft_prefixes(_in_order(module, list(here))).items():
            found.append(Place(f"{module}.{prefix}".rstrip("."), module, name))
    if missing := [place.parameter for place in found if place.path not in paths] + [*(patterns.keys() - used)]:
        raise AdapterError(
            _(
                "target_parameters has {names}, but the file has no A and B for it, so the file is incomplete or "
                "belongs to another adapter.",
                names=listed(sorted(missing)),
            )
        )
    return found


def _unwrapped(path: str) -> str:
    while path.endswith(_WRAPPED):
        path = path.removesuffix(_WRAPPED)
    return path


def _in_order(module: str, names: Sequence[str]) -> list[str]:
    """The names as the module has them. Raises AdapterError if that cannot be told without the model."""
    if len(names) > 1 and not set(names) <= set(_ORDER):
        raise AdapterError(
            _(
                "{module}: the order of its parameters {names}, by which their tensors are named, is known only with "
                "the base model. Merge the adapter into it with lorasmith merge and train the other adapters on the "
                "result.",
                module=module,
                names=listed(sorted(names)),
            )
        )
    return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else 0)


def expert_factors(config: LoraConfig, place: Place, A: Tensor, B: Tensor) -> dict[str, Factors]:
    """A and B of each expert by its path, `PARAMETER[e]`; of a weight [O, I], which is a linear layer, by the layer's.

    Empty if the shapes do not fit the rank that `config` gives.
    """
    r, alpha = rank_and_alpha(config, place.parameter)
    E, scaling = len(A) // r, config.scaling(r, alpha)
    if A.dim() != 2 or B.dim() != 2 or not len(A) == B.shape[1] == E * r > 0:
        return {}
    if E == 1 and place.name == "weight":
        return {place.module: Factors(A, B, scaling)}
    A_ERI, B_OER = A.view(E, r, -1), B.view(len(B), r, E).transpose(1, 2)
    return {f"{place.parameter}[{e}]": Factors(A_ERI[e], B_OER[:, e], scaling) for e in range(E)}


def is_expert(path: str) -> bool:
    """Whether the path is that of an expert, as `expert_factors` names them."""
    return _EXPERT.fullmatch(path) is not None


def parameters_of(paths: Iterable[str]) -> dict[str, int]:
    """The paths of the parameters whose experts are among `paths`, and the number of experts of each."""
    found: dict[str, int] = {}
    for path in paths:
        if match := _EXPERT.fullmatch(path):
            found[match["path"]] = max(found.get(match["path"], 0), int(match["expert"]) + 1)
    return found


def other_counts(adapters: Iterable[Iterable[str]]) -> list[str]:
    """A message for each parameter that does not have the same number of experts in all adapters, given their paths."""
    counts = dict[str, set[int]]()
    for paths in adapters:
        for path, count in parameters_of(paths).items():
            counts.setdefault(path, set()).add(count)
    return [
        _(
            "{path}: the adapters belong to different base models: the parameter has {counts} experts.",
            path=path,
            counts=listed(map(str, sorted(found))),
        )
        for path, found in counts.items()
        if len(found) > 1
    ]


def stacked(experts: Mapping[str, Factors], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_A and lora_B of all experts of each parameter, with this rank, by the path that PEFT's keys have for it."""
    counts, modules = parameters_of(experts), dict[str, list[str]]()
    for path in counts:
        module, _dot, name = path.rpartition(".")
        modules.setdefault(module, []).append(name)
    found = {}
    for module, names in modules.items():
        for name, prefix in peft_prefixes(_in_order(module, names)).items():
            path = f"{module}.{name}"
            each = [padded(experts[f"{path}[{e}]"], rank) for e in range(counts[path])]
            B_ORE = torch.stack([factors.B_OR for factors in each], dim=2)
            found[f"{module}.{prefix}".rstrip(".")] = torch.cat([f.A_RI for f in each]), B_ORE.flatten(1)
    return found
