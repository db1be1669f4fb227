"""Generation evaluation: prompts taken from held-out examples, the answers generated for them, and their scores.

`lorasmith eval --generate` and `training.generate` both evaluate here, so the scores during training are those that
`eval` reports for the adapter afterwards.

Prompts are taken from the tokens of an encoded example rather than from its file. A prompt therefore consists of the
very ids that preceded the answer in training, whatever the format of the row.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Self

from torch import Tensor

from lorasmith.config.sampling import SamplingConfig
from lorasmith.data.rows.conversation import Message, RowError
from lorasmith.data.template.encoding import Template
from lorasmith.engine.engine import Engine, generate
from lorasmith.engine.request import Finish, Request
from lorasmith.errors import DataError
from lorasmith.evaluation.loss import eval_mode
from lorasmith.evaluation.metrics import Metric, answer_statistics, built_in_metrics, mean_metric
from lorasmith.i18n import _
from lorasmith.model.base import Base
from lorasmith.model.row import Example
from lorasmith.report import Report

ENDED = "ended"  # key of the one metric that judges how an answer ended instead of its text
PLACEHOLDER = "\N{OPEN BOX}"  # text of a message that occurs in no template
NO_END = "\N{SYMBOL FOR SPACE}"  # text of an answer that no system message ends with
THOUGHT = re.compile(r"<(\w+)>\s*(?:</\1>\s*)?\Z")  # the reasoning before an answer, empty or begun


@dataclass(frozen=True)
class Prompt:
    """A prompt with a known answer.

    ids: what the model is given; text: its last message, for display; reference: the answer in the data, without
    reasoning; source: where the row stands ('rows.jsonl:7').
    """

    ids: list[int]
    text: str
    reference: str
    source: str


@dataclass(frozen=True)
class Answer:
    """A generated answer, and how it ended: 'stop', or 'length' if it reached the token limit."""

    text: str
    finish: Finish


@dataclass(frozen=True)
class Frame:
    """What a template writes around the content of an answer, as far as it is visible: metrics do not score it.

    tag: the name of the tag around reasoning, such as 'think'; empty if there is none.
    before, after: the text before the content, which may be reasoning that is empty, and after it.
    """

    tag: str = ""
    before: str = ""
    after: str = ""

    @classmethod
    def of(cls, template: Template) -> Self:
        """The frame of a template; empty if it cannot be told."""
        asked = (Message("user", PLACEHOLDER),)
        try:
            start = "".join(template.prompt_texts(asked)).rpartition(PLACEHOLDER)[2]
            _head, *rest = template.render((*asked, Message("assistant", PLACEHOLDER))).split(PLACEHOLDER)
        except RowError:
            return cls()
        if len(rest) != 2 or not rest[0].startswith(start):
            return cls()
        found = THOUGHT.search(rest[0])
        tag = found[1] if found and f"</{found[1]}>" not in rest[1] else ""  # there it would be around the answer
        before, after = (_plain_text(template, template.ids_of([text])) for text in (rest[0][len(start) :], rest[1]))
        return cls(tag, before, after)

    def content(self, text: str) -> str:
        """The content of the answer `text`; empty if it is reasoning that does not end."""
        text = text.strip().removesuffix(self.after)
        _thought, closed, rest = text.partition(f"</{self.tag}>")
        if self.tag and closed:
            return rest.strip()
        if self.tag and text.startswith(f"<{self.tag}>"):
            return ""
        return text.removeprefix(self.before).strip()


@dataclass(frozen=True)
class GenerationEvaluation:
    """Prompts, the settings to answer them with, and the metrics that score the answers; custom metrics come last."""

    prompts: list[Prompt]
    metrics: list[Metric]
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]
    frame: Frame

    @classmethod
    def from_examples(
        cls,
        examples: Sequence[Example],
        template: Template,
        count: int,
        sampling: SamplingConfig,
        custom: Sequence[Metric] = (),
    ) -> "GenerationEvaluation":
        """Take the prompts from the first `count` examples that have one.

        Raises DataError if none does, MissingExtraError if the packages that compute the metrics are not installed.
        """
        prompts = prompts_from_examples(examples, template, count)
        ended = mean_metric(ENDED, _("reached stop token"), lambda finish, _reference: 100.0 * (finish == "stop"))
        metrics = [*built_in_metrics([prompt.reference for prompt in prompts]), ended, *custom]
        return cls(prompts, metrics, sampling, template.stop_ids, Frame.of(template))

    def generate(self, base: Base, adapter: str | None, report: Report | None = None, task: str = "") -> list[Answer]:
        """Answer each prompt with `adapter` (None: the base model alone), without dropout and without gradient.

        No random generator of the training is advanced, and the model is left in the mode that it was in.
        """
        with eval_mode(base):
            return generate_answers(self.prompts, base, adapter, self.sampling, self.stop_ids, report, task)

    def statistics(self, metric: Metric, answers: Sequence[Answer]) -> Tensor:
        """The metric's statistics of the content of each answer, float64 of shape (answers, statistics)."""
        predictions = [a.finish if metric.key == ENDED else self.frame.content(a.text) for a in answers]
        return answer_statistics(metric, predictions, [prompt.reference for prompt in self.prompts])


