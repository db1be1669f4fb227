"""Access control: API keys, and protection against pages of other sites.

The file of keys contains their SHA-256 hashes, each optionally followed by the models that the key may use.
"""

import hashlib
import hmac
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Request

from lorasmith.errors import ConfigError
from lorasmith.i18n import _, foreign
from lorasmith.serve.protocol import Failure

if TYPE_CHECKING:
    from lorasmith.serve.request_manager import RequestManager

log = logging.getLogger("lorasmith.serve")
HASH = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class Key:
    """An API key. `models` None: it may use all models, and load and unload adapters."""

    hash: str
    models: frozenset[str] | None


def read_keys(path: Path) -> list[Key]:
    """Read a file with one key per line: its SHA-256 in hex, then names of models; # begins a comment.

    Raises ConfigError that lists every invalid line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = foreign(error.strerror) if isinstance(error, OSError) else str(error)
        raise ConfigError(_("--keys {path}: cannot be read: {why}", path=path, why=why)) from None
    keys, problems = [], []
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if HASH.fullmatch(words[0]):
            models = frozenset(words[1:]) - {"-"}  # sha256sum writes it after the hash of its standard input
            keys.append(Key(words[0].lower(), models or None))
        else:
            problems.append(
                _(
                    "--keys {path} line {number}: must begin with the SHA-256 of a key (64 hex digits). To "
                    "create it: printf %s KEY | sha256sum",
                    path=path,
                    number=number,
                )
            )
    if not keys and not problems:
        problems = [_("--keys {path}: contains no keys, so nobody could use the server.", path=path)]
    if problems:
        raise ConfigError(*problems)
    return keys


class KeyFile:
    """The keys of a file, which is read again when it changes. Raises ConfigError at first, as `read_keys` does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = _state_of(path)
        self._keys = read_keys(path)

    @property
    def keys(self) -> list[Key]:
        """The current keys. If the file cannot be used anymore, these are the last ones, and the log says so."""
        state = _state_of(self.path)
        if state != self._state:
            self._state = state
            try:
                self._keys = read_keys(self.path)
                log.warning("%s", _("--keys {path}: read again: {count} keys.", path=self.path, count=len(self._keys)))
            except ConfigError as error:
                log.warning("%s", _("{problem} The keys that were read before stay valid.", problem=error))
        return self._keys


def _state_of(path: Path) -> tuple[int, ...]:
    """What changes when the file does; empty if there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def find_key(keys: list[Key], given: str) -> Key | None:
    """The matching key, or None. Compares every hash in constant time, so that timing reveals nothing."""
    own = hashlib.sha256(given.encode()).hexdigest()
    return [None, *(key for key in keys if hmac.compare_digest(key.hash, own))][-1]


def authorize(manager: "RequestManager", request: Request, needs_all: bool = False) -> frozenset[str] | None:
    """The models that this client may use; None means all.

    Raises Failure 401 without a valid key, and 403 if `needs_all` is set and the key is limited to some models, or if
    the server has no keys and the request comes from a page of another site.
    """
    if manager.keys is None:
        refuse_foreign_origin(manager, request)
        return None
    kind, _space, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not given:
        raise Failure(
            401, _("an API key is required: send the header 'Authorization: Bearer KEY'."), code="invalid_api_key"
        )
    key = find_key(manager.keys, given.strip())
    if key is None:
        raise Failure(401, _("this API key is not valid."), code="invalid_api_key")
    if needs_all and key.models is not None:
        raise Failure(403, _("this API key is limited to some models, but this request concerns all of them."))
    return key.models


def refuse_foreign_origin(manager: "RequestManager", request: Request) -> None:
    """Without keys, only this machine can reach the server, but pages of other sites in its browser must not use it.

    Checks the Origin header, and the Host header against DNS rebinding. Raises Failure 403.
    """
    settings = manager.settings
    own = {"localhost", "127.0.0.1", "::1", settings.host, *map(str.lower, settings.allowed_hosts)}
    origin = request.headers.get("origin", "")
    scheme, _to, page = origin.partition("://")
    is_checked = scheme in ("http", "https", "null") and not {origin, "*"} & set(settings.allowed_origins)
    for address in [request.headers.get("host", "")] + ([page] if is_checked else []):
        if re.sub(r":\d+$", "", address).strip("[]").lower() not in own:
            text = _("requests from or to {address!r} are not allowed: without --keys, the server only accepts "
                    "pages and host names of this machine, and those in --allowed-origins and --allowed-hosts.",
                     address=address)  # fmt: skip
            raise Failure(403, text)
