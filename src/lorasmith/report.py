"""What a long piece of work tells the person who waits for it. The terminal's own is cli/screen.py."""


class Report:
    """Says nothing: the default of the Python interface. Subclasses show it."""

    def say(self, text: str) -> None:
        """One finished line for the reader."""

    def warn(self, text: str) -> None:
        """One line that the reader should not miss."""

    def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
        """`done` of `total` steps of `task`; numbers: loss, tokens_per_second, seconds_left, memory_mib.

        done == total ends it.
        """


class Warnings(Report):
    """Passes on warnings and progress only: where a part says of a training what does not hold for its caller."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def warn(self, text: str) -> None:
        """To the reader."""
        self.report.warn(text)

    def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
        """To the reader."""
        self.report.progress(task, done, total, **numbers)
