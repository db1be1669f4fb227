"""The models of a server by name: the base model and adapters, which can be added, replaced and removed at run time.

Registry belongs to the event loop's thread; `load_version`, `attach` and `detach` run in the model's thread.
"""

import asyncio
import hashlib
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lorasmith.adapters.folder import AdapterFolder, end_ids
from lorasmith.adapters.foreign import cannot_share
from lorasmith.config.values import did_you_mean
from lorasmith.data.template.chat_template import BUILTIN, named_templates
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.isolated import IsolatedRenderer
from lorasmith.engine.request import Request
from lorasmith.engine.scoring import prompt_logprobs
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.biases import bias_conflict
from lorasmith.lora.expressions import limited_time
from lorasmith.lora.fused.held import held_weights, inject_held
from lorasmith.lora.inject import remove
from lorasmith.lora.layer import SavedModule
from lorasmith.lora.parameters import LoRAParameters, cannot_split
from lorasmith.model.base import Base
from lorasmith.model.fast.decoder import unpacked
from lorasmith.model.vocabulary import embedding_kept_on_error
from lorasmith.serve.discovery import MODEL_NAME, DiscoveredAdapter, read, resolve_inside
from lorasmith.serve.protocol import Failure
from lorasmith.serve.worker import Worker
from lorasmith.system.memory import release_freed_memory
from lorasmith.version import installed_version

EFFECT_PROMPT = "Why is the sky blue?"  # text on which the effect of an adapter is measured


@dataclass(eq=False)
class ModelVersion:
    """A version of a model: loading an adapter again under the same name creates a new version.

    Requests keep the version that they started with.
    """

    name: str
    adapter: str | None  # its name in the engine; None for the base model
    template: Template
    discovered: DiscoveredAdapter | None = None
    effect: float = 0.0  # the largest change of a token's logprob on EFFECT_PROMPT, in nats
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0  # requests that use this version
    is_retired: bool = False


