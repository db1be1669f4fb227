"""The command that serves the same adapters with vLLM, and what vLLM would refuse of them."""

import json
import shlex
from pathlib import Path

from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.loading.gguf import PACKAGED, cached_gguf, packaged_model
from lorasmith.report import Report
from lorasmith.serve.discovery import DiscoveredAdapter, Discovery

# What vLLM's --max-lora-rank admits: MaxLoRARanks in its vllm/config/lora.py.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head")
PATTERNS_SINCE = "0.32"  # the first whose vllm/lora/peft_helper.py reads rank_pattern and alpha_pattern


def vllm_command(discovery: Discovery, model: str | None, report: Report) -> tuple[str, list[str]]:
    """The command for those that vLLM takes, and a line for each that it does not, with the reason.

    `model`: the base, where it is not what the adapters name. Raises AdapterError where none can be taken, ModelError
    where the base is a packaged model or a GGUF file that cannot be made a folder.
    """
    problems = [_("skipped: {problem}", problem=problem) for problem in discovery.problems]
    taken: list[DiscoveredAdapter] = []
    for found in discovery.adapters.values():
        refused = vllm_refuses(found)
        problems += [_("vLLM cannot serve {name}: {reason}", name=found.name, reason=reason) for reason in refused]
        taken += [] if refused else [found]
    base = model or next((found.adapter.base for found in taken), None)
    if base is None or not taken:
        raise AdapterError(*problems, _("no adapters are left that vLLM can serve."))
    others = [found.name for found in taken if model is None and found.adapter.base != base]
    told = [*problems]
    if others:
        text = _("{names}: trained on another base model than {base}; each base model needs its own command.",
                 names=", ".join(others), base=base)  # fmt: skip
        told.append(text)
        taken = [found for found in taken if found.name not in others]
    rank = next(rank for rank in VLLM_RANKS if rank >= max(found.rank for found in taken))
    patterned = [
        found.name
        for found in taken
        if found.adapter.peft_config.get("rank_pattern") or found.adapter.peft_config.get("alpha_pattern")
    ]
    if patterned:
        text = _("{names}: requires vLLM {version} or later; earlier versions ignore rank_pattern and alpha_pattern.",
                 names=", ".join(patterned), version=PATTERNS_SINCE)  # fmt: skip
        told.append(text)
    flags = ["--served-model-name", Path(base).name]  # what lorasmith serve calls it
    flags += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(len(taken))]
    return shlex.join(
        ["vllm", "serve", _model_argument(base, report), *flags, "--lora-modules", *map(_lora_module, taken)]
    ), told


def _model_argument(base: str, report: Report) -> str:
    """What vLLM reads the base from: a folder where it is one or is made into one here, else a hub's name."""
    path = Path(base).expanduser()
    if path.is_dir():
        return str(path.absolute())
    if path.is_file():
        return str(cached_gguf(path, report))
    return str(packaged_model(base, report)) if base in PACKAGED else base


def _lora_module(found: DiscoveredAdapter) -> str:
    """NAME=FOLDER, or JSON where a comma would make vLLM take it for JSON."""
    folder = str(found.folder.absolute())
    return json.dumps({"name": found.name, "path": folder}) if "," in folder else f"{found.name}={folder}"


def vllm_refuses(found: DiscoveredAdapter) -> list[str]:
    """Why vLLM does not load an adapter, or not on every base; empty where it serves it."""
    raw, reasons = found.adapter.peft_config, []
    if found.rank > VLLM_RANKS[-1]:
        reasons.append(_("its rank {rank} is higher than the maximum of {most}", rank=found.rank, most=VLLM_RANKS[-1]))
    if raw.get("modules_to_save"):
        reasons.append(_("modules_to_save contains {names}", names=", ".join(raw["modules_to_save"])))
    if raw.get("bias", "none") != "none":
        reasons.append(_("bias is {value!r}", value=raw["bias"]))
    if raw.get("use_dora"):
        reasons.append(_("it uses DoRA"))
    targets = raw.get("target_modules") or []
    names = [str(target).rpartition(".")[2] for target in targets] if isinstance(targets, list) else []
    if touched := [name for name in EMBEDDINGS if name in names]:
        reasons.append(_("it adapts the embedding {names}", names=", ".join(touched)))
    return reasons
