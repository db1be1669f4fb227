"""The datasets that a configuration of another program names, as our data.data and data.map."""

import re
from collections.abc import Mapping
from typing import Any

from lorasmith.config.migrate.migration import Migration
from lorasmith.i18n import _

OURS = "data.data"
FIRST_ROWS = re.compile(r"train\[:([1-9]\d{0,8})\]")


class Datasets:
    """Collects files and hub names with their columns, and moves them all at once.

    key: the key of their file that names the datasets. columns: those of the training data, if these are held out;
    data.map is for all files, or for one by its name.
    """

    def __init__(self, migration: Migration, key: str, columns: dict[str, str] | None = None) -> None:
        self.migration, self.key = migration, key
        self.is_held_out = columns is not None
        self.names: list[str] = []
        self.columns = {} if columns is None else columns
        self.note = ""

    def add(self, name: str, columns: Mapping[str, str], rows: Any = None, are_first: bool = False) -> None:
        """Add a dataset, with their name of each of our columns that has another one, and the number of rows to use.

        are_first: whether their program takes these rows from the beginning.
        """
        word = name if rows is None else f"{name}#{rows}"
        if rows is not None and are_first:
            self.note = not_first()
        if word not in self.names:
            self.names.append(word)
        elif not self._is_given():
            self.migration.unmatch("twice", self.key, word)
        for ours, theirs in columns.items():
            if ours != theirs and self.columns.setdefault(ours, theirs) != theirs:
                self.columns[f"{name}:{ours}"] = theirs

    def refuse(self, reason: str, value: Any, **values: object) -> None:
        """A dataset that cannot be used, unless the command line gives the data."""
        self.migration.refuse(reason, self.key, value, unless=OURS, **values)

    def lacks(self, key: str, split: Any) -> bool:
        """Whether held-out rows are not a whole training split, which `key` then tells: they must not be other rows."""
        if not self.is_held_out or split in (None, "train"):
            return False
        self.migration.unmatch("held_out_part", key, split)
        return True

    def move(self) -> None:
        """Set data.data and data.map."""
        if self.names:
            self.migration.put(OURS, self.names, self.key, self.note)
        if self.columns and not self._is_given():
            self.migration.put("data.map", self.columns, self.key)

    def hold_out(self) -> None:
        """Set data.held_out to the first dataset."""
        if self.names:
            self.migration.put("data.held_out", self.names[0], self.key)
        if len(self.names) > 1:
            self.migration.unmatch("evaluation_files", self.key, self.names)

    def _is_given(self) -> bool:
        """Whether the command line gives the data."""
        return "data" in self.migration.given.get("data", {})


def not_first() -> str:
    """What is said of a number of rows that their program takes from the beginning."""
    return _("there the first rows; lorasmith draws them at random")


def first_rows(split: Any) -> int | None:
    """The number of rows that a split such as `train[:500]` selects; None for the whole split, or another part."""
    match = FIRST_ROWS.fullmatch(split) if isinstance(split, str) else None
    return int(match[1]) if match else None


def base_model(migration: Migration, key: str, prefix: str = "") -> None:
    """The base model: a folder that is found, or its name on the hub of `prefix`."""
    if (name := migration.take(key)) is not None:
        migration.put("model.model", local_or_hub(migration, str(name), prefix), key)


def local_or_hub(migration: Migration, name: str, prefix: str = "") -> str:
    """A file that is found as a path that works from here; any other name as it is, with the prefix of its hub."""
    path = migration.path(name)
    if path is not None:
        return str(path)
    return name if name.startswith((".", "/", "~")) else prefix + name
