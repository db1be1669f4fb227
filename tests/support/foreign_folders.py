"""Adapter folders in the form in which other programs leave them, on the tiny models.

Read in their sources: mlx-lm 0.32 (lora.py, tuner/utils.py), ms-swift 3 (base_args.py), LLaMA-Factory
(webui/common.py), Axolotl (train.py: setup_model_card).
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.peft_folder import peft_folder
from tests.support.tiny import model_folder

CARD = """---
library_name: peft
base_model: {base}
tags:
{tags}
model-index:
- name: out
  results: []
---

<!-- This model card has been generated automatically -->

{body}
# out
"""
AXOLOTL_BODY = """[<img src="axolotl-badge-web.png" alt="Built with Axolotl"/>](https://github.com/axolotl-ai-cloud/axolotl)
<details><summary>See axolotl config</summary>

axolotl version: `0.12.2`
```yaml
{config}
```

</details><br>
"""
# The numbers of the tiny model's layers.
SIDES = {"self_attn.q_proj": "q_proj", "mlp.down_proj": "down_proj"}


def card(folder: Path, *tags: str, body: str = "", base: str = "tiny") -> None:
    """README.md as a trainer writes it."""
    text = CARD.format(base=base, tags="\n".join(f"- {tag}" for tag in tags), body=body)
    (folder / "README.md").write_text(text, "utf-8")


def tokenizer_into(folder: Path, template: str | None = None, family: str = "llama") -> None:
    """The tokenizer of the training, as `save_pretrained` of transformers leaves it."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder(family))
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def swift_folder(folder: Path, **changes: Any) -> Path:
    """A checkpoint of ms-swift: no tokenizer, and args.json with all options."""
    peft_folder(folder, target_modules=["q_proj", "v_proj"])
    card(folder, "base_model:adapter:tiny", "lora", "transformers")
    args = {
        "output_dir": "/root/output/v0-20260101-000000", "model": str(model_folder()), "model_type": "llama",
        "task_type": "causal_lm", "template": "llama3_2", "system": "Be brief.", "max_length": 2048,
        "use_chat_template": True, "train_type": "lora", "tuner_backend": "peft", "use_hf": True, "lora_rank": 4,
        "swift_version": "3.6.0",
    }  # fmt: skip
    (folder / "args.json").write_text(json.dumps(args | changes, indent=2), "utf-8")
    return folder


def factory_folder(folder: Path, arguments: str | None = None) -> Path:
    """An output of LLaMA-Factory: the tokenizer, a card, and training_args.yaml if its web page trained."""
    peft_folder(folder, target_modules=["q_proj", "v_proj"])
    tokenizer_into(folder)
    card(folder, "base_model:adapter:tiny", "llama-factory", "lora", "transformers")
    if arguments is not None:
        (folder / "training_args.yaml").write_text(arguments, "utf-8")
    return folder


def axolotl_folder(folder: Path, config: str) -> Path:
    """An output of Axolotl: the tokenizer, the config of the model, and a card with the configuration."""
    peft_folder(folder, target_modules=["q_proj", "v_proj"])
    tokenizer_into(folder)
    (folder / "config.json").write_text((model_folder() / "config.json").read_text("utf-8"), "utf-8")
    card(folder, "axolotl", "base_model:adapter:tiny", "lora", body=AXOLOTL_BODY.format(config=config))
    return folder


def mlx_folder(folder: Path, base: Path, kind: str = "lora", rank: int = 4, scale: float = 20.0) -> Path:
    """An output of mlx_lm.lora: adapters.safetensors with a [I, R], b [R, O] and, with DoRA, m [O]."""
    folder.mkdir(parents=True)
    with quiet_transformers():  # a bar on stderr, which tests read
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tensors = {}
    for path, layer in model.named_modules():
        if path.endswith(tuple(SIDES)):
            O, I = layer.weight.shape
            tensors[f"{path}.lora_a"] = torch.randn(I, rank) * 0.1
            tensors[f"{path}.lora_b"] = torch.randn(rank, O) * 0.02
            if kind == "dora":
                tensors[f"{path}.m"] = layer.weight.norm(dim=1) * (1 + torch.rand(O) * 0.2)
    save_file({key: tensor.contiguous().detach() for key, tensor in tensors.items()}, folder / "adapters.safetensors")
    config = {
        "adapter_path": "adapters", "batch_size": 4, "fine_tune_type": kind, "iters": 1000, "learning_rate": 1e-05,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0}, "mask_prompt": False, "model": str(base),
        "num_layers": 16, "optimizer": "adam", "train": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=4), "utf-8")
    return folder
