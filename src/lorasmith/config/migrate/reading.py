"""Read a configuration of another program: YAML, JSON, or a shell script with its command.

Numbers such as 1e-4 are numbers, as in YAML 1.2; PyYAML alone would read them as text. Loads no torch.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import yaml

from lorasmith.config.files import MAX_DEPTH, read_object, read_text
from lorasmith.errors import ConfigError, first_line
from lorasmith.i18n import _

# The commands that train, in the order of their words, and the program that each belongs to.
COMMANDS = {
    ("llamafactory-cli", "train"): "LLaMA-Factory",
    ("lmf", "train"): "LLaMA-Factory",
    ("swift", "sft"): "ms-swift",
    ("swift", "pt"): "ms-swift",
    ("swift", "rlhf"): "ms-swift",
    ("swift/cli/sft.py",): "ms-swift",
    ("swift/cli/pt.py",): "ms-swift",
    ("swift/cli/rlhf.py",): "ms-swift",
    ("trl", "sft"): "TRL",
    ("trl", "dpo"): "TRL",
    ("trl", "kto"): "TRL",
    ("scripts/sft.py",): "TRL",
    ("scripts/dpo.py",): "TRL",
    ("scripts/kto.py",): "TRL",
    ("scripts/orpo.py",): "TRL",
    ("scripts/cpo.py",): "TRL",
    ("mlx_lm.lora",): "mlx-lm",
    ("mlx_lm", "lora"): "mlx-lm",
}
ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
DEFAULT = re.compile(r"\$\{(\w+):-([^}]*)\}")
DIVISION = re.compile(r"\$\(expr (\d{1,9}) / \$?\{?(\w{1,99})\}?\)")
WHOLE_NUMBER = re.compile(r"^(\w+)=(\d{1,9})$", re.MULTILINE)
# Flags of torchrun and variables whose product is the number of processes.
PROCESSES = {
    "NPROC_PER_NODE": re.compile(r"--nproc[_-]per[_-]node[= ](\d+)"),
    "NUM_PROCESSES": re.compile(r"--num[_-]processes[= ](\d+)"),
    "NNODES": re.compile(r"--nnodes[= ](\d+)"),
}
NUMBER = re.compile(r"[1-9]\d{0,5}")
YES = ("1", "on", "t", "true", "y", "yes")  # values of an environment variable
MAX_VALUES = 100_000  # in one file, with every alias counted as what it stands for
WITHIN, STANDS_FOR = re.compile(r"(?<=\S)#"), "\ue000"  # a `#` that begins no comment
END = re.compile(r"[|;&].*|\d?>.*|<[^>]*")  # a word that ends a command; <think> does not
FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Foreign:
    """The keys and values of another program's file, and what only a shell script says.

    program: whose command it is; verb: the last word of that command, such as sft; processes: how many it starts;
    environment: the variables that the script sets for it.
    """

    path: Path
    values: dict[str, Any]
    program: str | None = None
    verb: str = ""
    processes: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)

    def is_on(self, variable: str) -> bool:
        """Whether the script switches something on by an environment variable."""
        return self.environment.get(variable, "").lower() in YES


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """PyYAML's safe loader, which also reads 1e-4 as a number, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping. Raises MarkedYAMLError for a key that occurs twice; keys merged by << may be replaced."""
        known = set[str]()
        for key, _value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in known:
                    text = _("the key {key!r} is given twice", key=key.value)
                    raise yaml.MarkedYAMLError(problem=text, problem_mark=key.start_mark)
                known.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"^{FLOAT.pattern}$"), list("-+.0123456789"))


def read_foreign(path: Path) -> Foreign:
    """The keys and values of a file, by its suffix. Raises ConfigError with the file and, if known, the line."""
    if path.suffix.lower() == ".json":
        return Foreign(path, read_object(path, ConfigError))
    text = read_text(path, ConfigError)
    if path.suffix.lower() in (".sh", ".bash"):
        return _command(path, text)
    values = _yaml(path, text)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(
            _("{file}: must hold keys and values, as in `lora_rank: 8`, and keys must be text.", file=path)
        )
    return Foreign(path, values)


