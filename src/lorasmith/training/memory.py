"""How long an example may be for the memory of this machine."""

from lorasmith.model.base import Base
from lorasmith.system.memory import available_mib

KEPT = 5  # values of the hidden size that a layer keeps per token for the backward pass: 4.8 in the demo
SHARE = 0.5  # of the memory that is free: the rest is for the logits, the optimizer and other programs


def affordable_tokens(base: Base) -> int | None:
    """The tokens of an example that can be trained on in the memory that is free now; None if that is not known."""
    config = base.model.config.get_text_config()
    hidden, layers = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    free = available_mib(base.device)
    if not hidden or not layers or free is None:
        return None
    return int(SHARE * free * 2**20 / (KEPT * layers * hidden * base.dtype.itemsize))
