"""Cross-attention of few queries against keys and values made plainly, and both ways in one student."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lit_distill.students.fast import attention as few_queries_module
from lit_distill.students.fast.attention import FewQueries, few_queries
from lit_distill.students.fast.packing import Packing
from lit_distill.students.fast.t5 import encode, log_likelihoods
from tests.students.fast.examples import (
    TASKS,
    VARIANTS,
    check_with_gradients,
    compare,
    fast_losses,
    make_student,
    make_task,
    target_losses,
)

HEADS, SIZE, WIDTH = 2, 3, 5


def test_rows_that_pay_by_hand() -> None:
    # with 2 heads of 3 on 4 wide states: n (3 + s) 2 4 against half of 2 3 s (4 + n)
    # n = 1, s = 6: 72 against 90; n = 1, s = 2: 40 against 30; n = 2, s = 6: 144 against 108
    found = few_queries(Packing([1, 1, 2]), Packing([6, 2, 6]), heads=2, d_model=4, d_kv=3)
    assert found == [0]


@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3], [3, 1], [2]], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_values_and_gradients(rows: list[int], p: float) -> None:
    queries, sources = Packing([2, 1, 3, 2]), Packing([4, 6, 1, 3])
    # the last two targets ask the same source
    asked = sources.rows([1, 0, 3, 3])
    q = torch.randn(queries.tokens, HEADS * SIZE, requires_grad=True)
    encoded = torch.randn(sources.tokens, WIDTH, requires_grad=True)
    key, value = (nn.Linear(WIDTH, HEADS * SIZE, bias=False) for _ in range(2))
    few = FewQueries(queries, asked, rows, HEADS, encoded)
    torch.manual_seed(3)
    found = few.attend(SimpleNamespace(k=key, v=value), q, p)
    tokens = [queries.starts[row] + i for row in rows for i in range(queries.lengths[row])]
    assert few.tokens.tolist() == tokens
    # by row, and the mask as the same seed gives it to scores that are all equal: from equal states that name
    # themselves, through values that let them pass
    parts = []
    for row in rows:
        own = slice(queries.starts[row], queries.starts[row] + queries.lengths[row])
        seen = slice(asked.starts[row], asked.starts[row] + asked.lengths[row])
        ask, keys, values = (
            x.unflatten(1, (HEADS, SIZE)).transpose(0, 1) for x in (q[own], key(encoded[seen]), value(encoded[seen]))
        )
        weights = torch.softmax(ask @ keys.transpose(1, 2), -1)
        if p:
            kept = kept_weights(queries, asked, rows, p)[row]
            weights = weights * kept
        parts.append((weights @ values).transpose(0, 1).flatten(1))
    expected = torch.cat(parts)
    check_with_gradients(found, expected, (q, encoded, key.weight, value.weight))


def kept_weights(queries: Packing, asked: Packing, rows: list[int], p: float) -> dict[int, torch.Tensor]:
    """What dropout of seed 3 multiplies each row's weights by, ``(heads, queries, keys)``, seen from outside."""
    size = asked.tokens
    few = FewQueries(queries, asked, rows, HEADS, torch.eye(size))
    weights = torch.zeros(HEADS * size, size), torch.eye(size).repeat(HEADS, 1)
    key, value = (SimpleNamespace(weight=weight) for weight in weights)
    torch.manual_seed(3)
    out = few.attend(SimpleNamespace(k=key, v=value), torch.zeros(queries.tokens, HEADS * size), p)
    out = out.unflatten(1, (HEADS, size))
    found, first = {}, 0
    for row in rows:
        length, start, keys = queries.lengths[row], asked.starts[row], asked.lengths[row]
        found[row] = out[first : first + length, :, start : start + keys].transpose(0, 1) * keys
        first += length
    return found


@pytest.mark.parametrize("worth", [0.0, 0.5, 1e9])
@pytest.mark.parametrize("kind", ["v1.1", "original", "wide heads"])
def test_any_share_of_rows(monkeypatch: pytest.MonkeyPatch, worth: float, kind: str) -> None:
    monkeypatch.setattr(few_queries_module, "WORTH", worth)
    student = make_student(1, **VARIANTS[kind])
    compare(student, TASKS)
    compare(student, [make_task([30, 2, 25, 7], [1, 9, 2, 3], seed=4)])


@pytest.mark.parametrize("worth", [0.0, 0.5, 1e9])
def test_rows_of_one_encoding_in_any_order(monkeypatch: pytest.MonkeyPatch, worth: float) -> None:
    monkeypatch.setattr(few_queries_module, "WORTH", worth)
    student = make_student(1)
    right = target_losses(student, TASKS)
    # every source row once, in another order, and a source that two targets share
    labels = [row[row >= 0].tolist() for row in TASKS[0]["labels"]]
    sums = torch.stack([own.sum() for own in right[0].split([len(row) for row in labels])])
    for order in ([3, 1, 0, 2], [2, 2, 1]):
        found = log_likelihoods(student, encode(student, TASKS[:1]), order, [labels[row] for row in order])
        torch.testing.assert_close(-found, sums[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("worth", [0.0, 1e9])
def test_in_bfloat16(monkeypatch: pytest.MonkeyPatch, worth: float) -> None:
    monkeypatch.setattr(few_queries_module, "WORTH", worth)
    student = make_student(1)
    with torch.autocast("cpu", torch.bfloat16):
        losses = torch.stack(fast_losses(student, TASKS))
    torch.testing.assert_close(losses, torch.stack(fast_losses(student, TASKS)), rtol=0.01, atol=0)
    losses.sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in student.parameters())


@pytest.mark.parametrize("name", ["k", "v"])
def test_keys_and_values_that_are_more_than_a_product(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    monkeypatch.setattr(few_queries_module, "WORTH", 1e9)
    student = make_student(1)
    blocks: Any = student.decoder.block
    for block in blocks:
        plain = getattr(block.layer[1].EncDecAttention, name)
        doubled = Doubled(plain.in_features, plain.out_features, bias=False)
        doubled.weight = plain.weight
        setattr(block.layer[1].EncDecAttention, name, doubled)
    compare(student, TASKS)
