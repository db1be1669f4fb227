"""A cache of encoded rows, so that the same data is not encoded again for every run.

$XDG_CACHE_HOME/lorasmith/rows/KEY.safetensors      ids, targets, weights, lengths; at most `FILES` of them

KEY is a hash of everything that determines the tokens: rows, template, `data.learn`, tokenizer and versions. The files
contain the user's texts, so only the user can read them, and every training says where they are.
"""

import json
import os
from collections.abc import Collection, Sequence
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
from lorasmith.data.template.findings import KINDS
from lorasmith.model.row import Example
from lorasmith.system.cache import PRIVATE, cache_folder, write_cached
from lorasmith.version import installed_version

FORMAT = "5"
MIN_ROWS = 64  # fewer rows are encoded faster than they are found in the cache
FILES = 16


def encoded_path(rows: Sequence[Conversation], template: Template, learn: str) -> Path | None:
    """The cache file of the encoded rows; None for few rows, and for a slow tokenizer, which cannot be hashed."""
    backend = getattr(template.tokenizer, "backend_tokenizer", None)
    if len(rows) < MIN_ROWS or backend is None:
        return None
    digest = sha256()
    parts = (
        FORMAT,
        str(installed_version()),
        transformers.__version__,
        template.kind,
        template.text,
        template.tool_text,
        template.system,
        json.dumps([template.kwargs, template.options, template.end_id, template.is_separate], sort_keys=True),
        learn,
        str(template.stop_ids),
        backend.to_str(),
    )
    for text in (*parts, str(template.tokenizer.special_tokens_map)):
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    for row in rows:
        content = json.dumps((row.messages, row.tools, row.text), ensure_ascii=True, default=str)
        digest.update(f"{row.source}\0{content}\0".encode())
    return cache_folder() / "rows" / f"{digest.hexdigest()}.safetensors"


def load_encoded(path: Path, rows: Sequence[Conversation]) -> tuple[list[list[Example]], list[set[str]]] | None:
    """The examples of each row and what it lacks, or None if the file does not exist or is damaged."""
    try:
        tensors = load_file(path)
        os.utime(path)  # the least recently used files are deleted first
        path.parent.chmod(PRIVATE)  # earlier versions let others read it
    except (OSError, SafetensorError):
        return None
    ids, targets, weights = (tensors[name].tolist() for name in ("ids", "targets", "weights"))
    ends = [0, *accumulate(tensors["lengths"].tolist())]
    spans = list(pairwise(ends))
    firsts = [0, *accumulate(tensors["examples"].tolist())]
    examples = [
        [Example(ids[a:b], targets[a:b], weights[a:b], row.source) for a, b in spans[first:last]]
        for row, (first, last) in zip(rows, pairwise(firsts), strict=True)
    ]
    return examples, [{kind for kind, is_lost in zip(KINDS, bits, strict=True) if is_lost} for bits in tensors["lost"]]


def save_encoded(path: Path, rows: Sequence[Sequence[Example]], lost: Sequence[Collection[str]]) -> None:
    """Save encoded rows, and what each lacks, for the next run.

    A cache that cannot be written is no error: the next run encodes again.
    """
    examples = [example for row in rows for example in row]
    tensors = {
        "ids": torch.tensor([i for e in examples for i in e.ids], dtype=torch.int32),
        "targets": torch.tensor([t for e in examples for t in e.targets], dtype=torch.int32),
        "weights": torch.tensor([w for e in examples for w in e.weights], dtype=torch.float64),
        "lengths": torch.tensor([len(e.ids) for e in examples], dtype=torch.int32),
        "lost": torch.tensor([[kind in kinds for kind in KINDS] for kinds in lost]).reshape(-1, len(KINDS)),
        "examples": torch.tensor([len(row) for row in rows], dtype=torch.int32),
    }
    with suppress(SafetensorError):
        write_cached(path, FILES, lambda staging: save_file(tensors, staging))
