"""Read a data file, a saved dataset or a dataset on a hub into records that know their file and line.

CSV, TSV and Parquet are recognized by the file's suffix. Any other file is JSON: a list if it begins with `[`, else
JSON Lines. All bad rows of a file are collected before an error is raised.
"""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from lorasmith.data.hub import folder_rows, hub_rows, is_hub_name
from lorasmith.data.read.json_rows import json_lines, json_list
from lorasmith.data.read.stream import COMPRESSED, BadRow, Source, open_source
from lorasmith.data.read.table import SEPARATORS, csv_rows, parquet_rows
from lorasmith.data.rows.cells import parse_list_cells
from lorasmith.data.rows.conversation import Problems, Record, places, quoted
from lorasmith.data.rows.formats import RowFormat, recognize_format, row_problem
from lorasmith.data.rows.messages import MESSAGE_KEYS
from lorasmith.errors import ConfigError, DataError
from lorasmith.i18n import _, counted, listed
from lorasmith.report import Report

__all__ = ["ROW_FILES", "DataFile", "iter_rows", "read_file", "read_records", "require_columns"]

Reader = Callable[[Source], Iterator[tuple[str, object]]]

BINARY_READERS: dict[str, Reader] = {".parquet": parquet_rows}  # by suffix
TEXT_READERS: dict[str, Reader] = dict.fromkeys(SEPARATORS, csv_rows)  # for UTF-8; other suffixes are read as JSON
ROW_FILES = frozenset((*BINARY_READERS, *TEXT_READERS, ".json", ".jsonl", ".ndjson"))
UNSUPPORTED_FILES = frozenset(
    {".arrow", ".xls", ".xlsx", ".ods", ".txt", ".md", ".pdf", ".docx", ".zip", ".tar", ".bz2", ".xz"}
)
MAX_PLACES = 5  # rows that a note names before it only counts them
REPORT_EVERY = 20_000  # rows between two progress reports


@dataclass(frozen=True)
class DataFile:
    """The rows of a file as records.

    format: the name of the row format. columns: all columns of the file, under its own names. notes: what the user
    should know, in sentences. skipped: which valid rows are not among the records and why, in sentences.
    """

    name: str
    format: str
    columns: tuple[str, ...]
    records: list[Record]
    notes: tuple[str, ...]
    skipped: tuple[str, ...]


def read_records(path: str | Path, option: str = "data.data") -> list[Record]:
    """All records of a file, a saved dataset or a dataset on a hub. Raises the errors of `read_file`."""
    return read_file(path, option).records


def read_file(
    name: str | Path,
    option: str = "data.data",
    renamed: Mapping[str, str] | None = None,
    report: Report | None = None,
) -> DataFile:
    """Read and check all rows. The format of the file is the one that most rows have.

    name: a file, a folder saved by `datasets`, or a dataset on a hub. option: the setting that `name` came from, for
    error messages. renamed: our column name -> the file's; entries whose column does not exist are ignored.

    Raises:
        DataError: rows that cannot be used, each with its line; or the file cannot be read.
        MissingExtraError: an optional package is needed.
        ConfigError: no format was recognized, and `renamed` names columns that do not exist.
    """
    source, renamed = Source(str(name), option, report or Report()), renamed or {}
    found = list(iter_rows(source))
    columns = tuple({key: None for _at, row in found if isinstance(row, dict) for key in row})
    found = [(at, parse_list_cells(_renamed(row, renamed)) if isinstance(row, dict) else row) for at, row in found]
    rows = [(at, row) for at, row in found if isinstance(row, dict)]
    row_format = recognize_format(row for _at, row in rows)
    if row_format is None and columns:
        require_columns(renamed, columns, source.name)
    skipped = _check(found, row_format, source)
    if row_format is None:
        raise DataError(
            _("{option}: {file} contains no rows. Give a file with at least one row.", **source.placeholders)
        )
    not_used = {at for sources in skipped.values() for at in sources}
    records = [
        Record({key: value for key, value in row.items() if key in row_format.keys}, at)
        for at, row in rows
        if at not in not_used
    ]
    texts = [_("{place}: skipped: {why}", place=places(rows, MAX_PLACES), why=why) for why, rows in skipped.items()]
    if not records:
        raise DataError(*(f"{option}: {text}" for text in texts))
    return DataFile(
        source.name, row_format.name, columns, records, tuple(_notes(source, row_format, rows, records)), tuple(texts)
    )


def _check(found: Sequence[tuple[str, object]], row_format: RowFormat | None, source: Source) -> dict[str, list[str]]:
    """The rows to skip, by reason: valid rows that hold more than text. Raises DataError with all bad rows."""
    problems, skipped = Problems(source.option), Problems(source.option)
    for done, (at, row) in enumerate(found, 1):
        if not isinstance(row, dict):
            problems.add(at, str(row) if isinstance(row, BadRow) else not_an_object(row))
        elif (text := row_problem(row, row_format)) is not None:
            problems.add(at, text)
        elif row_format is not None and (text := row_format.skip_reason(row)) is not None:
            skipped.add(at, text)
        if len(found) > REPORT_EVERY and (done % REPORT_EVERY == 0 or done == len(found)):
            source.report.progress(_("checking {file}", file=source.path.name), done, len(found))
    problems.raise_any()
    return skipped.sources


