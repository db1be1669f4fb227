"""Held-out questions that are answered for real, and the figures of the answers: for `eval` and at every evaluation.

One way for both, so that a training shows what `eval` will say of its adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorasmith.config.sampling import SamplingConfig
from lorasmith.data.template.encoding import Template
from lorasmith.evaluation.answers import Answer, Question, answers_to, questions_of
from lorasmith.evaluation.loss import evaluating
from lorasmith.evaluation.metrics import Metric, built_in, mean, score
from lorasmith.i18n import _
from lorasmith.model.base import Base
from lorasmith.model.row import Example
from lorasmith.report import Report

ENDED = "ended"  # judges how a reply ended, not its text


@dataclass(frozen=True)
class Quiz:
    """Questions with known answers, how they are answered, and every metric of the answers, the user's own last."""

    questions: list[Question]
    metrics: list[Metric]
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        template: Template,
        count: int,
        sampling: SamplingConfig,
        own: Sequence[Metric] = (),
    ) -> "Quiz":
        """Of the first `count` examples that ask something. Raises DataError where none does, MissingExtraError."""
        questions = questions_of(examples, template, count)
        ended = mean(ENDED, _("reached stop token"), lambda finish, _reference: 100.0 * (finish == "stop"))
        metrics = [*built_in([question.reference for question in questions]), ended, *own]
        return cls(questions, metrics, sampling, template.stop_ids)

    def answers(self, base: Base, adapter: str | None, report: Report | None = None, task: str = "") -> list[Answer]:
        """A reply to each question from `adapter` (None: the base alone), without dropout and without gradient.

        No generator of a training is drawn from, and the model comes back in the mode in which it was.
        """
        with evaluating(base):
            return answers_to(self.questions, base, adapter, self.sampling, self.stop_ids, report, task)

    def numbers(self, metric: Metric, answers: Sequence[Answer]) -> Tensor:
        """(examples, numbers): the metric's numbers of each answer, float64."""
        replies = [answer.finish if metric.key == ENDED else answer.text for answer in answers]
        return score(metric, replies, [question.reference for question in self.questions])

    def figures(self, answers: Sequence[Answer]) -> list[float]:
        """What each of `metrics` comes to over all answers."""
        return [metric.total(self.numbers(metric, answers).sum(0).tolist()) for metric in self.metrics]
