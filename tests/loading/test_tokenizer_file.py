"""The token ids of a model are those of its tokenizer.json, whatever class transformers chooses for it."""

import ast
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, dynamic_module_utils

from lorasmith.errors import ModelError
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.loading.tokenizer_file import TEXTS, as_in_file, is_built_like, save_tokenizer
from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.paths import ROOT
from tests.support.tiny import Watch
from tests.support.tokenizer_layouts import LLAMA3, SPECIAL, byte_level, file_ids, tokenizer_folder

# layout, model_type, tokenizer_class
FAMILIES: list[tuple[str, str, str | None]] = [
    ("gpt2", "gpt2", "GPT2Tokenizer"), ("gpt2", "gpt2", None), ("gpt2", "gpt_neo", "GPT2Tokenizer"),
    ("gpt2", "opt", "GPT2Tokenizer"), ("gpt2", "gpt_neox", "GPTNeoXTokenizerFast"),
    ("gpt2", "mpt", "GPTNeoXTokenizer"), ("gpt2", "phi", "CodeGenTokenizer"), ("gpt2", "codegen", "CodeGenTokenizer"),
    ("gpt2", "starcoder2", "GPT2TokenizerFast"), ("gpt2", "gpt_bigcode", "GPT2Tokenizer"),
    ("gpt2", "bloom", "BloomTokenizerFast"), ("gpt2", "falcon", "PreTrainedTokenizerFast"),
    ("gpt2", "cohere", "CohereTokenizerFast"), ("gpt2 with a space", "gpt_neox", "GPTNeoXTokenizerFast"),
    ("llama3", "llama", "PreTrainedTokenizerFast"), ("llama3", "llama", "LlamaTokenizerFast"),
    ("llama3", "llama", None), ("llama3", "olmo2", "GPT2Tokenizer"), ("llama3", "granite", "GPT2Tokenizer"),
    ("llama3", "glm4", "PreTrainedTokenizerFast"), ("llama3", "mistral", "LlamaTokenizerFast"),
    ("llama3", "deepseek_v3", "LlamaTokenizerFast"), ("llama3", "qwen2", "LlamaTokenizerFast"),
    ("llama3", "qwen2", "PreTrainedTokenizerFast"), ("llama3", "gpt2", "GPT2Tokenizer"),
    ("qwen", "qwen2", "Qwen2Tokenizer"), ("qwen", "qwen3", "Qwen2TokenizerFast"),
    ("qwen", "qwen3_moe", "Qwen2Tokenizer"),
    ("llama2", "llama", "LlamaTokenizer"), ("llama2", "mixtral", "LlamaTokenizerFast"),
    ("llama2", "phi3", "LlamaTokenizerFast"), ("mistral", "mistral", "LlamaTokenizer"),
    ("mistral", "llama", "LlamaTokenizerFast"), ("gemma", "gemma", "GemmaTokenizer"),
    ("gemma", "gemma2", "GemmaTokenizerFast"), ("gemma", "gemma3_text", "GemmaTokenizer"),
    ("unigram", "xglm", "XGLMTokenizerFast"), ("unigram", "xglm", "PreTrainedTokenizerFast"),
    ("wordpiece", "bert", "BertTokenizer"), ("wordpiece", "gpt2", "PreTrainedTokenizerFast"),
]  # fmt: skip
SAMPLES = [*TEXTS, *(f"x{token} {token}y" for token in SPECIAL)]


def ids_of(tokenizer: PreTrainedTokenizerBase, specials: bool = False) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(SAMPLES, add_special_tokens=specials)["input_ids"]
    return ids


@functools.cache
def expected(content: str) -> tuple[list[list[int]], list[list[int]], list[str]]:
    """What the package tokenizers alone makes of a tokenizer.json: ids without and with special tokens, and texts."""
    file = Tokenizer.from_str(content)
    plain, full = (
        [encoding.ids for encoding in file.encode_batch(SAMPLES, add_special_tokens=adds)] for adds in (False, True)
    )
    return plain, full, [file.decode(ids, skip_special_tokens=False) for ids in plain]


