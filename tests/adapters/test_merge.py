"""Merging: plain transformers must give the adapter's logits, and a merge that does not is never written."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, dynamic_module_utils

from lorasmith.adapters import merge as export
from lorasmith.adapters.folder import end_ids, write_adapter
from lorasmith.adapters.merge import FLOAT32_LIMIT, certify, merge_run
from lorasmith.adapters.session import open_adapters
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.data.rows.conversation import Message
from lorasmith.data.template.encoding import Template
from lorasmith.errors import AdapterError, ModelError, RunError
from lorasmith.loading.load import load_base
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.lora.inject import inject
from lorasmith.model.identity import identity
from lorasmith.system.locking import locked
from tests.support.families import distance, embedding, logits_of, stir
from tests.support.model_folders import ENDS, make_folder
from tests.support.tiny import CHATML, Watch, model_folder
from tests.support.tokenizer_layouts import file_ids, tokenizer_folder

FLOAT32 = ModelConfig(dtype="float32")
# Shows an empty thought in the last answer only, as Qwen3's does: earlier turns change when a later one follows.
QWEN3 = CHATML.replace(
    "message['content']",
    "('<think>\n\n</think>\n\n' if message['role'] == 'assistant' and loop.last else '') + message['content']",
)
# The prompt opens a thought that an answer does not show: every conversation is refused.
REFUSING = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}" + CHATML


def adapter_of(base_folder: Path, folder: Path, size: float = 1.0, seed: int = 1, **options: Any) -> Path:
    """An adapter folder with random weights, as a training would leave it."""
    base = load_base(ModelConfig(model=str(base_folder), dtype="float32", device="cpu"))
    adapter = inject(base.model, LoraConfig(**({"r": 4} | options)), base.router)
    stir(adapter, seed)
    with torch.no_grad():
        for key, parameter in adapter.parameters.items():
            if ".lora_B." in key:
                parameter *= size
    base.adapters["default"] = adapter
    write_adapter(base, "default", Template.of(base.tokenizer), folder, {"dtype": "float32"})
    return folder


def base_with(template: str, folder: Path) -> Path:
    """A copy of the tiny base whose tokenizer has another chat template."""
    shutil.copytree(model_folder(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def plain(folder: Path) -> PreTrainedModel:
    """As a person would load it who does not know lorasmith."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


def of_adapter(folder: Path) -> Tensor:
    return logits_of(open_adapters([folder], FLOAT32).base)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"modules_to_save": ("lm_head",), "target_modules": ("q_proj", "embed_tokens"), "bias": "all"}),
        ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}}),
        ("gpt2", {"target_modules": ("c_attn", "c_fc"), "bias": "all"}),  # Conv1D: weights lie transposed
        ("gpt2", {"target_modules": ("wte",)}),
        ("qwen2", {}),
        ("bloom", {}),
    ],
)
def test_float32_the_merged_folder_in_plain_transformers_answers_as_the_adapter(tmp_path, family, options):
    run = adapter_of(model_folder(family), tmp_path / "adapter", **options)
    certificate = merge_run(run, tmp_path / "merged", FLOAT32)
    merged = plain(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    wanted = of_adapter(run)
    assert distance(logits_of(plain(model_folder(family))), wanted) > 0.01, "the adapter changes too little"
    assert distance(logits_of(merged), wanted) < 1e-4
    assert certificate.holds
    assert certificate.error < 1e-5
    assert (certificate.limit, certificate.dtype) == (FLOAT32_LIMIT, "float32")
    assert certificate.agreeing == certificate.positions > 50
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("Why is the sky blue?")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(model_folder(family))("Why is the sky blue?")["input_ids"]
    assert not list(tmp_path.glob(".*"))


def test_the_tokenizer_of_a_merged_model_has_the_ids_of_the_training(tmp_path):
    """transformers would choose a class that splits 2024 otherwise, also for the merged model."""
    base = Path(shutil.copytree(model_folder("qwen2"), tmp_path / "base"))
    tokenizer_folder(base, "llama3 small", "qwen2", "LlamaTokenizerFast", chat_template=CHATML)
    (wanted,) = file_ids(base, ["In 2024"])
    assert AutoTokenizer.from_pretrained(base)("In 2024")["input_ids"] != wanted
    adapter = adapter_of(base, tmp_path / "adapter")
    assert open_adapters([adapter], FLOAT32).base.tokenizer("In 2024")["input_ids"] == wanted
    merge_run(adapter, tmp_path / "merged", FLOAT32)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("In 2024")["input_ids"] == wanted
    assert load_tokenizer(tmp_path / "merged")("In 2024")["input_ids"] == wanted


def test_the_configuration_of_the_base_stays_what_it_was(tmp_path):
    run = adapter_of(model_folder("gpt2"), tmp_path / "adapter")
    merge_run(run, tmp_path / "merged", FLOAT32)
    now, then = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "merged", model_folder("gpt2")))
    assert now == then
    assert now["resid_pdrop"] == 0.1  # no dropout while lorasmith holds the model, and back in what it writes


