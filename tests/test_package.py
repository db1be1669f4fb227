"""What a user installs: a command that answers without loading torch, and a wheel that works outside the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
HEAVY = ("torch", "transformers", "datasets", "gguf", "accelerate", "matplotlib")

# Runs the command as the console script does, then says on the last line which heavy packages it has loaded.
ANSWER = f"""
import sys
from lorasmith.cli.main import main
sys.argv = ["lorasmith", *sys.argv[2:]]
heavy = {HEAVY}
try:
    status = main()
except SystemExit as stop:
    status = stop.code
print("\\nloaded:", [name for name in heavy if name in sys.modules])
sys.exit(status)
"""


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)  # another environment must not find the checkout
    parts = [str(part) for part in command]
    return subprocess.run(parts, cwd=cwd, env=environment, capture_output=True, text=True)


def succeed(*command: str | Path, cwd: Path | None = None) -> str:
    """The standard output of a command that must succeed."""
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["chat", "--help"], 0),
        (["no-such-verb"], 2),
        (["train", "rows.jsonl", "--learning-rat", "1e-4"], 2),
        (["train", "rows.jsonl", "--r", "0"], 2),
    ],
)
def test_help_and_usage_errors_load_nothing_heavy(arguments: list[str], status: int, tmp_path: Path) -> None:
    done = run(sys.executable, "-c", ANSWER, "--", *arguments, cwd=tmp_path)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("loaded: []"), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) + len(done.stderr.splitlines()) > 2, "it said nothing"
    assert list(tmp_path.iterdir()) == [], "it wrote something"


def test_options_load_nothing_heavy() -> None:
    code = f"import sys, lorasmith.config.toml; print([name for name in {HEAVY} if name in sys.modules])"
    assert succeed(sys.executable, "-c", code).strip() == "[]"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    succeed(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    return folder / f"lorasmith-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="module")
def outside(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that has the wheel, and everything else from the environment of this test."""
    folder = tmp_path_factory.mktemp("outside")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    own = Path(succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A line of a .pth file is a path whose own .pth files are not read: the checkout itself stays out of sight.
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    install = ("install", "--no-deps", "--no-index", "--force-reinstall", "--ignore-installed", wheel)
    succeed(sys.executable, "-m", "pip", "--python", python, *install)
    return folder / "bin"


def test_wheel_holds_the_whole_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("lorasmith/")}
        metadata = archive.read(f"lorasmith-{VERSION}.dist-info/METADATA").decode()
        assert f"lorasmith-{VERSION}.dist-info/licenses/LICENSE" in archive.namelist()
    files = {
        path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/lorasmith").rglob("*") if path.is_file()
    }
    assert packed == {name for name in files if "__pycache__" not in name}
    assert {"lorasmith/py.typed", "lorasmith/cli/main.py"} <= packed
    assert "License-Expression: Apache-2.0" in metadata


def test_wheel_answers_outside_the_checkout(outside: Path, tmp_path: Path) -> None:
    found = succeed(outside / "python", "-c", "import lorasmith.errors as part; print(part.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(outside.parent), "the checkout was imported, not the wheel"
    assert "train" in succeed(outside / "lorasmith", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_wheel_runs_the_demo(outside: Path, tmp_path: Path) -> None:
    lines = succeed(outside / "lorasmith", "demo", "--steps", "2", "--json", cwd=tmp_path).splitlines()
    result = json.loads(lines[-1])
    assert result.keys() >= {"loss_before", "loss_after", "tokens_per_second", "peak_memory_mib", "seconds", "run"}
    assert result["loss_after"] < result["loss_before"]
    assert (tmp_path / result["run"] / "adapter" / "adapter_config.json").is_file()


def test_locks_hold_no_machine_and_no_cuda() -> None:
    for name in ("requirements.lock", "requirements-dev.lock"):
        text = (ROOT / name).read_text("utf-8")
        pins = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
        assert len(pins) > 40
        assert all("==" in pin and pin.endswith("\\") for pin in pins), "a version without a hash"
        assert not [pin for pin in pins if pin.startswith(("torch==", "nvidia", "cuda", "triton", "lorasmith"))]
        assert "://" not in text
        assert "/home/" not in text


def test_development_lock_agrees_with_the_other() -> None:
    pins = {}
    for name in ("requirements.lock", "requirements-dev.lock"):
        lines = (ROOT / name).read_text("utf-8").splitlines()
        pins[name] = {line for line in lines if line and not line.startswith((" ", "#"))}
    assert pins["requirements.lock"] < pins["requirements-dev.lock"]
