"""The one reader of JSON and TOML: whatever a file holds, a value comes of it, or one sentence with the place."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from lorasmith.adapters.folder import NAME
from lorasmith.cli.main import main
from lorasmith.config.files import MAX_DEPTH, Malformed, parse_json, read_objects, read_toml
from lorasmith.demo.run import _saved_replies
from lorasmith.errors import ConfigError, RunError
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.preflight.measurements import Measurement, load_measurement, save_measurement
from lorasmith.training.checkpoint import STATE
from tests.support.tiny import flags, rows_file, settings, trained

NINES = "9" * 5000
BAD = {  # content -> what is said of it
    "many digits": ('{"a": ' + NINES + "}", "a number with more than 4300 digits"),
    "many brackets": ("[" * 10**5, "nested too deeply"),
    "deep": ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deeply"),
    "half a character": ('{"a": "\\ud83d"}', "\\ud83d is a lone surrogate, which is not a character"),
    "half of a name": ('{"\\udc00": 1}', "\\udc00 is a lone surrogate, which is not a character"),
    "not UTF-8": (b'{"a": "\xff"}', "is not UTF-8"),
    "two values": ("{} {}", "unexpected text after the value"),
    "nothing": ("", "Expecting value"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_json_is_one_sentence(name):
    content, why = BAD[name]
    with pytest.raises(Malformed) as caught:
        parse_json(content)
    assert why in str(caught.value)


def test_the_place_is_told_where_it_is_known():
    for text, place in (
        ('{"a": 1,\n "b": ' + NINES + "}", (2, 7)),
        ('{"a": "\\ud83d\\ude00 \\\\ud800",\n\n "b": "x\\ud83d"}', (3, 9)),  # a pair, and an escaped backslash before
        ('{\n"a" 1}', (2, 5)),
        ("{}\n x", (2, 2)),
    ):
        with pytest.raises(Malformed) as caught:
            parse_json(text)
        assert (caught.value.line, caught.value.column) == place


def test_what_is_harmless_is_read():
    assert parse_json(b'\xef\xbb\xbf {"a": "\\ud83d\\ude00"}\n') == {"a": "😀"}
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_json(json.dumps([[]] * 1000))


def test_a_line_of_json_may_hold_what_python_takes_for_a_line_break(tmp_path):
    lines = [{"step": 1, "answer": "a\u2028b\x85c"}, {"step": 2}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write('{"step": 3, "ans')  # still being written
    assert read_objects(tmp_path / "x.jsonl", RunError) == lines
    (tmp_path / "x.jsonl").write_text("{}\n{1}\n")
    with pytest.raises(RunError, match=r"x\.jsonl:2: not valid JSON: Expecting property name"):
        read_objects(tmp_path / "x.jsonl", RunError)
    (tmp_path / "x.jsonl").write_bytes(b"{}\n\xff}\n")
    with pytest.raises(RunError, match=r"x\.jsonl:2: not valid JSON: byte 0 is not UTF-8"):
        read_objects(tmp_path / "x.jsonl", RunError)


@pytest.mark.parametrize("last", ['{"answer": "因'.encode()[:-1], b'{"answer": "{}', b'{"answer": "{}"'])
def test_a_last_line_may_end_anywhere(tmp_path, last):
    """A full disk can cut it within a character, or after a brace that does not end it."""
    (tmp_path / "x.jsonl").write_bytes(b'{"step": 1}\r\n{"step": 2}\n' + last)
    assert read_objects(tmp_path / "x.jsonl", RunError) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (f"[lora]\nr = {NINES}", "line 2, column 5: a number with more than 4300 digits"),
        (f"[lora]\nr = 1_{NINES}", "line 2, column 5: a number with more than 4300 digits"),
        ("a = " + "[" * 10**5, "nested too deeply"),
        ('a = "\\ud800"', "not a Unicode scalar value"),
        ("a = 2026-02-30", "(at line 1, column "),
        ("a = 2026-01-01T00:00:00+99:99", "(at line 1, column "),
        ("a =", "(at "),
    ],
)
def test_what_is_no_toml_is_one_sentence(tmp_path, content, why):
    (tmp_path / "a.toml").write_text(content, "utf-8")
    with pytest.raises(ConfigError) as caught:
        read_toml(tmp_path / "a.toml")
    (text,) = caught.value.problems
    assert text.startswith(f"{tmp_path / 'a.toml'}: ")
    assert why in text


def test_toml_that_a_windows_editor_saved_is_read(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf[lora]\nr = 4\n")
    assert read_toml(tmp_path / "a.toml") == {"lora": {"r": 4}}


# -- every file that the package reads, on the command line ----------------------------------------------------------

TRAIN = flags(settings(max_steps=1))
PLACES: dict[str, list[str]] = {  # file -> the words that read it; the last three are made with the content in them
    f"done/adapter/{ADAPTER_CONFIG}": ["info", "done"],
    f"done/adapter/{NAME}": ["info", "done"],
    "done/summary.json": ["info", "done"],
    "done/metrics.jsonl": ["plot", "done"],
    f"done/checkpoints/step-000001/{STATE}": ["train", "--output", "done", "--resume"],
    "rows.jsonl": ["train", "rows.jsonl", *TRAIN],
    "list.json": ["train", "list.json", *TRAIN],
    "cells.tsv": ["train", "cells.tsv", *TRAIN],
    "prompts.jsonl": ["generate", "done", "--file", "prompts.jsonl"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    trained(folder / "done", max_steps=1)
    return folder


def filled(place: str, content: str | bytes) -> bytes:
    """The content as it may stand in that file."""
    data = content if isinstance(content, bytes) else content.encode()
    if place == "list.json":
        return b'[{"prompt": "a", "completion": "b"},\n' + data + b"]"
    if place == "cells.tsv":
        return b"messages\n" + b'"[' + data.replace(b'"', b'""') + b']"\n'
    return data + (b" }\n" if place.endswith("jsonl") and not data.endswith(b"}") else b"\n")


@pytest.mark.parametrize("name", ["many digits", "many brackets", "deep", "half a character"])
@pytest.mark.parametrize("place", PLACES)
def test_a_broken_file_is_a_message_that_names_it(made, tmp_path, monkeypatch, capsys, place, name):
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "here"))
    if "checkpoints" in place:
        Path("done/summary.json").unlink()
    Path(place).write_bytes(filled(place, BAD[name][0]))
    assert main(PLACES[place]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert Path(place).name in line


def test_files_with_a_byte_order_mark_are_read(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "here"))
    names = [f"done/adapter/{ADAPTER_CONFIG}", f"done/adapter/{NAME}", "done/summary.json", "done/config.toml"]
    for file in [*map(Path, names), *Path("done/checkpoints").glob(f"*/{STATE}")]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert main(["info", "done"]) == 0
    assert main(["list", "."]) == 0
    assert "finished" in capsys.readouterr().out
    Path("done/summary.json").unlink()
    assert main(["train", "--output", "done", "--resume"]) == 0


@pytest.mark.parametrize("content", ["[1]", '[{"a": 1}]', "null", "[" * 10**5])
def test_samples_of_a_demo_that_somebody_changed(tmp_path, content):
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(RunError, match=r"samples\.json: not "):
        _saved_replies(tmp_path / "samples.json")


def test_a_measurement_of_other_kinds_is_measured_again(tmp_path):
    measured = Measurement(1.0, 1.0, 0.0, 1.0, 1.0, 1.0, "training")
    for change in ({"token": "fast"}, {"peak_mib": None}, {"by": "somebody"}):
        (tmp_path / "a.json").write_text(json.dumps(asdict(measured) | change))
        assert load_measurement(tmp_path / "a.json") is None
    save_measurement(tmp_path / "a.json", measured)
    assert load_measurement(tmp_path / "a.json") == measured


def test_a_summary_with_text_for_a_number_is_refused(made, tmp_path, capsys):
    run = Path(shutil.copytree(made / "done", tmp_path / "done"))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"steps": "1"}))
    assert main(["info", str(run)]) == 2
    assert "summary.json: not a valid run summary (steps: " in capsys.readouterr().err


def test_a_weight_that_no_float_can_hold_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows_file(Path("rows.jsonl"))
    answer = {"role": "assistant", "content": "b", "weight": 10**400}
    Path("a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, answer]}))
    assert main(["train", "a.jsonl", *TRAIN]) == 2
    assert "a.jsonl line 1: message 2 (assistant): 'weight' must be " in capsys.readouterr().err
