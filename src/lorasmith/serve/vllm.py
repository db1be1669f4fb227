"""The command that serves the same adapters with vLLM, and what vLLM would refuse of them. Loads no torch."""

import json
import shlex
from typing import Any

from lorasmith.adapter_folder import base_of
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.files import CONFIG
from lorasmith.serve.found import Found, Shelf

# What vLLM's --max-lora-rank admits: MaxLoRARanks in its vllm/config/lora.py.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head")


def vllm_command(shelf: Shelf, model: str | None) -> tuple[str, list[str]]:
    """The command for those that vLLM takes, and a line for each that it does not, with the reason.

    `model`: the base, where it is not what the adapters name. Raises AdapterError where none can be taken.
    """
    problems = [_("left out: {problem}", problem=problem) for problem in shelf.problems]
    taken: list[Found] = []
    for found in shelf.found.values():
        refused = vllm_refuses(found)
        problems += [_("vLLM refuses {name}: {reason}", name=found.name, reason=reason) for reason in refused]
        taken += [] if refused else [found]
    base = model or next((base_of(found.folder) for found in taken), None)
    if base is None or not taken:
        raise AdapterError(*problems, _("no adapter is left that vLLM could serve."))
    others = [found.name for found in taken if model is None and base_of(found.folder) != base]
    told = [*problems]
    if others:
        text = _("{names}: trained on another base than {base}; each base needs a command of its own.",
                 names=", ".join(others), base=base)  # fmt: skip
        told.append(text)
        taken = [found for found in taken if found.name not in others]
    rank = next(rank for rank in RANKS if rank >= max(found.rank for found in taken))
    modules = [f"{found.name}={found.folder.absolute()}" for found in taken]
    flags = ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(len(taken))]
    return shlex.join(["vllm", "serve", base, *flags, "--lora-modules", *modules]), told


def vllm_refuses(found: Found) -> list[str]:
    """Why vLLM does not load an adapter, or would compute it wrongly without a word; empty where it serves it."""
    raw: dict[str, Any] = json.loads((found.folder / CONFIG).read_text("utf-8"))
    reasons = []
    if found.rank > RANKS[-1]:
        reasons.append(_("its rank {rank} is beyond the {most} that it admits", rank=found.rank, most=RANKS[-1]))
    if raw.get("modules_to_save"):
        reasons.append(_("modules_to_save holds {names}", names=", ".join(raw["modules_to_save"])))
    if raw.get("bias", "none") != "none":
        reasons.append(_("bias is {value!r}", value=raw["bias"]))
    if raw.get("use_dora"):
        reasons.append(_("it is a DoRA"))
    for key in ("rank_pattern", "alpha_pattern"):
        if raw.get(key):
            reasons.append(_("it has a {key}, which vLLM does not read: its scale would be wrong", key=key))
    targets = raw.get("target_modules") or []
    names = [str(target).rpartition(".")[2] for target in targets] if isinstance(targets, list) else []
    if touched := [name for name in EMBEDDINGS if name in names]:
        reasons.append(_("it adapts the embedding {names}", names=", ".join(touched)))
    return reasons
