"""transformers without its own bars and warnings: what matters is said through the report, and checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own bars and warnings: the report shows the progress."""
    logging: Any = import_module("transformers.utils.logging")  # Any: these two are not annotated
    reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    bar = getattr(reader, "tqdm", None)  # made by tqdm itself: the switch does not reach it
    logging.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    if bar is not None:
        reader.tqdm = _no_bar
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if bar is not None:
            reader.tqdm = bar


def _no_bar(items: Any, **_options: object) -> Any:
    return items
