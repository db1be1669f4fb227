"""What of an encoded conversation is learned, and the proof against a template that marks its answers itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lorasmith.data.rows.conversation import Conversation, Message, RowError
from lorasmith.data.template.chat_template import Jinja
from lorasmith.data.template.turns import Turn
from lorasmith.i18n import _
from lorasmith.model.row import IGNORED, Example


@dataclass
class Draft:
    """An example while its turns are laid end to end; it teaches answers among messages [first, last].

    `weights`: of each token as something to be predicted; 0 where it is context only. `answers`: the characters of
    `text` that each answer takes.
    """

    first: int
    last: int
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    text: str = ""
    answers: list[tuple[int, int]] = field(default_factory=list)

    def add(self, turn: Turn, prompt: list[int], asked: float, answer: list[int], weight: float, end: int) -> None:
        """One more turn; of its answer the first `end` tokens have `weight`, of its prompt all have `asked`."""
        self.ids += prompt + answer
        self.weights += [asked] * len(prompt) + [weight] * end + [0.0] * (len(answer) - end)
        start = len(self.text) + len(turn.prompt)
        self.text += turn.prompt + (turn.answer or "")
        self.answers.append((start, len(self.text)))
        self.last = turn.at

    def example(self, source: str) -> Example:
        """Its ids with what each position must predict."""
        following = zip(self.ids[1:], self.weights[1:], strict=True)
        targets = [token if weight else IGNORED for token, weight in following]
        weights = [weight or 1.0 for weight in self.weights[1:]]
        return Example(self.ids, [*targets, IGNORED], [*weights, 1.0], source)


def compare_marks(draft: Draft, since: int, jinja: Jinja, messages: Sequence[Message], row: Conversation) -> None:
    """Raise RowError with the first token that `{% generation %}` and the prefix differences do not both call learned.

    Blanks may be either, as the line break behind a stop token is in many templates. Compared is from character `since`
    of the draft: after a restart the answers before are context, and another example teaches them.
    """
    found = jinja.marked(messages[: draft.last + 1], row.source, row.tools)
    for at, ((start, end), marked) in enumerate(zip(found["offset_mapping"], found["assistant_masks"], strict=True)):
        text = draft.text[start:end]
        ours = any(a < end and start < b for a, b in draft.answers)
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
