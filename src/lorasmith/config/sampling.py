"""Options of generation: how the next token is sampled and when a reply ends. Loads no torch.

`Sampling` is shared by the command line, the library and the server's API; the classes below it add to that.
"""

from typing import Annotated

from pydantic import ConfigDict, Field

from lorasmith.config.values import Typed
from lorasmith.i18n import _

# A type of its own, because the API has another default.
Temperature = Annotated[
    float, Field(ge=0, allow_inf_nan=False, description=_("Sampling temperature; 0 means greedy decoding"))
]
TopLogprobs = Annotated[int, Field(ge=0, le=20)]  # how many of the most likely tokens to report
# What is added to the logits of tokens, by their ids; with -100, a token is practically never sampled.
LogitBias = dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]]


class Sampling(Typed):
    """The options that the command line, the library and the server's API share."""

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
    def penalizes(self) -> bool:
        """Whether any penalty applies, so that logits depend on the tokens before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class SamplingFlags(Sampling):
    """The options of the command line. Decoding is greedy unless a temperature is given."""

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
    """The options of the library: those of the command line, log probabilities and logit bias."""

    # how many of the most likely tokens to report besides the sampled one; 0 reports the sampled one only
    logprobs: TopLogprobs | None = None
    logit_bias: LogitBias | None = None
