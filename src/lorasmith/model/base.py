"""A causal language model as the rest of lorasmith sees it."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorasmith.lora.inject import Adapter
from lorasmith.lora.router import Router
from lorasmith.model.identity import identity

if TYPE_CHECKING:
    from lorasmith.model.decoder import Decoder

Layout = Literal["packed", "padded"]


@dataclass(frozen=True)
class Head:
    """How logits come from hidden states: the output embedding, times `scale`, softly capped at `softcap`.

    `direct` is False where that does not equal the model's own logits; then the whole model computes them.
    """

    direct: bool = True
    scale: float = 1.0
    softcap: float | None = None


@dataclass
class Base:
    """A frozen model, its tokenizer, the adapters on it, and what the probe found out about it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str  # as the user named it
    folder: Path  # where its files lie
    dtype: torch.dtype
    device: torch.device
    layout: Layout = "padded"
    head: Head = field(default_factory=Head)
    fast: frozenset[str] = frozenset({"attention", "head", "linear layers", "prefix"})  # see verify.py
    kept_per_token: float = 0.0  # bytes that a training keeps for backward; see kept.py
    native: str = "sdpa"  # transformers' own attention for this model, by name
    why: dict[str, str] = field(default_factory=dict)
    router: Router = field(default_factory=Router)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    decoding: "Decoder | None" = None  # what decodes faster than its own modules, once an engine asked for it

    @cached_property
    def identity(self) -> dict[str, str]:
        """What makes it the same base; see identity.py."""
        return identity(self.folder, self.tokenizer)

    @property
    def decoder(self) -> nn.Module:
        """The model without its head: what it calls its decoder, or the part that is a model by itself.

        Llama 4's text model calls itself its decoder, and ModernBERT's decoder is its head.
        """
        named = self.model.get_decoder()
        parts = [named, *self.model.children()]
        others = (part for part in parts if isinstance(part, PreTrainedModel) and part is not self.model)
        return next(others, named)

    @property
    def output_embedding(self) -> nn.Module:
        """The head's linear layer, adapters included."""
        head: nn.Module = self.model.get_output_embeddings()
        return head

    @property
    def compiles_shapes(self) -> bool:
        """Whether products make a kernel for every shape: oneDNN does, which takes those of bfloat16 on a CPU."""
        return self.device.type == "cpu" and self.dtype == torch.bfloat16

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model can look at, where its config says so."""
        return positions_of(self.model.config)


def positions_of(config: PretrainedConfig) -> int | None:
    """Tokens that a model of this config can look at, where it says so."""
    text = config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, key, None)
        if isinstance(value, int) and value > 1:
            return value
    return None
