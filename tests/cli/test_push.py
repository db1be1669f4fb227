"""`push` as it is typed."""

from tests.export.push.conftest import hub  # noqa: F401 - a fixture
from tests.support.commands import as_json, refused, said


def test_push(capsys, run, hub, monkeypatch):  # noqa: F811
    found = as_json(capsys, "push", run, "org/mine", "--base-name", "org/base")
    assert found["repository"] == "org/mine"
    assert found["commit"].startswith(f"{hub.url}/org/mine/commit/")
    assert set(hub.repositories["org/mine"]) == {".gitattributes", *found["files"]}
    assert hub.messages == ["Upload with lorasmith"]
    assert "already has README.md" in refused(capsys, "push", run, "org/mine", "--base-name", "org/base")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "none")
    assert "There is no token of" in refused(capsys, "push", run, "org/mine")


def test_a_dry_run_uses_no_network(capsys, run, hub, monkeypatch):  # noqa: F811
    monkeypatch.delenv("HF_TOKEN")
    text = said(capsys, "push", run, "hf:org/mine", "--base-name", "org/base", "--dry-run")
    assert hub.asked == []
    assert "adapter_model.safetensors" in text
    assert "  base_model: org/base" in text
    assert text.splitlines()[-1] == "Nothing was uploaded. A new repository org/mine would be private."
    text = said(capsys, "push", run, "org/mine", "--base-name", "org/base", "--dry-run", "--public")
    assert text.splitlines()[-1] == "Nothing was uploaded. A new repository org/mine would be public."
    assert "modelscope upload" in refused(capsys, "push", run, "modelscope:org/mine", "--dry-run")
