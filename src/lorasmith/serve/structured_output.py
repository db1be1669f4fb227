"""Structured output: the grammar that a chat reply must follow, from `response_format`, `tools` and `tool_choice`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorasmith.engine.sampling.grammar import JSON_RULES, WHITESPACE, Grammar
from lorasmith.errors import ConfigError
from lorasmith.i18n import _
from lorasmith.serve.protocol import ChatRequest, Failure, FunctionName, ResponseFormat
from lorasmith.serve.tool_calls import CLOSE, OPEN


def grammar_of(body: ChatRequest, tokenizer: PreTrainedTokenizerBase) -> Grammar | None:
    """The compiled grammar; None if the reply is free. Raises Failure 400 that names what cannot be followed."""
    rules, param = "", "response_format"
    if body.must_call:
        rules, param = "start: call\n" + _call_rules(_chosen(body), tokenizer), "tools"
    elif body.response_format is not None and body.response_format.type != "text":
        rules = _answer_rules(body.response_format)
        if body.offered:  # the model decides whether it calls a function or answers
            rules = "start: answer | call\n" + rules + _call_rules(body.offered, tokenizer)
        else:
            rules = "start: answer\n" + rules
    if not rules:
        return None
    try:
        return Grammar(tokenizer, rules)
    except ConfigError as error:
        text = _("{key}: replies cannot be restricted to this schema: {why}", key=param, why=error)
        raise Failure(400, text, param) from None


def _answer_rules(form: ResponseFormat) -> str:
    """The rule `answer` and those that it needs."""
    if form.json_schema is None or form.type == "json_object":
        return "answer: object" + JSON_RULES
    return f"answer: {_json_rule(form.json_schema.schema_, form.json_schema.strict)}\n"


def _call_rules(tools: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The rule `call`, for one call of one of these tools, and those that it needs."""
    which = " | ".join(f"call_{i}" for i in range(len(tools)))
    rules = [f'call: {_tag(OPEN, tokenizer)} "\\n" ({which}) "\\n" {_tag(CLOSE, tokenizer)}']
    for i, function in enumerate(map(_function_of, tools)):
        name = json.dumps(function["name"], ensure_ascii=False)
        before = json.dumps('{"name": ' + name + ', "arguments": ', ensure_ascii=False)
        schema = {"type": "object"} | (function.get("parameters") or {})
        rules.append(f'call_{i}: {before} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: {_json_rule(schema, function.get('strict'))}")
    return "\n".join(rules) + "\n"


def _json_rule(schema: Mapping[str, Any], is_strict: bool | None) -> str:
    """JSON that follows the schema. Unless it is strict, keywords that cannot be followed are ignored."""
    options = {"whitespace_pattern": WHITESPACE, "lenient": not is_strict}
    return "%json " + json.dumps(dict(schema) | {"x-guidance": options})


def _tag(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The tag around a call: a special token where the tokenizer has one, else text."""
    found = next((i for i, token in tokenizer.added_tokens_decoder.items() if token.content == text), None)
    is_special = found is not None and tokenizer.added_tokens_decoder[found].special
    return f"<[{found}]>" if is_special else json.dumps(text)


def _chosen(body: ChatRequest) -> list[dict[str, Any]]:
    """The tools of which the reply must call one. Raises Failure 400 if there are none."""
    choice, names = body.choice, [_function_of(tool)["name"] for tool in body.offered]
    wanted = [choice.name] if isinstance(choice, FunctionName) else names
    chosen = [tool for tool, name in zip(body.offered, names, strict=True) if name in wanted]
    if not chosen:
        text = _("tool_choice: the reply must call {wanted}, but the functions in tools are: {names}.",
                 wanted=", ".join(wanted) or _("a function"), names=", ".join(names) or _("none"))  # fmt: skip
        raise Failure(400, text, "tool_choice")
    return chosen


def _function_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The function of a tool. Raises Failure 400 if it has none, or one that is not of OpenAI's form."""
    function = tool.get("function")
    if (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("parameters"), dict | None)
    ):
        return dict(function)
    text = _("tools: each tool must be {form}, where the parameters are a JSON schema.",
             form='{"type": "function", "function": {"name": ..., "parameters": {...}}}')  # fmt: skip
    raise Failure(400, text, "tools")
