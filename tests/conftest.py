"""Fixtures of all tests. One thread: two torch programs at once on two cores fight over them."""

import os
import signal
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start, too
os.environ["LORASMITH_LANG"] = "en"  # tests compare English texts, on a Chinese machine as well

import pytest
import torch

from tests.support.raised import Recorder

torch.set_num_threads(1)
# A shell's background job ignores Ctrl-C, and the programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)  # load_base sets it to all cores
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _english_and_not_plain() -> Iterator[None]:
    """--lang and --plain become variables, so that programs started from a verb follow; here each test begins anew."""
    yield
    os.environ["LORASMITH_LANG"] = "en"
    os.environ.pop("LORASMITH_PLAIN", None)


@pytest.fixture(autouse=True)
def _nothing_measured_yet(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run was measured at is kept for the next one; a test must not find that of another."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("lorasmith.preflight.measurements.cache_folder", lambda: cache)


@pytest.fixture
def exact() -> Iterator[None]:
    """The same mathematics without the casts down to float32 that some models make: see families.no_casts_down."""
    from tests.support.families import no_casts_down

    with no_casts_down():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-error", action="store_true", help="fail unless each text of docs/errors.md was raised")


def pytest_configure(config: pytest.Config) -> None:
    recorder = Recorder()
    recorder.listen()
    config.pluginmanager.register(recorder)
