"""What must not be uploaded is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorasmith.errors import RunError
from lorasmith.export.push.private import require_public


def test_what_names_no_place_of_this_machine_goes(tmp_path):
    (tmp_path / "README.md").write_text("See https://host/usr/bin and </think> and 1/2/3 and ~/no-such/x.", "utf-8")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"vocab": {"/usr/bin": 1}}), "utf-8")
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", {"format": "pt"})
    require_public({path.name: path for path in tmp_path.iterdir()})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", '{"_name_or_path": "PLACE/base"}', "a path of this machine"),
        ("README.md", "trained on PLACE/rows.jsonl", "a path of this machine"),
        ("README.md", "run /usr/bin", "README.md contains /usr/bin, a path of this machine"),
        ("README.md", "HF_TOKEN=hf_" + "a" * 34, "contains an access token"),
        ("optimizer.pt", "", "is not a file of a model"),
    ],
)
def test_what_is_private_is_refused(name, text, words, tmp_path):
    path = tmp_path / name
    path.write_text(text.replace("PLACE", str(tmp_path)), "utf-8")
    with pytest.raises(RunError, match=words):
        require_public({name: path}, (tmp_path,))


def test_headers_are_read(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", {"from": str(tmp_path)})
    with pytest.raises(RunError, match="a path of this machine"):
        require_public({"a.safetensors": tmp_path / "a.safetensors"}, (Path.home(),))
