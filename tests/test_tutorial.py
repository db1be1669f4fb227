"""The tutorial's eight steps: script and TOML on a small Bloom, and what the pages say of them."""

import ast
import importlib.util
import inspect
import io
import json
import re
import runpy
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
)

from lorasmith import load
from lorasmith.cli.flags import config_of
from lorasmith.config import Config, load_config
from lorasmith.data.conversation import Message
from lorasmith.engine.config import SamplingConfig
from lorasmith.engine.engine import Engine, replies
from lorasmith.engine.request import Request
from lorasmith.lora.config import LoraConfig
from lorasmith.lora.files import read_weights
from lorasmith.lora.target import find_targets
from lorasmith.model.config import ModelConfig
from lorasmith.model.load import load_base

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/tutorial"
PAGES = (ROOT / "docs/tutorial.md", ROOT / "docs/tutorial.zh.md")
ORIGINAL = ROOT.parent / "shared/tutorial.py"
REAL_ROWS = ROOT.parent / "shared/data/alpaca_zh_demo.json"
NO_ORIGINAL = pytest.mark.skipif(not ORIGINAL.is_file(), reason="../shared/tutorial.py is not there")

COUNTS = "trainable params: 43,815,936 || all params: 389,584,896 || trainable%: 11.2468"
ELEVEN = [1, *range(10, 20)]
LAYERS, WIDTH, ROWS = 12, 32, 96  # the pattern matches layers 1, 10 and 11; 12 steps of 8
QUESTION = "考试有哪些技巧?"
OWN_ROWS = [
    {"instruction": f"{verb}{thing}。", "input": f"例：{thing}" if verb == "说明" else "", "output": f"{thing}：{text}"}
    for verb in ("解释", "说明", "描述", "介绍")
    for thing, text in (
        ("考试", "先做会做的题，再检查一遍。" * 30),
        ("天空", "空气散射蓝光。"),
        ("猫", "吃鱼，也吃老鼠。"),
    )
] * 8


@dataclass(frozen=True)
class Ran:
    """What the script was given, printed and wrote."""

    rows: list[dict[str, str]]
    data: Path
    model: Path
    run: Path
    out: str


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lorasmith_tutorial", EXAMPLE / "tutorial.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Bloom's special tokens: eos is not pad. A token holds three characters at most."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, max_token_length=9, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
    )  # fmt: skip
    core.train_from_iterator(["\n".join(row.values()) for row in rows], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )


