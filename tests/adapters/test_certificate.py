"""Certificates are written and read beside their file."""

import pytest

from lorasmith.adapters.certificate import certificate_of, read_certificate, sha256_of, write_certificate
from lorasmith.errors import RunError


def test_a_certificate_is_beside_its_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"abc")
    with pytest.raises(RunError, match=r"has no certificate \(model\.gguf\.certificate\.json is missing\)"):
        read_certificate(file)
    made = write_certificate(file, {"name": "名"})
    assert made.certificate == certificate_of(file) == tmp_path / "model.gguf.certificate.json"
    assert read_certificate(file) == made.content == {"name": "名"}
    assert sha256_of(file).startswith("ba7816bf")
