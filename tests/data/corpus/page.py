"""docs/compatibility.md and .zh.md: chat templates by kinds of conversations, as `make corpus` found them."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tests.data.corpus.conversations import KINDS
from tests.data.corpus.oracle import REFUSED, RIGHT, TOLD, WRONG, Verdict

SIGNS = {RIGHT: "✓", TOLD: "told", REFUSED: "refused", WRONG: "**wrong**"}
ENGLISH = """# Chat templates and conversations

*[中文](compatibility.zh.md)*

On this page you can look up whether lorasmith learns your conversations exactly with the chat template of your model. It shows {count} chat templates that people use, and {kinds} kinds of conversations.
`make corpus` made it: it compares the learned tokens with an oracle that uses only transformers' own rendering. The learned tokens must be the answer, with what the template writes around it, and the
token that ends it. The tokens before them must be the prompt at inference. Where a template marks answers with `{{% generation %}}`, the learned tokens must be the marked ones. The tokenizers are
small ones that know the special tokens of each template.

- **✓**: the answers are learned exactly.
- **told**: the answers are learned, and a warning says what the template leaves out, such as the reasoning.
- **refused**: an error says why, and nothing is trained. Most of these templates reject the conversation themselves: they have no place for a system message, or for function calls.

{table}
{missing}
## By template

{rows}
"""
CHINESE = """# 聊天模板与对话

*[English](compatibility.md)*

在这一页可以查到：使用你的模型的聊天模板时，lorasmith 能否准确地学习你的对话。这里列出 {count} 个常用的聊天模板和 {kinds} 种对话。
本页由 `make corpus` 生成：它把计入损失的 token 与另一种只使用 transformers 自己的渲染结果的算法相比较。计入损失的 token 必须是回答、模板写在回答前后的内容，以及结束回答的 token；
在它们之前的 token 必须是推理时的提示词；如果模板用 `{{% generation %}}` 标出了回答，计入损失的 token 必须是标出的那些。所用的 tokenizer 都很小，但认识各个模板的特殊 token。

- **✓**：准确地学习回答。
- **told**：学习回答，并用警告说明模板没有渲染什么，例如思考过程。
- **refused**：报错说明原因，不进行训练。其中多数是模板自己拒绝这种对话：它不支持 system 消息或函数调用。

{table}
{missing}
## 各个模板

{rows}
"""
WORDS = {
    "compatibility.md": (ENGLISH, "conversation", "template", "\nNot tried: {count} templates of {source}.\n"),
    "compatibility.zh.md": (CHINESE, "对话", "模板", "\n没有测试：{source} 的 {count} 个模板。\n"),
}


def write(folder: Path, found: Mapping[str, Mapping[str, Verdict]], missing: Mapping[str, int]) -> None:
    """Write the page in both languages."""
    counts = {kind: Counter(fates[kind].fate for fates in found.values()) for kind in KINDS}
    fates = [fate for fate in SIGNS if any(count[fate] for count in counts.values())]
    lines = [[kind, *(str(counts[kind][fate]) for fate in fates)] for kind in KINDS]
    rows = [[name, *(SIGNS[fates[kind].fate] for kind in KINDS)] for name, fates in found.items()]
    for name, (text, conversation, template, left_out) in WORDS.items():
        page = text.format(
            count=len(found),
            kinds=len(KINDS),
            table=_table([conversation, *(SIGNS[fate] for fate in fates)], lines),
            missing="".join(left_out.format(count=count, source=source) for source, count in missing.items()),
            rows=_table([template, *KINDS], rows),
        )
        (folder / name).write_text(page.rstrip() + "\n", "utf-8")


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))
