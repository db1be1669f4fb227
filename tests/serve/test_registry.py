"""Adapters that come, go and are replaced while the server runs, and which of them a base can hold at once."""

import json
import shutil
import threading
from pathlib import Path

import openai
import pytest
import torch

from lorasmith.adapters.folder import AdapterFolder, write_adapter
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.serving import ServeConfig
from lorasmith.data.template.encoding import Template
from lorasmith.engine.engine import Engine, replies
from lorasmith.engine.request import Request
from lorasmith.engine.scoring import prompt_logprobs
from lorasmith.errors import AdapterError
from lorasmith.loading.load import load_base
from lorasmith.lora.inject import inject
from lorasmith.model.base import Base
from lorasmith.report import Report
from lorasmith.serve import registry
from lorasmith.serve.discovery import describe, discover
from lorasmith.serve.registry import attach, detach, load_version
from lorasmith.serve.startup import open_manager
from tests.support import tiny
from tests.support.experts import moe_folder
from tests.support.families import stir
from tests.support.serving import HI, ask, post, running, said, user, wait_for


def base_of() -> Base:
    return load_base(ModelConfig(model=str(tiny.model_folder()), dtype="float32", device="cpu"))


def offer_folder(base: Base, name: str, folder: Path) -> None:
    adapter = AdapterFolder.read(folder)
    attach(base, name, adapter, adapter.tensors_in(base.dtype))


def test_lora_and_a_module_trained_whole_beside_it_exclude_each_other(tmp_path: Path) -> None:
    """Whichever is first; the other is refused, and the base is as it was. Two modules with one input do not."""
    base = base_of()
    configs = {
        "lora": LoraConfig(r=2, target_modules=("v_proj",)),
        "whole": LoraConfig(r=2, target_modules=("up_proj",), modules_to_save=("v_proj",)),
        "beside": LoraConfig(r=2, target_modules=("up_proj",), modules_to_save=("q_proj",)),
    }
    for name, config in configs.items():
        own = base_of()
        own.adapters[name] = inject(own.model, config, own.router, name)
        stir(own.adapters[name])
        write_adapter(own, name, Template.of(own.tokenizer), tmp_path / name, {"data": []})
    Engine(base)
    assert base.fast_decoder is not None
    assert base.fast_decoder.bank is not None
    paths = base.fast_decoder.bank.paths
    offer_folder(base, "lora", tmp_path / "lora")
    with pytest.raises(AdapterError, match="v_proj: another adapter has LoRA on this module"):
        offer_folder(base, "whole", tmp_path / "whole")
    assert (list(base.adapters), base.fast_decoder.bank.paths) == ([], paths)
    asked = [7, 11, 13, 17, 19]
    alone = scored(base, "lora", asked)
    offer_folder(base, "beside", tmp_path / "beside")
    assert scored(base, "lora", asked) == pytest.approx(alone, abs=1e-4)
    assert scored(base, "beside", asked) != pytest.approx(alone, abs=1e-2)
    detach(base, "beside")
    assert base.fast_decoder.bank.paths == paths
    detach(base, "lora")
    offer_folder(base, "whole", tmp_path / "whole")
    with pytest.raises(AdapterError, match="v_proj: another adapter trains this module in full"):
        offer_folder(base, "lora", tmp_path / "lora")
    detach(base, "whole")
    offer_folder(base, "lora", tmp_path / "lora")
    assert (list(base.adapters), base.fast_decoder.bank.paths, list(base.fast_decoder.held)) == ([], paths, ["lora"])


