"""Which rows each rank sees."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from lit_distill.batch import PADDING_ROW
from lit_distill.data.sampler import EpochSampler


def passes(rows: int, world: int, **settings: int | bool) -> list[list[int]]:
    return [list(EpochSampler(range(rows), world, rank, **settings)) for rank in range(world)]  # type: ignore[arg-type]


def test_lightning_takes_it_for_a_distributed_sampler() -> None:
    assert isinstance(EpochSampler([1, 2]), DistributedSampler)


@given(rows=st.integers(1, 40), world=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_training_covers_every_row_and_wraps(rows: int, world: int, seed: int) -> None:
    ranks = passes(rows, world, seed=seed)
    rounds = -(-rows // world)
    assert [len(rank) for rank in ranks] == [rounds] * world
    # position p of the epoch's order is dealt to rank p % world
    order = [ranks[p % world][p // world] for p in range(rounds * world)]
    assert sorted(order[:rows]) == list(range(rows))
    assert order[rows:] == [order[p % rows] for p in range(rows, rounds * world)]


@given(rows=st.integers(0, 40), world=st.integers(1, 9))
def test_evaluation_sees_each_row_once_in_order(rows: int, world: int) -> None:
    ranks = passes(rows, world, shuffle=False)
    rounds = -(-rows // world)
    order = [ranks[p % world][p // world] for p in range(rounds * world)]
    assert order == list(range(rows)) + [PADDING_ROW] * (rounds * world - rows)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    sampler = EpochSampler(range(50), seed=3)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    torch.manual_seed(99)
    before = torch.get_rng_state()
    other = EpochSampler(range(50), seed=3)
    other.set_epoch(1)
    assert list(other) == second
    assert torch.equal(torch.get_rng_state(), before)
    # a neighbouring seed's epochs are not this seed's, one later
    neighbour = EpochSampler(range(50), seed=4)
    assert list(neighbour) not in (first, second)


def test_resume_goes_on_where_a_pass_was_left() -> None:
    sampler = EpochSampler(range(21), 2, 1, seed=5)
    sampler.set_epoch(7)
    whole = list(sampler)
    resumed = EpochSampler(range(21), 2, 1, seed=5)
    resumed.start(7, 4)
    resumed.set_epoch(7)  # Lightning says the epoch again before each pass
    assert len(resumed) == 11
    assert list(resumed) == whole[4:]
    assert list(resumed) == whole


def test_another_epoch_begins_at_its_beginning() -> None:
    sampler = EpochSampler(range(21), seed=5)
    sampler.start(7, 4)
    sampler.set_epoch(8)
    assert Counter(sampler) == Counter(range(21))


@pytest.mark.parametrize("rows", [10, 11])
def test_resume_at_or_beyond_the_end_is_an_empty_pass(rows: int) -> None:
    sampler = EpochSampler(range(10))
    sampler.start(0, rows)
    assert list(sampler) == []
