"""One server for most of the tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving import Running, make_runs, running


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs; see serving.make_runs."""
    return make_runs(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def served(runs: Path) -> Iterator[Running]:
    """A server of those runs."""
    with running(runs, context=120) as found:
        yield found
