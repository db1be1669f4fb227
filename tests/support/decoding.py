"""What the engine is tested with: tiny bases with a tokenizer, three adapters, prompts of many lengths."""

from collections.abc import Callable, Sequence

import torch

from lorasmith.config.lora import LoraConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.engine.detokenizer import Detokenizer
from lorasmith.engine.engine import Engine, generate
from lorasmith.engine.request import Chunk, Event, Request, RunningRequest
from lorasmith.engine.runner import Packed
from lorasmith.lora.inject import inject
from lorasmith.model.base import Base
from lorasmith.model.fast.recognize import recognize_modules
from lorasmith.model.probe import native_attention
from tests.support.families import WORDS, stir, tiny_base

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
    recognize_modules(base.model)  # as load_base does
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


def logits_of_steps(engine: Engine, act: Callable[[], object]) -> dict[int, torch.Tensor]:
    """The rows of logits that tokens are chosen from while `act` runs, [tokens, V] for each request's key."""
    found: dict[int, list[torch.Tensor]] = {}
    inner = engine._layout.run

    def spy(chunks: Sequence[Chunk]) -> torch.Tensor:
        logits = inner(chunks)
        ready = [chunk.running.key for chunk in chunks if chunk.running.pending == 0]
        for key, row in zip(ready, logits, strict=True):
            found.setdefault(key, []).append(row.clone())
        return logits

    engine._layout.run = spy  # type: ignore[method-assign]
    act()
    return {key: torch.stack(found[key]) for key in sorted(found)}


def packed(engine: Engine) -> Packed:
    assert isinstance(engine._layout, Packed)
    return engine._layout


def tokens_through(engine: Engine) -> list[int]:
    """How many tokens each forward of the engine had."""
    seen: list[int] = []
    inner = packed(engine).run
    packed(engine).run = lambda chunks: seen.append(sum(c.length for c in chunks)) or inner(chunks)  # type: ignore[method-assign, func-returns-value]
    return seen


def running_request(ids: list[int], **settings: object) -> RunningRequest:
    """The state of a request whose prompt is `ids`, in no engine."""
    one = Request(list(ids), SamplingConfig.model_validate(settings))
    return RunningRequest(0, one, ids, 99, frozenset(), Detokenizer(None))  # type: ignore[arg-type]
