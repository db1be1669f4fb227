"""The run folder: what is in it, what is never in it, when it may be replaced, and a disk that is full."""

import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasmith import train
from lorasmith.adapters.session import open_adapters
from lorasmith.cli.main import main
from lorasmith.config.toml import load_config
from lorasmith.errors import AdapterError, ConfigError, DataError, ModelError, RunError
from lorasmith.runs import train as run_module
from lorasmith.runs.evaluate import evaluate
from lorasmith.system import ownership
from lorasmith.training.run_files import is_run_file, read_summary
from tests.support.tiny import Watch, adapter_bytes, flags, losses, metrics, model_folder, rows_file, settings, trained

FILES = {
    ".lorasmith",
    "config.toml",
    "environment.json",
    "metrics.jsonl",
    "checkpoints",
    "adapter",
    "loss.png",
    "summary.json",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    trained(run)
    return run


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A finished run that a test may change; its rows lie where the first one's do."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def stopped_at(run: Path, step: int, **changes: Any) -> None:
    """A run that dies after `step` steps."""

    class Crash(Exception):
        pass

    def at_step(done: int) -> None:
        if done == step:
            raise Crash

    with pytest.raises(Crash):
        trained(run, Watch(at_step), **changes)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- what is in it


def test_a_run_folder_holds_what_is_promised(finished):
    assert {path.name for path in finished.iterdir()} == FILES
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["step-000004"]
    assert {path.name for path in (finished / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "lorasmith.json",
    }  # fmt: skip
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_summary_says_what_the_files_say(finished):
    summary = json.loads((finished / "summary.json").read_text("utf-8"))
    adapter = load_file(finished / "adapter" / "adapter_model.safetensors")
    assert summary["trainable_parameters"] == sum(t.numel() for t in adapter.values())
    assert summary["adapter_bytes"] == sum(t.nbytes for t in adapter.values())
    base = load_file(model_folder() / "model.safetensors")
    assert summary["base_bytes"] == sum(t.nbytes for t in base.values())
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines[0] == {"step": 0, "held_out_loss": pytest.approx(summary["loss_before"])}
    assert (summary["steps"], summary["tokens"]) == (4, lines[4]["tokens"])
    assert summary["loss_after"] == pytest.approx(lines[-1]["held_out_loss"])
    assert summary["interval"][0] <= summary["loss_after"] - summary["loss_before"] <= summary["interval"][1]
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / lines[4]["seconds"], rel=1e-6)
    assert read_summary(finished).interval == tuple(summary["interval"])


def test_environment_says_what_a_resume_depends_on(finished):
    environment = json.loads((finished / "environment.json").read_text("utf-8"))
    wanted = {"dtype": "float32", "layout": "packed", "threads": str(torch.get_num_threads()), "processes": "1"}
    assert environment.items() >= wanted.items()
    assert environment.keys() >= {
        "lorasmith",
        "torch",
        "transformers",
        "python",
        "system",
        "instructions",
        "train_sha256",
    }


def test_config_toml_is_resolved_has_reasons_and_reads_back(tmp_path):
    run = tmp_path / "run"
    options = settings()
    options.pop("dtype")
    train(rows_file(tmp_path / "rows.jsonl"), output=run, **options)
    text = (run / "config.toml").read_text("utf-8")
    written = tomllib.loads(text)
    assert written["model"]["dtype"] in ("float32", "bfloat16")
    assert written["model"]["device"] in ("cpu", "cuda", "mps")
    assert (written["data"]["template"], written["data"]["max_length"]) == ("model", 128)
    assert written["output"] == str(run)
    lines = text.splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith("dtype = "))
    assert lines[at - 1].startswith("# dtype: this processor")
    assert any(line.startswith("# model.layout: packed") for line in lines)
    config = load_config(run / "config.toml", {})
    assert (config.training.max_steps, config.lora.r, config.data.held_out) == (4, 8, 3.0)
    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.toml"), "--output", str(again)]) == 0
    assert adapter_bytes(again) == adapter_bytes(run)


def test_the_same_seed_is_the_same_run_and_another_is_another(finished, tmp_path):
    trained(tmp_path / "same")
    trained(tmp_path / "other", seed=7)
    assert adapter_bytes(tmp_path / "same") == adapter_bytes(finished)
    assert metrics(tmp_path / "same") == metrics(finished)
    assert adapter_bytes(tmp_path / "other") != adapter_bytes(finished)


