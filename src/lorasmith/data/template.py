"""The one encoding: how a conversation becomes tokens, for training, chat, generate, eval and the server alike.

A conversation is encoded turn by turn: the prompt of an answer and the answer are separate pieces of text, tokenised
separately and laid end to end. So the prompt at inference has exactly the ids that stood before the answer in training,
and what is learned follows from positions, never from token ids (pad may equal eos).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError

from lorasmith.data.conversation import Conversation, Message, Record, RowError
from lorasmith.data.forms import conversation
from lorasmith.errors import AdapterError, ConfigError, ModelError
from lorasmith.i18n import _
from lorasmith.model.row import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
PROBE_ANSWER = "lorasmith"
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
# A template that asks for today would encode one thing in training and another tomorrow: its clock stands still.
FIXED_DATE = (("%d", "26"), ("%b", "Jul"), ("%B", "July"), ("%m", "07"), ("%Y", "2024"), ("%y", "24"))
CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{directive}', '{value}')" for directive, value in FIXED_DATE)
    + " }}{%- endmacro -%}"
)


class Turn(NamedTuple):
    """One answer and the text since the answer before; `restart`: the prompt stands for the whole text before it.

    `answer` is None for a prompt that waits for its answer, and where the template shows an answer in another way
    than its own prompt begins it.
    """

    prompt: str
    answer: str | None
    restart: bool


@dataclass(frozen=True)
class Template:
    """How conversations of one model become tokens. Made by `Template.of` or, from an adapter, `Template.from_json`.

    kind 'model': `text` is the tokenizer's chat template. 'human-assistant': the tutorial's pattern, `text` is "".
    `stop_ids`: after any of these an answer is over, in training and in decoding; ascending.
    """

    tokenizer: "PreTrainedTokenizerBase"
    kind: Literal["model", "human-assistant"]
    text: str
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", kind: str = "auto", eos_ids: Iterable[int] = ()) -> "Template":
        """The template for a tokenizer; 'auto' is the model's own where there is one.

        `eos_ids`: what the model's generation config ends at. Raises ConfigError where 'model' is asked of a
        tokenizer without chat template, ModelError where an end-of-text token is needed and missing.
        """
        has_own = tokenizer.chat_template is not None
        if kind == "model" and not has_own:
            raise ConfigError(
                _("data.template: 'model', but this model's tokenizer has no chat template. Use 'human-assistant'.")
            )
        if kind == "human-assistant" or not has_own:
            eos = tokenizer.eos_token_id
            if eos is None:
                raise ModelError(
                    _(
                        "data.template: 'human-assistant' ends each answer with the tokenizer's eos token, "
                        "and this tokenizer has none. Set eos_token in its tokenizer_config.json."
                    )
                )
            return cls(tokenizer, "human-assistant", "", tuple(sorted({eos, *eos_ids})))
        text = str(tokenizer.get_chat_template())
        eos_id = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        return cls(tokenizer, "model", text, tuple(sorted({*_end_of_turn(tokenizer, text), *eos_id, *eos_ids})))

    def conversation(self, record: Record) -> Conversation:
        """A row of data as messages. Raises RowError where nothing can be learned from it."""
        return conversation(record, strip=self.kind == "model")  # the tutorial's pattern strips by its own rule

    def encode(self, messages: Sequence[Message], source: str = "") -> Example:
        """The whole conversation in one example, every answer learned up to and with its stop token.

        Raises RowError where this template cannot say it in one text: see `encode_all`.
        """
        examples = self.encode_all(messages, source)
        if len(examples) > 1:
            raise RowError(
                source,
                _(
                    "this template rewrites earlier turns once a later one follows, so one text for all answers "
                    "would teach what inference never shows. Give each answer a row of its own."
                ),
            )
        return examples[0]

    def encode_all(self, messages: Sequence[Message], source: str = "") -> list[Example]:
        """The conversation as examples: one, or one more wherever the template rewrites the turns before.

        Each answer is learned once, after exactly the ids that `encode_prompt` gives for what stands before it.
        Raises RowError with `source` where the template refuses the conversation, or an answer has no stop token.
        """
        last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
        if last < 0:
            raise RowError(source, _("no message has role 'assistant', so there is nothing to learn from it."))
        drafts: list[tuple[list[int], list[bool]]] = []
        for turn in self._turns(messages[: last + 1], source):
            if turn.restart:
                drafts.append(([], []))
            ids, learned = drafts[-1]
            prompt, answer = self._ids(turn.prompt), self._answer(turn, source)
            ids += prompt + answer
            learned += [False] * len(prompt) + self._learned(answer, source)
        return [_example(ids, learned, source) for ids, learned in drafts]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which the model is to answer `messages`, whose last is not an answer.

        Equal to what stands before that answer in training. Raises RowError where the template refuses them.
        """
        if not messages or messages[-1].role == "assistant":
            raise RowError("", _("the last message must be one to answer, with role 'user'."))
        ids: list[int] = []
        for turn in self._turns(messages, ""):
            ids = ([] if turn.restart else ids) + self._ids(turn.prompt) + self._ids(turn.answer or "")
        return ids

    def render(self, messages: Sequence[Message]) -> str:
        """The text that the model sees, for a reader; with the prompt of the next answer where one is awaited."""
        text = ""
        for turn in self._turns(messages, ""):
            text = ("" if turn.restart else text) + turn.prompt + (turn.answer or "")
        return text

    def to_json(self) -> dict[str, Any]:
        """What travels in the adapter folder: the template, its stop tokens, and golden ids of probe conversations."""
        return {
            "version": VERSION,
            "kind": self.kind,
            "chat_template": self.text,
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
        if data.get("version") != VERSION:
            raise AdapterError(
                _(
                    "the adapter's template has version {found}, known is {known}. Use the lorasmith that wrote it.",
                    found=data.get("version"),
                    known=VERSION,
                )
            )
        template = cls(tokenizer, data["kind"], data["chat_template"], tuple(stop["id"] for stop in data["stop"]))
        template.verify(data)
        return template

    def verify(self, data: dict[str, Any]) -> None:
        """Encode the probes of `to_json` again: AdapterError with the first token that differs."""
        for stop in data["stop"]:
            if self._token(stop["id"]) != stop["token"]:
                raise AdapterError(
                    _(
                        "this tokenizer is not the one that the adapter was trained with: "
                        "stop token {id} is {found}, then it was {wanted}.",
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
                "this tokenizer is not the one that the adapter was trained with: token {at} of a probe is "
                "{found}, then it was {wanted}. Name the base model that the adapter belongs to.",
                at=at,
                found=f"{found[at]} {self._token(found[at])!r}" if at < len(found) else _("missing"),
                wanted=wanted[at] if at < len(wanted) else _("none"),
            )
        )

    def _token(self, token_id: int) -> str | None:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return token if isinstance(token, str) else None

    def _ids(self, text: str) -> list[int]:
        """Tokens of a piece; special tokens only where the text has them."""
        if not text:
            return []
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _answer(self, turn: Turn, source: str) -> list[int]:
        if turn.answer is None:
            raise RowError(
                source,
                _(
                    "this template shows an answer in another way than its own prompt begins it, so the model would "
                    "learn what inference never shows. Use data.template 'human-assistant'."
                ),
            )
        return self._ids(turn.answer)

    def _learned(self, answer: list[int], source: str) -> list[bool]:
        """True up to and with the last stop token: the line break after it is context only."""
        end = max((i + 1 for i, token in enumerate(answer) if token in self.stop_ids), default=0)
        if not end:
            raise RowError(
                source,
                _(
                    "the answer ends without a stop token ({stops}), so the model would never learn to stop. "
                    "Use data.template 'human-assistant'.",
                    stops=", ".join(repr(self._token(i)) for i in self.stop_ids),
                ),
            )
        return [True] * end + [False] * (len(answer) - end)

    def _turns(self, messages: Sequence[Message], source: str) -> Iterator[Turn]:
        if messages[0].role == "assistant":
            raise RowError(source, _("the first message is an answer, and nothing was asked. Begin with role 'user'."))
        return (
            self._model_turns(messages, source) if self.kind == "model" else _human_turns(messages, self._eos, source)
        )

    @property
    def _eos(self) -> str:
        return str(self.tokenizer.eos_token)

    def _model_turns(self, messages: Sequence[Message], source: str) -> Iterator[Turn]:
        """Prefix differences of the rendered conversation: stock templates mark no answers themselves."""
        text: str | None = ""
        for i, message in enumerate(messages):
            if message.role == "assistant":
                prompt = self._rendered(messages[:i], True, source)
                whole = self._rendered(messages[: i + 1], False, source)
                answer = whole[len(prompt) :] if whole.startswith(prompt) else None
                yield _turn(prompt, answer, text)
                text = None if answer is None else whole
        if messages[-1].role != "assistant":
            yield _turn(self._rendered(messages, True, source), None, text)

    def _rendered(self, messages: Sequence[Message], prompt: bool, source: str) -> str:
        return _rendered(self.tokenizer, self.text, messages, prompt, source)


def _turn(prompt: str, answer: str | None, before: str | None) -> Turn:
    if not before or not prompt.startswith(before):
        return Turn(prompt, answer, restart=True)
    return Turn(prompt[len(before) :], answer, restart=False)


def _human_turns(messages: Sequence[Message], eos: str, source: str) -> Iterator[Turn]:
    """The tutorial's pattern, turn by turn; a system text stands, with a blank line, before the question it precedes.

    For an alpaca row the user's text is instruction + line break + input, so this is its
    "\\n".join(["Human: " + instruction, input]).strip() + "\\n\\nAssistant: ".
    """
    asked: list[str] = []
    first = True
    for message in messages:
        if message.role != "assistant":
            asked.append(message.content)
            continue
        if not asked:
            raise RowError(source, _("two answers follow each other. Put a message with role 'user' between them."))
        yield Turn(_human(asked), message.content + eos, restart=first)
        asked, first = [], False
    if asked:
        yield Turn(_human(asked), None, restart=first)


def _human(asked: list[str]) -> str:
    return ("Human: " + "\n\n".join(asked)).strip() + "\n\nAssistant: "


def _rendered(
    tokenizer: "PreTrainedTokenizerBase", text: str, messages: Sequence[Message], prompt: bool, source: str
) -> str:
    chat_template = CLOCK + text if "strftime_now" in text else text
    shown: list[Any] = [message._asdict() for message in messages]
    try:
        rendered = tokenizer.apply_chat_template(
            shown,
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except (TemplateError, TypeError) as error:
        raise RowError(source, _("the model's chat template refuses it: {why}", why=error)) from error
    return str(rendered)


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The first special token after a probe answer, or the first added one; none where the template has none."""
    probe = (Message("user", "?"), Message("assistant", PROBE_ANSWER))
    try:
        rest = _rendered(tokenizer, text, probe, False, "").rpartition(PROBE_ANSWER)[2]
    except RowError:
        return []  # a row will meet the same refusal and say where
    added = tokenizer.added_tokens_decoder
    ids: list[int] = tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else []
    found = [i for i in ids if i in added and added[i].special]
    found = found or [i for i in ids if i in added and added[i].content.strip()]
    return found[:1]


def _example(ids: list[int], learned: list[bool], source: str) -> Example:
    targets = [following if learn else IGNORED for following, learn in zip(ids[1:], learned[1:], strict=True)]
    return Example(ids, [*targets, IGNORED], [1.0] * len(ids), source)


def cut(example: Example, length: int) -> Example:
    """The first `length` tokens: its last token has nothing left to predict."""
    if len(example.ids) <= length:
        return example
    targets = [*example.targets[: length - 1], IGNORED]
    return Example(example.ids[:length], targets, example.weights[:length], example.source)
