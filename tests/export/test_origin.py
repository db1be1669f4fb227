"""Names and licenses of base models, without the folders of this machine."""

from lorasmith.adapters.session import open_adapters
from lorasmith.export.origin import origin_of


def test_the_origin_of_an_adapter(adapter):
    card = adapter.parent / "base" / "README.md"
    card.write_text("---\nlicense: mit\n---\n", "utf-8")
    found = origin_of(open_adapters([adapter]))
    card.unlink()
    assert found == {
        "general.base_model.count": 1, "general.base_model.0.name": "base", "general.license": "mit",
    }  # fmt: skip
