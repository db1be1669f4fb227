"""Small tokenizers of every layout that model folders have, and folders that name a class for them."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = (
    "Why is the sky blue? In 2024, 12345 people asked: the air scatters blue light most.\n\n",
    "def f(x):\n    return x ** 2  # 365 days\n\n\nWhat do cats eat? Cats eat mice!!\n",
    "考试有哪些技巧？先做会做的题，再检查一遍。\n早睡早起身体好。",
)
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
QWEN = LLAMA3.replace("{1,3}", "")


def byte_level(split: str = "", add_prefix_space: bool = False, size: int = 400) -> Tokenizer:
    """Byte-level BPE. split: a regular expression, that of GPT-2 if empty."""
    core = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=not split, trim_offsets=False)
    pieces = pre_tokenizers.Split(Regex(split), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_]) if split else bytes_
    core.normalizer = normalizers.NFC() if split == QWEN else None
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False),
    )
    return core


def metaspace(kind: str) -> Tokenizer:
    """BPE with byte fallback, as converted from SentencePiece: of Mistral, Llama 2 or Gemma."""
    core = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    words = ["<mask>", "<bos>", "<eos>", "<pad>"] if kind == "gemma" else []
    names = SPECIAL + words
    core.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=560, special_tokens=names + fallback, show_progress=False)
    )
    raw = json.loads(core.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in names]
    core = Tokenizer.from_str(json.dumps(raw))
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    space = normalizers.Replace(" ", "▁")
    if kind == "mistral":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif kind == "llama2":
        core.pre_tokenizer, core.normalizer = None, normalizers.Sequence([normalizers.Prepend("▁"), space])
    else:
        core.pre_tokenizer, core.normalizer = pre_tokenizers.Split(" ", "merged_with_previous"), space
    core.decoder = decoders.Sequence(steps if kind == "gemma" else [*steps, decoders.Strip(" ", 1, 0)])
    bos = "<bos>" if kind == "gemma" else "<s>"
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
    )
    return core


def unigram() -> Tokenizer:
    """A Unigram model with metaspace, as of XGLM."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.train_from_iterator(
        LINES, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=SPECIAL, show_progress=False)
    )
    return core


def word_piece() -> Tokenizer:
    """WordPiece, as of BERT."""
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    )
    return core


LAYOUTS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": byte_level,
    "gpt2 with a space": lambda: byte_level(add_prefix_space=True),
    "llama3": lambda: byte_level(LLAMA3),
    "llama3 small": lambda: byte_level(LLAMA3, size=300),  # fits the models of tests/support/tiny.py
    "qwen": lambda: byte_level(QWEN),
    "mistral": lambda: metaspace("mistral"),
    "llama2": lambda: metaspace("llama2"),
    "gemma": lambda: metaspace("gemma"),
    "unigram": unigram,
    "wordpiece": word_piece,
}


@functools.cache
def layout(name: str) -> str:
    """The content of a tokenizer.json of this layout."""
    return LAYOUTS[name]().to_str(pretty=True)


def tokenizer_folder(folder: Path, name: str, model_type: str, tokenizer_class: str | None, **config: object) -> Path:
    """Write tokenizer.json of a layout, and configs that name a class for it, into `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(layout(name), "utf-8")
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    about = {"eos_token": "<|im_end|>", "bos_token": "<s>", "unk_token": "<unk>", "tokenizer_class": tokenizer_class}
    kept = {key: value for key, value in (about | config).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


def file_ids(folder: Path, texts: list[str], specials: bool = False) -> list[list[int]]:
    """What the package tokenizers alone makes of `texts` with the tokenizer.json of `folder`."""
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [encoding.ids for encoding in core.encode_batch(texts, add_special_tokens=specials)]
