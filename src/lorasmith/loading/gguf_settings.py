"""What a GGUF file says about its model and transformers does not read, so that no model is silently another one.

transformers 5.23 takes only the base of the rotary positions from a file, not how they are scaled, and for some
architectures the values of a well-known model instead of the file's own.
"""

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import PretrainedConfig

from lorasmith.errors import ModelError
from lorasmith.i18n import _

# Entries of the config, and the keys of the file that have their values.
LEFT_OUT = {
    "qwen3": {"head_dim": "attention.key_length"},
    "gemma3": {"query_pre_attn_scalar": "attention.key_length"},
    "gpt2": {"n_positions": "context_length", "vocab_size": "vocab_size"},
}
GEMMA3_27B = 62  # layers of the one Gemma 3 whose attention is scaled by another size, by a rule of llama.cpp
READ = ("gpt-oss",)  # architectures whose scaling of rotary positions transformers reads
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FACTORS = "rope_freqs.weight"  # the tensor by which the wavelengths of Llama 3 are stretched
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"  # those of LongRoPE
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # what llama.cpp takes where a file does not say


def left_out(gguf: Path, config: PretrainedConfig) -> dict[str, Any]:
    """The entries of the config that transformers has left out of `config`. Raises ModelError for unknown scaling."""
    reader = GGUFReader(gguf)
    architecture = str(_value(reader, "general.architecture"))
    values = {name: _value(reader, f"{architecture}.{key}") for name, key in LEFT_OUT.get(architecture, {}).items()}
    found = {name: value for name, value in values.items() if value is not None}
    if architecture == "gemma3" and config.num_hidden_layers == GEMMA3_27B:
        found["query_pre_attn_scalar"] = config.hidden_size // config.num_attention_heads
    scaling = {} if architecture in READ else _scaling(reader, architecture, gguf, config)
    if scaling:
        rope = config.rope_parameters
        whole = rope.get("full_attention")  # Gemma 3 has one entry for each kind of layer
        found["rope_parameters"] = rope | ({"full_attention": whole | scaling} if whole else scaling)
    return found


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _scaling(reader: GGUFReader, architecture: str, gguf: Path, config: PretrainedConfig) -> dict[str, Any]:
    """The entries of `rope_parameters` that say how rotary positions are scaled; empty if they are not."""
    tensors = {one.name: one for one in reader.tensors if one.name.startswith("rope_")}
    if FACTORS in tensors:
        return _llama3(torch.from_numpy(tensors.pop(FACTORS).data.copy()), gguf, config)

    def said(key: str) -> Any:
        return _value(reader, f"{architecture}.rope.scaling.{key}")

    kind, factor = said("type"), said("factor")
    original = said("original_context_length") or config.max_position_embeddings
    if tensors.keys() == {LONG_FACTORS, SHORT_FACTORS} and config.model_type == "phi3":
        return {
            "rope_type": "longrope",
            "long_factor": tensors[LONG_FACTORS].data.tolist(),
            "short_factor": tensors[SHORT_FACTORS].data.tolist(),
            "attention_factor": float(said("attn_factor") or 1.0),
            "original_max_position_embeddings": int(original),
        }
    is_usual = all(said(f"yarn_{name}") in (None, value) for name, value in YARN.items())
    if kind == "yarn" and factor and is_usual and said("attn_factor") in (None, 1.0) and not tensors:
        return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(original)}
    if tensors or kind not in (None, "none", "linear"):
        raise ModelError(
            _(
                "{file}: its rotary positions are scaled in a way ({kind}) that is not read from GGUF files. Use the "
                "same model as a folder in Hugging Face format: --model FOLDER.",
                file=gguf,
                kind=kind or ", ".join(tensors),
            )
        )
    return {"rope_type": "linear", "factor": float(factor)} if factor not in (None, 0.0, 1.0) else {}


def _llama3(factors_F: Tensor, gguf: Path, config: PretrainedConfig) -> dict[str, Any]:
    """Llama 3's scaling with these factors (arXiv:2407.21783, section 3.2)."""
    found = {"rope_type": "llama3", "factor": round(float(factors_F.max()), 4), **LLAMA3}
    if torch.allclose(stretching(config, found), factors_F.double(), rtol=1e-4):
        return found
    raise ModelError(
        _(
            "{file}: its rotary positions are scaled in a way ({kind}) that is not read from GGUF files. Use the same "
            "model as a folder in Hugging Face format: --model FOLDER.",
            file=gguf,
            kind=FACTORS,
        )
    )


def stretching(config: PretrainedConfig, scaling: dict[str, Any]) -> Tensor:
    """By what the wavelength of each rotary frequency is multiplied: float64, shape (head size / 2,).

    scaling: as `rope_parameters` has it, of type llama3.
    """
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta = float(config.rope_parameters["rope_theta"])
    wavelength_F = 2 * torch.pi * theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns_F = scaling["original_max_position_embeddings"] / wavelength_F  # in the context of the pretraining
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept_F = ((turns_F - low) / (high - low)).clamp(0, 1)  # the share of the frequency that is not divided
    factors_F: Tensor = 1 / (kept_F + (1 - kept_F) / scaling["factor"])
    return factors_F
