"""How the next token is chosen and when a reply ends. Pydantic only: loads no torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.i18n import _


class SamplingFlags(BaseModel):
    """What the command line offers. Greedy unless a temperature is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description=_("how freely the next token is drawn; 0: the likeliest"))
    ] = 0.0
    top_p: Annotated[
        float, Field(gt=0, le=1, description=_("draw from the likeliest tokens that hold this part of the probability"))
    ] = 1.0
    top_k: Annotated[int, Field(ge=0, description=_("draw from this many of the likeliest tokens; 0: from all"))] = 0
    min_p: Annotated[
        float,
        Field(ge=0, le=1, description=_("draw from tokens at least this part as likely as the likeliest; 0: all")),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description=_("above 1: tokens that were there already are less likely")),
    ] = 1.0
    presence_penalty: Annotated[
        float, Field(ge=-2, le=2, description=_("taken from the logits of tokens that the reply holds already"))
    ] = 0.0
    frequency_penalty: Annotated[
        float, Field(ge=-2, le=2, description=_("taken from them once for each time that the reply holds them"))
    ] = 0.0
    max_new_tokens: Annotated[int, Field(gt=0, description=_("longest reply in tokens"))] = 256
    stop: Annotated[
        tuple[str, ...], Field(description=_("texts that end the reply, besides the template's own stop tokens"))
    ] = ()
    seed: Annotated[int, Field(ge=0, lt=2**32, description=_("decides what is drawn"))] = 0
    json_object: Annotated[bool, Field(description=_("the reply is one JSON object; needs lorasmith[serve]"))] = False

    @property
    def penalises(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class SamplingConfig(SamplingFlags):
    """That, and what only a program can look at."""

    # how many of the likeliest tokens to report beside each that is chosen; 0: that one alone
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
