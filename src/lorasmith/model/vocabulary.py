"""Token ids against the rows of the embedding: a tokenizer may have tokens that the model was never resized for."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorasmith.errors import ConfigError, DataError
from lorasmith.i18n import _, listed
from lorasmith.lora.quantized import unquantize_ends, weight_shape
from lorasmith.model.base import Base
from lorasmith.model.row import Example

SHOWN = 3  # tokens or rows that a message names


def embedding_rows(base: Base) -> int:
    """The number of token ids that the model can read and predict."""
    ends = [base.model.get_input_embeddings(), base.model.get_output_embeddings()]
    return min(weight_shape(end)[0] for end in ends if end is not None)


def surplus_tokens(base: Base) -> str:
    """A warning about the tokenizer's tokens that have no row in the embedding; empty if there are none."""
    rows = embedding_rows(base)
    surplus = sorted((i, token) for token, i in base.tokenizer.get_vocab().items() if i >= rows)
    if not surplus:
        return ""
    names = listed([repr(token) for _id, token in surplus[:SHOWN]] + ["..."] * (len(surplus) > SHOWN))
    return _(
        "{base}: the tokenizer has tokens that the model has no embedding for ({count}: {names}). Rows and prompts "
        "that contain one are refused.",
        base=base.source,
        count=len(surplus),
        names=names,
    )


def refuse_surplus(base: Base, ids: Iterable[int], source: str = "") -> None:
    """Raise DataError if the model has no embedding for one of these token ids, from `source`."""
    rows = embedding_rows(base)
    surplus = next((i for i in ids if i >= rows), None)
    if surplus is not None:
        raise DataError(_problem(base, surplus, source or _("the prompt")))


def refuse_surplus_examples(base: Base, examples: Sequence[Example]) -> None:
    """Raise DataError that names the first of these examples with tokens that the model has no embedding for."""
    rows = embedding_rows(base)
    found = [(e, max(*e.ids, *e.targets)) for e in examples if max(*e.ids, *e.targets) >= rows]
    problems = [_problem(base, token, example.source) for example, token in found[:SHOWN]]
    if len(found) > SHOWN:
        problems.append(_("{count} more rows contain such tokens.", count=len(found) - SHOWN))
    if problems:
        raise DataError(*problems)


@contextmanager
def embedding_kept_on_error(base: Base) -> Iterator[None]:
    """Take the rows that were added to the embedding inside the block away again if it ends with an error."""
    rows = embedding_rows(base)
    try:
        yield
    except BaseException:
        if embedding_rows(base) > rows:
            base.model.resize_token_embeddings(rows, mean_resizing=False)
            base.model.requires_grad_(False)
        raise


@torch.no_grad()
def extend_embedding(base: Base, rows: int, saved: Mapping[str, Tensor | None]) -> None:
    """Resize embedding and head to `rows` rows, before any adapter is added.

    saved: by module path, a tensor [rows, H] with the new rows; without one they are the mean of the others.
    """
    before = embedding_rows(base)
    unquantize_ends(base.model)
    base.model.resize_token_embeddings(rows, mean_resizing=False)
    base.model.requires_grad_(False)
    for end in (base.model.get_output_embeddings(), base.model.get_input_embeddings()):  # the input counts if tied
        if end is None:
            continue
        path = next(p for p, module in base.model.named_modules() if module is end)
        new, weight = saved.get(path), end.get_parameter("weight")
        weight[before:] = weight[:before].mean(0) if new is None else new[before:].to(weight)


def add_tokens(base: Base, tokens: Sequence[str]) -> None:
    """Add new tokens to the tokenizer, and rows for them to the embedding if it has none to spare; before any adapter.

    Raises ConfigError if the tokenizer has one of them already, has more tokens than the embedding has rows, or does
    not recognize one in a text.
    """
    known, rows = base.tokenizer.get_vocab(), embedding_rows(base)
    problems = [
        _(
            "data.add_tokens: {base} already has the token {token} (id {id}). Leave it out.",
            base=base.source,
            token=repr(token),
            id=known[token],
        )
        for token in tokens
        if token in known
    ]
    if max(known.values()) >= rows:
        text = _(
            "data.add_tokens: the tokenizer of {base} has tokens that the model has no embedding for, so none can be "
            "added after them. Use a model that was resized for its tokenizer.",
            base=base.source,
        )
        problems.append(text)
    if problems:
        raise ConfigError(*problems)
    assert base.identity  # which is kept: that of the model on disk, with the tokenizer as it was
    base.tokenizer = with_tokens(base.tokenizer, tokens)
    vocabulary = base.tokenizer.get_vocab()
    base.added_tokens = {token: vocabulary[token] for token in tokens}
    if (needed := max(base.added_tokens.values()) + 1) > rows:
        extend_embedding(base, needed, {})


def with_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer with these tokens; the tokenizer itself if it has all of them.

    They are no special tokens, which messages could not contain and answers would not show.

    Raises ConfigError if one is not recognized in a text.
    """
    new = [token for token in tokens if token not in tokenizer.get_vocab()]
    if not new:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    for token in new:
        if changed(token, add_special_tokens=False)["input_ids"] != [changed.convert_tokens_to_ids(token)]:
            raise ConfigError(
                _(
                    "data.add_tokens: the tokenizer does not recognize {token} as one token. Choose another spelling.",
                    token=repr(token),
                )
            )
    return changed


def unused_tokens(base: Base, examples: Iterable[Example]) -> str:
    """A warning about added tokens that no example contains; empty if there are none."""
    used = {i for example in examples for i in {*example.ids, *example.targets}}
    unused = [repr(token) for token, i in base.added_tokens.items() if i not in used]
    if not unused:
        return ""
    return _(
        "data.add_tokens: no training row contains {tokens}, so the model learns nothing about them.",
        tokens=listed(unused),
    )


def _problem(base: Base, token_id: int, source: str) -> str:
    return _(
        "{source}: contains the token {token}, whose id is {id}, but the embedding of {base} has only {rows} rows. Use "
        "the tokenizer that belongs to the model, or a model that was resized for this one.",
        source=source,
        token=repr(base.tokenizer.convert_ids_to_tokens(token_id)),
        id=token_id,
        base=base.source,
        rows=embedding_rows(base),
    )
