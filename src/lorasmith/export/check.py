"""Whether a GGUF file is the trained model: each part is read back and compared, and what differs is named.

Keys, tensors, tokenizer and chat template are compared one by one; then transformers reads the file, without knowing
the model, and must give the trained model's logits and replies.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from lorasmith.adapters.merge import adapter_logits, certify, plain_logits, probe_rows
from lorasmith.adapters.session import Session
from lorasmith.data.rows.conversation import RowError
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.golden import PROBES
from lorasmith.errors import ModelError
from lorasmith.export.families import context_length, family_of, keys_of
from lorasmith.export.gguf_file import GGUFFile, rounded, tensors_of
from lorasmith.export.tokenizer import SPLITS, compared_texts, first_other_text, from_file
from lorasmith.i18n import _
from lorasmith.loading.gguf import UNREADABLE, read_model
from lorasmith.model.probe import native_attention
from lorasmith.system.transformers_logging import quiet_transformers

REPLY = 32  # tokens of a greedy reply
SLACK, FLOOR = 1.001, 3e-7  # of a tensor's rounding error; the floor is float32's own, of norms that are stored plus 1


@dataclass
class Figures:
    """What was compared, with the results. problems: what differs, in words; empty if the file is the trained model.

    error and limit are relative errors of the logits; None if transformers does not read this architecture.
    """

    keys: int = 0
    tensors: int = 0
    worst_tensor: float = 0.0
    texts: int = 0
    prompts: int = 0
    error: float | None = None
    limit: float | None = None
    agreeing: int = 0
    positions: int = 0
    replies: int = 0
    equal_replies: int = 0
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For the certificate, which is only written without problems."""
        return {name: value for name, value in asdict(self).items() if name != "problems"}


@dataclass(frozen=True)
class Trained:
    """What the trained model says, before anything is merged or rounded.

    logits: of each probe, with the adapter on the base model.
    replies: the greedy replies to `prompts`, as token ids.
    """

    template: Template
    probes: Sequence[list[int]]
    logits: Sequence[Tensor]
    prompts: Sequence[list[int]]
    replies: Sequence[list[int]]


def measure(session: Session) -> Trained:
    """Compute what the trained model says."""
    limit = context_length(session.base.model.config)
    probes = [ids[:limit] for ids in probe_rows(session)]
    prompts = [ids for _messages, ids in prompts_of(session.template)]
    wanted = adapter_logits(session, probes)
    with native_attention(session.base):
        said = [greedy(session.base.model, ids, session.template.stop_ids, limit) for ids in prompts]
    return Trained(session.template, probes, wanted, prompts, said)


