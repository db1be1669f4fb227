"""Which form a file has, how its rows become conversations, and what is said of rows that cannot."""

import json

import pytest

from lorasmith.config.data import COLUMNS
from lorasmith.data.read.files import read_file
from lorasmith.data.rows.conversation import Message, Record
from lorasmith.data.rows.formats import FORMATS, to_conversation
from lorasmith.data.rows.preference import PAIRS, RATED
from lorasmith.errors import ConfigError, DataError

ROW = {"instruction": "Ask", "input": "", "output": "Answer"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PROMPT = {"prompt": "Ask", "completion": "Answer"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
TEXT = {"text": "Once upon a time"}


@pytest.fixture
def seen(tmp_path):
    """`seen(*rows, **options)`: what is found in a file of these rows."""

    def seen(*rows, **options):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return read_file(path, **options)

    return seen


@pytest.fixture
def made(seen):
    """`made(row)`: the conversation of the only row of a file."""
    return lambda row: to_conversation(seen(row).records[0])


@pytest.fixture
def refused(seen, tmp_path):
    """`refused(*rows)`: the problems of these rows, without the name of the file's folder."""

    def refused(*rows, **options):
        with pytest.raises(DataError) as caught:
            seen(*rows, **options)
        return [text.replace(f"{tmp_path}/", "") for text in caught.value.problems]

    return refused


def test_the_columns_that_map_may_name_are_those_of_the_row_formats():
    assert sorted(COLUMNS) == sorted({key for one in (*FORMATS, PAIRS, RATED) for key in one.keys})


# -- the format of a file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "form"),
    [(CHAT, "chat"), (SHAREGPT, "ShareGPT"), (ROW, "alpaca"), (PROMPT, "prompt/completion"), (TEXT, "text"),
     (ROW | TEXT, "alpaca"), (CHAT | TEXT | PROMPT, "chat"), (ROW | {"messages": None}, "alpaca"),
     (ROW | {"conversation": "a text"}, "alpaca"),
     ({"conversation": [{"human": "a", "bot": "b"}], "text": "c"}, "ShareGPT")],
)  # fmt: skip
def test_the_form_of_a_file(seen, row, form):
    assert seen(row, row).format == form


def test_most_rows_decide_and_the_others_are_told_with_what_they_are(refused):
    rows = [PROMPT, ROW, ROW, TEXT, ROW, {"instruction": "a", "ouput": "b"}]
    assert refused(*rows) == [
        "data.data: a.jsonl line 1: this row is in prompt/completion format ('prompt', 'completion'), but most rows of "
        'the file are in alpaca format, such as {"instruction": ..., "output": ...}. Convert it, or move it to a file '
        "of its own.",
        "data.data: a.jsonl line 4: this row is in text format ('text'), but most rows of the file are in alpaca "
        'format, such as {"instruction": ..., "output": ...}. Convert it, or move it to a file of its own.',
        "data.data: a.jsonl line 6: this row has 'instruction', 'ouput'; the rows of the file are in alpaca format, "
        'such as {"instruction": ..., "output": ...}. Should \'ouput\' be \'output\'?',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "end"),
    [
        ({"prompt": "a", "response": "b"}, "the closest format is prompt/completion, such as "
         '{"prompt": ..., "completion": ...}. Should \'response\' be \'completion\'? If so, '
         "use --map completion=response."),
        ({"question": "a", "answer": "b", "id": 3}, "the closest format is alpaca, such as "
         '{"instruction": ..., "output": ...}. Should \'question\' be \'instruction\'? '
         "Should 'answer' be 'output'? If so, use --map instruction=question output=answer."),
        ({"问题": "a", "回答": "b"}, "If so, use --map instruction=问题 output=回答."),
        ({"Dialog": CHAT["messages"]}, "If so, use --map messages=Dialog."),
        ({"content": "long", "summary": "short", "id": 1}, "If so, use --map instruction=content output=summary."),
        ({"article": "a", "question": "b", "answer": "c"}, "instruction=question output=answer input=article."),
        ({"input": [{"role": "user", "content": "a"}], "output": "b"}, "use --map prompt=input completion=output."),
        ({"source": "a", "frage": "b", "antwort": "c"}, "for example: --map instruction=frage output=antwort"),
        ({"prompt": "a", "response": "b", "context": "c"}, "--map instruction=prompt output=response input=context."),
        ({"prompt": "a", "content": "b"}, 'is prompt/completion, such as {"prompt": ..., "completion": ...}.'),
        ({"system_prompt": "a", "question": "b", "response": "c"}, "instruction=question output=response "
         "system=system_prompt."),
        ({"content": "long", "id": 1}, "If so, use --map text=content."),
        ({"instruction": "a", "ouput": "b"}, "If so, use --map output=ouput."),
        ({}, 'this row has no keys; supported formats are {"messages": ...}, {"conversations": ...}, '
         '{"instruction": ..., "output": ...}, {"prompt": ..., "completion": ...}, {"conversation": ...}, '
         '{"text": ...}. Say which column is which, for example: --map instruction=COLUMN output=COLUMN'),
        ({"datum": 3, "frage": "a", "antwort": "b"}, "for example: --map instruction=frage output=antwort"),
        ({"frage": "a", "datum": 3}, "for example: --map instruction=COLUMN output=COLUMN"),
        ({"sentence": "a", "label": 1}, "for example: --map instruction=COLUMN output=COLUMN"),
        ({"titel": "a", "frage": "b", "antwort": "c"}, "for example: --map instruction=COLUMN output=COLUMN"),
        ({"system": "a", "model": "b"}, "for example: --map instruction=COLUMN output=COLUMN"),
        ({"system": "a", "user": "b", "assistant": "c"}, "If so, use --map instruction=user output=assistant."),
        ({"conversation_x": CHAT["messages"], "conversation_y": CHAT["messages"]}, "for example: --map "
         "instruction=COLUMN output=COLUMN"),
        ({"question": "a", "answer": ""}, "for example: --map instruction=COLUMN output=COLUMN"),
        ({"question": "a", "answer": "b", "rating": 4}, "it has scores of answers ('rating'), as reward modeling uses "
         "them. Keep the rows with good answers, without these columns."),
    ],
)  # fmt: skip
def test_columns_that_nobody_knows_are_told_with_the_nearest_form(refused, row, end):
    (text,) = refused(row)
    assert text.startswith("data.data: a.jsonl line 1: this row has ")
    assert text.endswith(end)


