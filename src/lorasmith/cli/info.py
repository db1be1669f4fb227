"""lorasmith info: what a folder holds, without loading a model."""

import argparse
import json
from typing import Any

from lorasmith.cli.flags import Parser
from lorasmith.cli.screen import Screen
from lorasmith.i18n import _


def parser() -> Parser:
    """Which folder."""
    parser = Parser("info", "PATH", _("What a run or adapter folder holds. Loads no model."))
    parser.own.add_argument("path", metavar="PATH", help=_("run or adapter folder"))
    parser.add_json()
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints what the folder says of itself. Raises LorasmithError."""
    from lorasmith.inspection import inspect_folder

    facts = inspect_folder(args.path)
    with Screen(json=args.json) as screen:
        for line in _lines(facts):
            screen.say(line)
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
    return 0


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = [
        _("adapter   {folder}", folder=facts["folder"]),
        _("base      {base}", base=facts["base"]),
        _(
            "LoRA      r {r}, lora_alpha {alpha}, on {targets}",
            r=facts["r"],
            alpha=facts["lora_alpha"],
            targets=_names(facts["target_modules"]),
        ),
        _(
            "size      {parameters:,} parameters in {tensors} tensors, {mib:.1f} MiB",
            parameters=facts["parameters"],
            tensors=facts["tensors"],
            mib=facts["bytes"] / 2**20,
        ),
    ]
    if facts["modules_to_save"]:
        lines.append(_("whole     {names}", names=_names(facts["modules_to_save"])))
    if facts["template"]:
        lines.append(
            _("template  {kind}, a reply ends at {stop}", kind=facts["template"], stop=" ".join(facts["stop"]))
        )
    else:
        lines.append(_("template  none inside: made by another tool"))
    if facts["notes"]:
        lines.append(_("data      {names}", names=_names(facts["notes"].get("data", []))))
    summary = facts["summary"]
    if summary:
        lines.append(_("run       {steps} steps, {tokens:,} tokens, {seconds:.0f} s", **summary))
        if summary["loss_before"] is not None:
            lines.append(_("held out  loss {loss_before:.4f} -> {loss_after:.4f}", **summary))
    return lines


def _names(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)
