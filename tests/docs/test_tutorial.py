"""The tutorial's eight steps: script and TOML on a small Bloom, and on the meta device one of the tutorial's shape."""

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    PreTrainedModel,
)

from lorasmith import load
from lorasmith.config.lora import LoraConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.toml import load_config
from lorasmith.data.rows.conversation import Message
from lorasmith.engine.engine import Engine, replies
from lorasmith.engine.request import Request
from lorasmith.lora.files import read_weights
from lorasmith.lora.target import find_targets
from tests.support.tutorial_bloom import (
    COUNTS,
    EXAMPLE,
    OWN_ROWS,
    QUESTION,
    ROOT,
    ROWS,
    make_bloom,
    make_tokenizer,
    script,
    train_config,
)

REAL_ROWS = ROOT.parent / "shared/data/alpaca_zh_demo.json"
ELEVEN = [1, *range(10, 20)]


@dataclass(frozen=True)
class Ran:
    """What the script was given, printed and wrote."""

    rows: list[dict[str, str]]
    data: Path
    model: Path
    run: Path
    out: str


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
    assert f"truncated {cut} rows to 256 tokens; answer tokens lost: {sum(whole) - sum(kept):,}." in ran.out


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
    assert re.search(r"^merged: float32: relative logit error \S+ ", ran.out, re.MULTILINE)
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
    trained = load_config(ran.run / "config.toml", {"model": {"device": config.model.device}})  # there it is resolved
    assert config == trained
    plain, defaults = load_config(EXAMPLE / "tutorial.toml", {}), script().arguments([])
    assert plain.data.data == (str(defaults.data),)
    assert plain.model.model == str(defaults.model)
    assert plain.output == str(defaults.output)
