"""The variables of a chat template that data.template_kwargs sets."""

import re
from collections.abc import Iterable

from lorasmith.config.values import did_you_mean
from lorasmith.data.template.encoding import Template
from lorasmith.errors import ConfigError
from lorasmith.i18n import _


def check_variables(template: Template, names: Iterable[str]) -> None:
    """Raise ConfigError for each variable that the template does not mention, so that it would have no effect."""
    known = set(re.findall(r"[^\W\d]\w*", template.text + "\n" + template.tool_text))
    problems = [
        _("data.template_kwargs: the chat template has no variable {name!r}. Remove it.", name=name)
        + did_you_mean(name, sorted(known))
        for name in names
        if name not in known
    ]
    if problems:
        raise ConfigError(*problems)
