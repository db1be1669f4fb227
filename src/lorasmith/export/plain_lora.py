"""An adapter as A and B of each linear layer, for the formats that know nothing else, and what it says.

A format that has one formula for all layers gets B multiplied by what its formula lacks (rsLoRA, ranks and alphas of
single layers), so that the product stays the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lorasmith.adapters.certificate import identity_of
from lorasmith.adapters.folder import AdapterFolder, find_adapter
from lorasmith.adapters.merge import (
    Certificate,
    adapter_logits,
    certify,
    load_plain,
    plain_logits,
    probe_rows,
)
from lorasmith.adapters.session import Session, open_adapters
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.encoding import Template
from lorasmith.errors import AdapterError
from lorasmith.i18n import _, listed
from lorasmith.loading.folder import read_config
from lorasmith.lora.adapted import layers_of
from lorasmith.lora.combine import Factors
from lorasmith.lora.layer import LoRALayer
from lorasmith.model.vocabulary import embedding_rows
from lorasmith.report import Report


@dataclass(frozen=True)
class PlainLora:
    """An adapter whose whole effect is s B A beside linear layers.

    factors: in float32, by the path of the layer. probes, logits: token ids, and what the trained model makes of them.
    embedding_rows: of the base model. identity: of base model and adapter, for the certificate.
    """

    folder: AdapterFolder
    base: Path
    config: PretrainedConfig
    factors: Mapping[str, Factors]
    template: Template
    embedding_rows: int
    probes: Sequence[list[int]]
    logits: Sequence[Tensor]
    identity: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path, model: ModelConfig, report: Report, program: str, instead: str) -> Self:
        """Read a run or adapter folder. program: the reader of the format; instead: what else to export, if not.

        Raises AdapterError if the adapter is more than A and B of linear layers, with what that is.
        """
        wide = ModelConfig(**model.model_dump(exclude_unset=True) | {"dtype": "float32"})
        folder = AdapterFolder.read(find_adapter(Path(path).expanduser()))
        session = open_adapters([folder.path], wide, report)
        config = read_config(session.base.folder, model.trust_remote_code)
        if surplus := _more_than_lora(session):
            raise AdapterError(
                _(
                    "{folder}: {program} reads only A and B of linear layers, but this adapter has also trained "
                    "{what}. Export the merged model instead: {instead}",
                    folder=folder.path,
                    program=program,
                    what=listed(surplus),
                    instead=instead,
                )
            )
        name, probes = session.names[0], probe_rows(session)
        return cls(
            folder, session.base.folder, config,
            {path: _factors(layer, name) for path, layer in layers_of(session.base.model, name)},
            session.template, embedding_rows(session.base), probes, adapter_logits(session, probes),
            identity_of(session),
        )  # fmt: skip

    def require_same(self, target: Path, read: Mapping[str, Factors]) -> float:
        """The relative error of the logits of the base model with the matrices that were read back.

        Raises AdapterError if these are not the logits of the trained model.
        """
        plain = load_plain(self.base, None, torch.float32, False)
        add_to(plain, read)
        return require_same_logits(target, self.logits, plain_logits(plain, self.probes)).error


def require_same_logits(target: Path, wanted: Sequence[Tensor], found: Sequence[Tensor]) -> Certificate:
    """How far the logits of the base model with an exported adapter are off; float32 of shape [L, V] per probe.

    target: what the file or folder is or will be called. Raises AdapterError if they are not the trained model's.
    """
    result = certify(str(target), torch.float32, wanted, [wanted], found, False)
    if not result.holds:
        raise AdapterError(
            _(
                "{file} is not the trained model: with the base model, its logits differ by {error:.1e}, where "
                "{limit:.1e} is allowed.",
                file=target,
                error=result.error,
                limit=result.limit,
            )
        )
    return result


@torch.no_grad()
def add_to(model: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Add s B A to the weight of each layer, in float64. A Conv1D has its weight transposed."""
    for path, own in factors.items():
        layer = model.get_submodule(path)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        delta = own.B_OR.double() @ own.A_RI.double() * own.scaling
        weight.copy_(weight.double() + (delta if isinstance(layer, nn.Linear) else delta.t()))


def folded(factors: Mapping[str, Factors], formula: Callable[[Factors], float]) -> dict[str, Factors]:
    """The same products with the scaling that a format's formula gives, and B multiplied by what it lacks."""
    return {
        path: Factors(own.A_RI, own.B_OR * (own.scaling / formula(own)), formula(own)) for path, own in factors.items()
    }


def _factors(layer: LoRALayer, adapter: str) -> Factors:
    update = layer.updates[adapter]
    a_RI, b_OR = (matrix.detach().float() for matrix in update.own_matrices)
    return Factors(a_RI, b_OR, update.scaling)


def _more_than_lora(session: Session) -> list[str]:
    """What the adapter has trained besides A and B of linear layers, in words."""
    adapter = session.base.adapters[session.names[0]]
    found = [path for paths in adapter.targets.saved.values() for path in paths]
    found += [_("rows of {path}", path=path) for path in adapter.tokens]
    if adapter.config.bias != "none":
        found.append(_("biases"))
    for path, layer in layers_of(session.base.model, adapter.name):
        if not isinstance(layer, LoRALayer):
            found.append(path)
        elif not layer.updates[adapter.name].is_low_rank:
            kind = type(layer.updates[adapter.name]).__name__
            found.append(_("more than B A of {path} ({kind})", path=path, kind=kind))
    return found[:4]