def test_an_adapter_that_changes_biases_of_the_base_is_refused(tmp_path: Path) -> None:
    """The base model and adapters that are held outside of it would answer with these biases too."""
    folder = tiny.model_folder("qwen2")
    base, own = (load_base(ModelConfig(model=str(folder), dtype="float32", device="cpu")) for _ in range(2))
    own.adapters["biases"] = inject(own.model, LoraConfig(r=2, bias="all"), own.router, "biases")
    stir(own.adapters["biases"])
    write_adapter(own, "biases", Template.of(own.tokenizer), tmp_path / "biases", {"data": []})
    Engine(base, prepack=True)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters() if name.endswith("bias")}
    assert before
    with pytest.raises(AdapterError, match="adapter 'biases': bias='all' changes the base model itself"):
        offer_folder(base, "biases@1", tmp_path / "biases")
    now = dict(base.model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in before.items())


@pytest.mark.parametrize("order", [("lora", "dora"), ("dora", "lora")])
def test_a_variant_of_lora_is_served_by_its_own_layers(tmp_path: Path, order: tuple[str, str]) -> None:
    """A plain adapter on the same layers joins it there, whichever comes first, and stays when the variant goes."""
    configs = {
        "dora": LoraConfig(r=2, use_dora=True),
        "lora": LoraConfig(
            r=3, target_modules=("v_proj", "up_proj"), use_rslora=True, rank_pattern={"layers.0.mlp.up_proj": 1}
        ),
    }
    asked, alone = [7, 11, 13, 17, 19], {}
    for name, config in configs.items():
        own = base_of()
        own.adapters[name] = inject(own.model, config, own.router, name)
        stir(own.adapters[name])
        write_adapter(own, name, Template.of(own.tokenizer), tmp_path / name, {"data": []})
        (scores,) = prompt_logprobs(own, [Request(asked, SamplingConfig(), name, ())])
        alone[name] = [one.logprob for one in scores if one]
    base = base_of()
    engine = Engine(base, prepack=True)
    plain = [reply.ids for reply in replies(engine, [Request(asked, SamplingConfig(max_new_tokens=3), None, ())])]
    for name in order:
        offer_folder(base, name, tmp_path / name)
        assert base.router.active is None
    assert sorted(base.adapters) == ["dora", "lora"]
    assert not base.fast_decoder.held
    for name in configs:
        assert scored(base, name, asked) == pytest.approx(alone[name], abs=1e-4)
    together = [Request(asked, SamplingConfig(max_new_tokens=3), name, ()) for name in (*configs, None)]
    mixed = [reply.ids for reply in replies(engine, together)]
    assert mixed == [replies(engine, [one])[0].ids for one in together]
    assert mixed[-1] == plain[0]
    detach(base, "dora")
    assert scored(base, "lora", asked) == pytest.approx(alone["lora"], abs=1e-4)
    assert base.fast_decoder.bank.paths


def test_a_high_rank_in_one_layer_takes_no_memory_in_the_others(tmp_path: Path, monkeypatch) -> None:
    """It is computed in the model, exactly, beside an adapter of all layers, which returns to the bank in the end."""
    monkeypatch.setattr("lorasmith.lora.fused.bank.WEIGHT_SHARE", 2**40)  # the model is tiny
    monkeypatch.setattr("lorasmith.lora.fused.bank.LEAST_BYTES", 0)
    configs = {"wide": LoraConfig(r=32, target_modules=("layers.1.self_attn.q_proj",)), "lora": LoraConfig(r=3)}
    asked, alone = [7, 11, 13, 17, 19], {}
    for name, config in configs.items():
        own = base_of()
        own.adapters[name] = inject(own.model, config, own.router, name)
        stir(own.adapters[name])
        write_adapter(own, name, Template.of(own.tokenizer), tmp_path / name, {"data": []})
        alone[name] = scored(own, name, asked)
    base = base_of()
    engine = Engine(base, prepack=True)
    for name in ("lora", "wide"):
        offer_folder(base, name, tmp_path / name)
    together = [Request(asked, SamplingConfig(max_new_tokens=3), name, ()) for name in (*configs, None)]
    mixed = [reply.ids for reply in replies(engine, together)]
    assert mixed == [replies(engine, [one])[0].ids for one in together]
    for name in configs:
        assert scored(base, name, asked) == pytest.approx(alone[name], abs=1e-4)
    assert base.fast_decoder.bank.columns == 64
    assert "model.layers.1.self_attn.q_proj" not in base.fast_decoder.bank.paths
    detach(base, "wide")
    assert scored(base, "lora", asked) == pytest.approx(alone["lora"], abs=1e-4)
    assert "model.layers.1.self_attn.q_proj" in base.fast_decoder.bank.paths


