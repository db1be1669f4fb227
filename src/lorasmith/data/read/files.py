"""Files of examples become records that know their file and line.

JSON is told by its first character, not by its name: `[` begins one list, anything else is a row on each line. Tables
(CSV, TSV, Parquet) are told by their names. Every bad row of a file is found before the first error is raised.
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
from lorasmith.data.read.stream import PACKED, Broken, Source, opened
from lorasmith.data.read.table import SEPARATORS, csv_rows, parquet_rows
from lorasmith.data.rows.cells import unfolded
from lorasmith.data.rows.conversation import Problems, Record, places, quoted
from lorasmith.data.rows.forms import Form, recognised, row_problem
from lorasmith.data.rows.messages import USED
from lorasmith.errors import ConfigError, DataError
from lorasmith.i18n import _, counted, listed
from lorasmith.report import Report

__all__ = ["ROW_FILES", "Found", "look", "read", "require_columns", "rows_of"]

Reader = Callable[[Source], Iterator[tuple[str, object]]]

TABLES: dict[str, Reader] = {".parquet": parquet_rows}  # binary files, by the end of their name
TEXTS: dict[str, Reader] = dict.fromkeys(SEPARATORS, csv_rows)  # UTF-8; under any other name it is JSON
ROW_FILES = frozenset((*TABLES, *TEXTS, ".json", ".jsonl", ".ndjson"))
OTHER_FILES = frozenset(
    {".arrow", ".xls", ".xlsx", ".ods", ".txt", ".md", ".pdf", ".docx", ".zip", ".tar", ".bz2", ".xz"}
)
NAMED = 5  # rows that a note names before it only counts
CHECKED = 20_000  # rows between two lines of progress


@dataclass(frozen=True)
class Found:
    """A file's rows as records, the form that was recognised, and what a reader should know of them, in sentences.

    `columns`: all that one of its rows has, as the file calls them. `left_out`: of rows that are right and yet not
    among the records, where they are and why.
    """

    name: str
    form: str
    columns: tuple[str, ...]
    records: list[Record]
    notes: tuple[str, ...]
    left_out: tuple[str, ...]


def read(path: str | Path, option: str = "data.data") -> list[Record]:
    """All rows of a file, folder or hub's data set. Raises as `look` does."""
    return look(path, option).records


def look(
    name: str | Path,
    option: str = "data.data",
    renamed: Mapping[str, str] | None = None,
    report: Report | None = None,
) -> Found:
    """All rows, each checked to be of the form that most have.

    `renamed`: column we know -> what the file calls it; where it has no such column, it is read as it is.
    `option` names the setting that `name` came from in what is raised: DataError, with every bad row by its line;
    MissingExtraError where a package is needed that is not installed; ConfigError where no form is recognised and
    `renamed` names columns that are not there.
    """
    source, renamed = Source(str(name), option, report or Report()), renamed or {}
    found = list(rows_of(source))
    columns = tuple({key: None for _at, row in found if isinstance(row, dict) for key in row})
    found = [(at, unfolded(_under_our_names(row, renamed)) if isinstance(row, dict) else row) for at, row in found]
    rows = [(at, row) for at, row in found if isinstance(row, dict)]
    form = recognised(row for _at, row in rows)
    if form is None and columns:
        require_columns(renamed, columns, source.name)
    left_out = _checked(found, form, source)
    if form is None:
        raise DataError(_("{option}: {file} contains no rows. Give a file with at least one row.", **source.said))
    unread = {at for places in left_out.values() for at in places}
    records = [
        Record({key: value for key, value in row.items() if key in form.keys}, at)
        for at, row in rows
        if at not in unread
    ]
    texts = [_("{place}: skipped: {why}", place=places(rows, NAMED), why=why) for why, rows in left_out.items()]
    if not records:
        raise DataError(*(f"{option}: {text}" for text in texts))
    return Found(source.name, form.name, columns, records, tuple(_notes(source, form, rows, records)), tuple(texts))


def _checked(found: Sequence[tuple[str, object]], form: Form | None, source: Source) -> dict[str, list[str]]:
    """Why right rows are left out, each reason with where they are. Raises DataError with every bad row."""
    problems, left_out = Problems(source.option), Problems(source.option)
    for done, (at, row) in enumerate(found, 1):
        if not isinstance(row, dict):
            problems.add(at, str(row) if isinstance(row, Broken) else not_an_object(row))
        elif (text := row_problem(row, form)) is not None:
            problems.add(at, text)
        elif form is not None and (text := form.left_out(row)) is not None:
            left_out.add(at, text)
        if len(found) > CHECKED and (done % CHECKED == 0 or done == len(found)):
            source.report.progress(_("checking {file}", file=source.path.name), done, len(found))
    problems.raise_any()
    return left_out.sources