def scalar(word: str) -> Any:
    """A word of a command line as the value that it would be in YAML: 8, 1e-4, true, or text."""
    try:
        value = yaml.load(word, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return word
    return value if isinstance(value, bool | int | float | dict) else word


def _yaml(path: Path, text: str) -> Any:
    """The value of a YAML text. Raises ConfigError."""
    try:
        value = yaml.load(text, _Loader)
        if not _is_small(value):
            raise RecursionError
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = 0 if mark is None else mark.line + 1
        raise ConfigError(
            _(
                "{file} line {line}: invalid YAML: {why}. Correct the file.",
                file=path,
                line=line,
                why=error.problem or first_line(error),
            )
        ) from None
    except RecursionError:
        why = _("nested too deeply")
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        why = first_line(error).rstrip(".")
    raise ConfigError(_("{file}: invalid YAML: {why}. Correct the file.", file=path, why=why))


def _is_small(value: Any) -> bool:
    """Whether a value can be walked: aliases of YAML can make a small file endlessly deep or large."""
    left, count = [(value, 0)], 0
    while left:
        one, depth = left.pop()
        count += 1
        inside = [*one, *one.values()] if isinstance(one, dict) else one if isinstance(one, list) else []
        left += [(item, depth + 1) for item in inside]
        if depth > MAX_DEPTH or count > MAX_VALUES:
            return False
    return True


def _command(path: Path, text: str) -> Foreign:
    """The flags of the one training command in a shell script. Raises ConfigError."""
    variables: dict[str, str] = {}
    exported: set[str] = set()
    found: list[tuple[list[str], dict[str, str], tuple[str, ...], list[str]]] = []
    for words in _lines(path, text):
        exported |= {word.partition("=")[0] for word in words[1:] if words[0] == "export"}
        pairs = [ASSIGNMENT.fullmatch(word) for word in words if word != "export"]
        if all(pairs):
            variables |= _assigned(words, variables)
        elif (start := _find(words)) is not None:
            command, at = start
            rest = [_filled(word, variables) for word in words[at + len(command) :]]
            inherited = {name: variables[name] for name in exported & variables.keys()}
            before = [_filled(word, variables) for word in words[:at]]
            found.append((before, inherited | _assigned(words[:at], variables), command, rest))
    if len(found) != 1:
        known = ", ".join(" ".join(command) for command in COMMANDS)
        raise ConfigError(
            _(
                "{file}: must contain one training command, found {count}; looked for: {known}.",
                file=path,
                count=len(found),
                known=known,
            )
        )
    before, environment, command, words = found[0]
    return Foreign(
        path,
        _flags(path, words),
        COMMANDS[command],
        verb=command[-1].rpartition("/")[2].removesuffix(".py"),
        processes=_processes(" ".join(before), environment),
        environment=environment,
    )


def _assigned(words: Sequence[str], variables: dict[str, str]) -> dict[str, str]:
    """The variables that the words of a line set, without the `;` after it."""
    pairs = [ASSIGNMENT.fullmatch(word) for word in words]
    return {pair[1]: _filled(pair[2].rstrip(";"), variables) for pair in pairs if pair}


def _processes(before: str, environment: Mapping[str, str]) -> int:
    """The number of processes on all machines, by the words before the command or the variables set for it."""
    count = 1
    for variable, flag in PROCESSES.items():
        match = flag.search(before)
        number = match[1] if match else environment.get(variable, "")
        count *= int(number) if NUMBER.fullmatch(number) else 1
    return count


def _filled(word: str, variables: dict[str, str]) -> str:
    """A word with the values of the variables that the script sets."""
    word = DEFAULT.sub(lambda match: variables.get(match[1], match[2]), word)
    return Template(word).safe_substitute(variables)


def _lines(path: Path, text: str) -> Iterator[list[str]]:
    """The words of each logical line that is not empty. Raises ConfigError for a quote that is not closed."""
    lines, number = _divided(text.replace("\r\n", "\n")).split("\n"), 0
    while number < len(lines):
        first, line = number, lines[number]
        number += 1
        while number < len(lines) and (line.endswith("\\") or _is_open(line)):
            line = f"{line[:-1]} {lines[number]}" if line.endswith("\\") else f"{line}\n{lines[number]}"
            number += 1
        try:
            words = _words(line)
        except ValueError:
            raise ConfigError(
                _("{file} line {line}: a quotation mark is not closed. Correct the file.", file=path, line=first + 1)
            ) from None
        if words:
            yield words


def _words(line: str) -> list[str]:
    """The words of a line up to its comment; unlike in shlex, a `#` within a word is part of it, as in a shell."""
    words = shlex.split(WITHIN.sub(STANDS_FOR, line), comments=True)
    return [word.replace(STANDS_FOR, "#") for word in words]


def _divided(text: str) -> str:
    """A script with the values of `$(expr 16 / $NPROC)`, the accumulation for a total number of examples."""
    numbers = dict(WHOLE_NUMBER.findall(text))

    def quotient(match: re.Match[str]) -> str:
        divisor = str(numbers.get(match[2], match[2]))
        return str(int(match[1]) // int(divisor)) if divisor.isdecimal() and int(divisor) else match[0]

    return DIVISION.sub(quotient, text)


def _is_open(line: str) -> bool:
    """Whether a quotation mark of the line is not closed in it."""
    try:
        _words(line)
    except ValueError:
        return True
    return False


def _find(words: Sequence[str]) -> tuple[tuple[str, ...], int] | None:
    """The training command that a line runs, and the index of its first word."""
    for at in range(len(words)):
        for command in COMMANDS:
            there = words[at : at + len(command)]
            if len(there) == len(command) and all(
                word == wanted or word.endswith(f"/{wanted}") for word, wanted in zip(there, command, strict=True)
            ):
                return command, at
    return None


def _flags(path: Path, words: Sequence[str]) -> dict[str, Any]:
    """The flags with their values: True without one, a list of several. Raises ConfigError."""
    values: dict[str, Any] = {}
    lists: dict[str, list[Any]] = {}
    current = ""
    for word in words:
        if END.fullmatch(word):
            break
        if word.startswith("--"):
            current, equals, value = word[2:].partition("=")
            current = current.replace("-", "_")
            if current == "config":
                continue
            lists[current] = [scalar(value)] if equals else []
        elif current in ("", "config"):
            raise ConfigError(
                _(
                    "{file}: the command takes its options from {word}. Convert that file with lorasmith init "
                    "--from {word}",
                    file=path,
                    word=word,
                )
            )
        else:
            lists[current].append(scalar(word))
    for key, found in lists.items():
        values[key] = True if not found else found[0] if len(found) == 1 else found
    return values
