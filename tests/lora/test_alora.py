"""aLoRA against PEFT: rows with and without the sequence, ten steps, folders, and replies with a cache."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import Tensor, nn

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.lora import LoraConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.engine.engine import Engine, replies
from lorasmith.engine.padded import Padded
from lorasmith.engine.request import Request
from lorasmith.engine.runner import Packed
from lorasmith.engine.scoring import prompt_logprobs
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.lora.alora import NEVER, first_active
from lorasmith.lora.files import save_adapter
from lorasmith.lora.inject import inject, remove
from lorasmith.lora.merge import merged_weights
from lorasmith.model.base import Base
from lorasmith.model.forward import hidden, row_of
from lorasmith.model.head import loss_sum
from lorasmith.model.row import Example
from lorasmith.model.target_check import check_targets
from lorasmith.model.verify import enable_fast_parts, trial_loss
from lorasmith.report import Report
from tests.support.families import distance, own_logits, stir, tiny, tiny_base
from tests.support.tiny import Crash, Watch, adapter_bytes, crash_at, losses, metrics, tokenizer, trained

pytestmark = [pytest.mark.usefixtures("exact"), pytest.mark.filterwarnings("ignore::UserWarning:peft")]
CALL = (7, 8)
LIMIT = 1e-11
TEXTS = (
    [5, 17, 60, 7, 8, 44, 92, 31, 50],
    [5, 17, 60, 7, 8, 44, 92, 7, 8, 3, 4],  # twice: the last one counts
    [7, 8, 5, 17, 60, 44],  # from the first token on
    [5, 17, 60, 44, 7, 9, 8],  # never
    [5, 17, 60, 44, 92, 31, 50, 11, 12, 13, 7, 8],  # in the last two tokens
)


def of_text(ids: list[int]) -> Example:
    return Example(ids[:-1], ids[1:], [1.0] * (len(ids) - 1), "test")


EXAMPLES = [of_text(text) for text in TEXTS]
PREFIX = [5, 17, 60, 31, 33, 41, 7, 8, 50, 51, 52]
SIMILAR = [of_text([*PREFIX, *rest]) for rest in ([60, 61], [62, 63, 64], [70, 7, 8, 71])]


def both(family: str, **options: Any) -> tuple[Base, Any]:
    """Ours and PEFT's, with the same random values."""
    given = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "alora_invocation_tokens": list(CALL)} | options
    base = tiny_base(family)
    ours = given | {"alora_invocation_tokens": CALL}
    adapter = base.adapters["default"] = inject(base.model, LoraConfig(**ours), base.router)
    stir(adapter)
    theirs = peft.get_peft_model(tiny(family), peft.LoraConfig(task_type="CAUSAL_LM", **given))
    with torch.no_grad():
        for key, p in named(theirs).items():
            p.copy_(adapter.parameters[key])
    return base, theirs


def named(model: Any) -> dict[str, nn.Parameter]:
    return {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}


