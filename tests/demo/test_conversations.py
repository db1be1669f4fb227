"""The demo's rows: who is user, what one turn is, and the same choice each time."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from lorasmith.data.rows.conversation import Message
from lorasmith.data.rows.formats import to_conversation
from lorasmith.demo.conversations import conversations, demo_split
from lorasmith.errors import DataError
from lorasmith.loading.packages import CHITCHAT
from lorasmith.model.row import IGNORED, Example
from lorasmith.system.cache import cache_folder

PUBLISHED = cache_folder() / "packages" / f"{CHITCHAT.name}-{CHITCHAT.version}" / CHITCHAT.file


def turn(sender: str, *texts: str) -> list[dict[str, str]]:
    """One entry of `messages` in the data set."""
    return [{"sender": sender, "text": text, "timestamp": "2018-05-02T19:38:15Z"} for text in texts]


def write(path: Path, **talks: list[list[dict[str, str]]]) -> Path:
    """A data set of these conversations."""
    path.write_text(json.dumps({name: {"start": "", "messages": turns} for name, turns in talks.items()}))
    return path


def encode(messages: Sequence[Message]) -> Example:
    """A token for each character; the assistant's are learned."""
    ids = [ord(character) for message in messages for character in message.content]
    learned = [message.role == "assistant" for message in messages for _ in message.content]
    targets = [token if learn else IGNORED for token, learn in zip(ids[1:], learned[1:], strict=True)] + [IGNORED]
    return Example(ids, targets, [1.0] * len(ids), "")


TALK = [turn("a", "Hello", "you there?"), turn("b", " yes "), turn("a", "good"), turn("b", "bye")]


def test_who_speaks_first_is_the_user(tmp_path: Path) -> None:
    (record,) = conversations(write(tmp_path / "d.json", one=TALK))
    assert record.source == "chitchat:one"
    assert to_conversation(record).messages == (
        Message("user", "Hello\nyou there?"),
        Message("assistant", " yes "),
        Message("user", "good"),
        Message("assistant", "bye"),
    )


def test_short_and_crowded_conversations_are_left_out(tmp_path: Path) -> None:
    three = [*TALK[:3], turn("c", "me too")]
    path = write(tmp_path / "d.json", short=TALK[:3], crowded=three, alone=[turn("a", "hm")] * 4, empty=[], good=TALK)
    assert [record.source for record in conversations(path)] == ["chitchat:good"]


def test_blank_texts_are_no_turns(tmp_path: Path) -> None:
    turns = [turn("a", "one", " "), turn("b", "", "\n"), turn("a", "two"), turn("b", "three")]
    (record,) = conversations(write(tmp_path / "d.json", one=turns))
    assert to_conversation(record).messages == (Message("user", "one\ntwo"), Message("assistant", "three"))


def test_choice_is_by_what_is_learned_within_the_length_and_always_the_same(tmp_path: Path) -> None:
    late = [turn("a", "x" * 20), *TALK[1:]]
    talks = {f"t{i}": late if i % 2 else TALK for i in range(12)}
    path = write(tmp_path / "d.json", **talks)
    split = demo_split(path, encode, max_length=20, held_out=2, train=3)
    chosen = [record.source for record in (*split.held_out, *split.train)]
    assert (len(split.held_out), len(split.train), len(set(chosen))) == (2, 3, 5)
    assert all(int(source.removeprefix("chitchat:t")) % 2 == 0 for source in chosen)
    assert split == demo_split(path, encode, max_length=20, held_out=2, train=3)
    with pytest.raises(
        DataError, match="only 6 conversations have something to train on in their first 20 tokens, but 7"
    ):
        demo_split(path, encode, max_length=20, held_out=2, train=5)


def test_the_token_at_the_length_counts_and_the_one_after_does_not(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", one=[turn("a", "x" * 9), turn("b", "y"), turn("a", "z"), turn("b", "z")])
    assert len(demo_split(path, encode, max_length=10, held_out=0, train=1).train) == 1
    with pytest.raises(DataError):
        demo_split(path, encode, max_length=9, held_out=0, train=1)


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": 3}', '{"a": {"messages": [[{"text": "x"}]]}}'])
def test_another_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(DataError, match=r"other\.json is not the chitchat dataset"):
        conversations(tmp_path / "other.json")


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the package chitchat-dataset is not in the cache")
def test_the_published_data_set_has_3243_conversations() -> None:
    records = conversations(PUBLISHED)
    assert len(records) == 3243
    for record in records:
        messages = to_conversation(record).messages  # raises where a message is empty
        assert [m.role for m in messages] == [("user", "assistant")[i % 2] for i in range(len(messages))]
    first, second = (to_conversation(record).messages[0].content for record in records[:2])
    assert first == "Hello\nHow are you doing today?"
    assert second
