"""lorasmith serve: every adapter of a folder behind one address, through the API that everyone's client speaks."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.cli.flags import Parser, base_of, given
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.config.serving import ServeConfig
from lorasmith.config.values import check
from lorasmith.errors import ConfigError, MissingExtraError
from lorasmith.i18n import _

if TYPE_CHECKING:
    from lorasmith.serve.desk import Desk
    from lorasmith.serve.found import Shelf


def parser() -> Parser:
    """Which adapters, which base, where to listen."""
    about = _(
        "Serve all adapters in a folder with an OpenAI-compatible API; requests choose an adapter with the model field."
    )
    parser = Parser("serve", "RUNS ...", about)
    parser.own.add_argument(
        "runs", metavar="RUNS", nargs="+", help=_("Run folders, adapter folders, or folders that contain runs")
    )
    parser.add_switch("--print-vllm", _("Print the command that serves the same adapters with vLLM, then exit"))
    parser.add_base()
    parser.add_section("serve")
    return parser


def run(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C; 0 then. Raises LorasmithError."""
    model, settings = base_of(args), check(ServeConfig, given(args).get("serve", {}), "serve")
    paths = [Path(path).expanduser() for path in args.runs]
    with importing():
        from lorasmith.serve.found import look
    shelf = look(paths)
    with Screen() as screen:
        if args.print_vllm:
            from lorasmith.serve.vllm import vllm_command

            base = model.model if "model" in model.model_fields_set else None
            command, problems = vllm_command(shelf, base, screen)
            for problem in problems:
                screen.warn(problem)
            print(command)
            return 0
        return serve(shelf, args, settings, screen)


def serve(shelf: "Shelf", args: argparse.Namespace, settings: ServeConfig, screen: Screen) -> int:
    """Loads, shows what there is, serves."""
    with importing():
        try:
            from lorasmith.serve.app import make_app
            from lorasmith.serve.server import DrainingServer, is_public, listen
        except ModuleNotFoundError as error:
            if error.name not in ("fastapi", "uvicorn", "prometheus_client"):
                raise
            raise MissingExtraError(
                _("lorasmith serve requires {name}. Install it with: pip install 'lorasmith[serve]'", name=error.name)
            ) from None
        from lorasmith.serve.keys import read_keys
        from lorasmith.serve.start import open_desk
    if settings.keys is None and is_public(settings.host):
        raise ConfigError(
            _(
                "serve.host: {host} can be reached from other machines, so --keys FILE is required. Create a "
                "line of that file with: printf %s KEY | sha256sum",
                host=settings.host,
            )
        )
    keys = read_keys(Path(settings.keys).expanduser()) if settings.keys else None
    with listen(settings) as socket:
        desk = open_desk(shelf, base_of(args), settings, keys, screen)
        show(desk, shelf, socket.getsockname()[1], screen)
        server = DrainingServer(make_app(desk), desk)
        desk.worker.on_death = server.give_up
        server.run(sockets=[socket])
    return 1 if server.has_failed else 0


def show(desk: "Desk", shelf: "Shelf", port: int, screen: Screen) -> None:
    """The start screen: base, adapters, what was left out, address, an example."""
    registry, base = desk.registry, desk.registry.base
    for problem in shelf.problems:
        screen.warn(_("skipped: {problem}", problem=problem))
    dtype, device = str(base.dtype).removeprefix("torch."), base.device
    screen.say(_("base model: {name} ({dtype}, {device})", name=registry.base_name, dtype=dtype, device=device))
    found = [version.found for version in registry.versions.values() if version.found is not None]
    rows = [
        (
            one.name,
            str(one.rank),
            f"{one.adapter.size / 1e6:.1f}",
            ", ".join(one.data) or "-",
            "-" if one.loss is None else f"{one.loss:.3f}",
            one.hash[:12],
        )
        for one in found
    ]
    if rows:
        headings = (_("adapter"), _("rank"), "MB", _("data"), _("held-out loss"), _("hash"))
        screen.table(headings, [[row] for row in rows])
    else:
        screen.say(_("No adapter can be served; only the base model is available."))
    if desk.worker.engine.why:
        screen.say(_("requests run in padded batches: {why}", why=desk.worker.engine.why))
    host = f"[{desk.settings.host}]" if ":" in desk.settings.host else desk.settings.host
    address = f"http://{host}:{port}"
    screen.say(_("Serving at {address} (press Ctrl-C to stop)", address=address))
    body = f'{{"model": "{registry.names()[-1]}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    key = ' -H "Authorization: Bearer $KEY"' if desk.keys else ""
    screen.say(f"curl {address}/v1/chat/completions{key} \\\n  -H 'Content-Type: application/json' \\\n  -d '{body}'")
