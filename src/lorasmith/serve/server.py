"""The HTTP server: uvicorn, listening on an address, with a graceful shutdown that lets running requests finish."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from lorasmith.config.serving import ServeConfig
from lorasmith.errors import ConfigError
from lorasmith.i18n import _, foreign
from lorasmith.serve.request_manager import RequestManager

log = logging.getLogger("lorasmith.serve")
POLL_SECONDS = 0.05  # interval at which the shutdown checks for running requests


class DrainingServer(uvicorn.Server):
    """A uvicorn server that shuts down gracefully: it stops accepting requests, then waits for the running ones.

    It waits for at most the grace period (settings.drain).
    """

    def __init__(self, app: Any, manager: RequestManager) -> None:
        super().__init__(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5, lifespan="on")
        )
        self.manager = manager
        self.has_failed = False
        self._signals = 0
        self._ending: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM, SIGHUP or Ctrl-C.

        The first starts a graceful shutdown, the second does not wait, the third exits.
        """
        self._signals += 1
        self.force_exit = self._signals > 2
        if self._signals == 1:
            self.manager.is_draining = True
            asyncio.get_event_loop().call_soon_threadsafe(self._begin_to_end)

    def give_up(self) -> None:
        """Exit with an error, because the model's thread has failed (it has printed its traceback)."""
        self.has_failed = self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals inside the block: those of uvicorn, and that of a terminal that is closed."""
        with super().capture_signals():
            is_handled = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP")
            before = signal.getsignal(signal.SIGHUP) if is_handled else signal.SIG_IGN
            if before == signal.SIG_IGN:  # as nohup sets it
                yield
                return
            signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, before)

    def _begin_to_end(self) -> None:
        if waiting := len(self.manager.in_flight):
            log.warning("%s", _(
                "Shutting down: waiting up to {seconds:g} s for {count} running requests. Press Ctrl-C again to stop "
                "at once.",
                seconds=self.manager.settings.drain, count=waiting,
            ))  # fmt: skip
        self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        end = asyncio.get_running_loop().time() + self.manager.settings.drain
        while self.manager.in_flight and self._signals < 2 and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(POLL_SECONDS)
        self.manager.worker.end()
        self.should_exit = True


def listen(settings: ServeConfig) -> socket.socket:
    """Open a socket on the configured address. Raises ConfigError if it is in use or not available."""
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        made = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
        # asyncio sets TCP_NODELAY only if the protocol is named; without it, small replies are delayed by 40 ms.
        return socket.socket(made.family, made.type, socket.IPPROTO_TCP, fileno=made.detach())
    except OSError as error:
        raise ConfigError(
            _(
                "{host}:{port}: cannot listen on this address: {why}. Use another --port, or "
                "--port 0 to pick a free one.",
                host=settings.host,
                port=settings.port,
                why=foreign(str(error.strerror).partition(" (while ")[0]),  # socket adds the address there
            )
        ) from None


def is_public(host: str) -> bool:
    """Whether other machines can reach the address `host`; True if unknown."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return True
    return not all(address.startswith("127.") or address == "::1" for address in found)
