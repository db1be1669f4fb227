"""What merging costs: the held-out loss of an adapter on its base model, and that of the merged model."""

from pathlib import Path

from lorasmith.adapters.merge import Certificate
from lorasmith.adapters.session import open_adapters
from lorasmith.config.data import DataConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.values import check
from lorasmith.data.dataset.prepare import prepare
from lorasmith.evaluation.loss import Comparison, compare, evaluate_loss
from lorasmith.i18n import _
from lorasmith.loading.load import load_base
from lorasmith.report import Report, WarningsOnly


def merging_cost(
    run: str | Path,
    certificate: Certificate,
    file: str,
    config: ModelConfig | None = None,
    report: Report | None = None,
) -> Comparison:
    """Compare the loss on the rows of `file` before and after merging.

    run: the run or adapter folder, whose base model is loaded as in its training, quantized if it was. certificate: of
    the merged model, which is loaded as it was saved. Raises DataError for rows that cannot be read.
    """
    report = report or Report()
    session = open_adapters([run], config, report)
    data = DataConfig(data=(file,), held_out=0.0)
    examples = prepare(data, session.template, session.base.max_positions, WarningsOnly(report)).train
    before = evaluate_loss(session.base, examples, session.names[0], report, _("held-out loss of the adapter"))
    device = str(session.base.device)
    del session  # its memory is needed for the merged model
    merged = check(ModelConfig, {"model": certificate.folder, "dtype": certificate.dtype, "device": device}, "model")
    after = evaluate_loss(load_base(merged, report), examples, None, report, _("held-out loss of the merged model"))
    found = compare(before, after)
    report.say(
        _(
            "Held-out loss {before:.4f} before merging, {after:.4f} after; difference {difference:+.4f}, 95% "
            "confidence interval [{low:+.4f}, {high:+.4f}] on {examples} examples.",
            before=found.before,
            after=found.after,
            difference=found.difference,
            low=found.low,
            high=found.high,
            examples=found.examples,
        )
    )
    return found
