"""Whether a GGUF file is the trained model: each part is read back and compared, and what differs is named.

Keys, tensors, tokenizer and chat template are compared one by one; then each reader (`export.readback.readers`) reads
the file, without knowing the model, and must give the trained model's logits, replies and log probabilities of held-out
rows.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorasmith.errors import ModelError
from lorasmith.export.gguf.families import family_of, keys_of
from lorasmith.export.gguf.file import GGUFFile, Kind, rounded, tensors_of
from lorasmith.export.gguf.tokenizer.byte_level import SPLITS, ByteLevel
from lorasmith.export.gguf.tokenizer.sentencepiece import Merging
from lorasmith.export.gguf.tokenizer.vocabulary import compared_texts, first_other_text
from lorasmith.export.readback.prompts import prompts_of
from lorasmith.export.readback.readers import LlamaCpp, Reader, Transformers, has_llama_cpp
from lorasmith.export.readback.reading import Reading, Rounding, read
from lorasmith.export.readback.trained import Trained
from lorasmith.i18n import _
from lorasmith.loading.gguf import UNREADABLE
from lorasmith.report import Report, Steps

SLACK, FLOOR = 1.001, 3e-7  # of a tensor's rounding error; the floor is float32's own, of norms that are stored plus 1


@dataclass
class Figures:
    """What was compared, with the results. problems: what differs, in words; empty if the file is the trained model.

    readings: of each program that read the file; none if transformers does not read this architecture and llama.cpp is
    not installed.
    """

    keys: int = 0
    tensors: int = 0
    worst_tensor: float = 0.0
    texts: int = 0
    prompts: int = 0
    readings: list[Reading] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For the certificate, which is only written without problems."""
        return {name: value for name, value in asdict(self).items() if name != "problems"}


def compare(
    file: GGUFFile, plain: PreTrainedModel, trained: Trained, kind: Kind, report: Report | None = None
) -> Figures:
    """Compare the file with the merged model, whose weights are rounded then, and with what the trained model says."""
    figures, report = Figures(), report or Report()
    figures.problems += _other_keys(file, plain, figures)
    figures.problems += _other_tensors(file, plain, kind, figures, report)
    figures.problems += _other_tokens(file, trained, figures)
    _round(plain, kind)
    rounding = Rounding.of(plain, trained)
    for name, opened in _readers(file, plain, trained):
        try:
            reader = opened()
        except (*UNREADABLE, ModelError) as error:
            reason = str(error).splitlines()[0]
            figures.problems.append(_("{reader} cannot read it: {reason}", reader=name, reason=reason))
            continue
        with closing(reader):
            reading, problems = read(reader, trained, rounding, report)
        figures.readings.append(reading)
        figures.problems += problems
    return figures


def _readers(file: GGUFFile, plain: PreTrainedModel, trained: Trained) -> Iterator[tuple[str, Callable[[], Reader]]]:
    if family_of(plain.config).read_by_transformers:
        yield Transformers.name, lambda: Transformers(file.path)
    if has_llama_cpp():
        yield LlamaCpp.name, lambda: LlamaCpp(file.path, trained.longest)


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


def _other_tensors(
    file: GGUFFile, plain: PreTrainedModel, kind: Kind, figures: Figures, report: Report
) -> Iterator[str]:
    family, found = family_of(plain.config), file.tensors()
    tensors = list(tensors_of(plain))
    steps = Steps(report, _("comparing tensors"), len(tensors))
    for name, parameter, weight in tensors:
        steps.step()
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
    if not encoding.vocabulary.scores and encoding.vocabulary.pre not in SPLITS:
        yield _("tokenizer.ggml.pre is {name}, which is unknown", name=encoding.vocabulary.pre)
        return
    core = encoding.vocabulary.core
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


def _other_prompts(file: GGUFFile, core: ByteLevel | Merging, trained: Trained, figures: Figures) -> Iterator[str]:
    encoding, tokenizer = file.encoding, trained.template.tokenizer
    first = [encoding.bos] if encoding.add_bos and encoding.bos is not None else []
    for messages, wanted in prompts_of(trained.template):
        text = tokenizer.apply_chat_template(
            messages, chat_template=encoding.chat_template, add_generation_prompt=True, tokenize=False
        )
        ids, figures.prompts = [*first, *core.ids(str(text))], figures.prompts + 1
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


@torch.no_grad()
def _round(plain: PreTrainedModel, kind: Kind) -> None:
    """Round the merged weights as the file does, in memory.

    Not those of the base model: if these come from a file of the same type, rounding does not change them at all.
    """
    family = family_of(plain.config)
    for name, _parameter, tensor in tensors_of(plain):
        laid = family.change(name, tensor, plain.config)
        tensor.copy_(family.undo(name, rounded(name, laid, kind), plain.config))
