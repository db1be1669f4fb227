"""lorasmith push: upload an adapter or an exported model to a hub."""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.cli.flags import Parser, base_of
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.i18n import _

if TYPE_CHECKING:
    from lorasmith.export.push.content import Content

MESSAGE = "Upload with lorasmith"


def parser() -> Parser:
    """The arguments of the command."""
    about = _(
        "Upload the adapter of a run, or an exported file or folder, to Hugging Face, with a model card. Files that "
        "contain paths of this machine or access tokens are refused. New repositories are private unless --public is "
        "given."
    )
    parser = Parser("push", "RUN ORG/NAME", about)
    parser.own.add_argument(
        "run", metavar="RUN", help=_("Run or adapter folder, or a file or folder that lorasmith export wrote")
    )
    parser.own.add_argument("name", metavar="ORG/NAME", help=_("Repository on the hub"))
    parser.add_switch("--dry-run", _("Show what would be uploaded, without using the network"))
    parser.add_switch("--public", _("Make a new repository public, or allow an upload to a public one"))
    parser.add_switch("--overwrite", _("Replace files that the repository already has"))
    parser.own.add_argument(
        "--base-name", metavar="NAME", help=_("Name of the base model on the hub, such as ORG/NAME, for the card")
    )
    parser.own.add_argument(
        "--message", metavar="TEXT", default=MESSAGE,
        help=_("Commit message") + _(" (default: {default})", default=MESSAGE),
    )  # fmt: skip
    parser.add_json()
    parser.add_base()
    return parser


def run(args: argparse.Namespace) -> int:
    """Upload, or show what would be. Raises LorasmithError."""
    model = base_of(args)
    with importing():
        from lorasmith.export.push.content import content_of
        from lorasmith.export.push.hugging_face import Repository
        from lorasmith.export.push.private import require_public
        from lorasmith.export.push.target import repository_name
        from lorasmith.loading.hub_client import offline

    name = repository_name(args.name, args.run)
    with Screen(json=args.json) as screen, offline() if args.dry_run else nullcontext():
        repository = None if args.dry_run else Repository.find(name)
        with content_of(args.run, name, args.base_name, model, screen) as content:
            require_public(content.files, (Path.home(), Path(args.run).expanduser().absolute().parent))
            _show(content, screen)
            url = None
            if repository is None:
                screen.say(
                    _("Nothing was uploaded. A new repository {name} would be public.", name=name)
                    if args.public
                    else _("Nothing was uploaded. A new repository {name} would be private.", name=name)
                )
            else:
                repository.require_allowed(content.files, args.public, args.overwrite, screen)
                url = repository.upload(content, args.public, args.message, screen)
                screen.say(_("Uploaded: {url}", url=repository.url))
            found = {
                "repository": name,
                "format": content.format,
                "files": {file: path.stat().st_size for file, path in content.files.items()},
                "commit": url,
            }
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    return 0


def _show(content: "Content", screen: Screen) -> None:
    """List the files with their sizes, and what the card says."""
    rows = [[name, f"{path.stat().st_size / 1e6:,.3f}"] for name, path in content.files.items()]
    screen.table([_("file"), _("MB")], [[row] for row in rows])
    screen.say(_("Model card (README.md):"))
    for line in content.card.splitlines():
        screen.say("  " + line)
