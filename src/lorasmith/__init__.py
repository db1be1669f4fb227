"""lorasmith: train, evaluate and serve LoRA adapters for language models.

from lorasmith import LoraConfig, load, train

summary = train("rows.jsonl", lora=LoraConfig(r=8), output="runs/mine")
print(summary.loss_before, summary.loss_after)
print(load("runs/mine").generate("Hello!"))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasmith.api import load as load
    from lorasmith.api import train as train
    from lorasmith.api import train_each as train_each
    from lorasmith.config.lora import LoraConfig as LoraConfig

__all__ = ["LoraConfig", "load", "train", "train_each"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562), because `import lorasmith` must not load torch."""
    if name == "LoraConfig":
        from lorasmith.config.lora import LoraConfig

        return LoraConfig
    if name in ("load", "train", "train_each"):
        from lorasmith import api

        return getattr(api, name)
    raise AttributeError(f"module 'lorasmith' has no attribute {name!r}")
