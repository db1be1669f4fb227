"""bitsandbytes is imported silently, and without code from a hub."""

import subprocess
import sys
from pathlib import Path

import pytest

from lorasmith.system.bitsandbytes import bitsandbytes

KERNELS = """
def get_kernel(*args, **options):
    print("downloading", args)
    raise OSError("no network")
"""
IMPORT = "from lorasmith.system.bitsandbytes import bitsandbytes; print(bitsandbytes().__name__)"


def imported(words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "kernels.py").write_text(KERNELS, "utf-8")
    path = f"import sys; sys.path.insert(0, {str(folder)!r}); "
    return subprocess.run([sys.executable, "-c", path + words], capture_output=True, text=True, check=True)


def test_it_neither_downloads_a_kernel_nor_says_that_it_did_not(tmp_path: Path) -> None:
    ran = imported(IMPORT, tmp_path)
    assert (ran.stdout, ran.stderr) == ("bitsandbytes\n", "")


@pytest.mark.parametrize("before", ["", "import kernels; "])
def test_the_hidden_package_can_be_imported_afterwards(tmp_path: Path, before: str) -> None:
    ran = imported(f"{before}{IMPORT}; import kernels; print(kernels.get_kernel.__name__)", tmp_path)
    assert ran.stdout == "bitsandbytes\nget_kernel\n"


def test_it_is_the_package() -> None:
    assert bitsandbytes() is sys.modules["bitsandbytes"]
