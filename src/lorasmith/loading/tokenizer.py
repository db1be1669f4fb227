"""Load the tokenizer of a model folder."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasmith.errors import ModelError, first_line
from lorasmith.i18n import _
from lorasmith.loading.validate import LOAD_ERRORS


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises ModelError if it is missing, unreadable, or has no EOS token."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ModelError(
            _(
                "{folder}: no tokenizer found (tokenizer.json). Copy the tokenizer files of the same model there.",
                folder=folder,
            )
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
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
    return tokenizer
