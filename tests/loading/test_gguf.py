"""GGUF files become plain folders with the same logits, once, in one piece, quietly."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lorasmith.errors import ModelError
from lorasmith.loading.gguf import cached_gguf, convert_gguf, is_complete, packaged_model
from lorasmith.report import Report
from lorasmith.system.cache import cache_folder
from tests.support.tiny_gguf import write_tiny_gguf

torch.set_num_threads(1)


class Kept(Report):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
        self.steps.append((done, total))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf")


@pytest.mark.parametrize("quantized", [True, False])
def test_folder_has_the_logits_of_the_file(tmp_path: Path, quantized: bool) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", quantized=quantized)
    folder = convert_gguf(gguf, tmp_path / "out", Report())
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("hello there", return_tensors="pt").input_ids
    assert ids[0].tolist() == AutoTokenizer.from_pretrained(tmp_path, gguf_file=gguf.name)("hello there").input_ids
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, direct(ids).logits)
    assert plain.dtype == torch.float32
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert not hasattr(plain.config, "quantization_config")
    plain.bfloat16()  # transformers refuses this for a model that still counts as quantized


def test_folder_has_the_tokenizer_with_its_chat_template(gguf: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(gguf, tmp_path / "out", Report()))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert "hello" in tokenizer.convert_ids_to_tokens(tokenizer.encode("hello"))


def test_conversion_is_quiet_and_leaves_transformers_as_it_was(
    gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    report = Kept()
    convert_gguf(gguf, tmp_path / "out", report)
    assert capfd.readouterr() == ("", "")
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (bars, verbosity)
    assert report.steps[0] == (0, 4)
    assert report.steps[-1] == (4, 4)
    assert len(report.lines) == 1
    assert "tiny.Q8_0.gguf" in report.lines[0]


def test_a_second_conversion_uses_the_first(gguf: Path) -> None:
    first = cached_gguf(gguf, Report())
    written = (first / "model.safetensors").stat().st_mtime_ns
    report = Kept()
    assert cached_gguf(gguf, report) == first
    assert first.parent == cache_folder() / "models"
    assert first.name.startswith("tiny.Q8_0-")
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert report.lines == []


def test_a_changed_file_is_another_model(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    first = cached_gguf(gguf, Report())
    write_tiny_gguf(gguf, quantized=False)
    assert cached_gguf(gguf, Report()) != first


def test_an_incomplete_folder_in_the_cache_is_made_again(gguf: Path) -> None:
    folder = cached_gguf(gguf, Report())
    (folder / "model.safetensors").unlink()
    report = Kept()
    assert is_complete(cached_gguf(gguf, report))
    assert "incomplete" in report.lines[0]


def test_a_folder_with_something_else_is_left_alone(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    with pytest.raises(ModelError, match="exists and is not a converted model"):
        convert_gguf(gguf, tmp_path / "work", Report())
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"


def test_an_architecture_unknown_to_transformers_is_named(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "odd.gguf", architecture="bert-of-mars")
    with pytest.raises(ModelError, match=r"odd\.gguf.*architecture bert-of-mars.*--model FOLDER"):
        convert_gguf(gguf, tmp_path / "out", Report())
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "odd.gguf"]


def test_a_file_cut_short_is_an_error_in_one_sentence(gguf: Path, tmp_path: Path) -> None:
    for size in (20, 3000, gguf.stat().st_size - 5000):
        short = tmp_path / "short.gguf"
        short.write_bytes(gguf.read_bytes()[:size])
        with pytest.raises(ModelError, match=r"short\.gguf.*cannot read"):
            convert_gguf(short, tmp_path / "out", Report())
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="not a GGUF file"):
        cached_gguf(tmp_path / "model.gguf", Report())
    with pytest.raises(ModelError, match="cannot be read"):
        cached_gguf(tmp_path / "missing.gguf", Report())


def test_no_space_is_said_before_anything_is_written(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage)
    with pytest.raises(ModelError, match="MB are needed, but only 1 MB are free"):
        convert_gguf(gguf, tmp_path / "out", Report())
    assert not (tmp_path / "out").exists()


def test_an_unknown_packaged_model_names_the_known_one() -> None:
    with pytest.raises(ModelError, match="smollm2-135m-instruct"):
        packaged_model("smollm2", Report())


PROGRAM = """
import sys, pathlib, torch
torch.set_num_threads(1)
from lorasmith.loading.gguf import cached_gguf
from lorasmith.report import Report
class Out(Report):
    def say(self, text): print(text, flush=True)
    def progress(self, task, done, total, **numbers):
        if done == 0: print("converting", flush=True)
sys.stdin.readline()
print(cached_gguf(pathlib.Path(sys.argv[1]), Out()))
"""


def test_two_programs_at_once_convert_once(gguf: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(gguf)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    for program in programs:  # both have started Python; now let them go
        assert program.stdin
        program.stdin.write("\n")
        program.stdin.flush()
    outputs = [program.communicate(timeout=120)[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0]
    assert "".join(outputs).count("converting\n") == 1
    folders = {output.splitlines()[-1] for output in outputs}
    assert len(folders) == 1
    assert is_complete(Path(folders.pop()))
    assert not list((cache_folder() / "models").glob(".*.part-*"))