def is_right(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it encodes and decodes as the file alone."""
    plain, full, texts = expected((folder / "tokenizer.json").read_text("utf-8"))
    if ids_of(tokenizer) != plain or ids_of(tokenizer, specials=True) != full:
        return False
    return [tokenizer.decode(ids) for ids in plain] == texts


def auto(folder: Path) -> PreTrainedTokenizerBase:
    with quiet_transformers():
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def test_there_are_two_hundred_different_texts() -> None:
    assert len(set(TEXTS)) == len(TEXTS) == 200


def test_of_forty_families_the_ids_are_those_of_the_file_and_the_right_ones_are_left_alone(tmp_path: Path) -> None:
    right, wrong = set(), set()
    for number, family in enumerate(FAMILIES):
        folder = tokenizer_folder(tmp_path / str(number), *family)
        theirs, watch = auto(folder), Watch()
        found = as_in_file(folder, theirs, watch)
        assert is_right(folder, found), family
        if is_right(folder, theirs):
            assert found is theirs, family
            assert watch.warned == [], family
            right.add(family)
        else:
            (text,) = watch.warned
            assert type(theirs).__name__ in text
            assert str(folder / "tokenizer.json") in text
            assert type(found) is PreTrainedTokenizerFast
            wrong.add(family)
        assert (found.eos_token, found.bos_token, found.unk_token) == ("<|im_end|>", "<s>", "<unk>"), family
    assert len(right) + len(wrong) == len(set(FAMILIES)) == 40
    assert right >= {
        ("gpt2", "gpt2", "GPT2Tokenizer"),
        ("qwen", "qwen2", "Qwen2Tokenizer"),
        ("llama3", "llama", "LlamaTokenizerFast"),
        ("gemma", "gemma", "GemmaTokenizer"),
        ("mistral", "mistral", "LlamaTokenizer"),
        ("unigram", "xglm", "PreTrainedTokenizerFast"),
    }
    assert wrong >= {("llama3", "qwen2", "LlamaTokenizerFast"), ("llama3", "gpt2", "GPT2Tokenizer")}


def changed(change: Callable[[dict[str, Any]], None]) -> Callable[[Tokenizer], Tokenizer]:
    """A fault that changes the content of a tokenizer.json."""

    def fault(backend: Tokenizer) -> Tokenizer:
        content = json.loads(backend.to_str())
        change(content)
        return Tokenizer.from_str(json.dumps(content))

    return fault


def with_part(name: str, make: Callable[[Any], Any]) -> Callable[[Tokenizer], Tokenizer]:
    """A fault that replaces a part of a tokenizer."""

    def fault(backend: Tokenizer) -> Tokenizer:
        setattr(backend, name, make(getattr(backend, name)))
        return backend

    return fault


def renumber(content: dict[str, Any]) -> None:
    model, first = content["model"], len(SPECIAL) + 4
    if model["type"] == "Unigram":
        model["vocab"][first:] = model["vocab"][: first - 1 : -1]
        return
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    model["vocab"] = {token: i for i, token in enumerate(tokens[:first] + tokens[: first - 1 : -1])}


def forget_merges(content: dict[str, Any]) -> None:
    if content["model"]["type"] == "BPE":
        content["model"]["merges"] = []


def forget_special(content: dict[str, Any]) -> None:
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|im_start|>"]


def pieces(part: Any) -> Any:
    vowels = pre_tokenizers.Split(Regex("[aeiou]"), "isolated")
    return pre_tokenizers.Sequence([vowels, *([] if part is None else [part])])


def lowered(part: Any) -> Any:
    return normalizers.Sequence([normalizers.Lowercase(), *([] if part is None else [part])])


def ending(part: Any) -> Any:
    return processors.TemplateProcessing(single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)])


def without_merging(backend: Tokenizer) -> Tokenizer:
    if hasattr(backend.model, "dropout"):
        backend.model.dropout = 1.0
    return backend


FAULTS: dict[str, Callable[[Tokenizer], Tokenizer]] = {
    "vowels apart": with_part("pre_tokenizer", pieces),
    "lower case": with_part("normalizer", lowered),
    "another decoder": with_part("decoder", lambda part: decoders.Fuse()),
    "eos added": with_part("post_processor", ending),
    "other ids": changed(renumber),
    "no merges": changed(forget_merges),
    "a special token forgotten": changed(forget_special),
    "no merging": without_merging,
}
EXEMPT = {
    *((layout, fault) for layout in ("unigram", "wordpiece") for fault in ("no merges", "no merging")),
    ("wordpiece", "lower case"),  # as it is
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, PreTrainedTokenizerBase]]:
    """One folder and its tokenizer of each layout and class that the families have."""
    found = {}
    for family in FAMILIES:
        folder = tokenizer_folder(tmp_path_factory.mktemp("model"), *family)
        tokenizer = auto(folder)
        found[family[0], type(tokenizer).__name__] = folder, tokenizer
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_in_every_layout_and_class_is_caught(
    loaded: dict[tuple[str, str], tuple[Path, PreTrainedTokenizerBase]], fault: str
) -> None:
    for (layout, name), (folder, tokenizer) in loaded.items():
        if (layout, fault) in EXEMPT:
            continue
        kept = tokenizer.backend_tokenizer
        tokenizer._tokenizer = FAULTS[fault](Tokenizer.from_str(kept.to_str()))
        assert not is_right(folder, tokenizer), (layout, name)
        watch = Watch()
        assert is_right(folder, as_in_file(folder, tokenizer, watch)), (layout, name)
        assert len(watch.warned) == 1, (layout, name)
        tokenizer._tokenizer = kept


def test_what_the_class_and_the_configs_set_is_kept(tmp_path: Path) -> None:
    added = {"content": "<extra>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    last = len(json.loads(byte_level(LLAMA3).to_str())["model"]["vocab"])
    folder = tokenizer_folder(
        tmp_path / "model", "llama3", "qwen2", "LlamaTokenizerFast", chat_template="{{ messages }}",
        padding_side="left", pad_token="<unk>", unk_token=None, model_max_length=77,
        clean_up_tokenization_spaces=True,
        added_tokens_decoder={str(last): added | {"special": True}}, extra_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    theirs, found = auto(folder), load_tokenizer(folder)
    assert type(found) is PreTrainedTokenizerFast
    for name in (
        "chat_template", "padding_side", "pad_token", "eos_token", "bos_token", "unk_token", "model_max_length",
        "clean_up_tokenization_spaces", "model_input_names", "extra_special_tokens", "special_tokens_map",
    ):  # fmt: skip
        assert getattr(found, name) == getattr(theirs, name), name
    assert found.unk_token == "<|endoftext|>"  # which only the class names
    assert found("<extra>", add_special_tokens=False)["input_ids"] == [last]
    assert found.decode([last], skip_special_tokens=True) == ""
    assert found("2024", add_special_tokens=False)["input_ids"] == file_ids(folder, ["2024"])[0]


@pytest.mark.parametrize(
    ("family", "config"),
    [
        (("gpt2", "gpt2", "GPT2Tokenizer"), {"add_prefix_space": True}),
        (("gpt2 with a space", "gpt2", "GPT2Tokenizer"), {"add_prefix_space": False}),
        (("mistral", "llama", "LlamaTokenizer"), {"add_prefix_space": False}),
        (("mistral", "llama", "LlamaTokenizer"), {"legacy": False, "add_bos_token": False}),
        (("gemma", "gemma", "GemmaTokenizer"), {"add_bos_token": True, "add_eos_token": True}),
        (("qwen", "qwen2", "Qwen2Tokenizer"), {"split_special_tokens": True}),
        (("gpt2", "gpt2", "GPT2Tokenizer"), {"clean_up_tokenization_spaces": True}),
    ],
)
def test_a_setting_of_the_config_is_no_fault(
    tmp_path: Path, family: tuple[str, str, str], config: dict[str, Any]
) -> None:
    folder = tokenizer_folder(tmp_path / "model", *family, **config)
    theirs, watch = auto(folder), Watch()
    assert as_in_file(folder, theirs, watch) is theirs
    assert watch.warned == []


def test_truncation_and_padding_in_the_file_are_no_fault(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "model", "qwen", "qwen2", "Qwen2Tokenizer")
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.enable_truncation(3)
    core.enable_padding(length=5, pad_token="<s>")
    core.save(str(folder / "tokenizer.json"))
    theirs, watch = auto(folder), Watch()
    assert as_in_file(folder, theirs, watch) is theirs
    assert watch.warned == []


@pytest.mark.parametrize("write", [{"sort_keys": True}, {"indent": None}], ids=["keys in another order", "one line"])
def test_a_file_that_another_program_wrote_is_compared_as_well(tmp_path: Path, write: dict[str, Any]) -> None:
    for name, layout in (("right", "qwen"), ("wrong", "llama3")):
        folder = tokenizer_folder(tmp_path / name, layout, "qwen2", "Qwen2Tokenizer")
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")), **write), "utf-8")
        theirs = auto(folder)
        found = as_in_file(folder, theirs)
        assert is_right(folder, found)
        assert (found is theirs) == (name == "right")


def keep_modules_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers copy Python code of a model only into `folder`."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


CODE = '''
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast


class Own(PreTrainedTokenizerFast):
    """Reads tokenizer.json."""
'''
WRONG = """
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
"""


@pytest.mark.parametrize("is_wrong", [False, True])
def test_python_code_that_does_not_agree_with_the_file_is_refused(
    tmp_path: Path, is_wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_modules_apart(tmp_path, monkeypatch)
    folder = tokenizer_folder(
        tmp_path / f"model_{is_wrong}", "llama3", "llama", "Own", auto_map={"AutoTokenizer": [None, "own.Own"]}
    )
    (folder / "own.py").write_text(CODE + WRONG * is_wrong)
    if not is_wrong:
        assert type(load_tokenizer(folder, trust_remote_code=True)).__name__ == "Own"
        return
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder, trust_remote_code=True)
    (text,) = caught.value.problems
    assert text.startswith(
        f"{folder / 'tokenizer.json'}: the tokenizer that comes with the model as Python code (Own) does not agree "
        "with it: it splits "
    )


def test_without_a_file_there_is_nothing_to_compare(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "model", "llama3", "qwen2", "Qwen2Tokenizer")
    theirs = auto(folder)
    (folder / "tokenizer.json").unlink()
    assert as_in_file(folder, theirs) is theirs


@pytest.mark.parametrize("family", [f for f in FAMILIES if f[0] in ("llama3", "gemma", "llama2", "wordpiece")])
def test_a_saved_tokenizer_has_the_same_ids_in_plain_transformers(
    tmp_path: Path, family: tuple[str, str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_modules_apart(tmp_path, monkeypatch)
    ours = load_tokenizer(tokenizer_folder(tmp_path / "model", *family))
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    save_tokenizer(ours, saved)
    for options in ({}, {"trust_remote_code": True}):
        with quiet_transformers():
            theirs = AutoTokenizer.from_pretrained(saved, **options)
        assert ids_of(theirs) == ids_of(ours), options
        assert theirs.eos_token == ours.eos_token
    assert ids_of(load_tokenizer(saved)) == ids_of(ours)
    assert (saved / "read_tokenizer_json.py").exists() == (family[:2] == ("llama3", "qwen2"))


@pytest.mark.parametrize(
    ("listed", "text"),
    [
        ([("<a>", 0), ("<a>", 1)], "the token '<a>' with the id {1}, but the tokenizer gives it the id {0}"),
        ([("<a>", 5)], "the token '<a>' with the id {5}, but the tokenizer gives it the id {0}"),
        ([("<a>", 0), ("<b>", 0)], "the token '<b>' with the id {0}, but the tokenizer gives it the id {1}"),
        ([("<a>", 0), ("<b>", 1)], ""),
    ],
    ids=["two ids", "a gap", "one id for two", "right"],
)
def test_added_tokens_with_another_id_than_listed_are_told(
    tmp_path: Path, listed: Sequence[tuple[str, int]], text: str
) -> None:
    folder = tokenizer_folder(tmp_path / "model", "llama3", "llama", "PreTrainedTokenizerFast")
    path, watch = folder / "tokenizer.json", Watch()
    content = json.loads(path.read_text("utf-8"))
    first = len(content["model"]["vocab"])
    content["added_tokens"] += [content["added_tokens"][0] | {"content": t, "id": first + i} for t, i in listed]
    path.write_text(json.dumps(content), "utf-8")
    load_tokenizer(folder, report=watch)
    numbers = [first + i for i in range(6)]
    assert [text.format(*numbers) in warned for warned in watch.warned] == ([True] if text else [])


def test_a_token_that_the_config_lists_with_another_id_is_told(tmp_path: Path) -> None:
    token = {"content": "</s>", "special": True}
    folder = tokenizer_folder(
        tmp_path / "model", "llama3", "llama", "PreTrainedTokenizerFast", added_tokens_decoder={"900": token}
    )
    watch = Watch()
    load_tokenizer(folder, report=watch)
    assert f"{folder / 'tokenizer_config.json'}: lists the token '</s>' with the id 900, but" in watch.warned[0]


def test_the_comparison_is_quick_at_any_size(tmp_path: Path) -> None:
    """It reads no more than a sample of a vocabulary of 100,000 tokens, which takes a second to load."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet[::2] for b in alphabet[1::2]]
    twice = [("".join(a), "".join(b)) for a in pairs[:280] for b in pairs[-300:]]
    content = json.loads(byte_level(LLAMA3).to_str())
    tokens = dict.fromkeys([*SPECIAL, *alphabet, *map("".join, pairs), *map("".join, twice)])
    content["model"] |= {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": [*pairs, *twice]}
    folder = tokenizer_folder(tmp_path / "model", "llama3", "llama", "PreTrainedTokenizerFast")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    start = time.process_time()
    tokenizer = auto(folder)
    loading, least = time.process_time() - start, float("inf")
    for _ in range(5):
        start = time.process_time()
        assert is_built_like(path, tokenizer)
        least = min(least, time.process_time() - start)
    assert len(tokenizer) > 100_000
    assert least < loading / 5


def test_every_tokenizer_of_a_folder_is_compared() -> None:
    """Outside of `loading`, nothing reads a tokenizer in another way than `load_tokenizer`."""
    readers = set()
    for path in (ROOT / "src").rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Name)}
        if "AutoTokenizer" in names:
            readers.add(path.name)
    assert readers == {"tokenizer.py", "tokenizer_file.py", "gguf.py"}
