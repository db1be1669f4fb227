"""Adapters of other tools: the tokenizer and chat template beside them, and the tokens that they add.

LLaMA-Factory, TRL and Unsloth save the tokenizer of the training into the adapter folder. If tokens were added to it,
PEFT saves their embeddings in one of three ways:

    modules_to_save              embedding and head as they were trained, in full
    save_embedding_layers        the same untrained, because the base model was resized
    trainable_token_indices      the rows of some tokens only
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lorasmith.config.files import read_object, read_text
from lorasmith.config.lora import LoraConfig
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.isolated import IsolatedRenderer
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.lora.expressions import ends_with
from lorasmith.lora.files import ADAPTER_WEIGHTS, is_same
from lorasmith.lora.inject import PEFT_PREFIX
from lorasmith.lora.quantized import stored_weight, weight_shape
from lorasmith.lora.token_rows import ROWS, paths_of_ends
from lorasmith.model.base import Base
from lorasmith.model.vocabulary import embedding_rows, extend_embedding

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any of these is a whole tokenizer
CHAT_TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
# PEFT's keys of the base model's own embedding or head. The last may also be a trained copy.
WHOLE = (".original_module.weight", ".base_layer.weight", ".token_adapter.base_layer.weight", ".weight")


def foreign_template(
    folder: Path, base: Base, ends: tuple[int, ...], renderer: IsolatedRenderer | None = None
) -> Template:
    """The template of an adapter of another tool: that which stands in its folder, or else the base model's.

    ends: the tokens that end a reply according to the base model. Raises AdapterError or ModelError if the tokenizer
    beside the adapter belongs to another base model, or cannot be read.
    """
    return Template.of(_tokenizer(folder, base), "auto", ends, renderer=renderer)


def _tokenizer(folder: Path, base: Base) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, or the base model's with the chat template in `folder`, or the base model's."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        text = chat_template_of(folder)
        if text is None or text == base.tokenizer.chat_template:
            return base.tokenizer
        tokenizer = copy.deepcopy(base.tokenizer)
        tokenizer.chat_template = text
        return tokenizer
    tokenizer = load_tokenizer(folder)
    own = tokenizer.get_vocab()
    other = next((token for token, i in base.tokenizer.get_vocab().items() if own.get(token) != i), None)
    if other is not None:
        raise AdapterError(
            _(
                "{folder}: the tokenizer beside the adapter does not belong to {base}: the token {token} has another "
                "id. Specify the right base model with --model.",
                folder=folder,
                base=base.source,
                token=repr(other),
            )
        )
    tokenizer.chat_template = tokenizer.chat_template or base.tokenizer.chat_template
    return tokenizer


def chat_template_of(folder: Path) -> str | None:
    """The chat template in an adapter folder that has no whole tokenizer."""
    if (folder / CHAT_TEMPLATE).is_file():
        return read_text(folder / CHAT_TEMPLATE, AdapterError)
    if (folder / TOKENIZER_CONFIG).is_file():
        found = read_object(folder / TOKENIZER_CONFIG, AdapterError).get("chat_template")
        return found if isinstance(found, str) else None
    return None


def with_added_tokens(
    base: Base, folder: Path, raw: Mapping[str, Any], config: LoraConfig, tensors: Mapping[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and tensors of an adapter as `load_adapter` reads them, after the base model got rows for its tokens.

    raw: the content of adapter_config.json. Raises AdapterError if the model has other adapters, which would have to be
    resized too, or if rows of single tokens do not fit.
    """
    ends = paths_of_ends(base.model)
    rows = _rows_of(base, ends, raw, config, tensors)
    added = rows - embedding_rows(base)
    if added > 0:
        if base.adapters or base.fast_decoder is not None:
            raise cannot_share(folder, added, base)
        extend_embedding(base, rows, {path: _saved(path, tensors) for path in ends})
    repeated = {f"{PEFT_PREFIX}{path}.modules_to_save.weight" for path in ends}  # PEFT saves the copies twice then
    repeated |= {f"{PEFT_PREFIX}{path}{WHOLE[2]}" for path in ends}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in repeated}
    for path, ids in trained_tokens(base, raw, tensors).items():
        key, shape = f"{PEFT_PREFIX}{path}.{ROWS}", weight_shape(base.model.get_submodule(path))
        _refuse_rows(shape, ids, tensors[key], f"{folder / ADAPTER_WEIGHTS}: {key}")
    return config, tensors


