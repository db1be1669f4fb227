"""The schema of the HTTP API: requests and errors of OpenAI's API, with vLLM's extensions. Does not load torch.

Unknown fields are rejected rather than ignored, since they might change the reply.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from lorasmith.config.sampling import LogitBias, Sampling, Temperature, TopLogprobs
from lorasmith.config.values import Typed
from lorasmith.i18n import _

MAX_CHOICES = 64  # maximum number of replies per prompt
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}

Strings = str | list[str]

# Fields of OpenAI's API, of vLLM's and of other servers' that are not supported, with the values that change nothing.
# Clients send those.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("best_of", "length_penalty", "tfs", "typical", "typical_p"), (1,)),
    **dict.fromkeys(
        (
            "dry_multiplier", "dynatemp_range", "min_tokens", "mirostat", "mirostat_mode", "no_repeat_ngram_size",
            "priority", "smoothing_factor", "top_a", "xtc_probability",
        ),
        (0,),
    ),
    **dict.fromkeys(("bad_words", "documents", "logits_processors", "stop_token_ids"), ([],)),
    **dict.fromkeys(("chat_template_kwargs", "mm_processor_kwargs"), ({},)),
    **dict.fromkeys(
        (
            "continue_final_message", "include_stop_str_in_output", "return_token_ids", "return_tokens_as_token_ids",
            "use_beam_search",
        ),
        (False,),
    ),
    **dict.fromkeys(
        (
            "add_generation_prompt", "detokenize", "include_reasoning", "separate_reasoning", "skip_special_tokens",
            "spaces_between_special_tokens", "stream_reasoning",
        ),
        (True,),
    ),
    **dict.fromkeys(
        (
            "allowed_token_ids", "audio", "chat_template", "enable_thinking", "guided_choice", "guided_grammar",
            "guided_json", "guided_regex", "prompt_embeds", "prompt_logprobs", "reasoning", "structured_outputs",
            "thinking", "truncate_prompt_tokens", "web_search_options",
        ),
        (),
    ),
    "modalities": (["text"],),
}  # fmt: skip

# Values of supported fields with which other servers say "not set".
UNSET: dict[str, tuple[Any, ...]] = dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), (-1,))


# Keys of messages in other APIs that would change the reply, unlike `id` or `annotations`, which are ignored.
UNREAD_CONTENT = ("audio", "images", "partial", "prefix", "reasoning_details", "refusal", "videos")


class Failure(Exception):
    """An error response, in the format that the openai package turns into its exceptions.

    `param`: the field that is wrong; `code`: OpenAI's name of the error; `retry`: seconds until a retry makes sense.
    """

    def __init__(
        self, status: int, text: str, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(text)
        self.status, self.text, self.param, self.code, self.retry = status, text, param, code, retry

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.text, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After, if `retry` is set, and WWW-Authenticate for status 401."""
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class Strict(Typed):
    """A part of a request, in which unknown fields are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StreamOptions(Strict):
    """Options of streamed replies."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class _Tolerant(Strict):
    """A request in which fields of other servers may have the value that changes nothing."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        """The fields without those whose value changes nothing."""
        if not isinstance(values, dict):
            return values
        neutral = {key: (UNSET if key in cls.model_fields else cls.unsupported).get(key, ()) for key in values}
        return {key: value for key, value in values.items() if not _is_in(neutral[key], value)}


class Generated(_Tolerant, Sampling):
    """Fields shared by all requests for text: the engine's sampling settings, and the rest of OpenAI's API."""

    model: str
    stop: Strings | None = None
    temperature: Temperature = 1.0  # OpenAI's default
    top_k: Annotated[int, Field(ge=-1, description=Sampling.model_fields["top_k"].description)] = 0
    seed: int | None = None
    logit_bias: LogitBias | None = None
    ignore_eos: bool | None = None  # vLLM's, for benchmarks: the reply goes on to max_tokens
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted and ignored, because they do not change the reply.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _greedy(cls, values: Any) -> Any:
        """`top_p: 0` is greedy decoding."""
        if isinstance(values, dict) and _is_in((0,), values.get("top_p")):
            return values | {"top_p": 1, "temperature": 0}
        return values

    @field_validator("top_k")
    @classmethod
    def _all_tokens(cls, top_k: int) -> int:
        return max(top_k, 0)  # vLLM uses -1 for all tokens

    @property
    def sampling(self) -> dict[str, Any]:
        """The values of the engine's sampling settings."""
        return {name: getattr(self, name) for name in Sampling.model_fields}


