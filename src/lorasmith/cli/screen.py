"""What a terminal shows of a long piece of work."""

from typing import Self

from lorasmith.report import Report


class Screen(Report):
    def __init__(self, json: bool = False) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass
