"""Rows encoded before: the same examples, for as long as nothing that decides their tokens has changed."""

import dataclasses

import pytest

from lorasmith.data import encoded
from lorasmith.data.conversation import Record
from lorasmith.data.encoded import place_of, recall, remember
from lorasmith.data.template import Template
from lorasmith.model.row import Example

ROWS = [Record({"instruction": f"sky {i}?", "output": "blue"}, f"train.jsonl:{i + 1}") for i in range(70)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def examples(template: Template, rows: list[Record]) -> list[list[Example]]:
    return [template.encode_all(template.conversation(record).messages, record.source) for record in rows]


def test_what_is_recalled_is_what_was_remembered(make):
    template = Template.of(make(None))
    rows = examples(template, ROWS)
    rows[3] = [rows[3][0], dataclasses.replace(rows[3][0], weights=[0.25] * len(rows[3][0].ids))]
    place = place_of(ROWS, template)
    assert recall(place, ROWS) is None
    remember(place, rows)
    assert recall(place, ROWS) == rows


def test_the_place_follows_rows_sources_and_template(make):
    template, other = Template.of(make(None)), dataclasses.replace(Template.of(make(None)), stop_ids=(1,))
    changed = [*ROWS[:-1], Record({"instruction": "sky 69?", "output": "Blue"}, ROWS[-1].source)]
    moved = [Record(record.fields, "other" + record.source) for record in ROWS]
    places = {
        place_of(rows, t) for rows, t in ((ROWS, template), (ROWS, other), (changed, template), (moved, template))
    }
    assert len(places) == 4
    assert place_of(ROWS, Template.of(make(None))) in places


def test_few_rows_are_encoded_anew(make):
    assert place_of(ROWS[:63], Template.of(make(None))) is None


@pytest.mark.parametrize("content", [b"", b"not a tensor", None])
def test_a_broken_file_is_encoded_anew(content, make):
    template = Template.of(make(None))
    place = place_of(ROWS, template)
    remember(place, examples(template, ROWS))
    place.write_bytes(place.read_bytes()[:-20] if content is None else content)
    assert recall(place, ROWS) is None


def test_the_oldest_files_go(make, monkeypatch):
    monkeypatch.setattr(encoded, "FILES", 2)
    template = Template.of(make(None))
    places = [place_of(ROWS[: 64 + i], template) for i in range(4)]
    for i, place in enumerate(places):
        remember(place, examples(template, ROWS[: 64 + i]))
    assert sum(place.exists() for place in places) == 2
    assert places[-1].exists()


def test_a_cache_that_cannot_be_written_stops_nothing(make, tmp_path):
    (tmp_path / "lorasmith").write_text("a file where a folder belongs")
    template = Template.of(make(None))
    place = place_of(ROWS, template)
    remember(place, examples(template, ROWS))
    assert recall(place, ROWS) is None
