"""What goes up of each kind of export; no file of it names a place of this machine or a row of the data."""

import json

import pytest

from lorasmith.adapters.certificate import sha256_of
from lorasmith.adapters.merge import merge_run
from lorasmith.config.model import ModelConfig
from lorasmith.errors import RunError
from lorasmith.export.gguf.model import export_gguf
from lorasmith.export.gguf.ollama import export_ollama
from lorasmith.export.mlx import export_mlx
from lorasmith.export.peft_folder import export_peft
from lorasmith.export.push.content import content_of
from lorasmith.export.push.private import require_public
from lorasmith.report import Report
from tests.support.tiny import trained

EXPORTS = {
    "peft": (export_peft, "out", {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}),
    "mlx": (export_mlx, "out", {"adapter_config.json", "adapters.safetensors", "certificate.json"}),
    "gguf": (export_gguf, "out.gguf", {"out.gguf", "out.gguf.certificate.json"}),
    "ollama": (export_ollama, "out", {"out.gguf", "out.gguf.certificate.json", "Modelfile"}),
    "transformers": (merge_run, "out", {"config.json", "model.safetensors", "tokenizer.json", "certificate.json"}),
}
LIBRARIES = {"ollama": "gguf"}
PUBLIC = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "certificate.json", "chat_template.jinja",
    "lorasmith.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("pushed") / "run"
    trained(place, max_steps=2)
    return place


def what_goes(path, check, base_name="org/base"):
    with content_of(path, "me/mine", base_name, ModelConfig(), Report()) as content:
        require_public(content.files, (path.parent,))
        assert content.files["README.md"].is_file()
        check(content)


@pytest.mark.parametrize("target", EXPORTS)
def test_an_export_goes_with_a_card(target, run, tmp_path):
    export, name, wanted = EXPORTS[target]
    own = {"base_name": "org/base"} if target == "peft" else {}
    export(run, tmp_path / name, **own)

    def check(content):
        assert set(content.files) >= wanted | {"README.md"}
        assert f"\nlibrary_name: {LIBRARIES.get(target, target)}\n" in content.card
        assert "base_model: org/base\n" in content.card
        assert ("me/mine" if target != "peft" else "ORG/out") in content.card
        for path in content.files.values():
            assert str(tmp_path).encode() not in path.read_bytes(), path

    what_goes(tmp_path / name, check, None if own else "org/base")


def test_a_run_goes_as_its_adapter_only(run):
    rows = [json.loads(line)["messages"] for line in (run.parent / "rows.jsonl").read_text("utf-8").splitlines()]
    texts = [message["content"] for messages in rows for message in messages if len(message["content"]) > 8]
    private = [text.encode() for text in (str(run), str(run.parent), *texts)]
    assert len(private) > 12, private

    def check(content):
        assert content.format == "peft"
        assert "hf download me/mine --local-dir mine" in content.card
        assert set(content.files) <= PUBLIC
        for path in content.files.values():
            data = path.read_bytes()
            assert [text for text in private if text in data] == [], path

    what_goes(run, check)
    what_goes(run / "adapter", check)


def test_a_run_of_all_weights_goes_as_its_model(tmp_path):
    trained(tmp_path / "run", method="full", max_steps=2)

    def check(content):
        assert content.format == "transformers"
        assert set(content.files) >= {"model.safetensors", "config.json", "README.md"}
        assert "## Results" in content.card

    what_goes(tmp_path / "run", check)


def test_the_card_of_a_folder_is_kept(run, tmp_path):
    folder = export_peft(run, tmp_path / "out", base_name="org/base").file
    (folder / "README.md").write_text("Mine.", "utf-8")

    def check(content):
        assert content.card == "Mine."
        assert sha256_of(content.files["adapter_model.safetensors"]) == sha256_of(folder / "adapter_model.safetensors")

    what_goes(folder, check, None)
    with pytest.raises(RunError, match="Leave out --base-name"):
        what_goes(folder, check)


def test_what_has_changed_or_has_no_certificate_is_refused(run, tmp_path):
    file = export_gguf(run, tmp_path / "out.gguf").file
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(RunError, match="is not the file of its certificate"):
        what_goes(file, lambda _content: None)
    (tmp_path / "empty").mkdir()
    for path, words in ((tmp_path / "empty", "has no certificate"), (tmp_path / "no", "no such file or folder")):
        with pytest.raises(RunError, match=words):
            what_goes(path, lambda _content: None)
