"""Whether LoRA would have done: the update of a run that trained all weights, cut to ranks that LoRA has."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorasmith.evaluation.interval import Interval, Pair, retained_share
from lorasmith.evaluation.loss import evaluate_loss
from lorasmith.i18n import _
from lorasmith.lora.adapted import linear_layers
from lorasmith.lora.biases import HALF_PRECISION
from lorasmith.lora.difference import add_empty, cut, fill, replace_weights
from lorasmith.lora.spectrum import LayerSpectrum
from lorasmith.model.base import Base
from lorasmith.model.row import Example
from lorasmith.report import Report
from lorasmith.system.device import dtype_name

RANKS = (64, 8)  # the largest first, which is then cut further
NAME = "update"  # of the adapter that the update becomes


@dataclass(frozen=True)
class WholeUpdate:
    """The update of the linear layers.

    retained: the part of the improvement that remains with each rank of `RANKS`; empty if the loss did not fall.
    of_layers: that part with the whole update of the linear layers, but not of anything else.
    rounded_to: the dtype of the weights if it is so short that its rounding is a part of the update; otherwise "".
    """

    spectra: tuple[LayerSpectrum, ...]
    retained: dict[int, Interval]
    of_layers: Interval | None = None
    rounded_to: str = ""


def whole_update(
    original: Base, trained: Base, held_out: Sequence[Example], pair: Pair | None, seed: int, report: Report
) -> WholeUpdate:
    """Cut the update to each of `RANKS` and measure it. `original` has the weights of `trained` afterwards.

    pair: the held-out losses of both models; None if the ranks need not be measured. What LoRA does not change by
    default (embeddings, norms, biases and the head) is that of `original`.

    Raises ConfigError as `add_empty` does.
    """
    original.adapters[NAME] = add_empty(original.model, original.router, NAME, RANKS[0])
    spectra, total = list[LayerSpectrum](), len(linear_layers(original.model, NAME))
    for one in fill(original.model, trained.model, NAME):
        spectra.append(one)
        report.progress(_("singular values"), len(spectra), total)
    rounded_to = dtype_name(trained.dtype) if trained.dtype in HALF_PRECISION else ""
    if pair is None:
        return WholeUpdate(tuple(spectra), {}, rounded_to=rounded_to)
    retained = {}
    for rank in RANKS:
        cut(original.model, NAME, rank)
        task = _("held-out loss of the update at rank {rank}", rank=rank)
        retained[rank] = retained_share(*pair, evaluate_loss(original, held_out, NAME, report, task), seed)
    replace_weights(original.model, trained.model, NAME)
    task = _("held-out loss of the update of the linear layers")
    of_layers = retained_share(*pair, evaluate_loss(original, held_out, None, report, task), seed)
    return WholeUpdate(tuple(spectra), retained, of_layers, rounded_to)
