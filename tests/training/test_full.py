"""Full fine-tuning: the same as a plain loop of PyTorch, resumed bit for bit, and a folder that transformers loads."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasmith.adapters.session import open_adapters
from lorasmith.cli.main import main
from lorasmith.config.model import ModelConfig
from lorasmith.config.serving import ServeConfig
from lorasmith.config.toml import load_config
from lorasmith.errors import AdapterError, ConfigError, ModelError
from lorasmith.loading.load import load_base
from lorasmith.report import Report
from lorasmith.runs.evaluate import EvaluationOptions, evaluate
from lorasmith.runs.listing import find_runs
from lorasmith.serve.discovery import discover
from lorasmith.serve.startup import open_manager
from lorasmith.training import full
from lorasmith.training.assemble import assemble
from lorasmith.training.distributed import World
from lorasmith.training.loop import Job, one_step
from lorasmith.training.optim import learning_rate
from lorasmith.training.run_files import read_summary
from tests.support.families import no_casts_down
from tests.support.tiny import Crash, Watch, crash_at, metrics, model_folder, rows_file, trained


def job_of(folder: Path, family: str = "llama", dtype: str = "float64", **training: Any) -> Job:
    sections = {
        "model": {"model": str(model_folder(family)), "dtype": dtype, "device": "cpu"},
        "data": {"data": (rows_file(folder / "rows.jsonl"),), "held_out": 3.0},
        "training": {
            "method": "full",
            "batch_size": 4,
            "max_steps": 50,
            "clip": 0,
            "weight_decay": 0.01,
            "learning_rate": 2e-3,
        }
        | training,
    }
    return assemble(load_config(None, sections), folder / "run", Report(), World()).job


def losses_of(job: Job, model: Any) -> list[float]:
    """The losses of PyTorch's AdamW over a model of transformers, one example at a time, on the same steps."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=job.config.weight_decay)
    found = []
    for k in range(len(job.plan)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(job.config, len(job.plan), k)
        examples = [job.train[i] for i in job.plan.members(k)]
        total, losses = sum(e.weight for e in examples), []
        for e in examples:
            logits = model(input_ids=torch.tensor([e.ids]), use_cache=False).logits[0]
            each = torch.nn.functional.cross_entropy(logits, torch.tensor(e.targets), reduction="none")
            losses.append((each * torch.tensor(e.weights)).sum() / total)
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_fifty_steps_equal_those_of_pytorch(tmp_path, family):
    """gpt2 and bloom have tied embeddings, which must stay one weight."""
    job = job_of(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float64).eval()
    with no_casts_down():
        expected = losses_of(job, model)
        losses = [float(one_step(job, k).loss) for k in range(len(job.plan))]
    assert losses == pytest.approx(expected, rel=1e-10)
    own, theirs = dict(job.base.model.named_parameters()), dict(model.named_parameters())
    assert own.keys() == theirs.keys()
    for name, p in theirs.items():
        torch.testing.assert_close(own[name], p, rtol=1e-8, atol=1e-10)
    assert losses[-1] < 0.9 * losses[0]
    assert job.parameters.values.numel() == sum(p.numel() for p in theirs.values())


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
def test_weights_in_bfloat16_are_rounded_from_float32(tmp_path, optimizer):
    job = job_of(tmp_path, dtype="bfloat16", optimizer=optimizer, warmup=0, max_steps=3)
    before = job.parameters.values.detach().clone()
    for k in range(3):
        one_step(job, k)
    assert job.parameters.values.dtype == torch.float32
    assert not torch.equal(job.parameters.values, before)
    for p, piece in zip(job.parameters.tensors, job.parameters.pieces, strict=True):
        assert p.dtype == torch.bfloat16
        near = piece.detach().bfloat16().float()
        assert bool(((p.float() - piece).abs() <= (near.abs() * 2**-7).clamp_min(1e-30)).all())
        assert p.grad is None


def test_steps_too_small_for_bfloat16_move_its_weights_on_average(tmp_path):
    """Rounded to the nearest, hardly any weight would change: all of its steps are below half of the grid's."""
    job = job_of(tmp_path, dtype="bfloat16", learning_rate=1e-5, warmup=0, max_steps=3)
    before = [p.detach().float() for p in job.parameters.tensors]
    for k in range(3):
        one_step(job, k)
    pieces = [piece.detach() for piece in job.parameters.pieces]
    wanted = torch.cat([(piece - b).flatten() for piece, b in zip(pieces, before, strict=True)])
    nearest = torch.cat([(p.bfloat16().float() - b).flatten() for p, b in zip(pieces, before, strict=True)])
    moved = torch.cat([(p.detach().float() - b).flatten() for p, b in zip(job.parameters.tensors, before, strict=True)])
    along = wanted.sign()
    assert float(moved @ along) == pytest.approx(float(wanted @ along), rel=0.1)
    assert float(nearest @ along) < 0.7 * float(wanted @ along)


def test_gradients_of_several_rows_are_added_up_in_float32(tmp_path):
    """The same step in one row and in four: in bfloat16, sums of gradients would lose their last bits."""
    gradients = []
    for tokens in (2048, 1):
        job = job_of(tmp_path, dtype="bfloat16", row_tokens=tokens, learning_rate=1e-9, warmup=0)
        one_step(job, 0)
        gradients.append(job.parameters.gradient.clone())
    assert gradients[0].dtype == torch.float32
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 0.02


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "bfloat16")])
def test_answers_during_training_are_those_of_the_weights_as_they_are(tmp_path, family, dtype):
    """Decoding keeps no copy of weights that have changed since, and leaves them where the optimizer updates them."""
    options = {"dtype": dtype, "learning_rate": 2e-2, "warmup": 0}
    asked = job_of(tmp_path, family, samples=("Why is the sky blue? (0)", "1 2 3"), **options)
    silent = job_of(tmp_path, family, **options)
    ask, before = asked.evaluator.samples, asked.evaluator.samples.answers(None)
    for k in range(4):
        one_step(asked, k)
        one_step(silent, k)
        answers = ask.answers("default")
    assert torch.equal(asked.parameters.values, silent.parameters.values)
    asked.artifact.write(tmp_path)
    fresh = load_base(ModelConfig(model=str(tmp_path), dtype=dtype, device="cpu"), Report())
    assert replace(ask, base=fresh).answers(None) == answers != before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, dtype):
    options = {"method": "full", "learning_rate": 1e-3, "save_every": 2, "eval_every": 2, "dtype": dtype}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(whole, **options)
    with pytest.raises(Crash):
        trained(parts, crash_at(3), **options)
    trained(parts, resume=True, **options)
    one, other = (load_file(run / "model" / "model.safetensors") for run in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert metrics(whole) == metrics(parts)
    assert read_summary(whole).loss_before == read_summary(parts).loss_before


def test_the_best_model_is_kept(tmp_path):
    """After too large steps, an earlier evaluation has the lowest loss."""
    run = tmp_path / "run"
    summary = trained(run, method="full", learning_rate=3, eval_every=1, max_steps=4, warmup=3)
    lines = [
        (line["step"], line["held_out_loss"]) for line in metrics(run) if line.get("step") and "held_out_loss" in line
    ]
    best = min(lines, key=lambda line: line[1])
    assert summary.best_step == best[0] < 4
    assert summary.loss_after == pytest.approx(best[1], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"lora": {"r": 4}}, "lora.r"),
        ({"model": {"quantize": "nf4"}}, "model.quantize"),
        ({"training": {"start_from": "runs/demo"}}, "start_from"),
        ({"training": {"loraplus_lr_ratio": 16}}, "loraplus_lr_ratio"),
        ({"training": {"optimizer": "muon"}}, "optimizer"),
    ],
)
def test_options_of_adapters_are_refused_by_name(options, key):
    options = {name: dict(values) for name, values in options.items()}
    options.setdefault("training", {})["method"] = "full"
    with pytest.raises(ConfigError, match=key):
        load_config(None, options)


