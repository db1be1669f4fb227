"""The folder of a model: find it by the name that the user gave, check what it contains, and read its config."""

import difflib
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from lorasmith.config.files import read_object
from lorasmith.errors import ModelError
from lorasmith.i18n import _
from lorasmith.loading.gguf import PACKAGED, cached_gguf, packaged_model
from lorasmith.loading.hub import hub_folder, is_hub_name
from lorasmith.loading.validate import LOAD_ERRORS, config_problems, load_error, quantization_problems
from lorasmith.model.base import positions_of
from lorasmith.report import Report
from lorasmith.system.transformers_logging import quiet_transformers


def find_folder(name: str, report: Report) -> Path:
    """The folder with the model's files.

    name: a folder; a GGUF file, which is converted once; the model of the demo; or `org/name` on a hub, which is
    downloaded if it is not in the cache. Raises ModelError if there is no such model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return cached_gguf(path, report)
        raise ModelError(_("model.model: {path} is a file. Give the model's folder, or a .gguf file.", path=path))
    if name in PACKAGED:
        return packaged_model(name, report)
    if is_hub_name(name):
        return hub_folder(name, report)
    hint = difflib.get_close_matches(name, [*PACKAGED, *_neighbors(path)], n=1)
    text = _("model.model: {name!r} is not a folder or GGUF file on this machine.", name=name)
    raise ModelError(text + (" " + _("Did you mean {close!r}?", close=hint[0]) if hint else ""))


def check_folder(folder: Path, trust_remote_code: bool) -> None:
    """Raise ModelError if the folder lacks a file, its config is invalid, or its weights or code must not be run."""
    if not (folder / "config.json").is_file():
        raise ModelError(_("{folder} is not a model folder: it does not contain config.json.", folder=folder))
    config = read_object(folder / "config.json", ModelError)
    if problems := config_problems(folder / "config.json", config):
        raise ModelError(*problems)
    if problems := quantization_problems(folder / "config.json", config):
        raise ModelError(*problems)
    if "auto_map" in config and not trust_remote_code:
        raise ModelError(
            _(
                "{folder}: this model comes with its own Python code. If you trust it, use --trust-remote-code.",
                folder=folder,
            )
        )
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise ModelError(
                _(
                    "{folder}: the weights are pickle files, which can run code when they are loaded. Save the "
                    "model as safetensors.",
                    folder=folder,
                )
            )
        raise ModelError(_("{folder}: no weights found (model.safetensors).", folder=folder))


def read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a model folder, without a pad token that was added to the tokenizer only: nothing pads with it.

    Raises ModelError if transformers cannot read it.
    """
    try:
        with quiet_transformers():  # it warns of such a pad token, with which it cannot load the model
            config: PretrainedConfig = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except LOAD_ERRORS as error:
        raise load_error(folder, error) from error
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        pad, size = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(size, int) and pad >= size:
            part.pad_token_id = None
    return config


def max_positions(folder: Path, trust_remote_code: bool = False) -> int | None:
    """Context length in tokens of the model in `folder`, or None if its config does not say. Reads no weights."""
    return positions_of(read_config(folder, trust_remote_code))


def eos_ids(folder: Path) -> tuple[int, ...]:
    """The EOS tokens of the generation config in `folder`, or of its config; empty if they name none."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = read_object(path, ModelError).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return (found,) if isinstance(found, int) else tuple(found)
    return ()


def _neighbors(path: Path) -> list[str]:
    return [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