def test_adapter_is_the_best_by_held_out_loss_where_the_last_is_worse(tmp_path):
    """The learning rate is too high: the first step helps, the next ones do not."""
    run = tmp_path / "run"
    watch = Watch()
    trained(run, watch, max_steps=3, learning_rate=0.5, schedule="constant", eval_every=1)
    measured = {
        line["step"]: line["held_out_loss"] for line in metrics(run) if "held_out_loss" in line and line["step"]
    }
    best = min(measured, key=lambda step: measured[step])
    assert best < 3, "choose another learning rate: this test needs a last step that is not the best"
    assert read_summary(run).loss_after == pytest.approx(measured[best])
    kept = run / "checkpoints" / f"best-{best:06d}" / "adapter_model.safetensors"
    assert adapter_bytes(run) == kept.read_bytes()
    assert adapter_bytes(run) != (run / "checkpoints" / "step-000003" / "adapter_model.safetensors").read_bytes()
    assert f"Keeping the weights from step {best}, which have the best held-out loss" in watch.said
    trained(tmp_path / "short", max_steps=best, learning_rate=0.5, schedule="constant")
    assert adapter_bytes(tmp_path / "short") == adapter_bytes(run)


def test_without_held_out_rows_the_last_is_kept_and_nothing_is_claimed(tmp_path):
    watch = Watch()
    summary = trained(tmp_path / "run", watch, held_out=0, eval_every=2)
    assert (summary.loss_before, summary.loss_after, summary.interval) == (None, None, None)
    assert [text for text in watch.warned if "no examples are held out" in text]
    assert read_summary(tmp_path / "run") == summary
    assert not any("held_out_loss" in line for line in metrics(tmp_path / "run"))


def test_without_matplotlib_a_sentence_and_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    watch = Watch()
    trained(tmp_path / "run", watch)
    assert [text for text in watch.warned if "pip install 'lorasmith[report]'" in text]
    assert not (tmp_path / "run" / "loss.png").exists()
    assert read_summary(tmp_path / "run") is not None


def test_a_run_that_nobody_named_lies_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summary = train(rows_file(tmp_path / "some rows.jsonl"), **settings())
    assert summary.run.startswith("runs/some rows-20")
    assert (tmp_path / summary.run / "summary.json").is_file()


# --- when it may be replaced


def test_an_existing_run_is_never_overwritten_unasked(copied, capsys):
    before = tree(copied)
    files = rows_file(copied.with_name("rows.jsonl"))
    assert main(["train", files, "--output", str(copied), *flags(settings())]) == 2
    err = capsys.readouterr().err
    assert f"{copied} already exists. Continue with --resume, replace it with --overwrite" in err
    assert len(err.splitlines()) == 1
    assert tree(copied) == before


def test_overwrite_replaces_a_run(copied):
    (copied / "samples.jsonl").write_text("of the old run", "utf-8")
    files = rows_file(copied.with_name("rows.jsonl"))
    train(files, output=copied, overwrite=True, **settings(max_steps=2))
    assert {path.name for path in copied.iterdir()} == FILES
    assert len(losses(copied)) == 2
    assert [path.name for path in copied.parent.iterdir() if path.name.startswith(".")] == []


def test_overwrite_that_is_killed_leaves_no_run_that_looks_finished(copied, monkeypatch):
    def killed(*_args: object, **_more: object) -> None:
        raise SystemExit

    files = rows_file(copied.with_name("rows.jsonl"))
    monkeypatch.setattr(ownership, "remove", killed)
    with pytest.raises(SystemExit):
        train(files, output=copied, overwrite=True, **settings(max_steps=2))
    monkeypatch.undo()
    assert read_summary(copied) is None
    train(files, output=copied, overwrite=True, **settings(max_steps=2))
    assert read_summary(copied).steps == 2


@pytest.mark.parametrize("wrong", [{"r": 9, "target_modules": "nothing_like_it"}, {"data": "missing.jsonl"}])
def test_overwrite_keeps_the_old_run_until_the_new_one_can_begin(copied, wrong):
    before = tree(copied)
    files = wrong.pop("data", rows_file(copied.with_name("rows.jsonl")))
    with pytest.raises(Exception, match=r"nothing_like_it|missing\.jsonl"):
        train(files, output=copied, overwrite=True, **settings(**wrong))
    assert tree(copied) == before


