"""Which folders and files are ours, and that nothing else is ever removed."""

from pathlib import Path, PurePath

import pytest

from lorasmith.system.ownership import foreign_entries, is_marked, mark, marked_files, remove_own, short_list


def is_ours(path: PurePath) -> bool:
    return path.parts[0] in ("ours", ".lorasmith")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of ours and of others, also inside our own folder, and a link with a name of ours."""
    for name in ("ours/deep/weights", "theirs/notes"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "ours" / "link").symlink_to(tmp_path / "theirs")
    return tmp_path


def test_a_marker_tells_the_kind_and_the_files(tmp_path):
    assert not is_marked(tmp_path, "run")
    assert marked_files(tmp_path) == frozenset()
    mark(tmp_path, "model", ["config.json"])
    assert is_marked(tmp_path, "model")
    assert not is_marked(tmp_path, "run")
    assert marked_files(tmp_path) == {".lorasmith", "config.json"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2, "folder": "run"}', '{"version": 1, "folder": "site"}'])
def test_anything_else_is_not_a_marker(tmp_path, text):
    (tmp_path / ".lorasmith").write_text(text)
    assert not is_marked(tmp_path, "run")


def test_a_link_is_not_a_marker(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    mark(tmp_path / "one", "run")
    (tmp_path / "two" / ".lorasmith").symlink_to(tmp_path / "one" / ".lorasmith")
    assert not is_marked(tmp_path / "two", "run")


def test_links_and_the_folders_of_others_are_foreign(folder):
    assert foreign_entries(folder, is_ours) == ["ours/link", "theirs"]


def test_only_our_own_files_are_removed(folder):
    mark(folder, "run")
    remove_own(folder, is_ours, keep=frozenset({".lorasmith"}))
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == [
        ".lorasmith", "ours", "ours/link", "theirs", "theirs/notes",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "text"), [(["a"], "a"), (["a", "b", "c"], "a, b, c"), (["a", "b", "c", "d", "e"], "a, b, c and 2 more")]
)
def test_a_message_names_the_first_paths(paths, text):
    assert short_list(paths) == text
