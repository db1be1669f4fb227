import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.config.training import TrainingConfig
from lorasmith.data.dataset.plan import PADDED_ROWS, Plan, pack_rows, plan

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)
LAYOUTS = st.sampled_from(["packed", "padded"])


@st.composite
def plans(draw) -> Plan:
    lengths = draw(LENGTHS)
    cfg = TrainingConfig(
        batch_size=draw(st.integers(1, 6)),
        accumulate=draw(st.integers(1, 3)),
        row_tokens=draw(st.integers(1, 60)),
        epochs=draw(st.sampled_from([0.3, 1, 1.5, 2, 3])),
        max_steps=draw(st.none() | st.integers(1, 30)),
    )
    return plan(lengths, [n // 2 for n in lengths], cfg, draw(st.integers(0, 9)), draw(LAYOUTS))


@given(plans())
def test_every_example_stands_once_in_each_whole_epoch(made):
    per_epoch = made.steps_per_epoch
    for first in range(0, len(made) - per_epoch + 1, per_epoch):
        seen = [i for k in range(first, first + per_epoch) for row in made[k] for i in row]
        assert sorted(seen) == list(range(len(made.lengths)))


@given(plans(), st.integers(0, 30))
def test_a_sum_over_all_steps_is_that_of_each(made, since):
    since = min(since, len(made))
    wanted = sum(made.lengths[i] for k in range(since, len(made)) for i in made.members(k))
    assert made.total(made.lengths, since) == wanted


def test_a_sum_over_a_million_steps_takes_no_time():
    lengths = [3, 5, 7]
    made = plan(lengths, lengths, TrainingConfig(batch_size=2, max_steps=999_999), 0, "packed")
    assert made.total(lengths) == 499_999 * 15 + sum(lengths[i] for i in made.members(999_998))


@given(plans())
def test_a_step_has_its_examples_and_its_counts(made):
    for k in range(len(made)):
        members = [i for row in made[k] for i in row]
        left = len(made.lengths) - (k % made.steps_per_epoch) * made.step_examples
        assert len(members) == min(made.step_examples, left)
        assert made.targets(k) == sum(made.n_targets[i] for i in members)


@given(plans())
def test_rows_keep_their_budget_or_hold_one_example(made):
    for k in range(len(made)):
        for row in made[k]:
            lengths = [made.lengths[i] for i in row]
            size = sum(lengths) if made.layout == "packed" else len(row) * max(lengths)
            assert size <= made.row_tokens or len(row) == 1
            assert row, "an empty row"
            assert made.layout == "packed" or len(row) <= PADDED_ROWS


@given(plans())
def test_first_fit_wastes_less_than_half(made):
    """No two packed rows would fit in one: what a smaller budget of memory would pay for in forwards."""
    if made.layout == "packed":
        for k in range(len(made)):
            sizes = sorted(sum(made.lengths[i] for i in row) for row in made[k])
            assert len(sizes) < 2 or sizes[0] + sizes[1] > made.row_tokens


@given(plans(), st.integers(1, 5))
def test_ranks_partition_the_examples_and_get_as_many_tokens(made, world):
    for k in range(len(made)):
        shares = [made.of_rank(k, rank, world) for rank in range(world)]
        assert sorted(i for share in shares for row in share for i in row) == sorted(made.members(k))
        tokens = [sum(made.lengths[i] for row in share for i in row) for share in shares]
        assert max(tokens) - min(tokens) <= max(made.lengths[i] for i in made.members(k))
        assert all(share for share in shares) or len(made.members(k)) < world, "a rank idles"
        for row in (row for share in shares for row in share):
            lengths = [made.lengths[i] for i in row]
            size = sum(lengths) if made.layout == "packed" else len(row) * max(lengths)
            assert size <= made.row_tokens or len(row) == 1


@given(plans())
def test_one_process_computes_the_plan_as_it_stands(made):
    assert all(made.of_rank(k, 0, 1) == made[k] for k in range(len(made)))


def test_a_step_of_one_row_is_shared_by_the_ranks():
    """Eight short examples fill one row of the default length; each of four processes gets two of them."""
    made = plan([30, 10, 20, 40, 25, 15, 35, 5], [1] * 8, TrainingConfig(), 0, "packed")
    assert len(made[0]) == 1
    assert [sum(map(len, made.of_rank(0, rank, 4))) for rank in range(4)] == [2, 2, 2, 2]


@given(LENGTHS, LAYOUTS, st.integers(0, 2**32 - 1))
def test_same_seed_same_plan(lengths, layout, seed):
    cfg = TrainingConfig(batch_size=3, epochs=2)
    first, second = (plan(lengths, lengths, cfg, seed, layout) for _ in range(2))
    assert [first[k] for k in range(len(first))] == [second[k] for k in range(len(second))]


def test_the_layout_and_the_budget_decide_rows_never_steps():
    lengths = [3, 9, 4, 1, 7, 7, 2]
    options = [("packed", 2048), ("packed", 8), ("padded", 2048)]
    made = [plan(lengths, lengths, TrainingConfig(batch_size=3, row_tokens=n), 5, layout) for layout, n in options]
    steps = [[sorted(i for row in one[k] for i in row) for k in range(len(one))] for one in made]
    assert steps[0] == steps[1] == steps[2]
    assert made[0][0] != made[1][0]


def test_another_seed_and_another_epoch_draw_another_order():
    lengths = list(range(1, 31))
    one, two = (plan(lengths, lengths, TrainingConfig(batch_size=30, epochs=2), seed, "packed") for seed in (0, 1))
    assert one.members(0) != two.members(0)
    assert one.members(0) != one.members(1)
    # The very order is pinned: a run of another version or machine must resume on the same examples.
    assert one.members(0)[:6] == [8, 18, 20, 11, 28, 27]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"epochs": 1}, 10),
        ({"epochs": 1.1}, 11),
        ({"epochs": 0.25}, 3),
        ({"epochs": 0.001}, 1),
        ({"epochs": 2, "max_steps": 3}, 3),
        ({"epochs": 1, "max_steps": 25}, 25),
        ({"epochs": 1, "batch_size": 1, "accumulate": 8}, 10),
    ],
)
def test_steps(options, steps):
    made = plan([5] * 79, [1] * 79, TrainingConfig(**{"batch_size": 8} | options), 0, "packed")
    assert len(made) == steps
    assert made[steps - 1]
    with pytest.raises(IndexError):
        made[steps]


