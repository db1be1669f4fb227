"""What GGUF calls the parts of a model: for each family, its architecture, its keys and how its tensors are stored.

Names are those of the package gguf; keys and layouts are those that llama.cpp reads for the architecture. Where
llama.cpp has a rule in its code instead of a key, `require` refuses a model that does not follow the rule.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lorasmith.errors import ModelError
from lorasmith.i18n import _, listed
from lorasmith.loading.gguf_settings import FACTORS, GEMMA3_27B, LONG_FACTORS, SHORT_FACTORS, YARN, stretching

Value = int | float | str | bool
Change = Callable[[str, Tensor, PretrainedConfig], Tensor]
NO_POSITIONS_EVERY = 4  # SmolLM3: every fourth layer has no rotary positions
FULL_ATTENTION_EVERY = 6  # Gemma 3: every sixth layer sees all tokens
YARN_TOO = ("default", "linear", "yarn")
LLAMA3_TOO = (*YARN_TOO, "llama3")  # architectures that read the factors of Llama 3
LOCAL_ROPE_BASE = 10000.0  # Gemma 3: the rope base of the other layers


@dataclass(frozen=True)
class Family:
    """How a family is written. change: of a tensor, by its GGUF name; undo: the inverse, for reading back.

    keys: further keys, without the name of the architecture. require: what a config must have, with what it has.
    read_by_transformers: whether transformers loads this architecture from GGUF. ropes: the scalings of rotary
    positions that llama.cpp knows in it.
    """

    architecture: str
    change: Change
    undo: Change
    keys: Callable[[PretrainedConfig], dict[str, Value]] = lambda _config: {}
    require: Callable[[PretrainedConfig], dict[str, tuple[Any, Any]]] = lambda _config: {}
    read_by_transformers: bool = True
    ropes: Sequence[str] = ("default", "linear")


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model. Raises ModelError if GGUF export does not know it, or a setting that it has."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            _(
                "Models of type {kind} cannot be exported to GGUF yet; these can: {known}. Use lorasmith merge, and "
                "convert the folder with llama.cpp's convert_hf_to_gguf.py.",
                kind=config.model_type,
                known=listed(sorted(FAMILIES)),
            )
        )
    kind = rope_of(config).get("rope_type", "default")
    rope = kind if kind in family.ropes else family.ropes[0]
    needs = {"rope_type": (rope, kind)} | (_yarn(config) if rope == kind == "yarn" else {}) | family.require(config)
    for name, (wanted, found) in needs.items():
        if found != wanted:
            raise ModelError(
                _(
                    "config.json: a model of type {kind} with {name}={found} cannot be exported to GGUF yet, only "
                    "with {name}={wanted}. Use lorasmith merge, and convert the folder with llama.cpp's "
                    "convert_hf_to_gguf.py.",
                    kind=config.model_type,
                    name=name,
                    found=found,
                    wanted=wanted,
                )
            )
    return family


def keys_of(config: PretrainedConfig) -> dict[str, Value]:
    """All keys of the architecture, with their full names: what llama.cpp has to know about the model."""
    family = family_of(config)
    found = _gpt2_keys(config) if family.architecture == "gpt2" else _common_keys(config)
    return {f"{family.architecture}.{name}": value for name, value in (found | family.keys(config)).items()}


def context_length(config: PretrainedConfig) -> int:
    """How many tokens programs may give to the exported model, which is less than the model's own with `_window`."""
    return int(keys_of(config)[f"{family_of(config).architecture}.context_length"])


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """The settings of the rotary positions, of Gemma 3 those of the layers that see all tokens; empty without any."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    whole: dict[str, Any] = rope.get("full_attention", rope)
    return whole


def extra_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """Tensors of the file that are no weights of the model, in float32 by their names in GGUF."""
    rope = rope_of(config)
    if rope.get("rope_type") == "llama3":
        return {FACTORS: stretching(config, rope).float()}
    if rope.get("rope_type") == "longrope":
        return {LONG_FACTORS: torch.tensor(rope["long_factor"]), SHORT_FACTORS: torch.tensor(rope["short_factor"])}
    return {}


def names_of(config: PretrainedConfig) -> Callable[[str], str]:
    """A function from the name of a parameter to that in GGUF. It raises ModelError if there is none."""
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family_of(config).architecture)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)

    def name_of(parameter: str) -> str:
        name = table.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(
                _(
                    "{parameter}: GGUF has no name for this weight in the architecture {architecture}, so the model "
                    "cannot be exported.",
                    parameter=parameter,
                    architecture=family_of(config).architecture,
                )
            )
        return name

    return name_of


def head_size(config: PretrainedConfig) -> int:
    """Size of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _common_keys(config: PretrainedConfig) -> dict[str, Value]:
    rope = rope_of(config)
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_size(config),
        "attention.value_length": head_size(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": int(head_size(config) * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        **_scaling_keys(config, rope),
    }


def _scaling_keys(config: PretrainedConfig, rope: Mapping[str, Any]) -> dict[str, Value]:
    """How rotary positions are scaled. LongRoPE's factors are tensors.

    In a context of more than the original length, llama.cpp takes the long factors of LongRoPE for all positions, but
    transformers does only for texts that are so long: within the original length, the result is the same.
    """
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        found: dict[str, Value] = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    elif kind == "longrope":
        found = {"rope.scaling.attn_factor": _attention_factor(config)}
        found["context_length"] = min(config.max_position_embeddings, rope["original_max_position_embeddings"])
    else:
        return {}
    original = rope.get("original_max_position_embeddings")
    return found if kind == "linear" else found | {"rope.scaling.original_context_length": int(original or 0)}


