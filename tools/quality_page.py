"""Writes docs/quality.md and docs/quality.zh.md from the results of the studies that are committed in studies/results.

    python -m tools.quality_page                write the pages and their pictures
    python -m tools.quality_page --collect      before that, copy runs/studies/*/study.json to studies/results

A result says on which processor and from which commit it was computed; results that do not flatter stay in.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasmith.i18n import _, joined, using_language
from lorasmith.pages.study import charts, picture
from lorasmith.preflight.estimate import duration
from lorasmith.runs.study.findings import axis_text, findings, verdict
from lorasmith.runs.study.result import Curve, StudyResult
from tools.pages import ROOT, notes, places, table, write
from tools.quality_claims import claims

PAGES = places("quality")
PICTURES = ROOT / "docs" / "pictures"
RESULTS = ROOT / "studies" / "results"
RUNS = ROOT / "runs" / "studies"


def main(arguments: list[str]) -> int:
    """Write everything; 0, as a program's exit code."""
    if "--collect" in arguments:
        collect()
    for name, values in results().items():
        for language in PAGES:
            with using_language(language):
                result = StudyResult.from_json(values)
                for number, chart in enumerate(charts(result), 1):
                    picture_of(name, number, language).write_text(picture(result, chart), "utf-8")
    return write(PAGES, page)


def collect() -> None:
    """Copy the results of all studies that were run here, with the commit of the code that ran them."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    RESULTS.mkdir(exist_ok=True)
    for path in sorted(RUNS.glob("*/study.json")):
        values = json.loads(path.read_text("utf-8"))
        if all(cell["state"] == "open" for cell in values["cells"]):
            continue
        target = RESULTS / f"{path.parent.name}.json"
        before = json.loads(target.read_text("utf-8")) if target.is_file() else {}
        if {key: value for key, value in before.items() if key != "commit"} != values:
            target.write_text(json.dumps({"commit": commit, **values}, indent=1, ensure_ascii=False) + "\n", "utf-8")


def results() -> dict[str, dict[str, Any]]:
    """The committed results by the name of their study, in the order of the page."""
    order = list(notes("quality")["studies"])
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in RESULTS.glob("*.json")}
    return {name: found[name] for name in sorted(found, key=order.index)}


def page(language: str) -> str:
    """The whole page in `en` or `zh`."""
    known = notes("quality")
    words = known["words"][language]
    lines = [known["head"][language], *claims(results(), language)]
    with using_language(language):
        for name, values in results().items():
            lines += _study(name, values, known["studies"][name][language], words, language)
        if not results():
            lines += [words["none"], ""]
        lines += [known["tail"][language]]
    return "\n".join(lines).rstrip() + "\n"


def picture_of(name: str, number: int, language: str) -> Path:
    """The file of a picture."""
    end = "" if language == "en" else f".{language}"
    return PICTURES / f"quality-{name}-{number}{end}.svg"


def _study(
    name: str, values: dict[str, Any], text: dict[str, str], words: dict[str, str], language: str
) -> Iterator[str]:
    """The section of a study."""
    result = StudyResult.from_json(values)
    machine = result.machine
    yield from (f"## {text['title']}", "", text["about"].strip(), "")
    numbers = {
        "runs": len(result.cells),
        "done": sum(cell.state == "finished" for cell in result.cells),
        "examples": result.examples,
        "steps": max((cell.steps or 0 for cell in result.cells), default=0),
        "processor": machine["processor"],
        "threads": machine["threads"],
        "torch": machine["torch"],
        "commit": values["commit"],
        "file": f"studies/{name}.toml",
        "result": f"studies/results/{name}.json",
    }
    yield from (words["facts"].format(**numbers), "")
    for number, _chart in enumerate(charts(result), 1):
        file = picture_of(name, number, language)
        yield from (f"![{_('Held-out loss over {axis}', axis=axis_text(result.axis))}](pictures/{file.name})", "")
    yield from (f"- {joined(found)}" for found in findings(result))
    yield ""
    yield from table(words["columns"], (_row(curve, result) for curve in result.curves if not curve.is_open))


def _row(curve: Curve, result: StudyResult) -> list[str]:
    """A curve at its best value."""
    best = curve.best
    compared, seconds, memory = best.from_best, best.mean_of("seconds"), best.mean_of("peak_memory_mib")
    is_best = result.best is not None and best.options == result.best.options
    losses = f"{best.mean:.4f}" if math.isfinite(best.mean) else _("failed")
    low, high = (compared.examples.low, compared.examples.high) if compared else (0.0, 0.0)
    return [
        curve.name,
        f"{best.options[result.axis]:g}",
        losses,
        f"{compared.difference:+.4f} [{low:+.4f}, {high:+.4f}]" if compared else "",
        _("the best") if is_best else verdict(compared),
        "" if best.forgetting is None else f"{best.forgetting:+.4f}",
        "" if seconds is None else duration(seconds),
        "" if memory is None else f"{memory:,.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
