"""Starting from an existing adapter: its weights and options, what must fit, and what is refused."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasmith import LoraConfig, train
from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.toml import load_config
from lorasmith.errors import AdapterError, ConfigError, RunError
from lorasmith.preflight.check import check
from lorasmith.training.run_files import read_summary
from tests.support.checks import config
from tests.support.families import distance, logits_of
from tests.support.peft_folder import SHOUTED, foreign
from tests.support.tiny import Crash, Watch, adapter_bytes, crash_at, metrics, model_folder, rows_file, trained

FIRST = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose options of LoRA are not the default ones."""
    run = tmp_path_factory.mktemp("first") / "run"
    trained(run, **FIRST)
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_training_starts_where_the_adapter_is(first, tmp_path):
    """Steps whose learning rate is next to nothing leave its weights; its options are taken over into config.toml."""
    run = tmp_path / "run"
    trained(run, start_from=str(first), learning_rate=1e-12, max_steps=1)
    before, after = weights(first / "adapter"), weights(run / "adapter")
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[key], before[key], atol=1e-9, rtol=0) for key in before)
    lora = load_config(run / "config.toml", {}).lora
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, sorted(lora.target_modules)) == (
        3,
        7,
        0.1,
        ["q_proj", "v_proj"],
    )


def test_an_unconverted_pissa_of_peft_goes_on_as_plain_lora(tmp_path):
    """Of twice the rank, for the unchanged base model; and the run resumes bit for bit."""
    folder = tmp_path / "pissa"
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"}
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder()), peft.LoraConfig(**options))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p += 0.05
    theirs.save_pretrained(folder)
    changes = {"start_from": str(folder), "save_every": 1, "max_steps": 3, "template": "model"}
    trained(tmp_path / "whole", **changes)
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(2), **changes)
    trained(tmp_path / "run", resume=True, **changes)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert {len(p) for key, p in weights(tmp_path / "run" / "adapter").items() if "lora_A" in key} == {4}
    trained(tmp_path / "still", **changes | {"learning_rate": 1e-12})
    plain = AutoModelForCausalLM.from_pretrained(model_folder())
    ours = peft.PeftModel.from_pretrained(plain, tmp_path / "still" / "adapter")
    ids = torch.arange(3, 30)[None]
    assert distance(logits_of(ours, ids), logits_of(theirs, ids)) < 1e-5


def test_its_loss_goes_on_from_that_of_the_adapter(first, tmp_path):
    """The losses before and after are those of the base model and of the adapter that comes out."""
    then = read_summary(first)
    same = trained(tmp_path / "same", start_from=str(first), learning_rate=1e-12, max_steps=1)
    assert (same.loss_before, same.loss_after) == pytest.approx((then.loss_before, then.loss_after), rel=1e-6)
    assert trained(tmp_path / "more", start_from=str(first), max_steps=8).loss_after < then.loss_after - 0.1
    notes = json.loads((tmp_path / "more" / "adapter" / "lorasmith.json").read_text("utf-8"))["notes"]
    hashed = AdapterFolder.read(first / "adapter").hash
    assert notes["start_from"] == {"folder": str(first / "adapter"), "sha256": hashed}


def test_a_run_that_started_from_an_adapter_resumes_bit_for_bit(first, tmp_path, monkeypatch):
    monkeypatch.chdir(first.parent)
    options = {"start_from": "run", "max_steps": 4, "save_every": 1, "eval_every": 1}
    trained(tmp_path / "whole", **options)
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(3), **options)
    monkeypatch.chdir(tmp_path)
    train(output=tmp_path / "run", resume=True)
    assert (metrics(tmp_path / "run"), adapter_bytes(tmp_path / "run")) == (
        metrics(tmp_path / "whole"), adapter_bytes(tmp_path / "whole")
    )  # fmt: skip


def retrain(run: Path) -> None:
    trained(run, overwrite=True, max_steps=2, learning_rate=3e-3, **FIRST)


@pytest.mark.parametrize("change", [shutil.rmtree, retrain])
def test_with_a_checkpoint_the_adapter_it_started_from_is_not_needed(first, tmp_path, change):
    start = tmp_path / "start"
    shutil.copytree(first, start)
    options = {"start_from": str(start), "max_steps": 4, "save_every": 1, "eval_every": 1}
    trained(tmp_path / "whole", **options)
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(3), **options)
    change(start)
    train(output=tmp_path / "run", resume=True)
    assert (metrics(tmp_path / "run"), adapter_bytes(tmp_path / "run")) == (
        metrics(tmp_path / "whole"), adapter_bytes(tmp_path / "whole")
    )  # fmt: skip
    stored = [(tmp_path / name / "adapter" / "lorasmith.json").read_text("utf-8") for name in ("run", "whole")]
    assert stored[0] == stored[1]


