"""Importing torch and transformers, which is half of the time until a training begins."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from lorasmith.system.gc_pause import at_rest


@contextmanager
def importing() -> Iterator[None]:
    """Within it Python does not search for cycles; afterwards the million objects of the import are out of the search.

    For a program alone: what is garbage at that moment stays until the end.
    """
    with at_rest():
        yield
    gc.freeze()