def base_in_bfloat16(folder: Path, family: str = "llama") -> Path:
    """The tiny base as most are: its weights are bfloat16 already, so that rounding moves the least."""
    shutil.copytree(model_folder(family), folder)
    plain(model_folder(family)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("on_disk", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [0.01, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_bfloat16_is_as_near_as_rounding_the_base_allows(tmp_path, seed, size, on_disk):
    base = model_folder() if on_disk == "float32" else base_in_bfloat16(tmp_path / "base")
    run = adapter_of(base, tmp_path / "adapter", size, seed)
    certificate = merge_run(run, tmp_path / "merged", ModelConfig(dtype="bfloat16"))
    assert certificate.holds
    assert 1e-3 < certificate.limit < 0.2
    merged = plain(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert distance(logits_of(merged.float()), of_adapter(run)) < 0.2


def test_auto_is_the_dtype_of_the_base_on_disk(tmp_path):
    run = adapter_of(base_in_bfloat16(tmp_path / "base"), tmp_path / "adapter")
    assert merge_run(run, tmp_path / "merged").dtype == "bfloat16"
    assert merge_run(run, tmp_path / "wide", ModelConfig(dtype="float64")).dtype == "float64"
    assert {p.dtype for p in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}


# --- a merge that is wrong --------------------------------------------------------------------------------------------


def noise(merged: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: W + 0.02 * torch.randn(W.shape).to(W.dtype) for name, W in merged.items()}


def one_row(merged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output of one neuron of one layer."""
    name = sorted(merged)[0]
    merged[name][3] *= 1.5
    return merged


def nothing(_merged: dict[str, Tensor]) -> dict[str, Tensor]:
    return {}


WRONG = [(noise, "float32"), (noise, "bfloat16"), (nothing, "float32"), (nothing, "bfloat16"), (one_row, "float32")]


@pytest.mark.parametrize(("wrong", "dtype"), WRONG)  # in bfloat16 one row is less than what rounding moves
def test_a_wrong_merge_is_not_written(tmp_path, monkeypatch, wrong, dtype):
    run = adapter_of(model_folder(), tmp_path / "adapter")
    right = export.merged_weights
    monkeypatch.setattr(export, "merged_weights", lambda *given: wrong(right(*given)))
    with pytest.raises(
        AdapterError,
        match=r"merged: not written, because the merged model does not match the adapter: \w+: relative logit "
        r"error \S+ ",
    ) as caught:
        merge_run(run, tmp_path / "merged", ModelConfig(dtype=dtype))
    assert ("--dtype float32" in str(caught.value)) is (dtype == "bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_was_there_stays_when_the_merge_is_wrong(tmp_path, monkeypatch):
    run = adapter_of(model_folder(), tmp_path / "adapter")
    merge_run(run, tmp_path / "merged", FLOAT32)
    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    monkeypatch.setattr(export, "merged_weights", lambda *_given: {})
    with pytest.raises(AdapterError):
        merge_run(run, tmp_path / "merged", FLOAT32, overwrite=True)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before


# --- tied embeddings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["modules_to_save", "target_modules"])
def test_one_end_of_a_tied_pair_is_untied(tmp_path, option):
    run = adapter_of(model_folder("bloom"), tmp_path / "adapter", **{option: (embedding("bloom"),)})
    report = Watch()
    assert merge_run(run, tmp_path / "merged", FLOAT32, report=report).untied
    assert any("tie_word_embeddings=false" in text for text in report.said)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    merged, base = plain(tmp_path / "merged"), plain(model_folder("bloom"))
    assert torch.equal(merged.get_output_embeddings().weight, base.get_output_embeddings().weight)
    assert not torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert distance(logits_of(merged), of_adapter(run)) < 1e-4


def test_a_tied_pair_that_did_not_change_stays_tied(tmp_path):
    run = adapter_of(model_folder("bloom"), tmp_path / "adapter")
    assert not merge_run(run, tmp_path / "merged", FLOAT32).untied
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


# --- templates and models ---------------------------------------------------------------------------------------------


def test_a_template_that_rewrites_earlier_turns(tmp_path):
    run = adapter_of(base_with(QWEN3, tmp_path / "base"), tmp_path / "adapter")
    template = open_adapters([run], FLOAT32).template
    first, second = template.encode_all(export.PROBES[2])  # one would say that this template rewrites nothing
    assert template.probe_ids(export.PROBES[2]) == first.ids + second.ids
    assert merge_run(run, tmp_path / "merged", FLOAT32).holds
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == QWEN3


SYSTEM = 'You\'re "short" {% raw %} \\n 🙂\nof words.'


@pytest.mark.parametrize(
    ("family", "kind", "system"),
    [
        ("llama", "model", SYSTEM),
        ("llama", "human-assistant", ""),
        ("llama", "alpaca", "Be short."),
        ("bloom", "auto", ""),
        ("bloom", "chatml", SYSTEM),
        ("bloom", "file", ""),
    ],
)
def test_the_merged_folder_says_what_the_adapter_was_trained_to_say(tmp_path, family, kind, system):
    run = adapter_of(model_folder(family), tmp_path / "adapter")
    (tmp_path / "mine.jinja").write_text(CHATML.replace("assistant", "reply").replace("im_end", "im_start"), "utf-8")
    base = load_base(FLOAT32.model_copy(update={"model": str(model_folder(family))}))
    kind = str(tmp_path / "mine.jinja") if kind == "file" else kind
    about = json.loads((run / "lorasmith.json").read_text("utf-8"))
    about["template"] = Template.of(base.tokenizer, kind, end_ids(base), system).to_json()
    (run / "lorasmith.json").write_text(json.dumps(about), "utf-8")
    template = open_adapters([run], FLOAT32).template
    merge_run(run, tmp_path / "merged", FLOAT32)
    merged = load_base(FLOAT32.model_copy(update={"model": str(tmp_path / "merged")}))
    found = Template.of(merged.tokenizer, eos_ids=end_ids(merged))
    assert [found.probe_ids(probe) for probe in export.PROBES] == [template.probe_ids(p) for p in export.PROBES]
    asked = (Message("system", "Mine."), Message("user", "Why?"), Message("assistant", "So."), Message("user", "Ah?"))
    for messages in (asked, asked[1:], asked[3:]):
        assert found.encode_prompt(messages) == template.encode_prompt(messages)
    assert found.stop_ids == template.stop_ids
    assert sorted(end_ids(merged)) == list(template.stop_ids)


def test_a_template_that_refuses_every_probe(tmp_path):
    run = adapter_of(base_with(REFUSING, tmp_path / "base"), tmp_path / "adapter")
    template = open_adapters([run], FLOAT32).template
    assert [template.probe_ids(probe) for probe in export.PROBES] == [[], [], []]
    assert merge_run(run, tmp_path / "merged", FLOAT32).positions > 50


def test_a_model_that_can_look_at_few_tokens(tmp_path):
    shutil.copytree(model_folder("gpt2"), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"n_positions": 16}))
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:16].clone()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    run = adapter_of(tmp_path / "base", tmp_path / "adapter")
    assert merge_run(run, tmp_path / "merged", FLOAT32).holds


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class TwiceConfig(LlamaConfig):
    model_type = "twice"


class Twice(LlamaForCausalLM):
    config_class = TwiceConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out
"""


def test_a_model_with_code_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    base = tmp_path / "base"
    shutil.copytree(model_folder(), base)
    (base / "twice.py").write_text(OWN_CODE)
    config = json.loads((base / "config.json").read_text())
    auto = {"AutoConfig": "twice.TwiceConfig", "AutoModelForCausalLM": "twice.Twice"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "twice", "auto_map": auto}))
    trusted = ModelConfig(trust_remote_code=True, dtype="float32")
    adapter = adapter_of(model_folder(), tmp_path / "adapter")
    about = json.loads((adapter / "lorasmith.json").read_text())
    about["base"] = {"model": str(base), "identity": identity(base, load_tokenizer(model_folder()))}
    (adapter / "lorasmith.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        merge_run(adapter, tmp_path / "merged", FLOAT32)
    assert merge_run(adapter, tmp_path / "merged", trusted).holds
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True).eval()
    assert type(merged).__name__ == "Twice"
    assert distance(logits_of(merged), logits_of(open_adapters([adapter], trusted).base)) < 1e-4


# --- where it is written ----------------------------------------------------------------------------------------------


def test_what_is_there_is_not_replaced_without_being_asked(tmp_path):
    run = adapter_of(model_folder(), tmp_path / "adapter")
    out = tmp_path / "merged"
    out.mkdir()
    merge_run(run, out, FLOAT32)  # an empty folder is as good as none
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match=r"already exists\. Choose another --output, or replace it with --overwrite"):
        merge_run(run, out, FLOAT32)
    other = adapter_of(model_folder(), tmp_path / "other", seed=2)
    merge_run(other, out, FLOAT32, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged", "other"]


def test_overwrite_leaves_alone_what_is_no_model(tmp_path):
    run = adapter_of(model_folder(), tmp_path / "adapter")
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "thesis.txt").write_text("years of work")
    for there, why in (
        (papers, "was not written by lorasmith"),
        (papers / "thesis.txt", "is a file, not a folder"),
    ):
        with pytest.raises(RunError, match=why):
            merge_run(run, there, FLOAT32, overwrite=True)
    assert (papers / "thesis.txt").read_text() == "years of work"


def test_overwrite_leaves_alone_what_is_being_merged(tmp_path, monkeypatch):
    base = tmp_path / "base"
    merge_run(adapter_of(model_folder(), tmp_path / "first"), base, FLOAT32)
    run = adapter_of(base, tmp_path / "adapter")
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(base)
    before = (base / "model.safetensors").read_bytes()
    for there in (base, tmp_path / "link", ".", "../base"):
        with pytest.raises(RunError, match="contains files that are still needed"):
            merge_run(run, there, FLOAT32, overwrite=True)
    shutil.move(tmp_path / "adapter", base / "adapter")
    with pytest.raises(RunError, match="base contains adapter, which lorasmith did not write"):
        merge_run(base / "adapter", base, FLOAT32, overwrite=True)
    assert (base / "model.safetensors").read_bytes() == before


def test_overwrite_leaves_alone_what_looks_like_a_model_and_what_holds_more_than_one(tmp_path):
    run = adapter_of(model_folder(), tmp_path / "adapter")
    site = tmp_path / "mysite"
    site.mkdir()
    (site / "config.json").write_text("{}")
    (site / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="mysite was not written by lorasmith"):
        merge_run(run, site, FLOAT32, overwrite=True)
    assert (site / "thesis.txt").read_text() == "years of work"
    out = tmp_path / "merged"
    merge_run(run, out, FLOAT32)
    (out / "README.md").write_text("my notes")
    (out / ".git").mkdir()
    (out / "elsewhere").symlink_to(site)
    with pytest.raises(RunError, match=r"merged contains \.git, README\.md, elsewhere, which lorasmith did not"):
        merge_run(run, out, FLOAT32, overwrite=True)
    assert (out / "README.md").read_text() == "my notes"


def test_a_merge_that_was_killed_between_two_renames_lost_nothing(tmp_path):
    """The old folder had given its name away, and the new one had not got it yet."""
    run, out = adapter_of(model_folder(), tmp_path / "adapter"), tmp_path / "merged"
    merge_run(run, out, FLOAT32)
    before = (out / "model.safetensors").read_bytes()
    out.rename(tmp_path / ".merged.lorasmith-old")
    shutil.copytree(model_folder(), tmp_path / ".merged.lorasmith-new-abcd1234")
    with pytest.raises(RunError, match="already exists"):
        merge_run(run, out, FLOAT32)
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_two_merges_into_one_folder(tmp_path):
    run, out = adapter_of(model_folder(), tmp_path / "adapter"), tmp_path / "merged"
    with locked(tmp_path / ".merged.lorasmith-lock", out):
        for overwrite in (False, True):
            with pytest.raises(RunError, match=rf"merged is in use by process {os.getpid()}\."):
                merge_run(run, out, FLOAT32, overwrite=overwrite)
    assert merge_run(run, out, FLOAT32).holds


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    run = adapter_of(model_folder(), tmp_path / "adapter")
    merge_run(adapter_of(model_folder(), tmp_path / "other", seed=2), tmp_path / "disk" / "old", FLOAT32)
    (tmp_path / "merged").symlink_to(tmp_path / "disk" / "old")
    merge_run(run, tmp_path / "merged", FLOAT32, overwrite=True)
    assert (tmp_path / "merged").is_symlink()
    assert distance(logits_of(plain(tmp_path / "disk" / "old")), of_adapter(run)) < 1e-4


def test_a_full_disk_speaks_of_no_run(tmp_path, monkeypatch):
    run = adapter_of(model_folder(), tmp_path / "adapter")

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_save", full)
    with pytest.raises(RunError, match=r"cannot be written: No space left on device\..* choose another --output\.$"):
        merge_run(run, tmp_path / "merged", FLOAT32)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# --- the certificate by itself ----------------------------------------------------------------------------------------

EXACT = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.01, -1.0], [0.0, -2.0, 2.0]])


