"""Token ids against the rows of the embedding: a tokenizer may have tokens that the model was never resized for."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lorasmith.errors import DataError
from lorasmith.i18n import _, listed
from lorasmith.model.base import Base
from lorasmith.model.row import Example

SHOWN = 3  # tokens or rows that a message names


def embedding_rows(base: Base) -> int:
    """The number of token ids that the model can read and predict."""
    ends = [base.model.get_input_embeddings(), base.model.get_output_embeddings()]
    return min(int(end.weight.shape[0]) for end in ends if end is not None)


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


@torch.no_grad()
def extend_embedding(base: Base, rows: int, saved: Mapping[str, Tensor | None]) -> None:
    """Resize embedding and head to `rows` rows, before any adapter is added.

    saved: by module path, a tensor [rows, H] with the new rows; without one they are the mean of the others.
    """
    before = embedding_rows(base)
    base.model.resize_token_embeddings(rows, mean_resizing=False)
    base.model.requires_grad_(False)
    for end in (base.model.get_output_embeddings(), base.model.get_input_embeddings()):  # the input counts if tied
        if end is None:
            continue
        path = next(p for p, module in base.model.named_modules() if module is end)
        new, weight = saved.get(path), end.get_parameter("weight")
        weight[before:] = weight[:before].mean(0) if new is None else new[before:].to(weight)


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
