"""A measure from the user's own file: used as it is, and refused with file, line and example."""

import pytest

from lorasmith.errors import ConfigError
from lorasmith.evaluation.custom_metric import custom_metric
from lorasmith.evaluation.metrics import answer_statistics

GOOD = "from neighbor import HALF\n\ndef score(prediction, reference):\n    return HALF * (prediction == reference)\n"


def test_a_function_and_what_lies_beside_it(tmp_path):
    (tmp_path / "neighbor.py").write_text("HALF = 0.5\n", "utf-8")
    (tmp_path / "my.py").write_text(GOOD, "utf-8")
    metric = custom_metric(f"{tmp_path / 'my.py'}:score")
    assert answer_statistics(metric, ["a", "b"], ["a", "c"]).tolist() == [[0.5, 1.0], [0.0, 1.0]]
    assert (metric.key, metric.name) == (f"{tmp_path / 'my.py'}:score", "score")


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("def score(:\n", "score", "my.py line 1: SyntaxError"),
        ("x = 1\nimport no_such_package_here\n", "score", "my.py line 2: ModuleNotFoundError"),
        ("def score(p, r): ...\n", "scores",
         "function 'scores' not found; the file defines: score. Did you mean 'score'?"),
        ("score = 3\n", "score", "function 'score' not found; the file defines: none"),
        (None, "score", "my.py does not exist"),
        ("", "a b", "must name a file and a function in it, such as my.py:score"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_metric(tmp_path, text, name, words):
    if text is not None:
        (tmp_path / "my.py").write_text(text, "utf-8")
    with pytest.raises(ConfigError) as caught:
        custom_metric(f"{tmp_path / 'my.py'}:{name}")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("x = {}\n    return x[reference]", "my.py line 3: KeyError: 'the wanted one'"),
        ("return None", "must return a finite number, but returned None"),
        ("return float('nan')", "must return a finite number, but returned nan"),
        ("return 'high'", "must return a finite number, but returned 'high'"),
    ],
)
def test_what_goes_wrong_with_an_example(tmp_path, body, words):
    (tmp_path / "my.py").write_text(f"def score(prediction, reference):\n    {body}\n", "utf-8")
    metric = custom_metric(f"{tmp_path / 'my.py'}:score")
    with pytest.raises(ConfigError) as caught:
        answer_statistics(metric, ["the reply"], ["the wanted one"])
    assert words in str(caught.value)
    assert "(prediction 'the reply', reference 'the wanted one')" in str(caught.value)
