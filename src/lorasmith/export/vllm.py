"""What vLLM makes of an adapter folder: what it refuses, what it would compute wrongly, and which ranks it takes.

As in vllm/lora/peft_helper.py, lora_model.py and config/lora.py: it reads one rank and one lora_alpha for all layers,
use_rslora, and tensors named lora_A and lora_B (lora_embedding_A, lora_embedding_B).
"""

from collections.abc import Iterator

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.i18n import _, listed

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank accepts
DEFAULT_RANK = 16
PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def rank_of(adapter: AdapterFolder) -> int:
    """The largest rank of its layers."""
    config = adapter.config
    return max([config.r, *config.rank_pattern.values()])


def rank_for_vllm(adapter: AdapterFolder) -> int:
    """The smallest --max-lora-rank with which vLLM loads the adapter; the largest that there is if none does."""
    return next((rank for rank in RANKS[1:] if rank >= rank_of(adapter)), RANKS[-1])


def vllm_findings(adapter: AdapterFolder) -> Iterator[str]:
    """What vLLM refuses or computes wrongly, or needs an option for, in words."""
    config, rank = adapter.peft_config, rank_of(adapter)
    if config.get("use_dora"):
        yield _("vLLM does not load this adapter, because it does not support DoRA. Serve the merged model instead.")
    elif names := config.get("modules_to_save"):
        yield _(
            "vLLM does not load this adapter, because it does not support modules_to_save ({names}). Serve the merged "
            "model instead.",
            names=listed(map(str, names)),
        )
    elif others := sorted(key for key in adapter.shapes if not _is_known(key)):
        yield _(
            "vLLM does not load this adapter, because it does not know the tensor {name}. Serve the merged model "
            "instead.",
            name=others[0],
        )
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        yield _(
            "vLLM scales all layers by one lora_alpha / r and ignores rank_pattern and alpha_pattern, so its answers "
            "would differ. Serve the merged model instead."
        )
    if rank > RANKS[-1]:
        yield _(
            "vLLM does not load this adapter, because its rank is {rank}; {most} is the largest that it accepts.",
            rank=rank,
            most=RANKS[-1],
        )
    elif rank > DEFAULT_RANK:
        yield _(
            "This adapter has rank {rank}, so vLLM needs --max-lora-rank {most}.",
            rank=rank,
            most=rank_for_vllm(adapter),
        )


def _is_known(key: str) -> bool:
    parts = key.split(".")
    return parts[-1] in PARTS or (parts[-1] == "weight" and parts[-2] in PARTS)
