"""A hub on this machine that the client of this process uploads to."""

from collections.abc import Iterator

import pytest

from tests.support.upload_hub import TOKEN, UploadHub, upload_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with upload_hub() as made:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made
