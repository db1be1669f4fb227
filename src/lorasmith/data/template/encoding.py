"""Encode conversations as tokens: the only place where this is done, for training, evaluation, chat and the server.

The prompt of an answer and the answer are tokenized separately and then concatenated. So the prompt has exactly the
same token ids at inference as in training, and the loss mask follows from positions, never from token ids (the pad
token may be the EOS token).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorasmith.data.rows.conversation import Conversation, Message, Record, RowError
from lorasmith.data.rows.formats import to_conversation
from lorasmith.data.template.answer_parts import mask_parts
from lorasmith.data.template.chat_template import (
    ALPACA_INPUT,
    BUILTIN,
    HUMAN_ASSISTANT,
    JinjaTemplate,
    template_text,
    with_system_text,
)
from lorasmith.data.template.golden import PROBES, golden_conversations, verify_tokenizer
from lorasmith.data.template.loss_mask import ExampleBuilder, check_generation_tags
from lorasmith.data.template.turns import Pattern, Turn, human_turns, jinja_turns, refuse_unseen_tools
from lorasmith.errors import AdapterError, ConfigError, ModelError
from lorasmith.i18n import _, listed
from lorasmith.model.row import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2  # of `to_json`; 1 had no system message, and only the kinds 'model' and 'human-assistant'
KINDS = ("model", "human-assistant", *BUILTIN, "file")


@dataclass(frozen=True)
class Template:
    """Encodes conversations for a tokenizer. Made by `Template.of`, or from an adapter by `Template.from_json`.

    kind: 'human-assistant' is the pattern of the tutorial, without `text`. For other kinds, `text` is a chat template
    in Jinja: that of the tokenizer ('model'), a built-in one, or one from a file ('file').
    stop_ids: tokens that end an answer, in training and in decoding, in ascending order.
    system: the system message of conversations that have none; empty for none.
    """

    tokenizer: "PreTrainedTokenizerBase"
    kind: str
    text: str
    stop_ids: tuple[int, ...]
    system: str = ""

    @classmethod
    def of(
        cls, tokenizer: "PreTrainedTokenizerBase", kind: str = "auto", eos_ids: Iterable[int] = (), system: str = ""
    ) -> "Template":
        """The template for a tokenizer.

        kind: 'auto' (the model's own if there is one, else 'human-assistant'), 'model', 'human-assistant', 'alpaca',
        'chatml', or the path of a Jinja file. eos_ids: the EOS tokens of the model's generation config.

        Raises:
            ConfigError: the template or the system message cannot be used with this tokenizer.
            ModelError: the template needs an EOS token, and the tokenizer has none.
        """
        has_own = tokenizer.chat_template is not None
        if kind == "model" and not has_own:
            raise ConfigError(
                _(
                    "data.template: 'model' requires a chat template, but this model's tokenizer has none. Use "
                    "'human-assistant'."
                )
            )
        if kind == "auto":
            kind = "model" if has_own else "human-assistant"
        eos_id = tokenizer.eos_token_id
        if eos_id is None and kind in ("human-assistant", "alpaca"):
            raise ModelError(
                _(
                    "data.template: '{kind}' ends each answer with the tokenizer's EOS token, but this "
                    "tokenizer has none. Set eos_token in its tokenizer_config.json.",
                    kind=kind,
                )
            )
        ends = {*eos_ids} if eos_id is None else {eos_id, *eos_ids}
        if kind == "human-assistant":
            return cls(tokenizer, kind, "", tuple(sorted(ends)), system)
        text = str(tokenizer.get_chat_template()) if kind == "model" else template_text(kind, tokenizer)
        jinja = JinjaTemplate(tokenizer, text)
        if kind not in KINDS:
            jinja.check_syntax(kind)
        stops = tuple(sorted({*jinja.end_of_turn(), *ends}))
        template = cls(tokenizer, kind if kind in KINDS else "file", text, stops, system)
        template._check_system()
        return template

    @cached_property
    def jinja(self) -> JinjaTemplate:
        """The chat template. Not for the kind 'human-assistant'."""
        return JinjaTemplate(self.tokenizer, self.text)

    @cached_property
    def _pattern(self) -> Pattern | None:
        return Pattern.of(self.jinja)

    def conversation(self, record: Record) -> Conversation:
        """The conversation of a row. Raises RowError if the row cannot be used."""
        fields, given = record.fields, record.fields.get("input")
        if self.kind == "alpaca" and "instruction" in fields and isinstance(given, str) and given.strip():
            record = replace(record, fields=fields | {"input": ALPACA_INPUT.removeprefix("\n") + given.strip()})
        return to_conversation(record, strip=self.kind != "human-assistant")  # `human_turns` strips like the tutorial

    def with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """`messages` after the system message, unless they have one. It gets the weight of the first message."""
        if not self.system or not messages or any(message.role == "system" for message in messages):
            return messages
        first = messages[0]
        return [Message("system", self.system, learn=first.learn, weight=first.weight), *messages]

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
            return [self._plain(row.text, row.source)]
        return [builder.build(row.source) for builder in self.builders(row, learn)]

    def builders(self, row: Conversation, learn: str = "answers") -> list[ExampleBuilder]:
        """The examples of `encode_row` before they are built, which know their messages. Raises RowError."""
        messages = self.with_system(row.messages)
        last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
        if last < 0:
            raise RowError(row.source, _("no message has the role 'assistant', so there is nothing to train on."))
        messages = messages[: last + 1]
        turns = list(self._turns(messages, row.source, row.tools))
        ids = self._tokenize([text for turn in turns for text in (turn.prompt, turn.answer or "")])
        builders: list[ExampleBuilder] = []
        for turn, prompt, answer in zip(turns, ids[::2], ids[1::2], strict=True):
            if turn.restart:
                builders.append(ExampleBuilder(turn.at, turn.at))
            weight = 0.0 if learn == "last-answer" and turn.at < last else _weight(messages[turn.at])
            prompt_weight = _prompt_weight(messages[turn.first : turn.at], row.source) if learn == "all" else 0.0
            is_whole = not weight or (learn == "all" and turn.at < last)
            end = len(answer) if is_whole else self._end(turn, answer, row.source)
            builders[-1].add(turn, prompt, prompt_weight, answer, weight, end)
        if self.text and self.jinja.has_generation_tags and self.tokenizer.is_fast:  # only fast ones have offsets
            for builder in builders:
                since = 0 if builder is builders[0] else builder.answers[0][0]
                check_generation_tags(builder, since, self.jinja, messages, row)
        for builder in builders:
            mask_parts(builder, messages, self.tokenizer, row.source)
        return self._checked(builders[-1:] if learn == "all" else builders, row.source)

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Any] = (), source: str = "") -> list[int]:
        """Token ids of the prompt for the next answer to `messages`, the last of which must not be an answer.

        They equal those before this answer in training. Raises RowError if the template rejects the messages.
        """
        return self.ids_of(self.prompt_texts(messages, tools, source))

    def prompt_texts(self, messages: Sequence[Message], tools: Sequence[Any] = (), source: str = "") -> list[str]:
        """The texts of the prompt that are tokenized separately. Raises RowError as `encode_prompt` does."""
        if not messages or messages[-1].role == "assistant":
            raise RowError(source, _("the last message must be one to answer, such as one with the role 'user'."))
        turns = list(self._turns(self.with_system(messages), source, tools))
        since = max(i for i, turn in enumerate(turns) if turn.restart)
        return [text for turn in turns[since:] for text in turn[:2] if text]

    def ids_of(self, texts: list[str]) -> list[int]:
        """Token ids of texts that are tokenized separately, concatenated."""
        return [i for ids in self._tokenize(texts) for i in ids]

    def render(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """The text that the model gets, for display; with a generation prompt if the last message is not an answer."""
        text = ""
        for turn in self._turns(self.with_system(messages), "", tools):
            text = ("" if turn.restart else text) + turn.prompt + (turn.answer or "")
        return text

    def as_jinja(self) -> str:
        """This template as a chat template in Jinja, for other programs; includes the system message."""
        return with_system_text(self.text or HUMAN_ASSISTANT, self.system)

    def to_json(self) -> dict[str, Any]:
        """What is stored with an adapter: the template, its stop tokens, and the token ids of probe conversations."""
        return {
            "version": VERSION,
            "kind": self.kind,
            "chat_template": self.text,
            "system": self.system,
            "stop": [{"id": i, "token": self.token(i)} for i in self.stop_ids],
            "golden": golden_conversations(self),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> "Template":
        """The template of an adapter. Raises AdapterError if the tokenizer is not the one of the training."""
        if data.get("version") not in (1, VERSION):
            raise AdapterError(
                _(
                    "the adapter's template has version {found}, but this version of lorasmith reads {known}. "
                    "Use the lorasmith that wrote it.",
                    found=data.get("version"),
                    known=VERSION,
                )
            )
        stop_ids = tuple(stop["id"] for stop in data["stop"])
        template = cls(tokenizer, data["kind"], data["chat_template"], stop_ids, data.get("system", ""))
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

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens that the tokenizer would add."""
        if not any(texts):
            return [[] for _text in texts]
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _end(self, turn: Turn, answer: list[int], source: str) -> int:
        """How many tokens of an answer to train on: those up to its last stop token, not a line break after it."""
        if turn.answer is None:
            raise RowError(
                source,
                _(
                    "this template does not render an answer the way its own generation prompt "
                    "begins it, so training would not match inference. Use data.template 'human-assistant'."
                ),
            )
        end = max((i + 1 for i, token in enumerate(answer) if token in self.stop_ids), default=0)
        if not end:
            raise RowError(
                source,
                _(
                    "the answer does not end with a stop token ({stops}), so the model would never learn to "
                    "stop. Use data.template 'human-assistant'.",
                    stops=listed(repr(self.token(i)) for i in self.stop_ids),
                ),
            )
        return end

    def _checked(self, builders: list[ExampleBuilder], source: str) -> list[ExampleBuilder]:
        """Those with tokens to train on. The last of these must be a stop token in each; else raises RowError."""
        used = [builder for builder in builders if any(builder.weights)]
        if not used:
            raise RowError(
                source,
                _(
                    "nothing in this row is trained on: its answers have 'learn' false or 'weight' 0. Remove "
                    "the row, or change it."
                ),
            )
        for builder in used:
            token = builder.ids[max(i for i, weight in enumerate(builder.weights) if weight)]
            if token not in self.stop_ids:
                raise RowError(
                    source,
                    _(
                        "the last token that is trained on, {token}, is not a stop token. Train on the last "
                        "answer too, or use data.learn 'answers'.",
                        token=repr(self.token(token)),
                    ),
                )
        return used

    def _plain(self, text: str, source: str) -> Example:
        """Plain text with an EOS token: every token is trained on but the first, which has no context."""
        eos = self.tokenizer.eos_token_id
        if eos is None or eos not in self.stop_ids:
            raise RowError(
                source, _("plain text must end with the tokenizer's EOS token, but this tokenizer has none.")
            )
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        ids = ids if ids[-1:] == [eos] else [*ids, eos]
        return ExampleBuilder(0, 0, ids, [1.0] * len(ids)).build(source)

    def _turns(self, messages: Sequence[Message], source: str, tools: Sequence[Any] = ()) -> Iterator[Turn]:
        if messages[0].role == "assistant":
            raise RowError(
                source, _("the first message is an answer, but nothing was asked. Begin with the role 'user'.")
            )
        if tools or any(message.tool_calls for message in messages):
            refuse_unseen_tools(None if self.kind == "human-assistant" else self.jinja, messages, source, tools)
        if self.kind == "human-assistant":
            return human_turns(messages, str(self.tokenizer.eos_token), source)
        return jinja_turns(self.jinja, self._pattern, messages, source, tools)

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


def _weight(message: Message) -> float:
    return message.weight if message.learn else 0.0


def _prompt_weight(prompt: Sequence[Message], source: str) -> float:
    """The weight of the messages of one prompt. Raises RowError if they have different ones."""
    weights = {_weight(message) for message in prompt}
    if len(weights) > 1:
        raise RowError(
            source,
            _(
                "with data.learn 'all', the messages before an answer must all have the same 'learn' and "
                "'weight'. Make them equal, or use data.learn 'answers'."
            ),
        )
    return weights.pop() if weights else 1.0
