"""Which rows are used, with what became of the others."""

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_distill.data.selection import (
    Selector,
    UsedRows,
    filter_name,
    flags_of,
    hold_out,
    make_filter,
    select_rows,
    subset,
    targets,
    teacher_counts,
    train_rows,
)
from lit_distill.data.store import hashes
from lit_distill.errors import UserError
from lit_distill.tasks import Row, RowFilter, TeacherOutput, tasks_from
from tests.rows import make_row


def rows(count: int) -> list[Row]:
    return [make_row(str(i), f"in {i}", "yes", None, f"because {i}", "yes") for i in range(count)]


def ids(split: Sequence[Row] | UsedRows) -> list[str]:
    return [row.id for row in (split.rows if isinstance(split, UsedRows) else split)]


def held_out(found: Sequence[Row]) -> list[list[Row]]:
    """The rows of train and of val."""
    return [[found[position] for position in part] for part in hold_out(hashes(row.input for row in found))]


@given(st.integers(2, 300))
def test_val_is_a_tenth_rounded_up(count: int) -> None:
    train, val = held_out(rows(count))
    assert len(val) == math.ceil(count / 10)
    assert sorted(ids(train) + ids(val), key=int) == [str(i) for i in range(count)]
    assert ids(train) == sorted(ids(train), key=int)


def test_val_never_moves() -> None:
    # written down once: runs of other years have to be validated on the same rows
    assert ids(held_out(rows(30))[1]) == ["2", "13", "28"]


@given(st.lists(st.integers(0, 20), min_size=2, max_size=200).filter(lambda found: len(set(found)) > 1))
def test_rows_of_one_input_stay_together(inputs: list[int]) -> None:
    train, val = held_out([make_row(str(i), f"in {one}", "yes") for i, one in enumerate(inputs)])
    trained, held = ({row.input for row in part} for part in (train, val))
    assert not trained & held
    assert len(held) == math.ceil(len(set(inputs)) / 10)
    assert sorted(ids(train) + ids(val), key=int) == [str(i) for i in range(len(inputs))]


@pytest.mark.parametrize("count", [0, 1])
def test_val_cannot_be_taken_off_one_row(count: int) -> None:
    with pytest.raises(UserError, match="train has"):
        held_out(rows(count))


@given(
    count=st.integers(1, 200),
    fractions=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)),
    seed=st.integers(0, 2**32 - 1),
)
def test_fractions_are_nested(count: int, fractions: tuple[float, float], seed: int) -> None:
    small, large = (subset(count, fraction, seed).tolist() for fraction in sorted(fractions))
    assert set(small) <= set(large)
    assert len(small) == max(1, round(min(fractions) * count))
    assert subset(count, 1.0, seed).tolist() == list(range(count))


@pytest.mark.parametrize("number", [2, 7, 40])
def test_above_1_it_is_a_number_of_rows(number: int) -> None:
    drawn = subset(40, float(number), 3).tolist()
    assert drawn == subset(40, number / 40, 3).tolist()
    assert len(drawn) == number


def test_more_rows_than_train_has_are_refused() -> None:
    with pytest.raises(UserError, match="train_fraction: 2,500 rows of train, which has 40"):
        subset(40, 2500.0, 0)


GOLD_YES = make_row("a", "in", "yes", None, "because", "yes")
GOLD_NO = make_row("b", "in", "no", None, "hence", "yes")
UNPARSED = replace(make_row("c", "in", "yes"), outputs=(TeacherOutput(None),))
WITHOUT = make_row("c", "in", "yes")
OUTSIDE = make_row("d", "in", "yes", ("yes", "no"), "since", "maybe")
UNLABELLED = make_row("e", "in", None, None, "so", "no")
ROWS = [GOLD_YES, GOLD_NO, UNPARSED, OUTSIDE, UNLABELLED]


def used(*tasks: str, teacher_labels: bool = False, keep: RowFilter | None = None, fraction: float = 1.0) -> UsedRows:
    built = tuple(tasks_from({task: {"prefix": task} for task in tasks}).values())
    return selected(ROWS, Selector(built, teacher_labels, keep), fraction)


LABEL_TASK = tuple(tasks_from(["label"]).values())


def selected(found: Sequence[Row], select: Selector, fraction: float = 1.0) -> UsedRows:
    return train_rows(found, select_rows(found, select, fraction, 0), select)


def test_gold_labels_keep_an_unparsed_row_without_its_rationale() -> None:
    found = used("label", "rationale")
    assert ids(found) == ["a", "b", "c", "d", "e"]
    assert [example.label for example in found.rows] == ["yes", "no", "yes", "yes", None]
    assert found.rows[2].rationale is None


