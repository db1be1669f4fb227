"""`verify` as it is typed."""

from lorasmith.cli.export import show
from lorasmith.cli.screen import Screen
from tests.support.commands import as_json, refused, said


def test_verify(capsys, run, tmp_path):
    out = tmp_path / "model.gguf"
    made = as_json(capsys, "export", run, "--to", "gguf", "--output", out)
    assert said(capsys, "verify", out).splitlines()[-1].startswith(f"{out} is the file of its certificate")
    assert as_json(capsys, "verify", out, "--against", run) == made
    out.write_bytes(out.read_bytes() + b"x")
    assert "is not the file of its certificate" in refused(capsys, "verify", out)


def test_what_was_not_compared_is_said(capsys):
    figures = {"keys": 1, "tensors": 2, "texts": 3, "prompts": 4, "readings": []}
    with Screen() as screen:
        show({"architecture": "olmo2", "figures": figures}, screen)
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "does not read the architecture olmo2 from GGUF, and llama-cpp-python is not installed" in shown
