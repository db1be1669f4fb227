"""Adapters as LLaMA-Factory, TRL and Unsloth leave them: tokens added, tokenizer and chat template in the folder.

PEFT is the oracle: the logits of an opened adapter are those of the model that PEFT saved.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.adapters.merge import merge_run
from lorasmith.adapters.session import Session, open_adapters
from lorasmith.config.model import ModelConfig
from lorasmith.data.rows.conversation import Message
from lorasmith.engine.engine import Engine
from lorasmith.errors import AdapterError
from lorasmith.loading.load import load_base
from lorasmith.model.vocabulary import embedding_rows
from lorasmith.serve.discovery import read
from lorasmith.serve.registry import load_version
from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.families import distance, logits_of
from tests.support.peft_folder import SHOUTED, foreign, tokenizer_with
from tests.support.tiny import Watch, model_folder

ROWS = 300  # of the tiny models' embeddings
IDS = torch.tensor([[5, 17, 301, 3, 8, 300, 92, 31]])  # the added tokens among others
LIMIT = 1e-4  # float32: sums in another order
CASES: dict[str, dict[str, Any]] = {
    "copies": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "resized": {},
    "rows": {"trainable_token_indices": [300, 301]},
    "rows by name": {"trainable_token_indices": {"embed_tokens": [301, 7]}},
    "low rank": {"target_modules": ["q_proj", "embed_tokens"]},
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::peft.utils.warning.PeftWarning")


def opened(folder: Path, family: str, watch: Watch | None = None) -> Session:
    return open_adapters([folder], ModelConfig(model=str(model_folder(family)), dtype="float32", device="cpu"), watch)


@pytest.mark.parametrize("family", ["llama", "qwen2"], ids=["untied", "tied"])
@pytest.mark.parametrize("case", list(CASES))
def test_an_adapter_with_added_tokens_gives_pefts_logits(case: str, family: str, tmp_path: Path) -> None:
    theirs = foreign(tmp_path / "theirs", family, **CASES[case])
    watch = Watch()
    session = opened(tmp_path / "theirs", family, watch)
    said = [text for text in watch.warned if "adds tokens" in text]
    invented = (
        f"{tmp_path / 'theirs'}: the adapter adds tokens (2), but does not contain their rows of lm_head. The mean of "
        "the other rows is used there, which may differ from the training."
    )
    assert said == ([invented] if (case, family) == ("low rank", "llama") else [])
    wanted = logits_of(theirs, IDS)
    assert embedding_rows(session.base) == wanted.shape[-1] >= ROWS + 2
    assert distance(logits_of(session.base, IDS), wanted) < LIMIT
    assert isinstance(session.generate("Is it <|a|>?", max_new_tokens=3), str)
    if case != "resized":
        with theirs.disable_adapter():
            own = logits_of(theirs, IDS[:, :2])
        assert distance(own, wanted[:, :2]) > 0.01


@pytest.mark.parametrize("family", ["llama", "qwen2"], ids=["untied", "tied"])
@pytest.mark.parametrize("case", ["copies", "rows"])
def test_it_is_merged_with_its_tokens(case: str, family: str, tmp_path: Path) -> None:
    theirs = foreign(tmp_path / "theirs", family, **CASES[case])
    config = ModelConfig(model=str(model_folder(family)), dtype="float32", device="cpu")
    assert merge_run(tmp_path / "theirs", tmp_path / "merged", config).holds
    with quiet_transformers():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.vocab_size == theirs.config.vocab_size >= ROWS + 2
    assert distance(logits_of(merged, IDS), logits_of(theirs, IDS)) < LIMIT
    ids = [
        AutoTokenizer.from_pretrained(tmp_path / name).convert_tokens_to_ids("<|b|>") for name in ("merged", "theirs")
    ]
    assert ids == [theirs.config.vocab_size - 1] * 2


def test_rows_of_known_tokens_need_no_other_base(tmp_path: Path) -> None:
    theirs = foreign(tmp_path / "theirs", "llama", added=(), trainable_token_indices=[7, 9])
    session, ids = opened(tmp_path / "theirs", "llama"), IDS.clamp_max(ROWS - 1)
    assert embedding_rows(session.base) == ROWS
    assert distance(logits_of(session.base, ids), logits_of(theirs, ids)) < LIMIT


def test_it_is_not_served_beside_others_but_rows_of_known_tokens_are(tmp_path: Path) -> None:
    foreign(tmp_path / "more", "llama", **CASES["copies"])
    foreign(tmp_path / "same", "llama", added=(), trainable_token_indices=[7, 9])
    base = load_base(ModelConfig(model=str(model_folder("llama")), dtype="float32", device="cpu"))
    Engine(base)
    adapter = read("more", tmp_path / "more")
    with pytest.raises(
        AdapterError, match=r"the adapter adds tokens \(2\) to the vocabulary of .*, so it cannot share"
    ):
        load_version(base, adapter, adapter.adapter.tensors_in(base.dtype))
    assert embedding_rows(base) == ROWS
    adapter = read("same", tmp_path / "same")
    assert load_version(base, adapter, adapter.adapter.tensors_in(base.dtype)).effect > 0


def test_rows_that_the_config_does_not_name_are_refused(tmp_path: Path) -> None:
    foreign(tmp_path, "llama", added=(), trainable_token_indices=[7, 9])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": [7]}))
    with pytest.raises(AdapterError, match=r"trainable_tokens_delta has the shape \(2, 32\), which does not fit"):
        opened(tmp_path, "llama")


def test_the_saved_embedding_of_another_base_is_refused(tmp_path: Path) -> None:
    foreign(tmp_path, "llama")
    other = ModelConfig(model=str(model_folder("llama", 1)), dtype="float32", device="cpu")
    with pytest.raises(AdapterError, match="differs from that of this base model: the adapter belongs to another one"):
        open_adapters([tmp_path], other)


# -- the encoding of the training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "bloom"], ids=["base with a template", "base without one"])
@pytest.mark.parametrize("files", ["all", "template", "config"])
def test_the_chat_template_in_the_folder_is_used_and_said(files: str, family: str, tmp_path: Path) -> None:
    foreign(tmp_path, family, added=(), target_modules="all-linear")
    tokenizer = tokenizer_with(family)
    tokenizer.chat_template = SHOUTED
    tokenizer.save_pretrained(tmp_path)
    if files != "all":
        for file in tmp_path.glob("tokenizer*"):
            file.unlink()
    if files == "config":
        (tmp_path / "chat_template.jinja").unlink()
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": SHOUTED}))
    watch = Watch()
    session = opened(tmp_path, family, watch)
    text = session.base.tokenizer.decode(session.template.encode_prompt([Message("user", "Why?")]))
    assert text == "<|im_start|>USER\nWhy?<|im_end|><|im_start|>ASSISTANT\n"
    assert watch.warned == []
    assert (
        f"{tmp_path}: the adapter was made by another tool; the tokenizer and chat template in its folder are used."
        in watch.said
    )


def test_a_chat_template_in_another_encoding_is_said(tmp_path: Path) -> None:
    foreign(tmp_path, "llama", added=())
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    path = tmp_path / "chat_template.jinja"
    path.write_bytes("é {{ messages }}".encode("latin-1"))
    with pytest.raises(AdapterError) as caught:
        opened(tmp_path, "llama")
    assert str(caught.value) == f"{path}: invalid UTF-8 at byte 0; save the file as UTF-8"


@pytest.mark.parametrize("value", [{"embed_tokens": 5}, ["a"], 7, "7", [True], {"embed_tokens": [-1]}])
def test_indices_that_are_no_lists_of_tokens_are_said(value: Any, tmp_path: Path) -> None:
    foreign(tmp_path, "llama", added=(), trainable_token_indices=[7, 9])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": value}))
    with pytest.raises(AdapterError) as caught:
        opened(tmp_path, "llama")
    assert str(caught.value) == (
        f"{path}: trainable_token_indices must be a list of token ids, or such a list for each module, but is "
        f"{json.dumps(value)}."
    )


def test_its_end_of_a_reply_counts_too(tmp_path: Path) -> None:
    foreign(tmp_path, "llama", added=())
    tokenizer = tokenizer_with("llama")
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path)
    stops = opened(tmp_path, "llama").template.stop_ids
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in stops


def test_a_tokenizer_without_a_template_leaves_the_bases(tmp_path: Path) -> None:
    foreign(tmp_path, "llama", added=())
    tokenizer = tokenizer_with("llama")
    tokenizer.chat_template = None
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path)
    assert opened(tmp_path, "llama").template.kind == "model"


def test_the_tokenizer_of_another_base_is_refused(tmp_path: Path) -> None:
    foreign(tmp_path, "llama", added=())
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = "a", "b"
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    base = load_base(ModelConfig(model=str(model_folder("llama")), dtype="float32", device="cpu"))
    with pytest.raises(AdapterError, match=r"the tokenizer beside the adapter does not belong to .*: the token '.*' "):
        AdapterFolder.read(tmp_path).template(base)
