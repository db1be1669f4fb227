"""Exports tiny models of all families in all types, and writes a table of what their readers say.

    python -m tests.export.figures

`make export-check` installs llama-cpp-python before it, and runs the tests of the room, with the injected faults.
"""

import sys
import tempfile
from pathlib import Path

import torch

from lorasmith.export.gguf.families import FAMILIES
from lorasmith.export.gguf.file import Kind
from lorasmith.export.gguf.model import export_gguf
from tests.export.gguf.test_check import FAULTS
from tests.support.exported import adapter_of, folder_of

KINDS: tuple[Kind, ...] = ("f32", "f16", "bf16", "q8_0")


def say(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Write the table; 0, as a program's exit code, because what differs is raised."""
    torch.set_num_threads(1)
    say("family       type  reader        logit error   limit  equal replies")
    for family in sorted(FAMILIES):
        with tempfile.TemporaryDirectory() as place:
            adapter = adapter_of(folder_of(family, Path(place) / "base"), Path(place) / "adapter")
            for kind in KINDS:
                figures = export_gguf(adapter, Path(place) / f"{kind}.gguf", kind).content["figures"]
                for one in figures["readings"]:
                    say(
                        f"{family:12} {kind:5} {one['reader']:12} {one['error']:12.1e} {one['limit']:7.0e} "
                        f"{one['equal_replies']:7} of {one['replies']}"
                    )
    say(f"{len(FAMILIES)} families in {len(KINDS)} types; the tests inject {len(FAULTS)} faults")
    return 0


if __name__ == "__main__":
    sys.exit(main())
