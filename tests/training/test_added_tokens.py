"""Runs with data.add_tokens: what is trained, what is written, and that PEFT, resuming, chat and merging agree."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorasmith import LoraConfig, train
from lorasmith.adapters.folder import AdapterFolder
from lorasmith.adapters.merge import merge_run
from lorasmith.adapters.session import open_adapters
from lorasmith.config.model import ModelConfig
from lorasmith.config.toml import load_config
from lorasmith.data.rows.conversation import Message
from lorasmith.engine.engine import Engine
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.loading.load import load_base
from lorasmith.lora.token_rows import ROWS
from lorasmith.model.vocabulary import embedding_rows
from lorasmith.preflight.check import check
from lorasmith.serve.discovery import read
from lorasmith.serve.registry import load_version
from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.checks import config
from tests.support.families import distance, logits_of
from tests.support.tiny import ANSWERS, Crash, Watch, adapter_bytes, crash_at, metrics, model_folder, row, settings

TOKENS = ("<call>", "</call>")
IDS = torch.tensor([[5, 17, 301, 3, 8, 300, 92, 31]])  # the added tokens, 300 and 301, among others
LIMIT = 1e-4  # float32: sums in another order
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"], ids=["untied", "tied"])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::peft.utils.warning.PeftWarning")


def rows(path: Path) -> str:
    """Rows whose answers are between the added tokens."""
    made = [row(i) for i in range(12)]
    for i, one in enumerate(made):
        one["messages"][1]["content"] = f"<call>{ANSWERS[i % 5]}</call>"  # type: ignore[index]
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in made), "utf-8")
    return str(path)


def trained(run: Path, family: str = "llama", report: Watch | None = None, **changes: Any) -> Path:
    model = changes.pop("model", model_folder(family))
    options = {"output": run, "add_tokens": TOKENS} | settings(model=str(model)) | changes
    train(rows(run.with_name("rows.jsonl")), report=report, **options)
    return run


@pytest.fixture(scope="module", params=["llama", "gpt2"], ids=["untied", "tied"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("tokens") / "run", request.param, max_steps=40)


def model_of(run: Path) -> Path:
    return Path(load_config(run / "config.toml", {}).model.model)


def opened(run: Path) -> Any:
    return open_adapters([run], ModelConfig(dtype="float32", device="cpu"))


def in_peft(run: Path, tokens: int = 2) -> Any:
    """The adapter in PEFT, with the tokenizer of its folder and the base model resized for it."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(model_of(run), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    assert tokenizer.convert_tokens_to_ids(list(TOKENS)) == [300, 301]
    model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size), mean_resizing=False)
    return peft.PeftModel.from_pretrained(model, run / "adapter").eval()


def test_peft_gives_the_same_logits(run: Path) -> None:
    ours = opened(run)
    assert distance(logits_of(ours.base, IDS), logits_of(in_peft(run), IDS)) < LIMIT
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    found = [tensor for key, tensor in tensors.items() if key.endswith(ROWS)]
    assert [tuple(tensor.shape) for tensor in found] == [(2, 32)] * (1 if "gpt2" in str(model_of(run)) else 2)
    assert all(tensor[0].ne(tensor[1]).all() for tensor in found)  # both began as the same mean


def test_chat_reads_and_writes_the_tokens(run: Path) -> None:
    session = opened(run)
    ids = session.template.encode_prompt([Message("user", "Say <call> and </call>")])
    assert {300, 301} <= set(ids)
    assert session.base.tokenizer.decode([300, 301], skip_special_tokens=True) == "<call></call>"
    assert session.generate(row(0)["messages"][0]["content"], max_new_tokens=5).startswith("<call>")  # type: ignore[index]


