"""Encode conversations as tokens: the only place where this is done, for training, evaluation, chat and the server.

The whole rendered conversation is tokenized at once, and the loss mask follows from where the prompts end in it, never
from token ids (the pad token may be the EOS token). A prompt has the same token ids at inference as in training.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorasmith.config.data import DataConfig
from lorasmith.data.rows.conversation import Conversation, Message, Record, RowError
from lorasmith.data.rows.formats import to_conversation
from lorasmith.data.rows.preference import answers_of
from lorasmith.data.template.behavior import Behavior
from lorasmith.data.template.chat_template import (
    BUILTIN,
    HUMAN_ASSISTANT,
    JinjaTemplate,
    check_kind,
    for_other_programs,
    named_templates,
    template_text,
    with_input_heading,
)
from lorasmith.data.template.contents import AS_GIVEN, ContentOptions
from lorasmith.data.template.examples import build_examples, missing_stop, plain_example
from lorasmith.data.template.findings import lost
from lorasmith.data.template.golden import PROBES, golden_conversations, verify_tokenizer
from lorasmith.data.template.isolated import IsolatedRenderer
from lorasmith.data.template.loss_mask import ExampleBuilder
from lorasmith.data.template.special_tokens import as_text, marked, special_tokens, without_marks
from lorasmith.data.template.split import split_ids
from lorasmith.data.template.token_ids import token_ids, token_spans
from lorasmith.data.template.turns import (
    Pattern,
    Turn,
    human_turns,
    jinja_turns,
    refuse_unseen_calls,
    shows_tools,
    with_stops,
)
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.i18n import _
from lorasmith.model.row import Example

if TYPE_CHECKING:
    import re

    from transformers import PreTrainedTokenizerBase

# Of `to_json`. 1 had no system message, and only the kinds 'model' and 'human-assistant'; 2 had no `end`, `kwargs` and
# `tool_template`, and tokenized prompts and answers separately.
VERSION = 3
KINDS = ("model", "human-assistant", *BUILTIN, "file")


@dataclass(frozen=True)
class Template:
    """Encodes conversations for a tokenizer. Made by `Template.of`, or from an adapter by `Template.from_json`.

    kind: 'human-assistant' is the pattern of the tutorial, without `text`. For other kinds, `text` is a chat template
    in Jinja: that of the tokenizer ('model'), a built-in one, or one from a file ('file').
    stop_ids: tokens that end an answer, in training and in decoding, in ascending order.
    system: the system message of conversations that have none; empty for none.
    end_id: the token that is added to answers which the template does not end; None if it cannot be told.
    tool_text: the chat template of conversations with tools; empty if it is `text`.
    kwargs: variables of the chat template, such as enable_thinking.
    is_separate: whether prompts and answers are tokenized separately, as in adapters before version 3.
    options: how messages are changed before they are rendered.
    renderer: renders the chat template in a process with limits, if it comes with an adapter to a server.
    """

    tokenizer: "PreTrainedTokenizerBase"
    kind: str
    text: str
    stop_ids: tuple[int, ...]
    system: str = ""
    end_id: int | None = None
    tool_text: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    options: ContentOptions = AS_GIVEN
    is_separate: bool = False
    renderer: IsolatedRenderer | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        kind: str = "auto",
        eos_ids: Iterable[int] = (),
        system: str = "",
        kwargs: Mapping[str, Any] | None = None,
        options: ContentOptions = AS_GIVEN,
        renderer: IsolatedRenderer | None = None,
    ) -> "Template":
        """The template for a tokenizer.

        kind: 'auto' (the model's own if there is one, else 'human-assistant'), 'model', 'human-assistant', 'alpaca',
        'chatml', one of the model's named templates, or the path of a Jinja file. eos_ids: the EOS tokens of the
        model's generation config.

        Raises:
            ConfigError: the template or the system message cannot be used with this tokenizer.
            ModelError: the template needs an EOS token, and the tokenizer has none.
        """
        named = named_templates(tokenizer)
        kind = check_kind(kind, tokenizer, named)
        eos_id, eos_ids = tokenizer.eos_token_id, tuple(eos_ids)
        ends = {*eos_ids} if eos_id is None else {eos_id, *eos_ids}
        end_id = eos_id if eos_id in eos_ids else min(eos_ids, default=None)
        kwargs = kwargs or {}
        if kind == "human-assistant":
            return cls(tokenizer, kind, "", tuple(sorted(ends)), system, end_id, "", kwargs, options)
        own = named.get(kind, named.get("default", "")) if kind in ("model", *named) else None
        text = template_text(kind, tokenizer) if own is None else own
        tool_text = named.get("tool_use", "") if kind == "model" else ""
        jinja = JinjaTemplate(tokenizer, text, kwargs, renderer=renderer)
        if kind not in (*KINDS, *named):
            jinja.check_syntax(kind)
        stops = tuple(sorted({*jinja.end_of_turn(ends), *ends}))
        kind = "model" if kind in named else kind if kind in KINDS else "file"
        template = cls(tokenizer, kind, text, stops, system, end_id, tool_text, kwargs, options, renderer=renderer)
        template._check_system()
        return template

    @classmethod
    def from_config(
        cls, tokenizer: "PreTrainedTokenizerBase", cfg: DataConfig, eos_ids: Iterable[int] = ()
    ) -> "Template":
        """The template of the [data] section. Raises the errors of `of`."""
        options = ContentOptions(cfg.system_as, cfg.special_tokens, cfg.leading_answer)
        return cls.of(tokenizer, cfg.template, eos_ids, cfg.system, cfg.template_kwargs, options)

    @cached_property
    def jinja(self) -> JinjaTemplate:
        """The chat template. Not for the kind 'human-assistant'."""
        return JinjaTemplate(self.tokenizer, self.text, self.kwargs, self.is_separate, self.renderer)

    @cached_property
    def _tool_jinja(self) -> JinjaTemplate:
        return replace(self.jinja, text=self.tool_text, as_in_version_2=False) if self.tool_text else self.jinja

    @cached_property
    def _pattern(self) -> Pattern | None:
        return Pattern.of(self.jinja)

    def conversation(self, record: Record) -> Conversation:
        """The conversation of a row. Raises RowError if the row cannot be used."""
        return to_conversation(with_input_heading(record, self.kind), self.kind != "human-assistant")

    def answers(self, record: Record) -> tuple[Conversation, ...]:
        """The conversations of a preference row's answers. Raises RowError if the row cannot be used."""
        return answers_of(with_input_heading(record, self.kind), self.kind != "human-assistant")

    def with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """`messages` after the system message, unless they have one. It gets the weight of the first message."""
        has_own = any(message.role == "system" for message in messages)
        if self.system and messages and not has_own:
            first = messages[0]
            added = Message("system", self.system, learn=first.learn, weight=first.weight)
            is_there = self.options.system_as == "user" and first.content.startswith(self.system)
            messages = messages if is_there else [added, *messages]
        return self.options.arrange(messages)

    def encode(self, messages: Sequence[Message], source: str = "") -> Example:
        """The conversation as one example, with all answers and their stop tokens as targets.

        Raises RowError if it needs several examples (see `encode_row`), or for the reasons given there.
        """
        examples = self.encode_all(messages, source)
        if len(examples) > 1:
            raise RowError(
                source,
                _(
                    "this template rewrites earlier turns when later ones follow, so training on all answers "
                    "in one text would not match inference. Give each answer a row of its own."
                ),
            )
        return examples[0]

    def encode_all(self, messages: Sequence[Message], source: str = "") -> list[Example]:
        """`encode_row` for messages without tools."""
        return self.encode_row(Conversation(tuple(messages), source))

    def encode_row(self, row: Conversation, learn: str = "answers") -> list[Example]:
        """The row as one example, or as several if the template rewrites earlier turns when later ones follow.

        Each answer is trained on once, with the weight of its message, after exactly the ids that `encode_prompt` gives
        for the messages before it. Plain text is trained on as a whole, with an EOS token at the end.
        learn: 'answers'; 'last-answer': only the last one; 'all': the whole text up to the last stop token.

        Raises RowError if the template rejects the row, nothing of it is trained on, or the model would not learn to
        stop.
        """
        if row.text is not None:
            return [plain_example(self, row.text, row.source)]
        return [builder.build(row.source) for builder in self.builders(row, learn)]

    def builders(self, row: Conversation, learn: str = "answers") -> list[ExampleBuilder]:
        """The examples of `encode_row` before they are built, which know their messages. Raises RowError."""
        return build_examples(self, row, learn)

    def turns(
        self,
        messages: Sequence[Message],
        source: str = "",
        tools: Sequence[Any] = (),
        needs_end: Callable[[Turn], bool] = lambda _turn: False,
    ) -> list[Turn]:
        """The rendered turns of `messages`. Those that `needs_end` chooses have an end. Raises RowError."""
        shielded = self.shielded(messages)
        turns = list(self._turns(shielded, source, tools))
        stops = [text for i in self.stop_ids if (text := str(self.tokenizer.decode([i])))]
        return with_stops(turns, stops, lambda turn: missing_stop(self, turn, shielded, tools), needs_end)

    def shows_tools(self, row: Conversation) -> bool:
        """Whether the rendered row has its tools. Raises RowError as `encode_row` does."""
        if not row.tools or self.kind == "human-assistant":
            return not row.tools
        return shows_tools(self.jinja_for(row.tools), self.with_system(row.messages), row.tools)

    def lost(self, row: Conversation, learn: str = "answers") -> set[str]:
        """What the encoded row lacks, or has otherwise than the row: kinds of data/template/findings.py."""
        return lost(self, row, learn)

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Any] = (), source: str = "") -> list[int]:
        """Token ids of the prompt for the next answer to `messages`, the last of which must not be an answer.

        They equal those before this answer in training. Raises RowError if the template rejects the messages.
        """
        return self.ids_of(self.prompt_texts(messages, tools, source))

    def prompt_texts(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), source: str = "", may_lead: bool = False
    ) -> list[str]:
        """The prompt's separately tokenized texts. Raises as `encode_prompt`. may_lead: an answer may come first."""
        arranged = self.with_system(messages)
        if not arranged or arranged[-1].role == "assistant":
            raise RowError(source, _("the last message must be one to answer, such as one with the role 'user'."))
        if not self.shows_tools(Conversation(tuple(messages), source, tuple(tools))):
            raise RowError(
                source,
                _(
                    "the template has no place for 'tools', so the model would never see them. Use a model whose chat "
                    "template shows tools, or a Jinja file that does, or leave 'tools' out."
                ),
            )
        if self.is_whole:
            shielded = self.shielded(arranged)
            self._refuse(shielded, source, tools, may_lead)
            return [self.jinja_for(tools).render(shielded, True, source, self._shielded_tools(tools))]
        turns = list(self._turns(self.shielded(arranged), source, tools))
        since = max(i for i, turn in enumerate(turns) if turn.restart)
        return [text for turn in turns[since:] for text in turn[:2] if text]

    def ids_of(self, texts: list[str]) -> list[int]:
        """Token ids of texts that are tokenized separately, concatenated."""
        return [i for ids in self.tokenize(texts) for i in ids]

    def render(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """The text that the model gets, for display; with a generation prompt if the last message is not an answer."""
        text = ""
        for turn in self._turns(self.shielded(self.with_system(messages)), "", tools):
            text = ("" if turn.restart else text) + turn.prompt + (turn.answer or "")
        return without_marks(text)

    def as_jinja(self) -> str:
        """This template as a chat template in Jinja, for other programs; includes the system message."""
        return self.exported(self.text or HUMAN_ASSISTANT, self.jinja.behavior if self.text else Behavior())

    def named_as_jinja(self) -> dict[str, str]:
        """As `as_jinja`, for a model with several templates: that of conversations with tools is 'tool_use'."""
        return {"default": self.as_jinja(), "tool_use": self.exported(self.tool_text, self._tool_jinja.behavior)}

    def exported(self, text: str, behavior: Behavior) -> str:
        """The chat template `text` as other programs need it."""
        return for_other_programs(text, behavior, self.system, self.options.system_as, self.kwargs)

    def to_json(self) -> dict[str, Any]:
        """What is stored with an adapter: the template, its stop tokens, and the token ids of probe conversations."""
        return {
            "version": 2 if self.is_separate else VERSION,
            "kind": self.kind,
            "chat_template": self.text,
            "system": self.system,
            "end": self.end_id,
            "tool_template": self.tool_text,
            "kwargs": dict(self.kwargs),
            "options": self.options._asdict(),
            "stop": [{"id": i, "token": self.token(i)} for i in self.stop_ids],
            "golden": golden_conversations(self),
        }

    @classmethod
    def from_json(
        cls, data: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", renderer: IsolatedRenderer | None = None
    ) -> "Template":
        """The template of an adapter. Raises AdapterError if the tokenizer is not the one of the training."""
        if data.get("version") not in range(1, VERSION + 1):
            raise AdapterError(
                _(
                    "the adapter's template has version {found}, but this version of lorasmith reads {known}. "
                    "Use the lorasmith that wrote it.",
                    found=data.get("version"),
                    known=VERSION,
                )
            )
        stop_ids = tuple(stop["id"] for stop in data["stop"])
        template = cls(
            tokenizer,
            data["kind"],
            data["chat_template"],
            stop_ids,
            data.get("system", ""),
            data.get("end"),
            data.get("tool_template", ""),
            data.get("kwargs", {}),
            ContentOptions(**data.get("options", {"special_tokens": "tokens"})),
            is_separate=data["version"] < VERSION,
            renderer=renderer,
        )
        verify_tokenizer(template, data)
        return template

    def probe_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a probe conversation; empty if the template rejects it, such as for its second question."""
        try:
            return [i for example in self.encode_all(messages) for i in example.ids]
        except RowError:
            return []

    def token(self, token_id: int) -> str | None:
        """The token with this id, as the tokenizer spells it; None if there is none."""
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return token if isinstance(token, str) else None

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens that the tokenizer would add."""
        return token_ids(self.tokenizer, texts)

    @property
    def is_whole(self) -> bool:
        """Whether a rendered conversation is tokenized at once; the pattern of the tutorial is in two parts."""
        return self.kind != "human-assistant" and not self.is_separate

    def ids_of_turns(self, turns: Sequence[Turn]) -> list[tuple[list[int], list[int]]]:
        """The ids of each turn's prompt and answer."""
        if self.is_whole:
            return split_ids(turns, self.tokenize, lambda text: token_spans(self.tokenizer, text))
        ids = self.tokenize([text for turn in turns for text in (turn.prompt, turn.answer or "")])
        return list(zip(ids[::2], ids[1::2], strict=True))  # as in the tutorial

    def shielded(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages; special tokens that they spell are ordinary text, unless the options say otherwise."""
        return as_text(messages, self.special_pattern) if self.options.special_tokens == "text" else messages

    def _shielded_tools(self, tools: Sequence[Any]) -> Sequence[Any]:
        is_text = self.options.special_tokens == "text" and self.special_pattern is not None
        return [marked(tool, self.special_pattern) for tool in tools] if is_text else tools

    @cached_property
    def special_pattern(self) -> "re.Pattern[str] | None":
        """The special tokens and the stop tokens, as messages could spell them."""
        return special_tokens(self.tokenizer, self.stop_ids)

    def jinja_for(self, tools: Sequence[Any]) -> JinjaTemplate:
        """The chat template of a conversation with these tools."""
        return self._tool_jinja if tools else self.jinja

    def _turns(self, messages: Sequence[Message], source: str, tools: Sequence[Any] = ()) -> Iterator[Turn]:
        self._refuse(messages, source, tools)
        if self.kind == "human-assistant":
            return human_turns(messages, str(self.tokenizer.eos_token), source)
        return jinja_turns(self.jinja_for(tools), self._pattern, messages, source, self._shielded_tools(tools))

    def _refuse(self, messages: Sequence[Message], source: str, tools: Sequence[Any], may_lead: bool = False) -> None:
        """Raise RowError for messages that begin with an answer, and for function calls that are not shown."""
        if messages[0].role == "assistant" and not may_lead:
            text = _("the first message is an answer, but nothing was asked. Begin with the role 'user'.")
            raise RowError(source, text)
        if any(message.tool_calls for message in messages):
            jinja = None if self.kind == "human-assistant" else self.jinja_for(tools)
            refuse_unseen_calls(jinja, messages, source, tools)

    def _check_system(self) -> None:
        """Raise ConfigError if the template rejects or ignores the system message."""
        if not self.system:
            return
        try:
            shown = self.render(PROBES[0][:1])
        except RowError as error:
            raise ConfigError(
                _("data.system: {why}. Remove the system message.", why=error.text.rstrip(".。"))
            ) from None
        if self.system.strip() not in shown:
            raise ConfigError(_("data.system: this template ignores system messages. Remove the system message."))
