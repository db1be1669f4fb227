"""Trained rows of an embedding or output head, in place of its frozen ones (PEFT's trainable_token_indices).

N = trained tokens, V = vocabulary size, H = hidden size, T = tokens of the input
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasmith.errors import ConfigError
from lorasmith.i18n import _
from lorasmith.lora.expressions import ends_with
from lorasmith.lora.target import Targets, is_tied

ROWS = "token_adapter.trainable_tokens_delta"  # PEFT's name; contrary to it, these are the rows, not their change
TokenIds = Mapping[str, Sequence[int]]  # the ids of the trained tokens, by the path of the embedding or head


class TokenRows(nn.Module):
    """The rows of the tokens `ids`, [N, H], that one adapter has in place of those of the frozen original."""

    ids_N: Tensor
    sorted_N: Tensor
    order_N: Tensor

    def __init__(self, ids: Sequence[int], rows_NH: nn.Parameter) -> None:
        super().__init__()
        self.rows_NH = rows_NH
        ids_N = torch.tensor(ids, device=rows_NH.device)
        sorted_N, order_N = ids_N.sort()
        for name, values in (("ids_N", ids_N), ("sorted_N", sorted_N), ("order_N", order_N)):
            self.register_buffer(name, values, persistent=False)

    def output(self, original: nn.Module, x: Tensor) -> Tensor:
        """The original's output for ids [..., T] or states [..., T, H], as if it had these rows."""
        y: Tensor = original(x)
        if isinstance(original, nn.Embedding):
            at = torch.searchsorted(self.sorted_N, x.contiguous()).clamp_max(len(self.sorted_N) - 1)
            rows = F.embedding(self.order_N[at], self.rows_NH).to(y.dtype) * getattr(original, "embed_scale", 1.0)
            return torch.where((self.sorted_N[at] == x)[..., None], rows.to(y.dtype), y)
        bias = getattr(original, "bias", None)
        logits = F.linear(x, self.rows_NH.to(x.dtype), None if bias is None else bias[self.ids_N])
        return y.index_copy_(-1, self.ids_N, logits.to(y.dtype))  # in place: all logits are large, and kept by nobody

    def merged(self, original: nn.Module) -> Tensor:
        """The original's weight with these rows, [V, H], in float64."""
        weight: Tensor = original.weight.detach().double()  # type: ignore[operator]
        return weight.index_copy(0, self.ids_N, self.rows_NH.detach().double())


def rows_of_new_tokens(original: nn.Module, ids: Sequence[int], dtype: torch.dtype) -> nn.Parameter:
    """The rows [N, H] with which new tokens begin: the mean of those of the tokens before them.

    The spare rows that some models have were never trained, so their values are of no use.
    """
    weight: Tensor = original.weight.detach()  # type: ignore[operator]
    mean_H = weight[: max(1, min(ids))].mean(0, dtype=torch.promote_types(dtype, torch.float32))
    return nn.Parameter(mean_H.to(dtype).repeat(len(ids), 1))


def paths_of_ends(model: PreTrainedModel) -> list[str]:
    """The paths of the input embedding and the output head."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [path for path, module in model.named_modules() if any(module is end for end in ends)]


def tied_path(model: PreTrainedModel, path: str) -> str | None:
    """The path of the head that is tied to the embedding at `path`, or the reverse; None if they are not tied."""
    if not is_tied(model, model.get_submodule(path)):
        return None
    return next((other for other in paths_of_ends(model) if other != path), None)


def rows_to_train(model: PreTrainedModel, targets: Targets, tokens: TokenIds | Sequence[int]) -> TokenIds:
    """The ids of the tokens whose rows are trained, by the path of the module. `model` must be unwrapped.

    tokens: these ids; or the ids of new tokens, whose rows are trained in the embedding, and in the head unless it is
    tied to it. If modules_to_save trains embedding and head in full, there is nothing left to do.

    Raises ConfigError if embedding or head have LoRA, or only one of them is trained in full.
    """
    if not tokens:
        return {}
    ends = list(tokens) if isinstance(tokens, Mapping) else paths_of_ends(model)
    saved = [path for paths in targets.saved.values() for path in paths]
    whole = [path for path in ends if path in saved]
    problems = [
        _(
            "{path} has LoRA, so the rows of single tokens cannot be trained in it. Leave it out of target_modules, or "
            "train it in full with modules_to_save.",
            path=path,
        )
        for path in ends
        if path in targets.adapted
    ]
    if not isinstance(tokens, Mapping) and whole and len(whole) < len(ends):
        text = _(
            "data.add_tokens: lora.modules_to_save trains {path} in full. Name all of {ends} there, or none of them to "
            "train only the rows of the added tokens.",
            path=whole[0],
            ends=", ".join(ends),
        )
        problems.append(text)
    if problems:
        raise ConfigError(*problems)
    if isinstance(tokens, Mapping) or whole:
        return tokens if isinstance(tokens, Mapping) else {}
    embedding = next(path for path, m in model.named_modules() if m is model.get_input_embeddings())
    return {path: list(tokens) for path in ends if path == embedding or tied_path(model, path) is None}


def peft_token_indices(model: PreTrainedModel, tokens: TokenIds) -> dict[str, list[int]] | None:
    """The value of trainable_token_indices in adapter_config.json. PEFT finds a tied head by itself."""
    paths = [p for p, _m in model.named_modules() if ".modules_to_save." not in p]
    found = {}
    for path, ids in tokens.items():
        name = path.rpartition(".")[2]
        found[name if sum(ends_with(p, name) for p in paths) == 1 else path] = list(ids)
    return found or None
