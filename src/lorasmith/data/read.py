"""Files of examples become records that know their file and line: JSON, JSONL, or a folder that `datasets` saved.

What a file is follows from its first character, not from its name: `[` begins one JSON list, anything else is JSONL.
Every bad row of a file is found before the first error is raised.
"""

import codecs
import json
import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from lorasmith.data.conversation import Conversation, Message, Problems, Record, conversation, problem
from lorasmith.errors import DataError, MissingExtraError
from lorasmith.i18n import _

__all__ = ["Conversation", "Message", "Record", "conversation", "read"]

BLANK = re.compile(r"[ \t\n\r]*")
OTHER_FORMATS = {".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".txt", ".gz", ".zip", ".zst"}


def read(path: str | Path, option: str = "data.data") -> list[Record]:
    """All rows of a file or folder, each checked to be one of the known forms.

    `option` names the setting that the path came from in what is raised: DataError, with every bad row by its line;
    MissingExtraError where a `datasets` folder is named and the package is not installed.
    """
    place = Path(path)
    if not place.exists():
        raise DataError(_missing(place, option))
    found = _folder(place, option) if place.is_dir() else _file(place, option)
    problems, records = Problems(option), []
    for source, row in found:
        if isinstance(row, Broken):
            problems.add(source, str(row))
        elif not isinstance(row, dict):
            problems.add(
                source,
                _(
                    'a row must be an object like {{"instruction": ..., "output": ...}}, found {found}.',
                    found=json.dumps(row, ensure_ascii=False)[:40],
                ),
            )
        else:
            records.append(Record(row, source))
            if (text := problem(row)) is not None:
                problems.add(source, text)
    problems.raise_any()
    if not records:
        raise DataError(_("{option}: {file} holds no rows. Name a file with at least one.", option=option, file=place))
    return records


class Broken(str):
    """What stands where a row should be: the sentence that says why it cannot be read."""


def _file(path: Path, option: str) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        start = file.read(4096)
    if not start.strip():
        raise DataError(_("{option}: {file} is empty. Name a file with at least one row.", option=option, file=path))
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(_("{option}: {file} is UTF-16. Save it as UTF-8.", option=option, file=path))
    if path.suffix.lower() in OTHER_FORMATS:
        raise DataError(
            _(
                "{option}: {file} is no JSON. JSON, JSONL and folders that `datasets` saved can be read; "
                "convert it to one of them.",
                option=option,
                file=path,
            )
        )
    if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        return _list(path, option)
    return _lines(path, option)


def _lines(path: Path, option: str) -> Iterator[tuple[str, object]]:
    """JSONL: line by line in bytes, so that only a line feed ends a row and a broken one does not hide the next."""
    first = True
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if not line.strip():
                continue
            row = _line(line)
            if first and isinstance(row, Broken):
                _refuse_one_object(path, option)
            first = False
            yield f"{path}:{number}", row


def _line(line: bytes) -> object:
    try:
        row: object = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return Broken(_("byte {byte} of the line is not UTF-8. Save the file as UTF-8.", byte=error.start + 1))
    except json.JSONDecodeError as error:
        return Broken(_("not valid JSON at column {column}: {why}.", column=error.colno, why=error.msg))
    except RecursionError:
        return Broken(_("nested too deeply to be a row."))
    return row


def _refuse_one_object(path: Path, option: str) -> None:
    """A file that is one object over many lines: say that, instead of a problem for each of its lines."""
    try:
        whole = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return
    keys = ", ".join(f"'{key}'" for key in whole) if isinstance(whole, dict) else ""
    raise DataError(
        _(
            "{option}: {file} is one object ({keys}), not rows. Write a list of rows in [ ], or one row on each line.",
            option=option,
            file=path,
            keys=keys,
        )
    )


def _list(path: Path, option: str) -> Iterator[tuple[str, object]]:
    """One JSON list: item by item, so that each knows the line where it begins."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            _("{option}: {file} line {line} is not UTF-8. Save the file as UTF-8.", option=option, file=path, line=line)
        ) from error
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _after_blank(text, text.index("[") + 1)
    end = "]" if text[at : at + 1] == "]" else ","
    while end == ",":
        line, counted = line + text.count("\n", counted, at), at
        try:
            item, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(_broken(path, option, text, error.pos, error.msg)) from error
        yield f"{path}:{line}", item
        at = _after_blank(text, at)
        end = text[at : at + 1]
        if end not in (",", "]"):
            raise DataError(_broken(path, option, text, at, _("a comma or the closing ] is missing")))
        at = _after_blank(text, at + 1) if end == "," else at
    rest = _after_blank(text, at + 1)
    if rest < len(text):
        raise DataError(_broken(path, option, text, rest, _("something follows after the list's closing ]")))


def _broken(path: Path, option: str, text: str, at: int, why: str) -> str:
    if at >= len(text.rstrip()):
        why = _("the file ends in the middle of the list; was it cut when it was copied?")
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    return _(
        "{option}: {file} line {line}, column {column}: not valid JSON: {why}.",
        option=option,
        file=path,
        line=line,
        column=column,
        why=why.rstrip("."),
    )


def _after_blank(text: str, at: int) -> int:
    match = BLANK.match(text, at)
    return match.end() if match else at


def _folder(path: Path, option: str) -> Iterator[tuple[str, object]]:
    """A folder that `datasets` saved; the package is imported only once the folder is known to be one."""
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text("utf-8")).get("splits", [])
        named = ", ".join(str(path / split) for split in splits)
        raise DataError(
            _("{option}: {file} holds several data sets. Name one: {named}.", option=option, file=path, named=named)
        )
    if not (path / "state.json").exists():
        files = sorted(child.name for child in path.iterdir() if child.suffix.lower() in (".json", ".jsonl"))
        hint = _("Name a file in it: {files}.", files=", ".join(files[:5])) if files else _("Name a file.")
        raise DataError(
            _("{option}: {file} is a folder that `datasets` did not save.", option=option, file=path) + " " + hint
        )
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise MissingExtraError(
            _(
                "{option}: {file} is a folder of `datasets`, which is not installed: pip install 'lorasmith[data]'",
                option=option,
                file=path,
            )
        ) from error
    try:
        rows = load_from_disk(os.fspath(path))
    except (OSError, ValueError) as error:
        raise DataError(
            _("{option}: {file}: `datasets` cannot read it: {why}", option=option, file=path, why=error)
        ) from error
    return ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))


def _missing(path: Path, option: str) -> str:
    """The sentence for a path that is not there, with what is nearby."""
    text = _("{option}: {file}: no such file or folder.", option=option, file=path)
    parent = path.parent
    if not parent.is_dir():
        return text + " " + _("There is no folder {folder} either.", folder=parent)
    near = get_close_matches(path.name, [child.name for child in parent.iterdir()], 1)
    near = near or [child.name for child in sorted(parent.iterdir()) if child.stem == path.stem][:1]
    return text + " " + _("Did you mean {near}?", near=parent / near[0]) if near else text
