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
    most = max((bar.rows for bar in checked.lengths), default=1)
    facts = list(lines(checked.facts)) if checked.facts else []
    return rendered("check.html", checked=checked, facts=facts, most=most, words=words)
