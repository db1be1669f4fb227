"""Render the HTML templates of this folder into self-contained pages that can be sent to a colleague."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render_template(name: str, **values: Any) -> str:
    """The template file `name` filled in with `values`, which are escaped. Raises UndefinedError if one is missing."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name).render(**values)
