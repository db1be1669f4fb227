"""Certificates of exported files and folders: JSON with hashes, versions and what was compared.

Of a file it is beside it, NAME.certificate.json; of a folder it is inside, certificate.json.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorasmith.adapters.public_names import without_folders
from lorasmith.adapters.session import Session
from lorasmith.config.files import read_object
from lorasmith.errors import RunError
from lorasmith.i18n import _
from lorasmith.loading.license import license_of
from lorasmith.system.ownership import short_list
from lorasmith.system.writing import write_file
from lorasmith.version import installed_version

VERSION = 3
INSIDE, BESIDE = "certificate.json", ".certificate.json"
CARD = "README.md"  # which people edit


@dataclass(frozen=True)
class Export:
    """A finished file or folder, its certificate, and what the certificate says."""

    file: Path
    certificate: Path
    content: dict[str, Any]


def certificate_of(path: Path) -> Path:
    """The path of the certificate of a file or folder."""
    return path / INSIDE if path.is_dir() else path.with_name(path.name + BESIDE)


def read_certificate(path: Path) -> dict[str, Any]:
    """The certificate of a file or folder. Raises RunError if there is none."""
    found = certificate_of(path)
    if not found.is_file():
        raise RunError(
            _(
                "{file} has no certificate ({path} is missing). Compare the file with its run: lorasmith verify {file} "
                "--against RUN.",
                file=path,
                path=found.name,
            )
        )
    return read_object(found, RunError)


def write_certificate(path: Path, content: dict[str, Any]) -> Export:
    """Write the certificate of a file or folder. Raises RunError if it cannot be written."""
    found = certificate_of(path)
    write_file(found, json.dumps(content, indent=2, ensure_ascii=False) + "\n", is_run=False)
    return Export(path, found, content)


def certify_folder(
    folder: Path, target: str, identity: Mapping[str, Any], readings: Sequence[Mapping[str, Any]]
) -> Export:
    """Write the certificate of a folder that is complete.

    target: the format, as in `export --to`. identity: of base model and adapter. readings: who read the folder back,
    and how far its logits were off.
    """
    content = {
        "version": VERSION,
        "target": target,
        "files": hashes(folder),
        "figures": {"readings": list(readings)},
        "versions": versions("transformers", "safetensors", "torch"),
        **identity,
    }
    return write_certificate(folder, content)


def identity_of(session: Session) -> dict[str, Any]:
    """Base model and adapter with their hashes, for a certificate. A path is given without its folders."""
    base: dict[str, Any] = {"model": without_folders(session.base.source), **session.base.identity}
    if (text := license_of(session.base.folder)) is not None:
        base["license"] = text
    adapters = [{"hash": folder.hash} for folder in session.folders.values()]
    return {"base": base} | ({"adapter": adapters[0]} if adapters else {})


def versions(*packages: str) -> dict[str, str]:
    """The versions of lorasmith and of the packages that are installed."""
    found = {"lorasmith": installed_version() or ""}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def require_unchanged(path: Path) -> Export:
    """The certificate of a file or folder whose hashes are still those of the certificate.

    The card README.md may change. Raises RunError with the names of what has changed or is missing.
    """
    content = read_certificate(path)
    if path.is_dir():
        wanted, found = content.get("files"), hashes(path)
        wanted = wanted if isinstance(wanted, dict) else {}
        if others := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
            raise RunError(
                _(
                    "{folder} is not the folder of its certificate: {names} changed, missing or added. Export it "
                    "again, or compare it with its run: lorasmith verify {folder} --against RUN.",
                    folder=path,
                    names=short_list(others),
                )
            )
    elif content.get("sha256") != sha256_of(path):
        raise RunError(
            _(
                "{file} is not the file of its certificate: its SHA-256 has changed. Export it again, or compare "
                "it with its run: lorasmith verify {file} --against RUN.",
                file=path,
            )
        )
    return Export(path, certificate_of(path), content)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of an exported folder, without its certificate, its card and hidden files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: sha256_of(path)
        for name, path in names.items()
        if name not in (INSIDE, CARD) and not any(part.startswith(".") for part in name.split("/"))
    }


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()
