"""lorasmith serve: serve adapters and their base model with an OpenAI-compatible API."""

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
    from lorasmith.serve.discovery import Discovery
    from lorasmith.serve.request_manager import RequestManager


def parser() -> Parser:
    """The arguments of the command."""
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
    """Serve until SIGTERM or Ctrl-C, then return 0. Raises LorasmithError."""
    model, settings = base_of(args), check(ServeConfig, given(args).get("serve", {}), "serve")
    paths = [Path(path).expanduser() for path in args.runs]
    with importing():
        from lorasmith.serve.discovery import discover
    discovery = discover(paths)
    with Screen() as screen:
        if args.print_vllm:
            from lorasmith.serve.vllm import vllm_command

            base = model.model if "model" in model.model_fields_set else None
            command, problems = vllm_command(discovery, base, screen)
            for problem in problems:
                screen.warn(problem)
            print(command)
            return 0
        return serve(discovery, args, settings, screen)


def serve(discovery: "Discovery", args: argparse.Namespace, settings: ServeConfig, screen: Screen) -> int:
    """Load the base model and serve; returns 1 if the server failed. Raises LorasmithError."""
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
        from lorasmith.serve.access_log import show_log
        from lorasmith.serve.auth import KeyFile
        from lorasmith.serve.startup import open_manager
    if settings.keys is None and is_public(settings.host):
        raise ConfigError(
            _(
                "serve.host: {host} can be reached from other machines, so --keys FILE is required. Create a "
                "line of that file with: printf %s KEY | sha256sum",
                host=settings.host,
            )
        )
    keys = KeyFile(Path(settings.keys).expanduser()) if settings.keys else None
    with listen(settings) as socket:
        manager = open_manager(discovery, base_of(args), settings, keys, screen)
        show(manager, discovery, socket.getsockname()[1], screen)
        server = DrainingServer(make_app(manager), manager)
        if settings.access_log:
            show_log()
        manager.worker.on_death = server.give_up
        server.run(sockets=[socket])
    return 1 if server.has_failed else 0


def show(manager: "RequestManager", discovery: "Discovery", port: int, screen: Screen) -> None:
    """Print the start screen: base model, adapters, skipped folders, address and an example request."""
    registry, base = manager.registry, manager.registry.base
    for problem in discovery.problems:
        screen.warn(_("skipped: {problem}", problem=problem))
    dtype, device = str(base.dtype).removeprefix("torch."), base.device
    screen.say(_("base model: {name} ({dtype}, {device})", name=registry.base_name, dtype=dtype, device=device))
    found = [version.discovered for version in registry.versions.values() if version.discovered is not None]
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
    if manager.worker.engine.why:
        screen.say(_("requests run in padded batches: {why}", why=manager.worker.engine.why))
    show_memory(manager, screen)
    host = f"[{manager.settings.host}]" if ":" in manager.settings.host else manager.settings.host
    address = f"http://{host}:{port}"
    screen.say(_("Serving at {address} (press Ctrl-C to stop)", address=address))
    body = f'{{"model": "{registry.names()[-1]}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    key = ' -H "Authorization: Bearer $KEY"' if manager.keys else ""
    screen.say(f"curl {address}/v1/chat/completions{key} \\\n  -H 'Content-Type: application/json' \\\n  -d '{body}'")


def show_memory(manager: "RequestManager", screen: Screen) -> None:
    """Print how many requests of which length fit into the KV cache at the same time."""
    cache, admitted = manager.worker.engine.cache, manager.registry.base.max_positions
    if cache is None:
        return
    screen.say(
        _(
            "KV cache: {tokens:,} tokens ({mib:,.0f} MiB). Concurrent requests: {slots} of up to {each:,} tokens "
            "each, or {fitting} of the full context length of {context:,}.",
            tokens=cache.limit,
            mib=manager.cache_mib,
            slots=manager.settings.slots,
            each=min(cache.share(manager.settings.slots), manager.context),
            fitting=manager.max_concurrency,
            context=manager.context,
        )
    )
    if manager.context < min(manager.settings.context or 2**62, admitted or 2**62):
        screen.warn(
            _(
                "The context is {context:,} tokens, because the KV cache has no "
                "room for more. --cache-tokens sets its size.",
                context=manager.context,
            )
        )