def test_tokens_with_other_ids_are_refused(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    about = json.loads((copy / "lorasmith.json").read_text("utf-8"))
    about["tokens"] = [one | {"id": one["id"] + 1} for one in about["tokens"]]
    (copy / "lorasmith.json").write_text(json.dumps(about), "utf-8")
    with pytest.raises(AdapterError, match=r"the added token '?<call>'? had the id 301 in the training"):
        opened(copy)


def test_it_is_merged_with_its_tokens(run: Path, tmp_path: Path) -> None:
    assert merge_run(run, tmp_path / "merged", ModelConfig(dtype="float32", device="cpu")).holds
    with quiet_transformers():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.vocab_size == 302
    assert merged.config.tie_word_embeddings == AutoConfig.from_pretrained(model_of(run)).tie_word_embeddings
    assert distance(logits_of(merged, IDS), logits_of(in_peft(run), IDS)) < LIMIT
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids(list(TOKENS)) == [300, 301]


def test_it_is_not_served_beside_others(run: Path) -> None:
    base = load_base(ModelConfig(model=str(model_of(run)), dtype="float32", device="cpu"))
    Engine(base)
    adapter = read("more", run / "adapter")
    with pytest.raises(
        AdapterError, match=r"adds tokens \(2\) to the vocabulary of .*, so it cannot share the model with"
    ):
        load_version(base, adapter, adapter.adapter.tensors_in(base.dtype))
    assert embedding_rows(base) == 300


@FAMILIES
def test_a_crash_and_a_resume_give_the_same_bits(family: str, tmp_path: Path) -> None:
    options = {"save_every": 2, "eval_every": 2, "max_steps": 5, "keep_checkpoints": 1}
    whole = trained(tmp_path / "whole", family, **options)
    with pytest.raises(Crash):
        trained(tmp_path / "run", family, crash_at(4), **options)
    names = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-000002").iterdir()}
    assert {"tokenizer.json", "state.safetensors"} <= names
    watch = Watch()
    train(output=tmp_path / "run", resume=True, report=watch)
    assert "Resuming after step 2 of 5" in watch.said
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(whole)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert not (tmp_path / "run" / "checkpoints" / "step-000002").exists()  # its tokenizer is ours to remove


def test_the_best_adapter_of_an_earlier_step_is_copied_with_its_tokenizer(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", learning_rate=3.0, schedule="constant", eval_every=1, max_steps=8)
    assert json.loads((run / "summary.json").read_text("utf-8"))["best_step"] < 8
    assert AutoTokenizer.from_pretrained(run / "adapter").convert_tokens_to_ids(list(TOKENS)) == [300, 301]
    assert opened(run).template.encode_prompt([Message("user", "<call>")]).count(300) == 1


def test_a_finished_run_is_replaced_with_its_tokenizer(run: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / "run"))
    train(rows(tmp_path / "rows.jsonl"), output=again, overwrite=True, **settings(model=str(model_of(run))))
    assert not (again / "adapter" / "tokenizer.json").exists()


def test_spare_rows_are_used(tmp_path: Path) -> None:
    """A base whose embedding has more rows than its tokenizer has tokens keeps its shape; rows begin as the mean."""
    folder = tmp_path / "spare"
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
        model.resize_token_embeddings(304, mean_resizing=False)
        model.get_input_embeddings().weight.data[300:] = 1e-6
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    run = trained(tmp_path / "run", model=folder, learning_rate=1e-12, max_steps=1)
    rows_NH = load_file(run / "adapter" / "adapter_model.safetensors")[f"base_model.model.model.embed_tokens.{ROWS}"]
    mean = model.get_input_embeddings().weight[:300].mean(0)
    assert torch.allclose(rows_NH, mean.expand(2, -1), atol=1e-6)
    session = opened(run)
    assert embedding_rows(session.base) == 304
    assert distance(logits_of(session.base, IDS), logits_of(in_peft(run), IDS)) < LIMIT
    base = load_base(ModelConfig(model=str(folder), dtype="float32", device="cpu"))
    adapter = read("more", run / "adapter")
    with pytest.raises(AdapterError, match=r"adds tokens \(2\) to the vocabulary"):
        load_version(base, adapter, adapter.adapter.tensors_in(base.dtype))


def test_modules_to_save_trains_the_whole_embedding_instead(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", modules_to_save=["embed_tokens", "lm_head"])
    assert not any(ROWS in key for key in load_file(run / "adapter" / "adapter_model.safetensors"))
    session = opened(run)
    assert embedding_rows(session.base) == 302
    assert {300, 301} <= set(session.template.encode_prompt([Message("user", "<call></call>")]))
    assert distance(logits_of(session.base, IDS), logits_of(in_peft(run), IDS)) < LIMIT


def test_a_training_that_starts_from_it_goes_on_with_its_tokens(run: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    options = settings(model=str(model_of(run))) | {"start_from": str(run), "learning_rate": 1e-12, "max_steps": 1}
    train(rows(tmp_path / "rows.jsonl"), output=more, **options)
    before, after = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, more))
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[key], before[key], atol=1e-9, rtol=0) for key in before)
    assert AdapterFolder.read(more / "adapter").added_tokens == {"<call>": 300, "</call>": 301}
    assert load_config(more / "config.toml", {}).data.add_tokens == TOKENS
    with pytest.raises(ConfigError, match=r"data\.add_tokens: \('<other>',\), but .* was trained with \('<call>', "):
        train(rows(tmp_path / "rows.jsonl"), output=tmp_path / "x", add_tokens=("<other>",), **options)