def test_other_columns_by_map(seen):
    rows = {"question": "Ask", "answer": "Answer", "output": "not this one", "id": 1}
    found = seen(rows, renamed={"instruction": "question", "output": "answer"})
    assert (found.format, found.records[0].fields) == ("alpaca", {"instruction": "Ask", "output": "Answer"})
    assert seen(ROW, renamed={"instruction": "question"}).format == "alpaca"  # read as it is
    swapped = seen({"input": "a", "output": "b", "instruction": "c"}, renamed={"input": "output", "output": "input"})
    assert swapped.records[0].fields == {"instruction": "c", "input": "b", "output": "a"}
    with pytest.raises(
        ConfigError, match=r"instruction=frage: .*a.jsonl has no column 'frage'\. Its columns are 'question', 'a"
    ):
        seen({"question": "Ask", "answer": "Answer"}, renamed={"instruction": "frage", "output": "answer"})


# -- a row becomes a conversation -----------------------------------------------------------------------------------


def test_alpaca_with_history_and_system(made):
    row = ROW | {"history": [["Hi", "Hello"], ["And?", "So"]], "system": "Be kind."}
    assert [(m.role, m.content) for m in made(row).messages] == [
        ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "So"),
        ("user", "Ask"), ("assistant", "Answer"),
    ]  # fmt: skip
    assert made(ROW | {"history": None, "system": ""}).messages == (
        Message("user", "Ask"),
        Message("assistant", "Answer"),
    )


def test_prompt_and_completion_and_plain_text(made):
    assert made(PROMPT).messages == (Message("user", "Ask"), Message("assistant", "Answer"))
    plain = made(TEXT)
    assert (plain.messages, plain.text) == ((), "Once upon a time")


def test_prompt_and_completion_as_messages(made):
    """As TRL has them: what is in the prompt is not trained on, answers included."""
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    prompt = [*before, {"role": "user", "content": "Ask"}]
    expected = (
        Message("user", "Hi"),
        Message("assistant", "Hello", learn=False),
        Message("user", "Ask"),
        Message("assistant", "Answer"),
    )
    assert made({"prompt": prompt, "completion": [{"role": "assistant", "content": "Answer"}]}).messages == expected
    assert made({"prompt": prompt, "completion": "Answer"}).messages == expected


