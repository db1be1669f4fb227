"""lorasmith export: write the model of a run as one file for other programs, after checking that it is the same."""

import argparse
import json
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.cli.flags import Parser, base_of
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.i18n import _

if TYPE_CHECKING:
    from lorasmith.config.model import ModelConfig
    from lorasmith.export.gguf_file import Kind

TARGETS, TYPES = ("gguf", "ollama"), ("f16", "bf16", "f32", "q8_0")


def parser() -> Parser:
    """The arguments of the command."""
    about = _(
        "Merge an adapter into its base model and write it to a GGUF file, for llama.cpp or LM Studio, or to a folder "
        "for Ollama, after reading it back and comparing it with the trained model."
    )
    parser = Parser("export", "RUN --to FORMAT --output PATH", about)
    parser.own.add_argument("run", metavar="RUN", help=_("Run or adapter folder"))
    parser.own.add_argument(
        "--to", choices=TARGETS, required=True, help=_("gguf: a file; ollama: a folder with this file and a Modelfile")
    )
    parser.own.add_argument(
        "--type", choices=TYPES, default="f16",
        help=_("Type of the matrices in the file (default: f16); q8_0 takes about half as much space as f16"),
    )  # fmt: skip
    parser.own.add_argument("--output", metavar="PATH", required=True, help=_("File or folder to write"))
    parser.add_switch("--overwrite", _("Replace --output, if an export wrote it"))
    parser.add_json()
    parser.add_base()
    return parser


def run(args: argparse.Namespace) -> int:
    """Export and compare. Raises LorasmithError."""
    model = base_of(args)
    with importing():
        import lorasmith.export.export  # noqa: F401 - torch and transformers, while it says so
    with Screen(json=args.json) as screen:
        found = export(args.run, args.output, args.to, args.type, model, args.overwrite, screen)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    return 0


def export(
    run: str, output: str, target: str, kind: "Kind", model: "ModelConfig", overwrite: bool, screen: Screen
) -> dict[str, Any]:
    """Export a run and show what was compared. Returns the certificate, with the file. Raises LorasmithError."""
    from lorasmith.export.export import export_gguf
    from lorasmith.export.ollama import export_ollama
    from lorasmith.runs.evaluate import some_held_out

    rows = partial(some_held_out, path=run, report=screen)
    found = {"gguf": export_gguf, "ollama": export_ollama}[target](run, output, kind, model, overwrite, screen, rows)
    show(found.content, screen)
    screen.say(_("Exported: {file}, with {certificate}", file=found.file, certificate=found.certificate.name))
    if target == "ollama":
        place = Path(output).expanduser()
        command = f"ollama create {place.resolve().name} -f {shlex.quote(str(place / 'Modelfile'))}"
        screen.say(_("next: {command}", command=command))
    return {"file": str(found.file), **found.content}


def add_export(parser: Parser) -> None:
    """The option of `train` and `check`."""
    parser.own.add_argument(
        "--export", choices=TARGETS,
        help=_("Export to RUN.gguf or the folder RUN-ollama after the training; what is impossible is refused before"),
    )  # fmt: skip


def place_of(target: str, run: str) -> str:
    """Where `train --export` writes: beside the run folder."""
    return str(Path(run)) + (".gguf" if target == "gguf" else f"-{target}")


def show(content: dict[str, Any], screen: Screen) -> None:
    """Show what was compared."""
    figures = content["figures"]
    screen.say(
        _(
            "Read back and equal: {keys} keys, {tensors} tensors, token ids of {texts} texts, {prompts} prompts",
            keys=figures["keys"],
            tensors=figures["tensors"],
            texts=figures["texts"],
            prompts=figures["prompts"],
        )
    )
    if not figures["readings"]:
        screen.say(
            _(
                "transformers does not read the architecture {name} from GGUF, and llama-cpp-python is not installed, "
                "so logits and replies were not compared",
                name=content["architecture"],
            )
        )
    for one in figures["readings"]:
        screen.say(
            _(
                "As {reader} reads it: relative logit error {error:.1e} (limit {limit:.1e}); {equal_replies} of "
                "{replies} greedy replies are equal",
                **{name: one[name] for name in ("reader", "error", "limit", "equal_replies", "replies")},
            )
        )
        if one["rows"]:
            screen.say(
                _(
                    "{rows} held-out rows: mean log probability off by at most {error:.1e} (limit {limit:.1e})",
                    rows=one["rows"],
                    error=one["log_prob_error"],
                    limit=one["log_prob_limit"],
                )
            )
