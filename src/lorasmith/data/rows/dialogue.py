"""Dialogues in one text with the speakers of HH-RLHF (arXiv:2204.05862): Human and Assistant."""

import re

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def dialogue(text: object) -> list[dict[str, str]] | None:
    """The messages of such a text; None if it is no text that begins with what a human says.

    An answer that has no words at the end, as in a prompt that is to be continued, is left out.
    """
    if not isinstance(text, str):
        return None
    before, *parts = _TURN.split(text)
    if before.strip() or parts[:1] != ["Human"] or "Assistant" not in parts[::2]:
        return None
    turns = zip(parts[::2], parts[1::2], strict=True)
    messages = [{"role": _ROLES[speaker], "content": said.strip()} for speaker, said in turns]
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages
