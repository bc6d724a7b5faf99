"""Which demonstrations are shown with a row."""

from collections.abc import Sequence

import pytest

from lit_distill.annotation.prompts import Choose, Demonstration, fixed, nearest
from lit_distill.errors import UserError
from lit_distill.tasks import Row


def example(text: str, rationale: str = "because") -> Demonstration:
    return Demonstration(input=text, label="x", rationale=rationale)


BIRDS = example("owl swan crow")
TREES = example("oak pine birch")
MIXED = example("owl oak pine lemon")
METAL = example("tin zinc")
ALL = (BIRDS, TREES, MIXED, METAL)


def inputs(choose: Choose, text: str) -> list[str]:
    return [one.input for one in choose(Row("r", text, None))]


def texts(examples: Sequence[Demonstration]) -> list[str]:
    return [one.input for one in examples]


def test_all_whatever_the_row() -> None:
    for row in ("owl swan", "nothing of it", ""):
        assert inputs(fixed(ALL), row) == texts(ALL)


def test_a_row_is_not_shown_itself() -> None:
    assert inputs(fixed(ALL), TREES.input) == texts((BIRDS, MIXED, METAL))
    assert TREES.input not in inputs(nearest(ALL, 4), TREES.input)
    # as often as it is there
    again = [*ALL, example(TREES.input, "so")]
    assert TREES.input not in inputs(nearest(again, 5), TREES.input) + inputs(fixed(again), TREES.input)


def test_the_most_like_row_stands_last() -> None:
    choose = nearest(ALL, 2)
    # oak pine, side by side: three words and pairs of TREES, and three of the longer MIXED
    assert inputs(choose, "oak pine birch elm") == texts((MIXED, TREES))
    assert inputs(choose, "swan crow owl") == texts((MIXED, BIRDS))
    assert inputs(nearest(ALL, 1), "a tin of zinc") == texts((METAL,))
    assert inputs(nearest(ALL, 3), "lemon owl oak")[-1] == MIXED.input


def test_pairs_of_words_count() -> None:
    pairs = (example("a b c d"), example("d c b a"))
    assert inputs(nearest(pairs, 1), "b a d c") == ["d c b a"]
    assert inputs(nearest(pairs[::-1], 1), "a b c x") == ["a b c d"]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_as_many_as_are_asked_for(count: int) -> None:
    assert len(inputs(nearest(ALL, count), "owl oak tin")) == min(count, 4)


def test_of_those_that_are_as_like_the_first_are_taken() -> None:
    same = tuple(example("owl swan", str(i)) for i in range(6))
    chosen = nearest(same, 3)(Row("r", "a swan", None))
    assert [one.rationale for one in chosen] == ["2", "1", "0"]
    # of nothing that is known, all are as like
    assert inputs(nearest(ALL, 2), "quite unheard of") == texts((TREES, BIRDS))
    assert inputs(nearest(ALL, 2), "") == texts((TREES, BIRDS))


def test_choices_do_not_depend_on_what_was_asked_before() -> None:
    choose = nearest(ALL, 3)
    first = inputs(choose, "oak owl zinc")
    inputs(choose, "lemon")
    assert inputs(choose, "oak owl zinc") == first == inputs(nearest(ALL, 3), "oak owl zinc")


@pytest.mark.parametrize("shown", [(), (example("? !"), example("..."))])
def test_without_words_there_is_nothing_to_compare(shown: tuple[Demonstration, ...]) -> None:
    with pytest.raises(UserError, match="nearest_demonstrations: the demonstrations' inputs have no words"):
        nearest(shown, 1)
