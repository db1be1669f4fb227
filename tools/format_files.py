"""Files that no text can hold, made as docs/formats.md shows it: the page prints the bodies of these functions."""

import inspect
import textwrap
from collections.abc import Callable


def compressed() -> None:
    """chats.jsonl, smaller."""
    import gzip
    from pathlib import Path

    import pyarrow

    text = Path("chats.jsonl").read_bytes()
    Path("chats.jsonl.gz").write_bytes(gzip.compress(text))
    with pyarrow.CompressedOutputStream("chats.jsonl.zst", "zstd") as file:
        file.write(text)


def parquet() -> None:
    """The same rows as a table."""
    import json
    from pathlib import Path

    import pyarrow.parquet

    rows = [json.loads(line) for line in Path("chats.jsonl").read_text("utf-8").splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "chats.parquet")


def arrow() -> None:
    """The same rows as an Arrow file, such as `datasets` keeps in its cache."""
    import json
    from pathlib import Path

    import pyarrow

    rows = [json.loads(line) for line in Path("chats.jsonl").read_text("utf-8").splitlines()]
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream("chats.arrow", table.schema) as file:
        file.write_table(table)


def saved() -> None:
    """A data set of the package `datasets`."""
    import datasets

    rows = [{"prompt": "Which socket?", "completion": "E14 or E27."}]
    datasets.Dataset.from_list(rows).save_to_disk("lamps")


MADE: dict[str, Callable[[], None]] = {"compressed": compressed, "parquet": parquet, "arrow": arrow, "saved": saved}


def shown(name: str) -> str:
    """What stands in a function below its docstring."""
    lines = inspect.getsource(MADE[name]).splitlines()[2:]
    return textwrap.dedent("\n".join(lines)).strip()
