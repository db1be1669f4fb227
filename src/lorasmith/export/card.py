"""The model card README.md of what goes to a hub: metadata as YAML, then Markdown in English."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.adapters.public_names import without_folders
from lorasmith.config.files import read_object
from lorasmith.config.toml import Config, load_config
from lorasmith.errors import RunError
from lorasmith.export.vllm import rank_for_vllm
from lorasmith.version import installed_version

FILES = ("summary.json", "environment.json")


def of_run(run: Path) -> tuple[Config | None, dict[str, Any], dict[str, Any]]:
    """The configuration, the results and the environment of a run; empty for an adapter without its run."""
    if not (run / "config.toml").is_file():
        return None, {}, {}
    found = [read_object(run / name, RunError) if (run / name).is_file() else {} for name in FILES]
    return load_config(run / "config.toml", {}), found[0], found[1]


@dataclass(frozen=True)
class Card:
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
            names = ", ".join(without_folders(name) for name in self.config.data.data)
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
        return USE.format(base=self.base, title=self.title, rank=rank_for_vllm(self.source))


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
