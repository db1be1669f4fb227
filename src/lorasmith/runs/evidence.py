"""What `lorasmith report` measures with the loaded base model: losses with and without the adapter, and answers.

Of a run that trained all weights, the model as it was and as it is are both loaded, which needs memory for two.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

from lorasmith.adapters.session import Session, open_adapters
from lorasmith.config.data import DataConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.preference import METHODS
from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.toml import Config
from lorasmith.data.dataset.prepare import Prepared
from lorasmith.errors import ConfigError, DataError, RunError
from lorasmith.evaluation.general_text import general_examples
from lorasmith.evaluation.generation import Answer, Prompt, example_prompts, generate_answers
from lorasmith.evaluation.interval import Interval, Pair, by_change, generalization_gap, retained_share
from lorasmith.evaluation.loss import Comparison, ExampleLosses, compare, eval_mode, evaluate_loss
from lorasmith.evaluation.results import Forgetting
from lorasmith.i18n import _
from lorasmith.lora.biases import HALF_PRECISION
from lorasmith.lora.spectrum import strongest_half
from lorasmith.model.base import Base
from lorasmith.model.row import Example
from lorasmith.model.verify import enable_fast_parts
from lorasmith.model.vocabulary import refuse_surplus_examples
from lorasmith.report import Report
from lorasmith.runs.evaluate import original_of, prepared_again, read_examples
from lorasmith.runs.leakage import leakage_warnings
from lorasmith.runs.preferences import preference_comparisons
from lorasmith.runs.subject import Subject
from lorasmith.runs.whole_update import WholeUpdate, whole_update
from lorasmith.system.autograd import autograd_on

SHOWN_OF_EACH = 2  # examples from the top, the middle and the bottom of the order by change of loss
# Training examples whose losses are compared with the held-out ones: as many as these, within these bounds.
LEAST_TRAIN_EXAMPLES, MOST_TRAIN_EXAMPLES = 50, 200
ANSWERS = SamplingConfig(max_new_tokens=128)  # greedy; to show what the answers are like, that is enough


@dataclass(frozen=True)
class ShownExample:
    """A held-out example with the answers of base model and adapter. place: 'worst', 'middle' or 'best' by its change.

    before, after: its loss per token. adapter: the answer of the trained model, if all weights were trained.
    """

    place: str
    prompt: Prompt
    before: float
    after: float
    base: Answer
    adapter: Answer


@dataclass(frozen=True)
class Evidence:
    """The measurements. Each is None, or empty, where it cannot be made; `missing` then says why and what would help.

    learned: held-out loss of base model and adapter; forgotten: the same on the general text.
    trained_on: the same on a sample of the training examples; gap: see `generalization_gap`.
    later: held-out loss of this adapter and of the one after the last step, if that is another one.
    half: the part of the improvement that remains with half the rank; see `retained_share`.
    update: the update of all weights, if all were trained.
    eligible: the number of held-out examples that `shown` was chosen from.
    """

    learned: Comparison | None = None
    forgotten: Forgetting | None = None
    trained_on: Comparison | None = None
    gap: Interval | None = None
    later: Comparison | None = None
    half: Interval | None = None
    update: WholeUpdate | None = None
    shown: tuple[ShownExample, ...] = ()
    eligible: int = 0
    train_examples: int | None = None
    missing: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@autograd_on()
def measure(subject: Subject, files: Sequence[str], model: ModelConfig | None, report: Report) -> Evidence:
    """Load the base model and measure. `files`: use their rows as held-out examples instead of the run's.

    Raises AdapterError, ModelError as `open_adapters` does, DataError for invalid files.
    """
    session = open_adapters([subject.adapter, *subject.later], model, report)
    original = original_of(session, model, report) if subject.is_whole_model else session.base
    return _Measurement(session, original, subject, report).run(files)


class _Side(NamedTuple):
    """One of the two that are compared: a model, alone or with an adapter."""

    name: str
    base: Base
    adapter: str | None


class _Measurement:
    """The steps of one measurement.

    before, after: what is compared, the same model without and with an adapter, or two models.
    """

    def __init__(self, session: Session, original: Base, subject: Subject, report: Report) -> None:
        self.session, self.base, self.subject, self.report = session, session.base, subject, report
        self.before = _Side(_("the base model"), original, None)
        name = _("the trained model") if subject.is_whole_model else _("the adapter")
        self.after = _Side(name, session.base, next(iter(session.names), None))
        self.seed = subject.config.training.seed if subject.config else 0
        self.missing: list[str] = []
        self.improved: Pair | None = None  # the held-out losses, if they fell

    def run(self, files: Sequence[str]) -> Evidence:
        """Measure everything that can be measured."""
        held_out, train = self._examples(files)
        general = general_examples(self.base.tokenizer, self.base.max_positions)
        for side in (self.before, self.after):
            refuse_surplus_examples(side.base, [*held_out, *general])
        if self.base.dtype in HALF_PRECISION and self.after.adapter:  # as in training; see `evaluate`
            tokens = [token for example in (held_out or general)[:16] for token in example.ids]
            enable_fast_parts(self.base, self.after.adapter, tokens)
        warnings = tuple(leakage_warnings(self.session, held_out, self.report)) if files else ()
        forgotten = compare(*self._pair(general, _("loss on the general text")), self.seed)
        found = Evidence(train_examples=len(train) or None, warnings=warnings)
        config = self.subject.config
        if held_out and config and config.training.method in METHODS and not files:
            found = replace(self._of_preferences(config, held_out), warnings=warnings)
        elif held_out:
            found = self._of_held_out(found, held_out, self._sample(train, held_out))
        if self.subject.is_whole_model:
            found = replace(found, update=self._update(held_out))
        return replace(found, forgotten=Forgetting(*astuple(forgotten)), missing=tuple(self.missing))

    def _of_held_out(self, found: Evidence, held_out: Sequence[Example], train: Sequence[Example]) -> Evidence:
        before, after = pair = self._pair(held_out, _("held-out loss"))
        learned = compare(before, after, self.seed)
        found = replace(found, learned=learned)
        if train:
            trained_on = self._pair(train, _("loss on training examples"))
            gap = generalization_gap(trained_on, pair, self.seed)
            found = replace(found, trained_on=compare(*trained_on, self.seed), gap=gap)
        if self.subject.later:
            last = self._losses(held_out, self.session.names[1], _("held-out loss after the last step"))
            found = replace(found, later=compare(after, last, self.seed))
        if learned.is_significant and learned.difference < 0:
            self.improved = pair
            found = replace(found, half=self._half(held_out, before, after))
        shown, eligible = self._shown(held_out, pair)
        return replace(found, shown=shown, eligible=eligible)

    def _of_preferences(self, config: Config, held_out: Sequence[Example]) -> Evidence:
        """The preference loss alone: the other figures are losses of examples."""
        self.missing.append(
            _(
                "The run is on preferences ({method}): answers side by side, memorizing and half the rank are measured "
                "for runs on examples only.",
                method=config.training.method,
            )
        )
        return Evidence(next(preference_comparisons(self.session, self.subject.folder, config, held_out, self.report)))

    def _examples(self, files: Sequence[str]) -> tuple[Sequence[Example], Sequence[Example]]:
        """Held-out and training examples, as far as they are there."""
        config, run = self.subject.config, self.subject.folder
        again: Prepared | None = None
        if config is not None:
            try:
                again = prepared_again(self.session, run, config, self.report)
            except (DataError, RunError) as error:
                self.missing.append(str(error))
        if files:
            held_out = read_examples(self.session, files, DataConfig(), self.report)
        else:
            held_out = again.held_out if again else []
            if config is None:
                self.missing.append(
                    _("This is an adapter without its run folder, so no held-out examples are known. Give a file: "
                      "lorasmith report {run} FILE", run=run)
                )  # fmt: skip
            elif again and not held_out:
                self.missing.append(
                    _("The run held out no examples (data.held_out is 0). Give a file that it was not trained on: "
                      "lorasmith report {run} FILE", run=run)
                )  # fmt: skip
        train = again.train if again else []
        if train and not self.subject.saw_all_rows:
            self.missing.append(
                _("What is reported on was saved before the training had seen every row once, so its losses on "
                  "training examples say nothing about memorizing.")
            )  # fmt: skip
            train = []
        return held_out, train

    def _sample(self, train: Sequence[Example], held_out: Sequence[Example]) -> list[Example]:
        """About as many training examples as are held out, at even distances, so from all files."""
        count = min(max(len(held_out), LEAST_TRAIN_EXAMPLES), MOST_TRAIN_EXAMPLES, len(train))
        return [train[i * len(train) // count] for i in range(count)]

    def _losses(self, examples: Sequence[Example], adapter: str | None, task: str) -> ExampleLosses:
        return evaluate_loss(self.base, examples, adapter, self.report, task)

    def _pair(self, examples: Sequence[Example], what: str) -> Pair:
        task = _("{what} of the base model", what=what)
        before = evaluate_loss(self.before.base, examples, None, self.report, task)
        task = _("{what} of {name}", what=what, name=self.after.name)
        return before, self._losses(examples, self.after.adapter, task)

    def _update(self, held_out: Sequence[Example]) -> WholeUpdate | None:
        """Last of all, because it changes the base model."""
        try:
            return whole_update(self.before.base, self.base, held_out, self.improved, self.seed, self.report)
        except ConfigError as error:
            self.missing.append(
                _("Whether LoRA would have done is not measured: {why}.", why=str(error).removesuffix("."))
            )
            return None

    def _half(self, held_out: Sequence[Example], before: ExampleLosses, after: ExampleLosses) -> Interval | None:
        if self.after.adapter is None:
            return None
        adapter = self.base.adapters[self.after.adapter]
        with strongest_half(adapter.parameters, adapter.config) as changed:
            if not changed:
                return None
            reduced = self._losses(held_out, adapter.name, _("held-out loss with half the rank"))
        return retained_share(before, after, reduced, self.seed)

    def _shown(self, held_out: Sequence[Example], pair: Pair) -> tuple[tuple[ShownExample, ...], int]:
        """Examples from the top, middle and bottom of the order by change of loss, and of how many that is."""
        prompts = list(example_prompts(held_out, self.session.template))
        order = [i for i in by_change(*pair) if prompts[i] is not None]
        if not order:
            self.missing.append(
                _("None of the held-out examples has a prompt and a complete answer, so no answers are compared.")
            )
            return (), 0
        chosen = chosen_of(order)
        asked = [prompt for _place, i in chosen if (prompt := prompts[i]) is not None]
        answers = [self._answers(asked, side) for side in (self.before, self.after)]
        before, after = (losses.losses / losses.weights for losses in pair)
        return tuple(
            ShownExample(place, prompt, float(before[i]), float(after[i]), *both)
            for (place, i), prompt, *both in zip(chosen, asked, *answers, strict=True)
        ), len(order)

    def _answers(self, prompts: Sequence[Prompt], side: _Side) -> list[Answer]:
        task, stop_ids = _("answers of {name}", name=side.name), self.session.template.stop_ids
        with eval_mode(side.base):
            return generate_answers(prompts, side.base, side.adapter, ANSWERS, stop_ids, self.report, task)


def chosen_of(order: Sequence[int]) -> list[tuple[str, int]]:
    """(place, example) of those that are shown, without repeating one: the order is from worst to best."""
    each = min(SHOWN_OF_EACH, max(len(order) // 3, 1))
    middle = (len(order) - each) // 2
    slices = {"worst": order[:each], "best": order[max(len(order) - each, each) :], "middle": order[middle:][:each]}
    used = {*slices["worst"], *slices["best"]}
    slices["middle"] = [i for i in slices["middle"] if i not in used]
    return [(place, i) for place in ("worst", "middle", "best") for i in slices[place]]
