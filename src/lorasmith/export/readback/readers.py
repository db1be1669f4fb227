"""The programs that read an exported file back: transformers, and llama.cpp where llama-cpp-python is installed."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorasmith.adapters.merge import FLOAT32_LIMIT, plain_logits
from lorasmith.loading.gguf import read_model
from lorasmith.system.transformers_logging import quiet_transformers

REPLY = 32  # tokens of a greedy reply
LLAMA_CPP = "llama_cpp"  # the module of llama-cpp-python


class Reader(Protocol):
    """A program that has read a file.

    slack: how far it may be off, as a multiple of what rounding the weights explains. floor: how far in any case, as
    the relative error of its logits.
    """

    name: str
    version: str
    slack: float
    floor: float

    def tokens(self, text: str) -> list[int] | None:
        """The ids of a text in which special tokens count; None if it has no tokenizer of its own."""

    def logits(self, rows: Sequence[list[int]]) -> list[Tensor]:
        """Of each row of L ids, float32 of shape [L, V]."""

    def replies(self, prompts: Sequence[list[int]], stops: Sequence[int], context: int) -> list[list[int]]:
        """The likeliest tokens after each prompt, up to and including a stop token, within `context` tokens."""

    def close(self) -> None:
        """Give its memory back."""


class Transformers:
    """transformers, as it reads a file without knowing the model. Raises what `loading.gguf.read_model` does."""

    name, slack, floor = "transformers", 1.0, FLOAT32_LIMIT
    version = version("transformers")

    def __init__(self, file: Path) -> None:
        with quiet_transformers(), redirect_stderr(StringIO()):  # one progress bar bypasses transformers' logging
            self.model: PreTrainedModel = read_model(file).eval()

    def tokens(self, _text: str) -> None:
        """None: what it makes of a file's tokenizer says nothing about other programs."""

    def logits(self, rows: Sequence[list[int]]) -> list[Tensor]:
        """See `Reader`."""
        return plain_logits(self.model, rows)

    def replies(self, prompts: Sequence[list[int]], stops: Sequence[int], context: int) -> list[list[int]]:
        """See `Reader`."""
        return [greedy(self._next, ids, stops, context) for ids in prompts]

    def close(self) -> None:
        """See `Reader`."""
        del self.model

    @torch.no_grad()
    def _next(self, ids: list[int], past: Any) -> tuple[Tensor, Any]:
        new = torch.tensor([ids if past is None else ids[-1:]])
        out = self.model(input_ids=new, past_key_values=past, use_cache=True)
        return out.logits[0, -1], out.past_key_values


class LlamaCpp:
    """llama.cpp, which rounds the inputs of products to the type of the matrices. Raises ValueError.

    lora: the file of an adapter that it adds to the model.
    """

    name = "llama.cpp"
    slack = 3.0  # 1.5 with f16 and bf16, 2.0 with q8_0 were observed
    floor = 1e-3  # it takes GELU from a table in half precision; 4e-4 was observed in f32

    def __init__(self, file: Path, context: int, lora: Path | None = None) -> None:
        llama_cpp = __import__(LLAMA_CPP)
        threads, self.version = torch.get_num_threads(), f"llama-cpp-python {llama_cpp.__version__}"
        wide = llama_cpp.GGML_TYPE_F32  # of keys and values
        with _silent():
            self.llama = llama_cpp.Llama(
                str(file), n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads,
                logits_all=True, type_k=wide, type_v=wide, verbose=False, lora_path=str(lora) if lora else None,
            )  # fmt: skip

    def tokens(self, text: str) -> list[int]:
        """See `Reader`."""
        return list(self.llama.tokenize(text.encode(), add_bos=False, special=True))

    def logits(self, rows: Sequence[list[int]]) -> list[Tensor]:
        """See `Reader`."""
        return [self._forward(ids, 0) for ids in rows]

    def replies(self, prompts: Sequence[list[int]], stops: Sequence[int], context: int) -> list[list[int]]:
        """See `Reader`."""
        return [greedy(self._next, ids, stops, context) for ids in prompts]

    def close(self) -> None:
        """See `Reader`."""
        self.llama.close()

    def _next(self, ids: list[int], past: int | None) -> tuple[Tensor, int]:
        return self._forward(ids, past or 0)[-1], len(ids)

    def _forward(self, ids: list[int], past: int) -> Tensor:
        if not past:
            self.llama.reset()
        self.llama.eval(ids[past:])
        return torch.tensor(self.llama.scores[past : len(ids)])


def greedy(following: Any, prompt: list[int], stops: Sequence[int], context: int) -> list[int]:
    """The reply of likeliest tokens. following: gives the next token's logits after some ids, and what it keeps."""
    ids, past, end = list(prompt), None, min(len(prompt) + REPLY, context)
    while len(ids) < end and (len(ids) == len(prompt) or ids[-1] not in stops):
        logits_V, past = following(ids, past)
        ids.append(int(logits_V.argmax()))
    return ids[len(prompt) :]


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed."""
    return find_spec(LLAMA_CPP) is not None


@contextmanager
def _silent() -> Iterator[None]:
    """Without what llama.cpp writes to the standard error stream of the process, and what its package adds."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with redirect_stderr(StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
