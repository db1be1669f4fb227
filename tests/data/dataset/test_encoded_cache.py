"""Rows encoded before: the same examples, for as long as nothing that decides their tokens has changed."""

import dataclasses
import os
import stat

import pytest

from lorasmith.config.data import DataConfig
from lorasmith.data.dataset import encoded_cache
from lorasmith.data.dataset.encoded_cache import encoded_path, load_encoded, save_encoded
from lorasmith.data.dataset.prepare import prepare_rows
from lorasmith.data.rows.conversation import Conversation, Message, Record
from lorasmith.data.template.encoding import Template
from lorasmith.model.row import Example
from lorasmith.system.cache import cache_folder
from tests.support.tiny import Watch

NOTHING: list[set[str]] = []  # is lost


def row(i: int, answer: str = "blue", **of_the_answer) -> Conversation:
    asked = Message("user", f"sky {i}?")
    return Conversation((asked, Message("assistant", answer, **of_the_answer)), f"train.jsonl:{i + 1}")


ROWS = [row(i) for i in range(70)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def examples(template: Template, rows: list[Conversation]) -> list[list[Example]]:
    return [template.encode_row(one) for one in rows]


def test_what_is_recalled_is_what_was_remembered(make):
    template = Template.of(make(None))
    rows = examples(template, ROWS)
    rows[3] = [rows[3][0], dataclasses.replace(rows[3][0], weights=[0.25] * len(rows[3][0].ids))]
    path = encoded_path(ROWS, template, "answers")
    assert load_encoded(path, ROWS) is None
    lost = [{"reasoning", "tools"}, *[set[str]()] * (len(rows) - 1)]
    save_encoded(path, rows, lost)
    assert load_encoded(path, ROWS) == (rows, lost)


def test_the_place_follows_all_that_decides_tokens_and_weights(make):
    template = Template.of(make(None))
    lasts = (
        ROWS[-1],
        row(69, "Blue"),
        row(69, weight=0.5),
        row(69, learn=False),
        dataclasses.replace(ROWS[-1], source="other.jsonl:70"),
        dataclasses.replace(ROWS[-1], tools=({"name": "look"},)),
        dataclasses.replace(ROWS[-1], messages=(), text="sky"),
    )
    paths = {encoded_path([*ROWS[:-1], last], template, "answers") for last in lasts}
    others = [dataclasses.replace(template, **change) for change in ({"stop_ids": (1,)}, {"system": "Be kind."})]
    paths |= {encoded_path(ROWS, other, "answers") for other in others} | {encoded_path(ROWS, template, "all")}
    assert len(paths) == len(lasts) + 3
    assert encoded_path(ROWS, Template.of(make(None)), "answers") in paths


def test_nobody_else_can_read_them(make):
    template = Template.of(make(None))
    place = encoded_path(ROWS, template, "answers")
    place.parent.mkdir(parents=True)
    place.parent.chmod(0o755)  # as an earlier version made it
    before = os.umask(0)
    save_encoded(place, examples(template, ROWS), NOTHING)
    os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (place.parent, place)] == [0o700, 0o600]
    place.parent.chmod(0o755)
    assert load_encoded(place, ROWS) is not None
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700


def test_who_trains_is_told_where_they_are(make):
    template, watch = Template.of(make("chatml")), Watch()
    row = [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]
    records = [Record({"messages": row}, f"a.jsonl:{i}") for i in range(1, 81)]
    for _time in range(2):  # made, then found again
        watch.said.clear()
        prepare_rows(records, None, DataConfig(), template, None, watch)
        (text,) = [text for text in watch.said if text.startswith("Encoded copies of these rows are kept in ")]
        assert str(cache_folder() / "rows") in text
    watch.said.clear()
    prepare_rows(records[:20], None, DataConfig(), template, None, watch)
    assert not any("Encoded copies" in text for text in watch.said)


def test_few_rows_are_encoded_anew(make):
    assert encoded_path(ROWS[:63], Template.of(make(None)), "answers") is None


@pytest.mark.parametrize("content", [b"", b"not a tensor", None])
def test_a_broken_file_is_encoded_anew(content, make):
    template = Template.of(make(None))
    path = encoded_path(ROWS, template, "answers")
    save_encoded(path, examples(template, ROWS), NOTHING)
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    assert load_encoded(path, ROWS) is None


def test_the_oldest_files_go(make, monkeypatch):
    monkeypatch.setattr(encoded_cache, "FILES", 2)
    template = Template.of(make(None))
    paths = [encoded_path(ROWS[: 64 + i], template, "answers") for i in range(4)]
    for i, path in enumerate(paths):
        save_encoded(path, examples(template, ROWS[: 64 + i]), NOTHING)
    assert sum(path.exists() for path in paths) == 2
    assert paths[-1].exists()


def test_a_cache_that_cannot_be_written_stops_nothing(make, tmp_path):
    (tmp_path / "lorasmith").write_text("a file where a folder belongs")
    template = Template.of(make(None))
    path = encoded_path(ROWS, template, "answers")
    save_encoded(path, examples(template, ROWS), NOTHING)
    assert load_encoded(path, ROWS) is None