def certified(merged: Tensor, rounded: Tensor = EXACT, dtype: torch.dtype = torch.float32) -> export.Certificate:
    """Two probes, of two positions and of one."""
    a, r, m = ([t[:2], t[2:]] for t in (EXACT, rounded, merged))
    return certify("out", dtype, a, [r], m, untied=False)


def test_equal_logits_are_certified():
    found = certified(EXACT)
    assert (found.error, found.limit, found.agreeing, found.positions) == (0, FLOAT32_LIMIT, 3, 3)
    assert found.holds
    assert "float32: relative logit error 0.0e+00 (limit 1.0e-04)" in str(found)
    assert "the top token agrees at 3 of 3 positions" in str(found)


def test_the_error_is_the_root_mean_square_relative_to_the_logits():
    found = certified(EXACT * 1.01)
    assert found.error == pytest.approx(0.01, rel=1e-4)
    assert not found.holds
    assert certified(EXACT * (1 + 9e-5)).holds
    assert not certified(EXACT * (1 + 1.1e-4)).holds


def test_in_a_narrow_dtype_a_fifth_more_than_rounding_moves_is_allowed():
    rounded = EXACT * 1.01
    assert certified(EXACT * (1 - 0.0119), rounded, torch.bfloat16).holds
    assert not certified(EXACT * (1 - 0.0121), rounded, torch.bfloat16).holds