def test_tools_beside_a_prompt_and_a_completion(made, refused):
    tool = {"type": "function", "function": {"name": "weather"}}
    for column in ("tools", "functions"):
        assert made(PROMPT | {column: [tool["function"]]}).tools == (tool,)
        assert made({**PROMPT, "prompt": [{"role": "user", "content": "Ask"}], column: [tool]}).tools == (tool,)
    (text,) = refused(PROMPT | {"tools": ["weather"]})
    assert text.endswith("'tools' must be a list of function schemas, found a list.")


def test_a_conversation_of_pairs(made):
    pairs = [{"human": "Any E27 bulbs?", "assistant": "Yes, twelve."}, {"human": "And E14?", "assistant": "None."}]
    assert [(m.role, m.content) for m in made({"system": "You sell.", "conversation": pairs}).messages] == [
        ("system", "You sell."), ("user", "Any E27 bulbs?"), ("assistant", "Yes, twelve."), ("user", "And E14?"),
        ("assistant", "None."),
    ]  # fmt: skip


def test_rows_with_more_than_text_are_refused_or_left_out_and_told(seen, refused, tmp_path):
    image = {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, *CHAT["messages"][1:]]}
    found = seen(CHAT, image, image, CHAT | {"id": 1}, skip=0.5)
    why = (
        "message 1 (user): found a part of type 'image_url', but only text can be trained on, and the model would not "
        "see it. Remove such rows, or leave them out with data.skip_bad_rows."
    )
    assert [record.source.rpartition(":")[2] for record in found.records] == ["1", "4"]
    assert found.notes[0] == f"{tmp_path}/a.jsonl: chat format, 2 rows, 2 skipped."
    assert found.warnings == (f"{tmp_path}/a.jsonl lines 2-3: skipped: {why}",)
    assert refused(image) == [f"data.data: a.jsonl line 1: {why}"]
    assert refused(image, CHAT) == [f"data.data: a.jsonl line 1: {why}"]
    with pytest.raises(DataError, match="a part of type 'image_url'"):
        to_conversation(Record(image, "row"))


# -- rows that cannot be learned from -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (ROW | {"output": 3}, "'output' must be text, found a number."),
        (ROW | {"instruction": None}, "'instruction' must be text, found null."),
        (ROW | {"input": ["a"]}, "'input' must be text, found a list."),
        (ROW | {"output": " \n"}, "'output' is empty, so there is nothing to train on. Fill it in, or remove the row."),
        (CHAT | {"system": 3}, "'system' must be text, found a number."),
        (CHAT | {"system": "a", "messages": [{"role": "system", "content": "b"}, *CHAT["messages"]]}, "Keep only "
         "one of"),
        (PROMPT | {"system": "a", "prompt": [{"role": "system", "content": "b"}, *CHAT["messages"]]}, "'system' is "
         "set, but the first message has the role 'system' too."),
        (ROW | {"history": "Hi"}, "'history' must be a list of pairs [question, answer], found text."),
        (ROW | {"history": '[["Hi", "Hello"]'}, "'history' is not valid JSON (line 1, column 17 of its text): "),
        (ROW | {"history": [["Hi"]]}, "'history': item 1 must be a pair of texts [question, answer]."),
        (ROW | {"history": [["Hi", " "]]}, "'history': the answer of item 1 is empty."),
        (PROMPT | {"completion": ""}, "'completion' is empty, so there is nothing to train on."),
        (PROMPT | {"prompt": None}, "'prompt' must be text, found null."),
        (PROMPT | {"prompt": 3, "completion": []}, "'prompt' must be text or a list of messages, found a number."),
        (PROMPT | {"prompt": [], "completion": []}, "'completion' is empty"),
        (CHAT | {"images": ["a.png"]}, "found 'images', but only text can be trained on"),
        (TEXT | {"text": " "}, "'text' is empty, so there is nothing to train on."),
        (TEXT | {"text": ["a"]}, "'text' must be text, found a list."),
    ],
)  # fmt: skip
def test_a_bad_row_is_told_with_its_line(refused, row, text):
    good = next(form for form in (ROW, CHAT, PROMPT, SHAREGPT, TEXT) if form.keys() <= row.keys())
    (found,) = refused(good, row)
    assert found.startswith("data.data: a.jsonl line 2: ")
    assert text in found
