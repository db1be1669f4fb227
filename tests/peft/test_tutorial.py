"""The tutorial's own script with its import changed, beside the same script with PEFT."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

import lorasmith.peft as ours
from tests.support.paths import ROOT
from tests.support.tutorial_bloom import COUNTS, OWN_ROWS, make_bloom, make_tokenizer

EXAMPLE = ROOT / "examples/peft/tutorial.py"
IMPORT = "from lorasmith.peft import "
ROWS = [row | {"output": row["output"][:50]} for row in OWN_ROWS * 5][:400]  # fifty steps of 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, Path]]:
    """Runs the script with one of the libraries: what it printed, and its output folder."""
    folder = tmp_path_factory.mktemp("tutorial")
    Dataset.from_list(ROWS).save_to_disk(folder / "data")
    tokenizer = make_tokenizer(OWN_ROWS)
    make_bloom(len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    def run_with(library: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
        script, output = folder / f"with_{library}.py", folder / library
        script.write_text(EXAMPLE.read_text("utf-8").replace(IMPORT, f"from {library} import "), "utf-8")
        words = ["--data", str(folder / "data"), "--model", str(folder / "model"), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", [str(script), *words])
        torch.manual_seed(4)
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out, output

    return run_with


def test_it_differs_from_the_tutorials_script_in_the_import_and_its_mendings() -> None:
    tutorial = ROOT.parent / "shared/tutorial.py"
    if not tutorial.is_file():
        pytest.skip("../shared/tutorial.py is not there")

    def words(path: Path) -> set[str]:
        return set(re.findall(r"\w+", re.sub(r'"""[\s\S]*?"""|#.*', "", path.read_text("utf-8"))))

    unused = {"torch", "PromptTuningConfig", "PromptTuningInit", "PeftModel"}
    folders = {"D", "git", "download", "master", "code", "transformers", "chatbot", "checkpoint", "3357"}
    assert words(tutorial) - words(EXAMPLE) <= unused | folders


def test_the_same_lines_losses_and_files_as_with_peft(
    run: Callable[..., tuple[str, Path]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (theirs, their_folder), (mine, my_folder) = (run(name, capsys, monkeypatch) for name in ("peft", "lorasmith.peft"))
    assert IMPORT in EXAMPLE.read_text("utf-8")

    def losses(out: str) -> list[float]:
        return [float(value) for value in re.findall(r"\{'loss': '?([0-9.]+)", out)]

    assert len(losses(mine)) == 5  # one every ten steps
    assert losses(mine) == losses(theirs)
    counts = r"trainable params: .*"
    assert re.findall(counts, mine) == re.findall(counts, theirs)
    answers = r"(?s)生成的回答: (.*?)\n(?:合并|模型)"
    assert re.findall(answers, mine) == re.findall(answers, theirs)
    folders = [next(folder.glob("checkpoint-*")) for folder in (my_folder, their_folder)]
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.allclose(tensors[0][key], tensors[1][key], atol=1e-5) for key in tensors[0])
    assert (folders[0] / "adapter_config.json").read_text() == (folders[1] / "adapter_config.json").read_text()
    ids = torch.arange(5, 25)[None]
    base = AutoModelForCausalLM.from_pretrained
    merged, model = base(my_folder / "merge_model"), my_folder.parent / "model"
    read = peft.PeftModel.from_pretrained(base(model), folders[0])
    with torch.no_grad():
        assert torch.allclose(read(ids).logits, merged(ids).logits, atol=1e-4)


def test_a_bloom_of_the_tutorials_shape_prints_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = EXAMPLE.read_text("utf-8")
    options = re.search(r"config = LoraConfig\(([\s\S]*?)\n\)", text)
    assert options is not None
    with torch.device("meta"):
        model = BloomForCausalLM(BloomConfig(vocab_size=42437, hidden_size=1024, n_layer=24, n_head=16))
        config = ours.LoraConfig(
            task_type="CAUSAL_LM", target_modules=".*\\.1.*query_key_value", r=8, lora_alpha=32, lora_dropout=0.1,
            modules_to_save=["word_embeddings"],
        )  # fmt: skip
        ours.get_peft_model(model, config).print_trainable_parameters()
    assert COUNTS in capsys.readouterr().out.splitlines()
