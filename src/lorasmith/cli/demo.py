"""lorasmith demo: fine-tune a small model on real conversations in a few minutes."""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.cli.flags import Parser, positive
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.i18n import _

if TYPE_CHECKING:
    from lorasmith.demo.run import DemoResult


def parser() -> Parser:
    """The options of the demo, a few of those of `train`."""
    parser = Parser(
        "demo",
        "",
        _("Fine-tune a small model on real conversations in a few minutes, and compare it with the base model."),
    )
    parser.own.add_argument("--steps", metavar="N", type=positive, help=_("Number of training steps (default: 32)"))
    parser.own.add_argument("--output", metavar="RUN", help=_("Run folder (default: runs/demo)"))
    parser.add_switch("--overwrite", _("Train again even if the run has already finished"))
    parser.add_json()
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the demo and show its result. Raises LorasmithError."""
    with importing():
        from lorasmith.demo.run import demo

    given = {name: value for name, value in (("steps", args.steps), ("output", args.output)) if value is not None}
    with Screen(json=args.json) as screen:
        result = demo(screen, overwrite=args.overwrite, **given)
        show(result, screen)
    if args.json:
        print(json.dumps(asdict(result.summary)))
    return 0


def show(result: "DemoResult", screen: Screen) -> None:
    """Show the loss curve, the replies side by side, the numbers, and commands to try next."""
    summary = result.summary
    screen.curve(result.training, _("training loss, smoothed"))
    rows = [(sample.prompt, sample.before, sample.after) for sample in result.samples]
    screen.say(_("Replies to held-out prompts, sampled with the same seed:"))
    screen.side_by_side(rows, _("before"), _("after"))
    if summary.loss_before is not None and summary.loss_after is not None and summary.interval is not None:
        screen.say(
            _(
                "held-out loss {before:.3f} -> {after:.3f}, perplexity {ppl_before:.1f} -> {ppl_after:.1f}; "
                "95% confidence interval of the difference {low:+.3f} to {high:+.3f}",
                before=summary.loss_before,
                after=summary.loss_after,
                ppl_before=math.exp(summary.loss_before),
                ppl_after=math.exp(summary.loss_after),
                low=summary.interval[0],
                high=summary.interval[1],
            )
        )
    screen.say(
        _(
            "adapter {adapter:.1f} MB, base model {base:.0f} MB; {rate:.0f} tokens/s, peak memory {memory:.0f} "
            "MiB, {seconds:.0f} s",
            adapter=summary.adapter_bytes / 1e6,
            base=summary.base_bytes / 1e6,
            rate=summary.tokens_per_second,
            memory=summary.peak_memory_mib,
            seconds=summary.seconds,
        )
    )
    picture = Path(summary.run) / "loss.png"
    if picture.is_file():
        screen.say(_("loss curve: {file}", file=picture))
    screen.say(_("next:"))
    for command, what in (
        (f"lorasmith chat {summary.run}", _("chat with it; /base switches to the base model")),
        (f"lorasmith serve {summary.run}", _("serve it with an OpenAI-compatible API and a chat page")),
        (f"lorasmith merge {summary.run} --output merged", _("merge it into the base model")),
        (f"lorasmith eval {summary.run}", _("evaluate it again")),
        ("lorasmith train YOUR.jsonl", _("train on your own data")),
    ):
        screen.say(f"  {command:<46} {what}")
