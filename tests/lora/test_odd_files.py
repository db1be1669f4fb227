"""Adapter folders with anything in them: loaded, or AdapterError and the base model bit for bit as before."""

import json
import math
import struct
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.errors import AdapterError
from lorasmith.lora import inject
from lorasmith.lora.adapter_config import ADAPTER_CONFIG, PEFT_DEFAULTS
from lorasmith.lora.files import ADAPTER_WEIGHTS
from lorasmith.lora.inject import remove
from lorasmith.model.base import Base
from lorasmith.runs.inspect import facts_of
from tests.support.families import adapted, tiny_base
from tests.support.llama_adapter import KEY, configure

TABLE = json.loads(Path(__file__).with_name("peft_options.json").read_text("utf-8"))
KEYS = [option["key"] for option in TABLE["options"]]
DEEP: Any = "q_proj"
for _level in range(90):
    DEEP = [DEEP]
VALUES: list[Any] = [
    None, True, 0, "", "x", [], [1], {}, {"a": 1}, False, 1, -1, 2.5, 1e308, math.nan, math.inf, 10**400, "q_proj", "[",
    "(?P<", "\0", "a" * 9999, "all-linear", "é.ü", [[]], [None], [-1], [True], [10**30], [2.5], [""], ["["], ["q_proj"],
    ["q_proj", None], ["q_proj", "q_proj"], ["q_proj", 1], [{}], {"": 1}, {"q_proj": None}, {"q_proj": -1},
    {"q_proj": 4}, {"q_proj": []}, {"q_proj": "x"}, {"q_proj": 10**400}, {"(": 3}, {"q_proj": {"q_proj": 1}},
    {"embed_tokens": [1, 1]}, DEEP,
]  # fmt: skip
READ = {  # options of which more than whether they are set is read
    *PEFT_DEFAULTS, "peft_type", "task_type", "base_model_name_or_path", "target_modules", "exclude_modules",
    "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "trainable_token_indices", "target_parameters", "fan_in_fan_out", "use_dora",
}  # fmt: skip


def state(base: Base) -> dict[str, Any]:
    """Everything of a base that loading an adapter could change."""
    model = base.model
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {
        "modules": [(path, type(module), module.training) for path, module in model.named_modules()],
        "tensors": {name: (t.dtype, t.shape, t.requires_grad, digest(t)) for name, t in tensors.items()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "router": (base.router.active, base.router.slices, base.router.stacked),
        "adapters": list(base.adapters),
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
    }


def digest(tensor: Tensor) -> str:
    return sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def loads(base: Base, folder: Path) -> bool:
    """Whether it is loaded; it is removed again. Nothing but an AdapterError that names the folder may be raised."""
    with suppress(AdapterError):
        facts_of(AdapterFolder.read_header(folder), folder)
    active, trained = base.router.active, [p for p in base.model.parameters() if p.requires_grad]
    problems: tuple[str, ...] = ()
    try:
        AdapterFolder.read(folder).load_into(base, "odd")
    except AdapterError as error:
        problems = error.problems
    assert all(str(folder) in problem for problem in problems), problems
    if problems:
        return False
    remove(base.model, "odd")
    del base.adapters["odd"]
    base.router.active = active
    base.model.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    return True


@pytest.fixture(scope="module")
def alone() -> Base:
    return tiny_base("llama")


@pytest.fixture(scope="module")
def shared() -> Base:
    """A base with another adapter, whose layers, copies and router must stay as they are."""
    base, adapter = adapted("llama", target_modules=("q_proj", "up_proj"), modules_to_save=("norm",))
    base.adapters["default"] = adapter
    return base


@pytest.fixture(params=["alone", "shared"])
def base(request: pytest.FixtureRequest) -> Iterator[Base]:
    """A base that is the same, bit for bit, after each test."""
    found: Base = request.getfixturevalue(request.param)
    before = state(found)
    yield found
    after = state(found)
    assert after == before, [key for key in before if after[key] != before[key]]


@pytest.mark.parametrize("key", [*KEYS, "lora_parameters", "some_option"])
def test_any_value_of_any_option(key: str, alone: Base, folder: Path) -> None:
    before, content = state(alone), json.loads((folder / ADAPTER_CONFIG).read_text())
    for value in VALUES if key in READ else VALUES[:9]:
        (folder / ADAPTER_CONFIG).write_text(json.dumps(content | {key: value}))
        loads(alone, folder)
    assert state(alone) == before
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content))
    assert loads(alone, folder)