def ends_without_rows(base: Base, tensors: Mapping[str, Tensor]) -> list[str]:
    """The paths of the embedding and the head of which an adapter has no rows; tied ones share theirs.

    If the adapter adds tokens, `with_added_tokens` gives these the mean of the other rows; call this before it.
    """
    ends = {path: stored_weight(base.model.get_submodule(path)) for path in paths_of_ends(base.model)}
    given = [
        weight
        for path, weight in ends.items()
        if _saved(path, tensors) is not None or f"{PEFT_PREFIX}{path}.{ROWS}" in tensors
    ]
    return [path for path, weight in ends.items() if not any(weight is one for one in given)]


def cannot_share(folder: Path, count: int, base: Base) -> AdapterError:
    """The error for an adapter with `count` added tokens beside other adapters."""
    return AdapterError(
        _(
            "{folder}: the adapter adds tokens ({count}) to the vocabulary of {base}, so it cannot share the model "
            "with other adapters. Merge it into its base model, and use the result with --model.",
            folder=folder,
            count=count,
            base=base.source,
        )
    )


def trained_tokens(base: Base, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The ids of the tokens whose rows an adapter trains, by the path of the embedding or head."""
    paths = paths_of_ends(base.model)
    return {path: _indices(path, raw) for path in paths if f"{PEFT_PREFIX}{path}.{ROWS}" in tensors}


def _rows_of(
    base: Base, ends: list[str], raw: Mapping[str, Any], config: LoraConfig, tensors: Mapping[str, Tensor]
) -> int:
    """The number of rows that the adapter needs; 0 if its tensors contradict each other or belong to another base."""
    sizes = {size for path in ends for size in _sizes(path, raw, tensors, embedding_rows(base))}
    for path in ends:
        is_trained = any(ends_with(path, name) for name in config.modules_to_save)
        theirs = _saved(path, tensors, WHOLE[:-1] if is_trained else WHOLE)
        ours = base.model.get_submodule(path)
        if theirs is not None and not _has_values(ours, theirs[: weight_shape(ours)[0]]):
            return 0
    return max(sizes) if len(sizes) == 1 else 0


def _has_values(module: nn.Module, W: Tensor) -> bool:
    """Whether the module's weight is W, or what quantizing W gives."""
    stored = stored_weight(module)
    return is_same(stored.cpu(), W) if isinstance(stored, Tensor) else stored.is_from(W)


def _saved(path: str, tensors: Mapping[str, Tensor], suffixes: Sequence[str] = WHOLE) -> Tensor | None:
    """The embedding or head at `path` that PEFT saved in full, or None. Tensors of another form are no embeddings."""
    keys = (f"{PEFT_PREFIX}{path}{suffix}" for suffix in suffixes)
    return next((tensors[key] for key in keys if key in tensors and tensors[key].dim() == 2), None)


def _sizes(path: str, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], rows: int) -> list[int]:
    """How many rows the embedding or head at `path` has, according to its tensors; `rows` of them are the base's."""
    saved, low_rank = _saved(path, tensors), tensors.get(f"{PEFT_PREFIX}{path}.lora_embedding_A")
    sizes = [] if saved is None else [saved.shape[0]]
    sizes += [] if low_rank is None or low_rank.dim() != 2 else [low_rank.shape[1]]
    ids = _indices(path, raw) if f"{PEFT_PREFIX}{path}.{ROWS}" in tensors and not sizes else []
    return sizes + [max(ids) + 1 for _once in ids[:1] if max(ids) < rows + len(ids)]  # no rows without a token


def _indices(path: str, raw: Mapping[str, Any]) -> list[int]:
    """The ids of the tokens whose rows in the module at `path` were trained, from trainable_token_indices.

    A head that is tied to the embedding need not be named.
    """
    given = raw.get("trainable_token_indices") or []
    if isinstance(given, dict):
        given = next((ids for name, ids in given.items() if ends_with(path, name)), next(iter(given.values()), []))
    return list(given)


def _refuse_rows(need: tuple[int, ...], ids: list[int], rows: Tensor, key: str) -> None:
    """Raise AdapterError if `rows` are not those of the tokens `ids` in an embedding of the shape `need`."""
    is_known = all(0 <= i < need[0] for i in ids)
    if rows.dim() != 2 or not is_known or len(ids) != len(rows) or rows.shape[1:] != need[1:]:
        raise AdapterError(
            _(
                "{key} has the shape {found}, which does not fit the tokens in trainable_token_indices of "
                "adapter_config.json ({count}) and an embedding of the shape {need}.",
                key=key,
                found=tuple(rows.shape),
                count=len(ids),
                need=need,
            )
        )
