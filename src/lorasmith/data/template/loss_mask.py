"""Which tokens of a conversation are trained on, and a check against a template that marks its answers itself."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from lorasmith.data.rows.conversation import Conversation, Message, RowError
from lorasmith.data.template.chat_template import JinjaTemplate
from lorasmith.data.template.turns import Turn
from lorasmith.i18n import _
from lorasmith.model.row import IGNORED, Example


@dataclass
class ExampleBuilder:
    """An example under construction: turns are appended to it one by one.

    first, last: the messages whose answers it trains on, both included. weights: of each token as a target, 0 if it is
    only context. answers: start and end of each answer in `text`, in characters; ats: the messages that they are.
    """

    first: int
    last: int
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    text: str = ""
    answers: list[tuple[int, int]] = field(default_factory=list)
    ats: list[int] = field(default_factory=list)

    def add(
        self, turn: Turn, prompt: list[int], prompt_weight: float, answer: list[int], weight: float, end: int
    ) -> None:
        """Append a turn. The first `end` tokens of the answer get the weight `weight`, the prompt `prompt_weight`."""
        self.ids += prompt + answer
        self.weights += [prompt_weight] * len(prompt) + [weight] * end + [0.0] * (len(answer) - end)
        start = len(self.text) + len(turn.prompt)
        self.text += turn.prompt + (turn.answer or "")
        self.answers.append((start, len(self.text)))
        self.ats.append(turn.at)
        self.last = turn.at

    def build(self, source: str) -> Example:
        """The finished example."""
        following = zip(self.ids[1:], self.weights[1:], strict=True)
        targets = [token if weight else IGNORED for token, weight in following]
        weights = [weight or 1.0 for weight in self.weights[1:]]
        return Example(self.ids, [*targets, IGNORED], [*weights, 1.0], source)


def end_of_answer(ids: Sequence[int], stops: Collection[int], is_blank: Callable[[int], bool]) -> int:
    """The number of tokens up to the stop token that ends an answer; 0 if none does.

    Some templates write a second one after it, such as <|end|>, a line break and <|endoftext|>: the first one counts.
    """
    at = max((i for i, token in enumerate(ids) if token in stops), default=-1)
    before = at - 1
    while before >= 0 and (ids[before] in stops or is_blank(ids[before])):
        at = before if ids[before] in stops else at
        before -= 1
    return at + 1


def follow_generation_tags(
    builder: ExampleBuilder, since: int, jinja: JinjaTemplate, messages: Sequence[Message], row: Conversation
) -> None:
    """Train on the text before an answer that `{% generation %}` marks as well, such as the role or an opened thought.

    Raises RowError with the first other token that the tags and the builder's answers do not agree on. Whitespace may
    differ, such as the line break after a stop token. Text before the character `since` is not compared: after a
    restart, the earlier answers are only context, and trained on in another example.
    """
    found = jinja.tokenize_with_mask(messages[: builder.last + 1], row.source, row.tools)
    spans = [(int(start), int(end)) for start, end in found["offset_mapping"]]
    marked_spans = {span for span, mask in zip(spans, found["assistant_masks"], strict=True) if mask}
    marks = [span in marked_spans for span in spans]  # the tokens of one character share its span
    is_same_text = list(found["input_ids"]) == builder.ids[: len(spans)]
    before = [jinja.render(messages[:at], False, row.source, row.tools) for at in builder.ats] if is_same_text else []
    headers = _marked_headers(builder, spans, marks, before) if is_same_text else {}
    for at, ((start, end), marked) in enumerate(zip(spans, marks, strict=True)):
        text = builder.text[start:end]
        ours = any(a < end and start < b for a, b in builder.answers)
        if at in headers:
            builder.weights[at] = headers[at]
        if start < since or ours == marked or not text.strip() or at in headers:
            continue
        raise RowError(
            row.source,
            _(
                "token {at} ({token}) is {ours} according to the text that the template adds for an answer, "
                "but {theirs} according to its {{% generation %}} tags. Fix the tags, or remove them from the "
                "template.",
                at=at,
                token=repr(text),
                ours=_("trained on") if ours else _("not trained on"),
                theirs=_("trained on") if marked else _("not trained on"),
            ),
        )


def _marked_headers(
    builder: ExampleBuilder, spans: Sequence[tuple[int, int]], marks: Sequence[bool], before: Sequence[str]
) -> dict[int, float]:
    """The marked tokens directly before each answer, with the weight of the answer.

    before: the text of the conversation before each answer, without the generation prompt; no token of it counts.
    """
    found: dict[int, float] = {}
    for (start, end), text in zip(builder.answers, before, strict=True):
        at = next((i for i, span in enumerate(spans) if start < span[1] and span[0] < end), len(spans))
        if at == len(spans) or not builder.text.startswith(text):
            continue
        weight = builder.weights[at]
        while at > 0 and marks[at - 1] and spans[at - 1][0] >= len(text):
            at -= 1
            found[at] = weight
    return found