def not_an_object(row: object) -> str:
    """The error text for a row that is not a JSON object."""
    return _(
        'a row must be an object like {{"instruction": ..., "output": ...}}, found {found}.',
        found=json.dumps(row, ensure_ascii=False)[:40],
    )


def iter_rows(source: Source) -> Iterator[tuple[str, object]]:
    """Pairs of source, such as 'train.jsonl:812', and row; a `BadRow` if a row cannot be read. Raises DataError."""
    path = source.path
    if path.is_dir():
        if any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
            return folder_rows(source)
        children = (replace(source, name=child.name) for child in path.iterdir())
        files = sorted(child.name for child in children if child.suffix in ROW_FILES)
        hint = (
            _("Give one of the files in it: {files}.", files=listed(files[:5])) if files else _("Give a file instead.")
        )
        raise DataError(
            _("{option}: {file} is a folder, but not one saved by `datasets`.", **source.placeholders) + " " + hint
        )
    if path.exists():
        return _file_rows(source)
    if is_hub_name(source.name, ROW_FILES | UNSUPPORTED_FILES | frozenset(COMPRESSED)):
        return hub_rows(source)
    raise DataError(_missing(source))


def _file_rows(source: Source) -> Iterator[tuple[str, object]]:
    if source.suffix in UNSUPPORTED_FILES:
        raise DataError(
            _(
                "{option}: {file} is not in a supported format. Convert it to JSON, JSONL, CSV or TSV (also "
                ".gz, .zst), Parquet, or a folder saved by `datasets`.",
                **source.placeholders,
            )
        )
    if source.suffix in BINARY_READERS:
        return BINARY_READERS[source.suffix](source)
    with open_source(source) as file:
        start = file.read(4096)
    if not start.strip():
        raise DataError(_("{option}: {file} is empty. Give a file with at least one row.", **source.placeholders))
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(_("{option}: {file} is encoded in UTF-16. Save it as UTF-8.", **source.placeholders))
    if source.suffix in TEXT_READERS:
        return TEXT_READERS[source.suffix](source)
    return json_list(source) if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[" else json_lines(source)


def _missing(source: Source) -> str:
    """The error text for a path that does not exist, with a similar name if there is one."""
    path = source.path
    text, parent = _("{option}: {file} does not exist.", **source.placeholders), path.parent
    if not parent.is_dir():
        return text + " " + _("The folder {folder} does not exist either.", folder=parent)
    near = get_close_matches(path.name, [child.name for child in parent.iterdir()], 1)
    near = near or [child.name for child in sorted(parent.iterdir()) if child.stem == path.stem][:1]
    return text + " " + _("Did you mean {near}?", near=parent / near[0]) if near else text


def require_columns(renamed: Mapping[str, str], columns: Collection[str], name: str) -> None:
    """Raise ConfigError if data.map names columns that are not among `columns`, those of the file `name`."""
    problems = [
        _(
            "data.map: {ours}={theirs}: {file} has no column '{theirs}'. Its columns are {columns}.",
            ours=ours,
            theirs=theirs,
            file=name,
            columns=quoted(columns),
        )
        for ours, theirs in renamed.items()
        if theirs not in columns
    ]
    if problems:
        raise ConfigError(*problems)


def _renamed(row: Mapping[str, object], renamed: Mapping[str, str]) -> dict[str, object]:
    unchanged = {key: value for key, value in row.items() if key not in renamed.values()}
    return unchanged | {ours: row[theirs] for ours, theirs in renamed.items() if theirs in row}


def _notes(
    source: Source, row_format: RowFormat, rows: Sequence[tuple[str, dict[str, object]]], records: Sequence[Record]
) -> Iterator[str]:
    count = counted(len(records), _("1 row"), _("{count} rows"))
    values = {"file": source.name, "form": row_format.name, "rows": count}
    skipped = len(rows) - len(records)
    if skipped:
        yield _("{file}: {form} format, {rows}, {count} skipped.", **values, count=f"{skipped:,}")
    else:
        yield _("{file}: {form} format, {rows}, none skipped.", **values)
    unused = _unused(row_format, (row for _at, row in rows))
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


def _unused(row_format: RowFormat, rows: Iterable[Mapping[str, object]]) -> Counter[str]:
    """Columns that are not read, with the number of rows that have them; keys of messages as 'messages.thinking'."""
    keys: Counter[str] = Counter()
    for row in rows:
        keys.update(key for key, value in row.items() if value and key not in row_format.keys)
        inner = row.get(row_format.required[0])
        messages = inner if isinstance(inner, list) else []
        columns = {key for message in messages for key, value in message.items() if value}
        keys.update(f"{row_format.required[0]}.{key}" for key in columns - MESSAGE_KEYS)
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
