"""docs/errors.md and its Chinese twin hold every error of the code, and no other."""

import ast
import re

from tools.error_texts import Package, error_texts
from tools.errors_page import Notes, shown_as

from tests.support.raised import texts_in


def test_texts_are_found_where_they_are_raised_returned_and_collected():
    found = {(one.error, one.text) for one in error_texts()}
    assert len(found) > 170
    for error, text in (
        ("ConfigError", "--resume: specify the run to resume with --output RUN"),  # in the raise itself
        ("ConfigError", "{key}: unknown key."),  # returned by a function, appended to a list
        ("ConfigError", "unknown option {flag}."),  # handed on to another file
        (
            "ConfigError",
            "the values of rank_pattern and alpha_pattern must be greater than 0, up to {most}",
        ),  # a ValueError for pydantic
        ("DataError", "two answers follow each other. Put a message with the role 'user' between them."),
        (
            "AdapterError",
            "all B matrices are zero, so the adapter changes nothing: this file contains no trained weights.",
        ),
    ):
        assert (error, text) in found, text
    said = {text for _error, text in found}
    assert not said & {"training", "options", "Finished. The adapter is in {folder}", ", "}


def test_a_class_that_extends_one_of_its_own_name_is_no_endless_chain():
    package = Package()
    package.read(
        "a.py", ast.parse("class HelpFormatter(argparse.HelpFormatter): pass\nclass Mine(HelpFormatter): pass")
    )
    package.read("b.py", ast.parse("class DataError(LorasmithError): pass\nclass RowError(DataError): pass"))
    assert package.error_class("Mine") is None
    assert package.error_class("RowError") == "DataError"


def test_every_note_and_part_is_about_a_text_that_exists():
    notes, texts = Notes.read(), {one.text for one in error_texts()}
    assert {*notes.parts, *notes.notes} - texts == set()
    assert {one.error for one in error_texts()} == set(notes.classes)


def test_every_error_says_what_to_do():
    """A text of one clause, without a note, tells what was found and leaves the reader alone with it."""
    notes = Notes.read()
    short = {
        one.text
        for one in error_texts()
        if one.text not in notes.parts and one.text not in notes.notes and not re.search(r"[;:(]|\. |, ", one.text)
    }
    assert short == set()


def test_a_text_is_shown_as_it_is_met():
    assert shown_as("{a!r} {b:.3f} {{c}}") == "'{a}' {b} {c}"


def test_an_error_that_is_raised_is_known_by_its_text():
    """What --every-error counts: see raised.py."""
    assert texts_in("--metric a.py:b: the file a.py does not exist.") == {
        "--metric {metric}: the file {file} does not exist."
    }
    braces = 'a row must be an object like {"instruction": ..., "output": ...}, found 3.'
    assert texts_in(braces) == {braces.replace("{", "{{").replace("}", "}}").replace("3", "{found}")}
    assert texts_in("what nobody says") == set()
