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
    repository: str | None = None

    def text(self) -> str:
        """The whole card."""
        parts = [self._front(), f"# {self.title}\n", f"A LoRA adapter for {self.base}, trained with lorasmith.\n"]
        return "\n".join([*parts, *_results(self.summary), *self._training(), self._use()])

    def _front(self) -> str:
        lines = [f"base_model: {self.base}", "library_name: peft", "pipeline_tag: text-generation"]
        lines += [f"license: {self.license}"] if self.license else []
        return "\n".join(["---", *lines, "tags:", "- lora", "- lorasmith", "---\n"])

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
        place = self.repository or f"ORG/{self.title}"
        return USE.format(base=self.base, title=self.title, rank=rank_for_vllm(self.source), place=place)


@dataclass(frozen=True)
class MergedCard:
    """The card of anything but an adapter in PEFT's form. certificate: its content, empty if there is none.

    format: gguf, mlx or transformers. base: the name of the base model on the hub, if it is given.
    """

    repository: str
    format: str
    base: str | None
    certificate: Mapping[str, Any]
    config: Config | None
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]

    def text(self) -> str:
        """The whole card."""
        known = self.certificate.get("base", {})
        base = self.base or known.get("model") or (without_folders(self.config.model.model) if self.config else "")
        title = self.repository.rpartition("/")[2]
        lines = [f"base_model: {base}"] if base else []
        lines += [f"library_name: {self.format}", "pipeline_tag: text-generation"]
        lines += [f"license: {known['license']}"] if known.get("license") else []
        front = "\n".join(["---", *lines, "tags:", "- lorasmith", "---\n"])
        about = ABOUT[self.format].format(base=base or "a language model")
        use = USES[self.format].format(repository=self.repository, title=title, base=base or "BASE")
        parts = [front, f"# {title}\n", about + "\n", *_results(self.summary), *self._checked()]
        return "\n".join([*parts, "## Use\n", use + "\n"])

    def _checked(self) -> list[str]:
        readings = self.certificate.get("figures", {}).get("readings", [])
        lines = [
            f"- {one['reader']} {one['version'].removeprefix(one['reader']).strip()}: relative logit error "
            f"{one['error']:.1e}"
            for one in readings
        ]
        head = "Compared with the trained model after it was written, as these programs read it:\n"
        return ["## Compared\n", head, "\n".join(lines) + "\n"] if lines else []


def _results(summary: Mapping[str, Any]) -> list[str]:
    before, after = summary.get("loss_before"), summary.get("loss_after")
    if before is None or after is None:
        return []
    interval, count = summary.get("interval"), summary.get("held_out_examples")
    text = f"Loss on {count} held-out examples: {before:.4f} before, {after:.4f} after"
    if interval:
        text += f" (95% confidence interval of the difference: {interval[0]:+.4f} to {interval[1]:+.4f})"
    return ["## Results\n", f"{text}.\n"]


ABOUT = {
    "gguf": "{base}, fine-tuned with lorasmith, as a GGUF file with the chat template of the training.",
    "mlx": "A LoRA adapter for {base}, trained with lorasmith, in the form of mlx-lm.",
    "transformers": "{base}, fine-tuned with lorasmith.",
}
USES = {
    "gguf": "```bash\nllama-server -hf {repository}          # llama.cpp\nollama run hf.co/{repository}\n```",
    "mlx": "```bash\nhf download {repository} --local-dir {title}\n"
    "mlx_lm.generate --model {base} --adapter-path {title} --prompt 'Hello!'\n```",
    "transformers": "```bash\nvllm serve {repository}\nlorasmith generate --model {repository} 'Hello!'\n```",
}


USE = """## Use

The commands read the files from a folder `{title}`. To get them from the hub: `hf download {place} --local-dir {title}`

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
