"""lorasmith info: show what a run or adapter folder contains, without loading a model."""

import argparse
import json
from typing import Any

from lorasmith.cli.flags import Parser
from lorasmith.cli.screen import Screen
from lorasmith.cli.wrap import pad, wrap
from lorasmith.i18n import _, counted, listed

LABEL, NAMES_SHOWN = 10, 12  # columns of a label; most names in a list


def parser() -> Parser:
    """The options: a folder."""
    parser = Parser("info", "PATH", _("Show what a run or adapter folder contains, without loading a model."))
    parser.own.add_argument("path", metavar="PATH", help=_("Run or adapter folder"))
    parser.add_json()
    return parser


def run(args: argparse.Namespace) -> int:
    """Print what the folder contains. Raises LorasmithError."""
    from lorasmith.runs.inspect import inspect_folder

    facts = inspect_folder(args.path)
    with Screen(json=args.json) as screen:
        for line in _lines(facts):
            screen.say(line)
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
    return 0


def _lines(facts: dict[str, Any]) -> list[str]:
    if facts.get("method") == "full":
        return _model_lines(facts)
    lines = [
        _("adapter   {folder}", folder=facts["folder"]),
        _("base      {base}", base=facts["base"] or _("not specified")),
        _("LoRA      {options}", options=_options(facts)),
        *_wrapped(_("unusable"), _unusable(facts["problems"], facts["folder"])),
        *_wrapped(_("targets"), _names(facts["target_modules"])),
        *_wrapped(_("weights"), _names(facts["target_parameters"])),
        *_wrapped(_("ranks"), _pairs(facts["rank_pattern"])),
        *_wrapped(_("alphas"), _pairs(facts["alpha_pattern"])),
        *_wrapped(_("full"), _names(facts["modules_to_save"])),
        _(
            "size      {parameters:,} parameters in {tensors} tensors, {mib:.1f} MiB",
            parameters=facts["parameters"],
            tensors=facts["tensors"],
            mib=facts["bytes"] / 2**20,
        ),
    ]
    if facts["template"]:
        stops = " ".join(map(str, facts["stop"]))
        lines.append(_("template  {kind}, replies end with {stop}", kind=facts["template"], stop=stops))
        if facts["template"] == "file":  # a built-in template is known by its name
            lines += [" " * LABEL + line for line in facts["chat_template"].splitlines()]
        lines += _wrapped(_("system"), facts["system"].replace("\n", "\n" + " " * LABEL))
    else:
        lines.append(_("template  not stored: the adapter was made by another tool"))
    if facts["notes"]:
        data = facts["notes"].get("data", [])
        lines += _wrapped(_("data"), _names(data if isinstance(data, list) else str(data)))
        lines += _combined(facts["notes"].get("combined"))
    return lines + _run(facts["summary"])


def _model_lines(facts: dict[str, Any]) -> list[str]:
    """Of a model all of whose weights were trained."""
    size = _(
        "size      {parameters:,} parameters in {tensors} tensors, {mib:.1f} MiB",
        parameters=facts["parameters"],
        tensors=facts["tensors"],
        mib=facts["bytes"] / 2**20,
    )
    return [
        _("model     {folder}: all weights were trained", folder=facts["folder"]),
        _("base      {base}", base=facts["base"]),
        size,
        *_wrapped(_("data"), _names(facts["data"])),
        *_run(facts["summary"]),
    ]


def _options(facts: dict[str, Any]) -> str:
    text = _("r {r}, lora_alpha {alpha}", r=facts["r"], alpha=facts["lora_alpha"])
    text += _(", scaled by lora_alpha / sqrt(r) (use_rslora)") if facts["use_rslora"] else ""
    return text + "".join(f", {flag}" for flag in facts["variants"])


def _combined(how: dict[str, Any] | None) -> list[str]:
    """What a combined adapter was made of."""
    if how is None:
        return []
    parts = [f"{part['folder']} ({part['weight']:g})" for part in how["adapters"]]
    return _wrapped(_("made of"), _("{adapters}, with {method}", adapters=_names(parts), method=how["method"]))


def _unusable(problems: list[str], folder: str) -> str:
    """Why the adapter cannot be loaded, without the folder, which was named above."""
    why = " ".join(problem.removeprefix(folder).lstrip("/\\") for problem in problems)
    return _("this adapter cannot be loaded: {why}", why=why) if why else ""


def _run(summary: dict[str, Any] | None) -> list[str]:
    if summary is None:
        return []
    lines = [
        _(
            "run       {steps}, {tokens:,} tokens, {seconds:.0f} s",
            **{**summary, "steps": counted(summary["steps"], _("1 step"), _("{count} steps"))},
        )
    ]
    if summary["loss_before"] is not None:
        lines.append(_("held out  loss {loss_before:.4f} -> {loss_after:.4f}", **summary))
    return lines


def _wrapped(label: str, text: str) -> list[str]:
    """`label     text` with further lines indented under the text; nothing if the text is empty."""
    return wrap(pad(label, LABEL) + text, 80, " " * LABEL) if text else []


def _names(value: str | list[str]) -> str:
    """Names separated by commas, a long list shortened; a regular expression as it is."""
    if isinstance(value, str):
        return value
    more = len(value) - NAMES_SHOWN
    names = listed(map(str, value[:NAMES_SHOWN]))
    return _("{names} and {more} more", names=names, more=more) if more > 0 else names


def _pairs(pattern: dict[str, Any]) -> str:
    return _names([f"{name}={value}" for name, value in pattern.items()])
