"""Suggest a configuration for given data, as `lorasmith init` writes it, with the reason for each value.

Only the data and the tokenizer of the base model are read. Values that the user has set are kept; the rules for the
others are plain arithmetic over the number of rows and their lengths, all of it in this module.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel

from lorasmith.config.toml import Config, commented_toml
from lorasmith.config.training import SMALL_MODEL
from lorasmith.data.dataset.prepare import ROUND, prepare_rows, read_files
from lorasmith.data.read.files import DataFile
from lorasmith.data.rows.conversation import Record
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.variables import check_variables
from lorasmith.evaluation.loss import MIN_EXAMPLES
from lorasmith.i18n import _, listed
from lorasmith.loading.folder import eos_ids, find_folder, max_positions
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.loading.weights import weights_mib
from lorasmith.report import Report, WarningsOnly
from lorasmith.system.writing import write_file

UNLIMITED = 2**30  # tokens: nothing is truncated while lengths are counted
LONGEST = 2048  # most tokens of an example that are suggested: training.row_tokens, so that it fits one forward pass
FEW_TOO_LONG = 0.05  # fraction of the rows that may be dropped
HELD_OUT, MOST_HELD_OUT = 0.05, 200  # fraction and number of rows; more cost time and tell little
ENOUGH_STEPS, MOST_EPOCHS, EVALUATIONS = 60, 8, 5
RACE_STEPS = 250  # from which on a race has ten steps
PROMPTS, PROMPT_LENGTH = 2, 200  # number of training.samples, and most characters of one


@dataclass(frozen=True)
class DataSummary:
    """The properties of the data and the base model that the suggestions follow from.

    form: formats of the rows, for display; different: number of distinct rows; lengths: tokens of each example up to
    its last target; learned: number of target tokens; limit: context length of the model, None if it has none.
    parameters: of the model.
    """

    form: str
    rows: int
    different: int
    lengths: tuple[int, ...]
    learned: int
    limit: int | None
    parameters: int
    prompts: tuple[str, ...]

    def __str__(self) -> str:
        return _(
            "{rows:,} rows: {form}; {different:,} distinct; {shortest:,} to {longest:,} tokens per row, median "
            "{middle:,.0f}; {part:.0%} of the tokens are trained on",
            rows=self.rows,
            form=self.form,
            different=self.different,
            shortest=min(self.lengths),
            longest=max(self.lengths),
            middle=median(self.lengths),
            part=self.learned / sum(self.lengths),
        )


@dataclass(frozen=True)
class Suggestion:
    """A configuration that can be trained as it is, and the reason for each value that follows from the data."""

    config: Config
    reasons: dict[str, str]
    summary: DataSummary

    def to_toml(self) -> str:
        """The TOML file: above every key, a comment with its reason or else its description."""
        return commented_toml(self.config, self.reasons)

    def write(self, path: Path) -> None:
        """Write the TOML file atomically. Raises RunError if it cannot be written."""
        write_file(path, self.to_toml(), is_run=False)


def suggest(config: Config, report: Report | None = None) -> Suggestion:
    """Suggest values for options that `config` does not set. Raises LorasmithError: bad data, or no tokenizer."""
    report = report or Report()
    summary = summarize_data(config, report)
    reasons: dict[str, str] = {}
    data = _filled(config.data, "data", _for_data(summary), reasons)
    config = config.model_copy(update={"data": data})
    training = _filled(config.training, "training", _for_training(summary, config), reasons)
    return Suggestion(config.model_copy(update={"training": training}), reasons, summary)


def summarize_data(config: Config, report: Report) -> DataSummary:
    """Read and encode all rows, untruncated. Raises DataError with every bad row, ModelError without a tokenizer."""
    files = read_files(config.data, report)[: len(config.data.data)]  # without a file of held-out rows
    records = [record for found in files for record in found.records]
    folder = find_folder(config.model.model, report)
    tokenizer = load_tokenizer(folder, config.model.trust_remote_code, report)
    template = Template.from_config(tokenizer, config.data, eos_ids(folder))
    check_variables(template, config.data.template_kwargs)
    uncut = config.data.model_copy(update={"held_out": 0.0, "max_length": UNLIMITED, "too_long": "truncate"})
    examples = prepare_rows(records, None, uncut, template, None, WarningsOnly(report)).train
    return DataSummary(
        form=_forms(files),
        rows=len(records),
        different=len({tuple(example.ids) for example in examples}),
        lengths=tuple(example.useful_length + 1 for example in examples),
        learned=sum(example.n_targets for example in examples),
        limit=max_positions(folder, config.model.trust_remote_code),
        parameters=round(weights_mib(folder, torch.float32) * 2**20 / torch.float32.itemsize),
        prompts=_prompts(records, template),
    )


def _filled(part: Any, name: str, chosen: dict[str, tuple[Any, str]], reasons: dict[str, str]) -> Any:
    """`part` with the chosen values for options that the user did not set; adds their reasons to `reasons`."""
    suggested = {key: value for key, (value, _why) in chosen.items() if key not in part.model_fields_set}
    reasons |= {f"{name}.{key}": chosen[key][1] for key in suggested}
    return type(part).model_validate(part.model_dump() | suggested)


def _for_data(summary: DataSummary) -> dict[str, tuple[Any, str]]:
    longest = max(summary.lengths)
    bound = min(LONGEST, summary.limit or LONGEST)
    if longest <= bound:
        length = min(bound, math.ceil(longest / ROUND) * ROUND)
        why = _("the longest row has {longest:,} tokens, so nothing is truncated", longest=longest)
        policy = (
            "error",
            _(
                "no row is too long; if a longer one is added later, training stops with an error instead of "
                "truncating it"
            ),
        )
    else:
        length = bound
        why = _("the longest row has {longest:,} tokens; {why}", longest=longest, why=_bound_by(summary))
        policy = _policy(summary, bound)
    return {"max_length": (length, why), "too_long": policy, "held_out": _held_out(summary.rows)}


def _bound_by(summary: DataSummary) -> str:
    if summary.limit is not None and summary.limit <= LONGEST:
        return _("the model's context length is {limit:,}", limit=summary.limit)
    return _("more than {bound:,} would need a lot of memory", bound=LONGEST)


def _policy(summary: DataSummary, length: int) -> tuple[str, str]:
    longer = sum(tokens > length for tokens in summary.lengths)
    part = longer / len(summary.lengths)
    if part <= FEW_TOO_LONG:
        return "drop", _(
            "{longer:,} rows ({part:.1%}) are longer; they are dropped, so that none is trained on without its end",
            longer=longer,
            part=part,
        )
    return "truncate", _(
        "{longer:,} rows ({part:.0%}) are longer, too many to drop; they are truncated at the end",
        longer=longer,
        part=part,
    )


def _held_out(rows: int) -> tuple[float, str]:
    """A number of rows: at least as many as a confidence interval needs, but at most a fifth of all."""
    wanted = max(MIN_EXAMPLES, min(MOST_HELD_OUT, round(HELD_OUT * rows)))
    count = min(wanted, rows // 5)
    if not count:
        return 0.0, _("{rows} rows are too few to hold any out, so the adapter cannot be evaluated", rows=rows)
    if count < MIN_EXAMPLES:
        return float(count), _(
            "a fifth of {rows} rows; with {fewest} or more the evaluation would be more reliable",
            rows=rows,
            fewest=MIN_EXAMPLES,
        )
    return float(count), _("{part:.0%} of {rows:,} rows, never trained on", part=count / rows, rows=rows)


def _for_training(summary: DataSummary, config: Config) -> dict[str, tuple[Any, str]]:
    share, given = config.data.held_out, config.training
    rows = summary.rows if isinstance(share, str) else summary.rows - int(share if share >= 1 else share * summary.rows)
    batch = given.batch_size if "batch_size" in given.model_fields_set else 8 if rows >= 64 else 4 if rows >= 16 else 2
    per_epoch = math.ceil(rows / (batch * given.accumulate))
    epochs = suggested_epochs(per_epoch)
    steps = given.max_steps or math.ceil(round(per_epoch * _value_or(given, "epochs", epochs), 6))
    chosen: dict[str, tuple[Any, str]] = {
        "batch_size": (batch, _("{steps:,} steps per epoch over {rows:,} rows", steps=per_epoch, rows=rows)),
        "epochs": (float(epochs), _epochs(epochs, per_epoch)),
        "learning_rate": _learning_rate(config, summary.parameters),
    }
    if (
        steps >= RACE_STEPS
        and given.method == "lora"
        and config.lora.bias == "none"
        and not (config.lora.modules_to_save or config.data.add_tokens or given.start_from)
    ):
        chosen["learning_rate"] = (
            "auto",
            _("no rate is known for this data, and {steps:,} steps are enough for a race of five", steps=steps),
        )
    if share or isinstance(share, str):
        every = max(1, steps // EVALUATIONS)
        chosen["eval_every"] = every, _("{times} evaluations in {steps:,} steps; the best adapter is kept",
                                        times=steps // every, steps=steps)  # fmt: skip
    if summary.prompts:
        chosen["samples"] = (
            summary.prompts,
            _("taken from your data and answered at every evaluation, so that you can see it learn"),
        )
    return chosen


def suggested_epochs(per_epoch: int) -> int:
    """Number of epochs for data of which one epoch is `per_epoch` steps."""
    return max(1, min(MOST_EPOCHS, math.ceil(ENOUGH_STEPS / per_epoch)))


def _value_or(part: BaseModel, key: str, otherwise: Any) -> Any:
    return getattr(part, key) if key in part.model_fields_set else otherwise


def _epochs(epochs: int, per_epoch: int) -> str:
    if epochs == 1:
        return _("one epoch is {steps:,} steps; a second one would mostly add memorization", steps=per_epoch)
    return _(
        "{steps:,} steps; with few rows several epochs are needed, so watch the held-out loss", steps=epochs * per_epoch
    )


def _learning_rate(config: Config, parameters: int) -> tuple[float, str]:
    rate = config.training.with_usual_rate(parameters).peak_learning_rate
    if parameters < SMALL_MODEL:
        return rate, _("the usual value for this method on a small base model")
    return rate, _("the usual value for this method")


def _forms(files: Sequence[DataFile]) -> str:
    """The number of rows of each format, over all files."""
    counts: Counter[str] = Counter()
    for found in files:
        counts[found.format] += len(found.records)
    return listed(f"{count:,} {form}" for form, count in counts.items())


def _prompts(records: Sequence[Record], template: Template) -> tuple[str, ...]:
    """The first short user messages that begin a conversation; samples during training have no system message."""
    found: dict[str, None] = {}
    for record in records:
        first = template.conversation(record).messages[0]
        if first.role == "user" and first.content.strip() and len(first.content) <= PROMPT_LENGTH:
            found.setdefault(first.content)
        if len(found) == PROMPTS:
            break
    return tuple(found)
