"""A base model with trained adapters attached, ready to chat, to be evaluated or to be merged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.adapters.folder import AdapterFolder, end_ids, find_adapter, find_model
from lorasmith.adapters.foreign import ends_without_rows
from lorasmith.config.data import DataConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.values import check
from lorasmith.data.rows.conversation import Message
from lorasmith.data.template.encoding import Template
from lorasmith.engine.engine import Engine, replies
from lorasmith.engine.request import Request
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.i18n import _, listed
from lorasmith.loading.load import load_base
from lorasmith.model.base import Base
from lorasmith.model.vocabulary import embedding_rows
from lorasmith.report import Report
from lorasmith.system.autograd import autograd_on
from lorasmith.system.device import choose_device, choose_dtype


@dataclass(frozen=True)
class Session:
    """A loaded base model, its adapters by name, and the template that all of them were trained with.

    model: its folder if it is that of a run which trained all weights; there are no adapters then.
    """

    base: Base
    template: Template
    folders: dict[str, AdapterFolder]
    model: Path | None = None

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order in which they were given."""
        return list(self.folders)

    @autograd_on()
    def reply(
        self, conversations: Sequence[Sequence[Message]], adapter: str | None, sampling: SamplingConfig | None = None
    ) -> list[str]:
        """An answer to each conversation, decoded in one batch; with `adapter` None, by the base model alone."""
        requests = [
            Request(
                self.template.encode_prompt(messages), sampling or SamplingConfig(), adapter, self.template.stop_ids
            )
            for messages in conversations
        ]
        return [reply.text for reply in replies(Engine(self.base), requests)]

    def generate(self, prompt: str | Sequence[str], adapter: str | None = "", **sampling: Any) -> Any:
        """The answer to a prompt, or a list of answers to a list of prompts.

        Args:
            prompt: one or several user messages.
            adapter: one of `names`, or None for the base model alone; the first adapter by default, if there is one.
            sampling: any field of `SamplingConfig`, such as temperature, top_p or max_new_tokens.

        Raises:
            ConfigError: an option is unknown or has an invalid value.
        """
        settings = check(SamplingConfig, sampling, "sampling")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        name = next(iter(self.names), None) if adapter == "" else adapter
        answers = self.reply([(Message("user", text),) for text in prompts], name, settings)
        return answers[0] if isinstance(prompt, str) else answers


@autograd_on()
def open_adapters(
    paths: Sequence[str | Path],
    config: ModelConfig | None = None,
    report: Report | None = None,
    tells_template: bool = True,
) -> Session:
    """Load the base model that the first adapter names (or `config.model`) in eval mode, and attach every adapter.

    tells_template: whether to report which template an adapter of another tool is used with.

    Raises:
        AdapterError: a path contains no adapter, an adapter belongs to another base model or tokenizer, or the
            adapters were trained with different templates.
        ModelError: the base model cannot be loaded.
    """
    report = report or Report()
    if (whole := _whole_model(paths, config or ModelConfig(), report)) is not None:
        return whole
    folders = _named([AdapterFolder.read(find_adapter(Path(path).expanduser())) for path in paths])
    base = load_base(base_settings(next(iter(folders.values())), config or ModelConfig(), report), report)
    templates = {}
    for name, folder in folders.items():
        templates[name] = folder.template(base)
        rows, lacking = embedding_rows(base), ends_without_rows(base, folder.by_peft_keys(base, folder.tensors))
        folder.load_into(base, name)
        if lacking and embedding_rows(base) > rows:
            report.warn(
                _(
                    "{folder}: the adapter adds tokens ({count}), but does not contain their rows of {names}. The mean "
                    "of the other rows is used there, which may differ from the training.",
                    folder=folder.path,
                    count=embedding_rows(base) - rows,
                    names=listed(lacking),
                )
            )
        if folder.metadata is None and tells_template:
            tell_template(folder, templates[name].tokenizer is not base.tokenizer, report)
    template = next(iter(templates.values()))
    for name, other in templates.items():
        same_tokens = (
            other.tokenizer is template.tokenizer or other.tokenizer.get_vocab() == template.tokenizer.get_vocab()
        )
        if other.to_json() != template.to_json() or not same_tokens:
            raise AdapterError(
                _(
                    "{first} and {name} were trained with different templates. Load each of them separately.",
                    first=next(iter(folders)),
                    name=name,
                )
            )
    base.router.active = next(iter(folders))
    base.tokenizer = template.tokenizer  # which may have more tokens
    base.model.eval()
    return Session(base, template, {name: folder.without_tensors() for name, folder in folders.items()})


