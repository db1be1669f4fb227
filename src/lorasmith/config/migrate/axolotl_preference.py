"""What Axolotl says of training on preferences: the method, the options of its loss, and the formats of the data."""

from collections.abc import Mapping
from typing import Any

from lorasmith.config.migrate import preference
from lorasmith.config.migrate.migration import OFF, Migration
from lorasmith.config.preference import METHODS

OPTIONS = {
    "cpo_alpha": "rpo_alpha",
    "dpo_label_smoothing": "label_smoothing",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
    "simpo_gamma": "gamma",
}
DEFAULTS = {"beta": 0.1}  # TRL's
SIMPO_DEFAULTS = DEFAULTS | {"rpo_alpha": 1.0}  # TRL's cpo_alpha
BETAS = ("trl.beta", "rl_beta", "dpo_beta", "orpo_alpha")  # the first that is set is beta
MACHINE = (
    "dpo_padding_free", "dpo_use_liger_kernel", "dpo_use_logits_to_keep", "precompute_ref_log_probs",
    "rl_adapter_ref_model",
)  # fmt: skip
# The types of datasets, with the template that they spell, and their styles, with the column of the prompt.
TEMPLATES = {"chat_template": "", "chatml": "chatml", "llama3": "llama3"}
PROMPTS = {
    "": "prompt",
    "argilla": "prompt",
    "argilla_chat": "prompt",
    "default": "prompt",
    "icr": "input",
    "intel": "question",
    "prompt_pairs": "prompt",
    "ultra": "prompt",
}
KTO_PROMPTS = {"argilla": "instruction", "intel": "question", "prompt_pairs": "prompt", "ultra": "prompt"}


def method(migration: Migration) -> None:
    """The method and the options of its loss, where the file says nothing with TRL's defaults."""
    name = migration.take("rl")
    if name in METHODS:
        preference.choose(migration, name, "rl")
        migration.take_part("trl")
        migration.refuse_all("loss", ["dpo_norm_loss", "dpo_use_weighting"])
        betas = [key for key in BETAS if key in migration.left]
        migration.move(dict.fromkeys(betas[:1], "preference.beta"))
    elif name is not None and name not in OFF:
        migration.refuse("loss" if name == "ipo" else "stage", "rl", name)
    if name == "dpo":
        preference.trl_losses(migration, "dpo_loss_type", "dpo_loss_weights")
        migration.move({"rpo_alpha": "preference.rpo_alpha"})
    is_simpo = name == "simpo"
    table = {key: ours for key, ours in OPTIONS.items() if is_simpo or key != "cpo_alpha"}
    preference.options(migration, table, SIMPO_DEFAULTS if is_simpo else DEFAULTS)
    migration.ignore("machine", MACHINE)
    inactive = (*BETAS, "cpo_alpha", "dpo_loss_type", "dpo_loss_weights", "rpo_alpha")
    migration.ignore("inactive", [key for key in inactive if key in migration.left])


def form(
    migration: Migration, entry: Mapping[str, Any], kind: str, style: str
) -> tuple[str, dict[str, str] | None] | None:
    """The template that a dataset of preferences spells, and its columns; None for another dataset.

    kind, style: its type. The columns are None if they are messages, whose column the entry names.
    """
    is_kto = migration.value("training.method") == "kto"
    prompts = KTO_PROMPTS if is_kto else PROMPTS
    if not preference.is_on(migration) or kind not in TEMPLATES or style not in prompts:
        return None
    template = TEMPLATES[kind] or entry.get("chat_template") or migration.left.get("chat_template") or ""
    if kind == "chat_template" and style in ("", "default"):
        return str(template), None
    return str(template), {"prompt": prompts[style], **({} if is_kto else answers(entry))}


def answers(entry: Mapping[str, Any]) -> dict[str, str]:
    """The columns of the answers."""
    return {ours: str(entry.get(f"field_{ours}") or ours) for ours in ("chosen", "rejected")}
