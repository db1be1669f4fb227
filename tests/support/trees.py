"""Random rows of spans, some behind others, for Hypothesis."""

from collections.abc import Sequence

from hypothesis import strategies as st

from lorasmith.model.row import Span


@st.composite
def trees(draw: st.DrawFn, most: int = 6, longest: int = 12) -> tuple[Span, ...]:
    """Spans end to end, each of its own or behind an earlier one."""
    spans: list[Span] = []
    for i in range(draw(st.integers(1, most))):
        start = spans[-1].end if spans else 0
        spans.append(Span(start, start + draw(st.integers(1, longest)), parent=draw(st.integers(-1, i - 1))))
    return tuple(spans)


def path(spans: Sequence[Span], i: int) -> list[int]:
    """The places of all tokens from the root to the end of span i."""
    earlier = path(spans, spans[i].parent) if spans[i].parent >= 0 else []
    return [*earlier, *range(spans[i].start, spans[i].end)]
