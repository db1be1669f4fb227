"""The card of an adapter, which tests/export/test_peft_folder.py reads as a whole."""

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.export.card import Card, of_run


def test_the_card_names_a_rank_that_vllm_accepts(adapter):
    text = Card("mine", "org/base", AdapterFolder.read_header(adapter), "", "mit", *of_run(adapter)).text()
    assert text.startswith(
        "---\nbase_model: org/base\nlibrary_name: peft\npipeline_tag: text-generation\nlicense: mit\n"
    )
    assert "--max-lora-rank 8 " in text
