"""Processes that share the work on many rows."""

from collections.abc import Iterator

import pytest

from lit_distill.data.workers import in_order
from lit_distill.errors import UserError


def test_processes_keep_the_order() -> None:
    made = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    squares = in_order(lambda number: number**2, numbers())
    assert next(squares) == 0
    # so that what waits for its turn does not fill the memory
    assert len(made) < 60
    assert list(squares) == [number**2 for number in range(1, 100)]


def test_an_error_comes_from_the_process_that_had_it() -> None:
    def work(number: int) -> int:
        if number > 20:
            raise UserError(f"{number} is too many")
        return number

    with pytest.raises(UserError, match=r"^21 is too many$"):
        list(in_order(work, range(100)))