class _Sampled(Generated):
    """Fields shared by chat and completion requests."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    # Accepted and ignored, because they do not change the reply.
    cache_prompt: bool | None = None
    reasoning_effort: str | None = None  # hints, which any model may ignore
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None


def _is_in(values: Sequence[Any], value: Any) -> bool:
    """Whether `value` is one of `values`; `true` is not 1."""
    return any(value == one and isinstance(one, bool) == isinstance(value, bool) for one in values)


class Function(Typed):
    """The function of a tool call; `arguments` is usually a JSON text."""

    name: str
    arguments: str | dict[str, Any] = ""


class Call(Typed):
    """A tool call in an earlier reply."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class ChatMessage(Typed):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    function_call: Function | None = None  # OpenAI's older form; the role 'function' is the result
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_read(cls, values: Any) -> Any:
        for key in UNREAD_CONTENT:
            if isinstance(values, dict) and values.get(key):
                raise ValueError(_("a message has '{key}', which is not supported. Leave it out.", key=key))
        return values

    @field_validator("content")
    @classmethod
    def _text_only(cls, content: str | list[dict[str, Any]] | None) -> str | list[dict[str, Any]] | None:
        for part in content if isinstance(content, list) else ():
            if (kind := part.get("type")) != "text":
                raise ValueError(_("a message has a part of type {type}, but only text is supported.", type=repr(kind)))
            if not isinstance(part.get("text"), str):
                raise ValueError(_("a message has a part of type 'text' without a text. Add `text`."))
        return content


class JsonSchema(Strict):
    """The schema that a reply must follow. `name` and `description` are for the client only."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """Free text, one JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError(_("json_schema is missing. It must be an object with `name` and `schema`."))
        return self


class FunctionName(Typed):
    """The function that a reply must call."""

    name: str


class ToolChoice(Strict):
    """The tool that a reply must call."""

    type: Literal["function"] = "function"
    function: FunctionName


class ChatRequest(_Sampled):
    """POST /v1/chat/completions."""

    unsupported: ClassVar = UNSUPPORTED | {"add_special_tokens": (False,), "echo": (False,)}

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None  # OpenAI's older names for tools and tool_choice
    function_call: Literal["none", "auto"] | FunctionName | None = None

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the reply may call."""
        if self.choice == "none":
            return []
        return self.tools or [{"type": "function", "function": function} for function in self.functions or ()]

    @property
    def must_call(self) -> bool:
        """Whether the reply must be a call."""
        return self.choice not in ("none", "auto")

    @property
    def choice(self) -> str | FunctionName:
        """'none', 'auto', 'required', or the function to call."""
        chosen = self.tool_choice or self.function_call or "auto"
        return chosen.function if isinstance(chosen, ToolChoice) else chosen

    @property
    def choices(self) -> int:
        """The number of replies requested."""
        return self.n or 1


class CompletionRequest(_Sampled):
    """POST /v1/completions."""

    unsupported: ClassVar = UNSUPPORTED | {"add_special_tokens": (True,), "suffix": ("",)}

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: TopLogprobs | None = None

    @property
    def choices(self) -> int:
        """The number of replies requested."""
        is_one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return (self.n or 1) * (1 if is_one else len(self.prompt))


class TokenizeRequest(_Tolerant):
    """POST /tokenize, as in vLLM: the tokens of a text or of a chat. The default model is the base model."""

    unsupported: ClassVar = UNSUPPORTED | {"continue_final_message": (False, True)}  # both are what chats do

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True  # of a text; the template of a chat has its own
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError(_("give either prompt or messages, but not both."))
        return self


class DetokenizeRequest(_Tolerant):
    """POST /detokenize, as in vLLM."""

    model: str | None = None
    tokens: list[int]


class AdapterRequest(Strict):
    """POST /v1/adapters. `path` is relative to the folder of runs; the default is `name`."""

    name: str
    path: str | None = None
