"""The certificate of an exported file: a JSON file beside it, with hashes, versions and what was compared."""

import json
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

from lorasmith.config.files import read_object
from lorasmith.errors import RunError
from lorasmith.i18n import _
from lorasmith.system.writing import write_file

VERSION = 2


@dataclass(frozen=True)
class Export:
    """A finished file, the certificate beside it, and what the certificate says."""

    file: Path
    certificate: Path
    content: dict[str, Any]


def certificate_of(file: Path) -> Path:
    """The path of a file's certificate."""
    return file.with_name(file.name + ".certificate.json")


def read_certificate(file: Path) -> dict[str, Any]:
    """The certificate beside a file. Raises RunError if there is none."""
    path = certificate_of(file)
    if not path.is_file():
        raise RunError(
            _(
                "{file} has no certificate ({path} is missing). Compare the file with its run: lorasmith verify {file} "
                "--against RUN.",
                file=file,
                path=path.name,
            )
        )
    return read_object(path, RunError)


def write_certificate(file: Path, content: dict[str, Any]) -> Export:
    """Write the certificate of a file. Raises RunError if it cannot be written."""
    path = certificate_of(file)
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", is_run=False)
    return Export(file, path, content)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()
