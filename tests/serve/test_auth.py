"""API keys, pages of other sites, and bodies that are too large."""

from hashlib import sha256
from pathlib import Path

import openai
import pytest

from lorasmith.errors import ConfigError
from lorasmith.serve.auth import Key, KeyFile, find_key, read_keys
from tests.support.serving import HI, Running, curl, post, running, said, user


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Host: evil.example", 403),
        ("Host: 127.0.0.1.evil.example:8000", 403),
        ("Host: [evil", 403),
        ("Host: LOCALHOST:9", 200),
        ("Host: [::1]:9", 200),
        ("Origin: https://evil.example", 403),
        ("Origin: null", 403),
        ("Origin: http://localhost:3000", 200),
        ("Origin: app://notes", 200),
    ],
)
def test_pages_from_elsewhere_are_refused_where_no_key_is_asked_for(served: Running, header, status):
    assert curl(f"{served.url}/v1/models", "-H", header)[0] == status


def test_keys_open_what_they_name(runs: Path):
    hashes = {name: sha256(name.encode()).hexdigest() for name in ("all", "one")}
    keys = [Key(hashes["all"], None), Key(hashes["one"], frozenset({"calm"}))]
    with running(runs, keys=keys) as served:
        asked = {"messages": user(HI), "max_tokens": 1}
        with pytest.raises(openai.AuthenticationError):
            served.client("wrong").chat.completions.create(model="calm", **asked)
        assert [model.id for model in served.client("one").models.list()] == ["calm"]
        said(served.client("one").chat.completions.create(model="calm", **asked))
        with pytest.raises(openai.NotFoundError):
            served.client("one").chat.completions.create(model="loud", **asked)
        assert post(served, {"name": "loud"}, "one")[0] == 403
        assert len(list(served.client("all").models.list())) == 3


def test_a_file_of_keys_must_be_there_and_hold_one(runs: Path, tmp_path: Path, refused):
    (tmp_path / "empty").write_text("# nobody yet\n")
    assert refused(runs, "--keys", tmp_path / "none") == ["--keys none: cannot be read: No such file or directory"]
    assert refused(runs, "--keys", tmp_path / "empty") == [
        "--keys empty: contains no keys, so nobody could use the server."
    ]


def test_a_file_of_keys_is_read_again_when_it_changes(runs: Path, tmp_path: Path, caplog) -> None:
    path, hashes = tmp_path / "keys", {name: sha256(name.encode()).hexdigest() for name in ("old", "new")}
    path.write_text(hashes["old"])
    with running(runs, keys=KeyFile(path)) as served:
        assert [model.id for model in served.client("old").models.list()]
        path.write_text(hashes["new"] + "  # and another length")
        assert [model.id for model in served.client("new").models.list()]
        with pytest.raises(openai.AuthenticationError):
            served.client("old").models.list()
        path.write_text("nonsense")
        assert [model.id for model in served.client("new").models.list()]
        path.unlink()
        assert [model.id for model in served.client("new").models.list()]
    assert f"--keys {path}: read again: 1 keys." in caplog.text
    assert "line 1: must begin with the SHA-256" in caplog.text
    assert caplog.text.count("The keys that were read before stay valid.") == 2


def test_a_line_of_the_file_is_a_hash_and_the_models_it_may_use(tmp_path: Path) -> None:
    one, two = (sha256(name.encode()).hexdigest() for name in ("one", "two"))
    (tmp_path / "keys").write_text(f"# staff\n{one.upper()} calm loud  # both\n\n{two}  -\n")  # as sha256sum writes it
    keys = read_keys(tmp_path / "keys")
    assert keys == [Key(one, frozenset({"calm", "loud"})), Key(two, None)]
    assert find_key(keys, "two") == keys[1]
    assert find_key(keys, "three") is None
    (tmp_path / "keys").write_text("short\nalso\n")
    with pytest.raises(ConfigError) as caught:
        read_keys(tmp_path / "keys")
    assert [problem.split(":")[0].rpartition(" ")[2] for problem in caught.value.problems] == ["1", "2"]
