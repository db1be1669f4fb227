"""Where the repository lies, and what may lie beside it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"  # not part of the product: tests that read it skip where it is missing
