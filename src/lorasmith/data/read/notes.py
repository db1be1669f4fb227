"""What is said about a file that was read: what it holds, what of it is not used, and what looks like a mistake."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lorasmith.data.read.stream import Source
from lorasmith.data.rows.conversation import MAX_PLACES, Record, places
from lorasmith.data.rows.formats import RowFormat
from lorasmith.data.rows.messages import marks_prompts, unread_message_keys
from lorasmith.data.rows.other_methods import labels, scores
from lorasmith.data.rows.placeholders import unfilled
from lorasmith.i18n import _, counted, listed

Row = Mapping[str, Any]


def notes(
    source: Source, row_format: RowFormat, rows: Sequence[Row], records: Sequence[Record], skipped: int
) -> Iterator[str]:
    """What was read, keys that are not used, and duplicates. rows: those of `records`, with all their columns."""
    count = counted(len(records), _("1 row"), _("{count} rows"))
    values = {"file": source.name, "form": row_format.name, "rows": count}
    if skipped:
        yield _("{file}: {form} format, {rows}, {count} skipped.", **values, count=f"{skipped:,}")
    else:
        yield _("{file}: {form} format, {rows}, none skipped.", **values)
    unused = _unused(row_format, rows)
    if unused:
        named = listed(f"'{key}' ({n:,})" for key, n in unused.items())
        yield _("{file}: unused keys, with the number of rows that have them: {keys}.", file=source.name, keys=named)
    duplicates = _duplicates(records)
    if duplicates:
        yield _(
            "Duplicates of earlier rows, which are kept: {count} ({places}).",
            count=f"{len(duplicates):,}",
            places=places(duplicates, MAX_PLACES),
        )


def warnings(source: Source, row_format: RowFormat, rows: Sequence[Row], records: Sequence[Record]) -> Iterator[str]:
    """What is probably a mistake: scores that are not used, marks without an effect, placeholders that are left."""
    scored = Counter(key for row in rows for key in scores(row) if row[key] not in (None, ""))
    for key in scored.keys() - set(row_format.keys):
        yield _(
            "{file}: '{key}' looks like a score of the answers ({count} rows) and is not used: good and bad answers "
            "are learned alike. Remove rows with bad answers.",
            file=source.name,
            key=key,
            count=f"{scored[key]:,}",
        )
    for key in sorted({key for row in rows for key in labels(row)} - set(row_format.keys)):
        values = [str(row[key]).removesuffix(".0") for row in rows if row.get(key) not in (None, "")]
        if row_format.required != ("text",) and "0" in values and set(values) <= {"0", "1"}:
            yield _(
                "{file}: '{key}' is 0 or 1 ({count} rows with 0) and is not used. If 0 marks bad answers, train "
                "with --method kto, or remove these rows: good and bad answers are learned alike.",
                file=source.name,
                key=key,
                count=f"{values.count('0'):,}",
            )
    marked = [one.source for one in records if any(marks_prompts(one.fields.get(key)) for key in row_format.required)]
    if marked:
        yield _(
            "{places}: messages that are not answers are marked to be trained on, which only data.learn 'all' does.",
            places=places(marked, MAX_PLACES),
        )
    left = [(one.source, found) for one in records if (found := unfilled(one.fields))]
    for name in sorted({name for _source, found in left for name in found}):
        yield _(
            "{places}: the placeholder {mark} is trained on as it is. Give the text for it with --fill {name}=TEXT.",
            places=places([source for source, found in left if name in found], MAX_PLACES),
            mark=f"{{{{{name}}}}}",
            name=name,
        )


def _unused(row_format: RowFormat, rows: Iterable[Row]) -> Counter[str]:
    """Columns that are not read, with the number of rows that have them; keys of messages as 'messages.id'."""
    keys: Counter[str] = Counter()
    for row in rows:
        keys.update(key for key, value in row.items() if value not in (None, "") and key not in row_format.keys)
        for column in row_format.required:
            keys.update(f"{column}.{key}" for key in sorted(unread_message_keys(row.get(column))))
    return keys


def _duplicates(records: Sequence[Record]) -> list[str]:
    """Sources of the rows with exactly the values of an earlier row."""
    known, duplicates = set[str](), list[str]()
    for record in records:
        text = json.dumps(record.fields, sort_keys=True, default=str)
        if text in known:
            duplicates.append(record.source)
        known.add(text)
    return duplicates
