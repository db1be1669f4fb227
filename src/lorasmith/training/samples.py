"""Answers to fixed prompts while the training goes on: true generation, which leaves its numbers as they are."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorasmith.config.sampling import SamplingConfig
from lorasmith.data.rows.conversation import Message
from lorasmith.data.template.encoding import Template
from lorasmith.engine.engine import Engine, replies
from lorasmith.engine.request import Request
from lorasmith.errors import ConfigError
from lorasmith.evaluation.loss import eval_mode
from lorasmith.i18n import _
from lorasmith.model.base import Base

SAMPLING = SamplingConfig(max_new_tokens=64)  # greedy: only the adapter decides what changes from step to step


@dataclass(frozen=True)
class Samples:
    """The prompts of training.samples, encoded once as chat encodes them."""

    base: Base
    prompts: tuple[str, ...]
    ids: tuple[list[int], ...]
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, base: Base, template: Template, prompts: Sequence[str]) -> "Samples":
        """Raises ConfigError with every prompt that is longer than the model can hold."""
        ids = tuple(template.encode_prompt((Message("user", prompt),)) for prompt in prompts)
        limit = base.max_positions
        problems = [
            _(
                "training.samples: prompt {number} has {tokens} tokens, but the model's context length is "
                "{limit} tokens, including the answer. Shorten the prompt.",
                number=number,
                tokens=len(one),
                limit=limit,
            )
            for number, one in enumerate(ids, 1)
            if limit is not None and len(one) >= limit
        ]
        if problems:
            raise ConfigError(*problems)
        return cls(base, tuple(prompts), ids, template.stop_ids)

    def answers(self, adapter: str | None) -> list[str]:
        """An answer to each prompt, decoded together; `adapter` None: the base alone.

        No generator of the training is drawn from, and the model comes back in the mode in which it was.
        """
        requests = [Request(ids, SAMPLING, adapter, self.stop_ids) for ids in self.ids]
        with eval_mode(self.base):
            return [reply.text for reply in replies(Engine(self.base), requests)]
