"""transformers without its own bars and warnings: what matters is said through the report, and checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it transformers shows nothing; afterwards its settings are what they were."""
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