def test_a_training_does_not_start_from_tokens_of_another_tool(run: Path, tmp_path: Path) -> None:
    theirs = Path(shutil.copytree(run / "adapter", tmp_path / "theirs"))
    (theirs / "lorasmith.json").unlink()
    options = settings(model=str(model_of(run))) | {"start_from": str(theirs), "max_steps": 1}
    with pytest.raises(AdapterError, match="was trained with tokens that were added to the tokenizer of"):
        train(rows(tmp_path / "rows.jsonl"), output=tmp_path / "x", **options)


def test_an_adapter_of_another_tool_is_the_same_without_our_file(run: Path, tmp_path: Path) -> None:
    """The tokenizer beside the adapter says all that other programs need."""
    theirs = Path(shutil.copytree(run / "adapter", tmp_path / "theirs"))
    (theirs / "lorasmith.json").unlink()
    mine, foreign = opened(run), open_adapters([theirs], ModelConfig(dtype="float32", device="cpu"))
    messages = [Message("user", "Say <call>")]
    assert foreign.template.encode_prompt(messages) == mine.template.encode_prompt(messages)
    assert torch.equal(logits_of(foreign.base, IDS), logits_of(mine.base, IDS))


def test_adapters_with_and_without_tokens_are_not_opened_together(run: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    train(rows(tmp_path / "rows.jsonl"), output=plain, **settings(model=str(model_of(run))))
    for pair in ([plain, run], [run, plain]):
        with pytest.raises(AdapterError, match=r"cannot share the model with other adapters|different templates"):
            open_adapters(pair, ModelConfig(dtype="float32", device="cpu"))


def test_what_is_said(tmp_path: Path) -> None:
    found = check(config(rows(tmp_path / "rows.jsonl"), add_tokens=[*TOKENS, "<never>"]))
    assert "Added to the vocabulary, with their ids: '<call>' (300), '</call>' (301), '<never>' (302)" in found.notes
    text = "data.add_tokens: no training row contains '<never>', so the model learns nothing about them."
    assert text in found.warnings
    assert found.problems == []


def test_the_version_of_the_file_tells_older_programs(run: Path, tmp_path: Path) -> None:
    metadata = json.loads((run / "adapter" / "lorasmith.json").read_text("utf-8"))
    assert metadata["version"] == 2
    assert metadata["tokens"] == [{"id": 300, "token": "<call>"}, {"id": 301, "token": "</call>"}]
    plain = tmp_path / "plain"
    train(rows(tmp_path / "rows.jsonl"), output=plain, lora=LoraConfig(r=2), **settings())
    assert json.loads((plain / "adapter" / "lorasmith.json").read_text("utf-8"))["version"] == 1
