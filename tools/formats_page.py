"""Writes docs/formats.md and docs/formats.zh.md: each example of formats.toml read by our reader, a run's files listed.

python -m tools.formats_page
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorasmith.cli.check_result import row_text
from lorasmith.data.read.files import read_file
from lorasmith.data.template.encoding import Template
from lorasmith.errors import DataError
from lorasmith.i18n import using_language
from lorasmith.preflight.rows import text_spans
from tools.format_files import MADE, shown
from tools.pages import block, code, notes, places, table, write
from tools.tiny_run import private_cache, tiny_run, tokenizer

PAGES = places("formats")


def page(language: str) -> str:
    """The whole page in `en` or `zh`."""
    known = notes("formats")
    words = known["words"][language]
    with TemporaryDirectory() as folder, chdir(folder), using_language(language), private_cache(Path(folder)):
        Path("tools.jinja").write_text(known["tools"], "utf-8")
        lines = [known["head"][language], f"## {words['files']}", "", words["about_files"], ""]
        for one in known["file"]:
            Path(one["name"]).write_text(one["text"].lstrip("\n"), "utf-8")
            lines += [f"### {code(one['name'])}", "", one[language], ""]
            lines += [*block(one["language"], one["text"].lstrip("\n")), *_read(one["name"])]
        for one in known["made"]:
            MADE[one["function"]]()
            lines += ["### " + ", ".join(map(code, one["names"])), "", one[language], ""]
            lines += [*block("python", shown(one["function"])), *_read(*one["names"])]
        lines += [words["more_files"], "", f"## {words['rows']}", "", words["about_rows"], ""]
        for one in known["row"]:
            lines += _row(one, language, known["tools"])
        lines += [f"## {words['mistakes']}", "", words["about_mistakes"], "", *_mistakes(known["mistakes"])]
        lines += [f"## {words['run']}", "", words["about_run"], ""]
        lines += _run(known, words, language)
    return "\n".join(lines).rstrip() + "\n"


def _read(*names: str, **options: Any) -> list[str]:
    """What the reader says of these files."""
    return block("text", "\n".join(note for name in names for note in read_file(name, **options).notes))


def _row(one: dict[str, Any], language: str, tools: str) -> list[str]:
    """A row, what it is recognized as, and its text with what is learned between marks."""
    Path("rows.jsonl").write_text(one["text"].lstrip("\n"), "utf-8")
    made = tokenizer()
    template = Template.of(made, one.get("template", "chatml"))
    options = {"renamed": one.get("map", {}), "filling": one.get("fill", {}), "method": one.get("method", "lora")}
    (record,) = read_file("rows.jsonl", **options).records
    texts = [
        row_text(text_spans(example, made, template.stop_ids), marked=True, whole=True).plain
        for conversation in (template.answers(record) if "method" in one else [template.conversation(record)])
        for example in template.encode_row(conversation)
    ]
    lines = [f"### {one[language]}", "", one[f"about_{language}"], "", *block("json", one["text"].lstrip("\n"))]
    lines += [*_read("rows.jsonl", **options), *block("text", "\n".join(texts))]
    return lines + (block("jinja", tools) if one.get("template") == "tools.jinja" else [])


def _mistakes(text: str) -> list[str]:
    """A file with mistakes, and all that is said of them."""
    Path("rows.jsonl").write_text(text.lstrip("\n"), "utf-8")
    try:
        read_file("rows.jsonl")
    except DataError as error:
        return [*block("text", text.lstrip("\n")), *block("text", "\n".join(error.problems))]
    raise AssertionError("no mistake was found")


def _run(known: dict[str, Any], words: dict[str, str], language: str) -> list[str]:
    """The files of a run that was made now, and the keys in them; one without a caption is a KeyError."""
    run = tiny_run(Path.cwd())
    about = json.loads((run / "adapter" / "lorasmith.json").read_text("utf-8"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    found = {
        "run": {re.sub(r"\d{6}", "N", name) for name in _names(run)},
        "adapter": {path.name for path in (run / "adapter").iterdir()},
        "about": {
            f"{key}.{inner}" if isinstance(value, dict) else key
            for key, value in about.items()
            for inner in _keys(value)
        },
        "metrics": {key for line in metrics for key in line},
        "summary": set(json.loads((run / "summary.json").read_text("utf-8"))),
    }
    lines: list[str] = []
    for part, names in found.items():
        if odd := names ^ set(known[part]):
            raise KeyError(f"formats.toml, [{part}]: captions and files differ in {', '.join(sorted(odd))}")
        lines += [] if part == "run" else [f"### {words[part]}", ""]
        lines += table(
            [words["name"], words["holds"]], ((code(key), text[language]) for key, text in known[part].items())
        )
    return lines


def _names(run: Path) -> Iterator[str]:
    """Files and folders of a run, the checkpoints one by one."""
    for path in [*run.iterdir(), *(run / "checkpoints").iterdir()]:
        if path.name != "checkpoints":
            yield os.fspath(path.relative_to(run)) + "/" * path.is_dir()


def _keys(value: object) -> list[str]:
    return list(value) if isinstance(value, dict) else [""]


if __name__ == "__main__":
    sys.exit(write(PAGES, page))
