"""Which rows each rank sees."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from lit_distill.batch import PADDING_ROW
from lit_distill.data import batches
from lit_distill.data.batches import EpochSampler
from lit_distill.errors import UserError


def passes(rows: int, world: int, **settings: object) -> list[list[int]]:
    return [list(EpochSampler(range(rows), world, rank, **settings)) for rank in range(world)]  # type: ignore[arg-type]


def cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def skewed(rows: int) -> list[int]:
    """Lengths as of rationales: many short ones, a few very long ones."""
    draw = random.Random(rows)  # noqa: S311 - test data
    return [round(draw.lognormvariate(4, 0.7)) for _ in range(rows)]


def padding(batches: list[list[int]], lengths: Sequence[int]) -> float:
    """The part of the batches' positions that is padding."""
    real = sum(lengths[row] for batch in batches for row in batch)
    return 1 - real / sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)


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


lengths_lists = st.lists(st.integers(0, 30), min_size=1, max_size=60)


@given(lengths=lengths_lists, world=st.integers(1, 4), batch_size=st.integers(1, 7), epoch=st.integers(0, 3))
def test_by_length_covers_every_row_and_wraps(lengths: list[int], world: int, batch_size: int, epoch: int) -> None:
    rows = len(lengths)
    ranks = []
    for rank in range(world):
        sampler = EpochSampler(range(rows), world, rank, seed=1, lengths=lengths, batch_size=batch_size)
        sampler.set_epoch(epoch)
        assert len(sampler) == -(-rows // world)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    seen = Counter(row for rank in ranks for row in rank)
    # the last round is filled with rows that were seen before, one more time each before any is seen twice more
    assert set(seen) == set(range(rows))
    assert max(seen.values()) - min(seen.values()) <= 1
    assert seen.total() == -(-rows // world) * world


@given(
    lengths=lengths_lists, world=st.integers(1, 3), batch_size=st.integers(1, 7), most=st.sampled_from([1, 2, 3, 50])
)
def test_windows_of_the_shuffled_order_are_sorted(lengths: list[int], world: int, batch_size: int, most: int) -> None:
    rows, size = len(lengths), batch_size * world
    with patch.object(batches, "WINDOW", most):
        ranks = [cut(rank, batch_size) for rank in passes(rows, world, lengths=lengths, batch_size=batch_size)]
    steps = [[row for batch in step for row in batch] for step in zip(*ranks, strict=True)]
    whole, rest = [step for step in steps if len(step) == size], [step for step in steps if len(step) < size]
    assert steps == whole + rest
    # by hand: the same permutation, a window at a time, a quarter of the epoch at most; what is over comes last
    plain = passes(rows, world)
    order = [plain[p % world][p // world] for p in range(sum(map(len, plain)))]
    window = size * max(1, min(most, len(order) // size // 4))
    filled = len(order) - len(order) % size
    expected = [
        batch for part in cut(order[:filled], window) for batch in cut(sorted(lengths[row] for row in part), size)
    ]
    assert sorted(sorted(lengths[row] for row in step) for step in whole) == sorted(expected)
    assert [Counter(step) for step in rest] == [Counter(part) for part in [order[filled:]] if part]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_by_length_pads_less_and_alike_on_all_ranks(world: int) -> None:
    lengths = skewed(2000)
    shares, waiting = [], []
    for own in (None, lengths):
        ranks = [cut(rank, 8) for rank in passes(2000, world, lengths=own, batch_size=8)]
        shares.append(padding([batch for rank in ranks for batch in rank], lengths))
        longest = [[max(lengths[row] for row in batch) for batch in rank] for rank in ranks]
        # ranks wait at each step for the one with the longest rows
        waiting.append(sum(max(step) - min(step) for step in zip(*longest, strict=True)))
    assert shares[0] > 0.4
    assert shares[1] < 0.2
    assert waiting[1] < 0.2 * waiting[0] or world == 1


def test_by_length_the_batches_come_in_a_random_order() -> None:
    lengths = skewed(800)
    batches = cut(list(EpochSampler(lengths, lengths=lengths, batch_size=8)), 8)
    means = [sum(lengths[row] for row in batch) for batch in batches]
    rising = sum(after > before for before, after in pairwise(means))
    assert 30 < rising < 70  # of 99
    # nor is the last batch always of the shortest or the longest rows
    last = []
    for epoch in range(20):
        sampler = EpochSampler(lengths[:-4], lengths=lengths[:-4], batch_size=8)
        sampler.set_epoch(epoch)
        last.append(max(lengths[row] for row in list(sampler)[-4:]))
    assert min(last) < sorted(lengths)[500] < sorted(lengths)[760] < max(last)


def test_by_length_epochs_differ_and_repeat() -> None:
    def order(epoch: int, seed: int = 3) -> list[int]:
        sampler = EpochSampler(range(100), seed=seed, lengths=skewed(100), batch_size=4)
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch + seed)  # of no effect
        return list(sampler)

    orders = [order(0), order(1), order(0, seed=4)]
    assert all(one != other for i, one in enumerate(orders) for other in orders[:i])
    assert order(1) == orders[1]
    # rows meet other rows in other epochs, even where there are few batches
    together = [{frozenset(batch) for batch in cut(found, 4)} for found in orders]
    assert len(together[0] & together[1]) < 3


def test_equal_lengths_are_shuffled_as_ever() -> None:
    order = list(EpochSampler(range(100), lengths=[7] * 100, batch_size=4))
    assert sorted(order) == list(range(100))
    assert {tuple(batch) for batch in cut(order, 4)} == {
        tuple(batch) for batch in cut(list(EpochSampler(range(100))), 4)
    }


def test_fewer_rows_than_a_batch_are_one_batch() -> None:
    assert sorted(EpochSampler(range(3), lengths=[5, 1, 3], batch_size=8)) == [0, 1, 2]
    assert passes(1, 3, lengths=[5], batch_size=8) == [[0]] * 3
    assert list(EpochSampler([], lengths=[], batch_size=8)) == []


@given(lengths=st.lists(st.integers(0, 9), max_size=40), world=st.integers(1, 4))
def test_evaluation_by_length_reads_the_longest_rows_first(lengths: list[int], world: int) -> None:
    ranks = passes(len(lengths), world, shuffle=False, lengths=lengths)
    rounds = -(-len(lengths) // world)
    order = [ranks[p % world][p // world] for p in range(rounds * world)]
    assert order[len(lengths) :] == [PADDING_ROW] * (rounds * world - len(lengths))
    assert sorted(order[: len(lengths)]) == list(range(len(lengths)))
    for row, after in pairwise(order[: len(lengths)]):
        assert (-lengths[row], row) < (-lengths[after], after)


def test_orders_are_those_of_earlier_checkpoints() -> None:
    # written down before the order was kept in arrays
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    plain: list[list[int]] = []
    similar: list[list[int]] = []
    for rank in range(2):
        for found, settings in ((plain, {}), (similar, {"lengths": lengths, "batch_size": 2})):
            sampler = EpochSampler(range(11), 2, rank, seed=3, **settings)  # type: ignore[arg-type]
            sampler.set_epoch(2)
            found.append(list(sampler))
    assert plain == [[5, 8, 2, 7, 4, 6], [9, 10, 0, 1, 3, 5]]
    assert similar == [[3, 4, 1, 2, 9, 10], [6, 5, 0, 7, 8, 5]]
    longest = list(EpochSampler(range(11), shuffle=False, lengths=lengths))
    assert longest == [5, 7, 4, 8, 10, 2, 0, 9, 6, 1, 3]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("lengths", [None, skewed(100)])
def test_an_order_in_a_file_is_the_same_and_goes_on_anywhere(
    shuffle: bool, lengths: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = EpochSampler(range(100), 3, 1, shuffle, lengths=lengths, batch_size=4)
    whole = list(sampler)
    monkeypatch.setattr(batches, "IN_MEMORY", 10)
    monkeypatch.setattr(batches, "CHUNK", 7)
    monkeypatch.setenv("LIT_DISTILL_CACHE", str(tmp_path / "cache"))
    for skipped in (0, 6, 7, 33, 34, 40):
        assert list(sampler.after(skipped)) == whole[skipped:]
    if not (shuffle or lengths):
        return  # no order to keep
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIT_DISTILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"the order of 10[02] rows cannot be kept in .*; set LIT_DISTILL_CACHE"):
        list(sampler)
