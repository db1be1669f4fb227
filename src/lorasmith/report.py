"""How long-running work reports messages and progress. cli/screen.py has the implementation for terminals."""


class Report:
    """Ignores everything, which is the default in Python. Subclass it to show messages and progress."""

    def say(self, text: str) -> None:
        """A message."""

    def warn(self, text: str) -> None:
        """A warning."""

    def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
        """`done` of `total` units of `task` are done; the task ends when they are equal.

        numbers: any of loss, rewards/accuracies, rewards/margins, tokens_per_second, seconds_left, memory_mib.
        """


class WarningsOnly(Report):
    """Forwards warnings and progress but no messages, for callers that reuse parts of a training."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def warn(self, text: str) -> None:
        """Forward the warning."""
        self.report.warn(text)

    def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
        """Forward the progress."""
        self.report.progress(task, done, total, **numbers)


class Steps:
    """Reports the steps of a task, one by one; the task ends with the last of `total`."""

    def __init__(self, report: Report, task: str, total: int) -> None:
        self.report, self.task, self.total, self.done = report, task, total, 0

    def step(self) -> None:
        """One more is done."""
        self.done += 1
        self.report.progress(self.task, self.done, self.total)
