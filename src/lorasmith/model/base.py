"""A frozen causal language model with its tokenizer and adapters, as the rest of lorasmith uses it."""

from collections.abc import Iterator
from contextlib import contextmanager
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
    from lorasmith.model.fast.decoder import FastDecoder

Layout = Literal["packed", "padded"]


@dataclass(frozen=True)
class Head:
    """How logits follow from the last hidden states: output embedding, times `scale`, then softcapping.

    softcap: c in c tanh(logits / c) (Gemma 2, arXiv:2408.00118, section 2), or None. direct: False if this does not
    equal the model's own logits; then these are computed by the whole model.
    """

    direct: bool = True
    scale: float = 1.0
    softcap: float | None = None


@dataclass
class Base:
    """A frozen model, its tokenizer, its adapters, and how it is computed.

    `load_base` makes it; `probe` sets layout and head, `enable_fast_parts` the fast parts.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str  # the model as the user named it
    folder: Path  # with its files
    dtype: torch.dtype
    device: torch.device
    quantize: str = "none"  # the option with which it was loaded
    layout: Layout = "padded"
    one_by_one: bool = False  # whether padding changes the results, so that each example is computed alone
    head: Head = field(default_factory=Head)
    fast_parts: frozenset[str] = frozenset(
        {"attention", "head", "linear layers", "prefix"}
    )  # those in use; see verify.py
    saved_bytes_per_token: float = 0.0  # by autograd for backward, measured in the trial step of a training
    native: str = "sdpa"  # the name of transformers' own attention implementation for this model
    why: dict[str, str] = field(default_factory=dict)  # the reasons for layout, head, fast parts, device and dtype
    router: Router = field(default_factory=Router)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    added_tokens: dict[str, int] = field(default_factory=dict)  # their ids; added for a training, see vocabulary.py
    fast_decoder: "FastDecoder | None" = None  # made by the first engine

    @cached_property
    def identity(self) -> dict[str, str]:
        """Hashes by which the same base model is recognized; see identity.py."""
        return identity(self.folder, self.tokenizer)

    @property
    def decoder(self) -> nn.Module:
        """The model without its head: its `get_decoder()`, unless that is no separate model.

        Llama 4's text model returns itself there, and ModernBERT its head; then it is the child that is a model.
        """
        named = self.model.get_decoder()
        parts = [named, *self.model.children()]
        others = (part for part in parts if isinstance(part, PreTrainedModel) and part is not self.model)
        return next(others, named)

    @property
    def output_embedding(self) -> nn.Module:
        """The linear layer from hidden states to logits, adapters included."""
        head: nn.Module = self.model.get_output_embeddings()
        return head

    @property
    def compiles_shapes(self) -> bool:
        """Whether every new shape of a matrix product costs time: oneDNN compiles kernels, for bfloat16 on a CPU."""
        return self.device.type == "cpu" and self.dtype == torch.bfloat16

    @contextmanager
    def without_trained_biases(self) -> Iterator[None]:
        """Give the base model its own biases inside the block, instead of those that an adapter trains in place."""
        pairs = [(one.parameters[key], own) for one in self.adapters.values() for key, own in one.own_biases.items()]
        trained = [parameter.detach().clone() for parameter, _own in pairs]
        with torch.no_grad():
            for parameter, own in pairs:
                parameter.copy_(own)
        try:
            yield
        finally:
            with torch.no_grad():
                for (parameter, _own), values in zip(pairs, trained, strict=True):
                    parameter.copy_(values)

    @property
    def max_positions(self) -> int | None:
        """Context length in tokens, or None if the config does not say."""
        return positions_of(self.model.config)


def positions_of(config: PretrainedConfig) -> int | None:
    """Context length in tokens of a model with this config, or None if it does not say."""
    text = config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, key, None)
        if isinstance(value, int) and value > 1:
            return value
    return None
