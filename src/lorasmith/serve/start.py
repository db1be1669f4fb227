"""Base and adapters loaded, and the desk that serves them."""

from pathlib import Path

from lorasmith.adapters.session import base_settings
from lorasmith.config.model import ModelConfig
from lorasmith.config.serving import ServeConfig
from lorasmith.engine.engine import CACHE, Engine
from lorasmith.engine.kv import bytes_per_token
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.loading.load import load_base
from lorasmith.model.base import Base
from lorasmith.report import Report
from lorasmith.serve.desk import Desk
from lorasmith.serve.found import Shelf
from lorasmith.serve.keys import Key
from lorasmith.serve.registry import Registry
from lorasmith.serve.worker import Worker
from lorasmith.system.memory import available_mib


def open_desk(shelf: Shelf, model: ModelConfig, settings: ServeConfig, keys: list[Key] | None, report: Report) -> Desk:
    """Load the base (that of the first adapter where `model` names none), then every adapter that fits it.

    One that does not fit is told with its reason and left out. Raises ModelError, and AdapterError where no base is
    named.
    """
    first = next(iter(shelf.found.values()), None)
    if first is None and "model" not in model.model_fields_set:
        raise AdapterError(
            *shelf.problems, _("no adapter can be served, and no base model is given. Give one with --model.")
        )
    base = load_base(base_settings(first.adapter if first else None, model, report), report)
    engine = Engine(base, slots=settings.slots, cache_tokens=settings.cache_tokens or cache_tokens(base), prepack=True)
    registry = Registry(base, Path(base.source).name, shelf.roots)
    for done, found in enumerate(shelf.found.values(), 1):
        try:
            registry.put(found)
        except AdapterError as error:
            shelf.problems.extend(error.problems)
        report.progress(_("adapters"), done, len(shelf.found))
    return Desk(registry, Worker(engine, settings.slots), settings, keys)


def cache_tokens(base: Base) -> int:
    """As many as a quarter of the free memory holds, 2**15 where the system does not say what is free."""
    free = available_mib()
    tokens = CACHE if free is None else int(free * 2**20 / 4 / bytes_per_token(base.model.config, base.dtype))
    return max(tokens, base.max_positions or 0)
