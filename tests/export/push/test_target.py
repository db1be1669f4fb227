"""Names of repositories."""

import pytest

from lorasmith.errors import ConfigError
from lorasmith.export.push.target import repository_name


def test_the_prefix_is_optional():
    assert repository_name("org/mine", "run") == repository_name("hf:org/mine", "run") == "org/mine"


def test_other_names_are_refused():
    with pytest.raises(ConfigError, match="Give it as ORG/NAME"):
        repository_name("mine", "run")
    with pytest.raises(ConfigError, match="modelscope upload org/mine FOLDER"):
        repository_name("modelscope:org/mine", "run")
