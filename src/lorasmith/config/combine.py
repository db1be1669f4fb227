"""Options of `lorasmith combine`: how several adapters become one. Loads no torch."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from lorasmith.config.lora import MAX_RANK
from lorasmith.config.values import Typed
from lorasmith.i18n import _

Method = Literal[
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
SVD = "svd"  # the end of the methods whose result has a rank that can be chosen


def prunes(method: str) -> bool:
    """Whether the method sets part of the values to zero, and so needs a density."""
    return method not in ("cat", "linear", SVD)


class CombineConfig(Typed):
    """The options of `lorasmith combine`. Methods and names are those of PEFT's `add_weighted_adapter`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Annotated[
        Method,
        Field(
            description=_(
                "How to combine: cat is exact, and the ranks add up; svd is the best approximation of a given rank; "
                "the others are those of PEFT"
            )
        ),
    ] = "cat"
    rank: Annotated[
        int | None,
        Field(
            gt=0,
            le=MAX_RANK,
            description=_(
                "Rank of the result, for the methods that end in svd; the largest of the adapters if not given"
            ),
        ),
    ] = None
    density: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            allow_inf_nan=False,
            description=_(
                "Share of the values that the ties, dare and magnitude_prune methods keep; they require it, and 0.2 to "
                "0.7 is typical"
            ),
        ),
    ] = None
    majority_sign_method: Annotated[
        Literal["total", "frequency"],
        Field(
            description=_(
                "How the ties methods choose the sign of a value: by the sum of the adapters' values, or by their "
                "number"
            )
        ),
    ] = "total"
    seed: Annotated[int, Field(ge=0, le=1_000_000_000, description=_("Random seed of the dare methods"))] = 0

    @model_validator(mode="after")
    def _suits_the_method(self) -> Self:
        if prunes(self.method) and self.density is None:
            raise ValueError(
                _(
                    "{method} requires --density, the share of the values to keep; 0.2 to 0.7 is typical",
                    method=self.method,
                )
            )
        if not prunes(self.method) and self.density is not None:
            raise ValueError(_("--density has no effect with {method}, which keeps all values", method=self.method))
        if self.rank is not None and not self.method.endswith(SVD):
            raise ValueError(
                _(
                    "--rank has no effect with {method}; use a method that ends in svd to choose the rank",
                    method=self.method,
                )
            )
        return self
