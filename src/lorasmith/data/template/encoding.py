"""The one encoding: how a conversation becomes tokens, for training, chat, generate, eval and the server alike.

A conversation is encoded turn by turn: the prompt of an answer and the answer are separate pieces of text, tokenised
separately and laid end to end. So the prompt at inference has exactly the ids that stood before the answer in training,
and what is learned follows from positions, never from token ids (pad may equal eos).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorasmith.data.rows.conversation import Conversation, Message, Record, RowError
from lorasmith.data.rows.forms import conversation
from lorasmith.data.template.chat_template import (
    ALPACA_INPUT,
    HUMAN_ASSISTANT,
    OWN,
    Jinja,
    template_text,
    with_system_text,
)
from lorasmith.data.template.marks import Draft, compare_marks
from lorasmith.data.template.turns import Pattern, Turn, human_turns, jinja_turns, refuse_unseen_tools
from lorasmith.errors import AdapterError, ConfigError, ModelError
from lorasmith.i18n import _, listed
from lorasmith.model.row import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2  # 1 had no system text, and only the kinds 'model' and 'human-assistant'
KINDS = ("model", "human-assistant", *OWN, "file")
PROBES: tuple[tuple[Message, ...], ...] = (
    (Message("user", "Why is the sky blue?"), Message("assistant", "Because air scatters blue light most.")),
    (Message("user", "考试有哪些技巧？"), Message("assistant", "先做会做的题，再检查一遍。")),
    (
        Message("user", "2 + 2 = ?"),
        Message("assistant", "4\n\n  def f(x): return x*2  # naïve 🙂"),
        Message("user", "Thanks!\nAnd 3?"),
        Message("assistant", " 5 "),
    ),
)


@dataclass(frozen=True)
class Template:
    """How conversations of one model become tokens. Made by `Template.of` or, from an adapter, `Template.from_json`.

    kind 'human-assistant': the tutorial's pattern, `text` is "". Else `text` is a chat template in Jinja: the
    tokenizer's ('model'), one of ours, or a file's ('file').
    `stop_ids`: after any of these an answer is over, in training and in decoding; ascending.
    `system`: stands before every conversation that has no system text of its own; "" for none.
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
        """The template for a tokenizer; 'auto' is the model's own where there is one, else 'human-assistant'.

        `kind`: also 'alpaca', 'chatml' or the path of a Jinja file. `eos_ids`: what the model's generation config ends
        at. Raises ConfigError where the template or the system text cannot be used with this tokenizer, ModelError
        where an end-of-text token is needed and missing.
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
        jinja = Jinja(tokenizer, text)
        if kind not in KINDS:
            jinja.check_syntax(kind)
        stops = tuple(sorted({*jinja.end_of_turn(), *ends}))
        found = cls(tokenizer, kind if kind in KINDS else "file", text, stops, system)
        found._check_system()
        return found

    @cached_property
    def jinja(self) -> Jinja:
        """The chat template; of no use for 'human-assistant'."""
        return Jinja(self.tokenizer, self.text)

    @cached_property
    def _pattern(self) -> Pattern | None:
        return Pattern.of(self.jinja)

    def conversation(self, record: Record) -> Conversation:
        """A row of data as messages. Raises RowError where nothing can be learned from it."""
        fields, given = record.fields, record.fields.get("input")
        if self.kind == "alpaca" and "instruction" in fields and isinstance(given, str) and given.strip():
            record = replace(record, fields=fields | {"input": ALPACA_INPUT.removeprefix("\n") + given.strip()})
        return conversation(record, strip=self.kind != "human-assistant")  # the tutorial's strips by its own rule

    def with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """`messages` with the system text before them, unless they have one; it is learned as the first of them is."""
        if not self.system or not messages or any(message.role == "system" for message in messages):
            return messages
        first = messages[0]
        return [Message("system", self.system, learn=first.learn, weight=first.weight), *messages]

    def encode(self, messages: Sequence[Message], source: str = "") -> Example:
        """The whole conversation in one example, every answer learned up to and with its stop token.

        Raises RowError where this template cannot say it in one text: see `encode_row`.
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
        """`encode_row` of a conversation of which every answer is learned."""
        return self.encode_row(Conversation(tuple(messages), source))

    def encode_row(self, row: Conversation, learn: str = "answers") -> list[Example]:
        """The row as examples: one, or one more wherever the template rewrites the turns before.

        Each answer is learned once, after exactly the ids that `encode_prompt` gives for what stands before it, and
        with its message's weight. `learn` 'last-answer': only the last; 'all': the whole text as it stands at the end,
        up to the last stop token. Plain text is learned whole, eos behind it.
        Raises RowError where the template refuses the row, nothing of it is learned, or it would not learn to stop.
        """
        if row.text is not None:
            return [self._plain(row.text, row.source)]
        return [draft.example(row.source) for draft in self.drafts(row, learn)]

    def drafts(self, row: Conversation, learn: str = "answers") -> list[Draft]:
        """The same of a conversation, with the messages that each example is about. Raises RowError."""
        messages = self.with_system(row.messages)
        last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
        if last < 0:
            raise RowError(row.source, _("no message has the role 'assistant', so there is nothing to train on."))
        messages = messages[: last + 1]
        turns = list(self._turns(messages, row.source, row.tools))
        pieces = self._pieces([text for turn in turns for text in (turn.prompt, turn.answer or "")])
        drafts: list[Draft] = []
        for turn, prompt, answer in zip(turns, pieces[::2], pieces[1::2], strict=True):
            if turn.restart:
                drafts.append(Draft(turn.at, turn.at))
            weight = 0.0 if learn == "last-answer" and turn.at < last else _weight(messages[turn.at])
            asked = _asked_weight(messages[turn.first : turn.at], row.source) if learn == "all" else 0.0
            is_whole = not weight or (learn == "all" and turn.at < last)
            end = len(answer) if is_whole else self._end(turn, answer, row.source)
            drafts[-1].add(turn, prompt, asked, answer, weight, end)
        if self.text and self.jinja.marks_answers and self.tokenizer.is_fast:  # only these say where a token stands
            for draft in drafts:
                since = 0 if draft is drafts[0] else draft.answers[0][0]
                compare_marks(draft, since, self.jinja, messages, row)
        return self._checked(drafts[-1:] if learn == "all" else drafts, row.source)

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Any] = (), source: str = "") -> list[int]:
        """The ids after which the model is to answer `messages`, whose last is not an answer.

        Equal to what stands before that answer in training. Raises RowError where the template refuses them.
        """
        return self.ids_of(self.prompt_texts(messages, tools, source))

    def prompt_texts(self, messages: Sequence[Message], tools: Sequence[Any] = (), source: str = "") -> list[str]:
        """The prompt in the pieces that are tokenised one by one. Raises RowError as `encode_prompt`."""
        if not messages or messages[-1].role == "assistant":
            raise RowError(source, _("the last message must be one to answer, such as one with the role 'user'."))
        turns = list(self._turns(self.with_system(messages), source, tools))
        since = max(i for i, turn in enumerate(turns) if turn.restart)
        return [text for turn in turns[since:] for text in turn[:2] if text]

    def ids_of(self, texts: list[str]) -> list[int]:
        """Tokens of the pieces of a prompt, end to end."""
        return [i for ids in self._pieces(texts) for i in ids]

    def render(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """The text that the model sees, for a reader; with the prompt of the next answer where one is awaited."""
        text = ""
        for turn in self._turns(self.with_system(messages), "", tools):
            text = ("" if turn.restart else text) + turn.prompt + (turn.answer or "")
        return text

    def as_jinja(self) -> str:
        """The same as a chat template of transformers, the system text in it."""
        return with_system_text(self.text or HUMAN_ASSISTANT, self.system)

    def to_json(self) -> dict[str, Any]:
        """What travels in the adapter folder: the template, its stop tokens, and golden ids of probe conversations."""
        return {
            "version": VERSION,
            "kind": self.kind,
            "chat_template": self.text,
            "system": self.system,
            "stop": [{"id": i, "token": self._token(i)} for i in self.stop_ids],
            "golden": [
                {"messages": [message._asdict() for message in probe], "ids": ids}
                for probe in PROBES
                if (ids := self.probe_ids(probe))
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> "Template":
        """The template that an adapter was trained with, verified on this tokenizer. Raises AdapterError."""
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
        template.verify(data)
        return template

    def verify(self, data: dict[str, Any]) -> None:
        """Encode the probes of `to_json` again: AdapterError with the first token that differs."""
        for stop in data["stop"]:
            if self._token(stop["id"]) != stop["token"]:
                raise AdapterError(
                    _(
                        "this is not the tokenizer that the adapter was trained with: stop token {id} is "
                        "{found}, but was {wanted} in training.",
                        id=stop["id"],
                        found=repr(self._token(stop["id"])),
                        wanted=repr(stop["token"]),
                    )
                )
        for golden in data["golden"]:
            probe = [Message(**message) for message in golden["messages"]]
            self._compare(self.probe_ids(probe), golden["ids"])

    def probe_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a probe conversation; none where the template refuses it, say for its second question."""
        try:
            return [i for example in self.encode_all(messages) for i in example.ids]
        except RowError:
            return []

    def _compare(self, found: list[int], wanted: list[int]) -> None:
        if found == wanted:
            return
        pairs = enumerate(zip(found, wanted, strict=False))
        at = next((i for i, (now, then) in pairs if now != then), min(len(found), len(wanted)))
        raise AdapterError(
            _(
                "this is not the tokenizer that the adapter was trained with: token {at} of a test "
                "conversation is {found}, but was {wanted} in training. Use the base model that the adapter "
                "was trained on.",
                at=at,
                found=f"{found[at]} {self._token(found[at])!r}" if at < len(found) else _("missing"),
                wanted=wanted[at] if at < len(wanted) else _("none"),
            )
        )

    def _token(self, token_id: int) -> str | None:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return token if isinstance(token, str) else None

    def _pieces(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each piece; special tokens only where the text has them."""
        if not any(texts):
            return [[] for _text in texts]
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _end(self, turn: Turn, answer: list[int], source: str) -> int:
        """How many tokens of a learned answer are learned: the line break after its stop token is context only."""
        if turn.answer is None:
            raise RowError(
                source,
                _(
                    "this template renders an answer differently from what its own generation prompt begins, "
                    "so training would not match inference. Use data.template 'human-assistant'."
                ),
            )
        end = max((i + 1 for i, token in enumerate(answer) if token in self.stop_ids), default=0)
        if not end:
            raise RowError(
                source,
                _(
                    "the answer does not end with a stop token ({stops}), so the model would never learn to "
                    "stop. Use data.template 'human-assistant'.",
                    stops=listed(repr(self._token(i)) for i in self.stop_ids),
                ),
            )
        return end

    def _checked(self, drafts: list[Draft], source: str) -> list[Draft]:
        """Those that teach something. The last learned token of each must be one at which generation stops."""
        kept = [draft for draft in drafts if any(draft.weights)]
        if not kept:
            raise RowError(
                source,
                _(
                    "nothing in this row is trained on: its answers have 'learn' false or 'weight' 0. Remove "
                    "the row, or change it."
                ),
            )
        for draft in kept:
            token = draft.ids[max(i for i, weight in enumerate(draft.weights) if weight)]
            if token not in self.stop_ids:
                raise RowError(
                    source,
                    _(
                        "the last token that is trained on, {token}, is not a stop token. Train on the last "
                        "answer too, or use data.learn 'answers'.",
                        token=repr(self._token(token)),
                    ),
                )
        return kept

    def _plain(self, text: str, source: str) -> Example:
        """Plain text: all tokens learned but the first, which nothing precedes; eos at the end."""
        eos = self.tokenizer.eos_token_id
        if eos is None or eos not in self.stop_ids:
            raise RowError(
                source, _("plain text must end with the tokenizer's EOS token, but this tokenizer has none.")
            )
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        ids = ids if ids[-1:] == [eos] else [*ids, eos]
        draft = Draft(0, 0, ids, [1.0] * len(ids))
        return draft.example(source)

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
        """Raises ConfigError where the template refuses a system text, or leaves it out."""
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


def _asked_weight(asked: Sequence[Message], source: str) -> float:
    """The one weight of the messages that one prompt shows. Raises RowError where they differ."""
    weights = {_weight(message) for message in asked}
    if len(weights) > 1:
        raise RowError(
            source,
            _(
                "with data.learn 'all', the messages before an answer must all have the same 'learn' and "
                "'weight'. Make them equal, or use data.learn 'answers'."
            ),
        )
    return weights.pop() if weights else 1.0
