"""A base of a hub: `org/name` of Hugging Face, `modelscope:org/name`; its cache and its variables are its client's own.

A hub is asked only where its name is given, no such folder is here, and the cache does not hold it already.
"""

import math
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from lorasmith.errors import MissingExtraError, ModelError, first_line
from lorasmith.i18n import _
from lorasmith.loading.hub_client import bar_of, quiet_hub, why_refused
from lorasmith.report import Report

NAME = re.compile(r"(?:(?P<hub>hf|modelscope):)?(?P<id>[\w.-]+/[\w.-]+)", re.ASCII)
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]  # no pickled weights


def is_hub_name(name: str) -> bool:
    """Whether it can name a model of a hub; what lies in a folder that exists is a folder that is missing."""
    match = NAME.fullmatch(name)
    return match is not None and (match["hub"] is not None or not Path(match["id"]).parent.is_dir())


def hub_folder(name: str, report: Report) -> Path:
    """The folder with the model's files in the client's cache; fetched where it is not there.

    Raises ModelError that says what was tried and how to go on from a folder; MissingExtraError without the client.
    """
    match = NAME.fullmatch(name)
    assert match is not None
    return (_modelscope if match["hub"] == "modelscope" else _hugging_face)(match["id"], report)


def _hugging_face(name: str, report: Report) -> Path:
    hub: Any = import_module("huggingface_hub")
    refused = (OSError, ValueError, RuntimeError, hub.errors.HTTPError)
    try:  # of the same files: else the client takes a cache without the others for half of one
        kept = Path(hub.snapshot_download(name, allow_patterns=FILES, local_files_only=True))
        if any(kept.glob("*.safetensors")):
            return kept
    except refused:
        pass  # nothing of it is in the cache, or not all
    try:
        info = hub.HfApi().model_info(name, files_metadata=True, timeout=10)
        total = _say_what_comes(info, hub.constants.ENDPOINT, report)
        task = _("downloading {name}", name=name)
        with quiet_hub():
            folder = hub.snapshot_download(name, allow_patterns=FILES, tqdm_class=bar_of(report, task, total))
        report.progress(task, total, total)
        return Path(folder)
    except refused as error:
        why = why_refused(error, f"{hub.constants.ENDPOINT}/{name}")
        raise _unreachable(name, hub.constants.ENDPOINT, why) from error


def _modelscope(name: str, report: Report) -> Path:
    try:
        modelscope: Any = import_module("modelscope")
    except ImportError:
        text = _(
            "model.model: {name} requires the ModelScope client. Install it with: pip install 'lorasmith[modelscope]'",
            name=name,
        )
        raise MissingExtraError(text) from None
    report.say(_("Model {name} on ModelScope; downloaded unless it is in the cache.", name=name))
    try:
        return Path(modelscope.snapshot_download(name))
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreachable(name, "https://modelscope.cn", first_line(error).rstrip(".")) from error


def _say_what_comes(info: Any, endpoint: str, report: Report) -> int:
    """The megabytes of all files that come, begun ones included."""
    card, sizes = info.card_data or {}, {Path(file.rfilename): file.size or 0 for file in info.siblings or ()}
    size = sum(size for path, size in sizes.items() if path.match("*.safetensors"))
    report.say(
        _(
            "Model {name} on {endpoint}: {megabytes:,.0f} MB of weights, licence {licence}; downloaded once.",
            name=info.id,
            endpoint=endpoint,
            megabytes=size / 1e6,
            licence=card.get("license") or _("not stated"),
        )
    )
    return max(1, math.ceil(sum(size for path, size in sizes.items() if any(map(path.match, FILES))) / 1e6))


def _unreachable(name: str, endpoint: str, why: str) -> ModelError:
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
