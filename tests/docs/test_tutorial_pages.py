"""The tutorial's pages: every point they make of the tutorial holds, every block is the script's, runs or parses."""

import ast
import inspect
import re
import runpy
import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, Trainer

from lorasmith.config.model import ModelConfig
from lorasmith.loading.load import load_base
from lorasmith.lora.target import find_targets
from tests.support.tutorial_bloom import (
    COUNTS,
    EXAMPLE,
    OWN_ROWS,
    QUESTION,
    ROOT,
    make_bloom,
    make_tokenizer,
    script,
    train_config,
)

PAGES = (ROOT / "docs/tutorial.md", ROOT / "docs/tutorial.zh.md")
ORIGINAL = ROOT.parent / "shared/tutorial.py"
NO_ORIGINAL = pytest.mark.skipif(not ORIGINAL.is_file(), reason="../shared/tutorial.py is not there")


# -- what the pages say of the tutorial ---------------------------------------------------------------------------


def original() -> tuple[str, ast.Module]:
    text = ORIGINAL.read_text("utf-8")
    return text, ast.parse(text)


def calls(tree: ast.AST, name: str) -> list[dict[str, ast.expr]]:
    """The keyword arguments of every call of a function or method of this name."""
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func).split(".")[-1] == name]
    return [{k.arg: k.value for k in call.keywords if k.arg} for call in found]


@NO_ORIGINAL
def test_one_import_is_missing_and_three_are_not_used() -> None:
    _text, tree = original()
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    used = {n.id for n in names if isinstance(n.ctx, ast.Load)}
    assert imported - used == {"torch", "PromptTuningConfig", "PromptTuningInit"}
    assert "LoraConfig" in used - imported
    assert not any(n.id == "LoraConfig" and isinstance(n.ctx, ast.Store) for n in names)
    for page in PAGES:
        text = page.read_text("utf-8")
        assert all(f"`{name}`" in text for name in ("torch", "PromptTuningConfig", "PromptTuningInit", "LoraConfig"))


@NO_ORIGINAL
def test_trainer_takes_no_tokenizer_any_more() -> None:
    _text, tree = original()
    parameters = inspect.signature(Trainer.__init__).parameters
    assert "tokenizer" in calls(tree, "Trainer")[0]
    assert "tokenizer" not in parameters
    assert "processing_class" in parameters


@NO_ORIGINAL
def test_the_checkpoint_is_read_where_training_did_not_write() -> None:
    _text, tree = original()
    written = ast.literal_eval(calls(tree, "TrainingArguments")[0]["output_dir"])
    from_pretrained = [given["model_id"] for given in calls(tree, "from_pretrained") if "model_id" in given]
    assert (written, ast.literal_eval(from_pretrained[0])) == ("./chatbot_lora_tuned", "./chatbot/checkpoint-3357/")


@NO_ORIGINAL
def test_the_prompt_of_step_8_holds_backslashes() -> None:
    text, tree = original()
    assert text.count(r'"Human: {}\\n{}".format') == 2
    [first, *_more] = [n for n in ast.walk(tree) if isinstance(n, ast.BinOp) and "Human: {}" in ast.unparse(n)]
    form, end = (n.value for n in ast.walk(first) if isinstance(n, ast.Constant) and "\\n" in str(n.value))
    if "Human" not in form:
        form, end = end, form
    asked = form.format(QUESTION, "").strip() + end
    assert asked == r"Human: 考试有哪些技巧?\n\n\nAssistant: "
    assert "\n" not in asked
    for page in PAGES:
        assert f"`{asked}`" in page.read_text("utf-8")


