"""Chat templates in Jinja: the built-in ones, those from a file, and how they are rendered.

All rendering goes through `JinjaTemplate.render`, so that training and chat see the same text.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from lorasmith.config.data import TEMPLATES, SystemAs
from lorasmith.config.values import did_you_mean
from lorasmith.data.rows.conversation import Message, Record, RowError
from lorasmith.data.template.behavior import INLINE, Behavior, find_behavior, inline
from lorasmith.data.template.isolated import IsolatedRenderer
from lorasmith.errors import ConfigError, ModelError
from lorasmith.i18n import _, foreign, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# OpenAI's ChatML, without a default system message.
CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
ALPACA_INPUT = "\n\n### Input:\n"
# Both prompts of Stanford Alpaca. A system message replaces their first lines.
ALPACA = (
    "{%- for message in messages -%}{%- if loop.first -%}{%- if message.role == 'system' -%}"
    "{{ message.content + '\n\n' }}{%- elif '" + ALPACA_INPUT + "' in message.content -%}"
    "{{ 'Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n' }}{%- else -%}"
    "{{ 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n' }}{%- endif -%}{%- endif -%}"
    "{%- if message.role == 'user' -%}{{ '### Instruction:\n' + message.content + '\n\n' }}"
    "{%- elif message.role == 'tool' -%}{{ '### Input:\n' + message.content + '\n\n' }}"
    "{%- elif message.role == 'assistant' -%}{{ '### Response:\n' + message.content + eos_token }}"
    "{%- if not loop.last -%}{{ '\n\n' }}{%- endif -%}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- endif -%}"
)
BUILTIN = {"alpaca": ALPACA, "chatml": CHATML}
# The same text as `human_turns`, for other programs, which need a chat template.
HUMAN_ASSISTANT = (
    "{%- set turn = namespace(asked=[]) -%}{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
    "{{ ('Human: ' + turn.asked | join('\n\n')) | trim + '\n\nAssistant: ' + message.content + eos_token }}"
    "{%- set turn.asked = [] -%}{%- else -%}{%- set turn.asked = turn.asked + [message.content] -%}{%- endif -%}"
    "{%- endfor -%}{%- if turn.asked -%}{{ ('Human: ' + turn.asked | join('\n\n')) | trim }}"
    "{%- if add_generation_prompt -%}{{ '\n\nAssistant: ' }}{%- endif -%}{%- endif -%}"
)
# A template that inserts today's date would encode differently tomorrow, so it gets a fixed date.
FIXED_DATE = (("%d", "26"), ("%b", "Jul"), ("%B", "July"), ("%m", "07"), ("%Y", "2024"), ("%y", "24"))
CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{directive}', '{value}')" for directive, value in FIXED_DATE)
    + " }}{%- endmacro -%}"
)
PROBE = (Message("user", "?"), Message("assistant", "lorasmith"))
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as in transformers


# An answer with its reasoning inline, as most models write it.
THOUGHT = re.compile(r"\s*<think>(?P<reasoning>.*?)</think>\n*(?P<answer>.*)", re.DOTALL)


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template as transformers renders it, with the tokenizer whose special tokens it uses.

    kwargs: variables that the template knows besides the messages, such as enable_thinking. as_in_version_2: whether
    the generation prompt is the template's own, as in adapters of that version. renderer: renders texts in a process
    with limits; None for templates that are trusted.
    """

    tokenizer: "PreTrainedTokenizerBase"
    text: str
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    as_in_version_2: bool = False
    renderer: IsolatedRenderer | None = field(default=None, compare=False)

    @property
    def has_clock(self) -> bool:
        """Whether it inserts today's date, which is fixed here."""
        return "strftime_now" in self.text

    @property
    def has_generation_tags(self) -> bool:
        """Whether it marks what to train on with {% generation %}."""
        return GENERATION.search(self.text) is not None

    @cached_property
    def behavior(self) -> Behavior:
        """What it does with generation prompts, reasoning and function calls."""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        found = find_behavior(self._text, special)
        is_as_it_is = (
            self.as_in_version_2 or HUMAN_ASSISTANT in self.text
        )  # a model that was merged from such an adapter
        return replace(found, dropped="", header="") if is_as_it_is else found

    def _text(self, messages: list[dict[str, Any]], prompt: bool, behavior: Behavior) -> str:
        return str(self._apply(messages, "", (), behavior, tokenize=False, add_generation_prompt=prompt))

    def render(self, messages: Sequence[Message], prompt: bool, source: str, tools: Sequence[Any] = ()) -> str:
        """The text of `messages`, followed by the generation prompt if `prompt`. Raises RowError.

        The generation prompt is what the template renders before an answer, so that training matches inference.
        """
        own = self.behavior
        options = {"tokenize": False, "add_generation_prompt": prompt and not own.header}
        text = str(self._apply(self.to_dicts(messages), source, tools, own, **options))
        return text.removesuffix(own.dropped) + own.header if prompt else text

    def tokenize_with_mask(self, messages: Sequence[Message], source: str, tools: Sequence[Any] = ()) -> Any:
        """Tokens of the text with `assistant_masks` and `offset_mapping`, as in transformers. Raises RowError."""
        return self._apply(
            self.to_dicts(messages),
            source,
            tools,
            self.behavior,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )

    def to_dicts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages in the form that this template reads: its key for reasoning, its form of arguments."""
        return [self._to_dict(message) for message in messages]

    def _to_dict(self, message: Message) -> dict[str, Any]:
        shown = message._asdict()
        reasoning, answer = split_reasoning(message)
        key = self.behavior.reasoning
        if key == INLINE:
            shown["content"] = inline(reasoning, answer) if message.reasoning else message.content
        elif message.role == "assistant":
            shown["content"] = answer  # a template that has a key, or none, writes an empty thought by itself
            shown |= {key: reasoning} if key is not None and reasoning else {}
        if message.tool_calls and self.behavior.text_arguments:
            shown["tool_calls"] = [_with_text_arguments(call) for call in message.tool_calls]
        return shown

    def end_of_turn(self, ends: Collection[int] = ()) -> list[int]:
        """The token that ends an answer, as a list; empty if there is none, or if it is one of `ends`.

        It is the first special token after the answer, or else the first added token.
        """
        if any(i in ends for i in self._ids_after_answer((*PROBE, PROBE[0]))):
            return []
        added = self.tokenizer.added_tokens_decoder
        ids = self._ids_after_answer(PROBE)
        found = [i for i in ids if i in added and added[i].special]
        found = found or [i for i in ids if i in added and added[i].content.strip()]
        return found[:1]

    def _ids_after_answer(self, messages: Sequence[Message]) -> list[int]:
        """The tokens between the answer of `PROBE` and the next message."""
        try:
            rest = self.render(messages, False, "").rpartition(PROBE[1].content)[2]
        except RowError:
            return []  # rows will fail for the same reason, and report it
        if len(messages) > len(PROBE):
            rest = rest.rpartition(messages[-1].content)[0]
        ids: list[int] = self.tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else []
        return ids

    def check_syntax(self, path: str) -> None:
        """Raise ConfigError if the file `path` is not valid Jinja. Other errors are reported for the first row."""
        try:
            self.render(PROBE, False, "")
        except RowError as error:
            cause = error.__cause__
            if isinstance(cause, TemplateSyntaxError):
                line, why = cause.lineno, cause.message
                text = _("data.template: {path} line {line}: invalid Jinja: {why}", path=path, line=line, why=why)
                raise ConfigError(text) from None

    def _apply(
        self, messages: list[dict[str, Any]], source: str, tools: Sequence[Any], behavior: Behavior, **options: Any
    ) -> Any:
        if behavior.parts:
            messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        no_tools: list[Any] | None = None if behavior.no_tools is None else []
        text = CLOCK + self.text if self.has_clock else self.text
        try:
            if self.renderer is not None and self.text not in self.renderer.trusted:
                given = [{key: value for key, value in m.items() if value is not None} for m in messages]
                del options["tokenize"]
                variables = {**self.tokenizer.special_tokens_map, **self.kwargs}
                return self.renderer.render(text, given, {**variables, **options, "tools": list(tools) or no_tools})
            return self.tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or no_tools,
                chat_template=text,
                **self.kwargs,
                **options,
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise RowError(source, _("the chat template rejected this conversation: {why}", why=error)) from error


def split_reasoning(message: Message) -> tuple[str, str]:
    """The reasoning of an answer and the answer itself; the reasoning is empty if there is none."""
    match = THOUGHT.fullmatch(message.content) if message.role == "assistant" else None
    if match is None:
        return message.reasoning, message.content
    inner = match["reasoning"].strip("\n")
    return message.reasoning or inner, match["answer"]


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def for_other_programs(
    text: str, behavior: Behavior, system: str, system_as: SystemAs, variables: Mapping[str, Any]
) -> str:
    """The template `text`, changed so that other programs render with it what lorasmith does.

    It sets the variables, adds the system message to conversations that have none, and its generation prompt is that of
    the training. Only Jinja that llama.cpp knows too is added: no `+%}`, and strings without escapes for control
    characters beyond line breaks.
    """
    text = text.removesuffix("\n")  # which Jinja does at the end of a template, but not in the middle
    if behavior.dropped:
        dropped = _literal(behavior.dropped)
        text = (
            "{% set rendered %}{{ '' }}" + text + "{% endset %}"
            "{{ rendered[:-" + str(len(behavior.dropped)) + "] if add_generation_prompt and rendered.endswith("
            "" + dropped + ") else rendered }}"
        )
    elif behavior.header:
        text = (
            "{% set with_prompt = add_generation_prompt %}{% set add_generation_prompt = false %}{{ '' }}" + text + ""
            "{% if with_prompt %}{{ " + _literal(behavior.header) + " }}{% endif %}"
        )
    sets = "".join("{% set " + name + " = " + _literal(value) + " %}" for name, value in variables.items())
    before = sets + (_system_in_jinja(system, system_as, behavior) if system else "")
    return before + "{{ '' }}" + text if before else text


def _system_in_jinja(system: str, system_as: SystemAs, behavior: Behavior) -> str:
    """Jinja that adds the system message to conversations that have none, where `system_as` says."""
    has_none = "messages and not messages | selectattr('role', 'equalto', 'system') | list"
    if system_as == "user":
        first = "{'role': 'user', 'content': " + _literal(system + "\n\n") + " + messages[0].content}"
        return (
            "{% if "
            + has_none
            + " and messages[0].role == 'user' %}{% set messages = ["
            + first
            + "] + messages[1:] %}"
            "{% endif %}"
        )
    content = "[{'type': 'text', 'text': " + _literal(system) + "}]" if behavior.parts else _literal(system)
    added = "[{'role': 'system', 'content': " + content + "}]"
    return "{% if " + has_none + " %}{% set messages = " + added + " + messages %}{% endif %}"


def _literal(value: Any) -> str:
    """A value of JSON as Jinja writes it; a JSON string is also a valid one in Jinja."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def named_templates(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """The chat templates of a tokenizer by name; a single one is called 'default'. Empty if it has none."""
    own: Any = tokenizer.chat_template
    if own is None:
        return {}
    return dict(own) if isinstance(own, dict) else {"default": str(own)}


def check_kind(kind: str, tokenizer: "PreTrainedTokenizerBase", named: Mapping[str, str]) -> str:
    """`kind` with 'auto' resolved. Raises ConfigError or ModelError if this tokenizer cannot have it."""
    if kind == "model" and not named:
        raise ConfigError(
            _(
                "data.template: 'model' requires a chat template, but this model's tokenizer has none. Use "
                "'human-assistant'."
            )
        )
    if kind not in (*TEMPLATES, *named) and not any(mark in kind for mark in "./\\"):
        known = (*TEMPLATES, *(name for name in named if len(named) > 1))
        raise ConfigError(
            _(
                "data.template: {name!r} is not one of {known}; to use a Jinja file, give its path, as in "
                "'./chat.jinja'.",
                name=kind,
                known=listed(known),
            )
            + did_you_mean(kind, known)
        )
    if kind in ("auto", "model") and len(named) > 1 and "default" not in named:
        raise ConfigError(
            _(
                "data.template: this model has several chat templates and none is called 'default'. Give the name of "
                "one: {names}.",
                names=listed(named),
            )
        )
    if kind == "auto":
        kind = "model" if named else "human-assistant"
    if tokenizer.eos_token_id is None and kind in ("human-assistant", "alpaca"):
        raise ModelError(
            _(
                "data.template: '{kind}' ends each answer with the tokenizer's EOS token, but this "
                "tokenizer has none. Set eos_token in its tokenizer_config.json.",
                kind=kind,
            )
        )
    return kind


def template_text(kind: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text of a built-in template, or of the file `kind`. Raises ConfigError if it cannot be used."""
    if kind not in BUILTIN:
        return _from_file(Path(kind).expanduser())
    wanted = ("<|im_start|>", "<|im_end|>") if kind == "chatml" else ()
    missing = [token for token in wanted if token not in tokenizer.get_vocab()]
    if missing:
        raise ConfigError(
            _(
                "data.template: 'chatml' needs the tokens {tokens}, which this model's tokenizer does not have. "
                "Use 'human-assistant' or 'alpaca'.",
                tokens=listed(missing),
            )
        )
    return BUILTIN[kind]


def _from_file(path: Path) -> str:
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            _(
                "data.template: '{path}' is not one of {known}, and it cannot be read as a file: {why}.",
                path=path,
                known=listed(TEMPLATES),
                why=foreign(error.strerror),
            )
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            _("data.template: {path}: byte {at} is not valid UTF-8. Save the file as UTF-8.", path=path, at=error.start)
        ) from None
    if not text.strip():
        raise ConfigError(_("data.template: {path} is empty. It must contain a chat template in Jinja.", path=path))
    return text


def with_input_heading(record: Record, kind: str) -> Record:
    """An alpaca row for the template `kind`: that of the kind 'alpaca' has a heading above the input."""
    fields, given = record.fields, record.fields.get("input")
    if kind == "alpaca" and "instruction" in fields and isinstance(given, str) and given.strip():
        return replace(record, fields=fields | {"input": ALPACA_INPUT.removeprefix("\n") + given.strip()})
    return record