class Registry:
    """The current version of each model. `roots`: the folders from which adapters can be loaded at run time."""

    def __init__(self, base: Base, base_name: str, roots: Sequence[Path]) -> None:
        self.base, self.base_name, self.roots = base, base_name, list(roots)
        own = Template.of(base.tokenizer, "auto", end_ids(base))
        # the base model's own template comes with the base model, which the user trusts
        self.renderer = IsolatedRenderer(frozenset({*BUILTIN.values(), *named_templates(base.tokenizer).values()}))
        self.versions: dict[str, ModelVersion] = {base_name: ModelVersion(base_name, None, own)}
        self._retired: dict[str, ModelVersion] = {}  # old versions still in use, by their name in the engine
        self._changing = asyncio.Lock()

    def names(self, allowed: Collection[str] | None = None) -> list[str]:
        """The names of all models, or of those in `allowed`."""
        return [name for name in self.versions if allowed is None or name in allowed]

    def find(self, name: str, allowed: Collection[str] | None = None) -> ModelVersion:
        """The current version of a model. Raises Failure 404, which suggests a similar name."""
        names = self.names(allowed)
        if name not in names:
            text = _("model {name!r} does not exist.", name=name) + did_you_mean(name, names)
            shown = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
            text += " " + _("Available models: {names}.", names=shown or _("none"))
            raise Failure(404, text, "model", "model_not_found")
        return self.versions[name]

    def without_paths(self, text: str) -> str:
        """A message for clients, with paths relative to the folders of runs, and the base model by its name."""
        for place in (self.base.source, str(self.base.folder)):
            text = text.replace(place, self.base_name) if Path(place).is_absolute() else text
        for root in (path for given in self.roots for path in (given.absolute(), given.resolve())):
            text = text.replace(f"{root}/", "").replace(str(root), ".")
        return text

    def fingerprint(self, version: ModelVersion) -> str:
        """The `system_fingerprint` of replies: the same while base model, adapter and version of lorasmith are."""
        content = version.discovered.hash if version.discovered else ""
        named = repr((self.base_name, str(self.base.dtype), content, installed_version()))
        return f"fp_{hashlib.sha256(named.encode()).hexdigest()[:10]}"

    @contextmanager
    def using(self, version: ModelVersion, worker: Worker) -> Iterator[None]:
        """Keep the version loaded inside the block, even if it is replaced meanwhile."""
        version.users += 1
        try:
            yield
        finally:
            version.users -= 1
            self.detach_if_idle(version, worker)

    def put(self, adapter: DiscoveredAdapter) -> ModelVersion:
        """Load an adapter before the worker is started. Raises AdapterError."""
        self._refuse_base(adapter.name)
        if adapter.name in self.versions or not MODEL_NAME.fullmatch(adapter.name):
            raise AdapterError(
                _("{name!r} cannot be the name of another adapter. Rename its folder.", name=adapter.name)
            )
        whole = adapter.whole()
        template = whole.adapter.template(self.base, self.renderer)
        version = load_version(self.base, whole, whole.adapter.tensors_in(self.base.dtype), template)
        self.versions[adapter.name] = version
        return version

    async def register(self, name: str, path: str, worker: Worker) -> ModelVersion:
        """Load the adapter at `path`, relative to one of the roots, as `name`. New requests then use it.

        Raises AdapterError, or Failure 400 for an invalid name; the previous version then stays in place.
        """
        if not MODEL_NAME.fullmatch(name):
            raise Failure(
                400, _("{name!r}: a model name may only contain letters, digits, '-', '.' and '_'.", name=name), "name"
            )
        self._refuse_base(name)
        async with self._changing:
            discovered = await asyncio.to_thread(lambda: read(name, resolve_inside(self.roots, path)))
            before = self.versions.get(name)
            if before is not None and before.discovered is not None and before.discovered.hash == discovered.hash:
                return before
            version = self._revive(discovered)
            if version is None:
                template = await asyncio.to_thread(discovered.adapter.template, self.base, self.renderer)
                tensors = await asyncio.to_thread(discovered.adapter.tensors_in, self.base.dtype)
                version = await worker.call(lambda: load_version(self.base, discovered, tensors, template))
            self.versions[name] = version
            self._retire(before, worker)
            return version

    async def drop(self, name: str, worker: Worker) -> None:
        """Remove an adapter; it is unloaded once no request uses it. Raises Failure 400 for the base model."""
        if name == self.base_name:
            raise Failure(400, _("{name!r} is the base model; only adapters can be unloaded.", name=name), "name")
        async with self._changing:
            self.find(name)
            self._retire(self.versions.pop(name), worker)

    def detach_if_idle(self, version: ModelVersion, worker: Worker) -> None:
        """Unload a retired version if no request uses it."""
        if version.is_retired and not version.users and version.adapter is not None:
            adapter = version.adapter
            del self._retired[adapter]
            worker.do(lambda: detach(self.base, adapter))

    def _revive(self, discovered: DiscoveredAdapter) -> ModelVersion | None:
        """A retired version with the same name and content, if one is still loaded."""
        version = self._retired.pop(discovered.internal, None)
        if version is not None:
            version.is_retired = False
        return version

    def _refuse_base(self, name: str) -> None:
        if name == self.base_name:
            raise AdapterError(
                _("{name!r} is the name of the base model. Choose another name for the adapter.", name=name)
            )

    def _retire(self, version: ModelVersion | None, worker: Worker) -> None:
        if version is not None:
            version.is_retired = True
            self._retired[str(version.adapter)] = version
            self.detach_if_idle(version, worker)


def load_version(
    base: Base, discovered: DiscoveredAdapter, tensors: Mapping[str, Tensor], template: Template | None = None
) -> ModelVersion:
    """Load an adapter, and run a short text through it to measure its effect and to warm up. Raises AdapterError.

    `tensors`, `template`: those of the adapter; the tensors in the base model's dtype, the template if it was read.
    """
    template = template or discovered.adapter.template(base)
    if added := len(template.tokenizer) - len(base.tokenizer):
        raise cannot_share(discovered.folder, added, base)
    attach(base, discovered.internal, discovered.adapter, tensors)
    try:
        effect = effect_of(base, discovered.internal)
        if not 0 < effect < float("inf"):
            text = _(
                "{folder}: the adapter has no effect on the model's output, or makes it NaN or infinite.",
                folder=discovered.folder,
            )
            raise AdapterError(text)
    except BaseException:
        detach(base, discovered.internal)
        raise
    return ModelVersion(discovered.name, discovered.internal, template, discovered.without_tensors(), effect)


