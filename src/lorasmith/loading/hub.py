"""Download models from a hub: `org/name` from Hugging Face, `modelscope:org/name` from ModelScope.

The clients keep their own cache and environment variables (HF_HOME, HF_ENDPOINT, HF_TOKEN, ...). The network is used
only if no folder of that name exists and the model is not in the cache.
"""

import math
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from lorasmith.errors import MissingExtraError, ModelError, first_line
from lorasmith.i18n import _
from lorasmith.loading.hub_client import failure_reason, progress_bar_class, quiet_hub
from lorasmith.report import Report

HUB_NAME = re.compile(r"(?:(?P<hub>hf|modelscope):)?(?P<id>[\w.-]+/[\w.-]+)", re.ASCII)
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]  # to download: no pickled weights


def is_hub_name(name: str) -> bool:
    """Whether `name` can be the name of a model on a hub.

    If its first part is an existing folder, it is taken for the path of a folder that does not exist.
    """
    match = HUB_NAME.fullmatch(name)
    return match is not None and (match["hub"] is not None or not Path(match["id"]).parent.is_dir())


def hub_folder(name: str, report: Report) -> Path:
    """The folder of the model in the cache of the hub's client, downloaded if it is not there.

    Raises ModelError if it cannot be downloaded, MissingExtraError if the ModelScope client is not installed.
    """
    match = HUB_NAME.fullmatch(name)
    assert match is not None
    return (_modelscope if match["hub"] == "modelscope" else _hugging_face)(match["id"], report)


def _hugging_face(name: str, report: Report) -> Path:
    hub: Any = import_module("huggingface_hub")
    refused = (OSError, ValueError, RuntimeError, hub.errors.HTTPError)
    try:  # with the same allow_patterns, or the client considers a cache without the other files incomplete
        cached = Path(hub.snapshot_download(name, allow_patterns=FILES, local_files_only=True))
        if any(cached.glob("*.safetensors")):
            return cached
    except refused:
        pass  # not in the cache, or incomplete
    try:
        info = hub.HfApi().model_info(name, files_metadata=True, timeout=10)
        total = _announce_download(info, hub.constants.ENDPOINT, report)
        task = _("downloading {name}", name=name)
        with quiet_hub():
            folder = hub.snapshot_download(
                name, allow_patterns=FILES, tqdm_class=progress_bar_class(report, task, total)
            )
        report.progress(task, total, total)
        return Path(folder)
    except refused as error:
        why = failure_reason(error, f"{hub.constants.ENDPOINT}/{name}")
        raise _download_error(name, hub.constants.ENDPOINT, why) from error


def _modelscope(name: str, report: Report) -> Path:
    try:
        modelscope: Any = import_module("modelscope")
    except ImportError:
        text = _(
            "model.model: {name} requires the ModelScope client. Install it with: pip install 'lorasmith[modelscope]'",
            name=name,
        )
        raise MissingExtraError(text) from None
    report.say(_("Model {name} on ModelScope; downloaded unless it is already in the cache.", name=name))
    try:
        return Path(modelscope.snapshot_download(name))
    except (OSError, ValueError, RuntimeError) as error:
        raise _download_error(name, "https://modelscope.cn", first_line(error).rstrip(".")) from error


def _announce_download(info: Any, endpoint: str, report: Report) -> int:
    """Report size and license; return the megabytes of all files to download, partly downloaded ones in full."""
    card, sizes = info.card_data or {}, {Path(file.rfilename): file.size or 0 for file in info.siblings or ()}
    size = sum(size for path, size in sizes.items() if path.match("*.safetensors"))
    report.say(
        _(
            "Model {name} on {endpoint}: {megabytes:,.0f} MB of weights, license {license}; downloaded once.",
            name=info.id,
            endpoint=endpoint,
            megabytes=size / 1e6,
            license=card.get("license") or _("not stated"),
        )
    )
    return max(1, math.ceil(sum(size for path, size in sizes.items() if any(map(path.match, FILES))) / 1e6))


def _download_error(name: str, endpoint: str, why: str) -> ModelError:
    return ModelError(
        _(
            "model.model: {name!r} is not a folder or GGUF file on this machine, and it could not be "
            "downloaded as a model from {endpoint} ({why}); it is not in the cache either. Give a folder in "
            "Hugging Face format, or download the model on a machine with network access. To use a mirror, set "
            "HF_ENDPOINT.",
            name=name,
            endpoint=endpoint,
            why=why,
        )
    )