def prompts_of(template: Template) -> list[tuple[list[dict[str, str]], list[int]]]:
    """The prompts of the probe conversations that the template accepts: messages, and token ids as in training."""
    found = []
    for probe in PROBES:
        for end in range(1, len(probe), 2):
            try:
                ids = template.encode_prompt(probe[:end])
            except RowError:
                continue
            found.append(([{"role": m.role, "content": m.content} for m in probe[:end]], ids))
    return found


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], stops: Sequence[int], limit: int) -> list[int]:
    """The reply of likeliest tokens, up to and including a stop token, within a context of `limit` tokens."""
    ids, end = list(prompt), min(len(prompt) + REPLY, limit)
    while len(ids) < end and (len(ids) == len(prompt) or ids[-1] not in stops):
        row = torch.tensor([ids], device=model.device)
        ids.append(int(model(input_ids=row, use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def compare(file: GGUFFile, plain: PreTrainedModel, trained: Trained, kind: str) -> Figures:
    """Compare the file with the merged model, whose weights are rounded then, and with what the trained model says."""
    figures = Figures()
    figures.problems += _other_keys(file, plain, figures)
    figures.problems += _other_tensors(file, plain, kind, figures)
    figures.problems += _other_tokens(file, trained, figures)
    if family_of(plain.config).read_by_transformers:
        figures.problems += _other_logits(file, plain, trained, kind, figures)
    return figures


def _other_keys(file: GGUFFile, plain: PreTrainedModel, figures: Figures) -> Iterator[str]:
    wanted = {"general.architecture": family_of(plain.config).architecture} | keys_of(plain.config)
    for name, value in wanted.items():
        found, figures.keys = file.key(name), figures.keys + 1
        same = (
            math.isclose(found, value, rel_tol=1e-6)
            if isinstance(found, float) and isinstance(value, float)
            else found == value
        )
        if not same:
            yield _("{name} is {found} instead of {wanted}", name=name, found=found, wanted=value)


def _other_tensors(file: GGUFFile, plain: PreTrainedModel, kind: str, figures: Figures) -> Iterator[str]:
    family, found = family_of(plain.config), file.tensors()
    for name, parameter, weight in tensors_of(plain):
        if name not in found:
            yield _("the tensor {name} ({parameter}) is missing", name=name, parameter=parameter)
            continue
        back, figures.tensors = family.undo(name, found.pop(name), plain.config), figures.tensors + 1
        own = family.undo(name, rounded(name, family.change(name, weight, plain.config), kind), plain.config)
        if back.shape != weight.shape:
            shapes = {"found": list(back.shape), "wanted": list(weight.shape)}
            yield _("the tensor {name} has shape {found} instead of {wanted}", name=name, **shapes)
            continue
        off, limit = _distance(back, weight), max(SLACK * _distance(own, weight), FLOOR)
        figures.worst_tensor = max(figures.worst_tensor, off)
        if off > limit:
            values: dict[str, Any] = {"parameter": parameter, "off": off, "limit": limit}
            yield _(
                "the tensor {name} is not {parameter} of the trained model: relative difference {off:.1e}, where "
                "rounding explains {limit:.1e}",
                name=name,
                **values,
            )
    for name in found:
        yield _("the tensor {name} belongs to no weight of the model", name=name)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def _other_tokens(file: GGUFFile, trained: Trained, figures: Figures) -> Iterator[str]:
    template, encoding = trained.template, file.encoding
    if encoding.vocabulary.pre not in SPLITS:
        yield _("tokenizer.ggml.pre is {name}, which is unknown", name=encoding.vocabulary.pre)
        return
    core = from_file(encoding.vocabulary)
    figures.texts = len(compared_texts(template.tokenizer))
    if (text := first_other_text(template.tokenizer, core)) is not None:
        yield _(
            "the tokenizer, with tokenizer.ggml.pre={name}, splits the text {sample} into other tokens than in the "
            "training",
            name=encoding.vocabulary.pre,
            sample=repr(text),
        )
    yield from _other_prompts(file, core, trained, figures)
    if missing := [template.token(i) for i in template.stop_ids[: len(encoding.ends) + 1] if i not in encoding.ends]:
        yield _(
            "tokenizer.ggml.eos_token_id and its like lack the end token {token} of the training", token=str(missing[0])
        )


def _other_prompts(file: GGUFFile, core: Tokenizer, trained: Trained, figures: Figures) -> Iterator[str]:
    encoding, tokenizer = file.encoding, trained.template.tokenizer
    first = [encoding.bos] if encoding.add_bos and encoding.bos is not None else []
    for messages, wanted in prompts_of(trained.template):
        text = tokenizer.apply_chat_template(
            messages, chat_template=encoding.chat_template, add_generation_prompt=True, tokenize=False
        )
        ids, figures.prompts = [*first, *core.encode(text, add_special_tokens=False).ids], figures.prompts + 1
        if first and ids[1:] == wanted:
            yield _("tokenizer.ggml.add_bos_token puts a begin token before a prompt that has none in training")
            return
        if ids != wanted:
            yield _(
                "tokenizer.chat_template makes other tokens of the conversation {sample} than the template of the "
                "training",
                sample=repr(messages[0]["content"]),
            )
            return


def _other_logits(
    file: GGUFFile, plain: PreTrainedModel, trained: Trained, kind: str, figures: Figures
) -> Iterator[str]:
    try:
        with quiet_transformers(), redirect_stderr(StringIO()):  # one progress bar bypasses transformers' logging
            model = read_model(file.path).eval()
    except (*UNREADABLE, ModelError) as error:
        yield _("transformers cannot read it: {reason}", reason=str(error).splitlines()[0])
        return
    found = plain_logits(model, trained.probes)
    _round(plain, kind)
    runs = [plain_logits(plain, trained.probes)]
    result = certify("", torch.float32, trained.logits, runs, found, False)
    figures.error, figures.limit = result.error, result.limit
    figures.agreeing, figures.positions = result.agreeing, result.positions
    if not result.holds:
        yield _(
            "as transformers reads it, its logits differ from those of the trained model by {error:.1e}, where "
            "rounding explains {limit:.1e}; the top token agrees at {agreeing} of {positions} positions",
            error=result.error,
            limit=result.limit,
            agreeing=result.agreeing,
            positions=result.positions,
        )
        return
    stops, limit = trained.template.stop_ids, context_length(model.config)
    said = [greedy(model, ids, stops, limit) for ids in trained.prompts]
    figures.replies, figures.equal_replies = len(said), sum(map(list.__eq__, said, trained.replies))
    if kind == "f32" and figures.equal_replies < len(said):
        yield _("{count} of {total} replies differ", count=len(said) - figures.equal_replies, total=len(said))


@torch.no_grad()
def _round(plain: PreTrainedModel, kind: str) -> None:
    """Round the merged weights as the file does, in memory.

    Not those of the base model: if these come from a file of the same type, rounding does not change them at all.
    """
    family = family_of(plain.config)
    for name, _parameter, tensor in tensors_of(plain):
        laid = family.change(name, tensor, plain.config)
        tensor.copy_(family.undo(name, rounded(name, laid, kind), plain.config))
