"""Evaluation during training: held-out loss, generated answers with their scores, samples, and the best adapter so far.

An evaluation never changes what is trained: generating uses no random numbers of the training, and the model returns
to the mode that it was in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lorasmith.config.sampling import SamplingConfig
from lorasmith.data.rows.conversation import Message
from lorasmith.data.template.encoding import Template
from lorasmith.engine.engine import Engine, replies
from lorasmith.engine.request import Request
from lorasmith.errors import ConfigError
from lorasmith.evaluation.generation import GenerationEvaluation
from lorasmith.evaluation.loss import ExampleLosses, eval_mode, evaluate_loss
from lorasmith.evaluation.preference import PreferenceLosses
from lorasmith.i18n import _, counted, listed
from lorasmith.lora.saved_values import has_moved
from lorasmith.model.base import Base
from lorasmith.model.row import Example
from lorasmith.model.vocabulary import refuse_surplus
from lorasmith.report import Report
from lorasmith.system.writing import write_folder
from lorasmith.training.artifact import Artifact
from lorasmith.training.checkpoint import State, best_name
from lorasmith.training.distributed import World
from lorasmith.training.history import History
from lorasmith.training.preference import Preference
from lorasmith.training.run_files import CHECKPOINTS

SAMPLING = SamplingConfig(max_new_tokens=64)  # greedy, so that answers differ between steps only through the adapter
SHOWN = 200  # characters of a sample that are shown on screen


@dataclass(frozen=True)
class Samples:
    """The prompts of training.samples, encoded as chat encodes them."""

    base: Base
    prompts: tuple[str, ...]
    ids: tuple[list[int], ...]
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, base: Base, template: Template, prompts: Sequence[str]) -> "Samples":
        """Encode the prompts. Raises ConfigError that names every prompt that fills the model's context."""
        ids = tuple(template.encode_prompt((Message("user", prompt),)) for prompt in prompts)
        for one in ids:
            refuse_surplus(base, one, "training.samples")
        limit = base.max_positions
        problems = [
            _(
                "training.samples: prompt {number} has {tokens} tokens, but the model's context length is "
                "{limit} tokens, including the answer. Shorten the prompt.",
                number=number,
                tokens=len(one),
                limit=limit,
            )
            for number, one in enumerate(ids, 1)
            if limit is not None and len(one) >= limit
        ]
        if problems:
            raise ConfigError(*problems)
        return cls(base, tuple(prompts), ids, template.stop_ids)

    def answers(self, adapter: str | None) -> list[str]:
        """An answer to each prompt, decoded in one batch; with `adapter` None, by the base model alone."""
        requests = [Request(ids, SAMPLING, adapter, self.stop_ids) for ids in self.ids]
        with eval_mode(self.base):
            return [reply.text for reply in replies(Engine(self.base), requests)]


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the base model and then the adapter of one training, and records the results in its history.

    The held-out examples are divided over all processes; the first process alone generates answers. answered: by step,
    the statistics of each answer under each metric, of shape (answers, statistics).
    """

    base: Base
    adapter: str
    examples: Sequence[Example]  # held out; there may be none
    generation: GenerationEvaluation | None
    samples: Samples
    history: History
    folder: Path  # of the run
    artifact: Artifact
    world: World
    report: Report
    preference: Preference | None = None
    answered: dict[int, list[Tensor]] = field(default_factory=dict)

    def base_losses(self) -> ExampleLosses | None:
        """The held-out losses of the base model, or of the starting model in a training on preferences.

        None if nothing is held out.
        """
        if self.preference and self.examples:
            return self.preference.losses_before()
        return self._losses(None, _("held-out loss of the base model")) if self.examples else None

    def record_base(self, losses: ExampleLosses | None) -> None:
        """Record the base model's `losses`, its scores and its answers to training.samples."""
        if losses:
            self._record(0, losses, None)
        self._show_samples(0, None)

    def evaluate(self, state: State) -> None:
        """Evaluate the current adapter; the best one so far is saved as checkpoints/best-NNNNNN."""
        self._show_samples(state.step, self.adapter)
        if not self.examples:
            return
        loss = self._evaluate(state.step, _("held-out loss")).loss
        # After the first step of a warmup the adapter still has no effect, and is not worth keeping. A loss that is
        # not finite is never the best: no later loss would be better than NaN.
        is_better = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        if is_better and self._has_effect():
            state.best_loss, state.best_step = loss, state.step
            if self.world.is_first:
                write_folder(self.best_folder(state), self.artifact.write)

    def finish(self, state: State, is_last: bool) -> ExampleLosses | None:
        """Write the best adapter by held-out loss, or without that the last one; return its losses.

        is_last: all steps are done, so evaluate the current adapter first. After an early stop that has been done.
        """
        if is_last:
            self._show_samples(state.step, self.adapter)
            last = self._evaluate(state.step, _("held-out loss after training")) if self.examples else None
            if last is None or state.best_loss is None or last.loss <= state.best_loss:
                state.best_loss, state.best_step = last.loss if last else None, state.step
                if self.world.is_first:
                    write_folder(self.folder / self.artifact.name, self.artifact.write)
                return last
        best = self.best_folder(state)
        if self.world.is_first:
            write_folder(self.folder / self.artifact.name, lambda staging: self.artifact.copy(best, staging))
        self.world.barrier()
        self.artifact.load(best)
        self.report.say(
            _("Keeping the weights from step {step}, which have the best held-out loss", step=state.best_step)
        )
        return self._losses(self.adapter, _("held-out loss of the best step"))

    def best_folder(self, state: State) -> Path:
        """The folder of the best adapter so far."""
        return self.folder / CHECKPOINTS / best_name(state)

    def _evaluate(self, step: int, task: str) -> ExampleLosses:
        losses = self._losses(self.adapter, task)
        self._record(step, losses, self.adapter)
        return losses

    def _losses(self, adapter: str | None, task: str) -> ExampleLosses:
        if self.preference:
            return self.preference.losses(self.base, adapter, self.report, task, self.world)
        return evaluate_loss(self.base, self.examples, adapter, self.report, task, self.world)

    def _record(self, step: int, losses: ExampleLosses, adapter: str | None) -> None:
        """Record the mean of the `losses`, and the scores of the answers that training.generate asks for."""
        if self.world.is_first:
            scores = losses.scores if isinstance(losses, PreferenceLosses) else {}
            scores |= self._scores(step, adapter, self.generation) if self.generation else {}
            self.history.append({"step": step, "held_out_loss": losses.loss, **scores})

    def _scores(self, step: int, adapter: str | None, generation: GenerationEvaluation) -> dict[str, float]:
        answers = generation.generate(self.base, adapter, self.report, _("answers to held-out examples"))
        self.answered[step] = [generation.statistics(metric, answers) for metric in generation.metrics]
        scores = [
            (metric, metric.aggregate(statistics.sum(0).tolist()))
            for metric, statistics in zip(generation.metrics, self.answered[step], strict=True)
        ]
        figures = listed(f"{metric.name} {score:.{metric.digits}f}" for metric, score in scores)
        count = counted(len(generation.prompts), _("1 held-out answer"), _("{count} held-out answers"))
        self.report.say(
            _("Scores of the base model ({answers}): {figures}", answers=count, figures=figures)
            if adapter is None
            else _("Scores after step {step} ({answers}): {figures}", step=step, answers=count, figures=figures)
        )
        # record a custom metric as FILE.py:FUNCTION, without the folders
        return {Path(metric.key).name: score for metric, score in scores}

    def _show_samples(self, step: int, adapter: str | None) -> None:
        """Answer the prompts of training.samples; report and record the answers."""
        prompts = self.samples.prompts
        if not prompts or not self.world.is_first:
            return
        self.report.say(_("Answers after step {step}:", step=step) if step else _("Answers of the base model:"))
        for prompt, answer in zip(prompts, self.samples.answers(adapter), strict=True):
            self.history.append_sample(step, prompt, answer)
            shown = _one_line(answer) or _("(empty)")
            self.report.say(f"  > {_one_line(prompt)}\n    {shown}")

    def _has_effect(self) -> bool:
        return has_moved(self.base.adapters[self.adapter], self.base.model)


def _one_line(text: str) -> str:
    """The text as one line of at most `SHOWN` characters."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."
