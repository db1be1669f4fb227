"""Chat templates in Jinja: the built-in ones, those from a file, and how they are rendered.

All rendering goes through `JinjaTemplate.render`, so that training and chat see the same text.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from lorasmith.config.data import TEMPLATES
from lorasmith.data.rows.conversation import Message, RowError
from lorasmith.errors import ConfigError
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


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template as transformers renders it, with the tokenizer whose special tokens it uses."""

    tokenizer: "PreTrainedTokenizerBase"
    text: str

    @property
    def has_clock(self) -> bool:
        """Whether it inserts today's date, which is fixed here."""
        return "strftime_now" in self.text

    @property
    def has_generation_tags(self) -> bool:
        """Whether it marks what to train on with {% generation %}."""
        return GENERATION.search(self.text) is not None

    def render(self, messages: Sequence[Message], prompt: bool, source: str, tools: Sequence[Any] = ()) -> str:
        """The text of `messages`, followed by the generation prompt if `prompt`. Raises RowError."""
        return str(self._apply(messages, source, tools, tokenize=False, add_generation_prompt=prompt))

    def tokenize_with_mask(self, messages: Sequence[Message], source: str, tools: Sequence[Any] = ()) -> Any:
        """Tokens of the text with `assistant_masks` and `offset_mapping`, as in transformers. Raises RowError."""
        return self._apply(
            messages,
            source,
            tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )

    def end_of_turn(self) -> list[int]:
        """The first special token after an answer, or else the first added token, as a list; empty if there is none."""
        try:
            rest = self.render(PROBE, False, "").rpartition(PROBE[1].content)[2]
        except RowError:
            return []  # rows will fail for the same reason, and report it
        added = self.tokenizer.added_tokens_decoder
        ids: list[int] = self.tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else []
        found = [i for i in ids if i in added and added[i].special]
        found = found or [i for i in ids if i in added and added[i].content.strip()]
        return found[:1]

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

    def _apply(self, messages: Sequence[Message], source: str, tools: Sequence[Any], **options: Any) -> Any:
        conversation: list[Any] = [message._asdict() for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                conversation,
                tools=list(tools) or None,
                chat_template=CLOCK + self.text if self.has_clock else self.text,
                **options,
            )
        except (TemplateError, TypeError) as error:
            raise RowError(source, _("the chat template rejected this conversation: {why}", why=error)) from error


def with_system_text(text: str, system: str) -> str:
    """The template `text`, changed to add the system message `system` to conversations that have none."""
    if not system:
        return text
    literal = json.dumps(system, ensure_ascii=False)  # a JSON string is also a valid one in Jinja
    return (
        "{% if messages and not messages | selectattr('role', 'equalto', 'system') | list %}"
        "{% set messages = [{'role': 'system', 'content': " + literal + "}] + messages %}{% endif +%}" + text
    )


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
