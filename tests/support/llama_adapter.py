"""An adapter folder of the tiny llama, changes to it, and what is said when it is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.errors import AdapterError
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.lora.files import ADAPTER_WEIGHTS, save_adapter
from tests.support.families import adapted, logits_of, tiny, tiny_base

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def sound_folder(folder: Path) -> Path:
    """A sound adapter for llama's q_proj, in `folder`."""
    base, adapter = adapted("llama", target_modules="q_proj")
    save_adapter(adapter, base.model, folder, "the/base")
    return folder


def problems(folder: Path, family: str = "llama") -> tuple[str, ...]:
    """The messages when the folder is loaded; the model and its router stay as they were."""
    base = tiny_base(family)
    base.router.active = "before"
    with pytest.raises(AdapterError) as caught:
        AdapterFolder.read(folder).load_into(base, "default")
    assert base.router.active == "before"
    base.router.active = None
    assert [n for n, _m in base.model.named_modules()] == [n for n, _m in tiny(family).named_modules()]
    assert torch.equal(logits_of(base), logits_of(tiny(family)))
    return tuple(
        problem.removeprefix(f"{folder}/").removeprefix(f"{ADAPTER_WEIGHTS}: ") for problem in caught.value.problems
    )


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Set tensors of layer 0's q_proj, A= or B=; None takes it out; other names are whole keys."""
    found = load_file(folder / ADAPTER_WEIGHTS)
    for name, value in tensors.items():
        key = KEY.format(name) if name in "AB" else name
        found.pop(key, None)
        if value is not None:
            found[key] = value
    save_file(found, folder / ADAPTER_WEIGHTS)


def configure(folder: Path, **options: Any) -> None:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
