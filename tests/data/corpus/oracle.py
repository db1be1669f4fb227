"""An independent oracle: what must be learned of a conversation, from transformers' rendering alone.

Nothing here uses lorasmith's own templates. Where an answer stands in the rendered text is found by contents that occur
nowhere else, and the text around it by rendering the conversation up to this answer, with and without it.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from lorasmith.data.rows.conversation import Conversation, Record, RowError
from lorasmith.data.template.chat_template import CLOCK
from lorasmith.data.template.encoding import Template
from lorasmith.model.row import IGNORED, Example
from tests.data.corpus.conversations import TOOLS

RIGHT, TOLD, REFUSED, WRONG = "right", "told", "refused", "wrong"


@dataclass(frozen=True)
class Verdict:
    """What lorasmith did with a conversation. told: it learned the answer and says what the template leaves out."""

    fate: str
    why: str = ""


def judge(template: Template, tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]) -> Verdict:
    """Compare what lorasmith learns of a conversation with what the rendered text says."""
    tools = TOOLS if any("tool_calls" in message for message in messages) else []
    record = Record({"messages": messages} | ({"tools": tools} if tools else {}), "row")
    try:
        row = template.conversation(record)
        examples = template.encode_row(row)
    except RowError as error:
        return Verdict(REFUSED, error.text)
    return _compare(template, tokenizer, messages, tools, row, examples)


def _compare(
    template: Template,
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    tools: list[Any],
    row: Conversation,
    examples: Sequence[Example],
) -> Verdict:
    runs = [run for example in examples for run in learned(tokenizer, example)]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(runs) != len(answers):
        return Verdict(WRONG, f"{len(answers)} answers, {len(runs)} learned: {[run.text for run in runs]}")
    lost = False
    for at, run in zip(answers, runs, strict=True):
        problem = _problem(template, tokenizer, messages, at, tools, run)
        if problem:
            return Verdict(WRONG, problem)
        thought = f"Qthought{messages[at]['content'].partition('Qanswer')[2][:1]}z" if _thinks(messages[at]) else ""
        lost = lost or (thought not in run.text)
    if tools and tools[0]["function"]["description"] not in tokenizer.decode(runs[0].before):
        return Verdict(TOLD) if "tools" in template.lost(row) else Verdict(WRONG, "tools are lost in silence")
    if lost:
        return Verdict(TOLD) if template.lost(row) else Verdict(WRONG, f"reasoning lost in silence: {runs[-1].text!r}")
    return Verdict(RIGHT)


@dataclass(frozen=True)
class Learned:
    """A stretch of learned tokens: the text before it in its example, its own text, its last token."""

    before: list[int]
    ids: list[int]
    text: str


def learned(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[Learned]:
    """The learned stretches of an example."""
    runs: list[list[int]] = []
    for at, target in enumerate(example.targets):
        if target != IGNORED and (at == 0 or example.targets[at - 1] == IGNORED):
            runs.append([])
        if target != IGNORED:
            runs[-1].append(at + 1)
    return [
        Learned(example.ids[: run[0]], [example.ids[i] for i in run], tokenizer.decode([example.ids[i] for i in run]))
        for run in runs
    ]


def _thinks(message: dict[str, Any]) -> bool:
    return "reasoning_content" in message or "Qthought" in message["content"]


def _problem(
    template: Template,
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    at: int,
    tools: list[Any],
    run: Learned,
) -> str:
    """Why this stretch is not the answer `at` with its end; empty if it is."""
    wanted = messages[at]["content"].rpartition("\n")[2] if "tool_calls" not in messages[at] else "get_stock0z"
    others = ("Quser", "Qsystem", "Qresult")
    if wanted not in run.text or any(other in run.text for other in others):
        return f"learned {run.text!r} for {wanted!r}"
    if "Qitem0z" not in run.text and "tool_calls" in messages[at]:
        return f"arguments are missing: {run.text!r}"
    if run.ids[-1] not in template.stop_ids:
        return f"{run.text!r} does not end with a stop token"
    found = [*run.before, *run.ids]
    texts = renderings(tokenizer, messages[: at + 1], tools)
    for prompts in (renderings(tokenizer, messages[:at], tools, add_generation_prompt=add) for add in (True, False)):
        texts += [_after_prompt(messages[at - 1]["content"], prompt, text) for prompt in prompts for text in texts]
    if texts and not any(_begins(tokenizer, text, found) for text in texts):
        return f"other tokens than in the rendered text: {tokenizer.decode(found)[-200:]!r} for {texts[0][-200:]!r}"
    before = messages[:at]
    shown = [tool for tool in tools if tool["function"]["description"] in tokenizer.decode(run.before)]
    try:
        prompt = template.encode_prompt(_parsed(template, before, shown), shown)
    except RowError as error:
        return f"the prompt is refused: {error.text}"
    if len(prompt) < len(run.before) or found[: len(prompt)] != prompt:
        return f"the prompt is not that of the training: {tokenizer.decode(prompt)[-100:]!r}"
    return _other_mask(tokenizer, messages[: at + 1], tools, run)


def _other_mask(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], tools: list[Any], run: Learned
) -> str:
    """Where the mask of {% generation %} differs from the learned tokens; empty if the template has none."""
    if "generation %}" not in tokenizer.chat_template.replace("-%}", " %}"):
        return ""
    texts = []
    for given in _forms(messages):
        with suppress(Exception):  # whatever a template raises
            texts.append(
                tokenizer.apply_chat_template(
                    given, tools=tools or None, return_dict=True, return_assistant_tokens_mask=True
                )
            )
    for encoded in texts:
        marked = [i for i, mask in enumerate(encoded["assistant_masks"]) if mask and i >= len(run.before)]
        text = tokenizer.decode([encoded["input_ids"][i] for i in marked])
        if _words(tokenizer, text) == _words(tokenizer, run.text):
            return ""
    return f"other tokens than {{% generation %}} marks: {run.text!r}"


def _words(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """A text without special tokens: templates also mark a line break or a second end after the first."""
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text.strip()


def _parsed(template: Template, messages: list[dict[str, Any]], tools: list[Any]) -> Any:
    answer = {"role": "assistant", "content": "?"}
    return template.conversation(Record({"messages": [*messages, answer], "tools": tools}, "row")).messages[:-1]


def _begins(tokenizer: PreTrainedTokenizerFast, text: str, found: list[int]) -> bool:
    """Whether the tokens are the first ones of a text, or all of them and a stop token that the text does not have."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[: len(found)] == found or ids == found[:-1]


