"""Tiny random models of many families, and what the laws are tested with on them."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.inject import Adapter, inject
from lorasmith.model.base import Base
from lorasmith.model.probe import native_attention, probe
from lorasmith.model.row import Example, Row, flatten

WORDS = 99
_LLAMA = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
_OLDER = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_NO_DROPOUT = dict.fromkeys(
    ("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout", "dropout", "attention_dropout",
     "activation_dropout", "layerdrop", "hidden_dropout"), 0.0,
)  # fmt: skip

# what differs from _LLAMA; scales and caps large enough that leaving one out shows
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA | {"tie_word_embeddings": True},
    "qwen3": _LLAMA,
    "gemma3_text": _LLAMA
    | {"sliding_window": 4, "tie_word_embeddings": True, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    | {"eos_token_id": 1, "bos_token_id": 2},
    "opt": _OLDER | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0},
    "bloom": {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
    "mistral": _LLAMA | {"sliding_window": 4},
    "phi3": _LLAMA,
    "olmo2": _LLAMA,
    "granite": _LLAMA
    | {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": _LLAMA | {"logit_scale": 0.25},
    "gemma2": _LLAMA | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "sliding_window": 4},
    "stablelm": _LLAMA,
    "falcon": _OLDER | {"alibi": True},
    "gpt_neox": _OLDER | {"intermediate_size": 48, "max_position_embeddings": 64},
}  # fmt: skip

MAIN = ("llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "opt", "bloom")  # the laws hold on at least these
PADDED = {  # the families that cannot be packed, and why
    "bloom": "attend to each other",  # ALiBi from the mask: knows no position ids
    "falcon": "attend to each other",
    "gemma2": "softcap",
    "stablelm": "does not pass the packed row on",  # its layers do not hand keywords on
}
EMBEDDINGS = {"gpt2": "wte", "bloom": "word_embeddings", "falcon": "word_embeddings", "gpt_neox": "embed_in"}
ONE_LINEAR = {
    "gpt2": "c_attn",
    "phi3": "qkv_proj",
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), "query_key_value"),
}


def embedding(family: str) -> str:
    """The name of the family's token embedding."""
    return EMBEDDINGS.get(family, "embed_tokens")


def one_linear(family: str) -> str:
    """The name of a linear module that the family has in every layer."""
    return ONE_LINEAR.get(family, "q_proj")


@functools.cache
def _original(family: str, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **CONFIGS[family])
    for key, off in _NO_DROPOUT.items():
        if hasattr(config, key):
            setattr(config, key, off)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            p.data.normal_(1.0 if p.dim() == 1 else 0.0, 0.2)
        return model.to(dtype).requires_grad_(False).train()


def tiny(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A fresh copy of the family's model: the same weights each time, frozen, in train mode, dropouts zero."""
    return copy.deepcopy(_original(family, dtype))


@functools.cache
def _probed(family: str, dtype: torch.dtype) -> Base:
    model = tiny(family, dtype)
    base = Base(model, None, family, Path(), dtype, torch.device("cpu"))  # type: ignore[arg-type]
    probe(base)
    return base


def tiny_base(family: str, dtype: torch.dtype = torch.float64) -> Base:
    """A fresh Base on `tiny(family)`, as the probe found it."""
    return copy.deepcopy(_probed(family, dtype))


def adapted(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Base, Adapter]:
    """A Base with a trained-looking adapter: every parameter of it drawn at random."""
    base = tiny_base(family, dtype)
    adapter = inject(base.model, LoraConfig(**({"r": 4} | options)), base.router)
    stir(adapter)
    return base, adapter


@torch.no_grad()
def stir(adapter: Adapter, seed: int = 1) -> None:
    """Move every parameter of the adapter by random numbers, as a training would."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapter.parameters.values():
        p += torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * 0.2


def example(length: int, seed: int, learned: float = 0.6) -> Example:
    """Random words, about `learned` of them learned (at least one), with weights between 0.5 and 1.5."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (length + 1,), generator=generator).tolist()
    keep = (torch.rand(length, generator=generator) < learned).tolist()
    keep[seed % length] = True
    weights = (torch.rand(length, generator=generator, dtype=torch.float64) + 0.5).tolist()
    return Example(ids[:-1], [t if k else -100 for t, k in zip(ids[1:], keep, strict=True)], weights, f"test:{seed}")


def examples(lengths: Sequence[int] = (5, 9, 3, 12)) -> list[Example]:
    """One random example per length."""
    return [example(length, seed) for seed, length in enumerate(lengths)]


def one_row(batch: Sequence[Example], adapter: str | None = "default") -> Row:
    """All examples in one row that is a whole step."""
    return flatten(batch, sum(e.weight for e in batch), adapter)


IDS = torch.tensor([[5, 17, 60, 3, 8, 44, 92, 31], [9, 9, 12, 71, 0, 20, 6, 50]])


def own_logits(of: Base | PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    """Logits as transformers computes them, with gradient: the model's own attention, no mask, the active adapter."""
    model = of.model if isinstance(of, Base) else of
    with native_attention(of) if isinstance(of, Base) else nullcontext():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def logits_of(of: Base | PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    """The same without gradient."""
    with torch.no_grad():
        return own_logits(of, ids)


def gradients(adapter: Adapter) -> dict[str, Tensor]:
    """A copy of the adapter's gradients by key; they are set to None."""
    out = {}
    for key, p in adapter.parameters.items():
        assert p.grad is not None, f"{key} got no gradient"
        out[key], p.grad = p.grad.clone(), None
    return out


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of `b`."""
    assert a.shape == b.shape
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def far_apart(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float) -> dict[str, float]:
    """The keys whose tensors differ by more than `limit`, relative to the largest value of all of `theirs`."""
    assert ours.keys() == theirs.keys()
    largest = max(float(t.abs().max()) for t in theirs.values())
    found = {key: float((ours[key] - theirs[key]).abs().max()) / largest for key in theirs}
    return {key: value for key, value in found.items() if not value <= limit}


class _NoCastsDown(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype"))):
                return args[0]
            if func is F.softmax and kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = None
        return func(*args, **kwargs)


@contextmanager
def no_casts_down() -> Iterator[None]:
    """Within it `float64.to(float32)`, `.float()` and `softmax(dtype=float32)` keep float64.

    Llama's RMSNorm and Bloom's softmax cast to float32 whatever they are given. Two right ways of computing the same
    then agree to 1e-7 only, which would hide mistakes; without the casts they agree to 1e-13.
    """
    with _NoCastsDown():
        yield
