"""What the engine is tested with: tiny bases with a tokenizer, three adapters, prompts of many lengths."""

from collections.abc import Sequence

import torch

from families import WORDS, stir, tiny_base
from lorasmith.engine.config import SamplingConfig
from lorasmith.engine.engine import Engine, generate
from lorasmith.engine.request import Event, Request
from lorasmith.lora.config import LoraConfig
from lorasmith.lora.inject import inject
from lorasmith.model.base import Base
from lorasmith.model.probe import native_attention

STOP = 1


class Letters:
    """A tokenizer whose token i is one letter; the first three tokens are special."""

    def decode(self, ids: Sequence[int], **_options: object) -> str:
        return "".join(chr(256 + i) for i in ids if i > 2)

    def get_added_vocab(self) -> dict[str, int]:
        return {"<pad>": 0, "<end>": STOP, "<start>": 2}


def base_of(family: str, dtype: torch.dtype = torch.float32, adapters: int = 0) -> Base:
    """A probed base; its adapters a0, a1, ... differ in rank, scale and targets, and all change the answers."""
    base = tiny_base(family, dtype)
    base.tokenizer = Letters()  # type: ignore[assignment]
    for i in range(adapters):
        config = LoraConfig(r=2 + 3 * i, lora_alpha=8, use_rslora=i == 1, lora_dropout=0.3 * (i == 2))
        base.adapters[f"a{i}"] = inject(base.model, config, base.router, f"a{i}")
        stir(base.adapters[f"a{i}"], seed=i)
    return base


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, WORDS, (n,), generator=generator).tolist() for n in lengths]


def request(ids: Sequence[int], adapter: str | None = None, stop: bool = True, **sampling: object) -> Request:
    settings = SamplingConfig.model_validate({"max_new_tokens": 10} | sampling)
    return Request(ids, settings, adapter, (STOP,) if stop else ())


def theirs(base: Base, ids: Sequence[int], **options: object) -> list[int]:
    """The new tokens of transformers' own generate on one prompt, the stop token included."""
    prompt = torch.tensor([list(ids)])
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": STOP, "pad_token_id": 0} | options
    with native_attention(base):
        out = base.model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    return out[0, len(ids) :].tolist()


def run(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """The new tokens of each request."""
    ids: list[list[int]] = [[] for _ in requests]
    for event in generate(engine, requests):
        ids[event.key].append(event.token)
    return ids


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events
