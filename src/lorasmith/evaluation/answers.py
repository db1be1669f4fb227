"""Questions with known answers, taken out of held-out examples, and what the base or an adapter replies to them.

They come out of the tokens of an example, not out of its file: so a question has the very ids that stood before the
answer in training, whatever form the row had.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from lorasmith.config.sampling import SamplingConfig
from lorasmith.data.rows.conversation import Message, RowError
from lorasmith.data.template.encoding import Template
from lorasmith.engine.engine import Engine, generate
from lorasmith.engine.request import Finish, Request
from lorasmith.errors import DataError
from lorasmith.i18n import _
from lorasmith.model.base import Base
from lorasmith.model.row import Example
from lorasmith.report import Report

PROBE = "\N{OPEN BOX}"  # a question that no template has in its own text


@dataclass(frozen=True)
class Question:
    """The prompt as ids, its last message for a reader, the answer that the row gives, and where the row stands."""

    ids: list[int]
    text: str
    reference: str
    source: str


@dataclass(frozen=True)
class Answer:
    """A reply, and how it ended: 'stop', or 'length' where it was as long as allowed."""

    text: str
    finish: Finish


def questions_of(examples: Sequence[Example], template: Template, count: int) -> list[Question]:
    """Of the first `count` examples that have one, the last question and its answer.

    Passed over: plain text, in which nothing is asked, and answers that were cut. Raises DataError where none is left.
    """
    found: list[Question] = []
    before, after = _frame(template)
    for example in examples:
        if len(found) == count:
            break
        start, end, last = _last_answer(example)
        if start < 2 or example.ids[end - 1] not in template.stop_ids:
            continue
        asked = str(template.tokenizer.decode(example.ids[last:start]))
        text = asked.removesuffix(after).partition(before)[2] if before and before in asked else ""
        found.append(
            Question(
                example.ids[:start],
                text.strip() or _plain(template, example.ids[last:start]),
                _plain(template, example.ids[start:end]),
                example.source,
            )
        )
    if not found:
        raise DataError(
            _(
                "--generate: none of the {examples} held-out examples has a prompt and a complete answer (they "
                "are plain text, or truncated). Remove --generate, or give a file with prompts and answers.",
                examples=len(examples),
            )
        )
    return found


def answers_to(
    questions: Sequence[Question],
    base: Base,
    adapter: str | None,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    report: Report | None = None,
    task: str = "",
) -> list[Answer]:
    """A reply to each question from `adapter` (None: the base alone), decoded together."""
    requests = [Request(question.ids, sampling, adapter, stop_ids) for question in questions]
    texts, finish = [""] * len(questions), list[Finish](["length"] * len(questions))
    done = 0
    for event in generate(Engine(base), requests):
        texts[event.key] += event.text
        if event.finish:
            finish[event.key] = event.finish
            done += 1
            if report:
                report.progress(task, done, len(questions))
    return [Answer(text.strip(), end) for text, end in zip(texts, finish, strict=True)]


def _last_answer(example: Example) -> tuple[int, int, int]:
    """Tokens [start, end) are the last learned piece; what was asked before it begins at `last`."""
    learned = [i + 1 for i in example.learned]  # targets[i] is token i + 1
    if not learned:
        return 0, 0, 0
    end = start = learned[-1] + 1
    known = set(learned)
    while start - 1 in known:
        start -= 1
    return start, end, max((i + 1 for i in learned if i < start), default=0)


def _frame(template: Template) -> tuple[str, str]:
    """What a rendered conversation has right before its user's text, in later turns too, and right after it."""
    asked = (Message("user", PROBE), Message("assistant", "."), Message("user", PROBE))
    try:
        pieces = template.render(asked).split(PROBE)
    except RowError:  # a template that knows one question only
        return "", ""
    if len(pieces) != 3:
        return "", ""
    first, between, after = pieces
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(first), reversed(between), strict=False))
    return "".join(letter for letter, _same in alike)[::-1], after


def _plain(template: Template, ids: list[int]) -> str:
    return str(template.tokenizer.decode(ids, skip_special_tokens=True)).strip()
