"""Which adapters belong together. What does not is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.adapters.combinable import kept_tensors, read_sources, refuse_differences
from lorasmith.adapters.folder import NAME
from lorasmith.errors import AdapterError
from lorasmith.report import Report
from tests.adapters.test_combine import adapter_of
from tests.support.peft_folder import SHOUTED, foreign, peft_folder

UNMERGED = ("lora_bias", "alora_invocation_tokens")  # merge refuses these, so it is no way out
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Heard(Report):
    """Collects the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters of ours and of PEFT."""
    folder = tmp_path_factory.mktemp("adapters")
    adapter_of(folder / "one", 1, target_modules=("q_proj",))
    adapter_of(folder / "two", 2, target_modules=("v_proj",))
    adapter_of(folder / "base", 1, base_seed=1, target_modules=("q_proj",))
    adapter_of(folder / "system", 1, target_modules=("q_proj",), system="Be brief.")
    adapter_of(folder / "head", 1, target_modules=("q_proj",), modules_to_save=("lm_head",))
    adapter_of(folder / "lora-head", 1, target_modules=("q_proj", "lm_head"))
    adapter_of(folder / "bias", 1, family="gpt2", target_modules=("c_attn",), bias="lora_only")
    adapter_of(folder / "dora", 1, target_modules=("q_proj",), use_dora=True)
    peft_folder(folder / "theirs", target_modules=["q_proj"])
    return folder


def edited(made: Path, name: str, to: Path, edit: Callable[[dict[str, Any]], None], file: str = CONFIG) -> Path:
    shutil.copytree(made / name, to)
    content = json.loads((to / file).read_text())
    edit(content)
    (to / file).write_text(json.dumps(content))
    return to


def checked(*adapters: Path | tuple[Path, float]) -> None:
    sources = read_sources([one if isinstance(one, tuple) else (one, 1.0) for one in adapters])
    refuse_differences(sources, Report())
    kept_tensors(sources)


def refusal(*adapters: Path | tuple[Path, float]) -> str:
    with pytest.raises(AdapterError) as error:
        checked(*adapters)
    return str(error.value)


def warned(*adapters: Path) -> list[str]:
    heard = Heard()
    refuse_differences(read_sources([(one, 1.0) for one in adapters]), heard)
    return heard.warnings


def test_scalings_and_ranks_come_from_the_patterns(tmp_path):
    options = {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}, "lora_alpha": 8}
    folder = peft_folder(tmp_path / "theirs", target_modules=["q_proj", "v_proj"], use_rslora=True, **options)
    (source,) = read_sources([(folder, 0.5)])
    found = {path.rpartition(".")[2]: (one.rank, one.scaling) for path, one in source.factors.items()}
    assert found == {"q_proj": (9, 8 / 3), "v_proj": (4, 1.5)}
    assert (source.weight, source.kept) == (0.5, {})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"kasa_config": {"beta": 1}, "use_dora": True}, "kasa_config, use_dora"),
        ({"bias": "all"}, "bias=all"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
    ],
)
def test_whatever_is_not_plain_lora_is_refused_by_name(made, tmp_path, options, named):
    """PEFT 0.21.2 combines most of these, and returns something else in silence (huggingface/peft#3761)."""
    folder = edited(made, "theirs", tmp_path / "x", lambda config: config.update(options))
    text = refusal(folder, made / "two")
    assert text.startswith(f"{folder}: trained with {named}, so its change of a layer is more than the product")
    assert ("Merge it into its base model with lorasmith merge" in text) == (named not in UNMERGED)


def test_mica_leaves_the_base_as_it_is_and_is_plain_lora(made, tmp_path):
    mica = edited(made, "theirs", tmp_path / "x", lambda config: config.update(init_lora_weights="mica"))
    checked(mica, made / "theirs")


def test_variants_and_biases_of_real_folders_are_refused(made):
    text = refusal(made / "dora", made / "bias")
    assert "dora: trained with use_dora, " in text
    assert "bias: trained with bias=lora_only, " in text


def test_other_bases_are_refused(made):
    text = refusal(made / "one", made / "base")
    assert "belong to different base models (" in text
    assert "they differ in: tensors" in text


def test_a_base_that_only_has_another_name_is_warned_of(made, tmp_path):
    moved = edited(made, "theirs", tmp_path / "x", lambda config: config.update(base_model_name_or_path="org/llama"))
    (text,) = warned(made / "theirs", moved)
    assert f"and {moved} names org/llama. Whether these are the same" in text
    assert warned(made / "theirs", made / "theirs") == []


def test_other_templates_are_refused_and_other_system_messages_warned_of(made, tmp_path):
    def change(metadata: dict[str, Any]) -> None:
        metadata["template"]["chat_template"] += "x"

    other = edited(made, "two", tmp_path / "x", change, NAME)
    assert "were trained with different chat templates or stop tokens" in refusal(made / "one", other)
    (text,) = warned(made / "one", made / "system")
    assert f"with different system messages. The combined adapter has that of {made / 'one'};" in text
    *_names, text = warned(made / "theirs", made / "system")
    assert f"cannot be compared. The combined adapter has that of {made / 'system'}." in text


def test_other_added_tokens_are_refused(made, tmp_path):
    def add(token: str, i: int = 300) -> Callable[[dict[str, Any]], None]:
        return lambda metadata: metadata.update(version=2, tokens=[{"id": i, "token": token}])

    a, b = edited(made, "one", tmp_path / "a", add("<a>"), NAME), edited(made, "two", tmp_path / "b", add("<b>"), NAME)
    assert "with the id 300: '<a>' and '<b>'. Train both with the same data.add_tokens." in refusal(a, b)
    moved = edited(made, "two", tmp_path / "moved", add("<a>", 301), NAME)
    assert "'<a>' to the vocabulary with different ids: 300 and 301." in refusal(a, moved)
    assert warned(a, made / "two") == []


def test_other_templates_and_tokens_of_another_tool_are_refused(tmp_path):
    for name, token in (("a", "<a>"), ("b", "<b>"), ("c", "<a>")):
        foreign(tmp_path / name, "llama", (token,), modules_to_save=["embed_tokens", "lm_head"])
    assert "'<a>' and '<b>'. Train both with the same data.add_tokens." in refusal(tmp_path / "a", tmp_path / "b")
    assert warned(tmp_path / "a", tmp_path / "c") == []
    (tmp_path / "c" / "chat_template.jinja").write_text(SHOUTED)
    assert "with different chat templates" in refusal(tmp_path / "a", tmp_path / "c")


def test_a_module_that_is_trained_in_full_cannot_be_weighted(made):
    text = refusal((made / "head", 0.5), made / "two")
    assert text.startswith(f"base_model.model.lm_head.weight: {made / 'head'} (0.5) trained this in full")
    assert "trained this in full" in refusal(made / "head", made / "head")
    sources = read_sources([(made / "head", 0.25), (made / "head", 0.75), (made / "two", -3.0)])
    assert list(kept_tensors(sources)) == ["base_model.model.lm_head.weight"]  # equal, and the weights add up to 1


def test_two_modules_that_are_trained_in_full_differ(made, tmp_path):
    other = adapter_of(tmp_path / "other", 5, target_modules=("q_proj",), modules_to_save=("lm_head",))
    assert "trained this in full" in refusal((made / "head", 0.5), (other, 0.5))


def test_a_module_with_lora_in_one_and_trained_in_full_in_another_is_refused(made):
    text = refusal(made / "head", made / "lora-head")
    assert f"lm_head is trained in full by {made / 'head'}, but has LoRA in another adapter" in text


def test_copies_of_the_base_model_must_be_the_same(made, tmp_path):
    """PEFT saves the embedding along with A and B of it."""
    folder = peft_folder(tmp_path / "one", target_modules=["embed_tokens", "q_proj"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    sources = read_sources([(folder, 0.3), (folder, 0.2)])
    assert list(kept_tensors(sources)) == [key]
    shutil.copytree(folder, tmp_path / "two")
    tensors = load_file(folder / WEIGHTS)
    tensors[key] = tensors[key] + 1
    save_file(tensors, tmp_path / "two" / WEIGHTS)
    assert f"{key} is a weight of the base model that was saved along, and it differs" in refusal(
        folder, tmp_path / "two"
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: tensors.pop(next(key for key in tensors if "lora_B" in key)), "does not have an A and a B of"),
        (lambda tensors: tensors.update({"base_model.model.x.lora_C": torch.ones(1)}), "lora_C is neither A nor B of"),
        (lambda tensors: next(iter(tensors.values())).fill_(torch.nan), "NaN or infinity in "),
    ],
)
def test_broken_files_are_refused(made, tmp_path, change, text):
    shutil.copytree(made / "theirs", tmp_path / "x")
    tensors = load_file(made / "theirs" / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "x" / WEIGHTS)
    found = refusal(tmp_path / "x", made / "one")
    assert found.startswith(f"{tmp_path / 'x' / WEIGHTS}: ")
    assert text in found


def test_a_rank_that_the_options_do_not_say_is_refused(made, tmp_path):
    folder = edited(made, "theirs", tmp_path / "x", lambda config: config.update(r=5))
    assert "of the rank that adapter_config.json gives it (5)" in refusal(folder, made / "one")
