"""The LoRA examples of PEFT's documentation in small form, with the import changed; each beside PEFT itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

from tests.support.peft_pair import base, examples, ids, logits, same, stirred
from tests.support.tiny import model_folder, tokenizer

GENERATE = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}


def test_quick_tour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """huggingface.co/docs/peft/quicktour"""

    def program(peft: Any) -> list[Any]:
        torch.manual_seed(0)
        config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
        config.decoder_start_token_id = 0
        peft_config = peft.LoraConfig(
            task_type=peft.TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
        )
        model = peft.get_peft_model(T5ForConditionalGeneration(config), peft_config)
        model.print_trainable_parameters()
        args = TrainingArguments(
            output_dir=str(tmp_path), learning_rate=1e-3, per_device_train_batch_size=1, max_steps=4, weight_decay=0.01,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=examples(4))
        trainer.train()
        model.save_pretrained(tmp_path / peft.__name__)
        return [capsys.readouterr().out.splitlines()[0], trainer.state.log_history[-1]["train_loss"] > 0,
                peft.get_peft_model_state_dict(model)]  # fmt: skip

    same(program, limit=2e-4)


def test_quick_tour_of_inference(tmp_path: Path) -> None:
    def program(peft: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(model_folder())
        stirred(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))).save_pretrained(tmp_path)
        model = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path)).to("cpu")
        model.eval()
        inputs = tokenizer("llama")("Preheat the oven to 350 degrees", return_tensors="pt")
        return model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **GENERATE)

    same(program)


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "gaussian"},
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": "all-linear"},
        {"rank_pattern": {"^model.layers.0.self_attn.k_proj": 16}},
        {"trainable_token_indices": {"embed_tokens": [3, 4, 5]}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_lora_guide(options: dict[str, Any], tmp_path: Path) -> None:
    """huggingface.co/docs/peft/developer_guides/lora"""

    def program(peft: Any) -> list[Any]:
        torch.manual_seed(0)
        given = {"target_modules": ["q_proj", "k_proj"], "task_type": "CAUSAL_LM"} | options
        model = stirred(peft.get_peft_model(base(), peft.LoraConfig(**given)))
        model.save_pretrained(tmp_path / peft.__name__)
        model = peft.PeftModel.from_pretrained(base(), tmp_path / peft.__name__)
        found = [logits(model)]
        model.merge_adapter()
        found.append(logits(model))
        model.unmerge_adapter()
        found.append(logits(model))
        model = peft.PeftModel.from_pretrained(base(), tmp_path / peft.__name__)
        return [*found, logits(model.merge_and_unload()), logits(peft.PeftModel.from_pretrained(
            base(), tmp_path / peft.__name__).unload())]  # fmt: skip

    same(program, limit=2e-4)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    import peft

    for name in ("norobots", "adcopy", "sql"):
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "o_proj"], r=4)
        stirred(peft.get_peft_model(base(), config), seed=len(name)).save_pretrained(tmp_path / name)
    return tmp_path


def test_lora_guide_of_loading_and_switching(folders: Path) -> None:
    def program(peft: Any) -> list[Any]:
        model = peft.PeftModel.from_pretrained(base(), folders / "norobots", adapter_name="norobots")
        found = [logits(model)]
        model.load_adapter(str(folders / "sql"), adapter_name="sql")
        found.append(logits(model))
        model.set_adapter("sql")
        found.append(logits(model))
        with model.disable_adapter():
            found.append(logits(model))
        model.delete_adapter("norobots")
        found.append(logits(model))
        return [*found, logits(model.unload())]

    same(program)


@pytest.mark.parametrize(("method", "density"), [("ties", 0.2), ("dare_ties", 0.2), ("dare_linear", 0.7)])
def test_model_merging_guide(folders: Path, method: str, density: float) -> None:
    """huggingface.co/docs/peft/developer_guides/model_merging"""

    def program(peft: Any) -> list[Any]:
        model = peft.PeftModel.from_pretrained(base(), folders / "norobots", adapter_name="norobots")
        model.load_adapter(str(folders / "adcopy"), adapter_name="adcopy")
        model.load_adapter(str(folders / "sql"), adapter_name="sql")
        adapters, weights = ["norobots", "adcopy", "sql"], [2.0, 1.0, 1.0]
        torch.manual_seed(3)
        model.add_weighted_adapter(adapters, weights, "merge", combination_type=method, density=density)
        model.set_adapter("merge")
        return [logits(model), model.generate(input_ids=ids(), **GENERATE)]

    same(program, limit=1e-4)


def test_mixed_batches(folders: Path) -> None:
    """huggingface.co/docs/peft/developer_guides/lora, "Inference with different LoRA adapters in the same batch"."""

    def program(peft: Any) -> list[Any]:
        model = peft.PeftModel.from_pretrained(base(), folders / "adcopy", adapter_name="adapter_fr")
        model.load_adapter(str(folders / "sql"), adapter_name="adapter_de")
        names = ["__base__", "adapter_fr", "adapter_de"]
        return [model.generate(input_ids=ids(), adapter_names=names, **GENERATE), logits(model, adapter_names=names)]

    same(program)
