"""The serving figures as Markdown, with their minimum and target values.

python -m bench.serving.table bench-serve.json [docs/serving.md ...]      rewrites what stands between the two markers
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RATES = {  # names of closed.py as the table tells them
    "mixed": "8 adapters mixed",
    "generate": "base, transformers' `generate`",
    "peft mixed": "8 adapters mixed, PEFT",
    "set_adapter one by one": "8 adapters, PEFT's `set_adapter`, one request at a time",
}
BEGIN, END = "<!-- bench-serve -->", "<!-- /bench-serve -->"
GOALS = (  # what; its place in the figures of a dtype; required value and goal in float32, in bfloat16
    ("base, relative to transformers' `generate` with the same batch", "base_over_generate", (1.3, 2), (1.3, 2)),
    ("8 adapters mixed, relative to the base alone", "mixed_over_base", (0.85, 0.95), (0.75, 0.9)),
    ("8 adapters mixed, relative to PEFT's mixed-adapter batch", "mixed_over_peft", (2.3, 4), (3.5, 8)),
    ("8 adapters mixed, relative to PEFT's `set_adapter` for one request at a time", "mixed_over_serial", None, None),
)


def render(data: dict[str, Any]) -> str:
    """The Markdown section."""
    return "\n".join(_lines(data))


def _lines(data: dict[str, Any]) -> Iterator[str]:
    machine, sections = data["machine"], data["sections"]
    yield f"{data['date']}, {machine['processor']}, {machine['cores']} cores, {', '.join(machine['flags'])}; "
    yield ", ".join(f"{name} {version}" for name, version in data["versions"].items()) + "."
    closed = sections.get("closed", {})
    if closed:
        yield from ("", "| 16 requests of 32 tokens | " + " | ".join(closed) + " | required (goal) |")
        yield "| --- |" + " --- |" * (len(closed) + 1)
        for what, place, *goals in GOALS:
            values = " | ".join(f"{figures[place]:.2f} x" for figures in closed.values())
            wanted = {"float32": goals[0], "bfloat16": goals[1]}
            told = ", ".join(f"{w[0]} ({w[1]}) in {d}" for d, w in wanted.items() if w and d in closed)
            yield f"| {what} | {values} | {told or '-'} |"
        yield from _closed_lines(closed)
    if load := sections.get("load", {}).get("open"):
        yield from _load_lines(load)
    for what, why in data["left_out"].items():
        yield f"\n{what}: left out: {why}."


def _closed_lines(closed: dict[str, Any]) -> Iterator[str]:
    dtypes = list(closed.values())

    def row(what: str, *places: str, unit: str = "", required: str = "-") -> str:
        values = []
        for figures in dtypes:
            found = figures
            for place in places:
                found = found[place]
            values.append(f"{found:,.0f}{unit}" if found >= 100 else f"{found:.3g}{unit}")
        return f"| {what} | {' | '.join(values)} | {required} |"

    for name in dtypes[0]["tokens_per_second"]:
        yield row(f"tokens/s: {RATES.get(name, name)}", "tokens_per_second", name)
    for kind in dtypes[0]["mixed_over_llamacpp"] or {}:
        yield row(
            f"8 adapters mixed, relative to llama.cpp in {kind} for one request at a time",
            "mixed_over_llamacpp",
            kind,
            unit=" x",
        )
    yield row("switching to an adapter that is in use", "switch", "in_columns_ms", unit=" ms", required="2 (0.2) ms")
    yield row(
        "switching to an adapter that is in memory", "switch", "from_memory_ms", unit=" ms", required="2 (0.2) ms"
    )
    for name, text in (("first_token_ms", "time to the first token"), ("between_tokens_ms", "between tokens")):
        yield row(f"{text}, 8 adapters mixed, p50", name, "p50", unit=" ms")
        yield row(f"{text}, 8 adapters mixed, p99", name, "p99", unit=" ms")
    count = dtypes[0]["registered"]["adapters"]
    yield row(f"memory of {count} adapters", "registered", "grown_mib", unit=" MiB", required="size of their files")
    yield row(f"size of the files of {count} adapters", "registered", "files_mib", unit=" MiB")
    for dtype, figures in closed.items():
        batch = figures["generate_batch"]
        told = f"{batch['tokens_per_second']:.0f} tokens/s" if "tokens" in batch else batch["error"]
        yield f"\ntransformers' `generate_batch` on the base in {dtype}: {told}."
    for dtype, figures in closed.items():
        theirs = figures["llamacpp"]
        if "absent" in theirs:
            yield f"\nllama.cpp beside {dtype}: not measured ({theirs['absent']})."
            continue
        parts = [f"{kind} {part['adapters']:.0%}" for kind, part in theirs["agreement"].items()]
        version = f"`llama-cpp-python` {theirs['version']}"
        yield f"\nllama.cpp, in the measurements with {dtype}: {version}, {theirs['system']}."
        yield "Share of its tokens that are also the greedy choice of transformers after the same text: "
        yield f"{', '.join(parts)}."


def _load_lines(load: dict[str, Any]) -> Iterator[str]:
    memory = load["memory_mib"]
    rate = load["capacity_per_second"]
    most = f"The server answers {rate:.1f} requests of this test per second at most."
    yield f"\nServer under load. {most} {load['requests']:,} requests arrive at 80% of this rate."
    yield "\n| outcome | requests |\n| --- | --- |"
    for fate, number in sorted(load["fates"].items()):
        yield f"| {fate} | {number:,} |"
    yield f"| neither answered nor rejected | {load['lost']} |"
    yield "\n| figure | value |\n| --- | --- |"
    first, whole = load["first_token_s"], load["whole_reply_s"]
    yield f"| time to the first token, p50, p99 | {first['p50']:.2f} s, {first['p99']:.2f} s |"
    yield f"| whole reply, p50, p99 | {whole['p50']:.2f} s, {whole['p99']:.2f} s |"
    resident = f"{memory[0]:,.0f}, {max(memory):,.0f}, {memory[-1]:,.0f} MiB"
    yield f"| memory of the server at the start, at its peak, at the end | {resident} |"
    yield f"| exit status after SIGTERM | {load['exit_status']} |"


def main() -> int:
    """Print the section, or insert it into pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("pages", type=Path, nargs="*")
    args = parser.parse_args()
    text = render(json.loads(args.json.read_text("utf-8")))
    for page in args.pages:
        before, _begin, rest = page.read_text("utf-8").partition(BEGIN)
        _old, end, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after if end else rest}", "utf-8")
    if not args.pages:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
