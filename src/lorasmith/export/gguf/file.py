"""Writing a merged model to a GGUF file, and reading what is in one with the package gguf."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from torch import Tensor
from transformers import PreTrainedModel

from lorasmith.export.gguf.families import Value, extra_tensors, family_of, keys_of, names_of
from lorasmith.export.gguf.tokenizer.vocabulary import STRIPPING, Vocabulary
from lorasmith.i18n import _
from lorasmith.report import Report, Steps

Kind = Literal["f32", "f16", "bf16", "q8_0"]
TYPES: dict[Kind, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
BLOCK = 32  # values of Q8_0 that share a scale
ENDS = ("eos", "eot", "eom")  # the keys for tokens that end a reply


@dataclass(frozen=True)
class Encoding:
    """How a conversation becomes token ids: the vocabulary, the chat template and the tokens that end a reply.

    ends: at most three; the first is that which ends the answers of the training.
    """

    vocabulary: Vocabulary
    chat_template: str
    ends: Sequence[int]
    bos: int | None = None
    pad: int | None = None
    add_bos: bool = False
    unknown: int | None = None


def type_of(name: str, tensor: Tensor, kind: Kind) -> GGMLQuantizationType:
    """The type in which a tensor is stored: vectors, and GPT-2's positions, in F32; rows too short for Q8_0 in F16."""
    if tensor.dim() < 2 or name.startswith("position_embd"):
        return GGMLQuantizationType.F32
    if kind == "q8_0" and tensor.shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return TYPES[kind][0]


def stored(name: str, tensor: Tensor, kind: Kind) -> tuple[np.ndarray, GGMLQuantizationType]:
    """A tensor, whose layout is that of the file, as its bytes."""
    own = type_of(name, tensor, kind)
    return gguf.quantize(tensor.float().contiguous().numpy(), own), own


def rounded(name: str, tensor: Tensor, kind: Kind) -> Tensor:
    """A tensor as it is after it was stored: float32, in the same shape."""
    data, own = stored(name, tensor, kind)
    return torch.from_numpy(gguf.dequantize(data, own)).reshape(tensor.shape)


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, str, Tensor]]:
    """The name in GGUF, the name in the model, and the weight of each parameter. Tied weights come once.

    What else the file needs comes last, with the name of the entry of the config that it follows from.
    """
    name_of = names_of(model.config)
    for parameter, weight in model.named_parameters():
        yield name_of(parameter), parameter, weight.detach()
    for name, tensor in extra_tensors(model.config).items():
        yield name, "rope_parameters", tensor


@torch.no_grad()
def write_gguf(
    path: Path, model: PreTrainedModel, encoding: Encoding, kind: Kind, about: Mapping[str, Value],
    report: Report | None = None,
) -> None:  # fmt: skip
    """Write the model to `path`. about: further metadata, with full keys.

    Raises ModelError for a model that cannot be exported, OSError.
    """
    family = family_of(model.config)
    writer = GGUFWriter(path, family.architecture)
    writer.add_file_type(TYPES[kind][1])
    for key, value in (keys_of(model.config) | dict(about)).items():
        _add(writer, key, value)
    _add_encoding(writer, encoding)
    tensors = list(tensors_of(model))
    steps = Steps(report or Report(), _("converting tensors"), len(tensors))
    for name, _parameter, tensor in tensors:
        data, own = stored(name, family.change(name, tensor, model.config), kind)
        writer.add_tensor(name, data, raw_dtype=own)
        steps.step()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: GGUFWriter, key: str, value: Value) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[type(value)](key, value)  # type: ignore[operator]


def _add_encoding(writer: GGUFWriter, encoding: Encoding) -> None:
    words = encoding.vocabulary
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(list(words.tokens))
    writer.add_token_types(list(words.types))
    if words.scores:
        writer.add_token_scores(list(words.scores))
        writer.add_add_space_prefix(words.space)
    else:
        writer.add_token_merges(list(words.merges))
    if encoding.unknown is not None:
        writer.add_unk_token_id(encoding.unknown)
    for name, token in zip(ENDS, encoding.ends, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    if encoding.bos is not None:
        writer.add_bos_token_id(encoding.bos)
    if encoding.pad is not None:
        writer.add_pad_token_id(encoding.pad)
    writer.add_add_bos_token(encoding.add_bos)
    writer.add_add_eos_token(False)
    writer.add_chat_template(encoding.chat_template)


@dataclass(frozen=True)
class GGUFFile:
    """What is in a GGUF file. Raises ValueError, IndexError or OSError for one that is damaged."""

    path: Path

    @cached_property
    def _reader(self) -> GGUFReader:
        return GGUFReader(self.path)

    def key(self, name: str) -> Any:
        """The value of a key; None if the file does not have it."""
        field = self._reader.get_field(name)
        return None if field is None else field.contents()

    def texts(self) -> Iterator[str]:
        """The values that are texts, without those of the vocabulary."""
        for name, field in self._reader.fields.items():
            if field.types == [GGUFValueType.STRING]:
                yield f"{name}: {field.contents()}"

    @property
    def kind(self) -> Kind | None:
        """The type of its matrices; None for one that lorasmith does not write."""
        return next((kind for kind, (_t, own) in TYPES.items() if own == self.key("general.file_type")), None)

    @property
    def encoding(self) -> Encoding:
        """The tokenizer and the chat template."""
        key = "tokenizer.ggml."
        tokens, types, merges, pre, scores = (
            self.key(key + name) for name in ("tokens", "token_type", "merges", "pre", "scores")
        )
        strips = STRIPPING in str(self.key("general.name")).lower()
        space = bool(self.key(key + "add_space_prefix"))
        words = Vocabulary(tokens, types, merges or (), pre, scores or (), space, strips)
        ends = [end for name in ENDS if (end := self.key(f"{key}{name}_token_id")) is not None]
        return Encoding(
            words,
            self.key("tokenizer.chat_template") or "",
            ends,
            self.key(key + "bos_token_id"),
            self.key(key + "padding_token_id"),
            bool(self.key(key + "add_bos_token")),
            self.key(key + "unknown_token_id"),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors as float32, in the shapes and the layout of the file."""
        found = {}
        for one in self._reader.tensors:
            values = gguf.dequantize(np.array(one.data), one.tensor_type)
            found[one.name] = torch.from_numpy(values).reshape([int(n) for n in reversed(one.shape)])
        return found
