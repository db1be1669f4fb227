"""Which program wrote an adapter folder, and what it recorded there about how the training encoded its texts.

Loads no model. What is looked at:

    mlx-lm           adapters.safetensors; adapter_config.json with its own keys
    ms-swift         args.json, in the checkpoint's folder, with all options
    Axolotl          README.md with its configuration as YAML
    LLaMA-Factory    README.md with its tag; training_args.yaml where LLaMA Board was used
    Unsloth, TRL     README.md with their tags
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorasmith.config.files import read_object, read_text
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.lora.files import ADAPTER_WEIGHTS

MLX_WEIGHTS = "adapters.safetensors"
PICKLED = "adapter_model.bin"
ARGS, CARD, BOARD = "args.json", "README.md", "training_args.yaml"
SWIFT_KEYS = frozenset({"swift_version", "template", "train_type", "tuner_type", "sft_type"})
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
TAGS = {"llama-factory": "LLaMA-Factory", "axolotl": "Axolotl", "unsloth": "Unsloth", "trl": "TRL"}  # the first counts
YAML_BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
FRONT = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)


@dataclass(frozen=True)
class Recorded:
    """What is known of an adapter of another program.

    file: where it was read, empty if the folder says nothing. template: the program's own name for its template.
    system: the system text, None if it is not recorded.
    """

    folder: Path
    program: str
    file: str = ""
    template: str = ""
    system: str | None = None
    base: str = ""  # the base model by its name on a hub; empty if only adapter_config.json names it
    thinking: bool | None = None  # the variable enable_thinking of the template
    is_plain: bool = False  # whether the training used no chat template

    @property
    def has_own_template(self) -> bool:
        """Whether the program trained with a template that it has under a name, not with one in Jinja."""
        return self.program in ("LLaMA-Factory", "ms-swift") and bool(self.template)

    @property
    def is_mlx(self) -> bool:
        """Whether the folder has the files of mlx-lm instead of PEFT's."""
        return self.program == "mlx-lm"


def recorded(path: Path) -> Recorded:
    """What the folder at `path`, or its newest checkpoint, says. Raises AdapterError if there is no adapter in it."""
    folder = _folder(path)
    config = read_object(folder / ADAPTER_CONFIG, AdapterError)
    if "lora_parameters" in config or "fine_tune_type" in config:
        return Recorded(folder, "mlx-lm", ADAPTER_CONFIG)
    if not (folder / ADAPTER_WEIGHTS).is_file() and (folder / PICKLED).is_file():
        raise AdapterError(
            _(
                "{file}: weights in pickle format can run code when they are read, so lorasmith does not read them. "
                "Load the adapter with PEFT and save it again: save_pretrained writes {wanted}.",
                file=folder / PICKLED,
                wanted=ADAPTER_WEIGHTS,
            )
        )
    # The files of a training may also be beside its checkpoints.
    places = [folder, folder.absolute().parent] if CHECKPOINT.fullmatch(folder.name) else [folder]
    for file in (place / ARGS for place in places if (place / ARGS).is_file()):
        args = read_object(file, AdapterError)
        if not SWIFT_KEYS.isdisjoint(args):
            return _ms_swift(folder, args)
    place = next((one for one in places if (one / CARD).is_file()), folder)
    card = read_text(place / CARD, AdapterError) if (place / CARD).is_file() else ""
    tags = _tags(card)
    program = next((name for tag, name in TAGS.items() if tag in tags), "PEFT")
    if "unsloth_fixed" in (config.get("auto_mapping") or {}):
        program = "Unsloth"
    if program == "Axolotl" and (block := YAML_BLOCK.search(card)):
        values = _values(block[1], place / CARD)
        return Recorded(folder, program, CARD, _axolotl(values), _system(values, "default_system_message"))
    board = next((one / BOARD for one in places if (one / BOARD).is_file()), None)
    if board is not None:
        values = _values(read_text(board, AdapterError), board)
        return Recorded(
            folder, "LLaMA-Factory", BOARD, _text(values, "template"), _system(values, "default_system"),
            _text(values, "model_name_or_path"), _flag(values, "enable_thinking"), values.get("stage") == "pt",
        )  # fmt: skip
    return Recorded(folder, program, CARD if program != "PEFT" and card else "")


def _ms_swift(folder: Path, args: Mapping[str, Any]) -> Recorded:
    """What the args.json of ms-swift says. A system message may be in a file, which is not here."""
    system, base = _system(args, "system"), _text(args, "model")
    if base and not args.get("use_hf") and not base.startswith(("/", ".", "~")) and not Path(base).exists():
        base = f"modelscope:{base}"
    return Recorded(
        folder, "ms-swift", ARGS, _text(args, "template"),
        None if system is not None and system.endswith(".txt") else system,
        base, _flag(args, "enable_thinking"), args.get("use_chat_template") is False,
    )  # fmt: skip


def _flag(values: Mapping[str, Any], key: str) -> bool | None:
    value = values.get(key)
    return value if isinstance(value, bool) else None


def _folder(path: Path) -> Path:
    """The folder with the adapter: `path`, or the newest checkpoint in it. Raises AdapterError."""
    if (path / ADAPTER_CONFIG).is_file():
        return path
    if not path.is_dir():
        raise AdapterError(_("{path}: the folder does not exist.", path=path))
    found = [(int(match[1]), inner) for inner in path.iterdir() if (match := CHECKPOINT.fullmatch(inner.name))]
    complete = [pair for pair in found if (pair[1] / ADAPTER_CONFIG).is_file()]
    if complete:
        return max(complete)[1]
    if (path / "config.json").is_file():
        raise AdapterError(
            _("{path}: this is a whole model, not an adapter. Use it as a base model: --model {path}", path=path)
        )
    raise AdapterError(
        _(
            "{path}: there is no adapter in it or in a folder checkpoint-NUMBER in it: {name} is missing. Give the "
            "folder that contains this file.",
            path=path,
            name=ADAPTER_CONFIG,
        )
    )


def _tags(card: str) -> set[str]:
    """The tags of a model card, in lower case."""
    front = FRONT.match(card)
    try:
        values = yaml.safe_load(front[1]) if front else {}
    except (yaml.YAMLError, RecursionError):
        return set()
    tags = values.get("tags") if isinstance(values, dict) else []
    return {str(tag).lower() for tag in tags} if isinstance(tags, list) else set()


def _values(text: str, file: Path) -> Mapping[str, Any]:
    """The keys and values of a YAML text. Raises AdapterError."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        values = None
    if isinstance(values, dict):
        return values
    raise AdapterError(
        _("{file}: the configuration in it is not valid YAML. Correct it, or remove it from the folder.", file=file)
    )


def _axolotl(values: Mapping[str, Any]) -> str:
    """The template of an Axolotl configuration: `alpaca` if all rows were written in that way."""
    datasets = values.get("datasets")
    types = {str(one.get("type")) for one in datasets if isinstance(one, dict)} if isinstance(datasets, list) else set()
    return "alpaca" if types == {"alpaca"} else _text(values, "chat_template")


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    return value if isinstance(value, str) else ""


def _system(values: Mapping[str, Any], key: str) -> str | None:
    """The system text; None if there is none, because the template may then have one of its own."""
    return _text(values, key) or None
