"""The vLLM command that serves the same adapters, and the reasons why vLLM cannot serve some of them."""

import json
import shlex
from pathlib import Path

from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.loading.gguf import PACKAGED, cached_gguf, packaged_model
from lorasmith.lora.start_values import MOVING
from lorasmith.lora.variant import VARIANTS
from lorasmith.report import Report
from lorasmith.serve.discovery import DiscoveredAdapter, Discovery

# Allowed values of vLLM's --max-lora-rank: MaxLoRARanks in vllm/config/lora.py.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head")
_INNER = ".experts.base_layer."  # of the first of two adapted weights; vLLM's _stack_moe_lora_weights asserts both
PATTERNS_SINCE = "0.32"  # first version whose vllm/lora/peft_helper.py reads rank_pattern and alpha_pattern


def vllm_command(discovery: Discovery, model: str | None, report: Report) -> tuple[str, list[str]]:
    """The command, and messages about adapters that are left out or need attention.

    `model`: the base model, if it is not the one named by the adapters. Raises AdapterError if vLLM can serve none of
    the adapters, ModelError if the base is a packaged model or GGUF file that cannot be converted to a folder.
    """
    problems = [_("skipped: {problem}", problem=problem) for problem in discovery.problems]
    served: list[DiscoveredAdapter] = []
    for adapter in discovery.adapters.values():
        refused = vllm_refuses(adapter)
        problems += [_("vLLM cannot serve {name}: {reason}", name=adapter.name, reason=reason) for reason in refused]
        served += [] if refused else [adapter]
    base = model or next((adapter.adapter.base for adapter in served), None)
    if base is None or not served:
        raise AdapterError(*problems, _("no adapters are left that vLLM can serve."))
    others = [adapter.name for adapter in served if model is None and adapter.adapter.base != base]
    messages = [*problems]
    if others:
        text = _("{names}: trained on another base model than {base}; each base model needs its own command.",
                 names=", ".join(others), base=base)  # fmt: skip
        messages.append(text)
        served = [adapter for adapter in served if adapter.name not in others]
    rank = next(rank for rank in VLLM_RANKS if rank >= max(adapter.rank for adapter in served))
    patterned = [adapter.name for adapter in served if _has_patterns(adapter)]
    if patterned:
        text = _("{names}: requires vLLM {version} or later; earlier versions ignore rank_pattern and alpha_pattern.",
                 names=", ".join(patterned), version=PATTERNS_SINCE)  # fmt: skip
        messages.append(text)
    command = ["vllm", "serve", _model_argument(base, report)]
    command += ["--served-model-name", Path(base).name]  # as in lorasmith serve
    command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(len(served))]
    return shlex.join([*command, "--lora-modules", *map(_lora_module, served)]), messages


def _has_patterns(adapter: DiscoveredAdapter) -> bool:
    return bool(adapter.adapter.peft_config.get("rank_pattern") or adapter.adapter.peft_config.get("alpha_pattern"))


def _model_argument(base: str, report: Report) -> str:
    """vLLM's model argument: a model folder, created for GGUF files and packaged models, or a name on a hub."""
    path = Path(base).expanduser()
    if path.is_dir():
        return str(path.absolute())
    if path.is_file():
        return str(cached_gguf(path, report))
    return str(packaged_model(base, report)) if base in PACKAGED else base


def _lora_module(adapter: DiscoveredAdapter) -> str:
    """NAME=FOLDER, or JSON if the folder contains a comma, which vLLM would misinterpret."""
    folder = str(adapter.folder.absolute())
    return json.dumps({"name": adapter.name, "path": folder}) if "," in folder else f"{adapter.name}={folder}"


def vllm_refuses(adapter: DiscoveredAdapter) -> list[str]:
    """Reasons why vLLM cannot load the adapter, or not on every base model; empty if it can."""
    raw, keys, reasons = adapter.adapter.peft_config, adapter.adapter.shapes, []
    if adapter.rank > VLLM_RANKS[-1]:
        reasons.append(
            _("its rank {rank} is higher than the maximum of {most}", rank=adapter.rank, most=VLLM_RANKS[-1])
        )
    if raw.get("modules_to_save"):
        reasons.append(_("modules_to_save contains {names}", names=", ".join(raw["modules_to_save"])))
    if raw.get("bias", "none") != "none":
        reasons.append(_("bias is {value!r}", value=raw["bias"]))
    reasons += [_("{flag} is set", flag=flag) for flag in (*VARIANTS, "trainable_token_indices") if raw.get(flag)]
    if any(".experts.lora_A." in key and key.replace(".experts.", _INNER) not in keys for key in keys):
        reasons.append(_("it adapts only one of the two weights of the experts"))
    if str(start := raw.get("init_lora_weights")).startswith(MOVING):
        reasons.append(_("init_lora_weights is {value!r}, which belongs to a changed base model", value=start))
    targets = raw.get("target_modules") or []
    names = [str(target).rpartition(".")[2] for target in targets] if isinstance(targets, list) else []
    if touched := [name for name in EMBEDDINGS if name in names]:
        reasons.append(_("it adapts the embedding {names}", names=", ".join(touched)))
    return reasons
