"""What the tests of the tutorial share: its script, a small Bloom, its tokenizer, rows of our own."""

import importlib.util
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from lorasmith.cli.flags import config_of
from lorasmith.config.toml import Config
from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples/tutorial"
COUNTS = "trainable params: 43,815,936 || all params: 389,584,896 || trainable%: 11.2468"
LAYERS, WIDTH, ROWS = 12, 32, 96  # the pattern matches layers 1, 10 and 11; 12 steps of 8
QUESTION = "考试有哪些技巧?"
OWN_ROWS = [
    {"instruction": f"{verb}{thing}。", "input": f"例：{thing}" if verb == "说明" else "", "output": f"{thing}：{text}"}
    for verb in ("解释", "说明", "描述", "介绍")
    for thing, text in (
        ("考试", "先做会做的题，再检查一遍。" * 30),
        ("天空", "空气散射蓝光。"),
        ("猫", "吃鱼，也吃老鼠。"),
    )
] * 8


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lorasmith_tutorial", EXAMPLE / "tutorial.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Bloom's special tokens: eos is not pad. A token holds three characters at most."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, max_token_length=9, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
    )  # fmt: skip
    core.train_from_iterator(["\n".join(row.values()) for row in rows], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )


def make_bloom(words: int) -> BloomForCausalLM:
    """Weights wide enough that the likeliest token is no matter of rounding."""
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=words, hidden_size=WIDTH, n_layer=LAYERS, n_head=4, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    return BloomForCausalLM(config)


def train_config(words: list[str]) -> Config:
    """What `lorasmith train` makes of these words."""
    args, problems = import_module("lorasmith.cli.train").parser().read(words)
    assert not problems
    if args.config and not Path(args.config).is_absolute():
        args.config = str(ROOT / args.config)
    return config_of(args)
