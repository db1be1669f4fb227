"""Which adapters are found on disk, and paths that lead out of the folder of runs."""

import shutil
from pathlib import Path

import pytest

from lorasmith.errors import AdapterError
from lorasmith.serve.discovery import describe, discover, read, resolve_inside
from tests.support.serving import post, running


def test_paths_out_of_the_folder_are_refused(own_runs: Path, runs: Path):
    (own_runs / "link").symlink_to(runs.parent / "later")
    shutil.copytree(own_runs / "loud", own_runs / "sly")
    (own_runs / "sly" / "adapter" / "adapter_model.safetensors").unlink()
    (own_runs / "sly" / "adapter" / "adapter_model.safetensors").symlink_to(
        runs / "loud" / "adapter" / "adapter_model.safetensors"
    )
    with running(own_runs) as served:
        for path in ("../later", str(runs.parent / "later"), "link", "sly", "nowhere", "unfinished", "a" * 300):
            status, body = post(served, {"name": "x", "path": path})
            assert status == 400, path
            assert body["error"]["message"]
        assert "x" not in served.manager.registry.versions
        assert post(served, {"name": "../x"})[1]["error"]["param"] == "name"
    with pytest.raises(AdapterError, match="started with individual runs"):
        resolve_inside(discover([own_runs / "loud"]).roots, "calm")


def test_adapters_are_found_by_their_files_and_the_others_told_with_their_reason(own_runs: Path) -> None:
    (own_runs / "loud").rename(own_runs / "not a name")
    shutil.copytree(own_runs / "calm", own_runs.parent / "calm")
    discovery = discover([own_runs, own_runs.parent / "calm", own_runs / "calm" / "adapter"])
    assert list(discovery.adapters) == ["calm"]
    assert discovery.roots == [own_runs]
    calm = discovery.adapters["calm"]
    assert (calm.rank, calm.data, calm.loss, calm.hash) == (5, ["chats.jsonl"], None, "")
    for text in ("broken", "unfinished", "not a name", "same name"):
        assert any(text in problem for problem in discovery.problems), text
    with pytest.raises(AdapterError, match="does not exist"):
        discover([own_runs / "nowhere"])


def test_the_name_in_the_engine_follows_the_content(own_runs: Path) -> None:
    one = read("calm", own_runs / "calm")
    assert one.internal == f"calm@{one.hash[:12]}"
    assert read("a.b", own_runs / "calm").internal == f"a~b@{one.hash[:12]}"
    assert read("calm", own_runs / "loud").internal != one.internal
    assert one.without_tensors().adapter.tensors == {}
    assert describe("calm", own_runs / "calm").whole().hash == one.hash
