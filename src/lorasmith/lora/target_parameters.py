"""Selecting the parameters that a LoraConfig adapts directly: those named in target_parameters, or all experts.

all-linear includes the weights of experts, which are no linear layers: mixture-of-experts models have them in one
tensor of three dimensions for each projection, and most of their parameters there.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lorasmith.config.lora import LoraConfig
from lorasmith.i18n import _, listed
from lorasmith.lora.variant import flags_of

# keys of transformers' configs for the number of experts that compute each token
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds experts. transformers has no common base class for them, but a common word."""
    return "Expert" in type(module).__name__


def expert_parameters(module: nn.Module) -> list[str]:
    """Names of the module's own stacks of expert weights, [E, O, I] or [E, I, O]."""
    own = module.named_parameters(recurse=False) if is_experts(module) else ()
    return [name for name, p in own if p.dim() == 3 and p.is_floating_point()]


def has_experts(model: nn.Module) -> bool:
    """Whether the model has experts in one tensor. Its modules may be wrapped."""
    return any(expert_parameters(module) for module in model.modules())


def all_parameters(modules: dict[str, nn.Module]) -> Iterator[str]:
    """The paths of all parameters, in the order in which PEFT adapts them: that of the modules, and of each's own."""
    for path, module in modules.items():
        yield from (f"{path}.{name}" for name, _p in module.named_parameters(recurse=False) if path)


def all_experts(modules: dict[str, nn.Module]) -> list[str]:
    """The paths of all stacks of expert weights."""
    return [f"{path}.{name}" for path, module in modules.items() for name in expert_parameters(module)]


def expert_rank(model: PreTrainedModel, r: int) -> int:
    """The rank of each expert if other layers have rank r: r divided by the number of experts active per token.

    So an adapter has the same share of the weights that compute a token in experts as elsewhere (Schulman and Thinking
    Machines Lab, LoRA Without Regret, 2025). All parameters of a stack that is unknown to the config get r itself.
    """
    return max(1, r // active_experts(model.config)) if hasattr(model, "config") else r


def active_experts(config: PretrainedConfig) -> int:
    """The number of experts that compute each token; 1 if the config does not say."""
    text = config.get_text_config()
    values = (getattr(part, key, None) for part in (text, getattr(text, "ffn_config", None)) for key in _ACTIVE)
    counts = (max(value) if isinstance(value, list | tuple) and value else value for value in values)
    return next((value for value in counts if isinstance(value, int) and value > 0), 1)


def how_to_leave_out(paths: Iterable[str]) -> str:
    """The option that leaves out the modules of the parameters at `paths`."""
    names = dict.fromkeys(path.split(".")[-2] for path in paths)
    return f"--exclude-modules {' '.join(names)}"


def unsuitable_parameter(model: PreTrainedModel, path: str, pattern: str) -> str:
    """Why LoRA cannot be added to this parameter; empty if it can."""
    parameter = model.get_parameter(path)
    if parameter.dim() not in (2, 3):
        return _(
            "lora.target_parameters: {pattern!r} matches {path}, which has the shape {shape}. LoRA supports parameters "
            "of two dimensions, and of three if the first one counts the experts.",
            pattern=pattern,
            path=path,
            shape=tuple(parameter.shape),
        )
    if not parameter.is_floating_point():
        return _(
            "lora.target_parameters: {path} is quantized, and LoRA on parameters needs unquantized weights. Load the "
            "base model unquantized, or leave it out.",
            path=path,
        )
    return ""


def refused_options(config: LoraConfig, paths: Sequence[str]) -> list[str]:
    """A message for each option that cannot be applied to parameters, as in PEFT. `paths` are adapted."""
    if not paths:
        return []
    texts, how = [], how_to_leave_out(paths)
    if config.target_parameters is not None:
        how = "--target-parameters"
    if config.lora_dropout:
        text = _(
            "lora.lora_dropout: dropout is applied to the input of A, but the update of {path} is added to its "
            "weights, so it has no such input. Set lora_dropout to 0, or leave these weights out: {how}.",
            path=paths[0],
            how=how,
        )
        texts.append(text)
    if config.init_lora_weights not in ("default", "gaussian", "random"):
        text = _(
            "lora.init_lora_weights={kind}: {path} is a parameter, not a linear layer, and this initialization "
            "supports linear layers only. Use default, or leave these weights out: {how}.",
            kind=config.init_lora_weights,
            path=paths[0],
            how=how,
        )
        texts.append(text)
    if flags := flags_of(config):
        text = _(
            "lora.{flag}: {path} is a parameter, not a linear layer, and this variant supports linear layers only. "
            "Train plain LoRA, or leave these weights out: {how}.",
            flag=flags[0],
            path=paths[0],
            how=how,
        )
        texts.append(text)
    return texts


def no_such_parameter(pattern: str, modules: dict[str, nn.Module]) -> str:
    """The message for an item of target_parameters that matches nothing."""
    names = dict.fromkeys(path.rpartition(".")[2] for path in all_experts(modules))
    text = _("lora.target_parameters: {pattern!r} matches no parameter of this model.", pattern=pattern)
    if names:
        return text + " " + _("The weights of its experts are {names}.", names=listed(names))
    return text + " " + _("It has no experts; use lora.target_modules to adapt its layers.")
