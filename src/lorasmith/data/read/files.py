"""Read a data file, a saved dataset or a dataset on a hub into records that know their file and line.

Tables and documents are recognized by the file's suffix. Any other file is JSON: a list if it begins with `[`, else
JSON Lines. All bad rows of a file are collected before an error is raised.
"""

import codecs
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from lorasmith.config.data import DataConfig, is_file
from lorasmith.config.preference import METHODS
from lorasmith.data.hub import folder_rows, hub_rows, is_hub_name
from lorasmith.data.read.json_rows import columns_problem, document, json_lines, json_list
from lorasmith.data.read.notes import notes, warnings
from lorasmith.data.read.stream import COMPRESSED, BadRow, Source, UnreadRest, open_source
from lorasmith.data.read.table import SEPARATORS, arrow_rows, csv_rows, parquet_rows
from lorasmith.data.rows.cells import parse_list_cells
from lorasmith.data.rows.conversation import Problems, Record, quoted
from lorasmith.data.rows.formats import RowFormat, recognize_format, row_problem
from lorasmith.data.rows.placeholders import fill, placeholders
from lorasmith.data.rows.preference import preference_format, preference_problem
from lorasmith.data.rows.styles import rename_roles
from lorasmith.errors import ConfigError, DataError
from lorasmith.i18n import _, listed
from lorasmith.report import Report

__all__ = ["ROW_FILES", "DataFile", "iter_rows", "read_file", "read_records", "require_used"]

Reader = Callable[[Source], Iterator[tuple[str, object]]]

BINARY_READERS: dict[str, Reader] = {".parquet": parquet_rows, ".arrow": arrow_rows}  # by suffix
TEXT_READERS: dict[str, Reader] = dict.fromkeys(SEPARATORS, csv_rows)  # for UTF-8; other suffixes are read as JSON
DOCUMENTS: dict[str, Reader] = dict.fromkeys((".txt", ".md"), document)  # prompts are one per line in such files
ROW_FILES = frozenset((*BINARY_READERS, *TEXT_READERS, ".json", ".jsonl", ".ndjson"))
UNSUPPORTED_FILES = frozenset({".xls", ".xlsx", ".ods", ".pdf", ".docx", ".zip", ".tar", ".bz2", ".xz"})
REPORT_EVERY = 20_000  # rows between two progress reports


