"""Names and licenses of base models, without the folders of this machine."""

import pytest

from lorasmith.adapters.session import open_adapters
from lorasmith.export.origin import license_of, origin_of


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


def test_the_origin_of_an_adapter(adapter):
    card = adapter.parent / "base" / "README.md"
    card.write_text("---\nlicense: mit\n---\n", "utf-8")
    found = origin_of(open_adapters([adapter]))
    card.unlink()
    assert found == {
        "general.base_model.count": 1, "general.base_model.0.name": "base", "general.license": "mit",
    }  # fmt: skip