def test_without_a_checkpoint_it_must_be_the_same(first, tmp_path):
    start, run = tmp_path / "start", tmp_path / "run"
    shutil.copytree(first, start)
    with pytest.raises(Crash):
        trained(run, crash_at(2), start_from=str(start), save_every=0)
    retrain(start)
    with pytest.raises(RunError) as caught:
        train(output=run, resume=True)
    assert str(caught.value) == (
        f"{run}: the adapter that this run starts from has changed since ({start}). Restore it, or start again with "
        "--overwrite."
    )


def test_the_base_model_is_that_of_the_adapter(first, tmp_path):
    files, watch = rows_file(tmp_path / "rows.jsonl"), Watch()
    train(files, start_from=str(first), output=tmp_path / "run", report=watch, max_steps=1, held_out=0)
    assert load_config(tmp_path / "run" / "config.toml", {}).model.model == str(model_folder())
    assert not any("No base model given" in text for text in watch.said)


def test_options_that_differ_are_refused_and_dropout_may_change(first, tmp_path):
    with pytest.raises(ConfigError) as caught:
        trained(tmp_path / "run", start_from=str(first), r=8, lora_alpha=7, use_rslora=True)
    assert caught.value.problems == (
        f"lora.r: 8, but {first / 'adapter'} was trained with 3. Continue with the same value.",
        f"lora.use_rslora: True, but {first / 'adapter'} was trained with False. Continue with the same value.",
    )
    trained(tmp_path / "run", start_from=str(first), lora=LoraConfig(r=3, lora_dropout=0.5), max_steps=1)
    assert load_config(tmp_path / "run" / "config.toml", {}).lora.lora_dropout == 0.5
    trained(tmp_path / "same", start_from=str(first), max_steps=1)
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(tmp_path / "same"), "the dropout has an effect"


def test_the_same_modules_under_another_name_are_the_same(first, tmp_path):
    expression = r"model\.layers\.\d+\.self_attn\.[qv]_proj"
    trained(tmp_path / "run", start_from=str(first), target_modules=expression, max_steps=1)
    count = len(weights(first / "adapter")) // 2
    with pytest.raises(
        ConfigError, match=rf"^lora\.target_modules: \S+ has {count} adapted modules, but these"
    ) as caught:
        trained(tmp_path / "other", start_from=str(first), target_modules="all-linear")
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("template", "alpaca", "data.template: 'alpaca', but {folder} was trained with 'model'."),
        ("special_tokens", "tokens", "data.special_tokens: 'tokens', but {folder} was trained with 'text'."),
        ("system", "Be brief.", "data.system: 'Be brief.', but {folder} was trained with ''."),
    ],
)
def test_another_encoding_is_refused(first, tmp_path, option, value, said):
    with pytest.raises(ConfigError) as caught:
        trained(tmp_path / "run", start_from=str(first), **{option: value})
    assert caught.value.problems[0] == said.format(folder=first / "adapter") + " Continue with the same value."


def test_another_base_model_is_refused(first, tmp_path):
    base = Path(shutil.copytree(model_folder(), tmp_path / "base"))
    settings = json.loads((base / "config.json").read_text("utf-8")) | {"rms_norm_eps": 0.25}
    (base / "config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(AdapterError, match="is not the base model that this adapter was trained on"):
        trained(tmp_path / "run", start_from=str(first), model=str(base))


@pytest.mark.parametrize(
    ("name", "said"), [("nothing", "the folder does not exist"), (".", "not a run or adapter folder")]
)
def test_a_folder_without_an_adapter_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=rf"^training\.start_from: .*{said}"):
        trained(tmp_path / "run", start_from=name, model="there-is-no-such-model")


def test_an_adapter_of_peft_is_continued_and_its_encoding_is_not_known(tmp_path):
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder()), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    model.save_pretrained(tmp_path / "theirs")
    watch = Watch()
    trained(tmp_path / "run", watch, start_from=str(tmp_path / "theirs"), max_steps=1, learning_rate=1e-12)
    before, after = weights(tmp_path / "theirs"), weights(tmp_path / "run" / "adapter")
    assert all(torch.allclose(after[key], before[key], atol=1e-9, rtol=0) for key in before | after)
    assert any("was made by another tool" in text for text in watch.warned)


