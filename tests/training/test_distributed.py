"""Two processes are the same training as one: steps, evaluation, Ctrl-C and resuming."""

import os
import signal
import socket
import time
from collections.abc import Callable

import pytest
import torch
import torch.multiprocessing as mp

from lorasmith.errors import Interrupted
from lorasmith.evaluation.loss import evaluate_loss
from lorasmith.training import loop
from lorasmith.training.distributed import join, leave
from lorasmith.training.run_files import read_summary
from tests.support.families import adapted, example
from tests.support.tiny import EXACT, Watch, adapter_bytes, assert_same_results, losses, metrics, model_folder, trained


def in_two_processes(work: Callable[[int], None]) -> list[int | None]:
    """Exit codes of two processes that run `work(rank)` with the variables that torchrun sets."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def start(rank: int) -> None:
        os.environ.update(
            WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        try:
            work(rank)
        except Interrupted:
            os._exit(130)

    context = mp.get_context("fork")
    processes = [context.Process(target=start, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [process.exitcode for process in processes]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("family", "split"),
    [
        ("llama", {"batch_size": 3, "row_tokens": 1}),  # three rows of unlike length: two and one
        ("llama", {"batch_size": 4, "row_tokens": 100_000}),  # one row of four: two and two, or three and one
        ("llama", {"batch_size": 1}),  # the second process has none
        ("bloom", {"batch_size": 5}),
        ("llama", {"batch_size": 3, "row_tokens": 1, "method": "full", "learning_rate": 1e-3}),
        ("gpt2", {"batch_size": 3, "row_tokens": 1, "method": "full", "learning_rate": 1e-3}),  # a tied head
    ],
)
def test_two_processes_equal_one(tmp_path, family, split):
    options = EXACT | {"model": str(model_folder(family)), "eval_every": 1} | split
    trained(tmp_path / "one", **options)
    assert in_two_processes(lambda rank: trained(tmp_path / "two", **options)) == [0, 0]
    assert_same_results(tmp_path / "two", tmp_path / "one")
    assert read_summary(tmp_path / "two").loss_after == pytest.approx(read_summary(tmp_path / "one").loss_after)


def test_two_processes_agree_on_a_folder_that_nobody_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def work(rank: int) -> None:
        if rank:
            os.environ["TZ"] = "Asia/Shanghai"  # another hour, as another second could be
            time.tzset()
        # the best is not the last, so every process reads it back from the folder
        trained(tmp_path / "unnamed", output=None, **EXACT, learning_rate=0.5, schedule="constant", eval_every=1)

    assert in_two_processes(work) == [0, 0]
    (run,) = (tmp_path / "runs").iterdir()
    summary = read_summary(run)
    assert summary.run == f"runs/{run.name}"
    measured = [line["held_out_loss"] for line in metrics(run) if "held_out_loss" in line and line["step"]]
    assert summary.loss_after == pytest.approx(min(measured))
    assert min(measured) < measured[-1]


def test_ctrl_c_in_one_process_ends_both_and_resume_equals_uninterrupted(tmp_path, monkeypatch):
    options = EXACT | {"max_steps": 6, "batch_size": 3, "row_tokens": 1, "lora_dropout": 0.2}
    one_step = loop.one_step

    def work(rank: int) -> None:
        def interrupted(job: loop.Job, k: int, stop: bool = False) -> object:
            if k == 2 and rank == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return one_step(job, k, stop)

        monkeypatch.setattr(loop, "one_step", interrupted)
        trained(tmp_path / "run", **options)

    assert in_two_processes(work) == [130, 130]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]
    assert in_two_processes(lambda rank: trained(tmp_path / "run", resume=True, **options)) == [0, 0]
    assert in_two_processes(lambda rank: trained(tmp_path / "whole", **options)) == [0, 0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_a_run_of_two_processes_goes_on_in_one(tmp_path):
    options = EXACT | {"max_steps": 4, "batch_size": 3, "row_tokens": 1, "save_every": 2}

    def work(rank: int) -> None:
        trained(tmp_path / "run", Watch(lambda step: os._exit(1) if step == 3 else None), **options)

    assert in_two_processes(work)[0] == 1
    watch = Watch()
    trained(tmp_path / "run", watch, resume=True, **options)
    assert [text for text in watch.warned if "processes was 2 and is now 1" in text]
    trained(tmp_path / "whole", **options)
    assert_same_results(tmp_path / "run", tmp_path / "whole")


def test_two_processes_measure_half_each_and_agree(tmp_path):
    """As many rows as examples: each process measures its own, and both know every loss as one process would."""
    base, _adapter = adapted("llama")
    measured = [example(n, n) for n in (1500, 1400, 1300)]
    alone = evaluate_loss(base, measured, "default")

    def work(rank: int) -> None:
        world, watch = join(), Watch()
        found = evaluate_loss(base, measured, "default", watch, "measuring", world)
        assert torch.equal(found.losses, alone.losses)
        assert len(watch.tasks) == (2, 1)[rank]
        leave()

    assert in_two_processes(work) == [0, 0]


@pytest.mark.parametrize(("has_card", "backend"), [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_tensors_of_either_device_can_be_summed_where_a_card_is(monkeypatch, has_card, backend):
    """With --device cpu on a machine with a card, the gradients lie on the processor."""
    joined = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_card)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **_more: joined.append(backend))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    join()
    assert joined == [backend]
