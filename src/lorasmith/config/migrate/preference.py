"""Training on preferences in other programs' configurations: the method, the options of its loss, and the reference."""

from collections.abc import Mapping
from typing import Any

from lorasmith.config.migrate.migration import Migration, words
from lorasmith.config.preference import METHODS, USED_BY
from lorasmith.i18n import _

REFERENCED = ("dpo", "kto")  # methods that compare with the model as it was at the start
TRL_LOSSES = {"dpo": "sigmoid", "kto": "kto", "simpo": "simpo"}  # names of our losses in TRL
SFT = "sft"  # TRL's name of the loss on the chosen answer, which is added to another one


def choose(migration: Migration, method: str, key: str) -> None:
    """Set the method; refuse it if all weights shall be trained."""
    if migration.value("training.method") == "full":
        migration.refuse("full_preference", key, method)
    migration.put("training.method", method, key)


def is_on(migration: Migration) -> bool:
    """Whether the training is one on preferences."""
    return migration.value("training.method") in METHODS


def options(migration: Migration, table: Mapping[str, str], defaults: Mapping[str, Any]) -> None:
    """The options of the loss by a table of their key and our option; those of other methods have no effect.

    defaults: of the program, by our option.
    """
    method = migration.value("training.method")
    used = [ours for ours in {*table.values(), *defaults} if method in USED_BY.get(ours, METHODS)]
    migration.ignore("inactive", [key for key, ours in table.items() if ours not in used])
    migration.move({key: f"preference.{ours}" for key, ours in table.items() if ours in used})
    for ours, value in defaults.items():
        if ours in used:
            migration.default(f"preference.{ours}", value)


def trl_losses(migration: Migration, key: str, weights_key: str) -> None:
    """TRL's names of losses: one of ours, to which `sft` may be added with a weight. Refuses the others."""
    names, weights = words(migration.take(key, [])), migration.take(weights_key)
    if not names:
        return
    factors = [1] * len(names) if weights is None else weights if isinstance(weights, list) else [weights]
    losses = dict(zip(names, factors, strict=False))
    usual = losses.pop(TRL_LOSSES.get(migration.value("training.method"), ""), None)
    if usual is None or losses.keys() - {SFT}:
        migration.refuse("loss", key, names)
    elif usual != 1 or len(names) != len(factors):
        migration.refuse("loss", weights_key, weights)
    elif losses:
        migration.put("preference.rpo_alpha", losses[SFT], key)
    else:
        migration.ignore("default", [key, weights_key])


def reference(migration: Migration, model_key: str, adapters_key: str, base_key: str, start_key: str) -> None:
    """What the model is compared with: their keys of another model and of adapters on it.

    base_key, start_key: those of the base model and of the adapters from which the training starts. Refuses another
    reference than the model at the start, and reports it if theirs is without the adapter.
    """
    if migration.value("training.method") not in REFERENCED:
        migration.ignore("inactive", [model_key, adapters_key])
        return
    given = migration.foreign.values
    model, adapters, start = given.get(model_key), given.get(adapters_key), words(given.get(start_key) or [])
    if model is not None and model != given.get(base_key):
        migration.refuse("reference", model_key, model)
    if adapters and words(adapters) != start:
        migration.refuse("reference", adapters_key, adapters)
    elif start and not adapters:
        migration.unmatch("reference", adapters_key, _("not set"))
    migration.ignore("default", [key for key in (model_key, adapters_key) if key in migration.left])
