"""Which texts of the package a user meets as an error, and under which class: read from the code, without running it.

A text belongs to an error where it is an argument of it, is added to a `Problems` or is a `Broken` row, or reaches one
of these by way of variables, lists that are appended to, and functions that return or yield it.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "lorasmith"
FACADE = ("peft/", "lora/rows.py")  # whose ValueErrors are those of PEFT
# Functions whose texts another part raises: by module, name and class.
HANDED_ON = (
    ("cli/flags.py", "read", "ConfigError"),
    ("config/files.py", "_unreadable", "ConfigError"),
    ("config/files.py", "_not_a_text", "ConfigError"),
    ("config/files.py", "_not_json", "AdapterError"),
    ("config/files.py", "_not_json", "ModelError"),
    ("config/files.py", "_not_json", "RunError"),
    ("config/files.py", "_not_an_object", "AdapterError"),
    ("config/files.py", "_not_an_object", "ModelError"),
    ("data/rows/formats.py", "_alpaca_problem", "DataError"),
    ("data/rows/formats.py", "_prompt_problem", "DataError"),
    ("data/rows/formats.py", "_plain_problem", "DataError"),
)
# What pydantic and argparse catch, and config/values.py and cli/flags.py turn into a ConfigError.
ALIASES = {"ValueError": "ConfigError", "ArgumentTypeError": "ConfigError"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class ErrorText:
    """One text, its class in errors.py, and its module as a path."""

    text: str
    error: str
    module: str


@dataclass
class Package:
    """All functions by module and name, where an imported name comes from, and the bases of all classes."""

    functions: dict[tuple[str, str], list[Function]] = field(default_factory=dict)
    imports: dict[tuple[str, str], str] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)

    def read(self, module: str, tree: ast.Module) -> None:
        """Learns what a module defines and imports."""
        for node in ast.walk(tree):
            if isinstance(node, Function):
                self.functions.setdefault((module, node.name), []).append(node)
            elif isinstance(node, ast.ClassDef):
                self.bases[node.name] = _name(node.bases[0]) if node.bases else ""
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorasmith."):
                home = str(node.module).removeprefix("lorasmith.").replace(".", "/") + ".py"
                self.imports |= {(module, alias.asname or alias.name): home for alias in node.names}

    def named(self, module: str, name: str) -> list[tuple[str, Function]]:
        """The functions that `name` means in a module: its own, else the imported one."""
        home = module if (module, name) in self.functions else self.imports.get((module, name), "")
        return [(home, function) for function in self.functions.get((home, name), [])]

    def error_class(self, name: str) -> str | None:
        """The class of errors.py that `name` is or extends; None where it is no error of ours."""
        name, passed = ALIASES.get(name, name), set[str]()
        while name in self.bases and self.bases[name] not in ("LorasmithError", "Exception") and name not in passed:
            passed.add(name)  # a class may extend one of its own name, of another package
            name = self.bases[name]
        return name if self.bases.get(name) == "LorasmithError" else None


@cache
def error_texts() -> tuple[ErrorText, ...]:
    """Every text with its class, in the order of class, module and line."""
    package, trees = Package(), {}
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name == "i18n.py":
            continue  # its functions put texts together, so what they are given is followed
        module = path.relative_to(SOURCE).as_posix()
        trees[module] = ast.parse(path.read_text("utf-8"))
        package.read(module, trees[module])
    found: dict[ErrorText, tuple[str, int]] = {}
    for module, tree in trees.items():
        for function in ast.walk(tree):
            if isinstance(function, Function):
                for raised, error in _raises(function, package, is_facade=module.startswith(FACADE)):
                    _Flow(package, error, found).follow(module, function, raised)
    for module, name, error in HANDED_ON:
        if (module, name) not in package.functions:
            raise KeyError(f"HANDED_ON: {module} has no function {name}")
        _Flow(package, error, found).called(module, name)
    return tuple(sorted(found, key=lambda one: (one.error, one.module, found[one])))


def _raises(function: Function, package: Package, is_facade: bool) -> Iterator[tuple[ast.AST, str]]:
    """Where an error is made, to be raised here or by who asked for it, and where a bad row's text is kept for one.

    In FACADE a ValueError is raised as PEFT raises it, and nobody turns it into another.
    """
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        name = _name(node.func)
        if name == "Broken" or (name == "add" and _names(node.func) == {"problems"}):
            yield node.args[-1], "DataError"
        elif (name not in ALIASES or (_has_text(node) and not is_facade)) and (error := package.error_class(name)):
            yield node, error


class _Flow:
    """Walks back from a raise of one class to the texts that reach it."""

    def __init__(self, package: Package, error: str, found: dict[ErrorText, tuple[str, int]]) -> None:
        self.package, self.error, self.found = package, error, found
        self.seen: set[tuple[int, str]] = set()

    def follow(self, module: str, scope: Function, value: ast.AST) -> None:
        """Notes the texts in `value`, a part of the function `scope`, and follows its names."""
        if isinstance(value, ast.Call) and _name(value.func) == "_" and _is_literal(value):
            self._note(module, value)
            return  # what is filled into a text is a part of it
        if isinstance(value, ast.Name):
            self._variable(module, scope, value.id)
        if isinstance(value, ast.Attribute) and self._part(module, scope, value):
            return
        if isinstance(value, ast.Call) and self.called(module, _name(value.func)):
            return  # what a function of ours is given is not what it says
        for below in ast.iter_child_nodes(value):
            if not (isinstance(value, ast.IfExp) and below is value.test):  # a condition is not said
                self.follow(module, scope, below)

    def _note(self, module: str, call: ast.Call) -> None:
        text = ast.literal_eval(call.args[0])
        self.found.setdefault(ErrorText(text, self.error, module), (module, call.lineno))

    def _variable(self, module: str, scope: Function, name: str) -> None:
        if (id(scope), name) in self.seen:
            return
        self.seen.add((id(scope), name))
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(name in _names(target) for target in targets):
                    self.follow(module, scope, node.value)
            elif isinstance(node, ast.For | ast.comprehension) and name in _names(node.target):
                self.follow(module, scope, node.iter)
            elif isinstance(node, ast.Call):
                self._filled(module, scope, node, name)

    def _part(self, module: str, scope: Function, value: ast.Attribute) -> bool:
        """Follows `made.part` to the `part=` alone where a function made it as `Made(part=...)`; whether one did."""
        made = [
            (home, function, keyword.value)
            for given in ast.walk(scope)
            if isinstance(given, ast.Assign) and isinstance(given.value, ast.Call)
            if _names(value.value) & {name for target in given.targets for name in _names(target)}
            for home, function in self.package.named(module, _name(given.value.func))
            for node in ast.walk(function)
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Call)
            for keyword in node.value.keywords
            if keyword.arg == value.attr
        ]
        for home, function, part in made:
            self.follow(home, function, part)
        return bool(made)

    def _filled(self, module: str, scope: Function, call: ast.Call, name: str) -> None:
        """`name.append(...)`, or a function that is handed `name` and may fill it."""
        if isinstance(call.func, ast.Attribute) and name in _names(call.func.value) and call.func.attr in FILLING:
            for argument in call.args:
                self.follow(module, scope, argument)
        for place, argument in enumerate(call.args):
            if isinstance(argument, ast.Name) and argument.id == name:
                for home, function in self.package.named(module, _name(call.func)):
                    parameters = [one.arg for one in function.args.args if one.arg != "self"]
                    if place < len(parameters):
                        self._variable(home, function, parameters[place])

    def called(self, module: str, name: str) -> bool:
        """Follows what the functions of this name return; whether there are any."""
        functions = self.package.named(module, name)
        for home, function in functions:
            if (id(function), "") not in self.seen:
                self.seen.add((id(function), ""))
                for node in ast.walk(function):
                    if isinstance(node, ast.Return | ast.Yield | ast.YieldFrom) and node.value:
                        self.follow(home, function, node.value)
        return bool(functions)


FILLING = ("append", "extend", "add", "insert", "setdefault", "update")


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _names(node: ast.AST) -> set[str]:
    return {below.id for below in ast.walk(node) if isinstance(below, ast.Name)}


def _is_literal(call: ast.Call) -> bool:
    return bool(call.args) and isinstance(call.args[0], ast.Constant)


def _has_text(call: ast.Call) -> bool:
    return any(isinstance(node, ast.Call) and _name(node.func) == "_" for node in ast.walk(call))