def test_a_likeliest_token_that_changed_is_a_refusal_where_its_lead_was_clear():
    rounded = EXACT + 0.4 * torch.eye(3)  # may move a lead by 2.4 * 0.4: two of 2 are clear, that of 0.01 is not
    narrow = EXACT.clone()
    narrow[1, 0] += 0.02
    found = certified(narrow, rounded, torch.bfloat16)
    assert (found.agreeing, found.positions) == (2, 2)
    assert found.holds
    wide = EXACT.clone()
    wide[0, 1] = 3.01
    found = certified(wide, EXACT + 0.6, torch.bfloat16)
    assert (found.agreeing, found.positions) == (1, 2)
    assert found.error < found.limit
    assert not found.holds


def test_several_runs_that_round_differently_allow_what_the_farthest_of_them_allows():
    merged = [EXACT * (1 - 0.0119)]
    assert not certify("out", torch.bfloat16, [EXACT], [[EXACT * 1.001]], merged, untied=False).holds
    assert certify("out", torch.bfloat16, [EXACT], [[EXACT * 1.001], [EXACT * 1.01]], merged, untied=False).holds


def test_in_a_mixture_of_experts_a_few_positions_may_go_to_another_expert():
    wanted = [EXACT.repeat(20, 1)]
    merged = [wanted[0].clone()]
    merged[0][7] = -merged[0][7]
    assert not certify("out", torch.bfloat16, wanted, [wanted], merged, untied=False).holds
    assert certify("out", torch.bfloat16, wanted, [wanted], merged, untied=False, share=0.95).holds
    merged[0][:6] *= -1
    assert not certify("out", torch.bfloat16, wanted, [wanted], merged, untied=False, share=0.95).holds


