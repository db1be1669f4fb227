"""What this very model admits, found by trying, and why. Never a list of names: next year's model cannot leak.

Two short examples go through the model alone, and together in one packed row. Packed is taken only where nothing
leaks: not a bit of the second example's states may follow the first example's tokens, no gradient may cross, and the
numbers must be those of the example alone within rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasmith.errors import ModelError
from lorasmith.i18n import _
from lorasmith.lora.router import Slice
from lorasmith.model import attention
from lorasmith.model.base import Base, Head
from lorasmith.model.forward import hidden
from lorasmith.model.row import Example, Row, flatten

# relative differences that rounding makes between two right ways of computing the same
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def probe(base: Base) -> None:
    """Decide `base.layout` and `base.head`, with the reasons in `base.why`."""
    base.native = str(base.model.config._attn_implementation)
    base.layout = "padded"
    base.head, base.why["head"] = _find_head(base)
    reason = _packing_problem(base)
    if reason is None:
        base.layout = "packed"
        base.why["layout"] = _(
            "packed: examples laid end to end gave the same states as each alone, and nothing leaked"
        )
    else:
        base.layout = "padded"
        base.model.set_attn_implementation(base.native)
        base.why["layout"] = _("padded: {reason}", reason=reason)
    base.router.route(None)


@contextmanager
def native_attention(base: Base) -> Iterator[None]:
    """Within it the model is used as transformers uses it: its own attention, the active adapter for every token."""
    attends, slices = base.model.config._attn_implementation, base.router.slices
    if attends == attention.NAME:
        base.model.set_attn_implementation(base.native)
    base.router.route(None)
    try:
        yield
    finally:
        base.router.route(slices)
        if attends == attention.NAME:
            base.model.set_attn_implementation(attends)


def _find_head(base: Base) -> tuple[Head, str]:
    config = base.model.config.get_text_config()
    divided = getattr(config, "logits_scaling", None)
    scale = getattr(config, "logit_scale", None) or (1 / divided if divided else 1.0)
    head = Head(scale=float(scale), softcap=getattr(config, "final_logit_softcapping", None))
    if base.model.get_output_embeddings() is None:
        return Head(direct=False), _("the model's own logits: it has no output embedding to call")
    row = _row(base, *_two_examples(base))
    with torch.no_grad(), native_attention(base):
        base.head = head
        own = base.model(input_ids=row.ids_T[None, : row.spans[0].end], use_cache=False).logits[0]
        states = hidden(base, row)[: row.spans[0].end]
        output = base.output_embedding(states) * head.scale
        ours = output if head.softcap is None else torch.tanh(output / head.softcap) * head.softcap
    if _difference(ours, own) <= TOLERANCE[base.dtype]:
        return head, _("at the labels alone: equal to the model's logits")
    return Head(direct=False), _("the model's own logits: its head is more than a linear layer")


def _packing_problem(base: Base) -> str | None:
    """Why examples cannot be packed in this model, or None."""
    first, second = _two_examples(base)
    other = Example([t + 1 for t in first.ids], first.targets, first.weights, "probe")
    alone, alone_gradient = _states_and_gradient(base, _row(base, second))
    try:
        base.model.set_attn_implementation(attention.NAME)
        base.layout = "packed"
        row = _row(base, first, second)
        packed, gradient = _states_and_gradient(base, row, only=row.spans[1].start)
        changed, _unused = _states_and_gradient(base, _row(base, other, second), only=row.spans[1].start)
    except (ModelError, TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        return _("its attention cannot be given a packed row ({error})", error=str(error).splitlines()[0][:120])
    start = row.spans[1].start
    if not torch.equal(packed[start:], changed[start:]) or bool(gradient[:start].any()):
        return _("in a packed row its examples see each other")
    limit = TOLERANCE[base.dtype]
    if _difference(packed[start:], alone) > limit or _difference(gradient[start:], alone_gradient) > limit:
        return _("a packed row changes its numbers beyond rounding")
    return None


def _states_and_gradient(base: Base, row: Row, only: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states [T, H] of a row, and the gradient of those from token `only` on to the embedded tokens [T, H]."""
    with _embedded_leaf(base.model) as leaves:
        states = hidden(base, row)
        direction = torch.linspace(-1, 1, states.shape[1], device=states.device, dtype=states.dtype)
        gradient = torch.autograd.grad((states[only:] * direction).sum(), leaves[0])[0]
    return states.detach(), gradient.flatten(0, -2)


@contextmanager
def _embedded_leaf(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    leaves: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield leaves
    finally:
        handle.remove()


def _two_examples(base: Base) -> tuple[Example, Example]:
    words = int(base.model.config.get_text_config().vocab_size)
    ids = [(7 * i + 3) % (words - 2) for i in range(14)]
    parts = ids[:6], ids[6:]
    first, second = (Example(part, part, [1.0] * len(part), "probe") for part in parts)
    return first, second


def _row(base: Base, *examples: Example) -> Row:
    row = flatten(examples, 1.0, adapter=None)
    assert row.slots == (Slice(None, 0, row.tokens),)
    return row.to(base.device)


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
