"""Names of cells: readable, safe, each point's own, and the same whatever else is in the grid."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_distill.experiments.names import cell_name, value_text

KEYS = ["method", "student", "train_fraction", "label_source", "rationales", "seed", "model.init_args.order", "x.y"]
VALUES = st.one_of(
    st.text(st.sampled_from("ab-_/~+%.01 é\n*A"), min_size=1, max_size=12), st.integers(-3, 3), st.floats(-3, 3),
    st.booleans(), st.none(), st.sampled_from(["gold", "own", "google/t5-v1_1-base", "t5-v1_1-base", "_x", "..", "."]),
)  # fmt: skip


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two points with the same keys."""
    keys = draw(st.lists(st.sampled_from(KEYS), min_size=1, unique=True))
    # students and methods are texts
    texts = st.text(st.sampled_from("ab-_/~+%.01 g"), min_size=1, max_size=12) | st.sampled_from(["google/a-b", "a-b"])
    values = {key: texts if key in ("student", "method") else VALUES for key in keys}
    one, two = ({key: draw(values[key]) for key in keys} for _ in range(2))
    return one, two


@settings(max_examples=500)
@given(pairs())
def test_a_name_is_of_one_point(points: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = points
    same = all(value_text(one[key]) == value_text(two[key]) for key in one)
    # 1 and "1" are the same to fit, whose keys have types
    assert (cell_name(one) == cell_name(two)) == same


@settings(max_examples=500)
@given(pairs(), st.randoms())
def test_a_name_is_safe_and_does_not_depend_on_order(
    points: tuple[dict[str, Any], dict[str, Any]], draw: Any  # noqa: ANN401 - hypothesis's random
) -> None:  # fmt: skip
    point = points[0]
    name = cell_name(point)
    assert re.fullmatch(r"[A-Za-z0-9_%~+][A-Za-z0-9_.%~+-]*", name)
    assert len(name) <= 120
    keys = list(point)
    draw.shuffle(keys)
    assert cell_name({key: point[key] for key in keys}) == name


@pytest.mark.parametrize(
    ("point", "name"),
    [
        (
            {"seed": 1, "label_source": "gold", "train_fraction": 0.5, "method": "step_by_step"},
            "step_by_step-fraction0.5-gold-seed1",
        ),
        ({"method": "standard", "student": "google/t5-v1_1-base", "seed": 0}, "standard-t5-v1_1-base-seed0"),
        ({"student": "configs/students/toy-t5"}, "configs+students+toy-t5"),
        ({"student": "t5-v1_1-base"}, "_t5-v1_1-base"),
        ({"student": "-a/b"}, "%2da+b"),
        ({"student": "./b"}, "%2e+b"),
        ({"student": "_./b"}, "_.+b"),
        (
            {"method": "step_by_step", "rationales": "shuffled", "rationale_weight": 2.0},
            "step_by_step-shuffled-weight2",
        ),
        ({"method": "single_task", "model.init_args.order": "label_first"}, "single_task-order_label_first"),
        ({"seed": 3, "trainer.max_steps": 10, "model.init_args.lr": 5e-5}, "lr_5e~05-trainer.max_steps_10-seed3"),
        ({"data.class_path": "x", "model.init_args.fast": False}, "class_path_x-fast_false"),
    ],
)
def test_names_by_hand(point: dict[str, Any], name: str) -> None:
    assert cell_name(point) == name


def test_a_long_name_is_cut_and_still_its_own() -> None:
    long = {"student": "a/" + "b" * 300}
    other = {"student": "a/" + "b" * 299 + "c"}
    assert len(cell_name(long)) == len(cell_name(other)) == 120
    assert cell_name(long) != cell_name(other)