def _attention_factor(config: PretrainedConfig) -> float:
    """By what transformers multiplies the sines and cosines of the rotary positions."""
    _frequencies, factor = ROPE_INIT_FUNCTIONS[rope_of(config)["rope_type"]](config, torch.device("cpu"))
    return float(factor)


def _yarn(config: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp computes by itself for YaRN (arXiv:2309.00071), and what the config says."""
    rope = rope_of(config)
    own = 0.1 * math.log(rope["factor"]) + 1 if rope.get("factor") else 1.0
    factor = _attention_factor(config)
    return {
        "attention_factor": (own if abs(own - factor) > 1e-6 * own else factor, factor),
        **{name: (value, rope.get(name) or value) for name, value in YARN.items()},
        "truncate": (True, rope.get("truncate", True)),
    }


def _gpt2_keys(config: PretrainedConfig) -> dict[str, Value]:
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _same(_name: str, tensor: Tensor, _config: PretrainedConfig) -> Tensor:
    return tensor


def _heads(name: str, config: PretrainedConfig) -> int:
    """The number of heads whose rotary halves are interleaved in this tensor; 0 for all other tensors."""
    counts = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return int(counts.get(name.split(".")[-2], 0))


def interleaved(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    """q and k with the two halves of each head interleaved: there the pairs of the rotation are neighbors."""
    heads = _heads(name, config)
    if not heads:
        return tensor
    mixed: Tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    return mixed


def in_halves(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    """The inverse of `interleaved`, by row numbers instead of by reshaping."""
    heads = _heads(name, config)
    if not heads:
        return tensor
    size = len(tensor) // heads
    own = [*range(0, size, 2), *range(1, size, 2)]
    return tensor[torch.tensor([head * size + i for head in range(heads) for i in own])]


def _plus_one(name: str, tensor: Tensor, _config: PretrainedConfig) -> Tensor:
    return tensor + 1 if name.endswith("norm.weight") else tensor


def _minus_one(name: str, tensor: Tensor, _config: PretrainedConfig) -> Tensor:
    return tensor - 1 if name.endswith("norm.weight") else tensor


def _transposed(name: str, tensor: Tensor, _config: PretrainedConfig) -> Tensor:
    return tensor.t() if name.startswith("blk.") and tensor.dim() == 2 else tensor


def _window(config: PretrainedConfig) -> dict[str, Value]:
    """llama.cpp's architecture llama has no sliding window: within the window, the result is the same."""
    window = getattr(config, "sliding_window", None)
    return {"context_length": min(config.max_position_embeddings, window)} if window else {}


def _gemma3(config: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    kinds = [
        "sliding_attention" if (i + 1) % FULL_ATTENTION_EVERY else "full_attention"
        for i in range(config.num_hidden_layers)
    ]
    largest = config.num_hidden_layers == GEMMA3_27B
    scale = config.hidden_size // config.num_attention_heads if largest else head_size(config)
    local = config.rope_parameters["sliding_attention"]
    return {
        "layer_types": (kinds, list(config.layer_types)),
        "query_pre_attn_scalar": (scale, config.query_pre_attn_scalar),
        "rope_local_base_freq": (LOCAL_ROPE_BASE, float(local["rope_theta"])),
        "rope_local_type": ("default", local.get("rope_type", "default")),
    }


def _smollm3(config: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    wanted = [int((i + 1) % NO_POSITIONS_EVERY != 0) for i in range(config.num_hidden_layers)]
    return {"no_rope_layers": (wanted, list(config.no_rope_layers)), "use_sliding_window": (False, _slides(config))}


def _no_window(config: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    return {"use_sliding_window": (False, _slides(config))}


def _slides(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "use_sliding_window", False))


def _granite(config: PretrainedConfig) -> dict[str, Value]:
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", interleaved, in_halves, ropes=LLAMA3_TOO),
    "mistral": Family("llama", interleaved, in_halves, _window, ropes=LLAMA3_TOO),
    "qwen2": Family("qwen2", _same, _same, require=_no_window, ropes=YARN_TOO),
    "qwen3": Family("qwen3", _same, _same, require=_no_window, ropes=YARN_TOO),
    "gemma3_text": Family(
        "gemma3", _plus_one, _minus_one, lambda c: {"attention.sliding_window": c.sliding_window}, _gemma3
    ),
    "phi3": Family(
        "phi3", _same, _same,
        lambda c: {"attention.sliding_window": c.sliding_window or 0,
                   "rope.scaling.original_context_length": c.original_max_position_embeddings},
        ropes=("default", "linear", "longrope"),
    ),
    "smollm3": Family(
        "smollm3", interleaved, in_halves, require=_smollm3, read_by_transformers=False, ropes=YARN_TOO
    ),
    "olmo2": Family("olmo2", _same, _same, read_by_transformers=False, ropes=YARN_TOO),
    "granite": Family("granite", interleaved, in_halves, _granite, read_by_transformers=False, ropes=LLAMA3_TOO),
    "gpt2": Family("gpt2", _transposed, _transposed),
}  # fmt: skip
