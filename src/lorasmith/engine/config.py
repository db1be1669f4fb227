"""How the next token is chosen and when a reply ends. Pydantic only: loads no torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.i18n import _


class SamplingConfig(BaseModel):
    """Greedy unless a temperature is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description=_("how freely the next token is drawn; 0: the likeliest"))
    ] = 0.0
    top_p: Annotated[
        float, Field(gt=0, le=1, description=_("draw from the likeliest tokens that hold this part of the probability"))
    ] = 1.0
    top_k: Annotated[int, Field(ge=0, description=_("draw from this many of the likeliest tokens; 0: from all"))] = 0
    repetition_penalty: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description=_("above 1: tokens that were there already are less likely")),
    ] = 1.0
    max_new_tokens: Annotated[int, Field(gt=0, description=_("longest reply in tokens"))] = 256
    stop: Annotated[
        tuple[str, ...], Field(description=_("texts that end the reply, besides the template's own stop tokens"))
    ] = ()
    seed: Annotated[int, Field(ge=0, lt=2**32, description=_("decides what is drawn"))] = 0