def prompts_from_examples(examples: Sequence[Example], template: Template, count: int) -> list[Prompt]:
    """The last prompt and answer of each of the first `count` examples that have one.

    Plain text has no prompt, and truncated answers are no reference: both are skipped. Raises DataError if nothing is
    left.
    """
    prompts = list(islice(filter(None, example_prompts(examples, template)), count))
    if not prompts:
        raise DataError(
            _(
                "--generate: none of the {examples} held-out examples has a prompt and a complete answer (they "
                "are plain text, or truncated). Remove --generate, or give a file with prompts and answers.",
                examples=len(examples),
            )
        )
    return prompts


def example_prompts(examples: Sequence[Example], template: Template) -> Iterator[Prompt | None]:
    """The last prompt and answer of each example; None for plain text, and where the answer is truncated."""
    frame, (before, after) = Frame.of(template), _user_frame(template)
    for example in examples:
        start, end, last = _last_answer(example)
        if start < 2 or example.ids[end - 1] not in template.stop_ids:
            yield None
            continue
        asked = str(template.tokenizer.decode(example.ids[max(last - 1, 0) : start]))  # with the stop token before it
        text = asked.removesuffix(after).partition(before)[2] if before and before in asked else ""
        yield Prompt(
            example.ids[:start],
            text.strip() or _plain_text(template, example.ids[last:start]),
            frame.content(_plain_text(template, example.ids[start:end])),
            example.source,
        )


def generate_answers(
    prompts: Sequence[Prompt],
    base: Base,
    adapter: str | None,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    report: Report | None = None,
    task: str = "",
) -> list[Answer]:
    """The answer to each prompt by `adapter` (None: the base model alone), all decoded as one batch."""
    requests = [Request(prompt.ids, sampling, adapter, stop_ids) for prompt in prompts]
    texts, finish = [""] * len(prompts), list[Finish](["length"] * len(prompts))
    done = 0
    for event in generate(Engine(base), requests):
        texts[event.key] += event.text
        if event.finish:
            finish[event.key] = event.finish
            done += 1
            if report:
                report.progress(task, done, len(prompts))
    return [Answer(text.strip(), end) for text, end in zip(texts, finish, strict=True)]


def _last_answer(example: Example) -> tuple[int, int, int]:
    """(start, end, last): the last answer is tokens [start, end), and its user message begins at token `last`."""
    learned = [i + 1 for i in example.learned]  # targets[i] is token i + 1
    if not learned:
        return 0, 0, 0
    end = start = learned[-1] + 1
    known = set(learned)
    while start - 1 in known:
        start -= 1
    return start, end, max((i + 1 for i in learned if i < start), default=0)


def _user_frame(template: Template) -> tuple[str, str]:
    """What the template writes right before and right after any user message; empty if that cannot be told."""
    conversation = (Message("user", PLACEHOLDER), Message("assistant", NO_END), Message("user", PLACEHOLDER))
    try:
        parts = template.render(conversation).split(PLACEHOLDER)
    except RowError:  # the template accepts a single user message only
        return "", ""
    if len(parts) != 3:
        return "", ""
    first, between, after = parts
    common = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(first), reversed(between), strict=False))
    return "".join(letter for letter, _same in common)[::-1], after


def _plain_text(template: Template, ids: list[int]) -> str:
    return str(template.tokenizer.decode(ids, skip_special_tokens=True)).strip()