def stored(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, which may be anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(**entry: Any) -> dict[str, Any]:
    return {KEY.format("A"): {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]} | entry}


WRONG_FILES = {
    "empty": b"", "seven bytes": b"1234567", "no header": struct.pack("<Q", 0), "zeros": bytes(64),
    "a text": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "a zip": b"PK\x03\x04" + bytes(60),
    "a huge header": stored({}, length=2**63 + 5), "a header of 8 GB": stored({}, length=8 * 2**30),
    "a header beyond the end": stored({}, length=50), "no JSON": stored(b"{nothing"),
    "no UTF-8": stored(b'{"\xff": 1}'),
    "a list": stored([]), "null": stored(None), "a number": stored(3), "deep": stored(b"[" * 5000),
    "no tensors": stored({}),
    "only metadata": stored({"__metadata__": {"format": "pt"}}),
    "odd metadata": stored({"__metadata__": {"format": 3}}),
    "metadata that is a tensor": stored({"__metadata__": one()[KEY.format("A")]}, bytes(4)),
    "an entry that is null": stored({"x": None}), "an entry without shape": stored({"x": {"dtype": "F32"}}),
    "an unknown dtype": stored(one(dtype="F33"), bytes(4)), "a dtype of 4 bits": stored(one(dtype="F4", shape=[8]),
    bytes(4)),
    "another dtype": stored(one(dtype="F8_E8M0", shape=[4]), bytes(4)), "U64": stored(one(dtype="U64", shape=[0]),
    b""),
    "a negative shape": stored(one(shape=[-1, 1]), bytes(4)), "a huge shape": stored(one(shape=[2**62, 8]),
    bytes(4)),
    "a shape of floats": stored(one(shape=[1.0, 1.0]), bytes(4)), "offsets backwards": stored(one(data_offsets=[4,
    0])),
    "offsets beyond the end": stored(one(data_offsets=[0, 4000]), bytes(4)),
    "one offset": stored(one(data_offsets=[0])),
    "too few bytes": stored(one(shape=[2, 2]), bytes(4)), "bytes left": stored(one(), bytes(99)),
    "a gap": stored(one(data_offsets=[4, 8]), bytes(8)),
    "overlapping": stored(one() | {"x": one()[KEY.format("A")]}, bytes(4)),
    "the same key twice": stored(json.dumps(one()).encode()[:-1] + b", " + json.dumps(one()).encode()[1:],
    bytes(4)),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_any_file_of_weights(kind: str, base: Base, folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).write_bytes(WRONG_FILES[kind])
    assert not loads(base, folder)


def test_a_file_that_ends_anywhere(base: Base, folder: Path) -> None:
    data = (folder / ADAPTER_WEIGHTS).read_bytes()
    for end in [*range(0, 600, 37), len(data) - 1]:
        (folder / ADAPTER_WEIGHTS).write_bytes(data[:end])
        assert not loads(base, folder)
    (folder / ADAPTER_WEIGHTS).write_bytes(data)
    assert loads(base, folder)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [1, 2])
def test_an_error_in_the_middle_leaves_nothing(
    error: type[BaseException], at: int, base: Base, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, right = iter(range(1, 9)), inject.initialize

    def initialize(*args: Any) -> None:
        if next(calls) == at:
            raise error
        right(*args)

    monkeypatch.setattr(inject, "initialize", initialize)
    with pytest.raises(error):
        AdapterFolder.read(folder).load_into(base, "odd")


@pytest.mark.parametrize("bias", ["none", "all"])
def test_what_was_trained_before_is_trained_again(bias: str, folder: Path) -> None:
    base = tiny_base("gpt2")
    for i, p in enumerate(base.model.parameters()):
        p.requires_grad_(i % 2 == 0)
    before = state(base)
    configure(folder, target_modules=["c_attn"], bias=bias)
    assert not loads(base, folder)
    assert state(base) == before


def test_a_name_in_use_leaves_the_adapter_that_has_it(shared: Base, folder: Path) -> None:
    before = state(shared)
    with pytest.raises(AdapterError, match="already in use"):
        AdapterFolder.read(folder).load_into(shared, "default")
    assert state(shared) == before


Q, END = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model."
SHAPES = [(), (0,), (1,), (4,), (0, 32), (4, 0), (0, 0), (4, 32, 1), (1, 1, 1, 1), (5, 32), (32, 4), (4, 31), (4, 32)]
DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64,
    torch.bool, torch.complex64, torch.uint16,
]  # fmt: skip


