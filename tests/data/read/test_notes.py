"""What is said of a file besides its rows: scores, marks without an effect, and placeholders."""

from lorasmith.data.read.files import read_file
from tests.support.row_files import CHAT, ROW


def test_scores_that_are_not_used_are_warned_of(write):
    path = write("a.jsonl", [ROW | {"score": 1}, ROW | {"score": None}])
    assert read_file(path).warnings == (
        f"{path}: 'score' looks like a score of the answers (1 rows) and is not used: good and bad answers are learned "
        "alike. Remove rows with bad answers.",
    )


def test_labels_of_0_and_1_beside_an_answer_are_warned_of(write):
    path = write("a.jsonl", [CHAT | {"label": 0}, CHAT | {"label": 1.0}, CHAT | {"label": None}])
    assert read_file(path).warnings == (
        f"{path}: 'label' is 0 or 1 (1 rows with 0) and is not used. If 0 marks bad answers, train with --method kto, "
        "or remove these rows: good and bad answers are learned alike.",
    )
    for row in ({"text": "Nice.", "label": 0}, ROW | {"label": 1}, ROW | {"label": "positive"}):
        assert read_file(write("b.jsonl", [row, row | {"label": 2}])).warnings == ()
    table = "prompt,completion,label\na,b,1\nc,d,0\n"
    assert "'label' is 0 or 1 (1 rows with 0)" in read_file(write("c.csv", table)).warnings[0]


def test_prompts_that_are_marked_to_be_trained_on_are_told(write):
    question, answer = CHAT["messages"]
    path = write("a.jsonl", [{"messages": [question | {"train": True}, answer]}, CHAT])
    assert read_file(path).warnings == (
        f"{path} line 1: messages that are not answers are marked to be trained on, which only data.learn 'all' does.",
    )


def test_placeholders_that_are_left_are_warned_of_in_any_case(write):
    path = write("a.jsonl", [ROW | {"output": "I am {{NAME}}, by {{author}}."}])
    assert read_file(path).warnings == (
        f"{path} line 1: the placeholder {{{{NAME}}}} is trained on as it is. Give the text for it with --fill "
        "NAME=TEXT.",
        f"{path} line 1: the placeholder {{{{author}}}} is trained on as it is. Give the text for it with --fill "
        "author=TEXT.",
    )


def test_code_with_braces_is_no_placeholder(write):
    assert read_file(write("a.jsonl", [ROW | {"output": "{{ user }} {name}"}])).warnings == ()
