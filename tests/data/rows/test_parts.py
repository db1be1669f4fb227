"""Contents that are lists of parts, and tags that stand for images."""

import pytest

from lorasmith.data.rows.parts import Content, content_problem, media_tag, parse_content, unsupported_part


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
        ([{"type": "tool_result", "tool_use_id": "t", "content": "sun"}], Content(results=(("t", "sun"),))),
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
    ],
)
def test_parts_that_cannot_be_read(part, problem):
    assert problem in content_problem("value", [{"type": "text", "text": ""}, part])


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
