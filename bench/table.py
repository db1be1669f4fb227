"""The figures of a bench as Markdown, beside the required values and the goals.

python -m bench.table bench.json [PAGE ...]      rewrites what stands between the two markers of docs/performance*.md
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.breakdown import PARTS
from bench.programs import ROOT

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
PAGES = tuple(ROOT / "docs" / name for name in ("performance.md", "performance.zh.md"))


class Goal(NamedTuple):
    """One line of the table: the figure's place in the JSON; the required value and the goal by kind of processor."""

    what: str
    place: str
    bfloat16: tuple[float, float]
    float32: tuple[float, float]
    unit: str = ""
    better: str = "higher"


FASTEST, USUAL = "PEFT + Trainer's fastest setting", "PEFT + Trainer's usual setting"
SHARE, MEMORY, START = ((0.65, 0.85), (0.7, 0.85)), ((0.8, 0.6), (1.0, 0.8)), ((1.0, 0.8), (1.0, 0.8))
GOALS = (
    Goal(f"demo rows: tokens/s relative to {FASTEST}", "training.chat.ratio", (2.7, 4.0), (2.2, 3.0), " x"),
    Goal(f"alpaca rows: tokens/s relative to {FASTEST}", "training.alpaca.ratio", (2.1, 2.8), (1.7, 2.2), " x"),
    Goal("demo rows: tokens/s relative to the upper bound", "parts.chat.share", *SHARE),
    Goal("alpaca rows: tokens/s relative to the upper bound", "parts.alpaca.share", *SHARE),
    Goal(f"Bloom: tokens/s relative to {USUAL}", "bloom.alpaca.ratio_to_recipe", (2.2, 2.7), (1.5, 1.8), " x"),
    Goal(f"demo rows: peak memory relative to {USUAL}", "training.chat.memory_to_recipe", *MEMORY, better="lower"),
    Goal(f"alpaca rows: peak memory relative to {USUAL}", "training.alpaca.memory_to_recipe", *MEMORY, better="lower"),
    Goal(f"Bloom: peak memory relative to {USUAL}", "bloom.alpaca.memory_to_recipe", *MEMORY, better="lower"),
    Goal(f"time to the first step relative to {FASTEST}", "training.chat.start_to_peer", *START, better="lower"),
    Goal(
        "tokens/s of 2,048-token rows relative to 256-token rows", "lengths.ratio.2048 to 256", (0.7, 0.85), (0.7, 0.85)
    ),
    Goal(f"evaluation: tokens/s relative to {FASTEST}", "evaluation.chat.ratio", (1.6, 2.1), (1.4, 1.7), " x"),
)
SIDES = {
    "ours": "lorasmith",
    "peer": "PEFT + Trainer, fastest setting",
    "recipe": "PEFT + Trainer, usual setting",
}
CONTESTS = {
    "training.chat": "demo rows",
    "training.alpaca": "alpaca rows",
    "bloom.alpaca": "Bloom, alpaca rows",
    "evaluation.chat": "evaluation, demo rows",
    "sizes.360M": "model of 360M weights, demo rows",
}
STEP_OF = {"chat": "demo rows", "alpaca": "alpaca rows"}
STEP_LINES = {
    "tokens in the data": "{tokens_per_step:,.0f}",
    "tokens computed": "{computed_per_step:,.0f}",
    "tokens in the loss": "{labels_per_step:,.0f}",
    "seconds": "{seconds_per_step:.3f}",
    "lower bound: the required matrix products alone": "{limit_seconds_per_step:.3f} at {limit_gflops:,.0f} GFLOP/s",
    "tokens/s": "{tokens_per_second:,.0f}",
    "tokens/s, upper bound": "{limit_tokens_per_second:,.0f}",
    "seconds under the profiler": "{profiled[seconds_per_step]:.3f}",
}


def render(figures: dict[str, Any]) -> str:
    """All tables; what was not measured says so."""
    blocks = [
        _heading(figures),
        _goals(figures),
        _rates(figures),
        _parts(figures),
        _lengths(figures),
        _left_out(figures),
    ]
    return "\n\n".join(block for block in blocks if block)


