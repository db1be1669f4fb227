"""Adapters onto the base and off it: the only place that loads them. For the model's thread alone."""

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.held import Contents, held_ranks
from lorasmith.lora.inject import remove
from lorasmith.lora.layer import SavedModule
from lorasmith.model.base import Base
from lorasmith.model.decoding import unpacked


def offer(base: Base, internal_name: str, adapter: AdapterFolder, contents: Contents) -> None:
    """Make the adapter one that requests can name. Raises AdapterError; the base is then as it was.

    It waits in memory until it is used; only one that changes embeddings, whole modules or other layers than those
    that decode in groups gets modules in the model. `contents`: those of `adapter` in the base's dtype.
    """
    ranks = base.bank and held_ranks(base.model, contents, base.bank.paths, adapter.hash)
    if ranks:
        base.ranks[internal_name] = ranks
        return
    with unpacked(base):
        adapter.put_on(base, internal_name)
        base.router.active = None
    if blocks := _blocks(base, internal_name):
        withdraw(base, internal_name)
        text = _(
            "{path}: the adapter trains it whole, and it looks at more than one token at a time, so it cannot share a "
            "batch with other adapters. Merge the adapter into its base and serve that.",
            path=blocks[0],
        )
        raise AdapterError(text)
    held = base.ranks.values() if base.bank else ()
    lost = [path for ranks in held for path in ranks.read() if base.bank and path not in base.bank.paths]
    if lost:
        withdraw(base, internal_name)
        text = _(
            "{path}: another adapter has LoRA on this module, and this adapter trains a neighbouring module in "
            "full. They cannot be served together.",
            path=lost[0],
        )
        raise AdapterError(text)


def _blocks(base: Base, name: str) -> list[str]:
    """Modules that this adapter trains whole and that compute for one adapter only at a time, such as attention."""
    saved = [path for paths in base.adapters[name].targets.saved.values() for path in paths]
    modules = {path: base.model.get_submodule(path) for path in saved}
    return [path for path, m in modules.items() if isinstance(m, SavedModule) and m.sees_more_than_its_input]


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
