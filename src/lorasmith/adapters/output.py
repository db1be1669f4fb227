"""The folder that an export writes: locked, never a folder of others, and under its name only when it is complete."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorasmith.errors import RunError
from lorasmith.i18n import _
from lorasmith.system.locking import locked
from lorasmith.system.ownership import Kind, foreign_entries, is_marked, mark, marked_files, short_list
from lorasmith.system.writing import recover, write_folder, writing


@dataclass(frozen=True)
class OutputFolder:
    """A folder that only this process writes. Made by `output_folder`. kind: what it will contain."""

    path: Path
    overwrite: bool
    kind: Kind = "model"

    def spare(self, sources: Iterable[Path]) -> None:
        """Raise RunError if replacing the folder would remove any of `sources`, which are still needed."""
        target = self.path.resolve()
        for source in (source.resolve() for source in sources):
            if source.is_relative_to(target):
                raise RunError(
                    _(
                        "{folder} contains files that are still needed ({part}). Choose another --output.",
                        folder=self.path,
                        part=source,
                    )
                )

    def write(self, fill: Callable[[Path], None]) -> None:
        """Let `fill` write the files into an empty folder, which then gets the name. Raises RunError."""

        def fill_and_mark(staging: Path) -> None:
            fill(staging)
            mark(staging, self.kind, sorted(str(one.relative_to(staging)) for one in staging.rglob("*")))
            self.require_replaceable()  # another process may have written there in the meantime

        write_folder(self.path.resolve(), fill_and_mark, is_run=False)

    def require_replaceable(self) -> None:
        """Raise RunError if the folder exists and must not be replaced, or contains files that no export wrote."""
        folder = self.path
        if folder.exists() and not folder.is_dir():
            raise RunError(_("{folder} is a file, not a folder. Choose another --output.", folder=folder))
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not self.overwrite:
            raise RunError(
                _("{folder} already exists. Choose another --output, or replace it with --overwrite.", folder=folder)
            )
        if not is_marked(folder, self.kind):
            raise RunError(
                _(
                    "{folder} was not written by lorasmith, so --overwrite does not replace it. Choose another "
                    "--output, or remove the folder yourself.",
                    folder=folder,
                )
            )
        files = marked_files(folder)
        if others := foreign_entries(folder, lambda path: str(path) in files):
            raise RunError(
                _(
                    "{folder} contains {names}, which lorasmith did not write, so --overwrite does not replace it. "
                    "Move what you want to keep, remove the rest, or choose another --output.",
                    folder=folder,
                    names=short_list(others),
                )
            )


@contextmanager
def output_folder(path: str | Path, overwrite: bool, kind: Kind = "model") -> Iterator[OutputFolder]:
    """Lock the folder that is to be written, and undo what a killed process left there.

    Raises RunError if another process holds the lock, or if the folder cannot be written or must not be replaced.
    """
    output = OutputFolder(Path(path).expanduser(), overwrite, kind)
    place = output.path.resolve()  # follow a link, and give "." a name
    with ExitStack() as stack:
        with writing(output.path, is_run=False):
            stack.enter_context(locked(place.parent / f".{place.name}.lorasmith-lock", output.path))
            recover(place.parent, lambda name: name == place.name)
        output.require_replaceable()
        yield output
