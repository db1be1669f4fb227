"""The rank and scaling of each adapted module and parameter, and which ranks they can have."""

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import ConfigError
from lorasmith.i18n import _
from lorasmith.lora.expressions import value_for
from lorasmith.lora.start_values import computed_from_weight, start_problem
from lorasmith.lora.target import ALL_LINEAR, Targets


def rank_and_alpha(config: LoraConfig, path: str) -> tuple[int, float]:
    """r and lora_alpha of the module at `path`: the first match in rank_pattern and alpha_pattern, or the defaults."""
    return value_for(config.rank_pattern, path, config.r), value_for(config.alpha_pattern, path, config.lora_alpha)


def rank_of_parameter(config: LoraConfig, targets: Targets, path: str) -> tuple[int, float]:
    """r and lora_alpha of the parameter at `path`; see `Targets.expert_rank`."""
    usual = targets.expert_rank if targets.parameters[path] == ALL_LINEAR else config.r
    return value_for(config.rank_pattern, path, usual), value_for(config.alpha_pattern, path, config.lora_alpha)


def refuse_ranks(
    layers: Mapping[str, nn.Module],
    stacks: Mapping[str, Tensor],
    config: LoraConfig,
    targets: Targets,
    warn: bool = False,
) -> None:
    """Raise ConfigError, or only warn, if a rank exceeds min(O, I) of every layer, which would only waste memory.

    A rank that exceeds it in some of the layers, such as k and v of grouped-query attention, is common and allowed,
    unless A and B start from the weights. layers, stacks: the modules and the parameters to adapt, by path and
    without wrappers.
    """
    ranks = {path: rank_and_alpha(config, path)[0] for path in layers}
    if computed_from_weight(config):
        _refuse_starts(layers, config, ranks)
    if config.init_lora_weights == "orthogonal" and (odd := [r for r in ranks.values() if r % 2]):
        text = _("lora.init_lora_weights: 'orthogonal' needs an even rank, but r is {r}. Use {more}.",
                 r=odd[0], more=odd[0] + 1)  # fmt: skip
        raise ConfigError(text)
    ranks |= {path: rank_of_parameter(config, targets, path)[0] for path in stacks}
    most = max([*map(_largest_rank, layers.values()), *(min(stack.shape[-2:]) for stack in stacks.values())], default=0)
    path = max(ranks, key=lambda path: ranks[path], default="")
    if path and ranks[path] > most:
        text = _(
            "lora.r: {path} would have rank {rank}, but the layers of this model can have at most "
            "{most}. Use a smaller rank; 8 to 64 is typical.",
            path=path,
            rank=ranks[path],
            most=most,
        )
        if not warn:
            raise ConfigError(text)
        warnings.warn(text, stacklevel=2)


def _refuse_starts(layers: Mapping[str, nn.Module], config: LoraConfig, ranks: Mapping[str, int]) -> None:
    """Raise ConfigError for layers that have no such start: their weight has a smaller rank, or is quantized."""
    kind, problems = config.init_lora_weights, []
    for path, layer in layers.items():
        if problem := start_problem(layer):
            problems.append(f"lora.init_lora_weights={kind}: {path}: {problem}")
        elif ranks[path] > (most := _largest_rank(layer)):
            text = _(
                "lora.init_lora_weights={kind}: the weight of {path} has only {most} singular values, so its rank "
                "cannot be {rank}. Use a smaller rank, for this layer with lora.rank_pattern.",
                kind=kind,
                path=path,
                most=most,
                rank=ranks[path],
            )
            problems.append(text)
    if problems:
        raise ConfigError(*problems)


def _largest_rank(layer: nn.Module) -> int:
    """min(O, I). Not taken from the weight: a 4-bit weight has another shape."""
    shape = (layer.num_embeddings, layer.embedding_dim) if isinstance(layer, nn.Embedding) else features(layer)
    return min(shape)


def features(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer; Conv1D stores its weight as [in, out]."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.weight.shape[0], layer.weight.shape[1]  # type: ignore[index, return-value]