def test_the_bank_gives_the_memory_of_an_adapter_back(tmp_path: Path) -> None:
    base, asked = base_of(), [7, 11, 13, 17, 19]
    for name, rank in (("high", 32), ("low", 3)):
        config = LoraConfig(r=rank)
        base.adapters[name] = inject(base.model, config, base.router, name)
        stir(base.adapters[name])
        write_adapter(base, name, Template.of(base.tokenizer), tmp_path / name, {"data": []})
    base = base_of()
    Engine(base)
    for name in ("low", "high"):
        offer_folder(base, name, tmp_path / name)
    wanted = scored(base, "low", asked)
    base.fast_decoder.hold({"low", "high"})
    assert base.fast_decoder.bank.columns == 64
    base.fast_decoder.hold({"low"})
    offer_folder(base, "again", tmp_path / "high")
    base.fast_decoder.hold({"low", "high", "again"})
    assert base.fast_decoder.bank.columns == 128
    detach(base, "again")
    detach(base, "high")
    assert base.fast_decoder.bank.columns == 64
    assert scored(base, "low", asked) == wanted


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=("embed_tokens", "q_proj")),
        LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("embed_tokens",)),
        LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("lm_head",)),
    ],
)
def test_an_adapter_of_the_embedding_or_the_head_is_served_beside_others(tmp_path: Path, config: LoraConfig) -> None:
    asked, alone = [7, 11, 13, 17, 19], {}
    configs = {"ends": config, "lora": LoraConfig(r=3)}
    for number, (name, one) in enumerate(configs.items()):
        own = base_of()
        own.adapters[name] = inject(own.model, one, own.router, name)
        stir(own.adapters[name], number)
        write_adapter(own, name, Template.of(own.tokenizer), tmp_path / name, {"data": []})
        alone[name] = scored(own, name, asked)
    base = base_of()
    engine = Engine(base, prepack=True)
    plain = prompt_logprobs(base, [Request(asked, SamplingConfig(), None, ())])
    for name in configs:
        offer_folder(base, name, tmp_path / name)
    found = prompt_logprobs(base, [Request(asked, SamplingConfig(), name, ()) for name in (*configs, None)])
    for name, scores in zip(configs, found, strict=False):
        assert [one.logprob for one in scores if one] == pytest.approx(alone[name], abs=1e-4)
    bare = [one.logprob for one in plain[0] if one]
    assert [one.logprob for one in found[-1] if one] == pytest.approx(bare, abs=1e-4)
    assert alone["ends"] != pytest.approx(bare, abs=1e-2)
    together = [Request(asked, SamplingConfig(max_new_tokens=3), name, ()) for name in (*configs, None)]
    assert [reply.ids for reply in replies(engine, together)] == [replies(engine, [one])[0].ids for one in together]


def test_an_alora_is_served_from_its_sequence_on(tmp_path: Path) -> None:
    call, own = (7, 8), base_of()
    config = LoraConfig(r=2, alora_invocation_tokens=call)
    own.adapters["alora"] = inject(own.model, config, own.router, "alora")
    stir(own.adapters["alora"])
    write_adapter(own, "alora", Template.of(own.tokenizer), tmp_path / "alora", {"data": []})
    base = base_of()
    engine = Engine(base, prepack=True)
    discovered = describe("alora", tmp_path / "alora")
    whole = discovered.whole()
    version = load_version(base, whole, whole.adapter.tensors_in(base.dtype))
    assert version.effect > 0
    asked = [11, 13, *call, 17, 19]
    assert scored(base, version.adapter, asked) == pytest.approx(scored(own, "alora", asked), abs=1e-4)
    requests = [Request(asked, SamplingConfig(max_new_tokens=4), name, ()) for name in (version.adapter, None)]
    assert replies(engine, requests)[0].ids == replies(engine, requests[:1])[0].ids