def test_teacher_labels_drop_an_unparsed_row() -> None:
    found = used("label", "rationale", teacher_labels=True)
    assert ids(found) == ["a", "b", "d", "e"]
    assert [example.label for example in found.rows] == ["yes", "yes", "maybe", "no"]
    assert list(found.gold) == ["yes", "no", "yes", None]
    assert found.counts["dropped_without_teacher_label"] == 1


def test_a_teacher_label_counts_whichever_output_has_it() -> None:
    program = TeacherOutput("x + 2", None, kind="program")
    row = Row("a", "in", "yes", outputs=(TeacherOutput(None, "no"), program))
    tasks = tuple(tasks_from({"label": {}, "p": {"prefix": "p", "target": "{rationale}", "kind": "program"}}).values())
    (found,) = selected([row], Selector(tasks, True, None)).rows
    assert found.label == "no"
    assert [[target.text for target in targets(task, found)] for task in tasks] == [["no"], ["x + 2"]]
    swapped = replace(row, outputs=(program, TeacherOutput("because", "no")))
    (found,) = selected([swapped], Selector(tasks, True, None)).rows
    assert found.label == "no"


def test_filter_sees_the_gold_label_and_takes_rationales_only() -> None:
    seen: list[str | None] = []

    def keep(example: Row) -> bool:
        seen.append(example.label)
        return example.teacher_label == example.label

    found = used("label", "rationale", teacher_labels=True, keep=keep)
    assert seen == ["yes", "no", "yes", None]
    assert [example.rationale for example in found.rows] == ["because", None, None, None]
    assert found.counts["rationale_filtered"] == 3


def test_rows_without_any_target_are_dropped_and_counted() -> None:
    found = used("rationale")
    assert ids(found) == ["a", "b", "d", "e"]
    assert found.counts["dropped_without_target"] == 1
    assert used("rationale_label").counts["dropped_without_target"] == 2


@given(
    fraction=st.floats(0.01, 1),
    teacher_labels=st.booleans(),
    tasks=st.sampled_from([("label",), ("rationale",), ("label", "rationale"), ("label_rationale",)]),
)
def test_every_row_is_accounted_for(fraction: float, teacher_labels: bool, tasks: tuple[str, ...]) -> None:
    counts = used(*tasks, teacher_labels=teacher_labels, fraction=fraction).counts
    gone = ("left_out_by_fraction", "dropped_without_teacher_label", "dropped_without_target")
    assert counts["used"] + sum(counts[name] for name in gone) == len(ROWS)


def tally(found: Sequence[Row], label_set: tuple[str, ...] | None = None) -> dict[int, int]:
    return Counter(flags_of(row, str.__eq__, label_set) for row in found)


def test_teacher_counts_by_hand() -> None:
    assert teacher_counts(tally(ROWS, ("yes", "no"))) == {
        "rows": 5,
        "parsed": 4,
        "unparsed": 1,
        "no_output": 0,
        "teacher_correct": 1,
        "outside_label_set": 1,
    }
    assert teacher_counts(tally([WITHOUT, WITHOUT]))["no_output"] == 2


def test_pseudo_labels_are_for_rows_without_a_gold_one() -> None:
    said = [TeacherOutput(f"so {i}", "no", "student") for i in range(40)]
    released = TeacherOutput("because", "maybe", "released")
    found = [Row(str(i), "in", "yes" if i % 4 else None, outputs=(released, said[i])) for i in range(40)]
    drawn = set(subset(40, 0.5, 1).tolist())
    # one of which the student said nothing
    silent = min(set(range(40)) - drawn)
    found[silent] = replace(found[silent], outputs=(released,))
    select = Selector(LABEL_TASK, False, None, pseudo="student")
    used = train_rows(found, select_rows(found, select, 0.5, 1), select)
    for row in used.rows:
        number = int(row.id)
        if number in drawn and number % 4:
            assert (row.label, row.outputs) == ("yes", found[number].outputs)
        else:
            # its own label is not seen, and nor is what other teachers said
            assert (row.label, row.outputs) == ("no", (said[number],))
    assert ids(used) == [str(i) for i in range(40) if i != silent]
    assert used.counts["pseudo_labelled"] == 39 - sum(number % 4 > 0 for number in drawn)
    assert (used.counts["left_out_by_fraction"], used.counts["dropped_without_teacher_label"]) == (0, 1)