def test_a_weight_that_two_layers_share_is_refused(tmp_path: Path):
    model = plain(model_folder())
    first, second = (f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(
        AdapterError, match=rf"^{first} and {second} are one weight in LlamaForCausalLM, but the adapter"
    ):
        export._refuse_shared(model, {first: torch.ones(2), second: torch.zeros(2)})
    with pytest.raises(AdapterError):
        export._refuse_shared(model, {second: torch.ones(2)})
    export._refuse_shared(model, {first: torch.ones(2), second: torch.ones(2)})
    export._refuse_shared(model, {})


@pytest.mark.parametrize("family", ["openai-gpt", "xglm"])
def test_tensors_that_are_no_parameters_get_the_dtype_too(family: str, tmp_path: Path):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "d_model": 32, "num_layers": 2}
    sizes |= {"attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 128}
    own = vars(AutoConfig.for_model(family))
    base = make_folder(tmp_path / "base", family, ENDS | {key: size for key, size in sizes.items() if key in own})
    run = adapter_of(base, tmp_path / "adapter", 0.1)
    assert merge_run(run, tmp_path / "merged", ModelConfig(dtype="bfloat16")).holds


def test_numbers_that_are_none_are_no_certificate():
    assert not certified(EXACT * float("nan")).holds
    assert not certified(EXACT * float("nan"), EXACT * float("nan"), torch.float16).holds
