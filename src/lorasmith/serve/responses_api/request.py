"""Requests of OpenAI's Responses API, and their translation to chat requests. Does not load torch."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from lorasmith.config.sampling import TopLogprobs
from lorasmith.i18n import _
from lorasmith.serve.protocol import UNSUPPORTED, ChatRequest, Failure, Generated, Strict

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text")
# Chat's names of what this API names otherwise; errors of a chat request have them.
RENAMED = {
    "messages": "input",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
}


class TextFormat(Strict):
    """Free text, one JSON object, or JSON that follows a schema. `name` and `description` are for the client only."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError(_("schema is missing. It must be a JSON schema."))
        return self


class TextOptions(Strict):
    """The field `text`; `verbosity` is a hint, which is ignored."""

    format: TextFormat | None = None
    verbosity: str | None = None


class FunctionChoice(Strict):
    """The function that the reply must call."""

    type: Literal["function"]
    name: str


class ResponsesRequest(Generated):
    """POST /v1/responses."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED | {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "moderation": (),
        "n": (1,),
        "prompt": (),
    }

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: TopLogprobs | None = None
    include: list[str] | None = None
    previous_response_id: str | None = None
    # Accepted and ignored, because they do not change the reply.
    max_tool_calls: int | None = None  # counts only the tools that OpenAI runs
    prompt_cache_options: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None  # a hint
    truncation: Literal["auto", "disabled"] | None = None  # a prompt that is too long is refused

    @field_validator("previous_response_id")
    @classmethod
    def _is_not_stored(cls, _id: str | None) -> str | None:
        raise ValueError(
            _("this server stores no responses. Send the earlier messages and the earlier output in `input`.")
        )

    @property
    def choices(self) -> int:
        """The number of replies requested."""
        return 1

    @property
    def wants_logprobs(self) -> bool:
        """Whether the reply has the log probabilities of its tokens."""
        return "message.output_text.logprobs" in (self.include or ())

    @property
    def functions(self) -> list[dict[str, Any]]:
        """The functions of `tools`: {"name", "description", "parameters", "strict"} without what is not set."""
        return [_function_of(tool, f"tools[{i}]") for i, tool in enumerate(self.tools or ())]


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """The chat request with the same meaning. Raises Failure 400 that names the item which has none."""
    values: dict[str, Any] = {name: getattr(body, name) for name in Generated.model_fields}
    values |= {"messages": _messages_of(body), "parallel_tool_calls": body.parallel_tool_calls}
    values["max_tokens"] = body.max_output_tokens
    values |= {"logprobs": True, "top_logprobs": body.top_logprobs} if body.wants_logprobs else {}
    values["tools"] = [{"type": "function", "function": function} for function in body.functions] or None
    choice = body.tool_choice
    if isinstance(choice, FunctionChoice):
        values["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        values["tool_choice"] = choice
    if body.text is not None and body.text.format is not None:
        values["response_format"] = _format_of(body.text.format)
    return ChatRequest.model_validate({key: value for key, value in values.items() if value is not None})


def renamed(failure: Failure) -> Failure:
    """The error of a chat request in the names of this API."""
    name = RENAMED.get(failure.param or "")
    if name is None:
        return failure
    text = name + failure.text.removeprefix(str(failure.param)) if failure.text.startswith(f"{failure.param}:") else ""
    return Failure(failure.status, text or failure.text, name, failure.code, failure.retry)


def _format_of(wanted: TextFormat) -> dict[str, Any]:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    return {"type": "json_schema", "json_schema": {"schema": wanted.schema_, "strict": wanted.strict}}


def _function_of(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        text = _("{place}: a tool of type {type} is not supported, because only functions that the client runs are.",
                 place=place, type=repr(tool.get("type")))  # fmt: skip
        raise Failure(400, text, place)
    if not isinstance(tool.get("name"), str) or not isinstance(tool.get("parameters"), dict | None):
        text = _("{place}: a function must be {form}, where the parameters are a JSON schema.",
                 place=place, form='{"type": "function", "name": ..., "parameters": {...}}')  # fmt: skip
        raise Failure(400, text, place)
    named = {key: tool.get(key) for key in ("name", "description", "parameters", "strict")}
    return {key: value for key, value in named.items() if value is not None}


def _messages_of(body: ResponsesRequest) -> list[dict[str, Any]]:
    found = [{"role": "system", "content": body.instructions}] if body.instructions else list[dict[str, Any]]()
    if isinstance(body.input, str):
        return [*found, {"role": "user", "content": body.input}]
    if not body.input:
        raise Failure(400, _("input: must not be empty."), "input")
    for i, item in enumerate(body.input):
        _add_item(found, item, f"input[{i}]")
    return found


def _add_item(found: list[dict[str, Any]], item: Mapping[str, Any], place: str) -> None:
    """Append the item as a message, or complete the last one: an answer is one message with its calls."""
    kind = item.get("type") or "message"
    last = found[-1] if found and found[-1]["role"] == "assistant" else None
    if kind == "message":
        role = _text_of(item, "role", place)
        if role not in ROLES:
            text = _("{place}.role: {role} is none of the roles {known}. The result of a function is an item of type "
                    "'function_call_output'.",
                     place=place, role=repr(role), known=", ".join(ROLES))  # fmt: skip
            raise Failure(400, text, f"{place}.role")
        content = _content_of(item.get("content"), f"{place}.content")
        if role == "assistant" and last is not None and last.keys() == {"role", "reasoning_content"}:
            last["content"] = content
        else:
            found.append({"role": role, "content": content})
    elif kind == "function_call":
        function = {"name": _text_of(item, "name", place), "arguments": _text_of(item, "arguments", place)}
        call = {"id": _text_of(item, "call_id", place), "type": "function", "function": function}
        if last is None:
            found.append({"role": "assistant", "tool_calls": [call]})
        else:
            last.setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        content = _content_of(item.get("output"), f"{place}.output")
        found.append({"role": "tool", "tool_call_id": _text_of(item, "call_id", place), "content": content})
    elif kind == "reasoning":
        parts = item.get("content")
        if parts:  # else a summary or an encrypted text, which no template shows
            texts = _content_of(parts, f"{place}.content", ("reasoning_text",))
            text = "".join(part["text"] for part in texts) if isinstance(texts, list) else texts
            found.append({"role": "assistant", "reasoning_content": text})
    elif kind == "item_reference":
        text = _("{place}: this server stores no items. Send the item itself in place of a reference to it.",
                 place=place)  # fmt: skip
        raise Failure(400, text, place)
    else:
        text = _("{place}: an item of type {type} is not supported.", place=place, type=repr(kind))
        raise Failure(400, text, place)


def _text_of(item: Mapping[str, Any], key: str, place: str) -> str:
    if not isinstance(item.get(key), str):
        raise Failure(400, _("{place}.{key}: must be text.", place=place, key=key), f"{place}.{key}")
    return str(item[key])


def _content_of(content: Any, place: str, kinds: tuple[str, ...] = TEXT_PARTS) -> str | list[dict[str, Any]]:
    """Text, or parts of text as chat has them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Failure(400, _("{place}: must be text or a list of parts.", place=place), place)
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds or not isinstance(part.get("text"), str):
            text = _("{place}: a part of type {type} is not supported, because models here read only text. It must "
                    "be {form}.",
                     place=f"{place}[{i}]", type=repr(kind), form=f'{{"type": "{kinds[0]}", "text": ...}}')  # fmt: skip
            raise Failure(400, text, f"{place}[{i}]")
    return [{"type": "text", "text": part["text"]} for part in content]
