"""docs/compatibility.md: chat templates by kinds of conversations, as `make corpus` found them."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tests.data.corpus.conversations import KINDS
from tests.data.corpus.oracle import REFUSED, RIGHT, TOLD, WRONG, Verdict

SIGNS = {RIGHT: "✓", TOLD: "told", REFUSED: "refused", WRONG: "**wrong**"}
INTRODUCTION = """# Chat templates and conversations

This page shows what lorasmith does with {count} chat templates that people use, for {kinds} kinds of conversations. It
is made by `make corpus`, which compares the learned tokens with an oracle that uses only transformers' own rendering:
the learned tokens must be the answer, with what the template writes around it, and the token that ends it; the tokens
before them must be those of the prompt at inference; and where a template marks answers with `{{% generation %}}`, they
must be the marked ones. The tokenizers are small ones that know the special tokens of each template.

- **✓**: the answers are learned exactly.
- **told**: the answers are learned, and lorasmith says what the template leaves out, such as the reasoning.
- **refused**: an error says why, and nothing is trained. Most of these templates reject the conversation themselves:
  they have no place for a system message, or for tool calls.

{table}
{missing}
## Templates

{rows}
"""


def write(page: Path, found: Mapping[str, Mapping[str, Verdict]], missing: Mapping[str, int]) -> None:
    """Write the page."""
    counts = {kind: Counter(fates[kind].fate for fates in found.values()) for kind in KINDS}
    fates = [fate for fate in SIGNS if any(count[fate] for count in counts.values())]
    table = _table(["conversation", *fates], [[kind, *(str(counts[kind][fate]) for fate in fates)] for kind in KINDS])
    rows = _table(
        ["template", *KINDS], [[name, *(SIGNS[fates[kind].fate] for kind in KINDS)] for name, fates in found.items()]
    )
    left_out = "".join(f"\nNot tried: {count} templates of {source}.\n" for source, count in missing.items())
    text = INTRODUCTION.format(count=len(found), kinds=len(KINDS), table=table, missing=left_out, rows=rows)
    page.write_text(text.rstrip() + "\n", "utf-8")


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))
