"""Load the tokenizer of a model folder."""

from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasmith.errors import MissingExtraError, ModelError, first_line
from lorasmith.i18n import _
from lorasmith.loading.tokenizer_file import as_in_file, misnumbered_tokens
from lorasmith.loading.validate import LOAD_ERRORS
from lorasmith.report import Report

# Any of these can hold a tokenizer. All but the first are converted each time they are loaded.
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")


def load_tokenizer(
    folder: Path, trust_remote_code: bool = False, report: Report | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with the token ids of its tokenizer.json if it has one.

    Raises:
        ModelError: it is missing, unreadable, has no EOS token, or its Python code does not agree with tokenizer.json.
        MissingExtraError: it is in an older format, and the package that reads that is not installed.
    """
    if not any((folder / name).is_file() for name in FILES):
        raise ModelError(
            _(
                "{folder}: no tokenizer found (tokenizer.json). Copy the tokenizer files of the same model there.",
                folder=folder,
            )
        )
    _require_sentencepiece(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        tokenizer = as_in_file(folder, tokenizer, report)
    except LOAD_ERRORS as error:
        raise ModelError(
            _("{folder}: the tokenizer cannot be read: {error}", folder=folder, error=first_line(error))
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            _(
                "{folder}: the tokenizer has no eos_token, so a reply would never end. Set eos_token in its "
                "tokenizer_config.json.",
                folder=folder,
            )
        )
    if text := misnumbered_tokens(folder, tokenizer):
        (report or Report()).warn(text)
    return tokenizer


def _require_sentencepiece(folder: Path) -> None:
    """Raise MissingExtraError for a SentencePiece model without tokenizer.json, as in Llama 2, if it cannot be read."""
    old = sorted(folder.glob("*.model"))
    packages = ("sentencepiece", "google.protobuf") if old and not (folder / "tokenizer.json").is_file() else ()
    if not all(map(_is_installed, packages)):
        raise MissingExtraError(
            _(
                "{path}: this older format of a tokenizer is read with sentencepiece, which is not installed. Install "
                "it with: pip install 'lorasmith[sentencepiece]'. Or copy the tokenizer.json of the same model there.",
                path=old[0],
            )
        )


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package that contains it
        return False