def scored(base: Base, name: str, asked: list[int]) -> list[float]:
    (found,) = prompt_logprobs(base, [Request(asked, SamplingConfig(), name, ())])
    return [one.logprob for one in found if one]


def moe_base_of(folder: Path) -> Base:
    return load_base(ModelConfig(model=str(folder), dtype="float32", device="cpu"))


def test_adapters_of_experts_share_a_batch_with_others(tmp_path: Path) -> None:
    model, asked, alone = moe_folder(tmp_path / "model", "mixtral"), [7, 11, 13, 17, 19], {}
    configs = {
        "experts": LoraConfig(r=2),
        "one": LoraConfig(r=3, target_modules=(), target_parameters=("experts.down_proj",)),
        "lora": LoraConfig(r=3, target_modules=("v_proj",)),
    }
    for number, (name, config) in enumerate(configs.items()):
        own = moe_base_of(model)
        own.adapters[name] = inject(own.model, config, own.router, name)
        stir(own.adapters[name], number)
        write_adapter(own, name, Template.of(own.tokenizer), tmp_path / name, {"data": []})
        (alone[name],) = prompt_logprobs(own, [Request(asked, SamplingConfig(), name, ())])
    base = moe_base_of(model)
    Engine(base, prepack=True)
    for name in configs:
        offer_folder(base, name, tmp_path / name)
    assert list(base.adapters) == ["experts", "one"], "in the model; the other is in the bank"
    together = prompt_logprobs(base, [Request(asked, SamplingConfig(), name, ()) for name in configs])
    for name, found in zip(configs, together, strict=True):
        wanted = [one.logprob for one in alone[name] if one]
        assert [one.logprob for one in found if one] == pytest.approx(wanted, abs=1e-4)
    texts = [[one.logprob for one in found if one] for found in together]
    assert texts[0] != pytest.approx(texts[1], abs=1e-2) != texts[2]


def test_experts_that_cannot_share_a_batch_are_refused(tmp_path: Path) -> None:
    own, base = (moe_base_of(moe_folder(tmp_path / "model", "jetmoe")) for _ in range(2))
    own.adapters["one"] = inject(own.model, LoraConfig(r=2), own.router, "one")
    stir(own.adapters["one"])
    write_adapter(own, "one", Template.of(own.tokenizer), tmp_path / "one", {"data": []})
    Engine(base)
    with pytest.raises(AdapterError, match="a JetMoeParallelExperts cannot compute several adapters in one batch"):
        offer_folder(base, "one", tmp_path / "one")
    assert not base.adapters


def test_an_adapter_is_added_replaced_and_taken_away(own_runs: Path):
    with running(own_runs, context=120) as served:
        client = served.client()
        shutil.copytree(own_runs.parent / "runs" / "loud", own_runs / "new")
        status, model = post(served, {"name": "new"})
        assert (status, model["rank"], model["id"]) == (200, 2, "new")
        asked = {"model": "new", "messages": user(HI), "max_tokens": 60, "temperature": 0}
        as_loud = said(client.chat.completions.create(**asked))
        stream = client.chat.completions.create(**asked, stream=True)
        begun = next(iter(stream)).choices[0].delta.content or ""
        status, replaced = post(served, {"name": "new", "path": "calm"})
        assert (status, replaced["rank"]) == (200, 5)
        as_calm = said(client.chat.completions.create(**asked))
        rest = "".join(piece.choices[0].delta.content or "" for piece in stream)
        assert begun + rest == as_loud  # it finished on the version that it began with
        assert as_calm == said(client.chat.completions.create(**asked | {"model": "calm"}))
        assert as_calm != as_loud
        assert ask(served, "DELETE", "/v1/adapters/new")[0] == 200
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**asked)
        wait_for(lambda: not [name for name in served.manager.registry.base.adapters if name.startswith("new@")])
        assert ask(served, "DELETE", f"/v1/adapters/{served.manager.registry.base_name}")[0] == 400


