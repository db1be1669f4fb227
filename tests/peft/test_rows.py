"""adapter_names: each row of a batch with its adapter, beside PEFT's mixed batches and beside each row alone."""

from typing import Any

import pytest
import torch
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import lorasmith.peft as ours
from lorasmith.errors import ConfigError
from tests.support.peft_pair import base, compare, ids, logits, same, stirred, two

ROWS = [["first", "second", "__base__"], ["second", "second", "first"], ["__base__"] * 3, ["first"] * 3]


def alone(model: Any, name: str, compute: Any) -> Any:
    if name == "__base__":
        with model.disable_adapter():
            return compute()
    model.set_adapter(name)
    return compute()


@pytest.mark.parametrize("names", ROWS, ids=" ".join)
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_forward(names: list[str], changes: dict[str, Any]) -> None:
    model = two(ours, **changes)
    mixed = logits(model, adapter_names=names)
    if not changes:  # PEFT refuses to mix variants
        same(lambda library: logits(two(library), adapter_names=names))
    for i, name in enumerate(names):
        compare(mixed[i], alone(model, name, lambda: logits(model))[i], 2e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(beams: int) -> None:
    given = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "num_beams": beams}

    def program(library: Any) -> torch.Tensor:
        return two(library).generate(input_ids=ids(), adapter_names=ROWS[0], **given)

    mixed = same(program)
    model = two(ours)
    for i, name in enumerate(ROWS[0]):
        own = alone(model, name, lambda i=i: model.generate(input_ids=ids()[i : i + 1], **given))
        assert mixed[i, : own.shape[1]].tolist() == own[0].tolist()
    assert model.base_model.router.slices is None


def test_modules_that_are_trained_in_full_and_embeddings_with_lora() -> None:
    def program(library: Any) -> torch.Tensor:
        torch.manual_seed(1)
        given = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
        model = library.get_peft_model(base(), library.LoraConfig(**given), adapter_name="first")
        model.add_adapter("second", library.LoraConfig(**given))
        for i, (name, p) in enumerate(sorted(model.named_parameters())):
            if "first" in name or "second" in name:
                p.data += torch.linspace(-0.1, 0.1, p.numel()).view(p.shape) * (1 + i % 5)
        return logits(model.eval(), adapter_names=ROWS[0])

    same(program)


@pytest.mark.parametrize("beams", [1, 2])
def test_encoder_and_decoder_with_beams(beams: int) -> None:
    def program(library: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        config = T5Config(
            vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        model: Any = T5ForConditionalGeneration(config)
        for p in model.parameters():
            p.data.normal_(0, 0.2)
        given = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v", "wi"]}
        model = library.get_peft_model(model, library.LoraConfig(**given), adapter_name="first")
        model.add_adapter("second", library.LoraConfig(**given))
        stirred(model).eval()
        with torch.no_grad():
            out = model(input_ids=ids(), labels=ids(tokens=4), adapter_names=ROWS[0]).logits
            text = model.generate(input_ids=ids(), adapter_names=ROWS[0], num_beams=beams, max_new_tokens=5)
        return [out, text]

    same(program)


def test_what_cannot_be_is_refused() -> None:
    model = two(ours)
    with pytest.raises(ValueError, match="no adapter third"):
        logits(model, adapter_names=["third", "first", "first"])
    with pytest.raises(ValueError, match="gets 3 rows, but 2 adapters are named"):
        logits(model, adapter_names=["first", "second"])
    assert model.base_model.router.slices is None
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="eval"):
        logits(model.train(), adapter_names=ROWS[0])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        logits(model, adapter_names=ROWS[0])


CALL = [5, 9]  # the invocation tokens


def _with_alora(library: Any) -> Any:
    """A model with the aLoRA `default`, which is active, and the adapter `plain`."""
    torch.manual_seed(1)
    given = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4, "lora_alpha": 16}
    model = library.get_peft_model(base(), library.LoraConfig(alora_invocation_tokens=CALL, **given))
    model.add_adapter("plain", library.LoraConfig(**given))
    return stirred(model).eval()


def _called() -> torch.Tensor:
    """Three rows, two of which have the invocation tokens, at different places and one of them twice."""
    rows = ids()
    rows[(rows == CALL[0]) | (rows == CALL[1])] = 3
    rows[0, 4:6] = rows[1, 1:3] = rows[1, 7:9] = torch.tensor(CALL)
    return rows


def test_an_alora_is_active_from_its_invocation_tokens_on() -> None:
    def program(library: Any) -> list[Any]:
        model, rows = _with_alora(library), _called()
        given = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
        names = ["default", "plain", "default"]
        out = model(input_ids=rows, labels=rows)
        out.loss.backward()
        with torch.no_grad():
            found = [model(input_ids=rows, alora_offsets=[3, None, 20]).logits, model.generate(rows, **given),
                     model(inputs_embeds=model.get_input_embeddings()(rows)).logits,
                     model(input_ids=rows, adapter_names=["plain", "default", "__base__"]).logits,
                     model.generate(input_ids=rows, adapter_names=names, **given)]  # fmt: skip
            with model.disable_adapter():
                found.append(model(input_ids=rows).logits)
            model.set_adapter("plain")
            found.append(model(input_ids=rows).logits)
        return [out.logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, *found]

    found = same(program)
    plain = logits_of(base(), _called())
    assert torch.equal(found[0][0, :4], plain[0, :4])
    assert torch.equal(found[0][2], plain[2])
    assert not torch.allclose(found[0][0, 4], plain[0, 4], atol=1e-2)
    assert not torch.allclose(found[0][1, 7], plain[1, 7], atol=1e-2)
    assert torch.equal(found[4], plain)  # without tokens, PEFT warns


def test_an_alora_with_gradient_checkpointing() -> None:
    def program(library: Any, checkpointing: bool = True) -> dict[str, torch.Tensor]:
        model = _with_alora(library).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        for rows in (_called(), _called().flip(0)):
            model(input_ids=rows, labels=rows).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    compare(same(program), program(ours, checkpointing=False), 1e-6)
    model = _with_alora(ours).train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=_called())
    with pytest.raises(ValueError, match="a backward pass after each forward pass"):
        model(input_ids=_called())


def logits_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=rows).logits
    return found


def test_experts_do_not_know_which_row_a_token_is_from() -> None:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2,
             "num_heads": 2, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
             "decoder_start_token_id": 0}  # fmt: skip
    config = ours.LoraConfig(r=4, target_modules=["wi", "q"], task_type="SEQ_2_SEQ_LM")
    switch = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes))
    model = ours.get_peft_model(switch, config).eval()
    with pytest.raises(
        ConfigError, match=r"experts\.expert_0\.wi belongs to experts, which see the tokens of all rows"
    ):
        model(input_ids=ids() % 50, decoder_input_ids=ids() % 50, adapter_names=["default"] * len(ids()))
