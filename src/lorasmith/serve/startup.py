"""Starting a server: loads the base model and the adapters, and sizes the KV cache."""

from pathlib import Path

from lorasmith.adapters.folder import find_model
from lorasmith.adapters.session import base_settings, tell_template
from lorasmith.config.model import ModelConfig
from lorasmith.config.serving import ServeConfig
from lorasmith.engine.engine import DEFAULT_CACHE_TOKENS, Engine
from lorasmith.engine.kv_cache import FIRST_CAPACITY, bytes_per_token
from lorasmith.errors import AdapterError, OutOfMemoryError
from lorasmith.i18n import _
from lorasmith.loading.load import load_base
from lorasmith.model.base import Base
from lorasmith.report import Report
from lorasmith.serve.auth import Key, KeyFile
from lorasmith.serve.discovery import Discovery
from lorasmith.serve.registry import Registry
from lorasmith.serve.request_manager import RequestManager
from lorasmith.serve.worker import Worker
from lorasmith.system.memory import available_mib, convert_memory_errors


def open_manager(
    discovery: Discovery, model: ModelConfig, settings: ServeConfig, keys: KeyFile | list[Key] | None, report: Report
) -> RequestManager:
    """Load the base model and all adapters that fit it; the base defaults to that of the first adapter.

    Adapters that cannot be loaded are left out, with a message in `discovery.problems`.

    Raises ModelError if the base cannot be loaded, AdapterError if none is given and there are no adapters.
    """
    first = next(iter(discovery.adapters.values()), None)
    model = _with_trained_model(discovery, model)
    if first is None and "model" not in model.model_fields_set:
        raise AdapterError(
            *discovery.problems,
            _(
                "{paths}: no adapter can be served, and no base model is given. Train an adapter with lorasmith train, "
                "give the folder that holds your runs, or give a base model with --model.",
                paths=", ".join(map(str, discovery.paths)),
            ),
        )
    base = load_base(base_settings(first.adapter if first else None, model, report), report)
    with convert_memory_errors():
        cache = settings.cache_tokens or cache_tokens(base)
        engine = Engine(base, slots=settings.slots, cache_tokens=cache, prepack=True)
    place = Path(base.source)
    name = place.name or place.resolve().name  # `.` has no name
    if find_model(place) is not None:
        name = place.resolve().parent.name
    registry = Registry(base, name, discovery.roots)
    for done, found in enumerate(discovery.adapters.values(), 1):
        try:
            with convert_memory_errors():
                version = registry.put(found)
            if found.adapter.metadata is None:
                tell_template(found.adapter, version.template.tokenizer is not base.tokenizer, report)
        except (AdapterError, OutOfMemoryError) as error:
            discovery.problems.extend(error.problems)
        report.progress(_("adapters"), done, len(discovery.adapters))
    return RequestManager(registry, Worker(engine, settings.slots), settings, keys)


def _with_trained_model(discovery: Discovery, model: ModelConfig) -> ModelConfig:
    """`model`, or if it names none and there are no adapters, the model of the run that trained all weights.

    Other such models are left out, with a message in `discovery.problems`.
    """
    is_free = not discovery.adapters and "model" not in model.model_fields_set
    served, others = (discovery.models[:1], discovery.models[1:]) if is_free else ([], discovery.models)
    left_out = [
        _(
            "{path}: the model of a run that trained all weights is a base model, and a server has only one. Serve it "
            "alone, or give it with --model.",
            path=path,
        )
        for path in others
    ]
    if left_out:
        discovery.problems.extend(AdapterError(*left_out).problems)
    return model.model_copy(update={"model": str(served[0])}) if served else model


def cache_tokens(base: Base) -> int:
    """The size of the KV cache that takes a quarter of the free memory; a default if that is unknown."""
    free = available_mib(base.device)
    if free is None:
        return DEFAULT_CACHE_TOKENS
    tokens = int(free * 2**20 / 4 / bytes_per_token(base.model.config, base.dtype))
    return max(tokens, FIRST_CAPACITY)
