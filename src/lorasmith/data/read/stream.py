"""Open data files: decompressed if they are .gz or .zst, and with a progress report if they are large."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, cast

from lorasmith.errors import DataError, MissingExtraError
from lorasmith.i18n import _, foreign
from lorasmith.report import Report

COMPRESSED = (".gz", ".zst")
BLOCK = 1 << 20  # bytes read at once, and between two progress reports
LARGE = 32 * BLOCK  # bytes from which on progress is reported


class BadRow(str):
    """In place of a row that cannot be read: the reason, as a sentence."""


class UnreadRest(BadRow):
    """In place of the row from which on a file could not be read."""


@dataclass(frozen=True)
class Source:
    """A file or dataset to read. option: the setting that named it, for error messages; report: gets the progress."""

    name: str
    option: str
    report: Report

    @property
    def path(self) -> Path:
        """The name as a path."""
        return Path(self.name)

    @property
    def suffix(self) -> str:
        """The suffix in lower case, without that of a compression: '.csv' for 'a.csv' and 'a.CSV.gz'."""
        inner = Path(self.path.stem) if self.path.suffix.lower() in COMPRESSED else self.path
        return inner.suffix.lower()

    @property
    def task(self) -> str:
        """The title of its progress reports."""
        return _("reading {file}", file=self.path.name)

    @property
    def placeholders(self) -> dict[str, object]:
        """Values for messages that begin with '{option}: {file}'."""
        return {"option": self.option, "file": self.name}

    def import_package(self, package: str, extra: str = "data") -> Any:
        """Import an optional package. Raises MissingExtraError that says how to install it."""
        try:
            return import_module(package)
        except ImportError as error:
            raise MissingExtraError(
                _(
                    "{option}: {file} requires the package {package}. Install it with: pip install "
                    "'lorasmith[{extra}]'",
                    **self.placeholders,
                    package=package.partition(".")[0],
                    extra=extra,
                )
            ) from error


@contextmanager
def open_source(source: Source) -> Iterator[BinaryIO]:
    """Open a file for reading its decompressed bytes.

    Raises DataError, also inside the block, if it cannot be read or decompressed; MissingExtraError if .zst needs a
    package that is not installed.
    """
    packed = source.path.suffix.lower()
    pyarrow = source.import_package("pyarrow") if packed == ".zst" else None
    try:
        with _ProgressFile(source) as file:
            if packed == ".gz":
                yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
            elif pyarrow:  # zstandard's own reader does not notice a truncated file
                yield cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(file, compression="zstd")))
            else:
                yield io.BufferedReader(file, BLOCK)
    except (EOFError, zlib.error, OSError) as error:
        why = foreign(error.strerror) if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(_("{option}: {file}: cannot be read: {why}", **source.placeholders, why=why)) from error


class _ProgressFile(io.FileIO):
    """A file that reports how much of it has been read."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.path)
        self.source, self.size = source, source.path.stat().st_size

    def readinto(self, buffer: Any) -> int | None:
        """Read into `buffer`, as FileIO does, and report the progress of a large file."""
        count = super().readinto(buffer)
        if self.size >= LARGE and count:
            self.source.report.progress(self.source.task, self.tell(), self.size)
        return count
