"""Adapters onto the base and off it: the only place that loads them. For the model's thread alone."""

from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.files import load_adapter
from lorasmith.lora.fused.held import Contents, held_weights
from lorasmith.lora.inject import remove
from lorasmith.lora.variant import flags_of
from lorasmith.model.base import Base
from lorasmith.model.decoding import unpacked


def offer(base: Base, internal_name: str, contents: Contents, version: str) -> None:
    """Make the adapter one that requests can name. Raises AdapterError; the base is then as it was.

    It waits in memory until it is used; only one that changes embeddings, whole modules or other layers than those
    that decode in groups gets modules in the model.
    """
    ranks = base.bank and held_weights(base.model, contents, base.bank.paths, version)
    if ranks:
        base.ranks[internal_name] = ranks
        return
    with unpacked(base):
        base.adapters[internal_name] = load_adapter(base.model, base.router, contents.folder, internal_name)
        base.router.active = None
    held = base.ranks.values() if base.bank else ()
    lost = [path for ranks in held for path in ranks.read() if base.bank and path not in base.bank.paths]
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
    if base.bank is not None:
        base.bank.drop(internal_name)
    if internal_name in base.ranks:
        del base.ranks[internal_name]
        return
    with unpacked(base):
        remove(base.model, internal_name)
        del base.adapters[internal_name]
