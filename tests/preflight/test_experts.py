"""What check says of experts: trained, left out with their share of the model, and routers that stay as they are."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from lorasmith.preflight.check import check
from lorasmith.preflight.experts import Experts
from lorasmith.preflight.facts import labeled_facts
from tests.support.checks import config
from tests.support.experts import moe_folder
from tests.support.model_folders import ENDS, make_folder
from tests.support.tiny import rows_file


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("experts") / "rows.jsonl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("models")
    families = ("mixtral", "gpt_oss", "jetmoe")
    return {family: str(moe_folder(place / family, family)) for family in families}


def said(rows: Path, folder: str, **options: Any) -> tuple[list[tuple[str, str]], list[str]]:
    result = check(config(rows, model=folder, **options))
    assert not result.problems
    labels = ("weights", "experts", "routers")
    lines = [(label, text) for label, text in labeled_facts(result.facts) if label in labels]
    return lines, [text for text in result.warnings if "experts" in text]


@pytest.mark.parametrize(("family", "router"), [("mixtral", "gate"), ("gpt_oss", "router")])
def test_experts_are_trained_with_all_linear(family: str, router: str, rows: Path, folders: dict[str, str]) -> None:
    E, H, F, r = 4, 32, 48, 4
    size = 2 * E * r * (H + 2 * F + F + H)
    lines, warnings = said(rows, folders[family])
    assert lines == [
        (
            "weights",
            f"experts.gate_up_proj with rank {r}, experts.down_proj with rank {r}: {size:,} of the trainable "
            "parameters (--exclude-modules experts leaves them out)",
        ),
        ("routers", f"no adapter on {router}: the choice of experts is not trained"),
    ]
    assert not warnings


def test_left_out_on_request_they_are_named_with_their_share(rows: Path, folders: dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["mixtral"])
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    share = sum(size for name, size in sizes.items() if ".experts." in name) / sum(sizes.values())
    assert share > 0.4
    lines, warnings = said(rows, folders["mixtral"], exclude_modules=["experts"])
    assert lines[0] == ("experts", f"no adapter on experts: {share:.0%} of all parameters")
    assert not warnings
    lines, warnings = said(rows, folders["mixtral"], target_modules=["q_proj"])
    assert lines[0] == ("experts", f"no adapter on experts: {share:.0%} of all parameters")
    assert not warnings
    lines, _warnings = said(rows, folders["mixtral"], target_parameters=["experts.gate_up_proj"])
    assert lines[0][1].startswith("experts.gate_up_proj with rank 8:"), "named, so it has the rank that is given"
    assert lines[1][1].startswith("no adapter on experts: ")


def test_what_leaves_experts_out_is_said_by_the_names_of_the_model(rows: Path, folders: dict[str, str]) -> None:
    lines, _warnings = said(rows, folders["jetmoe"])
    assert lines[0][1].endswith("(--exclude-modules input_linear output_linear leaves them out)")
    lines, _warnings = said(rows, folders["jetmoe"], exclude_modules=["input_linear", "output_linear"])
    assert {text.partition(":")[0] for _label, text in lines} == {
        "no adapter on input_linear", "no adapter on output_linear"
    }  # fmt: skip


def test_experts_that_cannot_be_adapted_are_a_warning(rows: Path, tmp_path: Path) -> None:
    """DBRX has the weights of all experts in one matrix, which another module reads."""
    sizes = {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "d_model": 32, "n_heads": 4}
    experts = {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}, "n_layers": 2}
    folder = str(make_folder(tmp_path / "model", "dbrx", ENDS | sizes | experts | {"max_seq_len": 128}))
    lines, (warning,) = said(rows, folder)
    assert lines[0][0] == "experts"
    assert "no adapter on mlp: " in lines[0][1]
    assert "of the model's parameters get no adapter: those of the experts in mlp, to which LoRA" in warning


def test_a_model_without_experts_has_nothing_to_say(rows: Path) -> None:
    assert check(config(rows)).facts.experts == Experts()