def test_the_default_learning_rate_is_a_tenth_of_that_of_lora():
    assert load_config(None, {"training": {"method": "full"}}).training.learning_rate == 2e-5
    assert load_config(None, {"training": {"method": "full", "learning_rate": 1e-4}}).training.learning_rate == 1e-4
    assert load_config(None, {}).training.learning_rate == 2e-4


def test_a_model_that_does_not_fit_is_refused_with_what_would(tmp_path, monkeypatch):
    weights = sum(t.numel() for t in load_file(model_folder() / "model.safetensors").values())
    monkeypatch.setattr(full, "available_mib", lambda device: 5 * weights / 2**20)  # and 4 are loaded
    with pytest.raises(ConfigError, match=r"--method lora.*up to 0 million.*another --optimizer: adafactor"):
        job_of(tmp_path, dtype="float32")


def test_weights_that_no_text_reaches_are_left_out(tmp_path):
    """Weight decay would shrink them."""
    job = job_of(tmp_path, dtype="float32")
    base = job.base
    base.model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    base.adapters["default"] = full.whole_model(base, "default", job.config)
    said = Watch()
    full.leave_out_unreached(base, "default", [3, 4, 5, 6], said)
    assert "unused" not in base.adapters["default"].parameters
    assert not base.model.get_parameter("unused").requires_grad


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("full") / "run"
    trained(run, method="full", learning_rate=1e-2)
    return run


