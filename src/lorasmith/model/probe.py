"""Find out by trial whether a model supports packed rows and how it computes logits. There is no list of known models.

Two short examples are computed alone, and together in one packed row. The packed layout is chosen only if no
information leaks between them: no gradient may cross, the second example's hidden states may not follow the first one's
tokens, and the results must equal those of the example alone within rounding. The padded layout is tried in the same
way; a model in which padding changes the results computes one example at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasmith.errors import LIBRARY_ERRORS, ModelError, first_line
from lorasmith.i18n import _
from lorasmith.lora.router import Slice
from lorasmith.model import attention
from lorasmith.model.base import Base, Head
from lorasmith.model.forward import hidden, packed_inputs, padded_output
from lorasmith.model.rounding import TOLERANCE, differ_by_rounding
from lorasmith.model.row import Example, Row, flatten

# the largest relative difference between two rows of one shape: the experts of a mixture are computed in other groups
SAME_SHAPE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 2e-2}
AHEAD = 1e-6  # a gradient of this size, relative to the whole, to later tokens is one: in causal models it is zero


def probe(base: Base) -> None:
    """Set `base.layout` and `base.head`, and the reasons in `base.why`.

    Raises ModelError if the model cannot compute a forward pass of token ids alone.
    """
    base.native = _implementation(base)
    base.layout, base.one_by_one = "padded", False
    first, second = _two_examples(base)
    try:
        alone = _alone(base, second)
        looks_ahead = _looks_ahead(base, second, alone)
    except LIBRARY_ERRORS as error:
        raise ModelError(
            _(
                "{folder}: {kind} cannot be used as a language model of plain text: a forward pass with token ids "
                "alone fails ({error}).",
                folder=base.folder,
                kind=type(base.model).__name__,
                error=f"{type(error).__name__}: {first_line(error)}",
            )
        ) from error
    if looks_ahead:
        raise ModelError(
            _(
                "{folder}: {kind} is not a causal language model: what it computes for a token depends on the tokens "
                "after it, which a training would have to predict. If it is meant as a decoder, set is_decoder to "
                "true in its config.json.",
                folder=base.folder,
                kind=type(base.model).__name__,
            )
        )
    base.head, base.why["head"] = _find_head(base, alone)
    reason = _packing_problem(base, first, second, alone)
    if reason is None:
        base.layout = "packed"
        base.why["layout"] = _(
            "packed: examples are concatenated without padding (verified: same hidden states as separately, no leakage)"
        )
    else:
        base.layout = "padded"
        base.model.set_attn_implementation(base.native)
        base.one_by_one = _padding_changes(base, first, second, alone)
        if base.one_by_one:
            reason = _("{reason}; padding changes its results too, so examples are computed one by one", reason=reason)
        base.why["layout"] = reason
    base.router.route(None)


@contextmanager
def native_attention(base: Base) -> Iterator[None]:
    """Use the model as transformers does inside the block: its own attention, the active adapter for every token."""
    attends, slices = _implementation(base), base.router.slices
    if attends == attention.IMPLEMENTATION:
        base.model.set_attn_implementation(base.native)
    base.router.route(None)
    try:
        yield
    finally:
        base.router.route(slices)
        if attends == attention.IMPLEMENTATION:
            base.model.set_attn_implementation(attends)


def _implementation(base: Base) -> str:
    """The attention of the part that reads text; that of an image encoder, or of a whole with both, may be another."""
    return str(getattr(base.decoder, "config", base.model.config)._attn_implementation)


class Alone(NamedTuple):
    """Results on one example: hidden states and their gradient to the embedded tokens [T, H]; logits [T, V].

    ahead: the gradient of the first half of the hidden states to the embedded tokens after them.
    """

    states: Tensor
    gradient: Tensor
    logits: Tensor
    ahead: Tensor


def _alone(base: Base, example: Example) -> Alone:
    states: list[Tensor] = []
    record = lambda _module, _inputs, out: states.append(out.last_hidden_state)  # noqa: E731
    handle = base.decoder.register_forward_hook(record)
    try:
        with native_attention(base), _embedded_leaf(base.model) as leaves:
            ids = torch.tensor([example.ids], device=base.device)
            logits = base.model(input_ids=ids, use_cache=False).logits[0]
    finally:
        handle.remove()
    states_TH, half = states[0][0], len(example.ids) // 2
    ahead = _gradient(states_TH[:half], leaves[0], keep=True)[half:]
    return Alone(states_TH.detach(), _gradient(states_TH, leaves[0]), logits.detach(), ahead)


def _looks_ahead(base: Base, example: Example, alone: Alone) -> bool:
    """Whether the results of a token depend on later tokens, or only on their number."""
    if float(alone.ahead.norm()) > AHEAD * float(alone.gradient.norm()):
        return True
    half = len(example.ids) // 2
    begin = Example(example.ids[:half], example.targets[:half], example.weights[:half], "probe")
    first, whole = _alone(base, begin).logits, alone.logits[:half]
    return not differ_by_rounding(base, [first], [whole], lambda: [_alone(base, example).logits[:half]])


def _find_head(base: Base, alone: Alone) -> tuple[Head, str]:
    """How the model computes logits, and the reason, for a reader."""
    config = base.model.config.get_text_config()
    divided = getattr(config, "logits_scaling", None)
    scale = getattr(config, "logit_scale", None) or (1 / divided if divided else 1.0)
    head = Head(scale=float(scale), softcap=getattr(config, "final_logit_softcapping", None))
    if base.model.get_output_embeddings() is None:
        return Head(direct=False), _("the model's own logits: it has no output embedding")
    try:
        with torch.no_grad():
            output = base.output_embedding(alone.states) * head.scale
    except LIBRARY_ERRORS:  # RemBERT has further layers between the hidden states and its output embedding
        output = torch.full_like(alone.logits, torch.nan)
    ours = output if head.softcap is None else torch.tanh(output / head.softcap) * head.softcap
    if _difference(ours, alone.logits) <= TOLERANCE[base.dtype]:
        return head, _("computed only where there are labels: verified to equal the model's logits")
    return Head(direct=False), _("the model's own logits: its head is more than a linear layer")


def _packing_problem(base: Base, first: Example, second: Example, alone: Alone) -> str | None:
    """Why this model does not support packed rows, or None if it does."""
    other = Example([t + 1 for t in first.ids], first.targets, first.weights, "probe")
    try:
        base.model.set_attn_implementation(attention.IMPLEMENTATION)
        base.layout = "packed"
        row = _row(base, first, second)
        packed, gradient = _states_and_gradient(base, row, only=row.spans[1].start)
        with torch.no_grad():
            changed = hidden(base, _row(base, other, second))
            logits = None if base.head.direct else base.model(**packed_inputs(base, row)).logits[0]
    except (ModelError, *LIBRARY_ERRORS) as error:
        return _("its attention does not support packed rows ({error})", error=first_line(error))
    start = row.spans[1].start
    follows = _difference(packed[start:], changed[start:])
    if not follows <= SAME_SHAPE[base.dtype] or bool(gradient[:start].any()):
        return _("examples in a packed row attend to each other")
    own_logits = None if logits is None else logits[start:]
    if not _is_as_alone(base, second, alone, packed[start:], gradient[start:], own_logits):
        return _("packing changes its results by more than rounding")
    return None


def _padding_changes(base: Base, first: Example, second: Example, alone: Alone) -> bool:
    """Whether `second` is computed otherwise in a batch with a longer example, where it is padded, than alone."""
    longer = Example(first.ids + second.ids, first.targets + second.targets, first.weights + second.weights, "probe")
    try:
        row = _row(base, longer, second)
        start = row.spans[1].start
        states, gradient = _states_and_gradient(base, row, only=start)
        with torch.no_grad():
            logits = None if base.head.direct else padded_output(base, row, base.model, "logits")[start:]
    except LIBRARY_ERRORS:
        return True
    padded = gradient.unflatten(0, (2, -1))
    own = padded[1, : len(second.ids)]
    return bool(padded[0].any()) or not _is_as_alone(base, second, alone, states[start:], own, logits)


def _is_as_alone(
    base: Base, example: Example, alone: Alone, states: Tensor, gradient: Tensor, logits: Tensor | None
) -> bool:
    """Whether the results on an example are those of the example alone, up to rounding.

    logits: those of the whole model, if the loss needs them.
    """

    def of(run: Alone) -> list[Tensor]:
        return [run.states, run.gradient] if logits is None else [run.states, run.gradient, run.logits]

    results = [states, gradient] if logits is None else [states, gradient, logits]
    return differ_by_rounding(base, results, of(alone), lambda: of(_alone(base, example)))


def _states_and_gradient(base: Base, row: Row, only: int) -> tuple[Tensor, Tensor]:
    """Hidden states of a row [T, H], and the gradient of those from token `only` on to the embedded tokens [T, H]."""
    with _embedded_leaf(base.model) as leaves:
        states = hidden(base, row)
    return states.detach(), _gradient(states[only:], leaves[0])


def _gradient(states: Tensor, leaf: Tensor, keep: bool = False) -> Tensor:
    direction = torch.linspace(-1, 1, states.shape[-1], device=states.device, dtype=states.dtype)
    return torch.autograd.grad((states * direction).sum(), leaf, retain_graph=keep)[0].flatten(0, -2)


@contextmanager
def _embedded_leaf(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the embedded tokens of every forward pass inside the block, as leaves that can get a gradient."""
    leaves: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1].clone()  # some models write into it, which autograd forbids for a leaf

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
    """Largest absolute difference, relative to the largest absolute value of `b`."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
