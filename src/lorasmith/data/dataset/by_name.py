"""Data of several adapters that are trained at once: NAME=FILE, or all files of a folder."""

import re
from collections.abc import Sequence
from pathlib import Path

from lorasmith.config.toml import Config
from lorasmith.data.dataset.sources import split_source
from lorasmith.data.read.files import ROW_FILES
from lorasmith.errors import ConfigError
from lorasmith.i18n import _

_NAME = re.compile(r"[\w][\w.-]*")
_PACKED = (".gz", ".zst")


def files_by_name(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The files of each adapter, if the words of data.data are NAME=FILE; empty if they are plain files.

    A file whose whole name has this form takes precedence. A name that is given several times has several files.

    Raises ConfigError if only some words have names.
    """
    found: dict[str, tuple[str, ...]] = {}
    plain: list[str] = []
    for word in words:
        name, equals, file = word.partition("=")
        if equals and file and _NAME.fullmatch(name) and not Path(split_source(word)[0]).expanduser().exists():
            found[name] = (*found.get(name, ()), file)
        else:
            plain.append(word)
    if found and plain:
        raise ConfigError(
            _(
                "data.data: {file} has no adapter's name, but other files do. Write NAME={file}, or remove all names.",
                file=plain[0],
            )
        )
    return found


def configs_by_name(config: Config, folder: Path | None = None) -> dict[str, Config]:
    """The options of each adapter, if the words of data.data are NAME=FILE; empty if not. Its run is `folder`/NAME."""
    found = {}
    for name, files in files_by_name(config.data.data).items():
        data = config.data.model_copy(update={"data": files})
        output = {"output": str(folder / name)} if folder else {}
        found[name] = config.model_copy(update={"data": data, **output})
    return found


def with_names(config: Config) -> Config:
    """The same options with NAME=FILE for each of the files, as `named_by_file` gives them, unless they have names."""
    if files_by_name(config.data.data):
        return config
    data = config.data.model_copy(update={"data": named_by_file(config.data.data)})
    return config.model_copy(update={"data": data})


def named_by_file(words: Sequence[str]) -> tuple[str, ...]:
    """NAME=FILE for each of these files, and for each file of rows in these folders; the name is the file's.

    Raises ConfigError for a folder without such files, and for two files with the same name.
    """
    found: dict[str, str] = {}
    for word in words:
        path = Path(word).expanduser()
        files = _rows_in(path) if path.is_dir() else [word]
        if not files:
            raise ConfigError(_("data.data: {folder} contains no files of rows, such as JSONL or CSV.", folder=word))
        for file in files:
            name = _stem(Path(split_source(file)[0]))
            if name in found:
                text = _(
                    "data.data: {file} and {other} would both be the adapter {name}. Give them names: NAME=FILE.",
                    file=found[name],
                    other=file,
                    name=name,
                )
                raise ConfigError(text)
            found[name] = file
    return tuple(f"{name}={file}" for name, file in found.items())


def _rows_in(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.iterdir()) if path.is_file() and _suffix(path) in ROW_FILES]


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _PACKED else path.suffix.lower()


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix.lower() in _PACKED else path.stem
