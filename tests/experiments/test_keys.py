"""Configs laid over each other as ``fit`` lays them."""

import pytest

from lit_distill.experiments.keys import merge, without_own
from lit_distill.files import flatten

ARGUMENTS = {"One": {"shared", "own"}, "Two": {"shared"}}


def test_what_lies_over_wins() -> None:
    base = {"trainer": {"max_steps": 1, "callbacks": [1, 2]}, "seed_everything": 0}
    over = {"trainer": {"callbacks": [3]}, "seed_everything": 4, "new": {"a": 1}}
    wanted = {"trainer": {"max_steps": 1, "callbacks": [3]}, "seed_everything": 4, "new": {"a": 1}}
    assert merge(base, over, ARGUMENTS.get) == wanted
    # the given ones stay as they are
    assert base["seed_everything"] == 0


@pytest.mark.parametrize(
    ("over", "init_args"),
    [
        ({"class_path": "One"}, {"shared": 1, "own": 2}),
        ({"class_path": "Two"}, {"shared": 1}),
        ({"class_path": "Two", "init_args": {"own": 3}}, {"shared": 1, "own": 3}),
        ({"class_path": "unknown.Class"}, {}),
        ({"init_args": {"own": 5}}, {"shared": 1, "own": 5}),
    ],
)
def test_arguments_that_another_class_does_not_take_go(over: dict[str, object], init_args: dict[str, int]) -> None:
    base = {"model": {"class_path": "One", "init_args": {"shared": 1, "own": 2}}}
    assert merge(base, {"model": over}, ARGUMENTS.get)["model"]["init_args"] == init_args


def test_a_class_by_its_name_alone() -> None:
    merged = merge(
        {"model": "One", "data": "Some"}, {"model": {"init_args": {"own": 1}}, "data": "Other"}, ARGUMENTS.get
    )
    assert merged == {"model": {"class_path": "One", "init_args": {"own": 1}}, "data": {"class_path": "Other"}}


def test_a_run_without_its_place() -> None:
    config = {
        "ckpt_path": "last", "checkpoint": {"dirpath": "x"}, "trainer": {"logger": [1], "max_steps": 2}, "a": {"b": 1},
    }  # fmt: skip
    assert without_own(config) == {"trainer": {"max_steps": 2}, "a": {"b": 1}}
    assert "ckpt_path" in config
    assert flatten(config) == {
        "ckpt_path": "last", "checkpoint.dirpath": "x", "trainer.logger": [1], "trainer.max_steps": 2, "a.b": 1,
    }  # fmt: skip
