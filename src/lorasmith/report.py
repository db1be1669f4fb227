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
