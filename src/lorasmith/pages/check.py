"""The result of `lorasmith check` as a self-contained HTML page."""

from pathlib import Path

from lorasmith.i18n import _
from lorasmith.pages.page import render_template
from lorasmith.preflight.check import CheckResult
from lorasmith.preflight.facts import labeled_facts
from lorasmith.system.writing import write_file


def write_page(result: CheckResult, file: Path) -> None:
    """Write the page. Raises RunError if it cannot be written."""
    write_file(file, render_page(result), is_run=False)


def render_page(result: CheckResult) -> str:
    """The page as HTML. Texts of the data are escaped."""
    words = {
        "title": _("Preflight check"),
        "problems": _("Problems to fix first"),
        "warnings": _("Warnings"),
        "facts": _("Training plan"),
        "notes": _("Data processing"),
        "lengths": _("Lengths in tokens"),
        "cut": _("truncated"),
        "rows": _("Rows: green text is trained on; a boxed token ends a reply"),
        "tokens": _("tokens"),
        "learned": _("trained on"),
        "no_stop": _("it does NOT end with a stop token, because it was truncated"),
        "ready": _("Ready to train."),
    }
    most = max((bar.rows for bar in result.lengths), default=1)
    facts = list(labeled_facts(result.facts)) if result.facts else []
    return render_template("check.html", checked=result, facts=facts, most=most, words=words)
