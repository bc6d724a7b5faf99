"""Packing, grouping and masks, by hand and by their properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_distill.students.fast.packing import AttentionPlan, Packing, Slots, groups_of

INF = float("inf")
LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=12)


def test_a_packing_by_hand() -> None:
    packing = Packing([3, 1, 2])
    assert packing.lengths == (3, 1, 2)
    assert packing.starts == (0, 3, 4)
    assert packing.tokens == 6
    # the flattened positions of a 3 x 4 rectangle: 0 1 2 . / 4 . . . / 8 9 . .
    assert packing.positions(4).tolist() == [0, 1, 2, 4, 8, 9]
    assert packing.positions(3).tolist() == [0, 1, 2, 3, 6, 7]


def test_chosen_rows_by_hand() -> None:
    packing = Packing([3, 1, 2])
    chosen = packing.rows([2, 0, 2])
    assert chosen.lengths == (2, 3, 2)
    assert chosen.starts == (4, 0, 4)
    assert chosen.tokens == 6
    assert (packing.lengths, packing.starts) == ((3, 1, 2), (0, 3, 4)), "the packing itself stays"


@pytest.mark.parametrize(
    ("lengths", "width", "expected"),
    [([1], 1, [0]), ([1], 3, [0]), ([1, 1, 1], 2, [0, 2, 4]), ([2, 2], 2, [0, 1, 2, 3]), ([0, 2], 2, [2, 3])],
)
def test_positions_of_short_rows(lengths: list[int], width: int, expected: list[int]) -> None:
    assert Packing(lengths).positions(width).tolist() == expected


def test_positions_pick_the_real_tokens_of_a_padded_batch() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0], [9, 10, 0, 0]])
    assert ids.flatten()[Packing([3, 1, 2]).positions(4)].tolist() == [5, 6, 7, 8, 9, 10]


@given(LENGTHS, st.sampled_from([0.5, 0.75, 0.9, 1.0]))
@settings(max_examples=60, deadline=None)
def test_groups_are_filled_and_have_each_row_once(lengths: list[tuple[int, int]], filled: float) -> None:
    queries, keys = [q for q, _ in lengths], [k for _, k in lengths]
    groups = groups_of(queries, keys, filled)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        rectangle = len(group) * max(queries[r] for r in group) * max(keys[r] for r in group)
        assert sum(queries[r] * keys[r] for r in group) >= filled * rectangle - 1e-9


def test_equal_lengths_are_one_group() -> None:
    assert groups_of([4] * 5, [6] * 5, 1.0) == [[0, 1, 2, 3, 4]]
    assert groups_of([4], [6], 1.0) == [[0]]


def test_full_groups_have_equal_lengths() -> None:
    groups = groups_of([2, 3, 2, 3, 2], [4, 4, 4, 4, 5], 1.0)
    assert sorted(sorted(group) for group in groups) == [[0, 2], [1, 3], [4]]


def test_compacting_by_hand() -> None:
    # rows 2, 0 and 2 of three: tokens 4 5 | 0 1 2, and rows that begin at 0, 2 and 0 of these
    tokens, packing = Packing([3, 1, 2]).rows([2, 0, 2]).compact()
    assert tokens.tolist() == [4, 5, 0, 1, 2]
    assert (packing.lengths, packing.starts, packing.tokens) == ((2, 3, 2), (0, 2, 0), 5)


def test_padding_by_hand() -> None:
    tokens, real = Packing([3, 1, 2]).rows([2, 0]).padded(3)
    assert real.tolist() == [[True, True, False], [True, True, True]]
    assert tokens.tolist() == [[4, 5, 0], [0, 1, 2]]


def test_slots_by_hand() -> None:
    # token t, head h holds 10 t + h; rows of 2 and 1 tokens are padded to 2 positions
    packed = torch.tensor([[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]])
    slots = Slots(Packing([2, 1]), [(0, 1)], heads=2)
    flat = slots.spread(packed).clone()
    assert flat.shape == (8, 1)
    # row 0: head 0, head 1; row 1: head 0, head 1
    empty = [5, 7]
    assert sorted(slots.empty.tolist()) == empty
    assert flat.flatten()[[0, 1, 2, 3, 4, 6]].tolist() == [0, 10, 1, 11, 20, 21]
    assert slots.clear(flat).flatten().tolist() == [0, 10, 1, 11, 20, 0, 21, 0]
    assert torch.equal(slots.gather(flat), packed)


def test_empty_slots_do_not_reach_the_tokens() -> None:
    slots = Slots(Packing([2, 1]).rows([1, 0, 1]), [(1, 0), (2,)], heads=1)
    flat = slots.spread(torch.ones(3, 2))
    flat[slots.empty] = float("nan")
    assert len(slots.empty) == 1
    assert slots.gather(flat).tolist() == [[1, 1], [1, 1], [2, 2]]


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.lists(st.integers(0, 4), min_size=1, max_size=7),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_what_is_spread_is_gathered(lengths: list[int], choice: list[int], heads: int) -> None:
    chosen = [row % len(lengths) for row in choice]
    packing = Packing(lengths)
    own = packing.rows(chosen)
    slots = Slots(own, groups_of(own.lengths, own.lengths), heads)
    assert len(slots.token_of_slot) == sum(rows * heads * width for rows, width in slots.shapes)
    packed = torch.randn(packing.tokens, heads * 3)
    times = torch.tensor([float(chosen.count(row)) for row in range(len(lengths))])
    times = times.repeat_interleave(torch.tensor(lengths))[:, None]
    torch.testing.assert_close(slots.gather(slots.spread(packed)), packed * times)


def allowed(plan: AttentionPlan) -> list[list[list[list[float]]]]:
    """Of each group, row and query, for one head."""
    heads = plan.heads
    return [offsets.unflatten(0, (-1, heads))[:, 0].tolist() for offsets in plan.offsets]


def test_padding_of_sources_is_hidden() -> None:
    own = Packing([2, 3, 3])
    # 22 of 27 positions are real: one group, longest rows first
    (group,) = allowed(AttentionPlan(own, own, 2))
    assert group == [[[0, 0, 0]] * 3, [[0, 0, 0]] * 3, [[0, 0, -INF]] * 3]


def test_the_future_is_hidden() -> None:
    own = Packing([2, 3, 3])
    plan = AttentionPlan(own, own, 2, causal=True)
    (group,) = allowed(plan)
    assert group == [[[0, -INF, -INF], [0, 0, -INF], [0, 0, 0]]] * 3


def test_cross_attention_by_hand() -> None:
    # targets of 1, 2 and 1 tokens look at sources of 1, 4 and 4: two groups, for 1 x 4 fills too little beside 2 x 4
    plan = AttentionPlan(Packing([1, 2, 1]), Packing([1, 4, 4]), 2)
    assert (plan.queries.shapes, plan.keys.shapes) == ([(2, 2), (1, 1)], [(2, 4), (1, 1)])
    assert allowed(plan) == [[[[0, 0, 0, 0]] * 2] * 2, [[[0]]]]


@pytest.mark.parametrize("causal", [False, True])
def test_one_token(causal: bool) -> None:
    own = Packing([1])
    plan = AttentionPlan(own, own, 3, causal=causal)
    assert allowed(plan) == [[[[0]]]]
