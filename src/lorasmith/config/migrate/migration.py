"""A configuration of another program on its way to one of ours: what was taken over, what was not, and why.

The module of a program moves its keys here, one after the other; a key that no line of it mentions is reported too.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorasmith.config.migrate.reading import Foreign
from lorasmith.config.migrate.reasons import no_effect, refusal, unmatched
from lorasmith.config.toml import SECTIONS, Config
from lorasmith.config.values import check
from lorasmith.errors import ConfigError
from lorasmith.i18n import _, listed

OFF = (False, 0, "", "none", "no", "null", "None")  # values of an unknown key that ask for nothing
ABOVE = 5  # folders above their file in which its paths are looked for
SHOWN, SHOWN_ITEMS = 60, 8  # characters and items of a value that a message shows
VARIABLE = (
    re.compile(r"\$\{"),
    re.compile(r"\$[\w{(]"),
)  # in YAML, where $ also ends a regular expression; in a script
NO_VALUE: tuple[Any, ...] = (None, [], {}, "")


class Migration:
    """The keys of their file that are left, and the values of ours that are known.

    given: the options of the command line by section, which take precedence over the file.
    """

    def __init__(self, foreign: Foreign, program: str, given: Mapping[str, Any]) -> None:
        self.foreign, self.program, self.given = foreign, program, given
        self.left = {key: value for key, value in foreign.values.items() if value not in NO_VALUE}
        self.known = set(self.left)
        self.values: dict[str, Any] = {}
        self.comments: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        self.unmatched: dict[str, str] = {}
        self.no_effect: dict[str, list[str]] = {}
        self.off: list[str] = []
        self.refusals: list[str] = []
        for key, value in list(self.left.items()):
            if VARIABLE[foreign.program is not None].search(str(value) if isinstance(value, str | list) else ""):
                self.refuse("variable", key, value)
        if foreign.processes > 1:
            self.unmatch("processes", "nproc_per_node", foreign.processes, count=foreign.processes)

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which then counts as dealt with; `default` if the key is not set."""
        return self.left.pop(key, default)

    def take_part(self, key: str) -> dict[str, Any]:
        """The keys below `key`, as further keys `KEY.name`, which can be taken like the others."""
        inner = self.left.get(key)
        if not isinstance(inner, dict):
            return {}  # a value of another kind is left, and reported
        del self.left[key]
        below = {f"{key}.{name}": value for name, value in inner.items() if value not in NO_VALUE}
        self.left |= below
        self.known |= below.keys()
        return inner

    def put(self, ours: str, value: Any, key: str, note: str = "") -> None:
        """Set our option, such as "lora.r", from their `key`. Those of adapters have no effect with method full."""
        if self._is_unused(ours):
            self.ignore("inactive", [key])
            return
        if ours == "output" and _exists(Path(str(value))):
            self.unmatch("exists", key, value)
            return
        self.comments[ours] = _("from {key}", key=key) + (f"; {note}" if note else "")
        self.sources[ours] = key
        self._set(ours, value)

    def default(self, ours: str, value: Any) -> None:
        """Set our option to the default of the program, if the file did not set it."""
        if self.value(ours) is None and not self._is_unused(ours):
            self.comments[ours] = _("not set in the file; this is the default of {program}", program=self.program)
            self._set(ours, value)

    def forget(self, ours: str) -> None:
        """Undo `put` and `default`; a key of theirs that was moved counts as not taken over."""
        section, _dot, name = ours.partition(".")
        value = self.values.get(section, {}).pop(name, None)
        key = self.sources.pop(ours, None)
        self.comments.pop(ours, None)
        if key is not None:
            self.unmatch("none", key, value)

    def value(self, ours: str) -> Any:
        """The value that our option has so far, else None."""
        section, dot, name = ours.partition(".")
        return self.values.get(section, {}).get(name) if dot else self.values.get(section)

    def move(self, table: Mapping[str, str]) -> None:
        """Set our options from their keys with the same values, by a table of their key and our option."""
        for key, ours in table.items():
            if (value := self.take(key)) is not None:
                self.put(ours, value, key)

    def ignore(self, reason: str, keys: Iterable[str]) -> None:
        """Keys that have no effect here, by a name in `no_effect`; those that the file does not set are passed over."""
        for key in keys:
            if key in self.known:
                self.left.pop(key, None)
                self.no_effect.setdefault(no_effect(reason, self.program), []).append(key)

    def unmatch(self, reason: str, key: str, value: Any, **values: object) -> None:
        """A key that is not taken over, by a name in `unmatched`."""
        self.left.pop(key, None)
        self.unmatched |= {f"{key}: {shown(value)}": unmatched(reason, program=self.program, **values)}

    def refuse(self, reason: str, key: str, value: Any, unless: str = "", **values: object) -> None:
        """A key with which the file cannot be converted, by a name in `refusal`; not if `unless` is in `given`."""
        self.left.pop(key, None)
        section, _dot, name = unless.partition(".")
        if not unless or name not in self.given.get(section, {}):
            where = f"{self.foreign.path}: {key}: {shown(value)}"
            self.refusals.append(refusal(reason, where=where, program=self.program, **values))

    def refuse_all(self, reason: str, keys: Iterable[str]) -> None:
        """Refuse every key of `keys` that is set and not switched off."""
        for key in keys:
            value = self.take(key)
            if value is not None and value not in OFF:
                self.refuse(reason, key, value)

    def finish(self) -> Config:
        """Report the keys that are left. Returns our configuration. Raises ConfigError with every problem."""
        file = self.foreign.path
        for key, value in list(self.left.items()):
            if value in OFF:
                self.off.append(key)
                del self.left[key]
            else:
                self.unmatch("none", key, value)
        for ours, reason in (("model.model", "no_model"), ("data.data", "no_data")):
            section, _dot, name = ours.partition(".")
            if not self.value(ours) and name not in self.given.get(section, {}) and not self.refusals:
                self.refusals.append(refusal(reason, file=file))
        if self.refusals:
            raise ConfigError(*dict.fromkeys(self.refusals))
        merged = {**self.values, **self.given}
        for name in SECTIONS:
            merged[name] = {**self.values.get(name, {}), **self.given.get(name, {})}
            for key in self.given.get(name, {}):
                self.comments.pop(f"{name}.{key}", None)
        try:
            return check(Config, merged)
        except ConfigError as error:
            raise ConfigError(*(self._with_source(problem) for problem in error.problems)) from None

    def head(self) -> list[str]:
        """What is said at the top of the TOML file, one line each."""
        lines = [_("Converted from {file} ({program}).", file=self.foreign.path, program=self.program)]
        lines += [_("Not taken over: {key}: {why}", key=key, why=why) for key, why in self.unmatched.items()]
        lines += [_("Not needed ({why}): {keys}.", why=why, keys=listed(keys)) for why, keys in self.no_effect.items()]
        if self.off:
            lines.append(_("Switched off in the file, and unknown to lorasmith: {keys}.", keys=listed(self.off)))
        return lines

    def path(self, name: str) -> Path | None:
        """A file or folder that their file names, looked for where the command runs, then beside their file and above.

        None if it does not exist. The path is relative to the current folder if it is in it.
        """
        here = Path.cwd()
        for folder in (here, *list(self.foreign.path.absolute().parents)[:ABOVE]):
            found = Path(os.path.normpath(folder / name))
            if _exists(found):
                return found.relative_to(here) if found.is_relative_to(here) else found
        return None

    def _is_unused(self, ours: str) -> bool:
        return ours.startswith("lora.") and self.value("training.method") == "full"

    def _set(self, ours: str, value: Any) -> None:
        section, dot, name = ours.partition(".")
        if dot:
            self.values.setdefault(section, {})[name] = value
        else:
            self.values[ours] = value

    def _with_source(self, problem: str) -> str:
        """A problem of one of our options, with the file and the key that it comes from."""
        ours = problem.partition(":")[0]
        where = self.comments.get(ours, "")
        return f"{self.foreign.path}: {problem}" + (f" ({where})" if where else "")


def _exists(path: Path) -> bool:
    """Whether there is a file, or a folder that is not empty; a name that the file system refuses is none."""
    try:
        return path.is_file() or (path.is_dir() and any(path.iterdir()))
    except OSError:
        return False


def words(value: Any) -> list[str]:
    """A list of names, which may be written as one text with commas."""
    items = value if isinstance(value, list) else str(value).split(",")
    return [str(item).strip() for item in items if str(item).strip()]


def shown(value: Any) -> str:
    """A value as it stands in their file, shortened."""
    if isinstance(value, dict):
        return "{" + ", ".join([str(key) for key in value][:SHOWN_ITEMS]) + "}"
    if isinstance(value, list):
        items = [str(item) for item in value[:SHOWN_ITEMS] if not isinstance(item, list | dict)]
        value = ", ".join(items) + ("..." if len(items) < len(value) else "")
    text = str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
