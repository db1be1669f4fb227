"""How the next token is chosen and when a reply ends. Pydantic only: loads no torch."""

from typing import Annotated

from pydantic import ConfigDict, Field

from lorasmith.config.values import Typed
from lorasmith.i18n import _

# In a type, because the API's default is another.
Temperature = Annotated[
    float, Field(ge=0, allow_inf_nan=False, description=_("Sampling temperature; 0 means greedy decoding"))
]
Top = Annotated[int, Field(ge=0, le=20)]  # how many of the likeliest tokens are reported


class Sampling(Typed):
    """What has one name and one meaning everywhere: on the command line, in the library and in the API of a server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: Temperature = 0.0
    top_p: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description=_(
                "Nucleus sampling: sample from the most likely tokens whose probabilities add up to this value; 1 "
                "disables it"
            ),
        ),
    ] = 1.0
    top_k: Annotated[
        int, Field(ge=0, description=_("Sample from this many of the most likely tokens; 0 disables it"))
    ] = 0
    min_p: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description=_(
                "Sample from tokens whose probability is at least this fraction of the most likely token's; 0 "
                "disables it"
            ),
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        Field(
            gt=0,
            allow_inf_nan=False,
            description=_(
                "Penalty on tokens that occur in the prompt or the reply; above 1 makes repetition less likely"
            ),
        ),
    ] = 1.0
    presence_penalty: Annotated[
        float, Field(ge=-2, le=2, description=_("Subtracted from the logits of tokens that occur in the reply"))
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        Field(ge=-2, le=2, description=_("Subtracted from the logits of tokens in the reply, once per occurrence")),
    ] = 0.0

    @property
    def penalises(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class SamplingFlags(Sampling):
    """What the command line offers. Greedy unless a temperature is given."""

    max_new_tokens: Annotated[int, Field(gt=0, le=10_000_000, description=_("Maximum number of tokens in a reply"))] = (
        256
    )
    stop: Annotated[
        tuple[str, ...], Field(description=_("Strings that end the reply, in addition to the template's stop tokens"))
    ] = ()
    seed: Annotated[int, Field(ge=0, lt=2**32, description=_("Random seed for sampling"))] = 0
    json_object: Annotated[
        bool, Field(description=_("Make the reply a single JSON object; requires lorasmith[serve]"))
    ] = False


class SamplingConfig(SamplingFlags):
    """That, and what only a program can look at."""

    # how many of the likeliest tokens to report beside each that is chosen; 0: that one alone
    logprobs: Top | None = None
