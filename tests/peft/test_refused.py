"""The names that the package gives: all of PEFT's, of which some raise when they are used."""

import subprocess
import sys

import peft
import pytest

import lorasmith.peft as ours
from lorasmith.errors import ConfigError
from lorasmith.peft.refused import AS_IN_PEFT


@pytest.mark.parametrize("name", sorted(peft.__all__))
def test_every_name_of_peft_can_be_imported(name: str) -> None:
    mine, theirs = getattr(ours, name), getattr(peft, name)
    if name in ours.__all__:
        assert mine is theirs if name in AS_IN_PEFT else mine is not theirs
    elif mine is not theirs:
        with pytest.raises(ConfigError, match=f"^{name} is not supported by lorasmith.peft. Use peft itself for it.$"):
            mine()
        with pytest.raises(ConfigError, match=name):
            mine.from_pretrained("somewhere")
        assert not isinstance(ours.LoraConfig(), mine)


def test_the_tutorials_imports() -> None:
    from lorasmith.peft import (  # noqa: F401
        PeftModel,
        PromptTuningConfig,
        PromptTuningInit,
        TaskType,
        get_peft_model,
    )

    assert PromptTuningInit.TEXT == "TEXT"
    with pytest.raises(ConfigError, match="PromptTuningConfig is not supported"):
        PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=8)


def test_other_names_are_no_attributes() -> None:
    for name in ("LoraConfg", "_something"):
        with pytest.raises(AttributeError, match=name):
            getattr(ours, name)


def test_mixed_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="mixed=True"):
        ours.get_peft_model(None, ours.LoraConfig(), mixed=True)


def test_without_peft_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['peft'] = None; import lorasmith; import lorasmith.peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: lorasmith.peft needs PEFT. Install it with: pip install 'lorasmith[peft]'"
