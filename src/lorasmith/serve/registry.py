"""Which models there are by name, and which version of each new requests take. For the loop's thread alone."""

import asyncio
import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lorasmith.adapters.folder import AdapterFolder, end_ids
from lorasmith.config.values import closest
from lorasmith.data.template.encoding import Template
from lorasmith.engine.request import Request
from lorasmith.engine.scoring import prompt_logprobs
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.fused.held import Contents, held_weights
from lorasmith.lora.inject import remove
from lorasmith.lora.layer import SavedModule
from lorasmith.lora.variant import flags_of
from lorasmith.model.base import Base
from lorasmith.model.fast.decoder import unpacked
from lorasmith.serve.discovery import ALLOWED, DiscoveredAdapter, inside, read
from lorasmith.serve.failure import Failure
from lorasmith.serve.worker import Worker

PROBE = "Why is the sky blue?"  # what the effect of an adapter is measured on


@dataclass(eq=False)
class Version:
    """One content of one name. `adapter` None: the base alone. `effect`: largest change of a log probability, in
    nats, on a short text."""

    name: str
    adapter: str | None
    template: Template
    discovered: DiscoveredAdapter | None = None
    effect: float = 0.0
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0
    is_retired: bool = False


class Registry:
    """The models of one server: the base under `base_name`, and adapters. `roots`: where later ones may lie."""

    def __init__(self, base: Base, base_name: str, roots: Sequence[Path]) -> None:
        self.base, self.base_name, self.roots = base, base_name, list(roots)
        own = Template.of(base.tokenizer, "auto", end_ids(base))
        self.versions: dict[str, Version] = {base_name: Version(base_name, None, own)}
        self._retired: dict[str, Version] = {}  # by internal name: those that requests still use
        self._changing = asyncio.Lock()

    def names(self, allowed: Collection[str] | None = None) -> list[str]:
        """The models that may be used; `allowed` None: all."""
        return [name for name in self.versions if allowed is None or name in allowed]

    def find(self, name: str, allowed: Collection[str] | None = None) -> Version:
        """The version that a new request takes. Raises Failure 404 with the nearest name."""
        names = self.names(allowed)
        if name not in names:
            text = _("model {name!r} does not exist.", name=name) + closest(name, names)
            shown = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
            text += " " + _("Available models: {names}.", names=shown or _("none"))
            raise Failure(404, text, "model", "model_not_found")
        return self.versions[name]

    @contextmanager
    def using(self, version: Version, worker: Worker) -> Iterator[None]:
        """Within it the version stays, even when another takes its name."""
        version.users += 1
        try:
            yield
        finally:
            version.users -= 1
            self.withdraw_if_idle(version, worker)

    def put(self, found: DiscoveredAdapter) -> Version:
        """Load an adapter and give it its name, before the worker runs. Raises AdapterError."""
        self._refuse_base(found.name)
        if found.name in self.versions or not ALLOWED.fullmatch(found.name):
            raise AdapterError(_("{name!r} cannot be the name of another adapter. Rename its folder.", name=found.name))
        whole = found.whole()
        version = load(self.base, whole, whole.adapter.contents(self.base.dtype))
        self.versions[found.name] = version
        return version

    async def register(self, name: str, path: str, worker: Worker) -> Version:
        """Take the adapter at `path`: verified, hashed, its effect measured, warm; then new requests get it.

        Raises AdapterError, and Failure 400 for a name that is none; what was there before then stays.
        """
        if not ALLOWED.fullmatch(name):
            raise Failure(
                400, _("{name!r}: a model name may only contain letters, digits, '-', '.' and '_'.", name=name), "name"
            )
        self._refuse_base(name)
        async with self._changing:
            found = await asyncio.to_thread(lambda: read(name, inside(self.roots, path)))
            before = self.versions.get(name)
            if before is not None and before.discovered is not None and before.discovered.hash == found.hash:
                return before
            version = self._revived(found)
            if version is None:
                contents = await asyncio.to_thread(found.adapter.contents, self.base.dtype)
                version = await worker.call(lambda: load(self.base, found, contents))
            self.versions[name] = version
            self._retire(before, worker)
            return version

    async def drop(self, name: str, worker: Worker) -> None:
        """No new request gets it; it leaves once those that use it are through. Raises Failure 400 for the base."""
        if name == self.base_name:
            raise Failure(400, _("{name!r} is the base model; only adapters can be unloaded.", name=name), "name")
        async with self._changing:
            self.find(name)
            self._retire(self.versions.pop(name), worker)

    def withdraw_if_idle(self, version: Version, worker: Worker) -> None:
        """Take a retired version off the base once nobody uses it."""
        if version.is_retired and not version.users and version.adapter is not None:
            adapter = version.adapter
            del self._retired[adapter]
            worker.do(lambda: withdraw(self.base, adapter))

    def _revived(self, found: DiscoveredAdapter) -> Version | None:
        """The same content under the same name as one that is about to leave."""
        version = self._retired.pop(found.internal, None)
        if version is not None:
            version.is_retired = False
        return version

    def _refuse_base(self, name: str) -> None:
        if name == self.base_name:
            raise AdapterError(
                _("{name!r} is the name of the base model. Choose another name for the adapter.", name=name)
            )

    def _retire(self, version: Version | None, worker: Worker) -> None:
        if version is not None:
            version.is_retired = True
            self._retired[str(version.adapter)] = version
            self.withdraw_if_idle(version, worker)


