"""Finding the adapters in run folders, from their files alone, without loading a model."""

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorasmith.adapters.folder import NAME, AdapterFolder, find_adapter, find_model
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.adapter_config import ADAPTER_CONFIG, PEFT_DEFAULTS
from lorasmith.lora.files import ADAPTER_WEIGHTS
from lorasmith.runs.inspect import facts_of
from lorasmith.training.run_files import RUN_CONFIG

MODEL_NAME = re.compile(r"\w[\w.-]{0,99}")  # valid names of models in requests


@dataclass(frozen=True)
class DiscoveredAdapter:
    """An adapter on disk, by the name under which it is served. `summary` of its run; None if it is not in a run."""

    name: str
    adapter: AdapterFolder
    summary: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        """The adapter folder."""
        return self.adapter.path

    @property
    def hash(self) -> str:
        """SHA-256 of the content of its files; empty until the weights are read."""
        return self.adapter.hash

    def whole(self) -> "DiscoveredAdapter":
        """A copy with tensors and hash, which are read now. Raises AdapterError."""
        return replace(self, adapter=AdapterFolder.read(self.folder))

    def without_tensors(self) -> "DiscoveredAdapter":
        """A copy without its tensors, once they have been loaded elsewhere."""
        return replace(self, adapter=self.adapter.without_tensors())

    @property
    def internal(self) -> str:
        """Its name in the engine, which is unique to its content and contains no dot."""
        return f"{self.name.replace('.', '~')}@{self.hash[:12]}"

    @property
    def rank(self) -> int:
        """The largest rank of any of its modules."""
        raw: dict[str, Any] = PEFT_DEFAULTS | dict(self.adapter.peft_config)
        return int(max([raw["r"], *(raw.get("rank_pattern") or {}).values()]))

    @property
    def data(self) -> list[str]:
        """Names of the files it was trained on; empty if it was made by another tool."""
        return [Path(name).name for name in self.adapter.notes.get("data", [])]

    @property
    def loss(self) -> float | None:
        """Held-out loss after training, in nats per token."""
        return (self.summary or {}).get("loss_after")


@dataclass(frozen=True)
class Discovery:
    """The adapters found at startup, messages about those that cannot be served, and the folders of runs (`roots`).

    models: the models of runs that trained all weights. paths: where they were looked for.
    """

    adapters: dict[str, DiscoveredAdapter] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    roots: list[Path] = field(default_factory=list)
    models: list[Path] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)


def discover(paths: Sequence[Path]) -> Discovery:
    """Find all adapters in these paths: folders of runs, run folders or adapter folders.

    Raises AdapterError if a path does not exist.
    """
    missing = [_("{path}: the folder does not exist.", path=path) for path in paths if not path.is_dir()]
    if missing:
        raise AdapterError(*missing)
    discovery = Discovery(paths=list(paths))
    for path in paths:
        if _is_run_or_adapter(path):
            _add(discovery, path)
            continue
        discovery.roots.append(path)
        for inner in sorted(path.iterdir()):
            if inner.is_dir() and not inner.name.startswith(".") and _is_run_or_adapter(inner):
                _add(discovery, inner)
    return discovery


def describe(name: str, path: Path) -> DiscoveredAdapter:
    """The adapter of a run or adapter folder, without reading its weights. Raises AdapterError."""
    return _discovered(name, path, AdapterFolder.read_header(find_adapter(path)))


def read(name: str, place: Path) -> DiscoveredAdapter:
    """The adapter of a run or adapter folder, with its tensors and hash. Raises AdapterError."""
    return _discovered(name, place, AdapterFolder.read(find_adapter(place)))


def _discovered(name: str, place: Path, adapter: AdapterFolder) -> DiscoveredAdapter:
    return DiscoveredAdapter(name, adapter, facts_of(adapter, place)["summary"])  # raises AdapterError too


def resolve_inside(roots: Collection[Path], relative: str) -> Path:
    """The run or adapter folder at the path `relative` in one of `roots`.

    Raises AdapterError if it does not exist, or if the path or a link leads out of the root.
    """
    asked = Path(relative)
    if asked.is_absolute() or ".." in asked.parts or "\\" in relative or "\0" in relative:
        text = _(
            "path {path!r}: must be a relative path without '..'; it is looked up in the folder of runs.", path=relative
        )
        raise AdapterError(text)
    if not roots:
        raise AdapterError(
            _(
                "this server was started with individual runs and cannot load others: start it on the folder that "
                "holds the runs."
            )
        )
    for root in (root.resolve() for root in roots):
        place = root / asked
        if not os.path.isdir(place):  # noqa: PTH112 (Path.is_dir raises if a name is too long)
            continue
        folder = find_adapter(place)
        files = [place, folder, *(folder / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, NAME))]
        if not all(file.resolve().is_relative_to(root) for file in files):
            raise AdapterError(_("path {path!r}: a link points outside the folder of runs.", path=relative))
        return place
    raise AdapterError(_("path {path!r}: does not exist in the folder of runs.", path=relative))


def _is_run_or_adapter(path: Path) -> bool:
    """Whether the folder looks like a run or an adapter, even an incomplete one."""
    return any((path / name).is_file() for name in (ADAPTER_CONFIG, RUN_CONFIG)) or (path / "adapter").is_dir()


def _add(discovery: Discovery, path: Path) -> None:
    if (model := find_model(path)) is not None:
        discovery.models.append(model)
        return
    full = path.resolve()
    name = full.parent.name if full.name == "adapter" else full.name
    if not MODEL_NAME.fullmatch(name):
        discovery.problems.append(
            _("{path}: a model name may only contain letters, digits, '-', '.' and '_'. Rename the folder.", path=path)
        )
    elif name in discovery.adapters:
        other = discovery.adapters[name].folder
        discovery.problems.append(_("{path}: {other} has the same name. Rename one of them.", path=path, other=other))
    else:
        try:
            discovery.adapters[name] = describe(name, path)
        except AdapterError as error:
            discovery.problems.extend(error.problems)