def test_an_adapter_is_read_beside_the_replies_and_a_broken_one_ends_nothing(own_runs: Path, monkeypatch):
    with running(own_runs, context=120) as served:
        may_read, reading, client = threading.Event(), threading.Event(), served.client()
        read = registry.read
        monkeypatch.setattr(registry, "read", lambda *a: (reading.set(), may_read.wait(10), read(*a))[2])
        answers: list[tuple[int, dict]] = []
        adding = threading.Thread(target=lambda: answers.append(post(served, {"name": "new", "path": "loud"})))
        adding.start()
        assert reading.wait(10)
        said(client.chat.completions.create(model="calm", messages=user(HI), max_tokens=4))
        assert not answers
        may_read.set()
        adding.join()
        assert answers[0][0] == 200
        monkeypatch.setattr(registry, "read", lambda *_args: None)  # a kind of broken that nobody thought of
        assert post(served, {"name": "other", "path": "loud"})[0] == 500
        said(client.chat.completions.create(model="new", messages=user(HI), max_tokens=4))


@pytest.mark.parametrize("name", ["loud", ""])
def test_a_name_that_is_taken_or_none_is_refused_before_anything_is_loaded(runs: Path, name: str):
    model = ModelConfig(model=str(tiny.model_folder()), dtype="float32", device="cpu")
    registry = open_manager(discover([runs / "loud"]), model, ServeConfig(), None, Report()).registry
    before = list(registry.base.fast_decoder.held)
    with pytest.raises(AdapterError, match="cannot be the name of another adapter"):
        registry.put(describe(name, runs / "calm"))
    assert (list(registry.base.fast_decoder.held), len(registry.names())) == (before, 2)


def test_an_adapter_for_which_memory_is_short_is_refused_alone(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(runs) as served:
        registry = served.manager.registry

        def fails(*_args: object) -> None:
            raise MemoryError

        monkeypatch.setattr("lorasmith.serve.registry.attach", fails)
        with pytest.raises(openai.InternalServerError, match="not enough memory"):
            served.client().post("/adapters", body={"name": "new", "path": "loud"}, cast_to=object)
        assert "new" not in registry.names()
        assert said(
            served.client().chat.completions.create(model="calm", messages=user(HI), max_tokens=2, temperature=0)
        )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"notes": {"data": [1]}}, "notes.data"),
        ({"notes": 5}, "notes"),
        ({"notes": {"quantize": 4}}, "notes.quantize"),
        ({"notes": {"combined": {"adapters": [{"folder": 3}]}}}, "notes.combined.adapters"),
        ({"base": {"model": 7}}, "base.model"),
        ({"template": {"stop": [{"id": -1, "token": "x"}]}}, "template.stop"),
        ({"template": {"golden": [{"messages": [], "ids": [-5]}]}}, "template.golden"),
    ],
)
def test_an_adapter_with_odd_values_is_refused_and_nothing_of_it_stays(served, changes, says):
    """Also at the start: it is left out, and the others are served."""
    odd = Path(shutil.copytree(served.runs / "loud", served.runs / "odd"))
    try:
        path = odd / "adapter" / "lorasmith.json"
        values = json.loads(path.read_text())
        for key, change in changes.items():
            values[key] = values[key] | change if isinstance(change, dict) and key != "notes" else change
        path.write_text(json.dumps(values))
        status, body = post(served, {"name": "odd", "path": "odd"})
        assert status == 400, body
        assert says in body["error"]["message"]
        assert "odd" not in [model.id for model in served.client().models.list()]
        assert sorted(discover([served.runs]).adapters) == ["calm", "loud"]
    finally:
        shutil.rmtree(odd)
