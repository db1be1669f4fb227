"""The README's pictures, exported by the program from a finished run: python docs/pictures/make.py [runs/demo]."""

import re
import shutil
import sys
from pathlib import Path

from rich.console import Console

from lorasmith.cli.demo import show
from lorasmith.cli.screen import Screen
from lorasmith.demo.run import demo


def main() -> None:
    """Write demo.svg and loss.png beside this file."""
    run, here = sys.argv[1] if len(sys.argv) > 1 else "runs/demo", Path(__file__).parent
    screen = Screen()
    screen.console = Console(record=True, width=100, highlight=False, emoji=False)
    screen.live = True  # wrapped at the width, as in a terminal
    show(demo(screen, output=run), screen)
    svg = screen.console.export_svg(title="lorasmith demo")
    svg = re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL)  # nothing is fetched from outside
    svg = svg.replace("Fira Code", "DejaVu Sans Mono, Menlo, Consolas")
    (here / "demo.svg").write_text(svg, "utf-8")
    shutil.copy(Path(run) / "loss.png", here / "loss.png")


if __name__ == "__main__":
    main()