def test_the_chat_template_in_its_folder_must_be_the_one_used_here(tmp_path):
    foreign(tmp_path / "theirs", "llama", added=())
    start = {"start_from": str(tmp_path / "theirs"), "max_steps": 1}
    watch = Watch()
    trained(tmp_path / "same", watch, **start)
    assert not any("another tool" in text for text in watch.warned)
    (tmp_path / "theirs" / "chat_template.jinja").write_text(SHOUTED)
    with pytest.raises(ConfigError) as caught:
        trained(tmp_path / "other", **start)
    assert str(caught.value) == (
        f"data.template: {tmp_path / 'theirs'} was trained by another tool with the chat template in its folder, which "
        f"is not the one used here. Continue with the same one: --template {tmp_path / 'theirs'}/chat_template.jinja"
    )
    trained(tmp_path / "other", template=f"{tmp_path / 'theirs'}/chat_template.jinja", **start)


@pytest.mark.parametrize("files", ["all", "config"])
def test_a_chat_template_in_the_tokenizers_configuration_has_to_be_saved_first(tmp_path, files):
    theirs = tmp_path / "theirs"
    foreign(theirs, "llama", added=())
    (theirs / "chat_template.jinja").unlink()
    if files == "config":
        for file in theirs.glob("tokenizer*"):
            file.unlink()
        (theirs / "tokenizer_config.json").write_text(json.dumps({"chat_template": SHOUTED}))
    else:
        path = theirs / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": SHOUTED}))
    with pytest.raises(ConfigError) as caught:
        trained(tmp_path / "run", start_from=str(theirs), max_steps=1)
    path = theirs / "chat_template.jinja"
    assert str(caught.value) == (
        f"data.template: {theirs} was trained by another tool with the chat template in its tokenizer_config.json, "
        f"which is not the one used here. Save that template as {path}, and continue with --template {path}"
    )
    path.write_text(SHOUTED)
    trained(tmp_path / "run", start_from=str(theirs), max_steps=1, template=str(path))


def test_a_folder_with_a_tokenizer_but_no_template_leads_to_the_models_own(tmp_path):
    theirs = tmp_path / "theirs"
    foreign(theirs, "llama", added=())
    (theirs / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"with the model's own chat template, .* --template model$"):
        trained(tmp_path / "run", start_from=str(theirs), max_steps=1, template="alpaca")
    trained(tmp_path / "run", start_from=str(theirs), max_steps=1, template="model")


def test_an_adapter_with_added_tokens_is_not_continued(tmp_path):
    foreign(tmp_path, "llama", modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(AdapterError, match="was trained with tokens that were added to the tokenizer of"):
        trained(tmp_path / "run", start_from=str(tmp_path))


def test_an_adapter_with_trained_rows_goes_on_with_these_rows_alone(tmp_path):
    foreign(tmp_path / "theirs", "llama", added=(), trainable_token_indices=[7, 9])
    run, watch = tmp_path / "run", Watch()
    trained(run, watch, start_from=str(tmp_path / "theirs"), template=str(tmp_path / "theirs" / "chat_template.jinja"))
    before, after = weights(tmp_path / "theirs"), weights(run / "adapter")
    assert {key: tensor.shape for key, tensor in after.items()} == {key: t.shape for key, t in before.items()}
    raw = json.loads((run / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert raw["trainable_token_indices"] == {"embed_tokens": [7, 9]}


def test_check_says_what_training_would(first, tmp_path):
    files = rows_file(tmp_path / "rows.jsonl")
    found = check(config(files, start_from=str(first)))
    assert (found.problems, list(found.facts.targets)) == ([], ["q_proj", "v_proj"])
    (problem,) = check(config(files, start_from=str(tmp_path / "nothing"))).problems
    assert problem.startswith("training.start_from: ")


def test_a_run_resumes_only_from_the_same_adapter(first, tmp_path):
    trained(tmp_path / "run", start_from=str(first), max_steps=1)
    with pytest.raises(RunError, match=r"training\.start_from: was '.*/run', now '.*/other'"):
        trained(tmp_path / "run", resume=True, max_steps=1, start_from=str(tmp_path / "other"))


@pytest.mark.parametrize("name", ["run", "run/adapter", "link"])
def test_the_adapter_it_starts_from_is_not_overwritten(tmp_path, name):
    run = tmp_path / "run"
    trained(run, max_steps=1)
    (tmp_path / "link").symlink_to(run / "adapter")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    start = str(tmp_path / name)
    with pytest.raises(RunError) as caught:
        trained(run, start_from=start, overwrite=True, max_steps=2)
    assert str(caught.value) == f"{run} contains files that are still needed ({start}). Choose another --output."
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
