"""Contents that are lists of parts, and tags that stand for images."""

import pytest

from lorasmith.data.rows.parts import (
    Content,
    content_problem,
    media_tag,
    parse_content,
    unread_part_keys,
    unsupported_part,
)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, Content()),
        ("Hi", Content("Hi")),
        ({"sky": "blü"}, Content('{"sky": "blü"}')),
        ([{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}, {"type": "text", "value": "c"}],
         Content("abc")),
        ([{"type": "thinking", "thinking": "Hm"}, {"type": "reasoning", "value": "."}], Content(reasoning="Hm.")),
        ([{"type": "tool_use", "name": "f", "input": {}}], Content(calls=({"type": "tool_use", "name": "f",
                                                                           "input": {}},))),
        ([{"type": "tool_result", "tool_use_id": "t", "content": "sun"}], Content(results=(("t", Content("sun")),))),
        ([{"type": "text", "text": "a", "train": False}, {"type": "text", "text": "bc", "weight": 1},
          {"type": "text", "text": "d", "weight": 0}], Content("abcd", masked=((0, 1), (3, 4)))),
    ],
)  # fmt: skip
def test_what_a_content_holds(content, found):
    assert content_problem("content", content) is None
    assert unsupported_part(content) is None
    assert parse_content(content) == found


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ("Hi", 'must look like {"type": "text", "text": ...}, found text.'),
        ({"type": "thinking", "text": 3}, 'must look like {"type": "thinking", "thinking": ...}, found a number.'),
        ({"type": "tool_use", "input": {}}, "must be a function call, such as"),
        ({"type": "tool_result", "content": ["x"]}, "'content': part 1 must look like"),
        ({"type": "text", "text": "x", "train": 0}, "part 2 is marked in a way that cannot be used: 'train' must be "
         "true or false, found a number."),
        ({"type": "text", "text": "x", "weight": 0.5}, "part 2 has 'weight': 0.5, but a part can only be trained on "
         "or not, and only if it is text."),
        ({"type": "text", "text": "x", "train_detail": []}, "part 2 has 'train_detail': []"),
        ({"type": "thinking", "thinking": "x", "loss": False}, "part 2 has 'loss': false, but a part"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be_read(part, problem):
    assert problem in content_problem("value", [{"type": "text", "text": ""}, part])


def test_keys_of_parts_that_are_not_read():
    parts = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "citations": None, "train": True},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}},
        {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "b", "lang": "en"}]},
    ]
    assert unread_part_keys(parts) == {"cache_control", "lang"}
    assert unread_part_keys("a") == set()


def test_parts_that_are_not_text():
    assert unsupported_part([{"type": "text", "text": "a"}, {"type": "image_url"}]) == "image_url"
    assert unsupported_part([{"type": "tool_result", "content": [{"type": "image"}]}]) == "image"


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("<image>\nWhat?", "<image>"),
        ("What is in <image>, and why?", "<image>"),
        ("What is said? <audio>", "<audio>"),
        ("What does the tag <video> do in HTML?", None),
        ("", None),
    ],
)
def test_tags_for_images_video_and_audio(text, tag):
    assert media_tag(text) == tag
