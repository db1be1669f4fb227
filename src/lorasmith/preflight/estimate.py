"""Peak memory and time of a run before it begins, and what the machine has for it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from lorasmith.i18n import _, listed
from lorasmith.preflight.measured import Measured, seconds_of
from lorasmith.system.memory import expected_mib, room_mib
from lorasmith.training import loop
from lorasmith.training.loop import Job


@dataclass(frozen=True)
class Expected:
    """`peak_mib`: of the process; `free_mib`: what it can have in all; `seconds`: of the run's parts. None: unknown.

    `by`: what is known from: a 'dry step', a whole 'training' before, or the 'trial' of two short examples.
    `recompute`: whether activations are computed again in backward.
    """

    peak_mib: float | None = None
    free_mib: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    by: str = "trial"
    recompute: bool = False
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[tuple[str, str]]:
        """(label, sentence)."""
        ways = {
            "dry step": _("from a dry step"),
            "training": _("from the same training before"),
            "trial": _("from a trial of two short examples"),
        }
        if self.peak_mib is not None:
            text = _("about {mib:,.0f} MiB at most, {way}", mib=self.peak_mib, way=ways[self.by])
            if self.free_mib is not None:
                text += _("; this process can have {free:,.0f} MiB", free=self.free_mib)
            yield _("memory"), text
        if self.seconds:
            yield _("time"), self._time()

    def _time(self) -> str:
        words = {
            "start": _("start {time}"),
            "training": _("training {time}"),
            "evaluation": _("evaluation {time}"),
            "saving": _("saving {time}"),
        }
        parts = listed(words[part].format(time=duration(s)) for part, s in self.seconds.items())
        return _("about {time} ({parts})", time=duration(sum(self.seconds.values())), parts=parts)


def expect(job: Job, measured: Measured | None, recompute: bool) -> Expected:
    """What is to be expected of `job`; where the memory is not enough, activations are to be computed again.

    `recompute`: they are in any case, and the trial then foretells nothing, because it did not.
    """
    if measured is not None:
        peak, by = measured.peak_mib, str(measured.by)
    elif recompute:
        return Expected(recompute=True)
    else:
        found = expected_mib(job.base, loop.heaviest_row(job), job.parameters.values.numel())
        if found is None:
            return Expected()
        peak, by = found, "trial"
    seconds = seconds_of(job, measured) if measured else {}
    room, warnings = room_mib(job.base.device), list[str]()
    if room is not None and peak > room and not recompute:
        recompute = True
        warnings.append(
            _(
                "{peak:,.0f} MiB are more than the {room:,.0f} MiB that this process can have: activations will be "
                "computed again in backward, which is slower. A smaller training.row_tokens needs less memory too.",
                peak=peak,
                room=room,
            )
        )
    return Expected(peak, room, seconds, by, recompute, warnings)


def duration(seconds: float) -> str:
    """4 s, 1 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return _("{s} s", s=whole)
    if whole < 3600:
        return _("{min} min {s:02} s", min=whole // 60, s=whole % 60)
    return _("{h} h {min:02} min", h=whole // 3600, min=whole % 3600 // 60)