def not_an_object(row: object) -> str:
    """The sentence for a row that is no object."""
    return _(
        'a row must be an object like {{"instruction": ..., "output": ...}}, found {found}.',
        found=json.dumps(row, ensure_ascii=False)[:40],
    )


def rows_of(source: Source) -> Iterator[tuple[str, object]]:
    """Each row where it stands, as it is there; a `Broken` for one that cannot be read. Raises DataError."""
    path = source.path
    if path.is_dir():
        if any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
            return folder_rows(source)
        children = (replace(source, name=child.name) for child in path.iterdir())
        files = sorted(child.name for child in children if child.suffix in ROW_FILES)
        hint = (
            _("Give one of the files in it: {files}.", files=listed(files[:5])) if files else _("Give a file instead.")
        )
        raise DataError(_("{option}: {file} is a folder, but not one saved by `datasets`.", **source.said) + " " + hint)
    if path.exists():
        return _file_rows(source)
    if is_hub_name(source.name, ROW_FILES | OTHER_FILES | frozenset(PACKED)):
        return hub_rows(source)
    raise DataError(_missing(source))


def _file_rows(source: Source) -> Iterator[tuple[str, object]]:
    if source.suffix in OTHER_FILES:
        raise DataError(
            _(
                "{option}: {file} is not in a supported format. Convert it to JSON, JSONL, CSV or TSV (also "
                ".gz, .zst), Parquet, or a folder saved by `datasets`.",
                **source.said,
            )
        )
    if source.suffix in TABLES:
        return TABLES[source.suffix](source)
    with opened(source) as file:
        start = file.read(4096)
    if not start.strip():
        raise DataError(_("{option}: {file} is empty. Give a file with at least one row.", **source.said))
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(_("{option}: {file} is encoded in UTF-16. Save it as UTF-8.", **source.said))
    if source.suffix in TEXTS:
        return TEXTS[source.suffix](source)
    return json_list(source) if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[" else json_lines(source)


def _missing(source: Source) -> str:
    """The sentence for a path that is not there, with what is nearby."""
    path = source.path
    text, parent = _("{option}: {file} does not exist.", **source.said), path.parent
    if not parent.is_dir():
        return text + " " + _("The folder {folder} does not exist either.", folder=parent)
    near = get_close_matches(path.name, [child.name for child in parent.iterdir()], 1)
    near = near or [child.name for child in sorted(parent.iterdir()) if child.stem == path.stem][:1]
    return text + " " + _("Did you mean {near}?", near=parent / near[0]) if near else text


def require_columns(renamed: Mapping[str, str], columns: Collection[str], name: str) -> None:
    """Raises ConfigError, a line for each column that data.map names and none of `columns` of the file `name` is."""
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


def _under_our_names(row: Mapping[str, object], renamed: Mapping[str, str]) -> dict[str, object]:
    kept = {key: value for key, value in row.items() if key not in renamed.values()}
    return kept | {ours: row[theirs] for ours, theirs in renamed.items() if theirs in row}


def _notes(
    source: Source, form: Form, rows: Sequence[tuple[str, dict[str, object]]], records: Sequence[Record]
) -> Iterator[str]:
    count = counted(len(records), _("1 row"), _("{count} rows"))
    said = {"file": source.name, "form": form.name, "rows": count}
    left_out = len(rows) - len(records)
    if left_out:
        yield _("{file}: {form} format, {rows}, {count} skipped.", **said, count=f"{left_out:,}")
    else:
        yield _("{file}: {form} format, {rows}, none skipped.", **said)
    unused = _unused(form, (row for _at, row in rows))
    if unused:
        named = listed(f"'{key}' ({n:,})" for key, n in unused.items())
        yield _("{file}: unused keys, with the number of rows that have them: {keys}.", file=source.name, keys=named)
    again = _repeated(records)
    if again:
        yield _(
            "Duplicates of earlier rows, which are kept: {count} ({places}).",
            count=f"{len(again):,}",
            places=places(again, NAMED),
        )


def _unused(form: Form, rows: Iterable[Mapping[str, object]]) -> Counter[str]:
    """In how many rows each column has something that nobody reads; columns of messages as 'messages.thinking'."""
    keys: Counter[str] = Counter()
    for row in rows:
        keys.update(key for key, value in row.items() if value and key not in form.keys)
        inner = row.get(form.required[0])
        messages = inner if isinstance(inner, list) else []
        columns = {key for message in messages for key, value in message.items() if value}
        keys.update(f"{form.required[0]}.{key}" for key in columns - USED)
    return keys


def _repeated(records: Sequence[Record]) -> list[str]:
    """Where rows stand that have exactly the columns of an earlier one."""
    seen, again = set[str](), list[str]()
    for record in records:
        said = json.dumps(record.fields, sort_keys=True, default=str)
        if said in seen:
            again.append(record.source)
        seen.add(said)
    return again
