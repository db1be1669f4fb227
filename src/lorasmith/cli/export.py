"""lorasmith export: write the model of a run as one file for other programs, after checking that it is the same."""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.cli.flags import Parser, base_of
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.errors import ConfigError
from lorasmith.i18n import _

if TYPE_CHECKING:
    from lorasmith.config.model import ModelConfig
    from lorasmith.export.gguf.file import Kind

MERGED, ADAPTERS = ("gguf", "ollama"), ("gguf-lora", "mlx", "peft")
TARGETS, TYPES = (*MERGED, *ADAPTERS, "transformers"), ("f16", "bf16", "f32", "q8_0")


def parser() -> Parser:
    """The arguments of the command."""
    about = _(
        "Write what was trained for other programs, after reading it back and comparing it with the trained model: "
        "merged with the base model for llama.cpp, LM Studio or Ollama, or the adapter alone for llama.cpp or mlx-lm."
    )
    parser = Parser("export", "RUN --to FORMAT --output PATH", about)
    parser.own.add_argument("run", metavar="RUN", help=_("Run or adapter folder"))
    parser.own.add_argument(
        "--to", choices=TARGETS, required=True,
        help=_(
            "gguf: a file of the merged model; ollama: a folder with this file and a Modelfile; gguf-lora: a file of "
            "the adapter alone; mlx: a folder of the adapter alone for mlx-lm; peft: a folder of the adapter with a "
            "model card, for a hub; transformers: the same as lorasmith merge"
        ),
    )  # fmt: skip
    parser.own.add_argument(
        "--type", choices=TYPES,
        help=_(
            "Type of the matrices of the merged model (default: f16); q8_0 takes about half as much space as f16. "
            "Adapters are written in float32"
        ),
    )  # fmt: skip
    parser.own.add_argument(
        "--base-name", metavar="NAME", help=_("With --to peft: name of the base model on a hub, such as ORG/NAME")
    )
    parser.own.add_argument("--output", metavar="PATH", required=True, help=_("File or folder to write"))
    parser.add_switch("--overwrite", _("Replace --output, if an export wrote it"))
    parser.add_json()
    parser.add_base()
    return parser


def run(args: argparse.Namespace) -> int:
    """Export and compare. Raises LorasmithError."""
    model = base_of(args)
    if args.base_name and args.to != "peft":
        raise ConfigError(_("--base-name: only with --to peft"))
    if args.type and args.to == "transformers":
        raise ConfigError(_("--type: with --to transformers, choose the type with --dtype"))
    if args.type and args.to in ADAPTERS:
        raise ConfigError(
            _("--type: with --to {target}, the adapter is not rounded to another type. Leave it out.", target=args.to)
        )
    with importing():
        import lorasmith.export.gguf.model  # noqa: F401 - torch and transformers, while it says so
    with Screen(json=args.json) as screen:
        if args.to in MERGED:
            found = export(args.run, args.output, args.to, args.type or "f16", model, args.overwrite, screen)
        elif args.to == "transformers":
            found = _merge(args, model, screen)
        elif args.to == "peft":
            found = _export_peft(args, model, screen)
        else:
            found = export_adapter(args.run, args.output, args.to, model, args.overwrite, screen)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    return 0


def export(
    run: str, output: str, target: str, kind: "Kind", model: "ModelConfig", overwrite: bool, screen: Screen
) -> dict[str, Any]:
    """Export a run and show what was compared. Returns the certificate, with the file. Raises LorasmithError."""
    from lorasmith.export.gguf.model import export_gguf
    from lorasmith.export.gguf.ollama import export_ollama
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


def export_adapter(
    run: str, output: str, target: str, model: "ModelConfig", overwrite: bool, screen: Screen
) -> dict[str, Any]:
    """Export the adapter alone. Returns what was written and compared. Raises LorasmithError."""
    from lorasmith.export.gguf.lora import export_gguf_lora
    from lorasmith.export.mlx import export_mlx

    if target == "gguf-lora":
        made = export_gguf_lora(run, output, model, overwrite, screen)
        found = {"file": str(made.file), **made.content}
    else:
        made = export_mlx(run, output, model, overwrite, screen)
        found = {"folder": str(made.file), **made.content}
    show(made.content, screen)
    screen.say(_("Exported: {file}, with {certificate}", file=made.file, certificate=made.certificate.name))
    return found


def _merge(args: argparse.Namespace, model: "ModelConfig", screen: Screen) -> dict[str, Any]:
    from lorasmith.adapters.merge import merge_run

    certificate = merge_run(args.run, args.output, model, args.overwrite, screen)
    screen.say(_("Merged model: {folder}", folder=certificate.folder))
    return asdict(certificate)


def _export_peft(args: argparse.Namespace, model: "ModelConfig", screen: Screen) -> dict[str, Any]:
    from lorasmith.export.peft_folder import export_peft

    made = export_peft(args.run, args.output, model, args.overwrite, screen, args.base_name)
    show(made.content, screen)
    screen.say(_("Exported: {file}, with {certificate}", file=made.file, certificate=made.certificate.name))
    return {"folder": str(made.file), **made.content}


def add_export(parser: Parser) -> None:
    """The option of `train` and `check`."""
    parser.own.add_argument(
        "--export", choices=MERGED,
        help=_("Export to RUN.gguf or the folder RUN-ollama after the training; what is impossible is refused before"),
    )  # fmt: skip


def place_of(target: str, run: str) -> str:
    """Where `train --export` writes: beside the run folder."""
    return str(Path(run)) + (".gguf" if target == "gguf" else f"-{target}")


def show(content: dict[str, Any], screen: Screen) -> None:
    """Show what was compared."""
    figures = content["figures"]
    if content.get("target", "gguf") != "gguf":
        _show_readings(figures["readings"], screen)
        return
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


def _show_readings(readings: Sequence[Mapping[str, Any]], screen: Screen) -> None:
    """Of an adapter alone, or of a merged folder."""
    for one in readings:
        screen.say(
            _(
                "As {reader} reads it, with the base model: relative logit error {error:.1e}",
                reader=one["reader"],
                error=one["error"],
            )
            if "limit" not in one
            else _(
                "As {reader} reads it: relative logit error {error:.1e} (limit {limit:.1e})",
                reader=one["reader"],
                error=one["error"],
                limit=one["limit"],
            )
        )
