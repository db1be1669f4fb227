"""target_parameters: LoRA on the weights of experts, beside PEFT's, with its names."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith.peft as ours
from tests.support.experts import tiny_moe
from tests.support.peft_pair import LIBRARIES, compare, logits, same, stirred

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAMED = ["experts.down_proj", "experts.gate_up_proj"]


def config(library: Any, **changes: Any) -> Any:
    given = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "target_parameters": NAMED, "r": 4}
    return library.LoraConfig(**given | {"rank_pattern": {"experts.gate_up_proj": 2}} | changes)


def adapted(library: Any, family: str, **changes: Any) -> Any:
    torch.manual_seed(4)
    return library.get_peft_model(tiny_moe(family, torch.float32), config(library, **changes))


def own(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.state_dict(keep_vars=True).items() if "lora_" in name}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_numbers_names_gradients_and_merged_weights_are_pefts(family: str) -> None:
    def program(library: Any) -> list[Any]:
        model = adapted(library, family)
        start = {name: p.detach().clone() for name, p in own(model).items()}
        model.add_adapter("second", config(library))
        stirred(model).eval()
        counts = [model.get_nb_trainable_parameters(), library.get_peft_model_state_dict(model, adapter_name="second")]
        model.base_model.set_adapter(["default", "second"])
        out = logits(model)
        model(input_ids=torch.arange(12).view(2, 6) + 3).logits.square().mean().backward()
        gradients = {name: p.grad for name, p in own(model).items()}
        status = model.get_model_status()
        model.merge_adapter()
        merged = logits(model)
        model.unmerge_adapter()
        with model.disable_adapter():
            plain = logits(model)
        model.delete_adapter("second")
        left = logits(model)
        return [start, counts, out, gradients, status.active_adapters, status.available_adapters, merged, plain, left,
                dict(model.merge_and_unload().named_parameters())]  # fmt: skip

    found = same(program, limit=2e-5)
    compare(found[2], found[6], 2e-5)
    assert not torch.allclose(found[2], found[7], atol=1e-2)
    assert not torch.allclose(found[2], found[8], atol=1e-2)


def test_files_are_read_by_the_other(tmp_path: Path) -> None:
    def program(library: Any) -> list[torch.Tensor]:
        stirred(adapted(library, "mixtral")).save_pretrained(tmp_path / library.__name__)
        return [
            logits(library.PeftModel.from_pretrained(tiny_moe("mixtral", torch.float32), tmp_path / name).eval())
            for name in LIBRARIES
            if (tmp_path / name).exists()
        ]

    found = same(lambda library: program(library)[:1])
    compare(program(ours), [*found, *found], 1e-5)


def test_linear_layers_named_by_their_weight_are_linear_layers() -> None:
    def program(library: Any) -> list[Any]:
        model = stirred(
            adapted(library, "mixtral", target_modules=[], target_parameters=["k_proj.weight"], rank_pattern={})
        ).eval()
        return [logits(model), library.get_peft_model_state_dict(model), model.get_nb_trainable_parameters()]

    same(program)


def test_adapters_with_other_parameters_are_refused_as_in_peft() -> None:
    model = adapted(ours, "mixtral")
    with pytest.raises(ValueError, match="must target the same set of parameters"):
        model.add_adapter("other", config(ours, target_parameters=NAMED[:1]))
    assert list(model.peft_config) == ["default"]
