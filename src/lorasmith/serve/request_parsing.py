"""Converting API requests to engine requests: encodes prompts, maps sampling settings and checks limits."""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.values import check
from lorasmith.data.rows.messages import parse_messages
from lorasmith.data.template.chat_prompt import chat_texts
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.special_tokens import ids_of_plain_text, without_marks
from lorasmith.data.template.token_bytes import least_tokens
from lorasmith.engine.request import Request
from lorasmith.engine.sampling.grammar import Grammar
from lorasmith.errors import LorasmithError
from lorasmith.i18n import _
from lorasmith.serve.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Failure,
    TokenizeRequest,
)
from lorasmith.serve.registry import ModelVersion
from lorasmith.serve.structured_output import grammar_of

T = TypeVar("T")
DEFAULT_COMPLETION = 16  # tokens, as in OpenAI's API
API_NAMES = {"max_new_tokens": "max_tokens"}  # where ours differ from the API's

MAX_SHORT_BODY = 2**16  # bytes; larger request bodies are parsed one at a time
MAX_LONG_WAITING = 16  # maximum number of such bodies that may wait


class ParsingThreads:
    """Parses request bodies in threads: long ones one at a time, so that they do not delay short ones.

    So are those for adapters with a chat template of their own, which may take long for a short body.
    """

    def __init__(self) -> None:
        self._long = ThreadPoolExecutor(1, "long texts")
        self._own = ThreadPoolExecutor(1, "chat templates of adapters")
        self._waiting = 0

    async def run(self, size: int, template: Template, work: Callable[[], T]) -> T:
        """Run `work`, which parses a body of `size` bytes. Raises Failure 429 if too many long bodies are waiting."""
        work = partial(copy_context().run, work)  # with the client's language
        is_own = template.renderer is not None and not {template.text, template.tool_text} <= template.renderer.trusted
        if size <= MAX_SHORT_BODY:
            return await asyncio.get_running_loop().run_in_executor(self._own if is_own else None, work)
        if self._waiting >= MAX_LONG_WAITING:
            text = _("{waiting} long requests are being read, and no more may wait. Try again later.",
                     waiting=self._waiting)  # fmt: skip
            raise Failure(429, text, code="queue_full", retry=10)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._own if is_own else self._long, work)
        finally:
            self._waiting -= 1


@dataclass(frozen=True)
class ParsedRequest:
    """The engine requests of an API request, in the order of its choices: `n` for each prompt."""

    prompts: list[list[int]]
    requests: list[Request]
    n: int

    @property
    def prompt_tokens(self) -> int:
        """Total number of tokens of the prompts, each counted once."""
        return sum(map(len, self.prompts))


def parse_chat(body: ChatRequest, version: ModelVersion, context: int) -> ParsedRequest:
    """Parse a chat request. Raises Failure 400 if the template rejects the messages, or they are too long."""
    prompt = encode_chat(body.messages, version, body.offered, context)
    grammar = grammar_of(body, version.template.tokenizer)
    wanted = body.max_completion_tokens or body.max_tokens
    room = room_for(prompt, context)
    own: dict[str, Any] = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    made = requests(body, version, [prompt], [min(wanted or room, room)], own, grammar)
    return ParsedRequest([prompt], made, body.n or 1)


def parse_completion(body: CompletionRequest, version: ModelVersion, context: int) -> ParsedRequest:
    """Parse a completion request; `requests` is empty for max_tokens 0. Raises Failure 400."""
    prompts = prompts_of(body.prompt, version, context)
    wanted = DEFAULT_COMPLETION if body.max_tokens is None else body.max_tokens
    if not wanted and not body.echo:
        raise Failure(400, _("max_tokens: 0 is only allowed with echo."), "max_tokens")
    if not wanted:
        for prompt in prompts:
            room_for(prompt, context, least=0)
        return ParsedRequest(prompts, [], body.n or 1)
    rooms = [min(wanted, room_for(prompt, context)) for prompt in prompts]
    return ParsedRequest(prompts, requests(body, version, prompts, rooms, {"logprobs": body.logprobs}), body.n or 1)


def tokenize(body: TokenizeRequest, version: ModelVersion, context: int) -> dict[str, Any]:
    """The tokens of a text or a chat, as vLLM returns them. Raises Failure 400."""
    tokenizer = version.template.tokenizer
    if body.messages is not None:
        ids = encode_chat(body.messages, version, body.tools or [], context)
    else:
        text = body.prompt or ""
        refuse_too_long([text], version, context)
        ids = ids_of_plain_text(tokenizer, text, body.add_special_tokens)
    texts = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": texts}