def rewrite(page: str, table: str) -> str:
    """The page with `table` between its markers. Raises ValueError where they are not there, once and in order."""
    before, begin, rest = page.partition(BEGIN)
    _old, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in after:
        raise ValueError(f"needs one {BEGIN} and, after it, one {END}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def at(figures: dict[str, Any], place: str) -> Any:
    """The value at a dotted place of the sections; None where it was not measured."""
    found: Any = figures["sections"]
    for key in place.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _heading(figures: dict[str, Any]) -> str:
    machine, versions = figures["machine"], figures["versions"]
    names = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "system")
    set_by_hand = "".join(f", {name}={value}" for name, value in machine["environment"].items())
    minutes = f", {figures['seconds'] / 60:.0f} minutes" if "seconds" in figures else ""
    return (
        f"`{figures['command']}`, {figures['date'][:10]}{minutes}; {machine['cores']} cores of {machine['processor']} "
        f"({', '.join(machine['flags'])}{set_by_hand}), {machine['memory_mib'] / 1024:.0f} GiB, "
        f"lorasmith in {machine['dtype']}; {names}"
    )


def _goals(figures: dict[str, Any]) -> str:
    lines = []
    for goal in GOALS:
        value = at(figures, goal.place)
        required, aim = getattr(goal, figures["machine"]["kind"])
        measured = "not measured" if value is None else f"{value:.2f}{goal.unit}"
        lines.append((goal.what, goal.better, measured, f"{required:g}{goal.unit}", f"{aim:g}{goal.unit}"))
    return _table(("figure", "better", "measured", "required", "goal"), lines)


def _rates(figures: dict[str, Any]) -> str:
    lines = []
    for place, name in CONTESTS.items():
        contest = at(figures, place) or {}
        for side, program in SIDES.items():
            found = contest.get(side)
            if found and not (side == "recipe" and found["setting"] == contest["peer"]["setting"]):
                lines.append((name, program, found["setting"], *_numbers(found)))
    return _table(("work", "program", "setting", "tokens/s", "peak MiB", "seconds to the first step", "rounds"), lines)


def _numbers(found: dict[str, Any]) -> tuple[str, ...]:
    start = found["start_seconds"]
    texts = f"{found['tokens_per_second']:,.0f}", f"{found['peak_mib']:,.0f}", f"{start:.1f}" if start else "-"
    return (*texts, str(found["rounds"]))


def _parts(figures: dict[str, Any]) -> str:
    measured = {name: found for name in STEP_OF if (found := at(figures, f"parts.{name}"))}
    if not measured:
        return ""
    lines = [(what, *(text.format(**found) for found in measured.values())) for what, text in STEP_LINES.items()]
    for part in PARTS:
        lines.append((f"- {part}", *(_share(found["profiled"], part) for found in measured.values())))
    return _table(("one step of lorasmith", *(STEP_OF[name] for name in measured)), lines)


def _share(profiled: dict[str, Any], part: str) -> str:
    seconds = profiled["parts"][part]
    return f"{seconds:.3f}, {seconds / profiled['seconds_per_step']:.0%}"


def _lengths(figures: dict[str, Any]) -> str:
    found = at(figures, "lengths") or {}
    numbers = sorted(int(name) for name in found if name.isdigit())
    lines = [
        (f"{n:,}", f"{found[str(n)]['tokens_per_second']:,.0f}", f"{found[str(n)]['peak_mib']:,.0f}") for n in numbers
    ]
    growth = at(figures, "sizes.360M.times_slower") or {}
    grown = [f"{SIDES[side].split(',')[0]} {times:.2f} times" for side, times in growth.items()]
    table = _table(("lorasmith, tokens per row", "tokens/s", "peak MiB"), lines)
    text = f"From 135M to 360M weights a token takes longer: {', '.join(grown)}." if grown else ""
    return "\n\n".join(block for block in (table, text) if block)


def _left_out(figures: dict[str, Any]) -> str:
    return "\n".join(f"- not measured: {what}: {why.splitlines()[0]}" for what, why in figures["left_out"].items())


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [" | ".join(line) for line in lines]
    if not rows:
        return ""
    return "\n".join(f"| {row} |" for row in (" | ".join(head), " | ".join("---" for _name in head), *rows))


def main(words: Sequence[str] | None = None) -> int:
    """Rewrite the pages; 2: one has no place for the table, and none is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("pages", type=Path, nargs="*", default=PAGES)
    args = parser.parse_args(words)
    table, pages = render(json.loads(args.json.read_text("utf-8"))), dict[Path, str]()
    for path in args.pages:
        try:
            pages[path] = rewrite(path.read_text("utf-8"), table)
        except (OSError, ValueError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
    for path, page in pages.items():
        path.write_text(page, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
