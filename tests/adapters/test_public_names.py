"""Of a path, others see its last part only."""

from lorasmith.adapters.public_names import without_folders, without_paths


def test_a_name_on_a_hub_stays(tmp_path):
    assert without_folders("org/name") == "org/name"
    assert without_folders(str(tmp_path / "base")) == "base"
    assert without_folders("/no/such/place") == "place"


def test_paths_in_json_lose_their_folders():
    assert without_paths({"a": ["/x/y.jsonl", 1], "b": "org/name"}) == {"a": ["y.jsonl", 1], "b": "org/name"}