def load(base: Base, found: DiscoveredAdapter, contents: Contents) -> Version:
    """Put it on the base and run a short text through it, which measures its effect and warms it. Raises AdapterError.

    For the thread that owns the model.
    """
    template = found.adapter.template(base)
    offer(base, found.internal, found.adapter, contents)
    try:
        effect = effect_of(base, found.internal)
        if not 0 < effect < float("inf"):
            text = _(
                "{folder}: the adapter has no effect on the model's output, or makes it NaN or infinite.",
                folder=found.folder,
            )
            raise AdapterError(text)
    except BaseException:
        withdraw(base, found.internal)
        raise
    return Version(found.name, found.internal, template, found.without_tensors(), effect)


def effect_of(base: Base, adapter: str) -> float:
    """The largest change of a token's log probability in a short text; NaN where one is no number."""
    ids = base.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    own, others = prompt_logprobs(base, [Request(ids, adapter=None), Request(ids, adapter=adapter)])
    changes = [abs(a.logprob - b.logprob) for a, b in zip(own, others, strict=True) if a and b]
    return max(changes) if all(map(math.isfinite, changes)) else math.nan


def offer(base: Base, internal_name: str, adapter: AdapterFolder, contents: Contents) -> None:
    """Make the adapter one that requests can name. Raises AdapterError; the base is then as it was.

    It waits in memory until it is used; only one that changes embeddings, whole modules or other layers than those
    that decode in groups gets modules in the model. `contents`: those of `adapter` in the base's dtype.
    """
    decoder = base.fast_decoder
    paths = decoder.bank.paths if decoder and decoder.bank else frozenset[str]()
    weights = held_weights(base.model, contents, paths, adapter.hash) if paths else None
    if decoder and weights:
        decoder.held[internal_name] = weights
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


def _blocks(base: Base, name: str) -> list[str]:
    """Modules that this adapter trains whole and that compute for one adapter only at a time, such as attention."""
    saved = [path for paths in base.adapters[name].targets.saved.values() for path in paths]
    modules = {path: base.model.get_submodule(path) for path in saved}
    return [path for path, m in modules.items() if isinstance(m, SavedModule) and m.sees_more_than_its_input]


def withdraw(base: Base, internal_name: str) -> None:
    """Take it off again; no request may use it any more."""
    if base.fast_decoder is not None and base.fast_decoder.drop(internal_name):
        return
    with unpacked(base):
        remove(base.model, internal_name)
        del base.adapters[internal_name]
