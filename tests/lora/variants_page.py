"""The table of docs/peft.md and .zh.md that compares each variant with PEFT: `python -m tests.lora.variants_page`.

Both get the same adapter on the same tiny model in float32. Then their logits, the gradients of a loss, the merged
weights, and the logits after ten steps of AdamW are compared. All differences are relative to the largest value of
PEFT's.
"""

import copy
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.files import save_adapter
from lorasmith.lora.inject import Adapter, inject
from lorasmith.lora.merge import merged_weights
from lorasmith.model.base import Base
from lorasmith.training.eva import start_from_inputs
from tests.support.experts import moe_base, tiny_moe
from tests.support.families import distance, example, logits_of, own_logits, stir, tiny, tiny_base
from tests.support.paths import ROOT

STEPS = 10
MARK, END = "<!-- variants -->", "<!-- /variants -->"
PAGES = {
    "peft.md": ["variant", "model", "forward", "gradient", "ten steps", "merge"],
    "peft.zh.md": ["变体", "模型", "前向", "梯度", "十步训练", "合并"],
}
COLUMNS = ("forward", "gradient", "steps", "merge")
ALL = {"target_modules": "all-linear"}
EXPERTS = {"target_modules": ("q_proj",), "target_parameters": ("experts.gate_up_proj", "experts.down_proj")}


@dataclass(frozen=True)
class Case:
    """A line of the table: the options of the adapter, and the family it is added to.

    whole: PEFT starts it by itself, and the starts are compared too; else PEFT reads our file.
    """

    family: str
    options: dict[str, Any]
    whole: bool = False


CASES = {
    "LoRA": Case("llama", ALL),
    "LoRA, Conv1D": Case("gpt2", ALL),
    "`use_rslora`": Case("llama", ALL | {"use_rslora": True}),
    "`use_dora`": Case("llama", ALL | {"use_dora": True}),
    "`use_dora`, Conv1D": Case("gpt2", ALL | {"use_dora": True}),
    "`lora_bias`": Case("gpt2", ALL | {"lora_bias": True}),
    "`pissa`": Case("llama", ALL | {"init_lora_weights": "pissa"}, whole=True),
    "`olora`": Case("llama", ALL | {"init_lora_weights": "olora"}, whole=True),
    "`orthogonal`": Case("llama", ALL | {"init_lora_weights": "orthogonal"}),
    "`mica`": Case("llama", ALL | {"init_lora_weights": "mica"}, whole=True),
    "`eva`": Case("llama", ALL | {"init_lora_weights": "eva"}),
    '`bias="all"`': Case("gpt2", ALL | {"bias": "all"}),
    "`target_parameters`": Case("mixtral", EXPERTS),
    "`target_parameters`, gpt_oss": Case("gpt_oss", EXPERTS),
}


def measured(case: Case) -> dict[str, float]:
    """The largest relative difference of each column."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, adapter, theirs = (_started if case.whole else _read)(case, Path(folder))
    named = {_key(name): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert adapter.trained.keys() == named.keys(), set(adapter.trained) ^ set(named)
    if case.whole:
        _move(adapter.trained, named)
    differences = {"forward": distance(logits_of(base), logits_of(theirs))}
    first, second = _gradients(base, adapter.trained), _gradients(theirs, named)
    differences["gradient"] = max(float((first[key] - g).abs().max()) for key, g in second.items()) / max(
        float(g.abs().max()) for g in second.values()
    )
    merged, weights = copy.deepcopy(theirs).merge_and_unload(), merged_weights(base.model, adapter)
    differences["merge"] = max(distance(weight, merged.get_parameter(name)) for name, weight in weights.items())
    for model, parameters in ((base, adapter.trained), (theirs, named)):
        _train(model, parameters)
    return differences | {"steps": distance(logits_of(base), logits_of(theirs))}


def _key(name: str) -> str:
    """PEFT's name of a parameter as it is in its files."""
    return name.replace("_vector.default.weight", "_vector").replace(".default", "")


def _base(family: str) -> tuple[Base, Any]:
    """The model, for each of both."""
    if family in ("mixtral", "gpt_oss"):
        return moe_base(family, torch.float32), tiny_moe(family, torch.float32)
    return tiny_base(family, torch.float32), tiny(family, torch.float32)


def _read(case: Case, folder: Path) -> tuple[Base, Adapter, Any]:
    """Our adapter, with random values in it, and PEFT's from its file."""
    base, plain = _base(case.family)
    adapter = base.adapters["default"] = inject(base.model, LoraConfig(r=4, lora_alpha=6, **case.options), base.router)
    if case.options.get("init_lora_weights") == "eva":
        start_from_inputs(base, "default", [example(40, seed) for seed in range(4)], 10_000)
    stir(adapter)
    save_adapter(adapter, base.model, folder, "the/base")
    return base, adapter, peft.PeftModel.from_pretrained(plain, folder, is_trainable=True)


def _started(case: Case, _folder: Path) -> tuple[Base, Adapter, Any]:
    """The new adapter of each."""
    base, plain = _base(case.family)
    options = {"r": 4, "lora_alpha": 6} | case.options
    adapter = base.adapters["default"] = inject(base.model, LoraConfig(**options), base.router)
    return base, adapter, peft.get_peft_model(plain, peft.LoraConfig(task_type="CAUSAL_LM", **options))


@torch.no_grad()
def _move(ours: dict[str, nn.Parameter], theirs: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(3)
    for key, p in ours.items():
        step = torch.randn(p.shape, generator=generator) * 0.1
        p += step
        theirs[key] += step


def _loss(model: Any) -> Tensor:
    return torch.log_softmax(own_logits(model), -1)[..., 7].mean()


def _gradients(model: Any, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return dict(zip(parameters, torch.autograd.grad(_loss(model), list(parameters.values())), strict=True))


def _train(model: Any, parameters: dict[str, nn.Parameter]) -> None:
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    for _step in range(STEPS):
        optimizer.zero_grad()
        _loss(model).backward()
        optimizer.step()


def written(text: str, head: list[str], found: dict[str, dict[str, float]]) -> str:
    """The page with this table between the marks. Raises ValueError if it has no marks."""
    rows = [[name, CASES[name].family, *(f"{of[column]:.0e}" for column in COLUMNS)] for name, of in found.items()]
    table = "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))
    before, _mark, rest = text.partition(MARK)
    _old, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"no {MARK} ... {END}")
    return f"{before}{MARK}\n\n{table}\n\n{END}{after}"


def main() -> None:
    """Measure every variant, print the numbers and write both pages."""
    found = {}
    for name, case in CASES.items():
        found[name] = measured(case)
        sys.stdout.write(f"{name} {found[name]}\n")
    for page, head in PAGES.items():
        file = ROOT / "docs" / page
        file.write_text(written(file.read_text("utf-8"), head, found), "utf-8")


if __name__ == "__main__":
    main()
