"""Writes docs/errors.md and docs/errors.zh.md: every error under its literal text, from code, catalogue and notes.

python -m tools.errors_page
"""

import re
import sys
from dataclasses import dataclass

from lorasmith.i18n import _, using_language
from tools.error_texts import ErrorText, error_texts
from tools.pages import block, code, notes, places, write

PAGES = places("errors")
HEADS = {
    "en": """# Errors

*[中文](errors.zh.md)*

On this page you can find out what an error message means and how to fix it. It lists every message that ends a command
with exit code 2, in its exact words: search the page for a part of the message that you saw. `{name}` stands for what
the message filled in. In Python, the same messages are exceptions of `lorasmith.errors`.
The page is generated from the code by `make docs`.
""",
    "zh": """# 错误

*[English](errors.md)*

在这一页可以查到一条错误信息是什么意思、怎样解决。这里按原文列出所有使命令以退出码 2 结束的信息，中英文对照：
请在本页搜索你看到的信息的一部分。`{name}` 代表信息中填入的内容。
在 Python 里，同样的信息是 `lorasmith.errors` 中的异常。本页由 `make docs` 从代码生成。
""",
}


@dataclass(frozen=True)
class Notes:
    """What errors.toml holds: classes in their order, texts that are only parts, and notes by text."""

    classes: dict[str, dict[str, str]]
    parts: frozenset[str]
    notes: dict[str, dict[str, str]]

    @classmethod
    def read(cls) -> "Notes":
        """The file's content."""
        found = notes("errors")
        return cls(
            {one["name"]: one for one in found["class"]},
            frozenset(text for part in found["part"] for text in part["texts"]),
            {one["text"]: one for one in found["note"]},
        )


def page(language: str) -> str:
    """The whole page in `en` or `zh`; a text that several classes share stands once, under the first."""
    notes, texts = Notes.read(), error_texts()
    lines = [HEADS[language]]
    listed: set[str] = set()
    for name, about in notes.classes.items():
        lines += [f"## {name}", "", about[language], ""]
        for one in texts:
            if one.error == name and one.text not in notes.parts | listed:
                listed.add(one.text)
                lines += _entry(one, notes, language)
    return "\n".join(lines).rstrip() + "\n"


def _entry(one: ErrorText, notes: Notes, language: str) -> list[str]:
    """A text as a heading, further lines of it under it, in Chinese the English text too, then the note."""
    with using_language(language):
        first, *further = shown_as(_(one.text)).split("\n")
    lines = [f"### {code(first)}", ""]
    if further:
        lines += block("text", "\n".join(further))
    if language != "en":
        lines += [code(shown_as(one.text).split("\n")[0]), ""]
    if note := notes.notes.get(one.text):
        lines += [note[language], ""]
    return lines


def shown_as(text: str) -> str:
    """`text` as a person sees it, but for the values: 'x' for {x!r}, {x} for {x:.3f}."""
    text = re.sub(r"\{(\w+)!r\}", r"'{\1}'", text)
    return re.sub(r"\{(\w+)[:!][^{}]*\}", r"{\1}", text).replace("{{", "{").replace("}}", "}")


if __name__ == "__main__":
    sys.exit(write(PAGES, page))