def test_overwrite_leaves_what_is_no_run_alone(tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work", "utf-8")
    with pytest.raises(RunError, match="was not written by `lorasmith train`, so --overwrite does not replace it"):
        train(rows_file(tmp_path / "rows.jsonl"), output=folder, overwrite=True, **settings())
    with pytest.raises(RunError, match="is a file, not a folder"):
        train(rows_file(tmp_path / "rows.jsonl"), output=folder / "thesis.txt", **settings())
    with pytest.raises(RunError, match="is a file, not a folder"):
        train(rows_file(tmp_path / "rows.jsonl"), output=folder / "thesis.txt", overwrite=True, **settings())
    assert tree(folder) == {"thesis.txt": b"years of work"}


def project(folder: Path, config: str) -> dict[str, bytes]:
    """Somebody's folder that holds a config.toml."""
    (folder / ".git").mkdir(parents=True)
    (folder / "config.toml").write_text(config, "utf-8")
    (folder / "thesis.txt").write_text("years of work", "utf-8")
    (folder / ".git" / "HEAD").write_text("ref", "utf-8")
    return tree(folder)


OURS_BY_ITS_KEYS = "[lora]\nr = 4\n"


@pytest.mark.parametrize("config", ["title = 'my site'\n", OURS_BY_ITS_KEYS, ""])
def test_a_config_toml_makes_no_run_of_a_folder(tmp_path, config):
    """Many programs have one; and ours may lie beside what it trains on."""
    files, site = rows_file(tmp_path / "rows.jsonl"), tmp_path / "mysite"
    before = project(site, config)
    (tmp_path / "my.toml").touch()
    with pytest.raises(
        RunError, match="mysite was not written by `lorasmith train`, so --overwrite does not replace it"
    ):
        train(files, output=site, overwrite=True, **settings())
    with pytest.raises(RunError, match=r"its config\.toml was not written by `lorasmith train`"):
        train(files, output=site, config=tmp_path / "my.toml", resume=True, **settings())
    assert main(["train", files, "--output", str(site), "--resume", *flags(settings())]) == 2
    assert tree(site) == before
    shutil.rmtree(site / ".git")
    (site / "thesis.txt").unlink()
    for name in ("metrics.jsonl", "summary.json", "environment.json"):  # nor do names alone
        (site / name).write_text("{}\n", "utf-8")
    before = tree(site)
    with pytest.raises(RunError, match="mysite was not written by `lorasmith train`"):
        train(files, output=site, overwrite=True, **settings())
    assert tree(site) == before


@pytest.mark.parametrize("is_marked", [True, False])
@pytest.mark.parametrize(
    ("put", "shown"),
    [
        (lambda run: (run / ".git").mkdir(), r"\.git"),
        (lambda run: (run / "notes.txt").write_text("mine"), r"notes\.txt"),
        (lambda run: (run / "checkpoints" / "step-000004-mine").mkdir(), r"checkpoints/step-000004-mine"),
        (lambda run: (run / "checkpoints" / "step-000004" / "notes").write_text("mine"), r"\S+/step-000004/notes"),
        (lambda run: (run / "adapter" / "README.md").write_text("mine"), r"adapter/README\.md"),
        (lambda run: (run / "tensorboard").symlink_to(run.parent), r"tensorboard"),
        (lambda run: [(run / name).write_text("mine") for name in "abcde"], r"a, b, c and 2 more"),
    ],
)
def test_overwrite_names_what_is_of_others_and_leaves_all(copied, put, shown, is_marked):
    if not is_marked:  # of 0.1.0
        (copied / ".lorasmith").unlink()
    put(copied)
    before = tree(copied)
    with pytest.raises(
        RunError, match=rf"run contains {shown}, which lorasmith did not write, so --overwrite does not"
    ):
        train(rows_file(copied.with_name("rows.jsonl")), output=copied, overwrite=True, **settings(max_steps=2))
    assert tree(copied) == before


def test_what_comes_while_the_base_is_loaded_is_not_overwritten(copied, monkeypatch):
    assemble = run_module.assemble

    def slowly(*given: Any) -> Any:
        (copied / "notes.txt").write_text("mine", "utf-8")
        return assemble(*given)

    monkeypatch.setattr(run_module, "assemble", slowly)
    with pytest.raises(RunError, match=r"contains notes\.txt"):
        train(rows_file(copied.with_name("rows.jsonl")), output=copied, overwrite=True, **settings(max_steps=2))
    assert (copied / "notes.txt").read_text("utf-8") == "mine"
    assert read_summary(copied).steps == 4


def test_all_that_trainings_write_is_known_as_ours(tmp_path):
    """Else --overwrite would refuse a run of ours."""
    options = {"eval_every": 1, "samples": ("Hi",), "tensorboard": True, "max_steps": 2}
    stopped_at(tmp_path / "run", 2, **options)
    assert ownership.foreign_entries(tmp_path / "run", is_run_file) == []
    (tmp_path / "run" / ".lorasmith").unlink()  # of 0.1.0
    (tmp_path / "run" / "checkpoints" / ".step-000002.4242").mkdir()
    trained(tmp_path / "run", resume=True, **options)
    assert ownership.foreign_entries(tmp_path / "run", is_run_file) == []
    (tmp_path / "run" / "samples.json").write_text("[]", "utf-8")  # the demo's
    (tmp_path / "run" / ".config.toml.4242").write_text("half", "utf-8")
    files = rows_file(tmp_path / "rows.jsonl")
    train(files, output=tmp_path / "run", overwrite=True, **settings(max_steps=1))
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def test_a_start_that_was_killed_before_it_had_begun_leaves_a_folder_that_may_be_used(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    ownership.mark(run, "run")
    (run / ".lorasmith.lock").write_text("1 here", "utf-8")
    (run / "environment.json").write_text("{}", "utf-8")
    (run / ".config.toml.lorasmith-new-abcd1234").write_text("half", "utf-8")
    with pytest.raises(RunError, match=r"no run to resume \(config\.toml not found\)"):
        trained(run, resume=True)
    trained(run)
    assert {path.name for path in run.iterdir()} == FILES


@pytest.mark.parametrize("text", ["{", '{"version": 2, "folder": "run"}', '{"version": 1, "folder": "model"}', "[]"])
def test_a_marker_that_says_something_else_is_none(tmp_path, text):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / ".lorasmith").write_text(text, "utf-8")
    (folder / "config.toml").write_text("", "utf-8")
    with pytest.raises(RunError, match="was not written by `lorasmith train`"):
        train(rows_file(tmp_path / "rows.jsonl"), output=folder, overwrite=True, **settings())


def test_an_empty_folder_is_a_fine_place_and_so_is_the_working_directory(tmp_path, monkeypatch):
    files = rows_file(tmp_path / "rows.jsonl")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    for overwrite in (False, True):
        train(files, output=".", overwrite=overwrite, **settings(max_steps=2))
        assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


# --- resume


def test_resume_needs_only_the_run(tmp_path, finished, capsys):
    run = tmp_path / "run"
    stopped_at(run, 3, save_every=2)
    assert main(["train", "--output", str(run), "--resume"]) == 0
    assert "Resuming after step 2 of 4" in capsys.readouterr().out
    assert losses(run) == losses(finished)
    assert adapter_bytes(run) == adapter_bytes(finished)


def test_resume_of_a_finished_run_shows_its_summary(copied, capsys):
    before = tree(copied)
    assert main(["train", "--output", str(copied), "--resume", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((copied / "summary.json").read_text("utf-8"))
    assert "has already finished: 4 steps, held-out loss" in err
    assert tree(copied) == before


def test_resume_with_other_settings_lists_every_difference(tmp_path, capsys):
    run = tmp_path / "run"
    stopped_at(run, 3)
    before = tree(run)
    assert main(["train", "--output", str(run), "--resume", "--r", "4", "--learning-rate", "0.5"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"error: {run}: a run must be resumed with the settings it was started with. Start a new run to "
        "use different settings.",
        "error: lora.r: was 8, now 4",
        "error: training.learning_rate: was 0.01, now 0.5",
    ]
    assert tree(run) == before


def test_resume_takes_what_was_chosen_from_the_run(tmp_path, monkeypatch):
    """auto was float32 then; a machine that would choose otherwise now does not flip it."""
    run = tmp_path / "run"
    monkeypatch.setattr("lorasmith.system.device.torch.cpu.get_capabilities", dict)
    stopped_at(run, 3, dtype="auto", save_every=2)
    monkeypatch.setattr("lorasmith.system.device.torch.cpu.get_capabilities", lambda: {"amx_bf16": True})
    watch = Watch()
    trained(run, watch, resume=True, dtype="auto", save_every=2)
    assert [text for text in watch.said if text.startswith("base ") and "float32 on cpu" in text]
    assert watch.warned == []


def test_resume_where_nothing_is_and_where_nothing_was_saved(tmp_path, finished):
    with pytest.raises(RunError, match=r"no run to resume \(config\.toml not found\)"):
        trained(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    stopped_at(tmp_path / "run", 3, save_every=0)
    watch = Watch()
    trained(tmp_path / "run", watch, resume=True, save_every=0)
    assert [text for text in watch.said if text.startswith("No checkpoint in")]
    assert metrics(tmp_path / "run") == metrics(finished)


def test_resume_refuses_other_rows(tmp_path):
    run = tmp_path / "run"
    stopped_at(run, 3, save_every=2)
    rows_file(tmp_path / "rows.jsonl", range(1, 13))
    with pytest.raises(RunError, match="the training data has changed since this run started"):
        train(output=run, resume=True)


def test_resume_says_what_is_no_longer_the_same(tmp_path, monkeypatch):
    run = tmp_path / "run"
    stopped_at(run, 3, save_every=2)
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    watch = Watch()
    trained(run, watch, resume=True, save_every=2)
    (text,) = watch.warned
    assert text.startswith("torch was 2.")
    assert text.endswith("and is now 2.99.0; the remaining steps will not be bit-for-bit reproducible")


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_broken_checkpoint_is_one_sentence(tmp_path, name):
    run = tmp_path / "run"
    stopped_at(run, 3, save_every=2)
    (run / "checkpoints" / "step-000002" / name).write_bytes(b"{")
    with pytest.raises(RunError, match=rf"{name}: cannot be read: .*Start again with --overwrite"):
        train(output=run, resume=True)


def test_an_unfinished_run_has_no_adapter_to_talk_to(tmp_path):
    stopped_at(tmp_path / "run", 3)
    with pytest.raises(AdapterError, match=r"this run has not finished.*--resume"):
        open_adapters([tmp_path / "run"])


def test_no_data_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "assemble", lambda *_args: pytest.fail("loaded a model"))
    with pytest.raises(ConfigError, match=r"^data\.data: no training data is given"):
        train(output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- from another working directory


def test_relative_paths_are_written_as_they_are_from_anywhere(tmp_path, monkeypatch):
    """A run of relative paths answers and is measured from another folder, and goes on with the same words."""
    monkeypatch.chdir(tmp_path)
    rows_file(Path("rows.jsonl"))
    rows_file(Path("others.jsonl"), range(20, 23))
    shutil.copytree(model_folder(), "base")
    options = settings(model="base", held_out="others.jsonl", save_every=2)
    with pytest.raises(ZeroDivisionError):
        train("rows.jsonl", output="run", report=Watch(lambda step: 1 // (3 - step)), **options)
    written = tomllib.loads((tmp_path / "run" / "config.toml").read_text("utf-8"))
    places = [written["model"]["model"], *written["data"]["data"], written["data"]["held_out"], written["output"]]
    assert places == [str(tmp_path / name) for name in ("base", "rows.jsonl", "others.jsonl", "run")]
    with pytest.raises(RunError, match=r"model\.model: was .*base', now .*"):
        train("rows.jsonl", output="run", resume=True, **options | {"model": str(model_folder())})
    summary = train("rows.jsonl", output="run", resume=True, **options)
    monkeypatch.chdir(tmp_path.parent)
    assert open_adapters([tmp_path / "run"]).base.source == str(tmp_path / "base")
    assert evaluate([tmp_path / "run"]).adapters[0].loss.after == pytest.approx(summary.loss_after)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_run_may_go_on_on_another_device(tmp_path, monkeypatch):
    """It began on a card, and this machine has none."""
    run = tmp_path / "run"
    stopped_at(run, 3, save_every=2)
    for path in (run / "config.toml", run / "checkpoints" / "step-000002" / "state.json"):
        path.write_text(path.read_text("utf-8").replace('device = "cpu"', 'device = "cuda"'), "utf-8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"model\.device: cuda is not available on this machine"):
        train(output=run, resume=True)
    assert train(output=run, resume=True, device="cpu").steps == 4


def test_a_bad_row_is_told_before_a_base_is_loaded(tmp_path, monkeypatch):
    """A base may take minutes to load; what is wrong with a file shows in a second."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a"}\n', "utf-8")
    monkeypatch.setattr("lorasmith.training.assemble.load_base", lambda *_args: pytest.fail("the base was loaded"))
    with pytest.raises(DataError, match=r"rows\.jsonl line 1"):
        train(tmp_path / "rows.jsonl", output=tmp_path / "run")