def make_bloom(words: int) -> BloomForCausalLM:
    """Weights wide enough that the likeliest token is no matter of rounding."""
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=words, hidden_size=WIDTH, n_layer=LAYERS, n_head=4, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    return BloomForCausalLM(config)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """All eight steps, once, on the first real rows; on our own where the real ones are not there."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tutorial")
    rows = json.loads(REAL_ROWS.read_text("utf-8"))[:ROWS] if REAL_ROWS.is_file() else OWN_ROWS
    assert len(rows) == ROWS
    data, model, run = folder / "alpaca_data_zh", folder / "bloom", folder / "run"
    Dataset.from_list(rows).save_to_disk(data)
    tokenizer = make_tokenizer(rows)
    make_bloom(len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    with redirect_stdout(io.StringIO()) as out:
        script().main(["--data", str(data), "--model", str(model), "--output", str(run)])
    return Ran(rows, data, model, run, out.getvalue())


def process_func(example: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    """The tutorial's, but for the attention mask: copied, not mended."""
    MAX_LENGTH = 256
    prompt = "\n".join(["Human: " + example["instruction"], example["input"]]).strip() + "\n\nAssistant: "
    instruction_tokenized = tokenizer(prompt, add_special_tokens=False)
    response_tokenized = tokenizer(example["output"] + tokenizer.eos_token, add_special_tokens=False)
    input_ids = instruction_tokenized["input_ids"] + response_tokenized["input_ids"]
    labels = [-100] * len(instruction_tokenized["input_ids"]) + response_tokenized["input_ids"]
    return {"input_ids": input_ids[:MAX_LENGTH], "labels": labels[:MAX_LENGTH]}


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.double()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of `wanted`."""
    return float((found - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt())


# -- the tutorial's shape -----------------------------------------------------------------------------------------


def test_a_bloom_of_the_tutorials_shape_prints_its_line_and_the_eleven_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BloomConfig(vocab_size=42437, hidden_size=1024, n_layer=24, n_head=16).save_pretrained(tmp_path)
    script().show_lora(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert COUNTS in lines
    assert r".*\.1.*query_key_value matches 11 modules:" in lines
    module = r"transformer\.h\.(\d+)\.self_attention\.query_key_value"
    found = [int(m[1]) for line in lines if (m := re.fullmatch(module, line))]
    assert found == ELEVEN
    trained = lines[lines.index("trainable:") + 1 : lines.index(COUNTS)]
    part = r"transformer\.h\.\d+\.self_attention\.query_key_value\.lora_[AB]\.default\.weight"
    assert trained[0] == "transformer.word_embeddings.modules_to_save.default.weight"
    assert len(trained) == 1 + 2 * len(ELEVEN)
    assert all(re.fullmatch(part, name) for name in trained[1:])


def test_the_pattern_of_the_comment_matches_layer_1_alone() -> None:
    pattern = re.search(r'1 alone is r"(.*)"', (EXAMPLE / "tutorial.py").read_text("utf-8"))
    assert pattern is not None
    with torch.device("meta"):
        model = BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=24, n_head=4))
    found = find_targets(model, LoraConfig(target_modules=pattern[1])).adapted
    assert found == ["transformer.h.1.self_attention.query_key_value"]


# -- the eight steps ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_ROWS.is_file(), reason="../shared/data/alpaca_zh_demo.json is not there; our own rows ran")
def test_the_rows_are_real(ran: Ran) -> None:
    assert len(json.loads(REAL_ROWS.read_text("utf-8"))) == 1000
    assert all(set(row) == {"instruction", "input", "output"} for row in ran.rows)
    assert f"{ROWS} rows; the first: {ran.rows[0]}" in ran.out


def test_row_2_is_shown_as_process_func_makes_it(ran: Ran) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ran.model)
    made = process_func(ran.rows[1], tokenizer)
    learned = [label for label in made["labels"] if label != -100]
    assert f"row 2\ninput_ids: {tokenizer.decode(made['input_ids'])}\nlabels: {tokenizer.decode(learned)}\n" in ran.out
    assert "</s>" in tokenizer.decode(learned)


def test_what_is_cut_is_counted(ran: Ran) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ran.model)
    whole = [len(tokenizer(row["output"] + "</s>")["input_ids"]) for row in ran.rows]
    kept = [sum(label != -100 for label in process_func(row, tokenizer)["labels"]) for row in ran.rows]
    cut = sum(k < w for k, w in zip(kept, whole, strict=True))
    assert cut > 0
    assert f"{cut} rows cut at 256 tokens; answer tokens lost in all: {sum(whole) - sum(kept):,}." in ran.out


def test_training_had_the_tutorials_settings(ran: Ran) -> None:
    lines = [json.loads(line) for line in (ran.run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [10, 12]  # every 10, and the last
    rates = [line["learning_rate"] for line in lines]
    assert rates == pytest.approx([1e-4 * 9 / 100, 1e-4 * 11 / 100])  # from 0 in 100 steps
    assert [path.name for path in (ran.run / "checkpoints").iterdir()] == ["step-000012"]  # the epoch's end
    config = json.loads((ran.run / "adapter/adapter_config.json").read_text("utf-8"))
    wanted = {
        "task_type": "CAUSAL_LM", "target_modules": r".*\.1.*query_key_value", "r": 8, "lora_alpha": 32,
        "lora_dropout": 0.1, "modules_to_save": ["word_embeddings"],
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted


def test_the_adapter_holds_pefts_keys_and_learned_something(ran: Ran) -> None:
    tensors = read_weights(ran.run / "adapter")
    place = "base_model.model.transformer.h.{}.self_attention.query_key_value.lora_{}.weight"
    embedding = "base_model.model.transformer.word_embeddings.weight"
    assert set(tensors) == {place.format(layer, part) for layer in (1, 10, 11) for part in "AB"} | {embedding}
    assert all(tensors[place.format(layer, "B")].abs().sum() > 0 for layer in (1, 10, 11))
    base = AutoModelForCausalLM.from_pretrained(ran.model)
    assert not torch.equal(tensors[embedding], base.get_input_embeddings().weight)


def test_merged_is_a_plain_untied_model_that_answers_as_the_adapter(ran: Ran) -> None:
    merged = AutoModelForCausalLM.from_pretrained(ran.run / "merged")
    base = AutoModelForCausalLM.from_pretrained(ran.model)
    copy = read_weights(ran.run / "adapter")["base_model.model.transformer.word_embeddings.weight"]
    assert AutoConfig.from_pretrained(ran.run / "merged").tie_word_embeddings is False
    assert AutoConfig.from_pretrained(ran.model).tie_word_embeddings is True
    assert torch.equal(merged.get_input_embeddings().weight, copy)
    assert torch.equal(merged.get_output_embeddings().weight, base.get_output_embeddings().weight)

    session = load(ran.run, dtype="float32")
    asked = session.template.encode_prompt([Message("user", QUESTION)])
    request = Request(asked, SamplingConfig(max_new_tokens=60), session.names[0], session.template.stop_ids)
    [reply] = replies(Engine(session.base), [request])
    ids = torch.tensor([asked])
    plain = merged.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)
    assert plain[0, len(asked) :].tolist() == reply.ids
    assert len(set(reply.ids)) > 1

    wanted = logits(session.base.model, ids)
    apart = distance(logits(merged, ids), wanted)
    assert apart < 1e-5  # float32: measured 5e-7
    merged.get_output_embeddings().weight = merged.get_input_embeddings().weight  # what tie_word_embeddings=true does
    assert distance(logits(merged, ids), wanted) > 20 * apart


def test_both_answers_are_shown_and_the_merge_certified(ran: Ran) -> None:
    session = load(ran.run, dtype="float32")
    answer = session.generate(QUESTION, max_new_tokens=200)
    assert f"\nadapter, greedy: {answer}\n" in ran.out
    assert re.search(r"^merged: float32: logits within \S+ of the adapter's", ran.out, re.MULTILINE)
    assert ran.out.split("\nmerged, sampled: ")[1].strip()


def test_another_start_says_that_the_run_is_there_and_overwrite_is_passed_on(
    ran: Ran, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tutorial, given = script(), {}

    def instead(*_data: Path, **options: Any) -> None:
        given.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(tutorial, "train", instead)
    args = ["--data", str(ran.data), "--model", str(ran.model), "--output", str(ran.run)]
    for more in ([], ["--overwrite"]):
        with pytest.raises(KeyboardInterrupt):
            tutorial.main([*args, *more])
        assert given["overwrite"] is bool(more)


# -- the TOML -----------------------------------------------------------------------------------------------------


def test_the_toml_is_the_scripts_configuration(ran: Ran) -> None:
    flags = ["--data", str(ran.data), "--model", str(ran.model), "--output", str(ran.run)]
    config = train_config(["--config", str(EXAMPLE / "tutorial.toml"), *flags])
    assert config == load_config(ran.run / "config.toml", {})  # what the script trained with
    plain, defaults = load_config(EXAMPLE / "tutorial.toml", {}), script().arguments([])
    assert plain.data.data == (str(defaults.data),)
    assert plain.model.model == str(defaults.model)
    assert plain.output == str(defaults.output)


def train_config(words: list[str]) -> Config:
    """What `lorasmith train` makes of these words."""
    args, problems = import_module("lorasmith.cli.train").parser().read(words)
    assert not problems
    if args.config and not Path(args.config).is_absolute():
        args.config = str(ROOT / args.config)
    return config_of(args)


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
