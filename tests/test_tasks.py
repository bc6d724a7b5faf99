"""Rows, and tasks: what they write, what they read back, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_distill.errors import UserError
from lit_distill.tasks import (
    LABEL,
    LABEL_RATIONALE,
    PRESETS,
    RATIONALE,
    RATIONALE_LABEL,
    Parsed,
    Row,
    Task,
    TeacherOutput,
    answer_task,
    fingerprint,
    tasks_from,
)
from tests.rows import make_row

ROW = Row("r", "Which?", "yes", outputs=(TeacherOutput("Because.", "no", columns={"style": "short", "score": 0.5}),))
OUTPUT = ROW.outputs[0]
SHOUTING = "tests.test_tasks.shout"


def shout(text: str) -> str:
    return text.strip().upper()


def both(text: str) -> Parsed:
    return Parsed("L", "R")


@pytest.mark.parametrize(
    ("task", "target"),
    [
        (LABEL, "yes"),
        (RATIONALE, "Because."),
        (RATIONALE_LABEL, "Because. So the answer is yes"),
        (LABEL_RATIONALE, "yes Rationale: Because."),
        (
            Task(target="{input} {{{style}}} {score}: {label}!", parser=SHOUTING),
            "Which? {short} 0.5: yes!",
        ),
    ],
)
def test_targets_by_hand(task: Task, target: str) -> None:
    assert task.render(ROW, OUTPUT) == target


@pytest.mark.parametrize("target", ["{rationale}", RATIONALE_LABEL.target, "{style}", "{unknown} # {label}"])
def test_a_target_with_an_absent_part_is_none(target: str) -> None:
    task = Task(target=target)
    assert task.render(replace(ROW, label=None), TeacherOutput(None, columns={"style": None})) is None
    assert task.render(ROW) is None


@pytest.mark.parametrize(
    ("task", "text", "label", "rationale"),
    [
        (LABEL, " yes ", "yes", None),
        (RATIONALE, " so it is ", None, "so it is"),
        (RATIONALE_LABEL, "a So the answer is b So the answer is c", "c", "a So the answer is b"),
        (RATIONALE_LABEL, "no mark", "no mark", ""),
        (LABEL_RATIONALE, "c Rationale: a Rationale: b", "c", "a Rationale: b"),
        (LABEL_RATIONALE, "no mark", "no mark", ""),
        (Task(target="Answer: {label}."), "Answer: yes.", "yes", None),
        (Task(target="Answer: {label}."), "yes", "yes", None),
        (Task(target="{rationale} # {label} | {style}"), "a # b | c", "b", "a"),
        (Task(target="{style} | {rationale} | {label}"), "a | b | c", "c", "b"),
        (Task(target="{rationale}", parser=SHOUTING), " so ", "SO", "so"),
        (Task(target="{style}", parser="tests.test_tasks.both"), "x", "L", "R"),
    ],
)
def test_answers_by_hand(task: Task, text: str, label: str | None, rationale: str | None) -> None:
    assert task.read(text) == Parsed(label, rationale)


WORDS = st.text("abc .", min_size=1).map(str.strip)


@given(
    WORDS,
    WORDS,
    st.sampled_from([LABEL, RATIONALE, RATIONALE_LABEL, LABEL_RATIONALE, Task(target="<{rationale}> {label} !")]),
)
def test_a_target_is_read_back(label: str, rationale: str, task: Task) -> None:
    text = task.render(Row("r", "in", label), TeacherOutput(rationale))
    assert text is not None
    expected = Parsed(label if task.gives_label else None, rationale if task.gives_rationale else None)
    assert task.read(text) == expected


@pytest.mark.parametrize(
    ("target", "part", "ends"),
    [
        ("{label}", "yes", False),
        ("{rationale} So the answer is {label}", " So the answer is yes", True),
        ("{label} Rationale: {rationale}", "yes Rationale:", False),
        ("Label: {label}.", "Label: yes.", False),
        ("{rationale} -> {label}.", " -> yes.", True),
    ],
)
def test_what_is_not_cut(target: str, part: str, ends: bool) -> None:
    task = Task(target=target)
    assert (task.label_part("yes"), task.ends_in_label) == (part, ends)


def test_names_are_opaque() -> None:
    tasks = tasks_from({"rationale of a label": {"prefix": "x"}, "why": {"target": "{rationale}", "kind": "proof"}})
    assert tasks["rationale of a label"].render(ROW) == "yes"
    assert not tasks["rationale of a label"].gives_rationale
    assert (tasks["why"].accepts(OUTPUT), tasks["why"].accepts(TeacherOutput("x", kind="proof"))) == (False, True)
    assert replace(tasks["why"], teacher="T").accepts(TeacherOutput("x", teacher="U", kind="proof")) is False


@pytest.mark.parametrize(
    ("value", "prefixes"),
    [
        (["label"], [""]),
        (["label", "rationale"], ["predict: ", "explain: "]),
        ({"label": None, "rationale": {"prefix": "why: "}}, ["", "why: "]),
        ({"x": Task("y", prefix="a")}, ["a"]),
    ],
)
def test_tasks_in_each_form(value: Any, prefixes: list[str]) -> None:
    tasks = tasks_from(value)
    assert [task.prefix for task in tasks.values()] == prefixes
    assert all(task.name == name for name, task in tasks.items())
    assert tasks_from({name: task.plain() for name, task in tasks.items()}) == tasks


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "tasks must be a list"),
        ("label", "tasks must be a list"),
        (["lable"], "tasks must be one of label, rationale, rationale_label, label_rationale, got 'lable'"),
        (["label", "label"], "tasks must have different names, got ['label', 'label']"),
        ({"": {"prefix": "a"}}, "a task's name must be a text"),
        ({"a": {}, "b": {"prefix": " "}}, "a and b both have the prefix"),
        ({"a": {"perfix": "x"}}, "tasks: a: unexpected 'perfix'; allowed are prefix, input"),
        ({"a": 3}, "tasks: a must map prefix, input"),
        ({"a": {"prefix": 3}}, "tasks: a: prefix must be a text, got 3"),
        ({"a": {"select": "best"}}, "tasks: a: select must be one of first, all, sample, vote, got 'best'"),
        ({"a": {"weight": -1}}, "tasks: a: weight must be"),
        ({"a": {"final_weight": -1}}, "tasks: a: final_weight must be at least 0"),
        ({"a": {"max_new_tokens": 0}}, "tasks: a: max_new_tokens must be"),
        ({"a": {"input": "{label}"}}, "tasks: a: input must name {input} or {candidates}"),
        ({"a": {"input": "{rationale}"}}, "tasks: a: input must name {input} or {candidates}"),
        ({"a": {"input": "{input:>9}"}}, "tasks: a: input"),
        ({"a": {"draws": 2}}, "tasks: a: draws is for select: sample, got select: first"),
        ({"a": {"draws": 0, "select": "sample"}}, "tasks: a: draws must be"),
        ({"a": {"after": "b"}}, "tasks: a: after: b needs an input that names {rationale}"),
        (
            {
                "label": {"input": "{input} {rationale} {teacher_label}", "after": "r"},
                "r": {"prefix": "r: ", "target": "{rationale}"},
            },
            "tasks: label: after r, input may name input, rationale, got 'teacher_label'",
        ),
        (
            {"label": {"input": "{input} {rationale}", "after": "why"}, "rationale": {"prefix": "explain: "}},
            "tasks: label: after must name a task that writes a rationale from the input alone (rationale), got 'why'",
        ),
        ({"a": {"target": "yes"}}, "tasks: a: target must name"),
        ({"a": {"target": "{label} {label}"}}, "each once"),
        ({"a": {"target": "{label"}}, "tasks: a: target"),
        ({"a": {"target": "{label:>9}"}}, "tasks: a: target"),
        ({"a": {"target": "{label.x}"}}, "tasks: a: target must name"),
        ({"a": {"target": "{rationale}{label}"}}, "no text between two fields"),
        ({"a": {"parser": "os.getcwd"}}, "tasks: a: parser: 'os.getcwd' is not a Python function"),
        ({"a": {"parser": "no_such.parser"}}, "tasks: a: parser: 'no_such.parser' cannot be imported"),
        ({"a": {"parser": "lit_distill.tasks.nothing"}}, "parser: 'lit_distill.tasks.nothing' cannot be imported"),
    ],
)
def test_what_is_refused(value: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        tasks_from(value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


SAID = TeacherOutput("red", "no", columns={"sure": 2})
ASKED = Row("a", "cat ?", "yes", outputs=(SAID, TeacherOutput("blue"), TeacherOutput("1 + 1", kind="program")))


@pytest.mark.parametrize(
    ("template", "source"),
    [
        ("{input}", "p: cat ?"),
        ("{input} {rationale}", "p: cat ? red"),
        ("{rationale} ({teacher_label}, {sure}) {input}", "p: red (no, 2) cat ?"),
        ("{input} {candidates}", "p: cat ? (1) red So the answer is no\n(2) blue So the answer is unknown"),
    ],
)
def test_the_input_of_an_output(template: str, source: str) -> None:
    task = Task("t", "p: ", template)
    assert task.source(ASKED, SAID) == source
    assert task.render(ASKED, SAID) == "yes"
    assert task.uses_output is task.reads_output is (template != "{input}")


def test_an_input_without_an_output_lacks_what_it_says() -> None:
    task, bare = Task("t", "p: ", "{input} because {rationale}"), Row("a", "cat ?", "yes")
    assert task.source(bare) == "p: cat ? because"
    # in training there is no target then
    assert task.render(bare) is None


def test_the_teachers_label_is_a_field_of_targets() -> None:
    task = Task("t", target="{teacher_label}")
    assert task.render(ASKED, SAID) == "no"
    assert task.render(ASKED, TeacherOutput("blue")) is None
    assert (task.uses_output, task.gives_label, task.scores_labels) == (True, False, False)


def test_the_task_that_answers() -> None:
    assert answer_task(tasks_from({"rationale_label": {"prefix": "a"}, "label": {}})).name == "rationale_label"
    assert answer_task(tasks_from({"why": {"target": "{rationale}", "prefix": "b"}, "x": {}})).name == "x"
    with pytest.raises(UserError, match=r"tasks: none of why gives a label"):
        answer_task(tasks_from({"why": {"target": "{rationale}"}}))


def test_a_row_speaks_of_its_first_output() -> None:
    row = Row("a", "in", "yes", outputs=(TeacherOutput("so", "no", columns={"x": 1}), TeacherOutput("or", "yes")))
    assert (row.rationale, row.teacher_label, row.columns) == ("so", "no", {"x": 1})
    bare = Row("a", "in", "yes")
    assert (bare.rationale, bare.teacher_label, bare.columns) == (None, None, {})


def test_a_fingerprint_tells_rows_apart() -> None:
    rows = [make_row("a", "in", "yes", rationale="so"), make_row("b", "in", "no")]
    others = [rows[::-1], rows[:1], [rows[0], make_row("b", "in", "yes")], [rows[0], make_row("b", "on", "no")]]
    assert len({fingerprint(rows), *map(fingerprint, others)}) == 5
    said = [make_row("a", "in", "yes", rationale="or"), rows[1]]
    assert fingerprint(said) == fingerprint(rows)
    assert fingerprint(said, rationales=True) != fingerprint(rows, rationales=True)


def test_lengths_are_given_or_configured_or_known_or_usual() -> None:
    label, rationale, both = (PRESETS[name] for name in ("label", "rationale", "rationale_label"))
    assert [task.max_length() for task in (label, rationale, both)] == [64, 256, 320]
    assert [task.max_length(5, 7) for task in (label, rationale, both)] == [5, 7, 12]
    assert [task.max_length(5, known=9) for task in (label, rationale, both)] == [5, 9, 14]
    assert [task.max_length(known=9) for task in (label, rationale, both)] == [9, 9, 9]
    assert Task("own", max_new_tokens=3).max_length(5, 7, 9) == 3
