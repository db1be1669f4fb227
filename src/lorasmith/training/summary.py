"""What a finished run came to: RUN/summary.json, written last. Loads no torch."""

from dataclasses import dataclass
from pathlib import Path

from lorasmith.config.values import read_back
from lorasmith.errors import RunError
from lorasmith.i18n import _
from lorasmith.training.files import SUMMARY


@dataclass(frozen=True)
class Summary:
    """What a finished run came to. Losses in nats a token; they and best_step null where nothing was held out."""

    run: str
    loss_before: float | None
    loss_after: float | None
    interval: tuple[float, float] | None
    tokens_per_second: float
    peak_memory_mib: float
    seconds: float
    steps: int
    tokens: int
    trainable_parameters: int
    adapter_bytes: int
    base_bytes: int
    best_step: int | None = None  # of the adapter that is kept
    stopped_early: bool = False  # training.patience ran out; not there before 0.2

    def __str__(self) -> str:
        if self.loss_before is None or self.loss_after is None:
            return _("{steps} steps, no held-out examples", steps=self.steps)
        return _(
            "{steps} steps, held-out loss {before:.4f} -> {after:.4f}",
            steps=self.steps,
            before=self.loss_before,
            after=self.loss_after,
        )


def read_summary(folder: Path) -> Summary | None:
    """The summary of a finished run; None where the run is not finished. Raises RunError where it is broken."""
    path = folder / SUMMARY
    if not path.is_file():
        return None
    try:
        return read_back(path, Summary)
    except (OSError, ValueError) as error:
        raise RunError(
            _(
                "{path}: not what a training writes there: {error}. Remove the file; --resume then writes it again.",
                path=path,
                error=error,
            )
        ) from None
