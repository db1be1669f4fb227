"""The bytes of a file, unpacked where its name ends in .gz or .zst; large ones say how much of them is read."""

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

PACKED = (".gz", ".zst")
BLOCK = 1 << 20  # bytes read at once, and between two lines of progress
LARGE = 32 * BLOCK  # bytes from which on reading takes long enough to show its progress


class Broken(str):
    """What stands where a row should be: the sentence that says why it cannot be read."""


@dataclass(frozen=True)
class Source:
    """A file or data set that rows come from, the setting that named it, and who is told of the progress."""

    name: str
    option: str
    report: Report

    @property
    def path(self) -> Path:
        """As a path."""
        return Path(self.name)

    @property
    def suffix(self) -> str:
        """'.csv' of 'a.csv' and of 'a.CSV.gz'."""
        inner = Path(self.path.stem) if self.path.suffix.lower() in PACKED else self.path
        return inner.suffix.lower()

    @property
    def task(self) -> str:
        """What its progress is called."""
        return _("reading {file}", file=self.path.name)

    @property
    def said(self) -> dict[str, object]:
        """The placeholders with which a sentence about it begins: {option}: {file}."""
        return {"option": self.option, "file": self.name}

    def needed(self, package: str, extra: str = "data") -> Any:
        """An optional package, imported. Raises MissingExtraError with the way to install it."""
        try:
            return import_module(package)
        except ImportError as error:
            raise MissingExtraError(
                _(
                    "{option}: {file} requires the package {package}. Install it with: pip install "
                    "'lorasmith[{extra}]'",
                    **self.said,
                    package=package.partition(".")[0],
                    extra=extra,
                )
            ) from error


@contextmanager
def opened(source: Source) -> Iterator[BinaryIO]:
    """The unpacked bytes. Raises DataError, also while they are read, where they cannot be read or unpacked;
    MissingExtraError where .zst needs a package that is not installed.
    """
    packed = source.path.suffix.lower()
    pyarrow = source.needed("pyarrow") if packed == ".zst" else None
    try:
        with _Told(source) as file:
            if packed == ".gz":
                yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
            elif pyarrow:  # it tells a cut file, which zstandard's own reader takes for a short one
                yield cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(file, compression="zstd")))
            else:
                yield io.BufferedReader(file, BLOCK)
    except (EOFError, zlib.error, OSError) as error:
        why = foreign(error.strerror) if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(_("{option}: {file}: cannot be read: {why}", **source.said, why=why)) from error


class _Told(io.FileIO):
    """A file that tells how far it is read."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.path)
        self.source, self.size = source, source.path.stat().st_size

    def readinto(self, buffer: Any) -> int | None:
        """As FileIO's."""
        count = super().readinto(buffer)
        if self.size >= LARGE and count:
            self.source.report.progress(self.source.task, self.tell(), self.size)
        return count
