"""aLoRA: an adapter that is active from its invocation sequence on (arXiv:2504.12397, activated LoRA).

    y_t = W x_t                 before the last occurrence of the invocation tokens in the text
    y_t = W x_t + s B A x_t     from its first token on

So what comes before has the keys and values of the base model, and a cache of these serves the adapter too. A text
without the sequence is computed by the base model alone. As in PEFT, the sequence is looked for in the whole example
in training, and in the prompt when a reply is generated. It is a matter of routing: see `Router.partial`.
"""

import sys
from collections.abc import Sequence

from torch import Tensor

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.update import Update

NEVER = sys.maxsize  # the first active position of a text without the sequence


class ALoRA(Update):
    """Plain low rank at the tokens that are routed to it. No weights are equivalent to it, since others are not."""

    IS_LOW_RANK = True

    def merged(self, W_OI: Tensor) -> Tensor:
        """Raise AdapterError."""
        raise AdapterError(
            _(
                "the adapter is an aLoRA, which is active only from its invocation sequence on, so it cannot be "
                "merged. Serve it unmerged."
            )
        )


def first_active(ids: Sequence[int], config: LoraConfig) -> int:
    """The position in `ids` from which on an adapter with this config is active: 0 unless it is an aLoRA."""
    wanted = config.alora_invocation_tokens
    if wanted is None:
        return 0
    n, tokens = len(wanted), tuple(ids)
    return next((i for i in range(len(tokens) - n, -1, -1) if tokens[i : i + n] == wanted), NEVER)
