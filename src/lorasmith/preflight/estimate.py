"""Estimates of the peak memory and the time of a run before it begins, and of the memory that is available for it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from lorasmith.i18n import _, listed
from lorasmith.loading.weights import weights_mib
from lorasmith.lora.quantized_weight import PIECE
from lorasmith.model.base import Base
from lorasmith.model.head import FROZEN_CHUNK
from lorasmith.model.row import Row
from lorasmith.preflight.measurements import Measurement, estimate_seconds
from lorasmith.system.memory import memory_mib, usable_mib
from lorasmith.training import loop
from lorasmith.training.full import GRADIENT, MOMENTS
from lorasmith.training.loop import Job

# Measured with 135M parameters in bfloat16, rows of 900 and 1,400 tokens, 32 and 16 steps: 1,540 and 1,740 MiB.
GROWTH = 1.9  # memory that compiling kernels for ever new shapes adds, relative to the activations of the heaviest row
GROWTH_STEPS = 12  # steps after which nearly all of it has been added
UNSEEN = 260  # MiB that a trial on two short examples does not show: evaluation rows of 2,048 tokens, and a checkpoint


@dataclass(frozen=True)
class Estimate:
    """What a run will need.

    peak_mib: peak memory of the process; free_mib: memory that the process can have in all; None if unknown.
    seconds: time of each part of the run; empty if unknown.
    by: its source: a 'dry step', an earlier identical 'training', or a 'trial' on two short examples.
    recompute: whether activations are recomputed in the backward pass.
    """

    peak_mib: float | None = None
    free_mib: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    by: str = "trial"
    recompute: bool = False
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[tuple[str, str]]:
        """The estimate for display: (label, sentence)."""
        sources = {
            "dry step": _("measured in a dry run"),
            "training": _("measured in an earlier identical run"),
            "trial": _("estimated from a trial step on two short examples"),
        }
        if self.peak_mib is not None:
            text = _("up to about {mib:,.0f} MiB ({way})", mib=self.peak_mib, way=sources[self.by])
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


def estimate(job: Job, measurement: Measurement | None, recompute: bool) -> Estimate:
    """Estimate `job` from a measurement, or else from the trial step on two short examples that `assemble` made.

    If the memory is not enough, the estimate asks for activations to be recomputed. recompute: they are in any case;
    the trial step then tells nothing, because it did not recompute.
    """
    if measurement is not None:
        peak, by = measurement.peak_mib, str(measurement.by)
    elif recompute:
        return Estimate(recompute=True)
    else:
        found = estimate_peak_mib(job.base, loop.heaviest_row(job), _state_bytes(job))
        if found is None:
            return Estimate()
        peak, by = found, "trial"
    seconds = estimate_seconds(job, measurement) if measurement else {}
    room, warnings = usable_mib(job.base.device), list[str]()
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
    if room is not None and peak > room and (saved := _saved_by_quantizing(job)) > 0.05 * peak:
        warnings.append(
            _(
                "model.quantize: loading the base model with --quantize nf4 would save about {saved:,.0f} MiB.",
                saved=saved,
            )
        )
    return Estimate(peak, room, seconds, by, recompute, warnings)


def _saved_by_quantizing(job: Job) -> float:
    """MiB that the weights would need less in NF4; 0 if they are quantized already, or are trained themselves."""
    base = job.base
    if base.quantize != "none" or base.device.type != "cpu" or base.adapters[job.adapter].is_whole_model:
        return 0.0
    return max(0.0, weights_mib(base.folder, base.dtype) - weights_mib(base.folder, base.dtype, "nf4"))


def duration(seconds: float) -> str:
    """'4 s', '1 min 05 s', '2 h 10 min'."""
    whole = round(seconds)
    if whole < 60:
        return _("{s} s", s=whole)
    if whole < 3600:
        return _("{min} min {s:02} s", min=whole // 60, s=whole % 60)
    return _("{h} h {min:02} min", h=whole // 3600, min=whole % 3600 // 60)


def _state_bytes(job: Job) -> float:
    """What will be added for the trained parameters: gradient and optimizer state, and for an adapter its values."""
    trained = job.parameters.values.numel()
    is_whole = job.base.adapters[job.adapter].is_whole_model  # whose values are there already
    return trained * (GRADIENT + MOMENTS[job.config.optimizer] if is_whole else 4 * 4)


def estimate_peak_mib(base: Base, row: Row, state: float) -> float | None:
    """Peak memory of a training on a CPU whose heaviest row is `row`; None if it cannot be told.

    state: bytes of gradients and optimizer. Follows from the bytes per token that the trial step of `enable_fast_parts`
    kept for its backward pass.
    """
    now = memory_mib()
    if now is None or base.device.type != "cpu" or base.layout != "packed" or not base.saved_bytes_per_token:
        return None
    vocabulary = int(base.model.config.get_text_config().vocab_size)
    head = 2 * min(FROZEN_CHUNK, len(row.at_N)) * vocabulary * base.dtype.itemsize
    kept = row.tokens * base.saved_bytes_per_token / 2**20
    converted = 2 * PIECE * base.dtype.itemsize if base.quantize != "none" else 0
    return now + UNSEEN + kept + growth_mib(base, row, GROWTH_STEPS) + (state + head + converted) / 2**20


def growth_mib(base: Base, row: Row, steps: int) -> float:
    """MiB that rows of new lengths add to the peak in `steps` more steps, if `row` is the heaviest."""
    if not base.compiles_shapes:
        return 0.0
    return GROWTH * row.tokens * base.saved_bytes_per_token / 2**20 * min(1.0, max(0, steps) / GROWTH_STEPS)
