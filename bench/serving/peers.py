"""The peers: transformers' generate, PEFT's mixed batches, and PEFT's set_adapter with one request at a time."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from lorasmith.loading.folder import find_folder
from lorasmith.report import Report


class Peers:
    """A transformers model without adapters, and one with PEFT's; in the same dtype as ours."""

    def __init__(self, model: str, dtype: str, folders: Sequence[Path], prompts: list[list[int]], new: int) -> None:
        source = find_folder(model, Report())
        self.plain = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
        again = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
        self.names = [folder.name for folder in folders]
        self.peft = PeftModel.from_pretrained(
            again, folders[0], adapter_name=self.names[0], autocast_adapter_dtype=False
        )
        for folder in folders[1:]:
            self.peft.load_adapter(folder, adapter_name=folder.name, autocast_adapter_dtype=False)
        self.peft.eval()
        self.prompts, self.new = prompts, new
        longest = max(map(len, prompts))
        self.ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
        self.mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])

    def _options(self) -> dict[str, Any]:
        return {"max_new_tokens": self.new, "min_new_tokens": self.new, "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def base(self) -> dict[str, Any]:
        """All prompts in one batch, without adapters."""
        start = time.perf_counter()
        self.plain.generate(input_ids=self.ids, attention_mask=self.mask, **self._options())
        return {"seconds": time.perf_counter() - start}

    @torch.inference_mode()
    def mixed(self) -> dict[str, Any]:
        """All prompts in one batch, each with its adapter."""
        names = [self.names[i % len(self.names)] for i in range(len(self.prompts))]
        start = time.perf_counter()
        self.peft.generate(input_ids=self.ids, attention_mask=self.mask, adapter_names=names, **self._options())
        return {"seconds": time.perf_counter() - start}

    @torch.inference_mode()
    def serial(self) -> dict[str, Any]:
        """One prompt at a time, after switching to its adapter."""
        start = time.perf_counter()
        for i, ids in enumerate(self.prompts):
            self.peft.set_adapter(self.names[i % len(self.names)])
            one = torch.tensor([ids])
            self.peft.generate(input_ids=one, attention_mask=torch.ones_like(one), **self._options())
        return {"seconds": time.perf_counter() - start}

    @torch.inference_mode()
    def choices(self, prompt: list[int], reply: list[int], adapter: int | None) -> list[int]:
        """The most likely token at each position of `reply`, which another program generated with this adapter."""
        if adapter is not None:
            self.peft.set_adapter(self.names[adapter])
        logits = (self.plain if adapter is None else self.peft)(input_ids=torch.tensor([prompt + reply])).logits[0]
        return [int(token) for token in logits[len(prompt) - 1 : -1].argmax(-1)]


def generate_batch(peers: Peers, new: int) -> dict[str, Any]:
    """Transformers' continuous batching without adapters: tokens/s, or the error if it does not run here."""
    config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=-1)
    try:
        start = time.perf_counter()
        out = peers.plain.generate_batch(peers.prompts, generation_config=config, progress_bar=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(one.generated_tokens) for one in out.values())
    except Exception as error:  # noqa: BLE001 (whatever it is, that is the result)
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    return {"tokens_per_second": tokens / seconds, "tokens": tokens} if tokens else {"error": "it made no tokens"}
