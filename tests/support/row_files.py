"""Rows, and what is said of a file of rows that cannot be read."""

import pytest

from lorasmith.data.read.files import read_records
from lorasmith.errors import DataError

ROW = {"instruction": "Ask", "input": "", "output": "Answer"}
OTHER = {"instruction": "Why?", "output": "Because"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def problems(path) -> list[str]:
    """What reading it raises, each with the path shortened to its name."""
    with pytest.raises(DataError) as caught:
        read_records(path)
    return [text.replace(f"{path.parent}/", "") for text in caught.value.problems]
