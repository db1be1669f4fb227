"""lorasmith generate: prompts from everywhere, answers in order, nothing else on standard output."""

import io
import json
import shutil
from pathlib import Path

import pytest

from lorasmith.adapters.session import open_adapters
from lorasmith.cli.main import main
from lorasmith.config.model import ModelConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.data.rows.conversation import Message
from lorasmith.engine.engine import Engine, replies
from lorasmith.engine.request import Request

SHORT = ["--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu"]


def generate(folder: Path, *words: str) -> int:
    return main(["generate", str(folder), *words, *SHORT])


@pytest.fixture(scope="module")
def expected(talkers: tuple[Path, Path]) -> dict[str, str]:
    """What the first adapter answers, one prompt at a time."""
    session = open_adapters(talkers[:1], ModelConfig(dtype="float32", device="cpu"))
    return {text: session.generate(text, max_new_tokens=6) for text in ("hi", "who are you", "考试？")}


def test_one_prompt(talkers, expected, capsys):
    assert generate(talkers[0], "hi") == 0
    assert capsys.readouterr().out == expected["hi"] + "\n"


def test_a_prompt_a_line_from_a_pipe(talkers, expected, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\n考试？\n"))
    assert generate(talkers[0]) == 0
    out, err = capsys.readouterr()
    assert out == f"> hi\n{expected['hi']}\n\n> 考试？\n{expected['考试？']}\n\n"
    assert "answers 2/2" in err


def test_json_is_one_object_a_line_in_order(talkers, expected, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(text + "\n" for text in expected)))
    assert generate(talkers[0], "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["reply"]) for row in rows] == list(expected.items())
    assert {row["finish"] for row in rows} <= {"stop", "length"}
    assert all(1 <= row["tokens"] <= 6 for row in rows)


ROWS = [
    {"instruction": "hi"},
    {"instruction": "who are", "input": "you", "output": "unread"},
    {"prompt": "hi", "id": 3},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "unread"}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "who are you"}]},
]


@pytest.mark.parametrize("form", ["lines", "list"])
def test_rows_as_for_training(talkers, expected, capsys, tmp_path, form):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS) if form == "list" else "\n".join(map(json.dumps, ROWS)), "utf-8")
    assert generate(talkers[0], "--file", str(file), "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["hi", "who are\nyou", "hi", "hi", "who are you"]
    assert [row["reply"] for row in rows[::2]][:2] == [expected["hi"]] * 2 == [rows[3]["reply"], rows[0]["reply"]]
    assert rows[4]["reply"] != expected["who are you"]  # the system message counts


def test_tools_of_a_row_are_shown_to_the_template(talkers, capsys, tmp_path):
    folder = Path(shutil.copytree(talkers[0], tmp_path / "knows-tools"))
    about = json.loads((folder / "lorasmith.json").read_text("utf-8"))
    shown = "{% if tools %}{{ tools | map(attribute='function.name') | join(' ') }}{% endif %}"
    about["template"]["chat_template"] = shown + about["template"]["chat_template"]
    (folder / "lorasmith.json").write_text(json.dumps(about), "utf-8")
    row = {"messages": [{"role": "user", "content": "hi"}]}
    tools = [{"type": "function", "function": {"name": f"look_{i}", "parameters": {}}} for i in range(9)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in (row, row | {"tools": tools})), "utf-8")
    assert generate(folder, "--file", str(file), "--json") == 0
    bare, with_tools = (json.loads(line)["reply"] for line in capsys.readouterr().out.splitlines())
    session = open_adapters([folder], ModelConfig(dtype="float32", device="cpu"))
    names = " ".join(tool["function"]["name"] for tool in tools)
    text = names + session.template.render((Message("user", "hi"),))
    request = Request(session.base.tokenizer(text)["input_ids"], SamplingConfig(max_new_tokens=6), session.names[0],
                      session.template.stop_ids)  # fmt: skip
    (wanted,) = replies(Engine(session.base), [request])
    assert with_tools == wanted.text != bare


def test_tools_that_the_template_does_not_show_are_refused(talkers, capsys, tmp_path):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    rows = [{"messages": [{"role": "user", "content": "hi"}]} | more for more in ({}, {"tools": tools})]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")
    assert generate(talkers[0], "--file", str(tmp_path / "rows.jsonl"), "--json") == 2
    assert "rows.jsonl line 2: the template has no place for 'tools'" in capsys.readouterr().err


def test_rows_from_a_pipe(talkers, expected, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"instruction": "hi"}\n'))
    assert generate(talkers[0]) == 0
    assert capsys.readouterr().out == expected["hi"] + "\n"


def test_sampling_flags_and_the_seed(talkers, capsys):
    drawn = ["--temperature", "1.5", "--top-p", "0.99", "--top-k", "200"]
    answers = []
    for seed in ("1", "1", "2"):
        assert generate(talkers[0], "hi", *drawn, "--seed", seed) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_stop_text(talkers, expected, capsys):
    stop = expected["hi"][1]
    assert generate(talkers[0], "hi", "--stop", stop, "never") == 0
    assert capsys.readouterr().out == expected["hi"].partition(stop)[0] + "\n"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["a", "--file", "b"], "give only one of them"),
        (["a", "--top-p", "0"], "sampling.top_p: invalid value '0': must be greater than 0"),
        (["--file", "missing.txt"], "missing.txt: cannot be read: No such file"),
    ],
)
def test_usage_errors_before_a_model_is_loaded(capsys, words, text):
    assert main(["generate", "no-run", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err


def test_bad_rows_come_together(capsys, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a"}\n{"x": 1}\n[1]\n{"messages": []}\n{"instruction": 3}\n{bad\n', "utf-8")
    assert main(["generate", "no-run", "--file", str(file)]) == 2
    err = capsys.readouterr().err
    assert [f"line {n}:" in err for n in range(1, 7)] == [False, True, True, True, True, True]
    assert "'instruction' must be text, found a number" in err


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_no_prompt_at_all(capsys, monkeypatch, tmp_path, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["generate", "no-run"]) == 2
    assert "no prompt" in capsys.readouterr().err
    file = tmp_path / "p.txt"
    file.write_text(text)
    assert main(["generate", "no-run", "--file", str(file)]) == 2
    assert "contains no prompts" in capsys.readouterr().err


def test_no_such_run(capsys):
    assert main(["generate", "no-run", "hi"]) == 2
    assert "no-run" in capsys.readouterr().err