def _after_prompt(content: str, prompt: str, whole: str) -> str:
    """The prompt and the answer of `whole`: some templates render a system message only in prompts."""
    ending = prompt.rpartition(content)[2]
    rest = whole.rpartition(content)[2]
    return prompt + rest[len(ending) :] if rest.startswith(ending) else whole


def renderings(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], tools: list[Any], **options: bool
) -> list[str]:
    """transformers' texts of a conversation, with its reasoning wherever templates look for it."""
    clock = CLOCK if "strftime_now" in tokenizer.chat_template else ""
    found = []
    for given in _forms(messages):
        try:
            text = tokenizer.apply_chat_template(
                given, tools=tools or None, tokenize=False, chat_template=clock + tokenizer.chat_template, **options
            )
        except Exception:  # noqa: BLE001  whatever a template raises
            continue
        found.append(str(text))
    return found


def _forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The conversation as it is, with its reasoning under each key, inline, and without it."""
    yield messages
    for key in ("reasoning_content", "thinking", "reasoning", None, ""):
        yield [_with_reasoning(message, key) for message in messages]
    yield [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
    thought = [_with_reasoning(message, None) for message in messages]
    yield [message | {"content": [{"type": "text", "text": message["content"]}]} for message in thought]
    yield [  # arguments as text
        message | {"tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(function["arguments"])}}


def _with_reasoning(message: dict[str, Any], key: str | None) -> dict[str, Any]:
    if message["role"] != "assistant" or "tool_calls" in message:
        return message
    inline = message["content"].partition("<think>\n")[2].partition("\n</think>\n\n")
    thought = message.get("reasoning_content") or inline[0]
    answer = inline[2] or message["content"]
    if not thought:
        return message
    if key is None:
        return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{answer}"}
    return {"role": "assistant", "content": answer} | ({key: thought} if key else {})
