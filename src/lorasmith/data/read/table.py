"""Read rows from CSV, TSV, Parquet and Arrow. CSV rows know where they begin, even after cells with line breaks."""

import codecs
import csv
import sys
from collections.abc import Iterator
from typing import BinaryIO

from lorasmith.data.read.stream import BadRow, Source, UnreadRest, open_source
from lorasmith.data.rows.cells import drop_nulls
from lorasmith.data.rows.conversation import quoted
from lorasmith.errors import DataError
from lorasmith.i18n import _

SEPARATORS = {".csv": ",", ".tsv": "\t"}
ARROW_FILE = b"ARROW1"  # a stream, which `datasets` writes, has no such mark


def csv_rows(source: Source) -> Iterator[tuple[str, object]]:
    """The rows of a CSV or TSV file, with text values; a `BadRow` if the number of cells is wrong. Raises DataError."""
    csv.field_size_limit(sys.maxsize)  # a cell may be longer than the default limit of 131,072 characters
    with open_source(source) as stream:
        # strict, because otherwise an unclosed quote would silently take all following rows into its cell
        begin, reader = 1, csv.reader(_decoded(stream, source), delimiter=SEPARATORS[source.suffix], strict=True)
        try:
            header = _header(next(reader, []), source)
            begin = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield f"{source.name}:{begin}", _row(header, cells)
                begin = reader.line_num + 1
        except csv.Error as error:
            yield f"{source.name}:{begin}", UnreadRest(_broken(str(error)))


def parquet_rows(source: Source) -> Iterator[tuple[str, object]]:
    """The rows of a Parquet file. Raises DataError, or MissingExtraError if pyarrow is not installed."""
    parquet = source.import_package("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(source.path) as file:
            total = file.metadata.num_rows
            for batch in file.iter_batches(batch_size=10_000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{source.name} row {number}", drop_nulls(row)
                if total > batch.num_rows:
                    source.report.progress(source.task, number, total)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise DataError(
            _("{option}: {file} is not a valid Parquet file: {why}", **source.placeholders, why=error)
        ) from error


def arrow_rows(source: Source) -> Iterator[tuple[str, object]]:
    """The rows of an Arrow file or stream. Raises DataError, or MissingExtraError if pyarrow is not installed."""
    ipc = source.import_package("pyarrow.ipc")
    number = 0
    try:
        with source.path.open("rb") as file:
            is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
            file.seek(0)
            reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield f"{source.name} row {number}", drop_nulls(row)
    except (OSError, ValueError) as error:
        raise DataError(
            _("{option}: {file} is not a valid Arrow file: {why}", **source.placeholders, why=error)
        ) from error


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, also of one from an old Mac, where they end with a carriage return alone."""
    return (line for block in stream for line in block.splitlines(keepends=True))


def _decoded(stream: BinaryIO, source: Source) -> Iterator[str]:
    for number, line in enumerate(_lines(stream), 1):
        try:
            yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                _(
                    "{option}: {file} line {line} is not valid UTF-8. Save the file as UTF-8; Excel calls it "
                    "'CSV UTF-8'.",
                    **source.placeholders,
                    line=number,
                )
            ) from error


def _header(cells: list[str], source: Source) -> list[str]:
    names = [cell.strip() or _("column {number}", number=number) for number, cell in enumerate(cells, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            _(
                "{option}: {file}: several columns are named {names}. Give each column its own name.",
                **source.placeholders,
                names=quoted(twice),
            )
        )
    other = next((mark for mark in ";\t,|" if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        raise DataError(
            _(
                "{option}: {file}: the first line has a single column, {name}. If the cells are separated by "
                "{mark}, save the file with {wanted} instead.",
                **source.placeholders,
                name=repr(names[0]),
                mark=repr(other),
                wanted=repr(SEPARATORS[source.suffix]),
            )
        )
    return names


def _row(header: list[str], cells: list[str]) -> object:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return BadRow(
        _(
            "expected {wanted} cells as in the header ({names}), found {found}. Put cells that contain the "
            'separator or a line break in "quotes".',
            found=len(cells),
            wanted=len(header),
            names=quoted(header),
        )
    )


def _broken(why: str) -> str:
    if "end of data" in why:
        why = _("a quote is opened but never closed")
    elif "expected after" in why:
        why = _('quotes within a quoted cell must be doubled: ""')
    return _("not valid CSV: {why}. The rest of the file was not read.", why=why)
