"""Readers of files, and replies of likeliest tokens. What they say of real files is compared in test_export.py."""

import os

import pytest
import torch

from lorasmith.export.readback import readers
from lorasmith.export.readback.readers import LlamaCpp, greedy, has_llama_cpp


def counting(ids: list[int], past: int | None) -> tuple[torch.Tensor, int]:
    """A model whose next token is the last one plus 1."""
    assert past in (None, len(ids) - 1)
    return torch.nn.functional.one_hot(torch.tensor(ids[-1] + 1), 100), len(ids)


def test_a_reply_ends_with_the_end_token_or_the_context():
    assert greedy(counting, [3], [7], 50) == [4, 5, 6, 7]
    assert greedy(counting, [7], [7], 3) == [8, 9]
    assert len(greedy(counting, [1], [], 99)) == 32


def test_llama_cpp_is_used_where_it_is_installed(monkeypatch):
    assert has_llama_cpp() == (readers.find_spec("llama_cpp") is not None)
    monkeypatch.setattr(readers, "find_spec", lambda _name: None)
    assert not has_llama_cpp()


@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed; make export-check installs it")
def test_llama_cpp_says_nothing_of_its_own_about_a_broken_file(tmp_path, capfd):
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03" + bytes(40))
    with pytest.raises(ValueError, match="Failed to load"):
        LlamaCpp(tmp_path / "a.gguf", 10)
    assert capfd.readouterr().err == ""


def test_the_error_stream_comes_back(capfd):
    with readers._silent():
        os.write(2, b"hidden")
    os.write(2, b"shown")
    assert capfd.readouterr().err == "shown"
