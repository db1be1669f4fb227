"""The license of a base model is that of its card."""

import pytest

from lorasmith.loading.license import license_of


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- x\n---\n# Model\n", "apache-2.0"),
        ('---\nlanguage: en\nlicense: "llama3.2"\n---\n', "llama3.2"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("# Model\nlicense: mit\n", None),
    ],
)
def test_the_license_is_that_of_the_model_card(tmp_path, card, found):
    (tmp_path / "README.md").write_text(card, "utf-8")
    assert license_of(tmp_path) == found


def test_without_a_card_it_is_not_known(tmp_path):
    assert license_of(tmp_path) is None
