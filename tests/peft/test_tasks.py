"""The task types of PEFT, and quantized bases: the same program with PEFT and with lorasmith.peft."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import lorasmith.peft as ours
from tests.support.peft_pair import base, compare, ids, same, stirred

_BERT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
BERT = BertConfig(**_BERT | _NO_DROPOUT)
GPT2 = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, num_labels=3)
T5 = T5Config(
    vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0
)
TASKS: dict[str, tuple[Any, Any, list[str], Any]] = {
    "SEQ_CLS": (BertForSequenceClassification, BERT, ["query", "value"], torch.tensor([0, 2, 1])),
    "SEQ_CLS gpt2": (GPT2ForSequenceClassification, GPT2, ["c_attn"], torch.tensor([0, 2, 1])),
    "TOKEN_CLS": (BertForTokenClassification, BERT, ["query", "value"], ids() % 3),
    "SEQ_2_SEQ_LM": (T5ForConditionalGeneration, T5, ["q", "v", "wo"], ids(tokens=5)),
    "FEATURE_EXTRACTION": (BertModel, BERT, ["query", "value"], None),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("task", TASKS)
def test_a_step_a_file_and_a_second_adapter(task: str, tmp_path: Path) -> None:
    kind, settings, targets, labels = TASKS[task]

    def make() -> Any:
        torch.manual_seed(6)
        model = kind(settings)
        for p in model.parameters():
            p.data.normal_(1.0 if p.dim() == 1 else 0.0, 0.2)
        return model

    def program(library: Any) -> list[Any]:
        torch.manual_seed(7)
        given = {"task_type": task.split()[0], "target_modules": targets, "r": 4}
        model = library.get_peft_model(make(), library.LoraConfig(**given))
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _step in range(3):
            out = model(input_ids=ids(), **({} if labels is None else {"labels": labels}))
            loss = out.last_hidden_state.square().mean() if labels is None else out.loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / library.__name__)
        again = library.PeftModel.from_pretrained(make(), tmp_path / library.__name__)
        assert isinstance(again, type(model))
        extra = {"decoder_input_ids": ids(tokens=4)} if "2" in task.split()[0] else {}
        with torch.no_grad():
            outs = [one.eval()(input_ids=ids(), **extra)[0] for one in (model, again, again.merge_and_unload())]
        compare(outs[1], outs[0], 1e-6)
        model.add_adapter("other", library.LoraConfig(**given))
        model.set_adapter("other")
        with torch.no_grad():
            outs.append(stirred(model)(input_ids=ids(), **extra)[0])
        return [type(model).__name__, trained, loss.detach(), library.get_peft_model_state_dict(model), outs]

    same(program, limit=3e-5)


def test_a_model_is_prepared_for_training_on_a_quantized_base() -> None:
    def program(library: Any) -> list[Any]:
        model = base(dtype=torch.bfloat16)
        model.is_loaded_in_8bit = True
        model = library.prepare_model_for_kbit_training(model)
        torch.manual_seed(2)
        adapted = stirred(library.get_peft_model(model, library.LoraConfig(target_modules="all-linear")))
        adapted.train()(input_ids=ids(), labels=ids()).loss.backward()
        return [str(adapted.dtype), {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}]

    assert ours.prepare_model_for_kbit_training is not None
    same(program, limit=1e-4)


@pytest.mark.parametrize("cast", [True, False])
def test_a_half_precision_base_starts_with_pefts_numbers(cast: bool) -> None:
    def program(library: Any) -> list[Any]:
        torch.manual_seed(2)
        config = library.LoraConfig(target_modules="all-linear")
        model = library.get_peft_model(base(dtype=torch.bfloat16), config, autocast_adapter_dtype=cast)
        return [dict(model.named_parameters()), model(input_ids=ids()).logits]

    same(program, limit=0)
