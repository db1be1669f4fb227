"""A configuration for files of examples, each value with its reason. Reads the examples and the base's tokenizer only.

What the user has set stays. The rules are plain arithmetic over rows and lengths, all of them in this file.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel

from lorasmith.config.toml import SECTIONS, Config, to_toml
from lorasmith.data.dataset.prepare import prepare_rows, read_files
from lorasmith.data.read.files import Found
from lorasmith.data.rows.conversation import Record
from lorasmith.data.template.encoding import Template
from lorasmith.evaluation.loss import FEWEST
from lorasmith.i18n import _
from lorasmith.loading.load import find_folder, load_tokenizer, max_positions
from lorasmith.report import Report, Warnings
from lorasmith.training.checkpoint import write_file

UNCUT = 2**30  # tokens: looking at lengths, nothing is cut
LONGEST = 2048  # tokens of one example that are suggested at most: training.row_tokens, one forward
ROUND = 64  # max_length is a multiple of it: a few tokens of room for rows that come later
FEW_TOO_LONG = 0.05  # part of the rows that may be left out whole
HELD_OUT, MOST_HELD_OUT = 0.05, 200  # a part of the rows, and where more costs time and tells little
ENOUGH_STEPS, MOST_EPOCHS, EVALUATIONS = 60, 8, 5
FEW_STEPS, SMALL_BASE = 100, 1_000_000_000  # steps; bytes of a base that bears a higher learning rate
PROMPTS, PROMPT_LENGTH = 2, 200  # samples, and the characters of one


@dataclass(frozen=True)
class Look:
    """What was found. `lengths`: tokens of each example up to its last learned one; `limit`: what the base can hold."""

    form: str
    rows: int
    different: int
    lengths: tuple[int, ...]
    learned: int
    limit: int | None
    base_bytes: int
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
    """A configuration that trains as it stands, and the reason of each value that follows from the examples."""

    config: Config
    reasons: dict[str, str]
    look: Look

    def to_toml(self) -> str:
        """The file: every key under one line that says why, or else what it is."""
        about = {"output": str(Config.model_fields["output"].description)}
        for name, part in SECTIONS.items():
            about |= {f"{name}.{key}": str(field.description) for key, field in part.model_fields.items()}
        return to_toml(self.config, about | self.reasons)

    def write(self, path: Path) -> None:
        """Under its name only once it is whole. Raises RunError where the disk refuses."""
        write_file(path, self.to_toml(), is_run=False)


def suggest(config: Config, report: Report | None = None) -> Suggestion:
    """Values for what `config` leaves open. Raises LorasmithError: no files, a bad row, no tokenizer."""
    report = report or Report()
    look = look_at(config, report)
    reasons: dict[str, str] = {}
    data = _filled(config.data, "data", _for_data(look), reasons)
    config = config.model_copy(update={"data": data})
    training = _filled(config.training, "training", _for_training(look, config), reasons)
    return Suggestion(config.model_copy(update={"training": training}), reasons, look)


def look_at(config: Config, report: Report) -> Look:
    """Read and encode every row, uncut. Raises DataError with every bad row, ModelError without a tokenizer."""
    files = read_files(config.data.model_copy(update={"held_out": 0.0}), report)
    records = [record for found in files for record in found.records]
    folder = find_folder(config.model.model, report)
    tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
    template = Template.of(tokenizer, config.data.template, system=config.data.system)
    uncut = config.data.model_copy(update={"held_out": 0.0, "max_length": UNCUT, "too_long": "truncate"})
    examples = prepare_rows(records, None, uncut, template, None, Warnings(report)).train
    return Look(
        form=_forms(files),
        rows=len(records),
        different=len({tuple(example.ids) for example in examples}),
        lengths=tuple(example.useful_length + 1 for example in examples),
        learned=sum(example.n_targets for example in examples),
        limit=max_positions(folder, config.model.trust_remote_code),
        base_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        prompts=_prompts(records, template),
    )


def _filled(part: Any, name: str, chosen: dict[str, tuple[Any, str]], reasons: dict[str, str]) -> Any:
    """`part` with the chosen values where the user set none; their reasons are added to `reasons`."""
    own = {key: value for key, (value, _why) in chosen.items() if key not in part.model_fields_set}
    reasons |= {f"{name}.{key}": chosen[key][1] for key in own}
    return type(part).model_validate(part.model_dump() | own)


def _for_data(look: Look) -> dict[str, tuple[Any, str]]:
    longest = max(look.lengths)
    bound = min(LONGEST, look.limit or LONGEST)
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
        why = _("the longest row has {longest:,} tokens; {why}", longest=longest, why=_bound_by(look))
        policy = _policy(look, bound)
    return {"max_length": (length, why), "too_long": policy, "held_out": _held_out(look.rows)}


def _bound_by(look: Look) -> str:
    if look.limit is not None and look.limit <= LONGEST:
        return _("the model's context length is {limit:,}", limit=look.limit)
    return _("more than {bound:,} would need a lot of memory", bound=LONGEST)


def _policy(look: Look, length: int) -> tuple[str, str]:
    longer = sum(tokens > length for tokens in look.lengths)
    part = longer / len(look.lengths)
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
    """Whole rows: at least as many as an interval needs, as long as four times as many are left to learn from."""
    wanted = max(FEWEST, min(MOST_HELD_OUT, round(HELD_OUT * rows)))
    count = min(wanted, rows // 5)
    if not count:
        return 0.0, _("{rows} rows are too few to hold any out, so the adapter cannot be evaluated", rows=rows)
    if count < FEWEST:
        return float(count), _(
            "a fifth of {rows} rows; with {fewest} or more the evaluation would be more reliable",
            rows=rows,
            fewest=FEWEST,
        )
    return float(count), _("{part:.0%} of {rows:,} rows, never trained on", part=count / rows, rows=rows)


def _for_training(look: Look, config: Config) -> dict[str, tuple[Any, str]]:
    share, given = config.data.held_out, config.training
    rows = look.rows if isinstance(share, str) else look.rows - int(share if share >= 1 else share * look.rows)
    batch = given.batch_size if "batch_size" in given.model_fields_set else 8 if rows >= 64 else 4 if rows >= 16 else 2
    per_epoch = math.ceil(rows / (batch * given.accumulate))
    epochs = passes(per_epoch)
    steps = given.max_steps or math.ceil(round(per_epoch * _set(given, "epochs", epochs), 6))
    chosen: dict[str, tuple[Any, str]] = {
        "batch_size": (batch, _("{steps:,} steps per epoch over {rows:,} rows", steps=per_epoch, rows=rows)),
        "epochs": (float(epochs), _epochs(epochs, per_epoch)),
        "learning_rate": rate_for(steps, look.base_bytes),
    }
    if share or isinstance(share, str):
        every = max(1, steps // EVALUATIONS)
        chosen["eval_every"] = every, _("{times} evaluations in {steps:,} steps; the best adapter is kept",
                                        times=steps // every, steps=steps)  # fmt: skip
    if look.prompts:
        chosen["samples"] = (
            look.prompts,
            _("taken from your data and answered at every evaluation, so that you can see it learn"),
        )
    return chosen


def passes(per_epoch: int) -> int:
    """How often the examples should be seen, when one pass is so many steps."""
    return max(1, min(MOST_EPOCHS, math.ceil(ENOUGH_STEPS / per_epoch)))


def _set(part: BaseModel, key: str, otherwise: Any) -> Any:
    return getattr(part, key) if key in part.model_fields_set else otherwise


def _epochs(epochs: int, per_epoch: int) -> str:
    if epochs == 1:
        return _("one epoch is {steps:,} steps; a second one would mostly add memorisation", steps=per_epoch)
    return _(
        "{steps:,} steps; with few rows several epochs are needed, so watch the held-out loss", steps=epochs * per_epoch
    )


def rate_for(steps: int, base_bytes: int) -> tuple[float, str]:
    """A learning rate for so many steps on a base of this size, and why."""
    if steps < FEW_STEPS and base_bytes < SMALL_BASE:
        return 1e-3, _(
            "higher than LoRA's usual 2e-4, because the base model is small and there are only {steps} steps; "
            "3e-4 learned less in our measurements",
            steps=steps,
        )
    return 2e-4, _("the usual value for LoRA; {steps:,} steps", steps=steps)


def _forms(files: Sequence[Found]) -> str:
    """What the rows are, counted over all files."""
    counts: Counter[str] = Counter()
    for found in files:
        counts[found.form] += len(found.records)
    return ", ".join(f"{count:,} {form}" for form, count in counts.items())


def _prompts(records: Sequence[Record], template: Template) -> tuple[str, ...]:
    """The first short ones of rows that one user message begins: a sample has no system text before it."""
    found: dict[str, None] = {}
    for record in records:
        first = template.conversation(record).messages[0]
        if first.role == "user" and first.content.strip() and len(first.content) <= PROMPT_LENGTH:
            found.setdefault(first.content)
        if len(found) == PROMPTS:
            break
    return tuple(found)
