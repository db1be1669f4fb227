"""What `check` found as one HTML file that needs nothing else, to send to a colleague."""

from pathlib import Path

from lorasmith.i18n import _
from lorasmith.pages.page import rendered
from lorasmith.preflight.check import Checked
from lorasmith.preflight.facts import lines
from lorasmith.training.checkpoint import write_file


def write_page(checked: Checked, file: Path) -> None:
    """Write the page; raises RunError where it cannot be written."""
    write_file(file, page(checked), is_run=False)


def page(checked: Checked) -> str:
    """The page as text. Everything from outside is escaped."""
    words = {
        "title": _("Before the training"),
        "problems": _("To mend first"),
        "warnings": _("Warnings"),
        "facts": _("What would happen"),
        "notes": _("What was done to the rows"),
        "lengths": _("Lengths in tokens"),
        "cut": _("cut here"),
        "rows": _("Rows: green is learned, the framed token is where a reply stops"),
        "tokens": _("tokens"),
        "learned": _("learned"),
        "no_stop": _("NO stop token at its end, because it was cut"),
        "ready": _("A training can begin."),
    }
    most = max((bar.rows for bar in checked.lengths), default=1)
    facts = list(lines(checked.facts)) if checked.facts else []
    return rendered("check.html", checked=checked, facts=facts, most=most, words=words)
