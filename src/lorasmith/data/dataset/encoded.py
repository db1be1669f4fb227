"""Rows that were encoded before, by all that decides them: rows, template, what is learned, tokenizer, this program.

$XDG_CACHE_HOME/lorasmith/rows/KEY.safetensors      ids, targets, weights, lengths; the oldest beyond `FILES` go

They hold the user's own texts: nobody else may read them, and who trains is told where they are.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorasmith.data.rows.conversation import Conversation
from lorasmith.data.template.encoding import Template
from lorasmith.model.row import Example
from lorasmith.system.cache import PRIVATE, cache_folder, keep
from lorasmith.version import installed_version

FORMAT = "3"
FEWEST = 64  # rows below which encoding is quicker than looking
FILES = 16


def place_of(rows: Sequence[Conversation], template: Template, learn: str) -> Path | None:
    """Where the encoded rows would lie; None for few rows, and where the tokenizer cannot be told from another."""
    backend = getattr(template.tokenizer, "backend_tokenizer", None)
    if len(rows) < FEWEST or backend is None:
        return None
    digest = sha256()
    said = (
        FORMAT,
        str(installed_version()),
        transformers.__version__,
        template.kind,
        template.text,
        template.system,
        learn,
        str(template.stop_ids),
        backend.to_str(),
    )
    for text in (*said, str(template.tokenizer.special_tokens_map)):
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    for row in rows:
        said_in_row = json.dumps((row.messages, row.tools, row.text), ensure_ascii=True, default=str)
        digest.update(f"{row.source}\0{said_in_row}\0".encode())
    return cache_folder() / "rows" / f"{digest.hexdigest()}.safetensors"


def recall(place: Path, rows: Sequence[Conversation]) -> list[list[Example]] | None:
    """The examples of each row, or None where they are not there or not whole."""
    try:
        found = load_file(place)
        os.utime(place)
        place.parent.chmod(PRIVATE)  # an earlier version let others look into it
    except (OSError, SafetensorError):
        return None
    ids, targets, weights = (found[name].tolist() for name in ("ids", "targets", "weights"))
    ends = [0, *accumulate(found["lengths"].tolist())]
    spans = list(pairwise(ends))
    firsts = [0, *accumulate(found["examples"].tolist())]
    return [
        [Example(ids[a:b], targets[a:b], weights[a:b], row.source) for a, b in spans[first:last]]
        for row, (first, last) in zip(rows, pairwise(firsts), strict=True)
    ]


def remember(place: Path, rows: Sequence[Sequence[Example]]) -> None:
    """Keep encoded rows for the next run; where the cache cannot be written, it encodes again."""
    examples = [example for row in rows for example in row]
    tensors = {
        "ids": torch.tensor([i for e in examples for i in e.ids], dtype=torch.int32),
        "targets": torch.tensor([t for e in examples for t in e.targets], dtype=torch.int32),
        "weights": torch.tensor([w for e in examples for w in e.weights], dtype=torch.float64),
        "lengths": torch.tensor([len(e.ids) for e in examples], dtype=torch.int32),
        "examples": torch.tensor([len(row) for row in rows], dtype=torch.int32),
    }
    with suppress(SafetensorError):
        keep(place, FILES, lambda path: save_file(tensors, path))