def test_a_pseudo_label_has_to_pass_the_filter() -> None:
    def said(label: str, share: float, text: str | None) -> TeacherOutput:
        return TeacherOutput(text, label, "student", columns={"vote_share": share})

    keep = make_filter("(teacher == student and vote_share > 0.5) or (teacher != student and agrees)", operator.eq)
    for text in ("so", None):
        unsure, sure = [said("no", 0.3, text)], [said("no", 0.3, text), said("maybe", 0.7, text)]
        for teacher_labels in (False, True):
            select = Selector(LABEL_TASK, teacher_labels, keep, pseudo="student")
            assert select(Row("a", "in", "yes", outputs=(*unsure,)), False)[:2] == (
                None,
                "dropped_without_teacher_label",
            )
            row, *_ = select(Row("a", "in", "yes", outputs=(*sure,)), teacher_labels)
            assert row is not None
            assert (row.label, row.outputs) == ("maybe", (sure[1],))
    # columns that an output does not bring are known from itself
    own = Row("a", "in", "yes", outputs=(TeacherOutput("a", "yes"), TeacherOutput("b", "no")))
    row, *_ = Selector(LABEL_TASK, False, keep, pseudo="student")(own)
    assert row is not None
    assert [output.text for output in row.outputs] == ["a"]


def only_long(row: Row) -> bool:
    return len(row.rationale or "") > 3


@pytest.mark.parametrize(
    ("rationale_filter", "kept"),
    [
        ("none", ["why", "because"]),
        ("label_agrees", ["because"]),
        ("score > 1 and not bad", ["why"]),
        ("tests.data.test_selection.only_long", ["because"]),
        (only_long, ["because"]),
    ],
)
def test_filters(rationale_filter: str | RowFilter, kept: list[str]) -> None:
    first = TeacherOutput("why", "no", columns={"score": 2, "bad": False})
    row = Row("a", "in", "yes", outputs=(first, TeacherOutput("because", "yes", columns={"score": 0})))
    keep = make_filter(rationale_filter, str.__eq__)
    said = [replace(row, outputs=(output,)) for output in row.outputs]
    assert [one.rationale for one in said if keep is None or keep(one)] == kept
    assert filter_name(only_long) == "tests.data.test_selection.only_long"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such.module", "cannot be imported"),
        ("lit_distill.tasks.nothing", "cannot be imported"),
        ("os._exit", "is not a Python function"),
        ("lit_distill.tasks.Row", "is not a Python function"),
        ("lit_distill.data.selection.hold_out.x", "cannot be imported"),
        ("lit_distill.data.selection.evaluation_rows_of", "cannot be imported"),
        ("lit_distill.data.selection.subset", "does not take one argument"),
    ],
)
def test_a_filter_that_is_none_is_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"rationale_filter: .*{message}.*allowed are none, label_agrees"):
        make_filter(name, str.__eq__)


SEVERAL = Row(
    "r",
    "in",
    "yes",
    outputs=(
        TeacherOutput("a", "no", "A"),
        TeacherOutput("b", "yes", "B"),
        TeacherOutput("c", "yes", "B"),
        TeacherOutput("d", "yes", "B", kind="proof"),
        TeacherOutput(None, "yes", "B"),
    ),
)


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({}, ["a"]),
        ({"select": "all"}, ["a", "b", "c"]),
        ({"select": "sample"}, ["a", "b", "c"]),
        ({"select": "vote"}, ["b"]),
        ({"teacher": "B"}, ["b"]),
        ({"teacher": "B", "kind": "proof"}, ["d"]),
        ({"kind": "none"}, []),
    ],
)
def test_what_a_task_selects(settings: dict[str, Any], texts: list[str]) -> None:
    (task,) = tasks_from({"x": {"target": "{rationale}", **settings}}).values()
    assert [target.text for target in targets(task, SEVERAL)] == texts
    evaluated = targets(task, SEVERAL, evaluation=True)
    assert [target.text for target in evaluated] == texts[:1]


def test_a_target_holds_the_label_of_its_own_output() -> None:
    (both,) = tasks_from({"x": {"target": "{rationale} # {label}", "select": "all"}}).values()
    assert [target.text for target in targets(both, SEVERAL)] == ["a # yes", "b # yes", "c # yes"]
    found = targets(both, SEVERAL, teacher_labels=True)
    assert [(target.text, target.label) for target in found] == [
        ("a # no", "no"),
        ("b # yes", "yes"),
        ("c # yes", "yes"),
    ]
    (label,) = tasks_from({"x": {"select": "vote"}}).values()
    assert [target.text for target in targets(label, SEVERAL, teacher_labels=True)] == ["yes"]
    # the gold label is one target, however many outputs there are
    (gold,) = tasks_from({"x": {"select": "all"}}).values()
    assert [target.text for target in targets(gold, SEVERAL)] == ["yes"]
    # votes without labels elect nobody
    unlabelled = replace(SEVERAL, outputs=(TeacherOutput("a"), TeacherOutput("b")))
    (voting,) = tasks_from({"x": {"target": "{rationale}", "select": "vote"}}).values()
    assert targets(voting, unlabelled) == []
