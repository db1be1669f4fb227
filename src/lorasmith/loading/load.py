"""From a folder, a GGUF file, the demo's or a hub's name to a Base. safetensors only; offline but for a hub's name."""

import difflib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lorasmith.config.files import read_object
from lorasmith.config.model import ModelConfig
from lorasmith.errors import ModelError, first_line
from lorasmith.i18n import _, listed
from lorasmith.loading.gguf import PACKAGED, cached_gguf, packaged_model
from lorasmith.loading.hub import hub_folder, is_hub_name
from lorasmith.loading.weights import is_stored_as, tensor_by_tensor
from lorasmith.model.base import Base, positions_of
from lorasmith.model.fits import REFUSALS, config_problems, left_over, refused
from lorasmith.model.probe import probe
from lorasmith.model.verify import recognise
from lorasmith.report import Report
from lorasmith.system.device import choose_device, choose_dtype, use_all_cores
from lorasmith.system.gc_pause import gc_paused
from lorasmith.system.memory import keep_freed_memory
from lorasmith.system.transformers_logging import quiet_transformers


@gc_paused()
def load_base(config: ModelConfig, report: Report | None = None) -> Base:
    """Load, check and probe the base model. Its dropouts are zero, its parameters frozen, `train()` equals `eval()`.

    Raises:
        ModelError: nothing there, no tokenizer, pickled weights, remote code without leave, an unknown architecture.
    """
    report = report or Report()
    folder = find_folder(config.model, report)
    _check_folder(folder, config.trust_remote_code)
    device, why_device = choose_device(config.device)
    dtype, why_dtype = choose_dtype(config.dtype, device)
    use_all_cores()
    if device.type == "cpu":
        keep_freed_memory()
    settings = _without_dropout(_read_config(folder, config.trust_remote_code))
    tokenizer = load_tokenizer(folder, config.trust_remote_code)
    try:
        mapped = is_stored_as(folder, dtype)
        with quiet_transformers(), nullcontext() if mapped else tensor_by_tensor():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=settings, dtype=dtype, use_safetensors=True, local_files_only=True,
                trust_remote_code=config.trust_remote_code, output_loading_info=True,
            )  # fmt: skip
    except REFUSALS as error:
        raise refused(folder, error, settings) from error
    model, info = loaded
    if info["missing_keys"]:  # transformers would fill them with random numbers
        keys = listed(sorted(info["missing_keys"])[:3])
        raise ModelError(
            _("{folder}: missing weights {keys}; the model's files are incomplete.", folder=folder, keys=keys)
        )
    if problems := left_over(folder, model, info["unexpected_keys"]):
        raise ModelError(*problems)
    model.requires_grad_(False)
    nn.Module.to(model, device)
    base = Base(model.train(), tokenizer, config.model, folder, dtype, device)
    base.why |= {"device": why_device, "dtype": why_dtype}
    with quiet_transformers():  # it warns where a model's attention cannot be chosen: the verdict says so
        recognise(base.model)
        probe(base)
    return base


def find_folder(name: str, report: Report) -> Path:
    """The folder with the model's files; converts a GGUF once, asks a hub for `org/name`. Raises ModelError."""
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
    hint = difflib.get_close_matches(name, [*PACKAGED, *_neighbours(path)], n=1)
    text = _("model.model: {name!r} is not a folder or GGUF file on this machine.", name=name)
    raise ModelError(text + (" " + _("Did you mean {close!r}?", close=hint[0]) if hint else ""))


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises ModelError where it is missing or unreadable."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ModelError(
            _(
                "{folder}: no tokenizer found (tokenizer.json). Copy the tokenizer files of the same model there.",
                folder=folder,
            )
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except REFUSALS as error:
        raise ModelError(
            _("{folder}: the tokenizer cannot be read: {error}", folder=folder, error=first_line(error))
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            _(
                "{folder}: the tokenizer has no eos_token, so a reply would never end. Set eos_token in its "
                "tokenizer_config.json.",
                folder=folder,
            )
        )
    return tokenizer


def max_positions(folder: Path, trust_remote_code: bool = False) -> int | None:
    """Tokens that the model in `folder` can look at, from its config alone; None where it does not say."""
    return positions_of(_read_config(folder, trust_remote_code))


def _check_folder(folder: Path, trust_remote_code: bool) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(_("{folder} is not a model folder: it does not contain config.json.", folder=folder))
    config = read_object(folder / "config.json", ModelError)
    if problems := config_problems(folder / "config.json", config):
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


def _read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]
    except REFUSALS as error:
        raise refused(folder, error) from error


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Every field that is a dropout set to zero, also of parts: the base is frozen, and train() must equal eval()."""
    parts: list[Any] = [config, *(v for v in vars(config).values() if isinstance(v, PretrainedConfig))]
    for part in parts:
        for key, value in vars(part).items():
            if (
                ("drop" in key or key.endswith("pdrop"))
                and isinstance(value, int | float)
                and not isinstance(value, bool)
            ):
                setattr(part, key, type(value)(0))
    return config


def _neighbours(path: Path) -> list[str]:
    return [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
