"""The version comes from the installed package."""

from importlib import metadata

import pytest

from lorasmith import version
from lorasmith.cli.main import main


def missing(_name: str) -> str:
    raise metadata.PackageNotFoundError


def test_it_is_the_one_that_pip_knows():
    assert version.installed_version() == metadata.version("lorasmith")


def test_without_an_installation_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(version, "version", missing)
    assert version.installed_version() is None
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "lorasmith (not installed; running from the source folder)\n"
