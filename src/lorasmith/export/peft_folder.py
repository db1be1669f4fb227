"""Exporting an adapter to a folder for a hub: PEFT's files, the chat template and a model card, without own paths."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.adapters.folder import NAME, AdapterFolder, find_adapter
from lorasmith.adapters.output import output_folder
from lorasmith.adapters.session import open_adapters
from lorasmith.config.files import read_object
from lorasmith.config.model import ModelConfig
from lorasmith.config.toml import Config, load_config
from lorasmith.errors import RunError
from lorasmith.export.origin import license_of
from lorasmith.i18n import _
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.lora.files import ADAPTER_WEIGHTS
from lorasmith.report import Report
from lorasmith.version import installed_version

FILES = ("summary.json", "environment.json")
CARD, TEMPLATE = "README.md", "chat_template.jinja"
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def export_peft(
    path: str | Path,
    output: str | Path,
    config: ModelConfig | None = None,
    overwrite: bool = False,
    report: Report | None = None,
    base_name: str | None = None,
) -> Path:
    """Write the adapter of a run or adapter folder to the folder `output`.

    base_name: the base model's name on the hub; by default the name that the adapter has for it, without folders.

    Raises:
        RunError: `output` exists and is not to be replaced, or cannot be written.
        AdapterError: there is no adapter, or it does not fit the base model.
    """
    report, run = report or Report(), Path(path).expanduser()
    with output_folder(output, overwrite, "adapter") as folder:
        source = AdapterFolder.read_header(find_adapter(run))
        folder.spare([source.path])
        session = open_adapters([source.path], config or ModelConfig(), report)
        card = _Card(
            folder.path.resolve().name, base_name or _without_folders(source.base), source,
            session.template.system, license_of(session.base.folder), *_of_run(run),
        )  # fmt: skip
        if "/" not in card.base:
            report.warn(
                _(
                    "the card names the base model {name}. On a hub, other programs look it up: give its name there "
                    "with --base-name ORG/NAME.",
                    name=card.base,
                )
            )

        def fill(staging: Path) -> None:
            shutil.copyfile(source.path / ADAPTER_WEIGHTS, staging / ADAPTER_WEIGHTS)
            for name in COPIED:
                if (source.path / name).is_file():
                    shutil.copyfile(source.path / name, staging / name)
            settings = dict(source.peft_config) | {"base_model_name_or_path": card.base}
            _write_json(staging / ADAPTER_CONFIG, settings)
            if source.metadata is not None:
                _write_json(staging / NAME, _public(source.metadata, card.base))
            (staging / TEMPLATE).write_text(session.template.as_jinja(), "utf-8")
            (staging / CARD).write_text(card.text(), "utf-8")
            AdapterFolder.read(staging)  # raises AdapterError for what cannot be read again

        folder.write(fill)
    return folder.path


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _public(metadata: Mapping[str, Any], base: str) -> dict[str, Any]:
    """lorasmith.json with names instead of paths."""
    notes = {key: _named(value) for key, value in dict(metadata.get("notes") or {}).items()}
    return dict(metadata) | {"base": dict(metadata["base"]) | {"model": base}, "notes": notes}


def _named(value: Any) -> Any:
    if isinstance(value, list):
        return [_named(one) for one in value]
    if isinstance(value, dict):
        return {key: _named(one) for key, one in value.items()}
    return _without_folders(value) if isinstance(value, str) and Path(value).is_absolute() else value


def _without_folders(name: str) -> str:
    """A name on a hub as it is, and the last part of a path."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name


def _of_run(run: Path) -> tuple[Config | None, dict[str, Any], dict[str, Any]]:
    """The configuration, the results and the environment of a run; empty for an adapter without its run."""
    if not (run / "config.toml").is_file():
        return None, {}, {}
    found = [read_object(run / name, RunError) if (run / name).is_file() else {} for name in FILES]
    return load_config(run / "config.toml", {}), found[0], found[1]


@dataclass(frozen=True)
class _Card:
    """The model card, in the form of hubs: metadata as YAML, then Markdown in English."""

    title: str
    base: str
    source: AdapterFolder
    system: str
    license: str | None
    config: Config | None
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]

    def text(self) -> str:
        """The whole card."""
        parts = [self._front(), f"# {self.title}\n", f"A LoRA adapter for {self.base}, trained with lorasmith.\n"]
        return "\n".join([*parts, *self._results(), *self._training(), self._use()])

    def _front(self) -> str:
        lines = [f"base_model: {self.base}", "library_name: peft", "pipeline_tag: text-generation"]
        lines += [f"license: {self.license}"] if self.license else []
        return "\n".join(["---", *lines, "tags:", "- lora", "- lorasmith", "---\n"])

    def _results(self) -> list[str]:
        before, after = self.summary.get("loss_before"), self.summary.get("loss_after")
        if before is None or after is None:
            return []
        interval, count = self.summary.get("interval"), self.summary.get("held_out_examples")
        text = f"Loss on {count} held-out examples: {before:.4f} before, {after:.4f} after"
        if interval:
            text += f" (95% confidence interval of the difference: {interval[0]:+.4f} to {interval[1]:+.4f})"
        return ["## Results\n", f"{text}.\n"]

    def _training(self) -> list[str]:
        lora = self.source.config
        rows: list[tuple[str, object]] = [("rank", lora.r), ("lora_alpha", f"{lora.lora_alpha:g}")]
        if self.config is not None:
            names = ", ".join(_without_folders(name) for name in self.config.data.data)
            rows += [
                ("data", names), ("SHA-256 of the training rows", self.environment.get("train_sha256", "not known")),
                ("method", self.config.training.method),
                ("learning rate", f"{self.config.training.peak_learning_rate:g}"),
                ("examples per step", self.config.training.batch_size * self.config.training.accumulate),
                ("steps", self.summary.get("steps", "not known")),
            ]  # fmt: skip
        if self.system:
            rows.append(("system message", json.dumps(self.system, ensure_ascii=False)))
        rows.append(("lorasmith", installed_version() or "not known"))
        table = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
        return ["## Training\n", "\n".join(table) + "\n"]

    def _use(self) -> str:
        return USE.format(base=self.base, title=self.title, rank=max(8, self.source.config.r))


USE = """## Use

Prompts must have the chat template of the training, `chat_template.jinja`. In Python, with transformers and PEFT:

```python
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{title}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
tokenizer.chat_template = Path("{title}/chat_template.jinja").read_text()
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Hello!"}}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

With other programs:

```bash
lorasmith chat {title} --model {base}
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {title}={title} \\
  --chat-template {title}/chat_template.jinja
lorasmith export {title} --model {base} --to ollama --output {title}-ollama     # Ollama; with --to gguf for llama.cpp
lorasmith export {title} --model {base} --to mlx --output {title}-mlx           # mlx-lm, on a Mac
```
"""