def test_chat_and_generate_use_the_trained_model(run):
    session = open_adapters([run])
    assert (session.names, session.model) == ([], run / "model")
    base = open_adapters([run / "model"])
    assert session.generate("Why?", max_new_tokens=4) == base.generate("Why?", max_new_tokens=4)


def test_eval_compares_it_with_the_model_that_it_was(run):
    found = evaluate([run], EvaluationOptions(forget=""), ModelConfig(dtype="float32")).adapters[0]
    summary = read_summary(run)
    assert (found.loss.before, found.loss.after) == pytest.approx((summary.loss_before, summary.loss_after), rel=1e-6)
    assert (found.name, found.forgotten.before != found.forgotten.after) == ("run", True)


def test_it_is_served_under_the_name_of_its_run(run):
    manager = open_manager(discover([run]), ModelConfig(), ServeConfig(), None, Report())
    assert manager.registry.names() == ["run"]


def test_beside_adapters_it_is_left_out_with_a_message(run, tmp_path):
    trained(tmp_path / "lora")
    shutil.copytree(run, tmp_path / "whole")
    found = discover([tmp_path])
    assert (list(found.adapters), found.models) == (["lora"], [tmp_path / "whole" / "model"])
    open_manager(found, ModelConfig(), ServeConfig(), None, Report())
    assert any("Serve it alone" in problem for problem in found.problems)
    with pytest.raises(ConfigError, match="Leave --model out"):
        open_adapters([run], ModelConfig(model=str(model_folder())))
    with pytest.raises(AdapterError, match="Give only this one"):
        open_adapters([tmp_path / "lora", run])


def test_info_and_list_show_it(run, capsys):
    assert main(["info", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "all weights were trained" in shown
    assert "held out  loss" in shown
    assert find_runs(run)[0].adapter_bytes == (run / "model" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("words", [["merge"], ["combine", "RUN"]])
def test_what_needs_an_adapter_says_where_the_model_is(run, tmp_path, words, capsys):
    """There is nothing to merge or to combine."""
    command = [words[0], str(run), *[str(run) if word == "RUN" else word for word in words[1:]]]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert f"--model {run / 'model'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ("input_layernorm", "norm")),
        ("llama", ("lm_head",)),
        ("llama", ("embed_tokens", "norm")),
        ("gpt2", ("ln_1", "ln_f")),
        ("gpt2", ("lm_head",)),  # the tied embedding stays as it is
        ("gpt2", ("wte",)),  # the tied head stays as it is
    ],
)
def test_parts_that_are_trained_whole_beside_lora_learn_as_in_peft(tmp_path, family, names):
    """The in-between of LoRA and full fine-tuning: ten steps with the same learning rate for all."""
    target = {"llama": "q_proj", "gpt2": "c_attn"}[family]
    sections = {
        "model": {"model": str(model_folder(family)), "dtype": "float64", "device": "cpu"},
        "data": {"data": (rows_file(tmp_path / "rows.jsonl"),), "held_out": 3.0},
        "lora": {"r": 4, "target_modules": target, "modules_to_save": names},
        "training": {"batch_size": 4, "max_steps": 10, "clip": 0, "learning_rate": 2e-3},
    }
    job = assemble(load_config(None, sections), tmp_path / "run", Report(), World()).job
    plain = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float64)
    saved = ["model.norm" if name == "norm" else name for name in names]  # "norm" is the end of other names, too
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=[target], modules_to_save=saved)
    theirs = peft.get_peft_model(plain, config, autocast_adapter_dtype=False).eval()
    own = job.base.adapters["default"].parameters
    trained_there = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key in (key for key in own if ".lora_" in key):
            trained_there[key].copy_(own[key])
    with no_casts_down():
        expected = losses_of(job, theirs)
        losses = [float(one_step(job, k).loss) for k in range(len(job.plan))]
    assert losses == pytest.approx(expected, rel=1e-10)
    assert len(own) == len(trained_there)


def test_a_model_that_cannot_be_trained_whole_is_refused_by_name(tmp_path, monkeypatch):
    def broken(*_args: Any) -> Any:
        raise RuntimeError("a kernel without backward")

    monkeypatch.setattr(full, "trial_loss", broken)
    with pytest.raises(
        ModelError, match=r"a training step of all weights fails .*a kernel without backward.*--method lora"
    ):
        job_of(tmp_path, dtype="float32")
