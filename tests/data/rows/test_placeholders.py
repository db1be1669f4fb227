"""Placeholders in rows."""

from lorasmith.data.rows.placeholders import fill, placeholders


def test_placeholders_are_filled_in_all_texts_and_the_row_is_not_changed():
    row = {"messages": [{"content": "I am {{name}}, made by {{ author }}."}], "n": 3, "text": "{{other}} {name}"}
    assert placeholders(row) == {"name", "author", "other"}
    assert fill(row, {"name": r"A\da", "author": "{{name}}"}) == {
        "messages": [{"content": r"I am A\da, made by {{name}}."}], "n": 3, "text": "{{other}} {name}",
    }  # fmt: skip
    assert row["messages"][0]["content"].startswith("I am {{name}}")
    assert fill(row, {"x": "y"}) is row
    assert fill(row, {}) is row
