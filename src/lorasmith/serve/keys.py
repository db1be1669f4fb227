"""API keys: a file of hashes, so that who reads it learns no key; each may name the models that it may use."""

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from lorasmith.errors import ConfigError
from lorasmith.i18n import _, foreign

HASH = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class Key:
    """`models`: what it may use; None: all of them, and to add and take away adapters."""

    hash: str
    models: frozenset[str] | None


def read_keys(path: Path) -> list[Key]:
    """A key a line: SHA-256 in hex, then names; # begins a comment. Raises ConfigError with every wrong line."""
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
            keys.append(Key(words[0].lower(), frozenset(words[1:]) or None))
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


def find_key(keys: list[Key], given: str) -> Key | None:
    """The key that was given. Every hash is compared, so that time tells nothing."""
    own = hashlib.sha256(given.encode()).hexdigest()
    return [None, *(key for key in keys if hmac.compare_digest(key.hash, own))][-1]
