"""Importing bitsandbytes, which quantizes base models and the moments of an optimizer (extra `quant`)."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

_KERNELS = "bitsandbytes.backends.cpu.ops"  # its logger warns of a kernel that it could not download


@cache
def bitsandbytes() -> Any:
    """The package. It is imported without downloading anything, and without printing that it did not.

    Raises ImportError if it is not installed.
    """
    with _without_download():
        return import_module("bitsandbytes")


@contextmanager
def _without_download() -> Iterator[None]:
    """Hide the package `kernels` inside the block: bitsandbytes would download compiled code from a hub with it."""
    logger, had, before = logging.getLogger(_KERNELS), "kernels" in sys.modules, sys.modules.get("kernels")
    level = logger.level
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # importing it then raises ImportError
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if had:
            sys.modules["kernels"] = before  # type: ignore[assignment]
