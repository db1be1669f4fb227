"""Options of training on preferences: dpo, orpo, kto and simpo. Loads no torch."""

from typing import Annotated

from pydantic import ConfigDict, Field

from lorasmith.config.values import Typed
from lorasmith.i18n import _

METHODS = ("dpo", "orpo", "kto", "simpo")  # values of training.method that train on preferences
MAX_FACTOR = 1e6
# The methods that use an option; all others use all options.
USED_BY = {
    "gamma": ("simpo",),
    "label_smoothing": ("dpo", "simpo"),
    "rpo_alpha": ("dpo", "simpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


class PreferenceConfig(Typed):
    """The [preference] section. docs/decisions.md has the source of each default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    beta: Annotated[
        float | None,
        Field(
            gt=0,
            le=MAX_FACTOR,
            allow_inf_nan=False,
            description=_(
                "beta of the loss: how strongly dpo and kto hold the model to what it was at the start, the weight of "
                "the odds ratio in orpo, the scale of the reward in simpo; 0.1 if not given, with simpo 2"
            ),
        ),
    ] = None
    gamma: Annotated[
        float,
        Field(
            ge=0, le=MAX_FACTOR, allow_inf_nan=False, description=_("Margin that simpo wants between the two rewards")
        ),
    ] = 1.0
    label_smoothing: Annotated[
        float,
        Field(
            ge=0,
            lt=0.5,
            allow_inf_nan=False,
            description=_("Fraction of the pairs whose answers are assumed to be swapped, for dpo and simpo"),
        ),
    ] = 0.0
    rpo_alpha: Annotated[
        float,
        Field(
            ge=0,
            le=MAX_FACTOR,
            allow_inf_nan=False,
            description=_("Weight of the loss on the chosen answer that dpo and simpo add, as in training on examples"),
        ),
    ] = 0.0
    desirable_weight: Annotated[
        float, Field(ge=0, le=MAX_FACTOR, allow_inf_nan=False, description=_("Weight of good answers in kto"))
    ] = 1.0
    undesirable_weight: Annotated[
        float, Field(ge=0, le=MAX_FACTOR, allow_inf_nan=False, description=_("Weight of bad answers in kto"))
    ] = 1.0

    def beta_of(self, method: str) -> float:
        """`beta`, or its default for `method`."""
        return self.beta if self.beta is not None else 2.0 if method == "simpo" else 0.1

    def unused(self, method: str) -> list[str]:
        """The options that are set to other values than their defaults, and that `method` does not use."""
        fields = type(self).model_fields
        is_preference = method in METHODS
        return [
            key
            for key, field in fields.items()
            if getattr(self, key) != field.default and (not is_preference or method not in USED_BY.get(key, METHODS))
        ]
