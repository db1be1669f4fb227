"""Switching adapters layer by layer, as programs for PEFT do: `for layer in ...: layer.set_adapter(names)`.

All layers share one router, so this takes effect once every layer has been asked for the same adapters.
"""

from collections.abc import Collection, Sequence

from lorasmith.errors import AdapterError
from lorasmith.i18n import _


class OneByOne:
    """What the layers have been asked for, by path, since the adapters were last switched for all of them."""

    def __init__(self) -> None:
        self.asked: dict[str, tuple[object, ...]] = {}
        self.layers: Collection[str] = ()

    def ask(self, path: str, names: str | Sequence[str], inference_mode: bool, layers: Collection[str]) -> bool:
        """Note what the layer at `path` is asked for. Returns whether all `layers` now have been asked for the same."""
        self.asked[path] = (inference_mode, *([names] if isinstance(names, str) else names))
        self.layers = layers
        return self.asked.keys() >= set(layers) and len(set(self.asked.values())) == 1

    def check(self) -> None:
        """Raise AdapterError if only some layers have been switched, or to different adapters."""
        if self.asked:
            raise AdapterError(
                _(
                    "set_adapter of single layers: {count} of {all} layers have been switched, and all must be, to the "
                    "same adapters. Use set_adapter of the model.",
                    count=len(self.asked),
                    all=len(self.layers),
                )
            )
