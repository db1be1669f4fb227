"""What must not go to a hub: paths of this machine, access tokens, and files that are no part of a model."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorasmith.errors import RunError
from lorasmith.export.gguf.file import GGUFFile
from lorasmith.i18n import _

SUFFIXES = frozenset((".safetensors", ".gguf", ".json", ".jinja", ".md", ".model", ".txt", ".py"))
NAMES = frozenset(("Modelfile",))
VOCABULARIES = frozenset(("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"))
PATH = re.compile(r"(?<![\w:/.<])(?:~|/|[A-Za-z]:\\)[\w.@+-]+(?:[/\\][\w.@+-]+)+")
TOKENS = re.compile(r"\b(?:hf_[A-Za-z0-9]{30,}|ms-[0-9a-f]{8}-[0-9a-f-]{27}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16})\b")
HEADER = 8  # bytes of the length before the header of a safetensors file


def require_public(files: Mapping[str, Path], places: tuple[Path, ...] = ()) -> None:
    """Raise RunError that names each file with a path of this machine or an access token, or that is no model file.

    places: paths of this machine, besides those that exist on it.
    """
    problems = []
    for name, path in files.items():
        if path.suffix not in SUFFIXES and path.name not in NAMES:
            problems.append(_("{file} is not a file of a model, so it is not uploaded. Remove it.", file=path))
            continue
        for text in _texts(path):
            if TOKENS.search(text):
                problems.append(_("{file} contains an access token. Remove it; nothing was uploaded.", file=path))
            if found := _place(text, places):
                problems.append(
                    _(
                        "{file} contains {path}, a path of this machine. Export it again, or remove the path; nothing "
                        "was uploaded.",
                        file=name,
                        path=found,
                    )
                )
    if problems:
        raise RunError(*dict.fromkeys(problems))


def _place(text: str, places: tuple[Path, ...]) -> str | None:
    """The first path in a text that is one of `places`, or exists here."""
    if found := next((str(place) for place in places if str(place) in text), None):
        return found
    return next((match[0] for match in PATH.finditer(text) if _exists(match[0])), None)


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError):
        return False


def _texts(path: Path) -> Iterator[str]:
    """What can be read of a file, without vocabularies, where anything is a token, and without tensors."""
    if path.suffix == ".safetensors":
        yield json.dumps(_metadata(path), ensure_ascii=False)
    elif path.suffix == ".gguf":
        yield from GGUFFile(path).texts()
    elif path.suffix != ".model" and path.name not in VOCABULARIES:
        yield path.read_text("utf-8", errors="replace")


def _metadata(path: Path) -> Any:
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(HEADER), "little")))
    return header.get("__metadata__", {})