@pytest.mark.parametrize("matrix", ["A", "B"])
def test_any_shape_and_dtype(matrix: str, base: Base, folder: Path) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    own = tensors[KEY.format(matrix)]
    for shape in SHAPES:
        if shape != tuple(own.shape):
            save_file(tensors | {KEY.format(matrix): torch.ones(shape)}, folder / ADAPTER_WEIGHTS)
            assert not loads(base, folder), shape
    for dtype in DTYPES:
        save_file(tensors | {KEY.format(matrix): torch.ones(own.shape).to(dtype)}, folder / ADAPTER_WEIGHTS)
        assert loads(base, folder) == dtype.is_floating_point, dtype
    for value in (math.nan, math.inf, -math.inf, 1e300):
        save_file(tensors | {KEY.format(matrix): torch.full_like(own, value)}, folder / ADAPTER_WEIGHTS)
        assert not loads(base, folder), value


ODD_KEYS = [
    "", ".", "...", "x", "weight", "lora_A", "lora_A.weight", ".lora_A.weight", "base_model.model.",
    "base_model.model.model",
    "base_model.model.lora_A.weight", "base_model.model..lora_A.weight", "é\n\0.lora_A.weight",
    "a." * 3000 + "weight",
    f"{Q}.lora_A", f"{Q}.lora_A.", f"{Q}.lora_A..weight", f"{Q}.lora_A.a.b.c.weight", f"{Q}.lora_C.weight",
    f"{Q}.lora_B.bias",
    f"{Q}.lora_embedding_A", f"{Q}.lora_embedding_B.default", f"{Q}.lora_magnitude_vector",
    f"{Q}.weight.lora_A.weight",
    f"{Q}.lora_magnitude_vector.default.weight", f"{Q}.modules_to_save", f"{Q}.modules_to_save.default.weight",
    f"{Q}.modules_to_save.weight", f"{Q}.original_module.weight", f"{Q}.token_adapter.trainable_tokens_delta",
    f"{Q}.base_layer.weight", f"{Q}.base_layer.bias", f"{Q}.weight", f"{Q}.base_layer.lora_A.default.weight",
    *(f"{END}{path}.{part}" for path in ("model.embed_tokens", "lm_head", "model.norm") for part in (
        "weight", "base_layer.weight", "original_module.weight", "modules_to_save.weight", "lora_embedding_A",
        "token_adapter.base_layer.weight", "token_adapter.trainable_tokens_delta", "lora_A.weight",
    )),
]  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [1, 5]}, {"bias": "all"},
    {"trainable_token_indices": {"embed_tokens": [1, 200]}}, {"use_dora": True}, {"target_modules": ["embed_tokens"]},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_any_key_beside_the_others(options: dict[str, Any], alone: Base, folder: Path) -> None:
    before, tensors = state(alone), load_file(folder / ADAPTER_WEIGHTS)
    configure(folder, **options)
    for key in ODD_KEYS:
        for shape in ((), (101, 32)):  # two rows more than the embedding has
            (folder / ADAPTER_WEIGHTS).write_bytes(save(tensors | {key: torch.ones(shape)}))
            loads(alone, folder)
    assert state(alone) == before


def test_rows_that_were_added_to_the_embedding_are_taken_away_again(alone: Base, folder: Path) -> None:
    tensors, before = load_file(folder / ADAPTER_WEIGHTS), state(alone)
    own = alone.model.get_input_embeddings().weight.detach()
    larger = {
        f"{END}{path}.weight": torch.cat([alone.model.get_submodule(path).weight.detach(), own[:2]])
        for path in ("model.embed_tokens", "lm_head")
    }
    for key, tensor in (
        (KEY.format("A"), torch.ones(4, 31)),
        ("another.weight", torch.ones(2)),
        (KEY.format("B"), None),
    ):
        changed = {k: t for k, t in (tensors | larger | {key: tensor}).items() if t is not None}
        save_file(changed, folder / ADAPTER_WEIGHTS)
        assert not loads(alone, folder)
        assert state(alone) == before
    save_file(tensors | larger, folder / ADAPTER_WEIGHTS)
    base = tiny_base("llama")
    assert loads(base, folder)
    assert len(base.model.get_input_embeddings().weight) == len(own) + 2
