"""Metrics that the user wrote: `my.py:score` names a function (prediction, reference) -> number."""

import math
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from lorasmith.config.values import did_you_mean
from lorasmith.errors import ConfigError
from lorasmith.evaluation.metrics import Metric, mean_metric
from lorasmith.i18n import _, listed

MAX_QUOTED = 60  # characters of a text that an error message quotes


def custom_metrics(texts: Sequence[str]) -> list[Metric]:
    """The metric that each of `texts` names. Raises ConfigError with the problems of all of them."""
    metrics, problems = list[Metric](), list[str]()
    for text in texts:
        try:
            metrics.append(custom_metric(text))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return metrics


def custom_metric(text: str) -> Metric:
    """The metric that `text` ('FILE.py:FUNCTION') names; the file is imported.

    Raises ConfigError if the file or function does not exist, or if importing the file raises. So does the returned
    metric, with file, line and both texts, if the function fails on an example or returns no finite number.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        raise ConfigError(
            _("--metric {metric}: must name a file and a function in it, such as my.py:score", metric=text)
        )
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(_("--metric {metric}: the file {file} does not exist.", metric=text, file=path))
    function = _function(_load(path, text), name, text)
    return mean_metric(text, name, lambda prediction, reference: _call(function, prediction, reference, path, text), 4)


def _load(path: Path, text: str) -> ModuleType:
    """Import the file; it can import the modules beside it, as a script can."""
    spec = spec_from_file_location(f"lorasmith_metric_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(
            _("--metric {metric}: {file} is not a Python file; its name must end in .py", metric=text, file=path)
        )
    module = module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # user code can raise anything: reported with file and line
        raise ConfigError(
            _("--metric {metric}: {where}: {why}", metric=text, where=_where(error, path), why=_why(error))
        ) from error
    finally:
        sys.path.pop(0)
    return module


def _function(module: ModuleType, name: str, text: str) -> Callable[[str, str], Any]:
    found = getattr(module, name, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    raise ConfigError(
        _("--metric {metric}: function {name!r} not found; the file defines: {known}.",
          metric=text, name=name, known=listed(known) or _("none")) + did_you_mean(name, known)
    )  # fmt: skip


def _call(function: Callable[[str, str], Any], prediction: str, reference: str, path: Path, text: str) -> float:
    """The score that the function gives to one answer."""
    texts = {"prediction": _quoted(prediction), "reference": _quoted(reference)}
    example = _("prediction {prediction!r}, reference {reference!r}", **texts)
    try:
        found = function(prediction, reference)
    except Exception as error:  # user code, as above
        names = {"metric": text, "where": _where(error, path), "why": _why(error), "example": example}
        raise ConfigError(_("--metric {metric}: {where}: {why} ({example})", **names)) from error
    if isinstance(found, Real) and math.isfinite(found):
        return float(found)
    raise ConfigError(
        _("--metric {metric}: must return a finite number, but returned {found} ({example})",
          metric=text, found=repr(found)[:MAX_QUOTED], example=example)
    )  # fmt: skip


def _where(error: Exception, path: Path) -> str:
    """'my.py line 3': the last line of the user's file that was reached."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return _("{file} line {line}", file=error.filename or path, line=error.lineno)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path.absolute()]
    return _("{file} line {line}", file=path, line=frames[-1].lineno) if frames else str(path)


def _why(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _quoted(text: str) -> str:
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "…"
