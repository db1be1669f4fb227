"""PeftModel and the classes of tasks: the same program with PEFT and with lorasmith.peft."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import lorasmith.peft as ours
from tests.support.peft_pair import base, compare, logits, same, state, stirred, trained, two
from tests.support.tiny import model_folder


def test_folders_go_both_ways_with_names_and_selection(tmp_path: Path) -> None:
    def program(library: Any) -> dict[str, Any]:
        folder = tmp_path / library.__name__
        two(library).save_pretrained(folder)
        two(library).save_pretrained(folder / "one", selected_adapters=["second"])
        return {"files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))}

    same(program)
    for writer in ("peft", "lorasmith.peft"):

        def read(library: Any, folder: Path = tmp_path / writer) -> list[Any]:
            model = library.PeftModel.from_pretrained(base(), folder / "first", adapter_name="a", torch_device="cpu")
            found = [state(model), model.training]
            model.load_adapter(str(folder / "second"), "b", is_trainable=True)
            found.append(state(model))
            model.set_adapter("b")
            found.append(state(model))
            trainable = library.PeftModel.from_pretrained(base().train(), folder / "first", is_trainable=True)
            return [*found, trained(trainable), trainable.training, logits(trainable)]

        mine = same(read)
        model = two(ours)
        compare(mine[0]["logits"], logits(model), 0)
        model.set_adapter("second")
        compare(mine[3]["logits"], logits(model), 0)


def test_auto_classes_load_the_base_too(tmp_path: Path) -> None:
    def program(library: Any) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(model_folder())
        config = library.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
        torch.manual_seed(0)
        stirred(library.get_peft_model(model, config)).save_pretrained(tmp_path / library.__name__)
        loaded = library.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / library.__name__))
        assert isinstance(loaded, library.PeftModelForCausalLM)
        plain = library.get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder()), library.LoraConfig(r=2))
        plain.save_pretrained(tmp_path / "plain")
        assert isinstance(library.AutoPeftModel.from_pretrained(str(tmp_path / "plain")), library.PeftModel)
        return logits(loaded)

    same(program)


def test_the_base_model_is_the_model_that_was_given() -> None:
    for library in (ours,):
        model = base()
        adapted = library.get_peft_model(model, library.LoraConfig(target_modules=["q_proj"]))
        assert adapted.get_base_model() is model
        assert adapted.base_model.model is model
        assert adapted.unload() is model
        assert torch.equal(logits(model), logits(base()))
        assert not any("lora" in name for name, _p in model.named_parameters())
        assert not hasattr(model, "peft_config")


def test_transformers_itself_reads_our_folder(tmp_path: Path) -> None:
    model = two(ours)
    model.save_pretrained(tmp_path)
    plain = base()
    plain.load_adapter(str(tmp_path / "first"))
    compare(logits(plain), logits(model), 1e-5)
