"""Silencing transformers' own progress bars and warnings; lorasmith checks and reports what matters itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context in which transformers prints only errors; its settings are restored afterwards."""
    logging: Any = import_module("transformers.utils.logging")  # Any: these functions are not annotated
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