def test_epoch_is_whole_exactly_at_its_last_step():
    made = plan([5] * 79, [1] * 79, TrainingConfig(batch_size=8, max_steps=25), 0, "packed")
    assert [k for k in range(25) if made.epoch(k).is_integer()] == [9, 19]
    assert made.epoch(0) == pytest.approx(8 / 79)
    assert math.isclose(made.epoch(24), 2 + 40 / 79)


def test_padded_rows_are_neighbors_in_length():
    made = plan([1, 10, 2, 9, 3], [1] * 5, TrainingConfig(batch_size=5, row_tokens=20), 0, "padded")
    assert made[0] == [[1, 3], [4, 2], [0]]


def test_packed_rows_are_filled_longest_first():
    made = plan([1, 10, 2, 9, 3, 30], [1] * 6, TrainingConfig(batch_size=6, row_tokens=13), 0, "packed")
    assert made[0] == [[5], [1, 4], [3, 2, 0]]


@given(LENGTHS, LAYOUTS, st.integers(1, 60))
def test_rows_of_a_whole_set_hold_each_example_once(lengths, layout, row_tokens):
    rows = pack_rows(lengths, row_tokens, layout)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))


def test_no_examples_is_an_error():
    with pytest.raises(ValueError, match="0 lengths"):
        plan([], [], TrainingConfig(), 0, "packed")
