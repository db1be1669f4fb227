"""Which tokens of a conversation are trained on, and a check against a template that marks its answers itself."""

from collections.abc import Sequence
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
    only context. answers: start and end of each answer in `text`, in characters.
    """

    first: int
    last: int
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    text: str = ""
    answers: list[tuple[int, int]] = field(default_factory=list)

    def add(
        self, turn: Turn, prompt: list[int], prompt_weight: float, answer: list[int], weight: float, end: int
    ) -> None:
        """Append a turn. The first `end` tokens of the answer get the weight `weight`, the prompt `prompt_weight`."""
        self.ids += prompt + answer
        self.weights += [prompt_weight] * len(prompt) + [weight] * end + [0.0] * (len(answer) - end)
        start = len(self.text) + len(turn.prompt)
        self.text += turn.prompt + (turn.answer or "")
        self.answers.append((start, len(self.text)))
        self.last = turn.at

    def build(self, source: str) -> Example:
        """The finished example."""
        following = zip(self.ids[1:], self.weights[1:], strict=True)
        targets = [token if weight else IGNORED for token, weight in following]
        weights = [weight or 1.0 for weight in self.weights[1:]]
        return Example(self.ids, [*targets, IGNORED], [*weights, 1.0], source)


def check_generation_tags(
    builder: ExampleBuilder, since: int, jinja: JinjaTemplate, messages: Sequence[Message], row: Conversation
) -> None:
    """Raise RowError with the first token that `{% generation %}` and the builder's answers do not agree on.

    Whitespace may differ, such as the line break after a stop token. Text before the character `since` is not compared:
    after a restart, the earlier answers are only context, and trained on in another example.
    """
    found = jinja.tokenize_with_mask(messages[: builder.last + 1], row.source, row.tools)
    for at, ((start, end), marked) in enumerate(zip(found["offset_mapping"], found["assistant_masks"], strict=True)):
        text = builder.text[start:end]
        ours = any(a < end and start < b for a, b in builder.answers)
        if start < since or ours == bool(marked) or not text.strip():
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
