"""One server for most of the tests, folders of runs, and the command line."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorasmith.cli.main import main
from tests.support.serving import Running, make_runs, running
from tests.support.tiny import CHATML, model_folder

WITH_TOOLS = "{%- for tool in tools or [] %}{{ tool.function.name + '\n' }}{%- endfor %}"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs; see serving.make_runs."""
    return make_runs(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def served(runs: Path) -> Iterator[Running]:
    """A server of those runs."""
    with running(runs, context=120) as found:
        yield found


@pytest.fixture(scope="session")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a base model whose template shows tools."""
    place = tmp_path_factory.mktemp("tooled")
    folder = Path(shutil.copytree(model_folder(), place / "base"))
    shown = "{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{%- endif %}"
    template = WITH_TOOLS + CHATML.replace("'<|im_end|>\n' }}", "'<|im_end|>\n' }}" + shown)
    (folder / "chat_template.jinja").write_text(template)
    (place / "runs").mkdir()
    with running(place / "runs", folder=folder, context=120) as found:
        yield found


@pytest.fixture
def own_runs(runs: Path, tmp_path: Path) -> Path:
    """A copy of the runs that the test may change."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """`refused(*words)`: the problems that `lorasmith serve` ends with."""

    def refused(*words: object) -> list[str]:
        assert main(["serve", *map(str, words)]) == 2
        lines = capsys.readouterr().err.replace(f"{tmp_path}/", "").splitlines()
        return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]

    return refused
