"""From a client's request to requests of the engine: prompts, sampling, limits."""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.values import check
from lorasmith.data.rows.messages import parse_messages
from lorasmith.data.template.token_bytes import max_bytes_per_token
from lorasmith.engine.request import Request
from lorasmith.errors import LorasmithError
from lorasmith.i18n import _
from lorasmith.serve.failure import Failure
from lorasmith.serve.protocol import ChatMessage, ChatRequest, CompletionRequest
from lorasmith.serve.registry import Version

DEFAULT_COMPLETION = 16  # tokens, as OpenAI's
OUR_NAMES = {"max_new_tokens": "max_tokens", "json_object": "response_format"}


SHORT = 2**16  # bytes of a body that is read beside others
MOST_LONG = 16  # bodies beyond it that may wait


class ParsingThreads:
    """Threads in which bodies become requests: long ones one after the other, so that short ones pass them by."""

    def __init__(self) -> None:
        self._long = ThreadPoolExecutor(1, "long texts")
        self._waiting = 0

    async def run(self, size: int, work: Callable[[], "ParsedRequest"]) -> "ParsedRequest":
        """`work()` for a body of `size` bytes. Raises Failure 429 where too many long ones wait already."""
        if size <= SHORT:
            return await asyncio.to_thread(work)
        if self._waiting >= MOST_LONG:
            text = _("{waiting} long requests are being read, and no more may wait. Try again later.",
                     waiting=self._waiting)  # fmt: skip
            raise Failure(429, text, code="queue_full", retry=10)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._long, work)
        finally:
            self._waiting -= 1


@dataclass(frozen=True)
class ParsedRequest:
    """The engine's requests in the order of the choices: `n` for each of `prompts`."""

    prompts: list[list[int]]
    requests: list[Request]
    n: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))


def parse_chat(body: ChatRequest, version: Version, context: int) -> ParsedRequest:
    """Raises Failure 400 where the template refuses the messages, or they are too long."""
    tools = body.tools if body.tools and body.tool_choice != "none" else []
    prompt = encode_chat(body.messages, version, tools, context)
    wanted = body.max_completion_tokens or body.max_tokens
    room = room_for(prompt, wanted, context)
    own: dict[str, Any] = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    if body.response_format is not None and body.response_format.type == "json_object":
        own["json_object"] = True
    return ParsedRequest([prompt], requests(body, version, [prompt], [wanted or room], own), body.n or 1)


def parse_completion(body: CompletionRequest, version: Version, context: int) -> ParsedRequest:
    """The same for plain prompts; no requests where no token is asked for. Raises Failure 400."""
    prompts = prompts_of(body.prompt, version, context)
    wanted = DEFAULT_COMPLETION if body.max_tokens is None else body.max_tokens
    if not wanted and not body.echo:
        raise Failure(400, _("max_tokens: 0 is only allowed with echo."), "max_tokens")
    for prompt in prompts:
        room_for(prompt, wanted, context)
    if not wanted:
        return ParsedRequest(prompts, [], body.n or 1)
    rooms = [wanted] * len(prompts)
    return ParsedRequest(prompts, requests(body, version, prompts, rooms, {"logprobs": body.logprobs}), body.n or 1)


def encode_chat(messages: Sequence[ChatMessage], version: Version, tools: Sequence[Any], context: int) -> list[int]:
    """The prompt as the adapter saw such ones in training. Raises Failure 400 for one that is surely too long."""
    try:
        texts = version.template.prompt_texts(parse_messages([_plain(message) for message in messages]), tools)
        refuse_too_long(texts, version, context)
        return version.template.ids_of(texts)
    except LorasmithError as error:
        raise Failure(400, str(error), "messages") from None
    except ValueError as error:  # a call's arguments that are no JSON
        raise Failure(
            400, _("messages: the arguments of a tool call are not valid JSON: {error}", error=error), "messages"
        ) from None


def prompts_of(
    prompt: str | list[str] | list[int] | list[list[int]], version: Version, context: int
) -> list[list[int]]:
    """A text, several, token ids, or several lists of them, as lists of ids. Raises Failure 400."""
    listed: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
    tokenizer = version.template.tokenizer
    words = len(tokenizer)
    for one in listed:
        refuse_too_long([one] if isinstance(one, str) else [], version, context)
    ids: list[list[int]] = [list(tokenizer(p)["input_ids"]) if isinstance(p, str) else p for p in listed]
    if not ids or not all(ids):
        raise Failure(400, _("prompt: must not be empty."), "prompt")
    if any(not 0 <= i < words for one in ids for i in one):
        raise Failure(
            400, _("prompt: token ids must be in the vocabulary, from 0 to {last}.", last=words - 1), "prompt"
        )
    return ids


def refuse_too_long(texts: Sequence[str], version: Version, context: int) -> None:
    """Raises Failure 400 for a prompt that has more tokens than are admitted however it is tokenised: that is slow."""
    most = max_bytes_per_token(version.template.tokenizer)
    if most is None:
        return
    tokens = -(-sum(len(text.encode()) for text in texts) // most)
    if tokens >= context:
        text = _("the prompt has at least {tokens} tokens; prompt and reply together have at most {limit}.",
                 tokens=tokens, limit=context)  # fmt: skip
        raise Failure(400, text, None, "context_length_exceeded")


def room_for(prompt: Sequence[int], wanted: int | None, context: int) -> int:
    """Tokens that a reply can have. Raises Failure 400 where prompt and reply are longer than is admitted."""
    room = context - len(prompt)
    if room < max(wanted or 1, 0):
        text = _("the prompt ({tokens} tokens) and the reply ({wanted} tokens) do not fit into the context length "
                "of {limit} tokens.",
                 tokens=len(prompt), wanted=wanted or 1, limit=context)  # fmt: skip
        raise Failure(400, text, "max_tokens" if room > 0 else None, "context_length_exceeded")
    return room


def requests(
    body: ChatRequest | CompletionRequest,
    version: Version,
    prompts: Sequence[list[int]],
    rooms: Sequence[int],
    own: dict[str, Any],
) -> list[Request]:
    """`n` requests for each prompt, alike but for their seeds. Raises Failure 400 for what cannot be asked."""
    seed = secrets.randbits(32) if body.seed is None else body.seed
    values = own | body.sampling | {"stop": (body.stop,) if isinstance(body.stop, str) else body.stop}
    known = {key: value for key, value in values.items() if value is not None}
    found = []
    for prompt, room in zip(prompts, rooms, strict=True):
        for choice in range(body.n or 1):
            settings = known | {"max_new_tokens": room, "seed": (seed + choice) % 2**32}
            found.append(Request(prompt, _sampling(settings), version.adapter, version.template.stop_ids))
    return found


def _sampling(values: dict[str, Any]) -> SamplingConfig:
    try:
        return check(SamplingConfig, values)
    except LorasmithError as error:
        key = str(error).split(":")[0]
        raise Failure(400, str(error), OUR_NAMES.get(key, key)) from None


def _plain(message: ChatMessage) -> dict[str, object]:
    """As data.messages reads it."""
    shown: dict[str, object] = message.model_dump(exclude_none=True)
    return shown | {"role": "system" if message.role == "developer" else message.role}