@dataclass(frozen=True)
class DataFile:
    """The rows of a file as records.

    format: the name of the row format. columns: all columns of the file, under its own names. filled, roles: the
    placeholders of `data.fill` and the names in `data.roles` that it has. notes: what the user should know, in
    sentences; warnings: what is probably a mistake, and which rows are left out and why.
    """

    name: str
    format: str
    columns: tuple[str, ...]
    records: list[Record]
    filled: frozenset[str]
    roles: frozenset[str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def read_records(path: str | Path, option: str = "data.data") -> list[Record]:
    """All records of a file, a saved dataset or a dataset on a hub. Raises the errors of `read_file`."""
    return read_file(path, option).records


def read_file(
    name: str | Path,
    option: str = "data.data",
    renamed: Mapping[str, str] | None = None,
    report: Report | None = None,
    filling: Mapping[str, str] | None = None,
    skip: float = 0.0,
    roles: Mapping[str, str] | None = None,
    method: str = "lora",
) -> DataFile:
    """Read and check all rows. The format of the file is the one that most rows have.

    name: a file, a folder saved by `datasets`, or a dataset on a hub. option: the setting that `name` came from, for
    error messages. renamed: our column name -> the file's; entries whose column does not exist are ignored. filling:
    `data.fill`. skip: `data.skip_bad_rows`. roles: `data.roles`. method: `training.method`, which needs preference rows
    or examples.

    Raises:
        DataError: rows that cannot be used, each with its line; or the file cannot be read.
        MissingExtraError: an optional package is needed.
        ConfigError: no format was recognized, and `renamed` names columns that do not exist.
    """
    source, renamed, filling = Source(str(name), option, report or Report()), renamed or {}, filling or {}
    found = list(iter_rows(source))
    if len(found) == 1 and (text := columns_problem(found[0][1])):
        raise DataError(f"{source.option}: {source.name} {text}")
    columns = tuple({key: None for _at, row in found if isinstance(row, dict) for key in row})
    found = [(at, parse_list_cells(_renamed(row, renamed)) if isinstance(row, dict) else row) for at, row in found]
    filled = _filled(found, filling)
    renamed_roles = _with_roles(found, roles or {})
    recognize = preference_format if method in METHODS else recognize_format
    row_format = recognize(row for _at, row in found if isinstance(row, dict))
    missing = [(ours, theirs) for ours, theirs in renamed.items() if theirs not in columns]
    if row_format is None and columns and missing:
        raise ConfigError(*(_no_column(ours, theirs, columns, source.name) for ours, theirs in missing))
    good, problems = _check(found, row_format, source, method)
    if row_format is None or any(isinstance(row, UnreadRest) for _at, row in found):
        problems.raise_any()
    if row_format is None:
        raise DataError(
            _("{option}: {file} contains no rows. Give a file with at least one row.", **source.placeholders)
        )
    skipped = problems.skip_or_raise(skip, len(found))
    records = [Record({key: value for key, value in row.items() if key in row_format.keys}, at) for at, row in good]
    if not records:
        problems.raise_any()
    used = [row for _at, row in good]
    told = tuple(notes(source, row_format, used, records, len(found) - len(records)))
    warned = (*skipped, *warnings(source, row_format, used, records))
    return DataFile(source.name, row_format.name, columns, records, filled, renamed_roles, told, warned)


def _filled(found: list[tuple[str, object]], filling: Mapping[str, str]) -> frozenset[str]:
    """Fill the placeholders of the rows, in place; returns those that some row has."""
    names = set[str]()
    for number, (at, row) in enumerate(found if filling else ()):
        if isinstance(row, dict):
            names |= placeholders(row) & filling.keys()
            found[number] = at, fill(row, filling)
    return frozenset(names)


def _with_roles(found: list[tuple[str, object]], roles: Mapping[str, str]) -> frozenset[str]:
    """Rename the roles of the rows' messages, in place; returns the names that some row has."""
    names = set[str]()
    for number, (at, row) in enumerate(found if roles else ()):
        if isinstance(row, dict):
            renamed, here = rename_roles(row, roles)
            names |= here
            found[number] = at, renamed
    return frozenset(names)


def _check(
    found: Sequence[tuple[str, object]], row_format: RowFormat | None, source: Source, method: str
) -> tuple[list[tuple[str, dict[str, object]]], Problems]:
    """The rows that can be used, and the problems of the others."""
    good, problems = list[tuple[str, dict[str, object]]](), Problems(source.option)
    for done, (at, row) in enumerate(found, 1):
        if not isinstance(row, dict):
            problems.add(at, str(row) if isinstance(row, BadRow) else not_an_object(row))
        elif (text := _problem(row, row_format, method)) is not None:
            problems.add(at, text)
        else:
            good.append((at, row))
        if len(found) > REPORT_EVERY and (done % REPORT_EVERY == 0 or done == len(found)):
            source.report.progress(_("checking {file}", file=source.path.name), done, len(found))
    return good, problems


def _problem(row: Mapping[str, object], row_format: RowFormat | None, method: str) -> str | None:
    return preference_problem(row, row_format, method) if method in METHODS else row_problem(row, row_format)


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
    if is_hub_name(source.name, ROW_FILES | DOCUMENTS.keys() | UNSUPPORTED_FILES | frozenset(COMPRESSED)):
        return hub_rows(source)
    raise DataError(_missing(source))


def _file_rows(source: Source) -> Iterator[tuple[str, object]]:
    if source.suffix in UNSUPPORTED_FILES:
        raise DataError(
            _(
                "{option}: {file} is not in a supported format. Convert it to JSON, JSONL, CSV or TSV (also "
                ".gz, .zst), Parquet, Arrow, text (.txt, .md), or a folder saved by `datasets`.",
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
    for readers in (TEXT_READERS, DOCUMENTS):
        if source.suffix in readers:
            return readers[source.suffix](source)
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


def require_used(cfg: DataConfig, files: Sequence[DataFile]) -> None:
    """Raise ConfigError for columns of `data.map`, placeholders of `data.fill` and `data.roles` that no file has."""
    problems = list[str]()
    for key, theirs in cfg.map.items():
        name, _colon, ours = key.rpartition(":")
        meant = [found for found in files if not name or is_file(name, found.name)]
        if not meant:
            problems.append(_("data.map: {key}={theirs}: no file {name} is given.", key=key, theirs=theirs, name=name))
        elif text := _missing_column(ours, theirs, meant):
            problems.append(text)
    problems += [
        _("data.fill: {name}: no row contains the placeholder {mark}.", name=name, mark=f"{{{{{name}}}}}")
        for name in cfg.fill
        if not any(name in found.filled for found in files)
    ]
    problems += [
        _("data.roles: {name}: no message has this role.", name=name)
        for name in cfg.roles
        if not any(name in found.roles for found in files)
    ]
    if problems:
        raise ConfigError(*problems)


def _missing_column(ours: str, theirs: str, files: Sequence[DataFile]) -> str | None:
    columns = dict.fromkeys(column for found in files for column in found.columns)
    if theirs in columns:
        return None
    return _no_column(ours, theirs, columns, listed(found.name for found in files))


def _no_column(ours: str, theirs: str, columns: Collection[str], name: str) -> str:
    return _(
        "data.map: {ours}={theirs}: {file} has no column '{theirs}'. Its columns are {columns}.",
        ours=ours,
        theirs=theirs,
        file=name,
        columns=quoted(columns),
    )


def _renamed(row: Mapping[str, object], renamed: Mapping[str, str]) -> dict[str, object]:
    unchanged = {key: value for key, value in row.items() if key not in renamed.values()}
    return unchanged | {ours: row[theirs] for ours, theirs in renamed.items() if theirs in row}
