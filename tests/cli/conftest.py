"""A tiny model of bytes on disk, and adapters for it: what the verbs after training are tested with."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorasmith.adapters.folder import write_adapter
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.encoding import Template
from lorasmith.loading.load import load_base
from lorasmith.lora.inject import inject
from tests.support.families import stir
from tests.support.peft_folder import peft_folder
from tests.support.tiny import trained

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of two adapters, 'loud' and 'calm', on one base of 258 words that says letters."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("talkers")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=100_000, eos_token_id=fast.eos_token_id, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        p.data.normal_(1.0 if p.dim() == 1 else 0.0, 0.4)
    silent = [i for letter, i in fast.get_vocab().items() if not (letter.isascii() and letter.isalpha())]
    model.lm_head.weight.data[silent] = 0  # a letter's logit is above 0: replies are readable
    model.save_pretrained(folder / "base")
    fast.save_pretrained(folder / "base")
    base = load_base(ModelConfig(model=str(folder / "base"), dtype="float32", device="cpu"))
    template = Template.of(base.tokenizer)
    for seed, name in enumerate(("loud", "calm")):
        base.adapters[name] = inject(base.model, LoraConfig(r=2, exclude_modules="lm_head"), base.router, name)
        stir(base.adapters[name], seed)
        write_adapter(base, name, template, folder / name, {})
    return folder / "loud", folder / "calm"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run = tmp_path_factory.mktemp("finished") / "run"
    trained(run)
    return run


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT made, and options that have lines of their own."""
    options = {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}}
    return peft_folder(tmp_path_factory.mktemp("theirs"), target_modules="all-linear", **options)
