"""What follows a training on a quantized base: generate, chat, eval, serve, merge and resume, beside PEFT."""

import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.cli.main import main
from lorasmith.config.model import ModelConfig
from lorasmith.loading.load import load_base
from lorasmith.lora.quantized import unquantized
from tests.support.commands import COMMAND, as_json, said, server_process
from tests.support.quantized_weights import FORMATS, wide_folder
from tests.support.tiny import Crash, adapter_bytes, crash_at, rows_file, tokenizer, trained

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": tokenizer("llama").encode("<|im_start|>assistant\n")},
}
ASKED, TOKENS = "What do cats eat?", 8
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose answers are letters."""
    folder = wide_folder(tmp_path_factory.mktemp("wide") / "model")
    model, vocabulary = AutoModelForCausalLM.from_pretrained(folder), tokenizer("llama").get_vocab()
    silent = [i for token, i in vocabulary.items() if not (token.isascii() and token.isalpha())]
    with torch.no_grad():
        model.lm_head.weight[silent] *= 0.01  # which is the embedding, too; the first norm takes this back
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[(form, variant) for form in FORMATS for variant in VARIANTS], ids="-".join)
def finished(request: pytest.FixtureRequest, wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the quantized base that learned enough to answer otherwise."""
    form, variant = request.param
    run: Path = tmp_path_factory.mktemp("quantized") / "run"
    trained(run, model=str(wide), quantize=form, learning_rate=5e-2, max_steps=6, **VARIANTS[variant])
    return run


def on_dequantized(run: Path, wide: Path) -> Any:
    """PEFT's model with the adapter of a run, on ordinary layers with the values of the quantized base."""
    form = AdapterFolder.read(run / "adapter").notes["quantize"]
    base = load_base(ModelConfig(model=str(wide), quantize=form, dtype="float32", device="cpu"))
    plain = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    plain.load_state_dict(unquantized(base.model).state_dict(), strict=False)
    assert not torch.equal(plain.lm_head.weight, AutoModelForCausalLM.from_pretrained(wide).lm_head.weight)
    return peft.PeftModel.from_pretrained(plain, run / "adapter").eval()


def answer_of(model: Any, wide: Path) -> str:
    """What a model of transformers answers, greedily."""
    own = AutoTokenizer.from_pretrained(wide)
    messages = [{"role": "user", "content": ASKED}]
    ids = own.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    stops = own.convert_tokens_to_ids(["<eos>", "<|im_end|>"])
    out = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=stops, pad_token_id=0)
    return str(own.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_generate_and_chat_answer_as_peft_does(
    finished: Path, wide: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = answer_of(on_dequantized(finished, wide), wide)
    assert wanted.isalpha()
    short = ["--max-new-tokens", str(TOKENS)]
    assert main(["generate", str(finished), ASKED, *short]) == 0
    assert capsys.readouterr().out == wanted + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(ASKED + "\n"))
    assert main(["chat", str(finished), *short]) == 0
    assert capsys.readouterr().out == wanted + "\n"


def test_eval_is_on_the_quantized_base_unless_told_otherwise(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((finished / "summary.json").read_text("utf-8"))
    found = as_json(capsys, "eval", finished)
    assert found["before"] == pytest.approx(summary["loss_before"], rel=1e-5)
    assert found["after"] == pytest.approx(summary["loss_after"], rel=1e-5)
    assert as_json(capsys, "eval", finished, "--quantize", "none")["before"] != pytest.approx(found["before"], rel=1e-5)


def test_the_merged_model_answers_as_peft_does(finished: Path, wide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = on_dequantized(finished, wide)
    capsys.readouterr()  # transformers shows progress
    if theirs.peft_config["default"].alora_invocation_tokens:
        assert main(["merge", str(finished), "--output", str(finished.with_name("merged"))]) == 2
        assert "aLoRA" in capsys.readouterr().err
        return
    said(capsys, "merge", finished, "--output", finished.with_name("merged"))
    merged = AutoModelForCausalLM.from_pretrained(finished.with_name("merged"), dtype=torch.float32)
    ids = torch.tensor([[5, 17, 60, 3, 8, 44]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMATS)
def test_a_resumed_run_comes_to_the_same_adapter(form: str, variant: str, wide: Path, tmp_path: Path) -> None:
    options = {"model": str(wide), "quantize": form, "save_every": 1, **VARIANTS[variant]}
    trained(tmp_path / "whole", **options)
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(2), **options)
    trained(tmp_path / "run", resume=True, **options)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


@pytest.fixture
def served(finished: Path) -> Iterator[openai.OpenAI]:
    """A client of a server, which is a process of its own."""
    program, shown = server_process("serve", str(finished), "--port", "0")
    url = next(word for word in shown.split() if word.startswith("http://"))
    yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    program.terminate()
    assert program.wait(20) == 0


@pytest.mark.slow
def test_a_server_answers_as_peft_does(finished: Path, wide: Path, served: openai.OpenAI) -> None:
    (name,) = [model.id for model in served.models.list() if model.id == "run"]
    reply = served.chat.completions.create(
        model=name, messages=[{"role": "user", "content": ASKED}], max_tokens=TOKENS, temperature=0
    )
    assert reply.choices[0].message.content == answer_of(on_dequantized(finished, wide), wide)


@pytest.mark.slow
def test_processes_from_training_to_an_answer(wide: Path, tmp_path: Path) -> None:
    rows, run = rows_file(tmp_path / "rows.jsonl"), str(tmp_path / "run")
    options = ["--model", str(wide), "--quantize", "nf4", "--max-steps", "4", "--held-out", "3", "--warmup", "0"]

    def ran(*words: str, given: str = "") -> str:
        done = subprocess.run([*COMMAND, *words], input=given, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    ran("train", "--data", rows, "--output", run, *options)
    short = ["--max-new-tokens", str(TOKENS)]
    answer = ran("generate", run, ASKED, *short)
    assert ran("chat", run, *short, given=ASKED + "\n") == answer
    assert json.loads(ran("eval", run, "--json"))["examples"] == 3