@NO_ORIGINAL
def test_lengths_and_beams_of_step_8() -> None:
    _text, tree = original()
    greedy, sampled = sorted(calls(tree, "generate"), key=len)
    assert set(greedy) == {"do_sample"}
    numbers = {key: ast.literal_eval(value) for key, value in sampled.items()}
    assert numbers == {
        "max_length": 1024, "max_new_tokens": 500, "do_sample": True, "temperature": 0.8, "top_p": 0.9,
        "repetition_penalty": 1.2, "early_stopping": False,
    }  # fmt: skip
    ours = {key: value for key, value in numbers.items() if key not in ("max_length", "do_sample", "early_stopping")}
    assert ours == script().SAMPLING


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_what_transformers_makes_of_them() -> None:
    model, ids = make_bloom(99).eval(), torch.tensor([[5, 17, 60, 8, 44, 92, 31, 9, 12, 71]])
    model.generation_config.eos_token_id = None  # so that only the length ends an answer
    given = {"attention_mask": torch.ones_like(ids)}

    def answer(**options: Any) -> list[int]:
        torch.manual_seed(1)
        return list(model.generate(ids, **given, **options)[0, ids.shape[1] :].tolist())

    assert len(answer(do_sample=False)) == 20
    assert len(answer(do_sample=False, max_length=1024, max_new_tokens=30)) == 30
    sampled = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "max_new_tokens": 30}
    assert answer(**sampled, early_stopping=False) == answer(**sampled)


# -- the pages' blocks --------------------------------------------------------------------------------------------

BLOCKS = {"bash": 3, "python": 2, "text": 1}
COMMANDS = {"make": 1, ".": 1, "python": 1, "lorasmith": 4}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, its indentation taken away."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)) for indent, language, text in found]


def of_language(page: Path, language: str) -> list[str]:
    return [text for found, text in blocks(page) if found == language]


@pytest.mark.parametrize("page", PAGES, ids=["en", "zh"])
def test_every_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    kinds = [language for language, _text in blocks(page)]
    assert {kind: kinds.count(kind) for kind in kinds} == BLOCKS
    assert page.read_text("utf-8").count("```") == 2 * len(kinds)


def test_both_languages_have_the_same_blocks_tables_and_points() -> None:
    assert blocks(PAGES[0]) == blocks(PAGES[1])
    english, chinese = (page.read_text("utf-8") for page in PAGES)
    shapes: list[Callable[[str], list[str]]] = [
        lambda text: re.findall(r"^#+ ", text, re.MULTILINE),
        lambda text: re.findall(r"^\d+\. ", text, re.MULTILINE),
        lambda text: re.findall(r"^\| [\d,、 ]+ \|", re.sub("、", ", ", text), re.MULTILINE),
        lambda text: sorted(set(re.findall(r"\d+(?:[.,]\d+)+(?:e-?\d+)?|\de-\d", text))),
    ]
    for shape in shapes:
        assert shape(english) == shape(chinese)
        assert shape(english)


def test_every_command_parses() -> None:
    seen: dict[str, int] = {}
    for text in of_language(PAGES[0], "bash"):
        for line in text.splitlines():
            words = shlex.split(line)
            seen[words[0]] = seen.get(words[0], 0) + 1
            if words[:2] == ["lorasmith", "train"]:
                train_config(words[2:])
            elif words[0] == "lorasmith":
                _args, problems = import_module(f"lorasmith.cli.{words[1]}").parser().read(words[2:])
                assert not problems
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file()
                assert script().arguments(words[2:]) == script().arguments([])
            elif words[0] == "make":
                assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text("utf-8")
    assert seen == COMMANDS


def test_the_command_for_layer_1_alone_matches_it_alone() -> None:
    lines = "".join(of_language(PAGES[0], "bash")).splitlines()
    [line] = [line for line in lines if "--layers-to-transform" in line]
    config = train_config(shlex.split(line)[2:])
    with torch.device("meta"):
        model = BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=24, n_head=4))
    assert find_targets(model, config.lora).adapted == ["transformer.h.1.self_attention.query_key_value"]


def test_the_other_blocks_are_the_scripts_and_its_output() -> None:
    convert, lora = of_language(PAGES[0], "python")
    assert lora in (EXAMPLE / "tutorial.py").read_text("utf-8")
    assert of_language(PAGES[0], "text") == [COUNTS + "\n"]
    ast.parse(convert)


def test_a_pickled_bloom_is_converted_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(OWN_ROWS)
    model = make_bloom(len(tokenizer))
    pickled = tmp_path / "bloom-389m-zh"
    model.config.save_pretrained(pickled)
    tokenizer.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    block = tmp_path / "convert.py"
    block.write_text(of_language(PAGES[0], "python")[0], "utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(block))
    base = load_base(ModelConfig(model="bloom-389m-zh-safetensors", dtype="float32"))
    assert torch.equal(base.model.get_input_embeddings().weight, model.get_input_embeddings().weight)
