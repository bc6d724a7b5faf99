"""Attention of packed rows against softmax(Q K^T + B) V, row by row without any padding."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_distill.students.fast.attention import attention
from lit_distill.students.fast.packing import AttentionPlan, Packing
from tests.students.fast.examples import check_with_gradients

HEADS, SIZE = 2, 3

Plan = partial[AttentionPlan]


def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, plan: Plan, p: float = 0.0) -> Tensor:
    return attention(q, k, v, plan(bias=bias, dtype=q.dtype), p)


def longest(plan: Plan) -> tuple[int, int]:
    """Positions of the longest row of queries, and of keys."""
    made = plan()
    return max(width for _, width in made.queries.shapes), max(width for _, width in made.keys.shapes)


def plainly(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Sequence[tuple[slice, slice]], *, causal: bool
) -> Tensor:
    """Each row by itself; ``rows`` says where its queries and its keys are."""
    return torch.cat([plain_row(q[own], k[seen], v[seen], bias, causal=causal) for own, seen in rows])


def plain_row(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: Tensor | None = None, *, causal: bool
) -> Tensor:
    heads_of = [x.unflatten(1, (HEADS, -1)).transpose(0, 1) for x in (q, k, v)]
    queries, keys, values = heads_of
    scores = queries @ keys.transpose(1, 2)
    if bias is not None:
        scores = scores + bias[0, :, : len(q), : len(k)]
    if causal:
        scores = scores.masked_fill(torch.ones(len(q), len(k)).triu(1).bool(), float("-inf"))
    weights = torch.softmax(scores, -1)
    if scale is not None:
        weights = weights * scale
    out: Tensor = (weights @ values).transpose(0, 1).flatten(1)
    return out


def slices(packing: Packing) -> list[slice]:
    return [slice(s, s + n) for s, n in zip(packing.starts, packing.lengths, strict=True)]


def check(queries: Packing, keys: Packing, *, causal: bool, with_bias: bool) -> None:
    plan = partial(AttentionPlan, queries, keys, HEADS, causal=causal)
    q = torch.randn(queries.tokens, HEADS * SIZE, requires_grad=True)
    k, v = (torch.randn(keys.tokens, HEADS * SIZE, requires_grad=True) for _ in range(2))
    bias = torch.randn(1, HEADS, *longest(plan), requires_grad=True) if with_bias else None
    found = ours(q, k, v, bias, plan)
    expected = plainly(q, k, v, bias, list(zip(slices(queries), slices(keys), strict=True)), causal=causal)
    check_with_gradients(found, expected, [q, k, v] if bias is None else [q, k, v, bias])


SETS = [[1], [5], [1, 1, 1], [4, 4], [3, 1, 7, 2], [12, 1, 11, 2, 12], [2, 30]]


@pytest.mark.parametrize("lengths", SETS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(lengths: list[int], causal: bool) -> None:
    own = Packing(lengths)
    check(own, own, causal=causal, with_bias=True)


@pytest.mark.parametrize(
    ("targets", "sources"), [([1], [6]), ([6], [1]), ([3, 1, 7, 2], [5, 9, 1, 2]), ([2, 2, 2], [1, 20, 3])], ids=str
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_cross_attention(targets: list[int], sources: list[int], with_bias: bool) -> None:
    check(Packing(targets), Packing(sources), causal=False, with_bias=with_bias)


@pytest.mark.parametrize("rows", [[0, 0], [2, 0, 2, 2], [1], [2, 1, 0], [0, 1, 2]], ids=str)
def test_rows_that_are_looked_at_several_times_or_not_at_all(rows: list[int]) -> None:
    sources = Packing([4, 1, 6])
    check(Packing([2, 3, 1, 5][: len(rows)]), sources.rows(rows), causal=False, with_bias=False)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=6), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_lengths(lengths: list[tuple[int, int]], with_bias: bool) -> None:
    queries, keys = Packing([q for q, _ in lengths]), Packing([k for _, k in lengths])
    check(queries, keys, causal=False, with_bias=with_bias)
    check(queries, queries, causal=True, with_bias=with_bias)


def test_by_hand() -> None:
    # two keys with scores ln 1 and ln 3: weights 1/4 and 3/4
    own, seen = Packing([1]), Packing([2])
    plan = partial(AttentionPlan, own, seen, 1)
    q, k = torch.ones(1, 1), torch.tensor([[0.0], [3.0]]).clamp(min=1).log()
    out = ours(q, k, torch.tensor([[4.0], [8.0]]), None, plan)
    torch.testing.assert_close(out, torch.tensor([[7.0]]))


def test_large_scores_stay_finite() -> None:
    own = Packing([3, 2])
    plan = partial(AttentionPlan, own, own, HEADS, causal=True)
    q, k, v = (torch.randn(5, HEADS * SIZE) * 200 for _ in range(3))
    q.requires_grad_()
    out = ours(q, k, v, None, plan)
    torch.testing.assert_close(out, plainly(q, k, v, None, [(s, s) for s in slices(own)], causal=True))
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("causal", [False, True])
def test_with_dropout_each_weight_is_kept_or_not(causal: bool) -> None:
    p, lengths = 0.3, [4, 1, 3, 4, 6]
    own = Packing(lengths)
    plan = partial(AttentionPlan, own, own, HEADS, causal=causal)
    # equal scores and values that name their key show the mask: the output is factor * mask / keys
    named = torch.cat([torch.eye(length, 6).repeat(1, HEADS) for length in lengths])
    zeros = torch.zeros(own.tokens, HEADS * 6)
    torch.manual_seed(5)
    seen = ours(zeros, zeros, named, None, plan, p).unflatten(1, (HEADS, 6)) != 0
    factor = 65536 / (65536 - round(p * 65536))
    q, k, v = (torch.randn(own.tokens, HEADS * SIZE, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, HEADS, *longest(plan), requires_grad=True)
    torch.manual_seed(5)
    found = ours(q, k, v, bias, plan, p)
    expected = torch.cat(
        [
            plain_row(
                q[s], k[s], v[s], bias, factor * seen[s, :, : s.stop - s.start].transpose(0, 1).float(), causal=causal
            )
            for s in slices(own)
        ]
    )
    assert 0.5 < float(seen.sum()) / (HEADS * sum(n * (n + 1) / 2 if causal else n * n for n in lengths)) < 0.9
    check_with_gradients(found, expected, [q, k, v, bias])


def test_dropout_keeps_the_mean() -> None:
    own = Packing([3, 5])
    plan = partial(AttentionPlan, own, own, HEADS)
    q, k, v = (torch.randn(8, HEADS * SIZE) for _ in range(3))
    torch.manual_seed(0)
    draws = torch.stack([ours(q, k, v, None, plan, 0.25) for _ in range(1500)])
    error = draws.std(0) / len(draws) ** 0.5
    # 48 numbers: 4.5 standard errors
    assert bool(((draws.mean(0) - ours(q, k, v, None, plan)).abs() < 4.5 * error).all())


def test_bfloat16_is_near() -> None:
    own = Packing([3, 5, 2])
    plan = partial(AttentionPlan, own, own, HEADS, causal=True)
    inputs = [torch.randn(10, HEADS * SIZE).bfloat16().requires_grad_() for _ in range(3)]
    bias = torch.randn(1, HEADS, *longest(plan), requires_grad=True)
    found = ours(inputs[0], inputs[1], inputs[2], bias, plan)
    whole = [x.detach().float().requires_grad_() for x in inputs]
    expected = plainly(whole[0], whole[1], whole[2], bias, [(s, s) for s in slices(own)], causal=True)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)
    towards = torch.randn(found.shape)
    left = torch.autograd.grad(found, [*inputs, bias], towards.bfloat16())
    right = torch.autograd.grad(expected, [*whole, bias], towards)
    assert [x.dtype for x in left] == [torch.bfloat16] * 3 + [torch.float32]
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x.float(), y, rtol=0.05, atol=0.08)


def test_a_summed_output() -> None:
    # whose gradient is one number, repeated
    own = Packing([3, 2])
    plan = partial(AttentionPlan, own, own, HEADS)
    q, k, v = (torch.randn(5, HEADS * SIZE, requires_grad=True) for _ in range(3))
    out = ours(q, k, v, None, plan)
    found = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))


@pytest.mark.parametrize("which", ["gradient", "inputs"])
def test_any_layout(which: str) -> None:
    own = Packing([3, 2])
    plan = partial(AttentionPlan, own, own, HEADS)
    q, k, v = (torch.randn(HEADS * SIZE, 5, requires_grad=True) for _ in range(3))
    towards = torch.randn(HEADS * SIZE, 5).t()
    if which == "gradient":
        out = ours(q.t().contiguous(), k.t().contiguous(), v.t().contiguous(), None, plan)
    else:
        out, towards = ours(q.t(), k.t(), v.t(), None, plan), towards.contiguous()
    expected = plainly(q.t(), k.t(), v.t(), None, [(s, s) for s in slices(own)], causal=False)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), towards), torch.autograd.grad(expected, (q, k, v), towards)
    )
