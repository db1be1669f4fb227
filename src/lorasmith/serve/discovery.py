"""Which adapters a folder of runs holds, by their files alone; what cannot be served is told with its reason."""

import hashlib
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.adapters.folder import NAME, find_adapter
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.files import CONFIG, WEIGHTS
from lorasmith.runs.inspect import inspect_folder
from lorasmith.training.files import CONFIG as RUN_CONFIG

ALLOWED = re.compile(r"\w[\w.-]{0,99}")  # of a name, which is what requests say


@dataclass(frozen=True)
class DiscoveredAdapter:
    """An adapter on disk. `hash`: SHA-256 of its files' content; `facts`: see inspection.inspect_folder."""

    name: str
    folder: Path
    hash: str
    facts: dict[str, Any]

    @property
    def internal(self) -> str:
        """Its name inside the engine: another one whenever its content is another, and without a dot."""
        return f"{self.name.replace('.', '~')}@{self.hash[:12]}"

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return int(max([self.facts["r"] or 0, *self.facts["rank_pattern"].values()]))

    @property
    def data(self) -> list[str]:
        """Names of the files that it learned from; none where another tool made it."""
        return [Path(name).name for name in (self.facts["notes"] or {}).get("data", [])]

    @property
    def loss(self) -> float | None:
        """Held-out loss after the training, in nats a token."""
        return (self.facts["summary"] or {}).get("loss_after")


@dataclass(frozen=True)
class Discovery:
    """What was found at the start. `roots`: the folders under which later adapters may lie."""

    adapters: dict[str, DiscoveredAdapter] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    roots: list[Path] = field(default_factory=list)


def discover(paths: Sequence[Path]) -> Discovery:
    """Every adapter in these folders of runs, runs and adapter folders. Raises AdapterError where one is not there."""
    missing = [_("{path}: the folder does not exist.", path=path) for path in paths if not path.is_dir()]
    if missing:
        raise AdapterError(*missing)
    discovery = Discovery()
    for path in paths:
        if _is_own(path):
            _put(discovery, path)
            continue
        discovery.roots.append(path)
        for inner in sorted(path.iterdir()):
            if inner.is_dir() and not inner.name.startswith(".") and _is_own(inner):
                _put(discovery, inner)
    return discovery


def describe(name: str, path: Path) -> DiscoveredAdapter:
    """The adapter of a run or adapter folder, under this name. Raises AdapterError."""
    facts = inspect_folder(path)
    folder = Path(facts["folder"])
    return DiscoveredAdapter(name, folder, content_hash(folder), facts)


def content_hash(folder: Path) -> str:
    """SHA-256 over the files that decide what the adapter answers."""
    total = hashlib.sha256()
    for path in (folder / name for name in (CONFIG, WEIGHTS, NAME)):
        if path.is_file():
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def inside(roots: Collection[Path], relative: str) -> Path:
    """The run or adapter folder at `relative` under one of `roots`. Raises AdapterError for any way out of them."""
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
        if not os.path.isdir(place):  # noqa: PTH112 (Path.is_dir raises where a name is too long)
            continue
        folder = find_adapter(place)
        files = [place, folder, *(folder / name for name in (CONFIG, WEIGHTS, NAME))]
        if not all(file.resolve().is_relative_to(root) for file in files):
            raise AdapterError(_("path {path!r}: a link points outside the folder of runs.", path=relative))
        return place
    raise AdapterError(_("path {path!r}: does not exist in the folder of runs.", path=relative))


def _is_own(path: Path) -> bool:
    """Whether it looks like a run or an adapter, whole or not."""
    return any((path / name).is_file() for name in (CONFIG, RUN_CONFIG)) or (path / "adapter").is_dir()


def _put(discovery: Discovery, path: Path) -> None:
    full = path.resolve()
    name = full.parent.name if full.name == "adapter" else full.name
    if not ALLOWED.fullmatch(name):
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
