"""What clients may ask, in OpenAI's words and those that vLLM adds. Loads no torch.

A field that would change the answer and is not known is refused, never ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from lorasmith.config.sampling import Sampling, Temperature, TopLogprobs
from lorasmith.config.values import Typed

MOST_CHOICES = 64  # answers to one request

Strings = str | list[str]


class _Strict(Typed):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StreamOptions(_Strict):
    """What a stream says besides the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class _Sampled(Sampling):
    """What chat and completion requests share: all of the engine's sampling, and OpenAI's words for the rest."""

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Strings | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Temperature = 1.0  # OpenAI's default
    top_k: Annotated[int, Field(ge=-1, description=Sampling.model_fields["top_k"].description)] = 0
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # What says who asks, or what happens here in any case: changes no answer.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("top_k")
    @classmethod
    def _all_tokens(cls, top_k: int) -> int:
        return max(top_k, 0)  # vLLM's word for all of them is -1

    @property
    def sampling(self) -> dict[str, Any]:
        """The engine's part of it."""
        return {name: getattr(self, name) for name in Sampling.model_fields}


class Part(Typed):
    """A piece of a message; of other types than text there is none here."""

    type: Literal["text"]
    text: str


class Function(Typed):
    """A call's function; `arguments` is JSON text."""

    name: str
    arguments: str | dict[str, Any] = ""


class Call(Typed):
    """A call of a tool in an answer that came before."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class ChatMessage(Typed):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None


class ResponseFormat(_Strict):
    """Free text, or one JSON object."""

    type: Literal["text", "json_object"] = "text"


class ChatRequest(_Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def choices(self) -> int:
        """Replies that are asked for."""
        return self.n or 1


class CompletionRequest(_Sampled):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def choices(self) -> int:
        """Replies that are asked for."""
        is_one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return (self.n or 1) * (1 if is_one else len(self.prompt))


class AdapterRequest(_Strict):
    """POST /v1/adapters: `path` is relative to the folder that the server was started with; `name` where not given."""

    name: str
    path: str | None = None
