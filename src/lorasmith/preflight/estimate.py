"""Peak memory and time of a run before it begins, and what the machine has for it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from lorasmith.i18n import _, listed
from lorasmith.preflight.measured import Measured, seconds_of
from lorasmith.system.memory import expected_mib
from lorasmith.system.memory_limits import room_mib
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
            "dry step": _("measured in a dry run"),
            "training": _("measured in an earlier identical run"),
            "trial": _("estimated from a trial step on two short examples"),
        }
        if self.peak_mib is not None:
            text = _("up to about {mib:,.0f} MiB ({way})", mib=self.peak_mib, way=ways[self.by])
            if self.free_mib is not None:
                text += _("; {free:,.0f} MiB available to this process", free=self.free_mib)
            yield _("memory"), text
        if self.seconds:
            yield _("time"), self._time()

    def _time(self) -> str:
        words = {
            "start": _("startup {time}"),
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
                "the estimated {peak:,.0f} MiB exceed the {room:,.0f} MiB available to this process, so "
                "activations will be recomputed in the backward pass, which is slower. Lowering "
                "training.row_tokens also saves memory.",
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