def pefts_loss(model: Any, examples: Sequence[Example]) -> Tensor:
    total = sum(one.n_targets for one in examples)
    parts = []
    for one in examples:
        ids = torch.tensor([[*one.ids, one.targets[-1]]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        parts.append(nn.functional.cross_entropy(logits, torch.tensor(one.targets), reduction="sum"))
    return sum(parts) / total  # type: ignore[return-value]


def our_loss(base: Base, examples: Sequence[Example]) -> Tensor:
    return loss_sum(base, row_of(base, examples, float(sum(one.n_targets for one in examples)), "default"))


def test_the_last_occurrence_counts_as_in_peft() -> None:
    config = LoraConfig(alora_invocation_tokens=CALL)
    theirs = peft.LoraConfig(alora_invocation_tokens=list(CALL))
    for text in (*TEXTS, [7], [7, 8], []):
        (offset,) = calculate_alora_offsets({"a": theirs}, "a", torch.tensor([text], dtype=torch.long))
        start = first_active(text, config)
        assert (None if start == NEVER else len(text) - start) == offset, text
    assert first_active([5, 6], LoraConfig()) == 0


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bloom"])
def test_loss_and_gradients_of_a_row_equal_those_of_peft(family: str, fast: bool) -> None:
    """Packed with common prefixes, and padded (bloom). A prefix that is active in one text only is not common."""
    base, theirs = both(family)
    if fast:
        enable_fast_parts(base, "default", list(range(3, 27)))
        assert "plain" not in base.why
    row = row_of(base, SIMILAR, 1.0, "default")
    if base.layout == "packed":
        assert row.tokens == sum(len(one.ids) for one in SIMILAR) - 11, "11 tokens of two texts are computed once"
    ours, wanted = our_loss(base, [*EXAMPLES, *SIMILAR]), pefts_loss(theirs, [*EXAMPLES, *SIMILAR])
    assert distance(ours, wanted) < 1e-6  # the head sums in float32
    ours.backward()
    wanted.backward()
    for key, p in named(theirs).items():
        assert distance(base.adapters["default"].parameters[key].grad, p.grad) < 1e-5, key


@pytest.mark.parametrize("call", [(5,), (5, 5), tuple(range(3, 13)), tuple(range(40, 60))])
def test_the_trial_step_is_active_for_any_sequence(call: tuple[int, ...]) -> None:
    """One token, one twice, more than the common prefix has, more than the trial's own text."""
    base = tiny_base("llama")
    config = LoraConfig(r=4, alora_invocation_tokens=call)
    adapter = base.adapters["default"] = inject(base.model, config, base.router)
    paths = set(adapter.targets.adapted)
    for ids in (list(range(3, 30)), list(call)):
        check_targets(base, "default", ids, Report())
        assert set(base.adapters["default"].targets.adapted) == paths
        enable_fast_parts(base, "default", ids)
        assert "plain" not in base.why
        loss, _tokens = trial_loss(base, "default", ids)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(adapter.trained.values())))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_ten_steps_equal_those_of_peft(family: str) -> None:
    base, theirs = both(family)
    parameters, others = base.adapters["default"].parameters, named(theirs)
    optimizers = [torch.optim.AdamW(list(one.values()), lr=1e-2) for one in (parameters, others)]
    for step in range(10):
        batch = [EXAMPLES[step % 5], EXAMPLES[(2 * step + 1) % 5]]
        found = our_loss(base, batch), pefts_loss(theirs, batch)
        assert distance(*found) < 1e-5
        for loss, optimizer in zip(found, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert max(distance(parameters[key], others[key]) for key in others) < 1e-4


def states(base: Base, text: list[int], adapter: str | None = "default") -> Tensor:
    with torch.no_grad():
        return hidden(base, row_of(base, [of_text([*text, 0])], 1.0, adapter))


def test_what_comes_before_the_sequence_is_the_base_models() -> None:
    base, _theirs = both("llama")
    with_it, alone = states(base, TEXTS[0]), states(base, TEXTS[0], None)
    assert torch.equal(with_it[:3], alone[:3])
    assert distance(with_it[3:], alone[3:]) > 0.01
    assert torch.equal(states(base, TEXTS[3]), states(base, TEXTS[3], None))


def test_folders_go_both_ways(tmp_path: Path) -> None:
    base, theirs = both("llama")
    save_adapter(base.adapters["default"], base.model, tmp_path / "ours", "")
    theirs.save_pretrained(tmp_path / "theirs")
    read = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours")
    assert read.peft_config["default"].alora_invocation_tokens == list(CALL)
    assert distance(pefts_loss(read, EXAMPLES), pefts_loss(theirs, EXAMPLES)) < LIMIT
    again = tiny_base("llama")
    AdapterFolder.read(tmp_path / "theirs").load_into(again, "default")
    assert again.adapters["default"].config.alora_invocation_tokens == CALL
    assert distance(our_loss(again, EXAMPLES), our_loss(base, EXAMPLES)) < 1e-6


# --- replies ----------------------------------------------------------------------------------------------------------


class Letters:
    def decode(self, ids: Sequence[int], **_options: object) -> str:
        return "".join(chr(256 + i) for i in ids)

    def get_added_vocab(self) -> dict[str, int]:
        return {}


def asked(text: list[int], adapter: str | None, new: int = 6) -> Request:
    return Request(text, SamplingConfig(max_new_tokens=new, temperature=0), adapter, ())


@pytest.mark.parametrize("tokens", [512, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_greedy_replies_equal_those_of_peft(family: str, tokens: int) -> None:
    """In one batch with a plain adapter and the base model, prompts whole or in chunks, with the prefix cache."""
    base, theirs = both(family)
    base.tokenizer = Letters()  # type: ignore[assignment]
    plain = base.adapters["plain"] = inject(base.model, LoraConfig(r=3), base.router, "plain")
    stir(plain, 4)
    engine = Engine(base, tokens=tokens)
    assert isinstance(engine._layout, Padded) == (family == "bloom")
    requests = [asked(text, name) for text in TEXTS for name in ("default", None, "plain")]
    first = [reply.ids for reply in replies(engine, requests)]
    again = [reply.ids for reply in replies(engine, requests)]
    assert again == first
    assert [replies(engine, [one])[0].ids for one in requests] == first
    for text, ours in zip(TEXTS, first[::3], strict=True):
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted = theirs.generate(input_ids=torch.tensor([text]), attention_mask=torch.ones(1, len(text)), **options)
        assert ours == wanted[0, len(text) :].tolist(), text
    assert first[0] != first[1]
    assert first[9] == first[10], "a prompt without the sequence is answered by the base model"


def test_the_base_models_prefix_serves_the_adapter() -> None:
    base, _theirs = both("llama")
    base.tokenizer = Letters()  # type: ignore[assignment]
    text = [*range(10, 34), *CALL, 40, 41, 42, 43, 44, 45, 46, 47]
    engine = Engine(base)
    cold = replies(engine, [asked(text, "default")])[0].ids
    layout = engine._layout
    assert isinstance(layout, Packed)
    loaded: list[int] = []
    load = layout.prefixes.load

    def spy(*args: Any) -> int:
        loaded.append(load(*args))
        return loaded[-1]

    layout.prefixes.load = spy  # type: ignore[method-assign]
    replies(engine, [asked(text, None)])
    assert loaded == [24], "three blocks before the sequence, which the adapter's request left"
    layout.prefixes._at.clear()
    replies(engine, [asked(text, None)])
    assert replies(engine, [asked(text, "default")])[0].ids == cold
    assert loaded[1:] == [0, 24]
    replies(engine, [asked(text, "default")])
    assert loaded[-1] == 32, "and one that the adapter itself left"


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_prompt_is_scored_as_it_is_computed_in_training(family: str) -> None:
    base, theirs = both(family)
    for text in TEXTS:
        (told,) = prompt_logprobs(base, [asked(text, "default")])
        with torch.no_grad():
            logprobs = torch.log_softmax(theirs(input_ids=torch.tensor([text]), use_cache=False).logits[0], -1)
        wanted = [float(logprobs[i, token]) for i, token in enumerate(text[1:])]
        assert [one.logprob for one in told if one] == pytest.approx(wanted, abs=1e-5)


def test_a_prompt_that_is_scored_in_chunks_uses_the_adapter_from_its_sequence_on(monkeypatch) -> None:
    base, _theirs = both("llama")
    asked_of = [asked(text, "default") for text in TEXTS]
    whole = [prompt_logprobs(base, [one])[0] for one in asked_of]
    Engine(base)
    monkeypatch.setattr("lorasmith.engine.scoring.BATCH_TOKENS", 1)
    for chunk in (4, 7):
        monkeypatch.setattr("lorasmith.engine.scoring.CHUNK_TOKENS", chunk)
        for one, wanted in zip(asked_of, whole, strict=True):
            (told,) = prompt_logprobs(base, [one])
            assert [one.logprob for one in told if one] == pytest.approx(
                [one.logprob for one in wanted if one], abs=1e-5
            )


def test_the_head_can_be_adapted_too() -> None:
    base, theirs = both("llama", target_modules=["lm_head", "q_proj"])
    ours, wanted = our_loss(base, EXAMPLES), pefts_loss(theirs, EXAMPLES)
    assert distance(ours, wanted) < 1e-6


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_call_of_the_model_itself_is_refused_because_it_does_not_tell_where_to_begin() -> None:
    base, _theirs = both("llama")
    base.router.route(None)
    with pytest.raises(AdapterError, match="adapter 'default' is an aLoRA, and a call of the model itself"):
        own_logits(base)
    remove(base.model, "default")
    own_logits(base)


def test_it_cannot_be_merged() -> None:
    base, _theirs = both("llama")
    with pytest.raises(AdapterError, match="is an aLoRA, which is active only from its invocation sequence on"):
        merged_weights(base.model, base.adapters["default"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modules_to_save": ("lm_head",)}, "modules_to_save and bias change tokens before"),
        ({"bias": "all"}, "modules_to_save and bias change tokens before"),
        ({"use_dora": True}, r"lora\.use_dora and lora\.alora_invocation_tokens are mutually exclusive"),
        ({"init_lora_weights": "pissa"}, "alora_invocation_tokens and lora.init_lora_weights=pissa are mutually"),
        ({"target_modules": ("embed_tokens", "q_proj")}, "embed_tokens is an embedding"),
        ({"alora_invocation_tokens": ()}, "alora_invocation_tokens"),
    ],
)
def test_what_changes_other_tokens_too_is_refused(options: dict[str, Any], words: str) -> None:
    base = tiny_base("llama")
    with pytest.raises(ConfigError, match=words):
        inject(base.model, LoraConfig(**{"alora_invocation_tokens": CALL} | options), base.router)


def test_rows_of_single_tokens_are_refused() -> None:
    base = tiny_base("llama")
    with pytest.raises(ConfigError, match="an aLoRA cannot train the rows of single tokens"):
        inject(base.model, LoraConfig(alora_invocation_tokens=CALL), base.router, tokens=[3])


# --- through the training path ----------------------------------------------------------------------------------------


def answer_start() -> tuple[int, ...]:
    return tuple(tokenizer("llama")("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"])


def test_a_run_trains_it_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    changes = {"alora_invocation_tokens": answer_start(), "save_every": 1, "eval_every": 1}
    trained(tmp_path / "whole", **changes, samples=("Who are you?",))
    trained(tmp_path / "plain")
    assert losses(tmp_path / "whole")[0] == losses(tmp_path / "plain")[0]
    assert losses(tmp_path / "whole")[1:] != losses(tmp_path / "plain")[1:]
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(3), **changes)
    trained(tmp_path / "run", resume=True, **changes)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert written["alora_invocation_tokens"] == list(answer_start())


def test_examples_without_the_sequence_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no example has the tokens \[3, 3, 3\] before what is trained on"):
        trained(tmp_path / "run", alora_invocation_tokens=(3, 3, 3))
    really = tuple(tokenizer("llama")("Really?", add_special_tokens=False)["input_ids"])
    report = Watch()
    trained(tmp_path / "some", report, alora_invocation_tokens=really)
    assert [text for text in report.warned if "examples do not have these tokens before" in text]
