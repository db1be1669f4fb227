"""The data of the demo: conversations between two people, from the package `chitchat-dataset` (MIT license)."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

from lorasmith.config.files import parse_json
from lorasmith.data.rows.conversation import Message, Record
from lorasmith.data.rows.formats import to_conversation
from lorasmith.errors import DataError
from lorasmith.i18n import _
from lorasmith.model.row import IGNORED, Example

ROLES = ("user", "assistant")  # who speaks first, and who answers


class Utterance(TypedDict):
    """One message as it was typed."""

    sender: str
    text: str


class DemoRows(NamedTuple):
    """The demo's rows, not truncated: training truncates them to the length by which they were chosen."""

    held_out: list[Record]
    train: list[Record]


def demo_split(
    dataset: Path,
    encode: Callable[[Sequence[Message]], Example],
    max_length: int = 128,
    held_out: int = 64,
    train: int = 256,
) -> DemoRows:
    """The first `held_out` and the next `train` conversations, in a shuffled order that is always the same.

    encode: `Template.encode`. Conversations without a target in their first `max_length` tokens are skipped. Raises
    DataError if the file is not the data set, or has too few conversations.
    """
    records = conversations(dataset)
    random.Random(0).shuffle(records)
    chosen: list[Record] = []
    for record in records:
        if len(chosen) == held_out + train:
            break
        if _learns_within(encode(to_conversation(record).messages), max_length):
            chosen.append(record)
    if len(chosen) < held_out + train:
        raise DataError(
            _(
                "{file}: only {found} conversations have something to train on in their first {length} tokens, "
                "but {wanted} are needed. Ask for fewer rows.",
                file=dataset,
                found=len(chosen),
                length=max_length,
                wanted=held_out + train,
            )
        )
    return DemoRows(chosen[:held_out], chosen[held_out:])


def conversations(dataset: Path) -> list[Record]:
    """Conversations of four or more turns between exactly two people (3,243 of 7,168 in version 0.9.0), in file order.

    A record has `messages` and the source 'chitchat:ID'. Raises DataError if the file is not the data set.
    """
    try:
        content = parse_json(dataset.read_bytes())
        return list(_records(content))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            _(
                "{file} is not the chitchat dataset ({reason}). Delete the file and try again.",
                file=dataset,
                reason=error,
            )
        ) from error


def _records(content: dict[str, dict[str, list[list[Utterance]]]]) -> Iterator[Record]:
    for name, entry in content.items():
        turns = entry["messages"]
        people = {utterance["sender"] for turn in turns for utterance in turn}
        if len(turns) < 4 or len(people) != 2:
            continue
        messages = _messages(turns)
        if len(messages) > 1:
            yield Record({"messages": messages}, f"chitchat:{name}")


def _messages(turns: list[list[Utterance]]) -> list[dict[str, str]]:
    """Alternating messages, each the texts that one person typed in a row, joined by line breaks.

    In the file every turn has one sender, and consecutive turns have different ones. Blank texts (30 of 237,000) are
    left out, because an empty answer would teach the model to say nothing; if nothing is left of a turn (11 times), the
    turns around it, which have the same sender, become one message.
    """
    spoken: list[tuple[str, list[str]]] = []
    for utterance in (utterance for turn in turns for utterance in turn):
        if not utterance["text"].strip():
            continue
        if not spoken or spoken[-1][0] != utterance["sender"]:
            spoken.append((utterance["sender"], []))
        spoken[-1][1].append(utterance["text"])
    return [{"role": ROLES[i % 2], "content": "\n".join(texts)} for i, (_sender, texts) in enumerate(spoken)]


def _learns_within(example: Example, length: int) -> bool:
    """Whether one of the first `length` tokens is a target; `targets[i]` is token i + 1."""
    return any(target != IGNORED for target in example.targets[: length - 1])
