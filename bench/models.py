"""Three models with random weights, for shapes that no package brings. A program of its own: see `programs.run`.

python -m bench.models bloom FOLDER --demo FOLDER
"""

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from bench.rows import ALPACA, records_of

BLOOM: dict[str, Any] = {"n_layer": 24, "hidden_size": 1024, "n_head": 16, "vocab_size": 42_437}  # the tutorial's
LARGER = {  # SmolLM2-360M's
    "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
    "num_key_value_heads": 5, "head_dim": 64,
}  # fmt: skip


BILLION = {  # Llama 3.2 1B's
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "tie_word_embeddings": True,
}  # fmt: skip


def bloom(folder: Path, **changes: Any) -> None:
    """A Bloom in float32 with a tokenizer learned from the alpaca rows; its folder in the Hugging Face layout."""
    torch.manual_seed(0)
    shape = {**BLOOM, **changes}
    texts = ["\n".join(str(value) for value in fields.values()) for fields in records_of(ALPACA) or []]
    tokenizer(texts, shape["vocab_size"]).save_pretrained(folder)
    config = BloomConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    BloomForCausalLM(config).save_pretrained(folder)


def tokenizer(texts: Iterable[str], words: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Bloom's special tokens; a token holds three Chinese characters at most."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words, min_frequency=2, max_token_length=9, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def larger(folder: Path, demo: Path, shape: dict[str, Any] | None = None) -> None:
    """The demo's model in the shape of SmolLM2-360M or another one, bfloat16, with the demo's tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(demo)
    config.update(shape or LARGER)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in (*demo.glob("tokenizer*"), *demo.glob("chat_template*")):
        shutil.copy(file, folder)


def main() -> None:
    """Write one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=("bloom", "larger", "billion"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--demo", type=Path, required=True)
    args = parser.parse_args()
    if args.which == "bloom":
        bloom(args.folder)
    else:
        larger(args.folder, args.demo, BILLION if args.which == "billion" else LARGER)


if __name__ == "__main__":
    main()
