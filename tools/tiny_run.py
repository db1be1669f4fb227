"""A run of a model made here, with every extra a run can have: what it leaves is what docs/formats.md lists."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorasmith import train
from lorasmith.data.template.chat_template import CHATML
from lorasmith.system.transformers_logging import quiet_transformers

SPECIAL = ("<eos>", "<|im_start|>", "<|im_end|>")


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and ChatML's; its chat template is ChatML's too."""
    vocabulary = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    core = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", extra_special_tokens=list(SPECIAL[1:]))
    made.chat_template = CHATML
    return made


@contextmanager
def private_cache(folder: Path) -> Iterator[None]:
    """Within it nothing is kept in the user's cache, and `datasets` draws no bars."""
    with patch.dict(os.environ, XDG_CACHE_HOME=str(folder), HF_DATASETS_DISABLE_PROGRESS_BARS="1"):
        yield


def tiny_run(folder: Path) -> Path:
    """Train for four steps on rows written here; the run's folder."""
    base, rows, run = folder / "base", folder / "rows.jsonl", folder / "run"
    made = tokenizer()
    config = LlamaConfig(
        vocab_size=len(made), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with quiet_transformers():
        LlamaForCausalLM(config).save_pretrained(base)
        made.save_pretrained(base)
    asked = [{"prompt": f"{number} + 1?", "completion": f"{number + 1}."} for number in range(16)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked), "utf-8")
    with private_cache(folder / "cache"):
        train(
            str(rows), model=str(base), output=str(run), held_out=4, batch_size=4, max_steps=4, eval_every=2,
            learning_rate=1e-2, samples=("1 + 1?",), tensorboard=True, dtype="float32",
        )  # fmt: skip
    return run
