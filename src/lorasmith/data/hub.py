"""Read datasets through the package `datasets`: a folder that it saved, or a dataset on a hub (`org/name`).

The network is used only if there is no file of that name. The clients keep their own cache and environment variables
(HF_HUB_OFFLINE, HF_ENDPOINT, ...).
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorasmith.data.read.stream import Source
from lorasmith.data.rows.cells import drop_nulls
from lorasmith.errors import DataError, first_line
from lorasmith.i18n import _, listed
from lorasmith.loading.hub_client import failure_reason, quiet_hub

DATASET_NAME = re.compile(r"(?:(?P<hub>hf|modelscope):)?(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?", re.ASCII)
Rows = Iterator[tuple[str, object]]


def is_hub_name(name: str, suffixes: frozenset[str]) -> bool:
    """Whether `name` can be a dataset on a hub: org/name or org/name:config, optionally after hf: or modelscope:.

    Without a prefix it is taken for a missing file if its first part is an existing folder or it has one of `suffixes`.
    """
    match = DATASET_NAME.fullmatch(name)
    if match is None:
        return False
    folder, _slash, rest = match["id"].partition("/")
    is_file = os.path.isdir(folder) or os.path.splitext(rest)[1].lower() in suffixes  # noqa: PTH112, PTH122
    return match["hub"] is not None or not is_file


def hub_rows(source: Source) -> Rows:
    """The rows of a dataset on a hub, downloaded if it is not in the cache.

    Raises DataError if it cannot be downloaded or read; MissingExtraError if `datasets` is not installed.
    """
    match = DATASET_NAME.fullmatch(source.name)
    assert match is not None
    datasets = source.import_package("datasets")
    get = _modelscope if match["hub"] == "modelscope" else _hugging_face
    return _numbered(_train(get(match["id"], match["config"], source, datasets), source), source)


def folder_rows(source: Source) -> Rows:
    """The rows of a folder that `datasets` saved. Raises DataError, or MissingExtraError if it is not installed."""
    path = source.path
    if (path / "dataset_dict.json").exists():
        splits = sorted((file.parent for file in path.glob("*/state.json")), key=lambda split: split.name != "train")
        named = listed(map(str, splits)) or _("none")
        raise DataError(
            _(
                "{option}: {file} contains several splits. Give one of them: {named}.",
                **source.placeholders,
                named=named,
            )
        )
    datasets = source.import_package("datasets")
    try:
        rows = datasets.load_from_disk(os.fspath(path))
    except (OSError, ValueError) as error:
        raise _read_error(source, error) from error
    return _numbered(rows, source)


def _hugging_face(name: str, config: str | None, source: Source, datasets: Any) -> Any:
    """All splits, downloaded or from the cache."""
    hub = source.import_package("huggingface_hub")
    refused = (OSError, ValueError, RuntimeError, hub.errors.HTTPError, datasets.exceptions.DatasetsError)
    endpoint, reason = hub.constants.ENDPOINT, ""
    try:
        info = hub.HfApi().dataset_info(name, files_metadata=True, timeout=10)
        _announce_download(info, endpoint, source)
    except refused as error:
        reason = failure_reason(error, f"{endpoint}/datasets/{name}")
    try:
        with _offline(datasets) if reason else quiet_hub():
            splits = datasets.load_dataset(name, config)
    except refused as error:
        if isinstance(error, hub.errors.HTTPError | datasets.exceptions.DatasetNotFoundError):
            reason = reason or first_line(error)
        raise _download_error(source, endpoint, reason) if reason else _read_error(source, error) from error
    if reason:
        text = _(
            "{name}: using the cached copy, because the hub could not be reached or refused the request ({why}).",
            name=name,
            why=reason,
        )
        source.report.say(text)
    return splits


@contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Let `datasets` read only its cache inside the block; it would try to reach the hub for another 30 seconds."""
    before, verbosity = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    datasets.config.HF_HUB_OFFLINE = True
    datasets.logging.set_verbosity_error()  # it warns that it uses the cache, which we report ourselves
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
        datasets.logging.set_verbosity(verbosity)


def _modelscope(name: str, config: str | None, source: Source, datasets: Any) -> Any:
    """All splits, from files that the ModelScope client downloads."""
    modelscope = source.import_package("modelscope", "modelscope")
    source.report.say(_("Dataset {name} on ModelScope; downloaded unless it is already in the cache.", name=name))
    try:
        folder = modelscope.dataset_snapshot_download(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise _download_error(source, "https://modelscope.cn", first_line(error)) from error
    try:
        return datasets.load_dataset(str(folder), config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _read_error(source, error) from error


def _announce_download(info: Any, endpoint: str, source: Source) -> None:
    card = info.card_data or {}
    size = sum(file.size or 0 for file in info.siblings or ())
    source.report.say(
        _(
            "Dataset {name} on {endpoint}: {megabytes:.1f} MB, license {license}; downloaded unless it is "
            "already in the cache.",
            name=info.id,
            endpoint=endpoint,
            megabytes=size / 1e6,
            license=card.get("license") or _("not stated"),
        )
    )


def _download_error(source: Source, endpoint: str, why: str) -> DataError:
    return DataError(
        _(
            "{option}: {file} does not exist here and could not be downloaded as a dataset from {endpoint} "
            "({why}); it is not in the cache either. Give a file (JSON, JSONL, CSV, Parquet), or a folder "
            "saved by `datasets` on a machine with network access. To use a mirror, set HF_ENDPOINT.",
            **source.placeholders,
            endpoint=endpoint,
            why=why.rstrip("."),
        )
    )


def _read_error(source: Source, error: Exception) -> DataError:
    text = _("{option}: {file}: `datasets` cannot read it: {why}", **source.placeholders, why=first_line(error))
    if "config name" in text.lower():
        text += " " + _("Choose one with {file}:CONFIG.", file=source.name)
    return DataError(text)


def _train(splits: Any, source: Source) -> Any:
    """The split 'train', or the only one. Raises DataError if there is neither."""
    names = list(splits)
    if "train" not in names and len(names) != 1:
        raise DataError(
            _(
                "{option}: {file} has no split 'train', only {names}. Save one of them to a file and use that.",
                **source.placeholders,
                names=listed(map(repr, names)),
            )
        )
    return splits["train" if "train" in names else names[0]]


def _numbered(rows: Any, source: Source) -> Rows:
    total = len(rows)
    for number, row in enumerate(rows, 1):
        if number % 10_000 == 0:
            source.report.progress(source.task, number, total)
        yield f"{source.name} row {number}", drop_nulls(row)