def detokenize(body: DetokenizeRequest, version: ModelVersion) -> dict[str, Any]:
    """The text of the tokens. Raises Failure 400 if one is not in the vocabulary."""
    refuse_unknown_ids([body.tokens], version, "tokens")
    return {"prompt": str(version.template.tokenizer.decode(body.tokens))}


def encode_chat(
    messages: Sequence[ChatMessage], version: ModelVersion, tools: Sequence[Any], context: int
) -> list[int]:
    """Encode a conversation with the template that the adapter was trained with. Raises Failure 400."""
    try:
        texts = chat_texts(version.template, parse_messages([_message_fields(message) for message in messages]), tools)
        refuse_too_long(texts, version, context)
        return version.template.ids_of(texts)
    except LorasmithError as error:
        raise Failure(400, str(error), "messages") from None
    except ValueError as error:  # the arguments of a tool call are not JSON
        raise Failure(
            400, _("messages: the arguments of a tool call are not valid JSON: {error}", error=error), "messages"
        ) from None


def prompts_of(
    prompt: str | list[str] | list[int] | list[list[int]], version: ModelVersion, context: int
) -> list[list[int]]:
    """Token ids of the prompts of a completion request: one or several, as text or ids. Raises Failure 400."""
    listed: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
    tokenizer = version.template.tokenizer
    for one in listed:
        refuse_too_long([one] if isinstance(one, str) else [], version, context)
    ids: list[list[int]] = [ids_of_plain_text(tokenizer, p) if isinstance(p, str) else p for p in listed]
    if not ids or not all(ids):
        raise Failure(400, _("prompt: must not be empty."), "prompt")
    refuse_unknown_ids(ids, version, "prompt")
    return ids


def refuse_unknown_ids(ids: Sequence[Sequence[int]], version: ModelVersion, key: str) -> None:
    """Raise Failure 400 if a token id is not in the vocabulary."""
    words = len(version.template.tokenizer)
    if any(not 0 <= i < words for one in ids for i in one):
        text = _("{key}: token ids must be in the vocabulary, from 0 to {last}.", key=key, last=words - 1)
        raise Failure(400, text, key)


def refuse_too_long(texts: Sequence[str], version: ModelVersion, context: int) -> None:
    """Raise Failure 400 if texts exceed the context length in any case: tokenizing very long ones is slow."""
    tokens = least_tokens(version.template.tokenizer, [without_marks(text) for text in texts], context)
    if tokens >= context:
        text = _("the prompt has at least {tokens} tokens; prompt and reply together have at most {limit}.",
                 tokens=tokens, limit=context)  # fmt: skip
        raise Failure(400, text, None, "context_length_exceeded")


def room_for(prompt: Sequence[int], context: int, least: int = 1) -> int:
    """The maximum length of a reply in tokens. Raises Failure 400 if it is smaller than `least`."""
    room = context - len(prompt)
    if room < least:
        text = _("the prompt has {tokens} tokens, which leaves no room for a reply: prompt and reply together have at "
                "most {limit} tokens.",
                 tokens=len(prompt), limit=context)  # fmt: skip
        raise Failure(400, text, None, "context_length_exceeded")
    return room


def requests(
    body: ChatRequest | CompletionRequest,
    version: ModelVersion,
    prompts: Sequence[list[int]],
    rooms: Sequence[int],
    own: dict[str, Any],
    grammar: Grammar | None = None,
) -> list[Request]:
    """`n` engine requests for each prompt, which differ in their seeds. Raises Failure 400 for invalid settings.

    `rooms`: the maximum length of the replies to each prompt; `own`: settings besides those in `body.sampling`.
    """
    seed = secrets.randbits(32) if body.seed is None else body.seed
    values = own | body.sampling | {"stop": (body.stop,) if isinstance(body.stop, str) else body.stop}
    values["logit_bias"] = body.logit_bias
    stop_ids = () if body.ignore_eos else version.template.stop_ids
    known = {key: value for key, value in values.items() if value is not None}
    made = []
    for prompt, room in zip(prompts, rooms, strict=True):
        for choice in range(body.n or 1):
            settings = known | {"max_new_tokens": room, "seed": (seed + choice) % 2**32}
            made.append(Request(prompt, _sampling(settings), version.adapter, stop_ids, grammar))
    return made


def _sampling(values: dict[str, Any]) -> SamplingConfig:
    try:
        return check(SamplingConfig, values)
    except LorasmithError as error:
        key = str(error).split(":")[0]
        raise Failure(400, str(error), API_NAMES.get(key, key)) from None


def _message_fields(message: ChatMessage) -> dict[str, object]:
    """The message as data/rows/messages.py reads it."""
    shown: dict[str, object] = message.model_dump(exclude_none=True)
    return shown | {"role": "system" if message.role == "developer" else message.role}