def effect_of(base: Base, adapter: str) -> float:
    """The largest change of a token's logprob on EFFECT_PROMPT, in nats; NaN if a logprob is NaN or infinite.

    Before it comes the invocation sequence of an aLoRA, which has no effect otherwise.
    """
    invocation = base.adapters[adapter].config.alora_invocation_tokens if adapter in base.router.partial else None
    ids = [*(invocation or ()), *base.tokenizer(EFFECT_PROMPT, add_special_tokens=False)["input_ids"]]
    own, others = prompt_logprobs(base, [Request(ids, adapter=None), Request(ids, adapter=adapter)])
    changes = [abs(a.logprob - b.logprob) for a, b in zip(own, others, strict=True) if a and b]
    return max(changes) if all(map(math.isfinite, changes)) else math.nan


def attach(base: Base, internal_name: str, adapter: AdapterFolder, tensors: Mapping[str, Tensor]) -> None:
    """Make the adapter available to requests as `internal_name`. `tensors`: those of `adapter` in the base's dtype.

    Usually it is held in memory until a request needs it in the adapter bank. Only an adapter that changes embeddings,
    full modules or layers outside of the bank, or would take too much memory there, is injected into the model.

    Raises AdapterError if it cannot be served with the adapters already loaded; the base is then unchanged.
    """
    with embedding_kept_on_error(base), limited_time():
        _attach(base, internal_name, adapter, tensors)


def _attach(base: Base, internal_name: str, adapter: AdapterFolder, tensors: Mapping[str, Tensor]) -> None:
    decoder = base.fast_decoder
    paths = decoder.bank.paths if decoder and decoder.bank else frozenset[str]()
    config, tensors = adapter.fitted_to(base, tensors)
    weights = held_weights(base.model, config, tensors, adapter.path, paths, adapter.hash) if paths else None
    is_wide = bool(weights and decoder and decoder.bank and not decoder.bank.suits(weights))
    if decoder and weights and not is_wide:
        decoder.held[internal_name] = weights
        return
    if config.bias != "none":  # the base model is served too, and keeps changed biases when the adapter is removed
        raise bias_conflict(internal_name.partition("@")[0], config.bias)
    with unpacked(base):
        adapter.load_into(base, internal_name)
        base.router.active = None
        for path in base.adapters[internal_name].targets.adapted if is_wide else ():
            base.model.get_submodule(path).updates[internal_name].is_alone = True  # type: ignore[union-attr, index]
    if blocks := _blocks(base, internal_name):
        detach(base, internal_name)
        text = _(
            "{path}: the adapter trains this module in full, and the module uses more than one token at a time, so it "
            "cannot share a batch with other adapters. Merge the adapter into its base model and serve the result.",
            path=blocks[0],
        )
        raise AdapterError(text)
    stacks = [base.model.get_submodule(path) for path in base.adapters[internal_name].targets.by_module]
    if whole := [m for m in stacks if isinstance(m, LoRAParameters) and not m.splits_by_token]:
        detach(base, internal_name)
        raise AdapterError(cannot_split(type(whole[0].base_layer).__name__))
    try:
        _move_into_model(base)
    except AdapterError:
        saved = [path for paths in base.adapters[internal_name].targets.saved.values() for path in paths]
        detach(base, internal_name)
        text = _("{path}: another adapter has LoRA on this module, so it cannot be trained in full.", path=saved[0])
        raise AdapterError(text) from None


def _move_into_model(base: Base) -> None:
    """Add the held adapters to the model whose layers an adapter that was just added took out of the bank.

    Such is a variant of LoRA, which has layers of its own, or one that trains a module beside them in full. Raises
    AdapterError if that module is one of theirs.
    """
    decoder = base.fast_decoder
    lost = decoder.lost() if decoder else []
    if decoder is None or not lost:
        return
    with unpacked(base):
        for name in lost:
            base.adapters[name] = inject_held(base.model, base.router, name, decoder.held[name])
            decoder.drop(name)


def _blocks(base: Base, name: str) -> list[str]:
    """Paths of fully trained modules of this adapter that cannot compute a batch of several adapters."""
    saved = [path for paths in base.adapters[name].targets.saved.values() for path in paths]
    modules = {path: base.model.get_submodule(path) for path in saved}
    return [path for path, m in modules.items() if isinstance(m, SavedModule) and m.takes_several_inputs]


def detach(base: Base, internal_name: str) -> None:
    """Unload an adapter that no request uses."""
    if base.fast_decoder is None or not base.fast_decoder.drop(internal_name):
        with unpacked(base):
            remove(base.model, internal_name)
            del base.adapters[internal_name]
    release_freed_memory()
