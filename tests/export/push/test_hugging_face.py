"""Uploads through Hugging Face's own client, to a hub on this machine."""

import re

import pytest

from lorasmith.errors import RunError
from lorasmith.export.push.content import Content
from lorasmith.export.push.hugging_face import Repository
from tests.support.tiny import Watch

CARD = "---\nlicense: mit\n---\n# Mine\n"


@pytest.fixture
def content(tmp_path):
    (tmp_path / "README.md").write_text(CARD, "utf-8")
    (tmp_path / "a.safetensors").write_bytes(bytes(range(256)) * 20_000)
    return Content("peft", {name: tmp_path / name for name in ("README.md", "a.safetensors")})


def pushed(content, public=False, overwrite=False, report=None):
    report = report or Watch()
    repository = Repository.find("org/mine")
    repository.require_allowed(content.files, public, overwrite, report)
    return repository.upload(content, public, "A message", report)


def test_a_new_repository_is_private_and_has_every_file(hub, content):
    watch = Watch()
    assert pushed(content, report=watch).startswith(f"{hub.url}/org/mine/commit/")
    assert hub.private == {"org/mine": True}
    for name, path in content.files.items():
        assert hub.repositories["org/mine"][name] == path.read_bytes()
    assert hub.stored, "the large file went by LFS"
    assert hub.messages == ["A message"]
    assert any("does not exist yet and is created, private" in text for text in watch.said)


def test_public_is_only_what_is_asked_for(hub, content):
    pushed(content, public=True)
    assert hub.private == {"org/mine": False}
    with pytest.raises(RunError, match="is public, so everybody could read the upload"):
        pushed(content, overwrite=True)


def test_what_is_there_is_replaced_only_when_asked_for(hub, content):
    hub.repositories["org/mine"] = {".gitattributes": b"", "README.md": b"old", "other.txt": b"theirs"}
    hub.private["org/mine"] = True
    with pytest.raises(RunError, match=r"already has README\.md.*--overwrite"):
        pushed(content)
    assert hub.repositories["org/mine"]["README.md"] == b"old"
    watch = Watch()
    pushed(content, overwrite=True, report=watch)
    assert hub.repositories["org/mine"]["README.md"] == CARD.encode()
    assert hub.repositories["org/mine"]["other.txt"] == b"theirs"
    assert watch.said[-3:] == [
        f"{hub.url}/org/mine exists and is private; it stays so.",
        "These files are replaced: README.md",
        "These files in it are kept: other.txt",
    ]


def test_progress_counts_the_upload(hub, content):
    class Bar(Watch):
        def __init__(self):
            super().__init__()
            self.seen = []

        def progress(self, task, done, total, **_numbers):
            self.seen.append((task, done, total))

    bar = Bar()
    pushed(content, report=bar)
    assert bar.seen[-1] == ("uploading org/mine", 5, 5)
    numbers = [done for _task, done, _total in bar.seen]
    assert numbers == sorted(numbers)
    assert set(numbers) >= {1, 2, 3, 4, 5}


def test_without_a_token_it_says_where_to_get_one(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(RunError, match=re.escape(f"Create one with write access at {hub.url}/settings/tokens")):
        Repository.find("org/mine")
    assert hub.asked == []


def test_a_token_that_may_not_write_is_refused(hub, content):
    hub.refuses["/api/repos/create"] = 403
    with pytest.raises(RunError, match=r"org/mine could not be uploaded to .*that the token may write to org/mine"):
        pushed(content)


def test_without_network_one_sentence_says_so(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"could not be uploaded to http://127\.0\.0\.1:9 \("):
        Repository.find("org/mine")
