"""Adding, switching, loading, saving and removing adapters: the same program with PEFT and with lorasmith.peft."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorasmith.peft as ours
from lorasmith.errors import AdapterError, ConfigError
from tests.support.peft_pair import base, compare, ids, logits, same, stirred
from tests.support.tiny import model_folder

TWO = {
    "first": {"target_modules": ["q_proj", "v_proj"], "r": 4},
    "second": {"target_modules": ["q_proj", "up_proj"], "r": 2},
}


def two(library: Any, **changes: Any) -> Any:
    """A model with the adapters first and second, first active."""
    torch.manual_seed(1)
    first, second = (library.LoraConfig(task_type="CAUSAL_LM", lora_alpha=16, **o | changes) for o in TWO.values())
    model = library.get_peft_model(base(), first, adapter_name="first")
    model.add_adapter("second", second)
    return stirred(model).eval()


def trained(model: Any) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def state(model: Any) -> dict[str, Any]:
    status = model.get_model_status()
    return {
        "active": model.active_adapters,
        "trained": trained(model),
        "counts": model.get_nb_trainable_parameters(),
        "logits": logits(model),
        "status": dict(vars(status)),
        "layers": [(one.name, one.enabled, one.active_adapters, list(one.merged_adapters), one.available_adapters,
                    one.requires_grad, one.devices) for one in model.get_layer_status()],
    }  # fmt: skip


def test_adapters_are_added_switched_disabled_and_deleted_as_in_peft() -> None:
    def program(library: Any) -> list[Any]:
        model = two(library)
        states = [state(model)]
        model.set_adapter("second")
        states.append(state(model))
        with model.disable_adapter():
            states.append(logits(model))
            states.append(model.get_model_status().enabled)
        states.append(state(model))
        model.set_adapter("first", inference_mode=True)
        states.append(state(model))
        model.set_requires_grad("second")
        states.append(trained(model))
        model.delete_adapter("first")
        states.append(logits(model))
        states.append(model.active_adapters)
        return states

    found = same(program)
    assert torch.equal(found[2], logits(base()))
    assert not torch.allclose(found[0]["logits"], found[1]["logits"], atol=1e-2)


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


def test_several_active_adapters_are_refused() -> None:
    model = two(ours)
    with pytest.raises(ConfigError, match=r"first, second .*add_weighted_adapter.*adapter_names"):
        model.base_model.set_adapter(["first", "second"])
    with pytest.raises(ValueError, match="third not found"):
        model.base_model.set_adapter("third")


def test_deleting_what_is_not_there() -> None:
    model = two(ours)
    with pytest.raises(ValueError, match="third not found"):
        model.base_model.delete_adapter("third")


# -- files --------------------------------------------------------------------------------------------------------


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


def test_configs_are_read_as_ours(tmp_path: Path) -> None:
    two(ours).save_pretrained(tmp_path)
    config = ours.PeftConfig.from_pretrained(str(tmp_path / "first"))
    assert type(config) is ours.LoraConfig
    assert config.peft_type == ours.PeftType.LORA
    assert isinstance(config, ours.PeftConfig)
    assert (config.r, config.lora_alpha) == (4, 16)
    model = ours.PeftModel.from_pretrained(base(), tmp_path / "first", config=config)
    assert isinstance(model, ours.PeftModelForCausalLM)
    assert ours.get_peft_config(config.to_dict()) == config


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


def test_transformers_itself_reads_our_folder(tmp_path: Path) -> None:
    model = two(ours)
    model.save_pretrained(tmp_path)
    plain = base()
    plain.load_adapter(str(tmp_path / "first"))
    compare(logits(plain), logits(model), 1e-5)


def test_state_dicts_are_pefts() -> None:
    def program(library: Any) -> list[Any]:
        model = two(library)
        tensors = library.get_peft_model_state_dict(model, adapter_name="second")
        fresh = two(library)
        doubled = {key: 2 * tensor for key, tensor in tensors.items()}
        library.set_peft_model_state_dict(fresh, doubled, adapter_name="second")
        fresh.set_adapter("second")
        return [tensors, logits(fresh)]

    same(program)


def test_a_file_with_missing_or_unknown_tensors_is_refused_where_peft_says_little(tmp_path: Path) -> None:
    tensors = ours.get_peft_model_state_dict(two(ours), adapter_name="first")
    key = next(iter(tensors))
    for changed, text in (
        ({k: v for k, v in tensors.items() if k != key}, rf"missing .*{key.split('.lora')[0]}"),
        (
            tensors | {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": tensors[key]},
            r"unexpected .*layers\.7",
        ),
    ):
        with pytest.raises(AdapterError, match=text):
            ours.set_peft_model_state_dict(two(ours), changed, adapter_name="first")


def test_hotswap_gives_an_adapter_the_weights_of_another(tmp_path: Path) -> None:
    torch.manual_seed(9)
    other = ours.get_peft_model(base(), ours.LoraConfig(r=4, lora_alpha=40, target_modules=["q_proj", "v_proj"]))
    stirred(other, seed=77).save_pretrained(tmp_path / "other")
    model = two(ours)
    ours.hotswap_adapter(model, str(tmp_path / "other"), "first")
    compare(logits(model), logits(other.eval()), 0)
    with pytest.raises(AdapterError, match=r"missing|unexpected"):
        ours.hotswap_adapter(model, str(tmp_path / "other"), "second")
    config = ours.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    stirred(ours.get_peft_model(base(), config)).save_pretrained(tmp_path / "wide")
    with pytest.raises(AdapterError, match=r"has the shape \(8, 32\), but that of first is \(4, 32\)"):
        ours.hotswap_adapter(model, str(tmp_path / "wide"), "first")
    config = ours.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_rslora=True)
    stirred(ours.get_peft_model(base(), config)).save_pretrained(tmp_path / "rslora")
    with pytest.raises(AdapterError, match=r"use_rslora"):
        ours.hotswap_adapter(model, str(tmp_path / "rslora"), "first")


# -- what peft adds around ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["EMBEDDING", "LINEAR"]},
        {"modules_to_save": ["EMBEDDING"], "ensure_weight_tying": True},
        {"trainable_token_indices": [5, 7, 9]},
        {"exclude_modules": ["EXCLUDED"]},
        {"rank_pattern": {"LINEAR": 2}, "alpha_pattern": {"LINEAR": 3}, "use_rslora": True},
        {"target_modules": None},
        {"init_lora_weights": False},
        {"bias": "all"},
        {"layers_to_transform": [1], "target_modules": ["LINEAR"]},
        {"target_modules": r".*\.1\..*LINEAR"},
    ],
    ids=lambda options: " ".join(options),
)
def test_options_give_pefts_parameters_logits_gradients_and_files(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    names = {
        "LINEAR": "c_attn" if family == "gpt2" else "q_proj",
        "EMBEDDING": "wte" if family == "gpt2" else "embed_tokens",
        "EXCLUDED": "c_proj" if family == "gpt2" else "down_proj",
    }

    def spelled(value: Any) -> Any:
        if isinstance(value, dict):
            return {spelled(key): spelled(one) for key, one in value.items()}
        if isinstance(value, list):
            return [spelled(one) for one in value]
        for name, real in names.items():
            value = value.replace(name, real) if isinstance(value, str) else value
        return value

    def program(library: Any) -> list[Any]:
        folder = tmp_path / library.__name__
        torch.manual_seed(2)
        config = library.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear"} | spelled(options))
        model = library.get_peft_model(base(family), config)
        before = logits(model)
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data += torch.linspace(-0.1, 0.1, p.numel()).view(p.shape) * (1 + len(name) % 3)
        model(input_ids=ids(), labels=ids()).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.save_pretrained(folder)
        again = library.PeftModel.from_pretrained(base(family), folder)
        merged = library.PeftModel.from_pretrained(base(family), folder).merge_and_unload()
        kept = library.get_peft_model_state_dict(model)
        return [trained(model), before, logits(model), gradients, kept, logits(again), logits(merged)]

    if "init_lora_weights" in options:
        with pytest.raises(AssertionError):
            same(program)  # B is random in both, and not the same
        return
    mine = same(program, limit=1e-4)
    compare(mine[5], mine[2], 1e-5)
    if "EMBEDDING" not in str(options.get("target_modules")) or family == "llama":
        compare(mine[6], mine[2], 1e-4)  # a tied head is changed by merging into the embedding, of which PEFT warns
