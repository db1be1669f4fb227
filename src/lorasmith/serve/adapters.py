"""Adapters onto the base and off it: the only place that loads them. For the model's thread alone."""

from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.files import load_adapter
from lorasmith.lora.fused.held import Contents, held_weights
from lorasmith.lora.inject import remove
from lorasmith.lora.variant import flags_of
from lorasmith.model.base import Base
from lorasmith.model.decoder import unpacked


def offer(base: Base, internal_name: str, contents: Contents, version: str) -> None:
    """Make the adapter one that requests can name. Raises AdapterError; the base is then as it was.

    It waits in memory until it is used; only one that changes embeddings, whole modules or other layers than those
    that decode in groups gets modules in the model.
    """
    decoder = base.decoding
    paths = decoder.bank.paths if decoder and decoder.bank else frozenset[str]()
    weights = held_weights(base.model, contents, paths, version) if paths else None
    if decoder and weights:
        decoder.held[internal_name] = weights
        return
    with unpacked(base):
        base.adapters[internal_name] = load_adapter(base.model, base.router, contents.folder, internal_name)
        base.router.active = None
    lost = decoder.lost() if decoder else []
    if lost and (flags := flags_of(contents.config)):
        withdraw(base, internal_name)
        raise AdapterError(
            _(
                "{path}: an adapter with {flag} cannot share this layer with one that was loaded before it. Load it "
                "first, or serve it by itself.",
                path=lost[0],
                flag=flags[0],
            )
        )
    if lost:
        withdraw(base, internal_name)
        text = _(
            "{path}: another adapter has LoRA on this module, and this adapter trains a neighbouring module in "
            "full. They cannot be served together.",
            path=lost[0],
        )
        raise AdapterError(text)


def withdraw(base: Base, internal_name: str) -> None:
    """Take it off again; no request may use it any more."""
    if base.decoding is not None and base.decoding.drop(internal_name):
        return
    with unpacked(base):
        remove(base.model, internal_name)
        del base.adapters[internal_name]
