"""What vLLM refuses of an adapter is said when it is exported."""

from dataclasses import replace

import pytest

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.export.vllm import rank_for_vllm, vllm_findings
from tests.support.exported import adapter_of


def findings(adapter, tmp_path, **options):
    folder = AdapterFolder.read_header(adapter_of(adapter.parent / "base", tmp_path / "other", **options))
    return rank_for_vllm(folder), list(vllm_findings(folder))


@pytest.mark.parametrize(
    ("options", "rank", "text"),
    [
        ({"r": 4}, 8, None),
        ({"r": 12, "use_rslora": True}, 16, None),
        ({"r": 20}, 32, "This adapter has rank 20, so vLLM needs --max-lora-rank 32."),
        ({"r": 4, "use_dora": True}, 8, "does not support DoRA"),
        ({"r": 4, "modules_to_save": ["lm_head"]}, 8, "does not support modules_to_save (lm_head)"),
        ({"r": 4, "rank_pattern": {"q_proj": 24}}, 32, "ignores rank_pattern and alpha_pattern"),
    ],
)
def test_what_vllm_refuses_is_said(options, rank, text, adapter, tmp_path):
    found, texts = findings(adapter, tmp_path, **options)
    assert found == rank
    assert not texts if text is None else text in texts[0], texts


def test_a_tensor_that_vllm_does_not_know_is_named(adapter):
    folder = AdapterFolder.read_header(adapter)
    assert list(vllm_findings(folder)) == []
    (text,) = vllm_findings(replace(folder, shapes={**folder.shapes, "base_model.model.q_proj.bias": (8,)}))
    assert "does not know the tensor base_model.model.q_proj.bias" in text


def test_a_rank_above_512_is_too_large(adapter):
    folder = AdapterFolder.read_header(adapter)
    (text,) = vllm_findings(replace(folder, peft_config={**folder.peft_config, "rank_pattern": {}, "r": 600}))
    assert "its rank is 600; 512 is the largest" in text
