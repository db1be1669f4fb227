"""`serve` as it is typed, up to where it loads a model; tests/serve has the rest."""

from types import SimpleNamespace

import pytest

from lorasmith.cli.serve import show_memory
from tests.support.commands import refused
from tests.support.tiny import Watch


def test_an_address_for_other_machines_needs_keys(tmp_path, capsys):
    pytest.importorskip("fastapi")
    text = refused(capsys, "serve", tmp_path, "--host", "0.0.0.0")
    assert text.startswith("serve.host: 0.0.0.0 can be reached from other machines, so --keys FILE is required.")


def test_a_folder_that_does_not_exist(tmp_path, capsys):
    assert refused(capsys, "serve", tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: the folder does not exist."


@pytest.mark.parametrize("flag", [["--port", "70000"], ["--slots", "0"]])
def test_a_wrong_option_is_named(tmp_path, capsys, flag):
    assert refused(capsys, "serve", tmp_path, *flag).startswith(f"serve.{flag[0].removeprefix('--')}: invalid value ")


def manager(context: int, asked: int | None = None, cache: bool = True) -> SimpleNamespace:
    """What `show_memory` looks at: a cache of 4,000 tokens, 4 slots, a model with a context of 2,000."""
    kv_cache = SimpleNamespace(limit=4000, share=lambda slots: 4000 // slots)
    return SimpleNamespace(
        worker=SimpleNamespace(engine=SimpleNamespace(cache=kv_cache if cache else None)),
        registry=SimpleNamespace(base=SimpleNamespace(max_positions=2000)),
        settings=SimpleNamespace(slots=4, context=asked),
        context=context,
        cache_mib=80.0,
        max_concurrency=4000 // context,
    )


def test_how_many_requests_fit():
    watch = Watch()
    show_memory(manager(2000), watch)
    assert watch.said == [
        "KV cache: 4,000 tokens (80 MiB). Concurrent requests: 4 of up to 1,000 tokens each, or 2 of the full context "
        "length of 2,000."
    ]
    assert watch.warned == []


@pytest.mark.parametrize(("context", "asked", "warns"), [(1500, None, True), (1500, 1500, False), (1500, 1800, True)])
def test_a_context_that_the_cache_cuts_is_warned_of(context, asked, warns):
    watch = Watch()
    show_memory(manager(context, asked), watch)
    assert bool(watch.warned) is warns


def test_without_a_cache_there_is_nothing_to_say():
    watch = Watch()
    show_memory(manager(2000, cache=False), watch)
    assert (watch.said, watch.warned) == ([], [])
