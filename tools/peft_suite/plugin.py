"""A pytest plugin for PEFT's own tests: keeps those about LoRA, and lets `from peft import ...` give the names of
lorasmith.peft if the environment variable FACADE is set. Writes the outcome of each test to the file OUTCOMES."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest

# Test files that are about LoRA, or about what all methods share and LoRA is tried in.
FILES = {
    "test_auto", "test_config", "test_custom_models", "test_decoder_models", "test_encoder_decoder_models",
    "test_feature_extraction_models", "test_initialization", "test_lora_conversion", "test_lora_variants",
    "test_loraplus", "test_low_level_api", "test_mapping", "test_other", "test_seq_classifier",
    "test_target_parameters", "test_token_classification_qa", "test_torch_compile", "test_trainable_tokens",
    "test_tuners_utils",
}  # fmt: skip
OUTCOMES: dict[str, dict[str, str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Replace the names in the package peft before any test file imports them, and keep the tests off the network."""
    if os.environ.get("FACADE"):
        import lorasmith.peft as facade

        stand_in = ModuleType("peft")  # the facade keeps the real package, which it builds on
        stand_in.__dict__.update(vars(peft) | {name: getattr(facade, name) for name in facade.__all__})
        sys.modules["peft"] = stand_in
    from tests import testing_utils  # PEFT's: the tests run in its folder

    testing_utils.hub_online_once = lambda model_id: nullcontext()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests about LoRA."""
    items[:] = [item for item in items if item.path.stem in FILES and _is_about_lora(item)]


def _is_about_lora(item: pytest.Item) -> bool:
    """Whether all configurations that the test is given are LoRA's; without any, its name must not say another."""
    values = list(_flat(list(getattr(item, "callspec", None).params.values()) if hasattr(item, "callspec") else []))
    kinds = {v.__name__ for v in values if isinstance(v, type) and issubclass(v, peft.PeftConfig)}
    kinds |= {type(v).__name__ for v in values if isinstance(v, peft.PeftConfig)}
    if kinds:
        return kinds == {"LoraConfig"}
    others = [name.removesuffix("Config").lower() for name in vars(peft) if name.endswith("Config")]
    text = item.nodeid.lower()
    return not any(name in text.split("::", 1)[1] for name in others if name not in ("lora", "peft", "eva", "arrow"))


def _flat(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(list(value))
        elif isinstance(value, dict):
            yield from _flat(list(value.values()))
        else:
            yield value


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the outcome: passed, skipped, or failed with the line of the error."""
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        OUTCOMES[report.nodeid] = {"outcome": report.outcome, "why": crash.message.split("\n")[0] if crash else ""}


def pytest_sessionfinish() -> None:
    """Write the outcomes."""
    Path(os.environ["OUTCOMES"]).write_text(json.dumps(OUTCOMES, indent=1), "utf-8")