def _whole_model(paths: Sequence[str | Path], config: ModelConfig, report: Report) -> Session | None:
    """The model of a run that trained all weights, if `paths` is one; None otherwise.

    Raises AdapterError for other paths beside it, ConfigError for another base model.
    """
    found = [model for path in paths if (model := find_model(Path(path).expanduser())) is not None]
    if not found:
        return None
    if len(paths) > 1:
        raise AdapterError(
            _("{path}: the model of a run that trained all weights is loaded alone. Give only this one.", path=found[0])
        )
    if "model" in config.model_fields_set:
        text = _(
            "--model: the run trained all weights and is a model itself, in {path}. Leave --model out.", path=found[0]
        )
        raise ConfigError(text)
    base = load_base(config.model_copy(update={"model": str(found[0])}), report)
    base.model.eval()
    return Session(base, Template.from_config(base.tokenizer, DataConfig(), end_ids(base)), {}, found[0])


def tell_template(folder: AdapterFolder, has_own: bool, report: Report) -> None:
    """Report which template an adapter of another tool is used with."""
    if has_own:
        report.say(
            _(
                "{folder}: the adapter was made by another tool; the tokenizer and chat template in its folder are "
                "used.",
                folder=folder.path,
            )
        )
        return
    report.warn(
        _(
            "{folder}: the adapter was made by another tool, so the model's own chat template is used.",
            folder=folder.path,
        )
    )


def base_settings(adapter: AdapterFolder | None, config: ModelConfig, report: Report) -> ModelConfig:
    """How to load the base model: as `config` says, and otherwise as it was loaded when the adapter was trained."""
    settings = config.model_dump(exclude_unset=True)
    if adapter is not None:
        settings["model"] = settings.get("model") or adapter.base
        settings.setdefault("quantize", adapter.notes.get("quantize", "none"))
        if settings.get("dtype", "auto") == "auto":
            settings["dtype"] = _trained_dtype(adapter, settings.get("device", "auto"), report)
    return ModelConfig(**settings)


def _trained_dtype(adapter: AdapterFolder, device: str, report: Report) -> str:
    """The dtype of the base model in training, so that results match; auto if this processor does not have it."""
    trained = str(adapter.notes.get("dtype", "auto"))
    chosen, why = choose_dtype("auto", choose_device(device)[0], saves_memory=True)
    if trained in ("auto", "float32", "float64") or trained == str(chosen).removeprefix("torch."):
        return trained
    text = _(
        "The adapter was trained with the base model in {dtype}; here it runs in {here}: {why}",
        dtype=trained,
        here=chosen,
        why=why,
    )
    report.say(text)
    return "auto"


def _named(folders: Sequence[AdapterFolder]) -> dict[str, AdapterFolder]:
    """The adapter folders by name: the name of the folder or its run, with a number appended to duplicates."""
    named: dict[str, AdapterFolder] = {}
    for folder in folders:
        full = folder.path.resolve()
        stem = (full.parent.name if full.name == "adapter" else full.name).replace(".", "-") or "adapter"
        name, number = stem, 2
        while name in named:
            name, number = f"{stem}-{number}", number + 1
        named[name] = folder
    return named
