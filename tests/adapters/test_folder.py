"""An adapter folder, each of its files read once: what it knows, and that hash and tensors are of the same bytes."""

import json
import shutil
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorasmith.adapters.folder import NAME, AdapterFolder, find_adapter, write_adapter
from lorasmith.adapters.merge import merge_run
from lorasmith.adapters.session import open_adapters
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.encoding import Template
from lorasmith.engine.engine import Engine
from lorasmith.errors import AdapterError
from lorasmith.loading.load import load_base
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.lora.files import ADAPTER_WEIGHTS
from lorasmith.lora.inject import inject
from lorasmith.model.base import Base
from lorasmith.runs.inspect import inspect_folder
from lorasmith.serve.discovery import discover, read
from lorasmith.serve.registry import Registry, attach, load_version
from tests.support.families import stir
from tests.support.peft_folder import peft_folder
from tests.support.tiny import model_folder, trained

FILES = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, NAME]
_opened: list[str] = []


def _listen(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and isinstance(args[0], str) and args[0].endswith((".json", ".safetensors")):
        _opened.append(args[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is only read."""
    folder = tmp_path_factory.mktemp("adapter") / "run"
    trained(folder)
    return folder


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """A copy of its adapter, to spoil."""
    return Path(shutil.copytree(run / "adapter", tmp_path / "mine"))


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(ModelConfig(model=str(model_folder()), dtype="float32", device="cpu"))


def reads_of(folder: Path) -> Counter[str]:
    """How often each file of it was opened since the last call."""
    found = Counter(Path(name).name for name in _opened if Path(name).parent == folder)
    _opened.clear()
    return found


@pytest.fixture(scope="module", autouse=True)
def _opens() -> None:
    sys.addaudithook(_listen)  # there is no way to take one off again; it only notes


def test_it_knows_all_that_is_in_its_files(run: Path, base: Base) -> None:
    one = AdapterFolder.read(run / "adapter")
    tensors = load_file(run / "adapter" / ADAPTER_WEIGHTS)
    assert one.tensors.keys() == tensors.keys() == one.shapes.keys()
    assert all(torch.equal(one.tensors[key], tensor) for key, tensor in tensors.items())
    assert one.shapes == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert one.size == (run / "adapter" / ADAPTER_WEIGHTS).stat().st_size
    assert one.hash == sha256(b"".join(sha256((run / "adapter" / n).read_bytes()).digest() for n in FILES)).hexdigest()
    assert (one.config.r, one.base, one.notes["dtype"]) == (8, str(model_folder()), "float32")
    assert one.template(base).stop_ids
    assert one.metadata is not None
    assert one.metadata["base"]["identity"] == base.identity


def test_a_glance_is_the_same_without_the_numbers(run: Path) -> None:
    one, glance = AdapterFolder.read(run / "adapter"), AdapterFolder.read_header(run / "adapter")
    assert (glance.hash, glance.tensors) == ("", {})
    assert (glance.peft_config, glance.metadata, glance.shapes, glance.size) == (
        one.peft_config,
        one.metadata,
        one.shapes,
        one.size,
    )
    assert one.without_tensors().tensors == {}
    assert one.without_tensors().hash == one.hash


def test_a_folder_of_another_tool_has_the_bases_template(tmp_path: Path, base: Base) -> None:
    one = AdapterFolder.read(peft_folder(tmp_path, target_modules=["q_proj"]))
    assert (one.metadata, one.notes) == (None, {})
    assert one.template(base).to_json() == Template.of(base.tokenizer, "auto", one.template(base).stop_ids).to_json()


@pytest.mark.parametrize("name", FILES)
def test_another_byte_is_another_hash(folder: Path, name: str) -> None:
    before = AdapterFolder.read(folder).hash
    if name == ADAPTER_WEIGHTS:
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(content)
    else:
        (folder / name).write_text((folder / name).read_text("utf-8") + "\n", "utf-8")
    assert AdapterFolder.read(folder).hash != before


def test_the_hash_is_of_what_was_read_even_where_the_folder_is_replaced_meanwhile(folder: Path, base: Base) -> None:
    one = AdapterFolder.read(folder)
    for name in FILES:
        (folder / name).unlink()
    tensors = one.tensors_in(base.dtype)
    assert one.config.r == 8
    assert all(torch.equal(tensors[key], one.tensors[key]) for key in one.tensors)
    one.load_into(base, "gone")
    assert "gone" in base.adapters
    del base.adapters["gone"]


def test_each_file_is_read_once_on_the_way_to_an_adapter_that_is_served(run: Path) -> None:
    own = load_base(ModelConfig(model=str(model_folder()), dtype="float32", device="cpu"))
    registry, folder = Registry(own, "base", []), run / "adapter"
    Engine(own)
    (found,) = discover([run]).adapters.values()
    reads_of(folder)
    assert registry.put(found).discovered is not None
    assert reads_of(folder) == dict.fromkeys(FILES, 1)
    later = read("later", run)
    version = load_version(own, later, later.adapter.tensors_in(own.dtype))
    assert reads_of(folder) == dict.fromkeys(FILES, 1)
    assert version.discovered is not None
    assert version.discovered.hash == registry.versions["run"].discovered.hash  # type: ignore[union-attr]
    assert version.discovered.adapter.tensors == {}, "it waits in one place only"


def test_each_file_is_read_once_to_open_it(run: Path) -> None:
    reads_of(run / "adapter")
    session = open_adapters([run], ModelConfig(device="cpu"))
    assert reads_of(run / "adapter") == dict.fromkeys(FILES, 1)
    assert session.folders["run"].tensors == {}


def test_info_shows_pefts_defaults_where_the_file_does_not_say(folder: Path) -> None:
    raw = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    (folder / ADAPTER_CONFIG).write_text(
        json.dumps({k: v for k, v in raw.items() if k not in ("lora_alpha", "r")}), "utf-8"
    )
    assert (inspect_folder(folder)["r"], inspect_folder(folder)["lora_alpha"]) == (8, 8)


@pytest.mark.parametrize("read_it", [AdapterFolder.read, AdapterFolder.read_header])
def test_what_is_missing_or_broken_is_said(folder: Path, read_it: object) -> None:
    assert callable(read_it)
    (folder / ADAPTER_WEIGHTS).write_bytes(b"\x08")
    with pytest.raises(AdapterError, match="not a valid safetensors file"):
        read_it(folder)
    (folder / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=rf"does not contain {ADAPTER_WEIGHTS}"):
        read_it(folder)
    (folder / ADAPTER_CONFIG).unlink()
    with pytest.raises(AdapterError, match=rf"does not contain {ADAPTER_CONFIG}"):
        read_it(folder)
    with pytest.raises(AdapterError, match="not a run or adapter folder"):
        find_adapter(folder)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            ["one/adapter_config.json", "two/adapter_config.json"],
            "the adapters are in folders inside it: one, two. Give",
        ),
        (["checkpoint-50/adapter_config.json", "config.json"], "the adapters are in folders inside it: checkpoint-50."),
        (["config.json", "model.safetensors"], "this is a model, not an adapter. Give it with --model."),
        (["adapters.safetensors"], "not a run or adapter folder (adapter_config.json not found)."),
    ],
)
def test_what_a_folder_holds_instead_of_an_adapter_is_said(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(AdapterError) as caught:
        find_adapter(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: {says}")
    with pytest.raises(AdapterError, match=r"this is a file. Give the folder of the run or adapter\."):
        find_adapter(tmp_path / files[0])


def test_a_block_that_is_trained_whole_is_not_served_beside_others(tmp_path: Path) -> None:
    own, other = (load_base(ModelConfig(model=str(model_folder()), dtype="float32", device="cpu")) for _ in range(2))
    config = LoraConfig(r=2, target_modules=("up_proj",), modules_to_save=("self_attn",))
    other.adapters["block"] = inject(other.model, config, other.router, "block")
    stir(other.adapters["block"])
    write_adapter(other, "block", Template.of(other.tokenizer), tmp_path, {})
    one = AdapterFolder.read(tmp_path)
    with pytest.raises(
        AdapterError, match=r"model\.layers\.0\.self_attn: the adapter trains this module in full, and the module uses"
    ):
        attach(own, "block", one, one.tensors_in(own.dtype))
    assert own.adapters == {}


def test_a_run_that_trained_a_block_whole_is_opened_and_merged(tmp_path: Path) -> None:
    summary = trained(tmp_path / "run", target_modules=["up_proj"], modules_to_save=["self_attn"])
    assert summary.loss_after is not None
    assert summary.loss_before is not None
    assert summary.loss_after < summary.loss_before
    session = open_adapters([tmp_path / "run"], ModelConfig(dtype="float32", device="cpu"))
    assert session.generate("Why is the sky blue?", temperature=0) != session.generate(
        "Why is the sky blue?", adapter=None, temperature=0
    )
    assert merge_run(tmp_path / "run", tmp_path / "merged", ModelConfig(device="cpu")).holds
