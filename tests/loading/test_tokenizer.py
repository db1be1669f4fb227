"""What is said of a folder whose tokenizer cannot be used."""

import json
from pathlib import Path

import pytest

from lorasmith.errors import MissingExtraError, ModelError
from lorasmith.loading import tokenizer
from lorasmith.loading.tokenizer import load_tokenizer
from tests.support.tiny import LINES


def said(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    (problem,) = caught.value.problems
    return problem.replace(str(folder), "MODEL")


def test_no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert said(folder) == (
        "MODEL: no tokenizer found (tokenizer.json). Copy the tokenizer files of the same model there."
    )


def test_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert said(folder).startswith("MODEL: the tokenizer cannot be read: ")


def test_a_tokenizer_without_an_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"}
    path.write_text(json.dumps(kept))
    assert said(folder) == (
        "MODEL: the tokenizer has no eos_token, so a reply would never end. Set eos_token in its tokenizer_config.json."
    )


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_a_sentencepiece_model_alone_names_its_extra(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).write_bytes(b"")
    monkeypatch.setattr(tokenizer, "_is_installed", lambda package: package != "sentencepiece")
    load_tokenizer(folder)  # tokenizer.json is enough
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MissingExtraError) as caught:
        load_tokenizer(folder)
    assert str(caught.value) == (
        f"{folder / name}: this older format of a tokenizer is read with sentencepiece, which is not installed. "
        "Install it with: pip install 'lorasmith[sentencepiece]'. Or copy the tokenizer.json of the same model there."
    )


def test_with_its_extra_it_is_read_as_sentencepiece_reads_it(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(LINES), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    about = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = load_tokenizer(tmp_path)
    assert len(ours) == theirs.vocab_size()
    for line in LINES:
        assert ours(line, add_special_tokens=False)["input_ids"] == theirs.encode(line)
