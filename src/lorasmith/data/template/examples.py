"""From a row to its examples: which turns are trained on, where each answer ends, and what is refused."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lorasmith.data.rows.conversation import Conversation, Message, RowError
from lorasmith.data.template.answer_parts import mask_parts
from lorasmith.data.template.contents import different_opening, refuse_hidden
from lorasmith.data.template.loss_mask import ExampleBuilder, end_of_answer, follow_generation_tags
from lorasmith.data.template.special_tokens import ids_of_plain_text
from lorasmith.data.template.turns import Turn, grouped
from lorasmith.i18n import _, listed
from lorasmith.model.row import Example

if TYPE_CHECKING:
    from lorasmith.data.template.encoding import Template


def build_examples(template: "Template", row: Conversation, learn: str) -> list[ExampleBuilder]:
    """The examples of a row before they are built, which know their messages. Raises RowError as `encode_row` does."""
    messages = template.with_system(row.messages)
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    if last < 0:
        raise RowError(row.source, _("no message has the role 'assistant', so there is nothing to train on."))
    messages = messages[: last + 1]

    def weight_of(turn: Turn) -> float:
        return 0.0 if learn == "last-answer" and turn.at < last else _weight(messages[turn.at])

    def needs_end(turn: Turn) -> bool:
        return bool(weight_of(turn)) and (learn != "all" or turn.at == last)

    builders: list[ExampleBuilder] = []
    for group in grouped(template.turns(messages, row.source, row.tools, needs_end)):
        builder = ExampleBuilder(group[0].at, group[0].at)
        parts = template.ids_of_turns(group)
        for number, (turn, (prompt, answer)) in enumerate(zip(group, parts, strict=True)):
            end = len(answer)
            if needs_end(turn):
                _add_stop(turn, answer, parts[number + 1][0] if number + 1 < len(parts) else [], template.stop_ids)
                end = _end(template, turn, answer, row.source)
                refuse_hidden(messages, turn, row.source)
            prompt_weight = _prompt_weight(messages[turn.first : turn.at], row.source) if learn == "all" else 0.0
            builder.add(turn, prompt, prompt_weight, answer, weight_of(turn), end)
        builders.append(builder)
    jinja = template.jinja_for(row.tools)
    if template.text and jinja.has_generation_tags and template.tokenizer.is_fast:  # only fast ones have offsets
        for builder in builders:
            since = 0 if builder is builders[0] else builder.answers[0][0]
            follow_generation_tags(builder, since, jinja, template.shielded(messages), row)
    if learn == "all" and any(message.masked for message in messages[: builders[-1].first]):
        raise RowError(
            row.source,
            _(
                "only parts of an answer are to be trained on, but with data.learn 'all' the template renders it "
                "otherwise in the whole text. Use data.learn 'answers'."
            ),
        )
    for builder in builders:
        mask_parts(builder, messages, template.tokenizer, row.source)
    return _checked(template, builders[-1:] if learn == "all" else builders, row.source)


def plain_example(template: "Template", text: str, source: str) -> Example:
    """Plain text with an EOS token: every token is trained on but the first, which has no context."""
    eos = template.tokenizer.eos_token_id
    if eos is None or eos not in template.stop_ids:
        raise RowError(source, _("plain text must end with the tokenizer's EOS token, but this tokenizer has none."))
    ids = ids_of_plain_text(template.tokenizer, text)
    ids = ids if ids[-1:] == [eos] else [*ids, eos]
    return ExampleBuilder(0, 0, ids, [1.0] * len(ids)).build(source)


def missing_stop(template: "Template", turn: Turn, messages: Sequence[Message], tools: Sequence[Any]) -> int | None:
    """The stop token after an answer that the template does not end: the token that begins the next message, if it
    is a stop token, else the model's EOS token; None if generation does not stop at any.
    """
    if template.kind == "human-assistant":
        return None
    asked = messages[: turn.at + 1]
    following = Message("tool" if asked[-1].tool_calls else "user", "?")
    with suppress(RowError):
        whole, longer = (
            template.jinja_for(tools).render(part, False, "", tools) for part in (asked, [*asked, following])
        )
        begin = template.tokenize([longer.removeprefix(whole)])[0][:1] if longer.startswith(whole) else []
        if begin and begin[0] in template.stop_ids:
            return begin[0]
    return template.end_id


def _end(template: "Template", turn: Turn, answer: list[int], source: str) -> int:
    """How many tokens of an answer to train on: those up to its stop token, not what follows it."""
    if turn.answer is None:
        raise RowError(source, different_opening(turn))
    if template.kind == "human-assistant":
        return len(answer)
    end = end_of_answer(answer, template.stop_ids, lambda i: not str(template.tokenizer.decode([i])).strip())
    if not end:
        raise RowError(
            source,
            _(
                "the answer does not end with a stop token ({stops}), so the model would never learn to "
                "stop. Use data.template 'human-assistant'.",
                stops=listed(repr(template.token(i)) for i in template.stop_ids),
            ),
        )
    return end


def _checked(template: "Template", builders: list[ExampleBuilder], source: str) -> list[ExampleBuilder]:
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
        if token not in template.stop_ids:
            raise RowError(
                source,
                _(
                    "the last token that is trained on, {token}, is not a stop token. Train on the last "
                    "answer too, or use data.learn 'answers'.",
                    token=repr(template.token(token)),
                ),
            )
    return used


def _add_stop(turn: Turn, answer: list[int], following: list[int], stops: Collection[int]) -> None:
    """Add the stop token to an answer that the template does not end: its own, or the first of the following prompt."""
    if turn.stop is not None:
        answer.append(turn.stop)
    elif following[:1] and following[0] in stops and not any(i in stops for i in answer):
        answer.append(following.pop(0))


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
