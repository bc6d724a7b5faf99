"""Rows in proportion to their weights."""

import math
from collections import Counter

import numpy as np
import pytest

from lit_distill.data.selection import UsedRows
from lit_distill.data.weights import weigh_rows
from lit_distill.errors import UserError
from tests.rows import make_row


def test_rows_occur_in_proportion_to_their_weights() -> None:
    some = [make_row(str(i), "in", "no" if i < 5 else "yes", None, "so" if i % 2 else None) for i in range(10)]
    used = UsedRows(some, [row.label for row in some], {"used": 10}, np.arange(1, 10, 2), majority=0)
    weights = {str(i): float(w) for i, w in enumerate([0, 1, 1, 1, 1, 1, 1, 1, 1, 3.5])}
    expected = {row: 10 * weight / 11.5 for row, weight in weights.items()}
    totals = Counter[str]()
    for seed in range(300):
        weighed = weigh_rows(used, weights, seed)
        numbers = Counter(row.id for row in weighed.rows)
        assert sum(numbers.values()) == len(weighed.gold) == 10
        for row, number in expected.items():
            assert math.floor(number) <= numbers[row] <= math.ceil(number)
        assert list(weighed.gold) == [row.label for row in weighed.rows]
        assert [place in weighed.with_rationale for place in range(10)] == [bool(r.rationale) for r in weighed.rows]
        assert weighed.majority_label == "no"
        assert weighed.counts["left_out_by_weight"] == 10 - len(numbers)
        totals += numbers
    for row, number in expected.items():
        assert totals[row] / 300 == pytest.approx(number, abs=0.1)
    assert list(weigh_rows(used, weights, 1).rows) == list(weigh_rows(used, weights, 1).rows)
    with pytest.raises(UserError, match=r"row_weights: 1 of 10 rows have no weight, such as '9'"):
        weigh_rows(used, {row: 1.0 for row in weights if row != "9"}, 0)
    with pytest.raises(UserError, match="row_weights: all weights are 0"):
        weigh_rows(used, dict.fromkeys(weights, 0.0), 0)
