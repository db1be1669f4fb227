"""From records to the examples of each row, with the encoded copies of an earlier run if there are any."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from lorasmith.config.data import DataConfig
from lorasmith.data.dataset.encoded_cache import encoded_path, load_encoded, save_encoded
from lorasmith.data.dataset.fit import REPORT_EVERY, DataSplit
from lorasmith.data.rows.conversation import Conversation, Problems, Record, RowError
from lorasmith.data.template.encoding import Template
from lorasmith.errors import DataError
from lorasmith.i18n import _
from lorasmith.model.row import Example
from lorasmith.report import Report


class Notes:
    """Passes messages on to a report, and keeps them."""

    def __init__(self, report: Report) -> None:
        self.report, self.texts = report, list[str]()

    def say(self, text: str) -> None:
        """A message; an empty one is none."""
        if text:
            self.texts.append(text)
            self.report.say(text)

    def warn(self, text: str) -> None:
        """A warning; an empty one is none."""
        if text:
            self.texts.append(text)
            self.report.warn(text)


def encode_rows(
    files: dict[str, Sequence[Record]], template: Template, cfg: DataConfig, notes: Notes, preference: bool
) -> list[DataSplit]:
    """Encode the rows of each split. Raises DataError with every row that the template refuses, unless few may be.

    preference: whether they are preference rows.
    """
    total, done, splits, texts, caches = sum(map(len, files.values())), 0, [], list[str](), set[Path]()
    for option, records in files.items():
        problems, split = Problems(option), DataSplit(option, [], [])
        rows = list(_conversations(records, template, problems, preference))
        flat = [conversation for row in rows for conversation in row]
        path = encoded_path(flat, template, cfg.learn)
        cached = load_encoded(path, flat) if path else None
        left = iter(zip(*cached, strict=True)) if cached else None
        encoded = list[tuple[list[Example], Collection[str]]]()
        for row in rows:
            try:
                found = list(islice(left, len(row))) if left else [_encoded(one, template, cfg.learn) for one in row]
                split.rows.append(_joined(row, [examples for examples, _lost in found]))
                split.lost.append({kind for _examples, lost in found for kind in lost})
                split.conversations.append(row[0])
                encoded += found
            except RowError as error:
                problems.add(error.source, error.text)
            done += 1
            if cached is None and total > REPORT_EVERY and (done % REPORT_EVERY == 0 or done == total):
                notes.report.progress(_("encoding"), done, total)
        if path and cached is None and not problems.sources:
            save_encoded(path, [examples for examples, _lost in encoded], [lost for _examples, lost in encoded])
        caches |= {path.parent} if path and path.is_file() else set()
        splits.append(split)
        try:
            for text in problems.skip_or_raise(cfg.skip_bad_rows, len(records)):
                notes.warn(text)
        except DataError as error:
            texts += error.problems
    if texts:
        raise DataError(*texts)
    if caches:
        notes.report.say(
            _(
                "Encoded copies of these rows are kept in {folder} for the next run; only you can read them. "
                "To remove them, delete that folder.",
                folder=caches.pop(),
            )
        )
    return splits


def _conversations(
    records: Sequence[Record], template: Template, problems: Problems, preference: bool
) -> Iterator[tuple[Conversation, ...]]:
    """The conversation of each record that has no problem; one for each answer of a preference row."""
    for record in records:
        try:
            yield template.answers(record) if preference else (template.conversation(record),)
        except RowError as error:
            problems.add(error.source, error.text)


def _encoded(row: Conversation, template: Template, learn: str) -> tuple[list[Example], Collection[str]]:
    return template.encode_row(row, learn), template.lost(row, learn)


def _joined(row: Sequence[Conversation], encoded: Sequence[list[Example]]) -> list[Example]:
    """The examples of a row; of a preference row one for each answer. Raises RowError if an answer needs several."""
    if row[0].desirable is None:
        return encoded[0]
    examples = [replace(found[0], desirable=one.desirable) for one, found in zip(row, encoded, strict=True)]
    if any(len(found) > 1 for found in encoded):
        raise RowError(
            row[0].source,
            _(
                "the answer has several turns, and the chat template rewrites earlier turns when later ones follow. "
                "Give only the last turn as the answer, and the turns before it in the prompt."
            ),
        )
    if len(examples) == 2 and examples[0].whole_ids == examples[1].whole_ids:
        raise RowError(
            row[0].source, _("'chosen' and 'rejected' are the same tokens, so neither is better. Remove the row.")
        )
    return examples
