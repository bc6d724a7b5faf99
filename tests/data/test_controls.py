"""The controls: rationales of other rows, or with their words in random order."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_distill.data.controls import permute_rationales, shuffle_rationales
from lit_distill.data.selection import UsedRows
from lit_distill.errors import UserError
from lit_distill.tasks import Row, TeacherOutput
from tests.rows import make_row


def rows(count: int) -> list[Row]:
    return [make_row(str(i), f"in {i}", "yes", None, f"because {i}", "yes") for i in range(count)]


@given(st.lists(st.booleans(), min_size=2, max_size=60).filter(lambda has: sum(has) > 1), st.integers(0, 2**32 - 1))
def test_no_rationale_stays_with_its_row(has: list[bool], seed: int) -> None:
    examples = [make_row(str(i), f"in {i}", "yes", None, f"because {i}" if one else None) for i, one in enumerate(has)]
    used = shuffle_rationales(UsedRows(examples, ["yes"] * len(has), {"used": len(has)}, np.flatnonzero(has)), seed)
    assert [(one.id, one.input, one.label) for one in used.rows] == [(o.id, o.input, o.label) for o in examples]
    # the same rationales, in other places, and none where there was none
    assert sorted(filter(None, (one.rationale for one in used.rows))) == sorted(
        filter(None, (one.rationale for one in examples))
    )
    assert [one.rationale is not None for one in used.rows] == has
    assert all(one.rationale is None or one.rationale != f"because {one.id}" for one in used.rows)
    assert used.counts == {"used": len(has), "rationale_shuffled": sum(has)}


def test_permuted_rationales_have_the_same_words() -> None:
    row = Row("a", "in", "yes", outputs=(TeacherOutput("a b c d e f g", "no"), TeacherOutput(None, "yes")))
    used = UsedRows([row, replace(row, id="b")], ["yes"] * 2, {}, np.arange(2))
    one, other = permute_rationales(used, 0).rows
    for found in (one, other):
        assert sorted(str(found.rationale).split()) == list("abcdefg")
        assert [output.label for output in found.outputs] == ["no", "yes"]
        assert found.outputs[1].text is None
    assert len({str(one.rationale), str(other.rationale), row.rationale}) == 3
    assert permute_rationales(used, 0).rows[0] == one != permute_rationales(used, 1).rows[0]


def test_seeds_pair_differently() -> None:
    used = UsedRows(rows(50), ["yes"] * 50, {}, np.arange(50))
    pairings = [tuple(one.rationale for one in shuffle_rationales(used, seed).rows) for seed in (0, 0, 1)]
    assert pairings[0] == pairings[1] != pairings[2]


def test_one_rationale_cannot_be_exchanged() -> None:
    with pytest.raises(UserError, match="rationales of two rows or more, and 1 has one"):
        shuffle_rationales(UsedRows(rows(1), ["yes"], {}, np.arange(1)), 0)


def test_a_shuffled_output_does_not_tell_the_label() -> None:
    some = [Row(str(i), "in", f"label {i}", outputs=(TeacherOutput(f"so {i}", f"said {i}"),)) for i in range(5)]
    used = UsedRows(some, [None] * 5, {}, np.arange(5))
    for row in shuffle_rationales(used, 0).rows:
        assert [output.label for output in row.outputs] == [str(row.rationale).replace("so", "said")]
    # a teacher's labels are the rows' already
    assert all(row.outputs[0].label is None for row in shuffle_rationales(used, 0, teacher_labels=True).rows)
